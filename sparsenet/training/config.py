"""TrainConfig: every knob of a training run, once. The command line's flags follow from its fields."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sparsenet.densities import DISTRIBUTIONS
from sparsenet.memory.budget import MemoryBudget
from sparsenet.memory.planning import OPTIMIZER_STATES, MemoryPlan, plan
from sparsenet.pattern import BLOCK_SIZES
from sparsenet.policies import POLICIES
from sparsenet.schedules import number_of, numbers_of

__all__ = ["TrainConfig", "usable_device"]

LR_SCHEDULES = ("one_cycle", "cosine", "constant")


def _knob(default: Any, help: str, choices: Any = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices and tuple(choices)})


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the main job: Fashion-MNIST, 784-4096-4096-4096-10, 128 MiB.

    Raises:
        ValueError, TypeError: a field out of its range; the message names the field, the rule and the value.

    Example:
        >>> import sparsenet as sn
        >>> config = sn.TrainConfig(epochs=2, hidden=(256,), budget="16MiB")
        >>> config.plan(num_features=784, num_classes=10).sizes
        (784, 256, 10)
    """

    data: str = _knob("fashion-mnist", "data set: fashion-mnist, mnist, cifar10, cifar100, digits, or a path")
    hidden: tuple[int, ...] = _knob((4096, 4096, 4096), "sizes of the hidden layers")
    activation: str = _knob("relu", "of the hidden layers", ("relu", "gelu", "silu"))
    budget: str = _knob("128MiB", "memory for weights, gradients, optimizer, activations and workspace together")
    density: float = _knob(0.0, "share of active blocks; 0: the largest that fits the budget")
    block_size: int = _knob(0, "side of a block; 0: chosen for each layer from the density", (0, *BLOCK_SIZES))
    distribution: str = _knob("erdos_renyi", "how the first density is spread over the layers", DISTRIBUTIONS)
    dtype: str = _knob("float32", "of weights, gradients and activations", ("float32", "bfloat16", "float64"))
    policy: str = _knob("rigl", "which blocks go and which come", POLICIES)
    drop_fraction: float = _knob(0.3, "share of the blocks exchanged at the first rewire; falls to 0 as half a cosine")
    rewire_every: int = _knob(100, "steps between rewires")
    rewire_until: float = _knob(0.75, "share of the training after which the pattern stays")
    final_density: float = _knob(0.0, "gmp: density at the end; 0: half of the first")
    epochs: int = _knob(10, "passes over the training data")
    batch_size: int = _knob(256, "examples per step")
    optimizer: str = _knob("adamw", "torch's", OPTIMIZER_STATES)
    lr: float = _knob(1e-3, "the highest learning rate")
    momentum: float = _knob(0.9, "of sgd")
    weight_decay: float = _knob(0.01, "decoupled for adamw, added to the gradient for sgd")
    lr_schedule: str = _knob("one_cycle", "of the learning rate", LR_SCHEDULES)
    warmup: float = _knob(0.3, "one_cycle: share of the training in which the rate rises")
    label_smoothing: float = _knob(0.1, "share of a label spread over all classes")
    clip_norm: float = _knob(0.0, "largest norm of the gradient; 0: as it is")
    flip: bool = _knob(False, "mirror images at random, left to right")
    shift: int = _knob(0, "move images at random by up to this many pixels")
    validation: float = _knob(0.05, "share of the training data held out to measure progress on")
    patience: int = _knob(0, "stop after this many epochs without a better validation loss; 0: never")
    seed: int = _knob(0, "of patterns, values, order and growth")
    device: str = _knob("cpu", "cpu or cuda")
    threads: int = _knob(0, "of the kernels; 0: torch's")
    dense_steps: int = _knob(8, "steps of the same network dense, timed at the end in a process of its own; 0: none")
    log_every: int = _knob(20, "steps between lines of metrics.jsonl")
    out: str = _knob("runs", "folder of all runs")
    name: str = _knob("", "of this run's folder; default: the data set's, numbered")
    resume: str = _knob("", "folder of an interrupted run to continue, or latest")
    plots: bool = _knob(True, "draw the PNGs")
    progress: bool = _knob(True, "show a progress bar on a terminal")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        _check_ranges(self)

    def plan(self, num_features: int, num_classes: int, input_bytes: int = 1) -> MemoryPlan:
        """The memory plan of this run; see :func:`sparsenet.plan`."""
        return plan(
            (num_features, *self.hidden, num_classes),
            self.budget,
            self.batch_size,
            self.optimizer,
            self.dtype,
            self.block_size or None,
            self.distribution,
            self.activation,
            density=self.density or None,
            momentum=self.momentum,
            policy=self.policy,
            drop_fraction=self.drop_fraction,
            threads=self.threads or torch.get_num_threads(),
            input_bytes=input_bytes,
        )

    def to_json(self) -> str:
        """The fields as JSON; :meth:`from_dict` reads them back."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TrainConfig:
        """From what :meth:`to_json` wrote; an unknown field is a ValueError."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ValueError(f"TrainConfig: fields must be known, got {', '.join(unknown)}")
        return cls(**fields)


