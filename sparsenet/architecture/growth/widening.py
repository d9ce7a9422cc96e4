"""Widening: new units in a network that trains, in every layer that makes or reads them, with optimizer state.

The reverse of compaction, in the same steps: nothing changes before all new tensors are made, and what was put in place
is taken back if anything fails. Parameters stay the same objects; what an optimizer keeps for old weights stays bit for
bit.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsenet import distributed
from sparsenet.architecture.growth.born_state import BornState
from sparsenet.architecture.growth.moves import GrowthMoves
from sparsenet.architecture.growth.newborn import HOW, Operands, born, directions
from sparsenet.architecture.growth.placing import (
    Birth,
    GrowthError,
    readers_of,
    reason_against,
    said_by,
    stages_with_units,
    traced,
    why_unknown,
)
from sparsenet.architecture.growth.weights import Brood
from sparsenet.compaction.compacting import carry_out, copies_of, plain_model
from sparsenet.compaction.graph import UnitGraph
from sparsenet.optimizer_state import as_optimizers, with_inner_optimizers
from sparsenet.schedules import as_integer, as_number

__all__ = ["WidenReport", "widen"]


@dataclass(frozen=True)
class WidenReport:
    """What :func:`widen` added.

    Attributes:
        new: by layer that makes new units: int64, their positions along its outputs. Layers whose outputs are added to
            those of a widened layer are among them.
        columns: by layer that reads them: int64, their positions along its inputs.
        how: by widened layer: how its units were born, and why not as asked.
        parameters, bytes, blocks: before and after; bytes count gradients, buffers, indices and optimizer state.
        seconds: it took.
    """

    new: dict[str, Tensor]
    columns: dict[str, Tensor]
    how: dict[str, str]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    blocks: tuple[int, int]
    seconds: float

    @property
    def newborn(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer with new weights: (new rows, new columns), int64."""
        none = torch.zeros(0, dtype=torch.int64)
        return {n: (self.new.get(n, none), self.columns.get(n, none)) for n in {**self.new, **self.columns}}

    @property
    def incumbents(self) -> tuple[str, ...]:
        """Layers without new weights that these are compared with: none, they have old ones beside them."""
        return ()


