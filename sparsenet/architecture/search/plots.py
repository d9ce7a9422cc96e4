"""Pictures of a search: accuracy against active weights with the Pareto front, parallel coordinates, best so far."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

from sparsenet.architecture.search.report import SearchReport
from sparsenet.plotting.style import COLOURS, GREY, new_axes, save_figure

__all__ = ["plot_search"]


def plot_search(report: SearchReport, folder: Path) -> list[Path]:
    """The three plots of ``report`` as PNG files in ``folder``; empty when no trial finished."""
    if not report.finished():
        return []
    return [
        _accuracy_against_weights(report, folder / "accuracy_against_weights.png"),
        _parallel_coordinates(report, folder / "parallel_coordinates.png"),
        _best_so_far(report, folder / "best_so_far.png"),
    ]


def _accuracy_against_weights(report: SearchReport, path: Path) -> Path:
    figure, ax = new_axes()
    stopped, done, front = report.stopped(), report.finished(), report.pareto()
    for trials, label, style in (
        (
            stopped,
            f"stopped early, where they stopped ({len(stopped)})",
            {"s": 18, "color": GREY, "marker": "x", "linewidths": 1},
        ),
        (done, f"finished ({len(done)})", {"s": 28, "color": COLOURS[0]}),
    ):
        if trials:
            ax.scatter([t.active_weights for t in trials], [100 * t.accuracy for t in trials], label=label, **style)
    ax.step(
        [t.active_weights for t in front],
        [100 * t.accuracy for t in front],
        where="post",
        color=COLOURS[1],
        linewidth=1.6,
        marker="o",
        markersize=9,
        markerfacecolor="none",
        label="Pareto front",
    )
    # trials stopped after an epoch can be far below: the lowest quarter is not worth the space
    lowest = sorted(100 * t.accuracy for t in (*stopped, *done))
    ax.set_ylim(bottom=min(min(100 * t.accuracy for t in done), lowest[len(lowest) // 4]) - 0.5)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    ax.set_xlabel("active weights")
    ax.set_ylabel("validation accuracy (%)")
    ax.legend(frameon=False, loc="best", fontsize=8)
    return save_figure(figure, path)


def _parallel_coordinates(report: SearchReport, path: Path) -> Path:
    """One line per trial: depth, density of each layer (logarithmic), active weights, accuracy; stopped ones faint."""
    import matplotlib as mpl

    trials = [*report.stopped(), *sorted(report.finished(), key=lambda t: t.accuracy)]
    hidden = max(len(t.densities) for t in trials) - 1
    names = ["depth", *[f"density {i + 1}" for i in range(hidden)], "density out", "active\nweights", "accuracy\n(%)"]
    rows = []
    for t in trials:
        densities = [math.log10(d) if d > 0 else None for d in t.densities[:-1]]
        densities += [None] * (hidden - len(densities))
        rows.append([t.depth, *densities, math.log10(t.densities[-1]), t.active_weights, 100 * t.accuracy])
    columns = [[r[i] for r in rows if r[i] is not None] or [0.0] for i in range(len(names))]
    low, span = [min(c) for c in columns], [max(c) - min(c) for c in columns]
    figure, ax = new_axes(8.4, 4.4)
    first = len(report.stopped())
    for rank, row in enumerate(rows):
        points = [(i, (v - low[i]) / span[i] if span[i] else 0.5) for i, v in enumerate(row) if v is not None]
        done = rank >= first
        colour = mpl.colormaps["viridis"](0.92 * (rank - first) / max(1, len(rows) - first - 1)) if done else GREY
        style = {"color": colour, "alpha": 0.9 if done else 0.3, "linewidth": 1.6 if done else 0.8}
        for (i, a), (j, b) in pairwise(points):
            ax.plot((i, j), (a, b), "-" if j == i + 1 else ":", **style)
    for i, (a, s) in enumerate(zip(low, span, strict=True)):
        ax.axvline(i, color="black", linewidth=0.7)
        ends = (10**a, 10 ** (a + s)) if 0 < i <= hidden + 1 else (a, a + s)
        form = ",.0f" if max(map(abs, ends)) >= 1000 else ".3g"
        label = {"fontsize": 7, "in_layout": False, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.5}}
        if s:
            ax.text(i, -0.06, format(ends[0], form), ha="center", va="top", **label)
        ax.text(i, 1.06, format(ends[1], form), ha="center", va="bottom", **label)
    ax.set_xticks(range(len(names)), names, fontsize=8)
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(-0.14, 1.14)
    ax.set_yticks([])
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.grid(False)
    ax.set_title(
        "finished trials in colour, bright = more accurate; stopped ones grey; dotted: no such layer", fontsize=9
    )
    return save_figure(figure, path)


def _best_so_far(report: SearchReport, path: Path) -> Path:
    figure, ax = new_axes()
    done = report.finished()
    best, values = -1.0, []
    for t in done:
        best = max(best, 100 * t.accuracy)
        values.append(best)
    numbers = [t.number + 1 for t in done]
    ax.scatter(numbers, [100 * t.accuracy for t in done], s=16, color=GREY, label="finished trial")
    ax.step(numbers, values, where="post", color=COLOURS[0], linewidth=1.8, label="best so far")
    ax.set_ylim(bottom=max(0.0, min(100 * t.accuracy for t in done) - 1.0))
    ax.set_xlabel("trial")
    ax.set_ylabel("validation accuracy (%)")
    ax.legend(frameon=False, loc="lower right")
    return save_figure(figure, path)
