"""Compaction: values and two moments of what is left of a layer that loses a quarter of its units."""

import pytest

from sparsenet.benchmark.cases import Case
from sparsenet.benchmark.operations import compact_trial


@pytest.mark.parametrize("density", [0.01, 0.1])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_remove_units(contest, block_size, density):
    contest(compact_trial("remove_units", Case(density=density, block_size=block_size)))
