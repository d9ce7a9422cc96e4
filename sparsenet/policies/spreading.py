"""How blocks are spread over the layers of a network: by name, by the user's own wish, by scores, by sensitivity.

A *distribution* is the name of one of :data:`sparsenet.densities.DISTRIBUTIONS`, a mapping from layer names to relative
densities, or a function of the layers that returns such a mapping. Relative densities have any scale: a layer with
twice the number gets twice the density, until it is full. Where one is 0, the layer keeps its least number of blocks
until all others are full.

``global`` is no proportion at all: over all layers together the blocks with the lowest scores per weight leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet.densities import DISTRIBUTIONS, proportions
from sparsenet.distributed import unwrap
from sparsenet.layers import SparseLinear, sparse_layers
from sparsenet.policies.policy import block_squared_norms
from sparsenet.saliency.measuring import Call, untouched
from sparsenet.schedules import as_number, number_of

__all__ = ["GLOBAL", "Distribution", "checked_distribution", "leaving_by_score", "sensitivity", "spread"]

GLOBAL = "global"

Distribution = str | Mapping[str, float] | Callable[[Mapping[str, SparseLinear]], Mapping[str, float]]


# --- proportions ---


def checked_distribution(value: Any, owner: str, names: Collection[str] | None = None) -> Distribution | None:
    """``value`` where it is a distribution or None; a mapping as one of Python's own numbers.

    Args:
        value: None, a name of ``DISTRIBUTIONS``, ``global``, a mapping from layer names to relative densities, or a
            function; what a function returns is checked when :func:`spread` calls it.
        owner: who an error speaks for.
        names: of all layers; with them a mapping must name each of them and no other.

    Raises:
        TypeError, ValueError: anything else, or relative densities that are not finite, below 0 or all 0.

    Example:
        >>> from sparsenet.policies.spreading import checked_distribution
        >>> checked_distribution({"0": 1, "2": 3}, "Sparsifier", names=["0", "2"])
        {'0': 1.0, '2': 3.0}
    """
    if value is None or (isinstance(value, str) and value in (*DISTRIBUTIONS, GLOBAL)):
        return value
    if isinstance(value, Mapping):
        return _checked_densities(value, owner, "distribution", names)
    if callable(value) and not isinstance(value, type):
        return value
    known = ", ".join([*DISTRIBUTIONS, GLOBAL])
    error = ValueError if isinstance(value, str) else TypeError
    raise error(
        f"{owner}: distribution must be None, one of {known}, relative densities by layer name or a function that "
        f"returns them, got {value!r}"
    )


def spread(distribution: Distribution, layers: Mapping[str, SparseLinear], owner: str = "Sparsifier") -> list[float]:
    """Blocks of each layer relative to the others, as a distribution wants them; on any scale.

    Args:
        distribution: as :func:`checked_distribution` takes it, except None and ``global``. A mapping may name further
            layers, such as frozen ones; what a function returns must name those that it was given and no others.
        layers: those that share the blocks.
        owner: who an error speaks for.

    Returns:
        One number per layer, in their order; what :func:`sparsenet.densities.apportion` takes.

    Raises:
        TypeError, ValueError: another distribution, a layer without a relative density, one that is not finite or
            below 0, or none above 0.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.policies.spreading import spread
        >>> layers = dict(sn.SparseMLP([64, 128, 32], density=0.5, block_size=16).named_children())
        >>> spread({"0": 0.2, "1": 0.8}, layers)   # of 32 and 16 places
        [8.0, 16.0]
        >>> spread(lambda layers: {name: layer.out_features for name, layer in layers.items()}, layers)
        [32.0, 4.0]
    """
    shapes = [layer.pattern.shape for layer in layers.values()]
    sizes = [layer.block_size for layer in layers.values()]
    if isinstance(distribution, str) and distribution in DISTRIBUTIONS:
        return proportions(shapes, sizes, distribution)
    if callable(distribution):
        found, argument = distribution(layers), "what distribution returns"
        if not isinstance(found, Mapping):
            raise TypeError(f"{owner}: {argument} must be relative densities by layer name, got {found!r}")
        relative = _checked_densities(found, owner, argument, layers)
    elif isinstance(distribution, Mapping):
        own = {name: distribution[name] for name in layers if name in distribution}
        relative = _checked_densities(own, owner, "distribution", layers)
    else:
        known = ", ".join(DISTRIBUTIONS)
        raise ValueError(
            f"{owner}: distribution must be one of {known}, relative densities by layer name or a function that "
            f"returns them, got {distribution!r}"
        )
    return proportions(shapes, sizes, [relative[name] for name in layers])


def _checked_densities(
    densities: Mapping[Any, Any], owner: str, argument: str, names: Collection[str] | None
) -> dict[str, float]:
    """Relative densities by layer name as Python's own numbers."""
    if names is not None and (absent := [name for name in names if name not in densities]):
        raise ValueError(f"{owner}: {argument} must name every layer, got none for {', '.join(map(repr, absent))}")
    known = None if names is None else set(names)
    found = {}
    for name, value in densities.items():
        if not isinstance(name, str) or (known is not None and name not in known):
            layers = "layers by their names" if names is None else f"only layers ({', '.join(names)})"
            raise ValueError(f"{owner}: {argument} must name {layers}, got {name!r}")
        rule = f"{argument} must be finite numbers >= 0 by layer name"
        number = number_of(value)
        if number is None:
            raise TypeError(f"{owner}: {rule}, got {value!r} for {name!r}")
        if not math.isfinite(number) or number < 0:
            raise ValueError(f"{owner}: {rule}, got {value!r} for {name!r}")
        found[name] = float(number)
    if (names is None or known) and not any(found.values()):
        raise ValueError(f"{owner}: {argument} must have a number above 0, got {found!r}")
    return found


