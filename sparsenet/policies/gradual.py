"""Policies whose number of blocks changes while they train: it falls, or rises and falls in turns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsenet.policies.places import BadScores
from sparsenet.policies.policy import LayerView, Policy, Schedule
from sparsenet.policies.rewiring import GrowsByGradient
from sparsenet.schedules import Periodic

__all__ = ["ACDC", "GMP", "GraNet", "Movement"]

_LARGEST_SHARE = 0.05  # of the blocks, at one of 30 rewires of a cubic schedule to half of the density


class Falling(Policy):
    """Blocks leave as the Sparsifier's density falls, and none is exchanged."""

    exchanges = False
    follows_density = True

    def largest_share(self, drop_fraction: float) -> float:
        """A constant: blocks leave by the density schedule."""
        return _LARGEST_SHARE


@dataclass(frozen=True)
class GMP(Falling):
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


@dataclass(frozen=True)
class Movement(Falling):
    """Movement pruning (Sanh, Wolf & Rush, 2020): as the density falls, the weights leave that move towards zero.

    After every step ``-w g`` is added to the score of a block, summed over its weights; the lowest leave. As their soft
    form it has no scores that are trained, and what has left does not come back. The gradient is that of the last step
    of the optimizer, so :meth:`sparsenet.Sparsifier.step` has to be called before the next ``zero_grad``. It counts
    once, and not at all where it is not finite or where a GradScaler skipped the step.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=1.0, block_size=8)
        >>> sparsifier = sn.Sparsifier(model, None, sn.Movement(), density=sn.Linear(1.0, 0.5, steps=4), every=1)
        >>> for _ in range(4):
        ...     model(torch.randn(16, 64)).square().sum().backward()
        ...     update = sparsifier.step()
        >>> model[0].density
        0.5
    """

    drop_fraction: float | Schedule = 0.0
    every_step = True
    reads_gradient = True

    def after_step(self, layer: LayerView) -> None:
        """Adds the step's movement."""
        moved = torch.linalg.vecdot(layer.values.detach().flatten(1), layer.gradient.flatten(1)).float()
        before = layer.state.get("movement", torch.zeros_like(moved))
        layer.state["movement"] = before - moved.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def drop_scores(self, layer: LayerView) -> Tensor:
        """The movement so far."""
        if "movement" not in layer.state:
            raise BadScores("no gradient of its values was seen; call Sparsifier.step() before zero_grad()")
        return layer.state["movement"]


@dataclass(frozen=True)
class GraNet(GrowsByGradient):
    """Gradual pruning with regrowth (Liu et al., 2021): a falling density, and an exchange by the gradient beside it.

    Theirs prunes over all layers at once, which is ``distribution="global"``.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 64], density=0.5, block_size=8)
        >>> schedule = sn.Cubic(0.5, 0.25, steps=4)
        >>> sparsifier = sn.Sparsifier(model, None, sn.GraNet(), density=schedule, distribution="global", every=1)
        >>> for _ in range(4):
        ...     model(torch.randn(16, 64)).square().sum().backward()
        ...     update = sparsifier.step()
        >>> (model[0].density + model[1].density) / 2, update.grown > 0
        (0.25, True)
    """

    drop_fraction: float | Schedule = 0.5
    follows_density = True


@dataclass(frozen=True)
class ACDC(Falling, GrowsByGradient):
    """Alternating compressed and decompressed phases (Peste et al., 2021), by a density that rises and falls.

    Give the Sparsifier a :class:`sparsenet.Periodic` density that ends low. As it falls the smallest leave; as it rises
    blocks grow from zero where the gradient is largest, or everywhere if it rises to 1. With a ``budget`` a phase
    becomes as dense as fits in it.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 64], density=0.5, block_size=8)
        >>> schedule = sn.ACDC().density_schedule(0.5, 0.25, steps=10)
        >>> sparsifier = sn.Sparsifier(model, None, sn.ACDC(), density=schedule, every=1)
        >>> for _ in range(10):
        ...     model(torch.randn(16, 64)).square().sum().backward()
        ...     _ = sparsifier.step()
        >>> model[0].density
        0.25
    """

    drop_fraction: float | Schedule = 0.0

    def density_schedule(self, start: float, final: float, steps: int) -> Schedule:
        """Five times dense and compressed in turns, compressed at the end."""
        period = max(2, steps // 5)
        half = period // 2
        return Periodic(
            before=start, after=final, period=period, after_steps=half, begin=half, end=max(half, steps - half)
        )

    def largest_share(self, drop_fraction: float) -> float:
        """Half: all that came in a dense phase of twice the density."""
        return 0.5
