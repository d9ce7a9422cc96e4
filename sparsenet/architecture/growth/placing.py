"""Where new units stand: behind the last unit of a layer, in every tensor that holds that unit.

:class:`~sparsenet.compaction.graph.UnitGraph` names the units along every tensor. A layer grows by new units right
behind its last one, the *anchor*; so does whoever is added to it, and whoever reads it gets columns there. The tensors
of a concatenation may hold the anchor in the middle, those of a flattened map many times in a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sparsenet.architecture.gate_kinds import HardConcreteGate
from sparsenet.compaction.graph import CompactionError, Stage, UnitGraph
from sparsenet.compaction.modules import CompactLayerNorm
from sparsenet.compaction.rules import Axis
from sparsenet.compaction.weights import BlockWeights
from sparsenet.layers import SparseLinear

__all__ = ["Birth", "GrowthError", "Placing", "growable", "multiple_of", "place", "readers"]

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


class GrowthError(ValueError):
    """A model that cannot grow as asked; nothing was changed."""


@contextmanager
def said_by(op: str) -> Iterator[None]:
    """Errors of what growth shares with compaction and the Sparsifier, as errors of ``op``."""
    try:
        yield
    except (CompactionError, ValueError, TypeError, RuntimeError) as error:
        text = str(error)
        for owner in ("compact: ", "Sparsifier: "):
            if text.startswith(owner):
                raise GrowthError(f"{op}: {text.removeprefix(owner)}") from None
        raise


# --- new units ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Birth:
    """New units of one layer.

    Attributes:
        stage: the layer. anchor: class of the unit that they stand behind.
        first: number of the first of them among all that are born together; they have the numbers that follow.
        twin: int64 [count]: the earlier one of them whose mirror each is, -1: none.
        parent: int64 [count]: class of the unit that each is a copy of, -1: none.
        speaks: bool [count]: whether anything of it is heard at birth (its outgoing weights are not zero).
        how: the rule, as the report tells it.
    """

    stage: Stage
    anchor: int
    first: int
    twin: np.ndarray
    parent: np.ndarray
    speaks: np.ndarray
    how: str

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.twin)


@dataclass(frozen=True)
class Placing:
    """One axis after growth, by new position.

    Attributes:
        old: int64 [n]: the position before, -1 for a new one.
        born: int64 [n]: number of the newborn unit, -1 for an old one.
        source: int64 [n]: the new position of its twin or parent, -1: none.
        inserted: (old position behind which, how many), ascending.
    """

    old: Tensor
    born: Tensor
    source: Tensor
    inserted: tuple[tuple[int, int], ...]

    @property
    def new(self) -> Tensor:
        """int64: the new positions, ascending."""
        return (self.old < 0).nonzero().flatten()

    def index(self) -> Tensor:
        """int64 [n]: ``old`` with any valid position where it is -1."""
        return self.old.clamp(min=0)


def place(graph: UnitGraph, axis: Axis, births: Sequence[Birth]) -> Placing | None:
    """``axis`` with the new units in it; None where it gets none."""
    classes = graph.classes[axis.units].numpy()
    runs = [
        (int(end), int(length), int(before), birth)
        for birth in births
        for end, length, before in zip(*_runs(classes, birth.anchor), strict=True)
    ]
    if not runs:
        return None
    runs.sort(key=lambda run: run[0])
    old, born, start, inserted = [], [], 0, []
    places = []  # of each run: first new position, length, occurrences of the anchor before it, birth
    size = 0
    for end, length, before, birth in runs:
        old += [np.arange(start, end), np.full(birth.count * length, -1)]
        born += [np.full(end - start, -1), np.repeat(np.arange(birth.count) + birth.first, length)]
        size += end - start
        places.append((size, length, before, birth))
        size += birth.count * length
        start = end
        inserted.append((end, birth.count * length))
    old.append(np.arange(start, len(classes)))
    born.append(np.full(len(classes) - start, -1))
    olds, borns = np.concatenate(old), np.concatenate(born)
    source = np.full(len(olds), -1)
    now = np.flatnonzero(olds >= 0)  # where each old position went
    for at, length, before, birth in places:
        for unit in np.flatnonzero((birth.twin >= 0) | (birth.parent >= 0)):
            mine = slice(at + unit * length, at + (unit + 1) * length)
            if birth.twin[unit] >= 0:
                source[mine] = at + birth.twin[unit] * length + np.arange(length)
            else:
                held = now[np.flatnonzero(classes == birth.parent[unit])]
                source[mine] = held[before : before + length]
    return Placing(*map(torch.from_numpy, (olds, borns, source)), tuple(inserted))


def _runs(classes: np.ndarray, anchor: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the anchor stands several times in a row: (end, length, occurrences before) of each such run."""
    at = np.flatnonzero(classes == anchor)
    starts = np.flatnonzero(np.diff(at, prepend=-2) > 1)
    lengths = np.diff(starts, append=len(at))
    return (at[starts] + lengths if len(at) else at), lengths, starts


