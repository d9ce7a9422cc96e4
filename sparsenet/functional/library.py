"""The operations registered with ``torch.library``: torch.compile, torch.export, fake tensors and functorch see these.

The kernels are those of :mod:`sparsenet.functional`. Index tensors that no BlockPattern owns (an
exported program's constants, a direct caller's) are validated at every call.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sparsenet.functional import registry
from sparsenet.functional.autograd import backward, forward, library_backward, save_for_library_backward
from sparsenet.functional.checks import check_linear, refuse_onnx
from sparsenet.functional.native import NEEDS_PRE_ACTIVATION, storage_lock


def _together(values: Tensor, crow: Tensor, col: Tensor, shape: tuple[int, int], block_size: int):
    """The memory of ``values`` and the pattern behind the indices, unless a rewire has separated them."""
    with storage_lock:
        data = values.detach()
        registry.refuse_retired(col)
    return data, registry.pattern_behind(crow, col, shape, block_size)


@torch.library.custom_op("sparsenet::block_sparse_linear", mutates_args=())
def _linear_op(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    crow: Tensor,
    col: Tensor,
    out_features: int,
    in_features: int,
    block_size: int,
    activation: str,
) -> tuple[Tensor, Tensor]:
    values, pattern = _together(values, crow, col, (out_features, in_features), block_size)
    check_linear(x, values, pattern, bias, activation)
    y, pre = forward(x, values, bias, pattern, activation, keep=True)
    return y, x.new_empty(0) if pre is None else pre


@_linear_op.register_fake
def _(x, values, bias, crow, col, out_features, in_features, block_size, activation):
    refuse_onnx()
    y = x.new_empty((*x.shape[:-1], out_features))
    return y, torch.empty_like(y) if activation in NEEDS_PRE_ACTIVATION else x.new_empty(0)


@torch.library.custom_op("sparsenet::block_sparse_linear_backward", mutates_args=())
def _linear_backward_op(
    grad_y: Tensor,
    saved: Tensor,
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    out_features: int,
    in_features: int,
    block_size: int,
    activation: str,
    need_x: bool,
    need_values: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    values, pattern = _together(values, crow, col, (out_features, in_features), block_size)
    check_linear(x, values, pattern, None, activation)
    kept = None if activation == "none" else saved
    for name, tensor in (("grad_y", grad_y), ("saved", kept)):
        expected = (*x.shape[:-1], out_features)
        if tensor is not None and (tensor.shape != expected or tensor.dtype != x.dtype):
            raise ValueError(
                f"block_sparse_linear: {name} must be {x.dtype} {list(expected)}, "
                f"got {tensor.dtype} {list(tensor.shape)}"
            )
    wanted = (need_x, need_values, need_bias)
    grads = backward(grad_y, kept, x, values, pattern, registry.topology_of(pattern), activation, wanted)
    return tuple(x.new_empty(0) if g is None else g for g in grads)


@_linear_backward_op.register_fake
def _(
    grad_y,
    saved,
    x,
    values,
    crow,
    col,
    out_features,
    in_features,
    block_size,
    activation,
    need_x,
    need_values,
    need_bias,
):
    empty = x.new_empty(0)
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else empty,
        torch.empty(values.shape, dtype=x.dtype, device=x.device) if need_values else empty.clone(),
        x.new_empty(out_features) if need_bias else empty.clone(),
    )


_linear_op.register_autograd(library_backward, setup_context=save_for_library_backward)


@_linear_op.register_vmap
def _(info, in_dims, x, values, bias, crow, col, out_features, in_features, block_size, activation):
    if any(d is not None for d in in_dims[1:5]):
        raise RuntimeError("block_sparse_linear: vmap runs over x only; values, bias and pattern must not be batched")
    x = x.movedim(in_dims[0], 0)
    y, pre = torch.ops.sparsenet.block_sparse_linear(
        x, values, bias, crow, col, out_features, in_features, block_size, activation
    )
    return (y, pre), (0, 0 if activation in NEEDS_PRE_ACTIVATION else None)


@_linear_backward_op.register_vmap
def _(info, in_dims, grad_y, saved, x, values, *rest):
    """Gradients of each sample: one call of the operation per sample."""
    if any(d is not None for d in in_dims[3:]):
        raise RuntimeError("block_sparse_linear: vmap runs over x only; values, bias and pattern must not be batched")

    def sample(tensor: Tensor, dim: int | None, i: int) -> Tensor:
        return tensor if dim is None else tensor.select(dim, i)

    tensors = tuple(zip((grad_y, saved, x), in_dims[:3], strict=True))
    grads = [
        torch.ops.sparsenet.block_sparse_linear_backward(*(sample(t, d, i) for t, d in tensors), values, *rest)
        for i in range(info.batch_size)
    ]
    return tuple(torch.stack(g) for g in zip(*grads, strict=True)), (0, 0, 0)


@register_flop_formula(torch.ops.sparsenet.block_sparse_linear)
def _linear_flops(x_shape, values_shape, *_, **__) -> int:
    """A multiplication and an addition per active weight and row."""
    return 2 * math.prod(x_shape[:-1]) * math.prod(values_shape)


@register_flop_formula(torch.ops.sparsenet.block_sparse_linear_backward)
def _linear_backward_flops(grad_shape, _saved, _x, values_shape, *rest, **__) -> int:
    """The same for each of grad_x and grad_values that is wanted."""
    need_x, need_values = rest[6:8]
    return 2 * math.prod(grad_shape[:-1]) * math.prod(values_shape) * (need_x + need_values)


# The number of blocks changes with the density: torch.compile must take it as dynamic from the start, though values is
# a Parameter, whose sizes it takes as constant.
if hasattr(torch.compiler.config, "dynamic_sources"):
    _names = [torch.compiler.config.dynamic_sources, r".*\._parameters\['values'\]:0", r".*\.topology\.pattern\.col:0"]
    torch.compiler.config.dynamic_sources = ",".join(filter(None, _names))
