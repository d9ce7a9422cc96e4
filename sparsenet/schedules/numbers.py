"""What all of sparsenet takes for a number: Python's, NumPy's scalars, arrays and tensors of no dimension.

They are stored as Python's own. Truth values and arrays with a dimension are no numbers.
"""

from __future__ import annotations

import math
from numbers import Integral, Real

__all__ = ["as_integer", "as_number", "number_of", "numbers_of"]


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
