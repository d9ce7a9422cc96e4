"""Choosing blocks so that every block row and every block column keeps one.

A row of blocks without any is a set of outputs that are constant, and a column without any a set of inputs that nobody
reads. Behind a ReLU with a bias of zero such an output has a gradient of exactly zero: growth by gradients never finds
it again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsenet.functional.blocks import select_extreme

__all__ = ["largest_reaching_all", "lowest_to_spare"]

_ROUNDS = 64  # of pairing rows with columns by mutual choice; equal scores could need one for each


def lowest_to_spare(scores: Tensor, rows: Tensor, cols: Tensor, count: int) -> Tensor:
    """Numbers of the ``count`` lowest scores whose blocks can go without leaving a row or column empty.

    The blocks are asked in the order of their scores, ties by index; one that is the last of its row or column stays.

    Args:
        scores: float32 [n], one per block, without NaN.
        rows: int [n], the block row of each; ``cols``: int [n], the block column.
        count: how many shall go.

    Returns:
        int64, ascending; fewer than ``count`` where no more can be spared.

    Example:
        >>> import torch
        >>> from sparsenet.functional import lowest_to_spare
        >>> rows, cols = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
        >>> lowest_to_spare(torch.tensor([2.0, 3.0, 1.0]), rows, cols, count=1)   # block 2 is the last of row 1
        tensor([1])
    """
    lowest = count
    while True:
        asked = select_extreme(scores, lowest, largest=False)
        staying = _last_of_their_line(scores, rows, cols, asked)
        missing = count - (len(asked) - len(staying))
        if not missing or lowest == len(scores):
            break
        lowest = min(lowest + missing, len(scores))  # who was asked before answers as before
    goes = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    goes[asked] = True
    goes[staying] = False
    return goes.nonzero().flatten()


def _last_of_their_line(scores: Tensor, rows: Tensor, cols: Tensor, asked: Tensor) -> Tensor:
    """Those of ``asked`` that are the last of their row or column when their turn comes.

    Only lines that would lose all their blocks can refuse one, so only blocks on these are looked at one by one.
    """
    tight = []
    for lines in (rows, cols):
        blocks = torch.bincount(lines)
        tight.append((torch.bincount(lines[asked], minlength=len(blocks)) == blocks) & (blocks > 0))
    doubtful = asked[tight[0][rows[asked]] | tight[1][cols[asked]]]
    if not len(doubtful):
        return doubtful
    doubtful = doubtful[scores[doubtful].argsort(stable=True)]
    left = []
    for lines, is_tight in zip((rows, cols), tight, strict=True):
        # a line that keeps a block in any case never refuses: as if it had one more than it can lose
        left.append((torch.bincount(lines) + ~is_tight).tolist())
    row_left, col_left = left
    staying = []
    for block, row, col in zip(doubtful.tolist(), rows[doubtful].tolist(), cols[doubtful].tolist(), strict=True):
        if row_left[row] > 1 and col_left[col] > 1:
            row_left[row] -= 1
            col_left[col] -= 1
        else:
            staying.append(block)
    return torch.tensor(staying, dtype=torch.int64, device=scores.device)


def largest_reaching_all(scores: Tensor, count: int) -> Tensor:
    """Linear places of the ``count`` largest ``scores`` [rows, cols], each row and column with one if they suffice.

    Where the largest leave a line empty, its best place takes that of the smallest one that can be spared.

    Returns:
        int64 [count], in no order. Fewer than ``max(rows, cols)`` cannot reach all: then simply the largest.

    Example:
        >>> import torch
        >>> from sparsenet.functional import largest_reaching_all
        >>> largest_reaching_all(torch.tensor([[9.0, 8.0, 1.0], [2.0, 1.0, 0.0]]), count=3).sort().values
        tensor([1, 2, 3])
    """
    rows, cols = scores.shape
    order = scores.flatten().argsort(descending=True, stable=True)
    picked = order[:count]
    if not count or count < max(rows, cols):
        return picked
    filled = torch.bincount(picked // cols, minlength=rows), torch.bincount(picked % cols, minlength=cols)
    empty_rows, empty_cols = ((blocks == 0).nonzero().flatten() for blocks in filled)
    if not len(empty_rows) and not len(empty_cols):
        return picked
    added = _best_cover(scores, empty_rows, empty_cols)
    both = torch.cat([added, picked])
    spared = lowest_to_spare(scores.flatten()[both], both // cols, both % cols, len(added))
    if len(spared) < len(added):  # many of the largest share few lines; a cover of all lines always has room
        lines = (torch.arange(n, device=scores.device) for n in (rows, cols))
        cover = _best_cover(scores, *lines)
        return torch.cat([cover, order[~torch.isin(order, cover)][: count - len(cover)]])
    keep = torch.ones(len(both), dtype=torch.bool, device=scores.device)
    keep[spared] = False
    return both[keep]


def _best_cover(scores: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Linear places that give each of ``rows`` and ``cols`` one, as few as can be: who is best for each other first."""
    width, places = scores.shape[1], []
    for _ in range(_ROUNDS):
        if not len(rows) or not len(cols):
            break
        between = scores[rows][:, cols]
        best_col, best_row = between.argmax(1), between.argmax(0)
        mutual = best_row[best_col] == torch.arange(len(rows), device=rows.device)
        places.append(rows[mutual] * width + cols[best_col[mutual]])
        open_cols = torch.ones_like(cols, dtype=torch.bool)
        open_cols[best_col[mutual]] = False
        rows, cols = rows[~mutual], cols[open_cols]
    pairs = min(len(rows), len(cols))
    places.append(rows[:pairs] * width + cols[:pairs])
    rows, cols = rows[pairs:], cols[pairs:]
    places.append(rows * width + scores[rows].argmax(1))
    places.append(scores[:, cols].argmax(0) * width + cols)
    return torch.cat(places)
