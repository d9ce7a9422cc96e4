"""Optimal Brain Surgeon on small groups of weights: which blocks go, and what the weights that stay do about it.

The Fisher matrix of a layer is cut into square pieces: one for every ``SIZE`` or so consecutive active weights of one
output row, whole blocks' columns. For those weights it is the mean over rows of ``delta^2 x x'``. With its inverse
(Hassibi & Stork, 1993, for single weights; Kurtic et al., 2022, for blocks) removing the weights Q changes the loss by
``w_Q' ([F^-1]_QQ)^-1 w_Q / 2``, and the weights of the group that stay make up for it as well as they can. Empirical
Fisher pieces in place of the Hessian: WoodFisher (Singh & Alistarh, 2020). Blocks of a group go one after the other,
and each is judged by the loss summed so far: CAP (Kuznedelev et al., 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsenet.functional.checks import as_tensor
from sparsenet.pattern import BlockPattern
from sparsenet.saliency.fisher import WORKSPACE_BYTES, by_block, diagonal_fisher, operands
from sparsenet.schedules import as_number

__all__ = ["DAMP", "SIZE", "woodfisher_saliency", "woodfisher_update"]

SIZE = 48  # weights of a group; two blocks of 32, and one block where blocks are larger
DAMP = 1e-2  # added to the diagonal, as a share of the layer's mean
_ROWS = 256  # whose products are summed at a time


def woodfisher_saliency(
    x: Tensor,
    grad_output: Tensor,
    values: Tensor,
    pattern: BlockPattern,
    *,
    damp: float = DAMP,
    eligible: Tensor | None = None,
    element_mask: Tensor | None = None,
) -> Tensor:
    """The loss by the time each block has gone, as the blocks of its group go one after the other, the cheapest first.

    Args:
        x: [rows, in]. grad_output: [rows, out], of a loss that is a mean over the rows, before the activation.
        values: [num_blocks, b, b] on ``pattern``.
        damp: added to the diagonal of the Fisher matrix, as a share of the layer's mean diagonal.
        eligible: bool [num_blocks], the blocks that may go; the others get inf, and groups without any cost nothing.
        element_mask: bool [num_blocks, b, b]; elements where it is False are not there.

    Returns:
        [num_blocks], float32 (float64 for float64 operands). Temporary tensors take about four times
        ``WORKSPACE_BYTES``, or what one group needs, beyond those as large as the values.

    Raises:
        ValueError: shapes do not fit, no row, or ``damp`` is not positive.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.saliency import woodfisher_saliency
        >>> pattern = sn.BlockPattern([0, 2], [0, 1], shape=(1, 2), block_size=1)
        >>> x, values = torch.tensor([[1.0, 1.0], [1.0, 1.0001]]), torch.tensor([1.0, 2.0]).reshape(2, 1, 1)
        >>> first, both = woodfisher_saliency(x, torch.ones(2, 1) / 2, values, pattern).tolist()
        >>> first < 0.01, both > 4.4   # the second input stands in for the first; without both, (1 + 2)^2 / 2 is lost
        (True, True)
    """
    x, grad_output = operands("woodfisher_saliency", x, grad_output, pattern, values)
    eligible = _checked(pattern, "woodfisher_saliency", "eligible", eligible)
    groups = _Groups(x, grad_output, values, pattern, damp, element_mask)
    losses = torch.full((pattern.num_blocks,), torch.inf, dtype=torch.float64, device=x.device)
    if not groups.ridge > 0.0:  # no gradient anywhere, or NaN
        return losses.fill_(groups.ridge).to(x.dtype)
    for piece in groups.pieces(eligible):
        open_ = piece.there & eligible[piece.blocks]
        losses[piece.blocks[open_]] = _eliminate(piece, open_)[open_]
    return losses.to(x.dtype)


def woodfisher_update(
    x: Tensor,
    grad_output: Tensor,
    values: Tensor,
    pattern: BlockPattern,
    dropped: Tensor,
    *,
    damp: float = DAMP,
    element_mask: Tensor | None = None,
) -> Tensor:
    """What the weights that stay become when the ``dropped`` blocks go: the update of Optimal Brain Surgeon.

    In every group the weights K that stay move by ``[F_KK]^-1 F_KQ w_Q``, which is where the quadratic model of the
    loss is lowest once the weights Q are zero.

    Args:
        dropped: int64 [n], numbers of blocks. The other arguments are those of :func:`woodfisher_saliency`.

    Returns:
        [num_blocks, b, b], dtype of ``values``; dropped blocks, and groups that lose none, are as they were.

    Raises:
        ValueError: shapes do not fit, no row, or ``damp`` is not positive.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.saliency import woodfisher_update
        >>> pattern = sn.BlockPattern([0, 2], [0, 1], shape=(1, 2), block_size=1)
        >>> x, values = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.tensor([1.0, 2.0]).reshape(2, 1, 1)
        >>> after = woodfisher_update(x, torch.ones(2, 1) / 2, values, pattern, torch.tensor([0]), damp=1e-9)
        >>> round(float(after[1]), 4)   # the second input is the first: its weight takes over
        3.0
    """
    x, grad_output = operands("woodfisher_update", x, grad_output, pattern, values)
    leaves = torch.zeros(pattern.num_blocks, dtype=torch.bool, device=x.device)
    leaves[dropped] = True
    groups = _Groups(x, grad_output, values, pattern, damp, element_mask)
    after = values.detach().clone()
    if not groups.ridge > 0.0:
        return after
    for piece in groups.pieces(leaves):
        gone = piece.there & leaves[piece.blocks]
        stays = piece.there & ~gone
        after[piece.blocks[stays]] = piece.by_block(_made_up(piece, gone))[stays].to(after.dtype)
    return after


# --- groups ---------------------------------------------------------------------------------------------------------


@dataclass
class _Piece:
    """Some groups: k blocks of a row of blocks each, with one Fisher matrix for each of the b rows; m = k b.

    Attributes:
        blocks: int64 [groups, k]; where a group has fewer, 0. there: bool [groups, k].
        weights: [groups, b, m]. fisher: [groups, b, m, m], damped.
    """

    blocks: Tensor
    there: Tensor
    weights: Tensor
    fisher: Tensor

    def by_block(self, weights: Tensor) -> Tensor:
        """[groups, b, m] as [groups, k, b, b]."""
        groups, b, m = weights.shape
        return weights.reshape(groups, b, m // b, b).transpose(1, 2)


class _Groups:
    """The groups of a layer. ``ridge``: what the diagonal is damped with; zero or NaN where there is no gradient."""

    def __init__(
        self,
        x: Tensor,
        grad_output: Tensor,
        values: Tensor,
        pattern: BlockPattern,
        damp: float,
        element_mask: Tensor | None,
    ):
        if not as_number("woodfisher", "damp", damp) > 0.0:
            raise ValueError(f"woodfisher: damp must be positive, got {damp}")
        b = self.b = pattern.block_size
        self.pattern, self.values, self.mask, self.rows = pattern, values.detach(), element_mask, len(x)
        self.inputs = by_block(x, pattern.block_cols, b)  # [block columns, b, rows]
        self.gradients = by_block(grad_output * self.rows, pattern.block_rows, b)
        self.ridge = damp * float(diagonal_fisher(x, grad_output, pattern).mean()) if pattern.num_blocks else 0.0
        per_group = max(1, SIZE // b) if b != 32 else 2
        crow = pattern.crow.long()
        counts = (crow.diff() + per_group - 1) // per_group
        row = pattern.row_indices.long()
        number = torch.arange(pattern.num_blocks, device=row.device) - crow[row]
        first = counts.cumsum(0) - counts
        self.group_of = first[row] + number // per_group
        self.blocks = torch.full((int(counts.sum()), per_group), -1, dtype=torch.int64, device=row.device)
        self.blocks[self.group_of, number % per_group] = torch.arange(pattern.num_blocks, device=row.device)

    def pieces(self, chosen: Tensor) -> Iterator[_Piece]:
        """The groups that hold one of the ``chosen`` blocks (bool [num_blocks]), as many at a time as fit."""
        wanted = self.blocks[self.group_of[chosen].unique()]
        b, m = self.b, self.blocks.shape[1] * self.b
        each = b * m * (min(self.rows, _ROWS) + 4 * m) * 8
        for blocks in wanted.split(max(1, WORKSPACE_BYTES // each)):
            yield self._piece(blocks)

    def _piece(self, blocks: Tensor) -> _Piece:
        pattern, b = self.pattern, self.b
        there, blocks = blocks >= 0, blocks.clamp(min=0)
        groups, k = blocks.shape
        m = k * b
        inputs = self.inputs[pattern.col_indices.long()[blocks]].double()  # [groups, k, b, rows]
        inputs = (inputs * there[:, :, None, None]).reshape(groups, 1, m, self.rows)
        gradients = self.gradients[pattern.row_indices.long()[blocks[:, 0]]].double().unsqueeze(2)
        fisher = inputs.new_zeros(groups, b, m, m)
        for begin in range(0, self.rows, _ROWS):
            part = slice(begin, begin + _ROWS)
            products = inputs[..., part] * gradients[..., part]  # [groups, b, m, some rows]
            fisher += products @ products.mT
        fisher /= self.rows
        weights = (self.values[blocks].double() * there[:, :, None, None]).transpose(1, 2).reshape(groups, b, m)
        if self.mask is not None:
            kept = self.mask[blocks].transpose(1, 2).reshape(groups, b, m).double()
            fisher *= kept.unsqueeze(3) * kept.unsqueeze(2)
            weights = weights * kept
        fisher.diagonal(dim1=-2, dim2=-1).add_(self.ridge)
        return _Piece(blocks, there, weights, fisher)


def _eliminate(piece: _Piece, open_: Tensor) -> Tensor:
    """float64 [groups, k]: the loss summed up to and with each open block, taken greedily; inf for the others."""
    (groups, k), (b, m) = open_.shape, piece.weights.shape[1:]
    if k == 1:  # nothing else of the group stays
        loss = (piece.weights.unsqueeze(2) @ piece.fisher @ piece.weights.unsqueeze(3)).sum((1, 2, 3)) / 2
        return loss.unsqueeze(1)
    root = _inverse_root(piece.fisher)
    inverse = root.mT @ root
    weights, open_ = piece.weights.clone(), open_.clone()
    losses = inverse.new_full((groups, k), torch.inf)
    total = inverse.new_zeros(groups)
    every, unit = torch.arange(groups, device=open_.device), torch.eye(b, dtype=inverse.dtype, device=open_.device)
    for _ in range(int(open_.sum(1).max())):
        own = inverse.view(groups, b, k, b, k, b).diagonal(dim1=2, dim2=4).permute(0, 1, 4, 2, 3)
        own = torch.where(open_[:, None, :, None, None], own, unit)  # [groups, b, k, b, b]; gone blocks have zeros
        root = _inverse_root(own)  # [F^-1]_QQ ^ -1 = root' root
        reduced = root @ weights.view(groups, b, k, b, 1)
        cost = (reduced.square().sum((1, 3, 4)) / 2).masked_fill_(~open_, torch.inf)
        best, block = cost.min(1)
        goes = best.isfinite()
        total += torch.where(goes, best, 0.0)
        losses[every[goes], block[goes]] = total[goes]
        columns = inverse.view(groups, b, m, k, b)[every, :, :, block] * goes[:, None, None, None]  # [groups, b, m, b]
        columns = columns @ root[every, :, block].mT
        weights -= (columns @ reduced[every, :, block]).squeeze(3)
        inverse -= columns @ columns.mT
        open_[every[goes], block[goes]] = False
    return losses


def _inverse_root(matrices: Tensor) -> Tensor:
    """R with ``R' R`` the inverse of each of the positive definite ``matrices`` [..., n, n]."""
    if matrices.shape[-1] == 1:
        return matrices.rsqrt()
    lower, failed = torch.linalg.cholesky_ex(matrices)
    if bool(failed.any()):
        raise ValueError("woodfisher: damp must be large enough for an inverse to exist, got one that is too small")
    unit = torch.eye(matrices.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    return torch.linalg.solve_triangular(lower, unit, upper=False)


def _made_up(piece: _Piece, gone: Tensor) -> Tensor:
    """float64 [groups, b, m]: the weights after those ``gone`` (bool [groups, k]) are zero and the others made up."""
    m = piece.weights.shape[2]
    leaves = gone.repeat_interleave(m // gone.shape[1], 1).unsqueeze(1).double()  # [groups, 1, m]
    stays = 1.0 - leaves
    pull = (piece.fisher @ (piece.weights * leaves).unsqueeze(3)).squeeze(3) * stays
    fisher = piece.fisher * (stays.unsqueeze(3) * stays.unsqueeze(2))
    fisher.diagonal(dim1=-2, dim2=-1).add_(leaves)
    root = _inverse_root(fisher)
    moved = (root.mT @ (root @ pull.unsqueeze(3))).squeeze(3)
    return (piece.weights + moved) * stays


def _checked(pattern: BlockPattern, name: str, label: str, chosen: Tensor | None) -> Tensor:
    """Bool [num_blocks]; all where None."""
    if chosen is None:
        return torch.ones(pattern.num_blocks, dtype=torch.bool, device=pattern.device)
    chosen = as_tensor(name, label, chosen)
    if chosen.dtype != torch.bool or chosen.shape != (pattern.num_blocks,):
        raise ValueError(
            f"{name}: {label} must be bool [{pattern.num_blocks}], got {chosen.dtype} {list(chosen.shape)}"
        )
    return chosen
