"""Which blocks go and which come.

A policy is two scores: ``drop_scores``, one per active block (the lowest leave), and ``grow_scores``, one per inactive
place (the highest enter). A policy that need not look at every inactive place, because it grows at random or from a
list of its own, answers ``grow_places`` instead. How many of each is the Sparsifier's business: ``drop_fraction`` of
the blocks is exchanged at every rewire, and a density schedule adds or removes the rest.

Adding one: a frozen dataclass with the two methods, a line in ``POLICIES`` (of ``sparsenet.policies``), a test with
numbers worked by hand. What the trainer and the planner of memory need to know about it are class attributes.
:func:`sparsenet.testing.check_policy` says whether a policy keeps what the Sparsifier promises.

What a policy calls a block is whatever is rewired: in a layer whose elements are rewired inside stored blocks
(:class:`sparsenet.Sparsifier`) each active element is a block of side 1, and a policy need not know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from sparsenet.pattern import BlockPattern
from sparsenet.schedules import Cubic, as_schedule

__all__ = ["Combination", "LayerView", "Policy", "Schedule", "block_squared_norms"]

Schedule = Callable[[int], float]


class LayerView(Protocol):
    """What a policy sees of a layer while it is rewired."""

    name: str
    layer: nn.Module  # the SparseLinear
    values: Tensor  # [num_blocks, b, b]
    gradient: Tensor  # [num_blocks, b, b], that of the last optimizer step; a layer that has none keeps its pattern
    pattern: BlockPattern
    element_mask: Tensor | None  # bool [num_blocks, b, b]
    step: int  # the Sparsifier's count
    drop: int  # how many blocks are to leave
    measured: dict[str, Any]  # the policy's own, empty when a pass that is measured begins
    state: dict[
        str, Tensor
    ]  # the policy's own, one entry per block: follows its block, is zero for a new one, is saved

    def put(self, values: Tensor) -> None:
        """Writes values [num_blocks, b, b]; what :attr:`values` returns may be a copy."""

    def random(self, places: Tensor) -> Tensor:
        """float32 [n] in [0, 1): a function of seed, step, layer and place only, the same on every device and rank."""

    def random_places(self, count: int) -> Tensor:
        """int64, ascending: ``count`` inactive places, or all if there are fewer; each set of them equally likely.

        A function of seed, step, layer and pattern only, the same on every device and rank. It takes the time and
        memory of what is drawn and of the active blocks, however many places are free.
        """

    def gradient_squared_norms(self, places: Tensor) -> Tensor:
        """float32 [n]: squared norms of the dense weight gradient's blocks at ``places``; needs ``needs_gradient``."""


