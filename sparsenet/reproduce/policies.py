"""``sparsenet reproduce policies``: every policy in one small experiment, and what a rewire costs.

One network, one data set, one recipe, the same number of weights at the end: every policy beside the static pattern and
SET; policies on single weights inside stored blocks; growth by candidates beside growth by all places; time and memory
of rewiring. Every training is a cell that is kept as soon as it is done, every part a file ``<out>/<part>.json``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsenet import policies as p
from sparsenet.densities import distribute
from sparsenet.layers import SparseLinear
from sparsenet.models import SparseMLP
from sparsenet.pattern import BlockPattern
from sparsenet.policies.policy import Schedule
from sparsenet.reproduce import parts as reproduce_parts
from sparsenet.reproduce import policies_tables
from sparsenet.reproduce.growth_cells import Growth
from sparsenet.reproduce.growth_tasks import Task
from sparsenet.reproduce.growth_training import evaluate
from sparsenet.reproduce.policies_cost import costs
from sparsenet.schedules import Cosine
from sparsenet.sparsifier import Sparsifier
from sparsenet.training.initial import prune_at_initialization

__all__ = ["ARMS", "PARTS", "Recipe", "add_arguments", "run"]

SIZES, BLOCK, DENSITY = (784, 300, 100, 10), 4, 0.05
EPOCHS, BATCH, LR, DECAY = 8, 128, 1e-3, 0.01
REWIRES, UNTIL, DROP = 30, 0.75, 0.3
START = 3  # times the final density, where the density falls


@dataclass(frozen=True)
class Recipe:
    """One arm.

    Attributes:
        policy: made from the drop fraction; None: nothing is rewired.
        start: times the final density at the beginning.
        at_start: a policy that prunes from ``start`` before the first step, from the first images.
        block_size, stored, elements: blocks, the share of them that is stored, and the element mask inside.
        by_elements: whether elements are rewired.
        distribution: of the Sparsifier.
    """

    policy: Callable[[Schedule], p.Policy] | None
    start: float = 1
    at_start: Callable[[list], p.Policy] | None = None
    block_size: int = BLOCK
    stored: float = DENSITY
    elements: float | str | None = None
    by_elements: bool = False
    distribution: str | None = None


def _falling(kind: type[p.Policy]) -> Recipe:
    return Recipe(lambda drop: kind(), start=START)


def _at_start(make: Callable[[list], p.Policy]) -> Recipe:
    return Recipe(None, start=START, at_start=make)


_CE = nn.functional.cross_entropy
ARMS: dict[str, dict[str, Recipe]] = {
    "policies": {
        "static": Recipe(None),
        "random": Recipe(p.Random),
        "SET": Recipe(p.SET),
        "RigL": Recipe(p.RigL),
        "SNFS": Recipe(p.SNFS),
        "MEST": Recipe(p.MEST),
        "Top-KAST, half awake": Recipe(p.TopKAST),
        "Top-KAST, twice stored, half awake": Recipe(p.TopKAST, start=2),
        "Taylor": Recipe(p.Taylor),
        "OBD": Recipe(p.OBD),
        "Fisher": Recipe(p.Fisher),
        "WoodFisher": Recipe(p.WoodFisher),
        "Cascade": Recipe(p.Cascade),
        "drop MEST, grow RigL": Recipe(lambda drop: p.Policy(drop, drop=p.MEST(), grow=p.RigL())),
        "drop Fisher, grow SET": Recipe(lambda drop: p.Policy(drop, drop=p.Fisher(), grow=p.SET())),
        "GMP": _falling(p.GMP),
        "GMP, global": Recipe(lambda drop: p.GMP(), start=START, distribution="global"),
        "Movement": _falling(p.Movement),
        "GraNet": Recipe(p.GraNet, start=START),
        "GraNet, global": Recipe(p.GraNet, start=START, distribution="global"),
        "AC/DC": _falling(p.ACDC),
        "SNIP at the start": _at_start(lambda batches: p.SNIP(batches, _CE)),
        "GraSP at the start": _at_start(lambda batches: p.GraSP(batches, _CE)),
        "SynFlow at the start": _at_start(lambda batches: p.SynFlow(batches[0][0][:1])),
        "SNIP at the start, then RigL": Recipe(p.RigL, start=START, at_start=lambda batches: p.SNIP(batches, _CE)),
    },
    "elements": {
        "blocks of 16, static": Recipe(None, block_size=16),
        "blocks of 16, RigL": Recipe(p.RigL, block_size=16),
        "elements in a quarter of the blocks, static": Recipe(None, block_size=16, stored=0.25, elements=0.2),
        "elements, SET": Recipe(p.SET, block_size=16, stored=0.25, elements=0.2, by_elements=True),
        "elements, RigL": Recipe(p.RigL, block_size=16, stored=0.25, elements=0.2, by_elements=True),
        "elements, GMP": Recipe(lambda drop: p.GMP(), START, None, 16, 0.25, 0.2, True),
        "elements, GraNet": Recipe(p.GraNet, START, None, 16, 0.25, 0.2, True),
        "their blocks, RigL": Recipe(p.RigL, block_size=16, stored=0.25, elements=0.2),
        "single weights, RigL": Recipe(p.RigL, block_size=1),
        "2:4 in a tenth of the blocks, static": Recipe(None, block_size=16, stored=0.1, elements="2:4"),
        "2:4, elements by RigL": Recipe(p.RigL, block_size=16, stored=0.1, elements="2:4", by_elements=True),
        "2:4, blocks by RigL": Recipe(p.RigL, block_size=16, stored=0.1, elements="2:4"),
        "2:4, all blocks, static": Recipe(None, block_size=16, stored=1.0, elements="2:4"),
        "2:4, all blocks, RigL": Recipe(p.RigL, block_size=16, stored=1.0, elements="2:4", by_elements=True),
    },
    "candidates": {
        name: Recipe(make, block_size=1, stored=density)
        for density in (0.05, 0.01)
        for name, make in {
            f"{density:.0%}, all places, all rows": lambda drop: p.RigL(drop, candidates=None),
            f"{density:.0%}, 3 candidates for each that grows": p.RigL,
            f"{density:.0%}, 8 candidates": lambda drop: p.RigL(drop, candidates=8),
            f"{density:.0%}, SET": p.SET,
        }.items()
    },
}

ARMS["sparser"] = {name: replace(recipe, block_size=1, stored=0.01) for name, recipe in ARMS["policies"].items()}


def build(recipe: Recipe, task: Task, seed: int) -> SparseMLP:
    """The network before its first step; blocks by Erdos-Renyi."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [task.features, *SIZES[1:-1], task.outputs]
    shapes = [(out, inp) for inp, out in pairwise(sizes)]
    stored = min(1.0, recipe.stored * (recipe.start if recipe.elements is None else 1))
    counts = distribute(shapes, stored, "erdos_renyi", block_size=recipe.block_size)
    model = SparseMLP(sizes, density=stored, block_size=recipe.block_size, generator=generator)
    share = recipe.elements
    if isinstance(share, float):
        share = min(1.0, share * recipe.start)
    for i, (shape, count) in enumerate(zip(shapes, counts, strict=True)):
        pattern = BlockPattern.random(shape, block_size=recipe.block_size, generator=generator, num_blocks=count)
        activation = "relu" if i + 1 < len(shapes) else "none"
        model[i] = SparseLinear(
            shape[1], shape[0], pattern=pattern, element_mask=share, activation=activation, generator=generator
        )
    return model


