"""Tables and figures of ``sparsenet reproduce embedding``: FVU beside every percentage error."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from sparsenet.plotting.style import COLOURS, GREY, new_axes, save_figure
from sparsenet.reproduce.parts import markdown, times_table, verdict

__all__ = ["figures", "tables"]

METHODS = ("embedding", "embedding, not pruned", "dense, pruned", "random restarts")
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
    parts = [_checks(numbers), _autoencoders(numbers), _recovery(numbers), _per_depth(numbers)]
    if six := numbers.get("c6_sparsity_weights"):
        header = ["teacher", "sparsity weight", "median weights", "median FVU", "best: weights", "FVU", "MPE %"]
        rows = [[t, f"{w:g}", f"{n:g}", fvu(f), b, fvu(bf), f"{100 * m:.1f}"] for t, w, n, f, b, bf, m in six["rows"]]
        title = "### Sparsity weight, decoder 3, no pruning after the search (figure 4)"
        parts.append(f"{title}\n\n{markdown(header, rows)}")
    if "modern" in numbers:
        parts.append(_modern(numbers["modern"]))
    parts.append(times_table(numbers))
    return "\n\n".join(p for p in parts if p)


def fvu(value: float) -> str:
    """Four digits, or the order of magnitude; what rounding leaves is below 1e-6."""
    if value >= 1e-3:
        return f"{value:.4f}"
    return f"{value:.0e}".replace("e-0", "e-") if value >= 1e-6 else "< 1e-6"


def _error(found: list) -> str:
    """``FVU (MPE)`` of [weights, depth, FVU, MPE]."""
    return f"{fvu(found[2])} ({100 * found[3]:.1f} %)"


def _checks(numbers: dict[str, dict]) -> str:
    rows = [*_autoencoder_checks(numbers), *_search_checks(numbers)]
    named = [[check, target, ours, verdict(good)] for check, target, ours, good in sorted(rows, key=lambda r: r[0])]
    return "### Acceptance checks\n\n" + markdown(["check", "target", "ours", ""], named)


def _autoencoder_checks(numbers: dict[str, dict]) -> Iterator[tuple[str, str, str, bool]]:
    """C1, C2, C3, C7: (check, target, ours, met)."""
    if one := numbers.get("c1_fixture"):
        error, lossless = one["largest_error"], one["lossless"]
        target = "fixture within 1e-5; pack and unpack lossless"
        yield "C1", target, f"{error:.1e}, {lossless}", error <= 1e-5 and lossless
    for name, most in (("leaky_relu", 0.05), ("sigmoid", 0.12), ("linear", 0.002)):
        if two := numbers.get(f"c2_{name}"):
            value, each = two["min_nmse"], two["decoder_nmse"]
            yield "C2", f"{name}: min over decoders <= {most}", f"{value:.4f}", value <= most
            yield "C3", f"{name}: each decoder <= .5", " ".join(f"{v:.3f}" for v in each), max(each) <= 0.5
        if seven := numbers.get(f"c7_{name}"):
            rho, moved = seven["spearman"], seven["permutation_distance"]
            target = f"{name}: Spearman >= .6; permuted within 1e-4"
            yield "C7", target, f"{rho:.3f}, {moved:.1e}", rho >= 0.6 and moved <= 1e-4


def _search_checks(numbers: dict[str, dict]) -> Iterator[tuple[str, str, str, bool]]:
    """C4, C5, C6: (check, target, ours, met)."""
    for part, limits in (
        ("c4_leaky_relu_14_seed0", {"best": 0.01, "28": 0.03}),
        ("c4_leaky_relu_14_seed1", {"best": 0.01, "28": 0.03}),
        ("c5_leaky_relu_35", {"35": 0.10, "70": 0.05}),
        ("c5_linear_35", {"28": 0.001}),
        ("c5_sigmoid_fixture", {"70": 0.03}),
    ):
        if part in numbers:
            own = numbers[part]["embedding"]
            for count, most in limits.items():
                found = own["best"] if count == "best" else own["within"][count]
                target = f"{part[3:]}: {'best' if count == 'best' else f'<= {count} weights'} at FVU <= {most}"
                yield part[:2].upper(), target, f"{_error(found)} at {found[0]}", found[2] <= most
    if six := numbers.get("c6_sparsity_weights"):
        teachers = {r[0]: [q for q in six["rows"] if q[0] == r[0]] for r in six["rows"]}
        fewer = all(a[2] > b[2] for t in teachers.values() for a, b in pairwise(t))
        worse = all(a[3] <= b[3] for t in teachers.values() for a, b in pairwise(t))
        target = "weights fall, FVU does not, with the sparsity weight (medians)"
        yield "C6", target, f"{fewer}, {worse}", fewer and worse


def _autoencoders(numbers: dict[str, dict]) -> str:
    rows = []
    known = {n[3:]: {**numbers[n], **numbers.get(f"c7_{n[3:]}", {})} for n in numbers if n.startswith("c2_")}
    known |= numbers.get("encoders", {}).get("rows", {})
    for name, n in known.items():
        row = [name, n["steps"], f"{n['train_seconds']:.0f}", f"{n['min_nmse']:.4f}", fvu(n["median_fvu"])]
        row += [f"{100 * n['mpe_mean']:.1f} / {100 * n['mpe_median']:.1f}", " ".join(f"{s:.2f}" for s in n["shares"])]
        geometry = "permutation_distance" in n
        row += [f"{n['spearman']:.2f}", f"{n['permutation_distance']:.0e}"] if geometry else ["", ""]
        rows.append(row)
    if not rows:
        return ""
    header = ["autoencoder", "steps", "s", "mean nMSE", "median FVU", "MPE % mean / median", "shares of decoders 1-4"]
    header += ["Spearman of distances", "moved by permuting"]
    title = "### Autoencoders (nMSE: min over decoders of MSE / (var + .01), 512 fresh networks)"
    return f"{title}\n\n{markdown(header, rows)}"


def _recovery(numbers: dict[str, dict]) -> str:
    counts, rows = (10, 14, 20, 35, 70), []
    for part, reference in REFERENCE.items():
        for method in METHODS if part in numbers else ():
            found = numbers[part][method]
            cells = [_error(small) if (small := found["within"][str(count)]) else "-" for count in counts]
            seconds = f"{found['seconds']:.0f}" if "seconds" in found else ""
            first = method == METHODS[0]
            row = [part[3:] if first else "", method, *cells, f"{_error(found['best'])} at {found['best'][0]}", seconds]
            rows.append([*row, reference if first else ""])
    if not rows:
        return ""
    header = ["data", "method", *(f"<= {c} weights" for c in counts), "best", "s", "reference (METHODS 3.8)"]
    return "### Test FVU (MPE) within a number of weights, chosen by validation\n\n" + markdown(header, rows)


def _per_depth(numbers: dict[str, dict]) -> str:
    """Best network of each decoder: the form of the paper's tables."""
    rows = []
    for part in REFERENCE:
        for depth, front in numbers.get(part, {}).get("embedding", {}).get("per_depth", {}).items():
            best = min(front, key=lambda c: c[2])
            small = next((c for c in front if c[2] <= 2 * best[2] + 1e-3), best)
            rows.append([part[3:], depth, *(f"{c[0]} : {_error(c)}" for c in (best, small))])
    if not rows:
        return ""
    header = ["data", "hidden layers", "best: weights : FVU (MPE)", "sparsest within 2 x that + .001"]
    title = "### Each decoder's networks (the paper's values are not published in what we have)"
    return f"{title}\n\n{markdown(header, rows)}"


