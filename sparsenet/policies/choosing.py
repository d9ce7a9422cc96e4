"""Choosing what leaves and what enters a layer, and the pattern and element mask that follow; nothing is changed."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsenet import distributed
from sparsenet.elements import NM
from sparsenet.elements.masks import elements_inside
from sparsenet.functional import lowest_to_spare, select_extreme
from sparsenet.functional.blocks import take_blocks, zero_outside
from sparsenet.layers import SparseLinear
from sparsenet.pattern import BlockPattern, carried_from
from sparsenet.policies.exchange import LayerUpdate, Quota, Units
from sparsenet.policies.growth import Growth
from sparsenet.policies.places import BadScores, checked_scores, checked_values, hash_uniform
from sparsenet.policies.policy import Policy
from sparsenet.policies.views import ElementView, View

__all__ = ["Choice", "Plan", "choose", "drop_scores", "next_mask", "next_pattern", "planned", "units_of"]


@dataclass(frozen=True)
class Plan:
    """What becomes of one layer.

    ``values`` [num_blocks, b, b]: new ones for the blocks that stay; None: the same. ``element_mask`` bool, of the new
    pattern, or None.
    """

    pattern: BlockPattern
    update: LayerUpdate
    values: Tensor | None = None
    element_mask: Tensor | None = None

    @property
    def digest(self) -> int:
        """The same on every rank that plans the same."""
        pattern = int(self.pattern.fingerprint[:15], 16)
        if self.element_mask is None:
            return pattern
        return pattern ^ zlib.crc32(np.packbits(self.element_mask.numpy(force=True)))


@dataclass(frozen=True)
class Choice:
    """``dropped``: int64, ascending numbers of blocks (elements) that leave; ``grown``: int64, places that enter."""

    dropped: Tensor
    grown: Tensor


def units_of(layer: SparseLinear, by_elements: bool) -> Units:
    """The blocks of a layer, or the elements inside its stored blocks, in numbers.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.policies.choosing import units_of
        >>> units_of(sn.SparseLinear(64, 32, density=0.5, block_size=8), by_elements=False)
        Units(now=16, most=32, places=32, size=64)
    """
    if not by_elements:
        return Units.of_blocks(layer.pattern)
    return Units(layer.num_active, elements_inside(layer.pattern), math.prod(layer.pattern.shape), 1)


def drop_scores(policy: Policy, growth: Growth) -> Tensor:
    """float32 [num_blocks] of a layer's policy, checked; the same on every rank. BadScores says what is wrong."""
    if policy.observes or policy.measures:
        policy.share(growth.view)
    return checked_scores(policy.drop_scores(growth.view), growth.pattern.num_blocks, "drop")


def choose(policy: Policy, growth: Growth, quota: Quota, scores: Tensor | None, young: Tensor) -> Choice:
    """What leaves and what enters.

    Args:
        scores: of :func:`drop_scores`; None where nothing is to leave.
        young: int64 numbers of blocks that must not leave unless the density wants it.

    Raises:
        BadScores: why the layer stays as it is.
    """
    none = growth.pattern.linear_places()[:0]
    if isinstance(growth.view, ElementView) and isinstance(growth.view.layer.elements, NM):
        return _choose_in_groups(growth, quota, scores, young, growth.view.layer.elements.m)
    if quota.grow and policy.needs_gradient:
        growth.settle(quota.grow)
    if growth.error:
        raise BadScores(growth.error)
    dropped = none if scores is None else quota.leaving(growth.pattern, scores, young)
    entering = quota.grow - (quota.drop - len(dropped))
    if entering <= 0:
        return Choice(dropped, none)
    if not policy.needs_gradient:
        growth.settle(entering)
    if growth.error:
        raise BadScores(growth.error)
    return Choice(dropped, growth.best(entering))


def planned(policy: Policy, growth: Growth, quota: Quota, scores: Tensor | None, young: Tensor, places: int) -> Plan:
    """What becomes of a layer, which is not changed; see :func:`choose`. ``places``: of which its density counts."""
    view, none = growth.view, growth.pattern.linear_places()[:0]
    choice = choose(policy, growth, quota, scores, young) if quota.drop or quota.grow else Choice(none, none)
    pattern, mask = next_pattern(view, choice)
    active = growth.pattern.num_blocks - len(choice.dropped) + len(choice.grown)
    held = quota.drop - len(choice.dropped)
    clamped = quota.clamped + quota.grow - held - len(choice.grown)  # a policy may have named fewer places
    dropped = growth.pattern.linear_places()[choice.dropped]
    update = LayerUpdate(dropped, choice.grown, pattern.num_blocks, active / max(places, 1), clamped, held=held)
    return Plan(pattern, update, _adjusted(policy, view, choice.dropped), mask)


def _adjusted(policy: Policy, view: View, dropped: Tensor) -> Tensor | None:
    """New values, the same on every rank; raises BadScores for NaN and Inf."""
    values = policy.adjust(view, dropped) if len(dropped) else None
    return None if values is None else view.whole(distributed.averaged(checked_values(values, view.values)))


