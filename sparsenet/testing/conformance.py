"""Checking that a policy, of the library or of one's own, keeps what the Sparsifier promises."""

from __future__ import annotations

import copy
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet.layers import sparse_layers
from sparsenet.models import SparseMLP
from sparsenet.policies.policy import Policy
from sparsenet.schedules import as_integer
from sparsenet.testing.training import Case, Training

__all__ = ["PROPERTIES", "ConformanceReport", "check_policy"]

PROPERTIES = {
    "counts": "what leaves and comes is what drop fraction, density and distribution say, and what the update says",
    "choice": "the units of the lowest drop scores leave and those of the highest grow scores come",
    "coverage": "no row or column of blocks loses its last one while there are enough",
    "values": "what stays is bit for bit what it was, or what ``adjust`` says; what comes is zero",
    "moments": "optimizer state follows its blocks bit for bit; new blocks have that of a new parameter",
    "masks": "masked elements are zero after every step, and N:M rules hold",
    "scores": "scores have their shape and are finite; asking for them changes nothing and draws nothing",
    "same seed": "two runs from one seed are the same bit for bit, the second with a pickled copy of the policy",
    "other seed": "another seed of the Sparsifier changes nothing but what was drawn",
    "resume": "saved and loaded into a fresh network with another pattern, training goes on bit for bit",
    "no optimizer": "everything but the moments holds for a Sparsifier without an optimizer",
}


@dataclass(frozen=True)
class ConformanceReport:
    """What :func:`check_policy` has checked; it raises where something does not hold.

    Attributes:
        policy: its name.
        steps: of all trainings together. rewires: of single layers, in the trainings whose every step was checked.
        dropped, grown: units in these.
        skipped: rewires that left their layer as it was, and ``reasons`` for that.
        properties: the names in ``PROPERTIES`` of what was checked.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.testing import check_policy
        >>> report = check_policy(sn.SET, steps=8, every=2)
        >>> report.dropped == report.grown > 0, report.skipped
        (True, 0)
    """

    policy: str
    steps: int
    rewires: int
    dropped: int
    grown: int
    skipped: int
    reasons: tuple[str, ...]
    properties: tuple[str, ...]


def check_policy(
    make_policy: Policy | type[Policy] | Callable[[], Policy],
    *,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    density: float | Callable[[int], float] | None = None,
    distribution: Any = None,
    optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer] | None = None,
    elements: bool | float | str = False,
    steps: int = 24,
    every: int = 4,
    seed: int = 0,
    data: Sequence[tuple[Tensor, Tensor]] | None = None,
) -> ConformanceReport:
    """Trains a small network several times with a policy and checks every step of it; see ``PROPERTIES``.

    Args:
        make_policy: a policy, its class, or a function that makes one.
        model: a network with sparse layers, of which copies are trained, or a function that makes one; torch's
            generator is seeded before. Default: 50-61-37-10, half of the blocks, of sides 4, 8 and 4.
        density, distribution, every: as the Sparsifier takes them. Default: where the policy follows a density, one
            that falls to 0.6 of what the network has; else no layer's count changes.
        optimizer: makes an optimizer of a list of parameters; default Adam.
        elements: element masks in all layers, rewired inside stored blocks: a share in (0, 1), ``"2:4"`` and the like,
            or True for half. Layers of ``model`` that have masks keep theirs.
        steps: of one training, at least three times ``every``.
        seed: of network, data and Sparsifier.
        data: (input, target) pairs of a step each, in turns; integer targets are classes, others are regressed to. Half
            of the steps split theirs into two backward passes.

    Raises:
        AssertionError: a property does not hold; the message says which, at which step and in which layer.
        TypeError, ValueError: arguments that make no training. What the policy itself raises is passed on.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.testing import check_policy
        >>> class Shrinking(sn.Policy):
        ...     def drop_scores(self, layer):   # forgets that every block has one score
        ...         return layer.values.detach().flatten()
        >>> check_policy(Shrinking)
        Traceback (most recent call last):
        AssertionError: Shrinking: drop_scores must be floating-point [89], got torch.float32 [1424] (step 4, layer '0')
    """
    steps = as_integer("check_policy", "steps", steps, at_least=1)
    every = as_integer("check_policy", "every", every, at_least=1)
    if steps < 3 * every:
        raise ValueError(f"check_policy: steps must be at least three times every ({every}), got {steps}")
    policy = _policy_of(make_policy)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore", UserWarning)
        make_model = _model_maker(model, elements)
        first, made = make_model(seed), (_adam if optimizer is None else optimizer)
        if density is None and policy.follows_density and not (elements and _all_in_groups(first)):
            start = _density_of(first, bool(elements))
            density = policy.density_schedule(start, 0.6 * start, max(1, steps - every))
        batches = data or _data_for(first, seed)
        case = Case(make_model, made, batches, density, distribution, bool(elements), every, seed)
        return _check(policy, case, steps, Path(folder))


