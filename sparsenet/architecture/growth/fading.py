"""Pruning that can be taken back: what is to go fades over some steps, and returns if the loss asks for it.

A fading unit is one whose outgoing weights are multiplied, after every optimizer step, so that they fall to zero along
a straight line; a fading block is multiplied itself. While it fades, (weight x gradient) / strength says what the whole
unit would be worth; one whose worth rises clearly above that it was chosen with is given back its strength.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsenet.compaction.graph import UnitGraph
from sparsenet.compaction.weights import BlockWeights
from sparsenet.layers import SparseLinear

__all__ = ["Fade", "Fades", "outgoing_of"]

RESCUED_FROM = 4.0  # times the worth that it was chosen with
LEAST_STRENGTH = 0.3  # below it a worth is too uncertain to judge by


@dataclass
class Fade:
    """Units of one layer, or blocks of one, on their way out.

    Attributes:
        level: ``units`` or ``blocks``. layer: its name.
        items: int64 [n]: units in the order of the layer's outputs, or block numbers.
        worth: float32 [n], when chosen. seen: float32 [n], sums of what was seen while fading; ``looks``: how often.
        columns: of each reader, where the units stand; for blocks empty.
    """

    level: str
    layer: str
    items: Tensor
    worth: Tensor
    columns: dict[str, Tensor] = field(default_factory=dict)
    seen: Tensor | None = None
    looks: int = 0


def outgoing_of(graph: UnitGraph, layer: str, units: Tensor) -> dict[str, Tensor]:
    """int64 by reader: the columns in which the outputs ``units`` of ``layer`` stand, unit after unit.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.fading import outgoing_of
        >>> from sparsenet.compaction.graph import UnitGraph
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> outgoing_of(UnitGraph(model), "0", torch.tensor([1, 5]))
        {'2': tensor([1, 5])}
    """
    stage = next(s for s in graph.stages if s.name == layer)
    classes = graph.classes[stage.outputs.units[units]]
    found = {}
    for reader in graph.stages:
        if reader.weights is not None and reader.inputs is not None and not reader.weights.per_channel:
            columns = torch.isin(graph.classes[reader.inputs.units], classes).nonzero().flatten()
            if len(columns):
                found[reader.name] = columns
    return found


def scale_columns(module: nn.Module, columns: Tensor, factor: Tensor | float) -> None:
    """Multiplies columns of a layer's weight in place by one factor, or by one for each column."""
    with torch.no_grad():
        if isinstance(module, SparseLinear):
            b = module.block_size
            per_column = torch.ones(module.pattern.block_cols * b, device=module.values.device)
            per_column[columns.to(per_column.device)] = torch.as_tensor(factor, dtype=per_column.dtype)
            touched = (per_column.view(-1, b) != 1).any(1)[module.pattern.col.long()].nonzero().flatten()
            factors = per_column.view(-1, b)[module.pattern.col.long()[touched]].unsqueeze(1)
            module.values[touched] *= factors.to(module.values)
            return
        columns = columns.to(module.weight.device)
        factor = torch.as_tensor(factor, dtype=module.weight.dtype, device=module.weight.device)
        shape = [1, -1] + [1] * (module.weight.dim() - 2)
        module.weight[:, columns] *= factor.reshape(shape) if factor.dim() else factor


