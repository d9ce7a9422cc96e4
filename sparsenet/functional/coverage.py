"""Choosing blocks so that every block row and every block column keeps one.

A row of blocks without any is a set of outputs that are constant, and a column without any a set of inputs that nobody
reads. Behind a ReLU with a bias of zero such an output has a gradient of exactly zero: growth by gradients never finds
it again.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsenet.functional import native
from sparsenet.functional.checks import refuse_tracing

__all__ = ["largest_reaching_all", "lowest_to_spare"]

_ROUNDS = 64  # of pairing rows with columns by mutual choice; equal scores could need one for each


def lowest_to_spare(scores: Tensor, count: int, *lines: Tensor) -> Tensor:
    """Numbers of the ``count`` lowest scores whose blocks can go without leaving a row or column empty.

    The blocks are asked in the order of their scores, ties by index; one that is the last of its row or column stays.

    Args:
        scores: float32 [n], one per block, without NaN.
        count: how many shall go.
        lines: int64 [n] each, the block row or block column of each block: what must not become empty.

    Returns:
        int64, ascending; fewer than ``count`` where no more can be spared.

    Raises:
        ValueError: a NaN among the scores, more asked for than there are, or lines of another length.

    Example:
        >>> import torch
        >>> from sparsenet.functional import lowest_to_spare
        >>> rows, cols = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
        >>> lowest_to_spare(torch.tensor([2.0, 3.0, 1.0]), 1, rows, cols)   # block 2 is the last of row 1
        tensor([1])
    """
    refuse_tracing("lowest_to_spare")
    scores, order = scores.float().contiguous(), None
    if hasattr(native.kernels_of(scores.device), "lowest_to_spare"):
        asked_by = scores.numpy(force=True)
    else:  # scores stay on their device: blocks in the order of their scores are as blocks of equal scores
        if bool(scores.isnan().any()):
            raise ValueError("lowest_to_spare: scores must not be NaN")
        order = (scores + 0.0).sort(stable=True).indices  # -0 and +0 are the same score
        asked_by, lines = np.zeros(len(order), np.float32), tuple(line[order] for line in lines)
    on_cpu = [line.contiguous().numpy(force=True) for line in lines]
    chosen = torch.from_numpy(native.lowest_to_spare(asked_by, count, on_cpu)).to(scores.device)
    return chosen if order is None else order[chosen].sort().values


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
    spared = lowest_to_spare(scores.flatten()[both], len(added), both // cols, both % cols)
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