def widen(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    units: Mapping[str, int] | None = None,
    *,
    how: str = "pairs",
    operands: Operands | None = None,
    state: str | float = "scaled",
    density: float = 1.0,
    sparsifier=None,
    copies: Iterable[nn.Module] = (),
    opaque: Iterable[str] = (),
    graph: UnitGraph | None = None,
    seed: int = 0,
) -> WidenReport:
    """Adds units to layers of ``model``, in place, without changing what it computes, in train and eval mode.

    Args:
        model: any module whose forward ``torch.fx`` can trace: linear layers, convolutions and block-sparse layers with
            what stands between them (BatchNorm, gates, PReLU, flattening, concatenation, sums).
        optimizer: whose state grows along (one or several); those of ``sparsifier`` as well.
        units: layer name -> how many. New units stand behind the layer's last one. Where layers are added to each
            other, all of them grow: name one.
        how: how they are born. Random weights have the mean norm of those that the layer has; biases are zero.

            * ``pairs``: disturbed mixtures of the weights of old units, two by two the same and heard with opposite
              signs: they cancel, and all of their weights have a gradient at once. An odd one is heard with zeros.
            * ``zero``: random incoming, zero outgoing weights.
            * ``split``: copies of the strongest units (Net2Net; Chen et al., 2016), which share what these said, each
              outgoing weight a little unevenly.
            * ``gradient``: pairs along the singular vectors of the gradient (GradMax; Evci et al., 2022).
            * ``firefly``: pairs along the best of random and disturbed present directions (Wu et al., 2020).

            Where something between draws at random for each unit (Dropout, a hard-concrete gate), equal units do not
            cancel: outgoing weights are zero then, and the report says so.
        operands: for ``gradient`` and ``firefly``: layer name -> (x [n, inputs], grad_output [n, outputs of a reader,
            before its activation]) of the same n places. Of a convolution, inputs are those of one window; a direction
            is laid over all places of the reader's kernel.
        state: what second moments of new weights start with: ``scaled`` (a tenth of the mean of the others, as measured
            best), ``zero``, ``mean``, or a factor of the mean. All other state starts as that of a new parameter.
        density: of a block-sparse layer's new rows, and of the layer once it has new columns, at most. A unit may read
            64 others in any case.
        sparsifier: the :class:`~sparsenet.Sparsifier` of this model, to learn of the new patterns; its ``followers``
            are copies.
        copies: models of the same structure (an EMA, a best-so-far) that get the same units.
        opaque: names of modules to leave whole.
        graph: a :class:`~sparsenet.compaction.graph.UnitGraph` of the model as it is now, to save tracing it; it no
            longer describes the model afterwards.
        seed: of new weights and places of blocks: the same seed gives the same bits.

    A block-sparse layer's new rows and columns of blocks get as many blocks as its others have on average (or as
    ``density`` allows), at random places; blocks that were partly outside the matrix are filled first. Elements of new
    units are not masked. A copied unit has every block that its parent has.

    Returns:
        Where the new units are, and what they cost.

    Raises:
        GrowthError: the model cannot be traced; a layer that is unknown or whose units are pinned (the reason is
            given); a count, word, operand or state that does not fit. Nothing was changed.

    Gradients are carried along, new weights' are zero; a graph recorded before refuses its backward. Removing the same
    units by ``compact(model, remove=...)`` gives back what was before, except after ``split``.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth import widen
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).double()
        >>> optimizer, x = torch.optim.Adam(model.parameters()), torch.randn(5, 4).double()
        >>> before = model(x)
        >>> widen(model, optimizer, {"0": 4}).new
        {'0': tensor([ 8,  9, 10, 11])}
        >>> model[2].weight.shape, torch.allclose(model(x), before)
        (torch.Size([2, 12]), True)
    """
    start = time.perf_counter()
    if how not in HOW:
        raise GrowthError(f"widen: how must be one of {', '.join(HOW)}, got {how!r}")
    seed = as_integer("widen", "seed", seed)
    states, density = BornState(state), float(as_number("widen", "density", density, within=(0, 1)))
    with said_by("widen"), torch.no_grad():
        net = plain_model(model)
        optimizers = with_inner_optimizers((*as_optimizers(optimizer), *getattr(sparsifier, "optimizers", ())))
        graph = traced("widen", net, graph, tuple(opaque))
        births = _births(graph, units, how)
        found = {}
        if how in ("gradient", "firefly"):
            found = {b.stage.name: directions(graph, b, how, operands or {}, seed) for b in births}
        brood = Brood(births, how == "split", how not in ("zero", "split"), found, seed, density)
        growth = GrowthMoves(graph, brood, states)
        prepared = [growth.prepare(*entry, net, optimizers) for entry in growth.places]
        prepared += [
            growth.prepare(*entry, twin, ()) for twin in copies_of(net, copies, sparsifier) for entry in growth.places
        ]
        if distributed.is_active():
            distributed.assert_same("the units that widening adds", growth.digest())
        before, after = carry_out(prepared, model, optimizers, sparsifier)  # the graph no longer describes the model
    weighted = [(stage.name, rows, cols) for stage, rows, cols in growth.places if stage.weights is not None]
    return WidenReport(
        new={name: rows.new for name, rows, _ in weighted if rows is not None},
        columns={name: cols.new for name, _, cols in weighted if cols is not None},
        how={birth.stage.name: birth.how for birth in births},
        parameters=(before[0], after[0]),
        bytes=(before[1], after[1]),
        blocks=(before[2], after[2]),
        seconds=time.perf_counter() - start,
    )


def _births(graph: UnitGraph, units: Mapping[str, int] | None, how: str) -> tuple[Birth, ...]:
    """Who is born, checked."""
    if not units:
        raise GrowthError(f"widen: units must name at least one layer, got {units!r}")
    stages = stages_with_units(graph)
    found: list[Birth] = []
    first = 0
    for name, count in units.items():
        if name not in stages:
            raise GrowthError(f"widen: units must name layers that can grow, got {name!r}: {why_unknown(graph, name)}")
        count = as_integer("widen", f"units[{name!r}]", count, at_least=1)
        reason = reason_against(graph, stages[name])
        if reason is not None:
            raise GrowthError(f"widen: units must name layers that can grow, got {name!r}: {reason}")
        birth = born(graph, stages[name], count, how, first)
        twice = next((b.stage.name for b in found if b.anchor == birth.anchor), None)
        if twice is not None:
            raise GrowthError(
                f"widen: units must name units once, got {twice!r} and {name!r}, whose units are the same"
            )
        if how in ("gradient", "firefly") and not readers_of(graph, birth.anchor):
            raise GrowthError(
                f"widen: how must be zero, pairs or split for {name!r}, which no layer reads, got {how!r}"
            )
        found.append(birth)
        first += count
    return tuple(found)
