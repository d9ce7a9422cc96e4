"""Preparing a compaction: every new parameter, gradient, moment and buffer is made before the first is put in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from sparsenet import functional
from sparsenet.compaction.graph import CompactionError, Stage, UnitGraph
from sparsenet.compaction.modules import CompactLayerNorm
from sparsenet.compaction.reblocking import Reblocked
from sparsenet.compaction.rules import Axis
from sparsenet.compaction.weights import BlockWeights
from sparsenet.elements import NM
from sparsenet.elements.masks import elements_inside
from sparsenet.layers import SparseLinear
from sparsenet.topology import replace_data

__all__ = ["Orders", "StageMoves", "check_stage", "gathered_state", "model_bytes", "prepare_stage"]

Put = Callable[[], None]
Index = Mapping[int, Tensor]  # dimension -> old positions, in their new order


class Orders(Protocol):
    """Where units go: :class:`~sparsenet.compaction.orders.UnitOrders`, or the new order of one family of units."""

    def order(self, axis: Axis) -> Tensor:
        """int64: the old positions along ``axis`` that stay, in their new order."""

    def reblocked(self, stage: Stage) -> Reblocked:
        """Where the blocks of a block-sparse layer land."""


@dataclass
class StageMoves:
    """What has to be put in place for one module.

    Attributes:
        puts: callables that put it there, and for each one that takes it back.
        inactive: masked or filled-in elements stored in its blocks, before and after.
        folded: constant units that move into its bias.
    """

    puts: list[tuple[Put, Put]] = field(default_factory=list)
    inactive: tuple[int, int] = (0, 0)
    folded: int = 0


def prepare_stage(
    graph: UnitGraph, stage: Stage, orders: Orders, model: nn.Module, optimizers: Sequence, fill_in: str
) -> StageMoves:
    """The moves of one module of ``model``, which has the structure of the graph's (it may be a copy of it).

    Raises CompactionError when the optimizer's state or the copy does not fit; changes nothing.
    """
    module = module_of(model, stage)
    moves = StageMoves()
    rows = orders.order(stage.outputs)
    if stage.weights is None:
        if not _same(rows, len(stage.outputs.units)):
            _prepare_unitwise(graph, stage, module, model, rows, optimizers, moves)
        return moves
    old_cols = stage.weights.columns
    cols = torch.arange(old_cols) if stage.inputs is None else orders.order(stage.inputs)
    added = _folded_bias(graph, stage, module, cols, moves)
    rows_same, cols_same = _same(rows, stage.weights.rows), _same(cols, old_cols)
    if isinstance(stage.weights, BlockWeights):
        moves.inactive = (_inactive(module),) * 2
    if rows_same and cols_same:
        return moves
    if isinstance(stage.weights, BlockWeights):
        _prepare_blocks(orders, stage, module, rows, cols, optimizers, fill_in, moves)
    else:
        index = {} if rows_same else {0: rows}
        index |= {} if cols_same or stage.weights.per_channel else {1: cols}
        moves.puts.append(_move(module.weight, index, optimizers, stage.name))
        sizes = partial(set_sizes, module)
        moves.puts.append((partial(sizes, len(rows), len(cols)), partial(sizes, stage.weights.rows, old_cols)))
    if module.bias is not None:
        moves.puts.append(_move(module.bias, {0: rows}, optimizers, stage.name, added))
    return moves


def check_stage(stage: Stage, model: nn.Module, optimizers: Sequence) -> None:
    """Raises what :func:`prepare_stage` would raise, and makes nothing."""
    module = module_of(model, stage)
    for optimizer in optimizers:
        if isinstance(stage.weights, BlockWeights):
            block_state(optimizer, module.values, stage.name)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in optimizer.state and name != "values":
                gathered_state(optimizer, parameter, {}, f"{stage.name}.{name}")


def module_of(model: nn.Module, stage: Stage) -> nn.Module:
    """The module of ``model``, which may be a copy of the graph's, that ``stage`` is about; refuses other sizes."""
    try:
        module = model.get_submodule(stage.name)
    except AttributeError:
        raise CompactionError(f"compact: every copy must have the model's modules, one has no {stage.name!r}") from None
    same = type(module) is type(stage.module) and [p.shape for p in module.parameters()] == [
        p.shape for p in stage.module.parameters()
    ]
    if isinstance(module, SparseLinear) and same:
        same = module.pattern == stage.module.pattern
    if not same:
        raise CompactionError(f"compact: {stage.name!r} of a copy must have the model's sizes and pattern")
    return module


