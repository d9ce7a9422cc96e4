"""The CUDA kernels of one device behind the calls that :mod:`sparsenet.functional` makes to the CPU's native module.

Tensors arrive as addresses and sizes, kernels run on torch's current stream, and every byte of scratch memory comes
from torch's caching allocator. Sorting and ranking are torch's stable sort. Only ranking, sorting and the making of a
pattern or of a work list wait for the device. The last two happen at the first use of a pattern, so after a warm-up
step a training step can be captured in a CUDA graph. A rewire makes a captured graph worthless: capture again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CudaKernels", "CudaPattern"]

FLOAT32, TF32 = 0, 4  # dtype codes; tf32 is float32 whose products tensor cores may take
INT32_MAX = 2**31 - 1


def precision(dtype: int) -> int:
    """``dtype``'s code, or tf32's for float32 where ``torch.backends.cuda.matmul`` allows that."""
    if dtype != FLOAT32:
        return dtype
    matmul = torch.backends.cuda.matmul
    set_to = getattr(matmul, "fp32_precision", None)  # torch 2.9 on; allow_tf32 raises where both were set
    allowed = set_to == "tf32" if set_to is not None else matmul.allow_tf32
    return TF32 if allowed else FLOAT32


def addressed(indices: Tensor) -> tuple[int, int]:
    """An index array as native calls take it: its address and its length. The caller keeps it alive."""
    return indices.data_ptr(), indices.numel()


class CudaPattern:
    """A validated pattern on a device, with its transposed index and, made when first needed, its work lists.

    Attributes:
        arrays: int32 tensors crow, col, row, t_crow, t_row, t_block; nobody writes to them once they are made.
        handle: the native object over them.
    """

    def __init__(self, ops, arrays: tuple[Tensor, ...], rows: int, cols: int, block_size: int, stream: int):
        self.arrays = arrays
        self.rows, self.cols, self.block_size, self.num_blocks = rows, cols, block_size, arrays[1].numel()
        self.stream = stream
        self._ops = ops
        self.handle = self.new_handle()
        self.lists: dict[tuple[bool, int, int], tuple] = {}  # (transposed, group, split) -> handle and its work list

    def new_handle(self):
        """A native object over the arrays, without a work list."""
        addresses = tuple(t.data_ptr() for t in self.arrays)
        return self._ops.Pattern(addresses, self.rows, self.cols, self.num_blocks, self.block_size)

    @property
    def row(self) -> Tensor:
        """int32 [num_blocks], block rows; a copy."""
        return self.arrays[2].clone()

    @property
    def places(self) -> Tensor:
        """int64 [num_blocks], ascending: block row * block columns + block column."""
        return self.arrays[2].long() * -(-self.cols // self.block_size) + self.arrays[1]

    @property
    def t_crow(self) -> Tensor:
        """int32 [block columns + 1], pointers of the transposed index; a copy."""
        return self.arrays[3].clone()

    @property
    def t_row(self) -> Tensor:
        """int32 [num_blocks], block rows by block column; a copy."""
        return self.arrays[4].clone()

    @property
    def t_block(self) -> Tensor:
        """int32 [num_blocks], block numbers by block column; a copy."""
        return self.arrays[5].clone()


class CudaKernels:
    """The kernels of ``ops`` (``_C.cuda``, or its emulation in the tests) for one device.

    The methods have the names and arguments of the CPU's native module. A native CUDA call takes the same arguments and
    one more, ``run = (stream, allocate)``; the number of threads that is part of a call is of no use here.
    """

    def __init__(self, ops, device: torch.device):
        self.ops = ops
        self.device = device

    # --- device, stream, memory ---

    def _current(self) -> contextlib.AbstractContextManager:
        """Makes the device current, as launches need it."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _scratch(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def _run(self) -> tuple[int, Callable[[int], int]]:
        """The stream of a native call and where its scratch memory comes from.

        The memory goes back when this tuple does: to the allocator of the same stream, behind the call's kernels.
        """
        kept = []

        def allocate(nbytes: int) -> int:
            kept.append(self._scratch(nbytes))
            return kept[-1].data_ptr()

        return self._stream(), allocate

    def _indices(self, name: str, indices) -> Tensor:
        """Index arrays as they came, a tensor or a numpy array, on the device."""
        tensor = torch.as_tensor(indices, device=self.device)
        if tensor.dtype != torch.int32:
            raise TypeError(f"{name} must be int32, got {tensor.dtype}")
        return tensor.contiguous()

    # --- patterns ---

    def Pattern(self, crow, col, rows: int, cols: int, block_size: int) -> CudaPattern:
        """Checks row pointers and columns and adds the transposed index."""
        crow, col = self._indices("BlockPattern: crow_indices", crow), self._indices("BlockPattern: col_indices", col)
        block_rows, block_cols = (max(-(-n // max(block_size, 1)), 0) for n in (rows, cols))
        count = col.numel()
        lengths = (block_rows + 1, count, count, block_cols + 1, count, count)
        arrays = tuple(torch.empty(n, dtype=torch.int32, device=self.device) for n in lengths)
        with self._current():
            order = col.sort(stable=True).indices
            addresses = tuple(t.data_ptr() for t in arrays)
            shape, run = (rows, cols, block_size), self._run()
            self.ops.pattern_from_csr(addressed(crow), addressed(col), order.data_ptr(), shape, addresses, run)
        return CudaPattern(self.ops, arrays, rows, cols, block_size, run[0])

    def csr_from_places(self, places, block_rows: int, block_cols: int) -> tuple[Tensor, Tensor]:
        """int32 row pointers and columns of int64 ``places`` in any order; refuses equal ones and those outside."""
        places = torch.as_tensor(places, device=self.device).sort().values
        if places.numel() > INT32_MAX:
            raise ValueError(f"BlockPattern: there must be at most {INT32_MAX} blocks, got {places.numel()}")
        end = block_rows * block_cols
        for place in places[:1].tolist() + places[-1:].tolist():
            if not 0 <= place < end:
                raise ValueError(f"BlockPattern: places must lie in [0, {end}), got {place}")
        equal = places[1:] == places[:-1]
        if equal.any():
            row, col = divmod(int(places[equal.nonzero()[0, 0]]), block_cols)
            raise ValueError(f"BlockPattern: places must differ, got ({row}, {col}) twice")
        pointers = torch.arange(block_rows + 1, device=self.device) * block_cols
        col = places % max(block_cols, 1)
        return torch.searchsorted(places, pointers, out_int32=True), col.to(torch.int32)

    def carried_blocks(self, old: CudaPattern, new: CudaPattern) -> Tensor:
        """int64 [blocks of ``new``]: for each its number in ``old``, or -1."""
        if not old.num_blocks:
            return torch.full_like(new.places, -1)
        places, wanted = old.places, new.places
        at = torch.searchsorted(places, wanted).clamp(max=old.num_blocks - 1)
        return torch.where(places[at] == wanted, at, -1)

    def select_extreme(self, scores, k: int, largest: bool) -> Tensor:
        """int64 [k], ascending: the k lowest or highest scores, ties to the smaller index; refuses NaN."""
        scores = torch.as_tensor(scores, device=self.device)
        if not 0 <= k <= scores.numel():
            raise ValueError(f"select_extreme: k must lie in [0, {scores.numel()}], got {k}")
        missing = scores.isnan()
        if missing.any():
            raise ValueError(f"select_extreme: scores must not be NaN, got NaN at {int(missing.nonzero()[0, 0])}")
        ranked = (scores + 0.0).sort(descending=largest, stable=True).indices  # -0 and +0 are the same score
        return ranked[:k].sort().values

    def _listed(self, pattern: CudaPattern, dtype: int, batch: int, transposed: bool) -> tuple:
        """The pattern's handle with the work list that suits the call, and that list's memory or None."""
        group, split = self.ops.preferred_work(pattern.handle, dtype, batch, transposed)
        key = (transposed, group, split)
        found = pattern.lists.get(key) if split and pattern.num_blocks else (pattern.handle, None)
        if found is None and self._capturing():  # making one would wait; without one the lines go in their own order
            found = pattern.handle, None
        if found is None:
            found = pattern.lists[key] = self._make_list(pattern, *key)
        if self._stream() != pattern.stream:  # not where its memory comes from: that may not be given away too early
            for array in (*pattern.arrays, *(t for t in found[1:] if t is not None)):
                array.record_stream(torch.cuda.current_stream(self.device))
        return found

    def _make_list(self, pattern: CudaPattern, transposed: bool, group: int, split: int):
        pointers = pattern.arrays[3 if transposed else 0]
        lines, shape = (pointers.data_ptr(), pointers.numel() - 1, pattern.num_blocks), (group, split)
        items = self._scratch(self.ops.work_list_capacity(lines, shape) * self.ops.work_item_bytes)
        counts = self.ops.build_work_list(lines, shape, items.data_ptr(), self._run())
        handle = pattern.new_handle()
        install = handle.set_transposed_work if transposed else handle.set_forward_work
        install(items.data_ptr(), *counts, group)
        return handle, items

    # --- block_sparse_linear ---

    def linear_forward(self, pattern: CudaPattern, call, x, weight, outputs) -> None:
        """``y = activation(x W^T + bias)``."""
        call = (precision(call[0]), *call[1:])
        with self._current():
            handle, _kept = self._listed(pattern, call[0], x[1], transposed=False)
            self.ops.linear_forward(handle, call, x, weight, outputs, self._run())

    def linear_backward(self, pattern: CudaPattern, call, x, values, upstream, grads) -> None:
        """The gradients whose address is not 0."""
        call = (precision(call[0]), *call[1:])
        with self._current():
            handle, _kept = self._listed(pattern, call[0], upstream[0][1], transposed=True)
            self.ops.linear_backward(handle, call, x, values, upstream, grads, self._run())

    # --- gradients of blocks that are not there ---

    def gradient_norms(self, call, x, grad_z, block_rows, norms) -> None:
        """Squared norms of the dense gradient's blocks in block rows [begin, end)."""
        call = (precision(call[0]), *call[1:])
        with self._current():
            self.ops.gradient_norms(call, x, grad_z, block_rows, norms, self._run())

    def candidate_gradients(self, call, x, grad_z, places, grads) -> None:
        """The dense gradient's blocks at the given places."""
        call = (precision(call[0]), *call[1:])
        rows, cols = (
            self._indices(f"candidate_gradients: {n}", t) for n, t in zip(("rows", "cols"), places, strict=True)
        )
        with self._current():
            self.ops.candidate_gradients(call, x, grad_z, (addressed(rows), addressed(cols)), grads, self._run())

    # --- compact_blocks ---

    def compact_blocks(self, old: CudaPattern, new: CudaPattern, gathered, tensors, threads) -> None:
        """Gathers rows and columns of all tensors in one pass."""
        rows, cols = (self._indices(f"compact_blocks: {n}", t) for n, t in zip(("rows", "cols"), gathered, strict=True))
        with self._current():
            places = (addressed(rows), addressed(cols))
            self.ops.compact_blocks(old.handle, new.handle, places, list(tensors), self._run())


def kernels_by_device(ops) -> Callable[[torch.device], CudaKernels]:
    """Returns what gives the kernels of a device, made once for each."""
    made: dict[torch.device, CudaKernels] = {}

    def kernels(device: torch.device) -> CudaKernels:
        if device not in made:
            made[device] = CudaKernels(ops, device)
        return made[device]

    return kernels
