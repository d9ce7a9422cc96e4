"""How fast the loss would fall by what is not there yet: squared gradient norms of new units, blocks and layers.

All three levels are measured in the same unit, the squared norm of the loss's gradient by the new weights at birth: by
gradient flow the loss falls by that much per unit of time. Layers are compared by how it stands to that of what they
have already (``controller.py``), since gradients are larger the nearer a layer is to the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsenet import functional
from sparsenet.compaction.graph import Stage, UnitGraph
from sparsenet.layers import SparseLinear
from sparsenet.pattern import BlockPattern
from sparsenet.policies.places import best_places

__all__ = ["NewBlocks", "best_new_blocks", "layer_gain", "unit_gain"]

CANDIDATES = 16  # random units that stand for those which could be born
PARTS = 4  # of a layer's rows that are looked at in turn
CHOICE = 8  # free places for each block that is wanted, at least, in such a part
Pair = tuple[Tensor, Tensor]


def unit_gain(x: Tensor, grad_outputs: Sequence[Tensor], seed: int) -> float:
    """Mean over random relu units of x of the squared norm of their outgoing weights' gradient.

    Args:
        x: [rows, in], what the layer reads. grad_outputs: [rows, out] of each of its readers, before the activation.
        seed: of the units' incoming weights (He et al., 2015).

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.gains import unit_gain
        >>> unit_gain(torch.randn(32, 8), [torch.zeros(32, 4)], seed=0)
        0.0
    """
    generator = torch.Generator().manual_seed(seed)
    incoming = torch.randn(x.shape[1], CANDIDATES, generator=generator) * (2.0 / max(x.shape[1], 1)) ** 0.5
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # sums of half precision overflow
    made = torch.relu(x @ incoming.to(x))
    total = sum((g.to(made).T @ made).square().sum() for g in grad_outputs)
    return float(total) / CANDIDATES


def incumbent_gain(graph: UnitGraph, stage: Stage) -> float:
    """The same by what is there: mean over the layer's units of the squared gradient norm of their outgoing weights.

    For layers whose operands were not kept, convolutions above all.
    """
    classes = graph.classes[stage.outputs.units].unique()
    total = 0.0
    for reader in graph.stages:
        if reader.weights is None or reader.inputs is None or reader.weights.per_channel:
            continue
        here = torch.isin(graph.classes[reader.inputs.units], classes)
        weight = reader.module.values if isinstance(reader.module, SparseLinear) else reader.module.weight
        if not bool(here.any()) or weight.grad is None or weight.grad.shape != weight.shape:
            continue
        if isinstance(reader.module, SparseLinear):
            total += float(weight.grad.square().sum()) * float(here.float().mean())
        else:
            total += float(weight.grad[:, here.to(weight.device)].square().sum())
    return total / max(len(classes), 1)


def squared_gradient(module: nn.Module) -> float:
    """Squared norm of the gradient of a layer's weight; 0 where it has none.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.gains import squared_gradient
        >>> layer = torch.nn.Linear(2, 1)
        >>> layer.weight.grad = torch.tensor([[3.0, 4.0]])
        >>> squared_gradient(layer)
        25.0
    """
    grad = (module.values if isinstance(module, SparseLinear) else module.weight).grad
    if grad is None:
        return 0.0
    return float(torch.linalg.vector_norm(grad, dtype=torch.promote_types(grad.dtype, torch.float32)).double().square())


def density_of(module: nn.Module) -> float:
    """Share of a layer's weights that it has."""
    return module.density if isinstance(module, SparseLinear) else 1.0


