"""The Sparsifier: rewires a model and its optimizer while they train."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsenet import distributed, functional
from sparsenet.densities import distribute
from sparsenet.layers import SparseLinear, sparse_layers, take_blocks
from sparsenet.optimizer_state import carry_state, check_grown_state, state_by_block
from sparsenet.pattern import BlockPattern, carried_from
from sparsenet.policies.places import (
    BadScores,
    best_places,
    checked_places,
    checked_scores,
    hash_uniform,
    layer_key,
    random_places,
)
from sparsenet.policies.policy import Policy
from sparsenet.schedules import as_schedule

__all__ = ["LayerUpdate", "Sparsifier", "Update"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerUpdate:
    """What one rewire did to one layer.

    Attributes:
        dropped_places, grown_places: int64, block row * block columns + block column, ascending.
        num_blocks, density: after the rewire.
        clamped: growth that was asked for and found no free place.
        skipped: why the layer was left as it was; empty when it was rewired.
    """

    dropped_places: Tensor
    grown_places: Tensor
    num_blocks: int
    density: float
    clamped: int = 0
    skipped: str = ""

    @property
    def dropped(self) -> int:
        """Number of blocks dropped."""
        return len(self.dropped_places)

    @property
    def grown(self) -> int:
        """Number of blocks grown."""
        return len(self.grown_places)


@dataclass(frozen=True)
class Update:
    """What one rewire did, by layer name."""

    step: int
    layers: dict[str, LayerUpdate] = field(default_factory=dict)

    @property
    def dropped(self) -> int:
        """Blocks dropped in all layers."""
        return sum(u.dropped for u in self.layers.values())

    @property
    def grown(self) -> int:
        """Blocks grown in all layers."""
        return sum(u.grown for u in self.layers.values())


@dataclass(frozen=True)
class _Quota:
    """How many blocks leave and enter a layer at one rewire."""

    drop: int
    grow: int
    clamped: int

    @classmethod
    def of(cls, pattern: BlockPattern, target: int, drop_fraction: float) -> _Quota:
        """Exchanges ``drop_fraction`` of the blocks that stay and moves the count to ``target``.

        A dropped block cannot return in the same update, so growth is bounded by the places free beforehand.
        """
        free = pattern.block_rows * pattern.block_cols - pattern.num_blocks
        stays = min(pattern.num_blocks, target)
        exchange = min(round(drop_fraction * stays), free - max(0, target - pattern.num_blocks))
        asked = target - stays + round(drop_fraction * stays)
        grow = target - stays + max(0, exchange)
        return cls(drop=pattern.num_blocks - stays + max(0, exchange), grow=grow, clamped=asked - grow)


class _View:
    """One layer as a policy sees it; see :class:`sparsenet.policies.LayerView`."""

    def __init__(self, name: str, layer: SparseLinear, key: int):
        self.name = name
        self.layer = layer
        self.key = key
        self.operands: tuple[Tensor, Tensor] | None = None  # x, grad_output before the activation

    @property
    def values(self) -> nn.Parameter:
        return self.layer.values

    @property
    def pattern(self) -> BlockPattern:
        return self.layer.pattern

    def random(self, places: Tensor) -> Tensor:
        return hash_uniform(places, self.key)

    def random_places(self, count: int) -> Tensor:
        return random_places(self.pattern, count, self.key)

    def gradient_squared_norms(self, places: Tensor) -> Tensor:
        if self.operands is None:
            raise RuntimeError(
                f"Sparsifier: no gradient of layer {self.name} at hand; set needs_gradient in the policy"
            )
        if not len(places):
            return torch.empty(0, device=places.device)
        cols = self.pattern.block_cols
        rows = (int(places[0]) // cols, int(places[-1]) // cols + 1)
        norms = functional.block_gradient_squared_norms(*self.operands, self.pattern.block_size, rows)
        return norms.flatten()[places - rows[0] * cols]


class _Growth:
    """Finds the places that a layer will grow, at the latest backward before the rewire where that needs gradients."""

    def __init__(self, view: _View, policy: Policy, count: int):
        self.view = view
        self.policy = policy
        self.count = count
        self.places: Tensor | None = None
        self.error = ""
        self.operands: tuple[Tensor, Tensor] | None = None

    def observe(self, x: Tensor, grad_output: Tensor) -> None:
        """Called by the layer's backward."""
        if distributed.is_active():
            self.operands = x.detach(), grad_output.detach()
        else:
            self.select((x.detach(), grad_output.detach()))

    def select(self, operands: tuple[Tensor, Tensor] | None) -> None:
        """Asks the policy for places, or scores every inactive one, a slice of block rows at a time, for the best."""
        pattern = self.view.pattern
        self.view.operands = operands
        try:
            places = self.policy.grow_places(self.view, self.count)
            if places is not None:
                self.places, self.error = checked_places(pattern, places, self.count), ""
                return
            share = distributed.share_of(pattern.block_rows) if operands is not None else (0, pattern.block_rows)
            best = best_places(pattern, lambda places: self.policy.grow_scores(self.view, places), self.count, share)
            if operands is not None:
                best = distributed.gather_best(*best, self.count)
            self.places, self.error = best[0], ""
        except BadScores as error:
            self.places, self.error = None, str(error)
        finally:
            self.view.operands = None

    def gather(self) -> None:
        """Distributed: brings every rank's operands together and selects."""
        if self.operands is not None:
            self.select(distributed.gather_operands(*self.operands))
            self.operands = None


