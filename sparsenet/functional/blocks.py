"""Moving and choosing blocks: gathered into another pattern, drawn, picked by their scores, cut out of a matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparsenet.functional import native
from sparsenet.functional.checks import refuse_tracing
from sparsenet.functional.native import as_int32

__all__ = ["compact_blocks", "draw_free_places", "select_extreme"]


def compact_blocks(tensors: Sequence[Tensor], pattern, rows: Tensor, cols: Tensor, new_pattern) -> list[Tensor]:
    """Rows and columns of a block-sparse matrix gathered into another pattern: values and every moment in one pass.

    Element (i, j) of the new matrix is element ``(rows[i], cols[j])`` of the old one: a subset leaves units out, a
    permutation moves them, both at once re-block what is left.

    Args:
        tensors: each [num_blocks, b, b] for ``pattern``: values, optimizer moments, masks; any dtypes.
        pattern: the :class:`~sparsenet.BlockPattern` they are on.
        rows: int [new out], the old row of each new one; ``cols``: int [new in], the old column of each new one.
        new_pattern: of shape (new out, new in) and the same block size. Old blocks that it does not cover are lost.

    Returns:
        For each tensor a new one, [new num_blocks, b, b]: bit for bit what was there, zero where ``pattern`` has no
        block and outside the matrix.

    Raises:
        ValueError: shapes, devices or indices do not fit; TypeError: indices that are not integers.

    Example:
        >>> import torch, sparsenet as sn
        >>> old = sn.BlockPattern([0, 1, 2], [1, 0], shape=(8, 8), block_size=4)
        >>> new = sn.BlockPattern([0, 1], [0], shape=(4, 4), block_size=4)
        >>> values = torch.arange(32.0).reshape(2, 4, 4)
        >>> sn.functional.compact_blocks([values], old, torch.arange(4), torch.arange(4, 8), new)[0].equal(values[:1])
        True
    """
    refuse_tracing("compact_blocks")
    name, new_pattern = "compact_blocks", new_pattern.to(pattern.device)
    if pattern.block_size != new_pattern.block_size:
        raise ValueError(f"{name}: block_size must stay {pattern.block_size}, got {new_pattern.block_size}")
    b = pattern.block_size
    for t in tensors:
        if list(t.shape) != [pattern.num_blocks, b, b]:
            raise ValueError(f"{name}: tensors must have shape {[pattern.num_blocks, b, b]}, got {list(t.shape)}")
        if t.device != pattern.device:
            raise ValueError(f"{name}: tensors must be on the device of pattern, {pattern.device}, got {t.device}")
    picked = []
    for label, chosen, new, old in zip(("rows", "cols"), (rows, cols), new_pattern.shape, pattern.shape, strict=True):
        if chosen.dtype.is_floating_point or chosen.dtype == torch.bool or chosen.dtype.is_complex:
            raise TypeError(f"{name}: {label} must be integers, got {chosen.dtype}")
        if list(chosen.shape) != [new]:
            raise ValueError(f"{name}: {label} must have shape [{new}], got {list(chosen.shape)}")
        if new and (int(chosen.min()) < 0 or int(chosen.max()) >= old):
            raise ValueError(f"{name}: {label} must lie in [0, {old}), got {int(chosen.min())} to {int(chosen.max())}")
        picked.append(as_int32(chosen.to(pattern.device)))
    sources = [t.detach().contiguous() for t in tensors]
    targets = [torch.empty(new_pattern.num_blocks, b, b, dtype=t.dtype, device=t.device) for t in tensors]
    if new_pattern.num_blocks and sources:
        moved = [(s.data_ptr(), t.data_ptr(), s.element_size()) for s, t in zip(sources, targets, strict=True)]
        kernels = native.kernels_of(pattern.device)
        kernels.compact_blocks(pattern.native, new_pattern.native, tuple(picked), moved, torch.get_num_threads())
    return targets


def draw_free_places(active: Tensor, places: int, count: int, key: int) -> Tensor:
    """``count`` of the places in [0, ``places``) that are not active, every such set equally likely.

    Args:
        active: int64 [n], ascending and distinct.
        count: at most as many as are free.
        key: in [0, 2^63). What is drawn depends on the arguments only: not on device, rank, threads or a generator.

    Returns:
        int64 [count], ascending, on the device of ``active``. Time and memory are those of ``count`` and n, however
        many places there are. Numbers come from splitmix64 (Steele, Lea & Flood, 2014).

    Raises:
        ValueError: ``active`` does not ascend in [0, places), or more are asked for than are free.

    Example:
        >>> import torch
        >>> from sparsenet.functional import draw_free_places
        >>> drawn = draw_free_places(torch.tensor([1, 4]), places=6, count=3, key=0)
        >>> len(drawn), set(drawn.tolist()) <= {0, 2, 3, 5}
        (3, True)
    """
    refuse_tracing("draw_free_places")
    if active.dtype != torch.int64:
        raise TypeError(f"draw_free_places: active must be int64, got {active.dtype}")
    drawn = native.draw_free_places(active.contiguous().numpy(force=True), places, count, key)
    return torch.from_numpy(drawn).to(active.device)


def select_extreme(scores: Tensor, k: int, largest: bool) -> Tensor:
    """int64 [k], ascending: where the k smallest or largest scores are; ties go to the smaller index, NaN refused.

    Example:
        >>> import torch
        >>> from sparsenet.functional import select_extreme
        >>> select_extreme(torch.tensor([0.5, 2.0, 2.0, 1.0]), k=2, largest=True)
        tensor([1, 2])
        >>> select_extreme(torch.tensor([0.5, 2.0, 2.0, 1.0]), k=3, largest=False)   # ties: smaller index
        tensor([0, 1, 3])
    """
    refuse_tracing("select_extreme")
    if scores.dtype == torch.float64:  # float32 would make ties of close scores: pass their ranks on
        unique, ranks = scores.unique(return_inverse=True)
        scores = torch.where(scores.isnan(), torch.nan, ranks) if len(unique) < 2**24 else scores
    picked = native.kernels_of(scores.device).select_extreme(native.handed(scores.float().contiguous()), k, largest)
    return torch.as_tensor(picked, device=scores.device)


# --- pieces that layers and optimizer state are moved with ----------------------------------------------------------


def where_true(mask: Tensor) -> Tensor:
    """int64: where ``mask`` [n] is true. On the CPU numpy takes half of torch's time."""
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero().flatten()


