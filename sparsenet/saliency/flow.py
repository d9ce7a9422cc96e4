"""How much flows through each weight when all weights are positive and nothing bends: no data, no loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from sparsenet.layers import SparseLinear
from sparsenet.saliency.measuring import Call, untouched
from sparsenet.saliency.second_order import computes_as_ever, differentiable_layer, replaced_forwards

__all__ = ["synaptic_flow"]

_TOLERANCE = 1e-4  # of the test that the network is a sum of products of weights, relative to its output

_LEVEL = 1e-13  # the same, of the test that the output depends on the input

_BENDING = {  # what is the identity here
    *(F.relu, F.relu_, F.relu6, F.gelu, F.silu, F.mish, F.elu, F.elu_, F.selu, F.selu_, F.celu, F.celu_),
    *(F.leaky_relu, F.leaky_relu_, F.prelu, F.rrelu, F.softplus, F.softsign, F.hardswish, F.hardtanh, F.hardsigmoid),
    *(F.tanh, F.sigmoid, F.logsigmoid, F.tanhshrink, F.threshold),
    *(torch.relu, torch.relu_, torch.tanh, torch.sigmoid, torch.selu, torch.celu, torch.prelu, torch.rrelu),
    *(Tensor.relu, Tensor.relu_, Tensor.tanh, Tensor.tanh_, Tensor.sigmoid, Tensor.sigmoid_, Tensor.prelu),
}
_WEIGHING = {  # softmax, whose derivative is zero where all inputs are alike: attention
    *(F.softmax, F.log_softmax, F.softmin, F.scaled_dot_product_attention, F.multi_head_attention_forward),
    *(torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax),
}


class _Bends(Exception):
    """What makes the model no sum of products of its weights."""


class _Straight(TorchFunctionMode):
    """Activations are the identity, norms scale by the size of their weight; softmax has no place in the formula."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _BENDING:
            return args[0] if args else kwargs["input"]
        if func in _WEIGHING:
            raise _Bends("a softmax")
        if (straight := _NORMS.get(func)) is not None:
            return straight(*args, **kwargs)
        return func(*args, **kwargs)


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _by_channel(x: Tensor, *parameters: Tensor | None) -> list[Tensor | None]:
    """[channels] of each as [channels, 1, ...], to fit x [batch, channels, ...]."""
    return [None if p is None else p.view(-1, *[1] * (x.dim() - 2)) for p in parameters]


def _layer_norm(input, normalized_shape, weight=None, bias=None, eps=1e-5):
    return _scaled(input, weight, bias)


def _rms_norm(input, normalized_shape, weight=None, eps=None):
    return _scaled(input, weight, None)


def _group_norm(input, num_groups, weight=None, bias=None, eps=1e-5):
    return _scaled(input, *_by_channel(input, weight, bias))


