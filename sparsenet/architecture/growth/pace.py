"""Milliseconds as a limit, and whether shrinking helps: a network that got no faster is not what takes the time."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

__all__ = ["Pace"]

logger = logging.getLogger(__name__)

TOO_SLOW = 1.02  # times what is asked for
MOST_AT_ONCE = 0.8  # of the time that a step takes now: the network loses no more for it at a time
HELPED = 0.25  # of the time that was to be saved
PATIENCE = 16  # looks without shrinking, after one that did not help


@dataclass
class Pace:
    """What shrinking for the sake of time has brought so far.

    Attributes:
        before, hoped: milliseconds before the last time, and what was hoped for; infinite where there was none.
        wait: looks until the next try.

    Example:
        >>> from sparsenet.architecture.growth.pace import Pace
        >>> pace = Pace()
        >>> pace.too_slow(15.0, limit=10.0), pace.next_target(predicted=6.0, seen=15.0, limit=10.0)
        (True, 4.8)
        >>> pace.too_slow(15.0, limit=10.0)   # it did not help: something else takes the time
        False
    """

    before: float = math.inf
    hoped: float = math.inf
    wait: int = 0

    def too_slow(self, seen: float, limit: float) -> bool:
        """Whether the network is to shrink because a step takes ``seen`` of ``limit`` milliseconds."""
        if seen <= TOO_SLOW * limit:
            self.before = self.hoped = math.inf
            return False
        if self.wait:
            self.wait -= 1
            return False
        if self.before - seen < HELPED * (self.before - self.hoped) and math.isfinite(self.before):
            logger.warning("Grower: a step takes %.3g ms, and no less for a smaller network: it stays", seen)
            self.before, self.hoped, self.wait = math.inf, math.inf, PATIENCE
            return False
        return True

    def next_target(self, predicted: float, seen: float, limit: float) -> float:
        """Milliseconds to shrink to, on the scale of the model of times, which ``predicted`` now."""
        share = max(MOST_AT_ONCE, limit / seen)
        self.before, self.hoped = seen, share * seen
        return share * predicted

    def state_dict(self) -> dict:
        """As arguments."""
        return dict(vars(self))
