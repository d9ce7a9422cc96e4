"""Pictures of a network that gets smaller: units, time per step and bytes. matplotlib is imported only to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sparsenet.compaction.history import Interval
from sparsenet.plotting.style import COLOURS, new_axes, save_figure

__all__ = ["plot_compaction"]


def plot_compaction(intervals: Sequence[Interval], path: Path) -> Path:
    """Units per layer, time per step and bytes over the steps, as one PNG; returns ``path``.

    Raises ValueError before the first check.
    """
    if not intervals:
        raise ValueError("plot_compaction: intervals must hold at least one check, got none")
    figure, (units, seconds, size) = new_axes(11.0, 3.4, ncols=3)
    names = [name for name, count in intervals[0].units.items() if count > 1]
    for number, name in enumerate(names):
        known = [(i, i.units[name]) for i in intervals if name in i.units]
        colour = COLOURS[number % len(COLOURS)]
        style = ("-", "--", ":", "-.")[number // len(COLOURS) % 4]
        _steps(units, [i for i, _ in known], [n for _, n in known], color=colour, linestyle=style, label=name)
    units.set_yscale("log", base=2)
    units.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    units.set_ylabel("units")
    if len(names) <= 12:
        units.legend(frameon=False, fontsize=7, title="layer", title_fontsize=7)
    _steps(seconds, intervals, [1e3 * i.seconds_per_step for i in intervals], color=COLOURS[1])
    seconds.set_ylabel("time per step (ms)")
    seconds.set_ylim(bottom=0)
    _steps(size, intervals, [i.bytes / 2**20 for i in intervals], color=COLOURS[2])
    size.set_ylabel("weights, gradients, optimizer (MiB)")
    size.set_ylim(bottom=0)
    for axes in (units, seconds, size):
        axes.set_xlabel("step")
    return save_figure(figure, path)


def _steps(axes, intervals: Sequence[Interval], values: Sequence[float], **style: Mapping) -> None:
    """One level per interval."""
    edges = [*(i.begin for i in intervals), intervals[-1].end]
    axes.plot(edges, [*values, values[-1]], drawstyle="steps-post", linewidth=1.6, **style)
