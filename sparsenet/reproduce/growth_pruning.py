"""Which weights go, and which come: D1 to D4, single weights (blocks of 1), Fashion-MNIST and scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sparsenet.files import replace_file
from sparsenet.models import SparseMLP, sparsify_
from sparsenet.policies import GMP, OBD, Fisher, Policy, RigL, Static, WoodFisher
from sparsenet.reproduce.growth_cells import Growth
from sparsenet.reproduce.growth_tasks import Task, image_task
from sparsenet.reproduce.growth_training import evaluate, mlp, train
from sparsenet.schedules import Cosine, Exponential
from sparsenet.sparsifier import Sparsifier

__all__ = ["gradual", "one_shot", "rewired_digits", "rewired_fashion"]

SIZES = (300, 100)
STAGES = 10


def _dense(task: Growth, data: Task, seed: int) -> nn.Sequential:
    """The trained 784-300-100-10 network that is pruned, kept in a file."""
    file = task.cells / f"dense_{seed}_{task.scale}.pt"
    model = mlp([data.features, *SIZES, data.outputs], seed)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
    else:
        train(model, data, epochs=task.epochs(6), seed=seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(file, lambda part: torch.save(model.state_dict(), part))
    return model


def one_shot(task: Growth) -> dict:
    """D1: 80 % of the weights removed at once, without training afterwards."""
    data, rows = task.images("fashion-mnist"), []
    x, y = data.train
    batches = [(x[i : i + 250], y[i : i + 250]) for i in range(0, min(1000, len(x)), 250)]
    policies: dict[str, Callable[[], Policy]] = {
        "magnitude": lambda: GMP(),
        "OBD": lambda: OBD(drop_fraction=0.0, batches=batches, loss=data.loss),
        "WoodFisher with update": lambda: WoodFisher(drop_fraction=0.0, batches=batches, loss=data.loss),
    }
    for kind, make in policies.items():
        for seed in task.all_seeds:

            def compute(make=make, seed=seed) -> dict:
                model = _dense(task, data, seed)
                before = evaluate(model, data)[0]
                sparsify_(model, density=1.0, block_size=1)
                sparsifier = Sparsifier(model, None, make(), density=Exponential(1.0, 0.2, steps=1), every=1)
                sparsifier.step()
                return {"score": evaluate(model, data)[0], "dense": before}

            rows.append({"kind": kind, "seed": seed, **task.cell("d1", f"{kind} {seed}", compute)})
    return {"rows": rows}


def gradual(task: Growth) -> dict:
    """D2: to 5, 2 and 1 % in ten geometric stages over one epoch, then a second epoch; by OBD and by magnitude."""
    data, rows = task.images("fashion-mnist"), []
    policies = {"magnitude": lambda: GMP(), "OBD": lambda: OBD(drop_fraction=0.0)}
    for density in (0.05, 0.02, 0.01):
        for kind, make in policies.items():
            for seed in task.all_seeds:

                def compute(density=density, make=make, seed=seed) -> dict:
                    model = _dense(task, data, seed)
                    sparsify_(model, density=1.0, block_size=1)

                    def rewirer(m: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Sparsifier:
                        every = max(1, steps // 2 // STAGES)
                        schedule = Exponential(1.0, density, steps=every * STAGES)
                        end, spread = every * STAGES, "erdos_renyi"
                        return Sparsifier(m, optimizer, make(), schedule, spread, every=every, end=end)

                    return train(model, data, epochs=2, lr=5e-4, seed=seed, sparsifier=rewirer).numbers()

                row = task.cell("d2", f"{kind} {density} {seed}", compute)
                rows.append({"kind": kind, "density": density, "seed": seed, **row})
    return {"rows": rows}


def _rewired(task: Growth, part: str, data: Task, sizes: list[int], densities, epochs: float, seeds, **options) -> dict:
    """Networks whose rewires exchange 30 % at first and nothing at the end; D3 has some with 30 % throughout, too."""
    rows = []
    kinds = {"static": (Static, False, 0), "RigL": (RigL, True, 1)}
    if part == "d3":
        kinds["Fisher"] = (Fisher, True, 1)
        for name, policy in (("RigL", RigL), ("Fisher", Fisher)):
            kinds |= {f"{name}, 30 % throughout, grace {grace}": (policy, False, grace) for grace in (0, 1)}
    for density in densities:
        for kind, (policy, falls, grace) in kinds.items():
            for seed in seeds:

                def compute(density=density, policy=policy, falls=falls, grace=grace, seed=seed) -> dict:
                    generator = torch.Generator().manual_seed(seed)
                    model = SparseMLP(sizes, density, block_size=1, generator=generator)

                    def rewirer(m: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Sparsifier:
                        end = max(1, int(0.75 * steps))
                        drop = Cosine(0.3, 0.0, end) if falls else 0.3
                        rewires = policy() if policy is Static else policy(drop)
                        every = max(1, min(100, steps // 40))
                        return Sparsifier(m, optimizer, rewires, every=every, end=end, grace=grace)

                    return train(model, data, epochs=epochs, seed=seed, sparsifier=rewirer, **options).numbers()

                row = task.cell(part, f"{kind}{' falling' if falls else ''} {density} {seed}", compute)
                rows.append({"kind": kind, "density": density, "seed": seed, **row})
    return {"rows": rows}


def rewired_fashion(task: Growth) -> dict:
    """D3: RigL, and its growth with Fisher's drop, against a static pattern, Erdős–Rényi, at 5, 2 and 1 %."""
    data = task.images("fashion-mnist")
    sizes = [data.features, *SIZES, data.outputs]
    return _rewired(task, "d3", data, sizes, (0.05, 0.02, 0.01), task.epochs(8), task.all_seeds)


def rewired_digits(task: Growth) -> dict:
    """D4: the same for 64-100-10 on scikit-learn's digits, at 10 and 5 %, five seeds."""
    seeds = range(5) if task.scale == 1 else task.all_seeds
    data = image_task("digits")
    sizes = [data.features, 100, data.outputs]
    return _rewired(task, "d4", data, sizes, (0.1, 0.05), task.epochs(60), seeds, batch=32, lr=1e-2)