def zero_outside(blocks: Tensor, pattern) -> None:
    """Zeroes, in ``blocks`` [num_blocks, b, b], the parts of edge blocks that lie outside the matrix."""
    b = pattern.block_size
    out_features, in_features = pattern.shape
    if out_features % b:
        blocks[pattern.row_indices.long() == pattern.block_rows - 1, out_features % b :] = 0
    if in_features % b:
        blocks[pattern.col.long() == pattern.block_cols - 1, :, in_features % b :] = 0


def take_blocks(blocks: Tensor, carried: Tensor, fill) -> Tensor:
    """``blocks[carried]`` along the first dimension, ``fill`` where carried is -1."""
    if not len(blocks):
        return blocks.new_full((len(carried), *blocks.shape[1:]), fill)
    taken = blocks.index_select(0, carried.clamp(min=0))
    return taken.index_fill_(0, where_true(carried < 0), fill)  # six times as fast as indexing by a mask


def dense_blocks(weight: Tensor, pattern) -> Tensor:
    """[num_blocks, b, b]: the blocks of a dense [out, in] matrix that ``pattern`` names."""
    b = pattern.block_size
    padded = torch.nn.functional.pad(weight.detach(), (0, -weight.shape[1] % b, 0, -weight.shape[0] % b))
    tiles = padded.reshape(pattern.block_rows, b, pattern.block_cols, b).permute(0, 2, 1, 3)
    return tiles[pattern.row_indices.long(), pattern.col_indices.long()]


def uniform_(t: Tensor, generator: torch.Generator | None) -> Tensor:
    """Fills with U(-1, 1), drawn where the generator is."""
    if generator is None or generator.device.type == t.device.type:
        return t.uniform_(-1.0, 1.0, generator=generator)
    return t.copy_(
        torch.empty(t.shape, dtype=t.dtype, device=generator.device).uniform_(-1.0, 1.0, generator=generator)
    )
