"""``sparsenet reproduce training``: whether sparse training pays, against the dense network one would take instead.

Ten data sets, five densities: our defaults, a static pattern, the wide dense network, and dense networks of as many
weights or bytes; then the levers one at a time, SparseLab on the same recipe, times of a step and measured peaks. Every
training is a cell that is kept as soon as it is done, every part a file ``<out>/<part>.json``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sparsenet.memory import measure_peak, release_freed_memory
from sparsenet.reproduce import parts as reproduce_parts
from sparsenet.reproduce import training_tables
from sparsenet.reproduce.rows import kept_row
from sparsenet.reproduce.training_arms import BATCH, Arm, build, planned_bytes, train_arm
from sparsenet.reproduce.training_levers import BASE, LEVER_TASKS, LEVERS
from sparsenet.reproduce.training_permutation import compare_orders, whole_task
from sparsenet.reproduce.training_tasks import TASKS, Unavailable, training_task

__all__ = ["PARTS", "add_arguments", "run"]

DENSITIES = (0.1, 0.05, 0.2, 0.02, 0.01)
ALL_SEEDS_AT = (0.1, 0.05)  # the other densities take fewer
FEW_SEEDS = 2
WIDE_SEEDS = 3  # at most: it takes half of the time
OURS = Arm(policy="rigl")


@dataclass
class Comparison:
    """One run: ``out`` is the folder of everything, ``scale`` below 1 a quick look, ``seeds`` trainings of each kind.

    Raises:
        ValueError: ``seeds`` below 1.
    """

    out: Path
    scale: float = 1.0
    seeds: int = 5

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"reproduce training: seeds must be at least 1, got {self.seeds}")

    def seeds_for(self, density: float | None = None) -> range:
        """At a small scale one."""
        if self.scale < 1:
            return range(1)
        return range(self.seeds if density in ALL_SEEDS_AT else min(FEW_SEEDS, self.seeds))

    def row(self, part: str, name: str, arm: Arm, task: str, seed: int, **labels) -> dict:
        """One training, kept under its labels."""
        key = {"task": task, "arm": name, "seed": seed, **labels}
        cells = self.out / ("cells" if self.scale == 1 else f"cells_{self.scale:g}") / f"{part}.jsonl"
        return kept_row(cells, key, lambda: train_arm(arm, training_task(task, seed, self.scale), seed, self.scale))


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")


def arms_at(density: float) -> dict[str, Arm]:
    """What is compared at one density."""
    ours = replace(OURS, density=density)
    return {
        "sparse": ours,
        "static": replace(ours, policy="static"),
        "dense, equal bytes": replace(ours, kind="equal bytes"),
        "dense, equal weights": replace(ours, kind="equal weights"),
    }


def _say_skipped(what: str, error: Unavailable) -> None:
    print(f"reproduce training: {what} is SKIPPED: {error}", flush=True)


def _skipped(part: str, error: Unavailable) -> dict:
    _say_skipped(part, error)
    return {"rows": [], "skipped": str(error)}


def compare(run: Comparison, task: str) -> dict:
    """One data set: the wide dense network, and at each density the sparse ones and the dense ones instead."""
    part = _slug(task)
    try:
        training_task(task, 0, run.scale)
    except Unavailable as error:
        return _skipped(part, error)
    wide = replace(OURS, kind="wide")
    rows = [run.row(part, "dense, wide", wide, task, s) for s in run.seeds_for(ALL_SEEDS_AT[0])[:WIDE_SEEDS]]
    for density in DENSITIES:
        for seed in run.seeds_for(density):
            for name, arm in arms_at(density).items():
                rows.append(run.row(part, name, arm, task, seed, density=density))
    return {"rows": rows}


def pull(run: Comparison, lever: str) -> dict:
    """One lever, on four data sets. The base recipe is trained once for all levers."""
    rows = []
    for task in LEVER_TASKS:
        try:
            for seed in run.seeds_for():
                for name, arm in LEVERS[lever].items():
                    kept = "base" if arm == BASE else f"{lever}: {name}"
                    rows.append({**run.row("levers", kept, arm, task, seed), "arm": name})
        except Unavailable as error:
            _say_skipped(f"{task} in {lever}", error)
    return {"rows": rows, "lever": lever}


def rival(run: Comparison) -> dict:
    """SparseLab's RigL and static pattern beside ours, at 10 and 5 %, on two data sets."""
    rows = []
    try:
        for task in ("digits", "Fashion-MNIST"):
            for density in ALL_SEEDS_AT:
                ours = replace(OURS, density=density)
                arms = {
                    "sparsenet": ours,
                    "sparsenet, static": replace(ours, policy="static"),
                    "SparseLab, RigL": replace(ours, kind="sparselab"),
                    "SparseLab, static": replace(ours, kind="sparselab", policy="static"),
                }
                for seed in run.seeds_for():
                    for name, arm in arms.items():
                        rows.append(run.row("rival", name, arm, task, seed, density=density))
    except Unavailable as error:
        return _skipped("rival", error)
    return {"rows": rows}


