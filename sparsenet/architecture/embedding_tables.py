"""Tables and figures of ``sparsenet reproduce embedding``: FVU beside every percentage error."""

from __future__ import annotations

import statistics
from itertools import pairwise
from pathlib import Path

from tqdm import tqdm

from sparsenet.architecture.density_tables import markdown, verdict

__all__ = ["figures", "tables"]

METHODS = ("embedding", "dense, pruned", "random restarts")
# part -> what was measured for METHODS.md 3.8 without the final pruning: "FVU at weights"
REFERENCE = {
    "c4_leaky_relu_14_seed0": ".0035 at 14; best .0002 at 56",
    "c4_leaky_relu_14_seed1": ".016 at 20; best .0027 at 73",
    "c5_leaky_relu_35": ".039 at 14; .013 at 63",
    "c5_linear_35": ".0002 at 23",
    "c5_linear_14": "< .0001 at 24",
    "c5_sigmoid_14": ".17 at 11; .021 at 61",
    "c5_sigmoid_35": ".53 at 25; .10 at 61",
    "c5_sigmoid_fixture": ".068 at 46; .011 at 62",
}


def tables(numbers: dict[str, dict]) -> str:
    """All tables of the parts that have been run, as Markdown."""
    parts = [_checks(numbers), _autoencoders(numbers)]
    parts += [_recovery(numbers), _per_depth(numbers)]
    if six := numbers.get("c6_sparsity_weights"):
        header = ["teacher", "sparsity weight", "median weights", "median FVU", "best: weights", "FVU", "MPE %"]
        rows = [
            [t, f"{w:g}", f"{n:g}", f"{f:.4f}", b, f"{bf:.4f}", f"{100 * m:.1f}"]
            for t, w, n, f, b, bf, m in six["rows"]
        ]
        parts.append(
            "### Sparsity weight, decoder 3, no pruning after the search (figure 4)\n\n" + markdown(header, rows)
        )
    parts += [_modern(numbers["modern"])] if "modern" in numbers else []
    times = [[name, f"{n['wall_seconds']:.0f}", f"{n['cpu_seconds']:.0f}"] for name, n in numbers.items()]
    parts.append("### Time (s)\n\n" + markdown(["part", "wall", "CPU"], times))
    return "\n\n".join(p for p in parts if p)


def _checks(numbers: dict[str, dict]) -> str:
    rows: list[list[object]] = []

    def add(check: str, target: str, text: object, good: bool) -> None:
        rows.append([check, target, text, verdict(good)])

    if one := numbers.get("c1_fixture"):
        error = one["largest_error"]
        add(
            "C1",
            "fixture within 1e-5; pack and unpack lossless",
            f"{error:.1e}, {one['lossless']}",
            error <= 1e-5 and one["lossless"],
        )
    for name, most in (("leaky_relu", 0.05), ("sigmoid", 0.12), ("linear", 0.002)):
        if two := numbers.get(f"c2_{name}"):
            value, each = two["min_nmse"], two["decoder_nmse"]
            add("C2", f"{name}: min over decoders <= {most}", f"{value:.4f}", value <= most)
            add("C3", f"{name}: each decoder <= .5", " ".join(f"{v:.3f}" for v in each), max(each) <= 0.5)
    fours = [numbers[n] for n in ("c4_leaky_relu_14_seed0", "c4_leaky_relu_14_seed1") if n in numbers]
    for i, four in enumerate(fours):
        best, small = four["embedding"]["best"], four["embedding"]["within"]["28"]
        add("C4", f"teacher {i}: best FVU <= .01", f"{best[2]:.5f} at {best[0]}", best[2] <= 0.01)
        add("C4", f"teacher {i}: <= 28 weights at FVU <= .03", f"{small[2]:.5f} at {small[0]}", small[2] <= 0.03)
    for part, limits in (
        ("c5_leaky_relu_35", (("35", 0.10), ("70", 0.05))),
        ("c5_linear_35", (("28", 0.001),)),
        ("c5_sigmoid_fixture", (("70", 0.03),)),
    ):
        if part in numbers:
            for count, most in limits:
                found = numbers[part]["embedding"]["within"][count]
                add(
                    "C5",
                    f"{part[3:]}: <= {count} weights at FVU <= {most}",
                    f"{found[2]:.5f} at {found[0]}",
                    found[2] <= most,
                )
    if six := numbers.get("c6_sparsity_weights"):
        teachers = {r[0]: [q for q in six["rows"] if q[0] == r[0]] for r in six["rows"]}
        fewer = all(a[2] > b[2] for t in teachers.values() for a, b in pairwise(t))
        worse = all(a[3] <= b[3] for t in teachers.values() for a, b in pairwise(t))
        add(
            "C6", "weights fall, FVU does not, with the sparsity weight (medians)", f"{fewer}, {worse}", fewer and worse
        )
    for name in ("leaky_relu", "sigmoid"):
        if seven := numbers.get(f"c7_{name}"):
            rho, moved = seven["spearman"], seven["permutation_distance"]
            add(
                "C7",
                f"{name}: Spearman >= .6; permuted within 1e-4",
                f"{rho:.3f}, {moved:.1e}",
                rho >= 0.6 and moved <= 1e-4,
            )
    return "### Acceptance checks\n\n" + markdown(["check", "target", "ours", ""], rows)


