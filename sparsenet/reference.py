"""The operations in plain PyTorch: the specification, the oracle of the tests, and differentiable twice.

Same signatures and results as :mod:`sparsenet.functional`, any device and dtype, no native code. Each function reads of
``pattern`` only ``shape``, ``block_size``, ``row_indices`` and ``col_indices``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["block_gradient_squared_norms", "block_sparse_linear", "candidate_gradients", "compact_blocks"]

ACTIVATIONS = {"none": lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def _blocked(x: Tensor, block_size: int) -> Tensor:
    """[M, n] -> [M, ceil(n / b), b], padded with zeros."""
    blocks = -(-x.shape[1] // block_size)
    return F.pad(x, (0, blocks * block_size - x.shape[1])).reshape(x.shape[0], blocks, block_size)


def block_sparse_linear(
    x: Tensor, values: Tensor, pattern, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``activation(x @ W.T + bias)`` with W given by its active blocks. x [..., in] -> [..., out].

    Example:
        >>> import torch, sparsenet as sn
        >>> pattern = sn.BlockPattern.random((48, 64), 0.5, block_size=16)
        >>> x, values = torch.randn(3, 64), torch.randn(pattern.num_blocks, 16, 16)
        >>> y = sn.reference.block_sparse_linear(x, values, pattern, activation="relu")
        >>> torch.allclose(y, sn.functional.block_sparse_linear(x, values, pattern, activation="relu"), atol=1e-4)
        True
    """
    out_features, in_features = pattern.shape
    b = pattern.block_size
    flat = x.reshape(x.shape[:-1].numel(), in_features)
    rows = pattern.row_indices.to(x.device, torch.int64)
    cols = pattern.col_indices.to(x.device, torch.int64)
    gathered = _blocked(flat, b)[:, cols]  # [M, num_blocks, b]
    products = torch.einsum("mik,ink->imn", gathered, values)  # [num_blocks, M, b]
    block_rows = -(-out_features // b)
    z = products.new_zeros(block_rows, flat.shape[0], b).index_add(0, rows, products)
    z = z.permute(1, 0, 2).reshape(flat.shape[0], block_rows * b)[:, :out_features]
    if bias is not None:
        z = z + bias
    return ACTIVATIONS[activation](z).reshape(*x.shape[:-1], out_features)


def block_gradient_squared_norms(
    x: Tensor, grad_output: Tensor, block_size: int, block_rows: tuple[int, int] | None = None
) -> Tensor:
    """Squared Frobenius norm of every block of ``grad_output.T @ x``: [ceil(out / b), ceil(in / b)], float32.

    Example:
        >>> import torch, sparsenet as sn
        >>> x, grad_output = torch.tensor([[1.0, 2.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0, 3.0]])
        >>> sn.reference.block_gradient_squared_norms(x, grad_output, block_size=4)   # (1 + 9) (1 + 4)
        tensor([[50.]])
    """
    gradient = torch.einsum(
        "mrn,msk->rsnk",
        _blocked(grad_output.reshape(-1, grad_output.shape[-1]), block_size),
        _blocked(x.reshape(-1, x.shape[-1]), block_size),
    )
    return gradient.square().sum((2, 3)).float()[slice(*block_rows) if block_rows is not None else slice(None)]


def candidate_gradients(x: Tensor, grad_output: Tensor, rows: Tensor, cols: Tensor, block_size: int) -> Tensor:
    """Blocks (rows[i], cols[i]) of ``grad_output.T @ x``: [len(rows), b, b].

    Example:
        >>> import torch, sparsenet as sn
        >>> x, grad_output = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> sn.reference.candidate_gradients(x, grad_output, torch.tensor([1]), torch.tensor([0]), block_size=1)
        tensor([[[4.]]])
    """
    g = _blocked(grad_output.reshape(-1, grad_output.shape[-1]), block_size)[:, rows.long()]
    return torch.einsum("min,mik->ink", g, _blocked(x.reshape(-1, x.shape[-1]), block_size)[:, cols.long()])


def compact_blocks(tensors: Sequence[Tensor], pattern, rows: Tensor, cols: Tensor, new_pattern) -> list[Tensor]:
    """Element (i, j) of each new matrix is element (rows[i], cols[j]) of the old: [new num_blocks, b, b] each.

    Example:
        >>> import torch, sparsenet as sn
        >>> old = sn.BlockPattern([0, 1, 2], [1, 0], shape=(8, 8), block_size=4)
        >>> new = sn.BlockPattern([0, 1], [0], shape=(4, 4), block_size=4)
        >>> values = torch.arange(32.0).reshape(2, 4, 4)
        >>> sn.reference.compact_blocks([values], old, torch.arange(4), torch.arange(4, 8), new)[0].equal(values[:1])
        True
    """
    b = pattern.block_size
    inside = torch.arange(b)
    i = new_pattern.row_indices.long()[:, None, None] * b + inside[:, None]  # [new num_blocks, b, 1]
    j = new_pattern.col_indices.long()[:, None, None] * b + inside  # [new num_blocks, 1, b]
    exists = (i < new_pattern.shape[0]) & (j < new_pattern.shape[1])
    # one more entry for what lies outside the new matrix
    r, c = (F.pad(t.long(), (0, 1))[k.clamp(max=len(t))] for t, k in ((rows, i), (cols, j)))
    places = pattern.row_indices.long() * pattern.block_cols + pattern.col_indices.long()  # ascending
    wanted = r // b * pattern.block_cols + c // b
    block = torch.searchsorted(places, wanted).clamp(max=max(len(places) - 1, 0))
    if not len(places):
        return [t.new_zeros(new_pattern.num_blocks, b, b) for t in tensors]
    exists = exists & (places[block] == wanted)
    return [torch.where(exists, t[block, r % b, c % b], torch.zeros((), dtype=t.dtype)) for t in tensors]
