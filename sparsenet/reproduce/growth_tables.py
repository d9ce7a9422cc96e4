"""Tables and figures of ``sparsenet reproduce growth``."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from sparsenet.plotting.style import COLOURS, GREY, new_axes, save_figure
from sparsenet.reproduce.growth_stops import DENSITIES, WITHIN
from sparsenet.reproduce.parts import markdown, spread, times_table, verdict

__all__ = ["figures", "tables"]

Rows = Sequence[Mapping]


def _of(rows: Rows, key: str, **where) -> list[float]:
    return [row[key] for row in rows if all(row[k] == v for k, v in where.items())]


def _mean(rows: Rows, key: str, **where) -> float:
    found = _of(rows, key, **where)
    return statistics.fmean(found) if found else float("nan")


def _kinds(rows: Rows, key: str = "kind") -> list:
    return list(dict.fromkeys(row[key] for row in rows))


# --- checks: id, what, target, ours, met ------------------------------------------------------------------------------

Check = tuple[str, str, str, str, bool]


def _d1(rows: Rows) -> Iterable[Check]:
    ours, magnitude = (_mean(rows, "score", kind=k) for k in ("WoodFisher with update", "magnitude"))
    yield "D1", "80 % at once, WoodFisher with update, accuracy", ">= 85", f"{ours:.1f}", ours >= 85
    yield "D1", "the same over magnitude, points", ">= 15", f"{ours - magnitude:.1f}", ours - magnitude >= 15


def _d2(rows: Rows) -> Iterable[Check]:
    for density, least in ((0.05, 2), (0.02, 5), (0.01, 12)):
        obd, magnitude = (_mean(rows, "score", kind=k, density=density) for k in ("OBD", "magnitude"))
        gain = obd - magnitude
        text = f"{gain:.1f} ({obd:.1f} against {magnitude:.1f})"
        yield "D2", f"{1 - density:.0%} in ten stages, OBD over magnitude, points", f">= {least}", text, gain >= least


def _d3(rows: Rows) -> Iterable[Check]:
    for density, least in ((0.05, 0.2), (0.02, 0.6), (0.01, 2.0)):
        for kind, what in (("RigL", "RigL"), ("Fisher", "the same, dropped by Fisher,")):
            if _of(rows, "score", kind=kind):
                rewired, static = (_mean(rows, "score", kind=k, density=density) for k in (kind, "static"))
                text = f"{rewired - static:.2f} ({rewired:.1f} against {static:.1f})"
                yield (
                    "D3",
                    f"{what} over static at {density:.0%}, points",
                    f">= {least}",
                    text,
                    rewired - static >= least,
                )


def _d4(rows: Rows) -> Iterable[Check]:
    for density, least in ((0.1, 95), (0.05, 91)):
        rigl, static = (_mean(rows, "score", kind=k, density=density) for k in ("RigL", "static"))
        text = f"{rigl:.1f} (static {static:.1f})"
        yield "D4", f"digits, RigL at {density:.0%}, accuracy", f">= {least}", text, rigl >= least


def _d5(rows: Rows) -> Iterable[Check]:
    grown, full = "grown, continuous", "75 units from the start"
    score, share = _mean(rows, "score", kind=grown), _mean(rows, "flops", kind=grown) / _mean(rows, "flops", kind=full)
    text = f"{score:.2f} (75 from the start {_mean(rows, 'score', kind=full):.2f})"
    yield "D5", "784-8 grown to 75 units, accuracy", ">= 88.0", text, score >= 88.0
    if pairs := _of(rows, "score", kind="grown, by pairs"):
        pair = statistics.fmean(pairs)
        yield "D5", "the same, born in pairs", ">= 88.0", f"{pair:.2f}", pair >= 88.0
    yield "D5", "its training FLOPs over those of 75 from the start", "<= 0.9", f"{share:.2f}", share <= 0.9
    gap = score - _mean(rows, "score", kind="grown, in phases")
    yield "D6", "continuous minus in phases, points", ">= -0.2", f"{gap:.2f}", gap >= -0.2
    for kind, how in (("grown, every 200 steps", ""), ("grown, by pairs, every 200 steps", ", born in pairs")):
        if ratios := [ratio for row in rows if row["kind"] == kind for ratio in row["ratios"]]:
            middle = statistics.median(ratios)
            asked = f"newborn over incumbent gradient, 200 steps on, units{how}, median"
            yield "D11", asked, ">= 0.5", f"{middle:.2f}", middle >= 0.5


def _d7(rows: Rows) -> Iterable[Check]:
    for resource in ("bytes", "milliseconds"):
        for share in (0.5, 2.0):
            found = [row for row in rows if row["resource"] == resource and row["share"] == share]
            achieved, worst = (_mean(found, key) for key in ("achieved", "worst"))
            met = abs(achieved - 1) <= 0.05 and worst <= 1.02
            text = f"{achieved:.3f}, worst {worst:.3f}"
            yield (
                "D7",
                f"{resource} capped at {share:.0%} of the start, achieved over asked",
                "1 ± 0.05, worst 1.02",
                text,
                met,
            )


def _d8(rows: Rows) -> Iterable[Check]:
    for name in _kinds(rows, "task"):
        dense, grown = (_mean(rows, "score", task=name, kind=k) for k in ("dense", "grown"))
        share = _mean(rows, "weights", task=name, kind="grown") / _mean(rows, "weights", task=name, kind="dense")
        regression = name in ("diabetes", "Friedman-1", "Mackey-Glass")
        least = -2.0 if regression else -1.0
        text = f"{grown:.1f} against {dense:.1f}, {share:.0%} of the weights"
        asked = f">= dense {least:+.0f}, <= 20 %"
        yield (
            "D8",
            f"{name}, {'100 R²' if regression else 'accuracy'}",
            asked,
            text,
            grown - dense >= least and share <= 0.205,
        )


def _d9(rows: Rows, data: str) -> Iterable[Check]:
    if rows:
        drop = _mean(rows, "score", kind="dense") - _mean(rows, "score", kind="90 % sparse")
        yield "D9", f"{data}, 90 % sparse below dense, points", "<= 1", f"{drop:.2f}", drop <= 1


def _d10(rows: Rows, what: str, least: float, key: str, most: int) -> Iterable[Check]:
    score, size = _mean(rows, "score"), max(_of(rows, key))
    text = f"{score:.2f} at {size:,}"
    yield "D10", f"MNIST, {what}, accuracy", f">= {least} at <= {most:,}", text, score >= least and size <= most


def _d12(rows: Rows, ours: Rows) -> Iterable[Check]:
    if rows and ours:
        mine, theirs = _mean(ours, "score", kind="grown, continuous"), _mean(rows, "score")
        yield (
            "D12",
            "grown as in D5, against gromo at equal FLOPs",
            ">= gromo",
            f"{mine:.2f} against {theirs:.2f}",
            mine >= theirs,
        )


def _d13(rows: Rows) -> Iterable[Check]:
    for name in _kinds(rows, "task"):
        best = max(_mean(rows, "score", task=name, density=d) for d in DENSITIES)
        chosen = min(d for d in DENSITIES if _mean(rows, "score", task=name, density=d) >= best - WITHIN)
        found = _mean(rows, "found", task=name, density="stops itself")
        swept = sum(_mean(rows, "flops", task=name, density=d) for d in DENSITIES)
        share = _mean(rows, "flops", task=name, density="stops itself") / swept
        score = _mean(rows, "score", task=name, density="stops itself")
        text = f"{found:.3f} against {chosen}, {share:.0%} of the FLOPs, {score:.1f} against {best:.1f}"
        met = abs(found - chosen) <= 0.2 * chosen and share <= 0.3
        yield "D13", f"{name}, density that stops itself", "within 20 % of the sweep's, <= 30 % of its FLOPs", text, met


def checks(numbers: Mapping[str, dict]) -> list[Check]:
    """Every check whose part has been run."""
    makers: dict[str, Callable[[Rows], Iterable[Check]]] = {
        "d1_one_shot": _d1,
        "d2_gradual": _d2,
        "d3_rewired_fashion": _d3,
        "d4_rewired_digits": _d4,
        "d5_growth": _d5,
        "d7_budgets": _d7,
        "d8_tables": _d8,
        "d9_cifar": partial(_d9, data="CIFAR-10"),
        "d9_cifar100": partial(_d9, data="CIFAR-100"),
        "d10_mlp": lambda rows: _d10(rows, "MLP, weights", 98.0, "weights", 20_000),
        "d10_convolutional": lambda rows: _d10(rows, "convolutional, parameters", 99.3, "parameters", 6_200),
        "d12_gromo": lambda rows: _d12(rows, numbers.get("d5_growth", {}).get("rows", [])),
        "d13_stops": _d13,
    }
    return [check for part, make in makers.items() if part in numbers for check in make(numbers[part]["rows"])]


def tables(numbers: Mapping[str, dict]) -> str:
    """All tables as Markdown."""
    rows = [[name, what, asked, ours, verdict(met)] for name, what, asked, ours, met in checks(numbers)]
    parts = ["### Checks\n\n" + markdown(["", "what", "asked", "ours", ""], rows)]
    if "d3_rewired_fashion" in numbers:
        rewired = _rewired(numbers["d3_rewired_fashion"]["rows"])
        parts.append("### Single weights of 784-300-100-10 (Fashion-MNIST)\n\n" + rewired)
    if "d5_growth" in numbers:
        parts.append(
            "### Growth on Fashion-MNIST, 784-8-10 to 75 units, 15 epochs\n\n" + _growth(numbers["d5_growth"]["rows"])
        )
    if "d8_tables" in numbers:
        parts.append("### Tables and made problems (accuracy, or 100 R²)\n\n" + _tables(numbers["d8_tables"]["rows"]))
    if "start_points" in numbers:
        parts.append(
            "### One budget, three starts (Fashion-MNIST, 8 MiB)\n\n" + _starts(numbers["start_points"]["rows"])
        )
    for part in numbers:
        if numbers[part].get("skipped"):
            parts.append(f"**{part} was skipped**: {numbers[part]['skipped']}.")
    return "\n\n".join([*parts, times_table(numbers)])


def _rewired(rows: Rows) -> str:
    densities = _kinds(rows, "density")
    body = [[k, *(spread(_of(rows, "score", kind=k, density=d)) for d in densities)] for k in _kinds(rows)]
    return markdown(["exchanged, at first 30 %", *(f"at {d:.0%}" for d in densities)], body)


def _growth(rows: Rows) -> str:
    full = _mean(rows, "flops", kind="75 units from the start")
    body = [
        [
            kind,
            spread(_of(rows, "score", kind=kind)),
            f"{_mean(rows, 'flops', kind=kind) / full:.2f}",
            f"{_mean(rows, 'seconds', kind=kind):.0f}",
        ]
        for kind in _kinds(rows)
    ]
    return markdown(["network", "accuracy", "FLOPs", "seconds"], body)


def _tables(rows: Rows) -> str:
    kinds = _kinds(rows)
    body = []
    for name in _kinds(rows, "task"):
        weights = _mean([r for r in rows if "weights" in r], "weights", task=name, kind="grown")
        body.append([name, *(spread(_of(rows, "score", task=name, kind=kind), 1) for kind in kinds), f"{weights:.0f}"])
    return markdown(["task", *kinds, "weights grown"], body)


def _starts(rows: Rows) -> str:
    body = [
        [
            kind,
            spread(_of(rows, "score", kind=kind)),
            f"{_mean(rows, 'parameters', kind=kind):,.0f}",
            f"{_mean(rows, 'seconds', kind=kind):.0f}",
            " / ".join("-".join(map(str, row["sizes"])) for row in rows if row["kind"] == kind),
        ]
        for kind in _kinds(rows)
    ]
    return markdown(["start", "accuracy", "parameters", "seconds", "hidden widths found"], body)


# --- figures ----------------------------------------------------------------------------------------------------------


def figures(numbers: Mapping[str, dict], folder: Path) -> list[Path]:
    """A PNG for each part that has one."""
    made = []
    if "d5_growth" in numbers:
        made.append(_draw_growth(numbers["d5_growth"]["rows"], folder / "growth.png"))
    if "d8_tables" in numbers:
        made.append(_draw_tables(numbers["d8_tables"]["rows"], folder / "tables.png"))
    if "d13_stops" in numbers:
        made.append(_draw_stops(numbers["d13_stops"]["rows"], folder / "stops.png"))
    return made


def _draw_growth(rows: Rows, path: Path) -> Path:
    figure, axes = new_axes(6.4, 3.6)
    full = _mean(rows, "flops", kind="75 units from the start")
    for i, kind in enumerate(_kinds(rows)):
        found = [row for row in rows if row["kind"] == kind]
        x = [row["flops"] / full for row in found]
        style = {"color": COLOURS[i % len(COLOURS)], "marker": "o" if i < len(COLOURS) else "D"}
        axes.plot(x, [row["score"] for row in found], linestyle="", label=kind, **style)
    axes.axhline(88.0, color=GREY, linewidth=1, linestyle="--")
    axes.set(xlabel="training FLOPs, 75 units from the start = 1", ylabel="test accuracy, %")
    axes.set_title("784-8-10 grown to 75 units on Fashion-MNIST (dashed: asked)")
    axes.legend(loc="upper left")
    return save_figure(figure, path)


def _draw_tables(rows: Rows, path: Path) -> Path:
    names, kinds = _kinds(rows, "task"), _kinds(rows)
    figure, axes = new_axes(7.2, 4.0)
    for i, (colour, kind) in enumerate(zip(COLOURS, kinds, strict=False)):
        x = [j + (i - 1.5) * 0.2 for j in range(len(names))]
        axes.bar(x, [_mean(rows, "score", task=name, kind=kind) for name in names], 0.2, color=colour, label=kind)
    axes.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axes.set(ylabel="accuracy, or 100 R², %", ylim=(0, 105))
    axes.set_title("Grown networks of a fifth of the weights, nothing tuned for a task")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=4)
    return save_figure(figure, path)


def _draw_stops(rows: Rows, path: Path) -> Path:
    names = _kinds(rows, "task")
    figure, axes = new_axes(3.0 * len(names), 3.0, ncols=len(names), squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        ax.plot(
            DENSITIES, [_mean(rows, "score", task=name, density=d) for d in DENSITIES], "o-", color=GREY, label="sweep"
        )
        stopped = [row for row in rows if row["task"] == name and row["density"] == "stops itself"]
        ax.plot(
            [r["found"] for r in stopped], [r["score"] for r in stopped], "D", color=COLOURS[3], label="stops itself"
        )
        ax.set(xscale="log", xlabel="density", title=name, xlim=(0.8 * DENSITIES[0], 1.2))
        ax.set_xticks(DENSITIES, [f"{density:g}" for density in DENSITIES])
        ax.minorticks_off()
    axes[0][0].set_ylabel("test score, %")
    axes[0][0].legend()
    return save_figure(figure, path)
