"""Pictures of ``sparsenet reproduce gates``."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sparsenet.plotting.style import COLOURS, GREY, new_axes, save_figure
from sparsenet.reproduce.published_gates import PUBLISHED_CLASSES

__all__ = ["draw"]


def draw(numbers: Mapping[str, dict], folder: Path) -> list[Path]:
    """The figures of ``reproduce gates``; none, and a line that says so, without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"reproduce gates: no figures, {error}; pip install 'sparsenet[plot]'")
        return []
    made = []
    for part, draw_part in _FIGURES.items():
        if part in numbers:
            made.append(draw_part(_with_reference(part, numbers), folder / f"{part}.png"))
    return made


def _with_reference(part: str, numbers: Mapping[str, dict]) -> dict:
    """The numbers of a part; the relatives of tri-state gates beside those."""
    if part != "b10_relatives" or "b2_fashion" not in numbers:
        return numbers[part]
    own = [{**row, "gates": "tri_state"} for row in numbers["b2_fashion"]["learnt"] if row["name"] == "fc"]
    return {**numbers[part], "rows": [*own, *numbers[part]["rows"]]}


def _plain_log(axis) -> None:
    """A logarithmic axis with 10, 20, 50, 100, ... as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def _band(axes, rows: Sequence[Mapping], key: str, value: Callable[[Mapping], float], **style) -> None:
    """Mean over seeds with a band of one standard deviation."""
    x = sorted({row[key] for row in rows})
    values = [[value(row) for row in rows if row[key] == at] for at in x]
    centre = [statistics.fmean(v) for v in values]
    half = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    axes.plot(x, centre, marker="o", markersize=3.5, linewidth=1.5, **style)
    low, high = ([c + sign * h for c, h in zip(centre, half, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=style["color"], alpha=0.18, linewidth=0)


def _strengths(part: dict, path: Path) -> Path:
    """Units over training, one line per strength, mean over seeds."""
    figure, axes = new_axes(7.2, 4.2)
    pairs = list(dict.fromkeys((row["lambda_1"], row["lambda_3"]) for row in part["rows"]))
    for number, (one, three) in enumerate(pairs):
        runs = [row for row in part["rows"] if (row["lambda_1"], row["lambda_3"]) == (one, three)]
        units = [
            statistics.fmean(counts) for counts in zip(*([o[-1] for o in row["open"]] for row in runs), strict=True)
        ]
        style = {"color": COLOURS[number % len(COLOURS)], "linestyle": "-" if three / one >= 1 else "--"}
        axes.plot(
            runs[0]["steps"], units, linewidth=1.6, label=f"$\\lambda_1$={one:g}, $\\lambda_3$={three:g}", **style
        )
    axes.set_yscale("log")
    _plain_log(axes.yaxis)
    axes.set_xlabel("step")
    axes.set_ylabel("open units of 500")
    axes.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def _classes(part: dict, path: Path) -> Path:
    figure, (left, right) = new_axes(8.6, 3.4, ncols=2)
    _band(left, part["rows"], "classes", lambda row: row["widths"][2], color=COLOURS[0], label="ours")
    _band(right, part["rows"], "classes", lambda row: 100 - row["accuracy"], color=COLOURS[1])
    if "mnist" in path.stem:
        left.plot(*zip(*PUBLISHED_CLASSES.items(), strict=True), "s--", color=GREY, markersize=3.5, label="paper")
        left.legend(frameon=False)
    left.set_ylabel("learnt neurons of 500")
    right.set_ylabel("test error (%)")
    for axes in (left, right):
        axes.set_xlabel("classes")
    return save_figure(figure, path)


def _depths(part: dict, path: Path) -> Path:
    figure, (left, right) = new_axes(8.6, 3.4, ncols=2)
    _band(left, part["rows"], "initial", lambda row: row["final"], color=COLOURS[0], label="learnt")
    starts = sorted({row["initial"] for row in part["rows"]})
    left.plot(starts, starts, "--", color=GREY, label="initial")
    left.set_ylabel("layers with weights")
    left.legend(frameon=False)
    _band(right, part["rows"], "initial", lambda row: 100 - row["accuracy"], color=COLOURS[1])
    right.set_ylabel("test error (%)")
    right.set_ylim(bottom=0)
    left.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xlabel("initial depth")
        axes.set_xticks(starts)
    return save_figure(figure, path)


def _bayesian(part: dict, path: Path) -> Path:
    """Costs of the optimiser's runs, best so far, and the level that one run with gates reaches."""
    names = list(dict.fromkeys(run["name"] for run in part["bayesian"]))
    figure, both = new_axes(8.6, 3.4, ncols=2)
    for axes, name in zip(both, names, strict=True):
        runs = [[c["cost"] for c in run["costs"]] for run in part["bayesian"] if run["name"] == name]
        for seed, costs in enumerate(runs):
            best = list(itertools.accumulate(costs, min))
            number = range(1, len(costs) + 1)
            axes.plot(number, costs, ".", color=GREY, markersize=4, label=None if seed else "each run of BO")
            axes.step(
                number, best, where="post", color=COLOURS[0], linewidth=1.2, label=None if seed else "best so far"
            )
        for seed, own in enumerate(g for g in part["gates"] if g["name"] == name):
            axes.axhline(own["cost"], color=COLOURS[1], linewidth=1.2, label=None if seed else "one run with gates")
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("trainings")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_yscale("log")
        _plain_log(axes.yaxis)
    both[0].set_ylabel("loss + 1e-5 units")
    both[1].legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def _relatives(part: dict, path: Path) -> Path:
    figure, axes = new_axes(6.4, 3.8)
    for number, kind in enumerate(dict.fromkeys(row["gates"] for row in part["rows"])):
        own = [row for row in part["rows"] if row["gates"] == kind]
        points = ([row["widths"][2] for row in own], [row["accuracy"] for row in own])
        axes.scatter(*points, s=24, marker="osD^"[number], color=COLOURS[number], label=kind.replace("_", " "))
    axes.set_xscale("log")
    _plain_log(axes.xaxis)
    axes.set_xlabel("units left of 500")
    axes.set_ylabel("test accuracy (%)")
    axes.legend(frameon=False)
    return save_figure(figure, path)


