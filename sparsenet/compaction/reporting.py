"""What a compaction did, and for every dead unit that it had to leave, why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsenet.compaction.graph import Stage, UnitGraph
from sparsenet.compaction.orders import UnitOrders
from sparsenet.compaction.rules import variable
from sparsenet.compaction.weights import unit_weights
from sparsenet.layers import SparseLinear

__all__ = [
    "LAST",
    "CompactionReport",
    "Decision",
    "LayerChange",
    "closed_units",
    "layer_changes",
    "needed_units",
]

LAST = "a layer keeps at least one unit"
BLOCK = "its block is not empty"
READ = "a unit that stays reads it"
ADDED = "it is added to units that live"
VARIES = "what stands before its readers makes it vary"
NO_BIAS = "a reader has no bias to take it, or pads with zeros"


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


# --- who stays ---


@dataclass(frozen=True)
class Decision:
    """What was found out about a model, before anything changes.

    Attributes:
        graph: in which units that a criterion names are dead.
        dead: bool by unit id, those units. keeps: class -> why it stays whatever it computes.
        needed: bool by class, who must stay.
    """

    graph: UnitGraph
    dead: Tensor
    keeps: dict[int, str]
    needed: Tensor


def needed_units(graph: UnitGraph, keeps: Mapping[int, str], shells: set[int]) -> Tensor:
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


def closed_units(graph: UnitGraph) -> dict[str, Tensor]:
    """Gate name -> classes of its closed units."""
    return {
        stage.name: graph.classes[stage.outputs.units[graph.closed(stage.name, stage.module)]]
        for stage in graph.stages
        if hasattr(stage.module, "closed_units")
    }


# --- what to say ------------------------------------------------------------------------------------------------------


def layer_changes(decision: Decision, orders: UnitOrders) -> dict[str, LayerChange]:
    """What happened to each layer's units, and why; layers that the graph does not follow only if they hold dead ones.

    A unit is told to be dead where its gate is closed, a criterion named it, its layer makes it constant or some reader
    sees it constant, or where no unit that lives reads it.
    """
    graph = decision.graph
    dead = _Dead(decision, orders)
    changes = {stage.name: dead.change(stage) for stage in graph.stages if stage.weights is not None}
    for name, module in graph.modules.items():
        count, width = _dead_rows(graph, module) if name not in changes else (0, 0)
        if count:
            reason = f"module {name!r} {graph.whole.get(module, 'is not followed')}"
            changes[name] = LayerChange(width, width, {}, {reason: count}, torch.arange(width))
    for node in graph.lost:
        module = graph.modules.get(node.target) if node.op == "call_module" else None
        closed = graph.closed(node.target, module) if hasattr(module, "closed_units") else torch.zeros(0)
        if closed.any() and node.target not in changes:
            reason = graph.lost.get(node.all_input_nodes[0], "") or "what it reads is not followed"
            width = len(closed)
            changes[node.target] = LayerChange(width, width, {}, {reason: int(closed.sum())}, torch.arange(width))
    return changes


def _dead_rows(graph: UnitGraph, module: nn.Module) -> tuple[int, int]:
    """(outputs that are constant whatever is read, outputs) of a layer that has no stage."""
    weights = unit_weights(module)
    if weights is not None:
        return int((~weights.constant_rows(variable(weights.columns), graph.zeros).isnan()).sum()), weights.rows
    convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if graph.zeros and (convolution or isinstance(module, nn.Linear)):
        rows = module.weight.detach().flatten(1)
        return int((rows == 0).all(1).sum()), len(rows)
    if isinstance(module, SparseLinear):
        return int((module.weight_dense().detach() == 0).all(1).sum()), module.out_features
    return 0, 0


class _Dead:
    """What is known of the units that are dead, by class."""

    def __init__(self, decision: Decision, orders: UnitOrders):
        graph = decision.graph
        self.graph, self.keeps, self.orders = graph, decision.keeps, orders
        self.why: dict[int, str] = {}
        self.varying: set[int] = set()  # for some reader
        for stage in graph.stages:
            if stage.weights is not None and stage.inputs is not None:
                classes, constant = graph.classes[stage.inputs.units], ~graph.seen(stage.inputs).isnan()
                self.why.update(dict.fromkeys(classes[constant].tolist(), "constant"))
                self.varying.update(classes[~constant].tolist())
        for classes in closed_units(graph).values():
            self.why.update(dict.fromkeys(classes.tolist(), "closed gate"))
        self.why.update(dict.fromkeys(graph.classes[decision.dead].tolist(), "criterion"))
        read = {unit: why for unit, why in self.keeps.items() if why != LAST and unit not in graph.unread}
        self.lives = decision.needed if len(read) == len(self.keeps) else needed_units(graph, read, set())
        self.joined = torch.bincount(graph.classes, minlength=len(graph.classes)) > 1

    def change(self, stage: Stage) -> LayerChange:
        """One layer's."""
        classes, orders = self.graph.classes[stage.outputs.units], self.orders
        told = ~stage.outputs.constant.isnan() | ~self.lives[classes]
        removed: dict[str, int] = {}
        kept: dict[str, int] = {}
        for unit, stays, dead in zip(classes.tolist(), orders.kept[classes].tolist(), told.tolist(), strict=True):
            if not stays:
                reason = self.why.get(unit, "unread")
                removed[reason] = removed.get(reason, 0) + 1
            elif dead or unit in self.why:
                reason = self._reason(unit)
                kept[reason] = kept.get(reason, 0) + 1
        order = orders.order(stage.outputs)
        return LayerChange(len(classes), len(order), removed, kept, order)

    def _reason(self, unit: int) -> str:
        """Why a dead unit stays."""
        if unit in self.keeps:
            return self.keeps[unit]
        if not self.orders.needed[unit]:
            return BLOCK
        if not self.lives[unit]:
            return READ
        if unit in self.varying:
            return ADDED if self.joined[unit] else VARIES
        return NO_BIAS
