"""Tables and figures of ``sparsenet reproduce density``: every number beside its target."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from tqdm import tqdm

__all__ = ["figures", "markdown", "tables"]

COLOURS = {"sparse": "#d1495b", "dense": "#2a6fbb"}


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def verdict(good: bool) -> str:
    """``met`` or ``NOT met``."""
    return "met" if good else "NOT met"


def tables(numbers: dict[str, dict]) -> str:
    """All tables of the parts that have been run, as Markdown."""
    parts = [_checks(numbers)]
    parts += [_capacity(numbers, name) for name in ("a2_fashion", "a2_mnist") if name in numbers]
    parts += [_depths(numbers, name) for name in ("a6_fashion", "a6_mnist") if name in numbers]
    if "a4_estimators" in numbers:
        parts.append(_estimators(numbers["a4_estimators"]))
    times = [[name, f"{n['wall_seconds']:.0f}", f"{n['cpu_seconds']:.0f}"] for name, n in numbers.items()]
    parts.append("### Time (s)\n\n" + markdown(["part", "wall", "CPU of this process"], times))
    return "\n\n".join(parts)


def _checks(numbers: dict[str, dict]) -> str:
    rows: list[list[object]] = []
    if one := numbers.get("a1_counts"):
        rows.append(["A1", "N = 794 u exactly; 89,400", one["two_full_layers"], verdict(one["exact"])])
    if "a2_fashion" in numbers:
        gaps = capacity_gaps(numbers["a2_fashion"], 7940)
        mean, worst = statistics.fmean(gaps.values()), max(gaps.values())
        good = mean <= 0.7 and worst <= 1.2
        rows.append(["A2", "F-MNIST gap: mean <= 0.7, max <= 1.2", f"{mean:.2f}, {worst:.2f}", verdict(good)])
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
        rows.append(["A5", "regret: TPE <= random", text, verdict(regret["tpe"] <= regret["random"])])
    rows += _depth_checks(numbers.get("a6_fashion"))
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
        text = f"{pair['ratio']:.2f} ({rates} trials a minute, load {pair['load']:.1f})"
        rows.append(["", "two workers >= 1.7 x one", text, verdict(pair["ratio"] >= 1.7)])
    return "### Acceptance checks\n\n" + markdown(["check", "target", "ours", ""], rows)


def _headline_row(name: str, sampler: str, found: dict, least: float, loss: float | None) -> list[object]:
    accuracy, losses = statistics.fmean(found["accuracy"]), statistics.fmean(found["loss"])
    each = " ".join(f"{a:.2f}" for a in found["accuracy"])
    target = f">= {least} %" + (f", loss <= {loss}" if loss else "") + ", N <= 60,000"
    good = accuracy >= least and (loss is None or losses <= loss) and found["active"] <= 60000
    text = f"{accuracy:.2f} % ({each}), loss {losses:.4f}, N = {found['active']}, {found['depth']} hidden layers"
    return ["A3", f"{name}, {sampler}: {target}", text, verdict(good)]


def _depth_checks(six: dict | None) -> list[list[object]]:
    if not six:
        return []
    mean = depth_means(six)
    plain = {
        d: abs(mean[d, "plain", "sparse"] - mean[d, "plain", "dense"])
        for d, m, k in mean
        if m == "plain" and k == "dense"
    }
    gap = max(v for d, v in plain.items() if d <= 8)
    rows = [["A6", "gap <= 1.5 up to 8 layers", f"{gap:.2f}", verdict(gap <= 1.5)]]
    if (32, "small init", "sparse") in mean:
        chance = max(mean[32, "small init", k] for k in ("sparse", "dense"))
        rows.append(["A6", "32 layers, nn.Linear's init: chance in both", f"{chance:.1f} %", verdict(chance <= 15)])
    for depth, least in ((32, 85.0), (16, 85.5)):
        if (depth, "modern", "sparse") in mean:
            value = mean[depth, "modern", "sparse"]
            rows.append(["A6", f"modern sparse, {depth} layers >= {least}", f"{value:.1f} %", verdict(value >= least)])
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


def _spread(values: list[float], digits: int = 2) -> str:
    half = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {half:.{digits}f}"


def _capacity(numbers: dict, name: str) -> str:
    from sparsenet.architecture.reproduce_density import POSTER_SPARSE

    part, mnist = numbers[name], name.endswith("mnist")
    accuracy = grouped(part["rows"], ("active", "kind"), "accuracy")
    average = grouped(part["rows"], ("active", "kind"), "mean_accuracy")
    loss = grouped(part["rows"], ("active", "kind"), "loss")
    header = ["active weights", "sparse acc %", "dense acc %", "sparse loss", "dense loss"]
    header += ["sparse, mean over epochs", "poster (mean over epochs)"] if mnist else []
    rows = []
    for active in sorted({n for n, _ in accuracy}):
        row = [active, *(_spread(accuracy[active, k]) for k in ("sparse", "dense"))]
        row += [_spread(loss[active, k], 3) for k in ("sparse", "dense")]
        if mnist:
            row += [_spread(average[active, "sparse"]), POSTER_SPARSE.get(active, "")]
        rows.append(row)
    data = "MNIST" if mnist else "Fashion-MNIST"
    title = f"### One hidden layer, {data}, {part['epochs']} epochs, mean ± s.d. over seeds"
    return title + "\n\n" + markdown(header, rows)


def _depths(numbers: dict, name: str) -> str:
    from sparsenet.architecture.reproduce_density import POSTER_DEPTHS

    part, mnist = numbers[name], name.endswith("mnist")
    accuracy = grouped(part["rows"], ("depth", "mode", "kind"), "accuracy")
    loss = grouped(part["rows"], ("depth", "mode", "kind"), "loss")
    header = ["hidden layers", "mode", "sparse acc %", "dense acc %", "sparse loss", "dense loss"]
    header += ["poster"] if mnist else []
    rows = []
    for depth, mode in sorted({(d, m) for d, m, _ in accuracy}, key=lambda k: (k[1] != "plain", k[0])):
        row = [depth, mode, *(_spread(accuracy[depth, mode, k]) for k in ("sparse", "dense"))]
        row += [_spread(loss[depth, mode, k], 3) for k in ("sparse", "dense")]
        row += [POSTER_DEPTHS[depth] if mode == "plain" else ""] if mnist else []
        rows.append(row)
    data = "MNIST" if mnist else "Fashion-MNIST"
    return f"### 1 to 32 hidden layers, {data}, {part['epochs']} epochs\n\n" + markdown(header, rows)


def _estimators(part: dict) -> str:
    rows = [
        [
            r["name"],
            *(f"{r[k]:.3f}" for k in ("spearman_accuracy", "kendall_accuracy", "spearman_loss")),
            f"{r['seconds']:.2f}",
        ]
        for r in part["rows"]
    ]
    header = ["estimator", "Spearman, accuracy", "Kendall, accuracy", "Spearman, -loss", "s per network"]
    count = len(part["truth"])
    return f"### Estimators against full training ({count} architectures, {part['epochs']} epochs)\n\n" + markdown(
        header, rows
    )


def figures(numbers: dict[str, dict], folder: Path) -> list[Path]:
    """Curves with bands of one standard deviation, as PNG files; none (and a line that says so) without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        tqdm.write(f"reproduce density: no figures, {error}; pip install 'sparsenet[plot]'")
        return []
    made = []
    for name, title in (("fashion", "Fashion-MNIST"), ("mnist", "MNIST")):
        if f"a2_{name}" in numbers:
            rows = numbers[f"a2_{name}"]["rows"]
            made.append(
                _curves(rows, "active", f"{title}: one hidden layer", "active weights", folder / f"capacity_{name}.png")
            )
        if f"a6_{name}" in numbers:
            rows = numbers[f"a6_{name}"]["rows"]
            made.append(
                _curves(rows, "depth", f"{title}: 1 to 32 hidden layers", "hidden layers", folder / f"depth_{name}.png")
            )
    if "a5_regret" in numbers:
        made.append(_regret(numbers["a5_regret"], folder / "sampler_regret.png"))
    return made


