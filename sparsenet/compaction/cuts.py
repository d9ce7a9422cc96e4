"""What a layer would keep if it were cut to blocks: its importance by unit and block, in any order of its units."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsenet.functional import largest_reaching_all
from sparsenet.layers import SparseLinear

__all__ = ["IMPORTANCES", "Cut", "active_elements"]

CHUNK = 1 << 22  # elements of a dense weight that are looked at together


def _magnitude(weight: Tensor, grad: Tensor | None) -> Tensor:
    return weight.square()


def _taylor(weight: Tensor, grad: Tensor | None) -> Tensor:
    return (weight * grad).square()


# name -> importance of each element from its weight and its gradient
IMPORTANCES: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"magnitude": _magnitude, "taylor": _taylor}


def _wide(t: Tensor) -> Tensor:
    """float32 or float64."""
    return t if t.dtype == torch.float64 else t.float()


def active_elements(layer: SparseLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Of every active element inside the matrix: its index in the flattened values, its row and its column.

    Returns:
        Three int64 tensors [n] on the layer's device.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.compaction.cuts import active_elements
        >>> pattern = sn.BlockPattern([0, 1, 2], [1, 0], shape=(2, 2), block_size=1)
        >>> active_elements(sn.SparseLinear(2, 2, pattern=pattern))
        (tensor([0, 1]), tensor([0, 1]), tensor([1, 0]))
    """
    pattern, b = layer.pattern, layer.block_size
    row, col = pattern.row_indices.long() * b, pattern.col.long() * b
    if layer.element_mask is not None:  # False outside the matrix
        at = layer.element_mask.flatten().nonzero().flatten()
        block, i, j = at // (b * b), at // b % b, at % b
        return at, row[block] + i, col[block] + j
    side = torch.arange(b, device=row.device)
    rows = (row[:, None, None] + side[:, None]).expand(-1, -1, b).flatten()
    cols = (col[:, None, None] + side).expand(-1, b, -1).flatten()
    at = ((rows < pattern.shape[0]) & (cols < pattern.shape[1])).nonzero().flatten()
    return at, rows[at], cols[at]


@dataclass(frozen=True)
class Cut:
    """A linear layer that is to keep ``count`` blocks of ``block_size``.

    Attributes:
        module: nn.Linear or SparseLinear.
        importance: one of ``IMPORTANCES``, or what the user's function gave: float [out, in] on the CPU.
    """

    module: nn.Linear | SparseLinear
    block_size: int
    count: int
    importance: str | Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.module.out_features, self.module.in_features

    def by_row(self, cols: Tensor) -> Tensor:
        """Importance of each row in each block, float [out, blocks across] on the CPU, columns being in that order."""
        if isinstance(self.module, SparseLinear):
            return self._scattered(cols, across=True)
        parts = [self._grouped(part.index_select(1, cols.to(part.device)), 1) for part in self._chunks()]
        return torch.cat(parts) if parts else torch.zeros(0, -(-len(cols) // self.block_size))

    def by_column(self, rows: Tensor) -> Tensor:
        """Importance of each column in each block, float [in, blocks down] on the CPU, rows being in that order."""
        if isinstance(self.module, SparseLinear):
            return self._scattered(rows, across=False)
        parts = [self._grouped(part, 0).T for part in self._chunks(rows)]
        return torch.cat(parts, 1).contiguous() if parts else torch.zeros(self.shape[1], 0)

    def norms(self, by_unit: Tensor, order: Tensor) -> Tensor:
        """float64 [groups, blocks]: what :meth:`by_row` or :meth:`by_column` gave, summed over units in that order."""
        return self._grouped(by_unit.double().index_select(0, order), 0)

    def kept(self, norms: Tensor) -> Tensor:
        """int64 [count], ascending: linear places of the blocks that are kept, the heaviest, and every line reached."""
        return largest_reaching_all(norms, self.count).sort().values

    # --- pieces ---

    def _chunks(self, rows: Tensor | None = None) -> Iterator[Tensor]:
        """Importance [rows, in] of a dense layer, whole groups of rows in the given order at a time."""
        weight, grad = self.module.weight.detach(), self.module.weight.grad
        out, inp = self.shape
        step = max(CHUNK // max(inp, 1) // self.block_size, 1) * self.block_size
        for start in range(0, out, step):
            lines = slice(start, start + step) if rows is None else rows[start : start + step].to(weight.device)
            if isinstance(self.importance, Tensor):
                yield self.importance[lines.cpu() if isinstance(lines, Tensor) else lines]
            else:
                part = None if grad is None else _wide(grad[lines])
                yield IMPORTANCES[self.importance](_wide(weight[lines]), part)

    def _grouped(self, t: Tensor, dim: int) -> Tensor:
        """Sums over groups of ``block_size`` along ``dim``, on the CPU."""
        pad = -t.shape[dim] % self.block_size
        t = nn.functional.pad(t, (0, pad) if dim else (0, 0, 0, pad))
        return t.unflatten(dim, (-1, self.block_size)).sum(dim + 1).cpu()

    def _elements(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of a sparse layer, on the CPU: rows, columns and importance of its active elements."""
        at, rows, cols = active_elements(self.module)
        if isinstance(self.importance, Tensor):
            return rows.cpu(), cols.cpu(), self.importance[rows.cpu(), cols.cpu()]
        values, grad = self.module.values, self.module.values.grad
        grad = None if grad is None else _wide(grad.flatten()[at])
        found = IMPORTANCES[self.importance](_wide(values.detach().flatten()[at]), grad)
        return rows.cpu(), cols.cpu(), found.cpu()

    def _scattered(self, order: Tensor, across: bool) -> Tensor:
        rows, cols, found = self._elements()
        group = torch.empty_like(order)
        group[order] = torch.arange(len(order)) // self.block_size
        units, others = (rows, group[cols]) if across else (cols, group[rows])
        n, blocks = self.shape[0 if across else 1], -(-len(order) // self.block_size)
        out = torch.zeros(n * blocks, dtype=found.dtype)
        return out.index_add_(0, units * blocks + others, found).view(n, blocks)
