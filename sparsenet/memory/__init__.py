"""Budgets in bytes: named, predicted, planned, measured."""

from sparsenet.limits import MemoryBudget, available_bytes, format_bytes
from sparsenet.memory.budget import measure_peak, release_freed_memory
from sparsenet.memory.network import StepBytes, step_bytes
from sparsenet.memory.planning import BudgetError, MemoryPlan, plan

__all__ = [
    "BudgetError",
    "MemoryBudget",
    "MemoryPlan",
    "StepBytes",
    "available_bytes",
    "format_bytes",
    "measure_peak",
    "plan",
    "release_freed_memory",
    "step_bytes",
]
