"""Tri-state ReLU: units that learn whether they exist, and layers that learn whether they are non-linear.

``TriStateReLU`` computes ``w x`` for ``x >= 0`` and ``w d x`` below, with a width gate ``w`` per unit (or channel) and
a depth gate ``d`` per layer: ``w = 0`` drops the unit, ``w = 1, d = 0`` is ReLU, ``w = d = 1`` is the identity, after
which the layer merges with the next one (Srinivas & Babu, "Learning Neural Network Architectures using
Backpropagation", BMVC 2016). ``architecture_penalty`` is what makes gates binary and networks small::

    lambda_1 sum w (1 - w) + lambda_2 sum d (1 - d) + lambda_3 sum_layers [d < 1/2] sum w - lambda_4 sum d

Newer relatives stand behind the same module: how a gate is computed, what it costs and how it is kept in range is one
small class each, listed in ``GATES``. :func:`sparsenet.compact` removes units whose gate is closed, and
:func:`sparsenet.fold_depth` layers that became the identity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from sparsenet.after_step import after_every_step
from sparsenet.architecture.gate_kinds import GATES, HardConcreteGate, SlimmingGate, StraightThrough, TriStateGate
from sparsenet.schedules import as_integer, as_number, as_schedule

__all__ = [
    "GATES",
    "TriStateReLU",
    "architecture_penalty",
    "clip_gates_",
    "close_gates_",
    "gate_parameters",
    "gated_layers",
    "parameter_groups",
    "penalty_strengths",
]

REFERENCE_STRENGTH = 1e-5 * 570  # lambda_3 times units in the authors' MNIST network (20 + 50 + 500)
REFERENCE_RATIO = 0.4  # lambda_3 / lambda_1 of their first two tables

Strength = float | Callable[[int], float]


# --- the unit -------------------------------------------------------------------------------------------------------


class _GatedReLU(torch.autograd.Function):
    """y = w x where x >= 0 or d is 1, else 0; keeps only x for backward, whatever its size."""

    @staticmethod
    def forward(ctx, x, w, d, dim):
        """X [..., n, ...], w [n] gates, d [] binary -> y like x."""
        ctx.dim = dim % x.dim()
        ctx.save_for_backward(x, w, d)
        return torch.where((x < 0) & (d < 0.5), 0.0, x) * _along(w, x, ctx.dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Gradients of x, w and d; d's as if the negative half were ``w d x``."""
        x, w, d = ctx.saved_tensors
        off = (x < 0) & (d < 0.5)
        others = [i for i in range(x.dim()) if i != ctx.dim]
        grad_w = torch.where(off, 0.0, grad * x).sum(others) if ctx.needs_input_grad[1] else None
        grad_x = grad * _along(w, x, ctx.dim)
        grad_d = (grad_x * x.clamp(max=0)).sum() if ctx.needs_input_grad[2] else None
        return torch.where(off, 0.0, grad_x), grad_w, grad_d, None


def _along(w: Tensor, x: Tensor, dim: int) -> Tensor:
    return w.to(x.dtype).view([-1 if i == dim else 1 for i in range(x.dim())])