class Sparsifier:
    """Applies a policy on a schedule to the sparse layers of a model and to its optimizer's state.

    Args:
        model: holds the :class:`SparseLinear` layers (a DistributedDataParallel wrapper is looked through).
        optimizer: any ``torch.optim`` optimizer, or None. State tensors with one entry per block follow their blocks.
        policy: which blocks go and come.
        density: of all layers together at each step; a number, a schedule, or None to keep every layer's count.
        distribution: how ``density`` is spread over the layers: ``uniform`` or ``erdos_renyi``.
        every, begin, end: the n-th :meth:`step` rewires when ``begin < n <= end`` and ``(n - begin) % every == 0``.
        seed: of random growth. Random numbers depend on seed, step, layer and place, not on a generator's history.
        grown_state: what grown blocks' optimizer state starts with, by state name: ``zero`` (default) or ``mean``.
            ``{"exp_avg_sq": "mean"}`` tames Adam's first steps on grown blocks: with a zero second moment late in
            training they are several times too large.
        sparsity: alias, ``1 - density``.

    Raises:
        ValueError: no sparse layer, a parameter in two layers, a number out of range.

    Call :meth:`step` after every ``optimizer.step()``.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 256, 10], density=0.2, block_size=16)
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

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        policy: Policy,
        density: float | Callable[[int], float] | None = None,
        distribution: str = "uniform",
        every: int = 100,
        begin: int = 0,
        end: int | None = None,
        seed: int = 0,
        *,
        grown_state: Mapping[str, str] | None = None,
        sparsity: float | Callable[[int], float] | None = None,
    ):
        if not isinstance(policy, Policy):
            raise TypeError(f"Sparsifier: policy must be a sparsenet Policy, got {policy!r}")
        for name, value, least in (("every", every, 1), ("begin", begin, 0), ("end", begin if end is None else end, 0)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Sparsifier: {name} must be an integer of at least {least}, got {value!r}")
        self.model = model
        self.optimizer = optimizer
        self.policy = policy
        self.density = _density_schedule(density, sparsity)
        self.distribution = distribution
        self.every, self.begin, self.end, self.seed = every, begin, end, seed
        self.grown_state = check_grown_state(grown_state or {})
        self.layers = _distinct_layers(distributed.unwrap(model))
        distributed.assert_same_topology(model)
        self.steps = 0
        self._growth: dict[str, _Growth] = {}
        self._quotas: dict[str, _Quota] = {}
        self._arm()

    # --- the step ---

    def step(self) -> Update | None:
        """Counts one optimizer step and rewires when it is time.

        Returns:
            What was dropped and grown, per layer; None when this step does not rewire.

        Raises:
            RuntimeError: under DDP, ranks disagree (the layer is named) or the number of blocks would change.

        Either every layer is rewired or none: an exception leaves patterns, values and optimizer state as they were.
        Layers whose scores are NaN or Inf, or that saw no gradient, are skipped and say so.
        """
        self.steps += 1
        distributed.assert_same("the decision to rewire", int(self._rewires_at(self.steps)))
        update = None
        try:
            if self._rewires_at(self.steps):
                update = self._rewire()
        finally:
            self._arm()
        return update

    def refresh(self) -> None:
        """Looks at the model again after something else changed its layers: compaction, folding."""
        model = distributed.unwrap(self.model)
        self.layers = _distinct_layers(model) if sparse_layers(model) else {}
        self._arm()

    def _rewires_at(self, step: int) -> bool:
        inside = self.begin < step and (self.end is None or step <= self.end)
        return inside and (step - self.begin) % self.every == 0

    def _arm(self) -> None:
        """If the next step rewires, settles how many blocks move and has backward score the growth."""
        for layer in self.layers.values():
            layer.topology.observer = None
        self._growth, self._quotas = {}, {}
        step = self.steps + 1
        if not self._rewires_at(step):
            return
        fraction = self.policy.drop_fraction_at(step)
        targets = self._targets(step)
        for name, layer in self.layers.items():
            quota = self._quotas[name] = _Quota.of(layer.pattern, targets[name], fraction)
            growth = _Growth(_View(name, layer, layer_key(self.seed, step, name)), self.policy, quota.grow)
            self._growth[name] = growth
            if self.policy.needs_gradient and quota.grow:
                layer.topology.observer = growth.observe

    def _targets(self, step: int) -> dict[str, int]:
        if self.density is None:
            return {name: layer.pattern.num_blocks for name, layer in self.layers.items()}
        density = float(self.density(step))
        if not 0.0 <= density <= 1.0:
            raise ValueError(f"Sparsifier: density must lie in [0, 1], got {density} at step {step}")
        shapes = [(layer.pattern.block_rows, layer.pattern.block_cols) for layer in self.layers.values()]
        return dict(zip(self.layers, distribute(shapes, density, self.distribution, block_size=1), strict=True))

    def _rewire(self) -> Update:
        plans = {name: self._plan(name) for name in self.layers}
        if distributed.is_active():
            for name, (pattern, _) in plans.items():
                distributed.assert_same(f"the new topology of layer {name}", int(pattern.fingerprint[:15], 16))
        resized = [n for n, (p, _) in plans.items() if p.num_blocks != self.layers[n].pattern.num_blocks]
        if resized:
            distributed.check_resizable(self.model, resized[0])
        done: list[_Move] = []
        try:
            for name, (pattern, update) in plans.items():
                if update.dropped or update.grown:
                    done.append(_Move(self.layers[name], self.optimizer, pattern, self.grown_state))
        except BaseException:
            for move in reversed(done):
                move.undo()
            raise
        if resized:
            distributed.rebuild(self.model)
        return Update(self.steps, {name: update for name, (_, update) in plans.items()})

    def _plan(self, name: str) -> tuple[BlockPattern, LayerUpdate]:
        """The layer's next pattern; changes nothing."""
        layer, quota, growth = self.layers[name], self._quotas[name], self._growth[name]
        pattern = layer.pattern
        none = torch.empty(0, dtype=torch.int64, device=pattern.device)
        skipped = ""
        dropped = grown = none
        if quota.drop or quota.grow:
            dropped, grown, skipped = self._choose(pattern, growth, quota)
        if skipped:
            logger.warning("Sparsifier: step %d, layer %s keeps its topology: %s", self.steps, name, skipped)
            return pattern, LayerUpdate(none, none, pattern.num_blocks, pattern.density, quota.clamped, skipped)
        places = pattern.linear_places()
        stays = torch.ones(len(places), dtype=torch.bool, device=places.device)
        stays[dropped] = False
        after = torch.cat([places[stays], grown])
        new = BlockPattern.from_linear_places(after, pattern.shape, pattern.block_size)
        return new, LayerUpdate(places[dropped], grown, new.num_blocks, new.density, quota.clamped)

    def _choose(self, pattern: BlockPattern, growth: _Growth, quota: _Quota) -> tuple[Tensor, Tensor, str]:
        """Numbers of the blocks that leave, places that enter, and why not, if not."""
        none = torch.empty(0, dtype=torch.int64, device=pattern.device)
        if quota.grow:
            if self.policy.needs_gradient:
                growth.gather()
                if growth.places is None and not growth.error:
                    return none, none, "no backward ran through it before this step"
            else:
                growth.select(None)
            if growth.error:
                return none, none, growth.error
        try:
            scores = checked_scores(self.policy.drop_scores(growth.view), pattern.num_blocks, "drop")
        except BadScores as error:
            return none, none, str(error)
        dropped = functional.select_extreme(scores, quota.drop, largest=False)
        return dropped, growth.places if quota.grow else none, ""

    # --- saving ---

    def state_dict(self) -> dict:
        """The step count and seed; patterns are saved with the model."""
        return {"steps": self.steps, "seed": self.seed}

    def load_state_dict(self, state: Mapping) -> None:
        """Continues where :meth:`state_dict` was taken. Load the model first."""
        for key in ("steps", "seed"):
            if not isinstance(state.get(key), int):
                raise ValueError(f"Sparsifier: state must have an integer {key!r}, got {state.get(key)!r}")
        self.steps, self.seed = state["steps"], state["seed"]
        self._arm()


