"""Amounts of memory: naming them, what this process may still take, and what a forward pass keeps for its backward."""

from sparsenet.limits.amounts import MemoryBudget, format_bytes
from sparsenet.limits.process import Limit, available_bytes, is_out_of_memory, process_limit, release_heap
from sparsenet.limits.saved import SavedBytes

__all__ = [
    "Limit",
    "MemoryBudget",
    "SavedBytes",
    "available_bytes",
    "format_bytes",
    "is_out_of_memory",
    "process_limit",
    "release_heap",
]
