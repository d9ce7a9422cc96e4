"""What units and blocks are worth: by the interval's products of weight and gradient, or by their squared weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsenet import distributed
from sparsenet.architecture.growth.watch import IntervalScores
from sparsenet.compaction.weights import BlockWeights, unit_weights
from sparsenet.layers import SparseLinear

__all__ = ["Worth", "row_squares"]


def row_squares(module: nn.Module) -> Tensor:
    """float32 [outputs]: sums of squared weights of each output of a layer.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.worth import row_squares
        >>> layer = torch.nn.Linear(2, 1)
        >>> layer.weight.data = torch.tensor([[3.0, 4.0]])
        >>> row_squares(layer)
        tensor([25.])
    """
    weights = unit_weights(module)
    if isinstance(weights, BlockWeights):
        return weights.line_squares(rows=True).float()
    weight = module.weight.detach().flatten(1)
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=wide).square().float()  # without a tensor of squares


class Worth:
    """Scores by layer, averaged over the ranks. ``prune``: ``fisher`` or ``magnitude``; ``scores``: of the interval.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.watch import IntervalScores
        >>> from sparsenet.architecture.growth.worth import Worth
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer.weight.data, layer.weight.grad = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
        >>> scores = IntervalScores()
        >>> _ = scores.observe({"0": layer})
        >>> Worth("fisher", scores).units("0", layer), Worth("magnitude", scores).units("0", layer)
        (tensor([9.]), tensor([25.]))
    """

    def __init__(self, prune: str, scores: IntervalScores):
        self.prune, self.scores = prune, scores

    def units(self, name: str, module: nn.Module) -> Tensor | None:
        """float32 [outputs]; None where nothing is known."""
        found = self.scores.units(name) if self.prune == "fisher" else row_squares(module)
        return None if found is None or len(found) != unit_weights(module).rows else distributed.averaged(found)

    def blocks(self, name: str, layer: SparseLinear) -> Tensor | None:
        """float32 [num_blocks], infinite where too young to judge; None where nothing is known."""
        found = self.scores.blocks(name)
        if found is None or len(found) != layer.pattern.num_blocks:
            return None
        if self.prune == "magnitude":
            found = torch.where(torch.isinf(found), found, _block_squares(layer))
        return distributed.averaged(found)

    def of_all(
        self, layers: Mapping[str, nn.Module], growing: Sequence[str], sparse: Mapping[str, SparseLinear]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """By layer, of all units and of all blocks that may go; squared weights in layers of which nothing is known."""
        units, blocks = {}, {}
        for name in growing:
            scores = self.units(name, layers[name])
            units[name] = distributed.averaged(row_squares(layers[name])) if scores is None else scores
        for name, layer in sparse.items():
            scores = self.blocks(name, layer)
            blocks[name] = distributed.averaged(_block_squares(layer)) if scores is None else scores
        return units, blocks


def _block_squares(layer: SparseLinear) -> Tensor:
    return layer.values.detach().float().square().sum((1, 2))
