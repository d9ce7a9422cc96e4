"""Every check of the operands of the operations in Python; indices are checked natively, when a pattern is made."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsenet.functional.native import ACTIVATIONS, DTYPES, rows_of

BLOCK_SIZES = (1, 4, 8, 16, 32, 64, 128)


def check_dtype(name: str, argument: str, tensor: Tensor) -> None:
    """Raises where the kernels do not serve a dtype, or memory that is not strided."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: {argument} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: {argument} must be an ordinary dense tensor, got {kind}")


def fits(x: Tensor, values: Tensor, pattern, bias: Tensor | None, activation: str) -> bool:
    """Whether eager operands are as :func:`check_linear` demands, at a fraction of its time."""
    dtype, device = x.dtype, pattern.device
    return (
        x.dim() > 0
        and x.shape[-1] == pattern.shape[1]
        and values.shape == pattern.values_shape
        and dtype in DTYPES
        and values.dtype is dtype
        and x.device == device
        and values.device == device
        and (bias is None or (bias.shape == pattern.bias_shape and bias.dtype is dtype and bias.device == device))
        and activation in ACTIVATIONS
    )


def check_linear(x: Tensor, values: Tensor, pattern, bias: Tensor | None, activation: str) -> None:
    """Raises what is wrong with the operands of block_sparse_linear; traceable."""
    name = "block_sparse_linear"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a torch.Tensor, got {type(x).__name__}")
    check_dtype(name, "x", x)
    out_features, in_features = pattern.shape
    b = pattern.block_size
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"{name}: x must have {in_features} columns, got {list(x.shape)}")
    n = pattern.col.shape[0]  # not num_blocks: torch.compile takes a tensor's size as dynamic, an attribute as constant
    if values.dim() != 3 or values.shape[0] != n or values.shape[1] != b or values.shape[2] != b:
        raise ValueError(f"{name}: values must have shape {[n, b, b]}, got {list(values.shape)}")
    if values.dtype != x.dtype:
        raise TypeError(f"{name}: values must have the dtype of x, {x.dtype}, got {values.dtype}")
    if values.device != x.device or (pattern.col.device != x.device and not x.is_meta):
        other = values.device if values.device != x.device else pattern.col.device
        raise ValueError(f"{name}: values and pattern must be on the device of x, {x.device}, got {other}")
    if bias is not None:
        if bias.dim() != 1 or bias.shape[0] != out_features:
            raise ValueError(f"{name}: bias must have shape [{out_features}], got {list(bias.shape)}")
        if bias.dtype != x.dtype:
            raise TypeError(f"{name}: bias must have the dtype of x, {x.dtype}, got {bias.dtype}")
        if bias.device != x.device:
            raise ValueError(f"{name}: bias must be on the device of x, {x.device}, got {bias.device}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")


def check_gradient_operands(name: str, x: Tensor, grad_output: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Both operands as 2-D rows of the same length and dtype."""
    check_dtype(name, "x", x)
    if grad_output.dtype != x.dtype:
        raise TypeError(f"{name}: grad_output must have the dtype of x, {x.dtype}, got {grad_output.dtype}")
    if grad_output.device != x.device:
        raise ValueError(f"{name}: grad_output must be on the device of x, {x.device}, got {grad_output.device}")
    if x.dim() < 2 or grad_output.dim() < 2 or x.shape[:-1] != grad_output.shape[:-1]:
        raise ValueError(
            f"{name}: x and grad_output must have the same leading sizes, "
            f"got {list(x.shape)} and {list(grad_output.shape)}"
        )
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"{name}: block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size}")
    return rows_of(x.detach(), x.shape[-1]), rows_of(grad_output.detach(), grad_output.shape[-1])
