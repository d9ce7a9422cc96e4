"""One row of results: contenders, how they are timed, and what follows from their times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from sparsenet.benchmark import machine
from sparsenet.benchmark.goals import Goal
from sparsenet.benchmark.timing import Contender, Quartiles, Race, Timings

__all__ = ["Row", "Trial", "Unavailable"]

OURS = "sparsenet"


class Unavailable(Exception):
    """A rival cannot take part; says why."""


@dataclass(frozen=True)
class Row:
    """One measurement, as written to JSON.

    Attributes:
        op, phase: what was measured: an op's stem and one of its passes, or a bench such as ``training_step``.
        case: its sizes and settings.
        times: milliseconds of one call of each contender; ``sparsenet`` is ours.
        reference: the contender that speed-ups are over; empty if there is none.
        speedups: ``reference`` time / contender's time, median and quartiles of the ratios within each round.
        metrics: figures derived from the times, such as ``eff`` and ``active_gflops``.
        goal: what one of the metrics should be, or None. rounds: how many. date: when.
        left_out: contenders that could not take part, and why.
    """

    op: str
    phase: str
    case: Mapping[str, Any]
    times: Mapping[str, Quartiles]
    reference: str
    speedups: Mapping[str, Quartiles]
    metrics: Mapping[str, float]
    goal: Goal | None
    rounds: int
    date: str
    left_out: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[Any, ...]:
        """What two rows must have in common to be compared."""
        return self.op, self.phase, tuple(sorted(self.case.items()))

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached; None without a goal, or where its metric could not be measured."""
        if self.goal is None or self.goal.metric not in self.metrics:
            return None
        return self.goal.met(self.metrics[self.goal.metric])

    def to_dict(self) -> dict[str, Any]:
        """Plain data; ``met`` is written for readers of the file."""
        return asdict(self) | {"met": self.met}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Row:
        """From :meth:`to_dict`; KeyError or TypeError when it is not one."""
        fields = {name: value for name, value in fields.items() if name != "met"}
        fields["times"] = {name: Quartiles(**q) for name, q in fields["times"].items()}
        fields["speedups"] = {name: Quartiles(**q) for name, q in fields["speedups"].items()}
        fields["goal"] = None if fields["goal"] is None else Goal(**fields["goal"])
        return cls(**fields)


@dataclass(frozen=True)
class Trial:
    """A row to be.

    Attributes:
        contenders: by name, ours (``sparsenet``) first.
        derive: metrics from the times.
        threads: torch's number of threads while it runs; None leaves it. It is what it was afterwards.
    """

    op: str
    phase: str
    case: Mapping[str, Any]
    contenders: Mapping[str, Contender]
    derive: Callable[[Timings], dict[str, float]]
    goal: Goal | None = None
    reference: str = "dense"
    left_out: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None

    def run(self, seconds: float = 1.0, drive: Callable[[Race], Timings] = Race.run) -> Row:
        """Times all contenders in turns for about ``seconds``; ``drive`` runs the rounds."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            return self._row(drive(Race(self.contenders, seconds)))
        finally:
            torch.set_num_threads(before)

    def _row(self, timings: Timings) -> Row:
        reference = self.reference if self.reference in self.contenders else ""
        return Row(
            op=self.op,
            phase=self.phase,
            case=dict(self.case),
            times={name: timings.time(name).scaled(1e3) for name in self.contenders},
            reference=reference,
            speedups={name: timings.ratio(reference, name) for name in self.contenders if reference not in ("", name)},
            metrics=self.derive(timings),
            goal=self.goal,
            rounds=timings.rounds,
            date=machine.today(),
            left_out=dict(self.left_out),
        )
