"""Against others: tables by scikit-learn's boosting and MLP and by dense networks (D8), growth by gromo (D12)."""

from __future__ import annotations

import importlib
import importlib.util
import time
from collections.abc import Callable

import torch

from sparsenet.models import SparseMLP
from sparsenet.reproduce.growth_cells import Growth
from sparsenet.reproduce.growth_images import GROWN_UNITS, SEED_UNITS
from sparsenet.reproduce.growth_tasks import TABLES, Task, table_task
from sparsenet.reproduce.growth_training import evaluate, mlp, train, weights_of

__all__ = ["gromo_growth", "tables"]

HIDDEN = 128
EPOCHS, BATCH, RATE = 100, 32, 3e-3


def tables(task: Growth) -> dict:
    """D8: every table with the same defaults; grown networks of at most a fifth of the dense one's weights."""
    rows = []
    for name in TABLES:
        data = table_task(name)
        kinds: dict[str, Callable[[int], dict]] = {
            "dense": lambda seed, data=data: _dense(task, data, seed),
            "grown": lambda seed, data=data: _grown(task, data, seed),
            "gradient boosting": lambda seed, data=data: _sklearn(data, "HistGradientBoosting", seed),
            "scikit-learn's MLP": lambda seed, data=data: _sklearn(data, "MLP", seed),
        }
        for kind, compute in kinds.items():
            for seed in task.all_seeds:
                row = task.cell("d8", f"{name} {kind} {seed}", lambda c=compute, n=seed: c(n))
                rows.append({"task": name, "kind": kind, "seed": seed, **row})
    return {"rows": rows}


def _sizes(data: Task) -> list[int]:
    return [data.features, HIDDEN, HIDDEN, data.outputs]


def _epochs(task: Growth, data: Task) -> float:
    """A hundred, or as many as 6,000 steps are; fewer at a smaller scale."""
    return min(task.epochs(EPOCHS), 6_000 * task.scale * BATCH / len(data.train[0]))


def _dense(task: Growth, data: Task, seed: int) -> dict:
    return train(mlp(_sizes(data), seed), data, epochs=_epochs(task, data), batch=BATCH, lr=RATE, seed=seed).numbers()


def _grown(task: Growth, data: Task, seed: int) -> dict:
    """From 16 units in two layers of single weights, all three levels open, to a fifth of the dense network."""
    dense = weights_of(mlp(_sizes(data), 0))
    generator = torch.Generator().manual_seed(seed)
    model = SparseMLP([data.features, 16, 16, data.outputs], 0.5, block_size=1, generator=generator)
    grower = {"budget": "1GiB", "parameters": dense // 5, "held_out": True}
    return train(model, data, epochs=_epochs(task, data), batch=BATCH, lr=RATE, seed=seed, grower=grower).numbers()


def _sklearn(data: Task, kind: str, seed: int) -> dict:
    """scikit-learn's estimator with its defaults (its MLP with 128-128 units and early stopping)."""
    module = importlib.import_module("sklearn.ensemble" if "Boosting" in kind else "sklearn.neural_network")
    estimator = getattr(module, f"{kind}{'Classifier' if data.classes else 'Regressor'}")
    options = {} if "Boosting" in kind else {"hidden_layer_sizes": (HIDDEN, HIDDEN), "early_stopping": True}
    x, y = (torch.cat(both) for both in zip(data.train, data.validation, strict=True))
    started = time.perf_counter()
    model = estimator(random_state=seed, **options).fit(x.numpy(), y.flatten().numpy())
    seconds = time.perf_counter() - started
    return {
        "score": 100.0 * float(model.score(data.test[0].numpy(), data.test[1].flatten().numpy())),
        "seconds": seconds,
    }


# --- gromo ---


def gromo_growth(task: Growth) -> dict:
    """D12: gromo (the library of TINY; Verbockhaven et al., 2024) from 8 to 75 units, in as many FLOPs as D5."""
    if importlib.util.find_spec("gromo") is None:
        print("reproduce growth: d12_gromo is SKIPPED: gromo is not installed (pip install gromo)", flush=True)
        return {"rows": [], "skipped": "gromo is not installed"}
    data, rows = task.images("fashion-mnist"), []
    for seed in task.all_seeds:
        rows.append({"seed": seed, **task.cell("d12", str(seed), lambda n=seed: _gromo(task, data, n))})
    return {"rows": rows}


def _gromo(task: Growth, data: Task, seed: int) -> dict:
    """Nine enlargements in the first quarter, by its own optimal updates over 2,000 examples; AdamW anew each time."""
    container = importlib.import_module("gromo.containers.growing_mlp").GrowingMLP
    torch.manual_seed(seed)
    model = container(data.features, data.outputs, SEED_UNITS, 1, activation=torch.nn.ReLU())
    x, y = data.train
    batch, per_epoch = 128, len(x) // 128
    steps = round(task.epochs(15) * per_epoch)
    additions = 9
    at = {round(steps * 0.25 * (i + 1) / additions): None for i in range(additions)}
    lr_at = lambda step: 1e-3 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / steps)).item())  # noqa: E731
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    generator = torch.Generator().manual_seed(seed)
    flops, units, started = 0.0, SEED_UNITS, time.perf_counter()
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(x), generator=generator)
        rows = order[(step % per_epoch) * batch :][:batch]
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step)
        loss = data.loss(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        flops += 6.0 * batch * units * (data.features + data.outputs)
        if step + 1 in at:
            target = SEED_UNITS + (GROWN_UNITS - SEED_UNITS) * (step + 1) / (0.25 * steps)
            _gromo_grow(model, data, min(round(target), GROWN_UNITS) - units, generator)
            units = model.layers[0].out_features
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    seconds = time.perf_counter() - started
    size = sum(p.numel() for p in model.parameters())
    return {
        "score": evaluate(model, data)[0],
        "flops": flops,
        "seconds": seconds,
        "parameters": size,
        "units": units,
    }


def _gromo_grow(model, data: Task, count: int, generator: torch.Generator) -> None:
    """One enlargement as gromo's own tutorial does it; of four scales of the update the best on a batch is taken."""
    x, y = data.train
    chosen = torch.randperm(len(x), generator=generator)[:2000]
    model.init_computation()
    for rows in chosen.split(500):
        model.zero_grad()
        data.loss(model(x[rows]), y[rows]).backward()
        model.update_computation()
    model.compute_optimal_updates(statistical_threshold=0.0, maximum_added_neurons=count)  # else one at a time
    model.reset_computation()
    model.select_update(0)
    layer = model.currently_updated_layer
    rows = chosen[:1000]
    losses = {}
    with torch.no_grad():
        for scale in (0.25, 0.5, 1.0, 2.0):
            layer.scaling_factor = scale
            losses[scale] = float(data.loss(model.extended_forward(x[rows]), y[rows]))
    layer.scaling_factor = min(losses, key=losses.__getitem__)
    model.apply_change(extension_size=count)
