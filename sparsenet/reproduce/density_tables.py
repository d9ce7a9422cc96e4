"""Tables and figures of ``sparsenet reproduce density``: every number beside its target."""

from __future__ import annotations

import statistics
from pathlib import Path

from sparsenet.plotting.style import COLOURS, GREY, new_axes, save_figure
from sparsenet.reproduce.parts import markdown, spread, times_table, verdict

__all__ = ["figures", "tables"]

COLOUR_OF = {"sparse": COLOURS[3], "dense": COLOURS[0]}
# Digitised from the poster (METHODS 1.8): sparse, mean over all epochs, at 100 % and 10 % of MNIST's training data.
POSTER_SPARSE = {
    "a2_mnist": {3970: 86.5, 7940: 92.5, 19850: 95.6, 39700: 96.7, 59550: 97.06, 75430: 97.14},
    "a2_mnist_tenth": {3970: 70.6, 7940: 83.6, 19850: 89.9, 59550: 92.3, 75430: 92.8},
}
POSTER_DEPTHS = {1: 96.6, 2: 96.4, 4: 95.6, 8: 91.6, 16: 13.4, 32: 11.3}
TITLES = {
    "a2_fashion": "Fashion-MNIST",
    "a2_mnist": "MNIST",
    "a2_mnist_tenth": "a tenth of MNIST",
    "a6_fashion": "Fashion-MNIST",
    "a6_mnist": "MNIST",
}


def tables(numbers: dict[str, dict]) -> str:
    """All tables of the parts that have been run, as Markdown."""
    parts = [_checks(numbers), _searches(numbers)]
    parts += [_capacity(name, numbers[name]) for name in numbers if name.startswith("a2_")]
    parts += [_depths(name, numbers[name]) for name in numbers if name.startswith("a6_")]
    if "pareto" in numbers:
        rows = [[n, depth, f"{acc:.2f}", f"{loss:.4f}"] for n, depth, acc, loss in numbers["pareto"]["front"]]
        title = f"### Pareto front of {numbers['pareto']['trials']} trials, MNIST, a third of the data, 6 epochs"
        parts.append(f"{title}\n\n{markdown(['active weights', 'hidden layers', 'validation acc %', 'loss'], rows)}")
    for name, space in (("a4_estimators", "ReLU only"), ("a4_whole_space", "linear layers and three activations")):
        if name in numbers:
            parts.append(_estimators(numbers[name], space))
    return "\n\n".join(p for p in [*parts, times_table(numbers)] if p)


def _checks(numbers: dict[str, dict]) -> str:
    rows: list[list[object]] = []
    if one := numbers.get("a1_counts"):
        rows.append(["A1", "N = 794 u exactly; 89,400", one["two_full_layers"], verdict(one["exact"])])
    for name in ("a2_fashion", "a2_mnist"):
        if name in numbers:
            gaps = capacity_gaps(numbers[name], 7940)
            mean, worst = statistics.fmean(gaps.values()), max(gaps.values())
            target = f"{TITLES[name]} gap: mean <= 0.7, max <= 1.2"
            rows.append(["A2", target, f"{mean:.2f}, {worst:.2f}", verdict(mean <= 0.7 and worst <= 1.2)])
    for name, loss in (("mnist", 0.072), ("fashion", None)):
        least = 97.86 if loss else 88.7
        for sampler in ("random", "tpe"):
            if found := numbers.get(f"a3_{name}_{sampler}"):
                rows.append(_headline_row(name, sampler, found, least, loss))
    if four := numbers.get("a4_estimators"):
        proxy = next(r for r in four["rows"] if r["name"].startswith("20 % of the data"))
        rho = proxy["spearman_accuracy"]
        rows.append(["A4", "20 % data, 2 epochs: rho >= .85", f"{rho:.3f}", verdict(rho >= 0.85)])
        for name in ("SynFlow", "NASWOT", "gradient norm", "SNIP"):
            value = next(r for r in four["rows"] if r["name"] == name)["spearman_accuracy"]
            rows.append(["A4", f"{name}: rho >= .6", f"{value:.3f}", verdict(value >= 0.6)])
    if five := numbers.get("a5_regret"):
        regret = five["mean_regret"]
        text = ", ".join(f"{k} {v:.4f}" for k, v in regret.items())
        best = max(regret["tpe"], regret["gp"])
        rows.append(["A5", "regret after 30: TPE, GP <= random", text, verdict(best <= regret["random"])])
    rows += _depth_checks("Fashion-MNIST", numbers.get("a6_fashion"), {32: 85.0, 16: 85.5})
    rows += _depth_checks("MNIST", numbers.get("a6_mnist"), {})
    if seven := numbers.get("a7_gradient_flow"):
        error = seven["largest_relative_error"]
        rows.append(["A7", "EGF formula within 1e-6", f"{error:.1e}", verdict(error <= 1e-6)])
    if same := numbers.get("same_seed"):
        rows.append(
            [
                "",
                "same seed, same trials (TPE; random)",
                f"{same['same']}, {same['random']}",
                verdict(all((same["same"], same["random"]))),
            ]
        )
    if pair := numbers.get("workers"):
        rates = " and ".join(f"{v:.1f}" for v in pair["trials_per_minute"].values())
        ratios = ", ".join(f"{v:.2f}" for v in sorted(pair["ratios"]))
        text = f"{pair['ratio']:.2f}, median of {ratios} ({rates} trials a minute, load {pair['load']:.1f})"
        rows.append(["", "two workers >= 1.7 x one", text, verdict(pair["ratio"] >= 1.7)])
    return "### Acceptance checks\n\n" + markdown(["check", "target", "ours", ""], rows)


