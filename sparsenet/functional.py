"""The operations on block-sparse matrices, differentiable and compilable; only this file talks to the native module.

Eager calls on plain tensors go straight to the kernels through one ``autograd.Function`` per operation. Tracing
(``torch.compile``, ``torch.export``), fake tensors and functorch transforms go through the same kernels registered with
``torch.library`` (:mod:`sparsenet.library`).
Kernels read indices only from memory that a :class:`PatternIndex` validated and owns.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from sparsenet.cuda import kernels_by_device

try:
    from sparsenet import _C
except ImportError as error:  # pragma: no cover - exercised by a child process in the tests
    raise ImportError(
        f"sparsenet: the native module is missing or does not load ({error}); build it: pip install --force-reinstall ."
    ) from error
_NATIVE = (
    *("Pattern", "linear_forward", "linear_backward", "gradient_norms", "candidate_gradients", "compact_blocks"),
    *("row_order", "select_extreme", "build_info", "workspace_bytes", "trim_workspace"),
    *("linear_workspace", "norms_workspace"),
)
if _absent := [name for name in _NATIVE if not hasattr(_C, name)]:
    raise ImportError(
        f"sparsenet: the native module is older than the package, it has no {', '.join(_absent)}; "
        "build it: pip install --force-reinstall ."
    )

__all__ = ["block_gradient_squared_norms", "block_sparse_linear", "candidate_gradients", "compact_blocks"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "silu": 3}
NEEDS_PRE_ACTIVATION = ("gelu", "silu")
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
        self.kernels = _native(crow.device)
        if native is None:
            native = self.kernels.Pattern(_handed(crow), _handed(col), *shape, block_size)
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


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_dtype(name: str, argument: str, tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: {argument} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def fits(x: Tensor, values: Tensor, index: PatternIndex, bias: Tensor | None, activation: str) -> bool:
    """Whether eager operands are as :func:`check_linear` demands, at a fraction of its time."""
    dtype, device = x.dtype, index.device
    return (
        x.dim() > 0
        and x.shape[-1] == index.shape[1]
        and values.shape == index.values_shape
        and dtype in _DTYPES
        and values.dtype is dtype
        and x.device == device
        and values.device == device
        and (bias is None or (bias.shape == index.bias_shape and bias.dtype is dtype and bias.device == device))
        and activation in ACTIVATIONS
    )


def check_linear(x: Tensor, values: Tensor, index: PatternIndex, bias: Tensor | None, activation: str) -> None:
    """Raises what is wrong with the operands of block_sparse_linear; traceable."""
    name = "block_sparse_linear"
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: x must be a torch.Tensor, got {type(x).__name__}")
    _check_dtype(name, "x", x)
    out_features, in_features = index.shape
    b = index.block_size
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(f"{name}: x must have {in_features} columns, got {list(x.shape)}")
    n = index.col.shape[0]  # not num_blocks: torch.compile takes a tensor's size as dynamic, an attribute as constant
    if values.dim() != 3 or values.shape[0] != n or values.shape[1] != b or values.shape[2] != b:
        raise ValueError(f"{name}: values must have shape {[n, b, b]}, got {list(values.shape)}")
    if values.dtype != x.dtype:
        raise TypeError(f"{name}: values must have the dtype of x, {x.dtype}, got {values.dtype}")
    if values.device != x.device or (index.col.device != x.device and not x.is_meta):
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
    if t.dim() == 2 and t.is_contiguous() and not t.is_neg():
        return t
    t = t.resolve_neg()
    if t.dim() != 2:
        t = t.reshape(t.numel() // columns if columns else t.shape[:-1].numel(), columns)
    return t if t.stride(1) == 1 or columns == 1 else t.contiguous()


# Torch reads a tensor's storage without the GIL: another thread may not swap it (see layers.replace_data) meanwhile.
storage_lock = threading.Lock()
os.register_at_fork(
    before=storage_lock.acquire, after_in_parent=storage_lock.release, after_in_child=storage_lock.release
)


def snapshot(values: Tensor) -> Tensor:
    """A differentiable alias of ``values``: it keeps the memory that ``values`` has now, whatever other threads do."""
    if torch.compiler.is_compiling():
        return values
    with storage_lock:
        return values.view_as(values)


def held(values: Tensor) -> Tensor:
    """The same, detached. Take it before looking whether the pattern was retired, then both belong together."""
    with storage_lock:
        return values.detach()


def _packed(t: Tensor) -> Tensor:
    """``t`` in one piece. Callers keep it: an address alone does not keep a copy alive."""
    return t if t.is_contiguous() and not t.is_neg() else t.resolve_neg().contiguous()


_cuda_ops = getattr(_C, "cuda", None)  # absent where there was no nvcc
_cuda_kernels = None if _cuda_ops is None else kernels_by_device(_cuda_ops)


def _native(device: torch.device):
    """What serves ``device``: the native module itself on the CPU, else the kernels of one GPU with the same calls."""
    if device.type == "cpu":
        return _C
    if device.type == "cuda" and _cuda_kernels is not None:
        return _cuda_kernels(device)
    served = "cpu" if _cuda_kernels is None else "cpu, cuda"
    hint = "; build it where nvcc is: pip install --force-reinstall ." if device.type == "cuda" else ""
    raise RuntimeError(f"sparsenet: no kernels for device {device}; this build serves: {served}{hint}")


def _handed(indices: Tensor):
    """Indices as the kernels of their device take them: a numpy array on the CPU, the tensor itself elsewhere."""
    return indices.numpy(force=True) if indices.device.type == "cpu" else indices


def _handed_int32(indices: Tensor):
    return _handed(indices.to(torch.int32).contiguous())


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, index: PatternIndex, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Output [..., out] and, where ``keep`` and the activation needs it, the pre-activation of the same shape."""
    out_features, in_features = index.shape
    rows = _rows(x, in_features)
    batch = rows.shape[0]
    values = _packed(values)
    bias = None if bias is None else _packed(bias)
    y = rows.new_empty((batch, out_features) if x.dim() == 2 else (*x.shape[:-1], out_features))
    pre = torch.empty_like(y) if keep and activation in NEEDS_PRE_ACTIVATION else None
    if batch and out_features:
        index.kernels.linear_forward(
            index.native,
            _DTYPES[x.dtype],
            ACTIVATIONS[activation],
            rows.data_ptr(),
            rows.stride(0),
            batch,
            values.data_ptr(),
            0 if bias is None else bias.data_ptr(),
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
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, values and bias; None where not wanted. Tells the observer, if one watches."""
    values = held(values)
    if index.retired:
        index.raise_retired()
    out_features, in_features = index.shape
    need_x, need_values, need_bias = wanted[:3]
    g = _rows(grad_y, out_features)
    rows = _rows(x, in_features)
    if index.observer is not None:
        g = _rows(
            _grad_before_activation(g, None if saved is None else saved.reshape(g.shape), activation), out_features
        )
        activation, saved = "none", None
        index.observer(rows, g)
    values = _packed(values)
    saved = None if saved is None else _packed(saved)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    grad_values = torch.empty_like(values) if need_values else None  # values are contiguous by now
    grad_bias = rows.new_empty(out_features) if need_bias else None
    index.kernels.linear_backward(
        index.native,
        _DTYPES[x.dtype],
        ACTIVATIONS[activation],
        g.data_ptr(),
        g.stride(0),
        0 if saved is None else saved.data_ptr(),
        rows.data_ptr(),
        rows.stride(0),
        rows.shape[0],
        values.data_ptr(),
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
        places.append(_handed_int32(index.to(x.device)))
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


# --- gathering rows and columns -------------------------------------------------------------------------------------


def compact_blocks(tensors: Sequence[Tensor], pattern, rows: Tensor, cols: Tensor, new_pattern) -> list[Tensor]:
    """Rows and columns of a block-sparse matrix gathered into another pattern: values and every moment in one pass.

    Element (i, j) of the new matrix is element ``(rows[i], cols[j])`` of the old one: a subset leaves units out, a
    permutation moves them, both at once re-block what is left.

    Args:
        tensors: each [num_blocks, b, b] for ``pattern``: values, optimizer moments, masks; any dtypes.
        pattern: the :class:`~sparsenet.BlockPattern` they are on.
        rows: int [new out], the old row of each new one; ``cols``: int [new in], the old column of each new one.
        new_pattern: of shape (new out, new in) and the same block size. Old blocks that it does not cover are lost.

    Returns:
        For each tensor a new one, [new num_blocks, b, b]: bit for bit what was there, zero where ``pattern`` has no
        block and outside the matrix.

    Raises:
        ValueError: shapes, devices or indices do not fit; TypeError: indices that are not integers.

    Example:
        >>> import torch, sparsenet as sn
        >>> old = sn.BlockPattern([0, 1, 2], [1, 0], shape=(8, 8), block_size=4)
        >>> new = sn.BlockPattern([0, 1], [0], shape=(4, 4), block_size=4)
        >>> values = torch.arange(32.0).reshape(2, 4, 4)
        >>> sn.functional.compact_blocks([values], old, torch.arange(4), torch.arange(4, 8), new)[0].equal(values[:1])
        True
    """
    name, index = "compact_blocks", pattern.index
    new_index = new_pattern.index.to(index.col.device)
    if index.block_size != new_index.block_size:
        raise ValueError(f"{name}: block_size must stay {index.block_size}, got {new_index.block_size}")
    b = index.block_size
    for t in tensors:
        if list(t.shape) != [index.num_blocks, b, b]:
            raise ValueError(f"{name}: tensors must have shape {[index.num_blocks, b, b]}, got {list(t.shape)}")
        if t.device != index.col.device:
            raise ValueError(f"{name}: tensors must be on the device of pattern, {index.col.device}, got {t.device}")
    picked = []
    for label, chosen, new, old in zip(("rows", "cols"), (rows, cols), new_index.shape, index.shape, strict=True):
        if chosen.dtype.is_floating_point or chosen.dtype == torch.bool or chosen.dtype.is_complex:
            raise TypeError(f"{name}: {label} must be integers, got {chosen.dtype}")
        if list(chosen.shape) != [new]:
            raise ValueError(f"{name}: {label} must have shape [{new}], got {list(chosen.shape)}")
        if new and (int(chosen.min()) < 0 or int(chosen.max()) >= old):
            raise ValueError(f"{name}: {label} must lie in [0, {old}), got {int(chosen.min())} to {int(chosen.max())}")
        picked.append(_handed_int32(chosen.to(index.col.device)))
    sources = [t.detach().contiguous() for t in tensors]
    targets = [torch.empty(new_index.num_blocks, b, b, dtype=t.dtype, device=t.device) for t in tensors]
    if new_index.num_blocks and sources:
        addresses = ([t.data_ptr() for t in group] for group in (sources, targets))
        sizes = [t.element_size() for t in sources]
        _native(index.col.device).compact_blocks(
            index.native, new_index.native, *picked, *addresses, sizes, torch.get_num_threads()
        )
    return targets


# --- pattern arithmetic ---------------------------------------------------------------------------------------------


def row_order(rows: Tensor, cols: Tensor) -> Tensor:
    """int64 permutation that sorts places (block row, block column) by row, then column; equal places are refused."""
    if rows.dim() != 1 or rows.shape != cols.shape:
        raise ValueError(f"row_order: rows and cols must be of one length, got {list(rows.shape)}, {list(cols.shape)}")
    for t in (rows, cols):
        if t.dtype == torch.int64 and t.numel() and not -(2**31) <= int(t.min()) <= int(t.max()) < 2**31:
            raise ValueError(f"row_order: places must fit in int32, got {int(t.min())} to {int(t.max())}")
    order = _native(rows.device).row_order(*map(_handed_int32, (rows, cols)))
    return torch.as_tensor(order, device=rows.device).long()


def select_extreme(scores: Tensor, k: int, largest: bool) -> Tensor:
    """int64 [k], ascending: where the k smallest or largest scores are; ties go to the smaller index, NaN refused."""
    if scores.dtype == torch.float64:  # float32 would make ties of close scores: pass their ranks on
        unique, ranks = scores.unique(return_inverse=True)
        scores = torch.where(scores.isnan(), torch.nan, ranks) if len(unique) < 2**24 else scores
    picked = _native(scores.device).select_extreme(_handed(scores.float().contiguous()), k, largest)
    return torch.as_tensor(picked, device=scores.device)


def native_build_info() -> dict:
    """What the native module says of itself: version, instruction sets, CUDA architectures, compiler."""
    info = dict(_C.build_info())
    info["cuda_archs"] = info["cuda_archs"].split() if info["cuda_archs"] else []
    info["cuda_device"] = None if _cuda_ops is None else _cuda_ops.device_info()
    return info


def linear_workspace(
    dtype: torch.dtype, shape: tuple[int, int], block_size: int, num_blocks: int, batch: int, threads: int
) -> list[int]:
    """Bytes of each scratch buffer that forward and backward of one layer [out, in] take; calls share buffers."""
    return _C.linear_workspace(_DTYPES[dtype], *shape, block_size, num_blocks, batch, threads)


def norms_workspace(
    dtype: torch.dtype, shape: tuple[int, int], block_size: int, batch: int, block_rows: int, threads: int
) -> list[int]:
    """The same of :func:`block_gradient_squared_norms` for ``block_rows`` block rows of a layer [out, in]."""
    out_features, in_features = shape
    return _C.norms_workspace(_DTYPES[dtype], block_size, in_features, out_features, batch, block_rows, threads)


def workspace_bytes() -> int:
    """Bytes of scratch memory the CPU kernels hold, of all threads."""
    return _C.workspace_bytes()


def trim_workspace() -> None:
    """Gives back the scratch memory that the calling thread keeps for its next call."""
    _C.trim_workspace()
