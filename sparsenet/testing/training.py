"""One training of a small network with a policy under observation, every step of it checked."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet.checkpoint import load, save
from sparsenet.layers import sparse_layers
from sparsenet.policies.exchange import Update
from sparsenet.policies.policy import LayerView, Policy
from sparsenet.sparsifier import Sparsifier
from sparsenet.testing.rewires import Rewire, check_masked, check_rewire, new_block_state
from sparsenet.testing.snapshots import LayerSnapshot, digest, fingerprint
from sparsenet.testing.totals import check_totals
from sparsenet.testing.watching import Watcher

__all__ = ["Case", "Training"]


@dataclass(frozen=True)
class Case:
    """What is trained, and how; the same for all trainings of one check but for the seeds.

    ``hands_optimizer_over``: whether the Sparsifier is told about the optimizer. ``seed``: of the network, and of
    the Sparsifier where that has none of its own.
    """

    make_model: Callable[[int], nn.Module]
    make_optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
    data: Sequence[tuple[Tensor, Tensor]]
    density: float | Callable[[int], float] | None
    distribution: Any
    elements: bool
    every: int
    seed: int
    sparsifier_seed: int | None = None
    hands_optimizer_over: bool = True


def _without_state(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.01)


@dataclass
class _Saved:
    """What a training goes on from, beside the file."""

    model: dict
    optimizer: dict
    sparsifier: dict
    random: Tensor


@dataclass
class Training:
    """A training from its beginning, or from where another was saved.

    Attributes:
        fingerprints: by step, digests of everything by name.
        save_at: files by step. has_masks: whether a layer has an element mask.
    """

    case: Case
    given: Policy
    steps: int = 0
    rewires: int = 0
    dropped: int = 0
    grown: int = 0
    skipped: int = 0
    reasons: set[str] = field(default_factory=set)
    fingerprints: dict[int, dict[str, str]] = field(default_factory=dict)
    save_at: dict[int, Path] = field(default_factory=dict)
    saved: dict[int, _Saved] = field(default_factory=dict)

    def __post_init__(self):
        case = self.case
        self.model = case.make_model(case.seed)
        self.layers = sparse_layers(self.model)
        make = case.make_optimizer if case.hands_optimizer_over else _without_state
        self.optimizer = make(list(self.model.parameters()))
        self.optimizers = (self.optimizer,) if case.hands_optimizer_over else ()
        self.watcher = Watcher(self.given, self._after_the_policy)
        self.name = self.watcher.name
        self.sparsifier = Sparsifier(
            self.model,
            self.optimizer if case.hands_optimizer_over else None,
            self.watcher.policy,
            case.density,
            case.distribution,
            every=case.every,
            seed=case.seed if case.sparsifier_seed is None else case.sparsifier_seed,
            elements=case.elements,
        )
        self.first_counts = {name: int(self._look(name).units.sum()) for name in self.layers}
        self.has_masks = any(layer.element_mask is not None for layer in self.layers.values())
        self._first_states: dict[str, dict[str, Tensor]] = {}
        self._young: dict[str, list[Tensor]] = {name: [] for name in self.layers}
        self._before: dict[str, LayerSnapshot] = {}

    @property
    def draws(self) -> bool:
        """Whether policy or Sparsifier have drawn random numbers: candidates of a momentum, masks of grown blocks."""
        grown_blocks_are_masked = self.has_masks and not self.case.elements
        return self.watcher.drew or bool(self.given.momentum) or grown_blocks_are_masked

    # --- training ---

    def train(self, until: int, check: bool = True) -> Training:
        """Trains up to step ``until``."""
        while self.steps < until:
            self.steps += 1
            self.watcher.begin_step(self.steps)
            loss = self._backward()
            self.optimizer.step()
            if check:
                self._before = self._look_at_all()
                self._check_masks(self._before)
                counts = {name: int(seen.units.sum()) for name, seen in self._before.items()}
                others = self._digest_of_others()
                self._check(self.sparsifier.step(), counts)
                if others != self._digest_of_others():
                    where = f"other parameters and their state as they are (step {self.steps})"
                    raise AssertionError(f"{self.name}: a step of the Sparsifier must leave {where}")
            else:
                self.sparsifier.step()
            found = fingerprint(self.model, self.optimizers, self.sparsifier)
            self.fingerprints[self.steps] = {"the loss": repr(loss), **found}
            if self.steps in self.save_at:
                self._save(self.save_at[self.steps])
        return self

    def _backward(self) -> float:
        """Gradients of one step; around every second rewire in two backward passes."""
        x, target = self.case.data[self.steps % len(self.case.data)]
        self.optimizer.zero_grad()
        halves = 2 if (self.steps + self.case.every // 2) // self.case.every % 2 else 1
        total = 0.0
        for inputs, targets in zip(x.chunk(halves), target.chunk(halves), strict=True):
            y = self.model(inputs)
            classes = not targets.is_floating_point()
            loss = nn.functional.cross_entropy(y, targets) if classes else nn.functional.mse_loss(y, targets)
            loss.backward()
            total += float(loss)
        return total

    def _look(self, name: str) -> LayerSnapshot:
        return LayerSnapshot.of(self.layers[name], self.optimizers, self.case.elements)

    def _look_at_all(self) -> dict[str, LayerSnapshot]:
        return {name: self._look(name) for name in self.layers}

    def _digest_of_others(self) -> str:
        """Of all parameters but the layers' values, and of what the optimizer keeps of them."""
        values = {id(layer.values) for layer in self.layers.values()}
        others = [p for p in self.model.parameters() if id(p) not in values]
        return digest([others, *([dict(o.state.get(p, {})) for p in others] for o in self.optimizers)])

    def _after_the_policy(self, layer: LayerView) -> None:
        """A policy that acts after every step writes values; what a rewire must keep is what it leaves."""
        if self._before:
            self._before[layer.name] = self._look(layer.name)

    def release(self) -> Training:
        """Lets go of the network, whose masks every other optimizer's step would go on to mend."""
        del self.model, self.layers, self.optimizer, self.optimizers, self.sparsifier, self._before
        return self

    # --- checking ---

    def _check_masks(self, seen: Mapping[str, LayerSnapshot]) -> None:
        for name, layer in self.layers.items() if self.has_masks else ():
            try:
                check_masked(layer, name, self.steps, seen[name])
            except AssertionError as error:
                raise AssertionError(f"{self.name}: {error}") from None

    def _check(self, update: Update | None, counts: Mapping[str, int]) -> None:
        after = self._look_at_all()
        self._check_masks(after)
        try:
            self._check_step(update, after)
            if update is not None:
                check_totals(self.sparsifier, self.first_counts, counts, after, update, self.watcher.named_fewer)
        except AssertionError as error:
            raise AssertionError(f"{self.name}: {error}") from None
        if self.watcher.bad:
            name, what = next(iter(self.watcher.bad.items()))
            raise AssertionError(
                f"{self.name}: {what}; the layer kept its topology (step {self.steps}, layer {name!r})"
            )

    def _check_step(self, update: Update | None, after: Mapping[str, LayerSnapshot]) -> None:
        rewires = self.steps % self.case.every == 0
        if rewires != (update is not None):
            raise AssertionError(f"every {self.case.every} steps must rewire, got {update!r} at step {self.steps}")
        for name, layer in self.layers.items():
            before, change = self._before[name], None if update is None else update.layers.get(name)
            if change is None:  # between rewires, or a frozen layer
                if not after[name].is_same(before):
                    raise AssertionError(f"a layer must stay as it is, got another (step {self.steps}, layer {name!r})")
                continue
            if name in self.watcher.bad and not change.skipped:
                raise AssertionError(f"{self.watcher.bad[name]} (step {self.steps}, layer {name!r})")
            young = [torch.empty(0, dtype=torch.int64), *self._young[name]]
            rewire = Rewire(
                name,
                self.steps,
                layer,
                before,
                after[name],
                change,
                self._fraction(),
                torch.cat(young),
                self.watcher.adjusted.get(name),
                name in self.watcher.named_fewer,
                self.watcher.drop_scores.get(name),
                self.watcher.grow_scores.get(name, {}),
            )
            check_rewire(rewire, self._new_block_states(name))
            self._remember(name, rewire)

    def _new_block_states(self, name: str) -> list[dict[str, Tensor]]:
        """For each optimizer that the Sparsifier knows; made once."""
        if self.optimizers and name not in self._first_states:
            self._first_states[name] = new_block_state(self.case.make_optimizer, self.layers[name])
        return [self._first_states[name] for _ in self.optimizers]

    def _fraction(self) -> float:
        """The share that the policy exchanges now."""
        fraction = self.given.drop_fraction
        return float(fraction(self.steps) if callable(fraction) else fraction) if self.given.exchanges else 0.0

    def _remember(self, name: str, rewire: Rewire) -> None:
        grace, change = self.sparsifier.grace, rewire.update
        self._young[name] = [*self._young[name], rewire.grown.flatten().nonzero().flatten()][-grace:] if grace else []
        self.rewires += 1
        self.dropped += change.dropped
        self.grown += change.grown
        if change.skipped:
            self.skipped += 1
            self.reasons.add(change.skipped)

    def require_rewires(self) -> None:
        """AssertionError where every rewire was skipped: then nothing was seen of the policy."""
        if self.skipped and not self.dropped and not self.grown:
            raise AssertionError(
                f"{self.name}: a rewire must change the pattern, got {self.skipped} that were skipped: "
                f"{', '.join(sorted(self.reasons))}"
            )

    def must_equal(self, other: Training, what: str, until: int | None = None, but: Sequence[str] = ()) -> None:
        """AssertionError with the first step at which something differs, and what that is."""
        for step, mine in self.fingerprints.items():
            if until is not None and step > until:
                return
            theirs = other.fingerprints[step]
            differs = [k for k in (*mine, *theirs) if k not in but and mine.get(k) != theirs.get(k)]
            if differs:
                raise AssertionError(f"{self.name}: {what}, got another {differs[0]} at step {step}")

    # --- saving ---

    def _save(self, file: Path) -> None:
        save(file, self.model, self.optimizers[0] if self.optimizers else None, self.sparsifier, step=self.steps)
        states = (part.state_dict() for part in (self.model, self.optimizer, self.sparsifier))
        self.saved[self.steps] = _Saved(*copy.deepcopy(tuple(states)), torch.get_rng_state())

    def load(self, other: Training, step: int, by_file: bool) -> None:
        """Goes on from ``step`` of another training, by its file or by its state dicts."""
        saved = other.saved[step]
        if by_file:
            load(other.save_at[step], self.model, self.optimizer, self.sparsifier).restore_random_state()
        else:
            self.model.load_state_dict(saved.model)
            self.optimizer.load_state_dict(saved.optimizer)
            self.sparsifier.load_state_dict(saved.sparsifier)
            torch.set_rng_state(saved.random)
        self.steps = step
