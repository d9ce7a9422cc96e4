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
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsenet import distributed
from sparsenet.architecture.growth.account import Account
from sparsenet.architecture.growth.checking import (
    check_can_grow,
    check_fits,
    network_of,
    one_number,
    optimizers_of,
    smallest,
)
from sparsenet.architecture.growth.controller import Flow
from sparsenet.architecture.growth.deciding import Decider, Rules
from sparsenet.architecture.growth.diagnostics import newborn_ratio
from sparsenet.architecture.growth.events import Change, Event
from sparsenet.architecture.growth.fading import Fades
from sparsenet.architecture.growth.holding import Amount, Limits
from sparsenet.architecture.growth.losses import Losses
from sparsenet.architecture.growth.newborn import HOW
from sparsenet.architecture.growth.placing import GrowthError
from sparsenet.architecture.growth.restoring import fit_structure
from sparsenet.architecture.growth.saving import resume, state_of
from sparsenet.architecture.growth.shrinking import shrink
from sparsenet.architecture.growth.step_watch import StepWatch
from sparsenet.architecture.growth.stopping import ExtrapolatedGain
from sparsenet.architecture.growth.structure import Structure
from sparsenet.architecture.growth.surgery import Surgery
from sparsenet.architecture.growth.watch import IntervalScores, Operands, unit_and_block_products
from sparsenet.architecture.growth.worth import Worth
from sparsenet.limits import format_bytes, is_out_of_memory, release_heap
from sparsenet.memory.step_time import StepTimeModel
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
            kept for backward (or, where that is more, what the optimizer takes for a moment), at the batch size seen;
            the data are excluded. An amount such as ``"64MiB"``, or a function of the step that returns bytes. It may
            be set anew at any time.
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
            decided by the gradient in any case. Random units that are heard with ``zero`` weights at first end best
            (measured: docs/methods/growth.md).
        prune: ``fisher`` (Molchanov et al., 2019) or ``magnitude``.
        every: steps from decision to decision: small for continuous growth, large for growth in phases; the same code.
        grow_until: share of the training by which the limit may be used in full.
        density: up to which blocks are added to a block-sparse layer, and of its new rows and columns (which may have
            a fan-in of 64 in any case); the rest of the budget widens it. A wide layer of few blocks learns more than a
            narrow full one of the same bytes.
        turnover: share of each layer's blocks exchanged per 100 steps at the start, falling as a cosine to zero at
            three quarters of the training (RigL: Evci et al., 2020).
        idle: units worth less than this share of their layer's mean leave, in the first three quarters of the training.
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
        grow: str = "zero",
        prune: str = "fisher",
        every: int | None = None,
        grow_until: float = 0.25,
        density: float = 0.1,
        turnover: float = 0.3,
        idle: float = 1e-4,
        ramp: int | None = None,
        tolerance: float = 0.01,
        seed: int = 0,
        followers: Iterable[nn.Module] = (),
        opaque: Iterable[str] = (),
        sparsifier=None,
    ):
        self.model, self.optimizer, self.sparsifier = model, optimizer, sparsifier
        self.net = network_of(model)
        self.optimizers = optimizers_of(self.net, optimizer)
        _one_of("grow", grow, HOW)
        _one_of("prune", prune, ("fisher", "magnitude"))
        total = None if steps is None else as_integer("Grower", "steps", steps, at_least=1)
        default = 50 if total is None else min(100, max(10, total // 100))
        self.every = default if every is None else as_integer("Grower", "every", every, at_least=2)
        self.ramp = max(1, self.every // 2) if ramp is None else as_integer("Grower", "ramp", ramp, at_least=1)
        if self.ramp >= self.every:
            raise ValueError(f"Grower: ramp must be below every ({self.every}), got {self.ramp}")
        shares = {"density": density, "turnover": turnover, "idle": idle, "grow_until": grow_until}
        self.rules = Rules(
            levels=_chosen("levels", levels, LEVELS),
            every=self.every,
            steps=total,
            seed=as_integer("Grower", "seed", seed),
            **{name: as_number("Grower", name, share, within=(0, 1)) for name, share in shares.items()},
        )
        rows = None if batch_size is None else as_integer("Grower", "batch_size", batch_size, at_least=1)
        gain = ExtrapolatedGain(as_number("Grower", "tolerance", tolerance, within=(0, 1)))
        followers, opaque = tuple(followers), tuple(opaque)
        self.steps = 0
        self.done = False
        self.events: list[Event] = []
        self._still = 0  # decisions in a row that changed next to nothing
        self._operands: Operands | None = None
        self._losses = Losses(gain, validate)
        self._flow, self._fades, self._scores = Flow(), Fades(self.ramp), IntervalScores()
        self._worth = Worth(prune, self._scores)
        self._account = Account(self.net, self.optimizers, None, rows)
        self._limits = Limits(budget, parameters, None)
        self.step_ms = step_ms
        self._limits.later.clear()
        self._structure = Structure(self.net, opaque)
        graph = self._structure.latest
        frozen = check_can_grow(graph, self.rules.levels, bool(self._structure.sparse()))
        self._start = self._now = self._account.total(graph)  # without activations, until a batch was seen
        check_fits(self._now, self._limits.at(0))
        self._surgery = Surgery(model, optimizer, followers, opaque, sparsifier, grow, self._scores, self.rules.density)
        parts = self._structure, self._account, self._limits, self._surgery, self._worth, self._fades, self._flow
        self._decider = Decider(self.rules, *parts, [])
        self._watch = StepWatch(self.net, max(self.every, WINDOW))
        for name in frozen:
            logger.warning("Grower: layer %s is frozen, or is read by one that is: its units stay as they are", name)

    # --- what it is ---

    @property
    def budget(self) -> Callable[[int], float]:
        """Bytes as a function of the step."""
        return self._limits.budget

    @budget.setter
    def budget(self, amount: Amount) -> None:
        at_once = Limits(amount).budget(self.steps)
        if self.steps:
            graph = self._structure.graph()
            least = smallest(graph, self._account.ledger(graph), self.rules.levels).bytes
            if least > at_once:
                raise ValueError(
                    f"Grower: budget must be at least about {format_bytes(least)}, which the smallest network that "
                    f"this one can shrink to needs, got {format_bytes(at_once)}"
                )
        self._limits.set_budget(amount, self.steps)
        self._limits.later.pop("budget", None)
        if self._limits.fixed is not None:
            self._limits.later["budget"] = self._limits.fixed

    @property
    def parameters(self) -> float:
        """Most elements of all parameters, infinite where any number is allowed. May be set anew."""
        return self._limits.parameters

    @parameters.setter
    def parameters(self, most: float | None) -> None:
        self._limits.parameters = self._limits.later["parameters"] = most

    @property
    def step_ms(self) -> float:
        """Most milliseconds of a step, infinite where any number is allowed. May be set anew."""
        return self._limits.step_ms

    @step_ms.setter
    def step_ms(self, most: float | None) -> None:
        device = next((p.device.type for p in self.net.parameters() if p.device.type != "cpu"), "cpu")
        if most not in (None, math.inf) and device != "cpu":
            raise ValueError(f"Grower: step_ms must be None for a model on {device}: times are those of the CPU")
        self._limits.step_ms = self._limits.later["step_ms"] = most
        if self._limits.step_ms < math.inf and self._account.times is None:
            self._account.times = StepTimeModel(self.optimizers[0])

    @property
    def times(self) -> StepTimeModel | None:
        """The model of step times; None where there never was a limit of milliseconds."""
        return self._account.times

    @property
    def insertions(self) -> list[dict]:
        """Layers that were inserted: arguments of :func:`~sparsenet.architecture.growth.deepen`, in their order."""
        return self._decider.insertions

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
        noticed = self._notice(looks)
        if looks and not noticed and not self.done and all(p.grad is None for p in self.net.parameters()):
            raise RuntimeError("Grower: step must be called before the gradients are set to zero, got none")
        self.steps += 1
        if not self.done:
            self._losses.add(loss)
        self._fades.apply(self.steps, self._structure.layers)
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
            failed = loss = None
            try:
                loss = closure()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failed = error.with_traceback(None)  # its frames hold the activations
            why = "an allocation failed" if failed else self._limits.too_little(self._account)
            if not why:  # the optimizer's step has room as well
                return loss
            loss = loss if loss is None else loss.detach()
            self.net.zero_grad(set_to_none=True)
            release_heap()
            self._limits.cap = max(1.0, 0.75 * self._now.bytes)
            event = self._shrink(why)
            self.events.append(event)
            if not event.pruned:
                if failed is not None:
                    raise failed
                return closure()

    def close(self) -> None:
        """Takes its hooks off the model."""
        self._disarm()
        self._watch.close()

    # --- watching ---

    def _look(self) -> None:
        """Takes note of the gradients: of all units and blocks, and of what fades."""
        layers = self._structure.layers
        self._scores.observe(layers)
        if not self._fades.fades:
            return
        self._fades.look(self.steps, {f.layer: unit_and_block_products(layers[f.layer]) for f in self._fades.fades})
        middle = self._fades.begun + self.ramp // 2
        if middle <= self.steps < middle + max(1, self.every // LOOKS):
            for level, layer, count in self._fades.rescue(self._structure.graph, self.steps, layers):
                logger.info("Grower: step %d: %d fading %s of %s are kept after all", self.steps, count, level, layer)

    def _count(self) -> None:
        """Counts the activations of the first step, and of one with a larger batch than those before."""
        if not self._watch.seen and self.steps == 1:
            logger.warning("Grower: no forward pass of the model in training was seen: activations do not count")
        first = not self._account.counted
        if not distributed.any_rank(self._watch.batch is not None and (first or self._watch.larger)):
            return
        self._measure()
        self._now = self._account.total(self._structure.latest)
        if first:
            self._start = self._now
            check_fits(self._now, self._limits.at(self.steps))

    def _measure(self) -> None:
        """Every rank that kept a batch counts it, and the largest counts."""
        if self._watch.batch is not None:
            with self._watch.paused():
                self._account.measure(self._watch.batch, self._watch.most_rows)
            self._watch.batch, self._watch.larger = None, False
        if distributed.is_active():
            self._account.agree()

    def _arm(self) -> None:
        """Before a step that decides, has the operands of all layers kept."""
        self._disarm()
        if (self.steps + 1) % self.every == 0 and not self.done:
            self._operands = Operands(self._structure.layers.items())
            self._watch.wanted = self._account.stale

    def _disarm(self) -> None:
        if self._operands is not None:
            self._operands.close()
            self._operands = None

    def _notice(self, looks: bool) -> bool:
        """Whether others have changed the model since; what is known of units or blocks that moved is forgotten."""
        changed = self._structure.changed(thoroughly=looks)
        if not changed:
            return False
        if changed == "blocks":
            self._scores.forget_blocks()
            self._fades.drop_blocks()
        else:
            self._scores.clear()
            self._fades.begin(self.steps, [])
        self._disarm()
        graph, sizes = self._structure.graph(), self._structure.sizes
        self._structure.know(graph)
        self._account.follow(sizes, graph)
        self._now = self._account.total(graph)
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
        """One decision, unless what it would rest on is not finite or not there."""
        kept = {} if self._operands is None else self._operands.kept
        self._disarm()
        milliseconds = self._agreed_ms()
        if self.times is not None and self._account.layers and milliseconds > 0:
            self.times.observe(self._account.layers, milliseconds)
        self._measure()
        self._losses.end_interval()
        if reason := self._not_to_be_judged():
            logger.warning("Grower: step %d keeps the network: %s", self.steps, reason)
            self._scores.clear()
            return self._event((), reason)
        ratio = self._newborn_ratio()
        if self._flow.progress < 1.0:
            with self._watch.paused():
                self._losses.ask(self.net, self.steps)
        before = self._now.parameters
        decided = self._decider.decide(self.steps, kept, self._start, milliseconds, bool(self._losses.stopped))
        self._now = self._account.total(self._structure.latest)
        self._settle(before)
        if not self.done:
            self._decider.begin_fading(self.steps)
        self._scores.clear()
        predicted = -decided.gained * self._learning_rate() * self.every
        event = self._event(decided.changes, decided.reason or self._losses.stopped, predicted, ratio)
        if broken := self._limits.broken(self.steps, self._now, None, None):  # more than was predicted
            self.events.append(event)
            event = self._shrink(broken)
        return event

    def _not_to_be_judged(self) -> str:
        """Why no decision is made on what was seen; empty if one is."""
        bad = self._scores.not_finite()
        if distributed.any_rank(bool(bad)):
            return f"scores of layer {bad or 'another rank'} hold NaN or Inf"
        if not self._losses.finite:
            return "the loss holds NaN or Inf"
        if distributed.any_rank(self._scores.all_zero()):
            return "all gradients are zero; were they set to zero before Grower.step?"
        return ""

    def _settle(self, before: float) -> None:
        """Whether everything is done; ``before``: parameters before the decision."""
        net = abs(self._now.parameters - before) / max(before, 1.0)
        self._still = self._still + 1 if net <= 0.005 else 0
        if self.rules.steps is None:
            self.done = self._still >= SETTLED and (bool(self._losses.stopped) or self._flow.progress >= 1.0)
        else:
            self.done = self.steps + self.every > self.rules.steps

    def _shrink(self, why: str) -> Event:
        """What fades goes, then the lowest-scored units and blocks, now, until the limits hold."""
        before = self._now
        self._disarm()
        target = self._limits.to_shrink_to(why, self.steps, before, self._agreed_ms(), self._account)
        parts = self._structure, self._account, self._surgery, self._worth, self._fades
        changes = shrink(*parts, self.rules.levels, target, why)
        self._now = self._account.total(self._structure.latest)
        self._watch.seconds = []
        words = self.steps, why, format_bytes(before.bytes), format_bytes(self._now.bytes)
        logger.warning("Grower: step %d: %s: shrinks from %s to %s", *words)
        if not self._now.fits(target):
            logger.warning("Grower: step %d: the limit does not hold, and nothing more can go", self.steps)
        return self._event(changes, why)

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
            seen=self._losses.change,
            newborn_ratio=ratio,
            reason=reason,
            units=self._structure.rows(),
        )

    def _newborn_ratio(self) -> float | None:
        """Of the last additions, one interval later, while they are where they were born."""
        if self._surgery.young is None:
            return None
        try:
            ratio = newborn_ratio(self.model, self._surgery.young)
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
        """Continues where :meth:`state_dict` was taken. Load the model first: :func:`sparsenet.load` does both.

        Amounts that were set in mid-training hold again; a function of the step that was must be set anew.
        """
        resume(self, state)
        self._structure.know(self._structure.graph())
        self._surgery.young = None
        self._watch.wanted, self._watch.batch = True, None
        self._arm()

    def fit_to(self, path: str | Path, state: Mapping) -> Callable[[], None]:
        """Gives the model the layers and sizes that it had when ``path`` was saved; returns what takes that back.

        Part of :func:`sparsenet.load`, which calls it before it looks at anything else. ``state``: of the Grower in it.
        """
        if state.get("insertions", [])[: len(self.insertions)] != self.insertions:
            raise ValueError("Grower: the file must be of this model, got one with other layers inserted")
        return fit_structure(self.net, self.optimizers, state["insertions"][len(self.insertions) :], path)


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"Grower: {name} must be one of {', '.join(known)}, got {value!r}")


def _chosen(name: str, values: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    values = (values,) if isinstance(values, str) else tuple(values)
    for value in values:
        _one_of(name, value, known)
    return values
