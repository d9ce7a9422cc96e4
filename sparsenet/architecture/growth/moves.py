"""Preparing growth: every new parameter, gradient, moment and buffer is made before the first is put in place."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from sparsenet.architecture.gates import TriStateReLU
from sparsenet.architecture.growth.block_lines import GrownPattern, grow_pattern
from sparsenet.architecture.growth.born_state import BornState
from sparsenet.architecture.growth.placing import GrowthError, Placing, place
from sparsenet.architecture.growth.weights import Brood, grown_blocks, grown_dense
from sparsenet.compaction.graph import Stage, UnitGraph
from sparsenet.compaction.moves import (
    StageMoves,
    block_state,
    gather_lines,
    gathered_state,
    module_of,
    put_blocks,
    put_parameter,
    rule_of,
    set_sizes,
)
from sparsenet.compaction.weights import BlockWeights
from sparsenet.functional.blocks import take_blocks, zero_outside
from sparsenet.layers import SparseLinear
from sparsenet.optimizer_state import check_followable

__all__ = ["GrowthMoves"]


@dataclass
class GrowthMoves:
    """Makes the moves of every module that owns something per new unit; changes nothing."""

    graph: UnitGraph
    brood: Brood
    states: BornState
    places: list[tuple[Stage, Placing | None, Placing | None]] = field(default_factory=list)
    made: dict[str, Tensor] = field(default_factory=dict)
    patterns: dict[str, GrownPattern] = field(default_factory=dict)

    def __post_init__(self):
        for stage in self.graph.stages:
            rows = place(self.graph, stage.outputs, self.brood.births)
            reads = stage.weights is not None and not stage.weights.per_channel and stage.inputs is not None
            cols = place(self.graph, stage.inputs, self.brood.births) if reads else None
            if rows is not None or cols is not None:
                self.places.append((stage, rows, cols))

    def digest(self) -> int:
        """Of all new weights, below 2^63."""
        found = hashlib.sha256()
        for name, tensor in self.made.items():
            found.update(name.encode())
            found.update(tensor.double().cpu().numpy().tobytes())
        return int.from_bytes(found.digest()[:8], "big") >> 1

    def prepare(
        self, stage: Stage, rows: Placing | None, cols: Placing | None, model: nn.Module, optimizers: Sequence
    ) -> StageMoves:
        """The moves of one module of ``model``, the graph's or a copy."""
        module = module_of(model, stage)
        moves = StageMoves()
        if stage.weights is None:
            self._unitwise(stage, module, rows, optimizers, moves)
            return moves
        if isinstance(stage.weights, BlockWeights):
            self._blocks(stage, module, rows, cols, optimizers, moves)
        else:
            data = self._same_newborn(stage, module, grown_dense(stage, module, rows, cols, self.brood), rows, cols)
            index = {d: axis for d, axis in enumerate((rows, cols)) if axis is not None}
            moves.puts.append(self._parameter(module.weight, data, index, optimizers, stage.name))
            sizes, weights = partial(set_sizes, module), stage.weights
            grown = [
                n if axis is None else len(axis.old) for n, axis in ((weights.rows, rows), (weights.columns, cols))
            ]
            if weights.per_channel:
                grown[1] = grown[0]
            moves.puts.append((partial(sizes, *grown), partial(sizes, weights.rows, weights.columns)))
        if module.bias is not None and rows is not None:
            fill = 0.0 if not self.brood.copied else None
            moves.puts.append(self._vector(module.bias, rows, fill, optimizers, stage.name))
        return moves

    # --- one tensor ---

    def _same_newborn(self, stage: Stage, module: nn.Module, data: Tensor, rows, cols) -> Tensor:
        """New weights of a copy are those of the model; copied units are copies of the copy's own."""
        if module is stage.module:
            self.made[stage.name] = data
        elif not self.brood.copied:
            theirs = self.made[stage.name].to(data)
            for d, axis in enumerate((rows, cols)):
                if axis is not None:
                    new = axis.new.to(data.device)
                    data.index_copy_(d, new, theirs.index_select(d, new))
        return data

    def _parameter(
        self, parameter: nn.Parameter, data: Tensor, index: dict[int, Placing], optimizers: Sequence, name: str
    ):
        """What gives a parameter its new data, gradient and state, and what takes that back."""
        gathered = {d: axis.index() for d, axis in index.items()}
        new = {d: axis.new for d, axis in index.items()}
        grad = None if parameter.grad is None else _filled(gather_lines(parameter.grad, gathered), new, 0.0)
        states = []
        for optimizer in optimizers:
            _refuse_state_elsewhere(optimizer, parameter, name)
            if parameter not in optimizer.state:
                continue
            gathered_state(optimizer, parameter, {}, name)  # refuses what is not understood
            grown = {}
            for key, t in optimizer.state[parameter].items():
                if isinstance(t, Tensor) and t.dim():
                    along = [d for d in index if self.states.along(optimizer, parameter, key, d)]
                    first = self.states.value(optimizer, parameter, key)
                    taken = gather_lines(t, {d: gathered[d] for d in along})
                    grown[key] = _filled(taken, {d: new[d] for d in along}, first) if along else t
            states.append((optimizer, grown))
        old = [(o, {key: o.state[parameter][key] for key in state}) for o, state in states]
        put = partial(put_parameter, parameter, data, grad, states)
        return put, partial(put_parameter, parameter, parameter.detach(), parameter.grad, old)

    def _vector(self, parameter: nn.Parameter, rows: Placing, fill: float | None, optimizers: Sequence, name: str):
        """A parameter with one entry per unit; new ones are ``fill``, or None: as their parents'."""
        return self._parameter(parameter, _grown_vector(parameter.detach(), rows, fill), {0: rows}, optimizers, name)

    def _unitwise(self, stage: Stage, module: nn.Module, rows: Placing, optimizers: Sequence, moves: StageMoves):
        """Norms, gates and per-channel activations."""
        n = len(stage.outputs.units)
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() and parameter.shape[0] == n:
                fill = None if self.brood.copied else _usual_entry(module, name, parameter.detach())
                moves.puts.append(self._vector(parameter, rows, fill, optimizers, f"{stage.name}.{name}"))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dim() and buffer.shape[0] == n:
                fill = None if self.brood.copied else _usual_entry(module, name, buffer)
                put = partial(module._buffers.__setitem__, name)
                moves.puts.append((partial(put, _grown_vector(buffer, rows, fill)), partial(put, buffer)))
        for attribute in ("num_features", "num_parameters"):
            if hasattr(module, attribute):
                put = partial(setattr, module, attribute)
                moves.puts.append((partial(put, len(rows.old)), partial(put, n)))

    def _blocks(self, stage: Stage, layer: SparseLinear, rows, cols, optimizers: Sequence, moves: StageMoves) -> None:
        """Values, gradient, mask and state of a block-sparse layer."""
        old = layer.pattern
        if layer is stage.module:
            self.patterns[stage.name] = grow_pattern(
                stage.name, old, rows, cols, self.brood.copied, self.brood.seed, self.brood.density
            )
        grown = self.patterns[stage.name]
        new = _new_elements(grown, rows, cols)
        data = grown_blocks(stage, layer, grown, rows, cols, self.brood)
        if layer is stage.module:
            self.made[stage.name] = data
        elif not self.brood.copied:
            data = torch.where(new, self.made[stage.name].to(data), data)
        mask = layer.element_mask
        if mask is not None:
            mask = take_blocks(mask, grown.carried, True) | new
        grad = None if layer.values.grad is None else take_blocks(layer.values.grad, grown.carried, 0.0)
        states = []
        for optimizer in optimizers:
            _refuse_state_elsewhere(optimizer, layer.values, stage.name)
            check_followable(optimizer, layer.values, stage.name, old.num_blocks)
            kept = block_state(optimizer, layer.values, stage.name)
            after = {}
            for key, t in kept.items():
                first = self.states.value(optimizer, layer.values, key)
                after[key] = _grown_block_state(t, grown, new, first)
            if after:
                states.append((optimizer, after))
        was = [(o, {key: o.state[layer.values][key] for key in state}) for o, state in states]
        back = partial(
            put_blocks, layer, old, layer.values.detach(), layer.element_mask, layer.values.grad, was, layer.elements
        )
        rule = rule_of(layer, mask)
        moves.puts.append((partial(put_blocks, layer, grown.pattern, data, mask, grad, states, rule), back))


