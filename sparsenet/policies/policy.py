"""Which blocks go and which come.

A policy is two scores: ``drop_scores``, one per active block (the lowest leave), and ``grow_scores``, one per inactive
place (the highest enter). A policy that need not look at every inactive place, because it grows at random or from a
list of its own, answers ``grow_places`` instead. How many of each is the Sparsifier's business: ``drop_fraction`` of
the blocks is exchanged at every rewire, and a density schedule adds or removes the rest.

Adding one: a frozen dataclass with the two methods, a line in ``POLICIES`` (of ``sparsenet.policies``), a test with
numbers worked by hand. What the trainer and the planner of memory need to know about it are class attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsenet.pattern import BlockPattern
from sparsenet.schedules import as_schedule

__all__ = ["LayerView", "Policy", "Schedule", "block_squared_norms"]

Schedule = Callable[[int], float]


class LayerView(Protocol):
    """What a policy sees of a layer while it is rewired."""

    name: str
    layer: nn.Module  # the SparseLinear
    values: nn.Parameter  # [num_blocks, b, b]
    pattern: BlockPattern
    element_mask: Tensor | None  # bool [num_blocks, b, b]
    drop: int  # how many blocks are to leave
    measured: dict[str, Any]  # the policy's own, empty when a pass that is measured begins

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
        exchanges: whether blocks are exchanged at rewires, by ``drop_fraction``.
        follows_density: whether the Sparsifier must have a density schedule for the policy to do anything.
        observes: whether ``observe`` is shown the last backward pass before a rewire that drops.
        measures: whether ``measure`` may run the model at such a rewire, before anything is chosen.
        kept_rows: how many rows of every layer's input and output gradient it keeps until the rewire.

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
    needs_gradient = False
    exchanges = True
    follows_density = False
    observes = False
    measures = False
    kept_rows = 0

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
        """The drop fraction at ``step``, checked."""
        fraction = float(as_schedule(self.drop_fraction)(step))
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"{type(self).__name__}: drop_fraction must lie in [0, 1], got {fraction} at step {step}")
        return fraction

    @classmethod
    def grows(cls) -> bool:
        """Whether it can grow blocks."""
        return cls.grow_scores is not Policy.grow_scores or cls.grow_places is not Policy.grow_places

    @classmethod
    def scores_places(cls) -> bool:
        """Whether every inactive place is scored for growth at a rewire."""
        return cls.grow_scores is not Policy.grow_scores and cls.grow_places is Policy.grow_places

    @classmethod
    def largest_share(cls, drop_fraction: float) -> float:
        """The largest share of the blocks that leaves at one rewire, where training starts with ``drop_fraction``."""
        return drop_fraction if cls.exchanges else 0.0

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