def _batch_norm(input, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    weight, bias, var = _by_channel(input, weight, bias, var)
    return _scaled(input if var is None else input / (var + eps).sqrt(), weight, bias)


def _instance_norm(input, mean=None, var=None, weight=None, bias=None, use_input_stats=True, momentum=0.1, eps=1e-5):
    return _batch_norm(input, mean, None if use_input_stats else var, weight, bias, eps=eps)


_NORMS: dict[Callable, Callable] = {
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    F.instance_norm: _instance_norm,
}
if hasattr(F, "rms_norm"):  # torch 2.4
    _NORMS[F.rms_norm] = _rms_norm


def synaptic_flow(model: nn.Module, layers: Sequence[SparseLinear], call: Call, owner: str = "synaptic_flow"):
    """``|w dR/dw|`` of every weight w of ``layers``, R being the sum of the outputs for an input of ones.

    Tanaka et al. (2020): all parameters and running statistics enter by their size, in float64, so that R is the sum
    over all paths of the products of their weights. As in the authors' code biases begin paths of their own, and batch
    normalisation divides by its running deviation. Beyond that code, which is for ReLU networks at initialisation, what
    bends is left out: activations are the identity; layer, group, instance and RMS norms scale by their weight and do
    not normalise; batch normalisation subtracts no mean (at initialisation there is none).

    Args:
        model: stays as it is, bit for bit: it runs on copies of its parameters and buffers.
        call: the shapes of its arguments. Floating-point tensors become ones of one example, their first.
        owner: who an error speaks for.

    Returns:
        For each layer float64 [num_blocks, b, b], all in one unit, that of the largest of them, which is 1; all zero
        where nothing reaches the output, NaN where R exceeds float64, as in 190 dense layers of 1024 units.

    Raises:
        ValueError: a model that does not run on ones, returns no tensor, or is no sum of products of its weights: that
            multiplies two signals, normalises them by means of its own, or has a softmax (attention, whose queries and
            keys would get no flow at all).

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.saliency import Call, synaptic_flow
        >>> model = sn.SparseMLP([2, 1, 1], density=1.0, block_size=1, bias=False)
        >>> with torch.no_grad():
        ...     _ = model[0].values.copy_(torch.tensor([-3.0, 1.0]).view(2, 1, 1)), model[1].values.fill_(2.0)
        >>> flow = synaptic_flow(model, list(model), Call((torch.randn(8, 2),), {}))   # R = (3 + 1) 2
        >>> [8 * f.flatten() for f in flow]
        [tensor([6., 2.], dtype=torch.float64), tensor([8.], dtype=torch.float64)]
    """

    def straight(module: nn.Module) -> Callable[..., Tensor] | None:
        if isinstance(module, nn.MultiheadAttention):
            raise _Bends("an attention")
        return partial(differentiable_layer, module, activation="none") if computes_as_ever(module) else None

    measurement = _Measurement(model, layers, owner)
    with untouched(model), torch.inference_mode(False):
        named = [*measurement.named_parameters(), *measurement.named_buffers()]
        positive = {name: _size_of(t) for name, t in named}
        try:
            with replaced_forwards(model, straight), _Straight():
                flows, bends = functional_call(measurement, positive, (call,))
        except _Bends as what:
            raise ValueError(f"{owner}: model must be a sum of products of its weights, got {what} in it") from None
        except (RuntimeError, TypeError, ValueError) as error:
            if str(error).startswith(f"{owner}:"):
                raise
            given, line = _shapes(call), str(error).strip().partition("\n")[0]
            raise ValueError(
                f"{owner}: model must run on ones of its inputs' shape, here {given}, got: {line}"
            ) from error
    if bends:
        raise ValueError(
            f"{owner}: model must be a sum of products of its weights, got one whose output is not linear in its input "
            "when torch's activations and norms are left out"
        )
    largest = max((float(f.max()) for f in flows if f.numel()), default=0.0)
    return [f.div_(largest) if largest else f for f in flows]


class _Measurement(nn.Module):
    """Forward and backward in one, so that what backward computes anew has the same parameters."""

    def __init__(self, model: nn.Module, layers: Sequence[SparseLinear], owner: str):
        super().__init__()
        self.model, self.owner = model, owner
        self.layers = tuple(layers)

    def forward(self, call: Call) -> tuple[list[Tensor], bool]:
        """The flows, and whether the model is no sum of products."""
        weights = [layer.values.requires_grad_() for layer in self.layers]
        with torch.enable_grad():
            first = self.output(call, 1.0)
            _check_output(first, self.owner)
            gradients = torch.autograd.grad(first.sum(), weights, allow_unused=True)
        with torch.no_grad():
            bends = _bends(first.detach(), self.output(call, 2.0), self.output(call, 3.0))
            pairs = zip(weights, gradients, strict=True)
            return [torch.zeros_like(w) if g is None else g.abs_().mul_(w.detach()) for w, g in pairs], bends

    def output(self, call: Call, scale: float) -> Tensor:
        """What the model makes of one example of ``scale`` everywhere."""
        ones = _ones(call, scale)
        return self.model(*ones.args, **ones.kwargs)


def _size_of(t: Tensor) -> Tensor:
    return t.detach().to(torch.float64, copy=True).abs_() if t.is_floating_point() else t


def _ones(call: Call, scale: float) -> Call:
    """The arguments for one example, numbers being ``scale``."""

    def one(argument):
        if not isinstance(argument, Tensor):
            return argument
        first = argument[:1] if argument.dim() > 1 else argument
        return torch.full_like(first, scale, dtype=torch.float64) if first.is_floating_point() else first

    return Call(tuple(map(one, call.args)), {name: one(a) for name, a in call.kwargs.items()})


def _shapes(call: Call) -> str:
    given = _ones(call, 1.0)
    return ", ".join(str(list(a.shape)) for a in (*given.args, *given.kwargs.values()) if isinstance(a, Tensor))


def _check_output(output, owner: str) -> None:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        got = f"{output.dtype}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{owner}: model must return one floating-point tensor, got {got}")
    if not output.requires_grad:
        raise ValueError(f"{owner}: model must return what its sparse layers computed, got an output without a graph")


def _bends(first: Tensor, second: Tensor, third: Tensor) -> bool:
    """Whether outputs for the inputs 1, 2 and 3 lie on no straight line, or on a level one: normalised by something."""
    size = third.abs().amax()
    off, rise = (third - 2 * second + first).abs().amax(), (third - first).abs().amax()
    return bool(size > 0) and bool((off > _TOLERANCE * size) | (rise <= _LEVEL * size))
