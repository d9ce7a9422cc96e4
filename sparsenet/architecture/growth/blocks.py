"""Blocks that go and come in one layer, its copies and its optimizers, at one decision of the Grower."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsenet import functional
from sparsenet.layers import SparseLinear
from sparsenet.optimizer_state import LayerMove, check_followable
from sparsenet.pattern import BlockPattern

__all__ = ["move_blocks", "spared"]


def move_blocks(
    name: str,
    layer: SparseLinear,
    optimizers: Sequence[torch.optim.Optimizer],
    followers: Sequence[SparseLinear],
    leave: Tensor,
    enter: Tensor,
) -> BlockPattern:
    """Takes the blocks of numbers ``leave`` out and puts zero blocks at places ``enter``; returns the old pattern.

    Args:
        name: for errors. followers: copies of the layer, whose blocks move alike.
        leave: int64, block numbers. enter: int64, inactive places (block row * block columns + block column).

    Raises:
        RuntimeError: an optimizer's state cannot follow; nothing was changed.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.architecture.growth.blocks import move_blocks
        >>> pattern = sn.BlockPattern.from_mask(torch.tensor([[True, True], [False, False]]), block_size=8)
        >>> layer = sn.SparseLinear(16, 16, pattern=pattern)
        >>> _ = move_blocks("layer", layer, (), (), leave=torch.tensor([1]), enter=torch.tensor([3]))
        >>> layer.pattern.to_mask()
        tensor([[ True, False],
                [False,  True]])
    """
    old = layer.pattern
    for optimizer in optimizers:
        check_followable(optimizer, layer.values, name, old.num_blocks)
    places = old.linear_places()
    stays = torch.ones(len(places), dtype=torch.bool, device=places.device)
    stays[leave.to(places.device)] = False
    after = torch.cat([places[stays], enter.to(places.device)])
    new = BlockPattern.from_linear_places(after, old.shape, old.block_size)
    done: list[LayerMove] = []
    try:
        for follower in followers:
            done.append(LayerMove(follower, (), new, {}))
        done.append(LayerMove(layer, optimizers, new, {}))
    except BaseException:
        for move in reversed(done):
            move.undo()
        raise
    return old


def spared(layer: SparseLinear, scores: Tensor, count: int) -> Tensor:
    """int64: up to ``count`` block numbers of lowest score, none of them the last of its row or column of blocks.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.architecture.growth.blocks import spared
        >>> pattern = sn.BlockPattern.from_mask(torch.tensor([[True, True], [False, True]]), block_size=8)
        >>> spared(sn.SparseLinear(16, 16, pattern=pattern), torch.tensor([3.0, 2.0, 1.0]), 2)
        tensor([1])
    """
    pattern = layer.pattern
    lines = [pattern.row_indices.long(), pattern.col.long()]
    return functional.lowest_to_spare(scores.float(), min(count, pattern.num_blocks), *lines)
