"""What a Trainer makes of its configuration: optimizer, schedules, Sparsifier, random numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsenet.policies import POLICIES
from sparsenet.schedules import Cosine, Cubic
from sparsenet.sparsifier import Sparsifier
from sparsenet.training.config import TrainConfig
from sparsenet.training.progress import Tally

__all__ = ["generator_of", "make_optimizer", "make_scheduler", "make_sparsifier"]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Fused: one pass over weights, gradients and state, and no temporary tensors, on the CPU as well.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.training.parts import make_optimizer
        >>> type(make_optimizer(sn.SparseMLP([8, 4]), sn.TrainConfig(optimizer="sgd"))).__name__
        'SGD'
    """
    decay = config.weight_decay
    if config.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), config.lr, weight_decay=decay, fused=True)
    return torch.optim.SGD(model.parameters(), config.lr, config.momentum, weight_decay=decay, fused=True)


def make_scheduler(optimizer: torch.optim.Optimizer, config: TrainConfig, steps: int, again: bool) -> Any:
    """The schedule of the learning rate over ``steps`` steps.

    Args:
        again: the optimizer had one before, whose last rate is not the first of this one.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.training.parts import make_optimizer, make_scheduler
        >>> config = sn.TrainConfig(lr=0.1, lr_schedule="constant")
        >>> make_scheduler(make_optimizer(sn.SparseMLP([8, 4]), config), config, 10, again=False).get_last_lr()
        [0.1]
    """
    schedules = torch.optim.lr_scheduler
    if again:
        for group in optimizer.param_groups:
            group["lr"] = config.lr
            group.pop("initial_lr", None)
    if config.lr_schedule == "one_cycle":
        return schedules.OneCycleLR(optimizer, config.lr, steps, pct_start=config.warmup, cycle_momentum=False)
    if config.lr_schedule == "cosine":
        return schedules.CosineAnnealingLR(optimizer, steps)
    return schedules.ConstantLR(optimizer, 1.0, 0)


def make_sparsifier(
    model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig, tally: Tally
) -> Sparsifier:
    """The Sparsifier of one fit. Its steps count from 0 in every fit; its random numbers are others in each.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.training.parts import make_optimizer, make_sparsifier
        >>> from sparsenet.training.progress import Tally
        >>> model, config = sn.SparseMLP([64, 32], density=0.5, block_size=8), sn.TrainConfig(rewire_until=0.5)
        >>> make_sparsifier(model, make_optimizer(model, config), config, Tally(epochs=4, per_epoch=10)).end
        20
    """
    rewiring = max(1, round(config.rewire_until * (tally.end - tally.began)))
    density, policy = None, POLICIES[config.policy]
    if policy.follows_density:
        density = Cubic(tally.density, config.final_density or tally.first_density / 2, steps=rewiring)
    exchanging = {"drop_fraction": Cosine(config.drop_fraction, 0.0, rewiring)} if policy.exchanges else {}
    return Sparsifier(
        model,
        optimizer,
        policy(**exchanging),
        density,
        every=config.rewire_every,
        end=rewiring if policy.exchanges or policy.follows_density else 0,
        seed=config.seed + tally.began,
    )


def generator_of(*numbers: int) -> torch.Generator:
    """A generator seeded by a few small numbers: seed, epoch, batch.

    Example:
        >>> import torch
        >>> from sparsenet.training.parts import generator_of
        >>> a, b = (torch.rand(2, generator=generator_of(0, epoch)) for epoch in (1, 2))
        >>> torch.equal(a, b)
        False
    """
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**63
    return torch.Generator().manual_seed(seed)
