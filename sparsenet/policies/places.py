"""Choosing places by scores: bounded memory whatever the size of the layer, ties by index, random numbers by place."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparsenet import functional
from sparsenet.pattern import BlockPattern

__all__ = ["PLACES_AT_ONCE", "BadScores", "best_places", "checked_scores", "hash_uniform", "layer_key"]

PLACES_AT_ONCE = 1 << 20  # places scored at a time: bounds the memory of a rewire


class BadScores(ValueError):
    """NaN or Inf among scores."""


def best_places(
    pattern: BlockPattern, score: Callable[[Tensor], Tensor], count: int, rows: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The ``count`` inactive places of highest score in block rows [begin, end), ascending, and their scores.

    Scores a bounded number of places at a time; ties go to the smaller place.
    """
    cols, device = pattern.block_cols, pattern.device
    active = pattern.linear_places()
    best = torch.empty(0, dtype=torch.int64, device=device)
    best_scores = torch.empty(0, device=device)
    step = max(1, PLACES_AT_ONCE // max(cols, 1))
    for begin in range(rows[0], rows[1], step) if count else ():
        end = min(begin + step, rows[1])
        free = torch.ones((end - begin) * cols, dtype=torch.bool, device=device)
        here = active[torch.searchsorted(active, begin * cols) : torch.searchsorted(active, end * cols)]
        free[here - begin * cols] = False
        places = _true_places(free) + begin * cols
        scores = checked_scores(score(places), len(places), "grow")
        best, best_scores = torch.cat([best, places]), torch.cat([best_scores, scores])
        if len(best) > count:
            kept = functional.select_extreme(best_scores, count, largest=True)
            best, best_scores = best[kept], best_scores[kept]
    return best, best_scores


def _true_places(mask: Tensor) -> Tensor:
    """int64: where ``mask`` [n] is true. On the CPU numpy takes a fifth of torch's time."""
    return torch.from_numpy(np.flatnonzero(mask.numpy())) if mask.device.type == "cpu" else mask.nonzero().flatten()


def checked_scores(scores: Tensor, count: int, which: str) -> Tensor:
    """What a policy returned, as float32 [count]; raises BadScores for NaN and Inf, ValueError for another shape."""
    if scores.shape != (count,):
        raise ValueError(f"Policy: {which}_scores must have shape [{count}], got {list(scores.shape)}")
    scores = scores.detach().float()
    # NaN and Inf show in the extremes; isfinite on every score takes ten times as long
    if len(scores) and not all(map(math.isfinite, torch.stack(torch.aminmax(scores)).tolist())):
        raise BadScores(f"its {which} scores hold NaN or Inf")
    return scores


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
