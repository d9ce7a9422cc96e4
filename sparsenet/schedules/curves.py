"""Schedules of one curve: a constant, and the ramps from one number to another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields

from sparsenet.schedules.numbers import as_integer, as_number, number_of

Schedule = Callable[[float], float]

__all__ = [
    "Constant",
    "Cosine",
    "Cubic",
    "Exponential",
    "Linear",
    "Polynomial",
    "Schedule",
    "as_schedule",
    "schedule_or_number",
    "state_of",
]


@dataclass(frozen=True)
class Constant:
    """The same number at every step.

    Raises TypeError or ValueError when ``value`` is not a finite number.

    >>> Constant(0.3)(1000)
    0.3
    """

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", as_number("Constant", "value", self.value))

    def __call__(self, step: float) -> float:
        """The value, whatever the step."""
        as_number("Constant", "step", step)
        return self.value

    def state_dict(self) -> dict:
        """Its kind and arguments; :func:`sparsenet.schedules.schedule_from_state` makes an equal one of them."""
        return state_of(self)


@dataclass(frozen=True)
class _Ramp:
    """From ``start`` to ``end`` over ``steps`` steps from ``begin``; a subclass gives the curve in between."""

    start: float
    end: float
    steps: int
    begin: int = 0

    def __post_init__(self) -> None:
        owner = type(self).__name__
        object.__setattr__(self, "start", as_number(owner, "start", self.start))
        object.__setattr__(self, "end", as_number(owner, "end", self.end))
        object.__setattr__(self, "steps", as_integer(owner, "steps", self.steps, at_least=1))
        object.__setattr__(self, "begin", as_integer(owner, "begin", self.begin, at_least=0))

    def __call__(self, step: float) -> float:
        """The value at ``step``."""
        t = (as_number(type(self).__name__, "step", step) - self.begin) / self.steps
        if t <= 0.0:
            return self.start
        return self.end if t >= 1.0 else self._at(t)

    def state_dict(self) -> dict:
        """Its kind and arguments; :func:`sparsenet.schedules.schedule_from_state` makes an equal one of them."""
        return state_of(self)

    def _at(self, t: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Linear(_Ramp):
    """A straight line from ``start`` to ``end``.

    Raises TypeError or ValueError when ``start``/``end`` are not finite, ``steps`` < 1 or ``begin`` < 0.

    >>> Linear(start=1.0, end=0.0, steps=4)(1)
    0.75
    """

    def _at(self, t: float) -> float:
        return self.end + (self.start - self.end) * (1.0 - t)


@dataclass(frozen=True)
class Cosine(_Ramp):
    """Half a cosine: slow, fast, slow. With ``end=0`` it is RigL's drop fraction (Evci et al. 2020, section 3, (3)).

    Raises TypeError or ValueError when ``start``/``end`` are not finite, ``steps`` < 1 or ``begin`` < 0.

    >>> Cosine(start=0.3, end=0.0, steps=1000)(500)
    0.15
    """

    def _at(self, t: float) -> float:
        return self.end + (self.start - self.end) * (1.0 + math.cos(math.pi * t)) / 2.0


@dataclass(frozen=True)
class Cubic(_Ramp):
    """Fast at first, flat at the end: gradual magnitude pruning (Zhu & Gupta 2017, equation 1).

    Their equation is for sparsity; it is affine in its two ends, so for density it reads the same.
    Raises TypeError or ValueError when ``start``/``end`` are not finite, ``steps`` < 1 or ``begin`` < 0.

    >>> Cubic(start=1.0, end=0.0, steps=4)(2)
    0.125
    """

    def _at(self, t: float) -> float:
        return self.end + (self.start - self.end) * (1.0 - t) ** 3


@dataclass(frozen=True)
class Polynomial(_Ramp):
    """Polynomial decay of any positive ``power``: 1 is ``Linear``, 3 is ``Cubic``.

    Raises TypeError or ValueError when ``start``/``end`` are not finite, ``steps`` < 1, ``begin`` < 0, ``power`` <= 0.

    >>> Polynomial(start=1.0, end=0.0, steps=4, power=2)(2)
    0.25
    """

    power: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "power", as_number("Polynomial", "power", self.power))
        if self.power <= 0.0:
            raise ValueError(f"Polynomial: power must be > 0, got {self.power!r}")

    def _at(self, t: float) -> float:
        return self.end + (self.start - self.end) * (1.0 - t) ** self.power


@dataclass(frozen=True)
class Exponential(_Ramp):
    """The same factor at every step: halfway between 0.4 and 0.1 it is at their geometric mean, 0.2.

    Raises TypeError or ValueError when ``start``/``end`` are not finite and > 0, ``steps`` < 1 or ``begin`` < 0.

    >>> Exponential(start=4.0, end=1.0, steps=10)(5)
    2.0
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for argument in ("start", "end"):
            if getattr(self, argument) <= 0.0:
                raise ValueError(f"Exponential: {argument} must be > 0, got {getattr(self, argument)!r}")

    def _at(self, t: float) -> float:
        return self.start * (self.end / self.start) ** t


# --- what a schedule is, and what is saved of one ---


def schedule_or_number(owner: str, argument: str, value: object) -> Schedule:
    """:func:`as_schedule` of an ``argument`` of ``owner``, whom an error names.

    >>> schedule_or_number("Periodic", "before", "dense")
    Traceback (most recent call last):
    TypeError: Periodic: before must be a finite number or a schedule, got 'dense'
    """
    if callable(value) and not isinstance(value, type):
        return value
    number = number_of(value)
    if number is None:
        raise TypeError(f"{owner}: {argument} must be a finite number or a schedule, got {value!r}")
    if not math.isfinite(number):
        raise ValueError(f"{owner}: {argument} must be a finite number or a schedule, got {value!r}")
    return Constant(number)


def as_schedule(value: float | Schedule) -> Schedule:
    """``value`` as a schedule: a number becomes ``Constant(value)``, a callable passes unchanged.

    Raises TypeError for anything else (bool, str, None, a schedule *class*), ValueError for NaN and infinities.

    >>> as_schedule(0.3)
    Constant(value=0.3)
    """
    return schedule_or_number("as_schedule", "value", value)


def state_of(schedule: object) -> dict:
    """The kind and the arguments of a schedule as plain numbers, lists and mappings, which JSON can hold.

    Raises TypeError where the schedule, or one inside it, is a function or a class of somebody else: what it computes
    cannot be written down.

    >>> state_of(Linear(1.0, 0.5, steps=4))
    {'kind': 'Linear', 'start': 1.0, 'end': 0.5, 'steps': 4, 'begin': 0}
    """
    if type(schedule).__module__.rpartition(".")[0] != __package__:
        raise TypeError(
            f"state_dict: a schedule must be one of sparsenet's own to have a state, got {schedule!r}; give a function "
            "again when training goes on"
        )
    return {"kind": type(schedule).__name__} | {f.name: _plain(getattr(schedule, f.name)) for f in fields(schedule)}


def _plain(argument: object) -> object:
    if isinstance(argument, tuple):
        return [_plain(entry) for entry in argument]
    return state_of(argument) if callable(argument) else argument
