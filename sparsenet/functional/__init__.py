"""The operations on block-sparse matrices, differentiable and compilable; only this package calls the native module."""

from sparsenet.functional import library
from sparsenet.functional.autograd import block_sparse_linear, layer_linear
from sparsenet.functional.blocks import compact_blocks, draw_free_places, select_extreme
from sparsenet.functional.checks import BLOCK_SIZES
from sparsenet.functional.coverage import largest_reaching_all, lowest_to_spare
from sparsenet.functional.gradients import block_gradient_squared_norms, candidate_gradients
from sparsenet.functional.native import (
    ACTIVATIONS,
    linear_workspace,
    native_build_info,
    norms_workspace,
    trim_workspace,
    workspace_bytes,
)
from sparsenet.functional.registry import StaleTopologyError

__all__ = [
    "ACTIVATIONS",
    "BLOCK_SIZES",
    "StaleTopologyError",
    "block_gradient_squared_norms",
    "block_sparse_linear",
    "candidate_gradients",
    "compact_blocks",
    "draw_free_places",
    "largest_reaching_all",
    "layer_linear",
    "library",
    "linear_workspace",
    "lowest_to_spare",
    "native_build_info",
    "norms_workspace",
    "select_extreme",
    "trim_workspace",
    "workspace_bytes",
]
