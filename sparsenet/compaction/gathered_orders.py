"""Which hidden units may change places, and the search for the order in which kept blocks hold most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsenet.compaction.assignment import exchanged
from sparsenet.compaction.cuts import Cut
from sparsenet.compaction.graph import Stage, UnitGraph
from sparsenet.compaction.modules import CompactLayerNorm
from sparsenet.compaction.orders import axes_of, is_free, member_of, unit_families
from sparsenet.compaction.reblocking import Reblocked, reblock
from sparsenet.compaction.rules import Axis
from sparsenet.compaction.weights import BlockWeights
from sparsenet.layers import SparseLinear
from sparsenet.optimizer_state import state_by_block
from sparsenet.pattern import BlockPattern

__all__ = ["CutLayer", "Family", "FamilyOrder", "GatherSearch", "find_families"]

MOST_STEPS = 8  # of one family in one sweep
LEAST_GAIN = 1e-3  # of what is held: a sweep that gains less is the last


@dataclass(frozen=True)
class CutLayer:
    """A layer that is to be cut; ``stage`` is None where the graph does not follow it."""

    name: str
    cut: Cut
    stage: Stage | None


@dataclass(frozen=True)
class Family:
    """Hidden units that change places among each other: those of one or more layers that are one with each other.

    Attributes:
        classes: int64, ascending, in the order they stand. stages: every module that has one of them.
        makers, readers: the layers to be cut whose outputs, or inputs, they are.
    """

    classes: Tensor
    stages: tuple[Stage, ...]
    makers: tuple[CutLayer, ...]
    readers: tuple[CutLayer, ...]


def find_families(
    graph: UnitGraph, layers: Sequence[CutLayer], optimizers: Sequence
) -> tuple[list[Family], dict[str, str]]:
    """The units that may move, and by layer name why its outputs may not."""
    families, stays = [], {}
    for layer in layers:
        if layer.stage is None:
            why = graph.whole.get(layer.cut.module, "is not followed by the trace")
            stays[layer.name] = f"module {layer.name!r} {why}"
        else:
            pinned = [graph.pins.get(unit) for unit in graph.classes[layer.stage.outputs.units].tolist()]
            if None not in pinned:
                stays[layer.name] = pinned[0] if pinned else "it has no outputs"
    for classes in unit_families(graph):
        member = member_of(classes, len(graph.classes))
        stages = tuple(stage for stage in graph.stages if axes_of(stage, member[graph.classes]))
        names = {stage.name for stage in stages}
        near = [layer for layer in layers if layer.name in names and layer.stage is not None]
        makers = tuple(layer for layer in near if _has(graph, member, layer.stage.outputs))
        readers = tuple(layer for layer in near if _has(graph, member, layer.stage.inputs))
        why = _why_fixed(graph, classes, member, stages, near, optimizers)
        if why:
            stays.update((layer.name, why) for layer in makers)
        elif near:
            families.append(Family(classes, stages, makers, readers))
    return families, stays


def _has(graph: UnitGraph, member: Tensor, axis: Axis | None) -> bool:
    return axis is not None and bool(member[graph.classes[axis.units]].any())


def _why_fixed(
    graph: UnitGraph, classes: Tensor, member: Tensor, stages: Sequence[Stage], near: Sequence[CutLayer], optimizers
) -> str:
    """Why these units must keep their order; empty where they need not."""
    pinned = graph.pins.keys() & set(classes.tolist())
    if pinned:
        return graph.pins[min(pinned)]
    for stage in stages:
        layer, sparse = stage.module, isinstance(stage.weights, BlockWeights)
        if isinstance(layer, nn.LayerNorm | CompactLayerNorm):
            return f"module {stage.name!r} ({type(layer).__name__}) normalises over it"
        if sparse and layer.block_size > 1 and layer.element_mask is None:
            return f"moving them would break up the whole blocks of {stage.name!r}"
        if sparse and layer.elements is not None and _has(graph, member, stage.inputs):
            return f"moving them would break the rule {layer.elements} of {stage.name!r}"
        if sparse and layer.block_size > 1 and _has_block_state(layer, optimizers):
            return f"an optimizer keeps one number for each block of {stage.name!r}"
    if not is_free(graph, classes, member):
        return "they stand beside other units, or in another order, in some tensor"
    for layer in near:
        axes = axes_of(layer.stage, member[graph.classes])
        if any(len(axis.units) != len(classes) for axis in axes):
            return f"each stands several times among the inputs of {layer.name!r}"
    return ""


def _has_block_state(layer: SparseLinear, optimizers: Sequence) -> bool:
    values = layer.values
    return any(t.shape != values.shape for o in optimizers for t in state_by_block(o, values).values())


class FamilyOrder:
    """Another order of one family of units; all others stand. See :class:`~sparsenet.compaction.moves.Orders`.

    Args:
        positions: int64 [units], a permutation: the old position of each new one.
    """

    def __init__(self, graph: UnitGraph, family: Family, positions: Tensor):
        self.graph, self.family, self.positions = graph, family, positions
        self.stages = family.stages
        self._rank = torch.arange(len(graph.classes))
        self._rank[family.classes[positions]] = family.classes

    def order(self, axis: Axis) -> Tensor:
        """int64: the old positions along ``axis`` in their new order."""
        classes = self.graph.classes[axis.units]
        ranks = self._rank[classes]
        return torch.arange(len(classes)) if torch.equal(ranks, classes) else ranks.argsort(stable=True)

    def reblocked(self, stage: Stage) -> Reblocked:
        """Where the blocks of a block-sparse layer land."""
        layer = stage.module
        cols = torch.arange(layer.in_features) if stage.inputs is None else self.order(stage.inputs)
        return reblock(layer.pattern, self.order(stage.outputs), cols, layer.element_mask)

    def inverse(self) -> FamilyOrder:
        """The order that takes this one back."""
        return FamilyOrder(self.graph, self.family, self.positions.argsort())


@dataclass(frozen=True)
class Held:
    """What a layer's kept blocks hold, of what there is, and which they are."""

    kept: float
    total: float
    pattern: BlockPattern


