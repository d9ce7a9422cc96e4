"""What must hold of all layers' counts together after a rewire: density schedule and distribution."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from sparsenet.elements import NM
from sparsenet.policies.exchange import Update
from sparsenet.policies.spreading import GLOBAL
from sparsenet.sparsifier import Sparsifier
from sparsenet.testing.snapshots import LayerSnapshot

__all__ = ["check_totals"]


@dataclass(frozen=True)
class _Layer:
    """Units: before, after, that there can be, in the whole matrix; weights in one; ``missing`` had no place named."""

    name: str
    now: int
    after: int
    most: int
    places: int
    size: int
    wanted: float
    missing: int


def check_totals(
    sparsifier: Sparsifier,
    first: Mapping[str, int],
    counts: Mapping[str, int],
    after: Mapping[str, LayerSnapshot],
    update: Update,
    named_fewer: Collection[str],
) -> None:
    """Raises AssertionError where counts are not those of the density schedule and the distribution.

    Args:
        sparsifier: whose schedule counts.
        first: units by layer when it was made.
        counts: units by layer before the rewire.
        after: the layers after it.
        update: what the Sparsifier says of it.
        named_fewer: layers for which the policy named fewer places than it was asked for.
    """
    step = update.step
    after = {name: seen for name, seen in after.items() if name in update.layers}  # the others are frozen
    missing = {name: update.layers[name].clamped if name in named_fewer else 0 for name in after}
    layers = [
        _layer(sparsifier, name, first[name], counts[name], seen, missing[name])
        for name, seen in after.items()
        if not (seen.by_elements and isinstance(sparsifier.layers[name].elements, NM))
    ]
    if sparsifier.density is None or not layers:
        for name, seen in after.items():
            left = counts[name] - int(seen.units.sum())
            if left and not (0 < left <= missing[name]):
                raise AssertionError(
                    f"without a density no count must change, got {counts[name]} and then {counts[name] - left} units "
                    f"(step {step}, layer {name!r})"
                )
        return
    _check_density(sparsifier, layers, step, any(u.skipped for u in update.layers.values()))


def _layer(sparsifier: Sparsifier, name: str, first: int, now: int, seen: LayerSnapshot, missing: int) -> _Layer:
    places = seen.units.numel()
    most = places if not seen.by_elements else max(int(seen.stored.sum()), now)
    wanted = _wanted(sparsifier, name, first, seen)
    return _Layer(name, now, int(seen.units.sum()), most, places, seen.unit_size, wanted, missing)


def _wanted(sparsifier: Sparsifier, name: str, first: int, seen: LayerSnapshot) -> float:
    """Units relative to those of other layers."""
    distribution, pattern = sparsifier.distribution, seen.pattern
    if distribution is None or distribution == GLOBAL:
        return float(first)
    rows, cols, b = pattern.block_rows, pattern.block_cols, pattern.block_size
    per_block = b * b if seen.by_elements else 1
    if distribution == "memory":
        return per_block / b**2
    if distribution in ("erdos_renyi", "er", "erk"):
        return per_block * (rows + cols) / b
    if distribution == "uniform":
        return float(per_block * rows * cols)
    relative = distribution(sparsifier.layers) if callable(distribution) else distribution
    return per_block * rows * cols * float(relative[name])


def _check_density(sparsifier: Sparsifier, layers: list[_Layer], step: int, skipped: bool) -> None:
    density = float(sparsifier.density(step))
    total = density * sum(m.places * m.size for m in layers)
    before, after = (
        sum(n * m.size for n, m in zip(ns, layers, strict=True))
        for ns in ([m.now for m in layers], [m.after for m in layers])
    )
    half = max(m.size for m in layers) / 2
    unchanged = all(m.now == m.after for m in layers)
    rises = total > before
    if unchanged and (
        abs(total - before) <= sum(m.size for m in layers) / 2 or (rises and not sparsifier.policy.grows())
    ):
        return
    for m in layers:
        if (m.after < m.now and rises and not m.missing) or (m.after > m.now and not rises):
            raise AssertionError(
                f"no count must move against the total, from {before} to {total:.6g} weights, got {m.now} and then "
                f"{m.after} units (step {step}, layer {m.name!r})"
            )
    if skipped:
        return
    least = sum((m.now if rises else min(1, m.now) * (density > 0)) * m.size for m in layers)
    most = sum((m.most if rises else m.now) * m.size for m in layers)
    wanted = min(max(total, least), most)
    missing = sum(m.missing * m.size for m in layers)
    if not wanted - half - missing - 1e-6 * total <= after <= wanted + half + 1e-6 * total:
        raise AssertionError(
            f"density {density:.6g} must leave {wanted:.6g} weights in units to half a unit of {2 * half:.0f}, got "
            f"{after} (step {step}, all layers)"
        )
    if not missing and (rises or sparsifier.distribution != GLOBAL):
        _check_spread(layers, rises, density, step)


def _check_spread(layers: list[_Layer], rises: bool, density: float, step: int) -> None:
    """Webster's rule: where one more is due in a layer, no other has one that was due later."""
    for gives in layers:
        least = gives.now if rises else min(1, gives.now) * (density > 0)
        for takes in layers:
            most = takes.most if rises else takes.now
            if gives is takes or gives.after <= least or takes.after >= most or not takes.wanted:
                continue
            due = (takes.after + 0.5) / takes.wanted
            given = (gives.after - 0.5) / gives.wanted if gives.wanted else torch.inf
            if given > due * (1 + 1e-6):
                raise AssertionError(
                    f"units must be spread as the distribution says, got {gives.after} in layer {gives.name!r} and "
                    f"{takes.after} in layer {takes.name!r} (step {step})"
                )
