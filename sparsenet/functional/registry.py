"""Finds what stands behind a pattern: the topology of the layer that runs on it, and, for graphs that hold only index
tensors, the pattern itself.

Index tensors are private to their pattern, so each leads to one pattern. Nothing here keeps a pattern or a layer alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["StaleTopologyError"]


class StaleTopologyError(RuntimeError):
    """The pattern was replaced by a rewire: values and indices no longer belong together."""


def stale(label: str) -> StaleTopologyError:
    """The error for a forward or backward pass of a layer called ``label`` that was rewired meanwhile."""
    return StaleTopologyError(f"{label}: the layer was rewired since this forward; run the forward again")


_patterns = WeakTensorKeyDictionary()  # column indices -> weak reference to the pattern
_retired = WeakTensorKeyDictionary()  # column indices -> label; outlives the pattern as long as a graph keeps them
_topologies: dict[int, weakref.ref] = {}  # id of a pattern that a topology has now -> weak reference to the topology
_make_pattern: list[Callable] = []


def patterns_are_made_by(make: Callable) -> None:
    """Says how a pattern is made of ``(crow, col, shape, block_size)``: the class itself, which stands above us."""
    _make_pattern[:] = [make]


def remember(pattern) -> None:
    """Lets graphs that hold ``pattern.col`` find ``pattern``."""
    _patterns[pattern.col] = weakref.ref(pattern)


def pattern_behind(crow: Tensor, col: Tensor, shape: tuple[int, int], block_size: int):
    """The pattern that owns ``col``, else a new, validated one: exported programs and direct callers hand in copies."""
    found = _patterns.get(col)
    pattern = found() if found is not None else None
    if pattern is None or pattern.shape != shape or pattern.block_size != block_size:
        pattern = _make_pattern[0](crow, col, shape, block_size)
    return pattern


def installed(pattern, topology) -> None:
    """``topology`` runs on ``pattern`` from now on."""
    key = id(pattern)

    def forget(reference: weakref.ref) -> None:
        if _topologies.get(key) is reference:
            del _topologies[key]

    _topologies[key] = weakref.ref(topology, forget)


def retire(pattern, label: str) -> None:
    """No topology runs on ``pattern`` any more; who still uses it gets an error with ``label``."""
    _topologies.pop(id(pattern), None)
    _retired[pattern.col] = label


def release(pattern) -> None:
    """No topology runs on ``pattern`` any more, and whoever holds it may go on using it."""
    _topologies.pop(id(pattern), None)


def topology_of(pattern):
    """The topology that runs on ``pattern`` now, or None."""
    found = _topologies.get(id(pattern))
    return None if found is None else found()


def running_on(pattern):
    """The same for a call that is about to use ``pattern``: raises StaleTopologyError where a rewire replaced it."""
    found = _topologies.get(id(pattern))
    topology = None if found is None else found()
    if topology is None and _retired.data:  # its own len() takes longer than all the rest
        refuse_retired(pattern.col)
    return topology


def refuse_retired(col: Tensor) -> None:
    """Raises StaleTopologyError where a rewire replaced the pattern that these column indices belong to."""
    label = _retired.get(col)
    if label is not None:
        raise stale(label)
