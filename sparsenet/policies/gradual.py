"""Policies that remove blocks little by little."""

from __future__ import annotations

from dataclasses import dataclass

from sparsenet.policies.policy import Policy, Schedule

__all__ = ["GMP"]

_LARGEST_SHARE = 0.05  # of the blocks, at one of 30 rewires of a cubic schedule to half of the density


@dataclass(frozen=True)
class GMP(Policy):
    """Gradual magnitude pruning (Zhu & Gupta, 2017): drops the smallest as the Sparsifier's density schedule falls."""

    drop_fraction: float | Schedule = 0.0
    exchanges = False
    follows_density = True

    @classmethod
    def largest_share(cls, drop_fraction: float) -> float:
        """A constant: blocks leave by the density schedule."""
        return _LARGEST_SHARE
