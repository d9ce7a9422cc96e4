"""What compaction saves while a network trains: time per step and bytes, beside the same network left whole."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from sparsenet.architecture.compactor import Compactor
from sparsenet.architecture.gates import TriStateReLU, architecture_penalty, gated_layers, parameter_groups
from sparsenet.compaction.compacting import compact
from sparsenet.compaction.moves import model_bytes
from sparsenet.layers import SparseLinear
from sparsenet.policies.policy import RigL
from sparsenet.reproduce.gate_cells import ALL, Reproduction, weights_and_biases
from sparsenet.reproduce.gate_training import Images, evaluate
from sparsenet.reproduce.gated_networks import caffenet, lenet
from sparsenet.sparsifier import Sparsifier

__all__ = ["caffenet_mechanics", "running_process"]

SPARSE_WIDTH = 2048


class _Runner:
    """A network that takes one training step at a time."""

    def __init__(self, model: nn.Module, gate_lr: float, lambda_3: float, rewire_every: int = 0):
        self.model, self.lambda_3 = model.train(), lambda_3
        self.optimizer = torch.optim.SGD(parameter_groups(model, gate_lr), lr=0.05, momentum=0.9)
        self.sparsifier = None
        if rewire_every:
            self.sparsifier = Sparsifier(model, self.optimizer, RigL(drop_fraction=0.1), every=rewire_every)

    def step(self, x: torch.Tensor, y: torch.Tensor) -> float:
        """Seconds of one step, the Sparsifier's share included."""
        began = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(x), y) + architecture_penalty(self.model, self.lambda_3, 1e-4)
        loss.backward()
        self.optimizer.step()
        if self.sparsifier is not None:
            self.sparsifier.step()
        return time.perf_counter() - began


def _lenet_runner() -> _Runner:
    torch.manual_seed(0)
    model = lenet(learn=ALL, generator=torch.Generator().manual_seed(0), map_start=1.0)
    return _Runner(model.to(memory_format=torch.channels_last), gate_lr=0.3, lambda_3=3e-4)


def _sparse_runner() -> _Runner:
    """A block-sparse perceptron, rewired as it trains."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    options = {"density": 0.25, "block_size": 16, "generator": generator}
    n = SPARSE_WIDTH
    model = nn.Sequential(
        *(nn.Flatten(), SparseLinear(784, n, **options), TriStateReLU(n, depth=False, generator=generator)),
        *(SparseLinear(n, n, **options), TriStateReLU(n, depth=False, generator=generator), nn.Linear(n, 10)),
    )
    return _Runner(model, gate_lr=0.3, lambda_3=1e-3, rewire_every=20)


def _race(make: Callable[[], _Runner], images: Images, steps: int, every: int) -> dict:
    """Trains two equal networks in turns, one of them with a Compactor; medians of the time per step, and bytes."""
    small, whole = make(), make()
    compactor = Compactor(small.model, small.optimizer, every, patience=2, sparsifier=small.sparsifier)
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {"compacted": [], "whole": []}
    rows = []
    for number in range(1, steps + 1):
        chosen = torch.randint(len(images.train_x), (64,), generator=generator)
        x, y = images.train_x[chosen], images.train_y[chosen]
        turns = [("compacted", small), ("whole", whole)]
        for name, runner in turns if number % 2 else reversed(turns):
            seconds[name].append(runner.step(x, y))
        if number % every == 0:
            state = model_bytes(whole.model, (whole.optimizer,))[1]
            ratio = statistics.median(b / a for a, b in zip(*seconds.values(), strict=True))
            rows.append({"step": number, "speedup": ratio, "bytes_whole": state})
            rows[-1] |= {name: statistics.median(taken) for name, taken in seconds.items()}
            seconds = {name: [] for name in seconds}
        compactor.step()
    for row, interval in zip(rows, compactor.intervals, strict=True):
        row |= {key: asdict(interval)[key] for key in ("units", "bytes", "removed", "check_seconds")}
    return {
        "rows": rows,
        "accuracy": {name: evaluate(runner.model, images)[0] for name, runner in turns},
        "open_whole": [gate.num_open() for gate in gated_layers(whole.model).values()],
        "units": [gate.num_features for gate in gated_layers(small.model).values()],
    }


def running_process(task: Reproduction) -> dict:
    """LeNet and a block-sparse perceptron with a Compactor, against the same left whole, in turns; MNIST."""
    races = {"LeNet 20-50-500": _lenet_runner, f"block-sparse 784-{SPARSE_WIDTH}-{SPARSE_WIDTH}-10": _sparse_runner}
    steps, every = (700, 50) if task.scale >= 1 else (24, 6)
    return {
        "races": {
            name: task.cell("running_process", name, partial(_race, make, task.mnist_images, steps, every))
            for name, make in races.items()
        }
    }


# --- CaffeNet -------------------------------------------------------------------------------------------------------


def caffenet_mechanics(task: Reproduction) -> dict:
    """A CaffeNet-shaped network on generated data: a few steps, compaction, a few more. No accuracy is claimed."""
    return task.cell("caffenet", "mechanics", partial(_caffenet, 227 if task.scale >= 1 else 67))


def _caffenet(image: int) -> dict:
    torch.manual_seed(0)
    model = caffenet(image=image, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(parameter_groups(model, gate_lr=0.01), lr=1e-3, momentum=0.9)
    generator = torch.Generator().manual_seed(1)

    def steps(count: int) -> float:
        model.train()
        taken = []
        for _ in range(count):
            x = torch.randn(4, 3, image, image, generator=generator)
            y = torch.randint(1000, (4,), generator=generator)
            began = time.process_time()
            optimizer.zero_grad()
            (F.cross_entropy(model(x), y) + architecture_penalty(model)).backward()
            optimizer.step()
            taken.append(time.process_time() - began)
        return statistics.median(taken)

    before = steps(4)
    x = torch.randn(2, 3, image, image, generator=generator)
    with torch.no_grad():
        expected = copy.deepcopy(model).eval()(x)
        parameters = weights_and_biases(model)
        report = compact(model, optimizer)
        change = float((model.eval()(x) - expected).abs().max() / expected.abs().max())
    return {
        "image": image,
        "parameters": [parameters, weights_and_biases(model)],
        "bytes": report.bytes,
        "widths": [[c.before for c in report.layers.values()], [c.after for c in report.layers.values()]],
        "cpu_seconds_per_step": [before, steps(4)],
        "compaction_seconds": report.seconds,
        "largest_relative_change": change,
    }
