"""Training with gates: settings that fit a short budget, the loop, and what it leaves behind."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenet.architecture.compactor import Compactor
from sparsenet.architecture.gates import architecture_penalty, gate_parameters, gated_layers, parameter_groups
from sparsenet.compaction.history import Interval
from sparsenet.data.datasets import Dataset, Normalization
from sparsenet.schedules import Linear

__all__ = ["Images", "TrainingRun", "TrainingSettings", "evaluate", "prepare", "train"]


@dataclass(frozen=True)
class TrainingSettings:
    """One training run.

    The defaults are the short-budget settings of docs/methods/gates.md: lambda_3 / lambda_1 = 10 is far beyond the
    paper's k < 1, so that only data keeps a gate up, and a run takes minutes instead of 300 epochs.

    Attributes:
        images: of the training set, the first of a fixed shuffle. epochs, batch: of them.
        lr: of weights, SGD with momentum 0.9, falling as a half cosine. gate_lr: of gates, constant unless ``settle``.
        lambda_1, lambda_3: see ``architecture_penalty``; lambda_2 and lambda_4 follow by the heuristics.
        depth_reward: lambda_4, where it shall not follow.
        warmup: share of the training in which all of them and gate_lr rise from 0: weights learn before gates do.
        settle: whether gate_lr falls as lr does, so that the architecture is found before the weights come to rest.
        weight_decay: of weights.
        compact_every: steps between checks of a Compactor; 0: none. patience: of that Compactor.
    """

    images: int = 15_000
    epochs: float = 6
    batch: int = 64
    lr: float = 0.05
    gate_lr: float = 0.3
    lambda_1: float = 1e-4
    lambda_3: float = 1e-3
    depth_reward: float | None = None
    warmup: float = 0.0
    settle: bool = False
    weight_decay: float = 0.0
    compact_every: int = 0
    patience: int = 2

    def with_(self, **changes) -> TrainingSettings:
        """A copy with some of them changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Images:
    """A data set ready to train on: float32 [n, 1, h, w], normalised by the training set's mean and deviation."""

    name: str
    train_x: Tensor = field(repr=False)
    train_y: Tensor = field(repr=False)
    test_x: Tensor = field(repr=False)
    test_y: Tensor = field(repr=False)
    num_classes: int = 10

    def of_classes(self, count: int) -> Images:
        """Only the first ``count`` classes."""
        train, test = self.train_y < count, self.test_y < count
        return Images(self.name, self.train_x[train], self.train_y[train], self.test_x[test], self.test_y[test], count)

    def held_out(self, train: int, test: int) -> Images:
        """The first ``train`` training images to train on and the next ``test`` of them to judge by."""
        end = train + test
        x, y = self.train_x, self.train_y
        return Images(self.name, x[:train], y[:train], x[train:end], y[train:end], self.num_classes)


def prepare(data: Dataset, limit: int | None = None) -> Images:
    """``data`` as :class:`Images`, at most ``limit`` training images: the first of a fixed shuffle."""
    order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))[:limit]
    norm = Normalization.from_data(data.train_x, per="dataset")

    def ready(x: Tensor) -> Tensor:
        x = x if x.dim() == 4 else x.unsqueeze(1)
        return ((x.float() - norm.mean) / norm.std).contiguous(memory_format=torch.channels_last)

    return Images(
        data.name, ready(data.train_x[order]), data.train_y[order], ready(data.test_x), data.test_y, data.num_classes
    )


@dataclass
class TrainingRun:
    """What a run left behind.

    Attributes:
        accuracy: on the test set, percent. test_loss: there, mean, nats.
        loss: the last epoch's mean training loss, without the penalty.
        steps: counted at these steps: open: open units per gated layer, linear: layers whose depth gate is 1.
        intervals: of the Compactor, if there was one.
        seconds: of training, without evaluation; cpu_seconds: of this process in that time.
    """

    accuracy: float = math.nan
    test_loss: float = math.nan
    loss: float = math.nan
    steps: list[int] = field(default_factory=list)
    open: list[list[int]] = field(default_factory=list)
    linear: list[int] = field(default_factory=list)
    intervals: list[Interval] = field(default_factory=list)
    seconds: float = 0.0
    cpu_seconds: float = 0.0


