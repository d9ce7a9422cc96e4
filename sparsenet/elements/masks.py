"""Element masks of a layer: those that somebody made, read and checked, and those that are chosen here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsenet.elements.rules import NM
from sparsenet.functional import draw_free_places, select_extreme
from sparsenet.functional.bits import mask_bytes, unpack_mask
from sparsenet.functional.blocks import take_blocks, zero_outside
from sparsenet.functional.checks import as_tensor
from sparsenet.pattern import BlockPattern
from sparsenet.schedules import as_integer, number_of

__all__ = ["carried_mask", "checked_mask", "chosen_mask", "largest_elements", "random_elements", "read_mask"]


# --- unstructured ---------------------------------------------------------------------------------------------------


def largest_elements(values: Tensor, pattern: BlockPattern, count: int) -> Tensor:
    """The mask of the ``count`` elements of largest magnitude in the stored blocks.

    Args:
        values: [num_blocks, b, b], or other scores, whose magnitude counts.
        pattern: of the blocks; elements outside its matrix are never chosen.
        count: at most as many elements as lie in the blocks and inside the matrix.

    Returns:
        Bool [num_blocks, b, b] with exactly ``count`` True; ties go to the smaller index.

    Raises:
        ValueError: another shape, NaN, or a count out of range; TypeError: a count that is no integer.

    Example:
        >>> import torch, sparsenet as sn
        >>> pattern = sn.BlockPattern([0, 1], [0], shape=(3, 4), block_size=4)
        >>> values = torch.tensor([[1.0, -3, 0, 0], [0, 2, 0, 0], [0, 0, 0, 0], [9, 9, 9, 9]])[None]
        >>> sn.elements.largest_elements(values, pattern, 3)[0].int()
        tensor([[1, 1, 0, 0],
                [0, 1, 0, 0],
                [0, 0, 0, 0],
                [0, 0, 0, 0]], dtype=torch.int32)
    """
    if tuple(values.shape) != pattern.values_shape:
        raise ValueError(
            f"largest_elements: values must have shape {list(pattern.values_shape)}, got {list(values.shape)}"
        )
    count = _checked_count("largest_elements", count, pattern)
    scores = values.detach().abs()
    if bool(scores.isnan().any()):
        raise ValueError("largest_elements: values must be numbers, got NaN")
    _minus_one_outside(scores, pattern)
    picked = select_extreme(scores.flatten(), count, largest=True)
    return _mask_of(picked.to(pattern.device), pattern)


def random_elements(pattern: BlockPattern, count: int, seed: int) -> Tensor:
    """The mask of ``count`` elements of the stored blocks, every such set as likely as any other.

    Args:
        pattern: of the blocks; elements outside its matrix are never chosen.
        count: as for :func:`largest_elements`.
        seed: in [0, 2^63); the mask depends on the arguments only, not on device, rank or a generator.

    Returns:
        Bool [num_blocks, b, b] with exactly ``count`` True.

    Raises:
        ValueError: a count or a seed out of range; TypeError: one that is no integer.

    Example:
        >>> import sparsenet as sn
        >>> pattern = sn.BlockPattern.random((60, 60), 0.5, 16)
        >>> int(sn.elements.random_elements(pattern, 100, seed=0).sum())
        100
    """
    count = _checked_count("random_elements", count, pattern)
    seed = as_integer("random_elements", "seed", seed, at_least=0)
    if seed >= 2**63:
        raise ValueError(f"random_elements: seed must lie in [0, 2^63), got {seed}")
    heights, widths = _sizes_inside(pattern)
    before = (heights * widths).cumsum(0)
    total = int(before[-1]) if len(before) else 0
    few = min(count, total - count)  # the drawn ones are listed: the fewer, the better
    places = draw_free_places(torch.empty(0, dtype=torch.int64, device=pattern.device), total, few, seed)
    block = torch.searchsorted(before, places, right=True)
    inside = places - (before - heights * widths)[block]
    row, column = inside // widths[block], inside % widths[block]
    mask = _mask_of((block * pattern.block_size + row) * pattern.block_size + column, pattern)
    if few == count:
        return mask
    mask.logical_not_()
    zero_outside(mask, pattern)
    return mask


def _checked_count(owner: str, count: int, pattern: BlockPattern) -> int:
    count, most = as_integer(owner, "count", count, at_least=0), elements_inside(pattern)
    if count > most:
        raise ValueError(f"{owner}: count must be at most the {most} elements in the blocks, got {count}")
    return count


def elements_inside(pattern: BlockPattern) -> int:
    """How many elements lie in the blocks of ``pattern`` and inside its matrix."""
    heights, widths = _sizes_inside(pattern)
    return int((heights * widths).sum())


def _sizes_inside(pattern: BlockPattern) -> tuple[Tensor, Tensor]:
    """Int64 [num_blocks] each: rows and columns of each block inside the matrix."""
    b, (out_features, in_features) = pattern.block_size, pattern.shape
    heights = (out_features - pattern.row_indices.long() * b).clamp(max=b)
    return heights, (in_features - pattern.col.long() * b).clamp(max=b)


def _minus_one_outside(scores: Tensor, pattern: BlockPattern) -> None:
    b, (out_features, in_features) = pattern.block_size, pattern.shape
    if out_features % b:
        scores[pattern.row_indices.long() == pattern.block_rows - 1, out_features % b :] = -1
    if in_features % b:
        scores[pattern.col.long() == pattern.block_cols - 1, :, in_features % b :] = -1


def _mask_of(elements: Tensor, pattern: BlockPattern) -> Tensor:
    mask = torch.zeros(pattern.values_shape, dtype=torch.bool, device=pattern.device)
    mask.view(-1)[elements] = True
    return mask


# --- what somebody asks for -----------------------------------------------------------------------------------------


def chosen_mask(
    asked: Any, pattern: BlockPattern, values: Tensor | None = None, generator: torch.Generator | None = None
) -> tuple[Tensor, NM | None]:
    """The mask that ``asked`` means, bool [num_blocks, b, b], and the rule that it follows.

    Args:
        asked: a mask; ``"2:4"`` or an :class:`NM`; or the share of the elements that are there, a float in (0, 1).
        pattern: of the blocks.
        values: [num_blocks, b, b]: their largest magnitudes stay; None: ``generator`` draws.

    Raises:
        ValueError, TypeError: none of these, or one that does not fit ``pattern``.
    """
    if isinstance(asked, str):
        asked = NM.parse(asked)
    if values is not None and values.is_meta and not isinstance(asked, Tensor):
        raise ValueError("SparseLinear: values must hold data for a mask by magnitude, got a meta tensor")
    if isinstance(asked, NM):
        return (asked.random(pattern, generator) if values is None else asked.mask(values, pattern)), asked
    share = number_of(asked)
    if share is None:
        return checked_mask(asked, pattern), None
    if not 0.0 < share < 1.0:
        raise ValueError(f"SparseLinear: element_mask must be a share in (0, 1) if a number, got {share}")
    count = round(share * elements_inside(pattern))
    if values is not None:
        return largest_elements(values, pattern, count), None
    device = "cpu" if generator is None else generator.device
    seed = torch.randint(2**63 - 1, (1,), generator=generator, device=device)
    return random_elements(pattern, count, int(seed)), None


def carried_mask(topology: Any, pattern: BlockPattern, carried: Tensor, values: Tensor) -> Tensor | None:
    """The mask for ``pattern``: of old blocks as ``topology`` has it; new ones follow its rule, or are whole.

    Args:
        topology: a layer's :class:`sparsenet.topology.Topology`, which stays as it is.
        carried: int64 [num_blocks], the old number of each block, or -1.
        values: [num_blocks, b, b] for ``pattern``, of which new blocks keep the largest by the rule.
    """
    mask, rule = topology.element_mask, topology.elements
    if mask is None or rule is None:
        return None if mask is None else take_blocks(mask, carried, True)
    old, new = take_blocks(mask, carried, False), carried < 0
    if not bool(new.any()):
        return old
    new = new.view(-1, 1, 1)
    scores = torch.zeros(pattern.values_shape, device=new.device) if values.is_meta else values.masked_fill(~new, 0)
    return rule.mask(scores, pattern).logical_and_(new).logical_or_(old)


def checked_mask(mask: Any, pattern: BlockPattern) -> Tensor:
    """A copy of ``mask``, bool [num_blocks, b, b], for ``pattern``: False outside the matrix.

    Raises:
        ValueError: another dtype or shape, or no data.
    """
    mask = as_tensor("SparseLinear", "element_mask", mask)
    expected = list(pattern.values_shape)
    if mask.dtype != torch.bool or list(mask.shape) != expected:
        raise ValueError(f"SparseLinear: element_mask must be bool {expected}, got {mask.dtype} {list(mask.shape)}")
    if mask.is_meta:
        raise ValueError("SparseLinear: element_mask must hold data, got a meta tensor")
    mask = mask.to(pattern.device, copy=True)  # a layer without data keeps its pattern and mask
    zero_outside(mask, pattern)
    return mask


def read_mask(mask: Tensor | None, rule: Tensor | None, pattern: BlockPattern) -> tuple[Tensor | None, NM | None]:
    """Mask and rule of a state dict for ``pattern``, checked.

    Args:
        mask: uint8 [num_blocks, ceil(b*b/8)] of :func:`~sparsenet.functional.bits.pack_mask`; bool [num_blocks, b, b],
            as states had it before masks were packed; or None.
        rule: uint8 [2] of :meth:`NM.as_tensor`; None: the mask follows none.

    Raises:
        ValueError: sizes that do not fit, or a mask that does not keep the rule.
    """
    b = pattern.block_size
    if mask is not None and mask.dtype == torch.uint8:
        expected = [pattern.num_blocks, mask_bytes(b)]
        if list(mask.shape) != expected:
            raise ValueError(f"SparseLinear: element_mask must be packed in uint8 {expected}, got {list(mask.shape)}")
        mask = mask if mask.is_meta else unpack_mask(mask.detach(), b)
    elif mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != pattern.values_shape):
        raise ValueError(
            f"SparseLinear: element_mask must be bool {list(pattern.values_shape)}, got {mask.dtype} {list(mask.shape)}"
        )
    return mask, None if rule is None else _read_rule(rule, mask, pattern)


def _read_rule(rule: Tensor, mask: Tensor | None, pattern: BlockPattern) -> NM:
    if rule.dtype != torch.uint8 or list(rule.shape) != [2] or rule.is_meta:
        raise ValueError(f"SparseLinear: element_rule must be n, m in uint8 [2], got {rule.dtype} {list(rule.shape)}")
    elements = NM(*rule.tolist())
    elements.check(pattern)
    if mask is None:
        raise ValueError(f"SparseLinear: element_rule must come with an element_mask, got {elements} alone")
    if not mask.is_meta and not elements.holds(mask):
        raise ValueError(f"SparseLinear: element_mask must keep its element_rule {elements}, got more in a group")
    return elements
