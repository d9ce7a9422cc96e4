"""``sparsenet bench``: the user's door to the benchmarks.

sparsenet bench --op block_sparse_linear --sizes 4096x4096 --batch 512 --density 0.05,0.1,0.2 --plot
sparsenet bench --compare before.json after.json
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch

from sparsenet.benchmark import linear, operations, plot, training
from sparsenet.benchmark.cases import PATTERNS, Case
from sparsenet.benchmark.results import Results, compare, crossover, crossovers, read, table
from sparsenet.benchmark.rivals import RIVALS
from sparsenet.benchmark.trial import OURS, Row, Trial
from sparsenet.plotting.style import load_pyplot

__all__ = ["OPS", "add_arguments", "run"]

_Sweep = tuple[tuple[str, ...], Callable[[str, Case], Trial]]
OPS: dict[str, _Sweep] = {
    "block_gradient_squared_norms": (operations.NORMS_PHASES, operations.norms_trial),
    "block_pattern": (operations.PATTERN_PHASES, operations.pattern_trial),
    "compact_blocks": (operations.COMPACT_PHASES, operations.compact_trial),
}
_FIXED = ("overhead", "threads", "update", "training_step")  # benches of one size each, with a goal
_BISECTIONS = 3  # densities tried to enclose a crossover


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sparsenet bench``."""
    add = parser.add_argument
    names = ("block_sparse_linear", *OPS, *_FIXED)
    add("--op", nargs="+", type=_list_of(_name(names)), default=["block_sparse_linear"], help=", ".join(names))
    add("--sizes", nargs="+", type=_list_of(_size), default=[(2048, 2048)], metavar="OUTxIN", help="(2048x2048)")
    add("--batch", nargs="+", type=_list_of(int), default=[512], help="rows of x (512)")
    add("--density", nargs="+", type=_list_of(float), default=[0.1], help="shares of active blocks (0.1)")
    add("--block", nargs="+", type=_list_of(int), default=[32], help="block sizes (32)")
    add("--dtype", nargs="+", type=_list_of(str), default=["float32"], help="float32, bfloat16, float16, float64")
    add("--pattern", nargs="+", type=_list_of(str), default=["uniform"], help=", ".join(PATTERNS))
    add("--phase", nargs="+", type=_list_of(str), help=f"only these of {', '.join(linear.PHASES)}")
    add("--rivals", nargs="*", type=_list_of(str), help=f"{', '.join(RIVALS)}; all if none is named (dense)")
    add("--no-crossover", action="store_true", help="do not look for the density where sparse is as slow as dense")
    add("--seconds", type=float, default=1.0, help="for each comparison (1)")
    add("--threads", type=int, default=0, help="0: torch's")
    add("--json", type=Path, metavar="FILE", help="where the results go (runs/bench-DATE.json)")
    add(
        "--plot",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="draw speed-up over density (as the JSON, .png)",
    )
    add("--compare", type=Path, nargs=2, metavar="FILE", help="print the ratios of two results instead of measuring")


def run(options: argparse.Namespace) -> int:
    """Measures, prints the table, writes JSON."""
    if options.compare:
        print(compare(*(read(path) for path in options.compare)))
        return 0
    if options.threads < 0 or options.seconds <= 0:
        wrong = f"--threads {options.threads}" if options.threads < 0 else f"--seconds {options.seconds}"
        raise ValueError(f"bench: threads and seconds must be positive, got {wrong}")
    if options.threads:
        torch.set_num_threads(options.threads)
    path = options.json or Path("runs") / f"bench-{time.strftime('%Y%m%d-%H%M%S')}.json"
    if options.plot is not None:
        load_pyplot()  # before minutes of measuring, not after
    rows: list[Row] = []
    try:
        for row in _rows(options):
            rows.append(row)
    except KeyboardInterrupt:
        if not rows:
            raise
        print("interrupted: what was measured so far")
    results = Results.of(rows)
    print(f"{_headline(results)}\n\n{table(rows)}")
    found = crossovers([row for row in rows if row.op == "block_sparse_linear"])
    if found and not options.no_crossover:
        print("\ncrossover density (where sparse takes as long as dense)")
        print("\n".join(f"  {name:<60}{text}" for name, text in found.items()))
    for name, reason in {n: r for row in rows for n, r in row.left_out.items()}.items():
        print(f"{name} left out of some rows: {reason}")
    results.write(path)
    print(f"\nwritten: {path}")
    if options.plot is not None:
        picture = path.with_suffix(".png") if options.plot == Path() else options.plot
        plot.draw(rows, picture)
        print(f"written: {picture}")
    return 0


