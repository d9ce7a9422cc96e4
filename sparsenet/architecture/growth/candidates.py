"""What could grow at a decision, at all three levels, with the gain and the cost of one item."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from sparsenet.architecture.growth.controller import Candidate
from sparsenet.architecture.growth.fading import group_of
from sparsenet.architecture.growth.gains import (
    NewBlocks,
    density_of,
    grad_input_of,
    incumbent_gain,
    layer_gain,
    squared_gradient,
    unit_gain,
)
from sparsenet.architecture.growth.ledger import Ledger
from sparsenet.architecture.growth.placing import growable, readers
from sparsenet.architecture.growth.watch import Seen
from sparsenet.compaction.graph import UnitGraph
from sparsenet.layers import SparseLinear

__all__ = ["candidates", "growable_layers", "reasons_against"]

MOST_TIMES = 4  # as wide as it was: what a layer may be after one decision
Kept = Mapping[str, Seen]


def candidates(
    graph: UnitGraph,
    ledger: Ledger,
    kept: Kept,
    levels: Sequence[str],
    density: float,
    seed: int,
    new_blocks: NewBlocks | None = None,
) -> list[Candidate]:
    """Everything that could grow.

    Args:
        kept: what each layer saw in the last step.
        density: up to which blocks are added to a layer. seed: of random units. new_blocks: of ``kept``.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.candidates import candidates
        >>> from sparsenet.architecture.growth.ledger import Ledger
        >>> from sparsenet.architecture.growth.watch import Seen
        >>> from sparsenet.compaction.graph import UnitGraph
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> graph, r = UnitGraph(model), torch.randn
        >>> kept = {"0": Seen(r(16, 4), r(16, 8), 16), "2": Seen(r(16, 8), r(16, 2), 16)}
        >>> [offer] = candidates(graph, Ledger(graph, (), {}), kept, ["units"], density=0.1, seed=0)
        >>> offer.level, offer.layer, offer.cost.parameters
        ('units', '0', 7.0)
    """
    found: list[Candidate] = []
    new_blocks = NewBlocks(kept, 0) if new_blocks is None else new_blocks
    growing = growable_layers(graph)
    for name in growing if "units" in levels else ():
        stage = ledger.stages[name]
        heard, usual = readers(graph, name), incumbent_gain(graph, stage)
        seen = [kept[each] for each in (name, *heard) if each in kept]
        gain = usual
        if heard and len(seen) == 1 + len(heard) and len({each.total for each in seen}) == 1:
            parts = [(ledger.stages[each].module, kept[each].grad_output) for each in heard]
            gain = sum(unit_gain(seen[0].x, [grad], seed) * density_of(module) for module, grad in parts)
        width, group = len(stage.outputs.units), group_of(graph, name)
        most = max((MOST_TIMES - 1) * width, group)
        found.append(Candidate("units", name, gain, ledger.unit(name), width, usual, group, most))
    for stage in graph.stages if "blocks" in levels else ():
        layer = stage.module
        if isinstance(layer, SparseLinear) and layer.values.requires_grad and stage.name in kept:
            held, places = layer.pattern.num_blocks, layer.pattern.block_rows * layer.pattern.block_cols
            most = min(math.ceil(density * places) - held, held)
            if most > 0:
                _, norms = new_blocks.best(stage.name, layer, max(1, held // 20))
                cost, gain = ledger.block(stage.name), float(norms.mean())
                usual = squared_gradient(layer) / max(held, 1)
                found.append(Candidate("blocks", stage.name, gain, cost, held, usual, most=most))
    everywhere = sum(ledger.stages[name].weights.rows for name in growing)
    for name in growing if "layers" in levels else ():
        stage = ledger.stages[name]
        heard = [ledger.stages[reader] for reader in readers(graph, name)]
        linear = isinstance(stage.module, nn.Linear | SparseLinear) and len(heard) == 1
        if linear and heard[0].inputs.units.equal(stage.outputs.units) and heard[0].name in kept:
            x, grad_output, _ = kept[heard[0].name]
            gain, width = layer_gain(x, grad_input_of(heard[0].module, grad_output)), stage.weights.rows
            usual = squared_gradient(stage.module) / max(width, 1)  # a new layer is so many units, among those of all
            found.append(Candidate("layers", name, gain, ledger.layer(name), everywhere, usual, most=1))
    return found


def reasons_against(graph: UnitGraph) -> dict[str, str | None]:
    """By layer: why its units do not change, None where they can.

    Beside what stands against new units in any model, layers that are frozen and those that feed a frozen one stay.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.candidates import reasons_against
        >>> from sparsenet.compaction.graph import UnitGraph
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> _ = model[1].requires_grad_(False)
        >>> reasons_against(UnitGraph(model))["0"]
        "'1' is frozen"
    """
    held: dict[int, str] = {}
    for stage in graph.stages:
        if stage.weights is None:
            continue
        weight = stage.module.values if isinstance(stage.module, SparseLinear) else stage.module.weight
        if not weight.requires_grad:
            for axis in (stage.inputs, stage.outputs):
                for unit in graph.classes[axis.units].unique().tolist() if axis is not None else ():
                    held.setdefault(unit, f"{stage.name!r} is frozen")
    reasons = growable(graph.model, graph)
    stages = {stage.name: stage for stage in graph.stages}
    for name, reason in reasons.items() if held else ():
        if reason is None:
            units = graph.classes[stages[name].outputs.units].tolist()
            reasons[name] = next((held[unit] for unit in units if unit in held), None)
    return reasons


def growable_layers(graph: UnitGraph) -> list[str]:
    """Names of layers whose units can change, one of each family of layers that share theirs.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.candidates import growable_layers
        >>> from sparsenet.compaction.graph import UnitGraph
        >>> growable_layers(UnitGraph(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))))
        ['0']
    """
    taken: set[int] = set()
    names = []
    stages = {stage.name: stage for stage in graph.stages if stage.weights is not None}
    for name, reason in reasons_against(graph).items():
        classes = set(graph.classes[stages[name].outputs.units].tolist()) if reason is None else set()
        if reason is None and not classes & taken:
            taken |= classes
            names.append(name)
    return names
