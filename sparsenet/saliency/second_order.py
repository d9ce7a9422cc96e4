"""Gradients over batches, and products of the Hessian with a vector, of what a model holds in its sparse layers.

The kernels of a sparse layer have no second derivative of their own, and need none: forward, the gradient of its input
and that of its values are each linear in two operands, and the derivatives of any of the three are the other two. So
second derivatives are exact, and nothing dense is made (Pearlmutter, 1994, takes them by two backward passes likewise).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsenet.functional import autograd
from sparsenet.functional.checks import check_linear
from sparsenet.functional.native import rows_of
from sparsenet.layers import SparseLinear
from sparsenet.pattern import BlockPattern
from sparsenet.reference import ACTIVATIONS
from sparsenet.saliency.measuring import Batches, Call, call_and_target, checked_loss, untouched

__all__ = ["batch_derivatives", "differentiable_layer", "replaced_forwards"]

Forward = Callable[..., Tensor]

_UNDIFFERENTIABLE = ("torch::autograd::Error", "torch::autograd::NotImplemented")


# --- the three products -----------------------------------------------------------------------------------------------


class _Output(torch.autograd.Function):
    """``x @ W.T``: x [rows, in], values [num_blocks, b, b] -> [rows, out]."""

    @staticmethod
    def forward(ctx, x: Tensor, values: Tensor, pattern: BlockPattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(x, values)
        return autograd.forward(x, values, None, pattern, "none", keep=False)[0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values = ctx.saved_tensors
        of_x = _InputGradient.apply(grad, values, ctx.pattern) if ctx.needs_input_grad[0] else None
        of_values = _ValuesGradient.apply(grad, x, ctx.pattern) if ctx.needs_input_grad[1] else None
        return of_x, of_values, None


class _InputGradient(torch.autograd.Function):
    """``g @ W``: g [rows, out], values [num_blocks, b, b] -> [rows, in]."""

    @staticmethod
    def forward(ctx, g: Tensor, values: Tensor, pattern: BlockPattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(g, values)
        x = g.new_empty(len(g), pattern.shape[1])  # of its shape; not read
        return autograd.backward(g, None, x, values, pattern, None, "none", (True, False, False))[0]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        g, values = ctx.saved_tensors
        of_g = _Output.apply(grad, values, ctx.pattern) if ctx.needs_input_grad[0] else None
        of_values = _ValuesGradient.apply(g, grad, ctx.pattern) if ctx.needs_input_grad[1] else None
        return of_g, of_values, None


class _ValuesGradient(torch.autograd.Function):
    """The active blocks of ``g.T @ x``: g [rows, out], x [rows, in] -> [num_blocks, b, b]."""

    @staticmethod
    def forward(ctx, g: Tensor, x: Tensor, pattern: BlockPattern) -> Tensor:
        ctx.pattern = pattern
        ctx.save_for_backward(g, x)
        values = g.new_empty(pattern.values_shape)  # of its shape; not read
        return autograd.backward(g, None, x, values, pattern, None, "none", (False, True, False))[1]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        of_g = _Output.apply(x, grad, ctx.pattern) if ctx.needs_input_grad[0] else None
        of_x = _InputGradient.apply(g, grad, ctx.pattern) if ctx.needs_input_grad[1] else None
        return of_g, of_x, None


def differentiable_layer(layer: SparseLinear, x: Tensor, activation: str | None = None) -> Tensor:
    """What ``layer(x)`` returns, differentiable any number of times; nobody who watches the layer is told.

    Args:
        x: [..., in]; taken to the dtype of the layer.
        activation: another than the layer's own.

    Raises:
        ValueError, TypeError: operands that do not fit.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.saliency.second_order import differentiable_layer
        >>> layer, x = sn.SparseLinear(64, 32, density=0.5, block_size=8, activation="relu"), torch.randn(5, 64)
        >>> torch.allclose(differentiable_layer(layer, x), layer(x), atol=1e-5)
        True
    """
    pattern, values, mask, bias = layer.pattern, layer.values, layer.element_mask, layer.bias
    values = values if mask is None else torch.where(mask, values, 0)
    bias = None if bias is None else bias.to(values.dtype)
    x = x.to(values.dtype)
    check_linear(x, values, pattern, bias, "none")
    y = _Output.apply(rows_of(x, pattern.shape[1]), values, pattern)
    y = y if bias is None else y + bias
    return ACTIVATIONS[activation or layer.activation](y).view(*x.shape[:-1], pattern.shape[0])


def computes_as_ever(module: nn.Module) -> bool:
    """Whether it is a SparseLinear whose forward nobody has replaced by one of his own.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.saliency.second_order import computes_as_ever
        >>> layer = sn.SparseLinear(64, 32, density=0.5, block_size=8)
        >>> before, layer.forward = computes_as_ever(layer), lambda x: x
        >>> before, computes_as_ever(layer)
        (True, False)
    """
    return getattr(type(module), "forward", None) is SparseLinear.forward and "forward" not in module.__dict__


@contextmanager
def replaced_forwards(model: nn.Module, replacement: Callable[[nn.Module], Forward | None]) -> Iterator[None]:
    """Has modules of ``model`` computed by something else: whatever ``replacement`` returns for them, or as ever.

    Example:
        >>> import torch
        >>> from sparsenet.saliency.second_order import replaced_forwards
        >>> model, x = torch.nn.Sequential(torch.nn.Tanh()), torch.tensor([-1.0, 2.0])
        >>> with replaced_forwards(model, lambda module: torch.relu if isinstance(module, torch.nn.Tanh) else None):
        ...     print(model(x))
        tensor([0., 2.])
        >>> torch.equal(model(x), x.tanh())
        True
    """
    before = {}
    try:
        for module in model.modules():
            if (forward := replacement(module)) is not None:
                before[module] = module.__dict__.get("forward")
                module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            del module.forward
            if forward is not None:
                module.forward = forward


# --- over batches -----------------------------------------------------------------------------------------------------


def batch_derivatives(
    model: nn.Module,
    layers: Sequence[SparseLinear],
    batches: Batches,
    loss: Callable[[Tensor, Tensor], Tensor],
    vectors: Sequence[Tensor] | None = None,
    owner: str = "batch_derivatives",
) -> tuple[list[Tensor], int]:
    """The gradient of the values of ``layers``, or its derivative along ``vectors``, summed over batches times rows.

    Args:
        model: runs in eval mode; gradients, modes, buffers and the state of random numbers stay as they were.
        batches: (input, target) pairs; the input may be a :class:`sparsenet.saliency.Call`.
        loss: ``loss(output, target)``, a mean over the examples of a batch.
        vectors: [num_blocks, b, b] for each layer: what the Hessian over the values of all these layers is multiplied
            with. Then all that the model and the loss do must have second derivatives.
        owner: who an error speaks for.

    Returns:
        For each layer [num_blocks, b, b], float32 or float64: over all batches, the number of rows times the gradient
        of its mean loss (its product with the Hessian); and the number of rows of all of them together. So the first
        divided by the second belongs to the mean over all rows.

    Raises:
        ValueError: no batch, an empty one, a loss that does not serve.
        RuntimeError: a second derivative that does not exist.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.saliency.second_order import batch_derivatives
        >>> layer = sn.SparseLinear(2, 1, bias=False, density=1.0, block_size=1)
        >>> batch, half_square = torch.tensor([[3.0, 1.0]]), lambda y, _: y.square().sum() / 2
        >>> vector = torch.ones(2, 1, 1)   # H = x x'
        >>> batch_derivatives(layer, [layer], [(batch, batch)], half_square, [vector])[0][0].flatten()
        tensor([12.,  4.])
    """
    values = [layer.values for layer in layers]
    wide = [torch.float64 if v.dtype == torch.float64 else torch.float32 for v in values]
    total = 0
    with _running(model):
        sums = [torch.zeros_like(v, dtype=d, requires_grad=False) for v, d in zip(values, wide, strict=True)]
        if vectors is not None:
            vectors = [v.clone() if v.is_inference() else v for v in vectors]
        for batch in batches:
            call, target = call_and_target(batch, needs_target=True, owner=owner)
            rows = _rows(call)
            total += rows
            value = checked_loss(loss(model(*call.args, **call.kwargs), target))
            found = torch.autograd.grad(value, values, create_graph=vectors is not None, allow_unused=True)
            if vectors is not None:
                found = _along(found, values, vectors)
            for s, f in zip(sums, found, strict=True):
                if f is not None:
                    s.add_(f.detach(), alpha=rows)
    if not total:
        raise ValueError(f"{owner}: batches must hold at least one batch, got none")
    return sums, total


@contextmanager
def _running(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, every layer and attention of it differentiable twice."""

    def twice(module: nn.Module) -> Forward | None:
        return partial(differentiable_layer, module) if computes_as_ever(module) else None

    with (
        untouched(model),
        torch.inference_mode(False),
        torch.enable_grad(),
        replaced_forwards(model, twice),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


def _along(gradients: Sequence[Tensor | None], values: Sequence[Tensor], vectors: Sequence[Tensor]):
    """The derivative of the gradients' product with ``vectors``: the Hessian times these."""
    pairs = zip(gradients, vectors, strict=True)
    products = [(g * v.to(g)).sum() for g, v in pairs if g is not None and g.requires_grad]
    if not products:
        return [None] * len(values)  # the loss is linear in the values
    total = sum(products)
    _refuse_missing(total)
    return torch.autograd.grad(total, values, allow_unused=True)


def _refuse_missing(total: Tensor) -> None:
    """Looks for gradients that cannot be differentiated.

    Autograd takes them for constants where the derivative by chosen tensors is asked for, and raises nothing.
    """
    seen, waiting = set(), [total.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in _UNDIFFERENTIABLE:
            raise RuntimeError("batch_derivatives: something in the model or the loss can be differentiated only once")
        waiting += [following for following, _ in node.next_functions]


def _rows(call: Call) -> int:
    """Examples in a batch: the length of its first tensor."""
    first = next((a for a in (*call.args, *call.kwargs.values()) if isinstance(a, Tensor)), None)
    return len(first) if first is not None and first.dim() else 1
