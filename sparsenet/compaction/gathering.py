"""Gathering: hidden units change places so that important weights stand in few blocks.

Cutting a matrix to its heaviest blocks loses less when weights that matter stand together. The order of hidden units is
free: a network computes the same in any order, if the rows that make a unit, the columns that read it and all that goes
with them move alike. :func:`gather_units` looks for an order in which the blocks that will be kept hold more.

Nothing changes before all orders are found and all optimizer state is known to be able to follow; then the units of one
hidden layer move at a time, each move complete in itself.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsenet import distributed
from sparsenet.compaction.compacting import as_optimizers, commit, copies_of, plain_model
from sparsenet.compaction.cuts import IMPORTANCES, Cut
from sparsenet.compaction.gathered_orders import CutLayer, FamilyOrder, GatherSearch, find_families
from sparsenet.compaction.graph import CompactionError, UnitGraph
from sparsenet.compaction.moves import check_stage, prepare_stage
from sparsenet.densities import distribute
from sparsenet.functional.checks import check_block_size
from sparsenet.layers import SparseLinear
from sparsenet.pattern import BlockPattern
from sparsenet.schedules import as_integer, as_number

__all__ = ["GatherReport", "GatheredLayer", "gather_units"]

logger = logging.getLogger(__name__)

Importance = str | Callable[[nn.Module], Tensor]


@dataclass(frozen=True)
class GatheredLayer:
    """What gathering did for one layer that is to be cut.

    Attributes:
        blocks: how many it is to keep. in_a_row: blocks that a row of blocks keeps on average.
        before, after: share of the layer's importance that the kept blocks hold, in the order that units had and have.
        moved: outputs that changed places.
        stays: why its outputs could not change places; empty where they could.
    """

    blocks: int
    in_a_row: float
    before: float
    after: float
    moved: int
    stays: str


@dataclass(frozen=True)
class GatherReport:
    """What one :func:`gather_units` did.

    Attributes:
        layers: by the name of each layer that is to be cut.
        patterns: by the same name, the blocks to keep in the new order: the most important ones.
        before, after: share of all layers' importance that the kept blocks hold.
        seconds: it took.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 16))
        >>> report = sn.gather_units(model, density=0.25, block_size=8)
        >>> report.layers["0"].blocks, report.layers["0"].in_a_row, report.moved > 0
        (4, 0.5, True)
    """

    layers: dict[str, GatheredLayer]
    patterns: dict[str, BlockPattern] = field(repr=False)
    before: float
    after: float
    seconds: float

    @property
    def moved(self) -> int:
        """Units that changed places."""
        return sum(layer.moved for layer in self.layers.values())

    def __str__(self) -> str:
        lines = [f"{'layer':<24}{'blocks':>8}{'in a row':>10}{'kept before':>13}{'after':>8}  units"]
        for name, layer in self.layers.items():
            units = f"stay: {layer.stays}" if layer.stays else f"{layer.moved} moved"
            shares = f"{layer.before:>13.2%}{layer.after:>8.2%}"
            lines.append(f"{name:<24}{layer.blocks:>8}{layer.in_a_row:>10.2f}{shares}  {units}")
        lines.append(f"{'all':<42}{self.before:>13.2%}{self.after:>8.2%}")
        return "\n".join(lines)


def gather_units(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    *,
    density: float,
    block_size: int,
    distribution: str = "uniform",
    filter_fn: Callable[[str, nn.Module], bool] | None = None,
    importance: Importance = "magnitude",
    copies: Iterable[nn.Module] = (),
    sparsifier=None,
    opaque: Iterable[str] = (),
    sweeps: int = 6,
) -> GatherReport:
    """Reorders hidden units in place so that the blocks which a cut to ``density`` keeps hold as much as can be.

    The model computes what it did, up to the order of summation. Call it before :func:`sparsenet.sparsify_` or
    :func:`sparsenet.reblock_`, with the same density, block size and distribution: those then keep what was gathered.

    Args:
        model: any module whose forward ``torch.fx`` can trace. Parameters stay the same objects.
        optimizer: whose state goes along (one or several); ``.grad`` does as well.
        density, block_size, distribution: of the cut, as for ``sparsify_``; block_size 4, 8, 16, 32, 64 or 128.
        filter_fn: ``filter_fn(name, layer)`` says which layers will be cut; default every ``nn.Linear`` and every
            SparseLinear of single weights or with an element mask. The others move along and count nothing.
        importance: what kept blocks are to hold: ``magnitude``, the squared weights; ``taylor``, the squared products
            of weight and gradient (Molchanov et al., 2019); or a function of a layer that returns [out, in].
        copies: models of the same structure (an EMA, a best-so-far) whose units move alike.
        sparsifier: the :class:`~sparsenet.Sparsifier` of this model; its ``followers`` are copies.
        opaque: names of modules to leave whole; the units they read stay.
        sweeps: over all hidden layers, at most; it ends when one gains less than a thousandth. 0 moves nothing and
            tells what would be kept.

    Returns:
        What the kept blocks hold before and after, which units moved, and why others stay.

    Raises:
        CompactionError: the model cannot be traced, an optimizer's state is not understood, a copy does not fit.
        ValueError, TypeError: an argument out of range, importance that is not finite or not [out, in], gradients
            that ``taylor`` needs and that are not there. Nothing was changed.

    In an MLP and in a transformer's feed-forward part all hidden units are free. Units stay where something depends on
    their order: inputs and outputs of the model, a residual stream under a LayerNorm, attention heads, whole blocks of
    a SparseLinear that moving would break up, N:M groups. In a SparseLinear every active element stays active, and no
    other becomes so: the pattern is made anew from where they land.

    The search is coordinate ascent (TETRIS: Ji et al., 2018, has the idea): keep the heaviest blocks of the present
    order, let units change places between blocks given those, and repeat, layer after layer. It never ends below where
    it began. See docs/methods/permutation.md for what it is worth.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> report = sn.gather_units(model, density=0.1, block_size=16)
        >>> report.after > report.before, report.layers["2"].stays
        (True, 'the model returns it')
        >>> _ = sn.sparsify_(model, density=0.1, block_size=16)
        >>> model[0].pattern == report.patterns["0"]
        True
    """
    started = time.perf_counter()
    net, optimizers = _checked(model, optimizer, block_size, sweeps)
    density = as_number("gather_units", "density", density, within=(0, 1))
    with _in_own_name():
        graph = UnitGraph(net, tuple(opaque), zeros=False)
        cuts = _cuts(graph, density, block_size, distribution, filter_fn, importance)
        families, stays = find_families(graph, cuts, optimizers)
        search = GatherSearch(cuts, families)
        before = search.held()
        search.run(sweeps)
        moves = [FamilyOrder(graph, family, order) for family, order in search.changed()]
        twins = copies_of(net, copies, sparsifier)
        for move in moves:
            for stage in move.stages:
                check_stage(stage, net, optimizers)
                for twin in twins:
                    check_stage(stage, twin, ())
        distributed.assert_same("the order that gather_units found", _digest(move.positions for move in moves))
        after = search.held()
        _apply(moves, graph, net, twins, optimizers)
    if moves and isinstance(model, distributed.DataParallel):
        distributed.rebuild(model)
    if moves and sparsifier is not None:
        sparsifier.refresh()
    report = _report(cuts, stays, search, before, after, time.perf_counter() - started)
    logger.info("gather_units: %d units moved\n%s", report.moved, report)
    return report


@contextmanager
def _in_own_name() -> Iterator[None]:
    """What the graph and the moves of compaction refuse is said by this function."""
    try:
        yield
    except CompactionError as error:
        raise CompactionError(str(error).replace("compact: ", "gather_units: ", 1)) from error


def _checked(model, optimizer, block_size, sweeps) -> tuple[nn.Module, tuple[torch.optim.Optimizer, ...]]:
    """The model inside wrappers and the optimizers, all arguments being in range."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"gather_units: model must be a torch.nn.Module, got {type(model).__name__}")
    if check_block_size("gather_units", block_size) == 1:
        raise ValueError("gather_units: block_size must be 4 or more, got 1: single weights have no order to gather in")
    as_integer("gather_units", "sweeps", sweeps, at_least=0)
    optimizers = as_optimizers(optimizer)
    for one in optimizers:
        if not isinstance(one, torch.optim.Optimizer):
            raise TypeError(f"gather_units: optimizer must be a torch.optim.Optimizer, got {type(one).__name__}")
    with _in_own_name():
        return plain_model(model), optimizers


