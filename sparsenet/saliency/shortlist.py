"""Cheap first, expensive for the few."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rerank"]


def rerank(cheap: Tensor, expensive: Tensor, listed: Tensor) -> Tensor:
    """The order in which things go: those on the shortlist by the expensive score, then the others by the cheap one.

    Args:
        cheap, expensive: [n], the lowest goes first. listed: bool [n], the shortlist; ``expensive`` counts only there.

    Returns:
        float32 [n]: ranks from 0. Ties go to the smaller index.

    Raises:
        ValueError: three different lengths.

    Example:
        >>> import torch
        >>> from sparsenet.saliency import rerank
        >>> cheap, expensive = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([9.0, 5.0, 7.0, 0.0])
        >>> rerank(cheap, expensive, listed=cheap < 3.5)
        tensor([2., 0., 1., 3.])
    """
    if not cheap.shape == expensive.shape == listed.shape or cheap.dim() != 1:
        raise ValueError(
            f"rerank: cheap, expensive and listed must have one shape [n], got {list(cheap.shape)}, "
            f"{list(expensive.shape)} and {list(listed.shape)}"
        )
    order = torch.where(listed, expensive, cheap).argsort(stable=True)
    order = torch.cat([order[listed[order]], order[~listed[order]]])
    ranks = torch.empty(len(order), device=cheap.device)
    ranks[order] = torch.arange(len(order), device=cheap.device, dtype=ranks.dtype)
    return ranks
