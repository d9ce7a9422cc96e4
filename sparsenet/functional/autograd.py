"""block_sparse_linear, differentiable and compilable.

Eager calls on plain tensors go straight to the kernels through one ``autograd.Function``. Tracing (``torch.compile``,
``torch.export``), fake tensors and functorch transforms go through the same kernels registered with ``torch.library``
(:mod:`sparsenet.functional.library`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from sparsenet.functional import registry
from sparsenet.functional.bits import unpack_mask, without_masked, zero_masked_
from sparsenet.functional.checks import check_linear, fits, refuse_onnx, refuse_tracing
from sparsenet.functional.native import (
    ACTIVATIONS,
    DTYPES,
    NEEDS_PRE_ACTIVATION,
    packed,
    rows_of,
    storage_lock,
)

__all__ = ["block_sparse_linear", "layer_linear"]

_PLAIN = (Tensor, torch.nn.Parameter)
_NOT_FORWARD = "block_sparse_linear: has no forward-mode derivative; sparsenet.reference.block_sparse_linear has"
_NOT_TWICE = "block_sparse_linear: cannot be differentiated twice; sparsenet.reference.block_sparse_linear can"


# --- the kernels' calls ---------------------------------------------------------------------------------------------


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, pattern, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Output [..., out] and, where ``keep`` and the activation needs it, the pre-activation of the same shape."""
    out_features, in_features = pattern.shape
    rows = rows_of(x, in_features)
    batch = rows.shape[0]
    values = packed(values)
    bias = None if bias is None else packed(bias)
    y = rows.new_empty((batch, out_features) if x.dim() == 2 else (*x.shape[:-1], out_features))
    pre = torch.empty_like(y) if keep and activation in NEEDS_PRE_ACTIVATION else None
    if batch and out_features:
        pattern.kernels.linear_forward(
            pattern.native,
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
    pattern,
    topology,
    activation: str,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, values and bias; None where not wanted. Tells the topology's observer, if one watches."""
    out_features, in_features = pattern.shape
    need_x, need_values, need_bias = wanted[:3]
    g = rows_of(grad_y, out_features)
    rows = rows_of(x, in_features)
    if topology is not None:
        topology.trained |= need_values
        if topology.observer is not None:
            g = rows_of(
                _grad_before_activation(g, None if saved is None else saved.reshape(g.shape), activation), out_features
            )
            activation, saved = "none", None
            topology.observer(rows, g)
    values = packed(values)
    saved = None if saved is None else packed(saved)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format) if need_x else None
    grad_values = torch.empty_like(values) if need_values else None  # values are contiguous by now
    grad_bias = rows.new_empty(out_features) if need_bias else None
    batch = rows.shape[0]
    pattern.kernels.linear_backward(
        pattern.native,
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
    """Eager door. ``values`` gets the gradient; ``rest`` is its memory, pattern, topology, activation and mask as bits.

    These come in one tuple because autograd looks at every argument. Topology and mask may be None. The memory may hold
    anything where the mask is off, whoever wrote it there: what the kernels read is a copy without it, made for each
    pass and not kept between them.
    """

    @staticmethod
    def forward(ctx, x, values, bias, rest):
        """Y [..., out]."""
        data, pattern, topology, activation, bits = rest
        if topology is not None and topology.observer is not None:
            topology.expected_calls += 1
            topology.recomputed_in = torch._C._current_graph_task_id()
        y, pre = forward(x, _read(data, bits), bias, pattern, activation, keep=True)
        ctx.pattern, ctx.topology, ctx.activation, ctx.bits = pattern, topology, activation, bits
        ctx.save_for_backward(x, data, y if activation == "relu" else pre)
        return y

    @staticmethod
    def backward(ctx, grad_y):
        """Gradients of x, values and bias."""
        pattern, topology = ctx.pattern, ctx.topology
        if topology is not None and topology.pattern is not pattern:
            raise registry.stale(topology.label)
        if _dispatch_modes() or _jit_trace() is not None:
            refuse_tracing("block_sparse_linear: a backward pass of a forward from before")
        x, data, saved = ctx.saved_tensors
        operands = (grad_y, saved, x, data, pattern, topology, ctx.activation, ctx.needs_input_grad)
        if not torch.is_grad_enabled():
            return (*_backward_within(ctx.bits, operands), None)
        with torch.no_grad():  # create_graph=True
            grads = _backward_within(ctx.bits, operands)
        return (*_refuse_second_derivatives(grads), None)

    @staticmethod
    def jvp(ctx, *_):
        """Always raises."""
        raise NotImplementedError(_NOT_FORWARD)


def _read(data: Tensor, bits: Tensor | None) -> Tensor:
    """What the kernels read of ``data``: with a mask, a copy whose masked elements are zero."""
    return data if bits is None else without_masked(data, bits)


def _backward_within(bits: Tensor | None, operands: tuple) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """:func:`backward` of a layer whose mask is ``bits``: neither reads nor gives anything where it is off."""
    if bits is not None and operands[-1][0]:  # only the gradient of x reads the values
        operands = (*operands[:3], _read(operands[3], bits), *operands[4:])
    grads = backward(*operands)
    if bits is not None and grads[1] is not None:
        zero_masked_(grads[1], bits)
    return grads


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
    """Door for functorch transforms, which refuse the autograd formula of a library operation."""

    generate_vmap_rule = True
    setup_context = staticmethod(save_for_library_backward)
    backward = staticmethod(library_backward)
    jvp = _BlockSparseLinear.jvp

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
    """Whether plain tensors meet the kernels directly; else the library's operation serves whoever traces.

    Who records calls (``torch.jit.trace``, ``make_fx``, FLOP counters) would see memory being taken, and nothing that
    writes to it.
    """
    return (
        type(x) in _PLAIN
        and type(values) in _PLAIN
        and not x.is_meta
        and not _transforms_active()
        and not _dispatch_modes()
        and _jit_trace() is None
    )


_transforms_active = torch._C._are_functorch_transforms_active
_dispatch_modes = torch._C._len_torch_dispatch_stack
_jit_trace = torch._C._get_tracing_state

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
    if not hasattr(pattern, "native"):
        raise TypeError(f"block_sparse_linear: pattern must be a BlockPattern, got {type(pattern).__name__}")
    if not isinstance(values, Tensor):
        raise TypeError(f"block_sparse_linear: values must be a torch.Tensor, got {type(values).__name__}")
    if torch.compiler.is_compiling():
        return _traced(*_autocast(x, values, bias), pattern, activation)
    autocast = _may_autocast()
    with storage_lock:
        topology = registry.running_on(pattern)
        data = values.detach()
        if autocast:
            values = values.view_as(values)  # differentiable, and keeps this memory whatever happens to the Parameter
    return _eager(x, values, bias, data, pattern, topology, activation, autocast)


def layer_linear(x: Tensor, values: Tensor, topology, bias: Tensor | None, activation: str) -> Tensor:
    """The same for a layer: with the pattern, values and mask that its topology has at one moment.

    Another thread may rewire the layer meanwhile: pattern, mask and memory are exchanged together, and are taken
    together here.

    Example:
        >>> import torch, sparsenet as sn
        >>> layer, x = sn.SparseLinear(64, 48, density=0.5, block_size=16), torch.randn(3, 64)
        >>> y = sn.functional.layer_linear(x, layer.values, layer.topology, layer.bias, "none")
        >>> torch.equal(y, sn.functional.block_sparse_linear(x, layer.values, layer.pattern, layer.bias))
        True
    """
    if torch.compiler.is_compiling():
        values = _masked(values, topology.mask_bits, topology.pattern)
        return _traced(*_autocast(x, values, bias), topology.pattern, activation)
    autocast = _may_autocast()
    with storage_lock:
        pattern, bits = topology.pattern, topology.mask_bits
        data = values.detach()
        if autocast:
            values = values.view_as(values)
    return _eager(x, values, bias, data, pattern, topology, activation, autocast, bits)


def _masked(values: Tensor, bits: Tensor | None, pattern) -> Tensor:
    """``values`` with zeros where the mask is off, for whoever records the calls of torch."""
    if bits is None:
        return values
    return torch.where(unpack_mask(bits, pattern.block_size).to(values.device), values, 0)


def _eager(x, values, bias, data: Tensor, pattern, topology, activation: str, autocast: bool, bits=None) -> Tensor:
    """Straight to the kernels where plain tensors allow it, else as a traced call."""
    if autocast:
        plain = values
        x, values, bias = _autocast(x, values, bias)
        data = data if values is plain else values.detach()
    if not _is_eager(x, values):
        return _traced(x, _masked(values, bits, pattern), bias, pattern, activation)
    if not fits(x, data, pattern, bias, activation):
        check_linear(x, data, pattern, bias, activation)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return forward(x, _read(data, bits), bias, pattern, activation, keep=False)[0]
    return _apply(x, values, bias, (data, pattern, topology, activation, bits))


def _traced(x, values, bias, pattern, activation: str) -> Tensor:
    """The operation of torch.library, for whoever traces: compilers, fake tensors, functorch transforms."""
    if torch.compiler.is_compiling() or _jit_trace() is None:
        check_linear(x, values, pattern, bias, activation)
    else:  # torch.jit.trace, where sizes are tensors: the operation itself checks
        refuse_onnx()
    transformed = torch._C._are_functorch_transforms_active()
    op = _Transformed.apply if transformed else torch.ops.sparsenet.block_sparse_linear
    return op(x, values, bias, pattern.crow, pattern.col, *pattern.shape, pattern.block_size, activation)[0]
