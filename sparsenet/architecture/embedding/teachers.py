"""Random sparse MLPs: what the autoencoder learns from, and the ground truth of the experiments.

After arXiv 2410.08339: 3 to 6 neurons in each hidden layer, sparsity one of {.5, .7, .8, .9}, one guaranteed path from
every input to the output, then random further edges, weights U(-10, 10). The reference code's generator used another
leaky slope than its autoencoder (defect 2); here there is one activation, the space's.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sparsenet.architecture.embedding.codec import MIXED, NetworkBatch, NetworkSpace

__all__ = ["FIXTURE_WEIGHTS", "fixture_network", "grid_points", "normalised", "random_networks"]

SPARSITIES = (0.5, 0.7, 0.8, 0.9)

# The sample pickled in the authors' repository: sigmoid, two hidden layers of 5, 13 weights. (layer, from, to, weight)
FIXTURE_WEIGHTS = (
    (0, 0, 1, -9.576743),
    (0, 1, 1, 9.864551),
    (0, 1, 4, -4.469329),
    (0, 2, 1, 6.819699),
    (1, 1, 1, 3.545725),
    (1, 1, 2, 3.077727),
    (1, 2, 0, 8.110937),
    (1, 2, 2, 8.571483),
    (1, 2, 3, 0.273081),
    (1, 4, 2, -6.332983),
    (1, 4, 3, 0.638408),
    (2, 2, 0, -6.380102),
    (2, 3, 0, -7.204847),
)


def random_networks(
    space: NetworkSpace,
    depth: int,
    count: int,
    generator: torch.Generator | None = None,
    *,
    width: int | None = None,
    nonzeros: int | None = None,
    weight_bound: float = 10.0,
) -> NetworkBatch:
    """``count`` random networks of ``depth`` hidden layers, drawn without a loop over them.

    Args:
        space: bounds, activation, biases.
        depth: hidden layers.
        count: how many.
        generator: draws everything.
        width: neurons of every hidden layer; default 3 to ``space.width - 1``, each layer its own.
        nonzeros: exact number of weights other than zero; default by a random sparsity.
        weight_bound: weights are uniform in [-bound, bound]; biases in [-1, 1].

    Raises:
        ValueError: ``nonzeros`` outside what the width allows.
    """
    shapes = space.shapes(depth)
    neurons = _random_neurons(space, depth, count, width, generator)
    ones = neurons.new_ones
    ends = [ones(count, space.inputs), *neurons.unbind(1), ones(count, 1)]
    valid = [after[:, :, None] * before[:, None, :] for before, after in pairwise(ends)]
    path = _guaranteed_paths(space, ends, shapes, generator)
    flat_valid, flat_path = (torch.cat([p.flatten(1) for p in parts], 1) for parts in (valid, path))
    total = flat_valid.sum(1)
    if nonzeros is None:
        sparsity = torch.tensor(SPARSITIES)[torch.randint(len(SPARSITIES), (count,), generator=generator)]
        wanted = (total * (1 - sparsity)).floor()
    else:
        least = int(flat_path.sum(1).max())
        if not least <= nonzeros <= int(total.min()):
            raise ValueError(
                f"random_networks: nonzeros must lie in [{least}, {int(total.min())}] for this width, got {nonzeros}"
            )
        wanted = torch.full((count,), float(nonzeros))
    wanted = torch.maximum(wanted, flat_path.sum(1))
    score = torch.rand(flat_valid.shape, generator=generator) + 2 * flat_path - 9 * (1 - flat_valid)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    kept = (rank < wanted[:, None]).float() * (torch.rand(score.shape, generator=generator) * 2 - 1) * weight_bound
    weights, at = [], 0
    for out, inp in shapes:
        weights.append(kept[:, at : at + out * inp].reshape(count, out, inp))
        at += out * inp
    return NetworkBatch(space, tuple(weights), neurons, *_random_extras(space, depth, count, shapes, generator))


def _random_neurons(
    space: NetworkSpace, depth: int, count: int, width: int | None, generator: torch.Generator | None
) -> Tensor:
    """[count, depth, space.width]: which neurons exist."""
    if width is not None and not 1 <= width <= space.width:
        raise ValueError(f"random_networks: width must lie in [1, {space.width}], got {width}")
    low = min(3, space.width - 1) if width is None else width
    high = max(low + 1, space.width) if width is None else width + 1
    widths = torch.randint(low, high, (count, depth, 1), generator=generator)
    return (torch.arange(space.width) < widths).float()


def _guaranteed_paths(
    space: NetworkSpace, ends: list[Tensor], shapes: list[tuple[int, int]], generator: torch.Generator | None
) -> list[Tensor]:
    """One path of edges from every input to the output, through random neurons that exist."""
    count = len(ends[0])
    paths = [torch.zeros(count, *shape) for shape in shapes]
    each = torch.arange(count)[:, None].expand(count, space.inputs)
    here = torch.arange(space.inputs).expand(count, space.inputs)
    for layer, after in enumerate(ends[1:]):
        there = torch.multinomial(after, space.inputs, replacement=True, generator=generator)
        paths[layer][each, there, here] = 1.0
        here = there
    return paths


def _random_extras(
    space: NetworkSpace, depth: int, count: int, shapes: list[tuple[int, int]], generator: torch.Generator | None
) -> tuple[tuple[Tensor, ...] | None, Tensor | None]:
    """Biases U(-1, 1) and one random activation per neuron, where the space has them."""
    biases = mixture = None
    if space.bias:
        biases = tuple(torch.rand(count, out, generator=generator) * 2 - 1 for out, _ in shapes)
    if space.activation == MIXED:
        choice = torch.randint(3, (count, depth, space.width), generator=generator)
        mixture = torch.nn.functional.one_hot(choice, 3).float()
    return biases, mixture


def normalised(nets: NetworkBatch, x: Tensor) -> tuple[NetworkBatch, Tensor]:
    """The networks scaled to a root mean square of 1 on ``x`` [s, inputs], and their outputs [n, s] (defect 7)."""
    y = nets.outputs(x)
    factor = 1.0 / y.square().mean(1).sqrt().clamp(min=1e-6)
    return nets.scaled(factor), y * factor[:, None]


def grid_points(inputs: int, per_axis: int = 10) -> Tensor:
    """[per_axis ** inputs, inputs]: a regular grid over [-1, 1] in every input."""
    axis = torch.linspace(-1.0, 1.0, per_axis)
    return torch.cartesian_prod(*[axis] * inputs).reshape(-1, inputs)


def fixture_network() -> NetworkBatch:
    """The network of the authors' repository as a batch of one."""
    space = NetworkSpace(activation="sigmoid")
    weights = [torch.zeros(1, *shape) for shape in space.shapes(2)]
    for layer, start, end, weight in FIXTURE_WEIGHTS:
        weights[layer][0, end, start] = weight
    neurons = torch.zeros(1, 2, space.width)
    neurons[:, :, :5] = 1.0
    return NetworkBatch(space, tuple(weights), neurons)