def _modern(part: dict) -> str:
    kinds, rows = part["rows"], []
    for function in kinds["dense, pruned"]["functions"]:
        row = [function]
        for kind in kinds.values():
            found = kind["functions"][function]
            small = found["within"]["35"]
            row += [
                f"{_error(found['best'])} at {found['best'][0]}",
                f"{_error(small)} at {small[0]}" if small else "-",
            ]
        rows.append(row)
    header = ["function", *(f"{kind}: {what}" for kind in kinds for what in ("best", "<= 35 weights"))]
    trained = ", ".join(
        f"{name} {kind['min_nmse']:.3f} after {kind['train_seconds']:.0f} s"
        for name, kind in kinds.items()
        if "min_nmse" in kind
    )
    title = "### SWAT-NN's mode: biases and an activation per neuron, two-dimensional functions, test FVU (MPE)"
    return f"{title}\n\nAutoencoders' mean nMSE: {trained}.\n\n{markdown(header, rows)}"


def figures(numbers: dict[str, dict], folder: Path) -> list[Path]:
    """Functions side by side, Pareto fronts, the sparsity weight and training curves as PNG files."""
    made = []
    if "c2_leaky_relu" in numbers:
        made.append(_match(numbers["c2_leaky_relu"], folder / "embedding_match.png"))
    if any(part in numbers for part in REFERENCE):
        made.append(_fronts(numbers, folder / "embedding_fronts.png"))
        made.append(_overlays(numbers, folder / "embedding_overlays.png"))
    if "c6_sparsity_weights" in numbers:
        made.append(_sparsity(numbers["c6_sparsity_weights"], folder / "embedding_sparsity.png"))
    if any(n.startswith("c2_") for n in numbers):
        made.append(_training(numbers, folder / "embedding_training.png"))
    return made


def _grid(count: int, columns: int = 4):
    """A figure and ``count`` small axes."""
    columns = min(columns, count)
    lines = -(-count // columns)
    figure, axes = new_axes(2.9 * columns, 2.5 * lines + 0.4, nrows=lines, ncols=columns, squeeze=False)
    for ax in axes.flat:
        ax.tick_params(labelsize=7)
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, list(axes.flat[:count])


def _legend(figure, ax) -> None:
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)


def _line(points: list[float]) -> list[float]:
    """The line's t for each of ``points``."""
    return [2 * i / (len(points) - 1) - 1 for i in range(len(points))]


