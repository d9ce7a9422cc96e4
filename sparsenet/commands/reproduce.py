"""``sparsenet reproduce ...``: repeats published experiments beside their numbers."""

from __future__ import annotations

import argparse

from sparsenet.commands.parser import CommandParser

__all__ = ["EXPERIMENTS", "add_arguments"]

EXPERIMENTS = {
    "density": "Tessera and Rosman's density search",
    "embedding": "networks in a continuous space",
    "gates": "tri-state ReLU, compaction, depth collapse",
    "growth": "saliency, growth and pruning, budgets",
    "policies": "every policy in one small experiment, and what a rewire costs",
    "training": "sparse networks against the dense ones one would take instead",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A command for each experiment; its module adds its own flags and runs itself."""
    what = parser.add_subparsers(required=True, metavar="what", parser_class=CommandParser)
    for name, text in EXPERIMENTS.items():
        what.add_parser(name, help=text, module=f"sparsenet.reproduce.{name}")
