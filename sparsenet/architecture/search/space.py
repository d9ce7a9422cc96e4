"""Density as the search variable: a space of MLPs inside a maximum depth and width, and one point of it.

Tessera and Rosman, "Learning Compact, General Purpose Neural Network Architectures": every weight matrix has a density,
the share of its weights that are active; accuracy should depend on how many are active, not on which. A hidden layer of
density 0 is skipped, so depth follows from the densities, and so does width: a neuron without active inputs or outputs
is dead. Counts are exact, biases are not counted: layer l has ``round(d_l * n_l * n_{l-1})`` active weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from sparsenet.layers import SparseLinear
from sparsenet.pattern import BlockPattern
from sparsenet.schedules import as_integer

__all__ = ["ACTIVATIONS", "Architecture", "DensityMLP", "SearchSpace"]

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU, "gelu": nn.GELU}
# A neuron whose few inputs are nearly always zero has hardly any variance: PyTorch's 1e-5 would amplify its rare values
# 316 times per layer, and logits reach 1e5.
NORM_EPS = 1e-3


@dataclass(frozen=True)
class SearchSpace:
    """Bounds of a search. Hidden layers have ``max_width`` neurons each; what is searched is how dense they are.

    Attributes:
        in_features, out_features: of the data.
        max_depth, min_depth: hidden layers that are not skipped.
        max_width: neurons of a hidden layer before compaction.
        min_density, max_density: bounds of a layer that is not skipped; drawn log-uniformly.
        max_active: most active weights over all layers, or None. Densities that exceed it are scaled down together.
        allow_linear: the search may leave the activation of a hidden layer out.
        activations: which the search may choose from.
        pattern_seeds: how many random patterns the search may choose from.

    Raises:
        ValueError: bounds that contradict each other, or a ``max_active`` that even the smallest network exceeds.

    Example:
        >>> from sparsenet.architecture.search import SearchSpace
        >>> SearchSpace(784, 10, max_depth=3, max_width=512, max_active=60_000).max_active
        60000
        >>> SearchSpace(784, 10, min_depth=4, max_depth=3)
        Traceback (most recent call last):
        ValueError: SearchSpace: min_depth must be at most max_depth 3, got 4
    """

    in_features: int
    out_features: int
    max_depth: int = 3
    max_width: int = 512
    min_depth: int = 1
    min_density: float = 0.01
    max_density: float = 1.0
    max_active: int | None = None
    allow_linear: bool = True
    activations: tuple[str, ...] = tuple(ACTIVATIONS)
    pattern_seeds: int = 4

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "max_depth", "min_depth", "max_width", "pattern_seeds"):
            object.__setattr__(self, name, as_integer("SearchSpace", name, getattr(self, name), at_least=1))
        if self.min_depth > self.max_depth:
            raise ValueError(f"SearchSpace: min_depth must be at most max_depth {self.max_depth}, got {self.min_depth}")
        if not 0 < self.min_density <= self.max_density <= 1:
            rule = "densities must satisfy 0 < min_density <= max_density <= 1"
            raise ValueError(f"SearchSpace: {rule}, got {self.min_density!r} and {self.max_density!r}")
        unknown = [a for a in self.activations if a not in ACTIVATIONS]
        if unknown or not self.activations:
            rule = f"activations must be some of {', '.join(ACTIVATIONS)}"
            raise ValueError(f"SearchSpace: {rule}, got {self.activations!r}")
        if self.max_active is not None:
            least = self.least_active()
            if self.max_active < least:
                rule = f"max_active must be at least {least}, the weights of the smallest network inside these bounds"
                raise ValueError(
                    f"SearchSpace: {rule} (lower min_density, min_depth or max_width), got {self.max_active}"
                )

    def shapes(self, hidden: tuple[float, ...]) -> list[tuple[int, int]]:
        """(out, in) of the layers that exist when hidden layer i has density ``hidden[i]``, the output layer last."""
        widths = [self.in_features, *[self.max_width for d in hidden if d > 0], self.out_features]
        return [(out, inp) for inp, out in pairwise(widths)]

    def least_active(self) -> int:
        """Active weights of the smallest network in the space."""
        hidden = (self.min_density,) * self.min_depth
        return sum(max(1, round(self.min_density * out * inp)) for out, inp in self.shapes(hidden))

    def architecture(
        self,
        densities: tuple[float, ...],
        activation: str = "relu",
        linear: tuple[bool, ...] = (),
        pattern_seed: int = 0,
    ) -> Architecture:
        """A point of this space; densities are scaled down together if they exceed ``max_active``.

        Args:
            densities: one per hidden layer (0 = skipped), then the output layer's.
            activation: of the hidden layers.
            linear: hidden layers without activation; default none.
            pattern_seed: which random pattern.
        """
        arch = Architecture(
            self.in_features, self.out_features, self.max_width, densities, activation, linear, pattern_seed
        )
        if self.max_active is None or arch.active_weights <= self.max_active:
            return arch
        return arch.scaled_to(self.max_active)


@dataclass(frozen=True)
class Architecture:
    """One sparse MLP: densities of ``len(densities) - 1`` hidden layers of ``width`` neurons and of the output layer.

    ``linear[i]``: hidden layer i has no activation. ``pattern_seed`` draws which weights are active: for one seed a
    lower density's weights are a subset of a higher density's, which is what weights are inherited by.
    Raises ValueError for densities outside [0, 1], an output layer of density 0, or flags that do not fit.

    Example:
        >>> Architecture(784, 10, 100, (0.05, 0.05)).active_weights   # 794 * 5
        3970
    """

    in_features: int
    out_features: int
    width: int
    densities: tuple[float, ...]
    activation: str = "relu"
    linear: tuple[bool, ...] = ()
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        if not self.densities or not all(0 <= d <= 1 for d in self.densities) or self.densities[-1] == 0:
            rule = "densities must lie in [0, 1], the output layer's above 0"
            raise ValueError(f"Architecture: {rule}, got {self.densities!r}")
        if self.linear and len(self.linear) != len(self.densities) - 1:
            rule = f"linear must have {len(self.densities) - 1} entries, one per hidden layer"
            raise ValueError(f"Architecture: {rule}, got {len(self.linear)}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"Architecture: activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}"
            )

    @property
    def layers(self) -> list[tuple[tuple[int, int], float, str]]:
        """((out, in), density, activation) of every layer that is not skipped."""
        flags = self.linear or (False,) * (len(self.densities) - 1)
        kept = [(d, "none" if f else self.activation) for d, f in zip(self.densities[:-1], flags, strict=True) if d > 0]
        kept.append((self.densities[-1], "none"))
        widths = [self.in_features, *[self.width] * (len(kept) - 1), self.out_features]
        shapes = [(out, inp) for inp, out in pairwise(widths)]
        return [(shape, d, act) for shape, (d, act) in zip(shapes, kept, strict=True)]

    @property
    def depth(self) -> int:
        """Hidden layers that exist."""
        return len(self.layers) - 1

    @property
    def active_per_layer(self) -> list[int]:
        """Active weights of every layer, at least 1."""
        return [max(1, round(d * out * inp)) for (out, inp), d, _ in self.layers]

    @property
    def active_weights(self) -> int:
        """Active weights over all layers; biases are not counted."""
        return sum(self.active_per_layer)

    @property
    def dense_weights(self) -> int:
        """Weights of the same layers at density 1."""
        return sum(out * inp for (out, inp), _, _ in self.layers)

    def distance(self, other: Architecture) -> float:
        """How different two architectures are: the sum over layers of ``|log(active / other's active)|``; inf for other
        depths.
        """
        if self.depth != other.depth:
            return math.inf
        pairs = zip(self.active_per_layer, other.active_per_layer, strict=True)
        return sum(abs(math.log(a / b)) for a, b in pairs)

    def scaled_to(self, active: int) -> Architecture:
        """The architecture with all densities multiplied by one factor, 1 at most each, so that ``active`` weights
        remain, or the nearest number below.
        """
        low, high = 0.0, 1.0 / min(d for d in self.densities if d > 0)
        for _ in range(60):
            middle = (low + high) / 2
            if self._scaled(middle).active_weights <= active:
                low = middle
            else:
                high = middle
        return self._scaled(low)

    def _scaled(self, factor: float) -> Architecture:
        tiny = 1e-9  # a layer that exists stays: density 0 would skip it
        densities = tuple(min(1.0, max(tiny, d * factor)) if d > 0 else 0.0 for d in self.densities)
        return replace(self, densities=densities)

    def build(self, *, block_size: int = 1, norm: str = "none", residual: bool = False, seed: int = 0) -> DensityMLP:
        """The network, drawn from ``seed`` and the pattern seed; ``block_size`` 1 has exact counts (see DensityMLP)."""
        return DensityMLP(self, block_size=block_size, norm=norm, residual=residual, seed=seed)


def nested_places(total: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` of ``total`` places, uniform without replacement; a smaller count gives a subset. int64, ascending."""
    return torch.randperm(total, generator=generator)[:count].sort().values


def covering_order(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """All ``rows * cols`` places in random order, but every row and every column has a place among the first
    max(rows, cols): an empty row of blocks would kill a whole block of neurons.
    """
    down, across = torch.randperm(rows, generator=generator), torch.randperm(cols, generator=generator)
    steps = torch.arange(max(rows, cols))
    first = down[steps % rows] * cols + across[steps % cols]
    order = torch.randperm(rows * cols, generator=generator)
    return torch.cat([first, order[~torch.isin(order, first)]])


def sparse_layer(
    shape: tuple[int, int], active: int, activation: str, block_size: int, pattern_seed: int, seed: int
) -> nn.Module:
    """A layer of ``shape`` with exactly ``active`` weights.

    Block size 1 stores each weight by itself. Larger blocks: the fewest whole blocks that hold ``active`` weights, the
    rest masked; where these are too few to reach every row and column of blocks, as in an output layer, single weights.
    A full layer is ``nn.Linear`` (drawn as a sparse one).
    """
    out, inp = shape
    draw = torch.Generator().manual_seed(pattern_seed)
    weights = torch.Generator().manual_seed(seed)
    if active >= out * inp:
        return _full_layer(shape, activation, weights)
    chosen = _whole_blocks(shape, active, block_size, draw) if block_size > 1 else None
    if chosen is None:
        places, mask = nested_places(out * inp, active, draw), None
        pattern = BlockPattern.from_places(places // inp, places % inp, shape, 1)
    else:
        cols = -(-inp // block_size)
        pattern = BlockPattern.from_places(chosen // cols, chosen % cols, shape, block_size)
        mask = _masked_to(active, _inside(pattern), draw)
    return SparseLinear(inp, out, pattern=pattern, element_mask=mask, activation=activation, generator=weights)


def _whole_blocks(shape: tuple[int, int], active: int, block_size: int, draw: torch.Generator) -> Tensor | None:
    """The fewest places of blocks that hold ``active`` weights; None if they leave a row or column of blocks empty."""
    rows, cols = (-(-side // block_size) for side in shape)
    order = covering_order(rows, cols, draw)
    heights, widths = (_block_sides(side, block_size) for side in shape)
    held = (heights[order // cols] * widths[order % cols]).cumsum(0)
    count = int((held < active).sum()) + 1
    return order[:count].sort().values if count >= max(rows, cols) else None


def _masked_to(active: int, inside: Tensor, draw: torch.Generator) -> Tensor | None:
    """``inside`` [num_blocks, b, b] without random elements until ``active`` remain; None if no block is cut."""
    live = inside.view(-1).nonzero().flatten()
    spare = len(live) - active
    if not spare:
        return None
    mask = inside.clone()
    mask.view(-1)[live[torch.randperm(len(live), generator=draw)[:spare]]] = False
    return mask


def _full_layer(shape: tuple[int, int], activation: str, generator: torch.Generator) -> nn.Module:
    """``nn.Linear`` and its activation, drawn from the distribution that SparseLinear uses."""
    out, inp = shape
    linear = nn.Linear(inp, out)
    bound = math.sqrt((6.0 if activation != "none" else 1.0) / inp)
    with torch.no_grad():
        linear.weight.uniform_(-bound, bound, generator=generator)
        linear.bias.uniform_(-1 / math.sqrt(inp), 1 / math.sqrt(inp), generator=generator)
    return linear if activation == "none" else nn.Sequential(linear, ACTIVATIONS[activation]())


def _block_sides(size: int, block_size: int) -> Tensor:
    """How many elements of each block lie inside the matrix, along one side."""
    sides = torch.full((-(-size // block_size),), block_size)
    sides[-1] = size - (len(sides) - 1) * block_size
    return sides


def _inside(pattern: BlockPattern) -> Tensor:
    """Bool [num_blocks, b, b]: elements inside the matrix."""
    steps = torch.arange(pattern.block_size)
    down = steps < _block_sides(pattern.shape[0], pattern.block_size)[pattern.row_indices.long()][:, None]
    across = steps < _block_sides(pattern.shape[1], pattern.block_size)[pattern.col_indices.long()][:, None]
    return down[:, :, None] & across[:, None, :]


class DensityMLP(nn.Module):
    """The network of an :class:`Architecture`.

    Args:
        architecture: what to build.
        block_size: 1 for exact counts (fastest for scattered weights), or a block size with masks inside.
        norm: ``none`` or ``batch`` (BatchNorm before each activation).
        residual: hidden layers of equal width add their input. With ``norm`` this trains 32 layers.
        seed: draws the weights.

    Shape: [batch, in_features] -> [batch, out_features].

    Example:
        >>> import torch
        >>> from sparsenet.architecture.search import Architecture, DensityMLP
        >>> architecture = Architecture(784, 10, 100, (0.05, 0.05))
        >>> model = DensityMLP(architecture, block_size=1, norm="none", residual=False, seed=0)
        >>> model.active_weights(), model(torch.randn(2, 784)).shape
        (3970, torch.Size([2, 10]))
    """

    def __init__(self, architecture: Architecture, *, block_size: int, norm: str, residual: bool, seed: int):
        super().__init__()
        if norm not in ("none", "batch"):
            raise ValueError(f"DensityMLP: norm must be none or batch, got {norm!r}")
        self.architecture = architecture
        self.linears, self.after, self.residual = nn.ModuleList(), nn.ModuleList(), []
        for i, ((shape, _, activation), active) in enumerate(
            zip(architecture.layers, architecture.active_per_layer, strict=True)
        ):
            hidden = i < architecture.depth
            normed = hidden and norm == "batch"
            pattern_seed = architecture.pattern_seed * 1009 + i
            fused = "none" if normed else activation
            self.linears.append(
                sparse_layer(shape, active, fused, block_size, pattern_seed, seed * 7919 + pattern_seed)
            )
            tail: list[nn.Module] = [nn.BatchNorm1d(shape[0], eps=NORM_EPS)] if normed else []
            if normed and activation != "none":
                tail.append(ACTIVATIONS[activation]())
            self.after.append(nn.Sequential(*tail))
            self.residual.append(residual and hidden and shape[0] == shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """[batch, in_features] -> [batch, out_features]."""
        for linear, after, skip in zip(self.linears, self.after, self.residual, strict=True):
            y = after(linear(x))
            x = x + y if skip else y
        return x

    def masks(self) -> list[Tensor]:
        """Bool [out, in] per layer: the active weights. Dense, for counting and reports."""
        return [weight_mask(layer) for layer in self.linears]

    def active_weights(self) -> int:
        """Active weights, counted in the layers as built."""
        return sum(active_count(layer) for layer in self.linears)

    def live_neurons(self) -> list[Tensor]:
        """Bool [width] per hidden layer: has active weights from inputs and to outputs; found from both ends."""
        masks = [m.float() for m in self.masks()]
        reach = [torch.ones(masks[0].shape[1])]
        for mask in masks:
            reach.append((mask @ reach[-1] > 0).float())
        back = [torch.ones(masks[-1].shape[0])]
        for mask in reversed(masks):
            back.append((mask.t() @ back[-1] > 0).float())
        back.reverse()
        return [(r * b).bool() for r, b in zip(reach[1:-1], back[1:-1], strict=True)]

    def live_widths(self) -> list[int]:
        """Neurons of each hidden layer that compaction would keep."""
        return [int(live.sum()) for live in self.live_neurons()]


def linear_of(layer: nn.Module) -> nn.Module:
    """The SparseLinear or nn.Linear of one layer."""
    return layer[0] if isinstance(layer, nn.Sequential) else layer


def weights_of(layer: nn.Module) -> nn.Parameter:
    """The stored weights of one layer: ``values`` or ``weight``."""
    linear = linear_of(layer)
    return linear.values if isinstance(linear, SparseLinear) else linear.weight


def active_count(layer: nn.Module) -> int:
    """Active weights of one layer."""
    linear = linear_of(layer)
    return linear.num_active if isinstance(linear, SparseLinear) else linear.weight.numel()


def weight_mask(layer: nn.Module) -> Tensor:
    """Bool [out, in]: the active weights of one layer."""
    linear = linear_of(layer)
    if not isinstance(linear, SparseLinear):
        return torch.ones_like(linear.weight, dtype=torch.bool)
    pattern, b = linear.pattern, linear.block_size
    inside = linear.element_mask if linear.element_mask is not None else _inside(pattern)
    mask = torch.zeros(pattern.block_rows, pattern.block_cols, b, b, dtype=torch.bool)
    mask[pattern.row_indices.long(), pattern.col_indices.long()] = inside
    mask = mask.permute(0, 2, 1, 3).reshape(pattern.block_rows * b, pattern.block_cols * b)
    return mask[: linear.out_features, : linear.in_features]
