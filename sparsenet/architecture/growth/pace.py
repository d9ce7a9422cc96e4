"""Milliseconds as a limit, and whether shrinking helps: a network that got no faster is not what takes the time."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

__all__ = ["Pace"]

logger = logging.getLogger(__name__)

TOO_SLOW = 1.02  # times what is asked for
AIM = 0.95  # of it: what growth stays below
STEP = 0.6  # of the way there that one decision may go: what it costs is measured only afterwards
MOST_AT_ONCE = 0.8  # of the bytes: the network loses no more for the sake of time at once
HELPED = 0.25  # of the time that was to be saved
PATIENCE = 16  # looks without shrinking, after one that did not help


@dataclass
class Pace:
    """What a limit of milliseconds allows, and what shrinking for its sake has brought so far.

    Attributes:
        before, hoped: milliseconds before the last time it shrank, and what was hoped for; infinite where it did not.
        wait: looks until the next try. ceiling: bytes of a network that was too slow for ``ceiling_ms``.

    Example:
        >>> from sparsenet.architecture.growth.pace import Pace
        >>> pace = Pace()
        >>> pace.too_slow(15.0, limit=10.0), pace.shrunk(1000.0, seen=15.0, limit=10.0)
        (True, 800.0)
        >>> pace.too_slow(15.0, limit=10.0)   # it did not help: something else takes the time
        False
    """

    before: float = math.inf
    hoped: float = math.inf
    wait: int = 0
    ceiling: float = math.inf
    ceiling_ms: float = math.inf

    def too_slow(self, seen: float, limit: float) -> bool:
        """Whether the network is to shrink because a step takes ``seen`` of ``limit`` milliseconds."""
        if seen <= TOO_SLOW * limit:
            self.before = self.hoped = math.inf
            return False
        if self.wait:
            self.wait -= 1
            return False
        if math.isfinite(self.before) and self.before - seen < HELPED * (self.before - self.hoped):
            logger.warning("Grower: a step takes %.3g ms, and no less for a smaller network: it stays", seen)
            self.before, self.hoped, self.wait, self.ceiling = math.inf, math.inf, PATIENCE, math.inf
            return False
        return True

    def shrunk(self, held: float, seen: float, limit: float) -> float:
        """Bytes to shrink to, from ``held``; a network as large as it was is not tried again for the same limit."""
        share = max(MOST_AT_ONCE, AIM * limit / seen)
        self.before, self.hoped = seen, share * seen
        self.ceiling, self.ceiling_ms = AIM * held, limit
        return share * held

    def most_bytes(self, limit: float) -> float:
        """Bytes that the network may have, by what was too slow before."""
        return self.ceiling if limit <= self.ceiling_ms else math.inf

    def room(self, now: float, limit: float) -> float:
        """Milliseconds that may be added by one decision."""
        return STEP * (AIM * limit - now) if math.isfinite(limit) else math.inf

    def state_dict(self) -> dict:
        """As arguments."""
        return dict(vars(self))
