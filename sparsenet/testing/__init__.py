"""Checks to be run by users: of the operations on their machine, and of policies of their own.

``python -m sparsenet.testing`` checks every operation; ``python -m sparsenet.testing --policies FILE`` writes the table
of :func:`conformance_table`.
"""

from sparsenet.testing.conformance import PROPERTIES, ConformanceReport, check_policy
from sparsenet.testing.operations import BATCHES as BATCHES
from sparsenet.testing.operations import DTYPES as DTYPES
from sparsenet.testing.operations import PATTERN_KINDS as PATTERN_KINDS
from sparsenet.testing.operations import SHAPES as SHAPES
from sparsenet.testing.operations import (
    LinearCase,
    check_candidates,
    check_linear,
    check_norms,
    linear_cases,
    self_test,
    tolerance,
)
from sparsenet.testing.operations import assert_within as assert_within
from sparsenet.testing.operations import blocks_of as blocks_of
from sparsenet.testing.operations import dense_weight as dense_weight
from sparsenet.testing.operations import pattern_of_kind as pattern_of_kind
from sparsenet.testing.operations import unit_roundoff as unit_roundoff
from sparsenet.testing.table import conformance_table

__all__ = [
    "PROPERTIES",
    "ConformanceReport",
    "LinearCase",
    "check_candidates",
    "check_linear",
    "check_norms",
    "check_policy",
    "conformance_table",
    "linear_cases",
    "self_test",
    "tolerance",
]