def _headline_row(name: str, sampler: str, found: dict, least: float, most: float | None) -> list[object]:
    """Every search counts: the worst of the searches' means over retrainings must do."""
    accuracies = [statistics.fmean(s["accuracy"]) for s in found["searches"]]
    losses = [statistics.fmean(s["loss"]) for s in found["searches"]]
    largest = max(s["active"] for s in found["searches"])
    target = f">= {least} %" + (f", loss <= {most}" if most else "") + ", N <= 60,000"
    good = min(accuracies) >= least and (most is None or max(losses) <= most) and largest <= 60000
    each, their_losses = " ".join(f"{a:.2f}" for a in accuracies), " ".join(f"{v:.4f}" for v in losses)
    return ["A3", f"{name}, {sampler}: {target}", f"{each} %, loss {their_losses}, N <= {largest}", verdict(good)]


def _searches(numbers: dict[str, dict]) -> str:
    """What every search of A3 found."""
    rows = []
    for name, part in numbers.items():
        for seed, s in enumerate(part["searches"] if name.startswith("a3_") else ()):
            layers = " ".join(str(active) for active, _ in s["layers"])
            linear = [i + 1 for i, (_, act) in enumerate(s["layers"][:-1]) if act == "none"]
            row = [name[3:].replace("_", ", "), seed, s["trial"], s["active"], layers, s["activation"]]
            row += [", ".join(map(str, linear)) or "-", spread(s["accuracy"]), spread(s["loss"], 4)]
            rows.append([*row, f"{s['finished']} of {s['trials']}"])
    if not rows:
        return ""
    header = ["data, sampler", "seed", "trial", "active weights", "of each layer", "activation", "linear layers"]
    header += ["test acc %", "test loss", "finished"]
    title = "### Best network of every search, retrained on all data with three seeds and patterns"
    return f"{title}\n\n{markdown(header, rows)}"


def _depth_checks(data: str, six: dict | None, modern: dict[int, float]) -> list[list[object]]:
    """``modern``: depth -> accuracy that sparse networks with BatchNorm and residual connections must reach."""
    if not six:
        return []
    mean = depth_means(six)
    shallow = [d for d, mode, kind in mean if mode == "plain" and kind == "sparse" and d <= 8]
    gap = max(abs(mean[d, "plain", "sparse"] - mean[d, "plain", "dense"]) for d in shallow)
    rows = [["A6", f"{data}: gap <= 1.5 up to 8 layers", f"{gap:.2f}", verdict(gap <= 1.5)]]
    if (32, "small init", "sparse") in mean:
        chance = [mean[32, "small init", kind] for kind in ("sparse", "dense")]
        text = " and ".join(f"{c:.1f} %" for c in chance)
        rows.append(["A6", f"{data}: 32 layers, nn.Linear's init: chance", text, verdict(max(chance) <= 15)])
    for depth, least in modern.items():
        if (depth, "modern", "sparse") in mean:
            value = mean[depth, "modern", "sparse"]
            target = f"{data}: modern sparse, {depth} layers >= {least}"
            rows.append(["A6", target, f"{value:.1f} %", verdict(value >= least)])
    return rows


