"""A layer as a policy sees it: its blocks, or the active elements inside them as blocks of side 1."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sparsenet import functional
from sparsenet.elements.masks import elements_inside
from sparsenet.functional.blocks import where_true, zero_outside
from sparsenet.layers import SparseLinear
from sparsenet.pattern import BlockPattern
from sparsenet.policies.places import BadScores, hash_uniform, inactive_places, random_places

__all__ = ["CHEAP", "ELEMENTS_AT_ONCE", "ElementView", "View", "likely_places"]

Operands = tuple[Tensor, Tensor]  # x [batch, in], gradient of the output before the activation [batch, out]

CHEAP = 1 << 24  # multiplications of a dense weight gradient, below which all places are scored in any case
ELEMENTS_AT_ONCE = 1 << 20  # of candidates' gradients: bounds the memory of scoring them
ROWS_AT_ONCE = 128  # of operands, whose energies are summed
_DRAWS_AT_ONCE = 1 << 16
_ROW_AT_ONCE = 4096  # elements in a row of blocks, from which on it is put in order by itself
_ROUNDS = 8  # of drawing candidates, until so many differ


class View:
    """The blocks of one layer; see :class:`sparsenet.policies.LayerView`."""

    def __init__(self, name: str, layer: SparseLinear, key: int, drop: int = 0, step: int = 0):
        self.name = name
        self.layer = layer
        self.key = key
        self.drop = drop
        self.step = step
        self.has_step = True  # of the optimizer, since the last of the Sparsifier
        self.measured: dict[str, Any] = {}
        self.state: dict[str, Tensor] = {}
        self.operands: Operands | None = None
        self.summed: tuple[Tensor, Tensor] | None = None  # places and their gradient, where candidates were summed

    @property
    def values(self) -> Tensor:
        """[num_blocks, b, b]; :meth:`put` writes."""
        return self.layer.values

    @property
    def gradient(self) -> Tensor:
        """[num_blocks, b, b]; BadScores where there is none."""
        gradient = self.layer.values.grad
        if not self.has_step:
            raise BadScores("its optimizer made no step since the last Sparsifier.step(): were gradients not finite?")
        if gradient is None:
            raise BadScores("its values have no gradient; call Sparsifier.step() before zero_grad()")
        return gradient.detach()

    @property
    def pattern(self) -> BlockPattern:
        """The active blocks."""
        return self.layer.pattern

    @property
    def element_mask(self) -> Tensor | None:
        """Bool [num_blocks, b, b] or None."""
        return self.layer.element_mask

    @property
    def device(self) -> torch.device:
        """Where places are."""
        return self.layer.pattern.device

    @property
    def block_rows(self) -> int:
        """Rows of blocks, for searching some at a time."""
        return self.layer.pattern.block_rows

    @property
    def inactive(self) -> int:
        """How many places could grow."""
        return self.pattern.block_rows * self.pattern.block_cols - self.pattern.num_blocks

    def put(self, values: Tensor) -> None:
        """Writes values [num_blocks, b, b]."""
        self.layer.values.detach().copy_(values)

    def whole(self, values: Tensor) -> Tensor:
        """Values [num_blocks, b, b] of the layer's blocks from those of what is rewired."""
        return values

    def random(self, places: Tensor) -> Tensor:
        """float32 [n] in [0, 1), a function of seed, step, layer and place."""
        return hash_uniform(places, self.key)

    def random_places(self, count: int) -> Tensor:
        """int64 [<= count]: inactive places, ascending, drawn without looking at the others."""
        return random_places(self.pattern, count, self.key)

    def inactive_places(self, rows: tuple[int, int]) -> Iterator[Tensor]:
        """int64, ascending: the inactive places in block rows [begin, end), a bounded number at a time."""
        return inactive_places(self.pattern, rows)

    def check_growable(self, places: Tensor) -> None:
        """Refuses inactive places that cannot grow; here all can."""

    # --- the gradient of what is not there ---

    def gradients(self, places: Tensor, operands: Operands | None = None) -> Tensor:
        """[n, b, b]: the dense weight gradient's blocks at int64 ``places`` [n]."""
        where = places // self.pattern.block_cols, places % self.pattern.block_cols
        return functional.candidate_gradients(*(operands or self._operands()), *where, self.pattern.block_size)

    def gradient_squared_norms(self, places: Tensor) -> Tensor:
        """float32 [n]: of the dense weight gradient's blocks at int64 ``places`` [n], ascending."""
        if self.summed is not None:
            return self._summed_norms(places)
        operands, b, cols = self._operands(), self.pattern.block_size, self.pattern.block_cols
        if not len(places):
            return torch.empty(0, device=places.device)
        rows = (int(places[0]) // cols, int(places[-1]) // cols + 1)
        work = (rows[1] - rows[0]) * cols * b**2 * len(operands[0])
        if work <= CHEAP or 2 * len(places) > (rows[1] - rows[0]) * cols:  # all of these rows in one pass
            norms = functional.block_gradient_squared_norms(*operands, b, rows)
            return norms.flatten()[places - rows[0] * cols]
        parts = places.split(max(1, ELEMENTS_AT_ONCE // b**2))
        return torch.cat([_squared_norms(self.gradients(part)) for part in parts])

    def _summed_norms(self, places: Tensor) -> Tensor:
        candidates, gradient = self.summed
        at = torch.searchsorted(candidates, places).clamp_(max=max(len(candidates) - 1, 0))
        if len(places) and not (len(candidates) and torch.equal(candidates[at], places)):
            raise RuntimeError(f"Sparsifier: gradients of layer {self.name} were summed at the candidate places only")
        return _squared_norms(gradient[at])

    def likely_places(self, count: int, operands: Operands | None = None) -> Tensor:
        """int64 [<= count], ascending: inactive places, drawn the likelier the larger their gradient can be."""
        return likely_places(self.pattern, count, operands or self._operands(), self.key)

    def _operands(self) -> Operands:
        if self.operands is None:
            raise RuntimeError(
                f"Sparsifier: no gradient of layer {self.name} at hand; set needs_gradient in the policy"
            )
        return self.operands


class ElementView(View):
    """The active elements of a layer with an element mask, as blocks of side 1 on a pattern [out, in] of their own.

    A place is ``row * in_features + column``. Inactive are the masked elements of stored blocks, and no others. What
    the base reads of a block pattern it reads here of the elements' pattern, which is that of the moment when the view
    was made.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.policies.views import ElementView
        >>> pattern = sn.BlockPattern([0, 1], [1], shape=(4, 8), block_size=4)
        >>> mask = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> mask[0, 1, 2] = mask[0, 3, 0] = True
        >>> layer = sn.SparseLinear(8, 4, pattern=pattern, element_mask=mask)
        >>> view = ElementView("0", layer, key=0)
        >>> view.pattern.linear_places(), view.inactive   # (1, 4 + 2) and (3, 4 + 0)
        (tensor([14, 28]), 14)
    """

    def __init__(self, name: str, layer: SparseLinear, key: int, drop: int = 0, step: int = 0):
        super().__init__(name, layer, key, drop, step)
        self.blocks = layer.pattern
        self.mask = layer.element_mask
        self._rows = self.blocks.row_indices.long()
        parts = [self._places_of(rows, active=True) for rows in self._slices((0, self.blocks.block_rows))]
        places = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=self.blocks.device)
        self._pattern = BlockPattern.from_linear_places(places, self.blocks.shape, 1)
        self._inactive = elements_inside(self.blocks) - len(places)

    @property
    def inactive(self) -> int:
        """How many masked elements of stored blocks could grow."""
        return self._inactive

    @property
    def pattern(self) -> BlockPattern:
        """The active elements, blocks of side 1."""
        return self._pattern

    @property
    def element_mask(self) -> None:
        """There is none inside an element."""
        return None

    @property
    def values(self) -> Tensor:
        """[num_active, 1, 1], a copy."""
        return self._of_active(self.layer.values.detach())

    @property
    def gradient(self) -> Tensor:
        """[num_active, 1, 1], a copy."""
        return self._of_active(super().gradient)

    def is_current(self) -> bool:
        """Whether the layer still has the pattern and the mask that the view was made of."""
        return self.blocks is self.layer.pattern

    def whole(self, values: Tensor) -> Tensor:
        """[num_blocks, b, b] from [num_active, 1, 1]; masked elements are zero."""
        flat = torch.zeros_like(self.layer.values, requires_grad=False).view(-1)
        flat[self.stored(self.pattern.linear_places())] = values.flatten().to(flat)
        return flat.view_as(self.layer.values)

    def put(self, values: Tensor) -> None:
        """Writes values [num_active, 1, 1]."""
        flat = self.layer.values.detach().view(-1)
        flat[self.stored(self.pattern.linear_places())] = values.flatten().to(flat)

    def _of_active(self, stored: Tensor) -> Tensor:
        return stored.reshape(-1)[self.stored(self.pattern.linear_places())].view(-1, 1, 1)

    def stored(self, places: Tensor) -> Tensor:
        """int64 [n]: where elements at int64 ``places`` [n] of stored blocks are in the flat values."""
        b, (row, col) = self.blocks.block_size, (places // self.blocks.shape[1], places % self.blocks.shape[1])
        block = torch.searchsorted(self.blocks.linear_places(), row // b * self.blocks.block_cols + col // b)
        return (block * b + row % b) * b + col % b

    def random_places(self, count: int) -> Tensor:
        """int64 [<= count], ascending: masked elements of stored blocks, each set of them equally likely."""
        inside = torch.ones_like(self.mask)
        zero_outside(inside, self.blocks)
        taken = where_true((self.mask | ~inside).flatten())
        drawn = functional.draw_free_places(taken, self.mask.numel(), min(count, self.inactive), self.key)
        b = self.blocks.block_size
        block, row, col = drawn // b**2, drawn // b % b, drawn % b
        row += self._rows[block] * b
        col += self.blocks.col.long()[block] * b
        return (row * self.blocks.shape[1] + col).sort().values

    def likely_places(self, count: int, operands: Operands | None = None) -> Tensor:
        """Random ones: those inside stored blocks are few."""
        return self.random_places(count)

    def inactive_places(self, rows: tuple[int, int]) -> Iterator[Tensor]:
        """int64, ascending: the masked elements of stored blocks in block rows [begin, end), some at a time."""
        for part in self._slices(rows):
            yield self._places_of(part, active=False)

    def check_growable(self, places: Tensor) -> None:
        """Refuses elements of blocks that are not stored."""
        row, col = places // self.blocks.shape[1], places % self.blocks.shape[1]
        b, stored = self.blocks.block_size, self.blocks.linear_places()
        outside = places[~torch.isin(row // b * self.blocks.block_cols + col // b, stored)]
        if len(outside):
            raise ValueError(
                f"Policy: grow_places must return masked elements of stored blocks, got {int(outside[0])}, whose block "
                "is not stored"
            )

    def gradients(self, places: Tensor, operands: Operands | None = None) -> Tensor:
        """[n, 1, 1]: of elements of stored blocks; those of their whole blocks are made, some block rows at a time."""
        blocks, cols, b = self.blocks, self.blocks.shape[1], self.blocks.block_size
        found = []
        for begin, end in self._slices((0, blocks.block_rows)):
            bounds = torch.tensor([begin * b * cols, end * b * cols], device=places.device)
            here = places[slice(*torch.searchsorted(places, bounds).tolist())]
            if not len(here):
                continue
            first, last = int(blocks.crow[begin]), int(blocks.crow[end])
            where = self._rows[first:last], blocks.col[first:last]
            whole = functional.candidate_gradients(*(operands or self._operands()), *where, b)
            found.append(whole.flatten()[self.stored(here) - first * b**2])
        return (torch.cat(found) if found else places.new_empty(0, dtype=torch.float32)).view(-1, 1, 1)

    def gradient_squared_norms(self, places: Tensor) -> Tensor:
        """float32 [n]: squares of the gradient's elements at int64 ``places`` [n], ascending."""
        if self.summed is not None:
            return self._summed_norms(places)
        return self.gradients(places).flatten().float().square()

    def _slices(self, rows: tuple[int, int]) -> list[tuple[int, int]]:
        """Ranges of block rows that hold a bounded number of stored elements, or one block row."""
        stored = (self.blocks.crow.long() * self.blocks.block_size**2).tolist()
        slices, begin = [], rows[0]
        for end in range(rows[0] + 1, rows[1] + 1):
            if end == rows[1] or stored[end + 1] - stored[begin] > ELEMENTS_AT_ONCE:
                slices.append((begin, end))
                begin = end
        return slices

    def _places_of(self, rows: tuple[int, int], active: bool) -> Tensor:
        """int64, ascending: places of the stored elements of block rows [begin, end) that are, or are not, active."""
        bounds = self.blocks.crow[rows[0] : rows[1] + 1].tolist()
        if (bounds[-1] - bounds[0]) * self.blocks.block_size**2 < _ROW_AT_ONCE * (rows[1] - rows[0]):
            return self._unordered(bounds[0], bounds[-1], active).sort().values
        parts = [self._unordered(*pair, active, by_row=True) for pair in pairwise(bounds)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=self.device)

    def _unordered(self, first: int, last: int, active: bool, by_row: bool = False) -> Tensor:
        """The same for blocks [first, last), block by block; or row by row, which ascends in one row of blocks."""
        blocks, (out_features, in_features), b = self.blocks, self.blocks.shape, self.blocks.block_size
        side = torch.arange(b, device=blocks.device)
        row = (self._rows[first:last] * b).view(-1, 1, 1) + side.view(1, b, 1)
        col = (blocks.col[first:last].long() * b).view(-1, 1, 1) + side.view(1, 1, b)
        mask = self.mask[first:last] if active else ~self.mask[first:last] & (row < out_features) & (col < in_features)
        places = row * in_features + col
        return places.transpose(0, 1)[mask.transpose(0, 1)] if by_row else places[mask]


def likely_places(pattern: BlockPattern, count: int, operands: Operands, key: int) -> Tensor:
    """int64 [<= count], ascending: inactive places, the likelier drawn the larger their gradient can be.

    The gradient of block (i, j) is a product of the columns i of ``grad_output`` and j of ``x``; its norm is at most
    the product of theirs. A place is drawn in proportion to the square of that, which takes time for ``count`` places
    and for the operands, and none for the other places. Where too few differ, places at random make up the number.

    Args:
        operands: x [batch, in] and grad_output [batch, out].
        key: of the draw, in [0, 2^63).

    Raises:
        BadScores: NaN or Inf among the operands.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.policies.views import likely_places
        >>> pattern = sn.BlockPattern([0, 1, 2], [0, 1], shape=(8, 8), block_size=4)   # places 0 and 3
        >>> x, grad_output = torch.ones(2, 8), torch.ones(2, 8)
        >>> x[:, :4] = 0   # nothing to gain from the first block column: place 2
        >>> likely_places(pattern, 1, (x, grad_output), key=0)
        tensor([1])
    """
    total = pattern.block_rows * pattern.block_cols
    count = min(count, total - pattern.num_blocks)
    sums = [_line_energies(t, pattern.block_size).cumsum(0) for t in reversed(operands)]
    largest = [float(s[-1]) if len(s) else 0.0 for s in sums]
    if not all(map(math.isfinite, largest)):
        raise BadScores("its grow scores hold NaN or Inf")
    active = pattern.linear_places()
    found = active[:0]
    for turn in range(_ROUNDS if all(largest) else 0):
        if len(found) >= count:
            break
        more = count + count // 4 + 4  # some are active, some drawn twice
        ticks = torch.arange(turn * more, (turn + 1) * more, device=active.device).split(_DRAWS_AT_ONCE)
        drawn = (_drawn(some, sums, largest, key) for some in ticks)
        found = torch.cat([found, *(row * pattern.block_cols + col for row, col in drawn)]).unique()
        if len(active):
            at = torch.searchsorted(active, found).clamp_(max=len(active) - 1)
            found = found[active[at] != found]
    if len(found) > count:
        found = found[functional.select_extreme(hash_uniform(found, ~key), count, largest=True)]
    missing = count - len(found)
    if missing:
        taken = torch.cat([active, found]).sort().values
        found = torch.cat([found, functional.draw_free_places(taken, total, missing, key)]).sort().values
    return found


def _drawn(ticks: Tensor, sums: list[Tensor], largest: list[float], key: int) -> list[Tensor]:
    """int64 [n] each: a row and a column for every one of ``ticks``, in proportion to what ``sums`` grow by."""
    draws = ((hash_uniform(2 * ticks + i, key).double() + 2.0**-25) * top for i, top in enumerate(largest))
    return [torch.searchsorted(s, u).clamp_(max=len(s) - 1) for s, u in zip(sums, draws, strict=True)]


def _squared_norms(blocks: Tensor) -> Tensor:
    """float32 [n] of [n, b, b]."""
    return torch.linalg.vector_norm(blocks.flatten(1), dim=1, dtype=torch.float32).square()


def _line_energies(rows: Tensor, b: int) -> Tensor:
    """float64 [ceil(features / b)]: squared norms of [batch, features], ``b`` columns at a time."""
    energies = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    for some in rows.detach().split(ROWS_AT_ONCE):  # torch's norm along this dimension takes ten times as long
        energies += some.float().square().sum(0)
    return torch.nn.functional.pad(energies, (0, -len(energies) % b)).view(-1, b).sum(1)
