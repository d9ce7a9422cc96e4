"""What all parts of ``sparsenet reproduce growth`` share: data, seeds, and cells that outlive a killed run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
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

    Raises:
        ValueError: ``seeds`` below 1, or a ``data_dir`` that is no folder.
    """

    out: Path
    data_dir: str | None = None
    scale: float = 1.0
    seeds: int = 3
    _images: dict[tuple[str, bool], Task] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"reproduce growth: seeds must be at least 1, got {self.seeds}")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise ValueError(f"reproduce growth: data-dir must be a folder, got {self.data_dir!r}")

    @property
    def all_seeds(self) -> range:
        """At a small scale one."""
        return range(self.seeds if self.scale == 1 else 1)

    def epochs(self, n: float) -> float:
        """Of a training: fewer at a smaller scale, at least one."""
        return max(1.0, n * min(1.0, 4 * self.scale))

    def every(self, n: int) -> int:
        """Steps from decision to decision: fewer at a smaller scale, as there are fewer images and epochs."""
        return max(2, round(n * self.scale * min(1.0, 4 * self.scale)))

    def images(self, name: str, *, flat: bool = True, download: bool = True) -> Task:
        """Fashion-MNIST, MNIST or CIFAR; FileNotFoundError where the data are not there and cannot be had."""
        if (name, flat) not in self._images:
            here = None if self.data_dir is None else Path(self.data_dir, name)
            found = here if here is not None and here.exists() else name
            data = load(found, download=download, fallback=False)
            self._images[name, flat] = image_task(data, flat=flat, scale=self.scale)
        return self._images[name, flat]

    @property
    def cells(self) -> Path:
        """Where trainings are kept: a folder for each scale, since another scale is another experiment."""
        return self.out / ("cells" if self.scale == 1 else f"cells_{self.scale:g}")

    def cell(self, part: str, key: str, compute: Callable[[], dict]) -> dict:
        """What ``compute`` returns, kept under ``key``."""
        return kept_row(self.cells / f"{part}.jsonl", {"cell": key}, compute)
