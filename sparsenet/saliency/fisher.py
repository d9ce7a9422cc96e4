"""First order and diagonal or block-diagonal second order: one pass over a layer's operands."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsenet import functional
from sparsenet.functional.checks import as_tensor
from sparsenet.pattern import BlockPattern

__all__ = ["WORKSPACE_BYTES", "block_fisher", "diagonal_fisher", "first_order", "obd_saliency"]

WORKSPACE_BYTES = 32 << 20  # of the temporary tensors of one saliency, beyond those as large as the values


def first_order(x: Tensor, grad_output: Tensor, values: Tensor, pattern: BlockPattern) -> Tensor:
    """The first-order term of each block's loss: the sum over its weights of weight times gradient.

    Zeroing the block changes the loss by minus this, to first order (Mozer & Smolensky, 1989).

    Args:
        x: [rows, in]. grad_output: [rows, out], of the layer's output before the activation.
        values: [num_blocks, b, b] on ``pattern``.

    Returns:
        [num_blocks], float32 (float64 for float64 operands).

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.saliency import first_order
        >>> pattern = sn.BlockPattern([0, 1], [0], shape=(1, 2), block_size=1)   # one weight: the first
        >>> first_order(torch.tensor([[3.0, 1.0]]), torch.tensor([[2.0]]), torch.tensor([[[5.0]]]), pattern)   # 5 (2 3)
        tensor([30.])
    """
    x, grad_output = operands("first_order", x, grad_output, pattern, values)
    gradient = _gradient(x, grad_output, pattern)
    return gradient.mul_(values.detach().to(gradient)).flatten(1).sum(1)


def diagonal_fisher(x: Tensor, grad_output: Tensor, pattern: BlockPattern) -> Tensor:
    """Mean over the rows of the squared gradient of each active weight.

    The gradient of one row of a linear layer is ``delta_i x_j``, so that the mean of its square is
    ``(delta^2).T @ (x^2) / rows``: the product that gives a layer's gradient, of squared operands.

    Args:
        x: [rows, in]. grad_output: [rows, out], of a loss that is a mean over the rows, before the activation.

    Returns:
        [num_blocks, b, b], float32 (float64 for float64 operands); the part outside the matrix is zero. With targets
        drawn from the model (:func:`sparsenet.saliency.sampled_loss`) it estimates the diagonal of the Gauss-Newton
        matrix, with those of the data the empirical Fisher.

    Raises:
        ValueError: shapes do not fit, or there is no row.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.saliency import diagonal_fisher
        >>> pattern = sn.BlockPattern([0, 1], [1], shape=(1, 2), block_size=1)   # one weight: the second
        >>> x, grad_output = torch.tensor([[1.0, 2.0], [1.0, 0.0]]), torch.tensor([[0.5], [1.0]])
        >>> diagonal_fisher(x, grad_output, pattern)   # gradients of the two rows: 2 and 0
        tensor([[[2.]]])
    """
    x, grad_output = operands("diagonal_fisher", x, grad_output, pattern)
    return _gradient(x.square(), (grad_output * len(x)).square_(), pattern).div_(len(x))


def obd_saliency(x: Tensor, grad_output: Tensor, values: Tensor, pattern: BlockPattern) -> Tensor:
    """Half the sum over each block of h w^2, with h of :func:`diagonal_fisher`: Optimal Brain Damage.

    LeCun, Denker & Solla (1989): the change of the loss at a minimum, as if no two weights depended on each other.

    Args:
        x: [rows, in]. grad_output: [rows, out]. values: [num_blocks, b, b] on ``pattern``.

    Returns:
        [num_blocks], float32 (float64 for float64 operands).

    Raises:
        ValueError: shapes do not fit, or there is no row.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.saliency import obd_saliency
        >>> pattern = sn.BlockPattern([0, 1], [1], shape=(1, 2), block_size=1)
        >>> x, grad_output = torch.tensor([[1.0, 2.0], [1.0, 0.0]]), torch.tensor([[0.5], [1.0]])
        >>> obd_saliency(x, grad_output, torch.tensor([[[3.0]]]), pattern)   # 2 (3^2) / 2
        tensor([9.])
    """
    operands("obd_saliency", x, grad_output, pattern, values)
    fisher = diagonal_fisher(x, grad_output, pattern)
    return fisher.mul_(values.detach().to(fisher).square()).flatten(1).sum(1).div_(2)


def block_fisher(x: Tensor, grad_output: Tensor, values: Tensor, pattern: BlockPattern) -> Tensor:
    """Half the mean over the rows of (the sum over a block of gradient times weight) squared.

    This is ``w' F w / 2`` for each block and its own square block of the Fisher matrix F, which is never formed: the
    change of the loss when the whole block goes, what its weights do to one another included.

    Args:
        x: [rows, in]. grad_output: [rows, out], of a loss that is a mean over the rows, before the activation.
        values: [num_blocks, b, b] on ``pattern``.

    Returns:
        [num_blocks], float32 (float64 for float64 operands). Temporary tensors take at most ``WORKSPACE_BYTES``, or
        what one block and 1024 rows need.

    Raises:
        ValueError: shapes do not fit, or there is no row.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.saliency import block_fisher
        >>> pattern = sn.BlockPattern([0, 1], [0], shape=(4, 4), block_size=4)
        >>> x, grad_output = torch.eye(4), torch.eye(4) / 4   # row n: the gradient is 1 at (n, n)
        >>> block_fisher(x, grad_output, 2 * torch.eye(4).reshape(1, 4, 4), pattern)   # mean of 2^2, halved
        tensor([2.])
    """
    x, grad_output = operands("block_fisher", x, grad_output, pattern, values)
    rows, b = len(x), pattern.block_size
    if b == 1:
        return obd_saliency(x, grad_output, values, pattern)
    total = x.new_zeros(pattern.num_blocks)
    for begin in range(0, rows, 1024):
        inputs = by_block(x[begin : begin + 1024], pattern.block_cols, b)  # [block columns, b, rows]
        gradients = by_block(grad_output[begin : begin + 1024] * rows, pattern.block_rows, b)
        step = max(1, WORKSPACE_BYTES // (4 * inputs[0].nbytes + 1))
        for first in range(0, pattern.num_blocks, step):
            part = slice(first, first + step)
            passed = values.detach()[part].to(x) @ inputs[pattern.col_indices[part].long()]
            passed *= gradients[pattern.row_indices[part].long()]
            total[part] += passed.sum(1).square_().sum(1)
    return total.div_(2 * rows)


# --- pieces ---------------------------------------------------------------------------------------------------------


def operands(
    name: str, x: Tensor, grad_output: Tensor, pattern: BlockPattern, values: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Both, checked, in float32 or float64."""
    x, grad_output = as_tensor(name, "x", x).detach(), as_tensor(name, "grad_output", grad_output).detach()
    out_features, in_features = pattern.shape
    for label, t, features in (("x", x, in_features), ("grad_output", grad_output, out_features)):
        if t.dim() != 2 or t.shape[1] != features:
            raise ValueError(f"{name}: {label} must have shape [rows, {features}], got {list(t.shape)}")
    if len(x) != len(grad_output) or not len(x):
        raise ValueError(
            f"{name}: x and grad_output must have the same rows, at least one, got {len(x)} and {len(grad_output)}"
        )
    if values is not None and tuple(values.shape) != pattern.values_shape:
        raise ValueError(f"{name}: values must have shape {list(pattern.values_shape)}, got {list(values.shape)}")
    dtype = torch.float64 if torch.float64 in (x.dtype, grad_output.dtype) else torch.float32
    return x.to(dtype), grad_output.to(dtype)


def by_block(t: Tensor, blocks: int, b: int) -> Tensor:
    """[rows, features] as [blocks, b, rows], zero outside the matrix."""
    padded = torch.nn.functional.pad(t, (0, blocks * b - t.shape[1]))
    return padded.T.reshape(blocks, b, len(t))


def _gradient(x: Tensor, grad_output: Tensor, pattern: BlockPattern) -> Tensor:
    """[num_blocks, b, b]: ``grad_output.T @ x`` at the active blocks."""
    rows, cols = pattern.row_indices, pattern.col_indices
    return functional.candidate_gradients(x, grad_output, rows, cols, pattern.block_size)
