"""Products of two layers' weights, dense, convolutional or block-sparse: what they cost, and putting one in place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from sparsenet.layers import SparseLinear
from sparsenet.pattern import BlockPattern
from sparsenet.topology import replace_data

__all__ = ["FoldedWeight", "fold_weights", "replace_parameter"]

Conv = nn.modules.conv._ConvNd


@dataclass
class FoldedWeight:
    """A product that could be put in place.

    Attributes:
        before, elements: weights of the two factors, and of the product: memory and work per input both follow them.
        install: ``install(first, second)`` makes the product and returns the layer to stand for ``second``.
        fresh: parameters whose moments mean nothing any more, known after installing.
    """

    before: int
    elements: int
    install: Callable[[nn.Module, nn.Module], nn.Module]
    fresh: list[nn.Parameter] = field(default_factory=list)


def fold_weights(first: nn.Module, second: nn.Module, factor: Tensor | None) -> FoldedWeight | str:
    """The product of two layers with ``factor`` [n] (or ones) in between, not yet computed, or why there is none."""
    if isinstance(first, SparseLinear) and first.activation != "none":
        return f"its fused {first.activation} stands between"
    if isinstance(first, Conv) != isinstance(second, Conv):
        return "a convolution and a linear layer do not merge"
    if isinstance(first, Conv):
        return _convolutions(first, second, factor)
    if isinstance(first, SparseLinear) and isinstance(second, SparseLinear):
        return _blocks(first, second, factor)
    return _dense(first, second, factor)


def replace_parameter(parameter: nn.Parameter, data: Tensor) -> None:
    """Gives a Parameter new contents; graphs recorded before refuse their backward."""
    increment_version(parameter)
    parameter.grad = None
    replace_data(parameter, data)


def _elements(layer: nn.Module) -> int:
    return layer.values.numel() if isinstance(layer, SparseLinear) else layer.weight.numel()


def _finish(folded: FoldedWeight, first, second, merged, weight: nn.Parameter, carried: Tensor | None) -> nn.Module:
    """Biases: the second's takes what the first's becomes; without one, the first's Parameter goes on as the sum."""
    folded.fresh.append(weight)
    bias = second.bias
    if carried is not None and bias is not None:
        replace_parameter(bias, (bias.detach().double() + carried).to(bias))
    elif carried is not None:
        bias = first.bias
        folded.fresh.append(bias)
        replace_parameter(bias, carried.to(bias))
    merged.__dict__.pop("bias", None)  # a layer without bias may have a plain None there
    merged.register_parameter("bias", bias)
    return merged.train(second.training)


# --- linear ---------------------------------------------------------------------------------------------------------


def _dense(first: nn.Module, second: nn.Module, factor: Tensor | None) -> FoldedWeight:
    before = _elements(first) + _elements(second)

    def matrix(layer: nn.Module) -> Tensor:
        weight = layer.weight_dense() if isinstance(layer, SparseLinear) else layer.weight
        return weight.detach().double()

    def install(first: nn.Module, second: nn.Module) -> nn.Module:
        right = matrix(second) if factor is None else matrix(second) * factor.double()
        activation = getattr(second, "activation", "none")
        carried = None if first.bias is None else right @ first.bias.detach().double()
        weight = second.values if isinstance(second, SparseLinear) else second.weight
        merged = nn.Linear(first.in_features, second.out_features, False, device="meta")
        replace_parameter(weight, (right @ matrix(first)).to(weight.dtype))
        merged.weight = weight
        merged = _finish(folded, first, second, merged, weight, carried)
        acts = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
        return merged if activation == "none" else nn.Sequential(merged, acts[activation]()).train(second.training)

    folded = FoldedWeight(before, first.in_features * second.out_features, install)
    return folded


# --- block-sparse ---------------------------------------------------------------------------------------------------