class TriStateReLU(nn.Module):
    """``w x`` where x >= 0 and ``w d x`` below, with learnt binary ``w`` per unit and ``d`` per layer.

    Args:
        num_features: units, or channels of a convolution.
        width: whether the width gates learn; else all units stay.
        depth: whether the depth gate learns; else the layer stays a ReLU.
        gates: ``tri_state`` (the paper's), ``straight_through``, ``hard_concrete`` or ``slimming``.
        width_start: where width gates start, in [0, 1]: a number, a tensor [num_features], or ``uniform`` for U(0, 1).
            The default is ``uniform`` for tri_state and straight_through (it breaks the symmetry between units, as the
            published curves imply) and 1 for the others.
        depth_start: where the depth gate starts, in [0, 1].
        dim: which dimension of the input the units are; 1 fits [batch, n] and [batch, n, h, w].
        device, dtype: of the gates. generator: draws uniform starts.

    Raises:
        ValueError: a size, kind or start out of range.

    Gates are clipped to their range after every ``optimizer.step()``, of any ``torch.optim`` optimizer, and the
    strongest of a layer is held half open; with another optimizer call :func:`clip_gates_`. In backward the thresholds
    are straight-through.

    Attributes:
        width_gate: Parameter [num_features]. depth_gate: Parameter [].

    Shape: any [..., num_features, ...] -> the same.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), sn.TriStateReLU(16), torch.nn.Linear(16, 2))
        >>> loss = model(torch.randn(4, 8)).square().mean() + sn.architecture_penalty(model)
        >>> loss.backward()
        >>> model[1].width_gate.grad.shape
        torch.Size([16])
    """

    def __init__(
        self,
        num_features: int,
        *,
        width: bool = True,
        depth: bool = True,
        gates: str = "tri_state",
        width_start: float | Tensor | str | None = None,
        depth_start: float = 0.0,
        dim: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        num_features = as_integer("TriStateReLU", "num_features", num_features, at_least=1)
        if gates not in GATES:
            raise ValueError(f"TriStateReLU: gates must be one of {', '.join(GATES)}, got {gates!r}")
        self.num_features = num_features
        self.gates = gates
        self.dim = dim
        if width_start is None:
            width_start = "uniform" if width and gates in ("tri_state", "straight_through") else 1.0
        start = _width_start(num_features, width_start, generator).to(device=device, dtype=dtype)
        self.width_gate = nn.Parameter(self.kind.initial(start), requires_grad=width)
        self.depth_gate = nn.Parameter(
            start.new_tensor(as_number("TriStateReLU", "depth_start", depth_start, within=(0, 1))), depth
        )
        after_every_step(self, _clip)

    @property
    def kind(self) -> TriStateGate:
        """How the width gates are computed."""
        return GATES[self.gates]

    def forward(self, x: Tensor) -> Tensor:
        """[..., num_features, ...] -> the same."""
        if x.dim() == 0 or not -x.dim() <= self.dim < x.dim() or x.shape[self.dim] != self.num_features:
            raise ValueError(
                f"TriStateReLU: x must have {self.num_features} entries in dimension {self.dim}, got {list(x.shape)}"
            )
        w = self.kind.value(self.width_gate, self.training)
        return _GatedReLU.apply(x, w, StraightThrough.apply(self.depth_gate), self.dim)

    def closed_units(self) -> Tensor:
        """Bool [num_features]: units whose gate is zero; what compaction removes."""
        return self.kind.closed(self.width_gate.detach())

    def is_identity(self) -> bool:
        """Whether the depth gate made the layer linear."""
        return bool(self.depth_gate.detach() >= 0.5)

    def num_open(self) -> int:
        """Units whose gate is open."""
        return self.num_features - int(self.closed_units().sum())

    def extra_repr(self) -> str:
        """Open units, kind and state of the depth gate."""
        depth = "identity" if self.is_identity() else "relu"
        return f"{self.num_features}, open={self.num_open()}, {depth}, gates={self.gates!r}"

    def __setstate__(self, state):
        super().__setstate__(state)
        after_every_step(self, _clip)


def _width_start(n: int, start: float | Tensor | str, generator: torch.Generator | None) -> Tensor:
    """[n] in [0, 1]."""
    if isinstance(start, str):
        if start != "uniform":
            raise ValueError(f"TriStateReLU: width_start must be 'uniform', a number or a tensor, got {start!r}")
        return torch.rand(n, generator=generator)
    if isinstance(start, (Tensor, np.ndarray)) and start.ndim:
        start = torch.as_tensor(start)
        inside = start.shape == (n,) and bool(((start >= 0) & (start <= 1)).all())
        if not inside:
            raise ValueError(f"TriStateReLU: width_start must be [{n}] in [0, 1], got {list(start.shape)}: {start}")
        return start.detach().to(torch.get_default_dtype(), copy=True)
    return torch.full((n,), as_number("TriStateReLU", "width_start", start, within=(0, 1)))


@torch.no_grad()
def _clip(layer: TriStateReLU) -> None:
    if layer.width_gate.requires_grad:
        layer.kind.clip_(layer.width_gate)
        layer.kind.keep_one_(layer.width_gate)
    if layer.depth_gate.requires_grad:
        layer.depth_gate.clamp_(0.0, 1.0)


# --- over a model ---------------------------------------------------------------------------------------------------


def gated_layers(model: nn.Module) -> dict[str, TriStateReLU]:
    """The TriStateReLU layers of ``model`` by name, each once, in module order.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), sn.TriStateReLU(16), torch.nn.Linear(16, 2))
        >>> list(sn.architecture.gates.gated_layers(model))
        ['1']
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, TriStateReLU)}


def gate_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """All learnable gates of ``model``.

    Example:
        >>> import sparsenet as sn
        >>> [tuple(gate.shape) for gate in sn.architecture.gates.gate_parameters(sn.TriStateReLU(16))]
        [(16,), ()]
    """
    for layer in gated_layers(model).values():
        yield from (p for p in (layer.width_gate, layer.depth_gate) if p.requires_grad)


def parameter_groups(model: nn.Module, gate_lr: float, **gate_options) -> list[dict]:
    """Parameter groups for any optimizer: weights with the optimizer's own settings, gates with ``gate_lr``.

    Gates get no weight decay unless ``gate_options`` says so: the penalty is what pulls on them.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), sn.TriStateReLU(16), torch.nn.Linear(16, 2))
        >>> groups = sn.architecture.gates.parameter_groups(model, gate_lr=0.3)
        >>> optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    """
    gates = list(gate_parameters(model))
    known = {id(p) for p in gates}
    weights = [p for p in model.parameters() if id(p) not in known and p.requires_grad]
    return [{"params": weights}, {"params": gates, "lr": gate_lr, "weight_decay": 0.0, **gate_options}]


def clip_gates_(model: nn.Module) -> None:
    """Brings the gates of ``model`` back into their range; done already after every ``torch.optim`` step.

    Example:
        >>> import torch, sparsenet as sn
        >>> act = sn.TriStateReLU(3, width_start=torch.tensor([0.2, 0.6, 1.0]))
        >>> with torch.no_grad():
        ...     _ = act.width_gate.add_(0.3)
        >>> sn.architecture.gates.clip_gates_(act)
        >>> [round(gate, 3) for gate in act.width_gate.tolist()]
        [0.5, 0.9, 1.0]
    """
    for layer in gated_layers(model).values():
        _clip(layer)


@torch.no_grad()
def close_gates_(model: nn.Module, *, share: float | None = None, below: float | None = None) -> int:
    """Switches the weakest units off for good: what slimming does before :func:`sparsenet.compact`.

    Args:
        model: with TriStateReLU layers; those whose gates do not learn (``width=False``) stay as they are.
        share: of all other units together that shall be off, in [0, 1); the smallest gates go, ties by position.
        below: every unit whose gate outside of training is below this in absolute value goes. One of the two.

    Returns:
        How many units are off now. A layer keeps its strongest unit.

    Raises:
        ValueError: neither or both given, or out of range; no gate learns.

    Example:
        >>> import torch, sparsenet as sn
        >>> act = sn.TriStateReLU(4, gates="slimming", width_start=torch.tensor([0.1, 0.9, 0.2, 0.8]))
        >>> sn.architecture.gates.close_gates_(act, share=0.5)
        2
        >>> act(torch.ones(1, 4)).detach()
        tensor([[0.0000, 0.9000, 0.0000, 0.8000]])
    """
    if (share is None) == (below is None):
        raise ValueError(f"close_gates_: give share or below, one of the two, got share={share!r}, below={below!r}")
    if share is not None and not 0.0 <= share < 1.0:
        raise ValueError(f"close_gates_: share must lie in [0, 1), got {share!r}")
    layers = [layer for layer in gated_layers(model).values() if layer.width_gate.requires_grad]
    if not layers:
        raise ValueError("close_gates_: model must hold at least one TriStateReLU whose gates learn, got none")
    strengths = [_strength(layer) for layer in layers]
    if share is not None:
        ranked = torch.cat([s.float() for s in strengths]).argsort(stable=True)
        chosen = torch.zeros(len(ranked), dtype=torch.bool, device=ranked.device)
        chosen[ranked[: round(share * len(ranked))]] = True
        masks = chosen.split([len(s) for s in strengths])
    else:
        masks = [s < below for s in strengths]
    for layer, mask, strength in zip(layers, masks, strengths, strict=True):
        mask = mask.clone()
        mask[strength.argmax()] = False
        layer.kind.close_(layer.width_gate, mask)
    return sum(int(layer.closed_units().sum()) for layer in layers)


def _strength(layer: TriStateReLU) -> Tensor:
    """[n]: how open each gate is; for thresholded gates the parameter itself, which ranks what a threshold cannot."""
    if isinstance(layer.kind, HardConcreteGate | SlimmingGate):
        return layer.kind.value(layer.width_gate.detach(), training=False).abs()
    return layer.width_gate.detach()


def penalty_strengths(
    model: nn.Module,
    lambda_3: Strength | None = None,
    lambda_1: Strength | None = None,
    lambda_2: Strength | None = None,
    lambda_4: Strength | None = None,
    step: int = 0,
) -> tuple[float, float, float, float]:
    """The four strengths at ``step``, what is not given by the authors' heuristics.

    lambda_3 = 1e-5 for 570 units, less in proportion for more; lambda_1 = lambda_3 / 0.4; lambda_2 = lambda_1 / 10;
    lambda_4 = lambda_3 / 10. Each may be a number or a schedule (a warm-up: ``sn.Linear(0, 1e-4, steps=1000)``).

    Returns:
        (lambda_1, lambda_2, lambda_3, lambda_4).

    Raises:
        ValueError: a strength is negative or not finite at ``step``.

    Example:
        >>> import sparsenet as sn
        >>> strengths = sn.architecture.gates.penalty_strengths(sn.TriStateReLU(570), lambda_3=4e-5)
        >>> [float(f"{strength:.3g}") for strength in strengths]
        [0.0001, 1e-05, 4e-05, 4e-06]
    """
    if lambda_3 is None:
        units = sum(layer.num_features for layer in gated_layers(model).values())
        lambda_3 = REFERENCE_STRENGTH / max(units, 1)
    three = _strength_at("lambda_3", lambda_3, step)
    one = three / REFERENCE_RATIO if lambda_1 is None else _strength_at("lambda_1", lambda_1, step)
    two = one / 10 if lambda_2 is None else _strength_at("lambda_2", lambda_2, step)
    four = three / 10 if lambda_4 is None else _strength_at("lambda_4", lambda_4, step)
    return one, two, three, four


def architecture_penalty(
    model: nn.Module,
    lambda_3: Strength | None = None,
    lambda_1: Strength | None = None,
    lambda_2: Strength | None = None,
    lambda_4: Strength | None = None,
    step: int = 0,
) -> Tensor:
    """What to add to the loss: indecision of the gates, number of units, less a reward for linear layers.

    Args:
        model: with TriStateReLU layers.
        lambda_3: price of a unit; larger makes the network smaller. ``lambda_1``: pull of each gate to 0 or 1. With no
            data a gate falls to 0 from below ``1/2 + lambda_3 / (2 lambda_1)`` and rises to 1 from above.
        lambda_2, lambda_4: pull of the depth gates, and the reward of a linear layer.
        step: for strengths given as schedules.

    Strengths left out follow :func:`penalty_strengths`. Gates that do not learn count nothing. For hard-concrete
    gates the number of units is the expected one, for slimming gates the sum of absolute factors.

    Returns:
        A scalar tensor.

    Raises:
        ValueError: the model has no TriStateReLU, or a strength is negative or not finite.

    Source: Srinivas & Babu (BMVC 2016), equations 3.4 and 3.5.

    Example:
        >>> import torch, sparsenet as sn
        >>> act = sn.TriStateReLU(4, depth=False, width_start=torch.tensor([0.0, 0.5, 1.0, 1.0]))
        >>> round(sn.architecture_penalty(act, lambda_3=0.1, lambda_1=1.0).item(), 4)   # 1.0 * 0.25 + 0.1 * 2.5
        0.5
    """
    layers = gated_layers(model)
    if not layers:
        raise ValueError("architecture_penalty: model must hold at least one TriStateReLU, got none")
    one, two, three, four = penalty_strengths(model, lambda_3, lambda_1, lambda_2, lambda_4, step)
    terms = []
    for layer in layers.values():
        w, d, kind = layer.width_gate, layer.depth_gate, layer.kind
        if w.requires_grad:
            nonlinear = float(d.detach() < 0.5)  # a constant with respect to d
            terms.append(one * kind.indecision(w) + (three * nonlinear) * kind.cost(w))
        if d.requires_grad:
            terms.append(two * d * (1 - d) - four * d)
    return torch.stack(terms).sum() if terms else next(iter(layers.values())).width_gate.new_zeros(())


def _strength_at(name: str, strength: Strength, step: int) -> float:
    value = float(as_schedule(strength)(step))
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"architecture_penalty: {name} must be finite and at least 0, got {value}")
    return value
