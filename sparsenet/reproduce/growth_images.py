"""Growth on images: D5, D6 and D11 on Fashion-MNIST, D10 on MNIST, D9 on CIFAR."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsenet.models import sparsify_
from sparsenet.policies import RigL
from sparsenet.reproduce.growth_cells import Growth
from sparsenet.reproduce.growth_training import mlp, train
from sparsenet.sparsifier import Sparsifier

__all__ = ["cifar", "convolutional", "fashion_growth", "mnist_convolutional", "mnist_mlp"]

SEED_UNITS, GROWN_UNITS = 8, 75


def parameters_of(sizes: list[int]) -> int:
    """Weights and biases of a dense network."""
    return sum(a * b + b for a, b in pairwise(sizes))


def fashion_growth(task: Growth) -> dict:
    """D5, D6, D11: 784-8-10 grown to 75 units in 15 epochs, little by little and in phases, and 75 from the start."""
    data, rows = task.images("fashion-mnist"), []
    most = parameters_of([data.features, GROWN_UNITS, data.outputs])
    kinds = {
        "75 units from the start": (GROWN_UNITS, None),
        "8 units, not grown": (SEED_UNITS, None),
        "grown, continuous": (SEED_UNITS, {"every": task.every(25)}),
        "grown, every 200 steps": (SEED_UNITS, {"every": task.every(200)}),
        "grown, in phases": (SEED_UNITS, {"every": task.every(500)}),
        "grown, by pairs": (SEED_UNITS, {"every": task.every(25), "grow": "pairs"}),
        "grown, by pairs, every 200 steps": (SEED_UNITS, {"every": task.every(200), "grow": "pairs"}),
        "grown, by GradMax": (SEED_UNITS, {"every": task.every(25), "grow": "gradient"}),
        "grown, Firefly-like": (SEED_UNITS, {"every": task.every(25), "grow": "firefly"}),
        "grown, by splitting": (SEED_UNITS, {"every": task.every(25), "grow": "split"}),
    }
    for kind, (units, options) in kinds.items():
        for seed in task.all_seeds:
            grower = None
            if options is not None:
                grower = {"budget": "1GiB", "parameters": most, "levels": ("units",), "idle": 0.0, **options}

            def compute(units=units, grower=grower, seed=seed) -> dict:
                model = mlp([data.features, units, data.outputs], seed)
                return train(model, data, epochs=task.epochs(15), seed=seed, grower=grower).numbers()

            rows.append({"kind": kind, "seed": seed, **task.cell("d5", f"{kind} {seed}", compute)})
    return {"rows": rows}


def mnist_mlp(task: Growth) -> dict:
    """D10: an MLP of at most 20,000 weights, grown and pruned from 784-16-16-10 in single weights and units."""
    data, rows = task.images("mnist"), []
    for seed in task.all_seeds:

        def compute(seed=seed) -> dict:
            model = mlp([data.features, 256, 64, data.outputs], seed)
            sparsify_(model, density=0.03, block_size=1, distribution="erdos_renyi")
            grower = {
                "budget": "1GiB",
                "parameters": 20_300,
                "levels": ("blocks",),
                "density": 1.0,
                "every": task.every(100),
            }
            result = train(model, data, epochs=task.epochs(30), lr=2e-3, seed=seed, grower=grower)
            return result.numbers()

        rows.append({"seed": seed, **task.cell("d10_mlp", str(seed), compute)})
    return {"rows": rows}


def convolutional(widths: list[int], channels: int, classes: int, seed: int) -> nn.Sequential:
    """3 x 3 convolutions with BatchNorm and relu, pooled after the second and fourth, then a mean over places."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, (inp, out) in enumerate(zip([channels, *widths], widths, strict=False)):
        layers += [nn.Conv2d(inp, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i in (1, 3) else []
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image moved by up to two pixels in both directions."""
    n, _, h, w = x.shape
    padded = nn.functional.pad(x, (2, 2, 2, 2), value=float(x.min()))
    down, right = torch.randint(5, (2, n, 1), generator=generator)
    rows = (down + torch.arange(h)).unsqueeze(1).unsqueeze(3)
    cols = (right + torch.arange(w)).unsqueeze(1).unsqueeze(2)
    picked = torch.arange(n).reshape(n, 1, 1, 1), torch.arange(x.shape[1]).reshape(1, -1, 1, 1)
    return padded[(*picked, rows, cols)]


def mnist_convolutional(task: Growth) -> dict:
    """D10: a convolutional network of at most 6,200 parameters, grown from four maps in each of five layers."""
    data, rows = task.images("mnist", flat=False), []
    for seed in task.all_seeds:

        def compute(seed=seed) -> dict:
            model = convolutional([4] * 5, 1, data.outputs, seed)
            grower = {"budget": "1GiB", "parameters": 6200, "levels": ("units",), "every": task.every(25)}
            result = train(model, data, epochs=task.epochs(12), lr=5e-3, seed=seed, grower=grower, augment=shifted)
            widths = [m.out_channels for m in model if isinstance(m, nn.Conv2d)]
            return {**result.numbers(), "widths": widths}

        rows.append({"seed": seed, **task.cell("d10_convolutional", str(seed), compute)})
    return {"rows": rows}


def cifar(task: Growth, classes: int = 10) -> dict:
    """D9: a convolutional network with a block-sparse classifier against the dense one; skipped without the data."""
    name = f"cifar{classes}"
    try:
        data = task.images(name, flat=False, download=False)
    except FileNotFoundError as error:
        why = f"{error}; put the binary version into DATA_DIR/{name}"
        print(f"reproduce growth: d9_cifar{'' if classes == 10 else classes} is SKIPPED: {why}", flush=True)
        return {"rows": [], "skipped": why}
    rows = []
    for kind, density in (("dense", 1.0), ("90 % sparse", 0.1)):
        for seed in task.all_seeds:

            def compute(density=density, seed=seed) -> dict:
                torch.manual_seed(seed)
                model = nn.Sequential(
                    *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
                    *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
                    *(nn.Flatten(), nn.Linear(64 * 8 * 8, 512), nn.ReLU(), nn.Linear(512, data.outputs)),
                )
                rewirer = None
                if density < 1:
                    sparsify_(model, density, 16, filter_fn=lambda name, linear: linear.out_features == 512)
                    rewirer = lambda m, o, steps: Sparsifier(m, o, RigL(0.3), every=100, end=int(0.75 * steps))  # noqa: E731
                return train(model, data, epochs=task.epochs(8), seed=seed, sparsifier=rewirer).numbers()

            rows.append({"kind": kind, "seed": seed, **task.cell("d9", f"{name} {kind} {seed}", compute)})
    return {"rows": rows}