def _same(order: Tensor, n: int) -> bool:
    return len(order) == n and bool((order == torch.arange(n)).all())


def _folded_bias(graph: UnitGraph, stage: Stage, module: nn.Module, cols: Tensor, moves: StageMoves) -> Tensor | None:
    """float64 [rows]: what constant inputs that leave added to each output; None when nothing."""
    if stage.inputs is None or not stage.weights.folds:
        return None
    constant = graph.seen(stage.inputs).nan_to_num(0.0).clone()
    constant[cols] = 0.0
    moves.folded = int((constant != 0).sum())
    return stage.weights.of(module).contribution(constant) if moves.folded else None


# --- one tensor -----------------------------------------------------------------------------------------------------


def _move(
    parameter: nn.Parameter, index: Index, optimizers: Sequence, name: str, added: Tensor | None = None
) -> tuple[Put, Put]:
    """Prepares a parameter with its gradient and its state in every optimizer: what puts them in place, and back."""
    data = parameter.detach()
    if added is not None:
        data = (data.double() + added.to(data.device)).to(data.dtype)
    grad = None if parameter.grad is None else gather_lines(parameter.grad, index)
    states = [(o, gathered_state(o, parameter, index, name)) for o in optimizers if parameter in o.state]
    old = [(o, {key: o.state[parameter][key] for key in state}) for o, state in states]
    put = partial(put_parameter, parameter, gather_lines(data, index), grad, states)
    return put, partial(put_parameter, parameter, parameter.detach(), parameter.grad, old)


def put_parameter(parameter: nn.Parameter, data: Tensor, grad: Tensor | None, states: list) -> None:
    """Gives a parameter new memory, its gradient and, for each (optimizer, tensors by name), its state."""
    increment_version(parameter)  # a graph recorded before refuses its backward
    parameter.grad = None
    replace_data(parameter, data)
    parameter.grad = grad
    for optimizer, state in states:
        optimizer.state[parameter].update(state)


def gather_lines(t: Tensor, index: Index) -> Tensor:
    """A new tensor with the positions of ``index``, dimension by dimension; channels-last stays so."""
    channels_last = t.dim() == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
    for dim, order in index.items():
        t = t.index_select(dim, order.to(t.device))
    return t.contiguous(memory_format=torch.channels_last) if channels_last else t


def gathered_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, index: Index, name: str) -> dict:
    """The optimizer's state of ``parameter`` with the same rows and columns gathered; scalars are not in it.

    A state tensor of the parameter's shape is gathered like it; one with sizes of 1 (factored moments) along the
    others; a vector with one entry per row along the rows.

    Raises:
        CompactionError: a tensor of any other shape, or tensors in lists: this optimizer's state is not understood.
    """
    gathered = {}
    for key, value in optimizer.state[parameter].items():
        if not isinstance(value, Tensor):
            if isinstance(value, (list, tuple, dict)) and any(isinstance(v, Tensor) for v in value):
                raise CompactionError(_not_understood(optimizer, key, f"a {type(value).__name__} of tensors", name))
            continue
        if value.numel() == 1:
            continue
        alike = value.dim() == parameter.dim() and all(
            a in (1, b) for a, b in zip(value.shape, parameter.shape, strict=True)
        )
        if alike:
            gathered[key] = gather_lines(
                value, {d: o for d, o in index.items() if value.shape[d] == parameter.shape[d]}
            )
        elif value.dim() == 1 and value.shape[0] == parameter.shape[0]:
            gathered[key] = gather_lines(value, {0: index[0]}) if 0 in index else value
        else:
            raise CompactionError(_not_understood(optimizer, key, list(value.shape), name))
    return gathered


