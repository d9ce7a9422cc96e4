"""Criteria that name units to remove: by weight, by activation, by first-order saliency, or any function of a view.

A criterion is called with the :class:`UnitView` of each layer and returns which of its units leave (bool [units]);
:func:`sparsenet.compact` then treats them as zero wherever they are read. Adding one: a frozen dataclass with
``__call__``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from sparsenet.compaction.graph import Stage, UnitGraph
from sparsenet.compaction.weights import BlockWeights, UnitWeights
from sparsenet.schedules import as_integer

__all__ = ["Magnitude", "RarelyActive", "Taylor", "UnitStatistics", "UnitView", "unit_views"]

Batches = Iterable[Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class UnitStatistics:
    """What the readers of each unit saw over some data; float64 [units].

    Attributes:
        zero_share: share of zeros (APoZ, Hu et al., 2016). mean, mean_square: of the values.
        taylor: mean over examples of |sum over places of value x gradient| (Molchanov et al., 2017); 0 without a loss.
    """

    zero_share: Tensor
    mean: Tensor
    mean_square: Tensor
    taylor: Tensor


@dataclass(frozen=True)
class UnitView:
    """One layer's units as a criterion sees them.

    Attributes:
        name, module: of the layer that makes them.
        units: int64 [units], ids in the graph.
        removable: bool [units]; others stay whatever a criterion says.
    """

    name: str
    module: nn.Module
    units: Tensor
    removable: Tensor
    _graph: UnitGraph = field(repr=False)
    _weights: UnitWeights = field(repr=False)

    @property
    def num_units(self) -> int:
        """How many there are."""
        return len(self.units)

    def incoming(self) -> Tensor:
        """float64 [units]: Euclidean norm of each unit's incoming weights."""
        return _row_squares(self._weights).sqrt()

    def outgoing(self) -> Tensor:
        """float64 [units]: Euclidean norm of each unit's outgoing weights, over all layers that read it."""
        total = torch.zeros(len(self._graph.classes), dtype=torch.float64)
        for stage in self._graph.stages:
            if stage.weights is not None and stage.inputs is not None and not stage.weights.per_channel:
                classes = self._graph.classes[stage.inputs.units]
                total.index_add_(0, classes, _column_squares(stage.weights))
        return total[self._graph.classes[self.units]].sqrt()

    def statistics(self, batches: Batches, loss: Callable | None = None) -> UnitStatistics:
        """What the readers of each unit see while the model (in eval mode) runs over ``batches``.

        Args:
            batches: each the model's input, or (input, target).
            loss: ``loss(output, target)``, for the Taylor saliency.
        """
        cache = self._graph.__dict__.setdefault("_statistics", {})
        key = (id(batches), id(loss))
        if key not in cache:
            cache[key] = (batches, loss, _observe(self._graph, batches, loss))  # holds both, so that ids stay theirs
        at = self._graph.classes[self.units]
        return UnitStatistics(*(t[at] for t in cache[key][2]))


def unit_views(graph: UnitGraph) -> dict[str, UnitView]:
    """A view of each layer that makes units, by name.

    Example:
        >>> import torch
        >>> from sparsenet.compaction.criteria import unit_views
        >>> from sparsenet.compaction.graph import UnitGraph
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> {name: view.num_units for name, view in unit_views(UnitGraph(model)).items()}
        {'0': 32, '2': 2}
    """
    pinned = torch.zeros(len(graph.classes), dtype=torch.bool)
    if graph.pins:
        pinned[torch.tensor(list(graph.pins))] = True
    return {
        stage.name: UnitView(
            stage.name,
            stage.module,
            stage.outputs.units,
            ~pinned[graph.classes[stage.outputs.units]],
            graph,
            stage.weights,
        )
        for stage in graph.stages
        if stage.weights is not None
    }


# --- criteria -------------------------------------------------------------------------------------------------------