class _Move:
    """One layer and its optimizer state moved to a new pattern; can be taken back."""

    def __init__(self, layer: SparseLinear, optimizer, pattern: BlockPattern, grown_state: Mapping[str, str]):
        self.layer, self.optimizer = layer, optimizer
        self.old_pattern, self.old_mask = layer.pattern, layer.element_mask
        self.carried = carried_from(layer.pattern, pattern)
        state = state_by_block(optimizer, layer.values)
        leaves = torch.ones(layer.pattern.num_blocks, dtype=torch.bool, device=self.carried.device)
        leaves[self.carried[self.carried >= 0]] = False
        self.left = leaves.nonzero().flatten()
        self.left_values = layer.values.detach().index_select(0, self.left)
        self.left_state = {key: tensor.index_select(0, self.left) for key, tensor in state.items()}
        moved = {key: carry_state(tensor, self.carried, grown_state.get(key, "zero")) for key, tensor in state.items()}
        layer.set_pattern(pattern)  # nothing below can fail
        if moved:
            optimizer.state[layer.values].update(moved)

    def undo(self) -> None:
        """Puts the old pattern, values and state back, bit for bit."""
        back = torch.full((self.old_pattern.num_blocks,), -1, dtype=torch.int64, device=self.carried.device)
        stays = self.carried >= 0
        back[self.carried[stays]] = stays.nonzero().flatten()
        state = {key: take_blocks(t, back, 0) for key, t in state_by_block(self.optimizer, self.layer.values).items()}
        for key, tensor in state.items():
            tensor[self.left] = self.left_state[key]
        values = take_blocks(self.layer.values.detach(), back, 0)
        values[self.left] = self.left_values
        self.layer.set_pattern(self.old_pattern, values, self.old_mask)
        if state:
            self.optimizer.state[self.layer.values].update(state)


# --- checks ---------------------------------------------------------------------------------------------------------


def _density_schedule(density, sparsity) -> Callable[[int], float] | None:
    if density is not None and sparsity is not None:
        raise ValueError("Sparsifier: give density or its alias sparsity, not both")
    if sparsity is not None:
        of_step = as_schedule(sparsity)
        return lambda step: 1.0 - of_step(step)
    if density is None:
        return None
    schedule = as_schedule(density)
    if not callable(density) and not 0.0 <= density <= 1.0:
        raise ValueError(f"Sparsifier: density must lie in [0, 1], got {density}")
    return schedule


def _distinct_layers(model: nn.Module) -> dict[str, SparseLinear]:
    layers = sparse_layers(model)
    if not layers:
        raise ValueError("Sparsifier: model must hold at least one SparseLinear; see sparsify_")
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        other = owners.setdefault(id(layer.values), name)
        if other != name:
            raise ValueError(f"Sparsifier: one Parameter must not serve two layers, got {other!r} and {name!r}")
        layer.topology.label = f"block_sparse_linear ({name})"
    return layers
