"""Modules that compaction and folding leave behind where the ones before would not do."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["CompactLayerNorm", "ConstantBranch"]


class CompactLayerNorm(nn.Module):
    """The ``nn.LayerNorm`` of a tensor that lost constant units: they still count in the mean and the variance.

    Args:
        norm: the LayerNorm (or CompactLayerNorm) before; its Parameters go on here.
        kept: int64, the units that stay.
        constants: float64 [removed], the values of the units that left.
    """

    def __init__(self, norm: nn.LayerNorm | CompactLayerNorm, kept: Tensor, constants: Tensor):
        super().__init__()
        earlier = getattr(norm, "left", torch.zeros(3, dtype=torch.float64))
        left = torch.stack([torch.tensor(float(len(constants))), constants.sum(), constants.square().sum()])
        self.normalized_shape = (len(kept),)
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("left", earlier.cpu() + left.double())  # count, sum and sum of squares of what left
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """[..., n] -> the same."""
        count, total, squares = self.left.tolist()
        n = x.shape[-1] + count
        mean = (x.sum(-1, keepdim=True) + total) / n
        centred = x - mean
        variance = centred.square().sum(-1, keepdim=True) + (squares - 2 * mean * total + count * mean.square())
        y = centred * (variance / n + self.eps).rsqrt()
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Width now and before."""
        return f"{self.normalized_shape[0]}, normalising as {self.normalized_shape[0] + int(self.left[0])}"


class ConstantBranch(nn.Module):
    """What is left of a residual branch that no longer depends on its input: nothing, or a bias.

    Args:
        bias: Parameter [n] or None. dims: dimensions behind the channels.
    """

    def __init__(self, bias: nn.Parameter | None, dims: int = 0):
        super().__init__()
        self.bias, self.dims = bias, dims

    def forward(self, x: Tensor) -> Tensor:
        """Anything -> what adds to the other branch: a zero, or [n, 1, ...]."""
        return x.new_zeros(()) if self.bias is None else self.bias.reshape(-1, *[1] * self.dims)
