"""Tables of ``sparsenet reproduce gates``: every number beside the published or required one."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from sparsenet.architecture.search.estimators import spearman
from sparsenet.reproduce import gate_plots
from sparsenet.reproduce.parts import markdown, verdict
from sparsenet.reproduce.published_gates import PUBLISHED, PUBLISHED_CLASSES, PUBLISHED_DEPTHS, PUBLISHED_SVD

__all__ = ["figures", "tables"]

CALIBRATED_CLASSES = {2: "5, 8", 4: "11", 6: "17", 8: "21, 23", 10: "23, 26"}
DATA = {"mnist": "MNIST", "fashion": "Fashion-MNIST"}


def tables(numbers: dict[str, dict]) -> str:
    """All tables of the parts that have been run, as Markdown."""
    parts = [_checks(numbers)]
    makers = (
        ("al_mnist", _lenet),
        ("b2_fashion", _short),
        ("strengths", _strengths),
        ("b4_classes_mnist", lambda part: _classes(part, "mnist")),
        ("b4_classes_fashion", lambda part: _classes(part, "fashion")),
        ("b8_depth", _depths),
        ("bayesian", _bayesian),
        ("pretrained", _pretrained),
        ("b10_relatives", lambda part: _relatives(part, numbers.get("b2_fashion"))),
        ("running_process", _running),
        ("caffenet", _caffenet),
        ("b9_parameters", _counter),
    )
    parts += [make(numbers[name]) for name, make in makers if name in numbers]
    return "\n\n".join([*parts, _times(numbers)])


def mean(rows: Iterable[dict], key: str) -> float:
    """Over rows."""
    return statistics.fmean(row[key] for row in rows)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean and standard deviation."""
    values = list(values)
    half = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {half:.{digits}f}"


