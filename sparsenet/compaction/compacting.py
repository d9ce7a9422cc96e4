"""Compaction: units that are dead leave, from weights, biases, norms, convolutions, gates and optimizer state.

A unit is dead when nothing reads it (all outgoing weights are zero or inactive, or only dead units read it), when it is
constant (its gate is closed, or all it reads is zero or constant) and whoever reads it can take the constant into a
bias, or when a criterion says so. What is left computes the same function, with the same Parameter objects and the
same optimizer. Training continues as if the removed units were still present but frozen at zero.

:func:`compact` takes four steps, and nothing changes before the last: a
:class:`~sparsenet.compaction.graph.UnitGraph` finds the units, the dead ones are chosen, ``prepare_stage`` (moves.py)
makes every new tensor, and then all new tensors are put in place.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsenet import distributed
from sparsenet.compaction.criteria import UnitView, unit_views
from sparsenet.compaction.graph import CompactionError, Stage, UnitGraph
from sparsenet.compaction.moves import StageMoves, model_bytes, prepare_stage
from sparsenet.compaction.orders import UnitOrders

__all__ = ["CompactionError", "CompactionReport", "LayerChange", "compact", "plain_model"]

logger = logging.getLogger(__name__)

NATURAL = ("the model returns it", "it is an input of the model")
LAST = "a layer keeps at least one unit"
Criterion = Callable[[UnitView], Tensor]


@dataclass(frozen=True)
class LayerChange:
    """What compaction did to the outputs of one layer.

    Attributes:
        before, after: units.
        removed: why -> how many: ``closed gate``, ``constant``, ``unread``, ``criterion``.
        kept: why -> how many dead units stay.
        kept_units: int64 [after], the old number of each unit, in the new order.
    """

    before: int
    after: int
    removed: dict[str, int]
    kept: dict[str, int]
    kept_units: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class CompactionReport:
    """What one compaction did.

    Attributes:
        layers: by the name of the layer that makes the units.
        parameters: elements of all parameters, before and after.
        bytes: of parameters, gradients, buffers, block indices and optimizer state, before and after.
        blocks: active blocks of all block-sparse layers, before and after.
        fill_in: masked or filled-in elements stored in blocks, before and after.
        folded: constant units whose contribution moved into a bias.
        reblocked: layer whose units are in blocks -> ``whole blocks``, ``re-blocked`` or ``re-blocked, permuted``.
        seconds: it took.
    """

    layers: dict[str, LayerChange]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    blocks: tuple[int, int]
    fill_in: tuple[int, int]
    folded: int
    reblocked: dict[str, str]
    seconds: float

    @property
    def removed(self) -> int:
        """Units removed from all layers."""
        return sum(change.before - change.after for change in self.layers.values())

    def __str__(self) -> str:
        lines = [f"{'layer':<24}{'units':>14}  why"]
        for name, change in self.layers.items():
            why = [f"{n} {reason}" for reason, n in change.removed.items()]
            why += [f"{n} stay: {reason}" for reason, n in change.kept.items()]
            why += [self.reblocked[name]] if name in self.reblocked else []
            lines.append(f"{name:<24}{change.before:>6} -> {change.after:<5} {'; '.join(why)}".rstrip())
        lines.append(f"{'parameters':<24}{self.parameters[0]:>6} -> {self.parameters[1]}")
        lines.append(f"{'bytes':<24}{self.bytes[0]:>6} -> {self.bytes[1]}")
        if self.blocks[0]:
            lines.append(f"{'blocks':<24}{self.blocks[0]:>6} -> {self.blocks[1]}")
            lines.append(f"{'inactive in blocks':<24}{self.fill_in[0]:>6} -> {self.fill_in[1]}")
        return "\n".join(lines)


def compact(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    criterion: Criterion | None = None,
    remove: Mapping[str, Sequence[int]] | None = None,
    spare: Mapping[str, Sequence[int]] | None = None,
    copies: Iterable[nn.Module] = (),
    sparsifier=None,
    opaque: Iterable[str] = (),
    zeros: bool = True,
    inference: bool = False,
    fill_in: str = "masked",
    permute: bool = True,
    strict: bool = True,
) -> CompactionReport:
    """Removes dead units from ``model`` and from its optimizer's state, in place, at any time between two forwards.

    Args:
        model: any module whose forward ``torch.fx`` can trace. Parameters stay the same objects.
        optimizer: whose state goes along (one or several).
        criterion: more units to remove: called with a :class:`UnitView` of each layer, says which (bool [units]). See
            :mod:`sparsenet.compaction.criteria`. ``remove``: layer name -> units.
        spare: gate name -> units whose closed gate does not count: they may open again.
        copies: models of the same structure (an EMA, a best-so-far) that lose the same units.
        sparsifier: the :class:`~sparsenet.Sparsifier` of this model, to learn of the new patterns.
        opaque: names of modules to leave whole; the units they read stay.
        zeros: whether weights that are exactly zero count as absent. Off, a unit is dead only by its gate, by inactive
            blocks or by a criterion: layers that start at zero and blocks just grown are then safe.
        inference: whether constants need hold in eval mode only (a constant before a BatchNorm or Dropout then folds).
        fill_in: what re-blocking does with elements of new blocks that were not active: ``masked`` (training goes on
            as before, bit for bit where the arithmetic allows) or ``trainable``.
        permute: whether hidden units may change places so that blocks become fuller.
        strict: whether a closed gate that must stay because what reads it is not understood is an error.

    Returns:
        What went, what stayed and why, and what was saved.

    Raises:
        CompactionError: the model cannot be traced, a unit to remove cannot leave, an optimizer's state is not
            understood; the message names the module. Nothing was changed.

    What it is called between is documented behaviour: gradients are carried along, so a compact between backward and
    step does no harm; a graph recorded before it refuses its backward. A module that is called twice, or shares a
    parameter, keeps its units, and the report says so. A layer never loses its last unit.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), sn.TriStateReLU(8), torch.nn.Linear(8, 2))
        >>> _ = sn.architecture.gates.close_gates_(model, share=0.75)
        >>> sn.compact(model).layers["0"].after, model[2].weight.shape
        (2, torch.Size([2, 2]))
    """
    start = time.perf_counter()
    if fill_in not in ("masked", "trainable"):
        raise ValueError(f"compact: fill_in must be masked or trainable, got {fill_in!r}")
    optimizers = as_optimizers(optimizer)
    net = plain_model(model)
    spared = {name: _spared(net, name, units) for name, units in (spare or {}).items()}
    options = {"opaque": tuple(opaque), "zeros": zeros, "inference": inference, "spared": spared}
    decision = _decide(net, options, criterion, remove or {}, strict)
    graph = decision.graph
    orders = UnitOrders(graph, decision.needed, optimizers, fill_in, permute)
    prepared = [prepare_stage(graph, stage, orders, net, optimizers, fill_in) for stage in graph.stages]
    twins = [plain_model(copy) for copy in copies]
    prepared += [prepare_stage(graph, stage, orders, twin, (), fill_in) for twin in twins for stage in graph.stages]
    distributed.assert_same("the units that compaction keeps", int(orders.kept.long().sum()))
    layers = _layer_changes(decision, orders)
    reblocked = {stage.name: how for stage in graph.stages if (how := orders.how(stage))}
    before = model_bytes(net, optimizers)
    _commit(prepared)  # from here on the graph no longer describes the model
    after = model_bytes(net, optimizers)
    if isinstance(model, distributed.DataParallel):
        distributed.rebuild(model)
    if sparsifier is not None:
        sparsifier.refresh()
    own = prepared[: len(graph.stages)]
    report = CompactionReport(
        layers=layers,
        parameters=(before[0], after[0]),
        bytes=(before[1], after[1]),
        blocks=(before[2], after[2]),
        fill_in=(sum(moves.inactive[0] for moves in own), sum(moves.inactive[1] for moves in own)),
        folded=sum(moves.folded for moves in own),
        reblocked=reblocked,
        seconds=time.perf_counter() - start,
    )
    if report.removed:
        logger.info("compact: %d units left\n%s", report.removed, report)
    return report


def as_optimizers(optimizer) -> tuple[torch.optim.Optimizer, ...]:
    """None, one or several as a tuple."""
    if optimizer is None:
        return ()
    return tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)


def plain_model(model: nn.Module) -> nn.Module:
    """The module inside a wrapper of ours, torch.compile or an averaged model. DistributedDataParallel is refused."""
    if isinstance(model, DistributedDataParallel) or (
        distributed.is_active() and not isinstance(model, distributed.DataParallel)
    ):
        raise CompactionError(
            "compact: parameters must not change size under DistributedDataParallel; "
            "wrap the model with sparsenet.distributed.DataParallel"
        )
    model = distributed.unwrap(model)
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, torch.optim.swa_utils.AveragedModel) else model


def _commit(prepared: list[StageMoves]) -> None:
    """Puts everything in place; takes all of it back if anything fails (only a lack of memory can)."""
    done: list[Callable[[], None]] = []
    try:
        for moves in prepared:
            for put, back in moves.puts:
                done.append(back)
                put()
    except BaseException:
        for back in reversed(done):
            back()
        raise


# --- who stays ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Decision:
    """What was found out.

    Attributes:
        graph: in which units that a criterion names are dead.
        dead: bool by unit id, those units. keeps: class -> why it stays whatever it computes.
        needed: bool by class, who must stay.
    """

    graph: UnitGraph
    dead: Tensor
    keeps: dict[int, str]
    needed: Tensor


def _decide(net: nn.Module, options: Mapping, criterion, remove: Mapping, strict: bool) -> _Decision:
    """The units that must stay; nothing is changed."""
    graph = UnitGraph(net, **options)
    dead = _named(graph, criterion, remove)
    keeps = dict(graph.pins)
    shells: set[int] = set()
    if dead.any():
        graph = UnitGraph(net, **options, dead=dead)
    while (last := _last_unit(graph, needed := _needed(graph, keeps, shells))) is not None:
        keeps[last] = LAST
        if not dead[last]:
            if not graph.constant_classes()[last]:
                shells.add(last)  # unread, or behind a closed gate: nothing depends on its value
        else:
            dead &= graph.classes != last
            graph = UnitGraph(net, **options, dead=dead)
            keeps = {**graph.pins, **keeps}
    if strict:
        _refuse_held_gates(graph, keeps)
    return _Decision(graph, dead, keeps, needed)


def _spared(net: nn.Module, name: str, units: Sequence[int]) -> Tensor:
    """Bool by unit of one gate."""
    gate = dict(net.named_modules()).get(name)
    if not hasattr(gate, "closed_units"):
        raise CompactionError(f"compact: spare must name gates of the model, got {name!r}")
    mask = torch.zeros(len(gate.closed_units()), dtype=torch.bool)
    for unit in units:
        if not 0 <= unit < len(mask):
            raise CompactionError(f"compact: units of {name!r} must lie in [0, {len(mask)}), got {unit}")
        mask[unit] = True
    return mask


def _named(graph: UnitGraph, criterion: Criterion | None, remove: Mapping[str, Sequence[int]]) -> Tensor:
    """Bool by unit id: what criterion and caller want gone, all ids of a class together."""
    dead = torch.zeros(len(graph.classes), dtype=torch.bool)
    views = unit_views(graph)
    for name, units in remove.items():
        view = views.get(name)
        if view is None:
            raise CompactionError(f"compact: remove must name layers of the model ({', '.join(views)}), got {name!r}")
        for unit in units:
            if not 0 <= unit < view.num_units:
                raise CompactionError(f"compact: units of {name!r} must lie in [0, {view.num_units}), got {unit}")
            reason = graph.pins.get(int(graph.classes[view.units[unit]]))
            if reason is not None:
                raise CompactionError(f"compact: unit {unit} of {name!r} cannot be removed: {reason}")
            dead[graph.classes[view.units[unit]]] = True
    for name, view in views.items() if criterion is not None else ():
        chosen = torch.as_tensor(criterion(view)).cpu()
        if chosen.dtype != torch.bool or chosen.shape != (view.num_units,):
            raise CompactionError(
                f"compact: the criterion must return bool [{view.num_units}] for {name!r}, "
                f"got {chosen.dtype} {list(chosen.shape)}"
            )
        dead[graph.classes[view.units[chosen & view.removable]]] = True
    return dead[graph.classes]


def _needed(graph: UnitGraph, keeps: Mapping[int, str], shells: set[int]) -> Tensor:
    """Bool by class: what must stay, and whatever that reads. Of ``shells`` nobody reads the value."""
    alive = torch.zeros(len(graph.classes), dtype=torch.bool)
    if keeps.keys() - shells:
        alive[torch.tensor(list(keeps.keys() - shells))] = True
    weighted = [s for s in reversed(graph.stages) if s.weights is not None and s.inputs is not None]
    count = -1
    while count != (count := int(alive.sum())):
        for stage in weighted:
            rows = alive[graph.classes[stage.outputs.units]]
            if rows.any():
                columns = stage.weights.needed_columns(rows, graph.seen(stage.inputs), graph.zeros)
                alive[graph.classes[stage.inputs.units[columns]]] = True
    if shells:
        alive[torch.tensor(list(shells))] = True
    return alive


def _last_unit(graph: UnitGraph, kept: Tensor) -> int | None:
    """The strongest unit, as a class, of the last layer that would lose all its units."""
    for view in reversed(unit_views(graph).values()):
        classes = graph.classes[view.units]
        if not kept[classes].any():
            return int(classes[view.incoming().argmax()])
    return None


def _refuse_held_gates(graph: UnitGraph, keeps: Mapping[int, str]) -> None:
    """A closed gate that stays because what it reads, or what reads it, is not followed: an error that says so."""
    held: dict[str, str] = {}
    for name, classes in _closed(graph).items():
        for unit in classes.tolist():
            reason = keeps.get(unit, LAST)
            if reason not in (*NATURAL, LAST) and "normalises over it" not in reason:
                held[name] = reason
    for node in graph.lost:
        module = graph.modules.get(node.target) if node.op == "call_module" else None
        if hasattr(module, "closed_units") and bool(graph.closed(node.target, module).any()):
            held[node.target] = graph.lost.get(node.all_input_nodes[0], "")
    for name, reason in held.items():
        raise CompactionError(
            f"compact: a closed unit of {name!r} cannot be removed: {reason or 'what it reads is not followed'}; "
            "strict=False lets it stay"
        )


def _closed(graph: UnitGraph) -> dict[str, Tensor]:
    """Gate name -> classes of its closed units."""
    return {
        stage.name: graph.classes[stage.outputs.units[graph.closed(stage.name, stage.module)]]
        for stage in graph.stages
        if hasattr(stage.module, "closed_units")
    }


# --- what to say ----------------------------------------------------------------------------------------------------


def _layer_changes(decision: _Decision, orders: UnitOrders) -> dict[str, LayerChange]:
    """What happened to each layer's units, and why."""
    graph = decision.graph
    why: dict[int, str] = {}
    for stage in graph.stages:
        if stage.weights is not None and stage.inputs is not None:
            constant = ~graph.seen(stage.inputs).isnan()
            why.update(dict.fromkeys(graph.classes[stage.inputs.units[constant]].tolist(), "constant"))
    for classes in _closed(graph).values():
        why.update(dict.fromkeys(classes.tolist(), "closed gate"))
    why.update(dict.fromkeys(graph.classes[decision.dead].tolist(), "criterion"))
    return {
        stage.name: _layer_change(graph, stage, orders, why, decision.keeps)
        for stage in graph.stages
        if stage.weights is not None
    }


def _layer_change(graph: UnitGraph, stage: Stage, orders: UnitOrders, why: Mapping, keeps: Mapping) -> LayerChange:
    classes = graph.classes[stage.outputs.units]
    removed: dict[str, int] = {}
    kept: dict[str, int] = {}
    for unit, stays in zip(classes.tolist(), orders.kept[classes].tolist(), strict=True):
        if not stays:
            reason = why.get(unit, "unread")
            removed[reason] = removed.get(reason, 0) + 1
        elif not orders.needed[unit]:
            kept["its block is not empty"] = kept.get("its block is not empty", 0) + 1
        elif unit in why and keeps.get(unit) not in NATURAL:
            reason = keeps.get(unit, "a reader has no bias to take it, or pads with zeros")
            kept[reason] = kept.get(reason, 0) + 1
    order = orders.order(stage.outputs)
    return LayerChange(len(classes), len(order), removed, kept, order)
