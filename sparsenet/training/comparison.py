"""Times training steps of a sparse network and of the same network dense, side by side, in a process of their own.

The dense network must not spoil the memory measurement of the run it is compared with, hence the child process:
``python -m sparsenet.training.comparison`` reads a request as JSON from its standard input and prints the answer as
JSON.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from sparsenet.memory.budget import available_bytes, format_bytes, measure_peak, release_freed_memory
from sparsenet.memory.planning import MemoryPlan
from sparsenet.models import SparseMLP

__all__ = ["Comparison", "compare", "compare_in_child"]

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
_WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Comparison:
    """Median seconds per step of both networks, timed in turns, and the dense one's measured peak.

    ``skipped`` says why there are no figures, if there are none.
    """

    dense_seconds_per_step: float | None = None
    sparse_seconds_per_step: float | None = None
    dense_peak_bytes: int | None = None
    skipped: str = ""

    @property
    def speedup(self) -> float | None:
        """Dense time / sparse time."""
        if self.dense_seconds_per_step is None or self.sparse_seconds_per_step is None:
            return None
        return self.dense_seconds_per_step / self.sparse_seconds_per_step


def compare_in_child(plan: MemoryPlan, steps: int, threads: int, timeout_seconds: float = 300.0) -> Comparison:
    """Runs :func:`compare` in a new process; never raises for what happens there."""
    free = available_bytes()
    if plan.dense_bytes + (256 << 20) > free:
        return Comparison(
            skipped=f"the dense network needs {format_bytes(plan.dense_bytes)}, {format_bytes(free)} are free"
        )
    request = {
        "sizes": plan.sizes,
        "densities": [layer.density for layer in plan.layers],
        "block_sizes": plan.block_sizes,
        "activation": plan.activation,
        "batch_size": plan.batch_size,
        "optimizer": plan.optimizer,
        "dtype": plan.dtype,
        "steps": steps,
        "threads": threads,
    }
    root = str(Path(__file__).resolve().parents[2])
    try:
        child = subprocess.run(
            [sys.executable, "-m", "sparsenet.training.comparison"],
            input=json.dumps(request),
            cwd=root,  # where the child imports from, before a checkout that the parent may stand in
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=True,
        )
        return Comparison(**json.loads(child.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return Comparison(skipped=f"it took more than {timeout_seconds:.0f} s")
    except (subprocess.CalledProcessError, OSError, ValueError, IndexError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        return Comparison(skipped=f"the comparison process failed: {said[-1] if said else error}")


def compare(
    sizes: list[int],
    densities: list[float],
    block_sizes: list[int],
    activation: str,
    batch_size: int,
    optimizer: str,
    dtype: str,
    steps: int,
    threads: int,
) -> Comparison:
    """Trains both networks on random data, one step of each in turn; see :class:`Comparison`."""
    release_freed_memory()
    torch.set_num_threads(threads)
    kind = getattr(torch, dtype)
    x = torch.randn(batch_size, sizes[0], dtype=kind)
    y = torch.randint(sizes[-1], (batch_size,))
    with measure_peak() as peak:
        dense = _stepper(_dense_network(sizes, activation, kind), optimizer, x, y)
        for _ in range(_WARM_UP_STEPS):
            dense()
    sparse = _stepper(SparseMLP(sizes, densities, block_sizes, activation, dtype=kind), optimizer, x, y)
    for _ in range(_WARM_UP_STEPS):
        sparse()
    seconds: dict[Callable[[], None], list[float]] = {dense: [], sparse: []}
    for _ in range(steps):
        for step, taken in seconds.items():
            begin = time.perf_counter()
            step()
            taken.append(time.perf_counter() - begin)
    return Comparison(statistics.median(seconds[dense]), statistics.median(seconds[sparse]), peak.bytes)


def _dense_network(sizes: list[int], activation: str, dtype: torch.dtype) -> nn.Sequential:
    modules: list[nn.Module] = []
    for inp, out in pairwise(sizes):
        modules += [nn.Linear(inp, out, dtype=dtype), _ACTIVATIONS[activation]()]
    return nn.Sequential(*modules[:-1])


def _stepper(model: nn.Module, optimizer: str, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    """A function that takes one training step."""
    if optimizer == "adamw":
        update = torch.optim.AdamW(model.parameters(), fused=True)
    else:
        update = torch.optim.SGD(model.parameters(), 0.01, 0.9, fused=True)

    def step() -> None:
        nn.functional.cross_entropy(model(x).float(), y).backward()
        update.step()
        update.zero_grad()

    return step


if __name__ == "__main__":
    print(json.dumps(asdict(compare(**json.load(sys.stdin)))))
