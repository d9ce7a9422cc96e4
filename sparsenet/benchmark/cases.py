"""What is measured: sizes, density, block size, dtype, and the kind of pattern."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from sparsenet import data
from sparsenet.models import SparseMLP
from sparsenet.pattern import BlockPattern
from sparsenet.policies.rewiring import RigL
from sparsenet.sparsifier import Sparsifier

__all__ = ["DTYPES", "PATTERNS", "Case", "make_pattern"]

DTYPES = ("float32", "bfloat16", "float16", "float64")
_POWER = 0.8  # blocks of the r-th fullest row ~ r^-0.8: the fullest of 128 rows has 20 times the blocks of the last
_RIGL_STEPS, _RIGL_EVERY, _RIGL_BATCH = 200, 10, 128


@dataclass(frozen=True)
class Case:
    """One point of the grid.

    Attributes:
        shape: (out, in). batch: rows of x. density: share of active blocks.
        pattern: one of :data:`PATTERNS`.

    Raises:
        ValueError: a number or a name is out of range.
    """

    shape: tuple[int, int] = (4096, 4096)
    batch: int = 512
    density: float = 0.1
    block_size: int = 32
    dtype: str = "float32"
    pattern: str = "uniform"

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"bench: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.batch < 1:
            raise ValueError(f"bench: batch must be at least 1, got {self.batch}")
        if min(self.shape) < 1:
            raise ValueError(f"bench: sizes must be at least 1, got {self.shape[0]}x{self.shape[1]}")
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"bench: density must lie in (0, 1], got {self.density}")
        if self.pattern not in PATTERNS:
            raise ValueError(f"bench: pattern must be one of {', '.join(PATTERNS)}, got {self.pattern!r}")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype itself."""
        return getattr(torch, self.dtype)

    def block_pattern(self) -> BlockPattern:
        """The pattern, the same every time."""
        return make_pattern(self.pattern, self.shape, self.density, self.block_size)

    def fields(self) -> dict[str, object]:
        """As written to JSON."""
        return {
            "out": self.shape[0],
            "in": self.shape[1],
            "batch": self.batch,
            "density": self.density,
            "block": self.block_size,
            "dtype": self.dtype,
            "pattern": self.pattern,
        }


# --- patterns -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def make_pattern(kind: str, shape: tuple[int, int], density: float, block_size: int) -> BlockPattern:
    """A pattern of one of :data:`PATTERNS`, with ``density`` of all block places, the same every time."""
    return PATTERNS[kind](shape, density, block_size)


def _uniform(shape: tuple[int, int], density: float, block_size: int) -> BlockPattern:
    return BlockPattern.random(shape, density, block_size, torch.Generator().manual_seed(0))


def _power_law(shape: tuple[int, int], density: float, block_size: int) -> BlockPattern:
    """Block rows in random order, the r-th fullest with a share of the blocks proportional to r^-0.8."""
    rows, cols = (-(-n // block_size) for n in shape)
    generator = torch.Generator().manual_seed(0)
    shares = torch.arange(1, rows + 1, dtype=torch.float64) ** -_POWER
    counts = torch.zeros(rows, dtype=torch.int64)
    left = round(density * rows * cols)
    while left > 0:  # what does not fit into full rows goes to the others
        open_rows = counts < cols
        wanted = shares * open_rows
        extra = torch.minimum((wanted / wanted.sum() * left).floor().long(), cols - counts)
        if not extra.any():
            extra[open_rows.nonzero().flatten()[:left]] = 1
        counts, left = counts + extra, left - int(extra.sum())
    return _with_counts(counts[torch.randperm(rows, generator=generator)], shape, block_size, generator)


def _empty_rows(shape: tuple[int, int], density: float, block_size: int) -> BlockPattern:
    """Every other block row is empty, the others have twice the density (at most all)."""
    rows, cols = (-(-n // block_size) for n in shape)
    counts = torch.zeros(rows, dtype=torch.int64)
    counts[::2] = min(cols, round(2 * density * cols))
    return _with_counts(counts, shape, block_size, torch.Generator().manual_seed(0))


def _full_row(shape: tuple[int, int], density: float, block_size: int) -> BlockPattern:
    """One block row is full, the rest of the blocks is spread evenly over the other rows."""
    rows, cols = (-(-n // block_size) for n in shape)
    rest = max(0, round(density * rows * cols) - cols)
    counts = torch.full((rows,), rest // max(rows - 1, 1), dtype=torch.int64)
    counts[: rest % max(rows - 1, 1)] += 1
    counts[rows // 2] = cols
    return _with_counts(counts, shape, block_size, torch.Generator().manual_seed(0))


def _lone_row(shape: tuple[int, int], density: float, block_size: int) -> BlockPattern:
    """One full block row among empty ones, whatever ``density`` says."""
    rows, cols = (-(-n // block_size) for n in shape)
    mask = torch.zeros(rows, cols, dtype=torch.bool)
    mask[rows // 2] = True
    return BlockPattern.from_mask(mask, block_size, shape)


def _with_counts(counts: Tensor, shape: tuple[int, int], block_size: int, generator: torch.Generator) -> BlockPattern:
    """Row i has ``counts[i]`` blocks at random columns."""
    cols = -(-shape[1] // block_size)
    picked = [torch.randperm(cols, generator=generator)[:count] for count in counts.tolist()]
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    return BlockPattern.from_places(rows, torch.cat(picked), shape, block_size)


def _rigl(shape: tuple[int, int], density: float, block_size: int) -> BlockPattern:
    """What RigL makes of the middle layer of a network that it trains for 200 steps on real images, 20 rewires."""
    images = data.load("fashion-mnist")
    x = images.train_x[:20_000].flatten(1).float()
    x = (x - x.mean()) / x.std()
    y = images.train_y[:20_000]
    generator = torch.Generator().manual_seed(0)
    sizes = [x.shape[1], shape[1], shape[0], images.num_classes]
    model = SparseMLP(sizes, [0.2, density, 1.0], block_size, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sparsifier = Sparsifier(model, optimizer, RigL(drop_fraction=0.3), every=_RIGL_EVERY)
    for _ in range(_RIGL_STEPS):
        rows = torch.randint(len(x), (_RIGL_BATCH,), generator=generator)
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        sparsifier.step()
        optimizer.zero_grad()
    return model[1].pattern.copy()


PATTERNS = {
    "uniform": _uniform,
    "power_law": _power_law,
    "empty_rows": _empty_rows,
    "full_row": _full_row,
    "lone_row": _lone_row,
    "rigl": _rigl,
}