# --- what will be cut -------------------------------------------------------------------------------------------------


def _cuts(
    graph: UnitGraph, density: float, block_size: int, distribution: str, filter_fn, importance
) -> list[CutLayer]:
    """The layers that are to be cut, with their blocks spread as ``sparsify_`` spreads them."""
    chosen = {
        name: module
        for name, module in graph.modules.items()
        if _is_finer(module) and (filter_fn is None or filter_fn(name, module))
    }
    shapes = [(module.out_features, module.in_features) for module in chosen.values()]
    counts = distribute(shapes, density, distribution, block_size=block_size)
    stages = {stage.name: stage for stage in graph.stages}
    return [
        CutLayer(name, Cut(module, block_size, count, _importance(name, module, importance)), stages.get(name))
        for (name, module), count in zip(chosen.items(), counts, strict=True)
    ]


def _is_finer(module: nn.Module) -> bool:
    """Whether units can move weights of this layer from block to block."""
    if type(module) is SparseLinear:
        fine = module.block_size == 1 or module.element_mask is not None
        return fine and "values" in module._parameters
    return type(module) is nn.Linear and "weight" in module._parameters


def _importance(name: str, module: nn.Module, importance: Importance) -> str | Tensor:
    """Checked: a name, or what the function gives for this layer."""
    weight = module.values if isinstance(module, SparseLinear) else module.weight
    if weight.is_meta:
        raise ValueError(f"gather_units: {name!r} must hold data, got a meta tensor; load it first")
    shape = [module.out_features, module.in_features]
    if callable(importance):
        found = importance(module)
        if not isinstance(found, Tensor) or found.is_complex() or list(found.shape) != shape:
            got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"gather_units: importance of {name!r} must be real numbers {shape}, got {got}")
        found = found.detach().cpu()
        found = found if found.is_floating_point() else found.float()
        if not bool(found.isfinite().all()) or bool((found < 0).any()):
            least = float(found.min())
            raise ValueError(f"gather_units: importance of {name!r} must be finite and not negative, got {least}")
        return found.double() if found.dtype == torch.float64 else found.float()
    if importance not in IMPORTANCES:
        names = ", ".join(IMPORTANCES)
        raise ValueError(f"gather_units: importance must be {names} or a function of a layer, got {importance!r}")
    if importance == "taylor" and weight.grad is None:
        raise ValueError(f"gather_units: taylor must have a gradient of every layer, got none of {name!r}")
    for t in (weight.detach(), *((weight.grad,) if importance == "taylor" else ())):
        if not bool(t.isfinite().all()):
            raise ValueError(f"gather_units: weights must be finite, got NaN or infinity in {name!r}")
    return importance


