"""Policies, schedules, distributions and optimizers in pairs: the cases that :func:`check_policy` is run on.

Every pair of values of two factors is in at least one combination, so that what fails when two things meet is seen
(Cohen et al., 1997: the greedy method of AETG).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations as subsets
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet import schedules
from sparsenet.models import SparseMLP
from sparsenet.policies import MEST, POLICIES, SET, SNFS, Movement, Policy, RigL, Taylor
from sparsenet.testing.conformance import ConformanceReport, check_policy

__all__ = ["FACTORS", "MuonLike", "check_combination", "combinations", "is_allowed", "pairwise"]

EVERY, STEPS = 3, 12
START = 0.5  # the density of blocks that every network begins with; of elements half of that under a mask

Combination = dict[str, str]


class MuonLike(torch.optim.Optimizer):
    """Momentum whose blocks are made nearly orthogonal, as Muon (Jordan et al., 2024) does to whole matrices.

    torch's own takes 2-D parameters only. Biases, and other vectors, get the momentum itself.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.testing.combinations import MuonLike
        >>> layer = sn.SparseLinear(32, 16, density=0.5, block_size=8)
        >>> optimizer = MuonLike(layer.parameters(), lr=0.02)
        >>> layer(torch.randn(4, 32)).square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.state[layer.values]["momentum"].shape == layer.values.shape
        True
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float = 0.02, momentum: float = 0.9):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """One step; parameters without a gradient stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                state.setdefault("momentum", torch.zeros_like(parameter)).mul_(group["momentum"]).add_(parameter.grad)
                moved = state["momentum"]
                parameter.add_(_orthogonal(moved) if moved.dim() == 3 else moved, alpha=-group["lr"])


def _orthogonal(blocks: Tensor) -> Tensor:
    """Five steps of Newton and Schulz on each of [n, b, b]."""
    x = blocks / (torch.linalg.matrix_norm(blocks, keepdim=True) + 1e-7)
    for _ in range(5):
        x = 1.5 * x - 0.5 * x @ x.mT @ x
    return x


def _densities(name: str, start: float, steps: int) -> Callable[[int], float] | None:
    """The density schedule of this name, from ``start``."""
    half = max(1, steps // 2)
    made = {
        "none": None,
        "constant": schedules.Constant(0.8 * start),
        "linear": schedules.Linear(start, 0.5 * start, steps),
        "cosine": schedules.Cosine(start, 0.5 * start, steps),
        "cubic": schedules.Cubic(start, 0.5 * start, steps),
        "polynomial": schedules.Polynomial(start, 0.5 * start, steps, power=2.0),
        "exponential": schedules.Exponential(start, 0.5 * start, steps),
        "piecewise": schedules.Piecewise((half,), (start, schedules.Linear(start, 0.6 * start, half))),
        "one_shot": schedules.OneShot(start, 0.5 * start, at=half),
        "periodic": schedules.Periodic(start, 0.6 * start, period=2 * EVERY, after_steps=EVERY),
    }
    return made[name]


_SCHEDULES = ("constant", "linear", "cosine", "cubic", "polynomial", "exponential", "piecewise", "one_shot", "periodic")
FRACTIONS: dict[str, float | Callable[[int], float]] = {
    "number": 0.3,
    "cosine": schedules.Cosine(0.4, 0.0, steps=STEPS),
    "one_shot": schedules.OneShot(0.2, 0.4, at=2 * EVERY),
}
DISTRIBUTIONS: dict[str, Any] = {
    "none": None,
    "uniform": "uniform",
    "erdos_renyi": "erdos_renyi",
    "memory": "memory",
    "global": "global",
    "mapping": {"0": 0.5, "1": 1.0, "2": 2.0},
    "function": lambda layers: {name: 1.0 / layer.in_features for name, layer in layers.items()},
}
OPTIMIZERS: dict[str, Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "muon": MuonLike,
}
BLOCK_SIZES: dict[str, int | list[int]] = {"1": 1, "4": 4, "8": 8, "mixed": [4, 8, 4]}
ELEMENTS: dict[str, bool | float | str] = {"blocks": False, "half": 0.5, "2:4": "2:4"}
COMBINED: dict[str, Callable[[], Policy]] = {
    "mest+rigl": lambda: Policy(drop=MEST, grow=RigL),
    "taylor+set": lambda: Policy(drop=Taylor, grow=SET),
    "movement+snfs": lambda: Policy(drop=Movement, grow=SNFS),
}

FACTORS: dict[str, list[str]] = {
    "policy": [*POLICIES, *COMBINED],
    "density": ["none", *_SCHEDULES],
    "distribution": list(DISTRIBUTIONS),
    "optimizer": list(OPTIMIZERS),
    "block_size": list(BLOCK_SIZES),
    "elements": list(ELEMENTS),
    "drop_fraction": list(FRACTIONS),
}


def _policy(name: str) -> Policy:
    return COMBINED[name]() if name in COMBINED else POLICIES[name]()


def is_allowed(a: tuple[str, str], b: tuple[str, str]) -> bool:
    """Whether two (factor, value) can meet: the others are refused by the library.

    N:M masks need blocks that m divides and keep their number; a policy that grows nothing cannot follow a density that
    rises.

    Example:
        >>> from sparsenet.testing.combinations import is_allowed
        >>> [is_allowed(("policy", name), ("density", "periodic")) for name in ("gmp", "rigl")]
        [False, True]
    """
    found = dict((a, b))
    if found.get("elements") == "2:4":
        return found.get("block_size") != "1" and found.get("density", "none") in ("none", "constant")
    if found.get("density") == "periodic" and "policy" in found:
        return _policy(found["policy"]).grows()
    return True


def pairwise(
    factors: Mapping[str, Sequence[str]], allowed: Callable[[tuple[str, str], tuple[str, str]], bool]
) -> list[Combination]:
    """Combinations of one value of each factor, so that every allowed pair of values is in at least one.

    Greedy, and the same in every process: an uncovered pair, then for each other factor the value that covers most
    pairs that are new. Every pair that is allowed must be part of a whole combination.

    Example:
        >>> from sparsenet.testing.combinations import pairwise
        >>> found = pairwise({"a": "01", "b": "01", "c": "01"}, lambda one, other: True)
        >>> len(found), found[0]   # of eight
        (4, {'a': '0', 'b': '0', 'c': '0'})
    """
    values = [[(factor, value) for value in found] for factor, found in factors.items()]
    waiting = {
        pair: None
        for one, other in subsets(values, 2)
        for pair in ((a, b) for a in one for b in other)
        if allowed(*pair)
    }
    done: list[Combination] = []
    while waiting:
        chosen = list(next(iter(waiting)))
        for found in values:
            if found[0][0] in dict(chosen):
                continue
            fitting = [value for value in found if all(allowed(*_ordered(value, c, factors)) for c in chosen)]
            new = [sum(_ordered(value, c, factors) in waiting for c in chosen) for value in fitting]
            turn = len(done) % len(fitting)  # ties in turns, so that no value comes far more often than the others
            order = [*range(turn, len(fitting)), *range(turn)]
            chosen.append(fitting[max(order, key=lambda i: new[i])])
        for a, b in subsets(chosen, 2):
            waiting.pop(_ordered(a, b, factors), None)
        combination = dict(chosen)
        done.append({factor: combination[factor] for factor in factors})
    return done


def _ordered(a: tuple[str, str], b: tuple[str, str], factors: Mapping[str, Any]) -> tuple:
    """A pair in the order of the factors."""
    order = list(factors)
    return (a, b) if order.index(a[0]) < order.index(b[0]) else (b, a)


def combinations() -> list[Combination]:
    """All of them for ``FACTORS``: names by factor.

    Example:
        >>> from sparsenet.testing.combinations import FACTORS, combinations
        >>> {found["policy"] for found in combinations()} == set(FACTORS["policy"])
        True
    """
    return pairwise(FACTORS, is_allowed)


def check_combination(combination: Mapping[str, str]) -> ConformanceReport:
    """:func:`check_policy` for one of them; AssertionError where a property does not hold.

    Example:
        >>> from sparsenet.testing.combinations import FACTORS, check_combination
        >>> plain = {factor: values[0] for factor, values in FACTORS.items()}
        >>> check_combination(plain | {"policy": "set", "block_size": "8", "optimizer": "muon"}).grown > 0
        True
    """
    policy = _policy(combination["policy"])
    if policy.exchanges:
        policy = replace(policy, drop_fraction=FRACTIONS[combination["drop_fraction"]])
    elements, block_size = ELEMENTS[combination["elements"]], BLOCK_SIZES[combination["block_size"]]
    start = START / 2 if elements else START
    return check_policy(
        policy,
        model=lambda: SparseMLP([50, 61, 37, 10], START, block_size),
        density=_densities(combination["density"], start, STEPS),
        distribution=DISTRIBUTIONS[combination["distribution"]],
        optimizer=OPTIMIZERS[combination["optimizer"]],
        elements=elements,
        steps=STEPS,
        every=EVERY,
    )
