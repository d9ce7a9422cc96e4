"""A policy under observation: what it is asked, what it answers, and what it must not touch."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsenet.policies.policy import LayerView, Policy

__all__ = ["Watcher"]

_DRAWS = ("random", "random_places", "likely_places")  # of a view, by which a policy draws


class Watcher:
    """Watches one policy through one training, by a copy whose methods are wrapped.

    Attributes:
        policy: the copy, to be given to a Sparsifier.
        step: of the Sparsifier, set by whoever trains.
        after_step: called with a layer's view when the policy's own ``after_step`` has returned.
        drew: whether the policy has asked for random numbers.
        bad: why the scores that were just returned cannot be used; empty where they can.
        adjusted, named_fewer, drop_scores, grow_scores: of the present step, by layer; see
            :class:`sparsenet.testing.rewires.Rewire`. Grow scores are by place, those of the last backward pass.
    """

    def __init__(self, policy: Policy, after_step: Callable[[LayerView], None] | None = None):
        self.name = type(policy).__name__
        self.step = 0
        self.after_step = after_step
        self.drew = bool(policy.measures)
        self.bad: dict[str, str] = {}
        self.adjusted: dict[str, Tensor] = {}
        self.named_fewer: set[str] = set()
        self.drop_scores: dict[str, Tensor] = {}
        self.grow_scores: dict[str, dict[int, float]] = {}
        self.policy = copy.copy(policy)
        for name in ("drop_scores", "grow_scores", "grow_places", "observe", "measure", "after_step", "adjust"):
            object.__setattr__(self.policy, name, self._wrapped(name, getattr(policy, name)))

    def begin_step(self, step: int) -> None:
        """Forgets what was of the last one."""
        self.step = step
        self.bad, self.adjusted, self.named_fewer = {}, {}, set()
        self.drop_scores, self.grow_scores = {}, {}

    def _wrapped(self, name: str, method: Callable) -> Callable:
        def call(*arguments: Any) -> Any:
            if name == "measure":
                with self._untouched(name, dict(arguments[0].named_parameters()), arguments[0]):
                    return method(*arguments)
            layer = arguments[0]
            kept = {} if name == "after_step" else dict(layer.layer.named_parameters())
            with self._untouched(f"{name} of layer {layer.name!r}", kept), self._counting_draws(layer):
                answer = method(*arguments)
            getattr(self, f"_look_at_{name}", lambda *_: None)(answer, *arguments)
            return answer

        return call

    @contextmanager
    def _untouched(self, what: str, parameters: Mapping[str, nn.Parameter], model: nn.Module | None = None) -> Iterator:
        """AssertionError where a call has written into values or gradients or has used a global generator."""
        kept = {k: (p.detach().clone(), None if p.grad is None else p.grad.clone()) for k, p in parameters.items()}
        buffers = {} if model is None else {k: b.clone() for k, b in model.named_buffers()}
        modes = [] if model is None else [m.training for m in model.modules()]
        states = _random_states()
        yield
        for key, (value, gradient) in kept.items():
            now = parameters[key]
            if not _same(value, now.detach()):
                raise AssertionError(f"{self.name}: {what} must leave {key} as it is, got others (step {self.step})")
            if not _same(gradient, now.grad):
                raise AssertionError(
                    f"{self.name}: {what} must leave the gradient of {key} as it is, got another (step {self.step})"
                )
        if model is not None and not (
            all(_same(buffers[k], b) for k, b in model.named_buffers())
            and modes == [m.training for m in model.modules()]
        ):
            raise AssertionError(f"{self.name}: {what} must leave buffers and modes as they are (step {self.step})")
        for kind, before, after in zip(("torch", "Python", "NumPy"), states, _random_states(), strict=True):
            if before != after:
                raise AssertionError(
                    f"{self.name}: {what} must not use {kind}'s global random numbers, but layer.random (step "
                    f"{self.step})"
                )

    @contextmanager
    def _counting_draws(self, layer: LayerView) -> Iterator:
        """Notices whether the policy asks this view for random numbers."""
        before = dict(vars(layer))

        def drawing(method: Callable) -> Callable:
            def draw(*arguments: Any) -> Tensor:
                self.drew = True
                return method(*arguments)

            return draw

        for name in _DRAWS:
            setattr(layer, name, drawing(getattr(layer, name)))
        try:
            yield
        finally:
            for name in _DRAWS:
                vars(layer).pop(name)
                vars(layer).update({name: before[name]} if name in before else {})

    # --- what it answers ---

    def _look_at_drop_scores(self, scores: Any, layer: LayerView) -> None:
        self._look_at_scores("drop_scores", scores, layer, layer.pattern.num_blocks)
        self.drop_scores[layer.name] = scores.detach().float().clone()

    def _look_at_grow_scores(self, scores: Any, layer: LayerView, places: Tensor) -> None:
        self._look_at_scores("grow_scores", scores, layer, len(places))
        found = zip(places.tolist(), scores.detach().float().tolist(), strict=True)
        self.grow_scores.setdefault(layer.name, {}).update(found)

    def _look_at_scores(self, which: str, scores: Any, layer: LayerView, count: int) -> None:
        where = f"(step {self.step}, layer {layer.name!r})"
        if not isinstance(scores, Tensor) or tuple(scores.shape) != (count,) or not scores.is_floating_point():
            got = f"{scores.dtype} {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise AssertionError(f"{self.name}: {which} must be floating-point [{count}], got {got} {where}")
        wrong = int((~torch.isfinite(scores)).sum())
        if wrong:
            self.bad[layer.name] = f"{which} must be finite, got {wrong} of {count} that are not"

    def _look_at_grow_places(self, places: Any, layer: LayerView, count: int) -> None:
        if places is None:
            return
        where = f"(step {self.step}, layer {layer.name!r})"
        if not isinstance(places, Tensor) or places.dtype != torch.int64 or places.dim() != 1 or len(places) > count:
            got = f"{places.dtype} {list(places.shape)}" if isinstance(places, Tensor) else type(places).__name__
            raise AssertionError(f"{self.name}: grow_places must be int64 [at most {count}], got {got} {where}")
        if bool((places[1:] <= places[:-1]).any()):
            raise AssertionError(f"{self.name}: grow_places must ascend, each once, got others {where}")
        taken = int(torch.isin(places, layer.pattern.linear_places()).sum())
        if taken:
            raise AssertionError(f"{self.name}: grow_places must be inactive, got {taken} active ones {where}")
        if len(places) < count:
            self.named_fewer.add(layer.name)

    def _look_at_after_step(self, _: Any, layer: LayerView) -> None:
        for key, tensor in layer.state.items():
            if not isinstance(tensor, Tensor) or not tensor.dim() or len(tensor) != layer.pattern.num_blocks:
                got = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise AssertionError(
                    f"{self.name}: state {key!r} must have one entry for each of {layer.pattern.num_blocks} blocks, "
                    f"got {got} (step {self.step}, layer {layer.name!r})"
                )
        if self.after_step is not None:
            self.after_step(layer)

    def _look_at_adjust(self, values: Any, layer: LayerView, dropped: Tensor) -> None:
        if values is not None:
            self.adjusted[layer.name] = values.detach().clone()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    """Bit for bit, NaN included."""
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def _random_states() -> tuple:
    numpy = np.random.get_state()
    return bytes(torch.get_rng_state().numpy()), random.getstate(), (numpy[1].tobytes(), *numpy[2:])
