"""One decision of the Grower: what has faded goes, what is worth it is born, and what is idle begins to fade."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sparsenet import distributed
from sparsenet.architecture.growth.account import Account, agreed
from sparsenet.architecture.growth.candidates import candidates, growable_layers
from sparsenet.architecture.growth.controller import Candidate, Flow
from sparsenet.architecture.growth.events import Change
from sparsenet.architecture.growth.fading import Fade, Fades
from sparsenet.architecture.growth.gains import NewBlocks
from sparsenet.architecture.growth.holding import Limits
from sparsenet.architecture.growth.idle import fading_blocks, idle_units
from sparsenet.architecture.growth.ledger import Cost, Ledger
from sparsenet.architecture.growth.placing import readers
from sparsenet.architecture.growth.spending import agreed_offers, room, spent
from sparsenet.architecture.growth.structure import Structure
from sparsenet.architecture.growth.surgery import Surgery
from sparsenet.architecture.growth.watch import Seen
from sparsenet.architecture.growth.worth import Worth
from sparsenet.limits import is_out_of_memory
from sparsenet.policies.places import layer_key

__all__ = ["Decider", "Decision", "Rules"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """Options of a :class:`sparsenet.Grower` that do not change.

    Attributes:
        levels, every, density, turnover, idle, grow_until, seed: as there. steps: of the training, or None.
    """

    levels: tuple[str, ...]
    every: int
    density: float
    turnover: float
    idle: float
    grow_until: float
    steps: int | None
    seed: int

    @property
    def turn_end(self) -> float:
        """The step from which no blocks are exchanged any more."""
        return math.inf if self.steps is None else 0.75 * self.steps


@dataclass(frozen=True)
class Decision:
    """What was done. ``gained``: squared gradient norm of all that was born. ``reason``: why less was done."""

    changes: tuple[Change, ...]
    gained: float
    reason: str


@dataclass
class Decider:
    """The parts that a decision reads and changes, each of which says what it is.

    Attributes:
        insertions: arguments of :func:`deepen`, in the order they were made.
    """

    rules: Rules
    structure: Structure
    account: Account
    limits: Limits
    surgery: Surgery
    worth: Worth
    fades: Fades
    flow: Flow
    insertions: list[dict]

    def decide(self, step: int, kept: Mapping[str, Seen], start: Cost, milliseconds: float, stopped: bool) -> Decision:
        """Carries a decision out.

        Args:
            kept: operands of the last step. start: costs of the network at the beginning. milliseconds: of the last
                steps, with several ranks the largest; 0: not known. stopped: whether growth has ended.
        """
        graph = self.structure.graph()
        ledger, sizes, total = self.account.ledger(graph), Account.sizes(graph), self.account.total(graph)
        self.flow.advance(step, self.rules.steps, self.rules.grow_until)
        kept = _of_all_ranks(kept)
        units, blocks = self.fades.items("units"), self.fades.items("blocks")
        limit = self.limits.until(step, self.rules.every, total, self.account)
        if milliseconds > 0:  # what was seen is nearer than what is predicted
            total = replace(total, milliseconds=milliseconds)
        held = total - agreed(sum((ledger.unit(name) * len(items) for name, items in units.items()), Cost()))
        seed = layer_key(self.rules.seed, step, "births") & 0x7FFFFFFF
        free = room(start, limit, held, self.flow, self.limits.pace)
        offers: list[Candidate] = []
        new_blocks = NewBlocks(kept, step // self.rules.every)
        if not stopped and min(free.parts) > 0:  # alike on all ranks, as all that it is made of
            options = self.rules.levels, self.rules.density, seed, new_blocks
            offers = agreed_offers(candidates(graph, ledger, kept, *options))
        births = spent(offers, ledger, free, limit, limit - held, self.flow)
        gains = {offer.key: offer.gain for offer in offers}
        operands = _pairs(ledger, births.units, kept)
        self.fades.begin(step, [])
        sparse = self.structure.sparse()
        counts = {name: births.blocks.get(name, 0) + len(blocks.get(name, ())) for name in sparse}
        changes = self.surgery.exchange(sparse, blocks, counts, kept, new_blocks)
        removed = self.surgery.remove_units(units, "faded")
        changes += removed
        reason = ""
        try:
            by_layer = {name: gains[f"units {name}"] for name in births.units}
            changes += self.surgery.widen(births.units, {} if removed else operands, by_layer, seed)
            if births.layer:
                added, insertion = self.surgery.deepen(births.layer, gains[f"layers {births.layer}"], seed)
                self.insertions.append(insertion)
                changes += added
        except (RuntimeError, MemoryError) as error:
            if distributed.is_active() or not is_out_of_memory(error):
                raise
            reason = "no memory to grow"
            logger.warning("Grower: step %d: %s", step, reason)
        if any(change.level != "blocks" for change in changes):
            graph = self.structure.graph()
        if any(change.level != "blocks" or change.grown != change.pruned for change in changes):
            self.account.follow(sizes, graph)
        self.structure.know(graph)
        return Decision(tuple(changes), sum(change.gain * change.grown for change in changes), reason)

    def begin_fading(self, step: int) -> None:
        """Chooses what leaves until the next decision: blocks by turnover, units that are idle."""
        fades: list[Fade | None] = []
        rules, layers = self.rules, self.structure.layers
        if "blocks" in rules.levels and rules.turnover > 0 and step < rules.turn_end:
            share = rules.turnover / 2 * (1 + math.cos(math.pi * step / rules.turn_end)) * rules.every / 100
            for name, layer in self.structure.sparse().items():
                count, places = layer.pattern.num_blocks, layer.pattern.block_rows * layer.pattern.block_cols
                asked = self.flow.whole(f"turnover {name}", min(share * count, places - count))
                fades.append(fading_blocks(name, layer, self.worth.blocks(name, layer), min(asked, count)))
        if "units" in rules.levels and rules.idle and step < rules.turn_end:
            graph = self.structure.latest
            for name in growable_layers(graph):
                fades.append(idle_units(graph, name, self.worth.units(name, layers[name]), rules.idle))
        self.fades.begin(step, [fade for fade in fades if fade is not None])


def _of_all_ranks(kept: Mapping[str, Seen]) -> Mapping[str, Seen]:
    if not distributed.is_active():
        return kept
    names = sorted(kept)
    distributed.assert_same("the layers whose operands were kept", sum(map(ord, " ".join(names))))
    totals = distributed.mean_of([float(kept[name].total) for name in names]) if names else []
    return {
        name: Seen(*distributed.gather_operands(*kept[name][:2]), round(total * distributed.world_size()))
        for name, total in zip(names, totals, strict=True)
    }


def _pairs(ledger: Ledger, units: Mapping[str, int], kept: Mapping[str, Seen]) -> dict:
    """Of layers that are read by one layer only, unit by unit: (its inputs, gradients of what its reader makes)."""
    found = {}
    for name in units:
        heard = readers(ledger.graph, name)
        if len(heard) == 1 and heard[0] in kept and name in kept and kept[name].total == kept[heard[0]].total:
            made, read = ledger.stages[name].outputs.units, ledger.stages[heard[0]].inputs.units
            if read.equal(made):
                found[name] = kept[name].x, kept[heard[0]].grad_output
    return found