def _blocks(first: SparseLinear, second: SparseLinear, factor: Tensor | None) -> FoldedWeight | str:
    if first.block_size != second.block_size:
        return f"block sizes {first.block_size} and {second.block_size} differ"
    if first.element_mask is not None or second.element_mask is not None:
        return "a mask inside the blocks would not survive the product"
    rows, inner, cols = _meetings(second.pattern, first.pattern)
    places = (rows * first.pattern.block_cols + cols).unique()
    b = first.block_size

    def install(first: SparseLinear, second: SparseLinear) -> nn.Module:
        scaled = second.values.detach().double()
        if factor is not None:
            padded = nn.functional.pad(factor.double(), (0, -len(factor) % b)).reshape(-1, b)
            scaled = scaled * padded[second.pattern.col_indices.long()].unsqueeze(1)
        shape = (second.out_features, first.in_features)
        wide = first.pattern.block_cols
        pattern = BlockPattern.from_places(places // wide, places % wide, shape, b)
        target = torch.searchsorted(places, rows * wide + cols)
        values = scaled.new_zeros(len(places), b, b)
        left, right = inner
        for part in torch.arange(len(target)).split(4096):
            values.index_add_(0, target[part], scaled[left[part]] @ first.values.detach()[right[part]].double())
        carried = None
        if first.bias is not None:
            bias = nn.functional.pad(first.bias.detach().double(), (0, -first.out_features % b)).reshape(-1, b)
            by_row = scaled.new_zeros(second.pattern.block_rows, b)
            products = (scaled * bias[second.pattern.col_indices.long()].unsqueeze(1)).sum(2)
            carried = by_row.index_add_(0, second.pattern.row_indices.long(), products).flatten()[: shape[0]]
        second._install(pattern.to(second.values.device), values.to(second.values.dtype), None)
        second.in_features = first.in_features
        return _finish(folded, first, second, second, second.values, carried)

    before = first.values.numel() + second.values.numel()
    folded = FoldedWeight(before, len(places) * b * b, install)
    return folded


def _meetings(left: BlockPattern, right: BlockPattern) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """All pairs of a block (r, k) of ``left`` and (k, c) of ``right``: rows r, numbers of both blocks, columns c."""
    middle = left.col_indices.long()
    counts = torch.bincount(right.row_indices.long(), minlength=right.block_rows)
    times = counts[middle]
    number = torch.arange(left.num_blocks).repeat_interleave(times)
    step = torch.arange(len(number)) - (times.cumsum(0) - times).repeat_interleave(times)
    other = right.crow_indices.long()[middle[number]] + step
    return left.row_indices.long()[number], (number, other), right.col_indices.long()[other]


# --- convolutions ---------------------------------------------------------------------------------------------------


def _convolutions(first: Conv, second: Conv, factor: Tensor | None) -> FoldedWeight | str:
    plain = first.groups == second.groups == 1 and {*first.dilation, *second.dilation} == {1}
    if type(first) is not type(second) or not plain:
        return "only convolutions of one kind without groups and dilation merge"
    if second.padding not in ("valid", (0,) * len(second.kernel_size)):
        return "zero padding between the convolutions would not survive the product"
    kernel = [a + s * (b - 1) for a, b, s in zip(first.kernel_size, second.kernel_size, first.stride, strict=True)]
    elements = first.in_channels * second.out_channels * math.prod(kernel)
    before = first.weight.numel() + second.weight.numel()

    def install(first: Conv, second: Conv) -> nn.Module:
        left = first.weight.detach().double()  # [mid, in, *k1]
        right = second.weight.detach().double()  # [out, mid, *k2]
        if factor is not None:
            right = right * factor.double().view(1, -1, *[1] * len(kernel))
        merged_weight = left.new_zeros(second.out_channels, first.in_channels, *kernel)
        for offset in torch.cartesian_prod(*(torch.arange(k) for k in second.kernel_size)).reshape(-1, len(kernel)):
            at = offset.tolist()
            tap = right[(slice(None), slice(None), *at)]  # [out, mid]
            window = tuple(slice(o * s, o * s + k) for o, s, k in zip(at, first.stride, first.kernel_size, strict=True))
            merged_weight[(slice(None), slice(None), *window)] += torch.einsum("om,mi...->oi...", tap, left)
        carried = None if first.bias is None else right.flatten(2).sum(2) @ first.bias.detach().double()
        stride = [a * b for a, b in zip(first.stride, second.stride, strict=True)]
        weight = second.weight
        options = {"padding": first.padding, "padding_mode": first.padding_mode, "bias": False, "device": "meta"}
        merged = type(second)(first.in_channels, second.out_channels, kernel, stride, **options)
        replace_parameter(weight, merged_weight.to(weight.dtype))
        merged.weight = weight
        return _finish(folded, first, second, merged, weight, carried)

    folded = FoldedWeight(before, elements, install)
    return folded
