"""Cheap random changes of image batches: mirrored, moved by a few pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsenet.schedules import as_integer

__all__ = ["augment"]


def augment(x: Tensor, shape: Sequence[int], flip: bool, shift: int, generator: torch.Generator) -> Tensor:
    """A batch of images mirrored left to right with probability one half each, and moved.

    Args:
        x: [batch, features], images flattened.
        shape: of one image, (..., height, width).
        flip: whether to mirror.
        shift: largest move in pixels, the same for all images of the batch, drawn anew for every batch; what comes in
            at the border is the border's own pixels.
        generator: draws both.

    Returns:
        [batch, features].

    Raises:
        ValueError: ``shape`` has no height and width.

    Example:
        >>> import torch
        >>> from sparsenet.data import augment
        >>> x = torch.rand(32, 784)
        >>> augment(x, (28, 28), flip=True, shift=2, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([32, 784])
    """
    if len(shape) < 2:
        raise ValueError(f"augment: shape must be of images (..., height, width), got {tuple(shape)}")
    images = x.reshape(len(x), -1, shape[-2], shape[-1])
    if flip:
        chosen = torch.rand(len(x), generator=generator) < 0.5
        images = torch.where(chosen.to(x.device)[:, None, None, None], images.flip(3), images)
    shift = as_integer("augment", "shift", shift, at_least=0)
    if shift:
        down, right = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
        rows = (torch.arange(shape[-2]) - down).clamp(0, shape[-2] - 1)
        cols = (torch.arange(shape[-1]) - right).clamp(0, shape[-1] - 1)
        images = images[:, :, rows.to(x.device)][:, :, :, cols.to(x.device)]
    return images.reshape(x.shape)
