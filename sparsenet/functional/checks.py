"""Every check of the operands of the operations in Python; indices are checked natively, when a pattern is made."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsenet.functional.native import ACTIVATIONS, DTYPES, rows_of
from sparsenet.schedules import number_of

_STRIDED = torch.strided
_NOT_SERVED = ("DTensor", "MaskedTensor")  # the operation has no rule for them, nor can it read their memory
BLOCK_SIZES = (1, 4, 8, 16, 32, 64, 128)


def as_tensor(name: str, argument: str, value) -> Tensor:
    """``value`` as a tensor: itself, or what a NumPy array or lists of numbers hold, on the CPU."""
    if isinstance(value, Tensor):
        return value
    try:
        if isinstance(value, np.ndarray):  # any strides and byte order, and memory that may not be written
            value = np.array(value, value.dtype.newbyteorder("="), order="C")
        return torch.as_tensor(value, device="cpu")  # whatever the default device
    except (TypeError, ValueError, RuntimeError):
        kind = type(value).__name__
        raise TypeError(f"{name}: {argument} must be a tensor, an array or lists of numbers, got {kind}") from None


def check_block_size(name: str, block_size) -> int:
    """``block_size`` as a Python int."""
    number = number_of(block_size)
    if not isinstance(number, int) or number not in BLOCK_SIZES:
        raise ValueError(f"{name}: block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, got {block_size!r}")
    return number


def check_dtype(name: str, argument: str, tensor: Tensor) -> None:
    """Raises where the kernels do not serve a dtype, or memory that is not strided."""
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: {argument} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else tensor.layout
        raise TypeError(f"{name}: {argument} must be an ordinary dense tensor, got {kind}")


def check_dense(name: str, argument: str, tensor: Tensor) -> None:
    """The same for an operand whose memory is read here, so no wrapper without memory of its own either."""
    check_dtype(name, argument, tensor)
    if type(tensor).__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:
        raise TypeError(f"{name}: {argument} must be an ordinary dense tensor, got {type(tensor).__name__}")


def check_activation(name: str, activation: str) -> str:
    """Raises unless ``activation`` is one that the kernels fuse."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    return activation


def refuse_tracing(name: str) -> None:
    """Raises where a graph is being recorded that would hold the memory an operation fills, and not the operation."""
    modes = torch._C._TorchDispatchModeKey
    if torch._C._get_tracing_state() is not None or any(
        torch._C._get_dispatch_mode(mode) is not None for mode in (modes.PROXY, modes.FAKE)
    ):
        raise RuntimeError(f"{name}: cannot be traced; call it outside torch.jit.trace, make_fx and fake tensors")


def refuse_onnx() -> None:
    """Raises while a model is exported to ONNX, by either of torch's exporters."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "block_sparse_linear: ONNX has no operation for it; export a dense copy, "
            "sparsenet.densify_(copy.deepcopy(model))"
        )


def fits(x: Tensor, values: Tensor, pattern, bias: Tensor | None, activation: str) -> bool:
    """Whether eager operands are as :func:`check_linear` demands, at a fraction of its time."""
    dtype, device = x.dtype, pattern.device
    try:
        return (
            x.layout is _STRIDED
            and values.layout is _STRIDED
            and x.dim() > 0
            and x.shape[-1] == pattern.shape[1]
            and values.shape == pattern.values_shape
            and dtype in DTYPES
            and values.dtype is dtype
            and x.device == device
            and values.device == device
            and activation in ACTIVATIONS
            and (
                bias is None
                or (
                    bias.layout is _STRIDED
                    and bias.shape == pattern.bias_shape
                    and bias.dtype is dtype
                    and bias.device == device
                )
            )
        )
    except RuntimeError:  # nested tensors have no shape
        return False


def check_linear(x: Tensor, values: Tensor, pattern, bias: Tensor | None, activation: str) -> None:
    """Raises what is wrong with the operands of block_sparse_linear; traceable."""
    name = "block_sparse_linear"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a torch.Tensor, got {type(x).__name__}")
    for argument, t in (("x", x), ("values", values), ("bias", bias)):
        if t is not None and type(t).__name__ in _NOT_SERVED:
            raise TypeError(f"{name}: {argument} must be an ordinary dense tensor, got {type(t).__name__}")
        if t is not None and (argument == "x" or t.is_nested or t.layout is not torch.strided):
            check_dtype(name, argument, t)
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
    check_activation(name, activation)


def check_gradient_operands(name: str, x: Tensor, grad_output: Tensor, block_size: int) -> tuple[Tensor, Tensor, int]:
    """Both operands as 2-D rows of the same length and dtype, and the block size as a Python int."""
    refuse_tracing(name)
    x, grad_output = as_tensor(name, "x", x), as_tensor(name, "grad_output", grad_output)
    check_dense(name, "x", x)
    if grad_output.dtype != x.dtype:
        raise TypeError(f"{name}: grad_output must have the dtype of x, {x.dtype}, got {grad_output.dtype}")
    check_dense(name, "grad_output", grad_output)
    if grad_output.device != x.device:
        raise ValueError(f"{name}: grad_output must be on the device of x, {x.device}, got {grad_output.device}")
    if x.dim() < 2 or grad_output.dim() < 2 or x.shape[:-1] != grad_output.shape[:-1]:
        raise ValueError(
            f"{name}: x and grad_output must have the same leading sizes, "
            f"got {list(x.shape)} and {list(grad_output.shape)}"
        )
    size = check_block_size(name, block_size)
    return rows_of(x.detach(), x.shape[-1]), rows_of(grad_output.detach(), grad_output.shape[-1]), size