def _not_understood(optimizer, key, what, name: str) -> str:
    return (
        f"compact: state {key!r} of {type(optimizer).__name__} must have the shape of {name!r}'s parameter, got {what}"
    )


# --- one module -----------------------------------------------------------------------------------------------------


def set_sizes(module: nn.Module, rows: int, cols: int) -> None:
    """The sizes that a linear layer or convolution says it has."""
    if isinstance(module, nn.Linear | SparseLinear):
        module.out_features, module.in_features = rows, cols
    else:
        module.groups = rows if module.groups > 1 else 1
        module.out_channels, module.in_channels = rows, cols


def _prepare_unitwise(
    graph: UnitGraph, stage: Stage, module: nn.Module, model: nn.Module, rows: Tensor, optimizers: Sequence, moves
) -> None:
    """Norms, gates and per-channel activations: everything they have one of per unit."""
    n = len(stage.outputs.units)
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() and parameter.shape[0] == n:
            moves.puts.append(_move(parameter, {0: rows}, optimizers, f"{stage.name}.{name}"))
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.dim() and buffer.shape[0] == n:
            put = partial(module._buffers.__setitem__, name)
            moves.puts.append((partial(put, gather_lines(buffer, {0: rows})), partial(put, buffer)))
    for attribute in ("num_features", "num_parameters"):
        if hasattr(module, attribute):
            put = partial(setattr, module, attribute)
            moves.puts.append((partial(put, len(rows)), partial(put, n)))
    if isinstance(module, nn.LayerNorm | CompactLayerNorm):
        leaves = torch.ones(n, dtype=torch.bool)
        leaves[rows] = False
        twin = CompactLayerNorm(module, rows, graph.seen(stage.inputs)[leaves])
        twin = twin.to(next(model.parameters()).device)
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is module:
                    put = partial(parent._modules.__setitem__, name)
                    moves.puts.append((partial(put, twin), partial(put, module)))


def _inactive(layer: SparseLinear) -> int:
    """Elements stored in blocks, inside the matrix, that a mask switches off."""
    return 0 if layer.topology.mask_bits is None else elements_inside(layer.pattern) - layer.num_active


def _prepare_blocks(
    orders: Orders, stage: Stage, layer: SparseLinear, rows: Tensor, cols: Tensor, optimizers, fill_in: str, moves
) -> None:
    """Values, gradient, moments and mask of a block-sparse layer, gathered in one pass."""
    landed = orders.reblocked(stage)
    old, new = layer.pattern, landed.pattern()
    mask = layer.element_mask
    if mask is None and fill_in == "masked" and landed.fill_in:
        mask = torch.ones_like(layer.values, dtype=torch.bool)
    states = [(o, key, t) for o in optimizers for key, t in block_state(o, layer.values, stage.name).items()]
    values = layer.values.detach()
    elementwise = [t for _, _, t in states if t.shape == values.shape]
    extra = [t for t in (layer.values.grad, mask) if t is not None]
    new = new.to(values.device)
    gathered = functional.compact_blocks([values, *elementwise, *extra], old, rows, cols, new)
    data, rest = gathered[0], gathered[1:]
    grad = rest[len(elementwise)] if layer.values.grad is not None else None
    after: dict[int, dict[str, Tensor]] = {id(o): {} for o in optimizers}
    moved = iter(rest)
    for optimizer, key, t in states:
        after[id(optimizer)][key] = next(moved) if t.shape == values.shape else t[_carried(old, new, rows, cols)]
    moves.inactive = (_inactive(layer), landed.fill_in if mask is not None else 0)
    new_mask = gathered[-1] if mask is not None else None
    new_states = [(o, after[id(o)]) for o in optimizers if after[id(o)]]
    old_states = [(o, {key: o.state[layer.values][key] for key in state}) for o, state in new_states]
    back = partial(put_blocks, layer, old, values, layer.element_mask, layer.values.grad, old_states, layer.elements)
    rule = rule_of(layer, new_mask)
    moves.puts.append((partial(put_blocks, layer, new, data, new_mask, grad, new_states, rule), back))


