"""The operations on block-sparse matrices, differentiable and compilable; only this file talks to the native module.

Eager calls on plain tensors go straight to the kernels through one ``autograd.Function`` per operation. Tracing
(``torch.compile``, ``torch.export``), fake tensors and functorch transforms go through the same kernels registered with
``torch.library`` (:mod:`sparsenet.library`).
Kernels read indices only from memory that a :class:`PatternIndex` validated and owns.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

try:
    from sparsenet import _C
except ImportError as error:  # pragma: no cover - exercised by a child process in the tests
    raise ImportError(
        f"sparsenet: the native module is missing or does not load ({error}); build it: pip install --force-reinstall ."
    ) from error


__all__ = ["block_gradient_squared_norms", "block_sparse_linear", "candidate_gradients"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "silu": 3}
NEEDS_PRE_ACTIVATION = ("gelu", "silu")
_PLAIN = (Tensor, torch.nn.Parameter)

Observer = Callable[[Tensor, Tensor], None]


class StaleTopologyError(RuntimeError):
    """The pattern was replaced by a rewire: values and indices no longer belong together."""


class PatternIndex:
    """The validated indices of one pattern, as the operations read them.

    Args:
        crow: int32 [block rows + 1], row pointers. Copied.
        col: int32 [num_blocks], block columns, ascending in a row. Copied.
        shape: ``(out, in)``, elements.
        block_size: 1, 4, 8, 16, 32, 64 or 128.

    Raises:
        ValueError: an index is out of range, unsorted or duplicated, or the pointers contradict each other.

    Attributes:
        retired: set when a rewire replaced this pattern; a backward that still needs it raises.
        observer: called in backward with ``(x, grad_output before the activation)``, both 2-D; see the Sparsifier.
    """

    def __init__(self, crow: Tensor, col: Tensor, shape: tuple[int, int], block_size: int):
        self.native = _C.Pattern(crow.numpy(force=True), col.numpy(force=True), *shape, block_size)
        self.shape = shape
        self.block_size = block_size
        self.num_blocks = col.numel()
        self.crow = crow.clone()
        self.col = col.clone()
        self.retired = False
        self.observer: Observer | None = None
        self.label = "block_sparse_linear"
        _INDEX_OF_COL[self.col] = weakref.ref(self)

    def to(self, device: torch.device | str) -> PatternIndex:
        """The same indices with tensors on ``device``; itself when they are there already."""
        device = torch.device(device)
        if self.col.device == device or (self.col.device.type == device.type and device.index is None):
            return self
        return PatternIndex(self.crow.to(device), self.col.to(device), self.shape, self.block_size)

    def row_indices(self) -> Tensor:
        """int32 [num_blocks]: the block row of each block."""
        return torch.from_numpy(self.native.row).to(self.col.device)

    def raise_retired(self) -> None:
        """Raises the error of a stale forward or backward."""
        raise StaleTopologyError(f"{self.label}: the layer was rewired since this forward; run the forward again")


# Finds the index behind the tensors that a compiled graph passes; the tensors are private to their PatternIndex.
_INDEX_OF_COL = WeakTensorKeyDictionary()


def index_from(crow: Tensor, col: Tensor, shape: tuple[int, int], block_size: int) -> PatternIndex:
    """The PatternIndex that owns ``col``, else a new, validated one (exported programs, direct callers)."""
    found = _INDEX_OF_COL.get(col)
    index = found() if found is not None else None
    if index is None or index.shape != shape or index.block_size != block_size:
        index = PatternIndex(crow, col, shape, block_size)
    return index


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_dtype(name: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: {argument} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_linear(x: Tensor, values: Tensor, index: PatternIndex, bias: Tensor | None, activation: str) -> None:
    name = "block_sparse_linear"
    _check_dtype(name, "x", x)
    out_features, in_features = index.shape
    b = index.block_size
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"{name}: x must have {in_features} columns, got {list(x.shape)}")
    if values.dim() != 3 or values.shape[0] != index.num_blocks or values.shape[1] != b or values.shape[2] != b:
        raise ValueError(f"{name}: values must have shape {[index.num_blocks, b, b]}, got {list(values.shape)}")
    if values.dtype != x.dtype:
        raise TypeError(f"{name}: values must have the dtype of x, {x.dtype}, got {values.dtype}")
    if values.device != x.device or index.col.device != x.device:
        other = values.device if values.device != x.device else index.col.device
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


def _check_gradient_operands(name: str, x: Tensor, grad_output: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """Both operands as 2-D rows of the same length and dtype."""
    _check_dtype(name, "x", x)
    if grad_output.dtype != x.dtype:
        raise TypeError(f"{name}: grad_output must have the dtype of x, {x.dtype}, got {grad_output.dtype}")
    if grad_output.device != x.device:
        raise ValueError(f"{name}: grad_output must be on the device of x, {x.device}, got {grad_output.device}")
    if x.dim() < 2 or grad_output.dim() < 2 or x.shape[:-1] != grad_output.shape[:-1]:
        raise ValueError(
            f"{name}: x and grad_output must have the same leading sizes, "
            f"got {list(x.shape)} and {list(grad_output.shape)}"
        )
    if block_size not in (1, 4, 8, 16, 32, 64, 128):
        raise ValueError(f"{name}: block_size must be one of 1, 4, 8, 16, 32, 64, 128, got {block_size}")
    return _rows(x.detach(), x.shape[-1]), _rows(grad_output.detach(), grad_output.shape[-1])


# --- calls into the native module -----------------------------------------------------------------------------------


def _rows(t: Tensor, columns: int) -> Tensor:
    """``t`` as [M, columns] with contiguous columns."""
    if t.dim() != 2:
        t = t.reshape(t.numel() // columns if columns else t.shape[:-1].numel(), columns)
    return t if t.stride(1) == 1 or columns == 1 else t.contiguous()


def _native(device: torch.device):
    """The module that serves ``device``."""
    if device.type == "cpu":
        return _C
    raise RuntimeError(f"sparsenet: no kernels for device {device}; this build serves: cpu")


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: PatternIndex, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Output [..., out] and, where ``keep`` and the activation needs it, the pre-activation of the same shape."""
    out_features, in_features = index.shape
    rows = _rows(x, in_features)
    batch = rows.shape[0]
    values = values.contiguous()
    y = torch.empty((*x.shape[:-1], out_features), dtype=x.dtype, device=x.device)
    pre = torch.empty_like(y) if keep and activation in NEEDS_PRE_ACTIVATION else None
    if y.numel():
        _native(x.device).linear_forward(
            index.native,
            _DTYPES[x.dtype],
            ACTIVATIONS[activation],
            rows.data_ptr(),
            rows.stride(0),
            batch,
            values.data_ptr(),
            0 if bias is None else bias.contiguous().data_ptr(),
            y.data_ptr(),
            0 if pre is None else pre.data_ptr(),
            torch.get_num_threads(),
        )
    return y, pre