def _checked(field: dataclasses.Field, value: Any) -> Any:
    """``value`` in the type of the field's default; integers serve as floats, lists of integers as tuples."""
    name, kind = f"TrainConfig: {field.name}", type(field.default)
    value = _plain(value)
    if kind is tuple:
        sizes = numbers_of(value)
        if any(type(n) is not int or n < 1 for n in sizes):
            raise ValueError(f"{name} must be integers of at least 1, got {value!r}")
        return tuple(sizes)
    number = number_of(value)
    if number is not None:
        value = float(number) if kind is float else number
    if type(value) is not kind:
        raise TypeError(f"{name} must be of type {kind.__name__}, got {value!r}")
    if kind is float and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
    return value


def _plain(value: Any) -> Any:
    """Python's own number for one of NumPy or torch; anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _check_ranges(config: TrainConfig) -> None:
    at_least = {"rewire_every": 1, "epochs": 1, "batch_size": 1, "log_every": 1}
    for name in ("shift", "patience", "threads", "dense_steps", "weight_decay", "clip_norm", "seed"):
        at_least[name] = 0
    for name, least in at_least.items():
        if getattr(config, name) < least:
            raise ValueError(f"TrainConfig: {name} must be at least {least}, got {getattr(config, name)}")
    if config.lr <= 0:
        raise ValueError(f"TrainConfig: lr must be above 0, got {config.lr}")
    for name in ("density", "drop_fraction", "final_density", "rewire_until", "warmup"):
        if not 0.0 <= getattr(config, name) <= 1.0:
            raise ValueError(f"TrainConfig: {name} must lie in [0, 1], got {getattr(config, name)}")
    for name in ("momentum", "label_smoothing", "validation"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"TrainConfig: {name} must lie in [0, 1), got {getattr(config, name)}")
    if config.patience and not config.validation:
        raise ValueError(f"TrainConfig: patience needs validation data, got validation {config.validation}")
    if config.name in (".", "..") or "/" in config.name or "\\" in config.name:
        raise ValueError(f"TrainConfig: name must be a plain folder name, got {config.name!r}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", config.device):
        raise ValueError(f"TrainConfig: device must be cpu or cuda, got {config.device!r}")
    MemoryBudget(config.budget)


def usable_device(name: str) -> torch.device:
    """The device of that name, ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        ValueError: it is not on this machine.

    Example:
        >>> from sparsenet.training.config import usable_device
        >>> usable_device("cpu")
        device(type='cpu')
    """
    device = torch.device(name)
    found = torch.cuda.device_count() if device.type == "cuda" and torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= found:
        there = f"{found} CUDA devices" if found else "no CUDA device that works"
        raise ValueError(f"Trainer: device must be on this machine, got {name!r}; torch finds {there}")
    return device