def _curves(rows: list[dict], axis: str, title: str, label: str, path: Path) -> Path:
    """Accuracy and loss of sparse and dense networks, mean and one standard deviation over seeds."""
    from sparsenet.architecture.search_plots import new_axes, save_figure

    figure, both = new_axes(8.6, 3.6, ncols=2)
    modes = ("plain", "small init", "modern") if axis == "depth" else (None,)
    for ax, value in zip(both, ("accuracy", "loss"), strict=True):
        for mode in modes:
            for kind, colour in COLOURS.items():
                own = [r for r in rows if r["kind"] == kind and (mode is None or r["mode"] == mode)]
                if not own:
                    continue
                groups = sorted(grouped(own, (axis,), value).items())
                x = [k[0] for k, _ in groups]
                mean = [statistics.fmean(v) for _, v in groups]
                half = [statistics.stdev(v) if len(v) > 1 else 0.0 for _, v in groups]
                style = {"modern": "--", "small init": ":"}.get(mode, "-")
                name = kind + {"modern": ", BatchNorm + residual", "small init": ", small init"}.get(mode, "")
                ax.plot(x, mean, style, color=colour, marker="o", markersize=3.5, linewidth=1.5, label=name)
                low, high = ([m + s * h for m, h in zip(mean, half, strict=True)] for s in (-1, 1))
                ax.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        ax.set_xlabel(label)
        ax.set_ylabel("test accuracy (%)" if value == "accuracy" else "test loss (nats)")
        if axis == "active":
            ax.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")
        if axis == "depth":
            ax.set_xscale("log", base=2)
            ax.set_xticks(sorted({r["depth"] for r in rows}), [str(d) for d in sorted({r["depth"] for r in rows})])
    both[0].legend(frameon=False, fontsize=8, loc="lower left" if axis == "depth" else "lower right")
    figure.suptitle(f"{title}, equal numbers of active weights (mean ± s.d.)", fontsize=10)
    return save_figure(figure, path)


def _regret(part: dict, path: Path) -> Path:
    from sparsenet.architecture.search_plots import GREY, SERIES, new_axes, save_figure

    figure, ax = new_axes()
    for (kind, curves), colour in zip(part["curves"].items(), (GREY, SERIES[1], SERIES[0]), strict=False):
        mean = [statistics.fmean(c[i] for c in curves) - part["optimum"] for i in range(len(curves[0]))]
        ax.plot(range(1, len(mean) + 1), mean, color=colour, linewidth=1.7, label=f"{kind} ({len(curves)} repeats)")
    ax.set_xlabel("evaluations")
    ax.set_ylabel("mean regret of the best so far")
    ax.set_yscale("symlog", linthresh=1e-3)
    ax.legend(frameon=False)
    return save_figure(figure, path)
