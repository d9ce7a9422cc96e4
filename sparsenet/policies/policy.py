"""Which blocks go and which come.

A policy is two scores: ``drop_scores``, one per active block (the lowest leave), and ``grow_scores``, one per inactive
place (the highest enter). How many of each is the Sparsifier's business: ``drop_fraction`` of the blocks is exchanged
at every rewire, and a density schedule adds or removes the rest.

Adding one: a frozen dataclass with the two methods, a line in ``POLICIES``, a test with numbers worked by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparsenet.pattern import BlockPattern
from sparsenet.schedules import as_schedule

__all__ = ["GMP", "POLICIES", "SET", "LayerView", "Policy", "RigL", "Static"]

Schedule = Callable[[int], float]


class LayerView(Protocol):
    """What a policy sees of a layer while it is rewired."""

    name: str
    values: torch.nn.Parameter  # [num_blocks, b, b]
    pattern: BlockPattern

    def random(self, places: Tensor) -> Tensor:
        """float32 [n] in [0, 1): a function of seed, step, layer and place only, the same on every device and rank."""

    def gradient_squared_norms(self, places: Tensor) -> Tensor:
        """float32 [n]: squared norms of the dense weight gradient's blocks at ``places``; needs ``needs_gradient``."""


@dataclass(frozen=True)
class Policy:
    """Base of all policies.

    Attributes:
        drop_fraction: share of the active blocks exchanged at a rewire, in [0, 1]; a number or a schedule.
        needs_gradient: whether ``grow_scores`` reads ``layer.gradient_squared_norms``; it then runs in backward.

    Example:
        >>> import torch, sparsenet as sn
        >>> class LargestWeight(sn.Policy):
        ...     def drop_scores(self, layer):
        ...         return layer.values.detach().abs().flatten(1).amax(1).float()
        ...
        ...     def grow_scores(self, layer, places):
        ...         return layer.random(places)
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> sn.Sparsifier(model, None, LargestWeight(drop_fraction=0.25), every=1).step().grown > 0
        True
    """

    drop_fraction: float | Schedule = 0.3
    needs_gradient = False

    def __post_init__(self):
        schedule = as_schedule(self.drop_fraction)
        if not callable(self.drop_fraction) and not 0.0 <= schedule(0) <= 1.0:
            raise ValueError(f"{type(self).__name__}: drop_fraction must lie in [0, 1], got {self.drop_fraction}")

    def drop_fraction_at(self, step: int) -> float:
        """The drop fraction at ``step``, checked."""
        fraction = float(as_schedule(self.drop_fraction)(step))
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"{type(self).__name__}: drop_fraction must lie in [0, 1], got {fraction} at step {step}")
        return fraction

    def drop_scores(self, layer: LayerView) -> Tensor:
        """float32 [num_blocks]; the lowest leave. Here: the blocks' squared norms (magnitude)."""
        return block_squared_norms(layer.values)

    def grow_scores(self, layer: LayerView, places: Tensor) -> Tensor:
        """float32 [n] for int64 ``places`` [n] (block row * block columns + block column); the highest enter."""
        raise ValueError(
            f"{type(self).__name__}: density must not increase: this policy grows nothing (layer {layer.name})"
        )


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


@dataclass(frozen=True)
class RigL(Policy):
    """Drops the smallest, grows where the dense gradient is largest. RigL (Evci et al., 2020), by blocks.

    The dense gradient is never stored: only the norms of its blocks, made in the layer's own backward.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> sparsifier = sn.Sparsifier(model, None, sn.RigL(drop_fraction=0.25), every=1)
        >>> model(torch.randn(16, 64)).square().sum().backward()   # the growth scores come from this backward
        >>> update = sparsifier.step()
        >>> update.dropped == update.grown > 0
        True
    """

    needs_gradient = True

    def grow_scores(self, layer: LayerView, places: Tensor) -> Tensor:
        """Squared norms of the gradient's blocks."""
        return layer.gradient_squared_norms(places)


@dataclass(frozen=True)
class GMP(Policy):
    """Gradual magnitude pruning (Zhu & Gupta, 2017): drops the smallest as the Sparsifier's density schedule falls.

    Example:
        >>> import sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 64], density=1.0, block_size=8)
        >>> schedule = sn.Cubic(1.0, 0.25, steps=4)
        >>> sparsifier = sn.Sparsifier(model, None, sn.GMP(), density=schedule, every=1)
        >>> for _ in range(4):
        ...     update = sparsifier.step()
        >>> model[0].density, model[1].density
        (0.25, 0.25)
    """

    drop_fraction: float | Schedule = 0.0


POLICIES: dict[str, type[Policy]] = {"static": Static, "set": SET, "rigl": RigL, "gmp": GMP}


def block_squared_norms(values: Tensor) -> Tensor:
    """float32 [num_blocks]: squared Frobenius norms of ``values`` [num_blocks, b, b].

    Example:
        >>> import torch
        >>> from sparsenet.policies import block_squared_norms
        >>> block_squared_norms(torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]]))
        tensor([25.,  4.])
    """
    flat = values.detach().flatten(1)
    if flat.dtype in (torch.bfloat16, torch.float16):
        flat = flat.float()
    return torch.linalg.vector_norm(flat, dim=1).square().float()
