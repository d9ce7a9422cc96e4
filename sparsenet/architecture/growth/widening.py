"""Widening: new units in a network that trains, in every layer that makes or reads them, with optimizer state.

The reverse of compaction, in the same steps: nothing changes before all new tensors are made, and what was put in place
is taken back if anything fails. Parameters stay the same objects; what an optimizer keeps for old weights stays bit for
bit.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from sparsenet import distributed
from sparsenet.architecture.gates import TriStateReLU
from sparsenet.architecture.growth.block_lines import GrownPattern, grow_pattern
from sparsenet.architecture.growth.born_state import BornState
from sparsenet.architecture.growth.newborn import HOW, Operands, born, directions
from sparsenet.architecture.growth.placing import (
    Birth,
    GrowthError,
    Placing,
    place,
    readers_of,
    reason_against,
    said_by,
    stages_with_units,
    traced,
    why_unknown,
)
from sparsenet.architecture.growth.weights import Brood, grown_blocks, grown_dense
from sparsenet.compaction.compacting import commit, plain_model
from sparsenet.compaction.graph import Stage, UnitGraph
from sparsenet.compaction.moves import (
    StageMoves,
    block_state,
    gather_lines,
    gathered_state,
    model_bytes,
    module_of,
    put_blocks,
    put_parameter,
    set_sizes,
)
from sparsenet.compaction.weights import BlockWeights
from sparsenet.functional.blocks import take_blocks, zero_outside
from sparsenet.layers import SparseLinear
from sparsenet.optimizer_state import as_optimizers, check_followable, with_inner_optimizers
from sparsenet.schedules import as_integer

__all__ = ["WidenReport", "widen"]


@dataclass(frozen=True)
class WidenReport:
    """What :func:`widen` added.

    Attributes:
        new: by layer that makes new units: int64, their positions along its outputs. Layers whose outputs are added to
            those of a widened layer are among them.
        columns: by layer that reads them: int64, their positions along its inputs.
        how: by widened layer: how its units were born, and why not as asked.
        parameters, bytes, blocks: before and after; bytes count gradients, buffers, indices and optimizer state.
        seconds: it took.
    """

    new: dict[str, Tensor]
    columns: dict[str, Tensor]
    how: dict[str, str]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    blocks: tuple[int, int]
    seconds: float

    @property
    def newborn(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer with new weights: (new rows, new columns), int64."""
        none = torch.zeros(0, dtype=torch.int64)
        return {n: (self.new.get(n, none), self.columns.get(n, none)) for n in {**self.new, **self.columns}}

    @property
    def incumbents(self) -> tuple[str, ...]:
        """Layers without new weights that these are compared with: none, they have old ones beside them."""
        return ()


