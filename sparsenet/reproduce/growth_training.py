"""One training of ``sparsenet reproduce growth``: one loop for grown, sparse and dense networks, and its costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from sparsenet.architecture.growth.grower import Grower
from sparsenet.layers import SparseLinear
from sparsenet.models import SparseMLP
from sparsenet.reproduce.growth_tasks import Task
from sparsenet.sparsifier import Sparsifier

__all__ = ["Result", "evaluate", "mlp", "train", "weights_of"]


@dataclass
class Result:
    """What came of one training.

    Attributes:
        score: on the test set, percent. validation: held-out loss. flops: of all training steps, forward and backward.
        seconds: of the training loop. parameters, weights (without biases), bytes: at the end.
        curve: (step, units by layer, bytes, milliseconds, loss) at decisions.
    """

    score: float
    validation: float
    flops: float
    seconds: float
    parameters: int
    weights: int
    bytes: int = 0
    ratios: list[float] = field(default_factory=list)
    curve: list = field(default_factory=list)

    def numbers(self) -> dict:
        """For a results file."""
        return {key: value for key, value in vars(self).items() if key != "curve"}


def mlp(sizes: list[int], seed: int) -> nn.Sequential:
    """A dense relu network."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (inp, out) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(inp, out)] + ([nn.ReLU()] if i + 2 < len(sizes) else [])
    return nn.Sequential(*layers)


def sparse_mlp(sizes: list[int], density: float, block_size: int, seed: int) -> SparseMLP:
    """A block-sparse relu network."""
    return SparseMLP(sizes, density, block_size, generator=torch.Generator().manual_seed(seed))


def weights_of(model: nn.Module) -> int:
    """Elements of weights, biases and norms excluded."""
    return sum(
        m.num_active if isinstance(m, SparseLinear) else m.weight.numel()
        for m in model.modules()
        if isinstance(m, SparseLinear | nn.Linear | nn.Conv2d)
    )


def flops_of(model: nn.Module, x: torch.Tensor) -> float:
    """Multiplications and additions of one training step's products: 6 for each use of a weight, by one forward."""
    total, handles = [0.0], []

    def count(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        weight = module.values if isinstance(module, SparseLinear) else module.weight
        uses = output.numel() / output.shape[1] if isinstance(module, nn.Conv2d) else output.numel() / output.shape[-1]
        total[0] += 6.0 * weight.numel() * uses

    for module in model.modules():
        if isinstance(module, SparseLinear | nn.Linear | nn.Conv2d):
            handles.append(module.register_forward_hook(count))
    training = model.training
    model.eval()
    with torch.no_grad():
        model(x)
    model.train(training)
    for handle in handles:
        handle.remove()
    return total[0]


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, part: str = "test") -> tuple[float, float]:
    """(score, loss) in eval mode."""
    training = model.training
    model.eval()
    x, y = getattr(task, part)
    output = torch.cat([model(rows) for rows in x.split(2000)])
    model.train(training)
    return task.score(output, y), float(task.loss(output, y))


def train(
    model: nn.Module,
    task: Task,
    *,
    epochs: float = 10,
    batch: int = 128,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    seed: int = 0,
    grower: dict[str, Any] | None = None,
    sparsifier: Callable[[nn.Module, torch.optim.Optimizer, int], Sparsifier] | None = None,
    during: Callable[[int, Grower], None] | None = None,
    augment: Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None = None,
) -> Result:
    """AdamW with a cosine learning rate; a Grower (its options) or a Sparsifier goes along.

    Args:
        during: called with (step, grower) before each step, to change a budget in mid-training.
        augment: changes a batch of inputs.
    """
    x, y = task.train
    per_epoch = max(1, len(x) // batch)
    steps = max(1, round(epochs * per_epoch))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    owner = None
    if grower is not None:
        options = {"steps": steps, "seed": seed, **grower}
        if options.pop("held_out", False):
            options["validate"] = lambda: evaluate(model, task, "validation")[1]
        owner = Grower(model, optimizer, **options)
    rewirer = sparsifier(model, optimizer, steps) if sparsifier is not None else None
    generator = torch.Generator().manual_seed(seed)
    flops, per_step, curve, ratios = 0.0, 0.0, [], []
    model.train()
    started = time.perf_counter()
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator)
        rows = order[(step % per_epoch) * batch :][:batch]
        given = x[rows] if augment is None else augment(x[rows], generator)
        if during is not None:
            during(step, owner)
        loss = task.loss(model(given), y[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        event = owner.step(loss) if owner is not None else None
        changed = event is not None
        if rewirer is not None:
            changed |= rewirer.step() is not None
        schedule.step()
        if not step or changed:
            per_step = flops_of(model, given)
        flops += per_step
        if event is not None:
            curve.append((step, event.units, event.bytes, event.milliseconds, event.parameters, loss.item()))
            if event.newborn_ratio is not None:
                ratios.append(event.newborn_ratio)
    seconds = time.perf_counter() - started
    score = evaluate(model, task)[0]
    return Result(
        score,
        evaluate(model, task, "validation")[1],
        flops,
        seconds,
        sum(p.numel() for p in model.parameters()),
        weights_of(model),
        owner.bytes if owner is not None else 0,
        ratios,
        curve,
    )