def alike(graph: UnitGraph, anchor: int, classes: Tensor) -> Tensor:
    """Bool by entry of ``classes``: units that stand wherever the anchor stands, as often, and that may be copied."""
    same = torch.ones(len(graph.classes), dtype=torch.bool)
    if graph.pins:
        same[torch.tensor(list(graph.pins))] = False
    for stage in graph.stages:
        for axis in (stage.outputs, stage.inputs):
            if axis is not None:
                count = torch.bincount(graph.classes[axis.units], minlength=len(same))
                same &= count == count[anchor]
    return same[classes]


# --- whether they can -----------------------------------------------------------------------------------------------


def anchor_of(graph: UnitGraph, stage: Stage) -> int | None:
    """Class of the last unit of a layer."""
    return int(graph.classes[stage.outputs.units[-1]]) if len(stage.outputs.units) else None


def holds(graph: UnitGraph, axis: Axis | None, unit: int) -> bool:
    """Whether the class ``unit`` stands in ``axis``."""
    return axis is not None and bool((graph.classes[axis.units] == unit).any())


def reason_against(graph: UnitGraph, stage: Stage) -> str | None:
    """Why a layer can't get new units; None where it can."""
    anchor = anchor_of(graph, stage)
    if anchor is None:
        return "it has no units"
    if anchor in graph.pins:
        return graph.pins[anchor]
    for node in graph.graph.nodes:
        if node.target is torch.cat and _stands_side_by_side(graph, node, anchor):
            return "a concatenation holds its only unit twice in a row"
    for other in graph.stages:
        axes = [axis for axis in (other.outputs, other.inputs) if holds(graph, axis, anchor)]
        if not axes:
            continue
        if isinstance(other.module, nn.LayerNorm | CompactLayerNorm):
            return f"module {other.name!r} ({type(other.module).__name__}) normalises over it"
        if not isinstance(other.module, SparseLinear):
            continue
        if "values" not in other.module._parameters:
            return f"module {other.name!r} computes its values from other parameters"
        b = other.module.block_size
        for axis in axes:
            ends = _runs(graph.classes[axis.units].numpy(), anchor)[0]
            inside = [int(end) for end in ends if end < len(axis.units) and end % b]
            if inside:
                return (
                    f"others follow its units in {other.name!r} at {inside[0]}, inside a block of {b}, in a "
                    "concatenation or sum"
                )
    return None


def _stands_side_by_side(graph: UnitGraph, node: fx.Node, anchor: int) -> bool:
    """Whether one part of a concatenation ends with the anchor and the next begins with it."""
    given = node.args[0] if node.args and isinstance(node.args[0], (tuple, list)) else ()
    parts = [graph.classes[graph.nodes[n].units] for n in given if n in graph.nodes and len(graph.nodes[n].units)]
    return any(int(a[-1]) == anchor == int(b[0]) for a, b in pairwise(parts))


