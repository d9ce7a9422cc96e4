"""From what is free of the limits to how many units, blocks and layers of each layer are born, and what fades next."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sparsenet import distributed
from sparsenet.architecture.growth.account import agreed
from sparsenet.architecture.growth.controller import Candidate, Flow, allotted
from sparsenet.architecture.growth.ledger import Cost, Ledger
from sparsenet.architecture.growth.pace import Pace
from sparsenet.compaction.weights import unit_weights

__all__ = ["Births", "agreed_offers", "room", "spent"]


@dataclass(frozen=True)
class Births:
    """How many units and blocks by layer, and the layer behind which a new one comes (empty: none)."""

    units: dict[str, int]
    blocks: dict[str, int]
    layer: str = ""


def room(start: Cost, limit: Cost, total: Cost, flow: Flow, pace: Pace) -> Cost:
    """What may be spent now: from the cost at present to the target on the way from ``start`` to the limit.

    Milliseconds have no target on the way: what one is measured by is as uncertain as the steps between would be.

    Example:
        >>> from sparsenet.architecture.growth.controller import Flow
        >>> from sparsenet.architecture.growth.ledger import Cost
        >>> from sparsenet.architecture.growth.pace import Pace
        >>> from sparsenet.architecture.growth.spending import room
        >>> no = float("inf")
        >>> room(Cost(100.0), Cost(500.0, no, no), Cost(150.0), Flow(progress=0.5), Pace()).bytes
        150.0
    """
    parts = zip(start.parts, limit.parts, total.parts, strict=True)
    free = Cost(*(_target(first, most, flow.progress) - now for first, most, now in parts))
    return replace(free, milliseconds=pace.room(total.milliseconds, limit.milliseconds))


def _target(start: float, most: float, progress: float) -> float:
    return most if math.isinf(most) or most <= start else start + progress * (most - start)


def agreed_offers(offers: Sequence[Candidate]) -> list[Candidate]:
    """Offers with the gain that the ranks see on average, at the largest cost of all of them.

    Raises:
        RuntimeError: the ranks have other offers.

    Example:
        >>> from sparsenet.architecture.growth.controller import Candidate
        >>> from sparsenet.architecture.growth.ledger import Cost
        >>> from sparsenet.architecture.growth.spending import agreed_offers
        >>> agreed_offers([Candidate("units", "0", 2.0, Cost(8.0), count=4)])[0].gain
        2.0
    """
    if not distributed.is_active():
        return list(offers)
    distributed.assert_same("what could grow", sum(_number_of(i, offer) for i, offer in enumerate(offers)))
    if not offers:
        return []
    costs = distributed.highest([part for offer in offers for part in offer.cost.parts])
    gains = distributed.mean_of([number for offer in offers for number in (offer.gain, offer.usual)])
    together = zip(offers, zip(*[iter(gains)] * 2, strict=True), zip(*[iter(costs)] * 3, strict=True), strict=True)
    return [replace(offer, gain=gain, usual=usual, cost=Cost(*parts)) for offer, (gain, usual), parts in together]


def _number_of(place: int, offer: Candidate) -> int:
    return (place + 1) * (sum(map(ord, offer.key)) + 1_000_003 * offer.count)


def spent(offers: Sequence[Candidate], ledger: Ledger, free: Cost, limit: Cost, left: Cost, flow: Flow) -> Births:
    """What is born of ``offers``.

    Args:
        free: to be spent now. limit: of everything. left: until the limit, which nothing passes.

    One layer is inserted at a time; of several that were allotted, the others stay credited.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.controller import Candidate, Flow
        >>> from sparsenet.architecture.growth.ledger import Cost, Ledger
        >>> from sparsenet.architecture.growth.spending import spent
        >>> from sparsenet.compaction.graph import UnitGraph
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> ledger, no = Ledger(UnitGraph(net), (), {}), float("inf")
        >>> offer = Candidate("units", "0", 1.0, ledger.unit("0"), count=8)
        >>> free = Cost(3 * offer.cost.bytes, no, no)
        >>> spent([offer], ledger, free, Cost(1e6, no, no), free, Flow()).units
        {'0': 3}
    """
    counts = allotted(list(offers), free, limit, flow)
    layer: Candidate | None = None
    for offer in offers:
        if offer.level == "layers" and offer.key in counts:
            if layer is None:
                layer = offer
            else:
                flow.give_back(offer.key, counts[offer.key])
    share, born = 1.0, Births({}, {})
    while share > 0.01:
        units, blocks = _some(offers, counts, ledger, share)
        cost = agreed(ledger.grown(units, blocks))
        if layer is not None:  # it is as wide as the layer in front is then
            width = unit_weights(ledger.stages[layer.layer].module).rows
            cost += layer.cost * (1 + units.get(layer.layer, 0) / max(width, 1)) ** 2
        if cost.fits(left):
            born = Births(units, blocks, "" if layer is None else layer.layer)
            break
        share *= 0.8
    return born


def _some(
    offers: Sequence[Candidate], counts: Mapping[str, int], ledger: Ledger, share: float
) -> tuple[dict[str, int], dict[str, int]]:
    """A share of what was allotted, in whole groups."""
    units: dict[str, int] = {}
    blocks: dict[str, int] = {}
    for offer in offers:
        count = int(share * counts.get(offer.key, 0)) // offer.group * offer.group
        if offer.level == "units" and count:  # so many that the last block of the layer is full
            count -= unit_weights(ledger.stages[offer.layer].module).rows % offer.group
        if count > 0 and offer.level != "layers":
            (units if offer.level == "units" else blocks)[offer.layer] = count
    return units, blocks
