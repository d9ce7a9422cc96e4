"""Choosing places, by scores or at random: bounded memory whatever the size of the layer, ties by index."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from sparsenet import functional
from sparsenet.functional.blocks import where_true
from sparsenet.pattern import BlockPattern

__all__ = [
    "PLACES_AT_ONCE",
    "BadScores",
    "best_of",
    "best_places",
    "checked_places",
    "checked_scores",
    "checked_values",
    "hash_uniform",
    "inactive_places",
    "layer_key",
    "random_places",
]

PLACES_AT_ONCE = 1 << 18  # places scored at a time: bounds the memory of a rewire


class BadScores(ValueError):
    """NaN or Inf among scores."""


def inactive_places(pattern: BlockPattern, rows: tuple[int, int]) -> Iterator[Tensor]:
    """int64, ascending: the inactive places in block rows [begin, end), a bounded number at a time."""
    cols, active = pattern.block_cols, pattern.linear_places()
    step = max(1, PLACES_AT_ONCE // max(cols, 1))
    for begin in range(*rows, step):
        end = min(begin + step, rows[1])
        free = torch.ones((end - begin) * cols, dtype=torch.bool, device=active.device)
        here = active[torch.searchsorted(active, begin * cols) : torch.searchsorted(active, end * cols)]
        free[here - begin * cols] = False
        yield where_true(free) + begin * cols


def best_places(
    pattern: BlockPattern, score: Callable[[Tensor], Tensor], count: int, rows: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The ``count`` inactive places of highest score in block rows [begin, end), ascending, and their scores."""
    return best_of(inactive_places(pattern, rows), score, count, pattern.device)


def best_of(
    parts: Iterable[Tensor], score: Callable[[Tensor], Tensor], count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The ``count`` places of highest score, ascending, and their scores; they come in ascending parts, int64.

    A part is forgotten before the next comes; ties go to the smaller place.
    """
    best, best_scores = torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, device=device)
    for places in parts if count else ():
        scores = checked_scores(score(places), len(places), "grow")
        if len(best) == count:  # later places lose ties: few can still get in
            better = where_true(scores > best_scores.min())
            places, scores = places[better], scores[better]
        best, best_scores = torch.cat([best, places]), torch.cat([best_scores, scores])
        if len(best) > count:
            kept = functional.select_extreme(best_scores, count, largest=True)
            best, best_scores = best[kept], best_scores[kept]
    return best, best_scores


def checked_scores(scores: Tensor, count: int, which: str) -> Tensor:
    """What a policy returned, as float32 [count]; raises BadScores for NaN and Inf, ValueError for another shape."""
    if scores.shape != (count,):
        raise ValueError(f"Policy: {which}_scores must have shape [{count}], got {list(scores.shape)}")
    scores = scores.detach().float()
    # NaN and Inf show in the extremes; isfinite on every score takes ten times as long
    if len(scores) and not all(map(math.isfinite, torch.stack(torch.aminmax(scores)).tolist())):
        raise BadScores(f"its {which} scores hold NaN or Inf")
    return scores


def checked_values(values: Tensor, own: Tensor) -> Tensor:
    """What a policy's ``adjust`` returned, in the dtype of the layer's ``own`` values; BadScores for NaN and Inf."""
    if values.shape != own.shape:
        raise ValueError(f"Policy: adjust must return {list(own.shape)}, got {list(values.shape)}")
    values = values.detach().to(own)
    if len(values) and not bool(torch.isfinite(values).all()):
        raise BadScores("its adjusted values hold NaN or Inf")
    return values


def checked_places(pattern: BlockPattern, places: Tensor, count: int) -> Tensor:
    """What a policy's ``grow_places`` returned, on the pattern's device; raises ValueError for what cannot grow."""
    expected = f"Policy: grow_places must return int64 [at most {count}]"
    if not isinstance(places, Tensor) or places.dtype != torch.int64 or places.dim() != 1 or len(places) > count:
        got = f"{places.dtype} {list(places.shape)}" if isinstance(places, Tensor) else type(places).__name__
        raise ValueError(f"{expected}, got {got}")
    places = places.to(pattern.device)
    if not len(places):
        return places
    if (places[1:] <= places[:-1]).any():
        raise ValueError(f"{expected} of places that ascend, each once, got two that do not")
    end = pattern.block_rows * pattern.block_cols
    if places[0] < 0 or places[-1] >= end:
        raise ValueError(f"{expected} of places in [0, {end}), got {int(places[0])} to {int(places[-1])}")
    active = pattern.linear_places()
    if len(active):
        at = torch.searchsorted(active, places).clamp_(max=len(active) - 1)
        taken = places[active[at] == places]
        if len(taken):
            raise ValueError(f"{expected} of inactive places, got {int(taken[0])}, which is active")
    return places


def random_places(pattern: BlockPattern, count: int, key: int) -> Tensor:
    """int64, ascending: ``count`` inactive places, or all if there are fewer; each set of them equally likely."""
    places = pattern.block_rows * pattern.block_cols
    return functional.draw_free_places(pattern.linear_places(), places, min(count, places - pattern.num_blocks), key)


def layer_key(seed: int, step: int, name: str) -> int:
    """63-bit key of one layer at one step."""
    key = seed & _MASK
    for part in (step, *name.encode()):
        key = _mix_int((key ^ part) + 0x9E3779B97F4A7C15)
    return key >> 1


_MASK = 2**64 - 1


def _mix_int(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea & Flood, 2014)."""
    x &= _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def hash_uniform(places: Tensor, key: int) -> Tensor:
    """float32 [n] in [0, 1) from int64 ``places`` [n]: splitmix64 of place and key, its upper 24 bits."""
    x = places * _signed(0x9E3779B97F4A7C15) + key
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return ((x >> 40) & 0xFFFFFF).float() / float(1 << 24)
