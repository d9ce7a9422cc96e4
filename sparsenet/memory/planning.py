"""What a network will need, item by item and moment by moment, and the largest density that fits a budget.

A training step is played through on paper: forward, backward layer by layer (gradients appear while activations go),
the optimizer's step, a rewire (new values beside old ones), an evaluation. Each moment is a sum of items; the moment
with the largest sum is the peak. tests/memory compares it with measurements.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch

from sparsenet import functional
from sparsenet.densities import CHOSEN_FROM, block_places, choose_block_size, distribute
from sparsenet.functional.checks import check_block_size
from sparsenet.memory.budget import MemoryBudget, format_bytes
from sparsenet.memory.saliency import kept_bytes, measuring_bytes, pass_bytes, surgeon_bytes
from sparsenet.models import SparseMLP
from sparsenet.pattern import INDEX_BYTES
from sparsenet.policies import POLICIES, Policy
from sparsenet.policies.growth import is_sparing, rows_scored
from sparsenet.policies.places import PLACES_AT_ONCE
from sparsenet.policies.views import CHEAP, ELEMENTS_AT_ONCE, ROWS_AT_ONCE
from sparsenet.schedules import as_integer, as_number, numbers_of

__all__ = ["OPTIMIZER_STATES", "BudgetError", "LayerPlan", "MemoryPlan", "plan"]

OPTIMIZER_STATES = {"adamw": 2, "sgd": 1}  # tensors of state per weight; SGD's is its momentum
_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
_NEEDS_PRE_ACTIVATION = ("gelu", "silu")

# Bytes per block: of the patterns that a rewire plans for all layers, and of the layer it works on (int64 places,
# orders, masks). Per place scored at a time: int64 place, block row, float32 score and their selection. Other: Python
# objects, small tensors, the heap's rounding.
_PLANNED_BYTES, _REWIRE_BYTES, _SCORE_BYTES = 31, 27, 31
_DRAWN_BYTES, _CANDIDATE_BYTES = 70, 36  # per candidate place: while it is drawn, and while it is scored
_YOUNG_BYTES = 8  # per block that a rewire exchanges: its place, until it is old enough to leave
_OTHER_BYTES, _OTHER_SHARE = 2 << 20, 0.005


class BudgetError(ValueError):
    """The budget is below what the network needs at its sparsest."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer of a plan: ``shape`` is (out, in), ``weight_bytes`` its values and bias."""

    name: str
    shape: tuple[int, int]
    block_size: int
    num_blocks: int
    density: float
    weight_bytes: int


