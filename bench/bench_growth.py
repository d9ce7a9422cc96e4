"""What the Grower itself costs: steps with it against the same steps without, in time and in memory.

    python bench/bench_growth.py --results bench/results     # some minutes

Two copies of a network train in turns, one interval of each at a time, so that what disturbs the machine disturbs both.
Growth is held at the network's own size (``parameters``), so that both do the same work; the Grower looks, decides,
exchanges blocks and counts as ever. The least ratio of several repeats is the one least disturbed; all are written.
``growing`` is the share that one decision takes while the network does grow, spread over its interval. The goal is 10 %
of a step on average.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from torch import nn

import sparsenet as sn
from sparsenet.benchmark.machine import describe, today
from sparsenet.files import replace_text

GOAL, BATCH, INTERVALS = 0.10, 128, 6


def dense() -> nn.Module:
    """784-256-256-10."""
    return nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))


def sparse() -> nn.Module:
    """784-1024-1024-10 of which a tenth is there."""
    return sn.SparseMLP([784, 1024, 1024, 10], density=0.1, generator=torch.Generator().manual_seed(0))


class Run:
    """A network with its optimizer, with a Grower or without."""

    def __init__(self, make, every: int, grows: bool | None):
        torch.manual_seed(0)
        self.model = make()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), fused=True)
        self.x, self.y = torch.randn(BATCH, 784), torch.arange(BATCH) % 10
        self.grower, self.in_grower = None, 0.0
        if grows is not None:
            size = sum(p.numel() for p in self.model.parameters())
            most = 4 * size if grows else size
            self.grower = sn.Grower(self.model, self.optimizer, "1GiB", parameters=most, every=every, idle=0.0)

    def steps(self, count: int) -> float:
        """Seconds of so many steps; those inside the Grower are added up beside."""
        begin = time.perf_counter()
        for _ in range(count):
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self.model(self.x), self.y)
            loss.backward()
            self.optimizer.step()
            if self.grower is not None:
                entered = time.perf_counter()
                self.grower.step(loss)
                self.in_grower += time.perf_counter() - entered
        return time.perf_counter() - begin


def measured(name: str, make, every: int, repeats: int) -> dict:
    """One row: ratios by repeat, the least, the Grower's own share, and bytes of the peaks."""
    ratios, shares, growing = [], [], []
    for _ in range(repeats):
        plain, grown = Run(make, every, None), Run(make, every, False)
        plain.steps(every), grown.steps(every)  # warm, and past the first decision
        grown.in_grower = 0.0
        pairs = [(grown.steps(every), plain.steps(every)) for _ in range(INTERVALS)]
        ratios.append(statistics.median(a / b for a, b in pairs))
        shares.append(grown.in_grower / sum(b for _, b in pairs))
        full = Run(make, every, True)
        full.steps(every)
        full.in_grower = 0.0
        seconds = full.steps(INTERVALS * every)
        growing.append(full.in_grower / (seconds - full.in_grower))
    peaks = []
    for grows in (None, False):
        run = Run(make, every, grows)
        run.steps(2)
        sn.memory.release_freed_memory()
        with sn.measure_peak() as peak:
            run.steps(2 * every)
        peaks.append(peak.bytes)
    return {
        "network": name, "every": every, "batch": BATCH,
        "least_ratio": min(ratios), "ratios": ratios, "own_share": min(shares), "growing_share": min(growing),
        "peak_bytes_without": peaks[0], "peak_bytes_with": peaks[1],
    }  # fmt: skip


def main() -> None:
    """Measures, prints a table, and writes it where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="folder for growth.json")
    parser.add_argument("--repeats", type=int, default=4, help="of each row (4)")
    options = parser.parse_args()
    rows = []
    for name, make in (("dense 784-256-256-10", dense), ("sparse 784-1024-1024-10 at 0.1", sparse)):
        for every in (50, 25):
            rows.append(measured(name, make, every, options.repeats))
            row = rows[-1]
            print(
                f"{name:32} every {every:3}: {row['least_ratio']:.3f} of a step, own share {row['own_share']:.1%}, "
                f"while growing {row['growing_share']:.1%}"
            )
    if options.results is not None:
        content = {"machine": describe(), "date": today(), "load": os.getloadavg()[0], "goal": GOAL, "rows": rows}
        replace_text(options.results / "growth.json", json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