def _headline(results: Results) -> str:
    host, most = results.machine, results.ceilings
    peaks = most.fma_gflops or {}
    fma = ", ".join(f"{value:.0f} GFLOP/s {name}" for name, value in peaks.items()) or "not measured (no C compiler)"
    return (
        f"{host['cpu']}, {host['threads']} threads, {host['isa']}, torch {host['torch']}; "
        f"multiply-adds at most {fma}; copy {most.copy_gbytes:.1f} GB/s\n"
        "medians over rounds of calls in turns; eff = density x dense time / our time; rivals as speed-up over dense"
    )


# --- what is measured -----------------------------------------------------------------------------------------------


def _rows(options: argparse.Namespace) -> Iterator[Row]:
    flat = {name: _flat(getattr(options, name)) for name in ("op", "sizes", "batch", "block", "dtype", "pattern")}
    densities = _flat(options.density)
    grid = list(product(flat["dtype"], flat["sizes"], flat["batch"], flat["block"], flat["pattern"]))
    for op in flat["op"]:
        if op in _FIXED:
            yield from (trial.run(options.seconds) for trial in training.trials(op))
            continue
        for dtype, shape, batch, block, pattern in grid:
            cases = [Case(shape, batch, density, block, dtype, pattern) for density in densities]
            for case in cases:
                case.block_pattern()  # what is wrong with it shows before anything is measured
            if op == "block_sparse_linear":
                yield from _linear_rows(cases, options)
                continue
            phases, make = OPS[op]
            for phase in phases:
                for case in cases if phase != "norms" else cases[:1]:  # norms are of all blocks
                    yield make(phase, case).run(options.seconds)


def _linear_rows(cases: list[Case], options: argparse.Namespace) -> Iterator[Row]:
    rivals = tuple(RIVALS) if options.plot is not None else ("dense",)
    if options.rivals is not None:
        rivals = tuple(dict.fromkeys(("dense", *(_flat(options.rivals) or RIVALS))))
    for phase in _flat(options.phase) if options.phase else linear.PHASES:
        points = []
        for case in cases:
            row = linear.trial(phase, case, rivals).run(options.seconds)
            points.append((row.case["density"], row.speedups[OURS].median))
            yield row
        if not options.no_crossover:
            for density in _crossover_densities(points):
                row = linear.trial(phase, _at(cases[0], density)).run(options.seconds)
                points.append((row.case["density"], row.speedups[OURS].median))
                yield row


def _at(case: Case, density: float) -> Case:
    return Case(case.shape, case.batch, density, case.block_size, case.dtype, case.pattern)


def _crossover_densities(points: list[tuple[float, float]]) -> Iterator[float]:
    """100 %, and while sparse loses there densities halfway, until two neighbours enclose the crossover closely.

    The caller appends what it measured to ``points`` between two densities.
    """
    if max(density for density, _ in points) < 1.0:
        yield 1.0
    for _ in range(_BISECTIONS):
        wins = [d for d, speedup in points if speedup >= 1.0]
        loses = [d for d, speedup in points if speedup < 1.0]
        if not loses or not wins or crossover(sorted(points)) is None or min(loses) / max(wins) < 1.3:
            return
        yield (max(wins) * min(loses)) ** 0.5


# --- arguments ------------------------------------------------------------------------------------------------------


def _list_of(kind: Callable[[str], object]) -> Callable[[str], list]:
    """Comma-separated values; with nargs, spaces separate as well."""

    def parse(text: str) -> list:
        return [kind(part) for part in text.split(",") if part]

    parse.__name__ = getattr(kind, "__name__", "value")
    return parse


def _flat(lists: list) -> list:
    return [item for part in lists for item in (part if isinstance(part, list) else [part])]


def _name(names: tuple[str, ...]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"op must be one of {', '.join(names)}, got {text!r}")
        return text

    return parse


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"sizes must be OUTxIN such as 2048x2048, got {text!r}")
    return int(found[1]), int(found[2])
