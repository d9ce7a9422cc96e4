"""Deepening: a new layer that computes the identity when it is born, anywhere in a network that trains.

``identity`` (Net2DeeperNet; Chen et al., "Net2Net", 2016): the weight is the identity, with a ReLU where values are
not negative, so that it changes nothing yet. ``residual``: ``x + W relu(x)`` with W zero; W has a gradient at once, as
the last layers of residual branches that start at zero (ReZero; Bachlechner et al., 2021).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import skip_init
from torch.optim import Optimizer

from sparsenet import distributed, functional
from sparsenet.architecture.growth.born_state import group_of, twin_of
from sparsenet.architecture.growth.inserting import Place, ResidualLayer, placed
from sparsenet.architecture.growth.placing import GrowthError, said_by
from sparsenet.compaction.compacting import commit, copies_of, plain_model
from sparsenet.compaction.graph import Stage, UnitGraph
from sparsenet.compaction.moves import StageMoves
from sparsenet.compaction.rules import Axis
from sparsenet.densities import choose_block_size
from sparsenet.layers import SparseLinear, refuse_unfit_state
from sparsenet.optimizer_state import as_optimizers, with_inner_optimizers
from sparsenet.pattern import BlockPattern
from sparsenet.policies.places import layer_key
from sparsenet.schedules import as_integer, as_number

__all__ = ["KINDS", "DeepenReport", "deepen"]

KINDS = ("identity", "residual")
_CONVOLUTIONS = {-2: nn.Conv1d, -3: nn.Conv2d, -4: nn.Conv3d}


@dataclass(frozen=True)
class DeepenReport:
    """What :func:`~sparsenet.architecture.growth.deepen` inserted.

    Attributes:
        name: of the new module. layer: of the layer with weights in it. neighbour: of the one that feeds it.
        parameters: how many weights and biases were added.
        insertion: plain values for a file: ``deepen(model, **insertion)`` inserts the same again.
        width: outputs of the new layer.
    """

    name: str
    layer: str
    neighbour: str
    parameters: int
    insertion: dict
    width: int

    @property
    def newborn(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer with new weights: (new rows, new columns), int64."""
        return {self.layer: (torch.arange(self.width), torch.zeros(0, dtype=torch.int64))}

    @property
    def incumbents(self) -> tuple[str, ...]:
        """The layer that its gradient is compared with."""
        return (self.neighbour,)


