"""Which units of which modules are the same thing: a trace of a model in which every tensor's channels have names.

A *unit* is one output of a linear layer or one channel of a convolution. Walking the ``torch.fx`` graph of a model,
each tensor gets an :class:`Axis`: the ids of the units along its channel dimension, and which of them are constant. A
residual addition makes two units one; a concatenation puts ids side by side; flattening repeats each; a module that
the walk does not know pins the units it sees: they stay. Compaction asks this graph what can leave and who reads it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from sparsenet.compaction.modules import CompactLayerNorm, ConstantBranch
from sparsenet.compaction.operands import METHODS, place_operands
from sparsenet.compaction.rules import FUNCTION_RULES, MODULE_RULES, Axis, Shape, gated, name_of, variable
from sparsenet.compaction.weights import UnitWeights, unit_weights
from sparsenet.layers import SparseLinear
from sparsenet.models import SparseMLP

__all__ = ["CompactionError", "Stage", "UnitGraph", "trace"]


class CompactionError(ValueError):
    """A model that cannot be compacted as asked; nothing was changed."""


@dataclass(frozen=True)
class Stage:
    """One module that owns something per unit.

    Attributes:
        name, module: as in ``named_modules``.
        weights: of a linear layer or convolution; None for a module that is as wide as its input (norms, gates).
        inputs: units read, one per input column; None when unknown: all stay.
        outputs: units made.
    """

    name: str
    module: nn.Module
    weights: UnitWeights | None
    inputs: Axis | None
    outputs: Axis


@dataclass
class _Ids:
    """Unit ids and which of them are one (found at the end, by spreading the smallest id)."""

    count: int = 0
    joined: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def new(self, n: int) -> Tensor:
        self.count += n
        return torch.arange(self.count - n, self.count)

    def classes(self) -> Tensor:
        """int64 [count]: the smallest id that each id is one with."""
        label = torch.arange(self.count)
        if not self.joined:
            return label
        a, b = (torch.cat(side) for side in zip(*self.joined, strict=True))
        while True:
            low = torch.minimum(label[a], label[b])
            after = label.clone().scatter_reduce_(0, a, low, "amin").scatter_reduce_(0, b, low, "amin")
            after = after[after]
            if torch.equal(after, label):
                return label
            label = after


class _Tracer(fx.Tracer):
    """Traces down to modules that own parameters; remembers where it is, for a message that names the module."""

    def __init__(self, opaque: Iterable[nn.Module]):
        super().__init__()
        self.opaque = set(opaque)
        self.path: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if (
            isinstance(m, SparseLinear | CompactLayerNorm | ConstantBranch)
            or hasattr(m, "closed_units")
            or m in self.opaque
        ):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m, forward, args, kwargs):
        self.path.append(self.path_of_module(m))
        if type(m) in _FORWARDS and m not in self.opaque:
            result = _FORWARDS[type(m)](m, *args, **kwargs)
        else:
            result = super().call_module(m, forward, args, kwargs)
        self.path.pop()
        return result

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        root_fn = _FORWARDS.get(type(self.root), root_fn)
        return super().create_args_for_root(root_fn, is_module, concrete_args)


def _sparse_mlp_forward(self, x):
    return nn.Sequential.forward(self, torch.flatten(x, 1))


def _encoder_layer_forward(self, src, *masks, **settings):
    """Without the decisions on its input and mode, and without masks, of which no unit hangs on the choice."""
    if self.norm_first:
        x = src + self.dropout1(_attended(self, self.norm1(src)))
        return x + self.dropout2(_fed_forward(self, self.norm2(x)))
    x = self.norm1(src + self.dropout1(_attended(self, src)))
    return self.norm2(x + self.dropout2(_fed_forward(self, x)))


def _attended(layer, x):
    return layer.self_attn(x, x, x)[0]


def _fed_forward(layer, x):
    return layer.linear2(layer.dropout(layer.activation(layer.linear1(x))))


def _encoder_forward(self, src, *masks, **settings):
    for layer in self.layers:
        src = layer(src)
    return src if self.norm is None else self.norm(src)


_FORWARDS = {  # what is traced in place of a forward that looks at its input
    SparseMLP: _sparse_mlp_forward,
    nn.TransformerEncoderLayer: _encoder_layer_forward,
    nn.TransformerEncoder: _encoder_forward,
}


def trace(model: nn.Module, opaque: Iterable[nn.Module] = ()) -> fx.Graph:
    """The graph of ``model``'s forward. Raises CompactionError naming the module that cannot be traced."""
    tracer = _Tracer(opaque)
    try:
        graph = tracer.trace(model)
    except Exception as error:
        where = f"module {tracer.path[-1]!r}" if tracer.path else "the model's forward"
        raise CompactionError(
            f"compact: {where} must be traceable by torch.fx, got {type(error).__name__}: {error}; "
            "a submodule named in opaque= is left whole"
        ) from error
    place_operands(graph, dict(model.named_modules()))
    return graph


