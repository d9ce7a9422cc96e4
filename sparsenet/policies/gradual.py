"""Policies that remove blocks little by little."""

from __future__ import annotations

from dataclasses import dataclass

from sparsenet.policies.policy import Policy, Schedule

__all__ = ["GMP"]

_LARGEST_SHARE = 0.05  # of the blocks, at one of 30 rewires of a cubic schedule to half of the density


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
    exchanges = False
    follows_density = True

    @classmethod
    def largest_share(cls, drop_fraction: float) -> float:
        """A constant: blocks leave by the density schedule."""
        return _LARGEST_SHARE
