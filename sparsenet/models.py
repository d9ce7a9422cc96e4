"""Models built of sparse layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsenet.densities import distribute
from sparsenet.layers import SparseLinear, refuse_unfit_state
from sparsenet.pattern import BlockPattern

__all__ = ["SparseMLP"]


class SparseMLP(nn.Sequential):
    """A multilayer perceptron of :class:`SparseLinear` layers, activations fused.

    Args:
        sizes: feature counts, input first: ``[784, 4096, 4096, 10]``.
        density: share of active block places over all layers, or one number per layer.
        block_size: 1, 4, 8, 16, 32, 64 or 128.
        activation: of the hidden layers, ``relu``, ``gelu``, ``silu`` or ``none``; the last layer has none.
        distribution: how one density is spread over the layers: ``erdos_renyi`` or ``uniform``.
        bias, device, dtype, generator: as for SparseLinear.

    Raises:
        ValueError: fewer than two sizes, or as many densities as do not fit the layers.

    Shape: [batch, ...] is flattened to [batch, sizes[0]] -> [batch, sizes[-1]].

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([784, 1024, 10], density=0.1)
        >>> model(torch.randn(5, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        density: float | Sequence[float] = 0.1,
        block_size: int = 32,
        activation: str = "relu",
        distribution: str = "erdos_renyi",
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ):
        if isinstance(sizes, str) or len(sizes) < 2:
            raise ValueError(f"SparseMLP: sizes must name at least input and output, got {sizes!r}")
        shapes = [(out, inp) for inp, out in pairwise(sizes)]
        if isinstance(density, (int, float)):
            counts = distribute(shapes, density, distribution, block_size=block_size)
        else:
            if len(density) != len(shapes):
                raise ValueError(
                    f"SparseMLP: density must have {len(shapes)} entries, one per layer, got {len(density)}"
                )
            counts = [
                distribute([s], d, "uniform", block_size=block_size)[0] for s, d in zip(shapes, density, strict=True)
            ]
        layers = []
        for i, ((out, inp), count) in enumerate(zip(shapes, counts, strict=True)):
            pattern = BlockPattern.random((out, inp), block_size=block_size, generator=generator, num_blocks=count)
            layers.append(
                SparseLinear(
                    inp,
                    out,
                    bias,
                    pattern=pattern,
                    activation=activation if i + 1 < len(shapes) else "none",
                    device=device,
                    dtype=dtype,
                    generator=generator,
                )
            )
            layers[-1].topology.label = f"block_sparse_linear ({i})"
        super().__init__(*layers)
        self.register_load_state_dict_pre_hook(refuse_unfit_state)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Feature counts, input first; compaction makes them smaller."""
        return (self[0].in_features, *(layer.out_features for layer in self))

    def __getitem__(self, index):
        """A layer, or for a slice an ``nn.Sequential`` of layers."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, ...] -> [batch, sizes[-1]]."""
        x = x.reshape(len(x), math.prod(x.shape[1:])) if x.dim() > 2 else x
        return super().forward(x)
