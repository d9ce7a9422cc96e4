"""How one global density is spread over the layers of a network, in whole blocks.

``distribute`` scales a *relative* density per layer (one small function per distribution below) by one factor ``eps``
so that the blocks of all layers together come to ``density`` of all block places. A layer that would need more than
all of its places becomes dense, and the others get the rest.

A weight of shape [out, in, *kernel] is stored as a matrix [out, in * prod(kernel)] cut into square blocks, edge blocks
whole, so the relative densities see ``out`` and ``in`` rounded up to whole blocks. For linear layers the number of
blocks under ``erdos_renyi`` is then ``eps * (block rows + block columns)``: every row and column of blocks has, on
average, the same number of blocks in every layer.

Adding a distribution: one function and one line in ``DISTRIBUTIONS``. One that has to look at the layers themselves
(sensitivity, time) is a function that makes relative densities, one per layer; see :mod:`sparsenet.policies.spreading`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

from sparsenet.schedules import as_integer, as_number, numbers_of

__all__ = ["DISTRIBUTIONS", "apportion", "block_places", "choose_block_size", "distribute", "proportions"]

Shape = Sequence[int]

# Block sizes, where nobody names one, and the blocks that a row of blocks then needs on average. Fewer are enough for
# 4: single weights, the next choice, take twice the time and three times the bytes.
ENOUGH = {32: 3.0, 16: 3.0, 8: 3.0, 4: 1.5, 1: 0.0}
CHOSEN_FROM = tuple(ENOUGH)


class _Layer(NamedTuple):
    """Sizes of a layer: ``out`` and ``fan_in`` in whole blocks, of its kernel (() if linear), ``places`` for blocks."""

    out: int
    fan_in: int
    kernel: Shape
    places: int
    block_size: int


def _uniform(layer: _Layer) -> float:
    return float(layer.places)


def _erdos_renyi(layer: _Layer) -> float:
    out, fan_in = layer.out, layer.fan_in
    return layer.places * ((out + fan_in) / (out * fan_in))


def _erdos_renyi_kernel(layer: _Layer) -> float:
    out, fan_in, kernel = layer.out, layer.fan_in, layer.kernel
    return layer.places * ((out + fan_in + sum(kernel)) / (out * fan_in * math.prod(kernel)))


def _memory(layer: _Layer) -> float:
    return 1.0 / layer.block_size**2


# name -> blocks of a layer relative to those of the others: its places times its relative density
DISTRIBUTIONS: dict[str, Callable[[_Layer], float]] = {
    "uniform": _uniform,
    "erdos_renyi": _erdos_renyi,
    "er": _erdos_renyi,
    "erk": _erdos_renyi_kernel,
    "memory": _memory,
}

# What a relative density of 0 counts as beside the largest: such a layer gets its blocks when the others are full, so
# that the total is met all the same.
_NEXT_TO_NOTHING = 1e-18


def _whole_blocks(size: int, block_size: int) -> int:
    return -(-size // block_size)


def block_places(shape: Shape, block_size: int = 1) -> int:
    """Number of block places of a weight of shape (out, in, *kernel): ceil(out / b) * ceil(in * prod(kernel) / b).

    Raises TypeError or ValueError for a shape that is not two or more integers >= 0, or a ``block_size`` < 1.

    >>> block_places((10, 784), 32), block_places((64, 3, 3, 3), 16)
    (25, 8)
    """
    out, *columns = _checked_shape("block_places", "shape", shape)
    block_size = as_integer("block_places", "block_size", block_size, at_least=1)
    return _whole_blocks(out, block_size) * _whole_blocks(math.prod(columns), block_size)


def distribute(
    shapes: Sequence[Shape],
    density: float,
    distribution: str | Sequence[float] = "uniform",
    *,
    block_size: int | Sequence[int] = 1,
    min_blocks: int = 1,
) -> list[int]:
    """Number of blocks of each layer so that all layers together have ``density``; none rises where density falls.

    Args:
        shapes: one weight shape per layer: (out, in) for linear, (out, in, *kernel) for convolutions.
        density: in [0, 1]: blocks / block places over all layers.
        distribution: "uniform": the same density everywhere. "erdos_renyi" (or "er"): density ~ (in + out) / (in * out)
            (Mocanu et al. 2018; kernels are ignored, as in Evci et al. 2020's "Erdos-Renyi"). "erk": density
            ~ (in + out + kernel sizes) / (in * out * kernel sizes) (Evci et al. 2020). Both agree for linear layers.
            "memory": the same number of weights everywhere, and so the same bytes of values, gradients and optimizer
            state; a layer that is full leaves the rest to the others. Or relative densities of your own, one per shape,
            on any scale; where one is 0, the layer gets no more than ``min_blocks`` until the others are full.
        block_size: side of the square blocks, one for all layers or one per layer; totals then count weights.
        min_blocks: every layer gets at least this many (or all its places, if fewer) when ``density`` > 0.

    Returns:
        One integer per layer, between 0 and ``block_places(shape, block_size)``, the same on every machine. Their sum
        is ``round(density * places)``, unless ``min_blocks`` alone needs more; with several block sizes, the weights
        in them come to ``density`` of all to half a block. Ties go to the earlier layer. See :func:`apportion`.

    Raises:
        TypeError, ValueError: an argument out of the ranges above; the message gives its name and value.

    >>> distribute([(4096, 784), (4096, 4096), (10, 4096)], 0.1, "erdos_renyi", block_size=32)
    [689, 1154, 128]
    """
    shapes = [_checked_shape("distribute", f"shapes[{i}]", shape) for i, shape in enumerate(shapes)]
    density = as_number("distribute", "density", density, within=(0, 1))
    block_sizes = [block_size] * len(shapes) if not isinstance(block_size, Sequence) else list(block_size)
    if len(block_sizes) != len(shapes):
        raise ValueError(f"distribute: block_size must have one entry per shape, {len(shapes)}, got {len(block_sizes)}")
    block_sizes = [as_integer("distribute", "block_size", size, at_least=1) for size in block_sizes]
    min_blocks = as_integer("distribute", "min_blocks", min_blocks, at_least=1)
    places = [block_places(shape, size) for shape, size in zip(shapes, block_sizes, strict=True)]
    wanted = _proportions("distribute", shapes, block_sizes, distribution)
    if density == 0:
        return [0] * len(places)
    blocks = [size * size for size in block_sizes]
    total = density * sum(p * weights for p, weights in zip(places, blocks, strict=True))
    return apportion(wanted, total, [min(min_blocks, p) for p in places], places, blocks)


def proportions(
    shapes: Sequence[Shape], block_sizes: Sequence[int], distribution: str | Sequence[float]
) -> list[float]:
    """Blocks of each layer relative to the others, as a distribution wants them; on any scale.

    ``distribution`` is a name or one relative density per shape, and ``shapes`` are as :func:`distribute` takes them.
    Raises TypeError or ValueError for another name, or relative densities that are not one finite number >= 0 per
    shape, or not one of them above 0.

    >>> proportions([(4096, 784), (10, 4096)], [32, 32], "uniform")
    [3200.0, 128.0]
    >>> proportions([(4096, 784), (10, 4096)], [32, 32], [0.2, 0.8])
    [800.0, 128.0]
    """
    return _proportions("proportions", shapes, block_sizes, distribution)


def _proportions(
    owner: str, shapes: Sequence[Shape], block_sizes: Sequence[int], distribution: str | Sequence[float]
) -> list[float]:
    layers = []
    for (out, fan_in, *kernel), b in zip(shapes, block_sizes, strict=True):
        places = block_places((out, fan_in, *kernel), b)
        layers.append(_Layer(_whole_blocks(out, b) * b, _whole_blocks(fan_in, b) * b, kernel, places, b))
    if isinstance(distribution, str) and distribution in DISTRIBUTIONS:
        return [DISTRIBUTIONS[distribution](layer) if layer.places else 0.0 for layer in layers]
    relative = _relative_densities(owner, distribution, len(layers))
    return [layer.places * share for layer, share in zip(layers, relative, strict=True)]


def _relative_densities(owner: str, values: object, count: int) -> list[float]:
    """One number in (0, 1] per shape."""
    rule = f"distribution must be one of {', '.join(DISTRIBUTIONS)}, or one number >= 0 per shape"
    if isinstance(values, str):
        raise ValueError(f"{owner}: {rule}, got {values!r}")
    listed = (isinstance(values, Sequence) and not isinstance(values, bytes)) or hasattr(values, "shape")
    numbers = numbers_of(values) if listed else [None]
    if None in numbers:
        raise TypeError(f"{owner}: {rule}, got {values!r}")
    if len(numbers) != count or not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError(f"{owner}: {rule} ({count}), got {values!r}")
    largest = max(numbers, default=0.0)
    if count and not largest:
        raise ValueError(f"{owner}: {rule} and one above 0, got {values!r}")
    return [max(number / largest, _NEXT_TO_NOTHING) for number in numbers]


def apportion(
    wanted: Sequence[float], total: float, least: Sequence[int], most: Sequence[int], sizes: Sequence[int]
) -> list[int]:
    """Whole numbers of blocks in the given proportions that come to ``total``: Webster's method (1832).

    Block k of a layer is due when the common factor reaches ``(k + 1/2) / proportion``; blocks are handed out in that
    order. So a smaller total is a beginning of the same order, and no count rises where the total falls. (Largest
    remainders, the other common method, can raise one count when the total falls.)

    Args:
        wanted: proportions, one per layer, any scale; 0: no more than ``least``.
        total: the sum of blocks times their sizes. It is met to half a block, or exactly if ``sizes`` are equal.
        least, most: bounds of each count; what a bound takes or leaves, the other layers give or get.
        sizes: weights in a block of each layer.

    Returns:
        One integer per layer; ties go to the earlier one.

    Example:
        >>> from sparsenet.densities import apportion
        >>> apportion([6, 6, 4], total=5, least=[0, 0, 0], most=[6, 6, 4], sizes=[1, 1, 1])
        [2, 2, 1]
    """
    layers = range(len(wanted))

    def counts_at(factor: float) -> list[int]:
        due = (math.floor(min(factor * wanted[i], most[i]) + 0.5) for i in layers)
        return [min(max(n, least[i]), most[i]) for i, n in zip(layers, due, strict=True)]

    def weights(counts: Sequence[int]) -> int:
        return sum(n * size for n, size in zip(counts, sizes, strict=True))

    low, high = 0.0, max(((m + 1) / p for m, p in zip(most, wanted, strict=True) if p), default=0.0)
    while high - low > high * 1e-12 and low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if weights(counts_at(middle)) <= total else (low, middle)
    counts = counts_at(low * (1 - 1e-9))
    if weights(counts) > total:  # the least alone is more
        return counts
    left = total - weights(counts)
    due = [((counts[i] + 0.5) / wanted[i], i) for i in layers if wanted[i] and counts[i] < most[i]]
    heapify(due)
    while due and left >= sizes[due[0][1]] / 2:
        i = due[0][1]
        counts[i] += 1
        left -= sizes[i]
        if counts[i] < most[i]:
            heapreplace(due, ((counts[i] + 0.5) / wanted[i], i))
        else:
            heappop(due)
    return counts


def choose_block_size(fan_in: int, density: float) -> int:
    """The largest of 32, 16 and 8 that leaves every row of blocks 3 blocks on average; or 4, with 1.5; or 1.

    A row of blocks has ``density * fan_in / block_size`` of them. With 3 and more, blocks are on average as accurate as
    single weights; with 1.5 they cost up to 0.7 points, with 0.7 1.1 to 1.8, with 0.3 4 to 6 (docs/training.md).

    Example:
        >>> from sparsenet.densities import choose_block_size
        >>> [choose_block_size(fan_in, density=0.1) for fan_in in (4096, 300, 128, 20)]
        [32, 8, 4, 1]
    """
    return next((b for b, needed in ENOUGH.items() if density * fan_in >= needed * b), 1)


def _checked_shape(owner: str, argument: str, shape: Shape) -> tuple[int, ...]:
    rule = "two or more integers >= 0 (out, in, *kernel)"
    sizes = numbers_of(shape)
    if not all(isinstance(n, int) for n in sizes):
        raise TypeError(f"{owner}: {argument} must be {rule}, got {shape!r}")
    if len(sizes) < 2 or any(n < 0 for n in sizes):
        raise ValueError(f"{owner}: {argument} must be {rule}, got {tuple(sizes)}")
    return tuple(sizes)