def step_between(graph: UnitGraph, anchor: int) -> int:
    """How many units must be born at a time so that those that follow them in block-sparse layers stay in blocks."""
    step = 1
    for stage in graph.stages:
        if isinstance(stage.weights, BlockWeights):
            b = stage.module.block_size
            for axis in (stage.outputs, stage.inputs):
                if axis is not None:
                    for end, length, _ in zip(*_runs(graph.classes[axis.units].numpy(), anchor), strict=True):
                        if end < len(axis.units):
                            step = math.lcm(step, b // math.gcd(b, int(length)))
    return step


def noise_over(graph: UnitGraph, anchor: int) -> str | None:
    """What draws at random for each unit of the anchor's layer in training, so that two equal units differ."""
    for node, axis in graph.nodes.items():
        module = graph.modules[node.target] if node.op == "call_module" else None
        random = (isinstance(module, _DROPOUTS) and module.p > 0) or isinstance(
            getattr(module, "kind", None), HardConcreteGate
        )
        if node.op == "call_function" and node.target in _DROPOUT_FUNCTIONS:
            random = (node.args[1] if len(node.args) > 1 else node.kwargs.get("p", 0.5)) != 0
        if random and holds(graph, axis, anchor):
            return f"{node.target!r} ({type(module).__name__})" if module is not None else "dropout"
    return None


def stages_with_units(graph: UnitGraph) -> dict[str, Stage]:
    """The layers that make units, by name."""
    return {stage.name: stage for stage in graph.stages if stage.weights is not None}


def why_unknown(graph: UnitGraph, name: str) -> str:
    """Why a module that is no layer of the graph cannot grow."""
    module = graph.modules.get(name)
    if module is None:
        return "the model has no module of that name"
    if module in graph.whole:
        return f"it {graph.whole[module]}"
    if getattr(module, "groups", 1) > 1:
        return f"it has {module.groups} groups"
    if not isinstance(module, nn.Linear | SparseLinear | nn.modules.conv._ConvNd):
        return f"{type(module).__name__} is no linear layer or convolution"
    return "the model's forward does not call it as a layer that is understood"


def growable(model: nn.Module, graph: UnitGraph | None = None) -> dict[str, str | None]:
    """Which layers of ``model`` can get new units.

    Args:
        model: traceable by ``torch.fx``. graph: a UnitGraph of it, to save tracing it again.

    Returns:
        By the name of each linear layer and convolution: None where it can grow, else why not.

    Raises:
        GrowthError: the model cannot be traced.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth import growable
        >>> growable(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)))
        {'0': None, '2': 'the model returns it'}
    """
    graph = traced("growable", model, graph)
    stages = stages_with_units(graph)
    kinds = (nn.Linear, SparseLinear, nn.modules.conv._ConvNd)
    return {
        name: reason_against(graph, stages[name]) if name in stages else why_unknown(graph, name)
        for name, module in graph.modules.items()
        if isinstance(module, kinds)
    }


def readers(graph: UnitGraph, name: str) -> list[str]:
    """The layers that read the units of layer ``name``, in the order they run.

    Raises:
        GrowthError: the graph has no such layer.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth import readers
        >>> from sparsenet.compaction.graph import UnitGraph
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> readers(UnitGraph(model), "0")
        ['2']
    """
    stages = stages_with_units(graph)
    if name not in stages:
        raise GrowthError(f"readers: name must be a layer of the model, got {name!r}: {why_unknown(graph, name)}")
    anchor = anchor_of(graph, stages[name])
    return [s.name for s in readers_of(graph, anchor)] if anchor is not None else []


def readers_of(graph: UnitGraph, anchor: int) -> list[Stage]:
    """The layers with a column for the class ``anchor``."""
    return [
        stage
        for stage in graph.stages
        if stage.weights is not None and not stage.weights.per_channel and holds(graph, stage.inputs, anchor)
    ]


def multiple_of(graph: UnitGraph, name: str) -> int:
    """Of what the number of new units of layer ``name`` must be a multiple; 1: any number.

    More than 1 only where others follow its units in a block-sparse layer, as in a concatenation.

    Raises:
        GrowthError: the graph has no such layer.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.architecture.growth import multiple_of
        >>> from sparsenet.compaction.graph import UnitGraph
        >>> multiple_of(UnitGraph(sn.SparseMLP([16, 32, 4], density=0.5, block_size=8)), "0")
        1
    """
    stages = stages_with_units(graph)
    if name not in stages:
        raise GrowthError(f"multiple_of: name must be a layer of the model, got {name!r}: {why_unknown(graph, name)}")
    anchor = anchor_of(graph, stages[name])
    return 1 if anchor is None else step_between(graph, anchor)


def traced(op: str, model: nn.Module, graph: UnitGraph | None, opaque: Sequence[str] = ()) -> UnitGraph:
    """The graph of ``model``, or the one given, checked to be of the model as it is now."""
    if graph is None:
        with said_by(op):
            return UnitGraph(model, opaque, zeros=False)
    stale = graph.model is not model or any(
        len(stage.outputs.units) != _width(stage)
        or (stage.inputs is not None and len(stage.inputs.units) != _reads(stage))
        for stage in graph.stages
    )
    if stale:
        raise GrowthError(f"{op}: graph must be of this model as it is now; make another after every change")
    return graph


def _width(stage: Stage) -> int:
    if stage.weights is not None:
        return stage.weights.rows
    for attribute in ("num_features", "num_parameters"):
        if hasattr(stage.module, attribute):
            return getattr(stage.module, attribute)
    shape = getattr(stage.module, "normalized_shape", None)
    return shape[0] if shape is not None else len(stage.outputs.units)


def _reads(stage: Stage) -> int:
    return stage.weights.columns if stage.weights is not None else len(stage.inputs.units)