def train(recipe: Recipe, task: Task, seed: int, epochs: int) -> dict:
    """One training: ``score`` on the test images in percent, ``weights`` at the end, ``blocks``."""
    model = build(recipe, task, seed)
    x, y = task.train
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), LR, weight_decay=DECAY, fused=True)
    batch = min(BATCH, len(x))
    per_epoch = len(x) // batch
    steps = epochs * per_epoch
    end = max(1, round(UNTIL * steps))
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if recipe.at_start is not None:
        first = [(x[rows], y[rows]) for rows in torch.randperm(len(x), generator=generator)[: 8 * BATCH].split(BATCH)]
        prune_at_initialization(model, recipe.at_start(first), _final(recipe), optimizer=optimizer, seed=seed)
    sparsifier = _sparsifier(recipe, model, optimizer, end, seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator)[: per_epoch * batch].split(batch):
            optimizer.zero_grad()
            task.loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
            rates.step()
            if sparsifier is not None:
                sparsifier.step()
    with torch.no_grad():
        score = evaluate(model, task)[0]
    computing = sum(int((layer.values != 0).flatten(1).any(1).sum()) for layer in model)
    weights, blocks = sum(layer.num_active for layer in model), sum(layer.pattern.num_blocks for layer in model)
    return {"score": score, "weights": weights, "blocks": blocks, "computing": computing}


def _final(recipe: Recipe) -> float:
    return recipe.stored * (recipe.elements if recipe.by_elements and isinstance(recipe.elements, float) else 1)


def _sparsifier(recipe: Recipe, model: nn.Module, optimizer, end: int, seed: int) -> Sparsifier | None:
    if recipe.policy is None:
        return None
    policy = recipe.policy(Cosine(DROP, 0.0, end))
    density = None
    if policy.follows_density and recipe.start > 1:
        final = _final(recipe)
        density = policy.density_schedule(min(1.0, final * recipe.start), final, end)
    return Sparsifier(
        model,
        optimizer,
        policy,
        density,
        recipe.distribution,
        every=max(1, end // REWIRES),
        end=end,
        seed=seed,
        elements=recipe.by_elements,
    )


def compare(run: Growth, part: str) -> dict:
    """All arms of a part, seed after seed."""
    task = run.images("fashion-mnist")
    task = replace(task, train=_whole(task))
    epochs = max(1, round(run.epochs(EPOCHS)))
    rows = []
    for seed in run.all_seeds:
        for name, recipe in ARMS[part].items():
            row = run.cell(part, f"{name}, seed {seed}", lambda r=recipe, s=seed: train(r, task, s, epochs))
            rows.append({**row, "arm": name, "seed": seed})
    return {"rows": rows}


def _whole(task: Task) -> tuple[Tensor, Tensor]:
    """Training and validation images together: nothing is chosen by the latter."""
    if not len(task.validation[0]):
        return task.train
    return tuple(torch.cat([a, b]) for a, b in zip(task.train, task.validation, strict=True))


PARTS: dict[str, Callable[[Growth], dict]] = {
    "policies": lambda run: compare(run, "policies"),
    "sparser": lambda run: compare(run, "sparser"),
    "elements": lambda run: compare(run, "elements"),
    "candidates": lambda run: compare(run, "candidates"),
    "cost": costs,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sparsenet reproduce policies``."""
    parser.add_argument("--data-dir", help="folder with fashion-mnist/; default: as sparsenet.data.load")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (3)")
    reproduce_parts.add_arguments(parser, "reproduce-policies", PARTS)


def run(args: argparse.Namespace) -> int:
    """Runs the parts that are missing and prints the tables; errors: ``parts.reproduce``."""
    task = Growth(Path(args.out), args.data_dir, scale=args.scale, seeds=args.seeds)
    tables, figures = policies_tables.tables, lambda numbers, out: []
    return reproduce_parts.reproduce("policies", args, PARTS, task, tables, figures)
