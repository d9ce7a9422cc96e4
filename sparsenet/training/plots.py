"""Pictures of a training run, from the files in its folder. matplotlib is imported only when something is drawn.

``draw_run(folder)`` writes ``learning.png``, ``density.png``, ``rewiring.png``, ``patterns.png`` and ``memory.png``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sparsenet.checkpoint.file import CheckpointFile
from sparsenet.plotting.style import COLOURS, load_pyplot, save_figure
from sparsenet.training.progress import read_metrics

__all__ = ["draw_run"]

_MIB = 2**20


def draw_run(folder: str | Path) -> list[Path]:
    """Draws all pictures of the run in ``folder`` and returns their paths.

    Raises:
        ModuleNotFoundError: matplotlib is not installed. FileNotFoundError: ``summary.json`` or the model is missing.
    """
    pyplot = load_pyplot()
    folder = Path(folder)
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    metrics = read_metrics(folder / "metrics.jsonl")
    figures = {
        "learning": _draw_learning(pyplot, metrics, summary),
        "density": _draw_density(pyplot, metrics, summary),
        "rewiring": _draw_rewiring(pyplot, metrics, summary),
        "patterns": _draw_patterns(pyplot, folder / "model.safetensors"),
        "memory": _draw_memory(pyplot, summary),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(save_figure(figure, folder / f"{name}.png"))
    return paths


def _of_kind(metrics: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line for line in metrics if line["kind"] == kind]


def _layer_labels(summary: Mapping[str, Any]) -> dict[str, str]:
    return {
        layer["name"]: f"layer {layer['name']} ({layer['shape'][0]} x {layer['shape'][1]})"
        for layer in summary["layers"]
    }


# --- learning -------------------------------------------------------------------------------------------------------


def _draw_learning(pyplot: Any, metrics: list[dict[str, Any]], summary: Mapping[str, Any]) -> Any:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
    train, epochs = _of_kind(metrics, "train"), _of_kind(metrics, "epoch")
    steps = [line["step"] for line in train]
    for axes, key, scale in ((left, "loss", 1.0), (right, "accuracy", 100.0)):
        noisy = np.array([line[key] for line in train]) * scale
        axes.plot(steps, noisy, color=COLOURS[0], alpha=0.25, linewidth=1)
        axes.plot(steps, _smoothed(noisy), color=COLOURS[0], label="training, running mean")
        if epochs:
            at = [line["step"] for line in epochs]
            axes.plot(
                at, [line[key] * scale for line in epochs], "o-", color=COLOURS[3], label="validation", markersize=4
            )
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
    left.set_ylabel("cross-entropy (nats)")
    left.set_ylim(bottom=0, top=_roof([line["loss"] for line in train]))
    right.set_ylabel("right answers (%)")
    test = 100 * summary["test_accuracy"]
    right.axhline(test, color=COLOURS[2], linestyle="--", linewidth=1, label=f"test at the end: {test:.2f} %")
    low = min([line["accuracy"] * 100 for line in train[len(train) // 10 :]] + [test], default=0.0)
    right.set_ylim(max(0.0, low - 5), 100)
    left.set_title("loss")
    right.set_title("accuracy")
    left.legend(loc="upper right")
    right.legend(loc="lower right")
    return figure


def _smoothed(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Running mean over up to ``width`` neighbours, shorter at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    reach = np.minimum(width // 2, np.minimum(at, len(values) - 1 - at))
    return (sums[at + reach + 1] - sums[at - reach]) / (2 * reach + 1)


def _roof(losses: list[float]) -> float | None:
    """An upper end for the loss axis that the first few steps do not stretch."""
    later = losses[max(1, len(losses) // 20) :]
    return 1.15 * max(later) if later else None


# --- topology -------------------------------------------------------------------------------------------------------


def _draw_density(pyplot: Any, metrics: list[dict[str, Any]], summary: Mapping[str, Any]) -> Any:
    figure, axes = pyplot.subplots(figsize=(6.5, 3.6))
    rewires = _of_kind(metrics, "rewire")
    for number, (name, label) in enumerate(_layer_labels(summary).items()):
        final = next(layer["density"] for layer in summary["layers"] if layer["name"] == name)
        seen = [(line["step"], line["layers"][name]["density"]) for line in rewires if name in line["layers"]]
        first = next((layer["planned_density"] for layer in summary["layers"] if layer["name"] == name), final)
        steps, densities = zip(*[(0, first), *seen, (summary["steps"], final)], strict=True)
        style = ("-", "--", "-.", ":")[number % 4]  # layers of equal density lie on each other
        axes.step(
            steps,
            [100 * d for d in densities],
            where="post",
            color=COLOURS[number % len(COLOURS)],
            linestyle=style,
            linewidth=2,
            label=f"{label}: {final:.1%}",
        )
    axes.set_ylim(0, 105)
    axes.set_xlim(0, max(1, summary["steps"]))
    axes.set_xlabel("step")
    axes.set_ylabel("active blocks (%)")
    axes.set_title(f"density per layer, {summary['density']:.1%} over all")
    figure.legend(loc="outside right center")
    return figure


def _draw_rewiring(pyplot: Any, metrics: list[dict[str, Any]], summary: Mapping[str, Any]) -> Any:
    figure, axes = pyplot.subplots(figsize=(7.5, 3.6))
    rewires = _of_kind(metrics, "rewire")
    steps = np.array([line["step"] for line in rewires])
    width = 0.8 * (np.diff(steps).min() if len(steps) > 1 else 1)
    above, below = np.zeros(len(steps)), np.zeros(len(steps))
    for number, (name, label) in enumerate(_layer_labels(summary).items()):
        colour = COLOURS[number % len(COLOURS)]
        grown = np.array([line["layers"].get(name, {}).get("grown", 0) for line in rewires], dtype=float)
        dropped = np.array([line["layers"].get(name, {}).get("dropped", 0) for line in rewires], dtype=float)
        if not grown.any() and not dropped.any():
            continue
        axes.bar(steps, grown, width, bottom=above, color=colour, label=label)
        axes.bar(steps, -dropped, width, bottom=-below, color=colour, alpha=0.55)
        above, below = above + grown, below + dropped
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlim(0, max(1, summary["steps"]))
    axes.set_xlabel("step")
    axes.set_ylabel("blocks: dropped below 0, grown above")
    axes.yaxis.set_major_formatter(lambda value, _: f"{abs(value):,.0f}")
    axes.set_title(f"{len(rewires)} rewires, {int(above.sum()):,} blocks grown, {int(below.sum()):,} dropped")
    if not rewires:
        axes.text(0.5, 0.5, "the pattern never changed", transform=axes.transAxes, ha="center")
    if above.any() or below.any():
        figure.legend(loc="outside right center")
    return figure


def _draw_patterns(pyplot: Any, model: Path) -> Any:
    with CheckpointFile(model) as file:
        layers = {name: _block_norms(file, name, sizes) for name, sizes in file.header["layers"].items()}
        sizes = file.header["layers"]
    columns = min(4, max(1, len(layers)))
    rows = -(-len(layers) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(3.1 * columns + 0.6, 3.4 * rows), squeeze=False)
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    picture = None
    for axes, (name, norms) in zip(grid.flat, layers.items(), strict=False):
        shown = np.ma.masked_invalid(norms / max(np.nanmax(norms, initial=0.0), 1e-30))
        picture = axes.imshow(shown, cmap="viridis", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
        axes.set_facecolor("white")
        axes.grid(False)
        layer = sizes[name]
        axes.set_title(f"layer {name}: {layer['density']:.1%} of {norms.shape[0]} x {norms.shape[1]} blocks")
        axes.set_xlabel("block of inputs")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.yaxis.get_major_locator().set_params(integer=True)
        if norms.shape[0] == 1:
            axes.set_yticks([0])
    for axes in grid[:, 0]:
        axes.set_ylabel("block of outputs")
    if picture is not None:
        bar = figure.colorbar(picture, ax=grid, shrink=0.9, aspect=30, pad=0.01)
        bar.set_label("norm / largest of the layer")
    figure.suptitle("active blocks at the end (white: no block)", fontsize=10)
    return figure


def _block_norms(file: CheckpointFile, name: str, sizes: Mapping[str, Any]) -> np.ndarray:
    """[block rows, block columns]: norms of the active blocks of a layer, NaN elsewhere."""
    prefix = f"{name}." if name else ""
    crow = file.tensor(prefix + "crow_indices").numpy()
    col = file.tensor(prefix + "col_indices").numpy()
    norms = np.full((len(crow) - 1, -(-sizes["in_features"] // sizes["block_size"])), np.nan)
    rows = np.repeat(np.arange(len(crow) - 1), np.diff(crow))
    norms[rows, col] = file.tensor(prefix + "values").float().flatten(1).norm(dim=1).numpy()
    return norms


# --- memory ---------------------------------------------------------------------------------------------------------


def _draw_memory(pyplot: Any, summary: Mapping[str, Any]) -> Any:
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    _draw_items(left, summary)
    _draw_phases(right, summary)
    return figure


def _draw_items(axes: Any, summary: Mapping[str, Any]) -> None:
    """Stacked bars: what takes the predicted and the measured peak, and the dense network's below them."""
    memory = summary["memory"]
    predicted = {name: count for name, count in memory["predicted_items"].items() if count}
    measured = dict(memory["measured_items"])
    measured["not told apart"] = max(0, summary["measured_peak_bytes"] - sum(measured.values()))
    small = summary["predicted_peak_bytes"] / 100
    names = [n for n in memory["measured_items"] if n in predicted]  # first what can be compared
    names += [n for n in sorted(predicted, key=lambda n: -predicted[n]) if n not in names] + ["not told apart"]
    names = [n for n in names if max(predicted.get(n, 0), measured.get(n, 0)) > small]
    left = np.zeros(2)
    for number, name in enumerate(names):
        widths = np.array([predicted.get(name, 0), measured.get(name, 0)]) / _MIB
        colour = "#D9D9D9" if name == "not told apart" else COLOURS[number % len(COLOURS)]
        axes.barh([0, 1], widths, 0.6, left=left, color=colour, label=name)
        left = left + widths
    dense = summary["dense_peak_bytes"] or summary["dense_predicted_bytes"]
    how = "measured" if summary["dense_peak_bytes"] else "predicted"
    axes.barh([2], [dense / _MIB], 0.6, color="white", edgecolor="#7F7F7F", hatch="///", label="the same network dense")
    totals = (summary["predicted_peak_bytes"] / _MIB, summary["measured_peak_bytes"] / _MIB, dense / _MIB)
    for at, total in enumerate(totals):
        axes.annotate(f"{total:.1f}", (total, at), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks([0, 1, 2], ["predicted", "measured", f"dense\n({how})"])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.13 * max(totals))
    axes.set_xlabel("MiB")
    axes.grid(axis="y", visible=False)
    axes.set_title(f"the peak by item (predicted: {memory['moment']})")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=3, fontsize=8)