def widen(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    units: Mapping[str, int] | None = None,
    *,
    how: str = "pairs",
    operands: Operands | None = None,
    state: str | float = "scaled",
    sparsifier=None,
    copies: Iterable[nn.Module] = (),
    opaque: Iterable[str] = (),
    graph: UnitGraph | None = None,
    seed: int = 0,
) -> WidenReport:
    """Adds units to layers of ``model``, in place, without changing what it computes, in train and eval mode.

    Args:
        model: any module whose forward ``torch.fx`` can trace: linear layers, convolutions and block-sparse layers with
            what stands between them (BatchNorm, gates, PReLU, flattening, concatenation, sums).
        optimizer: whose state grows along (one or several).
        units: layer name -> how many. New units stand behind the layer's last one. Where layers are added to each
            other, all of them grow: name one.
        how: how they are born. Random weights have the mean norm of those that the layer has; biases are zero.

            * ``pairs``: disturbed mixtures of the weights of old units, two by two the same and heard with opposite
              signs: they cancel, and all of their weights have a gradient at once. An odd one is heard with zeros.
            * ``zero``: random incoming, zero outgoing weights.
            * ``split``: copies of the strongest units (Net2Net; Chen et al., 2016), which share what these said, each
              outgoing weight a little unevenly.
            * ``gradient``: pairs along the singular vectors of the gradient (GradMax; Evci et al., 2022).
            * ``firefly``: pairs along the best of random and disturbed present directions (Wu et al., 2020).

            Where something between draws at random for each unit (Dropout, a hard-concrete gate), equal units do not
            cancel: outgoing weights are zero then, and the report says so.
        operands: for ``gradient`` and ``firefly``: layer name -> (x [n, inputs], grad_output [n, outputs of a reader,
            before its activation]) of the same n places. Of a convolution, inputs are those of one window; a direction
            is laid over all places of the reader's kernel.
        state: what second moments of new weights start with: ``scaled`` (a tenth of the mean of the others, as measured
            best), ``zero``, ``mean``, or a factor of the mean. All other state starts as that of a new parameter.
        sparsifier: the :class:`~sparsenet.Sparsifier` of this model, to learn of the new patterns; its ``followers``
            are copies.
        copies: models of the same structure (an EMA, a best-so-far) that get the same units.
        opaque: names of modules to leave whole.
        graph: a :class:`~sparsenet.compaction.graph.UnitGraph` of the model as it is now, to save tracing it; it no
            longer describes the model afterwards.
        seed: of new weights and places of blocks: the same seed gives the same bits.

    A block-sparse layer's new rows and columns of blocks get as many blocks as its others have on average, at random
    places; blocks that were partly outside the matrix are filled first. Elements of new units are not masked. A copied
    unit has every block that its parent has.

    Returns:
        Where the new units are, and what they cost.

    Raises:
        GrowthError: the model cannot be traced; a layer that is unknown or whose units are pinned (the reason is
            given); a count, word, operand or state that does not fit. Nothing was changed.

    Gradients are carried along, new weights' are zero; a graph recorded before refuses its backward. Removing the same
    units by ``compact(model, remove=...)`` gives back what was before, except after ``split``.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth import widen
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).double()
        >>> optimizer, x = torch.optim.Adam(model.parameters()), torch.randn(5, 4).double()
        >>> before = model(x)
        >>> widen(model, optimizer, {"0": 4}).new
        {'0': tensor([ 8,  9, 10, 11])}
        >>> model[2].weight.shape, torch.allclose(model(x), before)
        (torch.Size([2, 12]), True)
    """
    start = time.perf_counter()
    if how not in HOW:
        raise GrowthError(f"widen: how must be one of {', '.join(HOW)}, got {how!r}")
    seed = as_integer("widen", "seed", seed)
    states = BornState(state)
    with said_by("widen"), torch.no_grad():
        net = plain_model(model)
        optimizers = with_inner_optimizers(as_optimizers(optimizer))
        graph = traced("widen", net, graph, tuple(opaque))
        births = _births(graph, units, how)
        found = {}
        if how in ("gradient", "firefly"):
            found = {b.stage.name: directions(graph, b, how, operands or {}, seed) for b in births}
        brood = Brood(births, how == "split", how not in ("zero", "split"), found, seed)
        twins = {id(twin): twin for twin in map(plain_model, (*copies, *getattr(sparsifier, "followers", ())))}
        twins.pop(id(net), None)
        growth = _Growth(graph, brood, states)
        prepared = [growth.prepare(*entry, net, optimizers) for entry in growth.places]
        prepared += [growth.prepare(*entry, twin, ()) for twin in twins.values() for entry in growth.places]
        if distributed.is_active():
            distributed.assert_same("the units that widening adds", growth.digest())
        before = model_bytes(net, optimizers)
        commit(prepared)  # from here on the graph no longer describes the model
        after = model_bytes(net, optimizers)
    if isinstance(model, distributed.DataParallel):
        distributed.rebuild(model)
    if sparsifier is not None:
        sparsifier.refresh()
    weighted = [(stage.name, rows, cols) for stage, rows, cols in growth.places if stage.weights is not None]
    return WidenReport(
        new={name: rows.new for name, rows, _ in weighted if rows is not None},
        columns={name: cols.new for name, _, cols in weighted if cols is not None},
        how={birth.stage.name: birth.how for birth in births},
        parameters=(before[0], after[0]),
        bytes=(before[1], after[1]),
        blocks=(before[2], after[2]),
        seconds=time.perf_counter() - start,
    )


def _births(graph: UnitGraph, units: Mapping[str, int] | None, how: str) -> tuple[Birth, ...]:
    """Who is born, checked."""
    if not units:
        raise GrowthError(f"widen: units must name at least one layer, got {units!r}")
    stages = stages_with_units(graph)
    found: list[Birth] = []
    first = 0
    for name, count in units.items():
        if name not in stages:
            raise GrowthError(f"widen: units must name layers that can grow, got {name!r}: {why_unknown(graph, name)}")
        count = as_integer("widen", f"units[{name!r}]", count, at_least=1)
        reason = reason_against(graph, stages[name])
        if reason is not None:
            raise GrowthError(f"widen: units must name layers that can grow, got {name!r}: {reason}")
        birth = born(graph, stages[name], count, how, first)
        twice = next((b.stage.name for b in found if b.anchor == birth.anchor), None)
        if twice is not None:
            raise GrowthError(
                f"widen: units must name units once, got {twice!r} and {name!r}, whose units are the same"
            )
        if how in ("gradient", "firefly") and not readers_of(graph, birth.anchor):
            raise GrowthError(
                f"widen: how must be zero, pairs or split for {name!r}, which no layer reads, got {how!r}"
            )
        found.append(birth)
        first += count
    return tuple(found)


@dataclass
class _Growth:
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
            self.patterns[stage.name] = grow_pattern(stage.name, old, rows, cols, self.brood.copied, self.brood.seed)
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
        back = partial(put_blocks, layer, old, layer.values.detach(), layer.element_mask, layer.values.grad, was)
        moves.puts.append((partial(put_blocks, layer, grown.pattern, data, mask, grad, states), back))


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
