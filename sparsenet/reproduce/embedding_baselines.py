"""What the search in the embedding must beat: dense networks of the same bounds trained from random weights, several
times, as they are or pruned by the same procedure.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from sparsenet.architecture.embedding.codec import MIXED, NetworkBatch, NetworkSpace
from sparsenet.architecture.embedding.search import (
    Candidate,
    EmbeddingSearchConfig,
    RegressionData,
    SearchOutcome,
    judged,
    prune_and_tune,
    tune,
)

__all__ = ["dense_then_prune", "train_directly"]


def train_directly(
    space: NetworkSpace, data: RegressionData, depth: int, count: int, iterations: int, seed: int = 0
) -> NetworkBatch:
    """``count`` dense networks of full width and ``depth`` hidden layers, trained from random weights by Adam."""
    generator = torch.Generator().manual_seed(seed * 101 + depth)
    weights = []
    for out, inp in space.shapes(depth):
        weights.append(torch.randn(count, out, inp, generator=generator) * (2.0 / inp) ** 0.5)
    biases = tuple(torch.zeros(count, out) for out, _ in space.shapes(depth)) if space.bias else None
    mixture = None
    if space.activation == MIXED:
        choice = torch.randint(3, (count, depth, space.width), generator=generator)
        mixture = nn.functional.one_hot(choice, 3).float()
    nets = NetworkBatch(space, tuple(weights), torch.ones(count, depth, space.width), biases, mixture)
    return tune(nets, data.train_x[:2000], data.train_y[:2000], iterations, 0.02)


def dense_then_prune(
    space: NetworkSpace,
    data: RegressionData,
    config: EmbeddingSearchConfig,
    depths: Iterable[int] | None = None,
    prune: bool = True,
) -> SearchOutcome:
    """Baselines at the search's iterations and restarts: train dense (random restarts), then, with ``prune``, prune."""
    found: list[Candidate] = []
    weights = torch.zeros(len(config.sparsity_weights) * config.restarts)
    for depth in depths or range(1, space.max_depth + 1):
        nets = train_directly(space, data, depth, len(weights), config.iterations, config.seed)
        found += judged(nets, data, weights, "dense")
        if prune:
            found += prune_and_tune(nets, data, weights, config)
    return SearchOutcome(found)
