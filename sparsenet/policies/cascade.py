"""A cheap policy that draws up a shortlist, and an expensive one that chooses from it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparsenet import saliency
from sparsenet.functional import select_extreme
from sparsenet.policies.curvature import Taylor, WoodFisher, informative
from sparsenet.policies.places import BadScores
from sparsenet.policies.policy import LayerView, Policy
from sparsenet.policies.rewiring import GrowsByGradient
from sparsenet.schedules import as_number

__all__ = ["Cascade"]


@dataclass(frozen=True)
class Cascade(GrowsByGradient):
    """Two policies: the cheap one draws up a shortlist, the expensive one chooses from it.

    The shortlist is ``shortlist`` times as long as what leaves, so that the work of a :class:`WoodFisher` depends on
    the number of blocks that go, not on that of the layer's; others save nothing, as they are sums that backward makes.
    The rest of the blocks follow in the cheap order, for the case that too many of the shortlist are the last of their
    row or column.

    Attributes:
        cheap, expensive: policies; only their drop scores count. shortlist: at least 1.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> policy = sn.Cascade(cheap=sn.Taylor(), expensive=sn.WoodFisher(), shortlist=2.0)
        >>> sparsifier = sn.Sparsifier(model, None, policy, every=1)
        >>> model(torch.randn(16, 64)).square().sum().backward()
        >>> sparsifier.step().dropped > 0
        True
    """

    drop_fraction: float | Callable[[int], float] = 0.3
    cheap: Policy = field(default_factory=Taylor)
    expensive: Policy = field(default_factory=WoodFisher)
    shortlist: float = 3.0

    _PARTS: ClassVar = ("cheap", "expensive")

    def __post_init__(self):
        super().__post_init__()
        for name in self._PARTS:
            part = getattr(self, name)
            if not isinstance(part, Policy) or isinstance(part, Cascade):
                raise ValueError(f"Cascade: {name} must be a policy, and no Cascade, got {part!r}")
        if as_number("Cascade", "shortlist", self.shortlist) < 1.0:
            raise ValueError(f"Cascade: shortlist must be at least 1, got {self.shortlist}")

    @property
    def observes(self) -> bool:
        """Whether one of them does."""
        return self.cheap.observes or self.expensive.observes

    @property
    def measures(self) -> bool:
        """Whether one of them does."""
        return self.cheap.measures or self.expensive.measures

    @property
    def kept_rows(self) -> int:
        """Those of both."""
        return self.cheap.kept_rows + self.expensive.kept_rows

    def observe(self, layer: LayerView, x: Tensor, grad_output: Tensor) -> None:
        """Shows both that want to see it."""
        for part, view in self._each(layer):
            if part.observes:
                part.observe(view, x, grad_output)
                layer.measured[view.part] = view.measured

    def measure(self, model: nn.Module, call: saliency.Call | None, layers: Mapping[str, LayerView], seed: int) -> None:
        """Lets both that want to."""
        for name in self._PARTS:
            part = getattr(self, name)
            if part.measures:
                views = {key: self._view(layer, name) for key, layer in layers.items()}
                part.measure(model, call, views, seed)
                for key, layer in layers.items():
                    layer.measured[name] = views[key].measured

    def share(self, layer: LayerView) -> None:
        """Lets both."""
        for part, view in self._each(layer):
            part.share(view)
            layer.measured[view.part] = view.measured

    def drop_scores(self, layer: LayerView) -> Tensor:
        """Ranks."""
        (_, cheap_view), (_, expensive_view) = self._each(layer)
        cheap = self.cheap.drop_scores(cheap_view)
        if not bool(torch.isfinite(cheap).all()):
            raise BadScores("its cheap drop scores hold NaN or Inf")
        count = min(len(cheap), math.ceil(self.shortlist * layer.drop))
        listed = torch.zeros(len(cheap), dtype=torch.bool, device=cheap.device)
        listed[select_extreme(cheap, count, largest=False)] = True
        if isinstance(self.expensive, WoodFisher):
            expensive = self.expensive.saliency(expensive_view, listed)
        else:
            expensive = self.expensive.drop_scores(expensive_view)
        informative(expensive[listed])
        return saliency.rerank(cheap, expensive.to(cheap.device), listed)

    def adjust(self, layer: LayerView, dropped: Tensor) -> Tensor | None:
        """The expensive one's."""
        return self.expensive.adjust(self._view(layer, "expensive"), dropped)

    def _each(self, layer: LayerView) -> list[tuple[Policy, LayerView]]:
        return [(getattr(self, name), self._view(layer, name)) for name in self._PARTS]

    @staticmethod
    def _view(layer: LayerView, part: str) -> LayerView:
        """The layer with what this part has measured of it."""
        view = copy.copy(layer)
        view.part, view.measured = part, layer.measured.setdefault(part, {})
        return view
