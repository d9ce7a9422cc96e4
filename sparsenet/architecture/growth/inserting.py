"""Where a new module goes in a model, and whether the model then runs it where it should."""

from __future__ import annotations

from torch import Tensor, fx, nn

from sparsenet.architecture.growth.placing import GrowthError
from sparsenet.compaction.graph import UnitGraph, trace
from sparsenet.models import SparseMLP

__all__ = ["Place", "ResidualLayer", "placed"]


class ResidualLayer(nn.Module):
    """``x + layer(activation(x))``: with a layer of zeros, the identity.

    Args:
        layer: as wide as its input. activation: in front of it.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth import ResidualLayer
        >>> residual = ResidualLayer(torch.nn.Linear(4, 4), torch.nn.ReLU())
        >>> residual(torch.randn(3, 4)).shape
        torch.Size([3, 4])
    """

    def __init__(self, layer: nn.Module, activation: nn.Module):
        super().__init__()
        self.activation, self.layer = activation, layer

    def forward(self, x: Tensor) -> Tensor:
        """[..., n, ...] -> the same."""
        return x + self.layer(self.activation(x))

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self.layer.out_features


class Place:
    """Where a new module goes, and how it is taken back."""

    def __init__(self, net: nn.Module, after: str, new: nn.Module, beside: bool):
        path, _, self.key = after.rpartition(".")
        self.parent, self.new, self.beside = net.get_submodule(path), new, beside
        self.before = dict(self.parent._modules)
        prefix = f"{path}." if path else ""
        if beside:
            number = next(n for n in range(1, len(self.before) + 2) if f"{self.key}_{n}" not in self.before)
            self.name = f"{prefix}{self.key}_{number}"
        else:
            self.name = f"{after}.1"

    def put(self) -> None:
        """Puts it there."""
        modules = self.parent._modules
        if not self.beside:
            old = self.before[self.key]
            modules[self.key] = nn.Sequential(old, self.new).train(old.training)
            return
        modules.clear()
        for key, module in self.before.items():
            modules[key] = module
            if key == self.key:
                modules[self.name.rpartition(".")[2]] = self.new

    def back(self) -> None:
        """Takes it back."""
        self.parent._modules.clear()
        self.parent._modules.update(self.before)

    def name_of(self, part: nn.Module) -> str:
        """Of a part of the new module."""
        inside = next(name for name, module in self.new.named_modules() if module is part)
        return f"{self.name}.{inside}" if inside else self.name


def placed(net: nn.Module, graph: UnitGraph, node: fx.Node, new: nn.Module) -> Place:
    """Beside the old module where its parent runs its children in turn, else around both; tried, and taken back."""
    kind = type(net.get_submodule(node.target.rpartition(".")[0]))
    for beside in (True, False) if kind in (nn.Sequential, SparseMLP) else (False,):
        place = Place(net, node.target, new, beside)
        place.put()
        try:
            if _runs_between(trace(net), graph, node, place):
                return place
        finally:
            place.back()
    raise GrowthError(f"deepen: after must name a module that its parent only calls, got {node.target!r}")


def _runs_between(after: fx.Graph, graph: UnitGraph, node: fx.Node, place: Place) -> bool:
    """Whether the new module reads what the old one returns, and everybody else reads the new one instead."""
    old = node.target if place.beside else f"{node.target}.0"
    called = [n for n in after.nodes if n.op == "call_module"]
    inside = [n for n in called if n.target == place.name or n.target.startswith(f"{place.name}.")]
    source = [n for n in called if n.target == old]
    others = [node.target if n.target == old else n.target for n in called if n not in inside]
    if len(source) != 1 or not inside or others != [n.target for n in graph.graph.nodes if n.op == "call_module"]:
        return False
    residual = isinstance(place.new, ResidualLayer)
    result = next(iter(inside[-1].users), None) if residual else inside[-1]
    if result is None or inside[0].all_input_nodes != [source[0]]:
        return False
    readers = {inside[0], result} if residual else {inside[0]}
    same = [u.target for u in result.users] == [u.target for u in node.users]
    return set(source[0].users) == readers and same
