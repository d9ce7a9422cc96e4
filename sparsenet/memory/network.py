"""Bytes of a training step of any model and optimizer, item by item and at the moment of the peak.

What stays (parameters, buffers, indices, optimizer state) is added up. What a forward pass keeps for its backward is
counted on one forward pass. The peak comes from playing a step through: the forward pass, the backward layer by layer,
where gradients appear while activations go, and the optimizer's step. tests/memory compares it with measurements.
:func:`sparsenet.plan` does the same for a block-sparse MLP that is not built yet.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsenet import functional
from sparsenet.functional.bits import UNPACKED_AT_ONCE
from sparsenet.layers import SparseLinear
from sparsenet.limits import SavedBytes
from sparsenet.optimizer_state import as_optimizers, scratch_twin, state_bytes, with_inner_optimizers
from sparsenet.pattern import INDEX_BYTES

__all__ = ["StepBytes", "step_bytes"]


@dataclass(frozen=True)
class StepBytes:
    """What a training step of a model takes.

    Attributes:
        items: bytes by item, each whole: ``parameters``, ``gradients``, ``optimizer state``, ``buffers``, ``indices``,
            ``activations``, ``outputs`` (of the model and its loss), ``workspace`` (of the block-sparse kernels).
        moments: bytes at each moment of a step; the data of the batch are in none.
        activation_bytes: what is kept for the backward pass, by the name of the layer whose outputs it scales with.
    """

    items: Mapping[str, int]
    moments: Mapping[str, int]
    activation_bytes: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes at the moment of the peak."""
        return max(self.moments.values())

    @property
    def at_once(self) -> int:
        """Bytes of all items together, or of the optimizer's step where that takes more: what a Grower counts."""
        return max(sum(self.items.values()), self.moments["optimizer step"])

    @property
    def moment(self) -> str:
        """The moment of the peak."""
        return max(self.moments, key=lambda name: self.moments[name])


@dataclass
class _Visit:
    """A layer with weights, as the forward pass came through it."""

    name: str
    fused: bool  # its activation is part of it
    in_bytes: int = 0
    out_bytes: int = 0
    parameters: list[nn.Parameter] = field(default_factory=list)  # its own, and those of norms behind it


