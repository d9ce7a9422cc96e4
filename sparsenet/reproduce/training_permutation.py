"""Whether reordering hidden units helps blocks, simulated on a trained dense network.

It is cut to its heaviest blocks once as it is, and once after its hidden units were reordered so that heavy weights
gather in few blocks.

The order of hidden units changes nothing of what a network computes. A random pattern is as good in any order, so that
this can help only where blocks are chosen by weights that are there: pruning, or in the middle of a training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsenet.densities import distribute
from sparsenet.layers import SparseLinear
from sparsenet.pattern import BlockPattern
from sparsenet.reproduce.growth_tasks import Task
from sparsenet.reproduce.growth_training import evaluate
from sparsenet.reproduce.training_arms import Arm, build, train_model

__all__ = ["gathered_order", "permuted", "prune_both_ways"]

DENSE_EPOCHS, TUNING_EPOCHS, SWEEPS = 5, 5, 2


def _block_norms(weight: Tensor, b: int, dim: int) -> Tensor:
    """Squared elements of a matrix, summed over runs of ``b`` along ``dim``."""
    squares = weight.detach().square()
    squares = squares if dim == 1 else squares.T
    pad = -squares.shape[1] % b
    return nn.functional.pad(squares, (0, pad)).unflatten(1, (-1, b)).sum(2)


def gathered_order(profile: Tensor, b: int) -> Tensor:
    """An order of units in which groups of ``b`` have like profiles.

    Args:
        profile: float [units, places]: how much weight each unit has at each place that a block can lie at.
        b: side of a block.

    Returns:
        int64 [units]: from the heaviest unit that is left, and the b - 1 most like it, to the lightest.

    Example:
        >>> import torch
        >>> from sparsenet.reproduce.training_permutation import gathered_order
        >>> gathered_order(torch.tensor([[4.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 1.0]]), 2)
        tensor([0, 2, 1, 3])
    """
    left = torch.ones(len(profile), dtype=torch.bool)
    weight, direction = profile.sum(1), nn.functional.normalize(profile, dim=1)
    order = []
    while left.any():
        first = int(weight.masked_fill(~left, -1).argmax())
        likeness = (direction @ direction[first]).masked_fill(~left, -1)
        likeness[first] = 2
        group = likeness.topk(min(b, int(left.sum()))).indices
        left[group] = False
        order.append(group)
    return torch.cat(order)


def permuted(linears: Sequence[nn.Linear], b: int, sweeps: int = SWEEPS) -> None:
    """Reorders the hidden units between consecutive ``linears`` in place, layer after layer; the function stays."""
    for _ in range(sweeps):
        for before, after in pairwise(linears):
            profile = torch.cat([_block_norms(before.weight, b, 1), _block_norms(after.weight, b, 0)], 1)
            order = gathered_order(profile, b)
            with torch.no_grad():
                before.weight.copy_(before.weight[order])
                before.bias.copy_(before.bias[order])
                after.weight.copy_(after.weight[:, order])


def prune_both_ways(task: Task, seed: int, density: float, block_size: int, scale: float = 1.0) -> list[dict]:
    """Rows of both orders: the share of the squared weights that is kept, and the score before and after tuning."""
    arm = Arm("wide", density=density, epochs=DENSE_EPOCHS)
    dense = build(arm, task, seed)
    train_model(dense, arm, task, seed, scale)
    rows = []
    for name in ("as it is", "gathered"):
        linears = [module for module in dense if isinstance(module, nn.Linear)]
        if name == "gathered":
            permuted(linears, block_size)
        shapes = [tuple(linear.weight.shape) for linear in linears]
        counts = distribute(shapes, density, "erdos_renyi", block_size=block_size)
        layers: list[nn.Module] = []
        kept = total = 0.0
        for i, (linear, count) in enumerate(zip(linears, counts, strict=True)):
            places = -(-linear.out_features // block_size) * -(-linear.in_features // block_size)
            pattern = BlockPattern.from_dense(linear.weight, count / places, block_size)
            layers.append(SparseLinear.from_linear(linear, pattern=pattern))
            layers += [nn.ReLU()] if i + 1 < len(linears) else []
            kept += float(layers[2 * i].values.detach().square().sum())
            total += float(linear.weight.detach().square().sum())
        sparse = nn.Sequential(*layers)
        cut = evaluate(sparse, task)[0]
        tuned = train_model(sparse, replace(arm, kind="sparse", epochs=TUNING_EPOCHS, lr=1e-3), task, seed, scale)
        rows.append({"order": name, "kept": kept / total, "cut": cut, "score": tuned["score"]})
    return rows
