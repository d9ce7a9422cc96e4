"""SparseLab (PyPI, CPU, single weights) on the recipe of ``sparsenet reproduce training``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn

from sparsenet.benchmark.rivals import set_sparselab_threads
from sparsenet.reproduce.training_tasks import Unavailable

__all__ = ["StoppingRigL", "sparselab_mlp"]


def _sparselab():
    try:
        return importlib.import_module("sparselab")
    except ImportError as error:
        raise Unavailable("sparselab is not installed (pip install sparselab)") from error


def sparselab_mlp(sizes: Sequence[int], densities: Sequence[float], seed: int) -> nn.Sequential:
    """A relu network of its layers, one density for each; a layer at 100 % is an ``nn.Linear``."""
    library = _sparselab()
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for i, ((inp, out), density) in enumerate(zip(pairwise(sizes), densities, strict=True)):
        layers.append(nn.Linear(inp, out) if density >= 1 else library.SparseLinear(inp, out, sparsity=1.0 - density))
        if i + 2 < len(sizes):
            layers.append(nn.ReLU())
    set_sparselab_threads(torch.get_num_threads())
    return nn.Sequential(*layers)


class StoppingRigL:
    """Its RigL, until step ``end``."""

    def __init__(self, model: nn.Module, density: float, drop_fraction: float, every: int, end: int, seed: int):
        self.steps, self.every, self.end = 0, every, end
        self._rigl = _sparselab().RigL(1.0 - density, drop_fraction, every, seed)
        model.apply(self._rigl)

    def step(self) -> None:
        """After every step of the optimizer."""
        self.steps += 1
        if self.steps <= self.end:
            self._rigl.step()