def step_bytes(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
    inputs: Tensor | Sequence[Any],
    *,
    loss: Callable[[Any], Tensor] | None = None,
    gradients_kept: bool = False,
) -> StepBytes:
    """Predicts the memory of a training step: forward, backward and ``optimizer.step()``, in bytes.

    Args:
        model: of any modules; block-sparse layers count what they store.
        optimizer: one, several, or None. State that is not there yet is what a scratch twin would have.
        inputs: of one batch; a tuple or list are several arguments. They do not count.
        loss: of the model's output; default one like cross-entropy, which keeps one more tensor of the output's size.
        gradients_kept: whether the gradients of the last step are still there during the forward pass, as where
            ``zero_grad`` stands between forward and backward, or does not set them to None.

    Runs one forward pass as the model is, training or not, and leaves buffers and random state as they were.

    Raises:
        TypeError: something that is no module or no optimizer. What the model raises for its inputs.

    What is kept between two layers with weights is put down to the first of them; in a network with branches to the one
    that ran last.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.memory import step_bytes
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
        >>> predicted = step_bytes(model, torch.optim.AdamW(model.parameters()), torch.randn(32, 64))
        >>> predicted.items["activations"], predicted.activation_bytes   # [32, 128] float32
        (16384, {'0': 16384})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"step_bytes: model must be a module, got {type(model).__name__}")
    optimizers = with_inner_optimizers(as_optimizers(optimizer))
    arguments = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    visits, saved, output_bytes = _one_forward(model, arguments, loss)
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    layers = [m for m in model.modules() if isinstance(m, SparseLinear)]
    rows = {visit.name: visit.out_bytes for visit in visits}
    states = [state_bytes(optimizers, p) for p in parameters]
    items = {
        "parameters": _bytes_of(parameters),
        "gradients": _bytes_of(trained),
        "optimizer state": sum(
            each * (p.shape[0] if p.dim() else 1) + fixed for p, (each, fixed) in zip(parameters, states, strict=True)
        ),
        "buffers": _bytes_of(model.buffers()),
        "indices": sum(
            layer.pattern.num_blocks * INDEX_BYTES + (0 if (bits := layer.topology.mask_bits) is None else bits.nbytes)
            for layer in layers
        ),
        "activations": saved.bytes,
        "outputs": output_bytes,
        "workspace": _workspace_bytes(model, rows),
    }
    moments = dict(_moments(items, visits, saved, gradients_kept))
    temporary = max((_temporary_bytes(o) for o in optimizers), default=0)
    stays = items["parameters"] + items["optimizer state"] + items["buffers"] + items["indices"] + items["workspace"]
    moments["optimizer step"] = stays + items["gradients"] + items["outputs"] + temporary
    return StepBytes(items, moments, {name: count for name, count in saved.by_owner.items() if name})


def _moments(
    items: Mapping[str, int], visits: Sequence[_Visit], saved: SavedBytes, gradients_kept: bool
) -> Iterator[tuple[str, int]]:
    stays = sum(items[name] for name in ("parameters", "optimizer state", "buffers", "indices", "workspace", "outputs"))
    gradients = items["gradients"] if gradients_kept else 0
    yield "forward", stays + gradients + items["activations"]
    names = list(dict.fromkeys(visit.name for visit in visits))
    own, read = {}, {}  # kept since the layer ran: behind it, and as its input
    for name in names:
        read[name] = sum(saved.inputs.get(name, {}).values())
        passed_on = sum(taken.get(name, 0) for taken in saved.inputs.values())
        own[name] = saved.by_owner.get(name, 0) - passed_on
    nameless = saved.by_owner.get("", 0) - sum(taken.get("", 0) for taken in saved.inputs.values())
    until = dict(zip(names, itertools.accumulate(own[n] + read[n] for n in names), strict=True))
    for visit in reversed(visits):
        alive = stays + nameless + until[visit.name]
        activation = alive + gradients + (0 if visit.fused else 2 * visit.out_bytes)
        fresh = _bytes_of(visit.parameters)  # where there is a gradient already, beside it
        visit.parameters = []  # of several visits, the last of the forward pass makes the gradient
        alive -= 0 if visit.fused else own[visit.name]
        weights = alive + gradients + fresh + visit.out_bytes + visit.in_bytes
        gradients += 0 if gradients_kept else fresh
        yield f"backward of {visit.name}", max(activation, weights)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Leaves buffers, random state and what the layers count of their calls as they were before."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    counted = [(m.topology, m.topology.expected_calls) for m in model.modules() if isinstance(m, SparseLinear)]
    devices = sorted({tensor.device.index for tensor in model.parameters() if tensor.is_cuda})
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for topology, calls in counted:
            topology.expected_calls = calls


def _one_forward(
    model: nn.Module, arguments: tuple, loss: Callable[[Any], Tensor] | None
) -> tuple[list[_Visit], SavedBytes, int]:
    """The layers in the order of the forward pass, what is kept for the backward, and bytes of output and loss."""
    given = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    saved = SavedBytes([*model.parameters(), *model.buffers(), *given])
    visits: list[_Visit] = []
    hooks = list(_watch(model, saved, visits))
    try:
        with undisturbed(model), torch.enable_grad(), saved:
            output = model(*arguments)
            outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            for leaf in outputs:
                saved.claim(leaf, "output")
            saved.owner = "loss"
            value = None if loss is None else loss(output)
    finally:
        for hook in hooks:
            hook.remove()
    kept_by_loss = saved.by_owner.pop("loss", 0)
    saved.by_owner.pop("output", None)
    of_loss = _bytes_of(outputs) if loss is None else kept_by_loss
    del value  # until here it kept its graph
    return visits, saved, _bytes_of(outputs) + of_loss


def _watch(model: nn.Module, saved: SavedBytes, visits: list[_Visit]) -> Iterator[Any]:
    """Hooks that tell ``saved`` whose outputs it sees, and note the layers as they are run."""

    def before(name: str):
        def enter(module: nn.Module, arguments: tuple) -> None:
            for leaf in tree_leaves(arguments):
                if isinstance(leaf, Tensor):
                    saved.claim(leaf, saved.owner)  # its input scales with the layer before
            own = list(module.parameters(recurse=False))
            if any(p.dim() > 1 for p in own):
                saved.owner = name
                visits.append(_Visit(name, fused=isinstance(module, SparseLinear), in_bytes=_tensors(arguments)))
            if visits:
                visits[-1].parameters += [p for p in own if p.requires_grad]

        return enter

    def after(module: nn.Module, arguments: tuple, output: Any) -> None:
        if visits:
            visits[-1].out_bytes = max(visits[-1].out_bytes, _tensors(output))

    for name, module in model.named_modules():
        if next(iter(module.parameters(recurse=False)), None) is None:
            continue
        yield module.register_forward_pre_hook(before(name))
        yield module.register_forward_hook(after)


def _tensors(tree: Any) -> int:
    return _bytes_of(leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def _bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _workspace_bytes(model: nn.Module, out_bytes: Mapping[str, int]) -> int:
    """Scratch memory that the CPU kernels of the block-sparse layers keep, by dry runs of their calls.

    A pass through a layer with a mask takes, for itself, a copy of the values and some of the mask unpacked.
    """
    sizes = []
    for name, layer in model.named_modules():
        if isinstance(layer, SparseLinear) and layer.values.device.type == "cpu" and out_bytes.get(name):
            batch = out_bytes[name] // (layer.pattern.shape[0] * layer.values.element_size())
            call = (layer.values.dtype, layer.pattern.shape, layer.block_size, layer.pattern.num_blocks)
            sizes.append(functional.linear_workspace(*call, batch, torch.get_num_threads()))
    masked = [m.values for m in model.modules() if isinstance(m, SparseLinear) and m.topology.mask_bits is not None]
    copied = max((values.nbytes + min(values.numel(), UNPACKED_AT_ONCE) for values in masked), default=0)
    return copied + sum(max(buffer) for buffer in itertools.zip_longest(*sizes, fillvalue=0))


# --- the optimizer's temporary tensors ------------------------------------------------------------------------------


class _LiveBytes(TorchDispatchMode):
    """Counts the new memory that is alive at once while it is on: the outputs of operations that are no views."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self._add(tensor.nbytes)
                weakref.finalize(tensor, self._add, -tensor.nbytes)
        return made

    def _add(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)


def _temporary_bytes(optimizer: torch.optim.Optimizer) -> int:
    """What ``optimizer.step()`` takes for a moment: for its largest parameter, or for all that it treats together."""
    most = 0
    for group in optimizer.param_groups:
        held = [p for p in group["params"] if p.requires_grad and p.numel()]
        if not held:
            continue
        largest = max(held, key=lambda p: p.nbytes)
        twin, scratch = scratch_twin(optimizer, largest, 1)
        if twin is None:
            continue
        with torch.no_grad(), _LiveBytes() as live:
            twin.step()
        together = _bytes_of(held) if group.get("foreach") else largest.nbytes
        most = max(most, round(live.most / scratch.nbytes) * together)
    return most
