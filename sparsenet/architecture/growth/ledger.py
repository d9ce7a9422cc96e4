"""What the network costs now, and what one more unit, block or layer would: bytes, parameters and milliseconds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from sparsenet import functional
from sparsenet.compaction.graph import Stage, UnitGraph
from sparsenet.compaction.moves import model_bytes
from sparsenet.compaction.weights import BlockWeights, unit_weights
from sparsenet.functional.bits import mask_bytes
from sparsenet.layers import SparseLinear
from sparsenet.memory.costs import LayerCost
from sparsenet.memory.step_time import StepTimeModel
from sparsenet.optimizer_state import state_bytes

__all__ = ["Cost", "Ledger", "as_is", "with_more"]


DEAREST = 2.0  # times the milliseconds that a byte takes now; a model of times may be far off for small layers


@dataclass(frozen=True)
class Cost:
    """Bytes, parameters and milliseconds of a step. Sums and multiples are costs."""

    bytes: float = 0.0
    parameters: float = 0.0
    milliseconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self.parts, other.parts, strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1.0

    def __mul__(self, factor: float) -> Cost:
        return Cost(*(part * factor for part in self.parts))

    @property
    def parts(self) -> tuple[float, float, float]:
        """The three numbers."""
        return self.bytes, self.parameters, self.milliseconds

    def share_of(self, limit: Cost) -> float:
        """The largest share of a limit that this is; limits that are infinite do not count."""
        return max(part / most for part, most in zip(self.parts, limit.parts, strict=True))

    def fits(self, limit: Cost) -> bool:
        """Whether no part is above its limit."""
        return all(part <= most for part, most in zip(self.parts, limit.parts, strict=True))


def with_more(cost: LayerCost, outputs: float, inputs: float, blocks: float) -> LayerCost:
    """The same layer with so many more outputs, inputs and blocks.

    Example:
        >>> from sparsenet.architecture.growth.ledger import with_more
        >>> from sparsenet.memory import LayerCost
        >>> wider = with_more(LayerCost("dense", out_features=8, in_features=4, positions=1), 2, 0, 0)
        >>> wider.out_features, wider.weights
        (10, 40)
    """
    wider = replace(
        cost,
        out_features=max(0, round(cost.out_features + outputs)),
        in_features=max(0, round(cost.in_features + inputs)),
        num_blocks=max(0, round(cost.num_blocks + blocks)),
    )
    elements = cost.optimizer_elements + wider.weights - cost.weights if cost.optimizer_elements else 0
    return replace(wider, optimizer_elements=max(0, elements))


def as_is(cost: LayerCost, model: nn.Module) -> LayerCost:
    """``cost`` with the sizes that its layer has now; as it was where the model has no such layer any more.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.ledger import as_is
        >>> from sparsenet.memory import LayerCost
        >>> cost = LayerCost("dense", out_features=8, in_features=4, positions=1, name="0")
        >>> as_is(cost, torch.nn.Sequential(torch.nn.Linear(4, 9))).out_features
        9
    """
    module = dict(model.named_modules()).get(cost.name)
    weights = unit_weights(module) if module is not None and cost.name else None
    if weights is None:
        return cost
    blocks = module.pattern.num_blocks if isinstance(module, SparseLinear) else 0
    more = weights.rows - cost.out_features, weights.columns - cost.in_features, blocks - cost.num_blocks
    return with_more(cost, *more)


def _square(cost: LayerCost, width: int, density: float) -> LayerCost:
    """A layer of its kind with as many inputs as outputs."""
    blocks = density * width * width / cost.block_size**2 - cost.num_blocks if cost.block_size else 0.0
    return with_more(cost, width - cost.out_features, width - cost.in_features, blocks)


Changes = Mapping[str, tuple[float, float, float]]  # by layer: outputs, inputs and blocks more


class Ledger:
    """Costs of a model as it is now.

    Args:
        graph: of the model. optimizers: whose state counts.
        activation_bytes: saved for backward by module name, those that grow with the module's outputs; ``fixed_bytes``:
            the others. temporary: what the optimizer's step takes for a moment, when the activations are gone.
        layers: as :func:`sparsenet.memory.layer_costs` sees them. times: says what they take; None: no matter.
    """

    def __init__(
        self,
        graph: UnitGraph,
        optimizers: Sequence[torch.optim.Optimizer],
        activation_bytes: Mapping[str, int],
        fixed_bytes: int = 0,
        layers: Sequence[LayerCost] = (),
        times: StepTimeModel | None = None,
        temporary: int = 0,
    ):
        self.graph, self.optimizers = graph, tuple(optimizers)
        self.activation_bytes, self.fixed_bytes = dict(activation_bytes), fixed_bytes
        self.layers, self.times = tuple(layers), times if layers else None
        self.stages = {stage.name: stage for stage in graph.stages}
        self.temporary = temporary

    def total(self) -> Cost:
        """Of the whole model."""
        elements, stored, _ = model_bytes(self.graph.model, self.optimizers)
        for p in self.graph.model.parameters():
            if p.requires_grad and not any(optimizer.state.get(p) for optimizer in self.optimizers):
                stored += _first_state(self.optimizers, p) * p.numel()  # it comes with the first step
        return Cost(stored + max(self._activations, self.temporary), elements) + self._of_layers({})

    @property
    def _activations(self) -> int:
        return self.fixed_bytes + sum(self.activation_bytes.values())

    def _of_layers(self, changes: Changes) -> Cost:
        """Milliseconds, and scratch memory of the block-sparse kernels, if layers had so many more of everything."""
        layers = [with_more(cost, *changes.get(cost.name, (0.0, 0.0, 0.0))) for cost in self.layers]
        scratch = [
            functional.linear_workspace(
                getattr(torch, cost.dtype),
                (cost.out_features, cost.in_features),
                cost.block_size,
                cost.num_blocks,
                cost.positions,
                torch.get_num_threads(),
            )
            for cost in layers
            if cost.kind == "block" and cost.num_blocks
        ]
        taken = sum(max(buffer) for buffer in itertools.zip_longest(*scratch, fillvalue=0))
        return Cost(taken, 0.0, self.times.predict(layers) if self.times is not None else 0.0)

    def _more(self, changes: Changes, stored: float) -> Cost:
        """What they would add beside ``stored`` bytes, which take at most ``DEAREST`` times what as many do now."""
        more = self._of_layers(changes) - self._of_layers({})
        most = DEAREST * self._now.milliseconds * stored / max(self._now.bytes, 1.0)
        return Cost(max(0.0, more.bytes), 0.0, min(max(0.0, more.milliseconds), most))

    @cached_property
    def _now(self) -> Cost:
        return self.total()

    def unit(self, name: str) -> Cost:
        """Of one unit of a layer: its row, its readers' columns, what norms and gates have of it, its activations."""
        classes = self._classes(name)
        cost, changes = Cost(), {}  # of as many units as there are
        for stage in self.graph.stages:
            rows = self._share(stage.outputs, classes)
            columns = self._share(stage.inputs, classes) if stage.inputs is not None else 0.0
            cost += self._stage(stage, rows, columns)
            if stage.weights is not None and (rows or columns):
                changes[stage.name] = (rows, columns, self._blocks(stage, rows, columns))
        count = max(len(classes), 1)
        return cost * (1.0 / count) + Cost(milliseconds=self._more(changes, cost.bytes).milliseconds / count)

    def block(self, name: str) -> Cost:
        """Of one block of a block-sparse layer."""
        layer = self.stages[name].module
        size = layer.block_size**2
        some = 16.0  # one block alone is below what a model of times resolves
        stored = size * self._bytes_per_element(layer.values) + self._bytes_per_block(layer)
        later = self._more({name: (0.0, 0.0, some)}, some * stored).milliseconds / some
        return Cost(stored, size, later)

    def layer(self, name: str) -> Cost:
        """Of a layer as wide as the outputs of ``name`` inserted after it, as dense as that one is."""
        stage = self.stages[name]
        width, module = stage.weights.rows, stage.module
        weight = module.values if isinstance(module, SparseLinear) else module.weight
        share = module.density if isinstance(module, SparseLinear) else 1.0
        elements = share * width * width * (weight[0, 0].numel() if not isinstance(module, SparseLinear) else 1) + width
        saved = self.activation_bytes.get(name, 0)
        indices = 8.0 * math.ceil(share * width * width / module.block_size**2) if share < 1 else 0.0
        more = 0.0
        new = [_square(cost, width, share) for cost in self.layers if cost.name == name]
        if self.times is not None and new:
            more = max(0.0, self.times.predict([*self.layers, *new]) - self.times.predict(self.layers))
        return Cost(elements * self._bytes_per_element(weight) + indices + 2 * saved, elements, more)

    def grown(self, units: Mapping[str, int], blocks: Mapping[str, int]) -> Cost:
        """What would be added by so many units and blocks of layers together, never too little.

        More than the sum of one by one: where a layer and its reader both grow, the new weights between them count too.
        """
        rows, columns, cost = {}, {}, Cost()
        for name, count in units.items():
            classes = self._classes(name)
            for stage in self.graph.stages:
                share = count / max(len(classes), 1)
                rows[stage.name] = rows.get(stage.name, 0.0) + share * self._share(stage.outputs, classes)
                read = self._share(stage.inputs, classes) if stage.inputs is not None else 0.0
                columns[stage.name] = columns.get(stage.name, 0.0) + share * read
        changes = {}
        for stage in self.graph.stages:
            r, c = rows.get(stage.name, 0.0), columns.get(stage.name, 0.0)
            cost += self._stage(stage, r, c)
            more = float(blocks.get(stage.name, 0))
            if isinstance(stage.weights, BlockWeights):
                side = stage.module.block_size
                if r or c:  # whole blocks, a whole number of them in each line
                    more += self._blocks(stage, r, c) + math.ceil(r / side) + math.ceil(c / side)
                    more += math.ceil(r / side) * math.ceil(c / side)
                weight = stage.module.values
                extra = max(0.0, more - self._blocks(stage, r, c)) * side**2
                indices = self._bytes_per_block(stage.module) * max(0.0, more - self._blocks(stage, r, c))
                cost += Cost(extra * self._bytes_per_element(weight) + indices, extra)
            elif stage.weights is not None and not stage.weights.per_channel and r and c:
                weight = stage.module.weight
                corner = weight[0, 0].numel() * r * c
                cost += Cost(corner * self._bytes_per_element(weight), corner)
            if r or c or more:
                changes[stage.name] = (r, c, more)
        if self.temporary:
            held = sum(p.numel() for p in self.graph.model.parameters())
            later = self.temporary * (1 + cost.parameters / max(held, 1))
            least = max(self._activations, self.temporary)
            cost += Cost(max(0.0, later - least))
        return cost + self._more(changes, cost.bytes)

    # --- parts ---

    def classes_of(self, name: str) -> Tensor:
        """int64, distinct: the classes of a layer's units."""
        return self._classes(name)

    def _classes(self, name: str) -> Tensor:
        return self.graph.classes[self.stages[name].outputs.units].unique()

    def _share(self, axis, classes: Tensor) -> float:
        """How many positions of ``axis`` are of these classes."""
        return float(torch.isin(self.graph.classes[axis.units], classes).sum()) if len(axis.units) else 0.0

    def _stage(self, stage: Stage, rows: float, columns: float) -> Cost:
        if not rows and not columns:
            return Cost()
        module, cost = stage.module, Cost()
        if stage.weights is None:
            n = max(len(stage.outputs.units), 1)
            for p in module.parameters(recurse=False):
                cost += Cost(p.numel() / n * rows * self._bytes_per_element(p), p.numel() / n * rows)
            buffers = sum(b.numel() * b.element_size() for b in module.buffers(recurse=False))
            return cost + Cost(rows / n * (buffers + self.activation_bytes.get(stage.name, 0)))
        weight = module.values if isinstance(stage.weights, BlockWeights) else module.weight
        all_rows, all_columns = max(stage.weights.rows, 1), max(stage.weights.columns, 1)
        elements = weight.numel() * (rows / all_rows + columns / all_columns)
        if stage.weights.per_channel:
            elements = weight.numel() * rows / all_rows
        bias = rows if module.bias is not None else 0.0
        indices = self._blocks(stage, rows, columns) * self._bytes_per_block(module)
        saved = self.activation_bytes.get(stage.name, 0) * rows / all_rows
        return Cost((elements + bias) * self._bytes_per_element(weight) + indices + saved, elements + bias)

    def _blocks(self, stage: Stage, rows: float, columns: float) -> float:
        if not isinstance(stage.weights, BlockWeights):
            return 0.0
        count = stage.module.pattern.num_blocks
        return count * (rows / max(stage.weights.rows, 1) + columns / max(stage.weights.columns, 1))

    def _bytes_per_block(self, layer: nn.Module) -> float:
        """Beside its values: of its indices, of the row index that grows with rows of blocks, and of its mask."""
        if not isinstance(layer, SparseLinear):
            return 0.0
        return 12.0 + (0 if layer.topology.mask_bits is None else mask_bytes(layer.block_size))

    def _bytes_per_element(self, parameter: nn.Parameter) -> float:
        """Of the parameter, its gradient and its state."""
        size = parameter.element_size() * (1 + parameter.requires_grad)
        if parameter.requires_grad and not any(optimizer.state.get(parameter) for optimizer in self.optimizers):
            return size + _first_state(self.optimizers, parameter)
        for optimizer in self.optimizers:
            for t in optimizer.state.get(parameter, {}).values():
                if isinstance(t, Tensor) and t.numel() > 1:
                    size += t.numel() * t.element_size() / max(parameter.numel(), 1)
        return size


_first_states = WeakIdKeyDictionary()  # bytes per element, by parameter: asking an optimizer takes two of its steps


def _first_state(optimizers: Sequence[torch.optim.Optimizer], parameter: nn.Parameter) -> float:
    """Bytes of state per element that the optimizers will keep for a parameter that they have not moved yet."""
    if parameter not in _first_states:
        per_entry, _ = state_bytes(optimizers, parameter)
        _first_states[parameter] = per_entry / max(parameter[:1].numel() if parameter.dim() else 1, 1)
    return _first_states[parameter]