def layer_gain(x: Tensor, grad_input: Tensor) -> float:
    """Squared norm of the gradient of a residual layer's weight where ``x`` [rows, n] stands, per output: n of them.

    Args:
        x: after the activation. grad_input: the loss's gradient by it, [rows, n].

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.gains import layer_gain
        >>> layer_gain(torch.eye(2), torch.eye(2))
        2.0
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    grad_input = grad_input.to(x)
    if x.shape[1] * grad_input.shape[1] <= x.shape[0] ** 2:
        return float((grad_input.T @ x).square().sum())
    return float(((grad_input @ grad_input.T) * (x @ x.T)).sum())  # the same, by rows


def best_new_blocks(
    layer: SparseLinear, operands: Pair, count: int, rows: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """The ``count`` inactive places of largest gradient norm (Evci et al., 2020), ascending, and the squared norms.

    ``rows``: block rows [begin, end) to look at; None: all.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.architecture.growth.gains import best_new_blocks
        >>> layer = sn.SparseLinear(64, 64, density=0.25, block_size=16)
        >>> places, norms = best_new_blocks(layer, (torch.randn(8, 64), torch.randn(8, 64)), 3)
        >>> len(places), bool((norms > 0).all())
        (3, True)
    """
    pattern = layer.pattern
    columns = pattern.block_cols

    def score(places: Tensor) -> Tensor:
        if not len(places):
            return torch.empty(0, device=places.device)
        rows = int(places[0]) // columns, int(places[-1]) // columns + 1
        norms = functional.block_gradient_squared_norms(*operands[:2], pattern.block_size, rows)
        return norms.flatten()[places - rows[0] * columns]

    return best_places(pattern, score, min(count, _free(pattern)), rows or (0, pattern.block_rows))


def _free(pattern: BlockPattern) -> int:
    return pattern.block_rows * pattern.block_cols - pattern.num_blocks


class NewBlocks:
    """:func:`best_new_blocks` of layers by name, looked for once in a decision.

    To look at all places takes as long as a dense backward pass. Where few blocks are wanted, one part of the layer's
    rows is looked at, and the next part at the next decision.

    Args:
        kept: by layer, (x, grad_output, ...) as :func:`best_new_blocks` takes them. turn: number of the decision.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.architecture.growth.gains import NewBlocks
        >>> layer = sn.SparseLinear(64, 64, density=0.25, block_size=16)
        >>> new = NewBlocks({"0": (torch.randn(8, 64), torch.randn(8, 64))}, turn=0)
        >>> [len(new.best("0", layer, count)[0]) for count in (3, 2, 12)]
        [3, 2, 12]
    """

    def __init__(self, kept: Mapping[str, Sequence], turn: int):
        self._kept, self._turn = kept, turn
        self._found: dict[str, tuple[int, Tensor, Tensor]] = {}

    def best(self, name: str, layer: SparseLinear, count: int) -> Pair:
        """The best ``count`` inactive places of a layer, ascending, and their squared norms."""
        if self._found.get(name, (-1,))[0] < count:
            some = max(count, layer.pattern.num_blocks // 6)  # what is asked for next is seldom more
            self._found[name] = some, *self._look(layer, self._kept[name][:2], some)
        _, places, norms = self._found[name]
        if len(places) > count:
            best = functional.select_extreme(norms, count, largest=True)
            places, norms = places[best], norms[best]
        return places, norms

    def _look(self, layer: SparseLinear, operands: Pair, count: int) -> Pair:
        rows, free = layer.pattern.block_rows, _free(layer.pattern)
        parts = max(1, min(PARTS, rows, free // (CHOICE * max(count, 1))))
        part = self._turn % parts
        found = best_new_blocks(layer, operands, count, (rows * part // parts, rows * (part + 1) // parts))
        return found if parts == 1 or len(found[0]) == min(count, free) else best_new_blocks(layer, operands, count)


def grad_input_of(module: nn.Module, grad_output: Tensor) -> Tensor:
    """[rows, in]: what the layer hands back of ``grad_output`` [rows, out] (before its activation)."""
    with torch.no_grad():
        if isinstance(module, SparseLinear):
            grad_output = grad_output.to(module.values.dtype)
            with torch.enable_grad():
                x = grad_output.new_zeros(len(grad_output), module.in_features).requires_grad_(True)
                y = functional.block_sparse_linear(x, module.values.detach(), module.pattern)
            return torch.autograd.grad(y, x, grad_output)[0]
        return grad_output.to(module.weight.dtype) @ module.weight.detach()
