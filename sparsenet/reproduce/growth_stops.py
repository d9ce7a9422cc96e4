"""D13: a density that stops itself by the extrapolated gain, against a sweep of six densities."""

from __future__ import annotations

import torch
from torch import nn

from sparsenet.policies import RigL
from sparsenet.reproduce.growth_cells import Growth
from sparsenet.reproduce.growth_tasks import Task, image_task, table_task
from sparsenet.reproduce.growth_training import sparse_mlp, train
from sparsenet.sparsifier import Sparsifier

__all__ = ["self_stopping"]

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
WITHIN = 0.2  # points of the best: the smallest density of those is the sweep's choice


def self_stopping(task: Growth) -> dict:
    """Both on four tasks: the sweep trains every density, the Grower one network that starts at the lowest."""
    problems = {
        "fashion-mnist": (lambda: task.images("fashion-mnist"), 256, 16, task.epochs(5), 128, 1e-3),
        "digits": (lambda: image_task("digits"), 128, 4, task.epochs(40), 32, 3e-3),
        "Friedman-1": (lambda: table_task("Friedman-1"), 128, 4, task.epochs(40), 32, 3e-3),
        "characters": (lambda: table_task("characters"), 128, 4, task.epochs(8), 32, 1e-3),
    }
    rows = []
    for name, (make, width, block, epochs, batch, lr) in problems.items():
        data = make()
        sizes = [data.features, width, width, data.outputs]
        common = {"epochs": epochs, "batch": batch, "lr": lr}
        for seed in task.all_seeds:
            for density in DENSITIES:
                row = task.cell(
                    "d13",
                    f"{name} {density} {seed}",
                    lambda d=density, n=seed, s=sizes, b=block, t=data, c=common: _swept(t, s, d, b, n, c),
                )
                rows.append({"task": name, "density": density, "seed": seed, **row})
            row = task.cell(
                "d13",
                f"{name} stops {seed}",
                lambda n=seed, s=sizes, b=block, t=data, c=common: _stopped(t, s, b, n, c),
            )
            rows.append({"task": name, "density": "stops itself", "seed": seed, **row})
    return {"rows": rows}


def _swept(data: Task, sizes: list[int], density: float, block: int, seed: int, common: dict) -> dict:
    def rewirer(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Sparsifier:
        return Sparsifier(model, optimizer, RigL(0.3), every=max(1, min(100, steps // 40)), end=int(0.75 * steps))

    model = sparse_mlp(sizes, density, block, seed)
    return train(model, data, seed=seed, sparsifier=rewirer, **common).numbers()


def _stopped(data: Task, sizes: list[int], block: int, seed: int, common: dict) -> dict:
    model = sparse_mlp(sizes, DENSITIES[0], block, seed)
    grower = {"budget": "1GiB", "levels": ("blocks",), "held_out": True, "grow_until": 0.5, "density": 1.0}
    result = train(model, data, seed=seed, grower=grower, **common)
    stored = sum(layer.pattern.num_blocks * block**2 for layer in model)
    places = sum(layer.pattern.block_rows * layer.pattern.block_cols * block**2 for layer in model)
    return {**result.numbers(), "found": stored / places}
