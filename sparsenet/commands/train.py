"""``sparsenet train``: trains a sparse network on real data inside a memory budget."""

from __future__ import annotations

import argparse
import dataclasses
import sys

from sparsenet.commands.config_flags import add_config_flags, config_of
from sparsenet.memory.budget import release_freed_memory
from sparsenet.training import job
from sparsenet.training.config import TrainConfig

__all__ = ["add_arguments", "run"]

_WITH_RESUME = ("resume", "plots", "progress", "dense_steps", "out")  # the only flags that --resume does not fix


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A flag for every field of TrainConfig."""
    add_config_flags(parser, [field.name for field in dataclasses.fields(TrainConfig)])


def run(options: argparse.Namespace) -> int:
    """Trains, and prints the report."""
    release_freed_memory()  # before torch allocates anything large
    config, given = config_of(options)
    fixed = sorted(given - set(_WITH_RESUME))
    if config.resume and fixed:
        flags = ", ".join("--" + name.replace("_", "-") for name in fixed)
        raise ValueError(f"train: --resume takes the settings of the interrupted run, got {flags} as well")
    try:
        summary = job.run(config)
    except job.Interrupted as stop:
        print(f"sparsenet: {stop}", file=sys.stderr)
        return 130
    print("\n" + job.report(summary))
    return 0
