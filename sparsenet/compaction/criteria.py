"""Criteria that name units to remove: by weight, by activation, by first- and second-order saliency, or any function.

A criterion is called with the :class:`UnitView` of each layer and returns which of its units leave (bool [units]);
:func:`sparsenet.compact` then treats them as zero wherever they are read. Those here have ``scores`` too, float64
[units], the lowest being the first to go, which :class:`Cascade` combines. Adding one: a frozen dataclass with
``__call__``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparsenet.compaction.graph import UnitGraph
from sparsenet.compaction.statistics import Batches, UnitStatistics, observe_units
from sparsenet.compaction.weights import BlockWeights, UnitWeights
from sparsenet.schedules import as_integer, as_number

__all__ = [
    "OBD",
    "Activity",
    "Cascade",
    "Fisher",
    "Magnitude",
    "RarelyActive",
    "Taylor",
    "UnitStatistics",
    "UnitView",
    "unit_views",
]


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

    def statistics(
        self,
        batches: Batches,
        loss: Callable | None = None,
        *,
        targets: str | None = None,
        samples: int = 1,
        seed: int = 0,
    ) -> UnitStatistics:
        """What the readers of each unit see while the model (in eval mode) runs over ``batches``.

        Args:
            batches: each the model's input, or (input, target).
            loss: ``loss(output, target)``, for the Taylor and Fisher saliency. ``targets``, ``samples``, ``seed``:
                instead, drawn from the model's prediction; see :func:`sparsenet.compaction.statistics.observe_units`.
        """
        cache = self._graph.__dict__.setdefault("_statistics", {})
        key = (id(batches), id(loss), targets, samples, seed)
        if key not in cache:
            found = observe_units(self._graph, batches, loss, targets=targets, samples=samples, seed=seed)
            cache[key] = (batches, loss, found)  # holds both, so that ids stay theirs
        at, found = self._graph.classes[self.units], cache[key][2]
        return UnitStatistics(*(t[at] for t in vars(found).values()))


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
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("compact: scores of units must be numbers, got NaN or Inf")
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

    def scores(self, view: UnitView) -> Tensor:
        """float64 [units]."""
        return view.incoming() * view.outgoing()

    def __call__(self, view: UnitView) -> Tensor:
        """Bool [units]."""
        return lowest(self.scores(view), self.share, view.removable, self.group)


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

    def scores(self, view: UnitView) -> Tensor:
        """float64 [units]: the share of values that are not zero."""
        return 1.0 - view.statistics(self.batches).zero_share

    def __call__(self, view: UnitView) -> Tensor:
        """Bool [units]."""
        share = view.statistics(self.batches).zero_share
        limit = self.above
        if limit is None:
            limit = float(share.mean() + (share.std() if len(share) > 1 else 0.0))
        return (share > limit) & view.removable


@dataclass(frozen=True, eq=False)
class _ByLoss:
    """Removes the ``share`` of each layer's units of least ``_statistic``, one of those that take a loss."""

    batches: Batches
    loss: Callable[[Tensor, Tensor], Tensor]
    share: float
    group: int = 1
    _statistic: ClassVar[str]

    def scores(self, view: UnitView) -> Tensor:
        """float64 [units]."""
        return getattr(view.statistics(self.batches, self.loss), self._statistic)

    def __call__(self, view: UnitView) -> Tensor:
        """Bool [units]."""
        return lowest(self.scores(view), self.share, view.removable, self.group)


@dataclass(frozen=True, eq=False)
class Taylor(_ByLoss):
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

    _statistic = "taylor"


@dataclass(frozen=True, eq=False)
class Activity:
    """Removes the ``share`` of each layer's units whose values matter least: by their mean square, or their variance.

    A unit of small variance is nearly a constant, which whoever reads it has to learn to do without.

    Attributes:
        batches: a list of inputs, or of (input, target). by: ``mean_square`` or ``variance``. share, group: as for
            :class:`Magnitude`.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.compaction.criteria import Activity
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> _ = sn.compact(model, criterion=Activity([torch.randn(64, 8)], share=0.25))
        >>> model[0].out_features
        24
    """

    batches: Batches
    share: float
    group: int = 1
    by: str = "mean_square"

    def __post_init__(self):
        if self.by not in ("mean_square", "variance"):
            raise ValueError(f"Activity: by must be mean_square or variance, got {self.by!r}")

    def scores(self, view: UnitView) -> Tensor:
        """float64 [units]."""
        if not any(True for _ in self.batches):
            raise ValueError("Activity: batches must hold at least one batch, got none")
        return getattr(view.statistics(self.batches), self.by)

    def __call__(self, view: UnitView) -> Tensor:
        """Bool [units]."""
        return lowest(self.scores(view), self.share, view.removable, self.group)


