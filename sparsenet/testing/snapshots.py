"""What a layer and its optimizer state are at one moment, by place, so that two moments can be compared."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsenet.layers import SparseLinear
from sparsenet.pattern import BlockPattern

__all__ = ["LayerSnapshot", "digest", "fingerprint", "is_by_block"]


@dataclass(frozen=True)
class LayerSnapshot:
    """One layer at one moment; copies, but for the pattern and the parameter themselves.

    ``by_elements``: whether what is rewired, a unit, is an element; else it is a block. ``states``: for each optimizer
    what it keeps of the values, by name.
    """

    pattern: BlockPattern
    parameter: nn.Parameter
    values: Tensor
    mask: Tensor | None
    has_gradient: bool
    states: tuple[dict[str, Any], ...]
    by_elements: bool

    @classmethod
    def of(cls, layer: SparseLinear, optimizers: Sequence[Optimizer], by_elements: bool) -> LayerSnapshot:
        """The layer as it is now."""
        states = tuple(
            {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in o.state.get(layer.values, {}).items()}
            for o in optimizers
        )
        mask = layer.element_mask
        return cls(
            layer.pattern,
            layer.values,
            layer.values.detach().clone(),
            None if mask is None else mask.clone(),
            layer.values.grad is not None,
            states,
            by_elements and mask is not None,
        )

    @cached_property
    def block_places(self) -> Tensor:
        """int64 [num_blocks]: block row * block columns + block column."""
        p = self.pattern
        return p.row_indices.long() * p.block_cols + p.col_indices.long()

    @cached_property
    def active(self) -> Tensor:
        """Bool [num_blocks, b, b]: the elements inside the matrix that are not masked."""
        p, b = self.pattern, self.pattern.block_size
        inside = torch.arange(b)
        rows = p.row_indices.long().view(-1, 1, 1) * b + inside.view(1, -1, 1) < p.shape[0]
        cols = p.col_indices.long().view(-1, 1, 1) * b + inside.view(1, 1, -1) < p.shape[1]
        return rows & cols if self.mask is None else rows & cols & self.mask

    @cached_property
    def units(self) -> Tensor:
        """Bool [rows, columns] of units: which of them are there."""
        if self.by_elements:
            return self.dense(self.active)
        found = torch.zeros(self.pattern.block_rows * self.pattern.block_cols, dtype=torch.bool)
        found[self.block_places] = True
        return found.view(self.pattern.block_rows, self.pattern.block_cols)

    @cached_property
    def stored(self) -> Tensor:
        """Bool [rows, columns] of units: which lie in stored blocks."""
        return self.dense(torch.ones_like(self.values, dtype=torch.bool)) if self.by_elements else self.units

    def is_same(self, other: LayerSnapshot) -> bool:
        """Whether nothing differs, bit for bit."""
        mine, theirs = ((s.values, s.mask, list(s.states)) for s in (self, other))
        return self.pattern is other.pattern and self.parameter is other.parameter and digest(mine) == digest(theirs)

    @property
    def unit_size(self) -> int:
        """Weights in one unit."""
        return 1 if self.by_elements else self.pattern.block_size**2

    def by_place(self, blocks: Tensor) -> Tensor:
        """[places, ...] of a tensor [num_blocks, ...]; zero where there is no block."""
        table = blocks.new_zeros(self.pattern.block_rows * self.pattern.block_cols, *blocks.shape[1:])
        table[self.block_places] = blocks.detach()
        return table

    def dense(self, blocks: Tensor) -> Tensor:
        """[out, in] of a tensor [num_blocks, b, b]."""
        p, b = self.pattern, self.pattern.block_size
        whole = self.by_place(blocks).view(p.block_rows, p.block_cols, b, b).permute(0, 2, 1, 3)
        return whole.reshape(p.block_rows * b, p.block_cols * b)[: p.shape[0], : p.shape[1]]


def is_by_block(value: Any, blocks: int) -> bool:
    """Whether a state has one entry per block; with a single block a vector counts as none."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == blocks and (value.dim() > 1 or blocks > 1)


def digest(value: Any) -> str:
    """The same for the same bits, of tensors in dicts and lists and of whatever else can be written down."""
    found = hashlib.blake2b(digest_size=12)

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            part = part.detach().cpu().contiguous()
            found.update(f"{part.dtype} {list(part.shape)}".encode())
            found.update(part.reshape(-1).view(torch.uint8).numpy().tobytes() if part.numel() else b"")
        elif isinstance(part, Mapping):
            for key in sorted(part, key=str):
                found.update(str(key).encode())
                add(part[key])
        elif isinstance(part, (list, tuple)):
            found.update(b"[%d]" % len(part))
            for inner in part:
                add(inner)
        else:
            found.update(repr(part).encode())

    add(value)
    return found.hexdigest()


def fingerprint(model: nn.Module, optimizers: Sequence[Optimizer], sparsifier: Any) -> dict[str, str]:
    """By name of what it is of, a digest of everything that training goes on from."""
    named = dict(model.named_parameters())
    found = {f"{name} of the model": digest(tensor) for name, tensor in model.state_dict().items()}
    for optimizer in optimizers:
        for name, parameter in named.items():
            found[f"the optimizer's state of {name}"] = digest(dict(optimizer.state.get(parameter, {})))
    for key, value in sparsifier.state_dict().items():
        found[f"{key!r} of the Sparsifier's state"] = digest(value)
    return found