def _check(policy: Policy, case: Case, steps: int, folder: Path) -> ConformanceReport:
    first = Training(case, _deepcopy(policy))
    first.save_at = {case.every + 1: folder / "1", 2 * case.every: folder / "2", 3 * case.every - 1: folder / "3"}
    first.train(steps).release()
    first.require_rewires()
    again = Training(case, _pickled(policy)).train(steps, check=False).release()
    again.must_equal(first, "a second run from the same seed must be the same")
    other = Training(replace(case, sparsifier_seed=case.seed + 1), _deepcopy(policy)).train(steps).release()
    _check_other_seed(first, other)
    resumed = sum(_check_resumed(first, policy, step, by_file=number != 1) for number, step in enumerate(first.save_at))
    bare = Training(replace(case, hands_optimizer_over=False), _deepcopy(policy)).train(2 * case.every).release()
    checked = (first, other, bare)
    return ConformanceReport(
        type(policy).__name__,
        3 * steps + resumed + bare.steps,
        *(sum(getattr(t, key) for t in checked) for key in ("rewires", "dropped", "grown", "skipped")),
        tuple(sorted({reason for t in checked for reason in t.reasons})),
        tuple(name for name in PROPERTIES if name != "masks" or first.has_masks),
    )


def _check_other_seed(first: Training, other: Training) -> None:
    """Nothing differs before the first rewire, and nothing at all where nothing was drawn."""
    until = first.case.every - 1 if first.draws or other.draws else first.steps
    what = "another seed of the Sparsifier must change only what is drawn"
    other.must_equal(
        first, what, until, but=("'seed' of the Sparsifier's state", "'watched' of the Sparsifier's state")
    )


def _check_resumed(first: Training, policy: Policy, step: int, by_file: bool) -> int:
    """Goes on from ``step`` in a network made with another seed; how many steps that were."""
    case = replace(first.case, seed=first.case.seed + 7)
    resumed = Training(case, _deepcopy(policy))
    resumed.load(first, step, by_file)
    resumed.train(first.steps, check=False).release()
    resumed.must_equal(first, f"a run that goes on from step {step} must be the same")
    return first.steps - step


# --- what is trained -------------------------------------------------------------------------------------------------


def _adam(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def _policy_of(make_policy: Any) -> Policy:
    policy = make_policy if isinstance(make_policy, Policy) else make_policy()
    if not isinstance(policy, Policy):
        raise TypeError(f"check_policy: make_policy must be or make a sparsenet Policy, got {policy!r}")
    return policy


def _deepcopy(policy: Policy) -> Policy:
    try:
        return copy.deepcopy(policy)
    except Exception as error:
        raise AssertionError(
            f"{type(policy).__name__}: the policy must survive copy.deepcopy, got {error!r}"
        ) from error


def _pickled(policy: Policy) -> Policy:
    """A copy through pickle; one by deepcopy of a class that only exists inside a function."""
    kind = type(policy)
    found: Any = sys.modules.get(kind.__module__)
    for part in kind.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is not kind:
        return _deepcopy(policy)
    try:
        return pickle.loads(pickle.dumps(policy))
    except Exception as error:
        raise AssertionError(f"{kind.__name__}: the policy must survive pickle, got {error!r}") from error


def _model_maker(model: Any, elements: bool | float | str) -> Callable[[int], nn.Module]:
    """A function of a seed: the same network for the same, one with another pattern for another where it is made."""

    def make(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        if model is None:
            made = SparseMLP([50, 61, 37, 10], density=0.5, block_size=[4, 8, 4])
        else:
            made = copy.deepcopy(model) if isinstance(model, nn.Module) else model()
        for layer in sparse_layers(made).values() if elements else ():
            if layer.element_mask is None:
                layer.set_element_mask(0.5 if elements is True else elements)
        return made

    return make


def _data_for(model: nn.Module, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Classes of a random linear teacher: inputs of the first sparse layer, labels of the last one's outputs."""
    layers = list(sparse_layers(model).values())
    draw = torch.Generator().manual_seed(seed)
    inputs, classes = layers[0].in_features, layers[-1].out_features
    teacher = torch.randn(inputs, classes, generator=draw)
    batches = [torch.randn(13, inputs, generator=draw) for _ in range(8)]
    return [(x.to(layers[0].values.dtype), (x @ teacher).argmax(1)) for x in batches]


def _all_in_groups(model: nn.Module) -> bool:
    """Whether all layers have N:M masks, whose elements keep their number."""
    return all(layer.elements is not None for layer in sparse_layers(model).values())


def _density_of(model: nn.Module, elements: bool) -> float:
    """Active elements of those of the matrices, or blocks of their places, in weights."""
    layers = list(sparse_layers(model).values())
    if elements:
        return sum(m.num_active for m in layers) / sum(m.in_features * m.out_features for m in layers)
    now = sum(m.pattern.num_blocks * m.block_size**2 for m in layers)
    return now / sum(m.pattern.block_rows * m.pattern.block_cols * m.block_size**2 for m in layers)
