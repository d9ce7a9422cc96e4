"""The gradient of blocks that are not there: the squared norm of every one, or a list of them whole."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsenet.functional import native
from sparsenet.functional.checks import as_tensor, check_gradient_operands
from sparsenet.functional.native import DTYPES, as_int32, matrix
from sparsenet.schedules import as_integer

__all__ = ["block_gradient_squared_norms", "candidate_gradients"]


def block_gradient_squared_norms(
    x: Tensor, grad_output: Tensor, block_size: int, block_rows: tuple[int, int] | None = None
) -> Tensor:
    """Squared Frobenius norm of every block of the dense weight gradient ``grad_output.T @ x``, which is never stored.

    Args:
        x: [..., in], the layer's input.
        grad_output: [..., out], the gradient of its output *before* the activation; dtype of x.
        block_size: 1, 4, 8, 16, 32, 64 or 128.
        block_rows: only block rows ``[begin, end)``.

    Returns:
        float32 [ceil(out / b), ceil(in / b)] (or ``end - begin`` rows). The growth score of RigL (Evci et al., 2020)
        for blocks.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices do not fit.

    Example:
        >>> import torch, sparsenet as sn
        >>> x, grad_output = torch.tensor([[1.0, 2.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0, 3.0]])
        >>> sn.functional.block_gradient_squared_norms(x, grad_output, block_size=4)   # (1 + 9) (1 + 4)
        tensor([[50.]])
    """
    name = "block_gradient_squared_norms"
    x, grad_output, block_size = check_gradient_operands(name, x, grad_output, block_size)
    total = -(-grad_output.shape[1] // block_size)
    begin, end = (0, total) if block_rows is None else (as_integer(name, "block_rows", n) for n in block_rows)
    if not 0 <= begin <= end <= total:
        raise ValueError(f"{name}: block_rows must lie in [0, {total}], got ({begin}, {end})")
    norms = torch.empty(end - begin, -(-x.shape[1] // block_size), dtype=torch.float32, device=x.device)
    if norms.numel():
        native.kernels_of(x.device).gradient_norms(
            (DTYPES[x.dtype], block_size, torch.get_num_threads()),
            matrix(x),
            matrix(grad_output),
            (begin, end),
            norms.data_ptr(),
        )
    return norms


def candidate_gradients(x: Tensor, grad_output: Tensor, rows: Tensor, cols: Tensor, block_size: int) -> Tensor:
    """Blocks ``(rows[i], cols[i])`` of the dense weight gradient ``grad_output.T @ x``, and no others.

    Args:
        x: [..., in].
        grad_output: [..., out], before the activation; dtype of x.
        rows: int [n], block rows; ``cols``: int [n], block columns.
        block_size: 1, 4, 8, 16, 32, 64 or 128.

    Returns:
        [n, b, b], dtype of x; the part outside the matrix is zero.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or indices do not fit.

    Example:
        >>> import torch, sparsenet as sn
        >>> x, grad_output = torch.randn(3, 8), torch.randn(3, 8)
        >>> rows, cols = torch.tensor([1]), torch.tensor([0])
        >>> block = sn.functional.candidate_gradients(x, grad_output, rows, cols, block_size=4)
        >>> torch.allclose(block[0], (grad_output.T @ x)[4:8, 0:4], atol=1e-5)
        True
    """
    name = "candidate_gradients"
    x, grad_output, block_size = check_gradient_operands(name, x, grad_output, block_size)
    rows, cols = as_tensor(name, "rows", rows), as_tensor(name, "cols", cols)
    places = []
    for label, index, limit in (
        ("rows", rows, -(-grad_output.shape[1] // block_size)),
        ("cols", cols, -(-x.shape[1] // block_size)),
    ):
        if index.dtype.is_floating_point or index.dtype == torch.bool or index.dtype.is_complex:
            raise TypeError(f"{name}: {label} must be integers, got {index.dtype}")
        if index.dim() != 1 or index.shape != rows.shape:
            raise ValueError(
                f"{name}: rows and cols must be lists of one length, got {list(rows.shape)}, {list(cols.shape)}"
            )
        if index.numel() and (int(index.min()) < 0 or int(index.max()) >= limit):
            raise ValueError(f"{name}: {label} must lie in [0, {limit}), got {int(index.min())} to {int(index.max())}")
        places.append(as_int32(index.to(x.device)))
    grads = torch.empty(len(places[0]), block_size, block_size, dtype=x.dtype, device=x.device)
    if grads.numel():
        native.kernels_of(x.device).candidate_gradients(
            (DTYPES[x.dtype], block_size, torch.get_num_threads()),
            matrix(x),
            matrix(grad_output),
            tuple(places),
            grads.data_ptr(),
        )
    return grads