def _autoencoders(numbers: dict[str, dict]) -> str:
    rows = []
    known = {n[3:]: numbers[n] for n in numbers if n.startswith("c2_")}
    known |= numbers.get("encoders", {}).get("rows", {})
    for name, n in known.items():
        shares = " ".join(f"{s:.2f}" for s in n["shares"])
        row = [name, n["steps"], f"{n['train_seconds']:.0f}", f"{n['min_nmse']:.4f}", f"{n['median_fvu']:.4f}"]
        row += [f"{100 * n['mpe_mean']:.1f} / {100 * n['mpe_median']:.1f}", shares]
        row.append(f"{n['permutation_distance']:.1e}" if "permutation_distance" in n else "")
        rows.append(row)
    header = [
        "autoencoder",
        "steps",
        "s",
        "mean nMSE",
        "median FVU",
        "MPE % mean / median",
        "shares of decoders 1-4",
        "moved by permuting",
    ]
    return (
        "### Autoencoders (nMSE: min over decoders of MSE / (var + .01), 512 fresh networks)\n\n"
        + markdown(header, rows)
        if rows
        else ""
    )


def _recovery(numbers: dict[str, dict]) -> str:
    rows = []
    for part, reference in REFERENCE.items():
        if part not in numbers:
            continue
        for method in METHODS:
            found = numbers[part][method]
            cells = []
            for count in ("10", "14", "20", "35", "70"):
                entry = found["within"][count]
                cells.append("-" if entry is None else f"{entry[2]:.4f} ({100 * entry[3]:.1f} %)")
            best = found["best"]
            label = part[3:] if method == "embedding" else ""
            row = [
                label,
                method,
                *cells,
                f"{best[2]:.5f} ({100 * best[3]:.1f} %) at {best[0]}",
                f"{found['seconds']:.0f}",
            ]
            rows.append([*row, reference if method == "embedding" else ""])
    if not rows:
        return ""
    header = [
        "data",
        "method",
        *(f"<= {c} weights" for c in (10, 14, 20, 35, 70)),
        "best",
        "s",
        "reference (METHODS 3.8)",
    ]
    return "### Test FVU (MPE) within a number of weights, chosen by validation\n\n" + markdown(header, rows)


def _per_depth(numbers: dict[str, dict]) -> str:
    """Best network of each decoder: the form of the paper's tables."""
    rows = []
    for part in REFERENCE:
        for depth, front in numbers.get(part, {}).get("embedding", {}).get("per_depth", {}).items():
            best = min(front, key=lambda c: c[1])
            small = next((c for c in front if c[1] <= 2 * best[1] + 1e-3), best)
            rows.append([part[3:], depth, *(f"{c[0]} : {c[1]:.5f} ({100 * c[2]:.1f} %)" for c in (best, small))])
    if not rows:
        return ""
    header = ["data", "hidden layers", "best: weights : FVU (MPE)", "sparsest within 2 x that + .001"]
    return "### Each decoder's networks (the paper's values are not published in what we have)\n\n" + markdown(
        header, rows
    )


