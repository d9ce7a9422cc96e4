"""What compaction asks of weights, dense or block-sparse: which inputs they read, and what constants do to outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsenet.functional.blocks import zero_outside
from sparsenet.layers import SparseLinear

__all__ = ["BlockWeights", "DenseWeights", "UnitWeights", "unit_weights"]


def unit_weights(module: nn.Module) -> UnitWeights | None:
    """The weights of a linear layer or convolution that can lose rows and columns; None for any other module."""
    if isinstance(module, SparseLinear) and type(module).forward is SparseLinear.forward:
        return BlockWeights(module)
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return DenseWeights(module, -1)
    for kind, dim in ((nn.Conv1d, -2), (nn.Conv2d, -3), (nn.Conv3d, -4)):
        if isinstance(module, kind) and type(module).forward is kind.forward:
            per_channel = module.groups == module.in_channels == module.out_channels and module.groups > 1
            return DenseWeights(module, dim, per_channel) if module.groups == 1 or per_channel else None
    return None


@dataclass(frozen=True)
class DenseWeights:
    """``weight`` [rows, columns, *kernel] of an ``nn.Linear`` or convolution.

    Attributes:
        module: whose weights they are.
        channel_dim: where the channels of its input and output are, counted from the end.
        per_channel: a depthwise convolution: row i reads column i only.
    """

    module: nn.Linear | nn.modules.conv._ConvNd
    channel_dim: int
    per_channel: bool = False

    @property
    def ndim(self) -> int | None:
        """Dimensions of input and output (batched), where fixed."""
        return 1 - self.channel_dim if self.channel_dim < -1 else None

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.module.weight.shape[0]

    @property
    def columns(self) -> int:
        """Inputs."""
        return self.rows if self.per_channel else self.module.weight.shape[1]

    @property
    def folds(self) -> bool:
        """Whether constant inputs can move into the bias: there is one, and no zero padding cuts sums at borders."""
        return self.module.bias is not None and not self._zero_padded

    @property
    def _zero_padded(self) -> bool:
        padding = getattr(self.module, "padding", 0)
        if padding == "valid" or getattr(self.module, "padding_mode", "zeros") != "zeros":
            return False
        return padding == "same" or any(torch.as_tensor(padding).reshape(-1).tolist())

    def _absent(self) -> Tensor:
        """Bool [rows, columns]: where a zero says that there is no connection."""
        absent = self.module.weight.detach() == 0
        return (absent.flatten(2).all(2) if absent.dim() > 2 else absent).cpu()

    def constant_rows(self, constant: Tensor, zeros: bool) -> Tensor:
        """float64 [rows]: outputs that never change, given the inputs' constants [columns]; NaN: variable."""
        varies = constant.isnan() | ((constant != 0) & torch.tensor(self._zero_padded))
        fixed = ~varies if self.per_channel else (~varies).all().expand(self.rows)
        if zeros:
            fixed = self._absent().flatten() | ~varies if self.per_channel else (self._absent() | ~varies).all(1)
        if not fixed.any():
            return torch.full((self.rows,), math.nan, dtype=torch.float64)
        value = self.contribution(torch.where(varies, 0.0, constant))
        if self.module.bias is not None:
            value = value + self.module.bias.detach().double().cpu()
        return torch.where(fixed, value, math.nan)

    def needed_columns(self, rows: Tensor, constant: Tensor, zeros: bool) -> Tensor:
        """Bool [columns]: inputs that the outputs ``rows`` (bool) read and that cannot move into the bias."""
        if self.per_channel:
            return torch.zeros(self.columns, dtype=torch.bool)
        replaceable = (constant == 0) | (~constant.isnan() if self.folds else False)
        return (~self._absent()[rows].all(0) if zeros else rows.any()) & ~replaceable

    def of(self, module: nn.Module) -> DenseWeights:
        """The same kind of weights of another module."""
        return DenseWeights(module, self.channel_dim, self.per_channel)

    def contribution(self, constant: Tensor) -> Tensor:
        """float64 [rows]: what inputs of these constant values add to each output."""
        weight = self.module.weight.detach()
        columns = constant.nonzero().flatten().to(weight.device)
        if not len(columns):
            return torch.zeros(self.rows, dtype=torch.float64)
        if self.per_channel:
            return constant * weight.flatten(1).double().sum(1).cpu()
        part = weight.index_select(1, columns).double()
        part = part.flatten(2).sum(2) if part.dim() > 2 else part
        return (part @ constant.to(weight.device)[columns]).cpu()


