"""Optimizer state that follows its blocks: one rule for every optimizer, and no list of known ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sparsenet.layers import take_blocks

__all__ = ["GROWN_STATE", "carry_state", "state_by_block"]

GROWN_STATE = ("zero", "mean")


def state_by_block(optimizer: torch.optim.Optimizer | None, parameter: nn.Parameter) -> dict[str, Tensor]:
    """The state tensors of ``parameter`` that have one entry per block: those whose first size is the number of blocks.

    Scalars such as ``step`` are not among them. With a single block a one-dimensional tensor could be either; it is
    taken for a scalar.

    Example:
        >>> import torch
        >>> from sparsenet.optimizer_state import state_by_block
        >>> values = torch.nn.Parameter(torch.randn(3, 4, 4))
        >>> optimizer = torch.optim.AdamW([values])
        >>> values.sum().backward()
        >>> optimizer.step()
        >>> sorted(state_by_block(optimizer, values))   # its ``step`` is a scalar
        ['exp_avg', 'exp_avg_sq']
    """
    if optimizer is None or parameter not in optimizer.state:
        return {}
    blocks = parameter.shape[0]
    return {
        key: value
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
        and value.dim() > 0
        and value.shape[0] == blocks
        and (value.dim() > 1 or blocks > 1)
    }


def carry_state(blocks: Tensor, carried: Tensor, grown: str = "zero") -> Tensor:
    """One state tensor after a rewire.

    Args:
        blocks: [old blocks, ...].
        carried: int64 [new blocks], the old number of each new block or -1.
        grown: what grown blocks start with: ``zero``, or ``mean`` over the blocks that stayed.

    Returns:
        [new blocks, ...]; blocks that stayed are bit for bit what they were.

    Example:
        >>> import torch
        >>> from sparsenet.optimizer_state import carry_state
        >>> moments = torch.tensor([[1.0], [2.0], [3.0]])
        >>> carry_state(moments, torch.tensor([2, -1, 0])).flatten()
        tensor([3., 0., 1.])
        >>> carry_state(moments, torch.tensor([2, -1, 0]), grown="mean").flatten()
        tensor([3., 2., 1.])
    """
    moved = take_blocks(blocks, carried, 0)
    if grown == "mean":
        stays = carried >= 0
        if stays.any() and not stays.all():
            moved[~stays] = moved[stays].mean()
    return moved


def check_grown_state(grown_state: Mapping[str, str]) -> dict[str, str]:
    """``grown_state`` as a dict, checked."""
    for key, how in grown_state.items():
        if how not in GROWN_STATE:
            raise ValueError(f"Sparsifier: grown_state[{key!r}] must be one of {', '.join(GROWN_STATE)}, got {how!r}")
    return dict(grown_state)
