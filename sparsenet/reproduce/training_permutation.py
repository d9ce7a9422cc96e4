"""What gathering hidden units is worth: networks cut to their heaviest blocks in the order they have, and gathered.

A network is trained for a while, dense or as single weights under RigL, then cut to blocks of 16 and trained on, with
optimizer and moments as they are. Everything but the order of the hidden units is the same: the number of blocks, the
examples, the steps. A random pattern is as good in any order, so the order matters only where blocks are chosen by
weights that are there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

from sparsenet.compaction import gather_units, reblock_
from sparsenet.densities import block_places, distribute
from sparsenet.models import SparseMLP
from sparsenet.pattern import BlockPattern
from sparsenet.policies import RigL
from sparsenet.reproduce.growth_tasks import Task
from sparsenet.reproduce.growth_training import evaluate
from sparsenet.reproduce.training_tasks import TASKS
from sparsenet.schedules import Cosine
from sparsenet.sparsifier import Sparsifier

__all__ = ["GATHERED", "GIVEN", "SCRATCH", "SINGLE", "compare_orders", "whole_task"]

HIDDEN, BLOCK_SIZE = (512, 512, 512), 16
IN_A_ROW = (1.5, 1.0, 0.6, 0.3)  # blocks that a row of blocks of a hidden layer keeps on average
BEFORE, AFTER = 2, 4  # epochs before and after the cut
BATCH, LEARNING_RATE, WEIGHT_DECAY, REWIRES = 128, 1e-3, 1e-2, 15
GRADIENT_ON = 4096  # training examples, at most, whose gradient is what taylor takes
GIVEN, GATHERED, SINGLE, SCRATCH = "given order", "gathered", "single weights", "blocks from the start"

Trained = tuple[nn.Module, torch.optim.Optimizer]


def whole_task(scale: float = 1.0) -> Task:
    """Fashion-MNIST as published: 60,000 examples to train on, 10,000 to test on; ``scale`` below 1 takes fewer.

    Raises Unavailable where it is not on this machine.
    """
    make, _ = TASKS["Fashion-MNIST"]
    x, y, classes = make()
    count = round(scale * 60_000)
    x = (x - x[:count].mean()) / x[:count].std()
    test = x[60_000:], y[60_000:]
    return Task("Fashion-MNIST", classes, (x[:count], y[:count]), test, test)


def compare_orders(task: Task, seed: int) -> list[dict]:
    """Rows of one seed: every start, every number of blocks, every way to choose them, with and without rewiring.

    Returns:
        Per row ``start``, ``in_a_row``, ``density``, ``importance`` and ``blocks`` (how they were chosen), ``rewired``
        (whether RigL goes on after the cut), ``kept`` (share of the importance that the cut keeps), ``cut`` and
        ``score`` (accuracy in percent right after the cut and at the end), ``weights`` (stored), ``seconds`` (of
        gathering). Networks that are sparse from the start, and references of single weights, lack what they have not.
    """
    sizes = (task.features, *HIDDEN, task.outputs)
    dense = _trained(_dense(sizes, seed), task, seed)
    rows = []
    for in_a_row in IN_A_ROW:
        density = in_a_row * BLOCK_SIZE / HIDDEN[0]
        made = {"dense": dense, "single weights": _trained(_sparse(sizes, density, 1, seed), task, seed, rewired=True)}
        where = {"in_a_row": in_a_row, "density": density}
        for start, trained in made.items():
            for importance in ("magnitude", "taylor"):
                for blocks in (GIVEN, GATHERED):
                    model, optimizer = copy.deepcopy(trained)
                    found = _cut(model, optimizer, task, density, importance, gathered=blocks == GATHERED)
                    found["cut"] = evaluate(model, task)[0]
                    for rewired in (False, True):
                        row = {"start": start, **where, "importance": importance, "blocks": blocks, "rewired": rewired}
                        end = _tuned(*copy.deepcopy((model, optimizer)), task, seed, rewired)
                        rows.append({**row, **found, **end})
            model, optimizer = _cut_to_single(*copy.deepcopy(trained), density)
            row = {"start": start, **where, "blocks": SINGLE, "rewired": False}
            rows.append({**row, **_tuned(model, optimizer, task, seed, rewired=False)})
        for rewired in (False, True):
            model, optimizer = _trained(_sparse(sizes, density, BLOCK_SIZE, seed), task, seed, rewired)
            row = {"start": "blocks", **where, "blocks": SCRATCH, "rewired": rewired}
            rows.append({**row, **_tuned(model, optimizer, task, seed, rewired)})
    return [{"task": task.name, "seed": seed, "block_size": BLOCK_SIZE, **row} for row in rows]


# --- networks --------------------------------------------------------------------------------------------------------


def _dense(sizes: tuple[int, ...], seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inp, out in pairwise(sizes):
        layers += [nn.Linear(inp, out), nn.ReLU()]
        nn.init.kaiming_uniform_(layers[-2].weight, nonlinearity="relu")
    return nn.Sequential(*layers[:-1])


def _sparse(sizes: tuple[int, ...], density: float, block_size: int, seed: int) -> SparseMLP:
    return SparseMLP(sizes, density, block_size, generator=torch.Generator().manual_seed(seed))


def _cut(model: nn.Module, optimizer, task: Task, density: float, importance: str, gathered: bool) -> dict:
    """Cuts ``model`` to its most important blocks; the share that they ``kept``, and the ``seconds`` of gathering."""
    if importance == "taylor":
        x, y = (t[:GRADIENT_ON] for t in task.train)
        optimizer.zero_grad(set_to_none=True)
        task.loss(model(x), y).backward()
    settings = {"density": density, "block_size": BLOCK_SIZE, "distribution": "erdos_renyi", "importance": importance}
    report = gather_units(model, optimizer, **settings, sweeps=6 if gathered else 0)
    reblock_(model, report.patterns, optimizer)
    return {"kept": report.after, "seconds": report.seconds}


def _cut_to_single(model: nn.Module, optimizer: torch.optim.Optimizer, density: float) -> Trained:
    """A dense network cut to its heaviest weights, as many in each layer as in blocks; a sparse one stays."""
    if not isinstance(model, SparseMLP):
        linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
        shapes = [tuple(m.weight.shape) for m in linears.values()]
        counts = distribute(shapes, density, "erdos_renyi", block_size=BLOCK_SIZE)
        shares = [count / block_places(shape, BLOCK_SIZE) for count, shape in zip(counts, shapes, strict=True)]
        patterns = {
            name: BlockPattern.from_dense(m.weight, share, 1)
            for (name, m), share in zip(linears.items(), shares, strict=True)
        }
        reblock_(model, patterns, optimizer)
    return model, optimizer


# --- training --------------------------------------------------------------------------------------------------------


def _trained(model: nn.Module, task: Task, seed: int, rewired: bool = False) -> Trained:
    """The epochs before the cut, at a learning rate that stays."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    _train(model, optimizer, task, BEFORE, seed, rewired, lambda done: LEARNING_RATE)
    return model, optimizer