@dataclass(frozen=True)
class BlockWeights:
    """The values of a :class:`SparseLinear`, with its fused activation."""

    module: SparseLinear
    channel_dim = -1
    per_channel = False
    ndim = None

    @property
    def rows(self) -> int:
        """Outputs."""
        return self.module.out_features

    @property
    def columns(self) -> int:
        """Inputs."""
        return self.module.in_features

    @property
    def folds(self) -> bool:
        """Whether a constant input can move into the bias."""
        return self.module.bias is not None

    def _present(self, zeros: bool) -> Tensor:
        """Bool [num_blocks, b, b]: where there is a connection."""
        layer = self.module
        present = layer.values.detach() != 0 if zeros else torch.ones_like(layer.values, dtype=torch.bool)
        if layer.element_mask is not None:
            present &= layer.element_mask
        zero_outside(present, layer.pattern)
        return present

    def _per_block(self, values: Tensor, block_index: Tensor) -> Tensor:
        """``values`` [n] of rows or columns as [num_blocks, b], zero outside the matrix."""
        b = self.module.block_size
        return nn.functional.pad(values, (0, -len(values) % b)).reshape(-1, b)[block_index]

    def _any(self, hit: Tensor, block_index: Tensor, n: int) -> Tensor:
        """Bool [n]: whether any block has a hit [num_blocks, b] at that row or column."""
        b = self.module.block_size
        out = torch.zeros(-(-n // b), b, dtype=torch.int32, device=hit.device)
        return out.index_add_(0, block_index, hit.int()).flatten()[:n] > 0

    def _index(self) -> tuple[Tensor, Tensor]:
        pattern = self.module.pattern
        return pattern.row_indices.long(), pattern.col.long()

    def line_squares(self, rows: bool) -> Tensor:
        """float64 [rows] (or [columns]): sums of squares."""
        b, (row, col) = self.module.block_size, self._index()
        squares = self.module.values.detach().double().square().sum(2 if rows else 1)
        n, index = (self.rows, row) if rows else (self.columns, col)
        out = torch.zeros(-(-n // b), b, dtype=torch.float64, device=squares.device)
        return out.index_add_(0, index, squares).flatten()[:n].cpu()

    def constant_rows(self, constant: Tensor, zeros: bool) -> Tensor:
        """float64 [rows]: outputs, after the fused activation, that never change; NaN: variable."""
        row, col = self._index()
        varies = self._per_block(constant.isnan().to(row.device), col)
        varying = self._any((self._present(zeros) & varies.unsqueeze(1)).any(2), row, self.rows).cpu()
        if varying.all():
            return torch.full((self.rows,), math.nan, dtype=torch.float64)
        value = self.contribution(constant.nan_to_num(0.0))
        if self.module.bias is not None:
            value = value + self.module.bias.detach().double().cpu()
        act = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu}.get(self.module.activation)
        if act is not None:
            value = act(value.to(self.module.values.dtype)).double()
        return torch.where(varying, math.nan, value)

    def needed_columns(self, rows: Tensor, constant: Tensor, zeros: bool) -> Tensor:
        """Bool [columns]: inputs that the outputs ``rows`` (bool) read and that cannot move into the bias."""
        row, col = self._index()
        read = (self._present(zeros) & self._per_block(rows.to(row.device), row).unsqueeze(2)).any(1)
        replaceable = (constant == 0) | (~constant.isnan() if self.folds else False)
        return self._any(read, col, self.columns).cpu() & ~replaceable

    def of(self, module: nn.Module) -> BlockWeights:
        """The same kind of weights of another module."""
        return BlockWeights(module)

    def contribution(self, constant: Tensor) -> Tensor:
        """float64 [rows]: what inputs of these constant values add to each output."""
        row, col = self._index()
        b = self.module.block_size
        given = self._per_block(constant.to(row.device), col)
        hit = given.any(1).nonzero().flatten()
        values = self.module.values.detach()[hit]
        if self.module.element_mask is not None:
            values = values * self.module.element_mask[hit]
        out = torch.zeros(self.module.pattern.block_rows, b, dtype=torch.float64, device=row.device)
        out.index_add_(0, row[hit], (values.double() * given[hit].unsqueeze(1)).sum(2))
        return out.flatten()[: self.rows].cpu()


UnitWeights = DenseWeights | BlockWeights