def deepen(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    after: str = "",
    *,
    kind: str = "identity",
    density: float | None = None,
    block_size: int | None = None,
    sparsifier=None,
    copies: Iterable[nn.Module] = (),
    seed: int = 0,
) -> DeepenReport:
    """Inserts a layer behind a module of ``model``, in place, without changing what the model computes.

    Args:
        model: any module whose forward ``torch.fx`` can trace.
        optimizer: its groups that hold the weight and bias of the layer in front get the new ones.
        after: name of a linear layer or convolution, or of a module behind one (an activation, a norm).
        kind: ``identity``: behind a ReLU, or a layer that a ReLU or no activation follows; or ``residual``: anywhere.
        density: the new layer is block-sparse, so dense; default as the layer in front of it is, or dense.
        block_size: of a block-sparse layer; default that of the layer in front, or chosen by the density.
        sparsifier, copies: as for :func:`~sparsenet.architecture.growth.widen`. seed: of the places of blocks.

    A convolution is followed by one of the same kernel size. In an ``nn.Sequential`` or :class:`~sparsenet.SparseMLP`
    the new module stands behind the old one, under a name of its own: all other names stay, while positions shift.
    Anywhere else both stand in an ``nn.Sequential`` in place of the old one, which so becomes ``<name>.0``.

    Returns:
        Its name and size, and ``insertion``, by which the structure is built again before a checkpoint is loaded: make
        model and optimizer as they were made at first, repeat the insertions with both, then
        :func:`sparsenet.resize_to` where widths have changed as well, and :func:`sparsenet.load`.

    Raises:
        GrowthError: no such module, one that is called several times or whose outputs are not followed, an identity
            behind another activation than ReLU, an optimizer without the layer in front; nothing was changed.

    Compact with ``zeros=False`` while a residual layer's weights are zero: else it counts as dead.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth import deepen
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(5, 4)
        >>> before = model(x)
        >>> report = deepen(model, torch.optim.Adam(model.parameters()), after="1")
        >>> report.name, list(dict(model.named_children())), torch.equal(model(x), before)
        ('1_1', ['0', '1', '1_1', '2'], True)
    """
    if kind not in KINDS:
        raise GrowthError(f"deepen: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    seed = as_integer("deepen", "seed", seed)
    if density is not None:
        density = as_number("deepen", "density", density, within=(0, 1))
    with said_by("deepen"), torch.no_grad():
        net = plain_model(model)
        optimizers = with_inner_optimizers((*as_optimizers(optimizer), *getattr(sparsifier, "optimizers", ())))
        graph = UnitGraph(net, zeros=False)
        node, axis = _found(graph, after)
        neighbour = _neighbour(graph, node)
        new, layer = _born(graph, node, axis, neighbour, kind, density, block_size, seed)
        new.train(graph.modules[after].training)
        place = placed(net, graph, node, new)
        moves = StageMoves([(place.put, place.back)])
        for twin in copies_of(net, copies, sparsifier):
            if after not in dict(twin.named_modules()):
                raise GrowthError(f"deepen: every copy must have the model's modules, one has no {after!r}")
            there = Place(twin, after, copy.deepcopy(new), place.beside)
            moves.puts.append((there.put, there.back))
        moves.puts += _held(optimizers, graph, neighbour, new, place.name)
        commit([moves])
    had_blocks = any(isinstance(module, SparseLinear) for module in graph.modules.values())
    if isinstance(layer, SparseLinear):
        layer.topology.label = f"block_sparse_linear ({place.name_of(layer)})"
        if not had_blocks:
            net.register_load_state_dict_pre_hook(refuse_unfit_state)
    if isinstance(model, distributed.DataParallel):
        distributed.rebuild(model)
    if sparsifier is not None:
        sparsifier.refresh()
    sparse = isinstance(layer, SparseLinear)
    return DeepenReport(
        name=place.name,
        layer=place.name_of(layer),
        neighbour=neighbour.name if neighbour.name != after or place.beside else f"{after}.0",
        parameters=sum(p.numel() for p in new.parameters()),
        insertion={
            "after": after,
            "kind": kind,
            "density": layer.density if sparse else None,
            "block_size": layer.block_size if sparse else None,
            "seed": seed,
        },
        width=len(axis.units),
    )


# --- where ----------------------------------------------------------------------------------------------------------


def _found(graph: UnitGraph, after: str) -> tuple[fx.Node, Axis]:
    """The call of the module, and the units that come out of it."""
    nodes = [node for node in graph.graph.nodes if node.op == "call_module" and node.target == after]
    if after not in graph.modules or not after:
        raise GrowthError(f"deepen: after must name a module of the model, got {after!r}")
    if len(nodes) != 1:
        told = f"one that is called {len(nodes)} times" if nodes else "a part that is not called as a whole"
        raise GrowthError(f"deepen: after must name a layer or activation that is called once, got {after!r}, {told}")
    axis = graph.nodes.get(nodes[0])
    if axis is None or axis.spread or axis.dim not in (-1, *_CONVOLUTIONS):
        why = graph.lost.get(nodes[0], "") or "what it returns has no units that are followed"
        raise GrowthError(f"deepen: after must name a module with units, got {after!r}: {why}")
    module = graph.modules[after]
    if sum(child is module for parent in graph.modules.values() for child in parent._modules.values()) != 1:
        raise GrowthError(f"deepen: after must name a module that stands in one place, got {after!r}")
    return nodes[0], axis


def _neighbour(graph: UnitGraph, node: fx.Node) -> Stage:
    """The nearest layer with weights that the node comes from."""
    stages = {stage.name: stage for stage in graph.stages if stage.weights is not None}
    waiting = [node]
    while waiting:
        here = waiting.pop(0)
        if here.op == "call_module" and here.target in stages:
            return stages[here.target]
        waiting += here.all_input_nodes
    raise GrowthError(f"deepen: after must stand behind a linear layer or convolution, got {node.target!r}")


# --- what -----------------------------------------------------------------------------------------------------------


def _born(
    graph: UnitGraph, node: fx.Node, axis: Axis, neighbour: Stage, kind: str, density, block_size, seed: int
) -> tuple[nn.Module, nn.Module]:
    """The new module, and the layer in it."""
    module = graph.modules[node.target]
    order = _order(graph, node, module) if kind == "identity" else ""
    sparse = density is not None or (axis.dim == -1 and isinstance(neighbour.module, SparseLinear))
    if sparse and axis.dim != -1:
        raise GrowthError(f"deepen: density must be None behind a convolution, got {density}")
    if block_size is not None and not sparse:
        raise GrowthError(f"deepen: block_size must be None for a dense layer, got {block_size}")
    bias = neighbour.module.bias is not None
    if sparse:
        fused = "relu" if order == "layer, relu" else "none"
        layer = _sparse(neighbour.module, len(axis.units), density, block_size, bias, kind, fused, seed, node.target)
        order = "" if fused == "relu" else order
    else:
        layer = _dense(neighbour.module, len(axis.units), axis.dim, bias, kind)
    if kind == "residual":
        return ResidualLayer(layer, nn.ReLU()), layer
    pieces = {"relu, layer": (nn.ReLU(), layer), "layer, relu": (layer, nn.ReLU())}.get(order)
    return (nn.Sequential(*pieces) if pieces else layer), layer


def _order(graph: UnitGraph, node: fx.Node, module: nn.Module) -> str:
    """Where the ReLU of an identity layer goes; empty: it has none."""
    fused = getattr(module, "activation", "none")
    if isinstance(module, nn.ReLU | nn.ReLU6) or fused == "relu":
        return "layer, relu"
    if any(stage.name == node.target and stage.weights is not None for stage in graph.stages) and fused == "none":
        followed = [
            isinstance(graph.modules.get(user.target), nn.ReLU) if user.op == "call_module" else _is_relu(user)
            for user in node.users
        ]
        return "relu, layer" if followed and all(followed) else ""
    raise GrowthError(
        f"deepen: kind must be residual behind {node.target!r} ({type(module).__name__}), where an identity layer with "
        "a ReLU would change the function, got 'identity'"
    )


def _is_relu(node: fx.Node) -> bool:
    return node.target in (F.relu, torch.relu, "relu", "relu_")


def _dense(neighbour: nn.Module, n: int, dim: int, bias: bool, kind: str) -> nn.Module:
    """A linear layer or convolution of zeros, or the identity."""
    like = neighbour.values if isinstance(neighbour, SparseLinear) else neighbour.weight
    factory = {"bias": bias, "device": like.device, "dtype": like.dtype}
    if dim == -1:
        layer = skip_init(nn.Linear, n, n, **factory)
    else:
        given = getattr(neighbour, "kernel_size", ())
        sizes = tuple(k if k % 2 else 1 for k in given) if len(given) == -1 - dim else (1,) * (-1 - dim)
        layer = skip_init(_CONVOLUTIONS[dim], n, n, sizes, padding=tuple(k // 2 for k in sizes), **factory)
    layer.weight.zero_()
    if kind == "identity":
        nn.init.eye_(layer.weight) if dim == -1 else nn.init.dirac_(layer.weight)
    if bias:
        layer.bias.zero_()
    return layer


def _sparse(
    neighbour: nn.Module, n: int, density, block_size, bias: bool, kind: str, fused: str, seed: int, name: str
) -> SparseLinear:
    """A block-sparse layer of zeros, or the identity: its diagonal blocks, and others of zeros up to the density."""
    known = isinstance(neighbour, SparseLinear)
    density = neighbour.density if density is None else density
    if block_size is None:
        block_size = neighbour.block_size if known else choose_block_size(n, density)
    lines = -(-n // block_size)
    key, places = layer_key(seed, 8, name), lines * lines
    count = max(lines, round(density * places))
    diagonal = torch.arange(lines) * (lines + 1)
    drawn = functional.draw_free_places(diagonal, places, count - len(diagonal), key)
    pattern = BlockPattern.from_linear_places(torch.cat([diagonal, drawn]), (n, n), block_size)
    like = neighbour.values if known else neighbour.weight
    layer = SparseLinear(
        n, n, bias, pattern=pattern, activation=fused, device=like.device, dtype=like.dtype,
        generator=torch.Generator().manual_seed(key),
    )  # fmt: skip
    layer.values.zero_()
    if kind == "identity":
        eye = torch.eye(block_size, dtype=like.dtype, device=like.device)
        layer.values[layer.pattern.row_indices.long() == layer.pattern.col.long()] = eye
        functional.blocks.zero_outside(layer.values, layer.pattern)
    if bias:
        layer.bias.zero_()
    return layer


# --- who trains it --------------------------------------------------------------------------------------------------


def _held(
    optimizers: Sequence[Optimizer], graph: UnitGraph, neighbour: Stage, new: nn.Module, name: str
) -> list[tuple[Callable, Callable]]:
    """What puts the new parameters into the groups of the neighbour's, and back."""
    if not optimizers:
        return []
    module = neighbour.module
    weight = module.values if isinstance(module, SparseLinear) else module.weight
    moves = []
    for inner, parameter in new.named_parameters():
        near = module.bias if inner.rpartition(".")[2] == "bias" and module.bias is not None else weight
        groups = [(o, group) for o in optimizers if (group := group_of(o, near)) is not None]
        if not groups:
            raise GrowthError(f"deepen: optimizer must hold the parameters of {neighbour.name!r}, got none that does")
        for optimizer, group in groups:
            join = partial(_join, optimizer, group, parameter, f"{name}.{inner}")
            moves.append((join, partial(_leave, optimizer, group, parameter)))
    return moves


def _join(optimizer: Optimizer, group: dict, parameter: nn.Parameter, name: str) -> None:
    if any(p is parameter for p in group["params"]):  # groups that two optimizers share
        return
    twin = twin_of(optimizer, group, [parameter])
    first = {} if twin is None else twin.state.get(parameter, {})
    group["params"].append(parameter)
    if isinstance(group.get("param_names"), list):
        group["param_names"].append(name)
    if first:  # what an optimizer prepares before its first step
        optimizer.state[parameter] = first


def _leave(optimizer: Optimizer, group: dict, parameter: nn.Parameter) -> None:
    at = next((i for i, p in enumerate(group["params"]) if p is parameter), None)
    if at is not None:
        del group["params"][at]
        if isinstance(group.get("param_names"), list):
            del group["param_names"][at]
        optimizer.state.pop(parameter, None)
