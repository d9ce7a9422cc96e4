"""Compaction: units that died leave a network, its optimizer and every consumer, and what is left is re-blocked.

Gathering moves hidden units without removing any, so that weights that matter stand in few blocks.
"""

from sparsenet.compaction.compacting import CompactionReport, compact
from sparsenet.compaction.cutting import reblock_
from sparsenet.compaction.gathering import GatherReport, gather_units
from sparsenet.compaction.graph import CompactionError
from sparsenet.compaction.history import Interval
from sparsenet.compaction.resize import resize_to

__all__ = [
    "CompactionError",
    "CompactionReport",
    "GatherReport",
    "Interval",
    "compact",
    "gather_units",
    "reblock_",
    "resize_to",
]
