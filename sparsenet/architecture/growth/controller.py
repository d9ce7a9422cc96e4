"""How much to grow, and where: the share of the budget that is free by now, spread by gain per cost.

The target rises from the network's cost at the start to the limit along a straight line (growing early trains what is
born for longer), over the first ``grow_until`` of the training; where the training's length is not known, by a fixed
part at every decision. What is between the cost now and the target is handed out in proportion to worth: gain, over
that of an item that is there, per cost, over the square of how many there are. The gradients of two layers do not
compare: the last one's are larger, and the smallest step there changes the loss most. How new units compare with old
ones of their layer does. Nor does the gradient of one new unit know how much of it the others could learn as well: if
the loss falls with width n as 1/n, the next unit is worth 1/n² of the first. Fractions of an item are kept until they
make a whole one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from sparsenet.architecture.growth.ledger import Cost

__all__ = ["Candidate", "Flow", "allotted"]

MOST_BETTER = 1e3  # times what is there: where that has no gradient at all, the ratio says nothing more
DECISIONS = 40  # to grow over, where the length of the training is not known


@dataclass(frozen=True)
class Candidate:
    """Something that can grow.

    Attributes:
        level, layer: what. gain: of one item. cost: of one item. count: of such items in the layer now.
        usual: gain of one that is there. group: items come in multiples of it. most: of items.
    """

    level: str
    layer: str
    gain: float
    cost: Cost
    count: int
    usual: float = 1.0
    group: int = 1
    most: float = math.inf

    @property
    def key(self) -> str:
        """Of its fraction."""
        return f"{self.level} {self.layer}"

    def worth(self, limit: Cost) -> float:
        """How much of what is free it gets, beside others."""
        better = min(self.gain / max(self.usual, 1e-30), MOST_BETTER)
        return better / (self.share_of(limit) * max(self.count, 1) ** 2)

    def share_of(self, limit: Cost) -> float:
        """Of the limit, that one item takes."""
        return max(self.cost.share_of(limit), 1e-12)


@dataclass
class Flow:
    """The fractions of items that wait to become whole, and how far growth has come.

    Attributes:
        progress: 0 at the start, 1 when the limit may be used in full. credit: items by level and layer, below a group.

    Example:
        >>> from sparsenet.architecture.growth.controller import Flow
        >>> flow = Flow()
        >>> [flow.whole("blocks 0", 0.4) for _ in range(5)]
        [0, 0, 1, 0, 1]
    """

    progress: float = 0.0
    credit: dict[str, float] = field(default_factory=dict)

    def advance(self, step: int, steps: int | None, grow_until: float) -> None:
        """Moves on by one decision."""
        if steps is None:
            self.progress = min(1.0, self.progress + 1.0 / DECISIONS)
        else:
            self.progress = min(1.0, max(self.progress, step / max(1.0, grow_until * steps)))

    def whole(self, key: str, items: float, group: int = 1) -> int:
        """Adds ``items`` and takes out the whole groups that there are by now."""
        held = self.credit.get(key, 0.0) + items
        count = int(held / group + 1e-9) * group
        self.credit[key] = held - count
        return count

    def give_back(self, key: str, items: int) -> None:
        """Items that were taken out and could not be born."""
        self.credit[key] = self.credit.get(key, 0.0) + items


def allotted(candidates: list[Candidate], room: Cost, limit: Cost, flow: Flow) -> dict[str, int]:
    """How many items of each candidate are grown now, by key; together within ``room``.

    Args:
        room: what may be spent; its parts may be infinite. limit: of everything.

    Example:
        >>> from sparsenet.architecture.growth.controller import Candidate, Flow, allotted
        >>> from sparsenet.architecture.growth.ledger import Cost
        >>> cost = Cost(bytes=10.0)
        >>> a, b = (Candidate("units", name, gain, cost, count=8) for name, gain in (("a", 3.0), ("b", 1.0)))
        >>> no_limit = float("inf")
        >>> allotted([a, b], Cost(80.0, no_limit, no_limit), Cost(1000.0, no_limit, no_limit), Flow())
        {'units a': 6, 'units b': 2}
    """
    worth = {c.key: c.worth(limit) for c in candidates if c.gain > 0 and c.most > 0 and math.isfinite(c.gain)}
    useful = [c for c in candidates if worth.get(c.key, 0.0) > 0.0]
    parts = zip(room.parts, limit.parts, strict=True)
    share = min((part / most for part, most in parts if math.isfinite(most)), default=0)
    counts: dict[str, int] = {}
    left = room
    order = sorted(useful, key=lambda c: c.most * c.share_of(limit) / worth[c.key])  # the first to be full
    for place, c in enumerate(order):
        each, waiting = c.share_of(limit), sum(worth[other.key] for other in order[place:])
        items = min(max(share, 0.0) * worth[c.key] / waiting / each, c.most)
        share -= items * each
        count = min(flow.whole(c.key, items, c.group), int(min(c.most, 1e12) // c.group * c.group))
        while count > 0 and not (c.cost * count).fits(left):
            count -= c.group
        if count > 0:
            counts[c.key] = count
            left = left - c.cost * count
    return counts