def lowest(scores: Tensor, share: float, allowed: Tensor, group: int = 1) -> Tensor:
    """Bool [n]: the lowest of the allowed ones, about ``share * n``; ties go to the smaller index.

    With ``group`` above 1, neighbours [0, group), [group, 2 group) and so on go together, by their sum of scores.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"compact: share must lie in [0, 1], got {share}")
    group = as_integer("compact", "group", group, at_least=1)
    member = torch.arange(len(scores)) // group
    count = -(-len(scores) // group)
    total = torch.zeros(count, dtype=torch.float64).index_add_(0, member, scores.double())
    held = torch.zeros(count, dtype=torch.int64).index_add_(0, member, (~allowed).long()) > 0
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.where(held, torch.inf, total).argsort(stable=True)[: round(share * count)]] = True
    return (chosen & ~held)[member]


@dataclass(frozen=True)
class Magnitude:
    """Removes the ``share`` of each layer's units with the smallest norm of incoming times outgoing weights.

    ``group``: so many neighbours go together; the block size, where block-sparse layers shall lose whole blocks.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.compaction.criteria import Magnitude
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> _ = sn.compact(model, criterion=Magnitude(0.25))
        >>> model[0].out_features
        24
    """

    share: float
    group: int = 1

    def __call__(self, view: UnitView) -> Tensor:
        """Bool [units]."""
        return lowest(view.incoming() * view.outgoing(), self.share, view.removable, self.group)


@dataclass(frozen=True, eq=False)
class RarelyActive:
    """Removes units that are zero more often than most (APoZ; Hu et al., "Network Trimming", 2016).

    Attributes:
        batches: a list of inputs, or of (input, target).
        above: units zero in more than this share of cases; None: more than the layer's mean plus one deviation.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.compaction.criteria import RarelyActive
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> with torch.no_grad():
        ...     _ = model[0].bias[:4].fill_(-100.0)   # these units are zero for all inputs here
        >>> _ = sn.compact(model, criterion=RarelyActive([torch.randn(64, 8)], above=0.99))
        >>> model[0].out_features
        28
    """

    batches: Batches
    above: float | None = None

    def __call__(self, view: UnitView) -> Tensor:
        """Bool [units]."""
        share = view.statistics(self.batches).zero_share
        limit = self.above
        if limit is None:
            limit = float(share.mean() + (share.std() if len(share) > 1 else 0.0))
        return (share > limit) & view.removable


@dataclass(frozen=True, eq=False)
class Taylor:
    """Removes the ``share`` of each layer's units whose removal changes the loss least, to first order.

    Attributes:
        batches: a list of (input, target). loss: ``loss(output, target)``. share: of each layer's units.
        group: so many neighbours go together, as for :class:`Magnitude`.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.compaction.criteria import Taylor
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> batches = [(torch.randn(64, 8), torch.randint(2, (64,)))]
        >>> _ = sn.compact(model, criterion=Taylor(batches, torch.nn.functional.cross_entropy, share=0.5))
        >>> model[0].out_features
        16
    """

    batches: Batches
    loss: Callable[[Tensor, Tensor], Tensor]
    share: float
    group: int = 1

    def __call__(self, view: UnitView) -> Tensor:
        """Bool [units]."""
        return lowest(view.statistics(self.batches, self.loss).taylor, self.share, view.removable, self.group)


# --- measuring ------------------------------------------------------------------------------------------------------


def _row_squares(weights: UnitWeights) -> Tensor:
    if isinstance(weights, BlockWeights):
        return weights.line_squares(rows=True)
    return weights.module.weight.detach().double().flatten(1).square().sum(1).cpu()


def _column_squares(weights: UnitWeights) -> Tensor:
    if isinstance(weights, BlockWeights):
        return weights.line_squares(rows=False)
    return weights.module.weight.detach().double().transpose(0, 1).flatten(1).square().sum(1).cpu()


class _Observer(fx.Interpreter):
    """Runs the model and keeps what layers with weights read."""

    def __init__(self, graph: UnitGraph):
        super().__init__(fx.GraphModule(graph.model, graph.graph))
        readers = {
            stage.name: stage for stage in graph.stages if stage.weights is not None and stage.inputs is not None
        }
        self.readers: dict[fx.Node, Stage] = {
            node.all_input_nodes[0]: readers[node.target]
            for node in graph.graph.nodes
            if node.op == "call_module" and node.target in readers
        }
        self.seen: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node):
        """Runs one node and remembers its value if a layer reads it."""
        result = super().run_node(n)
        if n in self.readers:
            if result.requires_grad:
                result.retain_grad()
            self.seen[n] = result
        return result


def _observe(graph: UnitGraph, batches: Batches, loss: Callable | None) -> tuple[Tensor, ...]:
    """(zero share, mean, mean square, Taylor saliency), each float64 by class."""
    count = len(graph.classes)
    sums = torch.zeros(4, count, dtype=torch.float64)
    seen, examples = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    observer = _Observer(graph)
    training = {m: m.training for m in graph.model.modules()}
    grads = {p: p.grad for p in graph.model.parameters()}
    graph.model.eval()
    try:
        for batch in batches:
            x, target = batch if isinstance(batch, (tuple, list)) else (batch, None)
            observer.seen.clear()
            with torch.set_grad_enabled(loss is not None):
                output = observer.run(x)
                if loss is not None:
                    loss(output, target).backward()
            for node, value in observer.seen.items():
                _accumulate(graph, observer.readers[node], value, sums, seen, examples)
    finally:
        for module, was in training.items():
            module.training = was
        for p, grad in grads.items():
            p.grad = grad
    seen, examples = seen.clamp(min=1), examples.clamp(min=1)
    return sums[0] / seen, sums[1] / seen, sums[2] / seen, sums[3] / examples


def _accumulate(graph: UnitGraph, stage: Stage, value: Tensor, sums: Tensor, seen: Tensor, examples: Tensor) -> None:
    """Adds one batch of what ``stage`` read to the sums by class."""
    classes = graph.classes[stage.inputs.units]
    data = value.detach().movedim(stage.inputs.dim, 1).flatten(2 if value.dim() > 2 else 1)
    data = data.reshape(data.shape[0], data.shape[1], -1).double()
    places = torch.full((len(classes),), float(data.shape[0] * data.shape[2]), dtype=torch.float64)
    seen.index_add_(0, classes, places)
    for row, terms in enumerate((data == 0, data, data.square())):
        sums[row].index_add_(0, classes, terms.sum((0, 2), dtype=torch.float64).cpu())
    if value.grad is not None:
        pull = (data * value.grad.movedim(stage.inputs.dim, 1).reshape(data.shape)).sum(2)  # [examples, positions]
        by_class = torch.zeros(len(pull), len(graph.classes), dtype=torch.float64).index_add_(1, classes, pull.cpu())
        sums[3] += by_class.abs().sum(0)
        examples[classes.unique()] += len(pull)
