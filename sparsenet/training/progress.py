"""What a training run counts, shows and writes, and how it is asked to stop."""

from __future__ import annotations

import json
import math
import signal
import sys
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sparsenet.data.examples import Evaluation
from sparsenet.files import replace_text

__all__ = ["FitResult", "MetricsFile", "ProgressBar", "StopSignal", "Tally"]


_FORMAT = "{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"


@dataclass(frozen=True)
class FitResult:
    """How a training went.

    ``steps``: taken in all, with those before a resume and of earlier fits, as are ``rewires`` and ``blocks_moved``;
    ``seconds``: spent on them, rewires included, evaluation and saving not; ``seconds_per_step``: their mean over the
    steps of this call. ``interrupted``: by Ctrl-C or SIGTERM. ``optimizer_bytes``: of the optimizer's state at the end.
    ``peak_bytes``, ``peak_phases``, ``peak_method``: as in :class:`sparsenet.memory.budget.PeakMemory`.
    """

    steps: int
    seconds: float
    seconds_per_step: float
    rewires: int
    blocks_moved: int
    interrupted: bool
    stopped_early: bool
    validation: Evaluation | None
    optimizer_bytes: int
    peak_bytes: int
    peak_phases: dict[str, int] = field(default_factory=dict)
    peak_method: str = ""


@dataclass
class Tally:
    """What a Trainer has counted, over all its fits; part of a checkpoint.

    Attributes:
        seconds, rewires, blocks_moved: in all.
        best_loss, epochs_without_better: of the validation in this fit.
        began: the step at which this fit did. epochs, per_epoch: how many it has, and steps of each.
        epochs_before: those that earlier fits began. density: at the beginning; first_density: of the first fit.
    """

    seconds: float = 0.0
    rewires: int = 0
    blocks_moved: int = 0
    best_loss: float = math.inf
    epochs_without_better: int = 0
    began: int = 0
    epochs: int = 0
    per_epoch: int = 0
    epochs_before: int = 0
    density: float = 1.0
    first_density: float = 0.0

    @property
    def end(self) -> int:
        """The step at which this fit ends."""
        return self.began + self.epochs * self.per_epoch

    def next_fit(self, step: int, per_epoch: int, epochs: int, density: float) -> Tally:
        """The tally of a fit that begins at ``step``."""
        return replace(
            self,
            best_loss=math.inf,
            epochs_without_better=0,
            began=step,
            epochs=epochs,
            per_epoch=per_epoch,
            epochs_before=self.epochs_at(step),
            density=density,
            first_density=self.first_density or density,
        )

    def epochs_at(self, step: int) -> int:
        """Epochs begun until ``step``, in all."""
        return self.epochs_before + math.ceil((step - self.began) / max(self.per_epoch, 1))

    def epoch_at(self, step: int) -> str:
        """For progress: the epoch of ``step``, of how many."""
        return f"epoch {self.epochs_at(step)}/{self.epochs_before + self.epochs}"


class StopSignal:
    """Within the ``with`` block, the first Ctrl-C or SIGTERM sets ``asked``; the second is obeyed at once.

    Outside the main thread signals cannot be caught; ``asked`` then stays False unless it is set.
    """

    def __init__(self):
        self.asked = False
        self._previous: dict[int, Any] = {}

    def _handle(self, number: int, _frame: Any) -> None:
        if self.asked:
            self._restore()
            raise KeyboardInterrupt
        self.asked = True

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            self._previous = {n: signal.signal(n, self._handle) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        self._restore()


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, flushed line by line; without a folder nothing is written.

    Args:
        folder: of the run, or None.
        step: lines of later steps, left by a run that was killed after its checkpoint, are dropped.
    """

    def __init__(self, folder: Path | None, step: int = 0):
        self._file = None
        if folder is None:
            return
        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, **fields: Any) -> None:
        """Appends one line."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, "step": step, **fields}) + "\n")
            self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *_) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a ``metrics.jsonl``; a last line that was cut off is left out. No file: no lines."""
    if not Path(path).exists():
        return []
    lines = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        lines.append(line)
    return lines


class ProgressBar:
    """A bar over the steps on a terminal; elsewhere only the lines that :meth:`say` prints.

    Args:
        total: steps; ``done``: taken before.
        shown: False shows nothing at all.
    """

    def __init__(self, total: int, done: int, shown: bool):
        self._shown = shown
        on_terminal = shown and sys.stderr.isatty()
        self._bar = tqdm(
            total=total, initial=done, unit="step", disable=not on_terminal, dynamic_ncols=True, leave=False
        )

    def advance(self, description: str, numbers: str = "") -> None:
        """One step; ``numbers`` replaces what stands behind the bar, if given."""
        self._bar.set_description(description, refresh=False)
        if numbers:
            self._bar.set_postfix_str(numbers, refresh=False)
        self._bar.update()

    def say(self, line: str) -> None:
        """Prints a line above the bar."""
        if self._shown:
            self._bar.write(line, file=sys.stdout)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, *_) -> None:
        self._bar.close()
