"""The networks that are trained side by side: sparse, dense, masked, SparseLab's, and dense with as many weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenet.benchmark.trial import Unavailable
from sparsenet.models import SparseMLP

__all__ = ["NETWORKS", "OPTIMIZERS", "equal_parameter_sizes", "training_step"]

OPTIMIZERS: dict[str, Callable[[Sequence[Tensor]], torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters),
    "adamw_fused": lambda parameters: torch.optim.AdamW(parameters, fused=True),
}


class _MaskedLinear(nn.Linear):
    """What libraries that simulate sparsity do: the dense weight times a mask, in every forward."""

    def __init__(self, in_features: int, out_features: int, mask: Tensor):
        super().__init__(in_features, out_features)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in] -> [batch, out]."""
        return F.linear(x, self.weight * self.mask, self.bias)


def _with_relu(layers: Sequence[nn.Module]) -> nn.Sequential:
    modules = [m for layer in layers for m in (layer, nn.ReLU())]
    return nn.Sequential(*modules[:-1])


def _sparse(sizes: Sequence[int], density: float, block_size: int) -> nn.Module:
    return SparseMLP(sizes, density, block_size)


def _dense(sizes: Sequence[int], density: float, block_size: int) -> nn.Module:
    return _with_relu([nn.Linear(inp, out) for inp, out in pairwise(sizes)])


def _masked(sizes: Sequence[int], density: float, block_size: int) -> nn.Module:
    layers = []
    for layer in SparseMLP(sizes, density, block_size):
        mask = layer.pattern.to_mask().repeat_interleave(block_size, 0).repeat_interleave(block_size, 1)
        mask = mask[: layer.out_features, : layer.in_features].float()
        layers.append(_MaskedLinear(layer.in_features, layer.out_features, mask))
    return _with_relu(layers)


def _sparselab(sizes: Sequence[int], density: float, block_size: int) -> nn.Module:
    try:
        import sparselab
    except ImportError as error:
        raise Unavailable("not installed: pip install 'sparsenet[bench]'") from error
    return _with_relu([sparselab.SparseLinear(inp, out, sparsity=1 - density) for inp, out in pairwise(sizes)])


def equal_parameter_sizes(sizes: Sequence[int], density: float) -> list[int]:
    """The same input, output and depth, hidden layers narrowed alike until ``density`` of the weights is left."""
    wanted = density * sum(a * b for a, b in pairwise(sizes))

    def narrowed(share: float) -> list[int]:
        return [sizes[0], *(max(1, round(share * n)) for n in sizes[1:-1]), sizes[-1]]

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        weights = sum(a * b for a, b in pairwise(narrowed(middle)))
        low, high = (middle, high) if weights < wanted else (low, middle)
    return narrowed(high)


def _equal(sizes: Sequence[int], density: float, block_size: int) -> nn.Module:
    return _dense(equal_parameter_sizes(sizes, density), density, block_size)


NETWORKS: dict[str, Callable[[Sequence[int], float, int], nn.Module]] = {
    "sparsenet": _sparse,
    "dense": _dense,
    "equal_parameter_dense": _equal,
    "masked_dense": _masked,
    "sparselab": _sparselab,
}


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, after: Callable[[], object] | None = None
) -> Callable[[], object]:
    """A call that takes one step: zero_grad, forward, cross-entropy, backward, optimizer, then ``after``."""

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        if after is not None:
            after()

    return step