def _choose_in_groups(growth: Growth, quota: Quota, scores: Tensor | None, young: Tensor, m: int) -> Choice:
    """The same for N:M masks: in a group of ``m`` the lowest leaves for the best masked one, the second for the second.

    Of all such pairs those are exchanged whose dropped element has the lowest score; the last of a column stays where
    there are elements enough for all columns.
    """
    none = growth.pattern.linear_places()[:0]
    if not quota.drop:
        return Choice(none, none)
    growth.settle(growth.view.inactive)
    if growth.error:
        raise BadScores(growth.error)
    active, columns = growth.pattern.linear_places(), growth.pattern.shape[1]
    asked = scores.index_fill(0, young, math.inf)
    first, first_key = _ranked_in_groups(active, asked, columns, m)
    second, second_key = _ranked_in_groups(growth.places, -growth.scores_found(), columns, m)
    at = torch.searchsorted(second_key, first_key).clamp_(max=max(len(second_key) - 1, 0))
    paired = second_key[at] == first_key if len(second_key) else torch.zeros_like(first_key, dtype=torch.bool)
    paired &= asked[first] < math.inf
    partner = torch.full_like(active, -1)
    partner[first[paired]] = second[at[paired]]
    asked = torch.where(partner >= 0, asked, math.inf)
    lines = [growth.pattern.col.long()] if len(active) >= columns else []  # rows keep their numbers in any case
    leaves = lowest_to_spare(asked, min(quota.drop, int(paired.sum())), *lines)
    leaves = leaves[partner[leaves] >= 0]
    return Choice(leaves, growth.places[partner[leaves]].sort().values)


def _ranked_in_groups(places: Tensor, scores: Tensor, columns: int, m: int) -> tuple[Tensor, Tensor]:
    """Indices into ascending ``places``, by group and score, and an ascending key of group and rank in the group."""
    if not len(places):
        return places, places
    group = places // columns * -(-columns // m) + places % columns // m
    present, number, count = group.unique_consecutive(return_inverse=True, return_counts=True)
    start = count.cumsum(0) - count
    within = torch.arange(len(places), device=places.device) - start[number]
    table = scores.new_full((len(present), m), math.inf)  # a group may have fewer than m
    table[number, within] = scores
    order = table.argsort(dim=1, stable=True)
    filled = torch.arange(m, device=places.device) < count[:, None]
    keys = present[:, None] * m + torch.arange(m, device=places.device)
    return (start[:, None] + order)[filled], keys[filled]


def next_pattern(view: View, choice: Choice) -> tuple[BlockPattern, Tensor | None]:
    """The layer's pattern and element mask afterwards. Blocks whose last element has left are stored no longer."""
    places = view.pattern.linear_places()
    if not isinstance(view, ElementView):
        stays = torch.ones(len(places), dtype=torch.bool, device=places.device)
        stays[choice.dropped] = False
        after = torch.cat([places[stays], choice.grown])
        new = BlockPattern.from_linear_places(after, view.pattern.shape, view.pattern.block_size)
        return new, None if view.element_mask is None else next_mask(view.layer, new, view.key)
    mask, old = view.mask.clone(), view.blocks
    if not len(choice.dropped) and not len(choice.grown):
        return old, mask
    mask.view(-1)[view.stored(places[choice.dropped])] = False
    mask.view(-1)[view.stored(choice.grown)] = True
    filled = mask.flatten(1).any(1)
    if bool(filled.all()):
        return old, mask
    return BlockPattern.from_linear_places(old.linear_places()[filled], old.shape, old.block_size), mask[filled]


def next_mask(layer: SparseLinear, new: BlockPattern, key: int) -> Tensor:
    """Bool [num_blocks, b, b] of a layer whose blocks are rewired: what stays keeps its elements.

    Blocks that come get random ones: N of every M where the layer has such a rule, else so many together that the
    share of active elements in stored blocks stays what it is.
    """
    old, mask = layer.pattern, layer.element_mask
    carried = carried_from(old, new)
    moved = take_blocks(mask, carried, False)
    grown = (carried < 0).nonzero().flatten()
    if not len(grown):
        return moved
    if isinstance(layer.elements, NM):
        places = BlockPattern.from_linear_places(new.linear_places()[grown], new.shape, new.block_size)
        slots = torch.arange(math.prod(places.values_shape), device=moved.device)
        moved[grown] = layer.elements.mask(hash_uniform(slots, key).view(places.values_shape), places)
        return moved
    inside = torch.ones_like(moved[grown])
    zero_outside(inside, BlockPattern.from_linear_places(new.linear_places()[grown], new.shape, new.block_size))
    drawn = hash_uniform(torch.arange(inside.numel(), device=moved.device), key).view(len(grown), -1)
    drawn = torch.where(inside.flatten(1), drawn, -1.0)
    drawn.scatter_(1, drawn.argmax(1, keepdim=True), 1.0)  # no block comes without an element
    wanted = round(int(mask.sum()) * new.num_blocks / max(old.num_blocks, 1)) - int(moved.sum())
    wanted = min(max(wanted, len(grown)), int(inside.sum()))
    chosen = torch.zeros_like(drawn, dtype=torch.bool).flatten()
    chosen[select_extreme(drawn.flatten(), wanted, largest=True)] = True
    moved[grown] = chosen.view_as(inside)
    return moved
