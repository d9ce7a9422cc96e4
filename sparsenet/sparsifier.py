"""The Sparsifier: rewires a model and its optimizer while they train."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsenet import distributed
from sparsenet.layers import SparseLinear, sparse_layers
from sparsenet.limits import MemoryBudget, is_out_of_memory
from sparsenet.optimizer_state import (
    LayerMove,
    StatesOfLayers,
    as_optimizers,
    check_followable,
    check_grown_state,
    with_inner_optimizers,
)
from sparsenet.pattern import BlockPattern
from sparsenet.policies.census import Census
from sparsenet.policies.choosing import Plan, drop_scores, planned
from sparsenet.policies.exchange import LayerUpdate, Newborn, Quota, Update
from sparsenet.policies.growth import Growth, steps_watched
from sparsenet.policies.holding import Holding
from sparsenet.policies.participants import distinct_layers, follower_layers, refuse_unheld
from sparsenet.policies.places import BadScores, layer_key
from sparsenet.policies.policy import Policy
from sparsenet.policies.spreading import GLOBAL, Distribution, checked_distribution
from sparsenet.policies.state import PolicyState
from sparsenet.policies.views import ElementView, View
from sparsenet.saliency import LastCall
from sparsenet.schedules import Complement, Constant, as_integer, as_schedule, last_step
from sparsenet.topology import warn_about_averages

__all__ = ["LayerUpdate", "Sparsifier", "Update"]

logger = logging.getLogger(__name__)


class Sparsifier:
    """Applies a policy on a schedule to the sparse layers of a model and to its optimizer's state.

    Args:
        model: holds the :class:`SparseLinear` layers (wrappers such as DistributedDataParallel are looked through).
            Frozen layers (``requires_grad=False``) are left alone.
        optimizer: any ``torch.optim`` optimizer, several, or None for a model that nobody trains. Together they must
            hold the values of every trainable layer. State tensors with one entry per block follow their blocks,
            those of optimizers inside optimizers too, also when somebody else changes a pattern: loads an earlier
            state, or calls ``set_pattern``.
        policy: which blocks go and which come.
        density: of all rewired layers together at each step, in weights; a number, a schedule, or None to keep every
            layer's count. The last rewire before ``end`` takes the density of step ``end``.
        distribution: how ``density`` is spread over the layers: None (in the proportions that they have now), a name
            (``uniform``, ``erdos_renyi``, ``memory``), relative densities by layer name, or a function that makes them
            of the layers. No count rises while the total falls, and none falls while it rises. ``global``: while the
            total falls, blocks leave by their drop scores per weight, compared over all layers.
        every, begin, end: the n-th :meth:`step` rewires when ``begin < n <= end`` and ``(n - begin) % every == 0``.
        grace: the number of rewires that a grown block outlasts, whatever its score. New weights start at zero, so that
            at 0 a policy that drops the smallest drops much of what it grew at the rewire before. Default: 1 where the
            policy's ``drop_fraction`` is a schedule; 0 where it is one number, because then so many blocks would always
            be too young. A falling density takes young blocks where it finds no others.
        seed: of random growth. Random numbers depend on seed, step, layer and place, not on a generator's history.
        followers: averaged copies of the model (``torch.optim.swa_utils.AveragedModel`` or a deepcopy): at every rewire
            their blocks go and come as the model's.
        grown_state: what grown blocks' optimizer state starts with, by state name: ``zero``, ``mean`` of the others, or
            a share of that mean; default what the optimizer gives a new parameter: zero for moments, the learning rate
            for Rprop's step sizes. With a zero second moment, Adam's first steps on blocks that are grown late in
            training are several times too large; ``{"exp_avg_sq": 0.1}`` makes them smaller (in our own measurements
            that gained nothing: docs/training.md).
        elements: whether layers with an element mask are rewired element by element inside their stored blocks, the
            density then being that of elements; a block whose last element leaves is stored no longer, and N:M masks
            exchange elements inside their groups. Default: block by block; a block that grows gets N of every M
            elements, or so many that the share of active elements in stored blocks stays.
        sparsity: alias, ``1 - density``.
        budget: bytes of a training step that the blocks keep within, as ``"512MiB"``; None: no limit. It counts values,
            gradients, optimizer state, indices, other parameters, buffers, followers, the room of a rewire, and, once a
            forward pass in training mode was seen, activations. Growth ends where it is reached; where it is passed
            (:attr:`budget` may be set at any time), or the process's own limits leave too little for a rewire, the
            lowest-scored blocks leave at the next step, whatever ``every`` says.

    Raises:
        ValueError: no sparse layer, a parameter in two layers or in no optimizer, a number out of range, a follower of
            other patterns, an optimizer whose state cannot follow (LBFGS), a budget below what the sparsest network
            takes that reaches every neuron.

    The last block of a row of blocks never leaves where there are blocks enough for all rows, nor that of a column
    where there are enough for all columns. Where a falling density leaves too few, a warning says how many outputs and
    inputs have no weight.

    Call :meth:`step` after every ``optimizer.step()``.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 256, 10], density=0.2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(drop_fraction=0.3), every=2)
        >>> for _ in range(4):
        ...     loss = model(torch.randn(32, 64)).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     update = sparsifier.step()
        >>> update.dropped == update.grown > 0
        True
    """

    # entries of a state that another may lack
    optional_state = frozenset({"budget", "policy", "seen_bytes", "watched", "young"})

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None,
        policy: Policy,
        density: float | Callable[[int], float] | None = None,
        distribution: Distribution | None = None,
        every: int = 100,
        begin: int = 0,
        end: int | None = None,
        seed: int = 0,
        followers: Iterable[nn.Module] = (),
        *,
        grown_state: Mapping[str, str | float] | None = None,
        sparsity: float | Callable[[int], float] | None = None,
        budget: str | int | MemoryBudget | None = None,
        grace: int | None = None,
        elements: bool = False,
    ):
        if not isinstance(policy, Policy):
            raise TypeError(f"Sparsifier: policy must be a sparsenet Policy, got {policy!r}")
        self.model = model
        self.optimizer = optimizer
        self.policy = policy
        self.every = as_integer("Sparsifier", "every", every, at_least=1)
        self.begin = as_integer("Sparsifier", "begin", begin, at_least=0)
        self.end = None if end is None else as_integer("Sparsifier", "end", end, at_least=0)
        self.seed = as_integer("Sparsifier", "seed", seed)
        self.grown_state = check_grown_state(grown_state or {})
        self.optimizers = with_inner_optimizers(as_optimizers(optimizer))
        self.layers = distinct_layers(distributed.unwrap(model))
        distribution = checked_distribution(distribution, "Sparsifier", self.layers)
        self._census = Census(_density_schedule(density, sparsity), distribution, bool(elements))
        refuse_unheld(self.layers, self.optimizers)
        self.followers = (followers,) if isinstance(followers, nn.Module) else tuple(followers)
        self._follower_layers = follower_layers(self.followers, self.layers)
        distributed.assert_same_topology(model)
        self.steps = 0
        self._said: set[str] = set()
        self._growth: dict[str, Growth] = {}
        self._quotas: dict[str, Quota] = {}
        self._armed_for: int | None = None  # the step of the rewire that they are for
        self._policy_state = PolicyState()
        self._element_views: dict[str, ElementView] = {}
        if grace is None:
            grace = int(not isinstance(as_schedule(policy.drop_fraction), Constant))
        self._newborn = Newborn(as_integer("Sparsifier", "grace", grace, at_least=0))
        self._last_call = LastCall()
        self._without_step: frozenset[str] = frozenset()  # layers that no optimizer has stepped
        self._refuse_fixed()
        self._census.proportions = self._census.counts(self.layers)
        self._states = StatesOfLayers(self.optimizers, self.layers, self.grown_state)
        self._warn_if_idle()
        self._holding: Holding | None = None
        self.budget = budget
        self._arm()

    @property
    def density(self) -> Callable[[int], float] | None:
        """The density schedule."""
        return self._census.density

    @property
    def distribution(self) -> Distribution | None:
        """How the density is spread over the layers."""
        return self._census.distribution

    @property
    def grace(self) -> int:
        """The number of rewires that a grown block outlasts."""
        return self._newborn.grace

    # --- the budget ---

    @property
    def budget(self) -> MemoryBudget | None:
        """What a training step may take; see the class. It may be set at any time, and holds from the next step on."""
        return None if self._holding is None else self._holding.budget

    @budget.setter
    def budget(self, amount: str | int | MemoryBudget | None) -> None:
        seen = None if self._holding is None else self._holding.seen
        holding = self._hold(None if amount is None else MemoryBudget(amount), seen)
        self._holding = None if holding is None else holding.check()

    def _hold(self, budget: MemoryBudget | None, seen: Mapping[str, int] | None) -> Holding | None:
        if budget is None or not self.layers:
            return None
        layers, model = self._rewired(), distributed.unwrap(self.model)
        followers = self._follower_layers, self.followers
        return Holding(model, layers, self.optimizers, *followers, budget, seen, self.policy.kept_copies)

    @property
    def bytes(self) -> int | None:
        """Bytes that a training step is predicted to take, as :attr:`budget` counts them; None without a budget."""
        return None if self._holding is None else self._holding.bytes(self.policy.drop_fraction_at(self.steps + 1))

    def _keep_within_budget(self) -> Update | None:
        """Lets blocks go where there are too many, or else what is about to grow end where the budget does."""
        if self._holding is None:
            return None
        if self._holding.layers.keys() != self._rewired().keys():  # somebody froze a layer
            self._holding = self._hold(self._holding.budget, self._holding.seen)
        elif self._quotas:
            self._holding.measure()
        holding = self._holding
        if not holding.layers:
            return None
        holding.look()
        share = self.policy.drop_fraction_at(self.steps)
        wanted = self._census.wanted_blocks(holding.layers)
        counts = holding.shrunk(wanted, share)
        if counts is not None:
            return self._shrink(counts, share)
        now = holding.counts()
        still = Quota(0, 0, 0, 0)  # elements come and go inside blocks that are stored
        quotas = {
            name: still if self._census.by_elements(layer) else self._quotas.get(name, still)
            for name, layer in holding.layers.items()
        }
        targets = {name: now[name] - quota.drop + quota.grow for name, quota in quotas.items()}
        for name, count in holding.within(targets, wanted, share).items():
            less = targets[name] - count
            if less:
                quota = quotas[name]
                self._quotas[name] = replace(quota, grow=quota.grow - less, clamped=quota.clamped + less)
        return None

    def _shrink(self, counts: Mapping[str, int], share: float) -> Update:
        holding = self._holding
        for name in counts:
            for optimizer in self.optimizers:
                check_followable(optimizer, self.layers[name].values, name, self.layers[name].pattern.num_blocks)
        distributed.check_resizable(self.model, next(iter(counts)))
        views = {name: self._view(name, self.steps, blocks=True) for name in counts}
        done = holding.shrink(counts, self.policy, self.steps, views, share)
        updates = {}
        for name, (before, after) in done.items():
            self._say_what_died(name, before, after)
            left = before.linear_places()
            left = left[~torch.isin(left, after.linear_places())]
            updates[name] = LayerUpdate(left, left[:0], after.num_blocks, after.density)
        distributed.rebuild(self.model)
        self._states.mark()
        return Update(self.steps, updates)

    # --- the step ---

    def step(self) -> Update | None:
        """Counts one optimizer step and rewires when it is time.

        Returns:
            What was dropped and grown, per layer; None when this step does not rewire.

        Raises:
            RuntimeError: under DDP, ranks disagree (the layer is named) or the number of blocks would change; or an
                optimizer keeps state that cannot follow (the optimizer and the layer are named).

        Either every layer is rewired or none: an exception leaves patterns, values and optimizer state as they were.
        Layers whose scores are NaN or Inf, or that saw no gradient, are skipped and say so.
        """
        self.steps += 1
        rewires = self._rewires_at(self.steps)
        distributed.assert_same("the decision to rewire", int(rewires) + 2 * (self._holding is not None))
        self._states.follow()
        if self.policy.reads_gradient:
            self._without_step = self._states.without_step()
        self._after_step()
        update = None
        try:
            update = self._keep_within_budget()
            if rewires and update is None:
                update = self._rewire_or_shrink()
        finally:
            for growth in self._growth.values():
                growth.grow_older()
            self._arm()
        warn_about_averages(self.layers, self._follower_layers)
        return update

    def refresh(self) -> None:
        """Looks at the model again after something else changed its layers: compaction, folding."""
        model = distributed.unwrap(self.model)
        self.layers = distinct_layers(model) if sparse_layers(model) else {}
        self._newborn.clear()
        self._policy_state.clear()
        self._follower_layers = follower_layers(self.followers, self.layers)
        self._census.proportions = self._census.counts(self.layers)
        self._states = StatesOfLayers(self.optimizers, self.layers, self.grown_state)
        if self._holding is not None:
            self._holding = self._hold(self._holding.budget, self._holding.seen)
        self._arm()

    def _rewires_at(self, step: int) -> bool:
        inside = self.begin < step and (self.end is None or step <= self.end)
        return inside and (step - self.begin) % self.every == 0

    def _next_rewire(self) -> int | None:
        """The step of the next rewire."""
        step = max(self.steps, self.begin) + 1
        step += -(step - self.begin) % self.every
        return step if self._rewires_at(step) else None

    def _view(self, name: str, step: int, drop: int = 0, *, blocks: bool = False) -> View:
        """The layer as the policy sees it; ``blocks``: its blocks in any case, with what is known of them."""
        layer, key = self.layers[name], layer_key(self.seed, step, name)
        if not self._census.by_elements(layer) or blocks:
            view = View(name, layer, key, drop, step)
            view.state = {} if self._census.by_elements(layer) else self._policy_state.of(view)
            return view
        view = self._element_views.get(name)
        if view is None or not view.is_current():
            view = self._element_views[name] = ElementView(name, layer, key)
        view = copy.copy(view)
        view.key, view.drop, view.step, view.measured = key, drop, step, {}
        view.state = self._policy_state.of(view)
        return view

    def _after_step(self) -> None:
        """Lets a policy that wants to look at every step."""
        if not self.policy.every_step:
            return
        with torch.no_grad():
            for name in self._rewired():
                view = self._view(name, self.steps)
                view.has_step = name not in self._without_step
                with suppress(BadScores):  # no gradient at hand; it is said where a rewire would need it
                    self.policy.after_step(view)

    def _rewired(self) -> dict[str, SparseLinear]:
        """The layers that take part: trainable ones."""
        frozen = [name for name, layer in self.layers.items() if not layer.values.requires_grad]
        if frozen and "frozen" not in self._said:
            self._said.add("frozen")
            logger.warning("Sparsifier: frozen layers keep their topology: %s", ", ".join(map(repr, frozen)))
        return {name: layer for name, layer in self.layers.items() if layer.values.requires_grad}

    def _arm(self) -> None:
        """If a rewire is near, settles how many blocks move and has backward score the growth."""
        for layer in self.layers.values():
            layer.topology.observer = None
        self._last_call.remove()
        self._last_call = LastCall()
        step = self._next_rewire()
        if step is None or step - self.steps > steps_watched(self.policy):
            self._growth, self._quotas, self._armed_for = {}, {}, None
            self._policy_state.tidy()
            if not self.policy.every_step:
                self._element_views.clear()  # each is larger than its layer's mask
            return
        layers = self._rewired()
        ready = step == self._armed_for and self._growth.keys() == layers.keys()
        if not ready or not all(growth.is_current() for growth in self._growth.values()):
            self._prepare(step, layers)
        for name, growth in self._growth.items():
            if growth.watches_growth or (growth.watches_drops and step == self.steps + 1):
                layers[name].topology.observer = growth.observe
                layers[name].topology.expected_calls = 0
        if self.policy.measures and step == self.steps + 1 and any(quota.drop for quota in self._quotas.values()):
            self._last_call = LastCall(self.model)

    def _prepare(self, step: int, layers: Mapping[str, SparseLinear]) -> None:
        """Settles for the rewire at ``step`` how many blocks leave and enter, and who looks for places."""
        fixed = {} if self.density is None else {"density": self._density_at(step), "first": self.density(self.begin)}
        targets = self._census.targets(step, layers, self.policy, **fixed)
        fraction = self.policy.drop_fraction_at(step)
        found = {n: self._census.quota_and_growth(layer, targets[n], fraction) for n, layer in layers.items()}
        self._quotas, self._armed_for = {name: quota for name, (quota, _) in found.items()}, step
        least = int(self._pools())  # where scores of all layers are compared, each of them is measured
        self._growth = {
            name: Growth(self._view(name, step, max(quota.drop, count, least)), self.policy, count)
            for name, (quota, count) in found.items()
        }

    def _pools(self) -> bool:
        """Whether what leaves is found by comparing the scores of all layers."""
        return self.distribution == GLOBAL and any(quota.must_drop for quota in self._quotas.values())

    def _density_at(self, step: int) -> float:
        """The density that a rewire at ``step`` moves to: the last one before the end moves to that of the end."""
        last = self.end is not None and step + self.every > self.end
        density = float(self.density(self.end if last else step))
        if not 0.0 <= density <= 1.0:
            raise ValueError(f"Sparsifier: density must lie in [0, 1], got {density} at step {step}")
        return density

    def _rewire_or_shrink(self) -> Update:
        """A rewire; with a budget, one for which the memory fails makes the network smaller instead."""
        try:
            return self._rewire()
        except (MemoryError, RuntimeError) as error:
            if self._holding is None or distributed.is_active() or not is_out_of_memory(error):
                raise
            logger.warning("Sparsifier: step %d: memory ran out during the rewire", self.steps)
        counts, fewest = self._holding.counts(), self._holding.fewest()
        smaller = {name: max(fewest[name], count - -(-count // 4)) for name, count in counts.items()}
        return self._shrink(smaller, self.policy.drop_fraction_at(self.steps))

    def _rewire(self) -> Update:
        for name in self._growth:
            for optimizer in self.optimizers:
                check_followable(optimizer, self.layers[name].values, name, self.layers[name].pattern.num_blocks)
        self._measure()
        scores = {name: self._scores(name) for name in self._growth}
        found = {name: of_layer for name, of_layer in scores.items() if isinstance(of_layer, Tensor)}
        fraction = self.policy.drop_fraction_at(self.steps)
        self._quotas |= self._census.share_out(self._quotas, found, self._growth, fraction)
        plans = {name: self._plan(name, scores[name]) for name in self._growth}
        if distributed.is_active():
            for name, plan in plans.items():
                distributed.assert_same(f"the new topology of layer {name}", plan.digest)
        resized = [n for n, p in plans.items() if p.pattern.num_blocks != self.layers[n].pattern.num_blocks]
        if resized:
            distributed.check_resizable(self.model, resized[0])
        done: list[LayerMove] = []
        try:
            for name, plan in plans.items():
                if plan.update.dropped or plan.update.grown:
                    new, mask = (plan.pattern, self.grown_state), plan.element_mask
                    for follower in self._follower_layers.get(name, ()):
                        done.append(LayerMove(follower, (), *new, element_mask=mask))
                    done.append(LayerMove(self.layers[name], self.optimizers, *new, plan.values, mask))
        except BaseException:
            for move in reversed(done):
                move.undo()
            raise
        if resized:
            distributed.rebuild(self.model)
        self._states.mark()
        for name, plan in plans.items():
            self._newborn.add(name, plan.update.grown_places)
        return Update(self.steps, {name: plan.update for name, plan in plans.items()})

    def _measure(self) -> None:
        """Lets a policy that wants to run the model, over the layers that are to lose blocks."""
        views = {name: g.view for name, g in self._growth.items() if g.view.drop and g.is_current()}
        if self.policy.measures and views:
            seed = layer_key(self.seed, self.steps, "targets")
            self.policy.measure(distributed.unwrap(self.model), self._last_call.call, views, seed)

    def _scores(self, name: str) -> Tensor | str | None:
        """A layer's drop scores, None where none are needed, or why the layer keeps its topology."""
        layer, quota, growth = self.layers[name], self._quotas[name], self._growth[name]
        if not layer.values.requires_grad:
            return "it was frozen after the rewire was prepared"
        if not growth.is_current():
            return "its pattern was replaced after the rewire was prepared"
        if not quota.drop and not self._pools():
            return None
        growth.view.has_step = name not in self._without_step
        try:
            return drop_scores(self.policy, growth)
        except BadScores as error:
            return str(error)

    def _plan(self, name: str, scores: Tensor | str | None) -> Plan:
        """The layer's next pattern; changes nothing."""
        layer, quota, growth = self.layers[name], self._quotas[name], self._growth[name]
        skipped = scores if isinstance(scores, str) else ""
        try:
            if not skipped:
                young = self._newborn.among(name, growth.pattern.linear_places())
                plan = planned(self.policy, growth, quota, scores, young, self._census.units(layer).places)
        except BadScores as error:
            skipped = str(error)
        if skipped:
            logger.warning("Sparsifier: step %d, layer %s keeps its topology: %s", self.steps, name, skipped)
            none = layer.pattern.linear_places()[:0]
            density = self._census.density_of(layer, self._census.units(layer).now)
            update = LayerUpdate(none, none, layer.pattern.num_blocks, density, quota.clamped, skipped)
            return Plan(layer.pattern, update)
        if quota.must_drop:
            self._say_what_died(name, layer.pattern, plan.pattern)
        return plan

    # --- what it says ---

    def _say_what_died(self, name: str, before: BlockPattern, after: BlockPattern) -> None:
        """Once per layer, when its density has become too low for all of its rows and columns of blocks."""
        if name in self._said or after.unreached() <= before.unreached():
            return
        self._said.add(name)
        (outputs, inputs), (out_features, in_features), b = after.unreached(), after.shape, after.block_size
        warnings.warn(
            f"Sparsifier: from step {self.steps} on, {outputs} of {out_features} outputs and {inputs} of {in_features} "
            f"inputs of layer {name} have no weight: {after.num_blocks} blocks of {b} x {b} are too few; use smaller "
            "blocks or a higher density",
            stacklevel=5,
        )

    def _warn_if_idle(self) -> None:
        """One warning about a schedule that never acts, or that is cut off."""
        policy, density = self.policy, self.density
        fixed = density is None and not policy.exchanges
        if policy.follows_density and density is None:
            rest = "only exchanges" if policy.exchanges else "changes nothing"
            said = f"{type(policy).__name__} needs a density schedule: without one it {rest}"
        elif fixed or (density is None and policy.drop_fraction == 0.0):
            return  # nothing is meant to change
        elif self.end is not None and self.begin + self.every > self.end:
            said = f"no step rewires: begin {self.begin} + every {self.every} lies beyond end {self.end}"
        elif (
            self.end is not None
            and (last_step(density) or 0) > self.end
            and density(self.end) != density(last_step(density))
        ):
            said = (
                f"end {self.end} cuts the density schedule off at {density(self.end):.4g}; it would reach "
                f"{density(last_step(density)):.4g} at step {last_step(density)}"
            )
        else:
            return
        warnings.warn(f"Sparsifier: {said}", stacklevel=3)

    def _refuse_fixed(self) -> None:
        """A density that changes is no use to N:M masks whose elements are rewired."""
        fixed = [name for name, layer in self.layers.items() if self._census.keeps_its_number(layer)]
        if self.density is not None and not isinstance(self.density, Constant) and len(fixed) == len(self.layers):
            raise ValueError(
                "Sparsifier: density must be constant where every layer has an N:M mask, whose elements keep their "
                "number; without elements=True their blocks are rewired"
            )

    # --- saving ---

    def state_dict(self) -> dict:
        """The step count, the seed, the layers' proportions and youngest blocks; patterns are saved with the model."""
        state = {"steps": self.steps, "seed": self.seed, "proportions": dict(self._census.proportions)}
        if young := self._newborn.state():
            state["young"] = young
        remembered = [name for name in self._policy_state.names() if name in self.layers]
        if remembered:
            state["policy"] = self._policy_state.state(self._view(name, self.steps) for name in remembered)
        if watched := {name: seen for name, growth in self._growth.items() if (seen := growth.state())}:
            state["watched"] = watched
        if self._holding is not None:
            state |= {"budget": self._holding.budget.bytes, "seen_bytes": dict(self._holding.seen)}
        return state

    def load_state_dict(self, state: Mapping) -> None:
        """Continues where :meth:`state_dict` was taken. Load the model first."""
        for key in ("steps", "seed"):
            if not isinstance(state.get(key), int):
                raise ValueError(f"Sparsifier: state must have an integer {key!r}, got {state.get(key)!r}")
        proportions = state.get("proportions", {})
        if not isinstance(proportions, Mapping) or not all(isinstance(n, int) for n in proportions.values()):
            raise ValueError(f"Sparsifier: state must have integers by layer in 'proportions', got {proportions!r}")
        newborn = Newborn(self.grace)
        newborn.load(state.get("young", {}))
        if "budget" in state:
            seen = state.get("seen_bytes", {})
            if not isinstance(seen, Mapping) or not all(isinstance(n, int) and n >= 0 for n in seen.values()):
                raise ValueError(f"Sparsifier: state must have bytes by name in 'seen_bytes', got {seen!r}")
            self._holding = self._hold(MemoryBudget(state["budget"]), seen).check()
        views = {name: self._view(name, state["steps"]) for name in self.layers}
        policy_state = PolicyState()
        policy_state.load(state.get("policy", {}), views)
        self.steps, self.seed, self._newborn = state["steps"], state["seed"], newborn
        self._policy_state, self._armed_for = policy_state, None
        known = {name: count for name, count in proportions.items() if name in self.layers}
        self._census.proportions = self._census.counts(self.layers) | known
        self._states.mark()
        self._arm()
        for name, seen in state.get("watched", {}).items():
            if name in self._growth:
                self._growth[name].load(seen)


# --- checks ---------------------------------------------------------------------------------------------------------


def _density_schedule(density, sparsity) -> Callable[[int], float] | None:
    if density is not None and sparsity is not None:
        raise ValueError("Sparsifier: give density or its alias sparsity, not both")
    name, value = ("sparsity", sparsity) if density is None else ("density", density)
    if value is None:
        return None
    schedule = as_schedule(value)
    if not callable(value) and not 0.0 <= schedule(0) <= 1.0:
        raise ValueError(f"Sparsifier: {name} must lie in [0, 1], got {value}")
    return Complement(schedule) if name == "sparsity" else schedule
