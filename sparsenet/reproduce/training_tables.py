"""Tables and figures of ``sparsenet reproduce training``."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from sparsenet.memory import format_bytes
from sparsenet.plotting.style import COLOURS, GREY, new_axes, save_figure
from sparsenet.reproduce.parts import markdown, spread, times_table, verdict
from sparsenet.reproduce.training_levers import LEVER_TASKS, LEVERS
from sparsenet.reproduce.training_permutation import GATHERED, GIVEN, SCRATCH, SINGLE
from sparsenet.reproduce.training_tasks import HELD_OUT, TASKS

__all__ = ["checks", "figures", "gaps", "tables"]

Rows = Sequence[Mapping]
EQUAL_BYTES, EQUAL_WEIGHTS, WIDE = "dense, equal bytes", "dense, equal weights", "dense, wide"
SHOWN = ("sparse", "static", EQUAL_BYTES, EQUAL_WEIGHTS)
BELOW = 1.0  # points below the dense network's best score: what "the same accuracy" is for times


def _of(rows: Rows, key: str, **where) -> list:
    return [row[key] for row in rows if all(row.get(k) == v for k, v in where.items())]


def comparisons(numbers: Mapping[str, dict]) -> list[Mapping]:
    """Rows of all data sets."""
    return [row for name in numbers for row in numbers[name]["rows"] if "curve" in row and row["task"] in TASKS]


def _data_rows(numbers: Mapping[str, dict]) -> list[Mapping]:
    return [row for row in comparisons(numbers) if row["arm"] in (*SHOWN, WIDE)]


def gaps(rows: Rows, arm: str, than: str, density: float) -> dict[str, tuple[float, float]]:
    """By data set: how many points ``arm`` lies above ``than``, over the seeds that both have, and its standard error.

    The same seed means the same examples, so the differences are paired.

    Example:
        >>> from sparsenet.reproduce.training_tables import gaps
        >>> row = {"task": "digits", "density": 0.1}
        >>> scores = [("sparse", 0, 98.0), ("sparse", 1, 97.0), ("static", 0, 97.0), ("static", 1, 97.0)]
        >>> gaps([{**row, "arm": arm, "seed": seed, "score": score} for arm, seed, score in scores],
        ...      "sparse", "static", 0.1)
        {'digits': (0.5, 0.5)}
    """
    found = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        ours = {r["seed"]: r["score"] for r in rows if (r["task"], r["arm"], r.get("density")) == (task, arm, density)}
        at = None if than == WIDE else density
        theirs = {r["seed"]: r["score"] for r in rows if (r["task"], r["arm"], r.get("density")) == (task, than, at)}
        differences = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
        if differences:
            error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
            found[task] = statistics.fmean(differences), error
    return found


def _average(found: Mapping[str, tuple[float, float]]) -> float:
    return statistics.fmean(gap for gap, _ in found.values())


# --- checks: what, asked, ours, met -----------------------------------------------------------------------------------

Check = tuple[str, str, str, bool]


def checks(numbers: Mapping[str, dict]) -> list[Check]:
    """What was asked of sparse training beside what came out."""
    rows = _data_rows(numbers)
    found = list(_accuracy_checks(rows))
    times = numbers.get("step_times", {}).get("rows", [])
    for task in dict.fromkeys(row["task"] for row in times):
        (ratio,) = _of(times, "ratio", task=task, density=0.1, arm="sparse")
        what = f"time of a step at 10 % over that of dense of equal bytes, {task}"
        found.append((what, "<= 1", f"{ratio:.2f}", ratio <= 1))
    return found


def _accuracy_checks(rows: Rows) -> Iterable[Check]:
    if held := gaps([r for r in rows if r["task"] in HELD_OUT], "sparse", EQUAL_BYTES, 0.1):
        mean = _average(held)
        yield f"the same on the {len(held)} data sets looked at once", ">= 0.3", f"{mean:+.2f}", mean >= 0.3
    if found := gaps(rows, "sparse", EQUAL_BYTES, 0.1):
        mean = _average(found)
        yield "sparse at 10 % over dense of equal bytes, mean of data sets", ">= 0.3", f"{mean:+.2f}", mean >= 0.3
        lost = {task: gap for task, (gap, error) in found.items() if gap < -2 * error and gap < 0}
        text = "; ".join(f"{task} {gap:+.2f}" for task, gap in lost.items()) or "none"
        yield "data sets where it loses by more than two standard errors", "none", text, not lost
    for density, least in ((0.1, -0.5), (0.05, -1.0)):
        if found := gaps(rows, "sparse", WIDE, density):
            mean, (task, (worst, _)) = _average(found), min(found.items(), key=lambda item: item[1][0])
            text = f"{mean:+.2f}, least {worst:+.2f} ({task})"
            yield f"sparse at {density:.0%} over the wide dense network", f">= {least}", text, worst >= least
    for density in (0.05, 0.02, 0.01):
        if found := gaps(rows, "sparse", "static", density):
            mean = _average(found)
            yield f"sparse over static at {density:.0%}", ">= 0.3", f"{mean:+.2f}", mean >= 0.3


# --- tables -----------------------------------------------------------------------------------------------------------


def tables(numbers: Mapping[str, dict]) -> str:
    """All tables as Markdown."""
    rows = _data_rows(numbers)
    body = [[what, asked, ours, verdict(met)] for what, asked, ours, met in checks(numbers)]
    parts = ["### Checks\n\n" + markdown(["what", "asked", "ours", ""], body)]
    densities = sorted({row["density"] for row in rows if "density" in row}, reverse=True)
    if rows:
        parts.append("### Points above dense of equal bytes, mean of all data sets\n\n" + _overview(rows, densities))
    parts += [f"### {density:.0%}\n\n" + _at(rows, density) for density in densities]
    if rows:
        parts.append("### Seconds of training until the same accuracy\n\n" + _seconds(rows))
    for lever in LEVERS:
        key = next(
            (name for name in numbers if name.startswith("lever_") and numbers[name].get("lever") == lever), None
        )
        if key is not None and numbers[key]["rows"]:
            parts.append(f"### Lever: {lever}\n\n" + _lever(numbers[key]["rows"]))
    if ordered := numbers.get("permutation", {}).get("rows"):
        parts.append("### Gathered hidden units, Fashion-MNIST\n\n" + _permutation(ordered))
    if rivals := numbers.get("rival", {}).get("rows"):
        parts.append("### SparseLab on the same recipe\n\n" + _rival(rivals))
    if times := numbers.get("step_times", {}).get("rows"):
        parts.append("### A step of training, one thread, processor time\n\n" + _times(times))
    if peaks := numbers.get("peaks", {}).get("rows"):
        parts.append("### Peak of memory, Fashion-MNIST\n\n" + _peaks(peaks))
    for part in numbers:
        if numbers[part].get("skipped"):
            parts.append(f"**{part} was skipped**: {numbers[part]['skipped']}.")
    return "\n\n".join([*parts, times_table(numbers)])


def _overview(rows: Rows, densities: Sequence[float]) -> str:
    body = []
    for density in densities:
        against = [gaps(rows, arm, EQUAL_BYTES, density) for arm in ("sparse", "static", EQUAL_WEIGHTS)]
        wide = {task: -gap for task, (gap, _) in gaps(rows, EQUAL_BYTES, WIDE, density).items()}
        seeds = sorted({len(_of(rows, "seed", density=density, arm="sparse", task=task)) for task in against[0]})
        body.append(
            [
                f"{density:.0%}",
                *(f"{_average(found):+.2f}" for found in against),
                f"{statistics.fmean(wide.values()):+.2f}",
                len(against[0]),
                " to ".join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1]))),
            ]
        )
    return markdown(["density", "sparse", "static", "dense, equal weights", "dense, wide", "data sets", "seeds"], body)


def _scores(values: Sequence[float]) -> str:
    """Mean and deviation over seeds; of one seed what there is."""
    return spread(values) if len(values) > 1 else f"{statistics.fmean(values):.2f}" if values else ""


def _at(rows: Rows, density: float) -> str:
    found = gaps(rows, "sparse", EQUAL_BYTES, density)
    body = []
    for task, (gap, error) in found.items():
        scores = [_scores(_of(rows, "score", task=task, arm=arm, density=density)) for arm in SHOWN]
        wide = _scores(_of(rows, "score", task=task, arm=WIDE))
        several = len(_of(rows, "score", task=task, arm="sparse", density=density)) > 1
        sizes = [max(_of(rows, key, task=task, arm="sparse", density=density)) for key in ("weights", "bytes")]
        width = max(_of(rows, "width", task=task, arm=EQUAL_BYTES, density=density))
        ratio = statistics.median(
            a / b
            for a, b in zip(
                *(_of(rows, "seconds", task=task, arm=arm, density=density) for arm in ("sparse", EQUAL_BYTES)),
                strict=False,
            )
        )
        mark = " *" if task in HELD_OUT else ""
        body.append(
            [
                f"{task}{mark}",
                wide,
                *scores,
                f"{gap:+.2f} ± {error:.2f}" if several else f"{gap:+.2f}",
                f"{sizes[0] / 1e3:.0f}K",
                format_bytes(sizes[1]),
                width,
                f"{ratio:.2f}",
            ]
        )
    header = ["data set", "wide dense", "sparse", "static", "dense, equal bytes", "dense, equal weights"]
    header += ["sparse - equal bytes", "weights", "bytes", "units per layer of the dense one", "time"]
    return markdown(header, body)


def _reached(curves: Sequence[Sequence[Sequence[float]]], score: float) -> float | None:
    """Seconds until the mean of the curves reaches ``score``, to a whole epoch."""
    for epoch in zip(*curves, strict=True):
        if statistics.fmean(point[1] for point in epoch) >= score:
            return statistics.fmean(point[0] for point in epoch)
    return None


def _seconds(rows: Rows) -> str:
    body = []
    for task in dict.fromkeys(row["task"] for row in rows):
        final = _of(rows, "score", task=task, arm=EQUAL_BYTES, density=0.1)
        if not final:
            continue
        score = statistics.fmean(final) - BELOW
        cells = [_reached(_of(rows, "curve", task=task, arm=arm, density=0.1), score) for arm in SHOWN]
        cells.insert(0, _reached(_of(rows, "curve", task=task, arm=WIDE), score))
        body.append([task, f"{score:.1f}", *("never" if c is None else f"{c:.1f}" for c in cells)])
    return markdown(["data set", "score", "wide dense", *(f"{arm}" for arm in SHOWN)], body)


def _lever(rows: Rows) -> str:
    """Scores of the first kind, points above it of the others."""
    tasks, arms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("task", "arm"))
    body = []
    for arm in arms:
        cells, found = [], []
        for task in tasks:
            scores = {r["seed"]: r["score"] for r in rows if (r["task"], r["arm"]) == (task, arm)}
            base = {r["seed"]: r["score"] for r in rows if (r["task"], r["arm"]) == (task, arms[0])}
            if arm == arms[0]:
                cells.append(f"{statistics.fmean(scores.values()):.2f}")
            else:
                found.append(statistics.fmean(scores[seed] - base[seed] for seed in scores.keys() & base.keys()))
                cells.append(f"{found[-1]:+.2f}")
        seconds = statistics.fmean(_of(rows, "seconds", arm=arm)) / statistics.fmean(_of(rows, "seconds", arm=arms[0]))
        body.append([arm, *cells, f"{statistics.fmean(found):+.2f}" if found else "", f"{seconds:.2f}"])
    return markdown(["", *tasks, "mean", "time"], body)


def _permutation(rows: Rows) -> str:
    """One line for each start, importance, rewiring and number of blocks; gains are paired by seed."""
    body = []
    cut = [row for row in rows if row["blocks"] in (GIVEN, GATHERED)]
    keys = ("start", "importance", "rewired", "in_a_row")
    for start, importance, rewired, r in dict.fromkeys(tuple(row[key] for key in keys) for row in cut):
        where = {"start": start, "importance": importance, "rewired": rewired, "in_a_row": r}
        kept = [f"{statistics.fmean(_of(cut, 'kept', **where, blocks=b)):.1%}" for b in (GIVEN, GATHERED)]
        given, gathered = (_of(cut, "score", **where, blocks=b) for b in (GIVEN, GATHERED))
        gains = [b - a for a, b in zip(given, gathered, strict=True)]
        error = f" ± {statistics.stdev(gains) / math.sqrt(len(gains)):.2f}" if len(gains) > 1 else ""
        others = [
            _scores(_of(rows, "score", in_a_row=r, blocks=SCRATCH, rewired=rewired)),
            _scores(_of(rows, "score", in_a_row=r, blocks=SINGLE, start=start)),
        ]
        after = "RigL" if rewired else "static"
        gain = f"{statistics.fmean(gains):+.2f}{error}"
        body.append([start, importance, after, r, *kept, _scores(given), _scores(gathered), gain, *others])
    header = ["start", "blocks by", "after the cut", "r", "kept, given order", "kept, gathered", "given order"]
    return markdown([*header, "gathered", "gain", "blocks from the start", "single weights"], body)


def _rival(rows: Rows) -> str:
    body = []
    for task in dict.fromkeys(row["task"] for row in rows):
        for density in dict.fromkeys(row["density"] for row in rows):
            for arm in dict.fromkeys(row["arm"] for row in rows):
                where = {"task": task, "density": density, "arm": arm}
                weights, seconds = (statistics.fmean(_of(rows, key, **where)) for key in ("weights", "seconds"))
                cells = [_scores(_of(rows, "score", **where)), f"{weights / 1e3:.0f}K", f"{seconds:.1f}"]
                body.append([task, f"{density:.0%}", arm, *cells])
    return markdown(["data set", "density", "", "accuracy", "weights stored", "seconds"], body)


def _times(rows: Rows) -> str:
    body = [
        [
            row["task"],
            f"{row['density']:.0%}",
            row["arm"],
            f"{row['ms']:.2f}",
            f"{row['ratio']:.2f}",
            format_bytes(row["bytes"]),
        ]
        for row in rows
    ]
    return markdown(["data set", "density", "", "ms", "over dense of equal bytes", "planned bytes"], body)


def _peaks(rows: Rows) -> str:
    body = [
        [f"{row['density']:.0%}", row["arm"], format_bytes(row["bytes"]), format_bytes(row["measured"])] for row in rows
    ]
    return markdown(["density", "", "planned", "measured"], body)


# --- figures ----------------------------------------------------------------------------------------------------------


def figures(numbers: Mapping[str, dict], folder: Path) -> list[Path]:
    """A PNG for each that has data."""
    rows = _data_rows(numbers)
    if not gaps(rows, "sparse", EQUAL_BYTES, 0.1):
        return []
    return [_draw_gaps(rows, folder / "gaps.png"), _draw_curves(rows, folder / "curves.png")]


def _draw_gaps(rows: Rows, path: Path) -> Path:
    """By data set, points above dense of equal bytes."""
    figure, axes = new_axes(7.2, 3.8)
    names: list[str] = []
    for i, (arm, density) in enumerate((("sparse", 0.1), ("sparse", 0.05), ("static", 0.1))):
        found = gaps(rows, arm, EQUAL_BYTES, density)
        names = names or list(found)
        at = [names.index(task) + 0.22 * (i - 1) for task in found if task in names]
        values = [found[task] for task in found if task in names]
        label = f"{'defaults' if arm == 'sparse' else arm}, {density:.0%}"
        axes.errorbar(
            at, [v for v, _ in values], [2 * e for _, e in values], fmt="o", color=COLOURS[i], capsize=2, label=label
        )
    axes.axhline(0, color=GREY, linewidth=1)
    axes.set_xticks(range(len(names)), [f"{n} *" if n in HELD_OUT else n for n in names], rotation=25, ha="right")
    axes.set(ylabel="points (accuracy, or 100 R²)")
    axes.set_title("Above the dense network of equal training bytes; bars are two standard errors")
    axes.legend(loc="upper right")
    return save_figure(figure, path)


def _draw_curves(rows: Rows, path: Path) -> Path:
    """Score against seconds of training at 10 %, four data sets."""
    there = dict.fromkeys(row["task"] for row in rows if row.get("density") == 0.1)
    tasks = sorted(there, key=lambda task: task not in LEVER_TASKS)[:4]
    figure, axes = new_axes(2.6 * len(tasks), 3.0, ncols=len(tasks), squeeze=False)
    for ax, task in zip(axes[0], tasks, strict=True):
        for colour, arm in zip((*COLOURS[:4], GREY), (*SHOWN, WIDE), strict=True):
            curves = _of(rows, "curve", task=task, arm=arm, **({} if arm == WIDE else {"density": 0.1}))
            x, y = ([statistics.fmean(p[k] for p in epoch) for epoch in zip(*curves, strict=True)] for k in (0, 1))
            ax.plot(x, y, color=colour, label=arm)
        highest = max(point[1] for curve in _of(rows, "curve", task=task) for point in curve)
        ax.set(title=task, xlabel="seconds of training", xscale="log", ylim=(max(0, highest - 15), highest + 1))
    axes[0][0].set_ylabel("test accuracy, %")
    axes[0][0].legend(loc="lower right", fontsize=8)
    return save_figure(figure, path)
