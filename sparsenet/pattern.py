"""BlockPattern: which blocks of a matrix exist. Immutable, validated, hashable."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from sparsenet.densities import CHOSEN_FROM, block_places
from sparsenet.functional import BLOCK_SIZES, draw_free_places, largest_reaching_all, native, registry
from sparsenet.functional.checks import as_tensor, check_block_size, check_dense, refuse_tracing
from sparsenet.schedules import as_integer, number_of, numbers_of

__all__ = ["BLOCK_SIZES", "BlockPattern"]

INDEX_BYTES = 24  # per block: 6 int32, rows, columns and their transposes
_INT32_MAX = 2**31 - 1


def _check_shape(shape, block_size: int) -> tuple[tuple[int, int], int]:
    """Both as Python integers."""
    refuse_tracing("BlockPattern")
    block_size = check_block_size("BlockPattern", block_size)
    sizes = numbers_of(shape)
    if len(sizes) != 2 or not all(isinstance(n, int) for n in sizes):  # 4.5 is refused, not cut
        raise ValueError(f"BlockPattern: shape must be two integers (out, in), got {shape!r}")
    out_features, in_features = sizes
    if not (0 <= out_features <= _INT32_MAX and 0 <= in_features <= _INT32_MAX):
        raise ValueError(f"BlockPattern: shape must have sizes from 0 to {_INT32_MAX}, got {tuple(shape)}")
    return (out_features, in_features), block_size


def _check_density(density: float) -> float:
    number = number_of(density)
    if number is None or not 0.0 <= number <= 1.0:
        raise ValueError(f"BlockPattern: density must lie in [0, 1], got {density!r}")
    return float(number)


def _as_int32(name: str, indices) -> Tensor:
    """``indices`` as a new int32 tensor; floats and bools are a TypeError, what does not fit a ValueError."""
    if isinstance(indices, (list, tuple)) and not indices:
        indices = torch.empty(0, dtype=torch.int32, device="cpu")  # torch would make it float
    indices = as_tensor("BlockPattern", name, indices)
    if indices.dtype in (torch.uint16, torch.uint32, torch.uint64):
        indices = indices.to(torch.int64)  # above 2^63 negative, which is refused below
    if indices.dtype not in (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"BlockPattern: {name} must be integers, got {indices.dtype}")
    if indices.dim() != 1:
        raise ValueError(f"BlockPattern: {name} must have one dimension, got {list(indices.shape)}")
    if indices.dtype == torch.int64 and indices.numel():
        low, high = int(indices.min()), int(indices.max())
        if low < -(2**31) or high > _INT32_MAX:
            raise ValueError(f"BlockPattern: {name} must fit in int32, got {low if low < 0 else high}")
    return indices.detach().to(torch.int32, copy=True)


class BlockPattern:
    """The active blocks of an [out, in] matrix, in row order.

    Block i of a layer's ``values`` sits at ``(row_indices[i], col_indices[i])``. Sizes need not divide by the block
    size: edge blocks are stored whole and their part outside the matrix stays zero.

    Args:
        crow_indices: int [ceil(out / b) + 1], row pointers; ``col_indices``: int [num_blocks], block columns, ascending
            within each block row (as in ``torch.sparse_bsr``). Copied; int64 is accepted where it fits int32.
        shape: ``(out, in)`` in elements.
        block_size: 1, 4, 8, 16, 32, 64 or 128.

    Attributes:
        shape, block_size, num_blocks: as given; ``(out, in)``, the side of a block, how many blocks are active.
        device: where the index tensors are.
        crow, col: int32, the index memory itself, which nobody may write to; ``crow_indices``, ``col_indices``: copies.
        kernels, native: what serves the device, and the checked index that its kernels read.

    Raises:
        ValueError: an index out of range, duplicated or unsorted, contradictory pointers, an unknown block size.
        TypeError: indices that are not integers.

    Example:
        >>> import sparsenet as sn
        >>> p = sn.BlockPattern([0, 1, 2], [1, 0], shape=(64, 64), block_size=32)
        >>> p.num_blocks, p.density
        (2, 0.5)
    """

    __slots__ = (
        "__weakref__", "_fingerprint", "bias_shape", "block_size", "col", "crow", "device", "kernels", "native",
        "num_blocks", "shape", "values_shape",
    )  # fmt: skip

    def __init__(self, crow_indices, col_indices, shape: tuple[int, int], block_size: int = 32):
        shape, block_size = _check_shape(shape, block_size)
        crow, col = _as_int32("crow_indices", crow_indices), _as_int32("col_indices", col_indices)
        self._fill(crow, col, shape, block_size)

    def _fill(self, crow: Tensor, col: Tensor, shape: tuple[int, int], block_size: int, checked=None) -> None:
        """Takes ``crow`` and ``col`` as its own; ``checked``: what the native module made of them before."""
        if crow.is_inference():  # the pattern outlives inference mode, and graphs keep its indices
            with torch.inference_mode(False):
                crow, col = crow.clone(), col.clone()
        kernels = native.kernels_of(crow.device)
        if checked is None:
            checked = kernels.Pattern(native.handed(crow), native.handed(col), *shape, block_size)
        count = col.numel()
        for name, value in (
            ("shape", shape),
            ("block_size", block_size),
            ("num_blocks", count),
            ("crow", crow),  # the memory itself: nobody may write to it
            ("col", col),
            ("device", col.device),
            ("kernels", kernels),
            ("native", checked),
            ("values_shape", (count, block_size, block_size)),
            ("bias_shape", shape[:1]),
            ("_fingerprint", None),
        ):
            object.__setattr__(self, name, value)
        registry.remember(self)

    def __setattr__(self, name, value):
        raise AttributeError(f"BlockPattern: is immutable, {name} cannot be set")

    # --- ways to make one ---

    @classmethod
    def from_places(cls, rows: Tensor, cols: Tensor, shape: tuple[int, int], block_size: int = 32) -> BlockPattern:
        """From block places in any order: int ``rows`` [n] and ``cols`` [n]; equal places are refused."""
        shape, block_size = _check_shape(shape, block_size)
        rows, cols = _as_int32("rows", rows), _as_int32("cols", cols)
        if rows.shape != cols.shape:
            raise ValueError(f"BlockPattern: rows and cols must be of one length, got {len(rows)} and {len(cols)}")
        sizes = [-(-n // block_size) for n in shape]
        for name, t, size in (("rows", rows, sizes[0]), ("cols", cols, sizes[1])):
            if t.numel() and (int(t.min()) < 0 or int(t.max()) >= size):
                raise ValueError(f"BlockPattern: {name} must lie in [0, {size}), got {int(t.min())} to {int(t.max())}")
        return cls._from_linear(rows.long() * sizes[1] + cols, shape, block_size)

    @classmethod
    def from_linear_places(cls, places: Tensor, shape: tuple[int, int], block_size: int = 32) -> BlockPattern:
        """From what :meth:`linear_places` gives, in any order: int64 [n]; equal places are refused.

        Example:
            >>> import torch, sparsenet as sn
            >>> sn.BlockPattern.from_linear_places(torch.tensor([2, 1]), (64, 64)).linear_places()
            tensor([1, 2])
        """
        if not isinstance(places, Tensor) or places.dtype != torch.int64 or places.dim() != 1:
            kind = f"{places.dtype} {list(places.shape)}" if isinstance(places, Tensor) else type(places).__name__
            raise TypeError(f"BlockPattern: places must be an int64 tensor with one dimension, got {kind}")
        return cls._from_linear(places.detach(), *_check_shape(shape, block_size))

    @classmethod
    def _from_linear(cls, places: Tensor, shape: tuple[int, int], block_size: int) -> BlockPattern:
        sizes = (-(-n // block_size) for n in shape)
        made = native.kernels_of(places.device).csr_from_places(native.handed(places.contiguous()), *sizes)
        pattern = cls.__new__(cls)
        pattern._fill(*(torch.as_tensor(t, device=places.device) for t in made), shape, block_size)
        return pattern

    @classmethod
    def random(
        cls,
        shape: tuple[int, int],
        density: float = 0.1,
        block_size: int = 32,
        generator: torch.Generator | None = None,
        num_blocks: int | None = None,
    ) -> BlockPattern:
        """A uniformly random pattern of ``round(density * places)`` blocks (or ``num_blocks``); never dense on the way.

        When there are enough blocks, every block row and every block column gets at least one.
        """
        shape, block_size = _check_shape(shape, block_size)
        block_rows, block_cols = (-(-n // block_size) for n in shape)
        places = block_rows * block_cols
        count = round(_check_density(density) * places) if num_blocks is None else num_blocks
        count = as_integer("BlockPattern", "num_blocks", count)
        if not 0 <= count <= places:
            raise ValueError(f"BlockPattern: num_blocks must lie in [0, {places}], got {count}")
        if count > _INT32_MAX:
            raise ValueError(f"BlockPattern: there must be at most {_INT32_MAX} blocks, got {count}")
        return cls._from_linear(_random_places(block_rows, block_cols, count, generator), shape, block_size)

    @classmethod
    def from_dense(cls, weight: Tensor, density: float = 0.1, block_size: int = 32) -> BlockPattern:
        """The ``round(density * places)`` blocks of ``weight`` [out, in] with the largest Frobenius norm.

        When there are enough blocks, every block row and every block column gets at least one.
        """
        refuse_tracing("BlockPattern")
        weight = as_tensor("BlockPattern", "weight", weight)
        check_dense("BlockPattern", "weight", weight)
        if weight.dim() != 2:
            raise ValueError(f"BlockPattern: weight must have two dimensions, got {list(weight.shape)}")
        if weight.is_meta:
            raise ValueError(
                "BlockPattern: weight must hold data for its largest blocks to be kept, got a meta tensor; "
                "load it first, or build the sparse layers on meta"
            )
        shape, block_size = _check_shape(weight.shape, block_size)
        norms = _block_norms(weight, block_size)
        count = round(_check_density(density) * norms.numel())
        if torch.isnan(norms).any():
            raise ValueError("BlockPattern: weight must not contain NaN")
        picked = largest_reaching_all(norms, count)
        return cls.from_places(picked // max(norms.shape[1], 1), picked % max(norms.shape[1], 1), shape, block_size)

    @classmethod
    def from_mask(cls, block_mask: Tensor, block_size: int = 32, shape: tuple[int, int] | None = None) -> BlockPattern:
        """From a bool mask of blocks [ceil(out / b), ceil(in / b)]; ``shape`` defaults to whole blocks."""
        block_mask = as_tensor("BlockPattern", "block_mask", block_mask)
        if block_mask.dim() != 2 or block_mask.dtype != torch.bool:
            raise TypeError(f"BlockPattern: block_mask must be bool with two dimensions, got {block_mask.dtype}")
        if shape is None:
            block_size = check_block_size("BlockPattern", block_size)
            shape = (block_mask.shape[0] * block_size, block_mask.shape[1] * block_size)
        shape, block_size = _check_shape(shape, block_size)
        expected = [-(-n // block_size) for n in shape]
        if list(block_mask.shape) != expected:
            raise ValueError(f"BlockPattern: block_mask must have shape {expected}, got {list(block_mask.shape)}")
        rows, cols = block_mask.nonzero(as_tuple=True)
        return cls.from_places(rows, cols, shape, block_size)

    def to_mask(self) -> Tensor:
        """Bool [ceil(out / b), ceil(in / b)]: which blocks are active."""
        mask = torch.zeros(self.block_rows, self.block_cols, dtype=torch.bool, device=self.device)
        mask[self.row_indices.long(), self.col.long()] = True
        return mask

    def to(self, device: torch.device | str) -> BlockPattern:
        """The same pattern with its index tensors on ``device``; itself where they are there already, or on meta."""
        device = torch.device(device)
        if self.device == device or (self.device.type == device.type and device.index is None) or device.type == "meta":
            return self  # layers without data keep their indices
        moved = BlockPattern.__new__(BlockPattern)
        moved._fill(self.crow.to(device), self.col.to(device), self.shape, self.block_size)
        return moved

    def copy(self) -> BlockPattern:
        """An equal pattern with index memory of its own; what was checked is not checked again."""
        twin = BlockPattern.__new__(BlockPattern)
        twin._fill(self.crow.clone(), self.col.clone(), self.shape, self.block_size, self.native)
        return twin

    # --- what it says ---

    @property
    def block_rows(self) -> int:
        """Block places down: ceil(out / b)."""
        return -(-self.shape[0] // self.block_size)

    @property
    def block_cols(self) -> int:
        """Block places across: ceil(in / b)."""
        return -(-self.shape[1] // self.block_size)

    @property
    def density(self) -> float:
        """Active blocks / all block places; 0 for an empty matrix."""
        places = self.block_rows * self.block_cols
        return self.num_blocks / places if places else 0.0

    @property
    def crow_indices(self) -> Tensor:
        """int32 [block_rows + 1], a copy."""
        return self.crow.clone()

    @property
    def col_indices(self) -> Tensor:
        """int32 [num_blocks], a copy."""
        return self.col.clone()

    @property
    def row_indices(self) -> Tensor:
        """int32 [num_blocks], a copy: the block row of each block."""
        return torch.as_tensor(self.native.row, device=self.device)

    def linear_places(self) -> Tensor:
        """int64 [num_blocks], ascending: block row * block_cols + block column."""
        return torch.as_tensor(self.native.places, device=self.device)

    def unreached(self) -> tuple[int, int]:
        """How many outputs have no block in their row and how many inputs none in their column."""
        b, (out_features, in_features) = self.block_size, self.shape
        counts = []
        for features, places, filled in (
            (out_features, self.block_rows, self.crow.diff() > 0),
            (in_features, self.block_cols, torch.bincount(self.col, minlength=self.block_cols) > 0),
        ):
            empty = places - int(filled.sum())
            missing = places * b - features if places and not filled[-1] else 0  # the last one may be narrower
            counts.append(empty * b - missing)
        return tuple(counts)

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of shape, block size and indices: equal patterns have equal fingerprints."""
        if self._fingerprint is None:
            digest = hashlib.sha256(repr((self.shape, self.block_size)).encode())
            digest.update(self.crow.numpy(force=True).tobytes())
            digest.update(self.col.numpy(force=True).tobytes())
            object.__setattr__(self, "_fingerprint", digest.hexdigest()[:32])
        return self._fingerprint

    def __eq__(self, other) -> bool:
        return isinstance(other, BlockPattern) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __deepcopy__(self, memo) -> BlockPattern:
        return self.copy()

    def __reduce__(self):
        # Arrays on the CPU: tensors would be shared with a spawned process, and copies of them do not live that long.
        return BlockPattern, (native.handed(self.crow), native.handed(self.col), self.shape, self.block_size)

    def __repr__(self) -> str:
        return (
            f"BlockPattern(shape={self.shape}, block_size={self.block_size}, num_blocks={self.num_blocks}, "
            f"density={self.density:.4g})"
        )