# --- global, by score ---


def leaving_by_score(
    scores: Mapping[str, Tensor], sizes: Mapping[str, int], least: Mapping[str, int], total: int
) -> dict[str, int]:
    """How many units leave each layer when over all layers the lowest scores per weight leave.

    Units leave in the order of score / size; ties go to the earlier layer, then to the lower index. A layer that has
    come down to its least number gives nothing more. So which units leave a layer follows from how many: those with its
    lowest scores. A score per weight makes blocks of different sizes comparable where scores add up over weights, as
    squared norms and saliencies do (Han et al. 2015 prune all layers by one threshold; Lee et al. 2019 rank them so).

    It is quickselect (Hoare 1961) with weights: a pivot halves what is undecided, without sorting.

    Args:
        scores: per layer, one finite number per unit [n]; on any device.
        sizes: weights in a unit of each layer, at least 1.
        least: how many units each layer keeps at any rate.
        total: weights that are to leave.

    Returns:
        One count per layer, in the order of ``scores``. Together they are worth ``total`` to half a unit, and exactly
        if all sizes are equal and divide it; less where the least of all layers does not allow it.

    Example:
        >>> import torch
        >>> from sparsenet.policies.spreading import leaving_by_score
        >>> scores = {"a": torch.tensor([1.0, 5.0, 2.0]), "b": torch.tensor([8.0, 40.0])}
        >>> leaving_by_score(scores, {"a": 1, "b": 4}, {"a": 1, "b": 1}, total=6)   # 1, 2 and 8 / 4
        {'a': 2, 'b': 1}
    """
    wide = any(s.dtype == torch.float64 for s in scores.values())
    dtype = torch.float64 if wide else torch.float32
    undecided = {name: s.detach().flatten().to(dtype) for name, s in scores.items()}
    if len(set(sizes.values())) > 1:  # else dividing changes no order, and copies them all
        undecided = {name: s / sizes[name] for name, s in undecided.items()}
    room = {name: max(0, s.numel() - least[name]) for name, s in scores.items()}
    leaving = dict.fromkeys(scores, 0)  # those below all that is undecided
    while any(s.numel() for s in undecided.values()):
        pivot = _pivot(undecided)
        with_below = {n: min(leaving[n] + int((s < pivot).sum()), room[n]) for n, s in undecided.items()}
        left = total - sum(with_below[n] * sizes[n] for n in scores)
        if left < 0:
            undecided = {n: s[s < pivot] for n, s in undecided.items()}
            continue
        for n in scores:  # the pivot's equals leave in the order of the layers
            most = min(int((undecided[n] == pivot).sum()), room[n] - with_below[n])
            count = min(most, max(0, (2 * left + sizes[n]) // (2 * sizes[n])))  # half a unit and more is one
            with_below[n] += count
            left -= count * sizes[n]
            if count < most:
                return with_below
        leaving = with_below
        if left <= 0:
            return leaving
        undecided = {n: s[s > pivot] if leaving[n] < room[n] else s[:0] for n, s in undecided.items()}
    return leaving


def _pivot(undecided: Mapping[str, Tensor]) -> float:
    """One of the scores, near their middle: the median of some at equal distances."""
    stride = max(1, sum(s.numel() for s in undecided.values()) // 1024)
    sample = torch.cat([s[::stride].cpu() for s in undecided.values()])
    return float(sample.median())


# --- by measured sensitivity ---


@torch.no_grad()
def sensitivity(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor | float],
    *,
    density: float = 0.5,
    least: float = 0.1,
) -> dict[str, float]:
    """Relative densities by how much the loss rises when one layer alone loses its smallest blocks.

    ::

        slope of a layer     max(0, loss without its smallest blocks - loss) / weights in these blocks
        relative density     max(least, slope / largest slope of all layers)

    So a layer is the denser the more a weight of it is worth. All are 1 where the loss rises nowhere, and so is that
    of a layer that has no block to lose. It is the scan of Han et al. (2015, figure 6) and Li et al. (2017, section
    3.2), by blocks, with the size of a block its norm; no gradient is needed. It takes as many passes over the batches
    as there are sparse layers, and one more.

    Args:
        model: with sparse layers; it runs in eval mode, and nothing of it changes, bit for bit, also where the loss
            raises an error: values, buffers, modes, the state of random numbers.
        batches: (input, target) pairs; the input is what the model is called with, or a
            :class:`sparsenet.saliency.Call`. All of them are kept at a time. Each counts the same.
        loss: ``loss(output, target)``, one finite number.
        density: the share of its blocks that a layer keeps while it is measured, in [0, 1); at least one block.
        least: the smallest relative density, in [0, 1].

    Returns:
        Relative densities by layer name, which a Sparsifier takes as its distribution. Processes that train one model
        together must be given the same batches.

    Raises:
        TypeError, ValueError: no sparse layer, no batches, a loss that is not one finite number, an argument out of
            range, or values that a parametrization computes.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.policies.spreading import sensitivity
        >>> model = sn.SparseMLP([64, 128, 10], density=0.5, block_size=16)
        >>> x = torch.randn(32, 64)
        >>> found = sensitivity(model, [(x, model(x))], torch.nn.functional.mse_loss)
        >>> found["1"], 0.1 <= found["0"] < 1.0   # a weight of the small last layer is worth more
        (1.0, True)
    """
    density = as_number("sensitivity", "density", density, within=(0, 1))
    if density == 1:
        raise ValueError("sensitivity: density must be below 1, so that a layer loses blocks, got 1")
    least = as_number("sensitivity", "least", least, within=(0, 1))
    layers = _layers_to_measure(model)
    calls = _calls(batches)
    whole = _mean_loss(model, calls, loss)
    slopes = {}
    for name, layer in layers.items():
        number = layer.pattern.num_blocks
        lost = number - max(1, math.floor(density * number + 0.5))
        if lost > 0:
            with _without_smallest(layer, lost):
                rise = _mean_loss(model, calls, loss) - whole
            slopes[name] = max(0.0, rise) / (lost * layer.block_size**2)
    largest = max(slopes.values(), default=0.0)
    return {name: max(least, slopes.get(name, largest) / largest) if largest else 1.0 for name in layers}


def _layers_to_measure(model: nn.Module) -> dict[str, SparseLinear]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"sensitivity: model must be a module, got {type(model).__name__}")
    layers = sparse_layers(unwrap(model))
    if not layers:
        raise ValueError("sensitivity: model must hold at least one SparseLinear; see sparsify_")
    for name, layer in layers.items():
        if "values" not in layer._parameters:
            raise ValueError(f"sensitivity: layer {name!r} must hold its values itself, got computed ones")
    return layers


@contextmanager
def _without_smallest(layer: SparseLinear, count: int) -> Iterator[None]:
    """``layer`` with zeros for its ``count`` blocks of smallest norm; afterwards it is what it was, bit for bit."""
    values = layer.values.data  # writing to it does not count as a change for graphs that are still to run backward
    lowest = torch.sort(block_squared_norms(values), stable=True).indices[:count]
    kept = values[lowest]
    try:
        values[lowest] = 0.0
        yield
    finally:
        values[lowest] = kept


def _calls(batches: Iterable[tuple[Any, Any]]) -> list[tuple[Call, Any]]:
    rule = "sensitivity: batches must be (input, target) pairs"
    if not isinstance(batches, Iterable):
        raise TypeError(f"{rule}, got {batches!r}")
    calls = []
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or isinstance(batch, Call) or len(batch) != 2:
            raise TypeError(f"{rule}, got {type(batch).__name__}")
        given, target = batch
        calls.append((given if isinstance(given, Call) else Call((given,), {}), target))
    if not calls:
        raise ValueError("sensitivity: batches must hold at least one batch, got none")
    return calls


def _mean_loss(model: nn.Module, calls: list[tuple[Call, Any]], loss: Callable[[Any, Any], Tensor | float]) -> float:
    """Over the batches; each evaluation draws the same random numbers, if any."""
    total = 0.0
    with untouched(model):
        for call, target in calls:
            value = loss(model(*call.args, **call.kwargs), target)
            number = number_of(value.reshape(()) if isinstance(value, Tensor) and value.numel() == 1 else value)
            if number is None or not math.isfinite(number):
                shape = isinstance(value, Tensor) and value.numel() != 1
                got = f"{list(value.shape)}" if shape else repr(value if number is None else number)
                raise ValueError(f"sensitivity: loss must return one finite number, got {got}")
            total += number
    return total / len(calls)