@dataclass(frozen=True)
class Policy:
    """Base of all policies.

    Attributes:
        drop_fraction: share of the active blocks exchanged at a rewire, in [0, 1]; a number or a schedule.
        needs_gradient: whether ``grow_scores`` reads ``layer.gradient_squared_norms``; it then runs in backward.
        candidates: with ``needs_gradient``, how many inactive places are scored for each one that grows; None: all.
        momentum: with ``needs_gradient``, the share of a gradient that is left after one more step; 0: the last only.
        exchanges: whether blocks are exchanged at rewires, by ``drop_fraction``.
        follows_density: whether the Sparsifier must have a density schedule for the policy to do anything.
        every_step: whether ``after_step`` is called after every step of the optimizer.
        reads_gradient: whether it reads ``layer.gradient``, which must be there when the Sparsifier steps.
        kept_copies: how many tensors of the size of the values its state has.
        observes: whether ``observe`` is shown the last backward pass before a rewire that drops.
        measures: whether ``measure`` may run the model at such a rewire, before anything is chosen.
        kept_rows: how many rows of every layer's input and output gradient it keeps until the rewire.

    Criteria are exchangeable: ``sn.Policy(drop=sn.MEST(), grow=sn.RigL())`` drops as the one and grows as the other
    (:class:`sparsenet.policies.Combination`).

    Example:
        >>> import torch, sparsenet as sn
        >>> class LargestWeight(sn.Policy):
        ...     def drop_scores(self, layer):
        ...         return layer.values.detach().abs().flatten(1).amax(1).float()
        ...
        ...     def grow_scores(self, layer, places):
        ...         return layer.random(places)
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> sn.Sparsifier(model, None, LargestWeight(drop_fraction=0.25), every=1).step().grown > 0
        True
    """

    drop_fraction: float | Schedule = 0.3
    needs_gradient: ClassVar[bool] = False
    candidates: ClassVar[int | None] = None
    momentum: ClassVar[float] = 0.0
    exchanges: ClassVar[bool] = True
    follows_density: ClassVar[bool] = False
    every_step: ClassVar[bool] = False
    reads_gradient: ClassVar[bool] = False
    kept_copies: ClassVar[int] = 0
    observes: ClassVar[bool] = False
    measures: ClassVar[bool] = False
    kept_rows: ClassVar[int] = 0

    def __new__(cls, *args, **kwargs):
        """A :class:`Combination` where ``drop`` or ``grow`` is given."""
        return super().__new__(Combination if cls is Policy and kwargs.keys() & {"drop", "grow"} else cls)

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "grow_scores" in vars(cls) and "grow_places" not in vars(cls):
            cls.grow_places = Policy.grow_places  # scores of its own are not passed over for inherited places

    def __post_init__(self):
        schedule = as_schedule(self.drop_fraction)
        if callable(self.drop_fraction):
            return
        if not 0.0 <= schedule(0) <= 1.0:
            raise ValueError(f"{type(self).__name__}: drop_fraction must lie in [0, 1], got {self.drop_fraction}")
        object.__setattr__(self, "drop_fraction", schedule(0))

    def drop_fraction_at(self, step: int) -> float:
        """The drop fraction at ``step``, checked; 0 for a policy that exchanges nothing."""
        if not self.exchanges:
            return 0.0
        fraction = float(as_schedule(self.drop_fraction)(step))
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"{type(self).__name__}: drop_fraction must lie in [0, 1], got {fraction} at step {step}")
        return fraction

    def grows(self) -> bool:
        """Whether it can grow blocks."""
        kind = type(self)
        return kind.grow_scores is not Policy.grow_scores or kind.grow_places is not Policy.grow_places

    def scores_places(self) -> bool:
        """Whether every inactive place is scored for growth at a rewire."""
        kind = type(self)
        return kind.grow_scores is not Policy.grow_scores and kind.grow_places is Policy.grow_places

    def largest_share(self, drop_fraction: float) -> float:
        """The largest share of the blocks that leaves at one rewire, where training starts with ``drop_fraction``."""
        return drop_fraction if self.exchanges else 0.0

    def density_schedule(self, start: float, final: float, steps: int) -> Schedule:
        """The density that suits the policy, from ``start`` to ``final`` in ``steps`` (Zhu & Gupta, 2017)."""
        return Cubic(start, final, steps)

    def drop_scores(self, layer: LayerView) -> Tensor:
        """float32 [num_blocks]; the lowest leave. Here: the blocks' squared norms (magnitude)."""
        return block_squared_norms(layer.values)

    def grow_scores(self, layer: LayerView, places: Tensor) -> Tensor:
        """float32 [n] for int64 ``places`` [n] (block row * block columns + block column); the highest enter."""
        raise ValueError(
            f"{type(self).__name__}: density must not increase: this policy grows nothing (layer {layer.name})"
        )

    def grow_places(self, layer: LayerView, count: int) -> Tensor | None:
        """The places that enter: int64 [n <= count], inactive, ascending, distinct. None: ``grow_scores`` says.

        For policies that need not look at every inactive place.
        """
        return None

    # --- for policies that look at more than the values ---

    def after_step(self, layer: LayerView) -> None:
        """Called after every step of the optimizer, for every layer; needs ``every_step``."""

    def observe(self, layer: LayerView, x: Tensor, grad_output: Tensor) -> None:
        """Called in the backward pass, as often as the layer was called in it; needs ``observes``.

        ``x`` [rows, in], ``grad_output`` [rows, out]: of the output before the activation. What is to be remembered
        goes into ``layer.measured``.
        """

    def measure(self, model: nn.Module, call: Any, layers: Mapping[str, LayerView], seed: int) -> None:
        """Called once at a rewire with the plain model; needs ``measures``. It must leave no trace in the model.

        ``call``: the arguments of the model's last forward that recorded a graph, a
        :class:`sparsenet.saliency.Call`, or None.
        """

    def share(self, layer: LayerView) -> None:
        """Called on every rank before ``drop_scores`` if the policy observes or measures: makes ``measured`` one."""

    def adjust(self, layer: LayerView, dropped: Tensor) -> Tensor | None:
        """New values [num_blocks, b, b] for the blocks that stay when those numbered ``dropped`` go; None: the same."""
        return None