@dataclass(frozen=True, eq=False)
class Fisher(_ByLoss):
    """Removes the ``share`` of each layer's units whose removal costs least, by the empirical Fisher of their values.

    Half the mean over examples of (the sum over places of value times gradient) squared: Theis et al. (2018) for
    channels, Liu et al. (2021, "Group Fisher pruning") for those that several layers read.

    Attributes:
        batches: a list of (input, target). loss: ``loss(output, target)``, a mean over examples. share, group: as for
            :class:`Magnitude`.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.compaction.criteria import Fisher
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> batches = [(torch.randn(64, 8), torch.randint(2, (64,)))]
        >>> _ = sn.compact(model, criterion=Fisher(batches, torch.nn.functional.cross_entropy, share=0.5))
        >>> model[0].out_features
        16
    """

    _statistic = "fisher"


@dataclass(frozen=True, eq=False)
class OBD:
    """Removes the ``share`` of each layer's units of least h / 2, h being the curvature by a gate of 1 on each unit.

    LeCun, Denker & Solla (1989) for units in place of weights: zeroing a unit moves its gate from 1 to 0. h is the
    diagonal of the Gauss-Newton matrix of the gates, estimated with targets drawn from the model's own prediction, so
    that no labels are needed.

    Attributes:
        batches: a list of inputs. targets: ``softmax`` (the outputs are logits) or ``gaussian``. samples: draws for
            each batch. seed: of the draws. share, group: as for :class:`Magnitude`.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.compaction.criteria import OBD
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> _ = sn.compact(model, criterion=OBD([torch.randn(64, 8)], share=0.5))
        >>> model[0].out_features
        16
    """

    batches: Batches
    share: float
    group: int = 1
    targets: str = "softmax"
    samples: int = 1
    seed: int = 0

    def scores(self, view: UnitView) -> Tensor:
        """float64 [units]."""
        return view.statistics(self.batches, targets=self.targets, samples=self.samples, seed=self.seed).fisher

    def __call__(self, view: UnitView) -> Tensor:
        """Bool [units]."""
        return lowest(self.scores(view), self.share, view.removable, self.group)


@dataclass(frozen=True, eq=False)
class Cascade:
    """Removes the ``share`` of each layer's units that the expensive criterion takes from the cheap one's shortlist.

    Attributes:
        cheap, expensive: criteria with ``scores``; their own shares do not count. share: of each layer's units.
        shortlist: how many times as long as what leaves the shortlist is. group: as for :class:`Magnitude`.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.compaction.criteria import OBD, Cascade, Magnitude
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        >>> criterion = Cascade(Magnitude(0.25), OBD([torch.randn(64, 8)], 0.25), share=0.25, shortlist=2.0)
        >>> _ = sn.compact(model, criterion=criterion)
        >>> model[0].out_features
        24
    """

    cheap: Any
    expensive: Any
    share: float
    shortlist: float = 3.0
    group: int = 1

    def __post_init__(self):
        if as_number("Cascade", "shortlist", self.shortlist) < 1.0:
            raise ValueError(f"Cascade: shortlist must be at least 1, got {self.shortlist}")

    def __call__(self, view: UnitView) -> Tensor:
        """Bool [units]."""
        longer = min(1.0, self.shortlist * self.share) if self.share <= 1.0 else self.share
        listed = lowest(self.cheap.scores(view), longer, view.removable, self.group)
        return lowest(self.expensive.scores(view), self.share, listed, self.group)


# --- measuring ------------------------------------------------------------------------------------------------------


def _row_squares(weights: UnitWeights) -> Tensor:
    if isinstance(weights, BlockWeights):
        return weights.line_squares(rows=True)
    return weights.module.weight.detach().double().flatten(1).square().sum(1).cpu()


def _column_squares(weights: UnitWeights) -> Tensor:
    if isinstance(weights, BlockWeights):
        return weights.line_squares(rows=False)
    return weights.module.weight.detach().double().transpose(0, 1).flatten(1).square().sum(1).cpu()
