"""``sparsenet reproduce growth``: saliency, rewiring, growth and budgets on images and tables: the checks D1 to D13.

Every training is a cell that is kept as soon as it is done (``<out>/cells``), every part a file ``<out>/<part>.json``;
neither is computed again while it is there. The tables put the figure asked for beside ours.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sparsenet.reproduce import growth_tables
from sparsenet.reproduce import parts as reproduce_parts
from sparsenet.reproduce.growth_budgets import budgets, start_points
from sparsenet.reproduce.growth_cells import Growth
from sparsenet.reproduce.growth_images import cifar, fashion_growth, mnist_convolutional, mnist_mlp
from sparsenet.reproduce.growth_pruning import gradual, one_shot, rewired_digits, rewired_fashion
from sparsenet.reproduce.growth_rivals import gromo_growth, tables
from sparsenet.reproduce.growth_stops import self_stopping

__all__ = ["PARTS", "add_arguments", "run"]

PARTS: dict[str, Callable[[Growth], dict]] = {
    "d1_one_shot": one_shot,
    "d2_gradual": gradual,
    "d3_rewired_fashion": rewired_fashion,
    "d4_rewired_digits": rewired_digits,
    "d5_growth": fashion_growth,
    "d7_budgets": budgets,
    "d8_tables": tables,
    "d9_cifar": cifar,
    "d9_cifar100": partial(cifar, classes=100),
    "d10_mlp": mnist_mlp,
    "d10_convolutional": mnist_convolutional,
    "d12_gromo": gromo_growth,
    "d13_stops": self_stopping,
    "start_points": start_points,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sparsenet reproduce growth``."""
    parser.add_argument(
        "--data-dir", help="folder with mnist/, fashion-mnist/, cifar10/, cifar100/; default: as sparsenet.data.load"
    )
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind (3)")
    reproduce_parts.add_arguments(parser, "reproduce-growth", PARTS)


def run(args: argparse.Namespace) -> int:
    """Runs the parts that are missing, prints the tables, draws the figures; errors: ``parts.reproduce``.

    A part that was skipped, or has fewer seeds than are asked for, is missing; its trainings so far are kept.
    """
    task = Growth(Path(args.out), args.data_dir, scale=args.scale, seeds=args.seeds)
    for part, numbers in reproduce_parts.read_parts(task.out, PARTS).items():
        asked = args.parts == "all" or part in args.parts.split(",")
        seeds = {row["seed"] for row in numbers["rows"]}
        if asked and numbers["scale"] == args.scale and not seeds >= set(task.all_seeds):
            (task.out / f"{part}.json").unlink()
    return reproduce_parts.reproduce("growth", args, PARTS, task, growth_tables.tables, growth_tables.figures)
