"""Depth folding: layers with nothing non-linear between them become one; constant residual branches vanish.

Where a depth gate turned a tri-state ReLU into the identity, ``W2 diag(w) W1`` does the work of two layers (Srinivas &
Babu, BMVC 2016, section 3.4). It is done where it pays, by counted elements: a product through a bottleneck, or of
sparse matrices with many blocks, may cost more than its factors. The model's forward is not rewritten: the second
layer takes the product, and what stood before it becomes ``nn.Identity``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx, nn

from sparsenet.architecture.folded_weights import FoldedWeight, fold_weights, replace_parameter
from sparsenet.architecture.gate_kinds import HardConcreteGate
from sparsenet.architecture.gates import TriStateReLU
from sparsenet.compaction.compacting import as_optimizers, plain_model
from sparsenet.compaction.graph import UnitGraph
from sparsenet.compaction.modules import ConstantBranch
from sparsenet.compaction.rules import Axis, name_of
from sparsenet.layers import SparseLinear

__all__ = ["FoldReport", "FoldedPair", "fold_depth"]

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, SparseLinear)
_ADDITIONS = ("add", "iadd", "add_")
Optimizers = Sequence[torch.optim.Optimizer]


@dataclass(frozen=True)
class FoldedPair:
    """Two layers that became one: their names, and elements of their weights before and after."""

    first: str
    second: str
    elements: tuple[int, int]


@dataclass(frozen=True)
class FoldReport:
    """What folding did.

    Attributes:
        folded: pairs, in the order they were folded.
        vanished: the last module of each residual branch that is gone.
        kept: linear layer -> why it was not folded.
    """

    folded: list[FoldedPair] = field(default_factory=list)
    vanished: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{p.first} into {p.second}: {p.elements[0]} -> {p.elements[1]} elements" for p in self.folded]
        lines += [f"branch ending at {name}: constant, gone" for name in self.vanished]
        return "\n".join(lines + [f"{name} stays: {why}" for name, why in self.kept.items()])


@dataclass(frozen=True)
class _Pair:
    """Two layers with only ``between`` between them; ``factor`` is what each unit in between is multiplied by."""

    first: str
    second: str
    between: list[str]
    factor: Tensor | None


def fold_depth(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    always: bool = False,
) -> FoldReport:
    """Merges layers that have nothing non-linear between them, in place.

    Args:
        model: any module that ``torch.fx`` can trace.
        optimizer: whose parameters it holds (one or several); merged ones leave it, the product's moments start anew.
        always: also where the product has more elements than its factors.

    Returns:
        What was folded, what vanished, and what stayed linear and why.

    Raises:
        CompactionError: the model cannot be traced; the message names the module. Nothing was changed.

    Between two linear layers may stand the identity: ``nn.Identity``, a TriStateReLU whose depth gate is 1 (closed
    units count as such), a PReLU or LeakyReLU of slope 1, dropout that never drops. Two convolutions merge if the
    second one has no padding, into a kernel of ``k1 + s1 (k2 - 1)``. Pooling and normalisation in between rule it out.
    The function stays the same, in train and eval mode.

    Example:
        >>> import torch, sparsenet as sn
        >>> act = sn.TriStateReLU(64, depth_start=1.0, width_start=1.0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(10, 64), act, torch.nn.Linear(64, 5))
        >>> print(sn.fold_depth(model))
        0 into 2: 960 -> 50 elements
        >>> model
        Sequential(
          (0): Identity()
          (1): Identity()
          (2): Linear(in_features=10, out_features=5, bias=True)
        )
    """
    net, optimizers = plain_model(model), as_optimizers(optimizer)
    report = FoldReport()
    _drop_constant_branches(net, optimizers, report)
    while True:
        report.kept.clear()
        best: tuple[int, _Pair, FoldedWeight] | None = None
        for pair in _pairs(net, report.kept):
            product = fold_weights(net.get_submodule(pair.first), net.get_submodule(pair.second), pair.factor)
            if isinstance(product, str):
                report.kept[pair.first] = product
            elif product.elements >= product.before and not always:
                report.kept[pair.first] = f"the product has {product.elements} elements, its factors {product.before}"
            elif best is None or product.before - product.elements > best[0]:
                best = (product.before - product.elements, pair, product)
        if best is None:
            return report
        _, pair, product = best
        _put(net, pair, product, optimizers)
        report.folded.append(FoldedPair(pair.first, pair.second, (product.before, product.elements)))


# --- finding pairs --------------------------------------------------------------------------------------------------


def _pairs(net: nn.Module, kept: dict[str, str]) -> list[_Pair]:
    """Layers and what follows them up to the next layer; why a linear activation is not in one goes to ``kept``."""
    graph = UnitGraph(net)
    pairs = []
    for node in graph.graph.nodes:
        module = graph.modules.get(node.target) if node.op == "call_module" else None
        if isinstance(module, _LAYERS) and module not in graph.whole:
            found = _follow(graph, node)
            if isinstance(found, _Pair):
                pairs.append(found)
            elif found[0]:
                kept[node.target] = found[1]
    return pairs


def _follow(graph: UnitGraph, start: fx.Node) -> _Pair | tuple[bool, str]:
    """The pair that begins at a layer; else whether a linear activation was met, and what ended the search."""
    between: list[str] = []
    factor: Tensor | None = None
    linear, node = False, start
    while True:
        if len(node.users) != 1:
            return linear, "its output is read more than once"
        node = next(iter(node.users))
        if node.op == "output":
            return linear, "the model returns it"
        if node.op != "call_module" or len(node.all_input_nodes) != 1:
            return linear, f"{name_of(node.target)} stands between"
        module = graph.modules[node.target]
        if module in graph.whole:
            return linear, f"module {node.target!r} {graph.whole[module]}"
        if isinstance(module, _LAYERS):
            return _Pair(start.target, node.target, between, factor)
        scale = _identity_factor(module)
        if isinstance(scale, str):
            return linear, f"module {node.target!r} ({type(module).__name__}) {scale}"
        linear = linear or isinstance(module, TriStateReLU)
        factor = scale if factor is None else factor if scale is None else factor * scale
        between.append(node.target)


def _identity_factor(module: nn.Module) -> Tensor | str | None:
    """[n], or None for one, by which a module multiplies each unit; why not, if it does anything else."""
    if isinstance(module, TriStateReLU):
        if not module.is_identity():
            return "is a ReLU"
        if isinstance(module.kind, HardConcreteGate):
            return "has gates that are random in training"
        return module.kind.value(module.width_gate.detach(), training=False)
    if isinstance(module, nn.PReLU) and bool((module.weight == 1).all()):
        return None
    if isinstance(module, nn.LeakyReLU) and module.negative_slope == 1:
        return None
    if isinstance(module, nn.Identity) or (isinstance(module, nn.Dropout) and module.p == 0):
        return None
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "sees the batch in training"
    return "stands between"


# --- constant branches ----------------------------------------------------------------------------------------------


def _drop_constant_branches(net: nn.Module, optimizers: Optimizers, report: FoldReport) -> None:
    """Replaces residual branches that are the same for every input."""
    graph = UnitGraph(net)
    for node in graph.graph.nodes:
        if getattr(node.target, "__name__", node.target) not in _ADDITIONS or len(node.all_input_nodes) != 2:
            continue
        for end, other in (node.all_input_nodes, reversed(node.all_input_nodes)):
            chain = _branch(graph, end, other)
            axis = graph.nodes.get(end)
            if chain and axis is not None and not axis.constant.isnan().any() and not axis.spread:
                _replace_branch(net, graph, chain, axis, optimizers)
                report.vanished.append(end.target)
                break


def _branch(graph: UnitGraph, end: fx.Node, fork: fx.Node) -> list[fx.Node]:
    """The modules from ``fork`` to ``end``, if they are a plain chain that nothing else reads; the last one first."""
    chain, node = [], end
    while node is not fork:
        plain = node.op == "call_module" and len(node.all_input_nodes) == 1 and len(node.users) == 1
        if not plain or graph.modules[node.target] in graph.whole:
            return []
        chain.append(node)
        node = node.all_input_nodes[0]
    return [] if chain and isinstance(graph.modules[chain[0].target], ConstantBranch) else chain


def _replace_branch(net: nn.Module, graph: UnitGraph, chain: list[fx.Node], axis: Axis, optimizers: Optimizers) -> None:
    """The last module becomes the constant, its bias Parameter going on if it has one; the others the identity."""
    modules = [graph.modules[n.target] for n in chain]
    bias = None
    if bool((axis.constant != 0).any()):
        bias = getattr(modules[0], "bias", None)
        if bias is None:
            bias = nn.Parameter(torch.empty_like(axis.constant), requires_grad=False)
        replace_parameter(bias, axis.constant.to(next(net.parameters())))
    for module in modules[1:]:
        _swap(net, module, nn.Identity())
    _swap(net, modules[0], ConstantBranch(bias, -1 - axis.dim))
    _forget(optimizers, [p for m in modules for p in m.parameters() if p is not bias])


# --- putting in place -----------------------------------------------------------------------------------------------


def _put(net: nn.Module, pair: _Pair, product: FoldedWeight, optimizers: Optimizers) -> None:
    """The second layer takes the product; the first and what stood between become the identity."""
    first, second = net.get_submodule(pair.first), net.get_submodule(pair.second)
    between = [net.get_submodule(name) for name in pair.between]
    gone = [p for m in (first, *between) for p in m.parameters()]
    merged = product.install(first, second)
    keep = {id(p) for p in merged.parameters()}
    if merged is not second:
        _swap(net, second, merged)
    for module in (first, *between):
        _swap(net, module, nn.Identity())
    _forget(optimizers, [p for p in gone if id(p) not in keep])
    for optimizer in optimizers:
        for parameter in product.fresh:
            optimizer.state.pop(parameter, None)


def _swap(net: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in net.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def _forget(optimizers: Optimizers, parameters: list[nn.Parameter]) -> None:
    """Takes parameters that no longer exist out of the optimizers."""
    gone = {id(p) for p in parameters}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
