"""Amounts of memory by name: ``512MiB`` and how bytes are told."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from sparsenet.schedules import number_of

__all__ = ["MemoryBudget", "format_bytes"]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS |= {f"{_letter}IB": 1024**_power, f"{_letter}B": 1000**_power}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True, init=False, order=True)
class MemoryBudget:
    """An amount of memory: ``MemoryBudget("512MiB")``, ``MemoryBudget("1.5 GB")``, ``MemoryBudget(2**29)``.

    KiB, MiB, GiB and TiB are powers of 1024; KB, MB, GB and TB are powers of 1000; a bare number is bytes.

    Raises:
        TypeError: neither text nor an integer. ValueError: not such an amount, or none at all.

    Example:
        >>> import sparsenet as sn
        >>> sn.MemoryBudget("512MiB").bytes, str(sn.MemoryBudget(1536 * 1024))
        (536870912, '1.5 MiB')
    """

    bytes: int

    def __init__(self, amount: str | int | MemoryBudget):
        object.__setattr__(self, "bytes", _parse_bytes(amount))

    def __str__(self) -> str:
        return format_bytes(self.bytes)


def _parse_bytes(amount: str | int | MemoryBudget) -> int:
    if isinstance(amount, MemoryBudget):
        return amount.bytes
    given, amount = amount, amount if isinstance(amount, str) else number_of(amount)
    if not isinstance(amount, (str, int)):
        raise TypeError(f"MemoryBudget: amount must be text such as '512MiB' or an integer of bytes, got {given!r}")
    found = _AMOUNT.fullmatch(amount) if isinstance(amount, str) else None
    if isinstance(amount, str) and (found is None or found[2].upper() not in _UNITS):
        raise ValueError(f"MemoryBudget: amount must be a number with KiB, MiB, GiB, KB, MB, GB or B, got {amount!r}")
    number = amount if found is None else math.floor(float(found[1]) * _UNITS[found[2].upper()])
    if not 1 <= number < 2**63:
        raise ValueError(f"MemoryBudget: amount must be at least 1 byte and below 8 EiB, got {amount!r}")
    return int(number)


def format_bytes(count: float) -> str:
    """``count`` bytes with a unit that leaves one to four digits before the point.

    >>> format_bytes(117_650_000), format_bytes(-2048), format_bytes(12)
    ('112.2 MiB', '-2 KiB', '12 B')
    """
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1024:
            break
        count, unit = count / 1024, larger
    return f"{count:.1f}".removesuffix(".0") + f" {unit}"