def _match(part: dict, path: Path) -> Path:
    """Networks never seen in training against what the best decoder makes of their codes."""
    figure, axes = _grid(len(part["slices"]))
    for ax, own in zip(axes, part["slices"], strict=True):
        t = _line(own["input"])
        ax.plot(t, own["input"], color=COLOURS[0], linewidth=2.6, alpha=0.5, label="network")
        ax.plot(t, own["decoded"], "--", color=COLOURS[1], linewidth=1.4, label="decoded from its code")
        ax.set_title(f"hidden layers: {own['depth']}, decoded: {own['decoder']}", fontsize=8)
    values = [v for own in part["slices"] for v in own["input"] + own["decoded"]]
    for ax in axes:  # one scale: every network has a root mean square of 1
        ax.set_ylim(min(values) - 0.2, max(values) + 0.2)
    _legend(figure, axes[0])
    figure.suptitle("outputs along x = (t, .5, -.5), leaky ReLU", fontsize=9)
    return save_figure(figure, path)


def _overlays(numbers: dict[str, dict], path: Path) -> Path:
    """The paper's figure 5: target, sparse network, dense network."""
    parts = [p for p in REFERENCE if p in numbers]
    figure, axes = _grid(len(parts))
    for ax, part in zip(axes, parts, strict=True):
        own = numbers[part]["slices"]
        t = _line(own["target"])
        ax.plot(t, own["target"], color=GREY, linewidth=3, alpha=0.6, label="target")
        ax.plot(t, own["sparse"], "--", color=COLOURS[1], linewidth=1.4, label="embedding, at most 14 weights")
        ax.plot(t, own["dense"], ":", color=COLOURS[0], linewidth=1.6, label="dense, pruned: best")
        weights = own["weights"]
        ax.set_title(f"{part[3:].replace('_', ' ')}: {weights['sparse']} / {weights['dense']} weights", fontsize=8)
        values = [v for name in ("target", "sparse", "dense") for v in own[name]]
        middle, half = (max(values) + min(values)) / 2, (max(values) - min(values)) / 2
        ax.set_ylim(middle - max(0.5, 1.1 * half), middle + max(0.5, 1.1 * half))  # targets: root mean square 1
    _legend(figure, axes[0])
    figure.suptitle("outputs along x = (t, .5, -.5)", fontsize=9)
    return save_figure(figure, path)


def _sparsity(part: dict, path: Path) -> Path:
    """The paper's figure 4: non-zeros and error against the sparsity weight."""
    figure, (weights, errors) = new_axes(7.6, 3.2, ncols=2)
    for teacher, colour in zip(sorted({row[0] for row in part["rows"]}), COLOURS, strict=False):
        own = [row for row in part["rows"] if row[0] == teacher]
        for ax, column in ((weights, 2), (errors, 3)):
            x, y = [r[1] for r in own], [r[column] for r in own]
            ax.plot(x, y, color=colour, marker="o", markersize=4, label=f"data of teacher {teacher}")
    for ax, label in ((weights, "median non-zero weights"), (errors, "median test FVU")):
        ax.set_xscale("log")
        ax.set_xlabel("sparsity weight (multiples of c)")
        ax.set_ylabel(label)
    errors.set_yscale("log")
    weights.legend(frameon=False, fontsize=8)
    return save_figure(figure, path)


def _fronts(numbers: dict[str, dict], path: Path) -> Path:
    parts = [p for p in REFERENCE if p in numbers]
    styles = zip(METHODS, (COLOURS[1], COLOURS[3], COLOURS[0], GREY), ("-", "-.", "--", ":"), strict=True)
    figure, axes = _grid(len(parts))
    for method, colour, style in styles:
        for ax, part in zip(axes, parts, strict=True):
            front = numbers[part][method]["front"]
            x, y = [c[0] for c in front], [max(c[2], 1e-6) for c in front]
            ax.plot(x, y, style, color=colour, marker=".", markersize=4, linewidth=1.3, label=method)
    for ax, part in zip(axes, parts, strict=True):
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(part[3:].replace("_", " "), fontsize=9)
        ax.set_xlabel("non-zero weights", fontsize=8)
        ax.set_xticks([5, 10, 20, 50, 100, 200], ["5", "10", "20", "50", "100", "200"])
        ax.minorticks_off()
    axes[0].set_ylabel("test FVU (floor 1e-6)", fontsize=8)
    _legend(figure, axes[0])
    return save_figure(figure, path)


def _training(numbers: dict[str, dict], path: Path) -> Path:
    figure, ax = new_axes(5.6, 3.4)
    trained = {name[3:]: part["curve"] for name, part in numbers.items() if name.startswith("c2_")}
    for colour, (name, curve) in zip(COLOURS, trained.items(), strict=False):
        steps, errors = [point[0] for point in curve], [point[1] for point in curve]
        ax.plot(steps, errors, color=colour, linewidth=1.6, label=name.replace("_", " "))
    ax.set_yscale("log")
    ax.set_xlabel("step (64 fresh networks each)")
    ax.set_ylabel("training error, best decoder")
    ax.legend(frameon=False)
    return save_figure(figure, path)
