"""Results as files and as text: JSON, the table, crossover densities, and the comparison of two files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from sparsenet.benchmark import machine
from sparsenet.benchmark.machine import Ceilings
from sparsenet.benchmark.trial import OURS, Row
from sparsenet.files import replace_text

__all__ = ["Results", "compare", "crossovers", "read", "table"]

FORMAT = 1
_METRIC_COLUMN = (
    *("eff", "copy_share", "share_of_dense", "speedup_over_sparselab", "share_of_dense_gradient"),
    *("scaling", "slowdown", "milliseconds", "ns_per_block"),
)


@dataclass(frozen=True)
class Results:
    """What one file holds: the machine, its measured ceilings, and rows."""

    machine: Mapping[str, Any]
    ceilings: Ceilings
    rows: tuple[Row, ...]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> Results:
        """Rows measured in this process."""
        return cls(machine.describe(), machine.ceilings(), tuple(rows))

    def to_json(self) -> str:
        """The file's text, a row a line."""
        head = {"format": FORMAT, "machine": self.machine, "ceilings": asdict(self.ceilings)}
        lines = ",\n".join(json.dumps(_rounded(row.to_dict())) for row in self.rows)
        return f'{json.dumps(_rounded(head))[:-1]},\n"rows": [\n{lines}\n]}}\n'

    def write(self, path: Path) -> None:
        """Writes the file whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, self.to_json())

    def merged_into(self, older: Results) -> Results:
        """``older`` with the rows of this one, which replace rows of the same key; of one machine and versions only."""
        if dict(older.machine) != dict(self.machine):
            return self
        rows = {row.key: row for row in (*older.rows, *self.rows)}
        return Results(self.machine, self.ceilings, tuple(rows.values()))


def _rounded(value: Any) -> Any:
    """Floats to six significant digits: a file that a person can read."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def read(path: Path) -> Results:
    """A file that :meth:`Results.write` wrote.

    Raises:
        OSError: it cannot be read. ValueError: it holds something else, or a newer format.
    """
    text = path.read_text(encoding="utf-8")
    try:
        fields = json.loads(text)
        if fields["format"] > FORMAT:
            raise ValueError(f"bench: {path} must have format {FORMAT} or older, got {fields['format']}")
        rows = tuple(Row.from_dict(row) for row in fields["rows"])
        return Results(fields["machine"], Ceilings(**fields["ceilings"]), rows)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"bench: {path} must be a file that sparsenet bench wrote, got {error!r}") from error


# --- the table ------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> str:
    """The rows as text; rivals as their speed-up over the reference."""
    rivals = list(dict.fromkeys(n for row in rows for n in row.times if n not in (OURS, row.reference, "copy")))
    head = ["what", "case", "ours ms", "quartiles", "dense ms", "speed-up", "figure", "goal", "", "GFLOP/s", "roof"]
    lines = [[*head, *rivals]]
    for row in rows:
        lines.append([*_columns(row), *(_over(row, name) for name in rivals)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in _numbered(line, widths))
        for line in lines
    ]
    return "\n".join(line.rstrip() for line in text)


def _numbered(line: Sequence[str], widths: Sequence[int]):
    return enumerate(zip(line, widths, strict=True))


def _columns(row: Row) -> list[str]:
    ours, metrics = row.times.get(OURS), row.metrics
    name = row.goal.metric if row.goal else next((m for m in _METRIC_COLUMN if m in metrics), "")
    return [
        row.phase if row.op == "block_sparse_linear" else f"{row.op} {row.phase}".strip(),
        case_text(row.case),
        f"{ours.median:.3f}" if ours else "",
        f"{ours.lower:.3f}-{ours.upper:.3f}" if ours else "",
        f"{row.times[row.reference].median:.3f}" if row.reference else "",
        f"{row.speedups[OURS].median:.2f}" if row.reference else "",
        f"{name} {metrics[name]:.3g}" if name in metrics else "",
        str(row.goal or ""),
        {True: "met", False: "missed", None: ""}[row.met],
        f"{metrics['active_gflops']:.0f}" if "active_gflops" in metrics else "",
        f"{metrics['roofline_share']:.0%}" if "roofline_share" in metrics else "",
    ]


