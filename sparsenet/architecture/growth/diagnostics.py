"""Whether what is born learns: the gradient of new weights over that of old ones."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from sparsenet.architecture.growth.placing import GrowthError
from sparsenet.compaction.compacting import plain_model
from sparsenet.functional.blocks import zero_outside
from sparsenet.layers import SparseLinear

__all__ = ["newborn_ratio"]


class Report(Protocol):
    """What :func:`~sparsenet.architecture.growth.widen` and :func:`~sparsenet.architecture.growth.deepen` return."""

    @property
    def newborn(self) -> dict[str, tuple[Tensor, Tensor]]:
        """By layer with new weights: (new rows, new columns)."""

    @property
    def incumbents(self) -> tuple[str, ...]:
        """Layers without new weights that these are compared with."""


def newborn_ratio(model: nn.Module, report: Report) -> float:
    """The gradient norm per weight of newborn weights over that of the old ones around them, by the present ``.grad``.

    Units that are heard but not spoken to, "forward-active but backward-starved", show as a ratio near zero
    ("Stability of growth", arXiv 2605.15435, 2026). New units are compared with the other weights of the same layers; a
    new layer with the layer that feeds it.

    Args:
        model: after a backward pass, with the sizes it had when ``report`` was made.
        report: of :func:`~sparsenet.architecture.growth.widen` or :func:`~sparsenet.architecture.growth.deepen`.

    Returns:
        The ratio of root mean squares; infinite where only the new weights have a gradient, NaN where none has.

    Raises:
        GrowthError: there are no gradients, or a layer has other sizes than then.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth import newborn_ratio, widen
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = widen(model, None, {"0": 4})
        >>> model(torch.randn(16, 4)).square().mean().backward()
        >>> newborn_ratio(model, report) > 0.1
        True
    """
    net = plain_model(model)
    sums = torch.zeros(2, 2, dtype=torch.float64)  # new and old: squares, weights
    none = torch.zeros(0, dtype=torch.int64)
    for name, (rows, cols) in {**report.newborn, **dict.fromkeys(report.incumbents, (none, none))}.items():
        module = dict(net.named_modules()).get(name)
        weight = getattr(module, "values" if isinstance(module, SparseLinear) else "weight", None)
        if weight is None or weight.grad is None:
            raise GrowthError(f"newborn_ratio: model must have a gradient for {name!r}, got none")
        shape = module.pattern.shape if isinstance(module, SparseLinear) else weight.shape
        if any(len(at) and int(at.max()) >= n for at, n in zip((rows, cols), shape, strict=False)):
            raise GrowthError(f"newborn_ratio: {name!r} must have the size it had in the report, got {list(shape[:2])}")
        new, active = _newborn(module, weight, rows, cols)
        squares = weight.grad.detach().float().square()
        for i, chosen in enumerate((new & active, ~new & active)):
            total = squares.masked_fill(~chosen, 0.0).sum(dtype=torch.float64)
            sums[i] += torch.stack([total, chosen.sum().double()]).cpu()
    new, old = (math.sqrt(float(squares) / max(float(count), 1.0)) for squares, count in sums)
    return new / old if old else (math.inf if new else math.nan)


def _newborn(module: nn.Module, weight: Tensor, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    """Bool like ``weight``: what is new, and what is a weight at all."""
    if not isinstance(module, SparseLinear):
        new = torch.zeros(weight.shape, dtype=torch.bool, device=weight.device)
        new[rows.to(new.device)] = True
        if len(cols):
            new[:, cols.to(new.device)] = True
        return new, torch.ones_like(new)
    pattern, b = module.pattern, module.block_size
    new, active = (torch.zeros(weight.shape, dtype=torch.bool, device=weight.device) for _ in range(2))
    active[:] = True if module.element_mask is None else module.element_mask
    zero_outside(active, pattern)
    for chosen, n, lines, shape in (
        (rows, pattern.block_rows, pattern.row_indices, (-1, b, 1)),
        (cols, pattern.block_cols, pattern.col, (-1, 1, b)),
    ):
        line = torch.zeros(n * b, dtype=torch.bool)
        line[chosen] = True
        new |= line.reshape(n, b).to(new.device)[lines.long()].view(shape)
    return new, active