def grouped(rows: list[dict], keys: tuple[str, ...], value: str) -> dict[tuple, list[float]]:
    """The values of rows that agree in ``keys``."""
    groups: dict[tuple, list[float]] = {}
    for row in rows:
        groups.setdefault(tuple(row[k] for k in keys), []).append(row[value])
    return groups


def capacity_gaps(part: dict, least: int) -> dict[int, float]:
    """Active weights -> |mean sparse - mean dense| accuracy, from ``least`` weights up."""
    means = {k: statistics.fmean(v) for k, v in grouped(part["rows"], ("active", "kind"), "accuracy").items()}
    return {n: abs(means[n, "sparse"] - means[n, "dense"]) for n, kind in means if kind == "sparse" and n >= least}


def depth_means(part: dict) -> dict[tuple[int, str, str], float]:
    """(depth, mode, kind) -> mean accuracy in percent."""
    return {k: statistics.fmean(v) for k, v in grouped(part["rows"], ("depth", "mode", "kind"), "accuracy").items()}


def _capacity(name: str, part: dict) -> str:
    poster = POSTER_SPARSE.get(name, {})
    columns = {
        value: grouped(part["rows"], ("active", "kind"), value) for value in ("accuracy", "loss", "mean_accuracy")
    }
    header = ["active weights", "sparse acc %", "dense acc %", "sparse loss", "dense loss"]
    header += ["sparse, mean over epochs", "poster (mean over epochs)"] if poster else []
    rows = []
    for active in sorted({n for n, _ in columns["accuracy"]}):
        row = [active, *(spread(columns["accuracy"][active, kind]) for kind in COLOUR_OF)]
        row += [spread(columns["loss"][active, kind], 3) for kind in COLOUR_OF]
        if poster:
            row += [spread(columns["mean_accuracy"][active, "sparse"]), poster.get(active, "")]
        rows.append(row)
    title = f"### One hidden layer, {TITLES[name]}, {part['epochs']} epochs, mean ± s.d. over three patterns"
    return f"{title}\n\n{markdown(header, rows)}\n\n{_same(part)}"


def _depths(name: str, part: dict) -> str:
    accuracy, loss = (grouped(part["rows"], ("depth", "mode", "kind"), value) for value in ("accuracy", "loss"))
    poster = name == "a6_mnist"
    header = ["hidden layers", "mode", "sparse acc %", "dense acc %", "sparse loss", "dense loss"]
    header += ["poster acc"] if poster else []
    rows = []
    for depth, mode in sorted({(d, m) for d, m, _ in accuracy}, key=lambda k: (k[1] != "plain", k[1], k[0])):
        row = [depth, mode, *(spread(accuracy[depth, mode, kind]) for kind in COLOUR_OF)]
        row += [spread(loss[depth, mode, kind], 3) for kind in COLOUR_OF]
        rows.append([*row, *([POSTER_DEPTHS[depth] if mode != "modern" else ""] if poster else [])])
    title = f"### 1 to 32 hidden layers, {TITLES[name]}, {part['epochs']} epochs, mean ± s.d. over three patterns"
    return f"{title}\n\n{markdown(header, rows)}\n\n{_same(part, ', plain networks')}"


def _same(part: dict, which: str = "") -> str:
    return f"Sparse against dense{which}, paired by size and seed: p = {part['p_value']:.2f} (Wilcoxon's signed ranks)."


def _estimators(part: dict, space: str) -> str:
    columns = ("spearman_accuracy", "kendall_accuracy", "spearman_loss")
    rows = [[r["name"], *(f"{r[c]:.3f}" for c in columns), f"{r['seconds']:.2g}"] for r in part["rows"]]
    header = ["estimator", "Spearman, accuracy", "Kendall, accuracy", "Spearman, -loss", "s per network"]
    what = f"{len(part['truth'])} architectures, {space}, {part['epochs']} epochs"
    return f"### Estimators against full training ({what})\n\n{markdown(header, rows)}"


