"""The CUDA kernels of one device behind the calls that :mod:`sparsenet.functional` makes to the CPU's native module.

Tensors arrive as addresses and sizes, kernels run on torch's current stream, and every byte of scratch memory comes
from torch's caching allocator. No call but the making of a pattern or of a work list waits for the device; both happen
at the first use of a pattern, so after a warm-up step a training step can be captured in a CUDA graph. A rewire makes a
captured graph worthless: capture again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["CudaKernels", "CudaPattern"]

FLOAT32, TF32 = 0, 4  # dtype codes; tf32 is float32 whose products tensor cores may take


def precision(dtype: int) -> int:
    """``dtype``'s code, or tf32's for float32 where ``torch.backends.cuda.matmul`` allows that."""
    if dtype != FLOAT32:
        return dtype
    matmul = torch.backends.cuda.matmul
    set_to = getattr(matmul, "fp32_precision", None)  # torch 2.9 on; allow_tf32 raises where both were set
    allowed = set_to == "tf32" if set_to is not None else matmul.allow_tf32
    return TF32 if allowed else FLOAT32


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
        addresses = (t.data_ptr() for t in self.arrays)
        return self._ops.Pattern(*addresses, self.rows, self.cols, self.num_blocks, self.block_size)

    @property
    def row(self) -> Tensor:
        """int32 [num_blocks], block rows; a copy."""
        return self.arrays[2].clone()

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

    The methods have the names and arguments of the native module's functions; the number of threads that those end
    with is of no use here.
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

    def _int32(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=self.device)

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
        arrays = self._pattern_arrays(block_rows, block_cols, col.numel())
        with self._current():
            stream = self._stream()
            scratch = self._scratch(self.ops.pattern_workspace_bytes(col.numel(), block_rows, block_cols))
            self.ops.pattern_from_csr(
                crow.data_ptr(),
                crow.numel(),
                col.data_ptr(),
                rows,
                cols,
                block_size,
                *(t.data_ptr() for t in arrays),
                col.numel(),
                scratch.data_ptr(),
                scratch.numel(),
                stream,
            )
        return CudaPattern(self.ops, arrays, rows, cols, block_size, stream)

    def _pattern_arrays(self, block_rows: int, block_cols: int, count: int) -> tuple[Tensor, ...]:
        return tuple(self._int32(n) for n in (block_rows + 1, count, count, block_cols + 1, count, count))

    def row_order(self, rows, cols) -> Tensor:
        """int32 [n]: sorts places by row, then column; refuses equal places."""
        rows, cols = self._indices("row_order: rows", rows), self._indices("row_order: cols", cols)
        count = rows.numel()
        order = self._int32(count)
        if count == 0:
            return order
        shape = [int(n) + 1 for n in torch.stack([rows.max(), cols.max()]).tolist()]
        arrays = self._pattern_arrays(max(shape[0], 0), max(shape[1], 0), count)
        with self._current():
            scratch = self._scratch(self.ops.pattern_workspace_bytes(count, 0, 0))
            self.ops.pattern_from_places(
                rows.data_ptr(),
                cols.data_ptr(),
                *(t.data_ptr() for t in arrays),
                *shape,
                count,
                order.data_ptr(),
                scratch.data_ptr(),
                scratch.numel(),
                self._stream(),
            )
        return order

    def select_extreme(self, scores, k: int, largest: bool) -> Tensor:
        """int64 [k], ascending: the k lowest or highest scores, ties to the smaller index; refuses NaN."""
        scores = torch.as_tensor(scores, device=self.device).contiguous()
        selected = self._int32(max(k, 0))
        with self._current():
            scratch = self._scratch(self.ops.pattern_workspace_bytes(scores.numel(), 0, 0))
            self.ops.select_scores(
                scores.data_ptr(),
                scores.numel(),
                k,
                largest,
                selected.data_ptr(),
                scratch.data_ptr(),
                scratch.numel(),
                self._stream(),
            )
        return selected.long().sort().values

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
        lines = pointers.numel() - 1
        capacity = self.ops.work_list_capacity(lines, pattern.num_blocks, group, split)
        items = self._scratch(capacity * self.ops.work_item_bytes)
        scratch = self._scratch(self.ops.pattern_workspace_bytes(0, 0, 0))
        counts = self.ops.build_work_list(
            pointers.data_ptr(),
            lines,
            pattern.num_blocks,
            group,
            split,
            items.data_ptr(),
            scratch.data_ptr(),
            scratch.numel(),
            self._stream(),
        )
        handle = pattern.new_handle()
        install = handle.set_transposed_work if transposed else handle.set_forward_work
        install(items.data_ptr(), *counts, group)
        return handle, items

    # --- block_sparse_linear ---

    def linear_forward(
        self, pattern: CudaPattern, dtype, activation, x, x_stride, batch, values, bias, y, pre_activation, threads
    ) -> None:
        """``y = activation(x W^T + bias)``."""
        dtype = precision(dtype)
        with self._current():
            handle, _kept = self._listed(pattern, dtype, batch, transposed=False)
            operands = (x, x_stride, values)
            scratch = self._scratch(self.ops.linear_forward_workspace_bytes(handle, dtype, batch, *operands))
            self.ops.linear_forward(
                handle,
                dtype,
                activation,
                batch,
                *operands,
                bias,
                y,
                pattern.rows,
                pre_activation,
                pattern.rows,
                scratch.data_ptr(),
                scratch.numel(),
                self._stream(),
            )

    def linear_backward(
        self,
        pattern: CudaPattern,
        dtype,
        activation,
        grad_y,
        grad_y_stride,
        saved,
        x,
        x_stride,
        batch,
        values,
        grad_x,
        grad_values,
        grad_bias,
        threads,
    ) -> None:
        """The gradients whose address is not 0."""
        dtype = precision(dtype)
        with self._current():
            handle, _kept = self._listed(pattern, dtype, batch, transposed=True)
            call = (
                handle,
                dtype,
                activation,
                batch,
                grad_y,
                grad_y_stride,
                saved,
                pattern.rows,
                x,
                x_stride,
                values,
                grad_x,
                pattern.cols,
                grad_values,
                grad_bias,
            )
            scratch = self._scratch(self.ops.linear_backward_workspace_bytes(*call))
            self.ops.linear_backward(*call, scratch.data_ptr(), scratch.numel(), self._stream())

    # --- gradients of blocks that are not there ---

    def gradient_norms(
        self, dtype, block_size, x, x_stride, cols, grad_z, grad_z_stride, rows, batch, begin, end, norms, threads
    ) -> None:
        """Squared norms of the dense gradient's blocks in block rows [begin, end)."""
        call = (precision(dtype), block_size, batch, x, cols, x_stride, grad_z, rows, grad_z_stride)
        with self._current():
            scratch = self._scratch(self.ops.gradient_norms_workspace_bytes(*call))
            self.ops.gradient_norms(*call, begin, end, norms, scratch.data_ptr(), scratch.numel(), self._stream())

    def candidate_gradients(
        self, dtype, block_size, x, x_stride, cols, grad_z, grad_z_stride, rows, batch, at_rows, at_cols, grads, threads
    ) -> None:
        """The dense gradient's blocks at the given places."""
        at_rows = self._indices("candidate_gradients: rows", at_rows)
        at_cols = self._indices("candidate_gradients: cols", at_cols)
        call = (precision(dtype), block_size, batch, x, cols, x_stride, grad_z, rows, grad_z_stride)
        with self._current():
            scratch = self._scratch(self.ops.candidate_gradients_workspace_bytes(*call, at_rows.numel()))
            self.ops.candidate_gradients(
                *call,
                at_rows.data_ptr(),
                at_cols.data_ptr(),
                at_rows.numel(),
                grads,
                scratch.data_ptr(),
                scratch.numel(),
                self._stream(),
            )

    # --- compact_blocks ---

    def compact_blocks(
        self, old: CudaPattern, new: CudaPattern, rows, cols, sources, targets, element_bytes, threads
    ) -> None:
        """Gathers rows and columns of all tensors in one pass."""
        rows, cols = self._indices("compact_blocks: rows", rows), self._indices("compact_blocks: cols", cols)
        with self._current():
            self.ops.compact_blocks(
                old.handle,
                new.handle,
                rows.data_ptr(),
                cols.data_ptr(),
                list(sources),
                list(targets),
                list(element_bytes),
                self._stream(),
            )


def kernels_by_device(ops) -> Callable[[torch.device], CudaKernels]:
    """Returns what gives the kernels of a device, made once for each."""
    made: dict[torch.device, CudaKernels] = {}

    def kernels(device: torch.device) -> CudaKernels:
        if device not in made:
            made[device] = CudaKernels(ops, device)
        return made[device]

    return kernels
