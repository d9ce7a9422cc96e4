"""The levers of sparse training, pulled one at a time: block size, rewiring, what is born, spread, start, width.

Each lever is a table: the base recipe (5 % in blocks of 4, RigL with its defaults) and what one change makes of it, on
four problems. Patches of other shapes than squares are trained as single weights that come and stay together.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from sparsenet.layers import SparseLinear
from sparsenet.models import SparseMLP
from sparsenet.pattern import BlockPattern
from sparsenet.reproduce.training_arms import Arm

__all__ = ["BASE", "LEVERS", "LEVER_TASKS"]

LEVER_TASKS = ("Fashion-MNIST", "cities", "source code", "digits")
BASE = Arm(density=0.05, block_size=4, policy="rigl")
_STATIC = replace(BASE, policy="static")


def _scaled(factor: float):
    """All values times ``factor``: below 1, closer to what the optimizer can change."""

    def initialise(model: SparseMLP, generator: torch.Generator) -> None:
        with torch.no_grad():
            for layer in model:
                layer.values.mul_(factor)

    return initialise


def _dense_fan_in(model: SparseMLP, generator: torch.Generator) -> None:
    """Values as of a dense layer: by the number of inputs, not of the active ones."""
    with torch.no_grad():
        for layer in model:
            scale = (layer.active_fan_in().clamp(min=1) / layer.in_features).sqrt().mean()
            layer.values.mul_(scale)


def patches(rows: int, cols: int):
    """A random pattern of patches of ``rows`` outputs by ``cols`` inputs, with as many weights; the last layer stays.

    Only for networks of single weights; the patches of hidden layers alone change.
    """

    def initialise(model: SparseMLP, generator: torch.Generator) -> None:
        for layer in list(model)[:-1]:
            out, inp = layer.pattern.shape
            high, wide = -(-out // rows), -(-inp // cols)
            count = max(round(layer.pattern.num_blocks / (rows * cols)), high, wide)
            chosen = BlockPattern.random((high, wide), block_size=1, generator=generator, num_blocks=count)
            at = chosen.linear_places()
            r = (at // wide)[:, None, None] * rows + torch.arange(rows)[:, None]
            c = (at % wide)[:, None, None] * cols + torch.arange(cols)
            r, c = (t.flatten() for t in torch.broadcast_tensors(r, c))
            inside = (r < out) & (c < inp)
            places = (r * inp + c)[inside].sort().values
            pattern = BlockPattern.from_linear_places(places, (out, inp), 1)
            new = SparseLinear(inp, out, pattern=pattern, activation=layer.activation, generator=generator)
            layer.set_pattern(pattern)
            with torch.no_grad():
                layer.values.copy_(new.values)
                layer.bias.copy_(new.bias)

    return initialise


_ONE = replace(_STATIC, block_size=1)

# lever -> {what is tried: arm}; the first is what the others are compared with
LEVERS: dict[str, dict[str, Arm]] = {
    **{
        f"defaults at {density:.0%}": {
            "now": replace(BASE, density=density, block_size=None),
            "now, without grace": replace(BASE, density=density, block_size=None, grace=0),
            "before: 1.5 blocks in a row, without grace": replace(
                BASE, density=density, block_size=None, least_blocks=1.5, grace=0
            ),
            "b = 32 in all layers, without grace": replace(BASE, density=density, block_size=32, grace=0),
        }
        for density in (0.1, 0.05)
    },
    "block size, static": {f"b = {b}": replace(_STATIC, block_size=b) for b in (4, 1, 16, 32)},
    "block size, RigL": {f"b = {b}": replace(BASE, block_size=b) for b in (4, 1, 8, 16, 32)},
    "policy": {
        "static": _STATIC,
        "SET": replace(BASE, policy="set"),
        "RigL": BASE,
        "Fisher": replace(BASE, policy="fisher"),
        "GMP from 20 %": replace(BASE, policy="gmp", start_density=0.2),
        "RigL while the density falls from 20 % (GraNet)": replace(BASE, start_density=0.2),
    },
    "rewires that a grown block outlasts": {
        "1": BASE,
        "0 (RigL as published)": replace(BASE, grace=0),
        "2": replace(BASE, grace=2),
        "4": replace(BASE, grace=4),
    },
    "rewires in a training": {"20": BASE, **{str(n): replace(BASE, rewires=n) for n in (5, 10, 40)}},
    "last rewire at": {"75 %": BASE, "50 %": replace(BASE, until=0.5), "95 %": replace(BASE, until=0.95)},
    "drop fraction at the start": {
        "0.3": BASE,
        **{str(f): replace(BASE, drop_fraction=f) for f in (0.1, 0.5)},
        "0.3 at every rewire": replace(BASE, drop_falls=False),
        "0.3 at every rewire, without grace": replace(BASE, drop_falls=False, grace=0),
    },
    "second moment of what is born, of the mean": {
        "0": BASE,
        "0.1": replace(BASE, grown_state={"exp_avg_sq": 0.1}),
        "1": replace(BASE, grown_state={"exp_avg_sq": "mean"}),
    },
    "growth scored on": {"1 batch": BASE, "8 batches": replace(BASE, scored_batches=8)},
    "spread over the layers": {"Erdos-Renyi": BASE, "uniform": replace(BASE, distribution="uniform")},
    "values at the start": {
        "by active fan-in": BASE,
        "by all inputs": replace(BASE, initialise=_dense_fan_in),
        "half of that by active fan-in": replace(BASE, initialise=_scaled(0.5)),
    },
    "learning rate": {"0.002": BASE, "0.001": replace(BASE, lr=1e-3), "0.004": replace(BASE, lr=4e-3)},
    "label smoothing": {"0": BASE, "0.1": replace(BASE, label_smoothing=0.1)},
    "width at about equal bytes": {
        "1024 at 5 %": BASE,
        "512 at 27 %": replace(BASE, hidden=(512,) * 3, density=0.27),
        "704 at 14 %": replace(BASE, hidden=(704,) * 3, density=0.14),
        "1408 at 1 %": replace(BASE, hidden=(1408,) * 3, density=0.01),
    },
    "patches of outputs x inputs, static": {
        "4 x 4": replace(_ONE, initialise=patches(4, 4)),
        "4 x 1": replace(_ONE, initialise=patches(4, 1)),
        "1 x 4": replace(_ONE, initialise=patches(1, 4)),
        "16 x 1": replace(_ONE, initialise=patches(16, 1)),
        "1 x 16": replace(_ONE, initialise=patches(1, 16)),
    },
}
