"""The Grower: a network that grows and prunes itself while it trains, inside a budget of bytes and milliseconds.

Between decisions it only looks: at gradients, losses and the clock. A decision reads what they say, lets what has faded
go, hands out what is free of the budget to whatever gains most per byte (or millisecond), and chooses what fades next.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsenet import distributed
from sparsenet.architecture.growth.candidates import candidates, growable_layers
from sparsenet.architecture.growth.controller import Candidate, Flow, allotted
from sparsenet.architecture.growth.diagnostics import newborn_ratio
from sparsenet.architecture.growth.events import Change, Event
from sparsenet.architecture.growth.fading import Fade, Fades, group_of
from sparsenet.architecture.growth.idle import fading_blocks, idle_units
from sparsenet.architecture.growth.ledger import Cost, Ledger, as_is
from sparsenet.architecture.growth.newborn import HOW
from sparsenet.architecture.growth.pace import Pace
from sparsenet.architecture.growth.placing import GrowthError, growable, readers
from sparsenet.architecture.growth.restoring import fit_structure
from sparsenet.architecture.growth.shrinking import choose_leaving
from sparsenet.architecture.growth.stopping import ExtrapolatedGain
from sparsenet.architecture.growth.surgery import Surgery
from sparsenet.architecture.growth.watch import IntervalScores, Operands, unit_and_block_products
from sparsenet.compaction.compacting import plain_model
from sparsenet.compaction.graph import UnitGraph
from sparsenet.compaction.weights import BlockWeights, unit_weights
from sparsenet.layers import SparseLinear
from sparsenet.limits import MemoryBudget, format_bytes, is_out_of_memory, process_limit
from sparsenet.memory.costs import layer_costs
from sparsenet.memory.network import step_bytes
from sparsenet.memory.step_time import StepTimeModel
from sparsenet.optimizer_state import as_optimizers, holds
from sparsenet.policies.places import layer_key
from sparsenet.schedules import as_integer, as_number

__all__ = ["Grower"]

logger = logging.getLogger(__name__)

LEVELS = ("blocks", "units", "layers")
LOOKS = 8  # at gradients, in an interval
SETTLED = 8  # decisions without a change after which a training of unknown length is done
KEPT_FREE = 0.1  # of what a limit of the process leaves: others allocate too
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
        step_ms: milliseconds of one training step (from the model's forward to :meth:`step`), or None.
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

    Call :meth:`step` after every ``optimizer.step()`` and before the gradients are set to zero.

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
        budget: str | int | MemoryBudget | Callable[[int], float] = "64MiB",
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
        self.optimizers = as_optimizers(optimizer)
        self.net = _plain(model)
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
        self.parameters = math.inf if parameters is None else as_integer("Grower", "parameters", parameters, at_least=1)
        self.step_ms = math.inf if step_ms is None else as_number("Grower", "step_ms", step_ms, within=(0, math.inf))
        self.batch_size = None if batch_size is None else as_integer("Grower", "batch_size", batch_size, at_least=1)
        self.seed = as_integer("Grower", "seed", seed)
        self.followers, self.opaque = tuple(followers), tuple(opaque)
        self.gain = ExtrapolatedGain(as_number("Grower", "tolerance", tolerance, within=(0, 1)))
        self.times = StepTimeModel(self.optimizers[0]) if step_ms is not None else None
        self.steps = 0
        self.done = False
        self.events: list[Event] = []
        self.insertions: list[dict] = []
        self._flow = Flow()
        self._fades = Fades(self.ramp)
        self._pace = Pace()
        self._scores = IntervalScores()
        self._losses: list[Tensor | float] = []
        self._seen: list[float] = []  # mean loss of the last intervals
        self._still = 0  # decisions in a row that changed next to nothing
        self._stopped = ""  # why growth has ended
        self._activations: tuple[dict[str, int], int] = ({}, 0)
        self._costs: list = []
        self._said: set[str] = set()
        self._check_model()
        self._layers = _layers_of(self.net)
        self._surgery = Surgery(model, optimizer, self.followers, self.opaque, sparsifier, grow, self._scores)
        graph = self._graph()
        self._check_can_grow(graph)
        self._start = self._ledger(graph).total()  # without activations, until a batch was seen
        self._now = self._start
        self.budget = budget
        self._check_seed()
        self._watch: Operands | None = None
        self._batch: tuple | None = None
        self._began: float | None = None
        self._seconds: list[float] = []
        self._want_batch = True
        self._hook = _watch_forward(self)

    # --- what it is ---

    @property
    def budget(self) -> Callable[[int], float]:
        """Bytes as a function of the step."""
        return self._budget

    @budget.setter
    def budget(self, amount: str | int | MemoryBudget | Callable[[int], float]) -> None:
        if callable(amount):
            schedule = amount
        else:
            fixed = MemoryBudget(amount).bytes
            schedule = lambda step: fixed  # noqa: E731
        at_once = float(schedule(self.steps))
        if not math.isfinite(at_once) or at_once < 1:
            raise ValueError(f"Grower: budget must be at least 1 byte, got {at_once} at step {self.steps}")
        if self.steps:
            self._refuse_below_smallest(at_once)
        self._budget = schedule

    @property
    def bytes(self) -> int:
        """Of one training step, as predicted for the network as it is."""
        return round(self._now.bytes)

    @property
    def milliseconds(self) -> float:
        """Of one training step: the lower quartile of the last ones seen, since what else runs only adds; 0 before."""
        return 1e3 * sorted(self._seconds)[len(self._seconds) // 4] if self._seconds else 0.0

    # --- the step ---

    def step(self, loss: Tensor | float) -> Event | None:
        """Counts one optimizer step; decides when it is time, or at once where a limit is broken.

        Args:
            loss: of this step; a scalar.

        Returns:
            What was decided, or None between decisions.

        Raises:
            CompactionError, RuntimeError: an optimizer's state is not understood, or ranks disagree.
        """
        self.steps += 1
        self._clock()
        self._losses.append(loss.detach() if isinstance(loss, Tensor) else float(loss))
        self._fades.apply(self.steps, self._layers)
        if self._batch is not None and not self._activations[0]:
            self._measure()
            self._start = self._now = self._ledger(self._graph()).total()
            self._check_seed()
        if self.steps % max(1, self.every // LOOKS) == 0 and not self.done:
            self._look()
        event = None
        broken = self._broken()
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
        each try; raises the error of the last one where nothing more can go.

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
        while True:
            try:
                return closure()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = error
            self.net.zero_grad(set_to_none=True)
            smaller = 0.75 * self._now.bytes
            event = self._shrink("an allocation failed", limit=smaller)
            self.events.append(event)
            if not event.pruned:
                raise failed
            self.budget = max(1, round(smaller))

    def close(self) -> None:
        """Takes its hooks off the model."""
        self._disarm()
        self._hook.remove()

    # --- watching ---

    def _clock(self) -> None:
        if self._began is not None:
            self._seconds.append(time.perf_counter() - self._began)
            self._seconds = self._seconds[-max(self.every, WINDOW) :]
        self._began = None

    def _look(self) -> None:
        """Takes note of the gradients: of all units and blocks, and of what fades."""
        self._scores.observe(self._layers)
        if not self._fades.fades:
            return
        products = {f.layer: unit_and_block_products(self._layers[f.layer]) for f in self._fades.fades}
        self._fades.look(self.steps, products)
        middle = self._fades.begun + self.ramp // 2
        if middle <= self.steps < middle + max(1, self.every // LOOKS):
            graph = self._graph()
            for level, layer, count in self._fades.rescue(graph, self.steps, self._layers):
                logger.info("Grower: step %d: %d fading %s of %s are kept after all", self.steps, count, level, layer)

    def _arm(self) -> None:
        """Before a step that decides, has the operands of all layers kept."""
        self._disarm()
        if (self.steps + 1) % self.every == 0 and not self.done:
            self._watch = Operands(self._layers.items())
            self._want_batch = True

    def _disarm(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def _measure(self) -> None:
        """Counts the activations of a step, by a forward pass of its own over the last batch; learns its time."""
        if self.times is not None and self._costs and self._seconds:
            self.times.observe(self._costs, self.milliseconds)
        if self._batch is None:
            return
        counted = step_bytes(self.net, self.optimizers, self._batch)
        items = counted.items
        rows = len(next(t for t in self._batch if isinstance(t, Tensor)))
        factor = 1.0 if self.batch_size is None else max(1.0, self.batch_size / max(rows, 1))
        by_module = {name: round(n * factor) for name, n in counted.activation_bytes.items()}
        others = items["activations"] - sum(counted.activation_bytes.values()) + items["outputs"]
        self._activations = by_module, round(others * factor)
        self._costs = layer_costs(self.net, self._batch)  # milliseconds are of the batch that was seen
        self._batch = None

    def _ledger(self, graph: UnitGraph) -> Ledger:
        return Ledger(graph, self.optimizers, *self._activations, self._costs, self.times)

    # --- limits ---

    def limit(self) -> Cost:
        """What a step may cost until the next decision."""
        budget = min(float(self._budget(step)) for step in (self.steps, self.steps + self.every))
        return Cost(min(budget, self._pace.most_bytes(self.step_ms)), self.parameters, self.step_ms)

    def _broken(self) -> str:
        """The limit that the network is above, in words; empty if none."""
        budget = float(self._budget(self.steps))
        if self._now.bytes > budget:
            return f"the budget is {format_bytes(budget)}"
        if self.steps % max(1, self.every // LOOKS) == 0:
            left = process_limit()
            needed = self._activations[1] + sum(self._activations[0].values())
            if left.bytes_left < needed:
                return f"{left.why} leaves {format_bytes(max(0, left.bytes_left))}"
        if len(self._seconds) >= max(self.every, WINDOW) and self._pace.too_slow(self.milliseconds, self.step_ms):
            return f"a step takes {self.milliseconds:.3g} ms of {self.step_ms:.3g}"
        return ""

    def _agreed(self, cost: Cost) -> Cost:
        """The largest of all ranks."""
        if not distributed.is_active():
            return cost
        return Cost(*distributed.largest(torch.tensor(cost.parts, dtype=torch.float64)).tolist())

    # --- deciding ---

    def _decide(self) -> Event:
        """One decision: what faded goes, what is worth it is born, what is idle begins to fade."""
        self._measure()
        self._ask_for_the_loss()
        bad = self._scores.not_finite()
        if bad or not (self._seen and math.isfinite(self._seen[-1])):
            what = f"scores of layer {bad} hold" if bad else "the loss holds"
            logger.warning("Grower: step %d keeps the network: %s NaN or Inf", self.steps, what)
            self._scores.clear()
            return self._event((), f"{what} NaN or Inf")
        graph = self._decided_on = self._graph()
        ledger = self._ledger(graph)
        ratio = self._newborn_ratio()
        self._ask_whether_growth_pays()
        self._flow.advance(self.steps, self.total_steps, self.grow_until)
        kept, sparse = self._kept(), self._sparse()
        leaving = {level: {f.layer: f.items for f in self._fades.fades if f.level == level} for level in LEVELS}
        turned = {name: len(items) for name, items in leaving["blocks"].items()}
        limit, total = self.limit(), self._agreed(ledger.total())
        freed = sum((ledger.unit(name) * len(items) for name, items in leaving["units"].items()), Cost())
        seed = layer_key(self.seed, self.steps, "births") & 0x7FFFFFFF
        offers = [] if self._stopped else candidates(graph, ledger, kept, self.levels, self.density, seed)
        counts = allotted(offers, self._room(total - freed, limit), limit, self._flow)
        gains = {c.key: c.gain for c in offers}
        units, more = self._within(ledger, offers, counts, limit - (total - freed))
        blocks = {name: more.get(name, 0) + turned.get(name, 0) for name in sparse}
        layers = [c.layer for c in offers if c.level == "layers" and c.key in counts]
        pairs = {n: (kept[n], kept[r]) for n in units if (r := self._reader_kept(ledger, n, kept))}
        self._fades.begin(self.steps, [])
        changes = self._surgery.exchange(sparse, leaving["blocks"], blocks, kept)
        removed = self._surgery.remove_units(leaving["units"], "faded")
        operands = {
            name: (x, grad_output)
            for name, ((x, _), (_, grad_output)) in pairs.items()
            if not removed or self._layers[name].in_features == x.shape[1]
        }
        changes += removed + self._surgery.widen(units, operands, {n: gains[f"units {n}"] for n in units}, seed)
        for name in layers[:1]:
            added, insertion = self._surgery.deepen(name, gains[f"layers {name}"], seed)
            self.insertions.append(insertion)
            changes += added
        predicted = -sum(c.gain * c.grown for c in changes) * self._learning_rate() * self.every
        self._layers = _layers_of(self.net)
        if any(c.level != "blocks" for c in changes):
            graph = self._graph()
        self._begin_fading(graph, {c.layer for c in changes if c.level == "units"})
        self._scores.clear()
        event = self._settle(graph, changes, total, predicted, ratio)
        broken = self._broken() if self._now.bytes > limit.bytes else ""  # more than was predicted
        if broken:
            self.events.append(event)
            event = self._shrink(broken)
        return event

    def _within(
        self, ledger: Ledger, offers: Sequence[Candidate], counts: Mapping[str, int], left: Cost
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Units and blocks by layer, as many as were allotted, or fewer if together they would pass what is left."""
        share = 1.0
        while share > 0.01:
            units, blocks = {}, {}
            for offer in offers:
                count = int(share * counts.get(offer.key, 0)) // offer.group * offer.group
                if offer.level == "units":  # so many that the last block of the layer is full
                    count -= unit_weights(self._layers[offer.layer]).rows % offer.group if count else 0
                if count > 0 and offer.level != "layers":
                    (units if offer.level == "units" else blocks)[offer.layer] = count
            if ledger.grown(units, blocks).fits(left):
                return units, blocks
            share *= 0.8
        return {}, {}

    def _graph(self) -> UnitGraph:
        return UnitGraph(self.net, self.opaque, zeros=False)

    def _reader_kept(self, ledger: Ledger, name: str, kept: Mapping) -> str:
        """The one layer that reads ``name``, where its operands and those of ``name`` were kept; else empty."""
        heard = readers(ledger.graph, name)
        known = len(heard) == 1 and heard[0] in kept and name in kept
        alike = known and ledger.stages[heard[0]].inputs.units.equal(ledger.stages[name].outputs.units)
        return heard[0] if alike else ""

    def _begin_fading(self, graph: UnitGraph, changed: set[str]) -> None:
        """Chooses what leaves until the next decision: blocks by turnover, units that are idle."""
        fades: list[Fade | None] = []
        if "blocks" in self.levels and self._turns():
            share = self.turnover / 2 * (1 + math.cos(math.pi * self.steps / self._turn_end())) * self.every / 100
            for name, layer in self._sparse().items():
                count, places = layer.pattern.num_blocks, layer.pattern.block_rows * layer.pattern.block_cols
                asked = self._flow.whole(f"turnover {name}", min(share * count, places - count))
                fades.append(fading_blocks(name, layer, self._block_scores(name), min(asked, count)))
        if "units" in self.levels and self.idle:
            fades += [idle_units(graph, name, self._unit_scores(name), self.idle) for name in growable_layers(graph)]
        self._fades.begin(self.steps, [fade for fade in fades if fade is not None])

    def _room(self, total: Cost, limit: Cost) -> Cost:
        """What may be spent now: from the cost at present to the target on the way to the limit."""
        parts = zip(self._start.parts, limit.parts, total.parts, strict=True)
        room = Cost(*(_target(start, most, self._flow.progress) - now for start, most, now in parts))
        now = max(total.milliseconds, self.milliseconds)
        return replace(room, milliseconds=min(room.milliseconds, self._pace.room(now, self.step_ms)))

    def _ask_for_the_loss(self) -> None:
        """The mean of the interval's losses joins those seen; the last two are kept."""
        if not self._losses:
            return
        losses = torch.stack([torch.as_tensor(x, dtype=torch.float64, device="cpu").reshape(()) for x in self._losses])
        mean = distributed.averaged(losses.mean()) if distributed.is_active() else losses.mean()
        self._losses = []
        self._seen = [*self._seen[-1:], float(mean)]

    def _ask_whether_growth_pays(self) -> None:
        """Asks for the held-out loss, and stops growth that no longer pays."""
        if self.validate is None or self._stopped or self._flow.progress >= 1.0:
            return
        size = float(sum(p.numel() for p in self.net.parameters()))
        training = {module: module.training for module in self.net.modules()}
        try:
            with torch.no_grad():
                loss = torch.tensor(float(self.validate()), dtype=torch.float64)
        finally:
            for module, was in training.items():
                module.training = was
        self.gain.observe(size, float(distributed.averaged(loss) if distributed.is_active() else loss))
        if not self.gain.useful():
            self._stopped = (
                f"the next enlargement is predicted to gain {self.gain.predicted():.2%} of the held-out loss"
            )
            logger.info("Grower: step %d: growth ends: %s", self.steps, self._stopped)

    def _kept(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The operands of the last step, of all ranks together."""
        kept = self._watch.kept if self._watch is not None else {}
        if distributed.is_active():
            kept = {name: distributed.gather_operands(*kept[name]) for name in self._layers if name in kept}
        return kept

    def _sparse(self) -> dict[str, SparseLinear]:
        return {n: m for n, m in self._layers.items() if isinstance(m, SparseLinear) and m.values.requires_grad}

    def _turns(self) -> bool:
        return self.turnover > 0 and self.steps < self._turn_end()

    def _turn_end(self) -> float:
        return 0.75 * self.total_steps if self.total_steps is not None else math.inf

    def _unit_scores(self, name: str) -> Tensor | None:
        if self.prune == "fisher":
            scores = self._scores.units(name)
        else:
            weights = (
                self._layers[name].values if isinstance(self._layers[name], SparseLinear) else self._layers[name].weight
            )
            scores = _row_squares(self._layers[name]) if weights.numel() else None
        return None if scores is None else distributed.averaged(scores) if distributed.is_active() else scores

    def _block_scores(self, name: str) -> Tensor | None:
        scores = self._scores.blocks(name)
        if self.prune == "magnitude" and scores is not None:
            young = torch.isinf(scores)
            scores = torch.where(young, scores, self._layers[name].values.detach().float().square().sum((1, 2)))
        return None if scores is None else distributed.averaged(scores) if distributed.is_active() else scores

    # --- shrinking at once ---

    def _shrink(self, why: str, limit: float | None = None) -> Event:
        """The lowest-scored units and blocks go, now, until the limits hold."""
        before, changes = self._now, []
        self._disarm()
        limits = self.limit()
        budget = min(float(self._budget(self.steps)), limits.bytes) if limit is None else limit
        left = process_limit().bytes_left
        needed = self._activations[1] + sum(self._activations[0].values())
        if left < needed and limit is None:
            budget = min(budget, self._now.bytes - (needed - left) * (1 + KEPT_FREE))
        if why.startswith("a step takes"):
            budget = min(budget, self._pace.shrunk(self._now.bytes, self.milliseconds, self.step_ms))
        target = Cost(budget, self.parameters, math.inf)
        for _ in range(12):
            graph = self._graph()
            ledger = self._ledger(graph)
            now = self._agreed(ledger.total())
            if now.fits(target):
                break
            units, blocks = self._worth(graph)
            leaving = choose_leaving(graph, ledger, list(units), units, blocks, partial(_enough, now, target))
            if not leaving.units and not leaving.blocks:
                break
            changes += self._surgery.blocks(self._sparse(), leaving.blocks, why)
            changes += self._surgery.remove_units(leaving.units, why)
            self._rescale(graph)
        self._fades.begin(self.steps, [])
        self._now = self._agreed(self._ledger(self._graph()).total())
        self._seconds = []
        logger.warning(
            "Grower: step %d: %s: shrinks from %s to %s",
            self.steps,
            why,
            format_bytes(before.bytes),
            format_bytes(self._now.bytes),
        )
        return self._event(_together(changes), why)

    def _worth(self, graph: UnitGraph) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Scores of all units and all blocks that may go; squared weights where none are known yet."""
        units, blocks = {}, {}
        for name in growable_layers(graph) if "units" in self.levels else ():
            scores = self._unit_scores(name)
            units[name] = _row_squares(self._layers[name]) if scores is None else scores
        for name, layer in self._sparse().items() if "blocks" in self.levels else ():
            scores = self._block_scores(name)
            known = scores is not None and len(scores) == layer.pattern.num_blocks
            blocks[name] = scores if known else layer.values.detach().float().square().sum((1, 2))
        return units, blocks

    def _rescale(self, before: UnitGraph) -> None:
        """Activations go with the outputs of the modules that they are of, until they are counted again."""
        sizes = {stage.name: len(stage.outputs.units) for stage in before.stages}
        after = {stage.name: len(stage.outputs.units) for stage in self._graph().stages}
        by_module, fixed = self._activations
        scaled = {n: round(size * after.get(n, 1) / max(sizes.get(n, 1), 1)) for n, size in by_module.items()}
        self._activations = scaled, fixed
        self._costs = [as_is(cost, self.net) for cost in self._costs]

    # --- what it says ---

    def _settle(
        self, before: UnitGraph, changes: list[Change], total: Cost, predicted: float, ratio: float | None
    ) -> Event:
        """The event, the costs as they are now, and whether everything is done."""
        if any(change.level != "blocks" or change.grown != change.pruned for change in changes):
            self._want_batch = True
            self._rescale(self._decided_on)
        self._now = self._agreed(self._ledger(before).total())
        net = abs(self._now.parameters - total.parameters) / max(total.parameters, 1.0)
        self._still = self._still + 1 if net <= 0.005 else 0
        if self.total_steps is None:
            self.done = self._still >= SETTLED and (bool(self._stopped) or self._flow.progress >= 1.0)
        else:
            self.done = self.steps + self.every > self.total_steps
        return self._event(tuple(changes), self._stopped, predicted, ratio)

    def _event(
        self, changes: Sequence[Change], reason: str, predicted: float = 0.0, ratio: float | None = None
    ) -> Event:
        return Event(
            step=self.steps,
            changes=tuple(changes),
            bytes=round(self._now.bytes),
            parameters=round(self._now.parameters),
            milliseconds=self.milliseconds,
            limit_bytes=round(float(self._budget(self.steps))),
            predicted=predicted,
            seen=self._seen[-1] - self._seen[-2] if len(self._seen) == 2 else None,
            newborn_ratio=ratio,
            reason=reason,
            units={name: weights.rows for name, m in self._layers.items() if (weights := unit_weights(m)) is not None},
        )

    def _newborn_ratio(self) -> float | None:
        """Of the last additions, while they are where they were born."""
        if self._surgery.young is None:
            return None
        try:
            ratio = newborn_ratio(self.net, self._surgery.young)
        except GrowthError:  # it is not where it was born any more
            return None
        return ratio if math.isfinite(ratio) else None

    def _learning_rate(self) -> float:
        return max(
            (float(group["lr"]) for o in self.optimizers for group in o.param_groups if "lr" in group), default=0.0
        )

    # --- checks ---

    def _check_model(self) -> None:
        if not self.optimizers:
            raise ValueError("Grower: optimizer must hold the model's parameters, got None")
        for name, p in self.net.named_parameters():
            if p.requires_grad and not any(holds(o, p) for o in self.optimizers):
                raise ValueError(f"Grower: optimizer must hold every trainable parameter, got none for {name!r}")

    def _check_can_grow(self, graph: UnitGraph) -> None:
        """Raises where nothing could ever change, with the reasons."""
        reasons = growable(self.net, graph)
        sparse = "blocks" in self.levels and bool(self._sparse())
        if not sparse and all(reasons.values()):
            said = (
                "; ".join(f"{name!r}: {reason}" for name, reason in reasons.items())
                or "it has no linear layer or convolution"
            )
            raise ValueError(f"Grower: model must have a layer whose units can change, got {said}")

    def _check_seed(self) -> None:
        budget = float(self._budget(self.steps))
        if not self._now.fits(Cost(budget, self.parameters, math.inf)):
            raise ValueError(
                f"Grower: budget must be at least {format_bytes(self._now.bytes)} and {round(self._now.parameters)} "
                f"parameters, which the network needs as it is, got {format_bytes(budget)}; lower it afterwards "
                "(grower.budget = ...) and the network shrinks"
            )

    def _refuse_below_smallest(self, budget: float) -> None:
        """A budget that not even one group of units in every layer would fit."""
        graph = self._graph()
        ledger = self._ledger(graph)
        least = ledger.total()
        for name in growable_layers(graph) if "units" in self.levels else ():
            count = len(ledger.classes_of(name)) - group_of(graph, name)
            least = least - ledger.unit(name) * max(0, count)
        if least.bytes > budget:
            raise ValueError(
                f"Grower: budget must be at least about {format_bytes(least.bytes)}, which the smallest network that "
                f"this one can shrink to needs, got {format_bytes(budget)}"
            )

    # --- saving ---

    def state_dict(self) -> dict:
        """Everything that decides what happens next; the model and the optimizer are saved beside it."""
        return {
            "steps": self.steps,
            "seed": self.seed,
            "done": self.done,
            "start": list(self._start.parts),
            "now": list(self._now.parts),
            "flow": {"progress": self._flow.progress, "credit": dict(self._flow.credit)},
            "fades": self._fades.state_dict(),
            "scores": self._scores.state_dict(),
            "gain": [list(point) for point in self.gain.points],
            "losses": [float(loss) for loss in self._losses],
            "seen": list(self._seen),
            "still": self._still,
            "stopped": self._stopped,
            "activations": [dict(self._activations[0]), self._activations[1]],
            "insertions": [dict(each) for each in self.insertions],
            "pace": self._pace.state_dict(),
            "times": None if self.times is None else self.times.state_dict(),
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Continues where :meth:`state_dict` was taken. Load the model first: :func:`sparsenet.load` does both."""
        for key in ("steps", "seed"):
            if not isinstance(state.get(key), int):
                raise ValueError(f"Grower: state must have an integer {key!r}, got {state.get(key)!r}")
        self.steps, self.seed, self.done = state["steps"], state["seed"], state["done"]
        self._start, self._now = Cost(*state["start"]), Cost(*state["now"])
        self._flow = Flow(state["flow"]["progress"], dict(state["flow"]["credit"]))
        self._fades.load_state_dict(state["fades"])
        self._scores.load_state_dict(state["scores"])
        self.gain.points = [tuple(point) for point in state["gain"]]
        self._losses, self._seen = list(state["losses"]), list(state["seen"])
        self._still, self._stopped = state["still"], state["stopped"]
        self._activations = dict(state["activations"][0]), state["activations"][1]
        self.insertions = [dict(each) for each in state["insertions"]]
        self._pace = Pace(**state["pace"])
        if self.times is not None and state["times"] is not None:
            self.times.load_state_dict(state["times"])
        self._layers = _layers_of(self.net)
        self._surgery.young, self._seconds = None, []
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


# --- helpers ----------------------------------------------------------------------------------------------------------


def _plain(model: nn.Module) -> nn.Module:
    if "_orig_mod" in model._modules:
        raise ValueError(
            "Grower: model must not be compiled while it grows: every change of shape compiles anew; compile it when "
            "the grower is done"
        )
    return plain_model(model)


def _target(start: float, most: float, progress: float) -> float:
    return most if math.isinf(most) or most <= start else start + progress * (most - start)


def _enough(now: Cost, target: Cost, freed: Cost) -> bool:
    return (now - freed).fits(target)


def _layers_of(net: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in net.named_modules() if unit_weights(module) is not None}


def _row_squares(module: nn.Module) -> Tensor:
    weights = unit_weights(module)
    if isinstance(weights, BlockWeights):
        return weights.line_squares(rows=True).float()
    return module.weight.detach().float().flatten(1).square().sum(1)


def _watch_forward(grower: Grower):
    """Notes when a step began, and keeps the inputs of one forward pass when they are wanted."""
    this = weakref.ref(grower)

    def before(module: nn.Module, args: tuple) -> None:
        owner = this()
        if owner is None or module is not owner.net or not module.training:
            return
        if owner._began is None:
            owner._began = time.perf_counter()
        if owner._want_batch and args:
            owner._batch, owner._want_batch = args, False

    return grower.net.register_forward_pre_hook(before)


def _together(changes: Sequence[Change]) -> tuple[Change, ...]:
    """One change by layer and level."""
    found: dict[tuple[str, str], Change] = {}
    for c in changes:
        key = c.level, c.layer
        before = found.get(key)
        found[key] = (
            c if before is None else replace(before, grown=before.grown + c.grown, pruned=before.pruned + c.pruned)
        )
    return tuple(found.values())


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"Grower: {name} must be one of {', '.join(known)}, got {value!r}")


def _chosen(name: str, values: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    values = (values,) if isinstance(values, str) else tuple(values)
    for value in values:
        _one_of(name, value, known)
    return values