def _over(row: Row, name: str) -> str:
    return f"{row.speedups[name].median:.2f}" if name in row.speedups else "-"


def case_text(case: Mapping[str, Any]) -> str:
    """A case in short: ``4096x4096 batch 512 10% b=32 float32``."""
    rest = dict(case)
    words = []
    if "out" in rest and "in" in rest:
        words.append(f"{rest.pop('out')}x{rest.pop('in')}")
    for name, text in (("batch", "batch {}"), ("density", "{:.3g}%"), ("block", "b={}"), ("dtype", "{}")):
        if name in rest:
            value = rest.pop(name)
            words.append(text.format(100 * value if name == "density" else value))
    if rest.get("pattern") == "uniform":
        del rest["pattern"]
    rest.pop("threads", None)
    return " ".join([*words, *(str(v) if isinstance(v, str) else f"{k}={v}" for k, v in rest.items())])


# --- crossover ------------------------------------------------------------------------------------------------------


def crossovers(rows: Sequence[Row]) -> dict[str, str]:
    """Per phase and case, where sparse takes as long as dense: interpolated between two measured densities."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.reference and "density" in row.case and OURS in row.speedups:
            case = {name: value for name, value in row.case.items() if name != "density"}
            key = f"{row.phase} {case_text(case)}"
            groups.setdefault(key, []).append((row.case["density"], row.speedups[OURS].median))
    return {key: _crossover_text(sorted(points)) for key, points in groups.items()}


def crossover(points: Sequence[tuple[float, float]]) -> float | None:
    """The density of speed-up 1 from ascending (density, speed-up); None if no two neighbours enclose it."""
    for (d0, s0), (d1, s1) in pairwise(points):
        if s0 >= 1.0 > s1:
            share = math.log(s0) / math.log(s0 / s1)
            return d0 * (d1 / d0) ** share
    return None


def _crossover_text(points: Sequence[tuple[float, float]]) -> str:
    found = crossover(points)
    if found is not None:
        return f"{found:.0%}"
    density, speedup = points[-1]
    if speedup >= 1.0:
        return f"none: {speedup:.2f}x at {density:.0%}" if density == 1.0 else f"above {density:.0%}"
    return f"below {points[0][0]:.1%}"


# --- two files ------------------------------------------------------------------------------------------------------


def compare(first: Results, second: Results) -> str:
    """Ratios of what both files hold, a row a line: our time, and our speed-up over dense, second / first.

    Raises:
        ValueError: the files have no row in common.
    """
    theirs = {row.key: row for row in second.rows}
    pairs = [(row, theirs[row.key]) for row in first.rows if row.key in theirs and OURS in row.times]
    if not pairs:
        raise ValueError("bench: the compared files must have a row in common, got none")
    lines = [f"{'what':<44}{'ours ms':>10}{'then':>10}{'time':>8}{'speed-up':>10}"]
    times, speedups = [], []
    for a, b in pairs:
        times.append(b.times[OURS].median / a.times[OURS].median)
        both = a.reference and b.reference
        speedups += [b.speedups[OURS].median / a.speedups[OURS].median] if both else []
        what = f"{a.phase if a.op == 'block_sparse_linear' else f'{a.op} {a.phase}'} {case_text(a.case)}"
        shown = f"{speedups[-1]:.3f}" if both else ""
        lines.append(
            f"{what:<60} {a.times[OURS].median:>9.3f} {b.times[OURS].median:>9.3f} {times[-1]:>7.3f} {shown:>9}"
        )
    width = max(len(line) for line in lines[1:])
    lines[0] = f"{'what':<60} {'ours ms':>9} {'then':>9} {'time':>7} {'speed-up':>9}".ljust(width).rstrip()
    mean = f"{'geometric mean of the ratios':<60} {'':>9} {'':>9} {_geometric_mean(times):>7.3f}"
    return "\n".join([*lines, mean + (f" {_geometric_mean(speedups):>9.3f}" if speedups else "")])


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