def _running(part: dict, path: Path) -> Path:
    """Units, time per step and bytes of every race."""
    races = part["races"]
    figure, grid = new_axes(11.0, 3.2 * len(races), ncols=3, nrows=len(races), squeeze=False)
    for (name, race), (units, seconds, size) in zip(races.items(), grid, strict=True):
        rows = race["rows"]
        edges = [0, *(row["step"] for row in rows)]
        for number, layer in enumerate(rows[0]["units"]):
            counts = [row["units"][layer] for row in rows]
            colour = COLOURS[number % len(COLOURS)]
            units.plot(edges, [*counts, counts[-1]], drawstyle="steps-post", color=colour, label=f"layer {layer}")
        units.set_yscale("log", base=2)
        units.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        units.set_ylabel(f"{name}\nunits")
        for side, colour in (("whole", GREY), ("compacted", COLOURS[1])):
            taken = [1e3 * row[side] for row in rows]
            seconds.plot(edges, [*taken, taken[-1]], drawstyle="steps-post", color=colour, label=side)
            held = [row["bytes" if side == "compacted" else "bytes_whole"] / 2**20 for row in rows]
            size.plot(edges, [*held, held[-1]], drawstyle="steps-post", color=colour, label=side)
        for axes, label in ((seconds, "ms per step"), (size, "MiB")):
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
        for axes in (units, seconds, size):
            axes.legend(frameon=False, fontsize=7)
            axes.set_xlabel("step")
    return save_figure(figure, path)


_FIGURES: dict[str, Callable[[dict, Path], Path]] = {
    "strengths": _strengths,
    "b4_classes_mnist": _classes,
    "b4_classes_fashion": _classes,
    "b8_depth": _depths,
    "bayesian": _bayesian,
    "b10_relatives": _relatives,
    "running_process": _running,
}