def chosen(rows: list[dict], **wanted) -> list[dict]:
    """The rows that agree with ``wanted``."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def shapes(rows: list[dict]) -> str:
    """The learnt architectures, one per seed."""
    return ", ".join("-".join(map(str, [*row["widths"], 10])) for row in rows)


def classes_spearman(rows: list[dict]) -> float:
    """Rank correlation of the number of classes with the mean number of neurons."""
    counts = sorted({row["classes"] for row in rows})
    return spearman(counts, [statistics.fmean(r["widths"][-1] for r in chosen(rows, classes=c)) for c in counts])


# --- the checks -----------------------------------------------------------------------------------------------------


def _checks(numbers: dict[str, dict]) -> str:
    rows: list[list[object]] = []
    if one := numbers.get("b1_gates_alone"):
        left = [row["left"] for row in chosen(one["rows"], k=0.4)]
        close = abs(statistics.fmean(left) - 150) <= 15
        rows.append(["B1", "gates alone, k = .4: 150 ± 15 of 500", ", ".join(map(str, left)), verdict(close)])
    if two := numbers.get("b2_fashion"):
        rows += _short_checks(two)
    for name in ("mnist", "fashion"):
        if four := numbers.get(f"b4_classes_{name}"):
            rho = classes_spearman(four["rows"])
            rows.append(["B4", f"classes and neurons, {DATA[name]}: rho >= .9", f"{rho:.3f}", verdict(rho >= 0.9)])
    rows += _function_check(numbers)
    if al := numbers.get("al_mnist"):
        gap = max(abs(mean(chosen(al["learnt"], name=n), "accuracy") - mean(chosen(al["direct"], name=n), "accuracy"))
                  for n in PUBLISHED)  # fmt: skip
        rows.append(["B6", "MNIST, AL against direct: paper <= .09, asked <= 1.0", f"{gap:.2f}", verdict(gap <= 1.0)])
    if eight := numbers.get("b8_depth"):
        finals = {h: mean(chosen(eight["rows"], hidden=h), "final") for h in {r["hidden"] for r in eight["rows"]}}
        span, start = max(finals.values()) - min(finals.values()), max(finals) - min(finals)
        text = f"{span:.1f} (initial {start}; means over seeds)"
        rows.append(["B8", "final depths within 3 of each other", text, verdict(span <= 3)])
    if nine := numbers.get("b9_parameters"):
        counts = {row[0]: row[2] for row in nine["rows"]}
        good = abs(counts["CaffeNet"] / 60.97e6 - 1) < 1e-3 and abs(counts["AL-fc"] / 19.83e6 - 1) < 1e-3
        text = f"{counts['CaffeNet'] / 1e6:.2f}M, {counts['AL-fc'] / 1e6:.2f}M"
        rows.append(["B9", "CaffeNet 60.97M, AL-fc 19.83M", text, verdict(good and nine["counted_in_built_networks"])])
    if "b10_relatives" in numbers and "b2_fashion" in numbers:
        rows += _relative_checks(numbers["b10_relatives"]["rows"], chosen(numbers["b2_fashion"]["learnt"], name="fc"))
    return "### Acceptance checks\n\n" + markdown(["check", "target", "ours", ""], rows)


def _short_checks(part: dict) -> list[list[object]]:
    fc, everything = (chosen(part["learnt"], name=name) for name in ("fc", "all"))
    full = mean(part["baseline"], "accuracy")
    neurons, accuracy = [row["widths"][2] for row in fc], mean(fc, "accuracy")
    good = max(neurons) <= 25 and accuracy >= full - 1.5 and max(r["parameters"] for r in fc) <= 47_500
    text = f"{', '.join(map(str, neurons))} neurons; {accuracy:.2f} % against {full:.2f} % without gates"
    rows = [["B2", "<= 25 neurons, within 1.5 points of ungated", text, verdict(good)]]
    parameters = [row["parameters"] for row in everything]
    good = statistics.fmean(parameters) <= 15_000 and mean(everything, "accuracy") >= 85.5
    text = f"{', '.join(f'{p / 1e3:.1f}K' for p in parameters)}; {mean(everything, 'accuracy'):.2f} %"
    rows.append(["B3", "all layers: <= 15K parameters, >= 85.5 %", text, verdict(good)])
    for name, learnt in (("hidden layer", fc), ("all layers", everything)):
        own = chosen(part["direct"], name="fc" if learnt is fc else "all")
        gap = abs(mean(learnt, "accuracy") - mean(own, "accuracy"))
        rows.append(["B6", f"Fashion-MNIST, {name}: AL against direct <= 1.0", f"{gap:.2f}", verdict(gap <= 1.0)])
    rank = [s for row in part["baseline"] for s in row["svd"] if s["rank"] == 10]
    gain = accuracy - mean(rank, "accuracy")
    text = f"{accuracy:.2f} % against {mean(rank, 'accuracy'):.2f} % ({mean(rank, 'tuned'):.2f} % tuned)"
    return [*rows, ["B7", "AL >= SVD of rank 10 + .3", text, verdict(gain >= 0.3)]]


def _function_check(numbers: dict[str, dict]) -> list[list[object]]:
    cells = [
        c for part in numbers.values() for key in ("learnt", "rows") for c in part.get(key, []) if "largest_change" in c
    ]
    if not cells:
        return []
    worst = {kind: max(cell["largest_change"][kind] for cell in cells) for kind in ("float32", "float64")}
    saving = all(after < before for cell in cells for *_, before, after in cell["folded"])
    good = worst["float32"] <= 1e-5 and worst["float64"] <= 1e-10 and saving
    folds = sum(len(cell["folded"]) for cell in cells)
    relative = max(cell["largest_change"]["float32"] / max(1.0, cell["largest_output"]) for cell in cells)
    text = f"{worst['float32']:.1e}, {worst['float64']:.1e} ({len(cells)} networks, {folds} collapsed layers)"
    text += f"; float32, of the largest logit: {relative:.1e}"
    return [["B5", "largest change of a logit: 1e-5 float32, 1e-10 float64; a collapse saves", text, verdict(good)]]


def _relative_checks(rows: list[dict], reference: list[dict]) -> list[list[object]]:
    """Of each kind the most accurate setting that is no larger than tri-state's network."""
    size, accuracy = mean(reference, "parameters"), mean(reference, "accuracy")
    checks = []
    for kind in dict.fromkeys(row["gates"] for row in rows):
        own = chosen(rows, gates=kind)
        settings = [chosen(own, lambda_3=s) for s in sorted({r["lambda_3"] for r in own})]
        fitting = [s for s in settings if mean(s, "parameters") <= size] or [
            min(settings, key=lambda s: mean(s, "parameters"))
        ]
        best = max(fitting, key=lambda s: mean(s, "accuracy"))
        good = mean(best, "parameters") <= size and mean(best, "accuracy") >= accuracy - 0.5
        text = f"{mean(best, 'accuracy'):.2f} % at {mean(best, 'parameters') / 1e3:.1f}K"
        target = f"{kind}: >= {accuracy - 0.5:.2f} % at <= {size / 1e3:.1f}K (tri-state - .5)"
        checks.append(["B10", target, text, verdict(good)])
    return checks