def _tuned(model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, seed: int, rewired: bool) -> dict:
    """The epochs after the cut, at a learning rate that falls to zero."""
    falling = Cosine(LEARNING_RATE, 0.0, steps=1000)
    _train(model, optimizer, task, AFTER, 1000 + seed, rewired, lambda done: falling(round(1000 * done)))
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("bias"))
    return {"score": evaluate(model, task)[0], "weights": weights}


def _train(
    model: nn.Module, optimizer, task: Task, epochs: int, seed: int, rewired: bool, rate: Callable[[float], float]
) -> None:
    """``rate`` gives the learning rate by the share of the steps that is done."""
    x, y = task.train
    batch = min(BATCH, len(x))
    steps = epochs * (len(x) // batch)
    end = max(1, round(0.75 * steps))
    rewirer = None
    if rewired:
        policy, every = RigL(Cosine(0.3, 0.0, steps=end)), max(1, end // REWIRES)
        rewirer = Sparsifier(model, optimizer, policy, every=every, end=end, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        if step % (len(x) // batch) == 0:
            order = torch.randperm(len(x), generator=generator).split(batch)
        rows = order[step % (len(x) // batch)]
        for group in optimizer.param_groups:
            group["lr"] = rate(step / steps)
        loss = task.loss(model(x[rows]), y[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if rewirer is not None:
            rewirer.step()
