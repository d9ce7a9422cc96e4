"""Pruning a network before it is trained, in one call."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import nn

from sparsenet.distributed import unwrap
from sparsenet.layers import SparseLinear, sparse_layers
from sparsenet.pattern import BlockPattern
from sparsenet.policies.policy import Combination, Policy
from sparsenet.policies.spreading import GLOBAL, Distribution
from sparsenet.schedules import Exponential, as_integer, as_number
from sparsenet.sparsifier import LayerUpdate, Sparsifier, Update

__all__ = ["prune_at_initialization"]

_OWNER = "prune_at_initialization"


def prune_at_initialization(
    model: nn.Module,
    policy: Policy,
    density: float,
    *,
    rounds: int | None = None,
    distribution: Distribution | None = GLOBAL,
    optimizer: torch.optim.Optimizer | None = None,
    seed: int = 0,
) -> Update:
    """Drops blocks of a network until ``density`` is left: by SNIP, GraSP, SynFlow or any other policy's drop scores.

    Args:
        model: holds :class:`SparseLinear` layers with more blocks than are asked for, as after
            ``sparsenet.sparsify_(model, density=1.0, block_size=16)``. Frozen layers are left alone.
        policy: its drop scores decide, and its adjustment of the values that stay, if it has one; nothing grows.
        density: of all trainable sparse layers together, in weights.
        rounds: scores are measured, and blocks dropped, so many times, the density falling by the same factor in each.
            Default: what the policy says (100 for :class:`sparsenet.SynFlow`), else 1.
        distribution: ``global``: the lowest scores per weight leave, compared over all layers; or how the density is
            spread, as for :class:`Sparsifier`. The last block of a row or column of blocks stays where there are blocks
            enough, so no layer empties.
        optimizer: of the model, if there is one already; its state follows.
        seed: of targets that a policy draws.

    Returns:
        What left, by layer, all rounds together; ``step`` is the number of rounds.

    Raises:
        TypeError, ValueError: no sparse layers, or no more blocks than asked for; a number out of range; a policy that
            scores nothing without training, such as ``SNIP()`` where no backward pass has left a gradient. Nothing has
            changed then.
        RuntimeError: the scores of a later round say nothing. The rounds before it stand.

    A warning says so where layers kept blocks because their scores said nothing.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        >>> _ = sn.sparsify_(model, density=1.0, block_size=8)
        >>> torch.nn.functional.cross_entropy(model(torch.randn(50, 64)), torch.randint(10, (50,))).backward()
        >>> update = sn.prune_at_initialization(model, sn.SNIP(), density=0.25)   # by the gradient at hand
        >>> update.dropped, model[0].pattern.num_blocks + model[2].pattern.num_blocks
        (60, 20)
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"{_OWNER}: policy must be a sparsenet Policy, got {policy!r}")
    layers = _layers(model)
    density = as_number(_OWNER, "density", density, within=(0, 1))
    start = _density(layers)
    if not 0 < density < start:
        raise ValueError(
            f"{_OWNER}: density must lie above 0 and below the {start:.4g} that the model has, got {density}"
            + ("" if start == 1 else "; prune a model of density 1.0")
        )
    criterion = policy.drop if isinstance(policy, Combination) else policy
    rounds = getattr(criterion, "rounds_at_start", 1) if rounds is None else rounds
    rounds = as_integer(_OWNER, "rounds", rounds, at_least=1)
    if rounds > 1 and getattr(criterion, "batches", ()) is None:
        kind = type(criterion).__name__
        raise ValueError(f"{_OWNER}: rounds must be 1 for {kind} without batches, whose gradient is gone, got {rounds}")
    before = {name: layer.pattern for name, layer in layers.items()}
    only_drops = Policy(drop=policy, drop_fraction=0.0)
    schedule = Exponential(start, density, rounds)
    sparsifier = Sparsifier(model, optimizer, only_drops, schedule, distribution, every=1, end=rounds, seed=seed)
    try:
        skipped = _run(sparsifier, rounds)
    finally:
        sparsifier.end = 0
        sparsifier.refresh()  # watches the model no more
    if skipped and _density(layers) > density + _half_a_block(layers):
        told = ", ".join(f"{name!r} ({reason})" for name, reason in skipped.items())
        warnings.warn(f"{_OWNER}: density {_density(layers):.4g} is left: layers kept blocks: {told}", stacklevel=2)
    return Update(
        rounds, {name: _left(was, layers[name].pattern, skipped.get(name, "")) for name, was in before.items()}
    )


def _layers(model: nn.Module) -> dict[str, SparseLinear]:
    """Those that take part; ValueError where there are none."""
    found = sparse_layers(unwrap(model))
    trained = {name: layer for name, layer in found.items() if layer.values.requires_grad}
    if trained:
        return trained
    if found:
        raise ValueError(f"{_OWNER}: model must hold trainable sparse layers, got frozen ones")
    first = "; swap its nn.Linear layers first: sparsenet.sparsify_(model, density=1.0, block_size=16)"
    dense = any(isinstance(module, nn.Linear) for module in model.modules())
    raise ValueError(f"{_OWNER}: model must hold SparseLinear layers, got none{first if dense else ''}")


def _run(sparsifier: Sparsifier, rounds: int) -> dict[str, str]:
    """All rounds; why layers kept their blocks at the last."""
    skipped: dict[str, str] = {}
    changed = False
    for number in range(1, rounds + 1):
        update = sparsifier.step()
        changed |= update.dropped > 0
        skipped = {name: u.skipped for name, u in update.layers.items() if u.skipped}
        if skipped and not update.dropped:
            name, reason = next(iter(skipped.items()))
            when = (
                f" in round {number} of {rounds}, density {_density(sparsifier.layers):.4g} being left"
                if changed
                else ""
            )
            raise (RuntimeError if changed else ValueError)(
                f"{_OWNER}: policy must score the layers as they are, got no scores of {name!r}{when}: {reason}"
            )
    return skipped


def _density(layers: Mapping[str, SparseLinear]) -> float:
    """Of all layers together, in weights."""
    weights = [layer.block_size**2 for layer in layers.values()]
    places = [layer.pattern.block_rows * layer.pattern.block_cols for layer in layers.values()]
    active = sum(layer.pattern.num_blocks * w for layer, w in zip(layers.values(), weights, strict=True))
    return active / max(sum(p * w for p, w in zip(places, weights, strict=True)), 1)


def _half_a_block(layers: Mapping[str, SparseLinear]) -> float:
    """Density that rounding to whole blocks may leave."""
    largest = max(layer.block_size**2 for layer in layers.values())
    places = sum(p.block_rows * p.block_cols * p.block_size**2 for p in (layer.pattern for layer in layers.values()))
    return 0.5001 * largest / max(places, 1)


def _left(before: BlockPattern, after: BlockPattern, skipped: str) -> LayerUpdate:
    places, stays = before.linear_places(), after.linear_places()
    return LayerUpdate(places[~torch.isin(places, stays)], places[:0], after.num_blocks, after.density, skipped=skipped)
