"""A distribution by time: every sparse layer takes the same predicted share of a training step."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from torch import Tensor, nn

from sparsenet.distributed import unwrap
from sparsenet.layers import SparseLinear, plain_name, sparse_layers
from sparsenet.memory.costs import LayerCost, layer_costs
from sparsenet.memory.step_time import StepTimeModel
from sparsenet.schedules import as_number

__all__ = ["equal_time"]

_HALVINGS = 50  # of the time that is looked for: finer than any two numbers of blocks differ


def equal_time(
    model: nn.Module,
    batch: int | Mapping[str, int] | Tensor | Sequence[Any],
    density: float,
    *,
    step_time: StepTimeModel | None = None,
) -> dict[str, float]:
    """Densities at which every sparse layer takes the same time in a training step.

    A layer that is full takes less than the others, and one whose first block already takes more gets one block. The
    time of a layer is that of its forward, its backward and the optimizer's update, which grows with its blocks, but
    not in proportion; so it is looked for at the ``density`` that is meant.

    Args:
        model: with sparse layers.
        batch: the inputs of one batch, a number of rows, or rows by layer name, as
            :func:`sparsenet.memory.layer_costs` takes them.
        density: of all sparse layers together, in (0, 1].
        step_time: predicts the times; default a new :class:`StepTimeModel`. Where nothing was measured before on this
            machine, it takes some seconds, and the same call on another machine gives other densities: processes that
            train one model together must be given the same.

    Returns:
        Densities by layer name, which a Sparsifier takes as its distribution.

    Raises:
        TypeError, ValueError: no sparse layer, one that the batch does not reach, a density out of range.

    Example:
        >>> import tempfile, sparsenet as sn
        >>> from sparsenet.memory import StepTimeModel
        >>> from sparsenet.memory.spreading import equal_time
        >>> model = sn.SparseMLP([64, 64, 64], density=0.5, block_size=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = equal_time(model, 32, density=0.5, step_time=StepTimeModel(folder=folder))
        >>> sorted(found), all(0.0 < share <= 1.0 for share in found.values())
        (['0', '1'], True)
    """
    density = as_number("equal_time", "density", density, within=(0, 1))
    if not density:
        raise ValueError("equal_time: density must be above 0, got 0")
    if not isinstance(model, nn.Module):
        raise TypeError(f"equal_time: model must be a module, got {type(model).__name__}")
    layers = sparse_layers(unwrap(model))
    if not layers:
        raise ValueError("equal_time: model must hold at least one SparseLinear; see sparsify_")
    step_time = StepTimeModel() if step_time is None else step_time
    calls = _calls_of(layers, unwrap(model), batch)
    places = {name: layer.pattern.block_rows * layer.pattern.block_cols for name, layer in layers.items()}
    weights = {name: layer.block_size**2 for name, layer in layers.items()}

    @cache
    def milliseconds(name: str, blocks: int) -> float:
        return step_time.measured_ms([_with_blocks(cost, layers[name], blocks) for cost in calls[name]])

    total = density * sum(places[name] * weights[name] for name in layers)
    counts = _equal_counts(milliseconds, places, weights, total)
    return {name: max(1, count) / max(1, places[name]) for name, count in counts.items()}


def _equal_counts(
    milliseconds: Callable[[str, int], float], places: Mapping[str, int], weights: Mapping[str, int], total: float
) -> dict[str, int]:
    """The most blocks within one time for all layers that come to no more than ``total`` weights."""

    def within(limit: float) -> dict[str, int]:
        numbers = {name: range(1, most + 1) for name, most in places.items()}
        return {n: bisect_right(numbers[n], limit, key=lambda blocks, n=n: milliseconds(n, blocks)) for n in places}

    def fits(limit: float) -> bool:
        return sum(count * weights[name] for name, count in within(limit).items()) <= total

    low, high = 0.0, max(milliseconds(name, most) for name, most in places.items())
    if fits(high):
        return dict(places)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return within(low)


def _calls_of(layers: Mapping[str, SparseLinear], model: nn.Module, batch: Any) -> dict[str, list[LayerCost]]:
    calls: dict[str, list[LayerCost]] = {name: [] for name in layers}
    for cost in layer_costs(model, batch):
        if (name := plain_name(cost.name)) in calls:
            calls[name].append(cost)
    if absent := [name for name, found in calls.items() if not found]:
        raise ValueError(f"equal_time: batch must reach every sparse layer, got no call of {absent[0]!r}")
    return calls


def _with_blocks(cost: LayerCost, layer: SparseLinear, blocks: int) -> LayerCost:
    """``cost`` if the layer had so many blocks."""
    updated = cost.optimizer_elements
    if updated and layer.values.requires_grad:
        updated += (blocks - cost.num_blocks) * cost.block_size**2
    return replace(cost, num_blocks=blocks, optimizer_elements=updated)
