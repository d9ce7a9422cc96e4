"""sparsenet: sparse training for PyTorch, with weights, gradients and optimizer state only where they are active."""

import sys
from importlib import import_module

if sys.version_info < (3, 10):  # noqa: UP036 - one clear line instead of a syntax error
    raise ImportError(f"sparsenet needs Python 3.10 or newer, this is {sys.version.split()[0]}")

import torch  # noqa: F401 - first: its OpenMP runtime is the one the kernels share

from sparsenet import distributed, elements, functional, reference
from sparsenet.elements import NM
from sparsenet.functional import library
from sparsenet.functional.build import build_info
from sparsenet.layers import SparseLinear
from sparsenet.models import SparseMLP, densify_, sparsify_
from sparsenet.pattern import BlockPattern
from sparsenet.policies import (
    ACDC,
    GMP,
    MEST,
    OBD,
    SET,
    SNFS,
    SNIP,
    Cascade,
    Fisher,
    GraNet,
    GraSP,
    Movement,
    Policy,
    Random,
    RigL,
    Static,
    SynFlow,
    Taylor,
    TopKAST,
    WoodFisher,
)
from sparsenet.schedules import Constant, Cosine, Cubic, Exponential, Linear, OneShot, Periodic, Piecewise, Polynomial
from sparsenet.sparsifier import LayerUpdate, Sparsifier, Update
from sparsenet.swapping import SparsifyReport

__version__ = functional.native_build_info()["version"]

_NAMES_OF = {  # modules that are loaded when one of their names is first used
    "sparsenet.architecture.compactor": ("Compactor",),
    "sparsenet.architecture.folding": ("fold_depth",),
    "sparsenet.architecture.growth": ("Grower",),
    "sparsenet.architecture.gates": ("TriStateReLU", "architecture_penalty"),
    "sparsenet.checkpoint": ("Checkpoint", "load", "save"),
    "sparsenet.compaction": ("CompactionError", "CompactionReport", "compact", "resize_to"),
    "sparsenet.compaction.cutting": ("reblock_",),
    "sparsenet.compaction.gathering": ("GatherReport", "gather_units"),
    "sparsenet.memory": ("BudgetError", "MemoryBudget", "MemoryPlan", "measure_peak", "plan"),
    "sparsenet.training": ("Evaluation", "Examples", "FitResult", "TrainConfig", "Trainer", "prune_at_initialization"),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}
_PACKAGES = ("architecture", "checkpoint", "compaction", "data", "memory", "training")  # likewise


def __getattr__(name: str):
    if name in _PACKAGES:
        return import_module(f"sparsenet.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sparsenet' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, *_PACKAGES})


__all__ = [
    "ACDC",
    "GMP",
    "MEST",
    "NM",
    "OBD",
    "SET",
    "SNFS",
    "SNIP",
    "BlockPattern",
    "BudgetError",
    "Cascade",
    "Checkpoint",
    "CompactionError",
    "CompactionReport",
    "Compactor",
    "Constant",
    "Cosine",
    "Cubic",
    "Evaluation",
    "Examples",
    "Exponential",
    "Fisher",
    "FitResult",
    "GatherReport",
    "GraNet",
    "GraSP",
    "Grower",
    "LayerUpdate",
    "Linear",
    "MemoryBudget",
    "MemoryPlan",
    "Movement",
    "OneShot",
    "Periodic",
    "Piecewise",
    "Policy",
    "Polynomial",
    "Random",
    "RigL",
    "SparseLinear",
    "SparseMLP",
    "Sparsifier",
    "SparsifyReport",
    "Static",
    "SynFlow",
    "Taylor",
    "TopKAST",
    "TrainConfig",
    "Trainer",
    "TriStateReLU",
    "Update",
    "WoodFisher",
    "architecture",
    "architecture_penalty",
    "build_info",
    "compact",
    "data",
    "densify_",
    "distributed",
    "elements",
    "fold_depth",
    "functional",
    "gather_units",
    "library",
    "load",
    "measure_peak",
    "plan",
    "prune_at_initialization",
    "reblock_",
    "reference",
    "resize_to",
    "save",
    "sparsify_",
]
