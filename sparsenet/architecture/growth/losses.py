"""Losses that the Grower sees: of training by interval, and held out to say when growth no longer pays."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sparsenet import distributed
from sparsenet.architecture.growth.stopping import ExtrapolatedGain

__all__ = ["Losses"]

logger = logging.getLogger(__name__)


class Losses:
    """Means of the losses of the last two intervals, over all ranks; and whether to go on growing.

    Attributes:
        seen: at most two means. stopped: why growth has ended; empty: it has not.

    Example:
        >>> from sparsenet.architecture.growth.losses import Losses
        >>> from sparsenet.architecture.growth.stopping import ExtrapolatedGain
        >>> losses = Losses(ExtrapolatedGain(), None)
        >>> for interval in ((3.0, 1.0), (1.0, 0.0)):
        ...     for loss in interval:
        ...         losses.add(loss)
        ...     losses.end_interval()
        >>> losses.seen, losses.change
        ([2.0, 0.5], -1.5)
    """

    def __init__(self, gain: ExtrapolatedGain, validate: Callable[[], float] | None):
        self.gain, self.validate = gain, validate
        self.seen: list[float] = []
        self.stopped = ""
        self._waiting: list[Tensor | float] = []

    def add(self, loss: Tensor | float) -> None:
        """One step's."""
        self._waiting.append(loss)

    def end_interval(self) -> None:
        """The mean of the losses since the last interval joins those seen."""
        if self._waiting:
            losses = torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in self._waiting])
            self._waiting = []
            self.seen = [*self.seen[-1:], *distributed.mean_of([float(losses.mean())])]

    @property
    def finite(self) -> bool:
        """Whether the last interval's is."""
        return bool(self.seen) and math.isfinite(self.seen[-1])

    @property
    def change(self) -> float | None:
        """From the last interval but one to the last."""
        return self.seen[-1] - self.seen[-2] if len(self.seen) == 2 else None

    def ask(self, net: nn.Module, step: int) -> None:
        """Asks for the held-out loss, and stops growth that no longer pays; training does not notice that it asked."""
        if self.validate is None or self.stopped:
            return
        size = float(sum(p.numel() for p in net.parameters()))
        training = {module: module.training for module in net.modules()}
        devices = sorted({p.device.index for p in net.parameters() if p.is_cuda})
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                loss = float(self.validate())
        finally:
            for module, was in training.items():
                module.training = was
        self.gain.observe(size, distributed.mean_of([loss])[0])
        if not self.gain.useful():
            gain = self.gain.predicted()
            self.stopped = f"the next enlargement is predicted to gain {gain:.2%} of the held-out loss"
            logger.info("Grower: step %d: growth ends: %s", step, self.stopped)

    def state_dict(self) -> dict:
        """Everything but ``validate``."""
        points = [list(point) for point in self.gain.points]
        return {
            "waiting": [float(loss) for loss in self._waiting],
            "seen": list(self.seen),
            "stopped": self.stopped,
            "points": points,
        }

    def load_state_dict(self, state: dict) -> None:
        """Takes all of that over."""
        points = [(float(size), float(loss)) for size, loss in state["points"]]
        self._waiting, self.seen = [float(x) for x in state["waiting"]], [float(x) for x in state["seen"]]
        self.stopped, self.gain.points = str(state["stopped"]), points