class Fades:
    """All that fades at a time. ``begun``: the step it began at; ``ramp``: how many steps it takes."""

    def __init__(self, ramp: int):
        self.ramp = ramp
        self.begun = 0
        self.fades: list[Fade] = []

    def strength(self, step: int) -> float:
        """Of what fades, after ``step``: from 1 to 0."""
        return max(0.0, 1.0 - (step - self.begun) / self.ramp)

    def begin(self, step: int, fades: list[Fade]) -> None:
        """What is to go from now on. What faded before must be gone."""
        self.begun, self.fades = step, fades

    def drop_blocks(self) -> None:
        """Blocks were moved by others: those that fade are not known any more."""
        self.fades = [fade for fade in self.fades if fade.level != "blocks"]

    def items(self, level: str) -> dict[str, Tensor]:
        """What fades at one level, by layer."""
        return {fade.layer: fade.items for fade in self.fades if fade.level == level}

    def apply(self, step: int, modules: Mapping[str, nn.Module]) -> None:
        """Weakens everything by one step; optimizers have moved the weights since."""
        before, now = self.strength(step - 1), self.strength(step)
        if not self.fades or before <= 0.0:
            return
        for fade in self.fades:
            self._scale(fade, modules, now / before)

    def _scale(self, fade: Fade, modules: Mapping[str, nn.Module], factor: float) -> None:
        if fade.level == "blocks":
            with torch.no_grad():
                modules[fade.layer].values[fade.items] *= factor
        for reader, columns in fade.columns.items():
            scale_columns(modules[reader], columns, factor)

    def look(self, step: int, products: Mapping[str, tuple[Tensor, Tensor | None]]) -> None:
        """Takes note of the worth of what fades: ``products`` by layer, of its units and its blocks."""
        strength = self.strength(step)
        if strength < LEAST_STRENGTH:
            return
        for fade in self.fades:
            found = products.get(fade.layer)
            values = None if found is None else found[0 if fade.level == "units" else 1]
            if values is None:
                continue
            worth = (values[fade.items] / strength).square()
            worth = worth.to(fade.worth.device)
            fade.seen = worth if fade.seen is None else fade.seen + worth
            fade.looks += 1

    def rescue(
        self, graph: Callable[[], UnitGraph], step: int, modules: Mapping[str, nn.Module]
    ) -> list[tuple[str, str, int]]:
        """Gives back its strength to what turned out to be worth more; (level, layer, how many). Called before the end.

        ``graph``: makes one of the model, asked only where units are rescued. Units of one block are rescued together.
        """
        strength, rescued = self.strength(step), []
        if strength <= 0.0:
            return rescued
        for fade in self.fades:
            if fade.seen is None or not fade.looks:
                continue
            back = (fade.seen / fade.looks > RESCUED_FROM * fade.worth.clamp(min=1e-30)).to(fade.items.device)
            if not bool(back.any()):
                continue
            if fade.level == "blocks":
                with torch.no_grad():
                    modules[fade.layer].values[fade.items[back]] *= 1.0 / strength
            else:
                units = graph()
                back = _whole_groups(units, fade, back)
                for reader, columns in outgoing_of(units, fade.layer, fade.items[back]).items():
                    scale_columns(modules[reader], columns, 1.0 / strength)
                fade.columns = outgoing_of(units, fade.layer, fade.items[~back])
            rescued.append((fade.level, fade.layer, int(back.sum())))
            kept = ~back.to(fade.worth.device)
            fade.items, fade.worth, fade.seen = fade.items[~back], fade.worth[kept], fade.seen[kept]
        self.fades = [fade for fade in self.fades if len(fade.items)]
        return rescued

    # --- saving ---

    def state_dict(self) -> dict:
        """Everything that fades, as far as it is."""
        return {"begun": self.begun, "fades": [vars(fade).copy() for fade in self.fades]}

    def load_state_dict(self, state: dict) -> None:
        """Goes on fading."""
        self.begun, self.fades = state["begun"], [Fade(**fields) for fields in state["fades"]]


def _whole_groups(graph: UnitGraph, fade: Fade, back: Tensor) -> Tensor:
    """``back``, where one unit of a block is rescued all of its block are."""
    size = group_of(graph, fade.layer)
    groups = fade.items // size
    return torch.isin(groups, groups[back]) if size > 1 else back


def group_of(graph: UnitGraph, layer: str) -> int:
    """How many neighbouring units of ``layer`` come and go together: the largest block that they stand in.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.architecture.growth.fading import group_of
        >>> from sparsenet.compaction.graph import UnitGraph
        >>> group_of(UnitGraph(sn.SparseMLP([64, 64, 10], density=0.5, block_size=16)), "0")
        16
    """
    stage = next(s for s in graph.stages if s.name == layer)
    classes = graph.classes[stage.outputs.units]
    size = 1
    for other in graph.stages:
        if isinstance(other.weights, BlockWeights):
            for axis in (other.outputs, other.inputs):
                if axis is not None and bool(torch.isin(graph.classes[axis.units], classes).any()):
                    size = max(size, other.module.block_size)
    return size