def _filled(t: Tensor, new: Mapping[int, Tensor], value: float) -> Tensor:
    for d, at in new.items():
        t.index_fill_(d, at.to(t.device), value)
    return t


def _grown_vector(t: Tensor, rows: Placing, fill: float | None) -> Tensor:
    """``t`` [n, ...] with new entries; None: those of their parents."""
    grown = gather_lines(t, {0: rows.index()})
    if fill is not None:
        return _filled(grown, {0: rows.new}, fill)
    follows = (rows.source >= 0).nonzero().flatten()
    grown[follows.to(t.device)] = grown[rows.source[follows].to(t.device)]
    return grown


def _usual_entry(module: nn.Module, name: str, t: Tensor) -> float:
    """What a new unit gets of a norm, gate or activation: shifts and counts zero, gates open, else the others' mean."""
    if name in ("bias", "running_mean") or not t.is_floating_point():
        return 0.0
    if isinstance(module, TriStateReLU):
        return float(module.kind.initial(t.new_ones(1)))
    if hasattr(module, "closed_units") and bool((~module.closed_units()).any()):
        t = t[~module.closed_units()]
    return float(t.double().mean())


def _new_elements(grown: GrownPattern, rows: Placing | None, cols: Placing | None) -> Tensor:
    """Bool [num_blocks, b, b]: elements of new units, and whole new blocks; inside the matrix."""
    pattern, b = grown.pattern, grown.pattern.block_size
    new = (grown.carried < 0).view(-1, 1, 1).expand(-1, b, b).clone()
    for axis, lines, shape in ((rows, pattern.row_indices, (-1, b, 1)), (cols, pattern.col, (-1, 1, b))):
        if axis is not None:
            fresh = nn.functional.pad(axis.old < 0, (0, -len(axis.old) % b)).reshape(-1, b).to(new.device)
            new |= fresh[lines.long()].view(shape)
    zero_outside(new, pattern)
    return new


def _grown_block_state(t: Tensor, grown: GrownPattern, new: Tensor, first: float) -> Tensor:
    """A state tensor [old blocks, ...] on the grown pattern."""
    moved = take_blocks(t, grown.carried, first)
    if moved.dim() == 3 and all(a in (1, b) for a, b in zip(moved.shape[1:], new.shape[1:], strict=True)):
        for d in (1, 2):
            if moved.shape[d] == 1:
                new = new.all(d, keepdim=True)
        moved = torch.where(new, torch.full_like(moved, first), moved)
        if moved.shape == (grown.pattern.num_blocks, *grown.pattern.values_shape[1:]):
            zero_outside(moved, grown.pattern)
    return moved


def _refuse_state_elsewhere(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, name: str) -> None:
    """State that an optimizer keeps in attributes of its own would stay behind."""
    for key, value in vars(optimizer).items():
        if key in ("state", "param_groups", "defaults"):
            continue
        inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        for t in (value, *inside):
            if isinstance(t, Tensor) and t is not parameter and t.dim() and t.shape == parameter.shape:
                raise GrowthError(
                    f"widen: {type(optimizer).__name__} must keep state in optimizer.state, got one of the size of "
                    f"{name!r} in {key}"
                )
