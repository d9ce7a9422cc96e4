"""``sparsenet plan``: predicts the memory of a training run and picks the density that fits."""

from __future__ import annotations

import argparse
import dataclasses
import json

from sparsenet.commands.config_flags import add_config_flags, config_of
from sparsenet.memory.budget import format_bytes

__all__ = ["add_arguments", "run"]

_FIELDS = (
    "hidden", "activation", "budget", "density", "block_size", "distribution", "dtype", "policy", "drop_fraction",
    "batch_size", "optimizer", "momentum", "threads",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Inputs and outputs of the network, and the fields of TrainConfig that memory depends on."""
    parser.add_argument("--features", type=int, default=784, help="inputs of the network (784)")
    parser.add_argument("--classes", type=int, default=10, help="outputs of the network (10)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_config_flags(parser, _FIELDS)


def run(options: argparse.Namespace) -> int:
    """Prints the plan."""
    config, _ = config_of(options)
    plan = config.plan(options.features, options.classes)
    if options.json:
        fields = dataclasses.asdict(plan) | {"predicted_peak_bytes": plan.predicted_peak_bytes, "moment": plan.moment}
        print(json.dumps(fields, indent=2))
        return 0
    print(plan.table())
    print(f"\n  {'at the least':<28}{format_bytes(plan.minimum_bytes):>12}")
    print(f"  {'the same network dense':<28}{format_bytes(plan.dense_bytes):>12}")
    return 0