def _grad_before_activation(grad_y: Tensor, saved: Tensor | None, activation: str) -> Tensor:
    if activation == "relu":
        return torch.ops.aten.threshold_backward(grad_y, saved, 0)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(grad_y, saved)
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad_y, saved)
    return grad_y


def backward(
    grad_y: Tensor,
    saved: Tensor | None,
    x: Tensor,
    values: Tensor,
    index: PatternIndex,
    activation: str,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, values and bias; None where not wanted. Tells the observer, if one watches."""
    if index.retired:
        index.raise_retired()
    out_features, in_features = index.shape
    need_x, need_values, need_bias = wanted
    g = _rows(grad_y, out_features)
    rows = _rows(x, in_features)
    if index.observer is not None:
        g = _rows(
            _grad_before_activation(g, None if saved is None else saved.reshape(g.shape), activation), out_features
        )
        activation, saved = "none", None
        index.observer(rows, g)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else None
    grad_values = torch.empty(values.shape, dtype=values.dtype, device=values.device) if need_values else None
    grad_bias = torch.empty(out_features, dtype=x.dtype, device=x.device) if need_bias else None
    _native(x.device).linear_backward(
        index.native,
        _DTYPES[x.dtype],
        ACTIVATIONS[activation],
        g.data_ptr(),
        g.stride(0),
        0 if saved is None else saved.data_ptr(),
        rows.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        values.contiguous().data_ptr(),
        0 if grad_x is None else grad_x.data_ptr(),
        0 if grad_values is None else grad_values.data_ptr(),
        0 if grad_bias is None else grad_bias.data_ptr(),
        torch.get_num_threads(),
    )
    return grad_x, grad_values, grad_bias


class _BlockSparseLinear(torch.autograd.Function):
    """Eager door. Parameters: x [..., in], values [num_blocks, b, b], bias [out] or None, index, activation."""

    @staticmethod
    def forward(ctx, x, values, bias, index, activation):
        """Y [..., out]."""
        data = values.detach()  # holds this storage even if another thread rewires the layer from here on
        if index.retired:
            index.raise_retired()
        y, pre = forward(x, data, bias, index, activation, keep=True)
        ctx.index, ctx.activation = index, activation
        ctx.save_for_backward(x, values, y if activation == "relu" else pre)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        """Gradients of x, values and bias."""
        if ctx.index.retired:
            ctx.index.raise_retired()
        x, values, saved = ctx.saved_tensors
        return (*backward(grad_y, saved, x, values, ctx.index, ctx.activation, ctx.needs_input_grad[:3]), None, None)


def _goes_through_library(x: Tensor, values: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or type(x) not in _PLAIN
        or type(values) not in _PLAIN
        or torch._C._are_functorch_transforms_active()
    )


def _autocast(device: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Floating-point tensors in autocast's dtype, float64 left alone, as for ``nn.functional.linear``."""
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def block_sparse_linear(
    x: Tensor, values: Tensor, pattern, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``activation(x @ W.T + bias)`` for a weight W [out, in] given by its active blocks.

    Args:
        x: [..., in], any strides; float32, bfloat16, float16 or float64. Half types accumulate in float32.
        values: [num_blocks, b, b] of the dtype of x; block i is the [out, in] content of the pattern's i-th block.
        pattern: the :class:`~sparsenet.BlockPattern` of W.
        bias: [out] or None.
        activation: ``none``, ``relu``, ``gelu`` (erf) or ``silu``, fused.

    Returns:
        [..., out]. NaN and Inf in ``x`` spread through active blocks only.

    Raises:
        ValueError: a shape or device does not fit; TypeError: a dtype is not supported or differs from that of x.
        StaleTopologyError: the pattern was replaced by a rewire.

    Differentiable once in x, values and bias.

    Example:
        >>> import torch, sparsenet as sn
        >>> pattern = sn.BlockPattern.random(shape=(64, 96), density=0.5, block_size=32)
        >>> values = torch.randn(pattern.num_blocks, 32, 32)
        >>> sn.functional.block_sparse_linear(torch.randn(8, 96), values, pattern).shape
        torch.Size([8, 64])
    """
    index = pattern.index
    if torch.is_autocast_enabled(x.device.type):
        x, values, bias = _autocast(x.device.type, x, values, bias)
    check_linear(x, values, index, bias, activation)
    if _goes_through_library(x, values):
        y, _ = torch.ops.sparsenet.block_sparse_linear(
            x, values, bias, index.crow, index.col, *index.shape, index.block_size, activation
        )
        return y
    if not torch.is_grad_enabled():
        data = values.detach()
        if index.retired:
            index.raise_retired()
        return forward(x, data, bias, index, activation, keep=False)[0]
    return _BlockSparseLinear.apply(x, values, bias, index, activation)


# --- gradients of blocks that are not there -------------------------------------------------------------------------


def block_gradient_squared_norms(
    x: Tensor, grad_output: Tensor, block_size: int, block_rows: tuple[int, int] | None = None
) -> Tensor:
    """Squared Frobenius norm of every block of the dense weight gradient ``grad_output.T @ x``, which is never stored.

    Args:
        x: [..., in], the layer's input.
        grad_output: [..., out], the gradient of its output *before* the activation; dtype of x.
        block_size: 1, 4, 8, 16, 32, 64 or 128.
        block_rows: only block rows ``[begin, end)``.

    Returns:
        float32 [ceil(out / b), ceil(in / b)] (or ``end - begin`` rows). The growth score of RigL (Evci et al., 2020)
        for blocks.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.
    """
    name = "block_gradient_squared_norms"
    x, grad_output = _check_gradient_operands(name, x, grad_output, block_size)
    total = -(-grad_output.shape[1] // block_size)
    begin, end = (0, total) if block_rows is None else block_rows
    if not 0 <= begin <= end <= total:
        raise ValueError(f"{name}: block_rows must lie in [0, {total}], got ({begin}, {end})")
    norms = torch.empty(end - begin, -(-x.shape[1] // block_size), dtype=torch.float32, device=x.device)
    if norms.numel():
        _native(x.device).gradient_norms(
            _DTYPES[x.dtype],
            block_size,
            x.data_ptr(),
            x.stride(0),
            x.shape[1],
            grad_output.data_ptr(),
            grad_output.stride(0),
            grad_output.shape[1],
            x.shape[0],
            begin,
            end,
            norms.data_ptr(),
            torch.get_num_threads(),
        )
    return norms


def candidate_gradients(x: Tensor, grad_output: Tensor, rows: Tensor, cols: Tensor, block_size: int) -> Tensor:
    """Blocks ``(rows[i], cols[i])`` of the dense weight gradient ``grad_output.T @ x``, and no others.

    Args:
        x: [..., in].
        grad_output: [..., out], before the activation; dtype of x.
        rows: int [n], block rows; ``cols``: int [n], block columns.
        block_size: 1, 4, 8, 16, 32, 64 or 128.

    Returns:
        [n, b, b], dtype of x; the part outside the matrix is zero.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or indices do not fit.
    """
    name = "candidate_gradients"
    x, grad_output = _check_gradient_operands(name, x, grad_output, block_size)
    places = []
    for label, index, limit in (
        ("rows", rows, -(-grad_output.shape[1] // block_size)),
        ("cols", cols, -(-x.shape[1] // block_size)),
    ):
        if index.dtype.is_floating_point or index.dtype == torch.bool or index.dtype.is_complex:
            raise TypeError(f"{name}: {label} must be integers, got {index.dtype}")
        if index.dim() != 1 or index.shape != rows.shape:
            raise ValueError(
                f"{name}: rows and cols must be lists of one length, got {list(rows.shape)}, {list(cols.shape)}"
            )
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= limit):
            raise ValueError(f"{name}: {label} must lie in [0, {limit}), got {int(index.min())} to {int(index.max())}")
        places.append(np.ascontiguousarray(index.numpy(force=True), dtype=np.int32))
    grads = torch.empty(len(places[0]), block_size, block_size, dtype=x.dtype, device=x.device)
    if grads.numel():
        _native(x.device).candidate_gradients(
            _DTYPES[x.dtype],
            block_size,
            x.data_ptr(),
            x.stride(0),
            x.shape[1],
            grad_output.data_ptr(),
            grad_output.stride(0),
            grad_output.shape[1],
            x.shape[0],
            *places,
            grads.data_ptr(),
            torch.get_num_threads(),
        )
    return grads


# --- pattern arithmetic ---------------------------------------------------------------------------------------------


def row_order(rows: Tensor, cols: Tensor) -> Tensor:
    """int64 permutation that sorts places (block row, block column) by row, then column; equal places are refused."""
    order = _C.row_order(*(np.ascontiguousarray(t.numpy(force=True), dtype=np.int32) for t in (rows, cols)))
    return torch.from_numpy(order).to(rows.device, torch.int64)


def select_extreme(scores: Tensor, k: int, largest: bool) -> Tensor:
    """int64 [k], ascending: where the k smallest or largest scores are; ties go to the smaller index, NaN refused."""
    picked = _C.select_extreme(np.ascontiguousarray(scores.float().numpy(force=True)), k, largest)
    return torch.from_numpy(picked).to(scores.device)


def native_build_info() -> dict:
    """What the native module says of itself: version, instruction sets, CUDA architectures, compiler."""
    return dict(_C.build_info())


def workspace_bytes() -> int:
    """Bytes of scratch memory the CPU kernels hold, of all threads."""
    return _C.workspace_bytes()


def trim_workspace() -> None:
    """Gives back the scratch memory that the calling thread keeps for its next call."""
    _C.trim_workspace()
