"""Writes the tables of README.md and docs/results/benchmarks.md from bench/results/*.json, between their markers.

    python bench/tables.py            # writes them
    python bench/tables.py --check    # exit status 1 if they are not what the results say
    python bench/tables.py --main-job runs/fashion-mnist    # keep that run's summary among the results first

A figure that no file holds is not shown.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from sparsenet.benchmark.results import Results, case_text, crossovers, read
from sparsenet.benchmark.trial import OURS, Row
from sparsenet.memory.budget import format_bytes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
STEMS = (
    *("training_step", "block_sparse_linear", "block_gradient_squared_norms", "compact_blocks"),
    *("block_pattern", "update", "memory"),
)
NAMES = {
    "dense": "dense (`nn.Linear`)",
    "dense_onednn": "dense, oneDNN's own kernel",
    "equal_parameter_dense": "dense with as many weights",
    "masked_dense": "masked dense",
    "torch_bsr": "`torch.sparse_bsr`",
    "sparselab": "SparseLab",
}


def load(suffix: str = "") -> dict[str, Results]:
    """The result files that there are, by stem."""
    paths = {stem: RESULTS / f"{stem}{suffix}.json" for stem in STEMS}
    return {stem: read(path) for stem, path in paths.items() if path.exists()}


def grid(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def machine_text(found: Results) -> str:
    """One sentence on where the figures come from."""
    host, most = found.machine, found.ceilings
    peak = f", multiply-adds at most {most.fma_gflops['float32']:.0f} GFLOP/s in float32" if most.fma_gflops else ""
    dates = sorted({row.date[:10] for row in found.rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"{host['cpu']}, {host['cores']} cores, {host['isa']}, torch {host['torch']}{peak}, "
        f"copy {most.copy_gbytes:.0f} GB/s; {when}"
    )


def rows_of(results: dict[str, Results], stem: str, **wanted) -> list[Row]:
    """Rows of a stem whose phase and case are as wanted."""
    rows = results[stem].rows if stem in results else ()
    return [
        row for row in rows if all((row.phase if k == "phase" else row.case.get(k)) == v for k, v in wanted.items())
    ]


def goal_text(row: Row) -> str:
    """The goal, and whether it was reached."""
    if row.goal is None or row.met is None:
        return ""
    return f"{'≤' if row.goal.at_most else '≥'} {row.goal.value:.3g} {'✓' if row.met else '✗'}"


# --- README ---------------------------------------------------------------------------------------------------------


def readme(results: dict[str, Results]) -> str:
    """Few lines: the whole step, and the layer over density against its rivals."""
    parts = []
    training = [row for row in rows_of(results, "training_step", batch=256) if "speedup" in row.metrics]
    if training:
        lines = [
            (
                f"training step, {row.case['sizes']}, batch 256, {row.case['density']:.0%}, "
                + ("AdamW" if row.phase == "adamw" else "fused AdamW"),
                f"{row.times['dense'].median:.0f} ms",
                f"{row.metrics['amortised_ms']:.1f} ms",
                f"**{row.metrics['speedup']:.1f}×**",
            )
            for row in training
        ]
        for row in rows_of(results, "memory", phase="training"):
            lines.append(
                (
                    f"peak memory of that training, {row.case['density']:.0%}",
                    format_bytes(row.metrics["dense_bytes"]),
                    format_bytes(row.metrics["sparsenet_bytes"]),
                    f"**{1 / row.metrics['share_of_dense']:.1f}× less**",
                )
            )
        parts.append(grid(("block size 32, float32", "dense", "sparsenet", ""), lines))
    rivals = rivals_table(results, "step")
    if rivals:
        parts.append(
            "Forward and both gradients of one 4096 × 4096 layer, batch 512, as speed-up over `nn.Linear` "
            "(1 / density is the ideal):\n\n" + rivals
        )
    if not parts:
        return ""
    newest = next(iter(results.values()))
    where = f"Measured in turns on {machine_text(newest)}. Medians of ratios; more, with the losing cases, in "
    return "\n\n".join([*parts, where + "[benchmarks](docs/benchmarks.md)."])


def rivals_table(results: dict[str, Results], phase: str) -> str:
    """Speed-ups over dense at each density; empty where they were not measured."""
    rows = rows_of(results, "block_sparse_linear", phase=phase, out=4096, batch=512, block=32, pattern="uniform")
    rows = sorted((r for r in rows if "masked_dense" in r.speedups), key=lambda r: r.case["density"])
    if not rows:
        return ""
    names = [name for name in (OURS, *NAMES) if any(name in row.speedups for row in rows)]
    lines = []
    for name in names:
        cells = [f"{row.speedups[name].median:.3g}×" if name in row.speedups else "–" for row in rows]
        bold = name == OURS
        label = "**sparsenet**" if bold else NAMES[name]
        lines.append((label, *(f"**{c}**" if bold else c for c in cells)))
    return grid(("density", *(f"{row.case['density']:.0%}" for row in rows)), lines)


# --- docs/results/benchmarks.md -------------------------------------------------------------------------------------


def eff_table(rows: Sequence[Row], sideways: str) -> str:
    """``eff``, or the metric of the goal: a line per case without ``sideways``, a column per value of it."""
    lines: dict[str, dict[float, str]] = {}
    for row in rows:
        key = f"{row.phase}, {case_text({k: v for k, v in row.case.items() if k != sideways})}"
        metric = row.goal.metric if row.goal else "eff"
        shown = f"{row.metrics[metric]:.2f}" if metric in row.metrics else "–"
        column = float(f"{row.case[sideways]:.1g}")  # as asked for: a pattern has whole blocks
        lines.setdefault(key, {})[column] = " ".join((shown, goal_text(row))).strip()
    columns = sorted({column for cells in lines.values() for column in cells})
    head = [f"{column:.0%}" if sideways == "density" else f"{column:g}" for column in columns]
    return grid(
        (sideways, *head), [(key, *(cells.get(c, "") for c in columns)) for key, cells in sorted(lines.items())]
    )


def crossover_table(rows: Sequence[Row]) -> str:
    """Where sparse takes as long as dense."""
    found = crossovers(rows)
    return grid(("phase and case", "crossover density"), list(found.items()))


def whole_table(rows: Sequence[Row]) -> str:
    """Every row with its times and the metric of its goal."""
    lines = []
    for row in rows:
        metric = row.goal.metric if row.goal else next(iter(row.metrics), "")
        ours = row.times.get(OURS)
        lines.append(
            (
                f"{row.phase}, {case_text(row.case)}",
                f"{ours.median:.3g} ({ours.lower:.3g} to {ours.upper:.3g})" if ours else "",
                f"{row.times[row.reference].median:.3g}" if row.reference else "",
                f"{metric} {row.metrics[metric]:.3g}" if metric in row.metrics else "",
                goal_text(row),
            )
        )
    return grid(("what", "ours, ms (quartiles)", "reference, ms", "figure", "goal"), lines)


def memory_table(rows: Sequence[Row]) -> str:
    """Peak bytes."""
    lines = []
    for row in rows:
        for name, value in row.metrics.items():
            if name.endswith("_bytes"):
                label = name.removesuffix("_bytes")
                lines.append((f"{row.phase}, {case_text(row.case)}", NAMES.get(label, label), format_bytes(value)))
    return grid(("what", "network", "peak"), lines)


def benchmarks(results: dict[str, Results], avx2: dict[str, Results]) -> str:
    """All sections that were measured."""
    sections: list[tuple[str, str]] = []
    linear = list(results["block_sparse_linear"].rows) if "block_sparse_linear" in results else []
    plain = [r for r in linear if r.case["block"] >= 16]
    square = [r for r in plain if (r.case["out"], r.case["in"], r.case["batch"]) == (4096, 4096, 512)]
    even = [r for r in square if r.case["pattern"] == "uniform"]
    for dtype in ("float32", "bfloat16"):
        rows = [r for r in even if r.case["dtype"] == dtype]
        sections.append(
            (f"4096 × 4096, batch 512, {dtype}: eff and its goal", eff_table(rows, "density") if rows else "")
        )
    whole = [r for r in even if r.case["dtype"] == "float32"]
    sections.append(("Crossover density", crossover_table(whole) if whole else ""))
    for phase in ("forward", "grad_input", "step"):
        sections.append((f"Rivals, {phase}: speed-up over dense", rivals_table(results, phase)))
    others = {
        "Other shapes": [
            r for r in plain if r.case["batch"] in (256, 512) and (r.case["out"], r.case["in"]) != (4096, 4096)
        ],
        "Batch": [r for r in plain if r.case["batch"] not in (256, 512)],
    }
    for title, rows in others.items():
        sections.append((title, eff_table(rows, "density") if rows else ""))
    patterns = [r for r in square if r.case["pattern"] != "uniform"]
    sections.append(("Patterns", whole_table(patterns) if patterns else ""))
    small = [r for r in linear if r.case["block"] < 16]
    sections.append(("Small blocks against SparseLab", whole_table(small) if small else ""))
    titles = {
        "training_step": "Training step, overhead, threads",
        "block_gradient_squared_norms": "Block norms and candidate gradients",
        "update": "Rewires",
        "compact_blocks": "Compaction",
        "block_pattern": "Building patterns",
    }
    sections += [(title, whole_table(results[stem].rows)) for stem, title in titles.items() if stem in results]
    if "memory" in results:
        sections.append(("Peak memory", memory_table(results["memory"].rows)))
    if "block_sparse_linear" in avx2:
        rows = list(avx2["block_sparse_linear"].rows)
        sections.append(("AVX2 on both sides, 4096 × 4096, batch 512", eff_table(rows, "density")))
    written = [f"### {title}\n\n{text}" for title, text in sections if text]
    if not written:
        return ""
    goals = [row for found in (*results.values(), *avx2.values()) for row in found.rows if row.met is not None]
    count = f"{sum(bool(row.met) for row in goals)} of {len(goals)} rows with a goal reach it (✓)."
    where = "\n".join(f"- {stem}: {machine_text(found)}" for stem, found in results.items())
    return "\n\n".join([f"{count} Measured on:\n\n{where}", *written])


# --- the main job ---------------------------------------------------------------------------------------------------


def keep_main_job(run: Path) -> None:
    """Copies the summary of a run of ``sparsenet train``, without what only that machine knows."""
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    for name in ("folder", "plots"):
        summary.pop(name, None)
    (RESULTS / "main_job.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def main_job() -> str:
    """What ``make demo`` does, in one paragraph."""
    path = RESULTS / "main_job.json"
    if not path.exists():
        return ""
    found = json.loads(path.read_text(encoding="utf-8"))
    sizes, threads = "-".join(map(str, found["sizes"])), found["environment"]["threads"]
    budget, measured, dense = (
        format_bytes(found[name]) for name in ("budget_bytes", "measured_peak_bytes", "dense_peak_bytes")
    )
    return (
        f"The main job, measured: a {sizes} network on Fashion-MNIST, trained from nothing and rewired "
        f"{found['rewires']} times inside **{budget}** (measured {measured}; dense with the same optimizer: {dense}), "
        f"reaches **{100 * found['test_accuracy']:.1f} %** in {found['seconds_total']:.0f} seconds on {threads} cores, "
        f"each step **{found['speedup_over_dense']:.1f} times** as fast as dense at {found['density']:.0%} density."
    )


# --- files ----------------------------------------------------------------------------------------------------------


def with_section(text: str, marker: str, section: str) -> str:
    """``text`` with what stands between the two markers replaced."""
    pattern = rf"(<!-- {marker}: begin -->\n).*?(<!-- {marker}: end -->)"
    if not re.search(pattern, text, re.DOTALL):
        raise ValueError(f"tables: the page must hold the markers '{marker}: begin' and '{marker}: end'")
    body = f"{section}\n" if section else ""
    return re.sub(pattern, lambda found: found[1] + body + found[2], text, flags=re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Writes the tables, or says whether they are what they should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit status 1 if a table is not up to date"
    )
    parser.add_argument("--main-job", type=Path, metavar="RUN", help="folder of a run of sparsenet train to keep")
    options = parser.parse_args(arguments)
    if options.main_job:
        keep_main_job(options.main_job)
    results, avx2 = load(), load("_avx2")
    pages = {
        ROOT / "README.md": {"demo": main_job(), "performance": readme(results)},
        ROOT / "docs" / "results" / "benchmarks.md": {"performance": benchmarks(results, avx2)},
    }
    stale = []
    for page, sections in pages.items():
        after = before = page.read_text(encoding="utf-8")
        for marker, section in sections.items():
            after = with_section(after, marker, section)
        if before != after:
            stale.append(page.name)
            if not options.check:
                page.write_text(after, encoding="utf-8")
    if options.check and stale:
        print(f"not what bench/results says: {', '.join(stale)}; run python bench/tables.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
