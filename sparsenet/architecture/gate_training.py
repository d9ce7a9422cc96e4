"""Training with gates: settings that fit a short budget, the loop, and what it leaves behind."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenet.architecture.gates import architecture_penalty, gated_layers, parameter_groups
from sparsenet.data import Dataset, Normalization

__all__ = ["Images", "TrainingRun", "TrainingSettings", "accuracy", "prepare", "train"]


@dataclass(frozen=True)
class TrainingSettings:
    """One training run.

    The defaults are the short-budget settings of docs/methods/gates.md: lambda_3 / lambda_1 = 10 is far beyond the
    paper's k < 1, so that only data keeps a gate up, and a run takes minutes instead of 300 epochs.

    Attributes:
        images: of the training set, the first of a fixed shuffle. epochs, batch: of them.
        lr: of weights, SGD with momentum 0.9, falling as a half cosine. gate_lr: of gates, constant.
        lambda_1, lambda_3: see ``architecture_penalty``; lambda_2 and lambda_4 follow by the heuristics.
        depth_reward: lambda_4, where it shall not follow.
        weight_decay: of weights.
    """

    images: int = 15_000
    epochs: float = 6
    batch: int = 64
    lr: float = 0.05
    gate_lr: float = 0.3
    lambda_1: float = 1e-4
    lambda_3: float = 1e-3
    depth_reward: float | None = None
    weight_decay: float = 0.0

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
        accuracy: on the test set, percent. loss: the last epoch's mean training loss, without the penalty.
        steps: counted at these steps: open: open units per gated layer, linear: layers whose depth gate is 1.
        seconds: of training, without evaluation.
    """

    accuracy: float = math.nan
    loss: float = math.nan
    steps: list[int] = field(default_factory=list)
    open: list[list[int]] = field(default_factory=list)
    linear: list[int] = field(default_factory=list)
    seconds: float = 0.0


def train(model: nn.Module, images: Images, settings: TrainingSettings, seed: int, after_step=None) -> TrainingRun:
    """Trains ``model`` (in place) by SGD with momentum; gates, where there are any, with their penalty.

    Args:
        model: in channels_last memory format afterwards.
        images: what to train and to test on.
        seed: of the order of images.
        after_step: called with the step's number after each optimizer step: a Compactor's ``step``, say.
    """
    x, y = images.train_x[: settings.images], images.train_y[: settings.images]
    generator = torch.Generator().manual_seed(seed)
    model.to(memory_format=torch.channels_last).train()
    gated = bool(gated_layers(model)) and any(
        p.requires_grad for g in gated_layers(model).values() for p in g.parameters()
    )
    groups = parameter_groups(model, gate_lr=settings.gate_lr) if gated else [{"params": list(model.parameters())}]
    groups = [g for g in groups if g["params"]]
    optimizer = torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, weight_decay=settings.weight_decay)
    run, per_epoch = TrainingRun(), len(x) // settings.batch
    total = round(settings.epochs * per_epoch)
    began = time.perf_counter()
    for step in range(total):
        if step % per_epoch == 0:
            order, losses = torch.randperm(len(x), generator=generator), []
        at = step % per_epoch * settings.batch
        rows = order[at : at + settings.batch]
        optimizer.param_groups[0]["lr"] = 0.5 * settings.lr * (1 + math.cos(math.pi * step / total))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x[rows]), y[rows])
        losses.append(loss.detach())
        if gated:
            loss = loss + architecture_penalty(
                model, settings.lambda_3, settings.lambda_1, lambda_4=settings.depth_reward
            )
        loss.backward()
        optimizer.step()
        if step % max(1, per_epoch // 4) == 0 or step + 1 == total:
            _note(run, model, step)
        if after_step is not None:
            after_step(optimizer, step)
    run.seconds = time.perf_counter() - began
    run.loss = torch.stack(losses).mean().item()
    run.accuracy = accuracy(model, images)
    return run


def _note(run: TrainingRun, model: nn.Module, step: int) -> None:
    layers = gated_layers(model).values()
    run.steps.append(step)
    run.open.append([layer.num_open() for layer in layers])
    run.linear.append(sum(layer.is_identity() for layer in layers))


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Share of test images that the model names right, in percent; in eval mode."""
    training = model.training
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(images.test_x.split(1000), images.test_y.split(1000), strict=True)
    )
    model.train(training)
    return 100.0 * right / len(images.test_y)