@dataclass(frozen=True)
class Combination(Policy):
    """Drops as one policy does and grows as another; made by ``sparsenet.Policy(drop=..., grow=...)``.

    Args:
        drop_fraction: share of the active blocks exchanged at a rewire; those of the two policies do not count.
        drop: a policy, or its class; default: the smallest leave.
        grow: a policy, or its class; default: nothing grows.

    Raises:
        TypeError: one of them is no policy. ValueError: both keep a state of the same names and differ.

    Example:
        >>> import torch, sparsenet as sn
        >>> policy = sn.Policy(drop=sn.Taylor(), grow=sn.SET(), drop_fraction=0.2)
        >>> policy.observes, policy.needs_gradient
        (True, False)
    """

    drop: Policy | type[Policy] | None = None
    grow: Policy | type[Policy] | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("drop", "grow"):
            given = getattr(self, name)
            policy = Policy() if given is None else given() if isinstance(given, type) else given
            if not isinstance(policy, Policy):
                raise TypeError(f"Policy: {name} must be a sparsenet Policy, got {given!r}")
            object.__setattr__(self, name, policy)
        if self.drop.every_step and self.grow.every_step and self.drop != self.grow:
            kinds = type(self.drop).__name__, type(self.grow).__name__
            raise ValueError(f"Policy: only one of drop and grow must act after every step, got {' and '.join(kinds)}")

    needs_gradient = property(lambda self: self.grow.needs_gradient)
    candidates = property(lambda self: self.grow.candidates)
    momentum = property(lambda self: self.grow.momentum)
    every_step = property(lambda self: self.drop.every_step or self.grow.every_step)
    reads_gradient = property(lambda self: self.drop.reads_gradient or self.grow.reads_gradient)
    kept_copies = property(lambda self: max(self.drop.kept_copies, self.grow.kept_copies))
    observes = property(lambda self: self.drop.observes)
    measures = property(lambda self: self.drop.measures)
    kept_rows = property(lambda self: self.drop.kept_rows)

    def grows(self) -> bool:
        """As the one that grows."""
        return self.grow.grows()

    def scores_places(self) -> bool:
        """As the one that grows."""
        return self.grow.scores_places()

    def drop_scores(self, layer: LayerView) -> Tensor:
        """Those of ``drop``."""
        return self.drop.drop_scores(layer)

    def grow_scores(self, layer: LayerView, places: Tensor) -> Tensor:
        """Those of ``grow``."""
        return self.grow.grow_scores(layer, places)

    def grow_places(self, layer: LayerView, count: int) -> Tensor | None:
        """Those of ``grow``."""
        return self.grow.grow_places(layer, count)

    def after_step(self, layer: LayerView) -> None:
        """That of whichever acts after every step."""
        (self.drop if self.drop.every_step else self.grow).after_step(layer)

    def observe(self, layer: LayerView, x: Tensor, grad_output: Tensor) -> None:
        """That of ``drop``."""
        self.drop.observe(layer, x, grad_output)

    def measure(self, model: nn.Module, call: Any, layers: Mapping[str, LayerView], seed: int) -> None:
        """That of ``drop``."""
        self.drop.measure(model, call, layers, seed)

    def share(self, layer: LayerView) -> None:
        """That of ``drop``."""
        self.drop.share(layer)

    def adjust(self, layer: LayerView, dropped: Tensor) -> Tensor | None:
        """That of ``drop``."""
        return self.drop.adjust(layer, dropped)


def block_squared_norms(values: Tensor) -> Tensor:
    """float32 [num_blocks]: squared Frobenius norms of ``values`` [num_blocks, b, b].

    Example:
        >>> import torch
        >>> from sparsenet.policies import block_squared_norms
        >>> block_squared_norms(torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]]))
        tensor([25.,  4.])
    """
    flat = values.detach().flatten(1)
    if flat.dtype in (torch.bfloat16, torch.float16):
        flat = flat.float()
    return torch.linalg.vector_norm(flat, dim=1).square().float()
