"""What the readers of each unit see while a model runs over some data, and how the loss hangs on it.

A unit is what every layer with weights reads of it: the same value in several layers counts in each of them, and the
gradient is the sum over them. So a unit of a residual stream is looked at as compaction removes it, as zero wherever it
is read. A depthwise convolution passes its units on to who reads them after it, and is not asked for gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from sparsenet.compaction.graph import Stage, UnitGraph
from sparsenet.saliency import sampled_loss
from sparsenet.saliency.measuring import checked_loss, untouched

__all__ = ["Batches", "UnitStatistics", "observe_units"]

Batches = Iterable[Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class UnitStatistics:
    """What the readers of each unit saw over some data; float64 [units].

    Attributes:
        zero_share: share of zeros (APoZ, Hu et al., 2016). mean, mean_square: of the values.
        taylor: mean over examples of |sum over places of value x gradient| (Molchanov et al., 2017); 0 without a loss.
        fisher: half the mean over examples of (that sum) squared, by the gradient of each example's own loss; 0 without
            a loss. This is the second-order change of the loss when the unit is zeroed (Theis et al., 2018; Liu et al.,
            2021, for groups of channels).
    """

    zero_share: Tensor
    mean: Tensor
    mean_square: Tensor
    taylor: Tensor
    fisher: Tensor

    @property
    def variance(self) -> Tensor:
        """Of the values."""
        return (self.mean_square - self.mean.square()).clamp(min=0.0)


class _Observer(fx.Interpreter):
    """Runs the model and keeps what each layer with weights reads, as a tensor of that layer's own."""

    def __init__(self, graph: UnitGraph):
        super().__init__(fx.GraphModule(graph.model, graph.graph))
        self.stages = {s.name: s for s in graph.stages if s.weights is not None and s.inputs is not None}
        self.seen: list[tuple[Stage, Tensor]] = []

    def call_module(self, target, args, kwargs):
        """Calls a module; a layer with weights reads an alias of its input."""
        stage = self.stages.get(target)
        if stage is not None:
            value = args[0].view_as(args[0]) if args else kwargs["input"]
            self.seen.append((stage, value))
            args = (value, *args[1:]) if args else args
        return super().call_module(target, args, kwargs)


def observe_units(
    graph: UnitGraph,
    batches: Batches,
    loss: Callable | None = None,
    *,
    targets: str | None = None,
    samples: int = 1,
    seed: int = 0,
) -> UnitStatistics:
    """Statistics by class of units, the model being in eval mode; it is left as it was.

    Args:
        batches: each the model's input, or (input, target).
        loss: ``loss(output, target)``, a mean over the examples. ``targets``: instead of one, drawn from the model's
            prediction (see :func:`sparsenet.saliency.sampled_loss`), ``samples`` times for each batch.

    Raises:
        ValueError: both a loss and targets, or an output that targets cannot be drawn from.

    Example:
        >>> import torch
        >>> from sparsenet.compaction.graph import UnitGraph
        >>> from sparsenet.compaction.statistics import observe_units
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> found = observe_units(UnitGraph(model), [torch.randn(8, 2)], targets="softmax")
        >>> bool((found.fisher >= 0).all())
        True
    """
    if loss is not None and targets is not None:
        raise ValueError("compact: give a criterion either a loss or targets, got both")
    count = len(graph.classes)
    sums = torch.zeros(5, count, dtype=torch.float64)
    seen, examples = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    observer, generator = _Observer(graph), torch.Generator().manual_seed(seed)
    passes, batch = samples if targets is not None else int(loss is not None), None
    with untouched(graph.model):
        for batch in batches:
            x, target = batch if isinstance(batch, (tuple, list)) else (batch, None)
            observer.seen.clear()
            with torch.set_grad_enabled(passes > 0):
                output = observer.run(x)
                _add_values(graph, observer.seen, sums, seen)
                for number in range(passes):
                    value = checked_loss(loss(output, target)) if loss else sampled_loss(output, targets, generator)
                    _add_pulls(graph, observer.seen, value, sums, examples, again=number + 1 < passes)
    if passes and batch is None:
        raise ValueError("compact: batches must hold at least one batch, got none")
    seen, examples = seen.clamp(min=1), examples.clamp(min=1)
    return UnitStatistics(*(sums[:3] / seen), *(sums[3:] / examples))


def _add_values(graph: UnitGraph, read: list[tuple[Stage, Tensor]], sums: Tensor, seen: Tensor) -> None:
    """Zeros, values and squares of one batch, by class."""
    for stage, value in read:
        classes, data = graph.classes[stage.inputs.units], _by_unit(stage, value.detach()).double()
        seen.index_add_(0, classes, torch.full((len(classes),), float(data.shape[0] * data.shape[2])).double())
        for row, terms in enumerate((data == 0, data, data.square())):
            sums[row].index_add_(0, classes, terms.sum((0, 2), dtype=torch.float64).cpu())


def _add_pulls(
    graph: UnitGraph, read: list[tuple[Stage, Tensor]], loss: Tensor, sums: Tensor, examples: Tensor, again: bool
) -> None:
    """Value times gradient of one backward pass, for each example over all places and readers, by class.

    The gradients are asked for and go to nobody: ``.grad`` and hooks on parameters are left alone.
    """
    read = [(stage, value) for stage, value in read if value.requires_grad and not stage.weights.per_channel]
    if not read:
        return
    gradients = torch.autograd.grad(loss, [value for _, value in read], retain_graph=again, allow_unused=True)
    pulls: dict[int, Tensor] = {}  # by number of examples, of which there is one as a rule
    reached = torch.zeros(len(graph.classes), dtype=torch.bool)
    for (stage, value), gradient in zip(read, gradients, strict=True):
        if gradient is None:
            continue
        terms = _by_unit(stage, value.detach()).double() * _by_unit(stage, gradient).double()
        classes = graph.classes[stage.inputs.units]
        total = pulls.setdefault(len(terms), torch.zeros(len(terms), len(graph.classes), dtype=torch.float64))
        total.index_add_(1, classes, terms.sum(2).cpu())
        reached[classes] = True
    for count, total in pulls.items():
        sums[3] += total.abs().sum(0)
        sums[4] += (total * count).square().sum(0) / 2  # the loss is a mean: each example's own gradient is larger
        examples += torch.where(reached, float(count), 0.0)


def _by_unit(stage: Stage, value: Tensor) -> Tensor:
    """[examples, units, places]."""
    data = value.movedim(stage.inputs.dim, 1).flatten(2 if value.dim() > 2 else 1)
    return data.reshape(data.shape[0], data.shape[1], -1)
