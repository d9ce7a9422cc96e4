"""Policies that keep the number of blocks: none is exchanged, or the smallest for new ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsenet.policies.policy import LayerView, Policy, Schedule

__all__ = ["SET", "RigL", "Static"]


@dataclass(frozen=True)
class Static(Policy):
    """The pattern never changes."""

    drop_fraction: float | Schedule = 0.0
    exchanges = False


@dataclass(frozen=True)
class SET(Policy):
    """Drops the smallest, grows at random. Sparse Evolutionary Training (Mocanu et al., 2018)."""

    def grow_scores(self, layer: LayerView, places: Tensor) -> Tensor:
        """Random numbers."""
        return layer.random(places)


@dataclass(frozen=True)
class RigL(Policy):
    """Drops the smallest, grows where the dense gradient is largest. RigL (Evci et al., 2020), by blocks.

    The dense gradient is never stored: only the norms of its blocks, made in the layer's own backward.
    """

    needs_gradient = True

    def grow_scores(self, layer: LayerView, places: Tensor) -> Tensor:
        """Squared norms of the gradient's blocks."""
        return layer.gradient_squared_norms(places)
