"""Which units stay, in which order, once blocks are counted: whole blocks only, re-blocked, or re-blocked and permuted.

Dense layers lose single units. A block-sparse layer that loses single units must re-block, which may need *more* blocks
(a new block row reads what two old ones read), so the units between block-sparse layers choose, by counted bytes: let
only whole blocks leave (never more bytes than before), close ranks in order, or also permute. Layer after layer, once
starting from whole blocks and once from closed ranks everywhere; the better of the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsenet.compaction.graph import Stage, UnitGraph
from sparsenet.compaction.reblocking import Reblocked, fullest_order, reblock
from sparsenet.compaction.rules import Axis
from sparsenet.compaction.weights import BlockWeights
from sparsenet.functional.bits import mask_bytes
from sparsenet.optimizer_state import state_by_block

__all__ = ["UnitOrders", "axes_of", "is_free", "member_of", "unit_families"]

MOST_SIGNATURE_BYTES = 1 << 27
MOST_SWEEPS = 4
WHOLE, IN_ORDER, PERMUTED = "whole blocks", "re-blocked", "re-blocked, permuted"


@dataclass(frozen=True)
class _Family:
    """Units that are decided together: those of one or more layers that are one with each other.

    Attributes:
        classes: int64, distinct, in the order they stand.
        stages: the block-sparse layers that make or read them. dense: the other layers with weights that do.
        free: whether they may change places: every tensor they are in is made of them alone, in this order.
    """

    classes: Tensor
    stages: tuple[Stage, ...]
    dense: tuple[Stage, ...]
    free: bool


@dataclass(frozen=True)
class _Choice:
    """Which classes stay and where they stand among each other."""

    kept: Tensor  # bool by class
    rank: Tensor  # int64 by class


class UnitOrders:
    """The order of every axis after compaction.

    Args:
        graph: the units. needed: bool by class, which must stay.
        optimizers: their state counts in the bytes, and state per block rules re-blocking out.
        fill_in: ``masked`` or ``trainable``. permute: whether units may change places.

    Attributes:
        needed: as given. kept: bool by class; more than needed where only whole blocks leave.
    """

    def __init__(self, graph: UnitGraph, needed: Tensor, optimizers: Sequence, fill_in: str, permute: bool):
        self.graph, self.needed, self.optimizers = graph, needed, optimizers
        self.masked = fill_in == "masked"
        self._landed: dict[tuple, Reblocked] = {}  # choices agree about many layers
        families = _families(graph)
        made = graph.constant_classes()
        while True:
            self._choice, self._how = self._choose(families, permute)
            missing = self._read_by(self._choice.kept & ~self.needed & made) & ~self._choice.kept
            if not missing.any():
                break
            self.needed = self.needed | missing  # a constant that stays in a block must stay what it is

    @property
    def kept(self) -> Tensor:
        """Bool by class: which units stay."""
        return self._choice.kept

    def order(self, axis: Axis) -> Tensor:
        """int64: the old positions along ``axis`` that stay, in their new order."""
        return self._order(axis, self._choice)

    def how(self, stage: Stage) -> str:
        """How a layer's units left the blocks they are in; empty where none of them is in a block, or none left."""
        classes = self.graph.classes[stage.outputs.units]
        return self._how.get(int(classes[0]), "") if stage.weights is not None and len(classes) else ""

    def reblocked(self, stage: Stage) -> Reblocked:
        """Where the blocks of a block-sparse layer land."""
        return self._reblocked(stage, self._choice)

    # --- choosing ---

    def _choose(self, families: list[_Family], permute: bool) -> tuple[_Choice, dict[int, str]]:
        """The better of two descents, and by class how its units left."""
        needed = self.needed
        whole = _Choice(needed.clone(), torch.arange(len(needed)))
        count = -1
        while count != (count := int(whole.kept.sum())):  # to begin with, nothing re-blocks
            for family in families:
                whole = self._whole(family, whole)
        found = [self._descend(whole, families, permute)]
        if len(families) > 1 and not bool(needed[torch.cat([f.classes for f in families])].all()):
            found.append(self._descend(self._closed_up(whole, families), families, permute))
        touched = {stage.name: stage for family in families for stage in family.stages + family.dense}.values()
        costs = [(sum(self._bytes(s, c) for s in touched), int(c.kept.sum()), i) for i, (c, _) in enumerate(found)]
        return found[min(costs)[2] if len(found) > 1 else 0]

    def _read_by(self, units: Tensor) -> Tensor:
        """Bool by class: what ``units`` (bool by class) read, however far back, and cannot take into a bias."""
        read, graph = torch.zeros_like(units), self.graph
        for stage in reversed(graph.stages) if units.any() else ():
            if stage.weights is not None and stage.inputs is not None:
                rows = (units | read)[graph.classes[stage.outputs.units]]
                if rows.any():
                    columns = stage.weights.needed_columns(rows, graph.seen(stage.inputs), graph.zeros)
                    read[graph.classes[stage.inputs.units[columns]]] = True
        return read

    def _closed_up(self, whole: _Choice, families: list[_Family]) -> _Choice:
        """Nobody stays who is not needed, where blocks may be divided: neighbours may be worth re-blocking together."""
        kept = self.needed.clone()
        for family in families:
            if any(self._has_block_state(stage) for stage in family.stages):
                kept[family.classes] = whole.kept[family.classes]
        return replace(whole, kept=kept)

    def _descend(self, choice: _Choice, families: list[_Family], permute: bool) -> tuple[_Choice, dict[int, str]]:
        """The best of each family in turn until nothing changes, and by class how its units left."""
        how: dict[int, str] = {}
        for _ in range(MOST_SWEEPS):
            before = choice
            for family in families:
                choice, label = self._best(family, choice, permute)
                how.update(dict.fromkeys(family.classes.tolist(), label))
            same = torch.equal(before.kept, choice.kept) and torch.equal(before.rank, choice.rank)
            if same or len(families) == 1:
                break
        return choice, how

    def _best(self, family: _Family, choice: _Choice, permute: bool) -> tuple[_Choice, str]:
        """The choice of fewest bytes; of equal ones, the one that removes most units."""
        kept, rank = choice.kept.clone(), choice.rank.clone()
        kept[family.classes], rank[family.classes] = self.needed[family.classes], family.classes
        in_order = _Choice(kept, rank)
        options = [(self._whole(family, in_order), WHOLE)]
        if not any(self._has_block_state(stage) for stage in family.stages):
            options.append((in_order, IN_ORDER))
            permuted = self._permuted(family, in_order) if permute and family.free else None
            if permuted is not None:
                options.append((permuted, PERMUTED))
        costs = [
            (sum(self._bytes(s, option) for s in family.stages + family.dense), int(option.kept.sum()), i)
            for i, (option, _) in enumerate(options)
        ]
        best = options[min(costs)[2]]
        unchanged = bool(best[0].kept[family.classes].all()) and best[1] != PERMUTED
        return best[0], "" if unchanged else best[1]

    def _whole(self, family: _Family, choice: _Choice) -> _Choice:
        """Keeps every unit that shares a block with one that stays."""
        kept = choice.kept.clone()
        member = member_of(family.classes, len(kept))
        while True:
            count = int(kept.sum())
            for stage in family.stages:
                for axis in (stage.outputs, stage.inputs):
                    classes = self.graph.classes[axis.units] if axis is not None else None
                    if classes is None or not (mine := member[classes]).any():
                        continue
                    group = torch.arange(len(classes)) // stage.module.block_size
                    stays = torch.zeros(int(group[-1]) + 1, dtype=torch.bool)
                    stays[group[kept[classes]]] = True
                    kept[classes[stays[group] & mine]] = True
            if int(kept.sum()) == count:
                return replace(choice, kept=kept)

    def _permuted(self, family: _Family, choice: _Choice) -> _Choice | None:
        """Units ordered so that neighbours touch the same blocks."""
        units = family.classes[choice.kept[family.classes]]
        mine = member_of(family.classes, len(self.needed))[self.graph.classes]
        appearances = [(stage, axis) for stage in family.stages for axis in axes_of(stage, mine)]
        wide = sum(max(s.module.pattern.block_rows, s.module.pattern.block_cols) for s, _ in appearances)
        if len(units) * wide > MOST_SIGNATURE_BYTES:
            return None
        parts = [self._signatures(stage, axis, units) for stage, axis in appearances]
        order = fullest_order(torch.cat(parts, 1), max(stage.module.block_size for stage in family.stages))
        if order is None:
            return None
        rank = choice.rank.clone()
        rank[units[order]] = torch.arange(len(units))
        return replace(choice, rank=rank)

    def _signatures(self, stage: Stage, axis: Axis, units: Tensor) -> Tensor:
        """Bool [units, block columns (or rows)]: which blocks of ``stage`` each unit, as a row (or column), is in."""
        layer, outputs = stage.module, axis is stage.outputs
        pattern, b = layer.pattern, layer.block_size
        own, other = pattern.row_indices.long().cpu(), pattern.col_indices.long().cpu()
        own, other = (own, other) if outputs else (other, own)
        number = torch.full((len(self.needed),), -1)
        number[units] = torch.arange(len(units))
        unit = number[self.graph.classes[axis.units]]
        here = (unit >= 0).nonzero().flatten()
        by_line = own.argsort(stable=True)
        count = torch.bincount(own, minlength=-(-len(axis.units) // b))
        times = count[here // b]
        place = here.repeat_interleave(times)
        step = torch.arange(len(place)) - (times.cumsum(0) - times).repeat_interleave(times)
        block = by_line[(count.cumsum(0) - count)[place // b] + step]
        if layer.element_mask is not None:
            present = layer.element_mask.any(2 if outputs else 1).cpu()[block, place % b]
            place, block = place[present], block[present]
        touched = torch.zeros(len(units), pattern.block_cols if outputs else pattern.block_rows, dtype=torch.bool)
        touched[unit[place], other[block]] = True
        return touched

    # --- counting ---

    def _order(self, axis: Axis, choice: _Choice) -> Tensor:
        classes = self.graph.classes[axis.units]
        places = choice.kept[classes].nonzero().flatten()
        ranks = choice.rank[classes[places]]
        own = torch.arange(len(choice.rank))
        if torch.equal(ranks, own[classes[places]]):  # nobody moved
            return places
        return places[ranks.argsort(stable=True)]

    def _reblocked(self, stage: Stage, choice: _Choice) -> Reblocked:
        layer = stage.module
        rows = self._order(stage.outputs, choice)
        cols = torch.arange(layer.in_features) if stage.inputs is None else self._order(stage.inputs, choice)
        key = (stage.name, rows.numpy().tobytes(), cols.numpy().tobytes())
        if key not in self._landed:
            self._landed[key] = reblock(layer.pattern, rows, cols, layer.element_mask)
        return self._landed[key]

    def _bytes(self, stage: Stage, choice: _Choice) -> int:
        """Bytes of a layer's weight, gradient and optimizer state, and of block-sparse layers' masks and indices."""
        layer, sparse = stage.module, isinstance(stage.weights, BlockWeights)
        weight = layer.values if sparse else layer.weight
        per_element = weight.element_size() * (1 + weight.requires_grad)
        for optimizer in self.optimizers:
            states = optimizer.state.get(weight, {}).values()
            per_element += sum(t.element_size() for t in states if isinstance(t, Tensor) and t.shape == weight.shape)
        if not sparse:
            axes = [self._order(a, choice) for a in (stage.outputs, stage.inputs) if a is not None]
            ends = [len(a.units) for a in (stage.outputs, stage.inputs) if a is not None]
            share = math.prod(len(o) / max(n, 1) for o, n in zip(axes, ends, strict=True))
            return round(weight.numel() * per_element * share)
        after = self._reblocked(stage, choice)
        masked = layer.topology.mask_bits is not None or (self.masked and after.fill_in > 0)
        beside = 8 + (mask_bytes(layer.block_size) if masked else 0)
        return after.num_blocks * (layer.block_size**2 * per_element + beside) + 4 * after.shape[0] // layer.block_size

    def _has_block_state(self, stage: Stage) -> bool:
        """Whether an optimizer keeps one number per block, which no re-blocking can divide."""
        values = stage.module.values
        return any(t.shape != values.shape for o in self.optimizers for t in state_by_block(o, values).values())


def unit_families(graph: UnitGraph) -> list[Tensor]:
    """Classes of the units that are decided together, ascending, in the order of the graph; none where all stay."""
    made: list[set[int]] = []
    for stage in graph.stages:
        mine = set(graph.classes[stage.outputs.units].tolist()) if stage.weights is not None else set()
        if not mine <= graph.pins.keys():
            mine = mine.union(*(family for family in made if family & mine))
            made = [family for family in made if not family & mine] + [mine]
    return [torch.tensor(sorted(mine)) for mine in made]


def _families(graph: UnitGraph) -> list[_Family]:
    """The units between block-sparse layers, in the order of the graph; units that all stay pinned are left out."""
    weighted = [s for s in graph.stages if s.weights is not None and len(s.outputs.units)]
    families = []
    for classes in unit_families(graph):
        member = member_of(classes, len(graph.classes))
        near = [s for s in weighted if axes_of(s, member[graph.classes])]
        sparse = tuple(s for s in near if isinstance(s.weights, BlockWeights) and s.module.block_size > 1)
        if sparse:
            dense = tuple(s for s in near if not isinstance(s.weights, BlockWeights))
            families.append(_Family(classes, sparse, dense, is_free(graph, classes, member)))
    return families


def member_of(classes: Tensor, count: int) -> Tensor:
    """Bool [count]: which classes are in ``classes``."""
    member = torch.zeros(count, dtype=torch.bool)
    member[classes] = True
    return member


def axes_of(stage: Stage, units: Tensor) -> list[Axis]:
    """The axes of ``stage`` that hold any of ``units`` (bool by id)."""
    return [a for a in (stage.outputs, stage.inputs) if a is not None and bool(units[a.units].any())]


def is_free(graph: UnitGraph, classes: Tensor, member: Tensor) -> bool:
    """Whether every axis that holds one of ``classes`` holds exactly them, in this order (each perhaps repeated)."""
    if graph.pins.keys() & set(classes.tolist()):
        return False
    axes = [axis for stage in graph.stages for axis in axes_of(stage, member[graph.classes])]
    return all(torch.equal(graph.classes[axis.units].unique_consecutive(), classes) for axis in axes)
