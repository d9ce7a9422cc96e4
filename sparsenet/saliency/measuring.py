"""Running a model for the sake of its gradients, and leaving no trace of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsenet.layers import SparseLinear
from sparsenet.schedules import as_integer

__all__ = ["TARGETS", "Batches", "Call", "LastCall", "sampled_loss", "show_backward_passes", "untouched"]

TARGETS = ("softmax", "gaussian")


class Call(NamedTuple):
    """The arguments of one call of a model.

    Example:
        >>> import torch
        >>> from sparsenet.saliency import Call
        >>> Call((torch.ones(2, 4),), {"scale": 2.0}).kwargs
        {'scale': 2.0}
    """

    args: tuple
    kwargs: dict[str, Any]


Batches = Iterable[Tensor | tuple | Call]  # the model's input, (input, target), or the arguments of a call


class LastCall:
    """Remembers the arguments of the last call of a model that recorded a graph; evaluation does not count.

    Attributes:
        call: the :class:`Call`, or None.

    Example:
        >>> import torch
        >>> from sparsenet.saliency import LastCall
        >>> model = torch.nn.Linear(4, 2)
        >>> last = LastCall(model)
        >>> _ = model(torch.ones(3, 4))
        >>> last.remove()
        >>> last.call.args[0].shape
        torch.Size([3, 4])
    """

    def __init__(self, model: nn.Module | None = None):
        self.call: Call | None = None
        self._handle = None if model is None else model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """The hook."""
        if self._handle is not None and torch.is_grad_enabled():
            self.call = Call(args, dict(kwargs))

    def remove(self) -> None:
        """Looks no more; the last call is kept."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __deepcopy__(self, memo) -> LastCall:
        return LastCall()  # a copy of the model is not watched

    def __reduce__(self):
        return LastCall, ()


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode; afterwards modes, buffers and the state of random numbers are what they were.

    Example:
        >>> import torch
        >>> from sparsenet.saliency.measuring import untouched
        >>> model = torch.nn.Dropout()
        >>> with untouched(model):
        ...     inside = model.training
        >>> inside, model.training
        (False, True)
    """
    training = {module: module.training for module in model.modules()}
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(sorted(devices, key=str)):
        model.eval()
        try:
            yield
        finally:
            for module, was in training.items():
                module.training = was
            for module, name, buffer, was in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, was):
                    with torch.no_grad():
                        buffer.copy_(was)


def show_backward_passes(
    model: nn.Module,
    layers: Mapping[str, SparseLinear],
    batches: Batches,
    visit: Callable[[str, Tensor, Tensor], None],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    targets: str | None = None,
    samples: int = 1,
    seed: int = 0,
) -> None:
    """Runs ``model`` in eval mode over ``batches`` and shows ``visit`` what every backward pass brings to the layers.

    Args:
        layers: those of the model to look at; their values or biases must require a gradient.
        batches: each the model's input, (input, target), or a :class:`Call`, which may also stand for the input.
        visit: called with the layer's name, x [rows, in] and the gradient of its output before the activation
            [rows, out], once per call of the layer.
        loss: ``loss(output, target)``, a mean over the examples. Without one, ``targets``.
        targets: drawn from what the model itself predicts, see :func:`sampled_loss`.
        samples: backward passes per batch, each with targets of its own. seed: of the targets.

    Gradients, modes, buffers and the state of random numbers stay as they were.

    Raises:
        ValueError: no batch, an empty one, an output or a loss that does not serve.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.saliency import show_backward_passes
        >>> model, seen = sn.SparseMLP([16, 8, 4], density=0.5, block_size=4), []
        >>> def visit(name, x, grad_output):
        ...     seen.append((name, list(x.shape), list(grad_output.shape)))
        >>> show_backward_passes(model, {"0": model[0]}, [torch.randn(5, 16)], visit, targets="softmax")
        >>> seen
        [('0', [5, 16], [5, 8])]
    """
    if (loss is None) == (targets is None):
        raise ValueError("show_backward_passes: give either loss or targets, got " + ("both" if loss else "neither"))
    samples = as_integer("show_backward_passes", "samples", samples, at_least=1)
    leaves = [_leaf(name, layer) for name, layer in layers.items()]
    generator = torch.Generator().manual_seed(seed % 2**63)
    before = {name: (layer.topology.observer, layer.topology.expected_calls) for name, layer in layers.items()}
    count = 0
    with untouched(model), torch.inference_mode(False), torch.enable_grad():
        try:
            for name, layer in layers.items():
                layer.topology.observer = partial(visit, name)
            for count, batch in enumerate(batches, 1):  # noqa: B007 - read after the loop
                call, target = call_and_target(batch, needs_target=loss is not None)
                output = model(*call.args, **call.kwargs)
                for number in range(samples):
                    value = checked_loss(loss(output, target)) if loss else sampled_loss(output, targets, generator)
                    if leaves:
                        torch.autograd.grad(value, leaves, retain_graph=number + 1 < samples, allow_unused=True)
        finally:
            for name, (observer, calls) in before.items():
                layers[name].topology.observer, layers[name].topology.expected_calls = observer, calls
    if not count:
        raise ValueError("show_backward_passes: batches must hold at least one batch, got none")


def _leaf(name: str, layer: SparseLinear) -> Tensor:
    """What a gradient is asked of, so that backward runs through the layer: the bias, which is small, if there is one.

    The gradient goes to nobody: ``.grad`` and the hooks of whoever averages gradients are left alone.
    """
    leaf = next((p for p in (layer.bias, layer.values) if p is not None and p.requires_grad), None)
    if leaf is None:
        raise ValueError(f"show_backward_passes: layers must be trainable, got {name!r}, which is frozen")
    return leaf


def call_and_target(batch: Any, needs_target: bool, owner: str = "show_backward_passes") -> tuple[Call, Any]:
    """The call that a batch means, and its target; ValueError, in the name of ``owner``, for anything else."""
    target = None
    if isinstance(batch, Call):
        call = batch
    elif isinstance(batch, Tensor):
        call = Call((batch,), {})
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        call = batch[0] if isinstance(batch[0], Call) else Call((batch[0],), {})
        target = batch[1]
    else:
        raise ValueError(
            f"{owner}: batches must be inputs, (input, target) pairs or Calls, got "
            f"{type(batch).__name__}" + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        )
    if needs_target and target is None:
        raise ValueError(f"{owner}: batches must be (input, target) pairs for a loss, got an input alone")
    first = next((a for a in (*call.args, *call.kwargs.values()) if isinstance(a, Tensor)), None)
    if first is not None and first.dim() and not len(first):
        raise ValueError(f"{owner}: batches must hold examples, got an empty batch")
    return call, target


def checked_loss(value: Any) -> Tensor:
    """What a loss returned; ValueError unless it is one number with a graph."""
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        got = f"{list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"saliency: loss must return one number that depends on the weights, got {got}")
    return value


def sampled_loss(output: Tensor, targets: str, generator: torch.Generator) -> Tensor:
    """The loss for targets drawn from the model's own prediction.

    The mean of the products of its gradients is the Fisher information matrix, which is the Gauss-Newton matrix of
    these losses (Martens, 2020); one drawn target per example gives an unbiased estimate of it and of its diagonal
    (Dangel, Kunstner & Hennig, 2020).

    Args:
        output: [batch, n] or [batch, places, n]; logits (or log-probabilities) of n classes for ``softmax``, means of n
            numbers for ``gaussian``.
        targets: ``softmax``: classes, for cross-entropy. ``gaussian``: numbers of unit variance, for half the squared
            error.
        generator: on the CPU.

    Returns:
        The mean over rows, differentiable. For ``gaussian`` a term that has no gradient is left out.

    Raises:
        ValueError: an output of another kind.

    Example:
        >>> import torch
        >>> from sparsenet.saliency import sampled_loss
        >>> logits = torch.tensor([[0.0, 50.0], [50.0, 0.0]], requires_grad=True)   # it is sure: it draws 1 and 0
        >>> bool(sampled_loss(logits, "softmax", torch.Generator().manual_seed(0)) < 1e-6)
        True
    """
    if targets not in TARGETS:
        raise ValueError(f"sampled_loss: targets must be one of {', '.join(TARGETS)}, got {targets!r}")
    least = 2 if targets == "softmax" else 1
    if (
        not isinstance(output, Tensor)
        or not output.is_floating_point()
        or output.dim() not in (2, 3)
        or output.shape[-1] < least
        or not output.requires_grad
    ):
        got = f"{output.dtype} {list(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"sampled_loss: the model's output must be trained [batch, n] or [batch, places, n], n at least {least}, "
            f"for targets={targets!r}, got {got}; give a loss"
        )
    rows = output.reshape(-1, output.shape[-1])
    rows = rows if rows.dtype == torch.float64 else rows.float()
    if targets == "gaussian":
        noise = torch.randn(rows.shape, generator=generator).to(rows)
        return (rows * noise).sum() / len(rows)
    cumulated = torch.softmax(rows.detach(), 1).cumsum(1)
    drawn = torch.rand(len(rows), 1, generator=generator).to(rows) * cumulated[:, -1:]
    labels = (cumulated <= drawn).sum(1).clamp_(max=rows.shape[1] - 1)
    return nn.functional.cross_entropy(rows, labels)
