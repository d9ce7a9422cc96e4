"""Budgets that change (D7), and three places to start from."""

from __future__ import annotations

import math

import torch

from sparsenet.memory.network import step_bytes
from sparsenet.reproduce.growth_cells import Growth
from sparsenet.reproduce.growth_tasks import Task
from sparsenet.reproduce.growth_training import mlp, sparse_mlp, train

__all__ = ["budgets", "start_points"]

LEAST_STEPS = 24  # of a training whose budget changes, at any scale: a fifth before, and a quarter to settle


def budgets(task: Growth) -> dict:
    """D7: half and twice the bytes, and milliseconds, of the start; how near the end is, and the worst once settled."""
    data, rows = task.images("fashion-mnist"), []
    for resource in ("bytes", "milliseconds"):
        for share in (0.5, 2.0):
            for seed in task.all_seeds:
                key = f"{resource} {share:g} {seed}"
                row = task.cell("d7", key, lambda r=resource, s=share, n=seed: _capped(task, data, r, s, n))
                rows.append({"resource": resource, "share": share, "seed": seed, **row})
    return {"rows": rows}


def _capped(task: Growth, data: Task, resource: str, share: float, seed: int) -> dict:
    """784-256-256-10: free for a fifth of the training, then capped."""
    model = mlp([data.features, 256, 256, data.outputs], seed)
    start: dict[str, float] = {}
    per_epoch = max(1, len(data.train[0]) // 128)
    epochs = max(task.epochs(6), LEAST_STEPS / per_epoch)
    steps = round(epochs * per_epoch)
    change_at = int(0.2 * steps)

    def during(step: int, grower) -> None:
        if step != change_at:
            return
        start["bytes"], start["milliseconds"] = grower.bytes, grower.milliseconds
        grower.parameters = math.inf
        if resource == "bytes":
            grower.budget = int(share * grower.bytes)
        else:
            grower.step_ms = share * grower.milliseconds

    held = sum(p.numel() for p in model.parameters())
    options = {"budget": "1GiB", "parameters": held, "levels": ("units",), "every": task.every(25), "grow_until": 0.5}
    if resource == "milliseconds":
        options["step_ms"] = 1e6  # none yet
    result = train(model, data, epochs=epochs, seed=seed, grower=options, during=during)
    target = share * start[resource]
    column = 2 if resource == "bytes" else 3
    # no milliseconds are known right after it shrank
    settled = [row[column] for row in result.curve if row[0] >= 0.75 * steps and row[column] > 0]
    if not settled:
        raise RuntimeError(f"reproduce growth: d7_budgets must have decisions after step {int(0.75 * steps)}, got none")
    final = sorted(settled)[len(settled) // 2]
    return {
        **result.numbers(),
        "start": start[resource],
        "target": target,
        "achieved": final / target,
        "worst": max(settled) / target,
    }


def start_points(task: Growth) -> dict:
    """One budget of parameters, reached from a tiny network, an oversized one and one chosen by hand; block-sparse."""
    data, rows = task.images("fashion-mnist"), []
    starts = {
        "tiny": ([data.features, 16, 16, data.outputs], 1.0),
        "oversized": ([data.features, 1024, 1024, data.outputs], 0.2),
        "chosen by hand": ([data.features, 512, 512, data.outputs], 0.1),
    }
    budget = 8 << 20
    for kind, (sizes, density) in starts.items():
        for seed in task.all_seeds:

            def compute(sizes=sizes, density=density, seed=seed) -> dict:
                model = sparse_mlp(sizes, density, 16, seed)
                epochs = task.epochs(10)
                steps = max(1, round(epochs * (len(data.train[0]) // 128)))
                falling = lambda step: max(budget, (32 << 20) * (1 - step / (0.4 * steps)))  # noqa: E731
                options = {
                    "budget": falling if sizes[1] == 1024 else budget,
                    "levels": ("blocks", "units"),
                    "every": task.every(50),
                }
                result = train(model, data, epochs=epochs, seed=seed, grower=options)
                return {**result.numbers(), "sizes": [m.out_features for m in model]}

            rows.append({"kind": kind, "seed": seed, **task.cell("start_points", f"{kind} {seed}", compute)})
    for seed in task.all_seeds:

        def dense(seed=seed) -> dict:
            width = dense_width(data, budget, seed)
            model = mlp([data.features, width, width, data.outputs], seed)
            return {**train(model, data, epochs=task.epochs(10), seed=seed).numbers(), "sizes": [width, width]}

        rows.append({"kind": "dense, equal bytes", "seed": seed, **task.cell("start_points", f"dense {seed}", dense)})
    return {"rows": rows}


def dense_width(data: Task, budget: int, seed: int, hidden: int = 2, batch: int = 128) -> int:
    """The widest dense network of ``hidden`` equal layers whose step fits ``budget``, counted as a Grower does."""
    low, high = 1, 4096
    while low < high:
        middle = (low + high + 1) // 2
        model = mlp([data.features, *[middle] * hidden, data.outputs], seed)
        optimizer = torch.optim.AdamW(model.parameters())
        fits = step_bytes(model, optimizer, (data.train[0][:batch],)).at_once <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    return low