def _draw_phases(axes: Any, summary: Mapping[str, Any]) -> None:
    """Pairs of bars, predicted and measured, for each phase of a training step; the budget as a line."""
    memory = summary["memory"]
    predicted, measured = memory["predicted_phases"], memory["measured_phases"]
    names = list(predicted)
    largest = max([*predicted.values(), *measured.values(), summary.get("budget_bytes") or 1]) / _MIB
    for offset, values, colour, label, ink in (
        (-0.2, predicted, COLOURS[5], "predicted", "black"),
        (0.2, measured, COLOURS[0], "measured", "white"),
    ):
        widths = [values.get(name, 0) / _MIB for name in names]
        bars = axes.barh(np.arange(len(names)) + offset, widths, 0.38, color=colour, label=label)
        axes.bar_label(bars, [f"{w:.1f}" if w else "" for w in widths], padding=-30, fontsize=7.5, color=ink)
    if summary.get("budget_bytes"):
        budget = summary["budget_bytes"] / _MIB
        axes.axvline(budget, color="black", linestyle="--", linewidth=1, label=f"budget: {budget:g} MiB")
    axes.set_yticks(np.arange(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("MiB")
    axes.set_xlim(0, 1.05 * largest)
    axes.grid(axis="y", visible=False)
    axes.set_title("the peak by phase of a training step")
    axes.legend(loc="upper center", bbox_to_anchor=(0.45, -0.16), ncols=3, fontsize=8)
