"""Budgets in bytes: named, predicted, planned, measured."""

from sparsenet.limits import MemoryBudget, available_bytes, format_bytes
from sparsenet.memory.budget import measure_peak, release_freed_memory
from sparsenet.memory.costs import LayerCost, layer_costs
from sparsenet.memory.measured_times import MeasuredTimes
from sparsenet.memory.network import StepBytes, step_bytes
from sparsenet.memory.planning import BudgetError, MemoryPlan, plan
from sparsenet.memory.spreading import equal_time
from sparsenet.memory.step_time import StepTimeModel

__all__ = [
    "BudgetError",
    "LayerCost",
    "MeasuredTimes",
    "MemoryBudget",
    "MemoryPlan",
    "StepBytes",
    "StepTimeModel",
    "available_bytes",
    "equal_time",
    "format_bytes",
    "layer_costs",
    "measure_peak",
    "plan",
    "release_freed_memory",
    "step_bytes",
]
