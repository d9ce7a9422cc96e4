"""Pictures of a search: accuracy against active weights with the Pareto front, parallel coordinates, best so far."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsenet.architecture.search import SearchReport

__all__ = ["plot_search"]

SERIES = ("#2a6fbb", "#d1495b", "#3a8f5c", "#8a63b5")
GREY = "#8c8c8c"


def new_axes(width: float = 6.4, height: float = 4.0, **options):
    """A figure and axes in the house style, drawn without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained", **options)
    for ax in axes.flat if hasattr(axes, "flat") else [axes]:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def save_figure(figure, path: Path) -> Path:
    """Writes a PNG at 110 dots per inch and closes the figure."""
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


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
    pruned = [t for t in report.trials if t.state == "pruned" and t.accuracy is not None]
    done = report.finished()
    ax.scatter(
        [t.active_weights for t in pruned],
        [100 * t.accuracy for t in pruned],
        s=14,
        color=GREY,
        marker="x",
        linewidths=0.9,
        label=f"stopped early ({len(pruned)})",
    )
    ax.scatter(
        [t.active_weights for t in done],
        [100 * t.accuracy for t in done],
        s=26,
        color=SERIES[0],
        label=f"finished ({len(done)})",
    )
    front = report.pareto()
    ax.step(
        [t.active_weights for t in front],
        [100 * t.accuracy for t in front],
        where="post",
        color=SERIES[1],
        linewidth=1.6,
        label="Pareto front",
    )
    lowest = min(100 * t.accuracy for t in done)
    ax.set_ylim(bottom=max(0.0, lowest - 2.0))
    ax.set_xlabel("active weights")
    ax.set_ylabel("validation accuracy (%)")
    ax.legend(frameon=False, loc="lower right")
    return save_figure(figure, path)


def _parallel_coordinates(report: SearchReport, path: Path) -> Path:
    """One line per finished trial: depth, density of each layer, active weights, accuracy."""
    import matplotlib as mpl

    done = sorted(report.finished(), key=lambda t: t.accuracy)
    depth = max(len(t.densities) for t in done)
    names = [
        "depth",
        *[f"density {i + 1}" for i in range(depth - 1)],
        "density out",
        "active\nweights",
        "accuracy\n(%)",
    ]
    rows = []
    for t in done:
        hidden = [d if d > 0 else None for d in t.densities[:-1]] + [None] * (depth - len(t.densities))
        rows.append([t.depth, *hidden, t.densities[-1], t.active_weights, 100 * t.accuracy])
    figure, ax = new_axes(8.4, 4.4)
    columns = [[r[i] for r in rows if r[i] is not None] for i in range(len(names))]
    low = [min(c) if c else 0.0 for c in columns]
    span = [(max(c) - min(c)) or 1.0 if c else 1.0 for c in columns]
    colours, scale = mpl.colormaps["viridis"], len(rows)
    for rank, row in enumerate(rows):
        points = [(i, (v - low[i]) / span[i]) for i, v in enumerate(row) if v is not None]
        colour = colours(0.92 * rank / max(1, scale - 1))
        for (i, a), (j, b) in pairwise(points):
            ax.plot((i, j), (a, b), "-" if j == i + 1 else ":", color=colour, alpha=0.8, linewidth=1.2)
    for i, (a, s) in enumerate(zip(low, span, strict=True)):
        ax.axvline(i, color="black", linewidth=0.7)
        label = {"fontsize": 7, "in_layout": False, "bbox": {"facecolor": "white", "edgecolor": "none", "pad": 1.5}}
        form = ",.0f" if max(abs(a), abs(a + s)) >= 1000 else ".3g"
        ax.text(i, -0.06, format(a, form), ha="center", va="top", **label)
        ax.text(i, 1.06, format(a + s, form), ha="center", va="bottom", **label)
    ax.set_xticks(range(len(names)), names, fontsize=8)
    ax.tick_params(axis="x", length=0)
    ax.set_ylim(-0.14, 1.14)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.spines["bottom"].set_visible(False)
    ax.grid(False)
    ax.set_title("finished trials, bright = more accurate; dotted across skipped layers", fontsize=9)
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
    ax.step(numbers, values, where="post", color=SERIES[0], linewidth=1.8, label="best so far")
    ax.set_ylim(bottom=max(0.0, min(100 * t.accuracy for t in done) - 1.0))
    ax.set_xlabel("trial")
    ax.set_ylabel("validation accuracy (%)")
    ax.legend(frameon=False, loc="lower right")
    return save_figure(figure, path)
