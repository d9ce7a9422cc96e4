"""Cases within a time budget, and the JSON file that is whole after every one of them.

A part of ``gpu_check.py`` is a list of cases, the most important first. A case that raises is recorded and the next
one runs. A case is not begun when cases of its kind took longer than what is left of the budget. Whatever stops the
process, the file holds everything before the case that was running, and names that case.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

CONTEXT_LOST = 75  # exit status: the device answers nothing any more in this process, another one must go on
FATAL_PER_KIND = 2  # after so many cases of a kind that cost their process, the others of that kind are left out


@dataclass(frozen=True)
class Case:
    """One thing to check or to time.

    Attributes:
        name: unique in its part.
        kind: cases of one kind take about the same time.
        run: returns what to record; ``passed`` is in it where something can be wrong.
    """

    name: str
    kind: str
    run: Callable[[], dict]


def read(path: Path) -> dict:
    """The report at `path`, or an empty one."""
    return json.loads(path.read_text()) if path.exists() else {"parts": {}}


def write(path: Path, report: dict) -> None:
    """Replaces the report at `path` in one step: a reader, or a stop in the middle, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(report, default=str))
    scratch.replace(path)


class Journal:
    """One part's entry in the report: what it did, what is running, what there was no time for."""

    def __init__(self, path: Path, part: str):
        self.path, self.report = path, read(path)
        self.part = self.report["parts"].setdefault(part, {"cases": [], "left_out": [], "running": None})

    @property
    def cases(self) -> list[dict]:
        """The results so far, in the order of their runs."""
        return self.part["cases"]

    def begin(self, case: Case) -> None:
        """Writes the file: everything before this case, and that this case runs."""
        self.part["running"] = {"name": case.name, "kind": case.kind}
        self.save()

    def record(self, name: str, kind: str, seconds: float, result: dict) -> None:
        """Adds a result."""
        self.cases.append({"name": name, "kind": kind, "seconds": round(seconds, 3), **result})
        self.part["running"] = None

    def bury(self, reason: str, seconds: float) -> str | None:
        """Records the case that was running when its process ended; returns its name."""
        running = self.part["running"]
        if running is not None:
            lost = {"passed": False, "error": reason, "fatal": True}
            self.record(running["name"], running["kind"], seconds, lost)
            self.save()
        return running and running["name"]

    def save(self) -> None:
        """Writes the file."""
        write(self.path, self.report)


def failures(part: dict) -> list[str]:
    """One line for every case of a part that did not pass."""
    return [f"{c['name']}: {c.get('error', 'wrong')}" for c in part["cases"] if not c.get("passed", True)]


def run_cases(
    journal: Journal,
    cases: Iterable[Case],
    seconds: float,
    healthy: Callable[[], bool] = lambda: True,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Run the cases that the report does not have yet, within `seconds`; say whether the device still answers.

    `healthy` is asked after a case that raised. When it says no, this process can do nothing more on the device.
    """
    end, parent = clock() + seconds, os.getppid()
    done, longest, fatal = set(), {}, {}
    for case in journal.cases:
        done.add(case["name"])
        longest[case["kind"]] = max(longest.get(case["kind"], 0.0), 0.0 if "fatal" in case else case["seconds"])
        fatal[case["kind"]] = fatal.get(case["kind"], 0) + ("fatal" in case)
    left_out = journal.part["left_out"] = []
    for case in cases:
        if case.name in done:
            continue
        left = end - clock()
        if left <= 0 or left < longest.get(case.kind, 0.0):
            left_out.append({"name": case.name, "reason": "no time left"})
            continue
        if fatal.get(case.kind, 0) >= FATAL_PER_KIND:
            left_out.append({"name": case.name, "reason": "others of its kind cost their process"})
            continue
        if os.getppid() != parent:
            left_out.append({"name": case.name, "reason": "the program that started this part has ended"})
            continue
        journal.begin(case)
        start, lost = clock(), False
        try:
            result = case.run()
        except Exception as error:  # whatever it is, it is this case's result
            lost = not healthy()
            result = {"passed": False, "error": f"{type(error).__name__}: {error}"[:800]}
            if lost:
                result["fatal"] = True
        journal.record(case.name, case.kind, clock() - start, result)
        longest[case.kind] = max(longest.get(case.kind, 0.0), clock() - start)
        if lost:
            journal.save()
            return False
    journal.save()
    return True
