"""Milliseconds of a training step: layers measured at first use, corrected by the steps that are observed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from sparsenet.memory.costs import LayerCost
from sparsenet.memory.measured_times import MeasuredTimes
from sparsenet.schedules import as_number

__all__ = ["StepTimeModel"]

_NOISE = 0.05  # of a step's time, relative
_SCALE_DEVIATION, _CONSTANT_DEVIATION = 0.5, 1.0  # what is not known at first: a factor, and milliseconds
_CONSTANT_DRIFT = 0.01  # milliseconds from one step to the next
_WINDOW = 5  # observations whose middle surprise counts: a step that was held up by something else counts for nothing


class StepTimeModel:
    """Predicts the milliseconds of one training step: forward, backward and the optimizer's step, on the CPU.

    ::

        T = constant + scale * sum over layers of (layer seconds + update seconds)

    The seconds come from short measurements on this machine, made when they are first needed and kept in the user's
    cache; see :mod:`sparsenet.memory.measured_times`. Constant and scale come from the steps that are observed, by
    recursive least squares for parameters that drift (a Kalman filter of two random walks; Åström & Wittenmark 1995,
    chapter 2), so that the predictions follow what the measurements do not know: the loss, other modules, caches that
    others use as well. A step that was held up by something else counts for nothing: of the last five, the middle
    surprise is taken.

    Args:
        optimizer: whose update is meant; default AdamW.
        folder: where measurements are kept; see :class:`~sparsenet.memory.MeasuredTimes`.
        drift: how much the scale may change from one observed step to the next, in [0, 1]: the larger, the faster
            predictions follow, and the more they tremble.

    Example:
        >>> import tempfile, sparsenet as sn
        >>> from sparsenet.memory import StepTimeModel, layer_costs
        >>> layers = layer_costs(sn.SparseMLP([64, 128, 16], 0.25, 16), 32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = StepTimeModel(folder=folder)
        ...     before = model.predict(layers)
        ...     for _ in range(20):
        ...         model.observe(layers, 2 * before)   # the real step takes twice as long
        ...     round(model.predict(layers) / before, 1)
        2.0
    """

    def __init__(self, optimizer: Optimizer | None = None, folder: str | Path | None = None, *, drift: float = 0.005):
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(f"StepTimeModel: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))]) if optimizer is None else optimizer
        self.drift = as_number("StepTimeModel", "drift", drift, within=(0, 1))
        self.times = MeasuredTimes(folder)
        self._begin_anew()

    def _begin_anew(self) -> None:
        self.scale, self.constant, self.observations = 1.0, 0.0, 0
        self._deviations = [[_SCALE_DEVIATION**2, 0.0], [0.0, _CONSTANT_DEVIATION**2]]  # covariance of the two
        self._window: list[tuple[float, float]] = []  # milliseconds by the measurements, and what a step took

    def measured_ms(self, layers: Sequence[LayerCost]) -> float:
        """What the measurements alone say, in milliseconds."""
        seconds = self.times.step_seconds(self.optimizer)
        for cost in layers:
            if not isinstance(cost, LayerCost):
                raise TypeError(f"StepTimeModel: layers must be LayerCosts, got {type(cost).__name__}")
            seconds += self.times.layer_seconds(cost)
            seconds += self.times.update_seconds(cost.optimizer_elements, self.optimizer)
        self.times.save()
        return 1e3 * seconds

    def predict(self, layers: Sequence[LayerCost]) -> float:
        """Milliseconds of a step of these layers."""
        return self._corrected(self.measured_ms(layers))

    def _corrected(self, measured: float) -> float:
        return max(self.scale * measured + self.constant, 0.05 * measured)

    def observe(self, layers: Sequence[LayerCost], milliseconds: float) -> None:
        """Takes in what a step of these layers really took.

        Raises:
            TypeError, ValueError: no finite number above 0.
        """
        milliseconds = as_number("StepTimeModel", "milliseconds", milliseconds)
        if milliseconds <= 0:
            raise ValueError(f"StepTimeModel: milliseconds must be above 0, got {milliseconds}")
        measured = self.measured_ms(layers)
        known = 1.0, 1.0 / measured  # errors count relative to the step
        self._window = [*self._window[1 - _WINDOW :], (measured, milliseconds)]
        surprise = statistics.median(took / m - self.scale - self.constant / m for m, took in self._window)
        p = self._deviations
        gain = [row[0] * known[0] + row[1] * known[1] for row in p]
        total = _NOISE**2 + known[0] * gain[0] + known[1] * gain[1]
        self.scale += gain[0] / total * surprise
        self.constant += gain[1] / total * surprise
        p = [[p[i][j] - gain[i] * gain[j] / total for j in (0, 1)] for i in (0, 1)]
        p[0][0] += self.drift**2
        p[1][1] += _CONSTANT_DRIFT**2
        # what is never observed alone, as of one network with one size, would become ever less certain without end
        over = max(p[0][0] / _SCALE_DEVIATION**2, p[1][1] / _CONSTANT_DEVIATION**2, 1.0)
        self._deviations = [[entry / over for entry in row] for row in p]
        self.observations += 1

    def state_dict(self) -> dict:
        """What was observed, and the measurements it rests on: predictions go on bit for bit."""
        return {
            "scale": self.scale,
            "constant": self.constant,
            "observations": self.observations,
            "deviations": [list(row) for row in self._deviations],
            "window": [list(pair) for pair in self._window],
            "machine": dict(self.times.machine),
            "seconds": dict(self.times.seconds),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Continues where :meth:`state_dict` was taken. On another machine it begins anew: its times are others.

        Raises:
            ValueError: an entry is missing or no number; nothing is changed.
        """
        try:
            numbers = [float(state[name]) for name in ("scale", "constant")]
            observations = int(state["observations"])
            deviations = [[float(entry) for entry in row] for row in state["deviations"]]
            window = [(float(measured), float(took)) for measured, took in state["window"]]
            seconds = {str(key): float(s) for key, s in state["seconds"].items()}
            machine = dict(state["machine"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"StepTimeModel: state must be what state_dict gives, got {error!r}") from None
        entries = [*numbers, *(entry for row in (*deviations, *window) for entry in row)]
        if [len(row) for row in deviations] != [2, 2] or not all(map(math.isfinite, entries)):
            raise ValueError("StepTimeModel: state must hold finite numbers, got others")
        if machine != self.times.machine:
            self._begin_anew()
            return
        (self.scale, self.constant), self.observations, self._deviations = numbers, observations, deviations
        self._window = window[-_WINDOW:]
        self.times.seconds |= {key: s for key, s in seconds.items() if 0 < s < 1e6}
