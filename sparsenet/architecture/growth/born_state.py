"""What optimizer state new weights start with, for any optimizer: found out by two strides on a scratch parameter.

A new weight gets what the optimizer itself gives a new parameter: zero for momentum, the learning rate for Rprop's step
sizes. Second moments are different. Late in training those of old weights are settled; at zero, the first steps of
new ones are several times too large (Adam divides by their root), and at the mean of the others they are held back as
long as the average forgets. The default is 0.03 of the mean of the old entries.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsenet.architecture.growth.placing import GrowthError
from sparsenet.schedules import as_number

__all__ = ["STATES", "BornState"]

STATES = {"zero": 0.0, "scaled": 0.03, "mean": 1.0}


class _Probed(NamedTuple):
    """One tensor of state: whether it is a second moment, how it starts, its shape for a parameter [2, 2, ...]."""

    second: bool
    first: float
    shape: tuple[int, ...]


class BornState:
    """The values that new entries of optimizer state start with.

    Args:
        state: ``zero``, ``scaled``, ``mean``, or a factor: second moments start at it times the mean of the others.

    Raises:
        GrowthError: another word, or a factor below 0.
    """

    def __init__(self, state: str | float):
        if isinstance(state, str):
            if state not in STATES:
                raise GrowthError(f"widen: state must be one of {', '.join(STATES)} or a number, got {state!r}")
            self.factor = STATES[state]
        else:
            self.factor = float(as_number("widen", "state", state, within=(0, float("inf"))))

    def value(self, optimizer: Optimizer, parameter: nn.Parameter, key: str) -> float:
        """What a new entry of the optimizer's state ``key`` of ``parameter`` starts with."""
        probed = self._of(optimizer, parameter).get(key)
        if probed is None:
            return 0.0
        if not probed.second:
            return probed.first
        others = optimizer.state[parameter][key].detach()
        return float(others.double().mean()) * self.factor if others.numel() else 0.0

    def along(self, optimizer: Optimizer, parameter: nn.Parameter, key: str, d: int) -> bool:
        """Whether the state has entries along dimension ``d`` of ``parameter``: one of size 1 does not show it."""
        t = optimizer.state[parameter][key]
        if t.dim() != parameter.dim():
            return d == 0 and t.dim() == 1 and len(t) == len(parameter)
        if parameter.shape[d] > 1:
            return t.shape[d] == parameter.shape[d]
        probed = self._of(optimizer, parameter).get(key)
        return probed is None or len(probed.shape) != t.dim() or probed.shape[d] == 2

    @staticmethod
    def _of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, _Probed]:
        group = group_of(optimizer, parameter)
        if group is None:
            return {}
        options = repr([(key, value) for key, value in group.items() if key not in ("params", "param_names")])
        known = _PROBED.setdefault(optimizer, {})
        at = (parameter.dim(), parameter.dtype)
        if known.get(at, ("",))[0] != options:
            known[at] = (options, _probe(optimizer, group, parameter))
        return known[at][1]


_PROBED: weakref.WeakKeyDictionary[Optimizer, dict] = weakref.WeakKeyDictionary()  # a probe takes a millisecond


def group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict | None:
    """The group of the optimizer that holds ``parameter``."""
    return next((g for g in optimizer.param_groups if any(p is parameter for p in g["params"])), None)


def _probe(optimizer: Optimizer, group: dict, parameter: nn.Parameter) -> dict[str, _Probed]:
    """What a new optimizer of the same kind keeps for two scratch parameters [2, 2, ...] after one step.

    One of them has a zero gradient, the other gradients of both signs. What becomes positive for either sign, and would
    not for none, is a second moment.
    """
    sizes = [2] * max(parameter.dim(), 1)
    still, moved = (nn.Parameter(parameter.detach().new_zeros(sizes)) for _ in range(2))
    still.grad, moved.grad = torch.zeros_like(still), torch.ones_like(moved)
    moved.grad[1] = -1.0
    twin = twin_of(optimizer, group, [still, moved])
    if twin is None:
        return {}
    try:
        with torch.no_grad():
            twin.step()
    except Exception:  # an optimizer that wants more for a step than gradients
        return {}
    found = {}
    for key, before in twin.state.get(still, {}).items():
        after = twin.state.get(moved, {}).get(key)
        if isinstance(before, Tensor) and isinstance(after, Tensor) and before.dim() and before.shape == after.shape:
            second = bool((after > 0).all()) and not torch.equal(before, after)
            found[key] = _Probed(second, float(before.flatten()[0]), tuple(before.shape))
    return found


def twin_of(optimizer: Optimizer, group: dict, parameters: Sequence[nn.Parameter]) -> Optimizer | None:
    """A new optimizer of the same kind and options for other parameters; None where none can be made so."""
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    kind = type(optimizer)
    try:
        accepted = inspect.signature(kind).parameters
        defaults = {key: value for key, value in optimizer.defaults.items() if key in accepted}
        return kind([{**options, "params": list(parameters)}], **defaults)
    except Exception:
        return None