# --- doing it -------------------------------------------------------------------------------------------------------


def _apply(moves: Sequence[FamilyOrder], graph, net: nn.Module, twins: Sequence[nn.Module], optimizers) -> None:
    """Moves one family after the other, each complete in itself; moves all of them back if one fails."""
    done: list[FamilyOrder] = []
    try:
        for move in moves:
            _move(move, graph, net, twins, optimizers)
            done.append(move)
    except BaseException:
        for move in reversed(done):
            _move(move.inverse(), graph, net, twins, optimizers)
        raise


def _move(move: FamilyOrder, graph, net: nn.Module, twins: Sequence[nn.Module], optimizers) -> None:
    prepared = [prepare_stage(graph, stage, move, net, optimizers, "masked") for stage in move.stages]
    prepared += [prepare_stage(graph, stage, move, twin, (), "masked") for twin in twins for stage in move.stages]
    commit(prepared)


def _digest(orders: Iterable[Tensor]) -> int:
    digest = hashlib.sha256()
    for order in orders:
        digest.update(order.numpy().tobytes())
    return int(digest.hexdigest()[:15], 16)


def _report(cuts: Sequence[CutLayer], stays, search: GatherSearch, before, after, seconds: float) -> GatherReport:
    layers = {}
    for layer in cuts:
        name, cut = layer.name, layer.cut
        total = before[name].total or 1.0
        layers[name] = GatheredLayer(
            blocks=cut.count,
            in_a_row=cut.count / max(-(-cut.shape[0] // cut.block_size), 1),
            before=before[name].kept / total,
            after=after[name].kept / total,
            moved=search.moved(name),
            stays=stays.get(name, ""),
        )
    total = sum(held.total for held in before.values()) or 1.0
    shares = (sum(held.kept for held in side.values()) / total for side in (before, after))
    return GatherReport(layers, {name: held.pattern for name, held in after.items()}, *shares, seconds)
