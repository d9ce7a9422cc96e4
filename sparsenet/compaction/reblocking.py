"""Re-blocking: where the blocks of a matrix land when rows and columns leave or move, and which order needs fewest.

Leaving out single rows shifts all later ones, so that a new block row may need blocks of two old ones; a good order of
the hidden units avoids that. Patterns are compared by counting blocks, without touching values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsenet.pattern import BlockPattern

__all__ = ["Reblocked", "fullest_order", "reblock"]

MOST_WORK = 1 << 36  # signatures x signatures x bits: beyond, no order is searched


@dataclass(frozen=True)
class Reblocked:
    """Where blocks land.

    Attributes:
        shape: (rows, columns) of the new matrix.
        places: int64 [num_blocks], ascending: block row * block columns + block column.
        carried: active elements that come along.
        fill_in: elements of the new blocks, inside the matrix, that were not active before.
    """

    shape: tuple[int, int]
    block_size: int
    places: Tensor
    carried: int
    fill_in: int

    @property
    def num_blocks(self) -> int:
        """Blocks needed."""
        return len(self.places)

    def pattern(self) -> BlockPattern:
        """The new pattern."""
        cols = max(-(-self.shape[1] // self.block_size), 1)
        return BlockPattern.from_places(self.places // cols, self.places % cols, self.shape, self.block_size)


def reblock(pattern: BlockPattern, rows: Tensor, cols: Tensor, present: Tensor | None = None) -> Reblocked:
    """The blocks that the new matrix ``old[rows][:, cols]`` needs.

    Args:
        pattern: of the old matrix.
        rows, cols: int64, distinct: the old row of each new one, the old column of each new one.
        present: bool [num_blocks, b, b], which elements are active; default all of every block.
    """
    b = pattern.block_size
    shape = (len(rows), len(cols))
    new_rows, new_cols = (
        _new_positions(chosen.cpu(), n) for chosen, n in zip((rows, cols), pattern.shape, strict=True)
    )
    block_row, block_col = pattern.row_indices.long().cpu(), pattern.col_indices.long().cpu()
    block_cols = max(-(-shape[1] // b), 1)
    if present is None:
        up, across = _bins(new_rows, b), _bins(new_cols, b)
        top, left = _product(up, across, block_row, block_col)
        places = (top * block_cols + left).unique()
        kept = [torch.nn.functional.pad(p >= 0, (0, -len(p) % b)).reshape(-1, b).sum(1) for p in (new_rows, new_cols)]
        carried = int((kept[0][block_row] * kept[1][block_col]).sum())
    else:
        n, i, j = present.cpu().nonzero(as_tuple=True)
        r, c = new_rows[block_row[n] * b + i], new_cols[block_col[n] * b + j]
        inside = (r >= 0) & (c >= 0)
        places = (r[inside] // b * block_cols + c[inside] // b).unique()
        carried = int(inside.sum())
    heights = (shape[0] - places // block_cols * b).clamp(max=b)
    widths = (shape[1] - places % block_cols * b).clamp(max=b)
    return Reblocked(shape, b, places, carried, int((heights * widths).sum()) - carried)


def _new_positions(chosen: Tensor, n: int) -> Tensor:
    """int64 [n]: where each old row or column goes, -1 where it leaves."""
    at = torch.full((n,), -1, dtype=torch.int64)
    at[chosen] = torch.arange(len(chosen))
    return at


def _bins(positions: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """For each old block row (or column) the distinct new ones its members go to: (starts [blocks + 1], bins)."""
    old = torch.arange(len(positions)) // b
    stays = positions >= 0
    width = int(positions.max()) // b + 1 if stays.any() else 1
    pairs = (old[stays] * width + positions[stays] // b).unique()
    blocks = -(-len(positions) // b)
    starts = torch.zeros(blocks + 1, dtype=torch.int64)
    starts[1:] = torch.bincount(pairs // width, minlength=blocks).cumsum(0)
    return starts, pairs % width


def _product(up: tuple[Tensor, Tensor], across: tuple[Tensor, Tensor], rows: Tensor, cols: Tensor):
    """All (new block row, new block column) that each old block's members go to."""
    (row_start, row_bins), (col_start, col_bins) = up, across
    tall, wide = row_start[rows + 1] - row_start[rows], col_start[cols + 1] - col_start[cols]
    counts = tall * wide
    block = torch.arange(len(rows)).repeat_interleave(counts)
    within = torch.arange(len(block)) - (counts.cumsum(0) - counts)[block]
    top = row_bins[row_start[rows[block]] + within // wide[block]]
    left = col_bins[col_start[cols[block]] + within % wide[block]]
    return top, left


def fullest_order(signatures: Tensor, block_size: int) -> Tensor | None:
    """An order of units in which each ``block_size`` neighbours touch few blocks between them.

    Args:
        signatures: bool [units, blocks], which blocks (of all matrices the unit is a row or column of) a unit touches.

    Returns:
        int64 [units], a permutation, the same on every machine; None where searching would take too long.

    Units of one signature that fill blocks on their own go first; the rest is packed greedily: a block opens with the
    unit that touches most and takes the units that add least.
    """
    unique, label, counts = signatures.unique(dim=0, return_inverse=True, return_counts=True)
    if len(unique) ** 2 * max(unique.shape[1], 1) > MOST_WORK:
        return None
    members = label.argsort(stable=True).split(counts.tolist())
    order = [units[: len(units) // block_size * block_size] for units in members]
    left = [units[len(units) // block_size * block_size :] for units in members]
    remaining = np.array([len(units) for units in left])
    touches, weight = unique.numpy(), unique.sum(1).numpy().astype(np.float64)
    by_block = np.ascontiguousarray(touches.T)
    covered, gain, space = None, weight, 0  # gain: blocks that a unit would add to those the open block touches
    while (remaining > 0).any():
        if space == 0:
            covered, gain, space = np.zeros(touches.shape[1], dtype=bool), weight.copy(), block_size
            score = -weight
        else:
            score = gain
        pick = int(np.where(remaining > 0, score, np.inf).argmin())
        taken = min(space, int(remaining[pick]))
        order.append(left[pick][:taken])
        left[pick] = left[pick][taken:]
        remaining[pick] -= taken
        space -= taken
        fresh = touches[pick] & ~covered
        gain -= by_block[fresh].sum(0)
        covered |= fresh
    return torch.cat(order) if order else torch.empty(0, dtype=torch.int64)
