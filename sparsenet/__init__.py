"""sparsenet: sparse training for PyTorch, with weights, gradients and optimizer state only where they are active."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - one clear line instead of a syntax error
    raise ImportError(f"sparsenet needs Python 3.10 or newer, this is {sys.version.split()[0]}")

import torch  # first: its OpenMP runtime is the one the kernels share

from sparsenet import architecture, data, distributed, functional, reference
from sparsenet.architecture.folding import fold_depth
from sparsenet.architecture.gates import TriStateReLU, architecture_penalty
from sparsenet.checkpoint import Checkpoint, load, save
from sparsenet.compaction import CompactionError, CompactionReport, Compactor, compact, resize_to
from sparsenet.functional import library
from sparsenet.layers import SparseLinear, densify_, sparsify_
from sparsenet.memory import BudgetError, MemoryBudget, MemoryPlan, measure_peak, plan
from sparsenet.models import SparseMLP
from sparsenet.pattern import BlockPattern
from sparsenet.policies import GMP, SET, Policy, RigL, Static
from sparsenet.schedules import Constant, Cosine, Cubic, Exponential, Linear, Piecewise, Polynomial
from sparsenet.sparsifier import LayerUpdate, Sparsifier, Update
from sparsenet.training import Evaluation, Examples, FitResult, TrainConfig, Trainer

__version__ = functional.native_build_info()["version"]


def build_info() -> dict:
    """Version, instruction set in use and available, CUDA architectures built, torch and CUDA seen, threads.

    Example:
        >>> import sparsenet as sn
        >>> info = sn.build_info()
        >>> info["version"] == sn.__version__, info["threads"] >= 1
        (True, True)
    """
    return {
        **functional.native_build_info(),
        "torch": torch.__version__,
        "cuda_available": torch.cuda.is_available(),
        "threads": torch.get_num_threads(),
    }


__all__ = [
    "GMP",
    "SET",
    "BlockPattern",
    "BudgetError",
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
    "FitResult",
    "LayerUpdate",
    "Linear",
    "MemoryBudget",
    "MemoryPlan",
    "Piecewise",
    "Policy",
    "Polynomial",
    "RigL",
    "SparseLinear",
    "SparseMLP",
    "Sparsifier",
    "Static",
    "TrainConfig",
    "Trainer",
    "TriStateReLU",
    "Update",
    "architecture",
    "architecture_penalty",
    "build_info",
    "compact",
    "data",
    "densify_",
    "distributed",
    "fold_depth",
    "functional",
    "library",
    "load",
    "measure_peak",
    "plan",
    "reference",
    "resize_to",
    "save",
    "sparsify_",
]
