"""Step times predicted from measured layers, against real training steps of dense, block-sparse and convolutional nets.

    python bench/bench_step_time.py --results bench/results     # two or three minutes; OMP_NUM_THREADS sets the threads

Layers are measured anew, in a cache of their own. Then all networks are trained in turns, one step each in every round,
so that what disturbs the machine disturbs them alike. ``raw`` compares what the layers' times alone predict with the
lower quartile of a network's steps; ``followed`` compares what a model of step times that observes each network's first
steps predicts with the median of its later ones. The goal is an error of 15 % on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

import sparsenet as sn
from sparsenet.benchmark.machine import describe, today
from sparsenet.benchmark.timing import Quartiles
from sparsenet.files import replace_text
from sparsenet.memory import StepTimeModel, layer_costs

GOAL = 0.15


def dense(*sizes: int) -> nn.Module:
    """A multilayer perceptron of ``nn.Linear`` and ReLU."""
    layers = [module for i, o in pairwise(sizes) for module in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def block(width: int, density: float, block_size: int) -> nn.Module:
    """784-width-width-10 of block-sparse layers."""
    return sn.SparseMLP([784, width, width, 10], density=density, block_size=block_size)


def conv(channels: int) -> nn.Module:
    """Two convolutions with pooling, and a linear layer."""
    layers = [m for i, o in ((1, channels), (channels, 2 * channels)) for m in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]  # fmt: skip # noqa: E501
    return nn.Sequential(nn.Unflatten(1, (1, 28, 28)), *layers, nn.Flatten(), nn.Linear(2 * channels * 49, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {  # name: network, rows of a batch
    "dense 64": (lambda: dense(784, 64, 64, 10), 64),
    "dense 300-100": (lambda: dense(784, 300, 100, 10), 100),
    "dense 512": (lambda: dense(784, 512, 512, 10), 128),
    "dense 1024": (lambda: dense(784, 1024, 1024, 10), 256),
    "dense 2048": (lambda: dense(784, 2048, 2048, 10), 32),
    "block 512 at 0.2, b=16": (lambda: block(512, 0.2, 16), 128),
    "block 1024 at 0.1, b=16": (lambda: block(1024, 0.1, 16), 64),
    "block 1500 at 0.1, b=32": (lambda: block(1500, 0.1, 32), 200),
    "block 2048 at 0.05, b=16": (lambda: block(2048, 0.05, 16), 128),
    "block 2048 at 0.2, b=32": (lambda: block(2048, 0.2, 32), 256),
    "conv 8": (lambda: conv(8), 64),
    "conv 16": (lambda: conv(16), 128),
}


def main() -> None:
    """Measures, prints a table, and writes it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder for step_time.json")
    parser.add_argument("--rounds", type=int, default=40, help="steps of each network (40)")
    parser.add_argument("networks", nargs="*", help="only those whose names contain one of these")
    options = parser.parse_args()
    names = [n for n in NETWORKS if not options.networks or any(part in n for part in options.networks)]
    with tempfile.TemporaryDirectory() as folder:
        rows = measured(names, options.rounds, folder)
    print(f"{'network':26} {'raw ms':>8} {'quartile':>8} {'error':>6} | {'followed':>8} {'median':>8} {'error':>6}")
    for row in rows:
        print(
            f"{row['network']:26} {row['raw_ms']:8.2f} {row['lower_quartile_ms']:8.2f} {row['raw_error']:6.1%} | "
            f"{row['followed_ms']:8.2f} {row['median_ms']:8.2f} {row['followed_error']:6.1%}"
        )
    summary = {f"{kind}_errors_within_goal": sum(abs(row[f"{kind}_error"]) <= GOAL for row in rows) for kind in ("raw", "followed")}  # fmt: skip # noqa: E501
    summary |= {"networks": len(rows), "measuring_seconds": round(sum(row["measuring_seconds"] for row in rows), 2)}
    print(summary)
    if options.results is not None:
        content = {"machine": describe(), "date": today(), "load": os.getloadavg()[0], "goal": GOAL}
        replace_text(options.results / "step_time.json", json.dumps(content | summary | {"rows": rows}, indent=1))


def measured(names: list[str], rounds: int, folder: str) -> list[dict]:
    """A row for each network."""
    torch.manual_seed(0)
    steps, raw, costs, models, seconds = {}, {}, {}, {}, {}
    for name in names:
        make, batch = NETWORKS[name]
        steps[name], network, optimizer, x = training(make(), batch)
        costs[name] = layer_costs(network, x)
        models[name] = StepTimeModel(optimizer, folder)
        begin = time.perf_counter()
        raw[name] = models[name].predict(costs[name])
        seconds[name] = time.perf_counter() - begin
        for _ in range(3):
            steps[name]()
    taken: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            steps[name]()  # brings the network's own tensors back into the caches, as in training it alone
            begin = time.perf_counter()
            steps[name]()
            taken[name].append(1e3 * (time.perf_counter() - begin))
            if number < rounds // 2:
                models[name].observe(costs[name], taken[name][-1])
    rows = []
    for name in names:
        quartile = Quartiles.of(taken[name]).lower
        later, followed = statistics.median(taken[name][rounds // 2 :]), models[name].predict(costs[name])
        rows.append(
            {
                "network": name, "batch": NETWORKS[name][1], "measuring_seconds": seconds[name],
                "raw_ms": raw[name], "lower_quartile_ms": quartile, "raw_error": raw[name] / quartile - 1,
                "followed_ms": followed, "median_ms": later, "followed_error": followed / later - 1,
            }
        )  # fmt: skip
    return rows


def training(network: nn.Module, batch: int):
    """A training step as a call, with the network, the optimizer and the inputs that it uses."""
    x, y = torch.randn(batch, 784), torch.arange(batch) % 10
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()

    return step, network, optimizer, x


if __name__ == "__main__":
    main()