def permutation(run: Comparison) -> dict:
    """Networks cut to their most important blocks, with their hidden units as they are and gathered."""
    try:
        task = whole_task(run.scale)
    except Unavailable as error:
        return _skipped("permutation", error)
    seeds = run.seeds_for(ALL_SEEDS_AT[0])[:WIDE_SEEDS]
    return {"rows": [row for seed in seeds for row in compare_orders(task, seed)]}


# --- times and bytes --------------------------------------------------------------------------------------------------


def _stepper(arm: Arm, task) -> Callable[[], None]:
    """One step of training: forward, backward and the optimizer."""
    model = build(arm, task, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    x, y = (t[:BATCH] for t in task.train)

    def step() -> None:
        loss = task.loss(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return step


def step_times(run: Comparison, rounds: int = 15, steps: int = 10) -> dict:
    """Processor time of a step in milliseconds, all networks in turns; ratios to the dense one of equal bytes."""
    rows = []
    for name in ("Fashion-MNIST", "digits"):
        try:
            task = training_task(name, 0, run.scale)
        except Unavailable as error:
            _say_skipped(f"{name} in step_times", error)
            continue
        for density in DENSITIES:
            arms = {**arms_at(density), "dense, wide": replace(OURS, kind="wide")}
            steppers = {key: _stepper(arm, task) for key, arm in arms.items()}
            found: dict[str, list[float]] = {key: [] for key in arms}
            for turn in range(1 + (rounds if run.scale == 1 else 2)):
                for key, step in steppers.items():
                    started = time.process_time()
                    for _ in range(steps):
                        step()
                    if turn:
                        found[key].append((time.process_time() - started) / steps * 1e3)
            for key, times in found.items():
                ratio = statistics.median(a / b for a, b in zip(times, found["dense, equal bytes"], strict=True))
                rows.append(
                    {
                        "task": name,
                        "density": density,
                        "arm": key,
                        "ms": statistics.median(times),
                        "ratio": ratio,
                        "bytes": planned_bytes(arms[key], task),
                    }
                )
    return {"rows": rows}


def _peak_of(arm: Arm, name: str) -> int:
    """Measured in this process, which does nothing else: bytes above what it held before there was a network."""
    torch.set_num_threads(1)
    task = training_task(name)
    nn.Linear(8, 8)(torch.ones(1, 8)).sum().backward()
    one_batch = {
        part: tuple(t[:BATCH].clone() for t in getattr(task, part)) for part in ("train", "validation", "test")
    }
    task = replace(task, **one_batch)
    release_freed_memory()
    with measure_peak() as peak:
        train_arm(replace(arm, epochs=12, rewires=3), task, 0)
    return peak.bytes


def peaks(run: Comparison, name: str = "Fashion-MNIST") -> dict:
    """Peaks of memory beside the plan's, each measured in a process of its own."""
    rows = []
    try:
        task = training_task(name)
        for density in ALL_SEEDS_AT:
            for key, arm in {**arms_at(density), "dense, wide": replace(OURS, kind="wide")}.items():
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    measured = pool.apply(_peak_of, (arm, name))
                rows.append({"density": density, "arm": key, "bytes": planned_bytes(arm, task), "measured": measured})
    except Unavailable as error:
        return _skipped("peaks", error)
    return {"rows": rows}


PARTS: dict[str, Callable[[Comparison], dict]] = {
    **{_slug(name): partial(compare, task=name) for name in TASKS},
    **{"lever_" + _slug(name): partial(pull, lever=name) for name in LEVERS},
    "permutation": permutation,
    "rival": rival,
    "step_times": step_times,
    "peaks": peaks,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sparsenet reproduce training``."""
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each kind at 10 and 5 %% (5)")
    reproduce_parts.add_arguments(parser, "reproduce-training", PARTS)


def run(args: argparse.Namespace) -> int:
    """Runs the parts that are missing, prints the tables, draws the figures; errors: ``parts.reproduce``.

    A part whose data was missing is tried again.
    """
    task = Comparison(Path(args.out), args.scale, args.seeds)
    for part, numbers in reproduce_parts.read_parts(task.out, PARTS).items():
        if "skipped" in numbers and (args.parts == "all" or part in args.parts.split(",")):
            (task.out / f"{part}.json").unlink()
    return reproduce_parts.reproduce("training", args, PARTS, task, training_tables.tables, training_tables.figures)
