"""Schedules: a number (density, drop fraction, gate strength) as a function of the step.

A schedule is a frozen dataclass called as ``schedule(step) -> float``. Every ramp goes from ``start`` to ``end``
over ``steps`` steps beginning at step ``begin``; before it stays at ``start``, after it at ``end``, both exactly.
With ``t = (step - begin) / steps`` clamped to [0, 1]::

    Linear       end + (start - end) (1 - t)
    Cosine       end + (start - end) (1 + cos(pi t)) / 2
    Cubic        end + (start - end) (1 - t)^3
    Polynomial   end + (start - end) (1 - t)^power
    Exponential  start (end / start)^t

Schedules hold no state, so a resumed run needs only its step. Adding one: one frozen dataclass here.

Here is also what all of sparsenet takes for a number: Python's, NumPy's scalars, arrays and tensors of no dimension.
They are stored as Python's own. Truth values and arrays with a dimension are no numbers.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral, Real

Schedule = Callable[[float], float]

__all__ = [
    "Complement",
    "Constant",
    "Cosine",
    "Cubic",
    "Exponential",
    "Linear",
    "Piecewise",
    "Polynomial",
    "Schedule",
    "as_integer",
    "as_number",
    "as_schedule",
    "last_step",
    "number_of",
    "numbers_of",
]


# --- numbers ---


def number_of(value: object) -> int | float | None:
    """``value`` as a Python int or float; None where it is no real number.

    >>> import numpy, torch
    >>> number_of(numpy.float32(0.5)), number_of(torch.tensor(3)), number_of(True), number_of([3])
    (0.5, 3, None, None)
    """
    if type(value) in (int, float):
        return value
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        try:
            value = value.item()
        except (RuntimeError, ValueError):  # a tensor without data
            return None
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def numbers_of(values: object) -> list[int | float | None]:
    """:func:`number_of` of each of ``values``; ``[None]`` where they cannot be listed.

    >>> import numpy
    >>> numbers_of(numpy.array([3, 4])), numbers_of("34"), numbers_of(34)
    ([3, 4], [None, None], [None])
    """
    try:
        return [number_of(value) for value in values]
    except TypeError:
        return [None]


def as_number(owner: str, argument: str, value: object, within: tuple[float, float] | None = None) -> float:
    """``value`` as a finite Python float.

    Raises TypeError where it is no real number, ValueError where it is NaN, infinite or not ``within`` the bounds; the
    message begins with ``owner``, what was called, and names the ``argument``.

    >>> as_number("train", "density", 1)
    1.0
    >>> as_number("train", "density", 1.5, within=(0, 1))
    Traceback (most recent call last):
    ValueError: train: density must be a number in [0, 1], got 1.5
    """
    rule = "a finite number" if within is None else f"a number in [{within[0]}, {within[1]}]"
    number = number_of(value)
    if number is None:
        raise TypeError(f"{owner}: {argument} must be {rule}, got {value!r}")
    if not math.isfinite(number) or (within is not None and not within[0] <= number <= within[1]):
        raise ValueError(f"{owner}: {argument} must be {rule}, got {value!r}")
    return float(number)


def as_integer(owner: str, argument: str, value: object, at_least: int | None = None) -> int:
    """``value`` as a Python int.

    Raises TypeError where it is no integer, as 3.0 is none, ValueError where it is below ``at_least``; see
    :func:`as_number`.

    >>> as_integer("train", "steps", 3, at_least=1)
    3
    >>> as_integer("train", "steps", 0, at_least=1)
    Traceback (most recent call last):
    ValueError: train: steps must be an integer >= 1, got 0
    """
    rule = "an integer" if at_least is None else f"an integer >= {at_least}"
    number = number_of(value)
    if not isinstance(number, int):
        raise TypeError(f"{owner}: {argument} must be {rule}, got {value!r}")
    if at_least is not None and number < at_least:
        raise ValueError(f"{owner}: {argument} must be {rule}, got {value!r}")
    return number


# --- schedules ---


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


@dataclass(frozen=True)
class Piecewise:
    """One schedule after another: ``pieces[i]`` holds for ``boundaries[i - 1] <= step < boundaries[i]``.

    A piece is a number or a schedule. Each sees steps counted from its own first step, so it is written as if it
    stood alone (as in optax's ``join_schedules``).
    Raises TypeError or ValueError when ``boundaries`` are not increasing integers >= 1, or there is not exactly one
    piece more than boundaries, or a piece is neither a finite number nor a schedule.

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
        pieces = tuple(_as_schedule("Piecewise", "pieces", piece) for piece in self.pieces)
        object.__setattr__(self, "boundaries", boundaries)
        object.__setattr__(self, "pieces", pieces)

    def __call__(self, step: float) -> float:
        """The value at ``step``, from the piece that holds there."""
        step = as_number("Piecewise", "step", step)
        i = bisect_right(self.boundaries, step)
        return self.pieces[i](step - (self.boundaries[i - 1] if i else 0))


@dataclass(frozen=True)
class Complement:
    """1 minus another schedule: density from sparsity.

    >>> Complement(Linear(0.0, 0.9, steps=10))(5)
    0.55
    """

    schedule: Schedule

    def __call__(self, step: float) -> float:
        """The value at ``step``."""
        return 1.0 - self.schedule(step)


def last_step(schedule: object) -> int | None:
    """The step from which on a schedule stays the same; None where that is not known, as for a function.

    >>> last_step(Linear(0.5, 0.1, steps=100, begin=20)), last_step(Constant(0.1)), last_step(lambda step: 0.1)
    (120, 0, None)
    """
    if isinstance(schedule, Constant):
        return 0
    if isinstance(schedule, _Ramp):
        return schedule.begin + schedule.steps
    if isinstance(schedule, Complement):
        return last_step(schedule.schedule)
    if isinstance(schedule, Piecewise):
        last = last_step(schedule.pieces[-1])
        return None if last is None else (schedule.boundaries[-1] if schedule.boundaries else 0) + last
    return None


def _as_schedule(owner: str, argument: str, value: object) -> Schedule:
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
    return _as_schedule("as_schedule", "value", value)
