"""block_sparse_linear, differentiable and compilable.

Eager calls on plain tensors go straight to the kernels through one ``autograd.Function``. Tracing (``torch.compile``,
``torch.export``), fake tensors and functorch transforms go through the same kernels registered with ``torch.library``
(:mod:`sparsenet.functional.library`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from sparsenet.functional import native as native_module
from sparsenet.functional.checks import check_linear, fits
from sparsenet.functional.native import (
    ACTIVATIONS,
    DTYPES,
    NEEDS_PRE_ACTIVATION,
    held,
    packed,
    rows_of,
)

__all__ = ["block_sparse_linear"]

_PLAIN = (Tensor, torch.nn.Parameter)
_NOT_TWICE = "block_sparse_linear: cannot be differentiated twice; sparsenet.reference.block_sparse_linear can"

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
        native: what the native module made of the same indices before; default: they are checked now.

    Raises:
        ValueError: an index is out of range, unsorted or duplicated, or the pointers contradict each other.

    Attributes:
        retired: set when a rewire replaced this pattern; a backward that still needs it raises.
        observer: called in backward with ``(x, grad_output before the activation)``, both 2-D; see the Sparsifier.
    """

    def __init__(self, crow: Tensor, col: Tensor, shape: tuple[int, int], block_size: int, native=None):
        self.kernels = native_module.kernels_of(crow.device)
        if native is None:
            native = self.kernels.Pattern(native_module.handed(crow), native_module.handed(col), *shape, block_size)
        self.native = native
        self.device = col.device
        self.shape = shape
        self.block_size = block_size
        self.num_blocks = col.numel()
        self.values_shape = (self.num_blocks, block_size, block_size)
        self.bias_shape = shape[:1]
        self.crow = crow.clone()
        self.col = col.clone()
        self.retired = False
        self.observer: Observer | None = None
        self.label = "block_sparse_linear"
        _INDEX_OF_COL[self.col] = weakref.ref(self)

    def to(self, device: torch.device | str) -> PatternIndex:
        """The same indices with tensors on ``device``; itself when they are there already."""
        device = torch.device(device)
        if self.device == device or (self.device.type == device.type and device.index is None):
            return self
        if device.type == "meta":  # layers without data keep their indices
            return self
        return PatternIndex(self.crow.to(device), self.col.to(device), self.shape, self.block_size)

    def copy(self) -> PatternIndex:
        """The same pattern with a life and public tensors of its own; the checked indices are shared."""
        return PatternIndex(self.crow, self.col, self.shape, self.block_size, self.native)

    def row_indices(self) -> Tensor:
        """int32 [num_blocks]: the block row of each block."""
        return torch.as_tensor(self.native.row, device=self.col.device)

    def retire(self) -> None:
        """Marks the pattern as replaced: calls that still use it, or only ``col`` as compiled graphs do, raise."""
        self.retired = True
        _RETIRED_COL[self.col] = self.label

    def raise_retired(self) -> None:
        """Raises the error of a stale forward or backward."""
        raise StaleTopologyError(_STALE.format(self.label))


_STALE = "{}: the layer was rewired since this forward; run the forward again"
# Finds the index behind the tensors that a compiled graph passes; the tensors are private to their PatternIndex.
_INDEX_OF_COL = WeakTensorKeyDictionary()
_RETIRED_COL = WeakTensorKeyDictionary()  # col -> label: outlives the index, as long as a graph keeps col


def index_from(crow: Tensor, col: Tensor, shape: tuple[int, int], block_size: int) -> PatternIndex:
    """The PatternIndex that owns ``col``, else a new, validated one (exported programs, direct callers).

    Raises:
        StaleTopologyError: a rewire replaced the pattern, even if its index is gone.
    """
    label = _RETIRED_COL.get(col)
    if label is not None:
        raise StaleTopologyError(_STALE.format(label))
    found = _INDEX_OF_COL.get(col)
    index = found() if found is not None else None
    if index is None or index.shape != shape or index.block_size != block_size:
        index = PatternIndex(crow, col, shape, block_size)
    return index


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: PatternIndex, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Output [..., out] and, where ``keep`` and the activation needs it, the pre-activation of the same shape."""
    out_features, in_features = index.shape
    rows = rows_of(x, in_features)
    batch = rows.shape[0]
    values = packed(values)
    bias = None if bias is None else packed(bias)
    y = rows.new_empty((batch, out_features) if x.dim() == 2 else (*x.shape[:-1], out_features))
    pre = torch.empty_like(y) if keep and activation in NEEDS_PRE_ACTIVATION else None
    if batch and out_features:
        index.kernels.linear_forward(
            index.native,
            (DTYPES[x.dtype], ACTIVATIONS[activation], torch.get_num_threads()),
            (rows.data_ptr(), batch, in_features, rows.stride(0)),
            (values.data_ptr(), 0 if bias is None else bias.data_ptr()),
            (y.data_ptr(), 0 if pre is None else pre.data_ptr()),
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
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, values and bias; None where not wanted. Tells the observer, if one watches."""
    values = held(values)
    if index.retired:
        index.raise_retired()
    out_features, in_features = index.shape
    need_x, need_values, need_bias = wanted[:3]
    g = rows_of(grad_y, out_features)
    rows = rows_of(x, in_features)
    if index.observer is not None:
        g = rows_of(
            _grad_before_activation(g, None if saved is None else saved.reshape(g.shape), activation), out_features
        )
        activation, saved = "none", None
        index.observer(rows, g)
    values = packed(values)
    saved = None if saved is None else packed(saved)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    grad_values = torch.empty_like(values) if need_values else None  # values are contiguous by now
    grad_bias = rows.new_empty(out_features) if need_bias else None
    batch = rows.shape[0]
    index.kernels.linear_backward(
        index.native,
        (DTYPES[x.dtype], ACTIVATIONS[activation], torch.get_num_threads()),
        (rows.data_ptr(), batch, in_features, rows.stride(0)),
        values.data_ptr(),
        ((g.data_ptr(), batch, out_features, g.stride(0)), 0 if saved is None else saved.data_ptr()),
        (
            0 if grad_x is None else grad_x.data_ptr(),
            0 if grad_values is None else grad_values.data_ptr(),
            0 if grad_bias is None else grad_bias.data_ptr(),
        ),
    )
    return grad_x, grad_values, grad_bias


