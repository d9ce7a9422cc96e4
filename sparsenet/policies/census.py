"""How many blocks, or elements, every layer has and is to have."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from sparsenet.densities import apportion
from sparsenet.elements import NM
from sparsenet.layers import SparseLinear
from sparsenet.policies.choosing import units_of
from sparsenet.policies.exchange import Quota, Units
from sparsenet.policies.growth import Growth
from sparsenet.policies.policy import Policy
from sparsenet.policies.spreading import GLOBAL, Distribution, leaving_by_score, spread

__all__ = ["Census"]

Layers = Mapping[str, SparseLinear]


@dataclass
class Census:
    """The numbers that a density schedule and a distribution give to the layers of a network.

    Attributes:
        density: of all layers together at each step, or None.
        distribution: how it is spread; None and ``global``: in the present proportions.
        elements: whether layers with an element mask are counted and rewired by elements.
        proportions: blocks (elements) of each layer to begin with.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.policies.census import Census
        >>> model = sn.SparseMLP([64, 64, 64], density=0.5, block_size=8)
        >>> census = Census(lambda step: 0.25, "uniform", elements=True)
        >>> census.targets(1, {"0": model[0], "1": model[1]}, sn.GMP(), first=0.5)
        {'0': 16, '1': 16}
    """

    density: Callable[[int], float] | None
    distribution: Distribution | None
    elements: bool
    proportions: dict[str, int] = field(default_factory=dict)

    def by_elements(self, layer: SparseLinear) -> bool:
        """Whether a layer is rewired element by element."""
        return self.elements and layer.topology.mask_bits is not None

    def keeps_its_number(self, layer: SparseLinear) -> bool:
        """Whether elements change places inside groups only."""
        return self.by_elements(layer) and isinstance(layer.elements, NM)

    def units(self, layer: SparseLinear) -> Units:
        """What of the layer is rewired, in numbers."""
        return units_of(layer, self.by_elements(layer))

    def counts(self, layers: Layers) -> dict[str, int]:
        """Blocks (elements) that are active."""
        return {name: self.units(layer).now for name, layer in layers.items()}

    def density_of(self, layer: SparseLinear, active: int) -> float:
        """What ``active`` blocks (elements) are of all."""
        return active / max(self.units(layer).places, 1)

    def targets(
        self, step: int, layers: Layers, policy: Policy, density: float | None = None, first: float = 1.0
    ) -> dict[str, int]:
        """Blocks of each layer after a rewire at ``step``. Totals count weights: layers may differ in block size.

        Args:
            density: that the rewire moves to; default: that of ``step``.
            first: the density that the schedule began with.

        Raises:
            ValueError: the density rises, and the policy grows nothing.
        """
        counts = self.counts(layers)
        layers = {name: layer for name, layer in layers.items() if not self.keeps_its_number(layer)}
        units = [self.units(layer) for layer in layers.values()]
        if self.density is None or not units:
            return counts
        density = float(self.density(step)) if density is None else density
        now, sizes = [u.now for u in units], [u.size for u in units]
        total = density * sum(u.places * u.size for u in units)
        change = total - sum(map(operator.mul, now, sizes))
        if density == first and abs(change) <= sum(sizes) / 2:  # the same density, up to the rounding of each layer
            return counts
        if change > 0 and not policy.grows():
            if density > first:
                raise ValueError(
                    f"{type(policy).__name__}: density must not increase: this policy grows nothing, and the "
                    f"schedule asks for {density:.4g} at step {step}"
                )
            change = 0  # it falls, from above what the network has
        if change <= 0:
            least, most = [min(1, n) if density else 0 for n in now], now
        else:
            least, most = now, [u.most for u in units]
        targets = apportion(self.wanted(layers), total, least, most, sizes)
        return counts | dict(zip(layers, targets, strict=True))

    def wanted(self, layers: Layers) -> Sequence[float]:
        """The proportions of the layers' blocks, or elements where these are rewired."""
        if self.distribution is None or self.distribution == GLOBAL:
            wanted = [float(self.proportions.get(name, 0)) for name in layers]
            return wanted if any(wanted) else [float(self.units(layer).places) for layer in layers.values()]
        per_block = (layer.block_size**2 if self.by_elements(layer) else 1 for layer in layers.values())
        return list(map(operator.mul, spread(self.distribution, layers), per_block))

    def wanted_blocks(self, layers: Layers) -> list[float]:
        """The proportions of the layers' blocks in any case."""
        wanted = zip(self.wanted(layers), layers.values(), strict=True)
        return [n / layer.block_size**2 if self.by_elements(layer) else n for n, layer in wanted]

    def quota_and_growth(self, layer: SparseLinear, target: int, drop_fraction: float) -> tuple[Quota, int]:
        """A layer's exchange, and how many places growth has to look for before the exchange is final."""
        units = self.units(layer)
        quota = Quota.of(units, target, drop_fraction)
        if self.keeps_its_number(layer):
            return quota, units.most - units.now if quota.grow else 0
        if self.distribution == GLOBAL:
            return quota, max(quota.grow, Quota.of(units, max(units.now, target), drop_fraction).grow)
        return quota, quota.grow

    def share_out(
        self, quotas: Mapping[str, Quota], scores: Mapping[str, Tensor], growths: Mapping[str, Growth], fraction: float
    ) -> dict[str, Quota]:
        """New quotas, with which the density takes what has the lowest scores per weight in all layers together."""
        layers = {name: growths[name].view.layer for name in scores}
        layers = {name: layer for name, layer in layers.items() if not self.keeps_its_number(layer)}
        units = {name: self.units(layer) for name, layer in layers.items()}
        total = sum(quotas[name].must_drop * units[name].size for name in layers)
        if self.distribution != GLOBAL or not total:
            return {}
        patterns = {name: growths[name].pattern for name in layers}
        least = {name: min(units[name].now, max(p.block_rows, p.block_cols)) for name, p in patterns.items()}
        if sum((units[name].now - least[name]) * units[name].size for name in layers) < total:
            least = {name: min(units[name].now, 1) for name in layers}
        sizes = {name: u.size for name, u in units.items()}
        leave = leaving_by_score({name: scores[name] for name in layers}, sizes, least, total)
        return {name: Quota.of(units[name], units[name].now - leave[name], fraction) for name in layers}
