"""The layers of a model that grows, and whether somebody else has changed them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from sparsenet.architecture.growth.account import Account
from sparsenet.compaction.graph import UnitGraph
from sparsenet.compaction.weights import unit_weights
from sparsenet.layers import SparseLinear

__all__ = ["Structure"]


class Structure:
    """Layers by name, as they were when last looked at, and ``latest``, a graph of that time.

    Args:
        opaque: names of modules to leave whole.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.structure import Structure
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> structure = Structure(net)
        >>> net[1] = torch.nn.Linear(8, 3)
        >>> structure.changed(), structure.rows()
        ('units', {'0': 8, '1': 2})
    """

    def __init__(self, net: nn.Module, opaque: Iterable[str] = ()):
        self.net, self.opaque = net, tuple(opaque)
        self.know(self.graph())

    def graph(self) -> UnitGraph:
        """Of the model as it is now."""
        return UnitGraph(self.net, self.opaque, zeros=False)

    def know(self, graph: UnitGraph) -> None:
        """Takes the model as it is for what is known. ``graph``: of it."""
        self.layers = _layers_of(self.net)
        self.latest, self.sizes, self._known = graph, Account.sizes(graph), _shapes(self.layers)

    def changed(self, thoroughly: bool = True) -> str:
        """What others have changed since: ``units``, ``blocks`` or nothing; ``thoroughly``: new modules as well."""
        if not thoroughly and _shapes(self.layers) == self._known:
            return ""
        layers = _layers_of(self.net)
        now, same = _shapes(layers), all(layers.get(name) is module for name, module in self.layers.items())
        if now == self._known and same:
            return ""
        sizes, before = ({name: shape for name, (shape, _) in found.items()} for found in (now, self._known))
        return "blocks" if sizes == before and same else "units"

    def sparse(self) -> dict[str, SparseLinear]:
        """Block-sparse layers that are trained."""
        return {n: m for n, m in self.layers.items() if isinstance(m, SparseLinear) and m.values.requires_grad}

    def rows(self) -> dict[str, int]:
        """Outputs of every layer."""
        return {name: unit_weights(module).rows for name, module in self.layers.items()}


def _layers_of(net: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in net.named_modules() if unit_weights(module) is not None}


def _shapes(layers: Mapping[str, nn.Module]) -> dict[str, tuple]:
    """By layer: the shape of its weight as a matrix or kernel, and the pattern of its blocks."""
    sparse = {name: m.pattern for name, m in layers.items() if isinstance(m, SparseLinear)}
    return {
        name: (sparse[name].shape, sparse[name]) if name in sparse else (tuple(m.weight.shape), None)
        for name, m in layers.items()
    }
