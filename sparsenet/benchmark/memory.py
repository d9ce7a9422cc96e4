"""Peak memory, each measurement in a process of its own: ``python -m sparsenet.benchmark.memory`` reads a request.

Training is measured over forward, backward, optimizer and (ours) a rewire; the operations over one call.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sparsenet import functional
from sparsenet.benchmark import machine
from sparsenet.benchmark.networks import NETWORKS, OPTIMIZERS, training_step
from sparsenet.benchmark.trial import OURS, Row, Unavailable
from sparsenet.memory.budget import measure_peak, release_freed_memory
from sparsenet.policies.policy import RigL
from sparsenet.sparsifier import Sparsifier

__all__ = ["norms_memory_row", "peak_bytes", "training_memory_row"]

_STEPS = 4  # the last of ours rewires


def training_memory_row(
    optimizer: str,
    density: float,
    networks: tuple[str, ...] = tuple(NETWORKS),
    sizes: tuple[int, ...] = (784, 4096, 4096, 4096, 10),
    batch: int = 256,
    block_size: int = 32,
) -> Row:
    """Peak bytes of training each network; ``share_of_dense`` is ours / dense."""
    request = {"sizes": sizes, "density": density, "block": block_size, "batch": batch, "optimizer": optimizer}
    metrics, left_out = {}, {}
    for name in networks:
        answer = _in_child({**request, "network": name})
        if "bytes" in answer:
            metrics[f"{name}_bytes"] = answer["bytes"]
        else:
            left_out[name] = answer["left_out"]
    if "dense_bytes" in metrics:
        metrics["share_of_dense"] = metrics[f"{OURS}_bytes"] / metrics["dense_bytes"]
    case = {"sizes": "-".join(map(str, sizes)), "batch": batch, "density": density, "block": block_size}
    return _row("training", case | {"optimizer": optimizer}, metrics, left_out)


def norms_memory_row(features: int = 8192, batch: int = 256, block_size: int = 32) -> Row:
    """Peak bytes of the block norms of a dense gradient that is never stored, result included."""
    request = {"features": features, "batch": batch, "block": block_size}
    metrics = {f"{OURS}_bytes": _in_child(request)["bytes"], "dense_gradient_bytes": 4.0 * features**2}
    metrics["share_of_dense_gradient"] = metrics[f"{OURS}_bytes"] / metrics["dense_gradient_bytes"]
    case = {"out": features, "in": features, "batch": batch, "block": block_size, "dtype": "float32"}
    return _row("block_gradient_squared_norms", case, metrics, {})


def _row(phase: str, case: Mapping[str, Any], metrics: dict[str, float], left_out: dict[str, str]) -> Row:
    fields = {"case": dict(case) | {"threads": torch.get_num_threads()}, "metrics": metrics, "left_out": left_out}
    empty = {"times": {}, "reference": "", "speedups": {}, "goal": None, "rounds": 1}
    return Row(op="memory", phase=phase, date=machine.today(), **fields, **empty)


def _in_child(request: Mapping[str, Any]) -> dict[str, Any]:
    root = str(Path(__file__).resolve().parents[2])
    child = subprocess.run(
        [sys.executable, "-m", "sparsenet.benchmark.memory"],
        input=json.dumps(request),
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if child.returncode:
        said = child.stderr.strip().splitlines()
        raise RuntimeError(f"bench: the measuring process must end well, got {said[-1] if said else child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def peak_bytes(request: Mapping[str, Any]) -> float:
    """Runs what ``request`` asks for in this process and returns its peak above what was in use before."""
    release_freed_memory()
    torch.manual_seed(0)
    if "network" in request:
        return _training_peak(request)
    x, grad = (torch.randn(request["batch"], request["features"]) for _ in range(2))
    with measure_peak() as peak:
        functional.block_gradient_squared_norms(x, grad, request["block"])
    return float(peak.bytes)


def _training_peak(request: Mapping[str, Any]) -> float:
    sizes, density, block = request["sizes"], request["density"], request["block"]
    x, y = torch.randn(request["batch"], sizes[0]), torch.randint(sizes[-1], (request["batch"],))
    if request["network"] == "sparselab":
        NETWORKS["sparselab"]([8, 8], density, block)  # loads it
    with measure_peak() as peak:
        model = NETWORKS[request["network"]](sizes, density, block)
        optimizer = OPTIMIZERS[request["optimizer"]](list(model.parameters()))
        after = None
        if request["network"] == OURS:
            after = Sparsifier(model, optimizer, RigL(drop_fraction=0.3), every=_STEPS).step
        step = training_step(model, optimizer, x, y, after)
        for _ in range(_STEPS):
            step()
    return float(peak.bytes)


if __name__ == "__main__":
    try:
        print(json.dumps({"bytes": peak_bytes(json.load(sys.stdin))}))
    except Unavailable as reason:
        print(json.dumps({"left_out": str(reason)}))
