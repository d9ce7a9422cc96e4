"""The operations in plain PyTorch: the specification, the oracle of the tests, and differentiable twice.

Same signatures and results as :mod:`sparsenet.functional`, any device and dtype, no native code. Each function reads of
``pattern`` only ``shape``, ``block_size``, ``row_indices`` and ``col_indices``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["block_gradient_squared_norms", "block_sparse_linear", "candidate_gradients"]

ACTIVATIONS = {"none": lambda z: z, "relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def _blocked(x: Tensor, block_size: int) -> Tensor:
    """[M, n] -> [M, ceil(n / b), b], padded with zeros."""
    blocks = -(-x.shape[1] // block_size)
    return F.pad(x, (0, blocks * block_size - x.shape[1])).reshape(x.shape[0], blocks, block_size)


def block_sparse_linear(
    x: Tensor, values: Tensor, pattern, bias: Tensor | None = None, activation: str = "none"
) -> Tensor:
    """``activation(x @ W.T + bias)`` with W given by its active blocks. x [..., in] -> [..., out]."""
    out_features, in_features = pattern.shape
    b = pattern.block_size
    flat = x.reshape(-1, in_features)
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


def block_gradient_squared_norms(x: Tensor, grad_output: Tensor, block_size: int) -> Tensor:
    """Squared Frobenius norm of every block of ``grad_output.T @ x``: [ceil(out / b), ceil(in / b)], float32."""
    gradient = torch.einsum(
        "mrn,msk->rsnk",
        _blocked(grad_output.reshape(-1, grad_output.shape[-1]), block_size),
        _blocked(x.reshape(-1, x.shape[-1]), block_size),
    )
    return gradient.square().sum((2, 3)).float()


def candidate_gradients(x: Tensor, grad_output: Tensor, rows: Tensor, cols: Tensor, block_size: int) -> Tensor:
    """Blocks (rows[i], cols[i]) of ``grad_output.T @ x``: [len(rows), b, b]."""
    g = _blocked(grad_output.reshape(-1, grad_output.shape[-1]), block_size)[:, rows.long()]
    return torch.einsum("min,mik->ink", g, _blocked(x.reshape(-1, x.shape[-1]), block_size)[:, cols.long()])
