"""Policies that keep the number of blocks: none is exchanged, or those that count least for new ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsenet.policies.policy import LayerView, Policy, Schedule, block_squared_norms
from sparsenet.schedules import as_integer, as_number

__all__ = ["MEST", "SET", "SNFS", "GrowsAtRandom", "GrowsByGradient", "Random", "RigL", "Static"]

CANDIDATES = 3  # places that RigL scores for each one that grows


class GrowsAtRandom(Policy):
    """Growth as in SET (Mocanu et al., 2018)."""

    def grow_scores(self, layer: LayerView, places: Tensor) -> Tensor:
        """Random numbers."""
        return layer.random(places)

    def grow_places(self, layer: LayerView, count: int) -> Tensor:
        """Random places: the same law without a number for every free place."""
        return layer.random_places(count)


class GrowsByGradient(Policy):
    """Growth as in RigL (Evci et al., 2020)."""

    needs_gradient = True
    candidates = CANDIDATES

    def grow_scores(self, layer: LayerView, places: Tensor) -> Tensor:
        """Squared norms of the gradient's blocks."""
        return layer.gradient_squared_norms(places)


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
class SET(GrowsAtRandom):
    """Drops the smallest, grows at random. Sparse Evolutionary Training (Mocanu et al., 2018).

    Example:
        >>> import sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> update = sn.Sparsifier(model, None, sn.SET(drop_fraction=0.25), every=1).step()
        >>> update.dropped == update.grown > 0
        True
    """


@dataclass(frozen=True)
class Random(GrowsAtRandom):
    """Drops and grows at random: what any criterion has to beat.

    Example:
        >>> import sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> update = sn.Sparsifier(model, None, sn.Random(drop_fraction=0.25), every=1).step()
        >>> update.dropped == update.grown > 0
        True
    """

    def drop_scores(self, layer: LayerView) -> Tensor:
        """Random numbers."""
        return layer.random(layer.pattern.linear_places())


@dataclass(frozen=True)
class MEST(GrowsAtRandom):
    """Drops the least of ``|w| + weight |g|``, grows at random. MEST (Yuan et al., 2021), by squared norms of blocks.

    A small weight that the gradient still moves may stay. The gradient is that of the last step of the optimizer:
    accumulated, unscaled and clipped as the optimizer saw it. So :meth:`sparsenet.Sparsifier.step` has to be called
    before the next ``zero_grad``, and where a GradScaler skipped the step the layer keeps its pattern.

    Attributes:
        weight: of the gradient; theirs is 0.01.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> sparsifier = sn.Sparsifier(model, None, sn.MEST(drop_fraction=0.25), every=1)
        >>> model(torch.randn(16, 64)).square().sum().backward()
        >>> update = sparsifier.step()
        >>> update.dropped == update.grown > 0
        True
    """

    weight: float = 0.01
    reads_gradient = True

    def __post_init__(self):
        super().__post_init__()
        if not as_number("MEST", "weight", self.weight) >= 0.0:
            raise ValueError(f"MEST: weight must be at least 0, got {self.weight}")

    def drop_scores(self, layer: LayerView) -> Tensor:
        """Squared norms of ``|w| + weight |g|``."""
        values = layer.values.detach().abs()
        return block_squared_norms(torch.add(values, layer.gradient.abs().to(values), alpha=self.weight))


@dataclass(frozen=True)
class RigL(GrowsByGradient):
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

    candidates: int | None = CANDIDATES

    def __post_init__(self):
        super().__post_init__()
        check_candidates(self)


@dataclass(frozen=True)
class SNFS(GrowsByGradient):
    """Drops the smallest, grows by the momentum of the gradient. Sparse momentum (Dettmers & Zettlemoyer, 2019).

    Their momentum of every weight that is not there would be as large as the dense network. Here some steps before the
    rewire ``candidates`` places are drawn for each one that will grow, the likelier the larger their gradient can be,
    and the momentum is summed at these alone, until the rewire takes the best. Layers keep their numbers of blocks,
    unless the Sparsifier's ``distribution`` says otherwise.

    Attributes:
        momentum: what is left of a gradient after one more step, in (0, 1). The sum begins so many steps before the
            rewire that an older gradient would count less than a tenth.
        candidates: places for each one that grows.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> sparsifier = sn.Sparsifier(model, None, sn.SNFS(drop_fraction=0.25), every=4)
        >>> for _ in range(4):
        ...     model(torch.randn(16, 64)).square().sum().backward()
        ...     update = sparsifier.step()
        >>> update.dropped == update.grown > 0
        True
    """

    momentum: float = 0.9
    candidates: int | None = 2

    def __post_init__(self):
        super().__post_init__()
        check_candidates(self)
        if not 0.0 < as_number("SNFS", "momentum", self.momentum) < 1.0:
            raise ValueError(f"SNFS: momentum must lie between 0 and 1, got {self.momentum}")


def check_candidates(policy: Policy) -> None:
    """Refuses a number of candidates that is no number of at least 1."""
    if policy.candidates is not None:
        as_integer(type(policy).__name__, "candidates", policy.candidates, at_least=1)