def train(model: nn.Module, images: Images, settings: TrainingSettings, seed: int) -> TrainingRun:
    """Trains ``model`` (in place) by SGD with momentum; gates, where there are any, with their penalty.

    Args:
        model: in channels_last memory format afterwards; smaller where ``settings`` asks for compaction.
        images: what to train and to test on.
        seed: of the order of images.

    Raises RuntimeError when the loss is no longer finite.
    """
    x, y = images.train_x[: settings.images], images.train_y[: settings.images]
    generator = torch.Generator().manual_seed(seed)
    model.to(memory_format=torch.channels_last).train()
    optimizer = _optimizer(model, settings)
    compactor = None
    if settings.compact_every:
        compactor = Compactor(model, optimizer, settings.compact_every, patience=settings.patience)
    run, per_epoch = TrainingRun(), len(x) // settings.batch
    total = round(settings.epochs * per_epoch)
    penalty = _penalty(settings, total)
    began, cpu = time.perf_counter(), time.process_time()
    for step in range(total):
        if step % per_epoch == 0:
            order, losses = torch.randperm(len(x), generator=generator), []
        at = step % per_epoch * settings.batch
        rows = order[at : at + settings.batch]
        _set_rates(optimizer, settings, step / total)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        losses.append(loss.detach())
        (loss + penalty(model, step)).backward()
        optimizer.step()
        if compactor is not None:
            compactor.step()
        if step % max(1, per_epoch // 4) == 0 or step + 1 == total:
            if not math.isfinite(losses[-1]):
                raise RuntimeError(f"train: the loss must be finite, got {float(losses[-1])} at step {step}")
            _note(run, model, step)
    run.seconds, run.cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    run.intervals = compactor.intervals if compactor is not None else []
    run.loss = torch.stack(losses).mean().item()
    run.accuracy, run.test_loss = evaluate(model, images)
    return run


def _learning_gates(model: nn.Module) -> bool:
    return next(gate_parameters(model), None) is not None


def _optimizer(model: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    if _learning_gates(model):
        groups = parameter_groups(model, gate_lr=settings.gate_lr)
    else:
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay)


def _set_rates(optimizer: torch.optim.Optimizer, settings: TrainingSettings, done: float) -> None:
    weights, *gates = optimizer.param_groups
    falling = 0.5 * (1 + math.cos(math.pi * done))
    weights["lr"] = settings.lr * falling
    for group in gates:
        rising = min(1.0, done / settings.warmup) if settings.warmup else 1.0
        group["lr"] = settings.gate_lr * rising * (falling if settings.settle else 1.0)


def _penalty(settings: TrainingSettings, total: int) -> Callable[[nn.Module, int], Tensor | float]:
    """(model, step) -> what the gates cost; nothing once no gate learns."""
    rise = max(1, round(settings.warmup * total))

    def strength(full: float | None):
        return None if full is None else Linear(0.0 if settings.warmup else full, full, rise)

    three, one, four = (strength(v) for v in (settings.lambda_3, settings.lambda_1, settings.depth_reward))

    def penalty(model: nn.Module, step: int) -> Tensor | float:
        if not _learning_gates(model):
            return 0.0
        return architecture_penalty(model, three, one, lambda_4=four, step=step)

    return penalty


def _note(run: TrainingRun, model: nn.Module, step: int) -> None:
    layers = gated_layers(model).values()
    run.steps.append(step)
    run.open.append([layer.num_open() for layer in layers])
    run.linear.append(sum(layer.is_identity() for layer in layers))


@torch.no_grad()
def evaluate(model: nn.Module, images: Images) -> tuple[float, float]:
    """Share of test images that the model names right, in percent, and the mean cross-entropy; in eval mode."""
    training = model.training
    model.eval()
    right, loss = 0, 0.0
    for x, y in zip(images.test_x.split(1000), images.test_y.split(1000), strict=True):
        logits = model(x)
        right += int((logits.argmax(1) == y).sum())
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
    model.train(training)
    return 100.0 * right / len(images.test_y), loss / len(images.test_y)