def _modern(part: dict) -> str:
    rows, kinds = [], list(part["rows"])
    for function in part["rows"]["dense, pruned"]:
        row = [function]
        for kind in kinds:
            entry = part["rows"][kind]
            found = entry.get("functions", entry)[function]
            small = found["within"]["35"]
            row.append(f"{found['best'][2]:.4f} at {found['best'][0]}; {small[2]:.4f} at {small[0]}" if small else "-")
        rows.append(row)
    header = ["function", *(f"{k}: best; <= 35 weights (test FVU)" for k in kinds)]
    means = [
        statistics.fmean(v["min_nmse"] for v in [part["rows"][k]]) if "min_nmse" in part["rows"][k] else None
        for k in kinds
    ]
    notes = ", ".join(f"{k}: autoencoder nMSE {m:.3f}" for k, m in zip(kinds, means, strict=True) if m is not None)
    return (
        f"### SWAT-NN's mode: biases and an activation per neuron, two-dimensional functions ({notes})\n\n"
        + markdown(header, rows)
    )


def figures(numbers: dict[str, dict], folder: Path) -> list[Path]:
    """Pareto fronts and training curves as PNG files; none (and a line that says so) without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        tqdm.write(f"reproduce embedding: no figures, {error}; pip install 'sparsenet[plot]'")
        return []
    made = []
    if any(part in numbers for part in REFERENCE):
        made.append(_fronts(numbers, folder / "embedding_fronts.png"))
    if any(n.startswith("c2_") for n in numbers):
        made.append(_training(numbers, folder / "embedding_training.png"))
    return made


def _fronts(numbers: dict[str, dict], path: Path) -> Path:
    from sparsenet.architecture.search_plots import GREY, SERIES, new_axes, save_figure

    parts = [p for p in REFERENCE if p in numbers]
    columns = min(4, len(parts))
    lines = -(-len(parts) // columns)
    figure, axes = new_axes(2.9 * columns, 2.7 * lines, nrows=lines, ncols=columns, squeeze=False)
    for ax, part in zip(axes.flat, parts, strict=False):
        for method, colour, style in zip(METHODS, (SERIES[1], SERIES[0], GREY), ("-", "--", ":"), strict=True):
            front = numbers[part][method]["front"]
            ax.plot(
                [c[0] for c in front],
                [max(c[2], 1e-6) for c in front],
                style,
                color=colour,
                marker=".",
                markersize=4,
                linewidth=1.3,
                label=method,
            )
        ax.set_yscale("log")
        ax.set_title(part[3:].replace("_", " "), fontsize=9)
        ax.set_xlabel("weights", fontsize=8)
        ax.tick_params(labelsize=7)
    for ax in axes.flat[len(parts) :]:
        ax.remove()
    axes[0, 0].set_ylabel("test FVU", fontsize=8)
    axes[0, 0].legend(frameon=False, fontsize=7)
    return save_figure(figure, path)


def _training(numbers: dict[str, dict], path: Path) -> Path:
    from sparsenet.architecture.search_plots import SERIES, new_axes, save_figure

    figure, ax = new_axes(5.6, 3.4)
    for colour, (name, part) in zip(SERIES, ((n, p) for n, p in numbers.items() if n.startswith("c2_")), strict=False):
        ax.plot(
            [s for s, _, _ in part["curve"]],
            [v for _, v, _ in part["curve"]],
            color=colour,
            linewidth=1.6,
            label=name[3:],
        )
    ax.set_yscale("log")
    ax.set_xlabel("step (64 fresh networks each)")
    ax.set_ylabel("training error, best decoder")
    ax.legend(frameon=False)
    return save_figure(figure, path)
