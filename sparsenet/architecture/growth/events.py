"""What the Grower did, in numbers and words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sparsenet.limits import format_bytes

__all__ = ["Change", "Event", "together"]


@dataclass(frozen=True)
class Change:
    """What happened to one layer at one level.

    Attributes:
        level: ``blocks``, ``units`` or ``layers``. layer: its name.
        grown, pruned: how many. why: in words.
        gain: squared norm of the gradient of what was born, per item: how fast the loss falls by it at first.

    Example:
        >>> from sparsenet.architecture.growth import Change
        >>> str(Change("units", "0", grown=4, why="largest gain"))
        '0 +4 units (largest gain)'
    """

    level: str
    layer: str
    grown: int = 0
    pruned: int = 0
    why: str = ""
    gain: float = 0.0

    def __str__(self) -> str:
        parts = [f"+{self.grown}" if self.grown else "", f"-{self.pruned}" if self.pruned else ""]
        return f"{self.layer} {' '.join(p for p in parts if p)} {self.level}" + (f" ({self.why})" if self.why else "")


@dataclass(frozen=True)
class Event:
    """What one decision did.

    Attributes:
        step: the call of :meth:`sparsenet.Grower.step` that decided.
        changes: by layer and level; empty if nothing moved.
        bytes, parameters, milliseconds: of a training step afterwards, as predicted. limit_bytes: in force.
        predicted: change of the loss over the next interval that the growth is worth, to first order and at the
            optimizer's learning rate. seen: change of the mean loss between the last two intervals.
        newborn_ratio: gradient per weight of the last additions over that of the incumbents, one interval later; None
            where none is young.
        reason: why nothing or less was done, or what limit was met. units: outputs of every layer.

    Example:
        >>> from sparsenet.architecture.growth import Change, Event
        >>> changes = (Change("units", "0", grown=4), Change("blocks", "2", grown=1, pruned=1))
        >>> event = Event(20, changes, bytes=2048, parameters=90, milliseconds=1.0, limit_bytes=4096)
        >>> event.grown, event.pruned, str(event)
        (5, 1, 'step 20: 0 +4 units; 2 +1 -1 blocks; 2 KiB of 4 KiB')
    """

    step: int
    changes: tuple[Change, ...]
    bytes: int
    parameters: int
    milliseconds: float
    limit_bytes: int
    predicted: float = 0.0
    seen: float | None = None
    newborn_ratio: float | None = None
    reason: str = ""
    units: dict[str, int] = field(default_factory=dict)

    @property
    def grown(self) -> int:
        """Items of all levels."""
        return sum(change.grown for change in self.changes)

    @property
    def pruned(self) -> int:
        """Items of all levels."""
        return sum(change.pruned for change in self.changes)

    def __str__(self) -> str:
        said = "; ".join(map(str, self.changes)) or "nothing changed"
        tail = f" [{self.reason}]" if self.reason else ""
        return f"step {self.step}: {said}; {format_bytes(self.bytes)} of {format_bytes(self.limit_bytes)}{tail}"


def together(changes: Sequence[Change]) -> tuple[Change, ...]:
    """One change by layer and level.

    Example:
        >>> from sparsenet.architecture.growth.events import Change, together
        >>> [str(change) for change in together([Change("units", "0", pruned=1), Change("units", "0", pruned=2)])]
        ['0 -3 units']
    """
    found: dict[tuple[str, str], Change] = {}
    for c in changes:
        key = c.level, c.layer
        before = found.get(key)
        more = c if before is None else replace(before, grown=before.grown + c.grown, pruned=before.pruned + c.pruned)
        found[key] = more
    return tuple(found.values())
