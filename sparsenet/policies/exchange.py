"""What one rewire exchanges: how many blocks of a layer, which of them are too young to leave, and what it did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsenet.functional import lowest_to_spare, select_extreme
from sparsenet.pattern import BlockPattern

__all__ = ["LayerUpdate", "Newborn", "Quota", "Units", "Update"]


@dataclass(frozen=True)
class LayerUpdate:
    """What one rewire did to one layer.

    Attributes:
        dropped_places, grown_places: int64, block row * block columns + block column, ascending; of a layer whose
            elements are rewired, row * in_features + column of elements.
        num_blocks, density: after the rewire; the density is that of elements where these are rewired.
        clamped: growth that was asked for and found no free place.
        skipped: why the layer was left as it was; empty when it was rewired.
        held: blocks that were to leave and stayed: as the last of their row or column of blocks, or because there was
            none left that is old enough.
    """

    dropped_places: Tensor
    grown_places: Tensor
    num_blocks: int
    density: float
    clamped: int = 0
    skipped: str = ""
    held: int = 0

    @property
    def dropped(self) -> int:
        """Number of blocks (elements) dropped."""
        return len(self.dropped_places)

    @property
    def grown(self) -> int:
        """Number of blocks (elements) grown."""
        return len(self.grown_places)


@dataclass(frozen=True)
class Update:
    """What one rewire did, by layer name."""

    step: int
    layers: dict[str, LayerUpdate] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """Blocks dropped in all layers."""
        return sum(u.dropped for u in self.layers.values())

    @property
    def grown(self) -> int:
        """Blocks grown in all layers."""
        return sum(u.grown for u in self.layers.values())


@dataclass(frozen=True)
class Units:
    """What of a layer is rewired, blocks or elements, in numbers.

    Attributes:
        now: that are active.
        most: that there can be.
        places: all of the matrix, as the density counts them.
        size: weights in one.
    """

    now: int
    most: int
    places: int
    size: int

    @classmethod
    def of_blocks(cls, pattern: BlockPattern) -> Units:
        """A layer's blocks."""
        places = pattern.block_rows * pattern.block_cols
        return cls(pattern.num_blocks, places, places, pattern.block_size**2)


@dataclass(frozen=True)
class Quota:
    """How many blocks leave and enter a layer at one rewire; ``must_drop`` of them for the sake of the density."""

    drop: int
    grow: int
    clamped: int
    must_drop: int

    @classmethod
    def of(cls, units: Units, target: int, drop_fraction: float) -> Quota:
        """Exchanges ``drop_fraction`` of the blocks that stay and moves the count to ``target``.

        A dropped block cannot return in the same update, so growth is bounded by the places free beforehand.
        """
        free = units.most - units.now
        stays = min(units.now, target)
        exchange = min(round(drop_fraction * stays), free - max(0, target - units.now))
        asked = target - stays + round(drop_fraction * stays)
        grow = target - stays + max(0, exchange)
        leave = units.now - stays
        return cls(drop=leave + max(0, exchange), grow=grow, clamped=asked - grow, must_drop=leave)

    def leaving(self, pattern: BlockPattern, scores: Tensor, young: Tensor) -> Tensor:
        """Numbers of the blocks that leave, ascending: those of the lowest float32 ``scores`` [num_blocks].

        The last block of a row or column of blocks stays where there are blocks enough for all, and so do the
        ``young`` ones (int64 numbers), unless the density has no others to take.
        """
        target = pattern.num_blocks - self.drop + self.grow
        lines = (pattern.block_rows, pattern.row_indices), (pattern.block_cols, pattern.col)
        lines = [of_block.long() for count, of_block in lines if target >= count]
        old = min(self.drop, len(scores) - len(young))
        leaves = lowest_to_spare(scores.index_fill(0, young, math.inf), old, *lines)
        leaves = leaves[~torch.isin(leaves, young)]  # asked where too few of the others may leave
        if len(leaves) < self.must_drop:
            leaves = lowest_to_spare(scores.index_fill(0, leaves, -math.inf), self.must_drop, *lines)
        if len(leaves) < self.must_drop:  # the density leaves too few blocks for all rows and columns
            leaves = select_extreme(scores.index_fill(0, leaves, -math.inf), self.must_drop, largest=False)
        return leaves


class Newborn:
    """The places that a layer has grown at its last ``grace`` rewires: their blocks do not leave.

    Places, and not blocks: whatever moves the blocks meanwhile, what is still where it grew is young.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.policies.exchange import Newborn
        >>> newborn = Newborn(grace=1)
        >>> newborn.add("0", torch.tensor([0, 7]))
        >>> newborn.among("0", torch.tensor([0, 3, 5]))  # block 0 of three is young; at place 7 there is none any more
        tensor([0])
    """

    def __init__(self, grace: int):
        self.grace = grace
        self._places: dict[str, list[Tensor]] = {}

    def add(self, name: str, places: Tensor) -> None:
        """One more rewire, which grew int64 ``places`` [n], or passed the layer over; the oldest grow up."""
        if self.grace:
            self._places[name] = [*self._places.get(name, ()), places][-self.grace :]

    def among(self, name: str, places: Tensor) -> Tensor:
        """int64: numbers of a layer's blocks, at int64 ``places`` [num_blocks], ascending, that are too young."""
        grown = self._places.get(name)
        if not grown or not len(places):
            return places[:0]
        grown = torch.cat([g.to(places.device) for g in grown]).unique()  # one may have left and come again
        found = torch.searchsorted(places, grown).clamp(max=len(places) - 1)
        return found[places[found] == grown]

    def clear(self) -> None:
        """None is young any more: places mean something else now."""
        self._places.clear()

    def state(self) -> dict[str, list[Tensor]]:
        """By layer, what each of the last rewires grew."""
        return {name: list(grown) for name, grown in self._places.items()}

    def load(self, state: Mapping[str, Sequence[Tensor]]) -> None:
        """Takes over a :meth:`state`.

        Raises:
            ValueError: it is not one.
        """
        fits = isinstance(state, Mapping) and all(
            isinstance(grown, Sequence)
            and all(isinstance(p, Tensor) and p.dtype == torch.int64 and p.dim() == 1 for p in grown)
            for grown in state.values()
        )
        if not fits:
            raise ValueError(f"Sparsifier: state must have int64 places by layer in 'young', got {state!r}")
        self._places = {name: list(grown)[-self.grace :] for name, grown in state.items() if self.grace}
