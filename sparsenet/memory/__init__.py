"""Budgets in bytes: named, predicted, planned, measured."""

from sparsenet.memory.budget import (
    MemoryBudget,
    available_bytes,
    format_bytes,
    measure_peak,
    release_freed_memory,
)
from sparsenet.memory.planning import BudgetError, MemoryPlan, plan

__all__ = [
    "BudgetError",
    "MemoryBudget",
    "MemoryPlan",
    "available_bytes",
    "format_bytes",
    "measure_peak",
    "plan",
    "release_freed_memory",
]
