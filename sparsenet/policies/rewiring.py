"""Policies that keep the number of blocks: none is exchanged, or the smallest for new ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsenet.policies.policy import LayerView, Policy, Schedule

__all__ = ["SET", "RigL", "Static"]


@dataclass(frozen=True)
class Static(Policy):
    """The pattern never changes.

    Example:
        >>> import sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> update = sn.Sparsifier(model, None, sn.Static(), every=1).step()
        >>> update is None or (update.dropped, update.grown) == (0, 0)
        True
    """

    drop_fraction: float | Schedule = 0.0
    exchanges = False


@dataclass(frozen=True)
class SET(Policy):
    """Drops the smallest, grows at random. Sparse Evolutionary Training (Mocanu et al., 2018).

    Example:
        >>> import sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> update = sn.Sparsifier(model, None, sn.SET(drop_fraction=0.25), every=1).step()
        >>> update.dropped == update.grown > 0
        True
    """

    def grow_scores(self, layer: LayerView, places: Tensor) -> Tensor:
        """Random numbers."""
        return layer.random(places)

    def grow_places(self, layer: LayerView, count: int) -> Tensor:
        """Random places: the same law without a number for every free place."""
        return layer.random_places(count)


@dataclass(frozen=True)
class RigL(Policy):
    """Drops the smallest, grows where the dense gradient is largest. RigL (Evci et al., 2020), by blocks.

    The dense gradient is never stored: only the norms of its blocks, made in the layer's own backward.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> sparsifier = sn.Sparsifier(model, None, sn.RigL(drop_fraction=0.25), every=1)
        >>> model(torch.randn(16, 64)).square().sum().backward()  # the growth scores come from this backward
        >>> update = sparsifier.step()
        >>> update.dropped == update.grown > 0
        True
    """

    needs_gradient = True

    def grow_scores(self, layer: LayerView, places: Tensor) -> Tensor:
        """Squared norms of the gradient's blocks."""
        return layer.gradient_squared_norms(places)
