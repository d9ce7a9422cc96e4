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

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparsenet import distributed
from sparsenet.compaction.criteria import UnitView, unit_views
from sparsenet.compaction.graph import CompactionError, UnitGraph
from sparsenet.compaction.moves import StageMoves, model_bytes, prepare_stage
from sparsenet.compaction.orders import UnitOrders
from sparsenet.compaction.reporting import (
    LAST,
    CompactionReport,
    Decision,
    LayerChange,
    closed_units,
    layer_changes,
    needed_units,
)

__all__ = ["CompactionError", "CompactionReport", "LayerChange", "compact", "plain_model"]

logger = logging.getLogger(__name__)

NATURAL = ("the model returns it", "it is an input of the model")
Criterion = Callable[[UnitView], Tensor]


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
        sparsifier: the :class:`~sparsenet.Sparsifier` of this model, to learn of the new patterns; its ``followers``
            are copies.
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
    twins = copies_of(net, copies, sparsifier)
    prepared += [prepare_stage(graph, stage, orders, twin, (), fill_in) for twin in twins for stage in graph.stages]
    distributed.assert_same("the units that compaction keeps", int(orders.kept.long().sum()))
    layers = layer_changes(decision, orders)
    reblocked = {stage.name: how for stage in graph.stages if (how := orders.how(stage))}
    before, after = carry_out(prepared, model, optimizers, sparsifier)  # the graph no longer describes the model
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


def copies_of(net: nn.Module, copies: Iterable[nn.Module], sparsifier) -> list[nn.Module]:
    """The models beside ``net`` that are to change as it does: ``copies`` and the Sparsifier's followers, each once."""
    twins = {id(twin): twin for twin in map(plain_model, (*copies, *getattr(sparsifier, "followers", ())))}
    twins.pop(id(net), None)
    return list(twins.values())


def carry_out(
    prepared: list[StageMoves], model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], sparsifier
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Puts everything in place and tells whoever must know; :func:`model_bytes` before and after."""
    net = plain_model(model)
    before = model_bytes(net, optimizers)
    commit(prepared)
    after = model_bytes(net, optimizers)
    if isinstance(model, distributed.DataParallel):
        distributed.rebuild(model)
    if sparsifier is not None:
        sparsifier.refresh()
    return before, after


def commit(prepared: list[StageMoves]) -> None:
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


def _decide(net: nn.Module, options: Mapping, criterion, remove: Mapping, strict: bool) -> Decision:
    """The units that must stay; nothing is changed."""
    graph = UnitGraph(net, **options)
    dead = _named(graph, criterion, remove)
    keeps = dict(graph.pins)
    shells: set[int] = set()
    if dead.any():
        graph = UnitGraph(net, **options, dead=dead)
    while (last := _last_unit(graph, needed := needed_units(graph, keeps, shells))) is not None:
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
    return Decision(graph, dead, keeps, needed)


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
    for name, classes in closed_units(graph).items():
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
