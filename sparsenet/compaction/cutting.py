"""Cutting: layers get whole blocks of another size in training, and what is kept keeps its optimizer state."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsenet import distributed
from sparsenet.compaction.compacting import as_optimizers, commit, copies_of, plain_model
from sparsenet.compaction.cuts import active_elements
from sparsenet.compaction.graph import CompactionError
from sparsenet.compaction.moves import StageMoves, put_blocks
from sparsenet.functional.blocks import dense_blocks
from sparsenet.layers import SparseLinear
from sparsenet.models import sparsify_
from sparsenet.pattern import BlockPattern, warn_unreached
from sparsenet.swapping.refusals import check_swappable, refuse_shared_weights

__all__ = ["reblock_"]


class _Fresh(NamedTuple):
    """A dense layer's Parameter, and the values and state (one for each optimizer) of the sparse layer in its place."""

    weight: nn.Parameter
    values: Tensor
    states: list[dict]


def reblock_(
    model: nn.Module,
    patterns: Mapping[str, BlockPattern],
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    copies: Iterable[nn.Module] = (),
    sparsifier=None,
) -> nn.Module:
    """Gives layers the named blocks, of any size, in place: what is in them is kept with its moments, the rest is gone.

    Args:
        model: in training or not. An ``nn.Linear`` becomes a SparseLinear as by :func:`sparsenet.sparsify_`, with a
            new Parameter ``values`` in the place of ``weight`` in the optimizer's group. A SparseLinear, of single
            weights or of any blocks, with an element mask or without, stays the same object with the same Parameter.
        patterns: layer name -> the blocks it is to have; ``gather_units(...).patterns``.
        optimizer: whose state goes along (one or several).
        copies: models of the same structure (an EMA, a best-so-far) that are cut alike.
        sparsifier: the :class:`~sparsenet.Sparsifier` of this model, to learn of it; its ``followers`` are copies.

    Returns:
        ``model``. All elements of the blocks are active from now on: those that were not before are zero, with
        moments of zero. Gradients are dropped: call it after a step.

    Raises:
        CompactionError: a name that is no layer, a pattern of another shape, state that is not one number per weight.
        ValueError: an ``nn.Linear`` that ``sparsify_`` refuses. Nothing was changed.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 128, 10], density=0.1, block_size=1)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> report = sn.gather_units(model, optimizer, density=0.1, block_size=16)
        >>> sn.reblock_(model, report.patterns, optimizer)[0].block_size
        16
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"reblock_: model must be a torch.nn.Module, got {type(model).__name__}")
    optimizers = as_optimizers(optimizer)
    try:
        net = plain_model(model)
    except CompactionError as error:
        raise CompactionError(str(error).replace("compact: ", "reblock_: ", 1)) from error
    models = [(net, optimizers), *((twin, ()) for twin in copies_of(net, copies, sparsifier))]
    for one, its_optimizers in models:
        _check(one, patterns, its_optimizers)
    _cut(models, patterns)
    warn_unreached("reblock_", {name: net.get_submodule(name).pattern for name in patterns}, stacklevel=3)
    if isinstance(model, distributed.DataParallel):
        distributed.rebuild(model)
    if sparsifier is not None:
        sparsifier.refresh()
    return model


@torch.no_grad()
def _cut(models: Sequence[tuple[nn.Module, Sequence]], patterns: Mapping[str, BlockPattern]) -> None:
    """Makes all that is new, then puts it in place."""
    linears = [_fresh_layers(one, patterns, optimizers) for one, optimizers in models]
    puts = [_prepared(one, patterns, optimizers) for one, optimizers in models]
    commit(puts)
    try:
        for (one, optimizers), fresh in zip(models, linears, strict=True):
            _swap(one, patterns, fresh, optimizers)
    except BaseException:
        for moves in puts:
            for _, back in moves.puts:
                back()
        raise


# --- checks ---------------------------------------------------------------------------------------------------------


def _check(model: nn.Module, patterns: Mapping[str, BlockPattern], optimizers: Sequence) -> None:
    """Refuses what does not fit, before anything is made."""
    modules = dict(model.named_modules())
    for name, pattern in patterns.items():
        layer = modules.get(name)
        if type(layer) not in (nn.Linear, SparseLinear):
            got = type(layer).__name__ if layer is not None else "no such module"
            raise CompactionError(f"reblock_: patterns must name Linear or SparseLinear layers, got {name!r}, {got}")
        if layer is model and type(layer) is nn.Linear:
            raise CompactionError("reblock_: model must hold the Linear to cut, got that Linear itself")
        if ("values" if type(layer) is SparseLinear else "weight") not in layer._parameters:
            raise CompactionError(f"reblock_: {name!r} must have its weights as a Parameter, got computed ones")
        if not isinstance(pattern, BlockPattern) or pattern.shape != (layer.out_features, layer.in_features):
            got = getattr(pattern, "shape", type(pattern).__name__)
            shape = (layer.out_features, layer.in_features)
            raise CompactionError(f"reblock_: the pattern of {name!r} must be a BlockPattern of {shape}, got {got}")
    linears = {name: modules[name] for name in patterns if type(modules[name]) is nn.Linear}
    for name, linear in linears.items():
        check_swappable(name, linear)
    refuse_shared_weights(model, linears)
    for name in patterns:
        for optimizer in optimizers:
            _elementwise(optimizer, _weight(modules[name]), name)


def _weight(layer: nn.Linear | SparseLinear) -> nn.Parameter:
    return layer.values if isinstance(layer, SparseLinear) else layer.weight


def _elementwise(optimizer: torch.optim.Optimizer, weight: nn.Parameter, name: str) -> dict[str, Tensor]:
    """State with one number per weight. Scalars go along as they are; any other state is refused."""
    found = {}
    for key, value in optimizer.state.get(weight, {}).items():
        if isinstance(value, Tensor) and value.shape == weight.shape and weight.dim() > 0:
            found[key] = value
        elif isinstance(value, (list, tuple, dict)) or (isinstance(value, Tensor) and value.numel() > 1):
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise CompactionError(
                f"reblock_: state {key!r} of {type(optimizer).__name__} must have one number per weight of {name!r}, "
                f"got {got}"
            )
    return found


# --- sparse layers --------------------------------------------------------------------------------------------------


def _prepared(model: nn.Module, patterns: Mapping[str, BlockPattern], optimizers: Sequence) -> StageMoves:
    """What puts new blocks into the layers that are sparse already."""
    moves = StageMoves()
    for name, pattern in patterns.items():
        layer = model.get_submodule(name)
        if isinstance(layer, SparseLinear):
            pattern = pattern.to(layer.values.device)
            put_into = _Landing(layer, pattern)
            states = [(o, _elementwise(o, layer.values, name)) for o in optimizers]
            new = [(o, {key: put_into(t) for key, t in state.items()}) for o, state in states if state]
            old = (layer.pattern, layer.values.detach(), layer.element_mask, layer.values.grad, states, layer.elements)
            put = partial(put_blocks, layer, pattern, put_into(layer.values.detach()), None, None, new, None)
            moves.puts.append((put, partial(put_blocks, layer, *old)))
    return moves


class _Landing:
    """Moves the active elements of a layer to where they stand in the blocks of another pattern."""

    def __init__(self, layer: SparseLinear, pattern: BlockPattern):
        at, rows, cols = active_elements(layer)
        b, places = pattern.block_size, pattern.linear_places()
        place = rows // b * pattern.block_cols + cols // b
        block = torch.searchsorted(places, place).clamp(max=max(len(places) - 1, 0))
        hit = places[block] == place if len(places) else torch.zeros_like(place, dtype=torch.bool)
        self.source, self.shape = at[hit], pattern.values_shape
        self.target = (block * b * b + rows % b * b + cols % b)[hit]

    def __call__(self, t: Tensor) -> Tensor:
        """[num_blocks, b, b] of the new pattern, zero where nothing was active."""
        out = t.new_zeros(self.shape)
        out.view(-1)[self.target] = t.flatten()[self.source]
        return out


# --- dense layers ---------------------------------------------------------------------------------------------------


def _fresh_layers(model: nn.Module, patterns: Mapping[str, BlockPattern], optimizers: Sequence) -> dict[str, _Fresh]:
    """By name, what the dense layers leave behind and what the sparse ones in their place begin with."""
    found = {}
    for name, pattern in patterns.items():
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            pattern = pattern.to(layer.weight.device)
            states = []
            for optimizer in optimizers:
                state = dict(optimizer.state.get(layer.weight, {}))
                moments = _elementwise(optimizer, layer.weight, name)
                states.append({**state, **{key: dense_blocks(t, pattern) for key, t in moments.items()}})
            found[name] = _Fresh(layer.weight, dense_blocks(layer.weight, pattern), states)
    return found


def _swap(model: nn.Module, patterns: Mapping[str, BlockPattern], fresh: Mapping[str, _Fresh], optimizers) -> None:
    """Puts sparse layers in the places of dense ones, and their values in the places of the weights."""
    by_size: dict[int, list[str]] = {}
    for name in fresh:
        by_size.setdefault(patterns[name].block_size, []).append(name)
    for b, names in by_size.items():
        chosen = [patterns[name] for name in names]
        density = sum(p.num_blocks for p in chosen) / max(sum(p.block_rows * p.block_cols for p in chosen), 1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about blocks that stay for a moment only
            sparsify_(model, density, b, filter_fn=lambda name, _, names=names: name in names)
    for name, (weight, values, states) in fresh.items():
        layer = model.get_submodule(name)
        layer.set_pattern(patterns[name], values)
        for optimizer, state in zip(optimizers, states, strict=True):
            for group in optimizer.param_groups:
                group["params"] = [layer.values if p is weight else p for p in group["params"]]
            if optimizer.state.pop(weight, None) is not None:
                optimizer.state[layer.values] = state