# --- one table per part ---------------------------------------------------------------------------------------------


def _lenet(part: dict) -> str:
    rows: list[list[object]] = [
        [
            "baseline",
            "-",
            "20-50-500-10",
            "431.1K",
            spread(r["accuracy"] for r in part["baseline"]),
            "",
            "99.3",
            "",
            "431K",
        ]
    ]
    for name, (published, accuracy, again, size) in PUBLISHED.items():
        own = chosen(part["learnt"], name=name)
        rows.append([
            name, f"{own[0]['lambda_3']:g}", shapes(own), ", ".join(f"{r['parameters'] / 1e3:.1f}K" for r in own),
            spread(r["accuracy"] for r in own), spread(r["accuracy"] for r in chosen(part["direct"], name=name)),
            accuracy, again, f"{published}, {size}",
        ])  # fmt: skip
    header = ["", "lambda_3", "learnt (per seed)", "parameters", "AL acc %", "directly %"]
    header += ["paper AL %", "paper directly %", "paper's architecture"]
    title = f"### LeNet-like, MNIST, {part['images']} images, {part['epochs']} epochs (paper: 300)"
    return f"{title}\n\n{markdown(header, rows)}\n\n{_svd(part, published=True)}"


def _svd(part: dict, published: bool = False) -> str:
    """``published``: whether the paper has these numbers, on MNIST."""
    rows = []
    for rank in [s["rank"] for s in part["baseline"][0]["svd"]]:
        own = [s for row in part["baseline"] for s in row["svd"] if s["rank"] == rank]
        size, accuracy = PUBLISHED_SVD.get(rank, ("", ""))
        shown = (spread(s[key] for s in own) for key in ("accuracy", "tuned"))
        rows.append([f"SVD, rank {rank}", f"{own[0]['parameters'] / 1e3:.1f}K", *shown, size, accuracy])
    for name in dict.fromkeys(row["name"] for row in part["learnt"]):
        own = chosen(part["learnt"], name=name)
        size, accuracy = PUBLISHED[name][3::-2] if name in PUBLISHED else ("", "")
        rows.append(
            [name, f"{mean(own, 'parameters') / 1e3:.1f}K", spread(r["accuracy"] for r in own), "", size, accuracy]
        )
    header = ["", "parameters", "acc %", "after an epoch of tuning %", "paper: parameters", "paper: acc %"]
    columns = len(header) if published else 4
    table = markdown(header[:columns], [row[:columns] for row in rows])
    return f"Against truncated SVD of the 800 x 500 layer:\n\n{table}"


def _short(part: dict) -> str:
    rows = [["ungated", "20-50-500-10", "431.1K", spread(r["accuracy"] for r in part["baseline"]), ""]]
    for name, label in (("fc", "hidden layer learnt"), ("all", "all layers learnt")):
        own, again = chosen(part["learnt"], name=name), chosen(part["direct"], name=name)
        sizes = ", ".join(f"{r['parameters'] / 1e3:.1f}K" for r in own)
        rows.append([label, shapes(own), sizes, *(spread(r["accuracy"] for r in x) for x in (own, again))])
    title = f"### Fashion-MNIST, {part['images']} images, {part['epochs']} epochs"
    header = ["", "architecture (per seed)", "parameters", "acc %", "directly %"]
    return f"{title}\n\n{markdown(header, rows)}\n\n{_svd(part)}"