class UnitGraph:
    """The units of a model.

    Args:
        model: what to look at; nothing is changed.
        opaque: names of modules to leave whole.
        zeros: whether weights that are exactly zero count as absent.
        inference: whether constants need hold outside of training only.
        spared: gate name -> bool by unit, units whose closed gate does not count.
        dead: bool by unit id of an earlier graph of the same model: units to be seen as zero wherever they are read.

    Raises:
        CompactionError: the model cannot be traced; the message names the module.

    Attributes:
        stages: in the order they run.
        classes: int64 by id: units that are one have one class.
        pins: class -> why it stays. unread: those of them whose value nobody is known to read.
        nodes: the axis of each graph node that has one. lost: why the others have none.
        whole: modules that must keep their size, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        opaque: Iterable[str] = (),
        *,
        zeros: bool = True,
        inference: bool = False,
        spared: Mapping[str, Tensor] | None = None,
        dead: Tensor | None = None,
    ):
        self.model, self.zeros, self.inference, self.dead = model, zeros, inference, dead
        self.spared = spared or {}
        self.modules = dict(model.named_modules())
        for name in opaque:
            if name not in self.modules:
                raise CompactionError(f"compact: opaque must name modules of the model, got {name!r}")
        hidden = {self.modules[name] for name in opaque}
        self.graph = trace(model, hidden)
        self.whole = _left_whole(model, self.graph, self.modules, hidden)
        self._ids = _Ids()
        self._pins: list[tuple[Tensor, str, bool]] = []
        self.stages: list[Stage] = []
        self.nodes: dict[fx.Node, Axis] = {}
        self.lost: dict[fx.Node, str] = {}
        values: dict[fx.Node, Axis | Shape | None] = {}
        for node in self.graph.nodes:
            self._lost = ""
            values[node] = self._visit(node, values)
            if values[node] is None:
                self.lost[node] = self._lost or next((self.lost[n] for n in node.all_input_nodes if n in self.lost), "")
            if isinstance(values[node], Axis):
                self.nodes[node] = values[node]
        self.classes = self._ids.classes()
        self.pins: dict[int, str] = {}
        self.unread: set[int] = set()
        for units, reason, read in sorted(self._pins, key=lambda pin: not pin[2]):  # who reads it is told first
            for unit in self.classes[units].unique().tolist():
                if unit not in self.pins and not read:
                    self.unread.add(unit)
                self.pins.setdefault(unit, reason)

    # --- the walk ---

    def _visit(self, node: fx.Node, values: dict) -> Axis | Shape | None:
        if node.op == "placeholder":
            return self._placeholder(node)
        if node.op == "get_attr":
            return None
        inputs = [values[n] for n in node.all_input_nodes]
        if node.op == "output":
            return self.pin_all(inputs, "the model returns it")
        if node.op == "call_module":
            return self._call_module(node, inputs)
        function = METHODS.get(node.target, node.target) if node.op == "call_method" else node.target
        handler = FUNCTION_RULES.get(function)
        if handler is not None:
            return handler(self, node, inputs, values)
        return self.pin_all(inputs, f"{node.target if node.op == 'call_method' else name_of(function)} reads it")

    def _placeholder(self, node: fx.Node) -> Axis | None:
        """The model's input, as wide as the first layer that reads it says."""
        for user in node.users:
            weights = unit_weights(self.modules[user.target]) if user.op == "call_module" else None
            if weights is not None:
                axis = Axis(
                    self._ids.new(weights.columns), weights.channel_dim, variable(weights.columns), weights.ndim
                )
                self.pin(axis, "it is an input of the model")
                return axis
        return None

    def _call_module(self, node: fx.Node, inputs: list) -> Axis | None:
        name, module = node.target, self.modules[node.target]
        x = inputs[0] if len(inputs) == 1 else None
        why = self.whole.get(module)
        weights = unit_weights(module)
        if why is not None:
            return self._whole(weights, x, inputs, f"module {name!r} {why}")
        if weights is not None:
            return self._weighted(name, module, weights, inputs)
        rule = MODULE_RULES.get(type(module), gated if hasattr(module, "closed_units") else None)
        result = rule(self, name, module, x) if rule is not None and isinstance(x, Axis) else None
        if result is None:
            self.pin_all(inputs, f"module {name!r} ({type(module).__name__}) reads it")
        return result

    def _whole(self, weights: UnitWeights | None, x: Axis | None, inputs: list, reason: str) -> None:
        """A module that must keep its size: what it has no weight for stays as well, but nobody reads it."""
        read = x.sized(weights.columns) if weights is not None and isinstance(x, Axis) else None
        if read is None or x.dim != weights.channel_dim or weights.per_channel:
            return self.pin_all(inputs, reason)
        rows = torch.ones(weights.rows, dtype=torch.bool)
        heard = weights.needed_columns(rows, variable(weights.columns), self.zeros)
        self.pin(read, reason, heard)
        self.pin(read, reason, ~heard, read=False)
        self._lost = reason
        return None

    def _weighted(self, name: str, module: nn.Module, weights: UnitWeights, inputs: list) -> Axis:
        """A linear layer or convolution: reads columns, makes rows."""
        x = inputs[0] if len(inputs) == 1 else None
        read = x.sized(weights.columns) if isinstance(x, Axis) and x.dim == weights.channel_dim else None
        if read is None:
            self.pin_all(inputs, f"module {name!r} reads it in a way that is not understood")
        constant = variable(weights.rows) if read is None else weights.constant_rows(self.seen(read), self.zeros)
        units = read.units if read is not None and weights.per_channel else self._ids.new(weights.rows)
        ndim = weights.ndim or (x.ndim if isinstance(x, Axis) else None)
        outputs = Axis(units, weights.channel_dim, constant, ndim)
        if read is None and weights.per_channel:
            self.pin(outputs, f"module {name!r} reads what is not understood")
        self.stages.append(Stage(name, module, weights, read, outputs))
        return outputs

    def constant_classes(self) -> Tensor:
        """Bool by class: units that a layer makes constant: their value hangs on the constants that it reads."""
        made = torch.zeros(len(self.classes), dtype=torch.bool)
        for stage in self.stages:
            if stage.weights is not None:
                made[self.classes[stage.outputs.units[~stage.outputs.constant.isnan()]]] = True
        return made

    # --- what rules do ---

    def seen(self, axis: Axis) -> Tensor:
        """float64 [n]: the constants that a reader of ``axis`` sees, dead units as zero."""
        return axis.constant if self.dead is None else torch.where(self.dead[axis.units], 0.0, axis.constant)

    def closed(self, name: str, module: nn.Module) -> Tensor:
        """Bool [n]: units that the gates of a module switch off for good."""
        closed = module.closed_units().cpu()
        return closed & ~self.spared[name] if name in self.spared else closed

    def own(self, name: str, module: nn.Module, outputs: Axis, inputs: Axis | None = None) -> Axis:
        """Records a module that has something per unit and is as wide as its input; returns ``outputs``."""
        self.stages.append(Stage(name, module, None, inputs, outputs))
        return outputs

    def join(self, a: Axis, b: Axis) -> None:
        """Makes the units of both, position by position, one."""
        self._ids.joined.append((a.units, b.units))

    def pin(self, axis: Axis, reason: str, which: Tensor | None = None, *, read: bool = True) -> None:
        """Units of ``axis`` stay: all, or those ``which`` (bool) says, though their values may not be ``read``."""
        self._pins.append((axis.units if which is None else axis.units[which], reason, read))

    def pin_all(self, inputs: list, reason: str) -> None:
        """All units of all inputs stay, and what comes of them is not followed."""
        self._lost = reason
        for x in inputs:
            axis = x.axis if isinstance(x, Shape) else x
            if isinstance(axis, Axis):
                self.pin(axis, reason)


