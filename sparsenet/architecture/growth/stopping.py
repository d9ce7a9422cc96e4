"""When to stop growing: the gain of the next enlargement, extrapolated from those so far.

Held-out losses at growing sizes are read as a sequence whose improvements shrink. The next improvement is predicted
from the last two, as geometric sequences go on (Aitken's delta-squared process); growing stops when what is
predicted, or seen twice in a row, is worth less than a given share of the loss, once something has been learnt at all
(some problems begin with a plateau). Training alone improves the loss too,
so the prediction is on the high side: growth stops late rather than early.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["ExtrapolatedGain"]

LEARNT = 0.8  # of the first held-out loss: above it a network is still finding its way, whatever its size


@dataclass
class ExtrapolatedGain:
    """Whether another enlargement is worth its cost.

    Attributes:
        tolerance: share of the held-out loss that an enlargement has to gain, for each step of growth.
        growth: how much larger the network has to be for its loss to count as that of another size.
        points: (size, held-out loss), one for each size so far, the best loss seen at it.

    Example:
        >>> from sparsenet.architecture.growth.stopping import ExtrapolatedGain
        >>> gain = ExtrapolatedGain(tolerance=0.02)
        >>> for size, loss in ((1, 1.0), (2, 0.6), (4, 0.5), (8, 0.48)):
        ...     gain.observe(size, loss)
        >>> gain.predicted() < 0.02, gain.useful()
        (True, False)
    """

    tolerance: float = 0.01
    growth: float = 2.0
    points: list[tuple[float, float]] = field(default_factory=list)

    def observe(self, size: float, loss: float) -> None:
        """A held-out loss at ``size``. Raises ValueError where it is not finite."""
        if not math.isfinite(loss):
            raise ValueError(f"Grower: validate must return a finite loss, got {loss}")
        if self.points and size < self.growth * self.points[-1][0]:
            last = self.points[-1]
            self.points[-1] = (last[0], min(last[1], loss))
        else:
            self.points.append((size, loss))

    def predicted(self) -> float:
        """The share of the loss that the next enlargement is predicted to gain; infinite where too little was seen."""
        if len(self.points) < 3:
            return math.inf
        a, b, c = (loss for _, loss in self.points[-3:])
        before, last = a - b, b - c
        ratio = min(max(last / before, 0.0), 1.0) if before > 0 else 1.0
        return max(last, 0.0) * ratio / max(abs(c), 1e-12)

    def useful(self) -> bool:
        """Whether to go on growing."""
        if not self.points or min(loss for _, loss in self.points) > LEARNT * self.points[0][1]:
            return True  # nothing has been learnt yet: the size says nothing
        if len(self.points) >= 3:
            a, b, c = (loss for _, loss in self.points[-3:])
            if b >= a * (1 - self.tolerance) and c >= b * (1 - self.tolerance):
                return False
        return self.predicted() >= self.tolerance
