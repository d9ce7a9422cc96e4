"""The report of a swap: which layers became sparse, which were left, and why."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from sparsenet import distributed
from sparsenet.layers import SparseLinear
from sparsenet.pattern import INDEX_BYTES

__all__ = ["SparsifyReport", "SwappedLayer", "announce", "describe", "quoted"]

logger = logging.getLogger(__name__)


class SwappedLayer(NamedTuple):
    """One layer that :func:`sparsenet.sparsify_` swapped.

    Bytes are those of its weight: dense, and as values with their indices.
    """

    shape: tuple[int, int]  # (out, in)
    block_size: int
    num_blocks: int
    density: float
    blocks_per_row: float  # of blocks, on average
    dense_bytes: int
    sparse_bytes: int


@dataclass(frozen=True)
class SparsifyReport:
    """What :func:`sparsenet.sparsify_` did.

    Attributes:
        model: the swapped model; another object than was given only where that was itself an ``nn.Linear``.
        layers: the swapped layers by name.
        left: name -> why a module that holds a matrix was left as it is.
    """

    model: nn.Module = field(repr=False)
    layers: Mapping[str, SwappedLayer]
    left: Mapping[str, str]

    def __str__(self) -> str:
        """A table of the swapped layers with their total, and a list of what was left."""
        names = [_shown(name) for name in (*self.layers, *self.left)]
        width = max(map(len, (*names, "layer")))
        lines = []
        if self.layers:
            heads = ("block", "blocks", "per row", "density", "KiB before", "KiB after")
            lines.append(f"{'layer':<{width}}{'out x in':>16}" + "".join(f"{head:>12}" for head in heads))
        for name, layer in self.layers.items():
            cells = (layer.block_size, layer.num_blocks, f"{layer.blocks_per_row:.1f}")
            lines.append(_line(_shown(name), width, "{} x {}".format(*layer.shape), cells, [layer]))
        if len(self.layers) > 1:
            blocks = sum(layer.num_blocks for layer in self.layers.values())
            lines.append(_line("total", width, "", ("", blocks, ""), list(self.layers.values())))
        if not self.layers:
            lines.append("no layer was swapped")
        if self.left:
            lines += ["left as they are", *(f"{_shown(name):<{width}}  {why}" for name, why in self.left.items())]
        return "\n".join(lines)


def _shown(name: str) -> str:
    return name or "(the model)"


def _line(name: str, width: int, shape: str, cells: Sequence[object], layers: list[SwappedLayer]) -> str:
    """A row of the table; the last three cells are sums over ``layers``."""
    weights = sum(math.prod(layer.shape) for layer in layers)
    kept = sum(layer.density * math.prod(layer.shape) for layer in layers)
    before, after = (sum(b) / 1024 for b in zip(*((m.dense_bytes, m.sparse_bytes) for m in layers), strict=True))
    cells = (*cells, f"{kept / max(weights, 1):.2%}", f"{before:,.1f}", f"{after:,.1f}")
    return f"{name:<{width}}{shape:>16}" + "".join(f"{cell:>12}" for cell in cells)


def describe(linear: nn.Linear, layer: SparseLinear) -> SwappedLayer:
    """What the report says of one layer."""
    pattern, values = layer.pattern, layer.values
    return SwappedLayer(
        pattern.shape,
        pattern.block_size,
        pattern.num_blocks,
        pattern.density,
        pattern.num_blocks / max(pattern.block_rows, 1),
        linear.weight.numel() * linear.weight.element_size(),
        values.numel() * values.element_size() + pattern.num_blocks * INDEX_BYTES,
    )


def announce(report: SparsifyReport) -> None:
    """Logs the report, on rank 0, and warns where nothing was swapped."""
    if distributed.is_active() and torch.distributed.get_rank() != 0:
        return
    logger.info("sparsify_:\n%s", report)
    if not report.layers:
        reasons = [f"{quoted(name)}: {why}" for name, why in report.left.items()] or ["it holds no nn.Linear"]
        more = f"; and {len(reasons) - 5} more" if len(reasons) > 5 else ""
        warnings.warn(f"sparsify_: no layer was swapped ({'; '.join(reasons[:5])}{more})", stacklevel=3)


def quoted(name: str) -> str:
    """The name of a module in a sentence."""
    return repr(name) if name else "the model"