def _strengths(part: dict) -> str:
    rows = []
    for one, three in dict.fromkeys((r["lambda_1"], r["lambda_3"]) for r in part["rows"]):
        own = chosen(part["rows"], lambda_1=one, lambda_3=three)
        alone = 500 * max(0.0, 0.5 - three / one / 2)
        units = ", ".join(str(r["widths"][2]) for r in own)
        rows.append(
            [f"{one:g}", f"{three:g}", f"{three / one:g}", f"{alone:.0f}", units, spread(r["accuracy"] for r in own)]
        )
    header = ["lambda_1", "lambda_3", "k", "left without data", "units left of 500 (per seed)", "acc %"]
    return "### Strengths of the penalty, hidden layer, MNIST, 8,000 images, 6 epochs\n\n" + markdown(header, rows)


def _classes(part: dict, data: str) -> str:
    rows = []
    for count in sorted({r["classes"] for r in part["rows"]}):
        own = chosen(part["rows"], classes=count)
        other = PUBLISHED_CLASSES[count] if data == "mnist" else CALIBRATED_CLASSES.get(count, "")
        neurons = ", ".join(str(r["widths"][2]) for r in own)
        rows.append([count, neurons, spread(100 - r["accuracy"] for r in own), other])
    label = "paper" if data == "mnist" else "short calibration runs"
    return f"### Classes against learnt neurons, {DATA[data]}\n\n" + markdown(
        ["classes", "neurons (per seed)", "error %", label], rows
    )


def _depths(part: dict) -> str:
    rows = []
    for hidden in sorted({r["hidden"] for r in part["rows"]}):
        own = chosen(part["rows"], hidden=hidden)
        final = ", ".join(str(r["final"]) for r in own)
        paper = PUBLISHED_DEPTHS.get(hidden + 3, "")
        rows.append([hidden + 3, final, shapes(own), spread(100 - r["accuracy"] for r in own), paper])
    header = ["initial depth", "final depth (per seed)", "learnt", "error %", "paper: final depth"]
    return "### Depth from different initial depths, 20-50-(75 x n)-10, MNIST\n\n" + markdown(header, rows)


def _bayesian(part: dict) -> str:
    rows = []
    for name in dict.fromkeys(run["name"] for run in part["bayesian"]):
        gates, runs = chosen(part["gates"], name=name), chosen(part["bayesian"], name=name)
        for own, run in zip(gates, runs, strict=True):
            costs = [c["cost"] for c in run["costs"]]
            first = next((i + 1 for i, c in enumerate(costs) if c <= own["cost"]), None)
            best = min(run["costs"], key=lambda c: c["cost"])
            seconds = sum(c["cpu_seconds"] for c in run["costs"])
            rows.append([
                name, run["seed"], f"{own['cost']:.4f}", "-".join(map(str, own["widths"])), f"{own['cpu_seconds']:.0f}",
                f"{best['cost']:.4f}", "-".join(map(str, best["widths"])), f"{seconds:.0f}",
                f"run {first}" if first else f"not in {len(costs)}",
            ])  # fmt: skip
    header = ["learnt", "seed", "gates: cost", "widths", "CPU s", "BO: best cost", "widths", "CPU s", "BO level at"]
    return "### One run with gates against 20 runs of Bayesian optimisation (GP), MNIST\n\n" + markdown(header, rows)


def _pretrained(part: dict) -> str:
    rows = []
    for name in ("fc", "all"):
        for start in ("random", "pretrained"):
            own = chosen(part["rows"], name=name, start=start)
            size = ", ".join(f"{r['parameters'] / 1e3:.1f}K" for r in own)
            label = {"fc": "hidden layer", "all": "all layers"}[name]
            rows.append([label, start, shapes(own), size, spread(r["accuracy"] for r in own)])
    title = "### Gates from a pre-trained start, MNIST, short budget"
    return f"{title}\n\n{markdown(['learnt', 'start', 'architecture (per seed)', 'parameters', 'acc %'], rows)}"


