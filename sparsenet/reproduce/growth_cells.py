"""What all parts of ``sparsenet reproduce growth`` share: data, seeds, and cells that outlive a killed run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sparsenet.data.datasets import load
from sparsenet.reproduce.growth_tasks import Task, image_task
from sparsenet.reproduce.rows import kept_row

__all__ = ["Growth"]


@dataclass
class Growth:
    """One run.

    Attributes:
        out: folder of everything. data_dir: where the images are, or None. scale: below 1 for a quick look.
        seeds: trainings of each kind.
    """

    out: Path
    data_dir: str | None = None
    scale: float = 1.0
    seeds: int = 3

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"reproduce growth: seeds must be at least 1, got {self.seeds}")

    @property
    def all_seeds(self) -> range:
        """At a small scale one."""
        return range(self.seeds if self.scale == 1 else 1)

    def epochs(self, n: float) -> float:
        """Of a training: fewer at a smaller scale, at least one."""
        return max(1.0, n * min(1.0, 4 * self.scale))

    def images(self, name: str, *, flat: bool = True) -> Task:
        """Fashion-MNIST, MNIST or CIFAR."""
        return self._images[name, flat]

    @cached_property
    def _images(self) -> dict:
        owner = self

        class Loaded(dict):
            def __missing__(self, key: tuple[str, bool]) -> Task:
                name, flat = key
                here = None if owner.data_dir is None else Path(owner.data_dir, name)
                data = load(here if here is not None and here.exists() else name, fallback=False)
                self[key] = image_task(data, flat=flat, scale=owner.scale)
                return self[key]

        return Loaded()

    def cell(self, part: str, key: str, compute: Callable[[], dict]) -> dict:
        """What ``compute`` returns, kept under ``key``."""
        return kept_row(self.out / "cells" / f"{part}.jsonl", {"cell": key}, compute)