def _block_norms(weight: Tensor, b: int) -> Tensor:
    """float32 [block rows, block cols]: squared norms of the blocks of a dense matrix."""
    out_features, in_features = weight.shape
    squares = weight.detach().float().square()
    squares = torch.nn.functional.pad(squares, (0, -in_features % b, 0, -out_features % b))
    return squares.reshape(-(-out_features // b), b, -(-in_features // b), b).sum((1, 3))


def _random_places(block_rows: int, block_cols: int, count: int, generator: torch.Generator | None) -> Tensor:
    """``count`` distinct linear places, uniform but for a first one in every block row and column if they suffice."""
    where = {"device": "cpu" if generator is None else generator.device}  # whatever the default device
    steps = torch.arange(min(max(block_rows, block_cols), count), **where)
    if not count:
        return steps
    rows = torch.randperm(block_rows, generator=generator, **where)[steps % block_rows]
    cols = torch.randperm(block_cols, generator=generator, **where)[steps % block_cols]
    chosen = rows * block_cols + cols
    key = int(torch.randint(2**63 - 1, (), generator=generator, **where))
    more = draw_free_places(chosen.sort().values, block_rows * block_cols, count - len(chosen), key)
    return torch.cat([chosen, more])


def blocks_for(shape: tuple[int, int], density: float, block_size: int) -> int:
    """Number of blocks that ``density`` means for a matrix of ``shape``."""
    return round(density * math.prod(-(-n // block_size) for n in shape))


def warn_unreached(owner: str, patterns: Mapping[str, BlockPattern], stacklevel: int) -> None:
    """One warning that says which layers have outputs or inputs without any weight, and what would change that."""
    said = []
    for name, pattern in patterns.items():
        outputs, inputs = pattern.unreached()
        if not outputs and not inputs:
            continue
        of_layer = f"layer {name}: " if name else ""
        (out_features, in_features), b = pattern.shape, pattern.block_size
        better = next((c for c in CHOSEN_FROM if c < b and _reaches_all(pattern.shape, pattern.density, c)), None)
        advice = f"block_size={better}" if better else "a higher density"
        said.append(
            f"{of_layer}{outputs} of {out_features} outputs and {inputs} of {in_features} inputs have no weight with "
            f"{pattern.num_blocks} blocks of {b} x {b}; {advice} would reach all"
        )
    if said:
        warnings.warn(f"{owner}: " + "; ".join(said), stacklevel=stacklevel)


def _reaches_all(shape: tuple[int, int], density: float, block_size: int) -> bool:
    return round(density * block_places(shape, block_size)) >= max(-(-n // block_size) for n in shape)


def carried_from(old: BlockPattern, new: BlockPattern) -> Tensor:
    """int64 [new.num_blocks]: for each block of ``new`` its number in ``old``, or -1 where it was not active."""
    if (old.shape, old.block_size) != (new.shape, new.block_size):
        raise ValueError(
            f"BlockPattern: shape and block_size must stay {old.shape}, {old.block_size}, "
            f"got {new.shape}, {new.block_size}"
        )
    new = new.to(old.device)
    return torch.as_tensor(old.kernels.carried_blocks(old.native, new.native), device=old.device)


registry.patterns_are_made_by(BlockPattern)
