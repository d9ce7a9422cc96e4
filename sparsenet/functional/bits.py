"""Element masks as bits: one bit per element of a stored block, each block beginning at a byte."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

__all__ = ["UNPACKED_AT_ONCE", "mask_bytes", "pack_mask", "unpack_mask", "without_masked", "zero_masked_"]

UNPACKED_AT_ONCE = 1 << 21  # elements unpacked at a time: a byte each, so 2 MiB
_PLAIN = (Tensor, torch.nn.Parameter)
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def mask_bytes(block_size: int) -> int:
    """Bytes of one block's mask.

    Example:
        >>> from sparsenet.functional.bits import mask_bytes
        >>> mask_bytes(16), mask_bytes(1)
        (32, 1)
    """
    return (block_size * block_size + 7) // 8


def pack_mask(mask: Tensor) -> Tensor:
    """A mask as bits.

    Args:
        mask: bool [num_blocks, b, b], on any device.

    Returns:
        uint8 [num_blocks, ceil(b*b/8)]: element ``i`` of a block, counted row by row, is bit ``i % 8`` of byte
        ``i // 8``, the lowest bit being bit 0. Bits behind the last element are 0.

    Example:
        >>> import torch
        >>> from sparsenet.functional.bits import pack_mask
        >>> mask = torch.zeros(1, 4, 4, dtype=torch.bool)
        >>> mask[0, 0, 0] = mask[0, 0, 1] = mask[0, 3, 3] = True
        >>> pack_mask(mask)
        tensor([[  3, 128]], dtype=torch.uint8)
    """
    flat = mask.flatten(1) if len(mask) else mask.reshape(0, mask.shape[1] * mask.shape[2])
    if _by_numpy(mask):
        return torch.from_numpy(np.packbits(flat.numpy(), axis=1, bitorder="little"))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = torch.empty(len(mask), mask_bytes(mask.shape[1]), dtype=torch.uint8, device=mask.device)
    for some in _chunks(len(mask), mask.shape[1]):
        padded = torch.nn.functional.pad(flat[some].to(torch.uint8), (0, -flat.shape[1] % 8))
        bits[some] = (padded.unflatten(1, (-1, 8)) * weights).sum(2, dtype=torch.uint8)
    return bits


def unpack_mask(bits: Tensor, block_size: int) -> Tensor:
    """What :func:`pack_mask` was given: a fresh bool [num_blocks, b, b]. Can be traced.

    Example:
        >>> import torch
        >>> from sparsenet.functional.bits import pack_mask, unpack_mask
        >>> mask = torch.rand(5, 8, 8) < 0.5
        >>> torch.equal(unpack_mask(pack_mask(mask), 8), mask)
        True
    """
    if _by_numpy(bits):
        return torch.from_numpy(_unpacked(bits, block_size)).view(torch.bool)
    if _is_recorded(bits):
        return _unpacked_by_torch(bits, block_size)
    mask = torch.empty(len(bits), block_size, block_size, dtype=torch.bool, device=bits.device)
    for some in _chunks(len(bits), block_size):
        mask[some] = _unpacked_by_torch(bits[some], block_size)
    return mask


@torch.no_grad()
def zero_masked_(blocks: Tensor, bits: Tensor) -> Tensor:
    """Makes elements of ``blocks`` that a mask switches off exactly zero, in place: also NaN and Inf, and never -0.

    Args:
        blocks: [num_blocks, b, b], any real dtype and strides. Autograd does not notice the change, which is none to
            elements that are zero already; the others are bit for bit what they were.
        bits: uint8 [num_blocks, ceil(b*b/8)] of :func:`pack_mask`, on the device of ``blocks``.

    Returns:
        ``blocks``. Beside them at most 2 MiB are in use.

    Example:
        >>> import torch
        >>> from sparsenet.functional.bits import pack_mask, zero_masked_
        >>> mask = torch.tensor([[[True, False], [False, True]]])
        >>> zero_masked_(torch.tensor([[[1.0, torch.nan], [-2.0, 3.0]]]), pack_mask(mask))
        tensor([[[1., 0.],
                 [0., 3.]]])
    """
    watched = type(blocks) in _PLAIN and torch._C._len_torch_dispatch_stack()
    with _disable_current_modes() if watched else nullcontext():  # who counts an optimizer's memory counts that alone
        _keep(blocks.data, blocks.data, bits)  # not detach(), which counts the change as one
    return blocks


@torch.no_grad()
def without_masked(blocks: Tensor, bits: Tensor) -> Tensor:
    """A copy of ``blocks`` as :func:`zero_masked_` would leave them, in one pass.

    Example:
        >>> import torch
        >>> from sparsenet.functional.bits import pack_mask, without_masked
        >>> mask = torch.tensor([[[True, False], [False, True]]])
        >>> without_masked(torch.ones(1, 2, 2), pack_mask(mask))
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    copy = torch.empty_like(blocks)
    _keep(blocks.detach(), copy, bits)
    return copy


def _keep(source: Tensor, target: Tensor, bits: Tensor) -> None:
    """Writes ``source`` to ``target``, which may be the same memory, with zeros where the mask is off."""
    b = source.shape[1]
    by_numpy = _by_numpy(bits) and _by_numpy(source)
    for some in _chunks(len(source), b):
        if by_numpy:
            kept = _unpacked(bits[some], b).view(np.int8)
            np.negative(kept, out=kept)  # 0 or -1, which is all ones in every integer type
            integer = _INTEGERS[source.element_size()]
            np.bitwise_and(source[some].view(integer).numpy(), kept, out=target[some].view(integer).numpy())
        else:  # twelve times as slow on the CPU
            target[some] = torch.where(unpack_mask(bits[some], b), source[some], 0)


def _unpacked(bits: Tensor, b: int) -> np.ndarray:
    """Uint8 [num_blocks, b, b] of 0 and 1, in memory of its own."""
    each = np.unpackbits(bits.numpy(), axis=1, bitorder="little", count=b * b)
    return each.reshape(len(bits), b, b)


def _unpacked_by_torch(bits: Tensor, b: int) -> Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    each = ((bits.unsqueeze(2) >> shifts) & 1).bool().reshape(bits.shape[0], bits.shape[1] * 8)
    return each[:, : b * b].reshape(bits.shape[0], b, b)


def _chunks(num_blocks: int, b: int) -> list[slice]:
    step = max(1, UNPACKED_AT_ONCE // (b * b))
    return [slice(begin, begin + step) for begin in range(0, num_blocks, step)]


def _by_numpy(t: Tensor) -> bool:
    """Whether numpy may read the memory: on the CPU, and nobody records the calls of torch."""
    return not _is_recorded(t) and t.device.type == "cpu"


def _is_recorded(t: Tensor) -> bool:
    return (
        torch.compiler.is_compiling()
        or type(t) not in _PLAIN
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )
