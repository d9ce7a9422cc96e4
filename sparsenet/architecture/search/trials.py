"""One trial: train an architecture with fixed hyper-parameters and report what it reached.

Hyper-parameters that are not the architecture's stay at these defaults for a whole search, so that what differs between
trials is the architecture alone.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from sparsenet import data as datasets
from sparsenet.architecture.search.space import Architecture, DensityMLP, linear_of, weights_of
from sparsenet.data.examples import Examples
from sparsenet.functional.blocks import dense_blocks
from sparsenet.layers import SparseLinear
from sparsenet.pattern import carried_from

__all__ = ["TrialConfig", "TrialData", "TrialResult", "effective_gradient_flow", "inherit_", "train_trial"]


@dataclass(frozen=True)
class TrialConfig:
    """What every trial shares.

    Attributes:
        epochs, batch_size, learning_rate, weight_decay: AdamW with a cosine to 0 after a warm-up of 5 % of the steps.
        schedule: ``cosine`` or ``constant``.
        norm, residual, block_size: see DensityMLP.
        train_fraction: share of the training examples that is used.
        init: ``he`` (by active fan-in), or ``small``: nn.Linear's default variance, a sixth of it before a ReLU.
        seed: of weights and batches, combined with the pattern seed.
        gradient_flow_samples: how many steps, evenly spread, log the effective gradient flow.

    Raises ValueError for a number out of range.

    Example:
        >>> from sparsenet.architecture.search import TrialConfig
        >>> TrialConfig(epochs=3, train_fraction=0.2).batch_size
        128
    """

    epochs: int = 15
    batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    schedule: str = "cosine"
    norm: str = "batch"
    residual: bool = False
    block_size: int = 16
    train_fraction: float = 1.0
    init: str = "he"
    seed: int = 0
    gradient_flow_samples: int = 11

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(
                f"TrialConfig: epochs and batch_size must be at least 1, got {self.epochs}, {self.batch_size}"
            )
        if not 0 < self.train_fraction <= 1:
            raise ValueError(f"TrialConfig: train_fraction must lie in (0, 1], got {self.train_fraction!r}")
        if self.init not in ("he", "small"):
            raise ValueError(f"TrialConfig: init must be he or small, got {self.init!r}")
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"TrialConfig: schedule must be cosine or constant, got {self.schedule!r}")


@dataclass(frozen=True, eq=False)
class TrialData:
    """Examples to train on and ``held_out`` ones to judge by; labels are checked.

    ``validation`` of :meth:`from_dataset` holds out a stratified share of the training set; without it (0) the test set
    is what networks are judged by, which is right for final numbers and wrong for a search.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.search import TrialData
        >>> x = torch.randn(100, 8)
        >>> data = TrialData.from_arrays(x, (x[:, 0] > 0).long())
        >>> data.num_classes
        2
    """

    train: Examples
    held_out: Examples
    num_classes: int
    normalization: datasets.Normalization = field(repr=False)

    @classmethod
    def from_dataset(cls, dataset: datasets.Dataset, validation: float = 0.1) -> TrialData:
        """The training and evaluation part of ``dataset``. ValueError for labels nothing can be learned from."""
        datasets.validate_labels(dataset.train_y, dataset.num_classes, name=f"labels of {dataset.name}")
        normalization = datasets.Normalization.from_data(dataset.train_x)
        x, y = dataset.train_x, dataset.train_y
        if not validation:
            test = Examples(dataset.test_x, dataset.test_y)
            return cls(Examples(x, y), test, dataset.num_classes, normalization)
        kept, held = datasets.split(y, validation)
        return cls(Examples(x[kept], y[kept]), Examples(x[held], y[held]), dataset.num_classes, normalization)

    @classmethod
    def from_arrays(cls, x: Tensor, y: Tensor, validation: float = 0.2) -> TrialData:
        """From ``x`` [n, features...] and labels ``y`` [n]; refuses NaN labels, one class, wrong types."""
        datasets.validate_labels(y, name="labels")
        kept, held = datasets.split(y, validation)
        normalization = datasets.Normalization.from_data(x)
        return cls(Examples(x[kept], y[kept]), Examples(x[held], y[held]), int(y.max()) + 1, normalization)

    @property
    def features(self) -> int:
        """Length of one flattened example."""
        return self.train.x[0].numel()

    def judge(self, model: nn.Module, batch_size: int = 2000) -> datasets.Evaluation:
        """How well ``model`` does on the examples held out."""
        return datasets.evaluate(model, self.held_out.batches(batch_size, self.normalization))


@dataclass(frozen=True)
class TrialResult:
    """What one trial reached. Losses are mean cross-entropies in nats, accuracies shares in [0, 1].

    ``curve``: (train loss, evaluation loss, evaluation accuracy) after each epoch. ``gradient_flow``: mean effective
    gradient flow (p = 2) over the logged steps.
    """

    loss: float
    accuracy: float
    active_weights: int
    live_widths: list[int]
    seconds: float
    curve: list[tuple[float, float, float]]
    gradient_flow: float


def effective_gradient_flow(model: nn.Module, p: float = 2.0, normalise: str | None = None) -> float:
    """``EGF_p = (1 / L) sum_l ||dC/dtheta^l * m^l||_p`` over the weight layers that have a gradient.

    ``normalise="active"`` divides each layer's norm by its number of active weights (Tessera, Hooker, Rosman 2021).
    Only active weights count: masked elements have no gradient here. ValueError for another ``normalise``, and when no
    layer has a gradient.
    """
    if normalise not in (None, "active"):
        raise ValueError(f"effective_gradient_flow: normalise must be None or active, got {normalise!r}")
    norms = []
    for layer in model.modules():
        if not isinstance(layer, (SparseLinear, nn.Linear)):
            continue
        weight = layer.values if isinstance(layer, SparseLinear) else layer.weight
        if weight.grad is None:
            continue
        active = layer.num_active if isinstance(layer, SparseLinear) else weight.numel()
        gradient = weight.grad
        if isinstance(layer, SparseLinear) and layer.element_mask is not None:
            gradient = gradient * layer.element_mask
        norm = float(gradient.norm(p))
        norms.append(norm / active if normalise == "active" else norm)
    if not norms:
        raise ValueError("effective_gradient_flow: model must have gradients, got none; call backward first")
    return sum(norms) / len(norms)


def calibrate_(model: nn.Module, data: TrialData, rows: Tensor, most: int = 10000, batch_size: int = 1000) -> None:
    """Sets BatchNorm's means and variances to those over ``most`` training examples, drawn from ``rows`` (int64 [n]).

    The running averages of training remember ten batches or so. The variance of a neuron whose few inputs are nearly
    always zero cannot be told from these, and some layers on the logits are off by orders of magnitude; a pruner would
    act on that. Precise statistics mend it (Wu and Johnson 2021). Training itself does not read them.
    """
    chosen = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]]
    x, y, size, normalization = data.train.x, data.train.y, min(batch_size, len(chosen)), data.normalization
    update_bn(datasets.batches(x, y, size, indices=chosen, normalization=normalization, drop_last=True), model)


def learning_rate_at(config: TrialConfig, step: int, steps: int) -> float:
    """Multiplier of the learning rate: linear warm-up, then a cosine to 0 (or constant)."""
    if config.schedule == "constant":
        return 1.0
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def train_trial(
    architecture: Architecture,
    data: TrialData,
    config: TrialConfig,
    report: Callable[[int, float, float], None] | None = None,
    donor: DensityMLP | None = None,
    model_out: list[DensityMLP] | None = None,
) -> TrialResult:
    """Trains ``architecture`` from scratch (or from ``donor``'s weights) and judges it.

    Args:
        architecture: what to train.
        data: examples.
        config: fixed hyper-parameters.
        report: called after every epoch with (epoch, evaluation loss, accuracy); what it raises ends the trial.
        donor: a trained network whose weights are inherited where both have them.
        model_out: the trained model is appended to it.
    """
    started = time.perf_counter()
    model = architecture.build(
        block_size=config.block_size, norm=config.norm, residual=config.residual, seed=config.seed
    )
    if config.init == "small":
        with torch.no_grad():
            for layer, (_, _, activation) in zip(model.linears, architecture.layers, strict=True):
                if activation != "none":
                    weights_of(layer).div_(math.sqrt(6.0))
    if donor is not None:
        inherit_(model, donor)
    shuffle = torch.Generator().manual_seed(config.seed * 31 + architecture.pattern_seed)
    kept = torch.arange(len(data.train.y))
    if config.train_fraction < 1:
        kept, _ = datasets.split(data.train.y, 1 - config.train_fraction, seed=config.seed)
    steps = -(-len(kept) // config.batch_size) * config.epochs
    optimizer = _optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_at(config, step, steps))
    log_every = max(1, steps // max(1, config.gradient_flow_samples))
    flows: list[float] = []
    curve: list[tuple[float, float, float]] = []
    for epoch in range(config.epochs):
        train_loss = _epoch(model, data, config, optimizer, schedule, shuffle, kept, log_every, flows)
        calibrate_(model, data, kept)
        found = data.judge(model)
        curve.append((train_loss, found.loss, found.accuracy))
        if report is not None:
            report(epoch + 1, found.loss, found.accuracy)
    if model_out is not None:
        model_out.append(model)
    flow = sum(flows) / len(flows) if flows else float("nan")
    seconds = time.perf_counter() - started
    active, widths = model.active_weights(), model.live_widths()
    return TrialResult(curve[-1][1], curve[-1][2], active, widths, seconds, curve, flow)


def _optimizer(model: DensityMLP, config: TrialConfig) -> torch.optim.Optimizer:
    """AdamW that decays weights and leaves biases and norms alone."""
    decayed = [weights_of(layer) for layer in model.linears]
    rest = [p for p in model.parameters() if all(p is not d for d in decayed)]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, config.learning_rate, weight_decay=config.weight_decay, fused=True)


def _epoch(
    model: DensityMLP,
    data: TrialData,
    config: TrialConfig,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    shuffle: torch.Generator,
    kept: Tensor,
    log_every: int,
    flows: list[float],
) -> float:
    """One pass over the rows ``kept``; appends to ``flows``; returns the mean training loss."""
    total, count = 0.0, 0
    for x, y in datasets.batches(
        data.train.x,
        data.train.y,
        config.batch_size,
        shuffle=True,
        generator=shuffle,
        indices=kept,
        normalization=data.normalization,
    ):
        if len(y) == 1 and config.norm == "batch":
            continue  # BatchNorm has no variance of one example
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if config.gradient_flow_samples and schedule.last_epoch % log_every == 0:
            flows.append(effective_gradient_flow(model))
        optimizer.step()
        schedule.step()
        total, count = total + float(loss.detach()), count + 1
    return total / max(1, count)


@torch.no_grad()
def inherit_(model: DensityMLP, donor: DensityMLP) -> int:
    """Copies weights, biases and norms from ``donor`` where both have them; returns how many weights were copied.

    The first layers are matched to the first, the last to the last; a layer of another shape is left as drawn. A weight
    active in both takes the donor's value, scaled so that the layer keeps its variance when it has another fan-in.
    """
    ours, theirs = list(model.linears), list(donor.linears)
    hidden = min(len(ours), len(theirs)) - 1
    pairs = [*zip(range(hidden), range(hidden), strict=True), (len(ours) - 1, len(theirs) - 1)]
    copied = 0
    for a, b in pairs:
        new, old = linear_of(ours[a]), linear_of(theirs[b])
        if (new.out_features, new.in_features) != (old.out_features, old.in_features):
            continue
        copied += _inherit_weights(new, old)
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
        if len(model.after[a]) and len(donor.after[b]):
            model.after[a].load_state_dict(donor.after[b].state_dict())
    return copied


def _inherit_weights(new: nn.Module, old: nn.Module) -> int:
    """Copies the values active in both layers; returns how many."""
    both_sparse = isinstance(new, SparseLinear) and isinstance(old, SparseLinear)
    if both_sparse and new.block_size == old.block_size and new.element_mask is None and old.element_mask is None:
        carried = carried_from(old.pattern, new.pattern)
        shared = carried >= 0
        gain = (len(old.values) / max(1, len(new.values))) ** 0.5
        new.values[shared] = old.values[carried[shared]] * gain
        return int(shared.sum()) * new.block_size**2
    dense = old.weight_dense() if isinstance(old, SparseLinear) else old.weight
    if not isinstance(new, SparseLinear):
        known = dense != 0
        new.weight.copy_(torch.where(known, dense, new.weight))
        return int(known.sum())
    taken = dense_blocks(dense, new.pattern)
    known = taken != 0 if new.element_mask is None else (taken != 0) & new.element_mask
    new.values.copy_(torch.where(known, taken, new.values))
    return int(known.sum())