@dataclass(frozen=True)
class MemoryPlan:
    """A network and the memory that training it will need.

    Attributes:
        sizes, distribution, activation, dtype: of the network; ``layers``: its layers, with their blocks.
        density: weights in the blocks of all layers together / those in all block places.
        batch_size, optimizer, policy: of the training.
        budget_bytes: the budget; None for a plan of a given density without one.
        items: bytes by item at the moment of the peak; they sum to ``predicted_peak_bytes``.
        moments: bytes at each moment of training; ``moment`` is the one where the peak is.
        minimum_bytes: what the sparsest network that reaches every neuron would need.
        dense_bytes: what the same network of ``nn.Linear`` would need.
    """

    sizes: tuple[int, ...]
    density: float
    layers: tuple[LayerPlan, ...]
    items: Mapping[str, int]
    moments: Mapping[str, int]
    budget_bytes: int | None
    minimum_bytes: int
    dense_bytes: int
    batch_size: int
    distribution: str
    activation: str
    optimizer: str
    policy: str
    dtype: str

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Side of a block in each layer."""
        return tuple(layer.block_size for layer in self.layers)

    @property
    def predicted_peak_bytes(self) -> int:
        """The largest sum over the moments."""
        return max(self.moments.values())

    @property
    def moment(self) -> str:
        """When the peak is reached."""
        return max(self.moments, key=self.moments.__getitem__)

    @property
    def phases(self) -> dict[str, int]:
        """The moments of all layers together: forward, backward, scoring growth, optimizer step, rewire, evaluation."""
        phases: dict[str, int] = {}
        for name, count in self.moments.items():
            phase = name.split(" of layer")[0]
            phases[phase] = max(phases.get(phase, 0), count)
        return phases

    @property
    def num_weights(self) -> int:
        """Stored weights, edge blocks whole, without biases."""
        return sum(layer.num_blocks * layer.block_size**2 for layer in self.layers)

    def build(self, device: torch.device | str | None = None, generator: torch.Generator | None = None) -> SparseMLP:
        """The planned network with random patterns of the planned numbers of blocks."""
        return SparseMLP(
            self.sizes,
            [layer.density for layer in self.layers],
            self.block_sizes,
            self.activation,
            device=device,
            dtype=getattr(torch, self.dtype),
            generator=generator,
        )

    def table(self) -> str:
        """The plan as text: layers, then items at the peak."""
        lines = [f"{'layer':<8}{'out x in':>14}{'block':>7}{'blocks':>9}{'density':>10}{'weights':>12}"]
        for layer in self.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            size = format_bytes(layer.weight_bytes)
            side, count = layer.block_size, layer.num_blocks
            lines.append(f"{layer.name:<8}{shape:>14}{side:>7}{count:>9}{layer.density:>10.2%}{size:>12}")
        lines += ["", f"at the peak ({self.moment})"]
        lines += [f"  {name:<28}{format_bytes(count):>12}" for name, count in self.items.items() if count]
        lines.append(f"  {'predicted peak':<28}{format_bytes(self.predicted_peak_bytes):>12}")
        if self.budget_bytes is not None:
            lines.append(f"  {'budget':<28}{format_bytes(self.budget_bytes):>12}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Training:
    """What a prediction depends on besides the numbers of blocks. ``shapes`` are (out, in)."""

    shapes: tuple[tuple[int, int], ...]
    block_sizes: tuple[int, ...]
    batch_size: int
    activation: str
    dtype: str
    states: int
    grows_by_gradient: bool  # growth is scored in backward
    grows_otherwise: bool  # growth is scored at the rewire
    drop_fraction: float
    threads: int
    input_bytes: int  # per stored feature of an example: 1 for images, 4 for float32
    policy: Policy = field(default_factory=Policy)
    layer_places: tuple[int, ...] = field(init=False)

    def __post_init__(self):
        places = (block_places(shape, b) for shape, b in zip(self.shapes, self.block_sizes, strict=True))
        object.__setattr__(self, "layer_places", tuple(places))

    @property
    def element_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return _DTYPE_BYTES[self.dtype]

    def growing(self, layer: int, count: int) -> int:
        """Blocks that grow at a rewire in a layer that has ``count``."""
        return min(round(self.drop_fraction * count), self.layer_places[layer] - count)

    def sparing(self, layer: int, count: int) -> bool:
        """Whether growth in a layer of ``count`` blocks is scored at candidates only."""
        inactive = self.layer_places[layer] - count
        growing = self.growing(layer, count)
        return self.grows_by_gradient and is_sparing(
            self.policy, self.batch_size, self.shapes[layer], growing, inactive
        )

    def rows_bytes(self, features: int) -> int:
        """Bytes of one [batch, features] tensor."""
        return self.batch_size * features * self.element_bytes


def _moments(job: _Training, counts: Sequence[int]) -> Iterator[tuple[str, dict[str, int]]]:
    """Each moment's name and its bytes by item, without ``other``."""
    values = [count * b**2 * job.element_bytes for count, b in zip(counts, job.block_sizes, strict=True)]
    weights = [v + out * job.element_bytes for v, (out, _) in zip(values, job.shapes, strict=True)]
    blocks, first_in, last = sum(counts), job.shapes[0][1], len(job.shapes) - 1
    sizes = list(zip(job.block_sizes, counts, strict=True))
    rows = [kept_bytes(job.policy, shape, job.batch_size) for shape in job.shapes]
    young = round(job.drop_fraction * blocks) if job.policy.grows() else 0
    kept = {
        "weights": sum(weights),
        "optimizer state": sum(weights) * job.states,
        "indices": blocks * INDEX_BYTES + young * _YOUNG_BYTES,
        "policy": sum(values) * job.policy.kept_copies + sum(_momentum_bytes(job, i, n) for i, n in enumerate(counts)),
        "kernel workspace": _workspace_bytes(job, counts),
        "batch": job.batch_size * first_in * (4 + job.input_bytes)
        + (job.rows_bytes(first_in) if job.element_bytes != 4 else 0),
    }
    saved = 2 if job.activation in _NEEDS_PRE_ACTIVATION else 1
    hidden = [job.rows_bytes(out) * saved for out, _ in job.shapes[:-1]]
    logits = 4 * job.batch_size * job.shapes[-1][0] * 4  # logits, their softmax and gradient; float32
    yield "forward", kept | {"activations": sum(hidden) + logits}
    gradients = 0
    for layer in range(last, -1, -1):
        out, inputs = job.shapes[layer]
        gradients += weights[layer]
        alive = sum(hidden[:layer]) + (0 if layer == last else hidden[layer] // saved)
        flowing = job.rows_bytes(out) + (job.rows_bytes(inputs) if layer else 0)
        moment = kept | {"gradients": gradients, "activations": alive + logits, "gradients of activations": flowing}
        yield f"backward of layer {layer}", moment
        if during_pass := measuring_bytes(job.policy, job.shapes[layer], *sizes[layer], job.batch_size):
            held = sum(weights) if job.policy.measures else gradients  # a pass of its own comes beside the gradients
            saliency = during_pass + sum(rows[layer:])
            yield f"measuring layer {layer}", moment | {"gradients": held, "saliency": saliency}
        if job.grows_by_gradient:
            before_activation = job.rows_bytes(out) if job.activation != "none" and layer != last else 0
            scores = _scoring_bytes(job, layer, counts[layer])
            after = moment | {"gradients of activations": flowing + before_activation}
            during = after | {"gradients": gradients - weights[layer], "growth scores": scores}
            during["gradients of activations"] -= job.rows_bytes(inputs) if layer else 0
            yield f"scoring growth of layer {layer}", max(during, after, key=lambda items: sum(items.values()))
    yield "optimizer step", kept | {"gradients": gradients, "activations": logits}
    kept = kept | {"gradients": gradients} if job.policy.reads_gradient else kept
    if own_pass := pass_bytes(job.policy, sum(blocks_of * b**2 * 4 for b, blocks_of in sizes), sum(hidden) + logits):
        yield "measuring before a rewire", kept | {"saliency": own_pass}
    left, states, planned = 0.0, 1 + job.states, 0
    kept = kept | {"saliency": sum(rows)} if any(rows) else kept
    for layer, (size, count, places) in enumerate(zip(values, counts, job.layer_places, strict=True)):
        exchanged = min(job.drop_fraction, (places - count) / max(count, 1))  # no more than there are free places
        if exchanged * count < 0.5:
            continue
        left += exchanged * size * states  # kept until the rewire has succeeded
        beside = round(left + size * states) + blocks * _PLANNED_BYTES + count * _REWIRE_BYTES
        moving = kept | {"rewiring": beside, "activations": logits}
        surgeon = surgeon_bytes(job.policy, job.shapes[layer], *sizes[layer], job.batch_size)
        scores = min(places, PLACES_AT_ONCE) * _SCORE_BYTES if job.grows_otherwise else 0
        choosing = kept | {"rewiring": planned, "growth scores": scores, "activations": logits}
        if surgeon:
            choosing["saliency"] += surgeon
            planned += size  # the adjusted values
        planned += count * _PLANNED_BYTES
        yield f"rewire of layer {layer}", max(choosing, moving, key=lambda items: sum(items.values()))
        if job.policy.reads_gradient:  # each goes as its layer is moved
            kept = kept | {"gradients": kept["gradients"] - size}
    flowing = max(job.rows_bytes(out) + job.rows_bytes(inputs) for out, inputs in job.shapes)
    yield "evaluation", kept | {"activations": flowing + logits}


def _scoring_bytes(job: _Training, layer: int, count: int) -> int:
    """While a layer's growth is scored in backward: of all places, or of candidates and their gradients."""
    if not job.sparing(layer, count):
        return min(job.layer_places[layer], PLACES_AT_ONCE) * _SCORE_BYTES
    candidates, b = job.policy.candidates * job.growing(layer, count), job.block_sizes[layer]
    gradients = min(candidates * b**2, ELEMENTS_AT_ONCE) * job.element_bytes
    rows = min(ROWS_AT_ONCE, rows_scored(job.batch_size))
    drawing = candidates * _DRAWN_BYTES + rows * max(job.shapes[layer]) * 4
    return max(drawing, gradients + candidates * _CANDIDATE_BYTES)


def _momentum_bytes(job: _Training, layer: int, count: int) -> int:
    """Of a momentum of the gradient at candidate places."""
    if not (job.grows_by_gradient and job.policy.momentum):
        return 0
    return (job.policy.candidates or 0) * job.growing(layer, count) * (job.block_sizes[layer] ** 2 * 4 + 8)


def _workspace_bytes(job: _Training, counts: Sequence[int]) -> int:
    """Scratch memory the CPU kernels keep, by dry runs of the calls that training makes."""
    dtype = getattr(torch, job.dtype)
    sizes = []
    layers = zip(job.shapes, job.block_sizes, counts, job.layer_places, strict=True)
    for layer, (shape, b, count, places) in enumerate(layers):
        call = (dtype, shape, b)
        sizes.append(functional.linear_workspace(*call, count, job.batch_size, job.threads))
        sparing = job.sparing(layer, count)
        costs_much = job.batch_size * places * b**2 > CHEAP
        if sparing or (job.grows_by_gradient and places <= 2 * count < 2 * places and costs_much):
            listed = job.policy.candidates * job.growing(layer, count) if sparing else places - count
            listed = max(1, min(ELEMENTS_AT_ONCE // b**2, listed))
            rows = rows_scored(job.batch_size) if sparing else job.batch_size
            sizes.append(functional.linear_workspace(*call, listed, rows, job.threads))
        elif job.grows_by_gradient and count < places:
            columns = -(-shape[1] // b)
            rows = min(places // columns, max(1, PLACES_AT_ONCE // columns))
            sizes.append(functional.norms_workspace(*call, job.batch_size, rows, job.threads))
    return sum(max(depth) for depth in zip(*sizes, strict=True))


def _predict(job: _Training, counts: Sequence[int]) -> tuple[dict[str, int], dict[str, int]]:
    """Items at the peak, and bytes by moment."""
    moments: dict[str, int] = {}
    peak: dict[str, int] = {}
    for name, items in _moments(job, counts):
        items["other"] = _OTHER_BYTES + int(sum(items.values()) * _OTHER_SHARE)
        moments[name] = sum(items.values())
        if moments[name] > sum(peak.values()):
            peak = items
    return peak, moments


def plan(
    sizes: Sequence[int],
    budget: str | int | MemoryBudget | None = "512MiB",
    batch_size: int = 256,
    optimizer: str = "adamw",
    dtype: str = "float32",
    block_size: int | None = None,
    distribution: str = "erdos_renyi",
    activation: str = "relu",
    *,
    density: float | None = None,
    momentum: float = 0.9,
    policy: str = "rigl",
    drop_fraction: float = 0.3,
    threads: int | None = None,
    input_bytes: int = 1,
) -> MemoryPlan:
    """Predicts the memory that training a :class:`SparseMLP` needs, and picks the largest density that fits.

    Args:
        sizes: feature counts, input first.
        budget: for weights, gradients, optimizer state, activations, indices and workspace together; None only with
            ``density``.
        batch_size: of training and evaluation.
        optimizer: ``adamw`` or ``sgd``, torch's, with ``fused=True`` (the others need temporary tensors as well).
        dtype: float32, bfloat16, float16 or float64, of weights, gradients, state and activations.
        block_size, distribution, activation: as for SparseMLP; ``block_size`` None is chosen for each layer.
        density: take this one instead of the largest; it must fit a budget that is given.
        momentum: of SGD; 0 saves its state.
        policy: a name in ``sparsenet.policies.POLICIES``; ``drop_fraction``: the largest share of blocks it exchanges.
        threads: that the kernels use; default torch's.
        input_bytes: per stored feature of an example: 1 for images, 4 for float32.

    Raises:
        BudgetError: the budget is below ``minimum_bytes``, or below what ``density`` needs; says what takes it.
        ValueError, TypeError: an argument out of range.

    Example:
        >>> import sparsenet as sn
        >>> plan = sn.plan([784, 1024, 1024, 10], budget="24MiB", batch_size=64)
        >>> plan.predicted_peak_bytes <= 24 << 20 < plan.dense_bytes
        True
    """
    features = numbers_of(sizes)
    given = list(sizes) if isinstance(sizes, tuple) else sizes
    if not all(isinstance(n, int) and n >= 1 for n in features):
        raise ValueError(f"plan: sizes must be integers of at least 1, got {given}")
    if len(features) < 2:
        raise ValueError(f"plan: sizes must name at least input and output, got {given}")
    batch_size = as_integer("plan", "batch_size", batch_size, at_least=1)
    input_bytes = as_integer("plan", "input_bytes", input_bytes, at_least=1)
    drop_fraction = as_number("plan", "drop_fraction", drop_fraction, within=(0, 1))
    block_size = None if block_size is None else check_block_size("plan", block_size)
    density = None if density is None else as_number("plan", "density", density, within=(0, 1))
    _check_names(optimizer, dtype, policy)
    shapes = tuple((out, inp) for inp, out in pairwise(features))
    chosen = POLICIES[policy]()
    job = _Training(
        shapes=shapes,
        block_sizes=_block_sizes(shapes, block_size, 1.0 if density is None else density),
        batch_size=batch_size,
        activation=activation,
        dtype=dtype,
        states=OPTIMIZER_STATES[optimizer] if optimizer != "sgd" or momentum else 0,
        grows_by_gradient=chosen.needs_gradient,
        grows_otherwise=not chosen.needs_gradient and chosen.scores_places(),
        drop_fraction=chosen.largest_share(drop_fraction),
        policy=chosen,
        threads=as_integer("plan", "threads", threads or torch.get_num_threads(), at_least=1),
        input_bytes=input_bytes,
    )
    limit = None if budget is None else MemoryBudget(budget).bytes
    if density is not None:
        counts = distribute(shapes, density, distribution, block_size=job.block_sizes)
    elif limit is None:
        raise ValueError("plan: give a budget or a density, got neither")
    else:
        job, counts = _largest_network(job, distribution, limit, chosen=block_size is None)
    items, moments = _predict(job, counts)
    if limit is not None and max(moments.values()) > limit:
        raise BudgetError(_shortage(f"density {density}", items, moments, limit))
    return MemoryPlan(
        sizes=tuple(features),
        density=_density(job, counts),
        layers=tuple(_layer_plans(job, counts)),
        items=items,
        moments=moments,
        budget_bytes=limit,
        minimum_bytes=max(_sparsest(job, distribution)[1].values()),
        dense_bytes=_dense_bytes(job),
        batch_size=batch_size,
        distribution=distribution,
        activation=activation,
        optimizer=optimizer,
        policy=policy,
        dtype=dtype,
    )


def _block_sizes(shapes: Sequence[tuple[int, int]], block_size: int | None, density: float) -> tuple[int, ...]:
    return tuple(choose_block_size(inputs, density) if block_size is None else block_size for _, inputs in shapes)


def _density(job: _Training, counts: Sequence[int]) -> float:
    """Weights in blocks / those in all places."""
    weights, places = (
        sum(n * b * b for n, b in zip(blocks, job.block_sizes, strict=True)) for blocks in (counts, job.layer_places)
    )
    return weights / max(places, 1)


def _fewest_weights(job: _Training) -> int:
    """Weights in the blocks of the sparsest network that reaches every neuron."""
    return sum(max(-(-n // b) for n in shape) * b * b for shape, b in zip(job.shapes, job.block_sizes, strict=True))


def _counts_of(job: _Training, weights: int, distribution: str) -> list[int]:
    places = sum(p * b * b for p, b in zip(job.layer_places, job.block_sizes, strict=True))
    return distribute(job.shapes, min(weights / max(places, 1), 1.0), distribution, block_size=job.block_sizes)


def _sparsest(job: _Training, distribution: str) -> tuple[dict[str, int], dict[str, int]]:
    return _predict(job, _counts_of(job, _fewest_weights(job), distribution))


def _largest_network(job: _Training, distribution: str, limit: int, chosen: bool) -> tuple[_Training, Sequence[int]]:
    """The most blocks that fit the budget; where block sizes are chosen, they shrink until they suit the density."""
    while True:
        counts = _most_blocks(job, distribution, limit)
        sizes = job.block_sizes
        if chosen and counts is None:
            smaller = replace(job, block_sizes=tuple(next((c for c in CHOSEN_FROM if c < b), 1) for b in sizes))
            needs = (max(_sparsest(one, distribution)[1].values()) for one in (smaller, job))
            sizes = smaller.block_sizes if operator.lt(*needs) else sizes
        elif chosen:
            sizes = tuple(map(min, sizes, _block_sizes(job.shapes, None, _density(job, counts))))
        if sizes != job.block_sizes:
            job = replace(job, block_sizes=sizes)
        elif counts is None:
            what = "the sparsest network that reaches every neuron"
            raise BudgetError(_shortage(what, *_sparsest(job, distribution), limit))
        else:
            return job, counts


def _most_blocks(job: _Training, distribution: str, limit: int) -> Sequence[int] | None:
    """Blocks of each layer in the largest network within ``limit`` bytes; None: not even the sparsest is."""
    unit = max(job.block_sizes) ** 2
    places = sum(p * b * b for p, b in zip(job.layer_places, job.block_sizes, strict=True))

    def fits(units: int) -> bool:
        return max(_predict(job, _counts_of(job, units * unit, distribution))[1].values()) <= limit

    fewest = _fewest_weights(job) // unit
    if not fits(fewest):
        return None
    return _counts_of(job, _largest(fewest, places // unit, fits) * unit, distribution)


def _check_names(optimizer: str, dtype: str, policy: str) -> None:
    for name, value, known in (
        ("optimizer", optimizer, OPTIMIZER_STATES),
        ("dtype", dtype, _DTYPE_BYTES),
        ("policy", policy, POLICIES),
    ):
        if value not in known:
            raise ValueError(f"plan: {name} must be one of {', '.join(known)}, got {value!r}")


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest k in [low, high] that fits; low is known to."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _shortage(what: str, items: Mapping[str, int], moments: Mapping[str, int], limit: int) -> str:
    largest = sorted(((count, name) for name, count in items.items() if count), reverse=True)
    parts = ", ".join(f"{name} {format_bytes(count)}" for count, name in largest)
    needed = format_bytes(max(moments.values()))
    return f"plan: budget must be at least {needed} for {what} ({parts}), got {format_bytes(limit)}"


def _dense_bytes(job: _Training) -> int:
    """What the same network with ``nn.Linear`` needs: all weights, no indices, no workspace of ours, no rewiring."""
    peak = 0
    single = replace(job, block_sizes=(1,) * len(job.shapes), drop_fraction=0.0)
    for name, items in _moments(single, [out * inp for out, inp in job.shapes]):
        if "growth" not in name:
            items |= {"indices": 0, "kernel workspace": 0, "other": _OTHER_BYTES}
            peak = max(peak, sum(items.values()))
    return peak


def _layer_plans(job: _Training, counts: Sequence[int]) -> Iterator[LayerPlan]:
    layers = zip(job.shapes, job.block_sizes, counts, job.layer_places, strict=True)
    for number, (shape, b, count, places) in enumerate(layers):
        weight_bytes = (count * b**2 + shape[0]) * job.element_bytes
        yield LayerPlan(str(number), shape, b, count, count / places, weight_bytes)
