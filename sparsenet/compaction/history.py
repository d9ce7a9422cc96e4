"""What a Compactor notes at every check: the size, speed and removals of a network that gets smaller."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Interval"]


@dataclass(frozen=True)
class Interval:
    """Training between two checks of a :class:`sparsenet.Compactor`, and what left at its end.

    Attributes:
        begin, end: steps; begin < step <= end.
        units: outputs of every layer with weights, by its name.
        parameters, bytes: of the model and its optimizer as in :class:`CompactionReport`, before anything left.
        seconds_per_step: the median, from one call of ``step`` to the next.
        removed: units that left at the end. folded: layers that merged there.
        check_seconds: what the check took, removing included.
    """

    begin: int
    end: int
    units: dict[str, int]
    parameters: int
    bytes: int
    seconds_per_step: float
    removed: int
    folded: int
    check_seconds: float