class GatherSearch:
    """Coordinate ascent over the orders of all families; what the kept blocks hold never falls.

    Attributes:
        orders: for each family int64 [units], the old position of each new one.
    """

    def __init__(self, layers: Sequence[CutLayer], families: Sequence[Family]):
        self.layers, self.families = layers, families
        self.orders = [torch.arange(len(family.classes)) for family in families]
        self._rows = {layer.name: i for i, family in enumerate(families) for layer in family.makers}
        self._cols = {layer.name: i for i, family in enumerate(families) for layer in family.readers}

    def run(self, sweeps: int) -> None:
        """At most so many sweeps over all families."""
        for _ in range(sweeps):
            found = [self._improve(i) for i in range(len(self.families))]
            before, after = (sum(side) for side in zip(*found, strict=True)) if found else (0.0, 0.0)
            if after - before <= LEAST_GAIN * after:
                break

    def held(self) -> dict[str, Held]:
        """By layer name, with all units in the present orders."""
        found = {}
        for layer in self.layers:
            cut = layer.cut
            norms = cut.norms(cut.by_row(self._order(layer, rows=False)), self._order(layer, rows=True))
            kept = cut.kept(norms)
            pattern = BlockPattern.from_linear_places(kept, cut.shape, cut.block_size)
            found[layer.name] = Held(float(norms.flatten()[kept].sum()), float(norms.sum()), pattern)
        return found

    def changed(self) -> Iterator[tuple[Family, Tensor]]:
        """Families whose order is another one now."""
        for family, order in zip(self.families, self.orders, strict=True):
            if not torch.equal(order, torch.arange(len(order))):
                yield family, order

    def moved(self, name: str) -> int:
        """How many outputs of a layer change places."""
        i = self._rows.get(name)
        return 0 if i is None else int((self.orders[i] != torch.arange(len(self.orders[i]))).sum())

    # --- one family ---

    def _order(self, layer: CutLayer, rows: bool) -> Tensor:
        i = (self._rows if rows else self._cols).get(layer.name)
        return torch.arange(layer.cut.shape[0 if rows else 1]) if i is None else self.orders[i]

    def _improve(self, i: int) -> tuple[float, float]:
        """Moves the units of family ``i`` while that pays; what its layers hold before and after."""
        family, order = self.families[i], self.orders[i]
        profiles = {
            (layer.name, as_rows): self._profile(layer, as_rows)
            for layers, as_rows in ((family.makers, True), (family.readers, False))
            for layer in layers
            if self._rows.get(layer.name) != self._cols.get(layer.name)
        }
        first, gains = self._look(family, profiles, order)
        held = first
        for _ in range(MOST_STEPS):
            trial = exchanged(gains, order, self.layers[0].cut.block_size)
            after, gains = self._look(family, profiles, trial)
            if not after > held:
                break
            order, held = trial, after
        self.orders[i] = order
        return first, held

    def _profile(self, layer: CutLayer, as_rows: bool, order: Tensor | None = None) -> Tensor:
        """[units, blocks]: each unit's importance by block, the other side of the layer in its present order."""
        order = self._order(layer, rows=not as_rows) if order is None else order
        return layer.cut.by_row(order) if as_rows else layer.cut.by_column(order)

    def _look(self, family: Family, profiles: dict, order: Tensor) -> tuple[float, Tensor]:
        """What the family's layers hold in that order, and what each unit is worth in each group [units, groups]."""
        held, gains = 0.0, torch.zeros(())
        for layers, as_rows in ((family.makers, True), (family.readers, False)):
            for layer in layers:
                profile = profiles.get((layer.name, as_rows))
                both = profile is None  # the units are rows and columns of this layer
                if both:
                    profile = self._profile(layer, as_rows, order)
                norms = layer.cut.norms(profile, order)
                norms = norms if as_rows else norms.T.contiguous()
                kept = layer.cut.kept(norms)
                if as_rows or not both:
                    held += float(norms.flatten()[kept].sum())
                mask = torch.zeros(norms.shape, dtype=profile.dtype)
                mask.view(-1)[kept] = 1
                gains = gains + profile @ (mask.T if as_rows else mask)
        return held, gains