def rule_of(layer: SparseLinear, mask: Tensor | None) -> NM | None:
    """The layer's N:M rule, where ``mask``, with other inputs beside each other or new elements, still keeps it."""
    rule = layer.elements
    if rule is None or (mask is not None and rule.holds(mask)):
        return rule
    warnings.warn(
        f"SparseLinear: the elements no longer keep {rule}, as other inputs stand side by side: the mask stays as "
        "an unstructured one; set_element_mask makes it one by the rule again",
        stacklevel=2,
    )
    return None


def put_blocks(
    layer: SparseLinear, pattern, data: Tensor, mask: Tensor | None, grad: Tensor | None, states, rule: NM | None
) -> None:
    """Gives a block-sparse layer another pattern, with all that goes with it, and its sizes."""
    layer._install(pattern.copy(), data, mask, rule)
    layer.out_features, layer.in_features = pattern.shape
    layer.values.grad = grad
    for optimizer, state in states:
        optimizer.state[layer.values].update(state)


def block_state(optimizer: torch.optim.Optimizer, values: nn.Parameter, name: str) -> dict[str, Tensor]:
    """State tensors of ``values`` with one entry per block or element; others than these and scalars are refused."""
    kept = {}
    for key, t in optimizer.state.get(values, {}).items():
        if isinstance(t, (list, tuple, dict)) and any(isinstance(v, Tensor) for v in t):
            raise CompactionError(_not_understood(optimizer, key, f"a {type(t).__name__} of tensors", name))
        if not isinstance(t, Tensor) or (t.numel() == 1 and t.dim() < 3):
            continue
        if t.shape[0] != values.shape[0]:
            raise CompactionError(_not_understood(optimizer, key, list(t.shape), name))
        kept[key] = t
    return kept


def _carried(old, new, rows: Tensor, cols: Tensor) -> Tensor:
    """int64 [new blocks]: the old block that each new one is, where only whole blocks left."""
    b = old.block_size
    row, col = (
        rows.to(new.device)[new.row_indices.long() * b] // b,
        cols.to(new.device)[new.col_indices.long() * b] // b,
    )
    return torch.searchsorted(old.linear_places(), row * old.block_cols + col)


# --- counting -------------------------------------------------------------------------------------------------------


def model_bytes(model: nn.Module, optimizers: Sequence) -> tuple[int, int, int]:
    """(elements of parameters, bytes of parameters, gradients, buffers, indices and state, active blocks)."""
    parameters = list(model.parameters())
    elements = sum(p.numel() for p in parameters)
    total = sum(p.numel() * p.element_size() * (1 + p.requires_grad) for p in parameters)
    total += sum(b.numel() * b.element_size() for b in model.buffers())
    for optimizer in optimizers:
        for p in parameters:
            state = optimizer.state.get(p, {}).values()
            total += sum(t.numel() * t.element_size() for t in state if isinstance(t, Tensor))
    blocks = 0
    for layer in model.modules():
        if isinstance(layer, SparseLinear):
            blocks += layer.pattern.num_blocks
            total += 8 * layer.pattern.num_blocks + 4 * (layer.pattern.block_rows + 1)
            total += 0 if (bits := layer.topology.mask_bits) is None else bits.numel()
    return elements, total, blocks