def _relatives(part: dict, reference: dict | None) -> str:
    groups = [("tri_state", "0.001", chosen(reference["learnt"], name="fc"))] if reference else []
    for kind, strength in dict.fromkeys((r["gates"], r["lambda_3"]) for r in part["rows"]):
        groups.append((kind, f"{strength:g}", chosen(part["rows"], gates=kind, lambda_3=strength)))
    rows = [
        [kind, strength, ", ".join(str(r["widths"][2]) for r in own), f"{mean(own, 'parameters') / 1e3:.1f}K",
         spread(r["accuracy"] for r in own)]
        for kind, strength, own in groups
    ]  # fmt: skip
    header = ["gates", "lambda_3", "units left of 500 (per seed)", "parameters", "acc %"]
    return "### Other gates, hidden layer, Fashion-MNIST, short budget\n\n" + markdown(header, rows)


def _running(part: dict) -> str:
    rows = []
    for name, race in part["races"].items():
        first, last = race["rows"][0], race["rows"][-1]
        accuracy = " / ".join(f"{race['accuracy'][side]:.2f}" for side in ("compacted", "whole"))
        rows.append([
            name, f"{'-'.join(map(str, first['units'].values()))} -> {'-'.join(map(str, last['units'].values()))}",
            f"{1e3 * last['compacted']:.1f} / {1e3 * last['whole']:.1f}", f"{last['speedup']:.2f}",
            f"{last['bytes'] / 2**20:.2f} / {last['bytes_whole'] / 2**20:.2f}",
            f"{1e3 * statistics.median(r['check_seconds'] for r in race['rows']):.0f}", accuracy,
        ])  # fmt: skip
    header = ["network", "units", "ms per step at the end, compacted / whole", "times as fast"]
    header += ["MiB, compacted / whole", "ms per check", "acc %, compacted / whole"]
    return "### Compaction as a running process, MNIST, both networks in turns\n\n" + markdown(header, rows)


def _caffenet(part: dict) -> str:
    rows = [
        ["weights and biases", *(f"{p:,}" for p in part["parameters"])],
        ["units", *("-".join(map(str, w)) for w in part["widths"])],
        ["MiB with gradients and momentum", *(f"{b / 2**20:.0f}" for b in part["bytes"])],
        ["CPU ms per step of 4 images", *(f"{1e3 * s:.0f}" for s in part["cpu_seconds_per_step"])],
    ]
    text = markdown([f"{part['image']} x {part['image']} images", "before", "after"], rows)
    change, took = part["largest_relative_change"], part["compaction_seconds"]
    return (
        "### CaffeNet-shaped, generated data (mechanics only; one group per convolution)\n\n"
        f"{text}\n\nCompaction took {took:.1f} s; largest change of an output {change:.1e} of the largest output."
    )


def _counter(part: dict) -> str:
    rows = [
        [name, "-".join(map(str, widths)), f"{count:,}", f"{printed / 1e3:,.1f}K" if printed else ""]
        for name, widths, count, printed in part["rows"]
    ]
    header = ["network", "architecture", "weights and biases", "printed in the paper"]
    return "### Parameters of the published architectures\n\n" + markdown(header, rows)


def _times(numbers: dict[str, dict]) -> str:
    """Of all cells of a part, whenever they were computed."""
    taken = {}
    for name, part in numbers.items():
        keys = ("wall_seconds", "cpu_seconds")
        taken[name] = [sum(_all_of(part, f"cell_{key}")) or part[key] for key in keys]
    rows = [[name, *(f"{t:.0f}" for t in pair)] for name, pair in taken.items()]
    rows.append(["all, minutes", *(f"{sum(column) / 60:.0f}" for column in zip(*taken.values(), strict=True))])
    return "### Time (s)\n\n" + markdown(["part", "wall", "CPU"], rows)


def _all_of(numbers, key: str) -> list[float]:
    """Every value under ``key``, however deep."""
    if isinstance(numbers, list):
        return [v for item in numbers for v in _all_of(item, key)]
    if not isinstance(numbers, dict):
        return []
    return [numbers[key]] if key in numbers else [v for item in numbers.values() for v in _all_of(item, key)]


def figures(numbers: dict[str, dict], folder: Path) -> list[Path]:
    """The figures of the parts that have been run, as PNG files."""
    return gate_plots.draw(numbers, folder)
