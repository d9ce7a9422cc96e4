"""What ``sparsenet reproduce training`` compares: one recipe for sparse networks and for the dense ones instead.

Every arm is trained by the same loop, on the same examples in the same order: AdamW with a cosine learning rate, batch
128. The dense networks that somebody might take instead of a sparse one are as wide as give the same number of weights,
or the same bytes of training as :func:`sparsenet.plan` counts them, activations included.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from sparsenet.densities import CHOSEN_FROM
from sparsenet.memory import plan
from sparsenet.models import SparseMLP
from sparsenet.policies import POLICIES
from sparsenet.reproduce.growth_tasks import Task
from sparsenet.reproduce.growth_training import evaluate
from sparsenet.reproduce.training_rivals import StoppingRigL, sparselab_mlp
from sparsenet.schedules import Cosine, Cubic
from sparsenet.sparsifier import Sparsifier

__all__ = ["BATCH", "HIDDEN", "Arm", "build", "train_arm", "train_model"]

HIDDEN = (1024, 1024, 1024)
BATCH, EPOCHS, LEARNING_RATE, WEIGHT_DECAY = 128, 15, 2e-3, 1e-2
CURVE_ON = 2000  # test examples, at most, on which a curve's points are measured


@dataclass(frozen=True)
class Arm:
    """One kind of network and of training.

    Attributes:
        kind: ``sparse``; or dense: ``wide`` (of the same sizes), ``equal bytes``, ``equal weights``; or ``sparselab``,
            single weights of the same densities.
        hidden, density, block_size, distribution: of the sparse network, which also decides how wide ``equal ...`` are.
        least_blocks: the largest block sizes with so many in every row of blocks, in place of the default rule.
        policy, options: the policy by name, and its arguments; ``equal bytes`` counts what its rewires need.
        drop_fraction: at the start; if it falls (``drop_falls``), by a cosine to zero at the last rewire.
        rewires, until: how many in a training, and up to which share of its steps.
        start_density: above ``density``: falls to it by Zhu and Gupta's cubic until the last rewire.
        grown_state, grace: as for the Sparsifier.
        initialise: changes a new sparse network; it is given the generator that has drawn it.
        scored_batches: a step before a rewire is one of that many batches put together, so that growth sees them all.
        lr, epochs, label_smoothing: of the training.
    """

    kind: str = "sparse"
    hidden: tuple[int, ...] = HIDDEN
    density: float = 0.1
    block_size: int | None = None
    least_blocks: float | None = None
    distribution: str = "erdos_renyi"
    policy: str = "static"
    options: Mapping[str, Any] = field(default_factory=dict)
    drop_fraction: float = 0.3
    drop_falls: bool = True
    rewires: int = 20
    until: float = 0.75
    start_density: float | None = None
    grown_state: Mapping[str, str | float] = field(default_factory=dict)
    grace: int = 1
    scored_batches: int = 1
    initialise: Callable[[SparseMLP, torch.Generator], None] | None = None
    lr: float = LEARNING_RATE
    epochs: int = EPOCHS
    label_smoothing: float = 0.0


def sizes_of(arm: Arm, task: Task) -> list[int]:
    """Of the network of ``kind`` ``sparse`` or ``wide``."""
    return [task.features, *arm.hidden, task.outputs]


@functools.cache
def _sparse_plan(sizes: tuple[int, ...], density: float, block_size: int | None, distribution: str, policy: str):
    return plan(
        sizes, None, BATCH, "adamw", "float32", block_size, distribution, density=density, policy=policy, input_bytes=4
    )


@functools.cache
def _dense_bytes(sizes: tuple[int, ...]) -> int:
    return plan(sizes, None, BATCH, block_size=16, density=1.0, policy="static", input_bytes=4).dense_bytes


def _sparse_plan_of(arm: Arm, task: Task):
    density = arm.density if arm.start_density is None else arm.start_density
    return _sparse_plan(tuple(sizes_of(arm, task)), density, arm.block_size, arm.distribution, arm.policy)


def planned_bytes(arm: Arm, task: Task) -> int | None:
    """The predicted peak of training the network of this arm; None for another library's, or other block sizes."""
    if arm.least_blocks is not None:
        return None
    if arm.kind == "sparse":
        return _sparse_plan_of(arm, task).predicted_peak_bytes
    if arm.kind == "sparselab":
        return None
    width = _width(arm, task)
    return _dense_bytes((task.features, *[width] * len(arm.hidden), task.outputs))


def _width(arm: Arm, task: Task) -> int:
    """Of a dense network: the largest that takes no more bytes, or weights, than the sparse one."""
    if arm.kind == "wide":
        return arm.hidden[0]
    sparse = _sparse_plan_of(arm, task)
    middle = len(arm.hidden) - 1

    def weights(w: int) -> int:
        return task.features * w + middle * w * w + w * task.outputs

    def amount(w: int) -> int:
        if arm.kind == "equal weights":
            return weights(w)
        return _dense_bytes((task.features, *[w] * (middle + 1), task.outputs))

    limit = sparse.num_weights if arm.kind == "equal weights" else sparse.predicted_peak_bytes
    low, high = 1, max(arm.hidden)
    while low < high:
        w = (low + high + 1) // 2
        low, high = (w, high) if amount(w) <= limit else (low, w - 1)
    return low


