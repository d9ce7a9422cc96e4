"""Schedules made of others: one after another, at one stroke, alternating, and 1 minus another."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import pairwise

from sparsenet.schedules.curves import Schedule, schedule_or_number, state_of
from sparsenet.schedules.numbers import as_integer, as_number

__all__ = ["Complement", "OneShot", "Periodic", "Piecewise"]


@dataclass(frozen=True)
class Piecewise:
    """One schedule after another: ``pieces[i]`` holds for ``boundaries[i - 1] <= step < boundaries[i]``.

    A piece is a number or a schedule. Each sees steps counted from its own first step, so it is written as if it
    stood alone (as in optax's ``join_schedules``).
    Raises TypeError or ValueError when ``boundaries`` are not increasing integers >= 1, or there is not exactly one
    piece more than boundaries, or a piece is neither a finite number nor a schedule.

    >>> from sparsenet.schedules import Linear, Piecewise
    >>> schedule = Piecewise(boundaries=(100,), pieces=(0.3, Linear(0.3, 0.1, steps=100)))
    >>> schedule(99), schedule(150), schedule(1000)
    (0.3, 0.2, 0.1)
    """

    boundaries: tuple[int, ...]
    pieces: tuple[float | Schedule, ...]

    def __post_init__(self) -> None:
        for argument in ("boundaries", "pieces"):
            if not isinstance(getattr(self, argument), (tuple, list)):
                raise TypeError(f"Piecewise: {argument} must be a tuple, got {getattr(self, argument)!r}")
        boundaries = tuple(as_integer("Piecewise", "boundaries", b, at_least=1) for b in self.boundaries)
        if any(after <= before for before, after in pairwise(boundaries)):
            raise ValueError(f"Piecewise: boundaries must be increasing, got {self.boundaries!r}")
        if len(self.pieces) != len(boundaries) + 1:
            raise ValueError(
                f"Piecewise: pieces must be one more than boundaries ({len(boundaries) + 1}), got {len(self.pieces)}"
            )
        pieces = tuple(schedule_or_number("Piecewise", "pieces", piece) for piece in self.pieces)
        object.__setattr__(self, "boundaries", boundaries)
        object.__setattr__(self, "pieces", pieces)

    def __call__(self, step: float) -> float:
        """The value at ``step``, from the piece that holds there."""
        step = as_number("Piecewise", "step", step)
        i = bisect_right(self.boundaries, step)
        return self.pieces[i](step - (self.boundaries[i - 1] if i else 0))

    def state_dict(self) -> dict:
        """Its kind and arguments; :func:`sparsenet.schedules.schedule_from_state` makes an equal one of them."""
        return state_of(self)


@dataclass(frozen=True)
class OneShot:
    """One number before step ``at``, another from then on: pruning at one stroke (Han et al. 2015).

    For schedules instead of numbers, see :class:`Piecewise`.
    Raises TypeError or ValueError when ``before``/``after`` are not finite or ``at`` < 0.

    >>> schedule = OneShot(before=1.0, after=0.1, at=100)
    >>> schedule(99), schedule(100)
    (1.0, 0.1)
    """

    before: float
    after: float
    at: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "before", as_number("OneShot", "before", self.before))
        object.__setattr__(self, "after", as_number("OneShot", "after", self.after))
        object.__setattr__(self, "at", as_integer("OneShot", "at", self.at, at_least=0))

    def __call__(self, step: float) -> float:
        """The value at ``step``."""
        return self.before if as_number("OneShot", "step", step) < self.at else self.after

    def state_dict(self) -> dict:
        """Its kind and arguments; :func:`sparsenet.schedules.schedule_from_state` makes an equal one of them."""
        return state_of(self)


@dataclass(frozen=True)
class Periodic:
    """As :class:`OneShot`, but alternating on the way: AC/DC's phases (Peste et al. 2021, algorithm 1).

    It is ``before`` until step ``begin`` (the warm-up) and ``after`` from step ``end`` on (the last phase). In between
    every ``period`` of steps begins with ``after`` for ``after_steps`` and goes on with ``before``. Without an ``end``
    it alternates for ever. AC/DC's density is 1.0 before, and the wanted one after; for a sparsity it is 0.0 before.

    ``before`` and ``after`` are numbers, or schedules that see the step itself, not one counted from their phase: what
    falls over the whole training goes on falling from one phase to the next.
    Raises TypeError or ValueError when ``before``/``after`` are neither finite numbers nor schedules, ``period`` < 2,
    ``after_steps`` is not from 1 to ``period`` - 1, ``begin`` < 0 or ``end`` < ``begin``.

    >>> schedule = Periodic(before=1.0, after=0.1, period=10, after_steps=5, begin=20, end=60)
    >>> [schedule(step) for step in (19, 20, 24, 25, 29, 30, 55, 60, 65)]
    [1.0, 0.1, 0.1, 1.0, 1.0, 0.1, 1.0, 0.1, 0.1]
    """

    before: float | Schedule
    after: float | Schedule
    period: int
    after_steps: int
    begin: int = 0
    end: int | None = None

    def __post_init__(self) -> None:
        for argument in ("before", "after"):
            value = schedule_or_number("Periodic", argument, getattr(self, argument))
            object.__setattr__(self, argument, value)
        for argument, least in (("period", 2), ("after_steps", 1), ("begin", 0)):
            value = as_integer("Periodic", argument, getattr(self, argument), at_least=least)
            object.__setattr__(self, argument, value)
        if self.after_steps >= self.period:
            raise ValueError(f"Periodic: after_steps must be below period ({self.period}), got {self.after_steps}")
        if self.end is not None:
            object.__setattr__(self, "end", as_integer("Periodic", "end", self.end))
            if self.end < self.begin:
                raise ValueError(f"Periodic: end must be None or at least begin ({self.begin}), got {self.end}")

    def __call__(self, step: float) -> float:
        """The value at ``step``."""
        step = as_number("Periodic", "step", step)
        if step < self.begin:
            return self.before(step)
        last_phase = self.end is not None and step >= self.end
        within = last_phase or (step - self.begin) % self.period < self.after_steps
        return self.after(step) if within else self.before(step)

    def state_dict(self) -> dict:
        """Its kind and arguments; :func:`sparsenet.schedules.schedule_from_state` makes an equal one of them."""
        return state_of(self)


@dataclass(frozen=True)
class Complement:
    """1 minus another schedule: density from sparsity.

    Raises TypeError or ValueError when ``schedule`` is neither a finite number nor a schedule.

    >>> from sparsenet.schedules import Complement, Linear
    >>> Complement(Linear(0.0, 0.9, steps=10))(5)
    0.55
    """

    schedule: Schedule

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", schedule_or_number("Complement", "schedule", self.schedule))

    def __call__(self, step: float) -> float:
        """The value at ``step``."""
        return 1.0 - self.schedule(step)

    def state_dict(self) -> dict:
        """Its kind and arguments; :func:`sparsenet.schedules.schedule_from_state` makes an equal one of them."""
        return state_of(self)
