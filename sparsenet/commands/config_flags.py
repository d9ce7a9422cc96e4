"""Flags that follow from the fields of :class:`sparsenet.TrainConfig`; ``train`` and ``plan`` have them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

from sparsenet.training.config import TrainConfig

__all__ = ["add_config_flags", "config_of"]


def add_config_flags(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """A flag per field; absent flags leave no attribute, so that the dataclass's defaults hold."""
    for field in dataclasses.fields(TrainConfig):
        if field.name not in names:
            continue
        kind, default = type(field.default), field.default
        shown = " ".join(map(str, default)) if kind is tuple else default
        how: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        how["help"] = f"{field.metadata['help']} ({shown})".replace("%", "%%")
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            how |= {"type": int, "nargs": "+", "metavar": "N"}
        else:
            how |= {"type": kind, "choices": field.metadata["choices"]}
        if field.name == "resume":
            how |= {"nargs": "?", "const": "latest", "metavar": "FOLDER"}
        parser.add_argument("--" + field.name.replace("_", "-"), **how)


def config_of(options: argparse.Namespace) -> tuple[TrainConfig, set[str]]:
    """The configuration that the flags mean, and which were given."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in known}
    return TrainConfig(**given), set(given)
