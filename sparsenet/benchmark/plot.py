"""Speed-up over density: ours, the ideal line 1 / density, and the rivals. matplotlib is imported only to draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsenet.benchmark.results import case_text
from sparsenet.benchmark.trial import OURS, Row
from sparsenet.plotting.style import COLOURS, load_pyplot, save_figure

__all__ = ["draw"]

_RIVALS = {  # what the legend calls them, and the colour that each has in every panel
    "dense_onednn": ("dense, oneDNN's own kernel", COLOURS[2]),
    "equal_parameter_dense": ("dense with as many weights", COLOURS[3]),
    "masked_dense": ("masked dense", COLOURS[4]),
    "torch_bsr": ("torch.sparse_bsr", COLOURS[5]),
    "sparselab": ("SparseLab", COLOURS[7]),
}
_OURS = (COLOURS[0], COLOURS[1], "#004166", "#8A5F00", "#66B8E8", "#F5CF7A")
_TITLES = {"step": "step: forward and both gradients"}


def draw(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG: a panel per phase; rows without a density or a dense time are left out.

    Raises:
        ModuleNotFoundError: matplotlib is not installed. ValueError: no row can be drawn.
    """
    rows = [row for row in rows if row.reference == "dense" and "density" in row.case]
    if not rows:
        raise ValueError("bench: plot needs a row with a density and a dense time, got none")
    pyplot = load_pyplot()
    phases = list(dict.fromkeys(row.phase for row in rows))
    columns = min(2, len(phases))
    lines = -(-len(phases) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(4.7 * columns, 3.9 * lines + 0.4), squeeze=False)
    for axes in grid.flat[len(phases) :]:
        axes.set_visible(False)
    for axes, phase in zip(grid.flat, phases, strict=False):
        _draw_phase(axes, [row for row in rows if row.phase == phase])
        axes.set_title(_TITLES.get(phase, phase))
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3 if grid.size > 1 else 2)
    save_figure(figure, path)


def _draw_phase(axes: Any, rows: Sequence[Row]) -> None:
    densities = sorted({row.case["density"] for row in rows})
    ends = [min(densities), 1.0]
    axes.plot(ends, [1 / d for d in ends], color="black", linestyle="--", linewidth=1, label="ideal: 1 / density")
    axes.axhline(1.0, color="#7F7F7F", linewidth=1.2, label="dense (nn.Linear)")
    groups = _by_case(rows)
    for number, (label, members) in enumerate(groups.items()):
        _line(axes, members, OURS, f"sparsenet{f', {label}' if label else ''}", _OURS[number % len(_OURS)], 2.0)
    first = next(iter(groups.values()))
    for name, (label, colour) in _RIVALS.items():
        if any(name in row.speedups for row in first):
            _line(axes, first, name, label, colour, 1.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("density (%)")
    axes.set_ylabel("speed-up over dense")
    ticks = [d for i, d in enumerate(densities) if i == 0 or d / densities[i - 1] > 1.3]
    axes.set_xticks(ticks, [f"{100 * d:.3g}" for d in ticks], minor=False)
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")


def _by_case(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that differ in density only, named by what tells them apart."""
    cases = [{k: v for k, v in row.case.items() if k != "density"} for row in rows]
    differs = {k for k in cases[0] if len({str(case.get(k)) for case in cases}) > 1}
    differs |= {"out", "in"} if differs & {"out", "in"} else set()
    groups: dict[str, list[Row]] = {}
    for row, case in zip(rows, cases, strict=True):
        groups.setdefault(case_text({k: v for k, v in case.items() if k in differs}), []).append(row)
    return groups


def _line(axes: Any, rows: Sequence[Row], name: str, label: str, colour: str, width: float) -> None:
    points = sorted((row.case["density"], row.speedups[name]) for row in rows if name in row.speedups)
    middle = [q.median for _, q in points]
    below = [q.median - q.lower for _, q in points]
    above = [q.upper - q.median for _, q in points]
    marks = {"marker": "o", "markersize": 4, "linewidth": width, "color": colour, "capsize": 2}
    axes.errorbar([d for d, _ in points], middle, yerr=[below, above], label=label, **marks)
