"""How one global density is spread over the layers of a network, in whole blocks.

``distribute`` scales a *relative* density per layer (one small function per distribution below) by one factor ``eps``
so that the blocks of all layers together come to ``density`` of all block places. A layer that would need more than
all of its places becomes dense, and ``eps`` is solved again for the others, until none does.

A weight of shape [out, in, *kernel] is stored as a matrix [out, in * prod(kernel)] cut into square blocks, edge blocks
whole, so the relative densities see ``out`` and ``in`` rounded up to whole blocks. For linear layers the number of
blocks under ``erdos_renyi`` is then ``eps * (block rows + block columns)``: every row and column of blocks has, on
average, the same number of blocks in every layer.

Adding a distribution: one function and one line in ``DISTRIBUTIONS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sparsenet.schedules import as_integer, as_number, numbers_of

__all__ = ["DISTRIBUTIONS", "block_places", "distribute"]

Shape = Sequence[int]


def _uniform(out: int, fan_in: int, kernel: Shape) -> float:
    return 1.0


def _erdos_renyi(out: int, fan_in: int, kernel: Shape) -> float:
    return (out + fan_in) / (out * fan_in)


def _erdos_renyi_kernel(out: int, fan_in: int, kernel: Shape) -> float:
    return (out + fan_in + sum(kernel)) / (out * fan_in * math.prod(kernel))


# name -> relative density of a layer from its out and in sizes (whole blocks) and its kernel sizes (() if linear)
DISTRIBUTIONS: dict[str, Callable[[int, int, Shape], float]] = {
    "uniform": _uniform,
    "erdos_renyi": _erdos_renyi,
    "er": _erdos_renyi,
    "erk": _erdos_renyi_kernel,
}


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
    distribution: str = "uniform",
    *,
    block_size: int = 1,
    min_blocks: int = 1,
) -> list[int]:
    """Number of blocks of each layer so that all layers together have ``density``.

    Args:
        shapes: one weight shape per layer: (out, in) for linear, (out, in, *kernel) for convolutions.
        density: in [0, 1]: blocks / block places over all layers.
        distribution: "uniform": the same density everywhere. "erdos_renyi" (or "er"): density ~ (in + out) / (in * out)
            (Mocanu et al. 2018; kernels are ignored, as in Evci et al. 2020's "Erdos-Renyi"). "erk": density
            ~ (in + out + kernel sizes) / (in * out * kernel sizes) (Evci et al. 2020). Both agree for linear layers.
        block_size: edge of the square blocks.
        min_blocks: every layer gets at least this many (or all its places, if fewer) when ``density`` > 0.

    Returns:
        One integer per layer, between 0 and ``block_places(shape, block_size)``, the same on every machine. Their sum
        is ``round(density * places)``, unless ``min_blocks`` alone needs more. Ties go to the earlier layer.

    Raises:
        TypeError, ValueError: an argument out of the ranges above; the message gives its name and value.

    >>> distribute([(4096, 784), (4096, 4096), (10, 4096)], 0.1, "erdos_renyi", block_size=32)
    [689, 1154, 128]
    """
    shapes = [_checked_shape("distribute", f"shapes[{i}]", shape) for i, shape in enumerate(shapes)]
    density = as_number("distribute", "density", density, within=(0, 1))
    block_size = as_integer("distribute", "block_size", block_size, at_least=1)
    min_blocks = as_integer("distribute", "min_blocks", min_blocks, at_least=1)
    relative = DISTRIBUTIONS.get(distribution) if isinstance(distribution, str) else None
    if relative is None:
        raise ValueError(f"distribute: distribution must be one of {', '.join(DISTRIBUTIONS)}, got {distribution!r}")
    places = [block_places(shape, block_size) for shape in shapes]
    if density == 0:
        return [0] * len(places)
    weights = [
        p
        * relative(_whole_blocks(out, block_size) * block_size, _whole_blocks(fan_in, block_size) * block_size, kernel)
        if p
        else 0.0
        for p, (out, fan_in, *kernel) in zip(places, shapes, strict=True)
    ]
    target = math.floor(density * sum(places) + 0.5)
    return _round_to_sum(_share(weights, places, target), places, target, min_blocks)


def _share(weights: list[float], places: list[int], target: int) -> list[float]:
    """Real-valued blocks per layer: min(eps * weight, places), with the ``eps`` for which they sum to ``target``."""
    shares = [float(p) for p in places]  # dense until shown otherwise
    free = [i for i, p in enumerate(places) if p]
    while free:
        eps = target / sum(weights[i] for i in free)
        dense = {i for i in free if eps * weights[i] > places[i]}  # a larger eps later keeps them dense
        if not dense:
            for i in free:
                shares[i] = eps * weights[i]
            break
        free = [i for i in free if i not in dense]
        target -= sum(places[i] for i in dense)
    return shares


def _round_to_sum(shares: list[float], places: list[int], target: int, min_blocks: int) -> list[int]:
    """Whole blocks closest to ``shares`` that sum to ``target`` within [min_blocks, places] (largest remainders)."""
    least = [min(min_blocks, p) for p in places]
    counts = [min(max(math.floor(share), low), p) for share, low, p in zip(shares, least, places, strict=True)]
    missing = target - sum(counts)
    while missing > 0:
        room = [i for i, count in enumerate(counts) if count < places[i]]
        counts[max(room, key=lambda i: (shares[i] - counts[i], -i))] += 1
        missing -= 1
    while missing < 0:
        spare = [i for i, count in enumerate(counts) if count > least[i]]
        if not spare:
            break  # min_blocks alone is more than the target
        counts[min(spare, key=lambda i: (shares[i] - counts[i], -i))] -= 1
        missing += 1
    return counts


def _checked_shape(owner: str, argument: str, shape: Shape) -> tuple[int, ...]:
    rule = "two or more integers >= 0 (out, in, *kernel)"
    sizes = numbers_of(shape)
    if not all(isinstance(n, int) for n in sizes):
        raise TypeError(f"{owner}: {argument} must be {rule}, got {shape!r}")
    if len(sizes) < 2 or any(n < 0 for n in sizes):
        raise ValueError(f"{owner}: {argument} must be {rule}, got {tuple(sizes)}")
    return tuple(sizes)
