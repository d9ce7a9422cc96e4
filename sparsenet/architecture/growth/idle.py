"""What begins to fade: blocks that are exchanged, units that are worth next to nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsenet.architecture.growth.blocks import spared
from sparsenet.architecture.growth.fading import Fade, group_of, outgoing_of
from sparsenet.compaction.graph import UnitGraph
from sparsenet.layers import SparseLinear

__all__ = ["fading_blocks", "idle_units"]


def fading_blocks(name: str, layer: SparseLinear, scores: Tensor | None, count: int) -> Fade | None:
    """The ``count`` blocks of lowest score that rows and columns can spare; None where there are none.

    Args:
        scores: float32 [num_blocks], infinite for blocks that are too young to judge.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.architecture.growth.idle import fading_blocks
        >>> layer = sn.SparseLinear(32, 32, density=1.0, block_size=16)
        >>> fading_blocks("layer", layer, torch.tensor([1.0, 4.0, 2.0, torch.inf]), 1).items
        tensor([0])
    """
    if scores is None or len(scores) != layer.pattern.num_blocks:
        return None
    items = spared(layer, scores, count)
    items = items[torch.isfinite(scores[items])]
    return Fade("blocks", name, items, scores[items]) if len(items) else None


def idle_units(graph: UnitGraph, name: str, scores: Tensor | None, share: float) -> Fade | None:
    """Groups of units whose score is below ``share`` of the layer's mean; never all of them, none that are young.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.idle import idle_units
        >>> from sparsenet.compaction.graph import UnitGraph
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> idle_units(UnitGraph(model), "0", torch.tensor([1.0, 0.0, 1.0]), share=0.01).items
        tensor([1])
    """
    if scores is None or not len(scores):
        return None
    size = group_of(graph, name)
    number = torch.arange(len(scores)) // size
    total = torch.zeros(int(number[-1]) + 1).index_add_(0, number, scores.float().cpu())
    known = torch.isfinite(total)
    idle = known & (total < share * total[known].mean()) if bool(known.any()) else known
    if bool(idle.all()) or not bool(idle.any()):
        return None
    items = idle[number].nonzero().flatten()
    return Fade("units", name, items, scores[items].cpu(), outgoing_of(graph, name, items))
