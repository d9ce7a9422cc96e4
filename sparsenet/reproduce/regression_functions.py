"""Two-dimensional regression functions made from formulas, on [-1, 1]^2: as SWAT-NN is tried on.

Standard test functions of optimisation (Ackley, Booth, Branin, ...), as in the CORNN collection, whose domains are
scaled to [-1, 1]^2 here. Targets are used after centring and scaling, so constants do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["FUNCTIONS", "sample_function"]


def _ackley(x: Tensor, y: Tensor) -> Tensor:
    root = (-0.2 * (0.5 * (x * x + y * y)).sqrt()).exp()
    return -20 * root - (0.5 * ((2 * math.pi * x).cos() + (2 * math.pi * y).cos())).exp()


def _branin(x: Tensor, y: Tensor) -> Tensor:
    wave = 10 * (1 - 1 / (8 * math.pi)) * x.cos()
    return (y - 5.1 / (4 * math.pi**2) * x * x + 5 / math.pi * x - 6) ** 2 + wave


def _franke(x: Tensor, y: Tensor) -> Tensor:
    a = 0.75 * (-((9 * x - 2) ** 2) / 4 - (9 * y - 2) ** 2 / 4).exp()
    b = 0.75 * (-((9 * x + 1) ** 2) / 49 - (9 * y + 1) / 10).exp()
    c = 0.5 * (-((9 * x - 7) ** 2) / 4 - (9 * y - 3) ** 2 / 4).exp()
    return a + b + c - 0.2 * (-((9 * x - 4) ** 2) - (9 * y - 7) ** 2).exp()


# name -> (function of two tensors, (low, high) of the first input, (low, high) of the second)
FUNCTIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[float, float], tuple[float, float]]] = {
    "ackley": (_ackley, (-2.0, 2.0), (-2.0, 2.0)),
    "beale": (
        lambda x, y: (1.5 - x + x * y) ** 2 + (2.25 - x + x * y * y) ** 2 + (2.625 - x + x * y**3) ** 2,
        (-2.0, 2.0),
        (-2.0, 2.0),
    ),
    "booth": (lambda x, y: (x + 2 * y - 7) ** 2 + (2 * x + y - 5) ** 2, (-10.0, 10.0), (-10.0, 10.0)),
    "branin": (_branin, (-5.0, 10.0), (0.0, 15.0)),
    "franke": (_franke, (0.0, 1.0), (0.0, 1.0)),
    "griewank": (lambda x, y: (x * x + y * y) / 4000 - x.cos() * (y / 2**0.5).cos(), (-4.0, 4.0), (-4.0, 4.0)),
    "himmelblau": (lambda x, y: (x * x + y - 11) ** 2 + (x + y * y - 7) ** 2, (-5.0, 5.0), (-5.0, 5.0)),
    "matyas": (lambda x, y: 0.26 * (x * x + y * y) - 0.48 * x * y, (-10.0, 10.0), (-10.0, 10.0)),
    "mccormick": (lambda x, y: (x + y).sin() + (x - y) ** 2 - 1.5 * x + 2.5 * y, (-1.5, 4.0), (-3.0, 4.0)),
    "rosenbrock": (lambda x, y: 100 * (y - x * x) ** 2 + (1 - x) ** 2, (-2.0, 2.0), (-1.0, 3.0)),
    "six_hump_camel": (
        lambda x, y: (4 - 2.1 * x * x + x**4 / 3) * x * x + x * y + (4 * y * y - 4) * y * y,
        (-2.0, 2.0),
        (-1.0, 1.0),
    ),
    "three_hump_camel": (lambda x, y: 2 * x * x - 1.05 * x**4 + x**6 / 6 + x * y + y * y, (-2.0, 2.0), (-2.0, 2.0)),
}


def sample_function(name: str, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``count`` uniform points x [count, 2] in [-1, 1]^2 and the values y [count]. ValueError for another name."""
    if name not in FUNCTIONS:
        raise ValueError(f"sample_function: name must be one of {', '.join(FUNCTIONS)}, got {name!r}")
    function, first, second = FUNCTIONS[name]
    x = torch.rand(count, 2, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    scaled = [low + (x[:, i] + 1) / 2 * (high - low) for i, (low, high) in enumerate((first, second))]
    return x, function(*scaled)
