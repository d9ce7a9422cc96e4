"""A trained 2:4 layer in torch's own semi-structured format, which its tensor-core kernels multiply."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

__all__ = ["to_semi_structured"]


def to_semi_structured(layer: Any) -> nn.Linear:
    """An ``nn.Linear`` whose weight is torch's ``SparseSemiStructuredTensor``: half the bytes, for inference.

    Args:
        layer: a :class:`sparsenet.SparseLinear` whose rule implies 2:4, such as 2:4, 1:4 or 1:2, in float16 or bfloat16
            on a CUDA device. Blocks that are not stored become zeros. A fused activation is not part of the result.

    Raises:
        ValueError: no such rule, dtype, size or device: the message says which.

    Example:
        >>> import sparsenet as sn
        >>> layer = sn.SparseLinear(128, 64, density=0.5, block_size=16, element_mask="2:4")
        >>> sn.elements.to_semi_structured(layer)
        Traceback (most recent call last):
        ValueError: to_semi_structured: layer must be float16 or bfloat16, got torch.float32
    """
    rule, dtype = layer.elements, layer.values.dtype
    if rule is None or _most_in_four(rule.n, rule.m) > 2:
        raise ValueError(f"to_semi_structured: layer must follow a rule that implies 2:4, got {rule or 'none'}")
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"to_semi_structured: layer must be float16 or bfloat16, got {dtype}")
    rows, columns = _multiples(dtype)
    if layer.out_features % rows or layer.in_features % columns or not layer.out_features or not layer.in_features:
        raise ValueError(
            f"to_semi_structured: layer must have a multiple of {rows} outputs and of {columns} inputs, got "
            f"{layer.out_features} and {layer.in_features}"
        )
    device = layer.values.device
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        raise ValueError(f"to_semi_structured: layer must be on a CUDA device of capability 8.0 or more, got {device}")
    linear = layer.to_linear()
    weight = torch.sparse.to_sparse_semi_structured(linear.weight.detach().contiguous())
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _most_in_four(n: int, m: int) -> int:
    """The most elements that a group of four can have under n:m; groups are counted from 0."""
    if m == 2:
        return 2 * n
    return min(n, 4)  # m is 4 or a multiple of it, as it divides a block size


def _multiples(dtype: torch.dtype) -> tuple[int, int]:
    """Of which outputs and inputs must be multiples, in the format that torch would make here."""
    formats = torch.sparse.SparseSemiStructuredTensorCUTLASS, torch.sparse.SparseSemiStructuredTensorCUSPARSELT
    taken = formats[0] if torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS else formats[1]
    sizes = taken._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return sizes.sparse_min_rows, sizes.sparse_min_cols
