"""Compaction: units that died leave a network, its optimizer and every consumer, and what is left is re-blocked."""

from sparsenet.compaction.compacting import CompactionReport, compact
from sparsenet.compaction.graph import CompactionError
from sparsenet.compaction.history import Interval
from sparsenet.compaction.resize import resize_to

__all__ = ["CompactionError", "CompactionReport", "Interval", "compact", "resize_to"]
