"""The Grower: a network that grows and prunes itself while it trains, inside a budget of bytes and milliseconds.

Between decisions it only looks: at gradients, losses and the clock. A decision reads what they say, lets what has faded
go, hands out what is free of the budget to whatever gains most per byte (or millisecond), and chooses what fades next.

What goes fades out over a ramp; what comes does not fade in. It is born so that it changes no output, with weights of
the size that its layer has and second moments that let it learn at once: behind a gate that starts at zero its own
weights would have no gradient until the gate has opened.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsenet import distributed
from sparsenet.architecture.growth.account import Account
from sparsenet.architecture.growth.candidates import candidates, growable_layers
from sparsenet.architecture.growth.checking import (
    check_can_grow,
    check_fits,
    network_of,
    one_number,
    optimizers_of,
    smallest,
)
from sparsenet.architecture.growth.controller import Flow
from sparsenet.architecture.growth.diagnostics import newborn_ratio
from sparsenet.architecture.growth.events import Change, Event, together
from sparsenet.architecture.growth.fading import Fade, Fades
from sparsenet.architecture.growth.holding import Amount, Limits
from sparsenet.architecture.growth.idle import fading_blocks, idle_units
from sparsenet.architecture.growth.ledger import Cost, Ledger
from sparsenet.architecture.growth.newborn import HOW
from sparsenet.architecture.growth.placing import GrowthError, readers
from sparsenet.architecture.growth.restoring import fit_structure
from sparsenet.architecture.growth.saving import resume, state_of
from sparsenet.architecture.growth.shrinking import choose_leaving
from sparsenet.architecture.growth.spending import agreed_offers, room, spent
from sparsenet.architecture.growth.step_watch import StepWatch
from sparsenet.architecture.growth.stopping import ExtrapolatedGain
from sparsenet.architecture.growth.surgery import Surgery
from sparsenet.architecture.growth.watch import IntervalScores, Operands, Seen, unit_and_block_products
from sparsenet.architecture.growth.worth import Worth
from sparsenet.compaction.graph import UnitGraph
from sparsenet.compaction.weights import unit_weights
from sparsenet.layers import SparseLinear
from sparsenet.limits import format_bytes, is_out_of_memory, release_heap
from sparsenet.memory.step_time import StepTimeModel
from sparsenet.policies.places import layer_key
from sparsenet.schedules import as_integer, as_number

__all__ = ["Grower"]

logger = logging.getLogger(__name__)

LEVELS = ("blocks", "units", "layers")
LOOKS = 8  # at gradients, in an interval
SETTLED = 8  # decisions without a change after which a training of unknown length is done
WINDOW = 20  # steps whose times are looked at, at least


class Grower:
    """Grows a model where the gradient asks, prunes what is idle, and holds a budget; all while it trains.

    Args:
        model: anything that ``torch.fx`` can trace, of dense, convolutional and block-sparse layers. Wrappers of
            :class:`sparsenet.distributed.DataParallel` are looked through; a compiled model is refused: every change of
            shape would compile it anew, so compile it when :attr:`done`.
        optimizer: one or several ``torch.optim`` optimizers that hold the model's parameters.
        budget: bytes of one training step: parameters, gradients, optimizer state, indices, buffers and the activations
            kept for backward, at the batch size seen; the data are excluded. An amount such as ``"64MiB"``, or a
            function of the step that returns bytes. It may be set anew at any time.
        step_ms: milliseconds of one training step (from the model's forward to :meth:`step`), or None. Times are
            measured, so two runs with such a limit need not be alike; models on the CPU only.
        parameters: most elements of all parameters together, or None.
        batch_size: rows of a batch, where the budget is to hold for larger ones than those seen.
        steps: optimizer steps of the whole training. None: growth goes on in fixed parts, and the Grower is
            :attr:`done` when nothing has changed for some decisions.
        validate: called without arguments now and then, returns the held-out loss; growth stops when the next
            enlargement is predicted to gain less than ``tolerance`` of it. None: growth goes on to the limit.
        levels: of ``blocks``, ``units`` and ``layers``, what may change.
        grow: how units are born, as ``how`` of :func:`sparsenet.architecture.growth.widen`; which layers get them is
            decided by the gradient in any case. Random ``pairs`` learn best (measured: docs/methods/growth.md).
        prune: ``fisher`` (Molchanov et al., 2019) or ``magnitude``.
        every: steps from decision to decision: small for continuous growth, large for growth in phases; the same code.
        grow_until: share of the training by which the limit may be used in full.
        density: up to which blocks are added to a block-sparse layer; the rest of the budget widens it. A wide layer
            of few blocks learns more than a narrow full one of the same bytes.
        turnover: share of each layer's blocks exchanged per 100 steps at the start, falling as a cosine to zero at
            three quarters of the training (RigL: Evci et al., 2020).
        idle: units (and, where blocks may change, blocks) worth less than this share of their layer's mean leave.
        ramp: steps over which what leaves fades out; it returns if the loss asks for it meanwhile.
        tolerance: see ``validate``.
        seed: of everything random. followers: averaged copies, which change alike.
        opaque: names of modules to leave whole. sparsifier: the model's Sparsifier, to learn of changes.

    Raises:
        ValueError, TypeError: the model needs more than the budget as it is; it cannot be traced, or has nothing that
            can grow; a number out of range. Nothing was changed.

    Call :meth:`step` after every ``optimizer.step()`` and before the gradients are set to zero. Frozen layers stay as
    they are, and so do the units that they read. With several ranks, the model is in a
    :class:`sparsenet.distributed.DataParallel` and every rank calls :meth:`step`: the smallest budget counts, and the
    largest cost and time; scores, gains and losses are averaged, and all ranks decide alike.

    Between decisions nothing else should change the model's sizes; where a Sparsifier moves blocks or units are
    removed by hand, what is known of them is forgotten.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        >>> grower = sn.Grower(model, optimizer, budget="64KiB", steps=200, every=20)
        >>> x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
        >>> for _ in range(100):
        ...     loss = torch.nn.functional.cross_entropy(model(x), (x[:, 0] * x[:, 1] > 0).long())
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     event = grower.step(loss)
        >>> model[0].out_features > 4, grower.bytes <= 64 << 10
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        budget: Amount = "64MiB",
        step_ms: float | None = None,
        *,
        parameters: int | None = None,
        batch_size: int | None = None,
        steps: int | None = None,
        validate: Callable[[], float] | None = None,
        levels: Sequence[str] = LEVELS,
        grow: str = "pairs",
        prune: str = "fisher",
        every: int | None = None,
        grow_until: float = 0.25,
        density: float = 0.1,
        turnover: float = 0.3,
        idle: float = 0.01,
        ramp: int | None = None,
        tolerance: float = 0.01,
        seed: int = 0,
        followers: Iterable[nn.Module] = (),
        opaque: Iterable[str] = (),
        sparsifier=None,
    ):
        self.model, self.optimizer, self.validate, self.sparsifier = model, optimizer, validate, sparsifier
        self.net = network_of(model)
        self.optimizers = optimizers_of(self.net, optimizer)
        self.levels, self.grow, self.prune = _chosen("levels", levels, LEVELS), grow, prune
        _one_of("grow", grow, HOW)
        _one_of("prune", prune, ("fisher", "magnitude"))
        self.total_steps = None if steps is None else as_integer("Grower", "steps", steps, at_least=1)
        default = 50 if steps is None else min(100, max(10, self.total_steps // 100))
        self.every = default if every is None else as_integer("Grower", "every", every, at_least=2)
        self.ramp = max(1, self.every // 2) if ramp is None else as_integer("Grower", "ramp", ramp, at_least=1)
        if self.ramp >= self.every:
            raise ValueError(f"Grower: ramp must be below every ({self.every}), got {self.ramp}")
        self.grow_until = as_number("Grower", "grow_until", grow_until, within=(0, 1))
        self.density = as_number("Grower", "density", density, within=(0, 1))
        self.turnover = as_number("Grower", "turnover", turnover, within=(0, 1))
        self.idle = as_number("Grower", "idle", idle, within=(0, 1))
        rows = None if batch_size is None else as_integer("Grower", "batch_size", batch_size, at_least=1)
        self.seed = as_integer("Grower", "seed", seed)
        self.followers, self.opaque = tuple(followers), tuple(opaque)
        self.gain = ExtrapolatedGain(as_number("Grower", "tolerance", tolerance, within=(0, 1)))
        self.steps = 0
        self.done = False
        self.events: list[Event] = []
        self.insertions: list[dict] = []
        self._flow, self._fades, self._scores = Flow(), Fades(self.ramp), IntervalScores()
        self._worth = Worth(prune, self._scores)
        self._losses: list[Tensor | float] = []
        self._seen: list[float] = []  # mean loss of the last intervals
        self._still = 0  # decisions in a row that changed next to nothing
        self._stopped = ""  # why growth has ended
        self._operands: Operands | None = None
        self._account = Account(self.net, self.optimizers, None, rows)
        self._limits = Limits(budget, parameters, None)
        self.step_ms = step_ms
        self._surgery = Surgery(model, optimizer, self.followers, self.opaque, sparsifier, grow, self._scores)
        self._layers = _layers_of(self.net)
        graph = self._graph()
        for name in check_can_grow(graph, self.levels, bool(self._sparse())):
            logger.warning("Grower: layer %s is frozen, or feeds one that is: its units stay as they are", name)
        self._start = self._now = self._account.total(graph)  # without activations, until a batch was seen
        check_fits(self._now, self._limits.at(0))
        self._know(graph)
        self._watch = StepWatch(self.net, max(self.every, WINDOW))

    # --- what it is ---

    @property
    def budget(self) -> Callable[[int], float]:
        """Bytes as a function of the step."""
        return self._limits.budget

    @budget.setter
    def budget(self, amount: Amount) -> None:
        at_once = Limits(amount).budget(self.steps)
        if self.steps:
            graph = self._graph()
            least = smallest(graph, self._account.ledger(graph), self.levels).bytes
            if least > at_once:
                raise ValueError(
                    f"Grower: budget must be at least about {format_bytes(least)}, which the smallest network that "
                    f"this one can shrink to needs, got {format_bytes(at_once)}"
                )
        self._limits.set_budget(amount, self.steps)

    @property
    def parameters(self) -> float:
        """Most elements of all parameters, infinite where any number is allowed. May be set anew."""
        return self._limits.parameters

    @parameters.setter
    def parameters(self, most: float | None) -> None:
        self._limits.parameters = most

    @property
    def step_ms(self) -> float:
        """Most milliseconds of a step, infinite where any number is allowed. May be set anew."""
        return self._limits.step_ms

    @step_ms.setter
    def step_ms(self, most: float | None) -> None:
        device = next((p.device.type for p in self.net.parameters() if p.device.type != "cpu"), "cpu")
        if most not in (None, math.inf) and device != "cpu":
            raise ValueError(f"Grower: step_ms must be None for a model on {device}: times are those of the CPU")
        self._limits.step_ms = most
        if self._limits.step_ms < math.inf and self._account.times is None:
            self._account.times = StepTimeModel(self.optimizers[0])

    @property
    def times(self) -> StepTimeModel | None:
        """The model of step times; None where there never was a limit of milliseconds."""
        return self._account.times

    @property
    def bytes(self) -> int:
        """Of one training step, as predicted for the network as it is."""
        return round(self._now.bytes)

    @property
    def milliseconds(self) -> float:
        """Of one training step: the lower quartile of the last ones seen, since what else runs only adds; 0 before."""
        return self._watch.milliseconds

    # --- the step ---

    def step(self, loss: Tensor | float) -> Event | None:
        """Counts one optimizer step; decides when it is time, or at once where a limit is broken.

        Args:
            loss: of this step; a scalar.

        Returns:
            What was decided, or None between decisions.

        Raises:
            ValueError: ``loss`` is not one number; at the first step, the budget is too small for the activations.
            CompactionError, RuntimeError: an optimizer's state is not understood, gradients were set to zero before,
                or ranks disagree.
        """
        loss = one_number(loss)
        self._watch.stop_clock()
        looks = (self.steps + 1) % max(1, self.every // LOOKS) == 0
        noticed = self._notice()
        if looks and not noticed and not self.done and all(p.grad is None for p in self.net.parameters()):
            raise RuntimeError("Grower: step must be called before the gradients are set to zero, got none")
        self.steps += 1
        if not self.done:
            self._losses.append(loss)
        self._fades.apply(self.steps, self._layers)
        self._count()
        if looks and not self.done:
            self._look()
        event = None
        broken = self._broken(looks)
        if broken:
            event = self._shrink(broken)
        elif self.steps % self.every == 0 and not self.done:
            event = self._decide()
        if event is not None:
            self.events.append(event)
            logger.info("Grower: %s", event)
        self._arm()
        return event

    def attempt(self, closure: Callable[[], Tensor]) -> Tensor:
        """Calls ``closure`` (forward and backward, returns the loss); where memory runs out, shrinks and tries again.

        The closure must set gradients to zero itself before it computes them. A quarter of what the step costs goes at
        each try; raises the error of the last one where nothing more can go. For one rank only: others would wait.

        Example:
            >>> import torch, sparsenet as sn
            >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> grower = sn.Grower(model, optimizer, "1MiB")
            >>> def closure():
            ...     optimizer.zero_grad()
            ...     loss = model(torch.ones(4, 16)).square().mean()
            ...     loss.backward()
            ...     if model[0].out_features > 40:
            ...         raise MemoryError
            ...     return loss
            >>> loss = grower.attempt(closure)
            >>> model[0].out_features <= 40
            True
        """
        if distributed.is_active():
            raise RuntimeError("Grower: attempt must be called by a single rank, got several: the others would wait")
        while True:
            try:
                return closure()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = error.with_traceback(None)  # its frames hold the activations
            self.net.zero_grad(set_to_none=True)
            release_heap()
            self._limits.cap = max(1.0, 0.75 * self._now.bytes)
            event = self._shrink("an allocation failed")
            self.events.append(event)
            if not event.pruned:
                raise failed

    def close(self) -> None:
        """Takes its hooks off the model."""
        self._disarm()
        self._watch.close()

    # --- watching ---

    def _look(self) -> None:
        """Takes note of the gradients: of all units and blocks, and of what fades."""
        self._scores.observe(self._layers)
        if not self._fades.fades:
            return
        products = {f.layer: unit_and_block_products(self._layers[f.layer]) for f in self._fades.fades}
        self._fades.look(self.steps, products)
        middle = self._fades.begun + self.ramp // 2
        if middle <= self.steps < middle + max(1, self.every // LOOKS):
            for level, layer, count in self._fades.rescue(self._graph, self.steps, self._layers):
                logger.info("Grower: step %d: %d fading %s of %s are kept after all", self.steps, count, level, layer)

    def _count(self) -> None:
        """Counts the activations of the first step, and of one with a larger batch than those before."""
        batch = self._watch.batch
        if batch is None:
            if not self._watch.seen and self.steps == 1:
                logger.warning("Grower: no forward pass of the model in training was seen: activations do not count")
            return
        first = not self._account.counted
        if not first and not self._watch.larger:
            return
        self._measure()
        self._now = self._account.total(self._graph())
        if first:
            self._start = self._now
            check_fits(self._now, self._limits.at(self.steps))

    def _measure(self) -> None:
        if self._watch.batch is not None:
            with self._watch.paused():
                self._account.measure(self._watch.batch, self._watch.most_rows)
            self._watch.batch = None

    def _arm(self) -> None:
        """Before a step that decides, has the operands of all layers kept."""
        self._disarm()
        if (self.steps + 1) % self.every == 0 and not self.done:
            self._operands = Operands(self._layers.items())
            self._watch.wanted = self._account.stale

    def _disarm(self) -> None:
        if self._operands is not None:
            self._operands.close()
            self._operands = None

    def _know(self, graph: UnitGraph) -> None:
        """Remembers the structure, to see when others change it."""
        self._layers = _layers_of(self.net)
        self._known, self._sizes = _structure(self._layers), Account.sizes(graph)

    def _notice(self) -> bool:
        """Whether others have changed the model since; what is known of units or blocks that moved is forgotten."""
        layers = _layers_of(self.net)
        now = _structure(layers)
        if now == self._known and all(layers[name] is module for name, module in self._layers.items()):
            return False
        if {n: shape for n, (shape, _) in now.items()} == {n: shape for n, (shape, _) in self._known.items()}:
            self._scores.forget_blocks()
            self._fades.drop_blocks()
        else:
            self._scores.clear()
            self._fades.begin(self.steps, [])
        graph = self._graph()
        self._disarm()
        self._account.follow(self._sizes, graph)
        self._now = self._account.total(graph)
        self._know(graph)
        return True

    def _broken(self, looks: bool) -> str:
        """The limit that the network is above, in words; empty if none."""
        timed = looks and self.step_ms < math.inf and len(self._watch.seconds) >= self._watch.window
        milliseconds = self._agreed_ms() if distributed.any_rank(timed) else None
        return self._limits.broken(self.steps, self._now, milliseconds, self._account if looks else None)

    def _agreed_ms(self) -> float:
        return distributed.highest([self.milliseconds])[0]

    # --- deciding ---

    def _decide(self) -> Event:
        """One decision: what faded goes, what is worth it is born, what is idle begins to fade."""
        if self._operands is not None:
            self._operands.close()  # what was kept stays
        if self.times is not None and self._account.layers and (ms := self._agreed_ms()) > 0:
            self.times.observe(self._account.layers, ms)
        self._measure()
        self._ask_for_the_loss()
        if reason := self._not_to_be_judged():
            logger.warning("Grower: step %d keeps the network: %s", self.steps, reason)
            self._scores.clear()
            return self._event((), reason)
        graph = self._graph()
        ledger, before = self._account.ledger(graph), Account.sizes(graph)
        ratio = self._newborn_ratio()
        self._ask_whether_growth_pays()
        self._flow.advance(self.steps, self.total_steps, self.grow_until)
        kept, sparse = self._kept(), self._sparse()
        leaving, faded = self._fades.items("units"), self._fades.items("blocks")
        total = self._account.total(graph)
        limit = self._limits.until(self.steps, self.every, total, self._account)
        freed = sum((ledger.unit(name) * len(items) for name, items in leaving.items()), Cost())
        seed = layer_key(self.seed, self.steps, "births") & 0x7FFFFFFF
        offers = [] if self._stopped else candidates(graph, ledger, kept, self.levels, self.density, seed)
        offers = agreed_offers(offers)
        free = room(self._start, limit, total - freed, self._flow, self._limits.pace, self._agreed_ms())
        births = spent(offers, ledger, free, limit, limit - (total - freed), self._flow)
        gains = {c.key: c.gain for c in offers}
        operands = self._pairs(ledger, births.units, kept)
        self._fades.begin(self.steps, [])
        blocks = {name: births.blocks.get(name, 0) + len(faded.get(name, ())) for name in sparse}
        changes = self._surgery.exchange(sparse, faded, blocks, kept)
        removed = self._surgery.remove_units(leaving, "faded")
        changes += removed
        no_memory = ""
        try:
            units = {name: gains[f"units {name}"] for name in births.units}
            changes += self._surgery.widen(births.units, {} if removed else operands, units, seed)
            if births.layer:
                added, insertion = self._surgery.deepen(births.layer, gains[f"layers {births.layer}"], seed)
                self.insertions.append(insertion)
                changes += added
        except (RuntimeError, MemoryError) as error:
            if distributed.is_active() or not is_out_of_memory(error):
                raise
            no_memory = "no memory to grow"
            logger.warning("Grower: step %d: %s", self.steps, no_memory)
        predicted = -sum(c.gain * c.grown for c in changes) * self._learning_rate() * self.every
        graph = self._settle(graph, before, changes, total)
        if not self.done:
            self._begin_fading(graph)
        self._scores.clear()
        event = self._event(changes, no_memory or self._stopped, predicted, ratio)
        if broken := self._limits.broken(self.steps, self._now, None, None):  # more than was predicted
            self.events.append(event)
            event = self._shrink(broken)
        return event

    def _not_to_be_judged(self) -> str:
        """Why no decision is made on what was seen; empty if one is."""
        bad = self._scores.not_finite()
        if distributed.any_rank(bool(bad)):
            return f"scores of layer {bad or 'another rank'} hold NaN or Inf"
        if not (self._seen and math.isfinite(self._seen[-1])):
            return "the loss holds NaN or Inf"
        if distributed.any_rank(self._scores.all_zero()):
            return "all gradients are zero; were they set to zero before Grower.step?"
        return ""

    def _settle(self, graph: UnitGraph, before: Mapping[str, int], changes: list[Change], total: Cost) -> UnitGraph:
        """What the network costs now, and whether everything is done; returns a graph of it."""
        if any(change.level != "blocks" for change in changes):
            graph = self._graph()
        if any(change.level != "blocks" or change.grown != change.pruned for change in changes):
            self._account.follow(before, graph)
        self._know(graph)
        self._now = self._account.total(graph)
        net = abs(self._now.parameters - total.parameters) / max(total.parameters, 1.0)
        self._still = self._still + 1 if net <= 0.005 else 0
        if self.total_steps is None:
            self.done = self._still >= SETTLED and (bool(self._stopped) or self._flow.progress >= 1.0)
        else:
            self.done = self.steps + self.every > self.total_steps
        return graph

    def _begin_fading(self, graph: UnitGraph) -> None:
        """Chooses what leaves until the next decision: blocks by turnover, units that are idle."""
        fades: list[Fade | None] = []
        if "blocks" in self.levels and self._turns():
            share = self.turnover / 2 * (1 + math.cos(math.pi * self.steps / self._turn_end())) * self.every / 100
            for name, layer in self._sparse().items():
                count, places = layer.pattern.num_blocks, layer.pattern.block_rows * layer.pattern.block_cols
                asked = self._flow.whole(f"turnover {name}", min(share * count, places - count))
                fades.append(fading_blocks(name, layer, self._worth.blocks(name, layer), min(asked, count)))
        if "units" in self.levels and self.idle:
            for name in growable_layers(graph):
                fades.append(idle_units(graph, name, self._worth.units(name, self._layers[name]), self.idle))
        self._fades.begin(self.steps, [fade for fade in fades if fade is not None])

    def _turns(self) -> bool:
        return self.turnover > 0 and self.steps < self._turn_end()

    def _turn_end(self) -> float:
        return 0.75 * self.total_steps if self.total_steps is not None else math.inf

    def _graph(self) -> UnitGraph:
        return UnitGraph(self.net, self.opaque, zeros=False)

    def _sparse(self) -> dict[str, SparseLinear]:
        return {n: m for n, m in self._layers.items() if isinstance(m, SparseLinear) and m.values.requires_grad}

    def _kept(self) -> dict[str, Seen]:
        """The operands of the last step, of all ranks together."""
        kept = self._operands.kept if self._operands is not None else {}
        if not distributed.is_active():
            return kept
        names = [name for name in self._layers if name in kept]
        distributed.assert_same("the layers whose operands were kept", sum(map(ord, " ".join(names))))
        totals = distributed.mean_of([float(kept[name].total) for name in names])
        world = distributed.world_size()
        return {
            name: Seen(*distributed.gather_operands(*kept[name][:2]), round(total * world))
            for name, total in zip(names, totals, strict=True)
        }

    def _pairs(self, ledger: Ledger, units: Mapping[str, int], kept: Mapping[str, Seen]) -> dict:
        """Of layers that are read by one layer only, unit by unit: (its inputs, gradients of what its reader makes)."""
        found = {}
        for name in units:
            heard = readers(ledger.graph, name)
            if len(heard) == 1 and heard[0] in kept and name in kept and kept[name].total == kept[heard[0]].total:
                made, read = ledger.stages[name].outputs.units, ledger.stages[heard[0]].inputs.units
                if read.equal(made):
                    found[name] = kept[name].x, kept[heard[0]].grad_output
        return found

    def _ask_for_the_loss(self) -> None:
        """The mean of the interval's losses joins those seen; the last two are kept."""
        if self._losses:
            losses = torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu") for x in self._losses])
            self._losses = []
            self._seen = [*self._seen[-1:], *distributed.mean_of([float(losses.mean())])]

    def _ask_whether_growth_pays(self) -> None:
        """Asks for the held-out loss, and stops growth that no longer pays; training does not notice that it asked."""
        if self.validate is None or self._stopped or self._flow.progress >= 1.0:
            return
        size = float(sum(p.numel() for p in self.net.parameters()))
        training = {module: module.training for module in self.net.modules()}
        devices = sorted({p.device.index for p in self.net.parameters() if p.is_cuda})
        try:
            with torch.no_grad(), torch.random.fork_rng(devices), self._watch.paused():
                loss = float(self.validate())
        finally:
            for module, was in training.items():
                module.training = was
        self.gain.observe(size, distributed.mean_of([loss])[0])
        if not self.gain.useful():
            gain = self.gain.predicted()
            self._stopped = f"the next enlargement is predicted to gain {gain:.2%} of the held-out loss"
            logger.info("Grower: step %d: growth ends: %s", self.steps, self._stopped)

    # --- shrinking at once ---

    def _shrink(self, why: str) -> Event:
        """What fades goes, then the lowest-scored units and blocks, now, until the limits hold."""
        before, changes = self._now, []
        self._disarm()
        target = self._limits.to_shrink_to(why, self.steps, before, self._agreed_ms(), self._account)
        units, blocks = self._fades.items("units"), self._fades.items("blocks")
        self._fades.begin(self.steps, [])
        for again in range(13):
            graph = self._graph()
            ledger, sizes = self._account.ledger(graph), Account.sizes(graph)
            now = self._account.total(graph)
            if again:
                if now.fits(target):
                    break
                growing = growable_layers(graph) if "units" in self.levels else []
                worth = self._worth.of_all(self._layers, growing, self._sparse() if "blocks" in self.levels else {})
                leaving = choose_leaving(graph, ledger, growing, *worth, partial(_enough, now, target))
                units, blocks = leaving.units, leaving.blocks
                if not units and not blocks:
                    break
            for freed in (False, True):
                try:
                    changes += self._surgery.blocks(self._sparse(), blocks, why)
                    blocks = {}
                    changes += self._surgery.remove_units(units, why)
                    break
                except (RuntimeError, MemoryError) as error:
                    if freed or not is_out_of_memory(error):
                        raise
                self.net.zero_grad(set_to_none=True)  # room for the smaller tensors beside the larger ones
                release_heap()
            self._layers = _layers_of(self.net)
            self._account.follow(sizes, self._graph())
        graph = self._graph()
        self._know(graph)
        self._now = self._account.total(graph)
        self._watch.seconds = []
        sizes_in_words = format_bytes(before.bytes), format_bytes(self._now.bytes)
        logger.warning("Grower: step %d: %s: shrinks from %s to %s", self.steps, why, *sizes_in_words)
        if not self._now.fits(target):
            logger.warning("Grower: step %d: nothing more can go, and the limit does not hold", self.steps)
        return self._event(together(changes), why)

    # --- what it says ---

    def _event(
        self, changes: Sequence[Change], reason: str, predicted: float = 0.0, ratio: float | None = None
    ) -> Event:
        return Event(
            step=self.steps,
            changes=tuple(changes),
            bytes=round(self._now.bytes),
            parameters=round(self._now.parameters),
            milliseconds=self.milliseconds,
            limit_bytes=round(self._limits.at(self.steps).bytes),
            predicted=predicted,
            seen=self._seen[-1] - self._seen[-2] if len(self._seen) == 2 else None,
            newborn_ratio=ratio,
            reason=reason,
            units={name: weights.rows for name, m in self._layers.items() if (weights := unit_weights(m)) is not None},
        )

    def _newborn_ratio(self) -> float | None:
        """Of the last additions, one interval later, while they are where they were born."""
        if self._surgery.young is None:
            return None
        try:
            ratio = newborn_ratio(self.net, self._surgery.young)
        except GrowthError:  # it is not where it was born any more
            return None
        return ratio if math.isfinite(ratio) else None

    def _learning_rate(self) -> float:
        groups = (group for o in self.optimizers for group in o.param_groups)
        return max((float(group["lr"]) for group in groups if "lr" in group), default=0.0)

    # --- saving ---

    def state_dict(self) -> dict:
        """Everything that decides what happens next; the model and the optimizer are saved beside it."""
        return state_of(self)

    def load_state_dict(self, state: Mapping) -> None:
        """Continues where :meth:`state_dict` was taken. Load the model first: :func:`sparsenet.load` does both."""
        resume(self, state)
        self._know(self._graph())
        self._surgery.young = None
        self._watch.wanted, self._watch.batch = True, None
        self._arm()

    def fit_to(self, path: str | Path, state: Mapping) -> Callable[[], None]:
        """Gives the model the layers and sizes that it had when ``path`` was saved; returns what takes that back.

        Part of :func:`sparsenet.load`, which calls it before it looks at anything else. ``state``: of the Grower in it.
        """
        if state.get("insertions", [])[: len(self.insertions)] != self.insertions:
            raise ValueError("Grower: the file must be of this model, got one with other layers inserted")
        undo = fit_structure(self.net, self.optimizers, state["insertions"][len(self.insertions) :], path)
        self._layers = _layers_of(self.net)

        def back() -> None:
            undo()
            self._layers = _layers_of(self.net)

        return back


def _enough(now: Cost, target: Cost, freed: Cost) -> bool:
    return (now - freed).fits(target)


def _layers_of(net: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in net.named_modules() if unit_weights(module) is not None}


def _structure(layers: Mapping[str, nn.Module]) -> dict[str, tuple]:
    """By layer: the shape of its weight as a matrix or kernel, and the pattern of its blocks."""
    sparse = {name: m.pattern for name, m in layers.items() if isinstance(m, SparseLinear)}
    return {
        name: (sparse[name].shape, sparse[name]) if name in sparse else (tuple(m.weight.shape), None)
        for name, m in layers.items()
    }


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"Grower: {name} must be one of {', '.join(known)}, got {value!r}")


def _chosen(name: str, values: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    values = (values,) if isinstance(values, str) else tuple(values)
    for value in values:
        _one_of(name, value, known)
    return values