def _left_whole(model: nn.Module, graph: fx.Graph, modules: dict, hidden: set[nn.Module]) -> dict[nn.Module, str]:
    """Modules that must keep their size, and why."""
    whole = {module: "is left whole as asked" for module in hidden}
    calls = Counter(modules[n.target] for n in graph.nodes if n.op == "call_module")
    owners: dict[int, set[nn.Module]] = {}
    for module in modules.values():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), set()).add(module)
    for module in modules.values():
        own = [p for p in module._parameters.values() if p is not None]
        if not own and not module._buffers:
            continue
        if calls[module] > 1:
            whole.setdefault(module, f"is called {calls[module]} times")
        if any(len(owners[id(p)]) > 1 for p in own):
            whole.setdefault(module, "shares a parameter with another module")
        if parametrize.is_parametrized(module) or _weight_is_computed(module):
            whole.setdefault(module, "computes its weight from other parameters")
    for node in graph.nodes:
        if node.op == "get_attr":
            owner = modules.get(node.target.rpartition(".")[0])
            if owner is not None and owner is not model:
                whole.setdefault(owner, f"has its {node.target.rpartition('.')[2]} read directly")
    return whole


def _weight_is_computed(module: nn.Module) -> bool:
    """torch.nn.utils.prune and weight_norm replace the parameter by a tensor made before every forward."""
    if isinstance(module, SparseLinear):
        return "values" not in module._parameters
    return isinstance(module, nn.Linear | nn.modules.conv._ConvNd) and "weight" not in module._parameters
