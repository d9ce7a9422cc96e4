"""Shrinking at once: the units and blocks that are worth least per byte, until a limit holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sparsenet.architecture.growth.account import Account
from sparsenet.architecture.growth.candidates import growable_layers
from sparsenet.architecture.growth.events import Change, together
from sparsenet.architecture.growth.fading import Fades, group_of
from sparsenet.architecture.growth.ledger import Cost, Ledger
from sparsenet.architecture.growth.structure import Structure
from sparsenet.architecture.growth.surgery import Surgery
from sparsenet.architecture.growth.worth import Worth
from sparsenet.compaction.graph import UnitGraph
from sparsenet.layers import SparseLinear
from sparsenet.limits import is_out_of_memory, release_heap

__all__ = ["Leaving", "choose_leaving", "shrink"]


LESS = 0.7  # of the bytes to keep, where there is no memory for that many beside the old ones
ROUNDS = 12  # of choosing: what leaves frees more or less than was estimated


@dataclass(frozen=True)
class Leaving:
    """What goes: units by layer, block numbers by layer, and what that is estimated to free."""

    units: dict[str, Tensor]
    blocks: dict[str, Tensor]
    frees: Cost


def choose_leaving(
    graph: UnitGraph,
    ledger: Ledger,
    layers: list[str],
    unit_scores: Mapping[str, Tensor],
    block_scores: Mapping[str, Tensor],
    enough: Callable[[Cost], bool],
) -> Leaving:
    """The lowest-scored per byte of all units of ``layers`` and all blocks, until ``enough`` of what they free.

    A layer keeps at least one group of units; a row of blocks keeps its last block. Scores: float32 by unit or block.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.ledger import Ledger
        >>> from sparsenet.architecture.growth.shrinking import choose_leaving
        >>> from sparsenet.compaction.graph import UnitGraph
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> graph = UnitGraph(model)
        >>> scores = {"0": torch.tensor([3.0, 1.0, 2.0])}
        >>> choose_leaving(graph, Ledger(graph, (), {}), ["0"], scores, {}, lambda freed: freed.bytes > 0).units
        {'0': tensor([1])}
    """
    offers: list[tuple[float, str, str, Tensor, Cost]] = []  # score per byte, level, layer, items, cost
    for name in layers:
        if name in unit_scores:
            offers += _unit_offers(graph, ledger, name, unit_scores[name].cpu())
    for name, scores in block_scores.items():
        cost = ledger.block(name)
        module = ledger.stages[name].module
        per_byte = scores.cpu() / max(cost.bytes, 1.0)
        keep = _last_of_rows(module, per_byte)
        offers += [
            (float(per_byte[i]), "blocks", name, torch.tensor([i]), cost) for i in (~keep).nonzero().flatten().tolist()
        ]
    units: dict[str, list[Tensor]] = {}
    blocks: dict[str, list[Tensor]] = {}
    freed = Cost()
    for _, level, name, items, cost in sorted(
        offers, key=lambda offer: (offer[0], offer[1], offer[2], int(offer[3][0]))
    ):
        if enough(freed):
            break
        (units if level == "units" else blocks).setdefault(name, []).append(items)
        freed = freed + cost
    together = [{name: torch.cat(parts).sort().values for name, parts in found.items()} for found in (units, blocks)]
    return Leaving(*together, freed)


def _unit_offers(graph: UnitGraph, ledger: Ledger, name: str, scores: Tensor) -> list:
    """Groups of units, all but the best one."""
    size, cost = group_of(graph, name), ledger.unit(name)
    number = torch.arange(len(scores)) // size
    total = torch.zeros(int(number[-1]) + 1).index_add_(0, number, scores.float())
    count = torch.bincount(number)
    per_byte = total / (count * max(cost.bytes, 1.0))
    best = int((total / count).argmax())
    return [
        (float(per_byte[g]), "units", name, (number == g).nonzero().flatten(), cost * float(count[g]))
        for g in range(len(total))
        if g != best
    ]


def _last_of_rows(layer: SparseLinear, scores: Tensor) -> Tensor:
    """Bool [num_blocks]: the best block of each row of blocks."""
    row = layer.pattern.row_indices.long().cpu()
    best = torch.full((layer.pattern.block_rows,), -torch.inf).scatter_reduce_(0, row, scores.float(), "amax")
    keep = scores == best[row]
    return keep


def shrink(
    structure: Structure,
    account: Account,
    surgery: Surgery,
    worth: Worth,
    fades: Fades,
    levels: Sequence[str],
    target: Cost,
    why: str,
) -> tuple[Change, ...]:
    """What fades goes, then the lowest-scored units and blocks, until the network fits ``target`` or no more can go.

    Args:
        levels: what may go. why: in the words of the changes.

    The smaller tensors are made before the larger ones go. Where there is no memory for them, still less is kept.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.account import Account
        >>> from sparsenet.architecture.growth.fading import Fades
        >>> from sparsenet.architecture.growth.ledger import Cost
        >>> from sparsenet.architecture.growth.shrinking import shrink
        >>> from sparsenet.architecture.growth.structure import Structure
        >>> from sparsenet.architecture.growth.surgery import Surgery
        >>> from sparsenet.architecture.growth.watch import IntervalScores
        >>> from sparsenet.architecture.growth.worth import Worth
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> scores, no = IntervalScores(), float("inf")
        >>> surgery = Surgery(net, (), (), (), None, "pairs", scores)
        >>> parts = Structure(net), Account(net, ()), surgery, Worth("magnitude", scores), Fades(4)
        >>> [change] = shrink(*parts, ("units",), Cost(no, 30.0, no), "too many parameters")
        >>> change.pruned, sum(p.numel() for p in net.parameters())
        (4, 30)
    """
    changes: list[Change] = []
    units, blocks = fades.items("units"), fades.items("blocks")
    fades.begin(fades.begun, [])
    for again in range(ROUNDS + 1):
        graph = structure.latest
        if again:
            now = account.total(graph)
            if now.fits(target):
                break
            growing = growable_layers(graph) if "units" in levels else []
            scores = worth.of_all(structure.layers, growing, structure.sparse() if "blocks" in levels else {})
            leaving = choose_leaving(graph, account.ledger(graph), growing, *scores, partial(_enough, now, target))
            units, blocks = leaving.units, leaving.blocks
            if not units and not blocks:
                break
        sizes = Account.sizes(graph)
        try:
            changes += _removed(structure, surgery, units, blocks, why)
        except (RuntimeError, MemoryError) as error:
            if again == ROUNDS or not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold what was made already
            target = replace(target, bytes=LESS * min(target.bytes, account.total(graph).bytes))
        graph = structure.graph()
        structure.know(graph)
        account.follow(sizes, graph)
    return together(changes)


def _removed(structure: Structure, surgery: Surgery, units: dict, blocks: dict, why: str) -> list[Change]:
    """Blocks and units leave; where there is no memory for the smaller tensors beside the larger ones, gradients go."""
    changes, waiting = [], dict(blocks)
    for freed in (False, True):
        try:
            while waiting:
                name = next(iter(waiting))
                changes += surgery.blocks(structure.sparse(), {name: waiting[name]}, why)
                del waiting[name]
            return changes + surgery.remove_units(units, why)
        except (RuntimeError, MemoryError) as error:
            if freed or not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold what was made already
        structure.net.zero_grad(set_to_none=True)
        release_heap()
    return changes


def _enough(now: Cost, target: Cost, freed: Cost) -> bool:
    return (now - freed).fits(target)