def figures(numbers: dict[str, dict], folder: Path) -> list[Path]:
    """Curves with bands of one standard deviation, as PNG files."""
    made = []
    for name, part in numbers.items():
        if name.startswith("a2_"):
            made.append(_capacity_figure(part["rows"], TITLES[name], folder / f"{name}.png"))
        elif name.startswith("a6_"):
            made.append(_depth_figure(part["rows"], TITLES[name], folder / f"{name}.png"))
    if "a5_regret" in numbers:
        made.append(_regret_figure(numbers["a5_regret"], folder / "a5_regret.png"))
    return made


def _panel(ax, rows: list[dict], axis: str, value: str, styles: dict[str, str] | None = None) -> None:
    """Mean and one standard deviation of ``value`` along ``axis``, sparse and dense, one line style per mode."""
    for mode, style in (styles or {"": "-"}).items():
        for kind, colour in COLOUR_OF.items():
            own = [r for r in rows if r["kind"] == kind and r.get("mode", "") == mode]
            groups = sorted(grouped(own, (axis,), value).items())
            x = [k[0] for k, _ in groups]
            mean = [statistics.fmean(v) for _, v in groups]
            half = [statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in groups]
            label = f"{kind}, {mode}" if mode else kind
            ax.plot(x, mean, style, color=colour, marker="o", markersize=3.5, linewidth=1.5, label=label)
            low, high = ([m + s * h for m, h in zip(mean, half, strict=True)] for s in (-1, 1))
            ax.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    ax.set_ylabel("test accuracy (%)" if value == "accuracy" else "test loss (nats)")
    if axis == "active":
        ax.set_xlabel("active weights")
        ax.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
    else:
        depths = sorted({r["depth"] for r in rows})
        ax.set_xlabel("hidden layers")
        ax.set_xscale("log", base=2)
        ax.set_xticks(depths, [str(d) for d in depths])


def _capacity_figure(rows: list[dict], title: str, path: Path) -> Path:
    figure, both = new_axes(8.6, 3.6, ncols=2)
    for ax, value in zip(both, ("accuracy", "loss"), strict=True):
        _panel(ax, rows, "active", value)
    both[0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle(f"{title}: one hidden layer, equal numbers of active weights (mean ± s.d.)", fontsize=10)
    return save_figure(figure, path)


def _depth_figure(rows: list[dict], title: str, path: Path) -> Path:
    figure, (accuracy, loss, collapse) = new_axes(11.5, 3.7, ncols=3)
    trained = {"plain": "-", "modern": "--"}
    _panel(accuracy, rows, "depth", "accuracy", trained)
    _panel(loss, rows, "depth", "loss", trained)
    _panel(collapse, rows, "depth", "accuracy", {"plain": "-", "small init": ":"})
    for ax, heading in ((accuracy, "modern: BatchNorm + residual"), (collapse, "small init: nn.Linear's default")):
        ax.legend(frameon=False, fontsize=7.5, loc="lower left", title=heading, title_fontsize=7.5)
    figure.suptitle(f"{title}: 1 to 32 hidden layers, equal numbers of active weights (mean ± s.d.)", fontsize=10)
    return save_figure(figure, path)


def _regret_figure(part: dict, path: Path) -> Path:
    figure, ax = new_axes()
    for (kind, curves), colour in zip(part["curves"].items(), (GREY, COLOURS[1], COLOURS[0]), strict=True):
        steps = list(range(1, len(curves[0]) + 1))
        regrets = [[c[i - 1] - part["optimum"] for c in curves] for i in steps]
        mean = [statistics.fmean(r) for r in regrets]
        error = [statistics.stdev(r) / len(r) ** 0.5 for r in regrets]
        ax.plot(steps, mean, color=colour, linewidth=1.7, label=f"{kind} ({len(curves)} repeats)")
        low, high = ([max(0.0, m + s * e) for m, e in zip(mean, error, strict=True)] for s in (-1, 1))
        ax.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.set_xlabel("evaluations")
    ax.set_ylabel("regret of the best so far (mean ± s.e.)")
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.legend(frameon=False)
    return save_figure(figure, path)