def _block_size(arm: Arm, task: Task) -> int | list[int] | None:
    """As SparseMLP wants it."""
    if arm.least_blocks is None:
        return arm.block_size
    fan_in = sizes_of(arm, task)[:-1]
    return [next((b for b in CHOSEN_FROM if arm.density * n >= arm.least_blocks * b), 1) for n in fan_in]


def build(arm: Arm, task: Task, seed: int) -> nn.Sequential:
    """The network, drawn by the seed: values by the fan-in of each unit (He et al., 2015) in all of them."""
    if arm.kind == "sparse":
        density = arm.density if arm.start_density is None else arm.start_density
        generator = torch.Generator().manual_seed(seed)
        model = SparseMLP(
            sizes_of(arm, task), density, _block_size(arm, task), distribution=arm.distribution, generator=generator
        )
        if arm.initialise is not None:
            arm.initialise(model, generator)
        return model
    if arm.kind == "sparselab":
        layers = _sparse_plan_of(arm, task).layers
        return sparselab_mlp(sizes_of(arm, task), [layer.density for layer in layers], seed)
    torch.manual_seed(seed)
    sizes = [task.features, *[_width(arm, task)] * len(arm.hidden), task.outputs]
    layers: list[nn.Module] = []
    for i, (inp, out) in enumerate(pairwise(sizes)):
        layers.append(nn.Linear(inp, out))
        if i + 2 < len(sizes):
            nn.init.kaiming_uniform_(layers[-1].weight, nonlinearity="relu")
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def _rewirer(arm: Arm, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int):
    """What is stepped after the optimizer, if anything."""
    end = max(1, round(arm.until * steps))
    if arm.kind == "sparselab" and arm.policy == "rigl":
        return StoppingRigL(model, arm.density, arm.drop_fraction, max(1, end // arm.rewires), end, seed)
    if arm.kind != "sparse" or arm.policy == "static":
        return None
    falling = None if arm.start_density is None else Cubic(arm.start_density, arm.density, steps=end)
    every = max(1, end // arm.rewires)
    kind = POLICIES[arm.policy]
    drop = Cosine(arm.drop_fraction, 0.0, steps=end) if arm.drop_falls else arm.drop_fraction
    policy = kind(**({"drop_fraction": drop} if kind.exchanges else {}), **arm.options)
    return Sparsifier(
        model,
        optimizer,
        policy,
        falling,
        every=every,
        end=end,
        seed=seed,
        grown_state=arm.grown_state or None,
        grace=arm.grace,
    )


def train_arm(arm: Arm, task: Task, seed: int, scale: float = 1.0) -> dict:
    """Builds and trains a network: the numbers of :func:`train_model`, ``bytes`` planned, ``weights``, ``width``."""
    model = build(arm, task, seed)
    return {
        **train_model(model, arm, task, seed, scale),
        "bytes": planned_bytes(arm, task),
        "weights": sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias")),
        "width": arm.hidden[0] if arm.kind in ("sparse", "sparselab") else _width(arm, task),
    }


def train_model(model: nn.Module, arm: Arm, task: Task, seed: int, scale: float = 1.0) -> dict:
    """Trains ``model`` as ``arm`` says.

    Returns:
        ``score`` (accuracy in percent, or R² times 100) and ``loss`` on the test set, ``train_loss``, ``seconds`` of
        processor time spent on training, ``curve``: (seconds, score on 2,000 examples) after every epoch, ``steps``.
    """
    epochs = max(1, round(arm.epochs * min(1.0, 4 * scale)))
    x, y = task.train
    batch = min(BATCH, len(x))
    per_epoch = len(x) // batch
    steps = epochs * per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=arm.lr, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rewirer = _rewirer(arm, model, optimizer, steps, seed)
    generator = torch.Generator().manual_seed(seed)
    looked_at = replace(task, test=tuple(t[:CURVE_ON] for t in task.test))
    seconds, curve = 0.0, []
    for _ in range(epochs):
        started = time.process_time()
        for rows in torch.randperm(len(x), generator=generator)[: per_epoch * batch].split(batch):
            if rewirer is not None and arm.scored_batches > 1 and (rewirer.steps + 1) % rewirer.every == 0:
                others = torch.randint(len(x), (batch * (arm.scored_batches - 1),), generator=generator)
                rows = torch.cat([rows, others])
            output = model(x[rows])
            if task.classes:
                loss = nn.functional.cross_entropy(output, y[rows], label_smoothing=arm.label_smoothing)
            else:
                loss = task.loss(output, y[rows])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if rewirer is not None:
                rewirer.step()
            schedule.step()
        seconds += time.process_time() - started
        curve.append((round(seconds, 3), evaluate(model, looked_at)[0]))
    score, loss = evaluate(model, task)
    return {
        "score": score,
        "loss": loss,
        "train_loss": evaluate(model, task, "train")[1],
        "seconds": seconds,
        "curve": curve,
        "steps": steps,
    }