class _BlockSparseLinear(torch.autograd.Function):
    """Eager door. Parameters: x [..., in], values [num_blocks, b, b], bias [out] or None, index, activation."""

    @staticmethod
    def forward(ctx, x, values, bias, index, activation):
        """Y [..., out]."""
        data = held(values)
        if index.retired:
            index.raise_retired()
        y, pre = forward(x, data, bias, index, activation, keep=True)
        ctx.index, ctx.activation = index, activation
        ctx.save_for_backward(x, values, y if activation == "relu" else pre)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        """Gradients of x, values and bias."""
        if ctx.index.retired:
            ctx.index.raise_retired()
        x, values, saved = ctx.saved_tensors
        operands = (grad_y, saved, x, values, ctx.index, ctx.activation, ctx.needs_input_grad)
        if not torch.is_grad_enabled():
            return (*backward(*operands), None, None)
        with torch.no_grad():  # create_graph=True
            grads = backward(*operands)
        return (*_refuse_second_derivatives(grads), None, None)


# Function.apply looks for functorch transforms and dead functorch wrappers first; here both are known to be absent, and
# the look takes a sixth of a small call.
_apply = super(torch.autograd.Function, _BlockSparseLinear).apply


def _refuse_second_derivatives(grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The same gradients; differentiating them raises.

    ``once_differentiable`` would not where grad_y is a constant, as in a gradient penalty.
    """
    raising = torch._C._functions.DelayedError(_NOT_TWICE.encode(), len(grads))
    return raising(*(None if g is None else g.detach().requires_grad_() for g in grads))


def save_for_library_backward(ctx, inputs, output) -> None:
    """Keeps what :func:`library_backward` needs of a call of the library operation."""
    x, values, _bias, crow, col, *constants = inputs
    y, pre = output
    ctx.constants = constants
    ctx.save_for_backward(x, values, y if constants[-1] == "relu" else pre, crow, col)


def library_backward(ctx, grad_y, _grad_pre):
    """Gradients of x, values and bias by the library's backward operation."""
    x, values, saved, crow, col = ctx.saved_tensors
    need = ctx.needs_input_grad
    transformed = torch._C._are_functorch_transforms_active()
    op = _TransformedBackward.apply if transformed else torch.ops.sparsenet.block_sparse_linear_backward
    grads = op(grad_y, saved, x, values, crow, col, *ctx.constants, need[0], need[1], need[2])
    return (*(g if wanted else None for g, wanted in zip(grads, need, strict=False)), *[None] * 6)


class _Transformed(torch.autograd.Function):
    """Door for functorch transforms, which refuse the autograd formula of a library operation. No jvp: it raises."""

    generate_vmap_rule = True
    setup_context = staticmethod(save_for_library_backward)
    backward = staticmethod(library_backward)

    @staticmethod
    def forward(*arguments):
        """The library operation's two outputs."""
        return torch.ops.sparsenet.block_sparse_linear(*arguments)


class _TransformedBackward(torch.autograd.Function):
    """The backward of :class:`_Transformed`; differentiating it raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        """The library's backward operation."""
        return torch.ops.sparsenet.block_sparse_linear_backward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        """Keeps nothing."""

    @staticmethod
    def backward(ctx, *_):
        """Always raises."""
        raise RuntimeError(_NOT_TWICE)


def _is_eager(x: Tensor, values: Tensor) -> bool:
    """Whether plain tensors meet the kernels directly; else the library's operation serves whoever traces."""
    return (
        type(x) in _PLAIN
        and type(values) in _PLAIN
        and not torch.compiler.is_compiling()
        and not x.is_meta
        and not torch._C._are_functorch_transforms_active()
    )


# Whether autocast is on for any device: a tenth of the time of asking for one device.
_may_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)


def _autocast(x: Tensor, values: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The operands as autocast wants them, float64 left alone, as for ``nn.functional.linear``."""
    if not isinstance(x, Tensor) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return x, values, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, values, bias))


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
    if torch.compiler.is_compiling() or _may_autocast():
        x, values, bias = _autocast(x, values, bias)
    eager = _is_eager(x, values)
    if not eager or not fits(x, values, index, bias, activation):
        check_linear(x, values, index, bias, activation)
    if not eager:
        transformed = torch._C._are_functorch_transforms_active()
        op = _Transformed.apply if transformed else torch.ops.sparsenet.block_sparse_linear
        return op(x, values, bias, index.crow, index.col, *index.shape, index.block_size, activation)[0]
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        data = held(values)
        if index.retired:
            index.raise_retired()
        return forward(x, data, bias, index, activation, keep=False)[0]
    return _apply(x, values, bias, index, activation)
