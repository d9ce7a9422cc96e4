"""Timing contenders in turns. All figures of this package come from here, on the command line and in ``bench/``.

Machines are noisy and throttle in bursts, so times of different minutes are not comparable: a :class:`Race` calls every
contender once in each round, and what is reported are medians and quartiles over rounds of times and of their *ratios*.
Operands are rotated through more memory than the last-level cache holds (:func:`rotated`).
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np

__all__ = ["Contender", "Quartiles", "Race", "Timings", "last_level_cache_bytes", "rotated", "rotations"]

_SAMPLE_SECONDS = 2e-3  # a sample shorter than this is several calls: the clock and the loop must not show
_MOST_CALLS = 200
_MOST_COPIES = 64


@dataclass(frozen=True)
class Contender:
    """What is timed.

    Attributes:
        call: one call of it.
        before: called before each sample, untimed.
        settle_seconds: pause after each sample, untimed: threads of another OpenMP runtime still spin.
    """

    call: Callable[[], object]
    before: Callable[[], object] | None = None
    settle_seconds: float = 0.0


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles over the rounds."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        """Of at least one number."""
        lower, median, upper = np.percentile(np.asarray(values, dtype=np.float64), (25, 50, 75)).tolist()
        return cls(median, lower, upper)

    def scaled(self, factor: float) -> Quartiles:
        """The same in another unit."""
        return Quartiles(self.median * factor, self.lower * factor, self.upper * factor)


@dataclass(frozen=True)
class Timings:
    """Seconds per call of each contender, one number per round; entry i of all of them is round i."""

    seconds: Mapping[str, Sequence[float]]

    @property
    def rounds(self) -> int:
        """How many there were."""
        return len(next(iter(self.seconds.values())))

    def time(self, name: str) -> Quartiles:
        """Seconds per call."""
        return Quartiles.of(self.seconds[name])

    def ratio(self, over: str, under: str) -> Quartiles:
        """``over``'s time / ``under``'s time within each round."""
        return Quartiles.of([a / b for a, b in zip(self.seconds[over], self.seconds[under], strict=True)])


class Race:
    """Contenders timed in turns: each round times every one once, in an order that moves on by one each round.

    Args:
        contenders: by name; the first is the subject, which :meth:`run_subject` calls. pytest-benchmark times it and
            runs :meth:`run_others` before each of its rounds; :meth:`run` does both itself.
        seconds: about how long all rounds together take; at least ``least_rounds`` are run, however long they take.
    """

    def __init__(self, contenders: Mapping[str, Contender], seconds: float = 1.0, least_rounds: int = 5):
        self.subject, *self.others = contenders
        self.contenders = dict(contenders)
        estimates = {name: _warm_up(contender) for name, contender in contenders.items()}
        self.calls = {
            name: max(1, min(_MOST_CALLS, math.ceil(_SAMPLE_SECONDS / estimate)))
            for name, estimate in estimates.items()
        }
        one_round = sum(estimates[name] * self.calls[name] + c.settle_seconds for name, c in contenders.items())
        self.rounds = max(least_rounds, min(1000, round(seconds / one_round)))
        self._seconds: dict[str, list[float]] = {name: [] for name in contenders}

    def run_others(self) -> None:
        """Times everyone but the subject, once."""
        if self.others:
            self.others.append(self.others.pop(0))
        for name in self.others:
            self._seconds[name].append(self._timed(name))
        self._before(self.subject)

    def run_subject(self) -> None:
        """One sample of the subject, untimed: ``calls[subject]`` calls."""
        _repeat(self.contenders[self.subject].call, self.calls[self.subject])

    def run(self) -> Timings:
        """All rounds."""
        samples = []
        for _ in range(self.rounds):
            self.run_others()
            begin = time.perf_counter()
            self.run_subject()
            samples.append(time.perf_counter() - begin)
            time.sleep(self.contenders[self.subject].settle_seconds)
        return self.timings(samples)

    def timings(self, subject_samples: Sequence[float]) -> Timings:
        """What the rounds gave; ``subject_samples`` are the seconds of each :meth:`run_subject`."""
        subject = [sample / self.calls[self.subject] for sample in subject_samples]
        rounds = len(subject)
        return Timings({name: subject if name == self.subject else s[-rounds:] for name, s in self._seconds.items()})

    def _before(self, name: str) -> None:
        before = self.contenders[name].before
        if before is not None:
            before()

    def _timed(self, name: str) -> float:
        self._before(name)
        begin = time.perf_counter()
        _repeat(self.contenders[name].call, self.calls[name])
        taken = time.perf_counter() - begin
        time.sleep(self.contenders[name].settle_seconds)
        return taken / self.calls[name]


def _repeat(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def _warm_up(contender: Contender) -> float:
    """Calls it twice; seconds of the second call."""
    for _ in range(2):
        if contender.before is not None:
            contender.before()
        begin = time.perf_counter()
        contender.call()
        taken = time.perf_counter() - begin
        time.sleep(contender.settle_seconds)
    return max(taken, 1e-7)


# --- operands past the caches ---------------------------------------------------------------------------------------


def last_level_cache_bytes() -> int:
    """Size of the largest cache of the first processor; 32 MiB where the system does not say."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)K", file.read_text().strip())
        if found:
            sizes.append(int(found[1]) * 1024)
    return max(sizes, default=32 << 20)


def rotations(set_bytes: int) -> int:
    """How many sets of operands of ``set_bytes`` are needed so that none is in a cache when its turn comes again."""
    wanted = math.ceil(2 * last_level_cache_bytes() / max(set_bytes, 1))
    affordable = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16 // max(set_bytes, 1)
    return max(1, min(wanted, _MOST_COPIES, affordable))


def rotated(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A call that makes the next of ``calls`` each time."""
    if len(calls) == 1:
        return calls[0]
    turn = cycle(calls)
    return lambda: next(turn)()
