"""The CUDA ops of a built ``_C`` on torch tensors, without the Python package: what gpu_check checks and times.

Where there is no GPU the same code drives the emulated module on CPU tensors (tests/cuda/test_gpu_check.py).
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu_check"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
TF32 = 4  # float32 tensors whose products tensor cores may take
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "silu": 3}
VARIANTS = {"automatic": 0, "simt": 1, "sm80": 2}


def build(arch: str) -> Path:
    """Configure and build ``_C`` with the CUDA kernels for one architecture; returns the module's path."""
    import pybind11

    environment = dict(os.environ, SPARSENET_CUDA_ARCHS=arch)
    BUILD.mkdir(parents=True, exist_ok=True)
    for command in (
        [
            "cmake",
            "-G",
            "Ninja",
            "-S",
            str(ROOT),
            "-B",
            str(BUILD),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSPARSENET_CUDA_ARCHS={arch}",
        ],
        ["cmake", "--build", str(BUILD), "--parallel", str(os.cpu_count() or 2)],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"the build failed:\n{(done.stdout + done.stderr)[-6000:]}")
    return next(iter(BUILD.glob("_C*.so")))


def load(path: Path):
    """The CUDA ops of a built module."""
    spec = importlib.util.spec_from_file_location("_C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.cuda


def address(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's data, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def stream() -> int:
    """torch's current stream."""
    return torch.cuda.current_stream().cuda_stream if DEVICE == "cuda" else 0


def matrix(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """A matrix as the native ops take it: address, rows, columns, stride."""
    return tensor.data_ptr(), *tensor.shape, tensor.stride(0)


def indices(tensor: torch.Tensor, count: int | None = None) -> tuple[int, int]:
    """An index array as the native ops take it: address and length."""
    return tensor.data_ptr(), tensor.numel() if count is None else count


def run():
    """``(stream, allocate)``, the last argument of every op; scratch memory is torch's, kept until the call is over."""
    kept = []

    def allocate(nbytes: int) -> int:
        kept.append(torch.empty(nbytes, dtype=torch.uint8, device=DEVICE))
        return kept[-1].data_ptr()

    return stream(), allocate


class Pattern:
    """A pattern made on the device from a list of places, with its work lists."""

    def __init__(self, ops, place_rows, place_cols, rows, cols, block, code: int, batch: int, split=None) -> None:
        self.split = split
        self.ops, self.rows, self.cols, self.block = ops, rows, cols, block
        shape, count = (-(-rows // block), -(-cols // block)), len(place_rows)
        self.shape, self.num_blocks = shape, count
        sizes = (shape[0] + 1, count, count, shape[1] + 1, count, count)
        self.arrays = [torch.full((max(n, 1),), -1, dtype=torch.int32, device=DEVICE) for n in sizes]
        self.order = torch.argsort(place_rows.long() * shape[1] + place_cols.long())  # of the places, by block number
        row, col = place_rows[self.order], place_cols[self.order]
        starts = torch.arange(shape[0] + 1, dtype=torch.int32, device=DEVICE)
        crow, by_column = torch.searchsorted(row, starts, out_int32=True), col.sort(stable=True).indices
        addresses = tuple(map(address, self.arrays))
        ops.pattern_from_csr(indices(crow), indices(col), address(by_column), (rows, cols, block), addresses, run())
        self.handle = ops.Pattern(addresses, rows, cols, count, block)
        self.items = [
            self.work(False, code, batch, self.handle.set_forward_work),
            self.work(True, code, batch, self.handle.set_transposed_work),
        ]

    def work(self, transposed: bool, code: int, batch: int, install) -> torch.Tensor:
        """One direction's work list, as the product builds it; `split` overrides where long groups are cut."""
        pointers, num_lines = self.arrays[3 if transposed else 0], self.shape[transposed]
        group, split = self.ops.preferred_work(self.handle, code, batch, transposed)
        lines, shape = (address(pointers), num_lines, self.num_blocks), (group, self.split or max(split, 1))
        capacity = self.ops.work_list_capacity(lines, shape)
        items = torch.empty(max(capacity, 1) * self.ops.work_item_bytes, dtype=torch.uint8, device=DEVICE)
        counts = self.ops.build_work_list(lines, shape, address(items), run())
        install(address(items), *counts, group)
        return items

    def dense(self, values: torch.Tensor) -> torch.Tensor:
        """The matrix, float64."""
        b, row, col = self.block, self.arrays[2][: self.num_blocks].long(), self.arrays[1][: self.num_blocks].long()
        full = torch.zeros(*self.shape, b, b, dtype=torch.float64, device=DEVICE)
        full[row, col] = values.double()
        return full.permute(0, 2, 1, 3).reshape(self.shape[0] * b, self.shape[1] * b)[: self.rows, : self.cols]

    def blocks_of(self, dense: torch.Tensor) -> torch.Tensor:
        """The pattern's blocks of a matrix, zeros outside it."""
        b, row, col = self.block, self.arrays[2][: self.num_blocks].long(), self.arrays[1][: self.num_blocks].long()
        full = torch.zeros(self.shape[0] * b, self.shape[1] * b, dtype=dense.dtype, device=DEVICE)
        full[: self.rows, : self.cols] = dense
        return full.view(self.shape[0], b, self.shape[1], b).permute(0, 2, 1, 3)[row, col]


def make_pattern(
    ops, kind: str, rows: int, cols: int, block: int, density: float, code: int, batch: int, seed: int = 0, split=None
) -> Pattern:
    """random, power_law, empty_rows, full_row, none or dense, for operands of that dtype code and batch.

    The places are handed over in random order.
    """
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    shape = (-(-rows // block), -(-cols // block))
    mask = torch.rand(shape, device=DEVICE, generator=generator) < density
    if kind == "power_law":
        keep = shape[1] / (1 + torch.arange(shape[0], device=DEVICE, dtype=torch.float64))
        mask = torch.rand(shape, device=DEVICE, generator=generator) < (keep / shape[1]).clamp(max=1)[:, None]
    elif kind == "empty_rows":
        mask[::2] = False
    elif kind == "full_row":
        mask[shape[0] // 2] = True
        mask[:, shape[1] // 2] = True
    elif kind in ("none", "dense"):
        mask[:] = kind == "dense"
    places = mask.nonzero().to(torch.int32)
    places = places[torch.randperm(len(places), device=DEVICE, generator=generator)]
    return Pattern(ops, places[:, 0].contiguous(), places[:, 1].contiguous(), rows, cols, block, code, batch, split)


class Layer:
    """One call's tensors: x, values, bias, gradients; runs the ops."""

    def __init__(
        self, pattern: Pattern, batch: int, dtype, activation="none", bias=True, pads=(0, 0), seed=0, tf32=False
    ) -> None:
        generator = torch.Generator(device=DEVICE).manual_seed(seed)

        def draw(*shape, pad=0):
            full = torch.full((*shape[:-1], shape[-1] + pad), float("nan"), dtype=dtype, device=DEVICE)
            full[..., : shape[-1]] = torch.randn(shape, device=DEVICE, generator=generator)
            return full[..., : shape[-1]]

        self.pattern, self.batch, self.dtype, self.activation = pattern, batch, dtype, activation
        b = pattern.block
        self.x, self.grad_y = draw(batch, pattern.cols, pad=pads[0]), draw(batch, pattern.rows, pad=pads[1])
        self.saved = draw(batch, pattern.rows)
        self.bias = draw(pattern.rows) if bias else None
        inside = pattern.blocks_of(torch.ones(pattern.rows, pattern.cols, device=DEVICE))
        self.values = (draw(max(pattern.num_blocks, 1), b, b)[: pattern.num_blocks] * inside).to(dtype)
        self.y, self.pre = self.blank(batch, pattern.rows), self.blank(batch, pattern.rows)
        self.grad_x, self.grad_bias = self.blank(batch, pattern.cols), self.blank(pattern.rows)
        self.grad_values = self.blank(max(pattern.num_blocks, 1), b, b)
        self.code = TF32 if tf32 else DTYPES[dtype]
        self.call = (self.code, ACTIVATIONS[activation], 1)

    def blank(self, *shape) -> torch.Tensor:
        """An output that nobody wrote."""
        return torch.full(shape, float("nan"), dtype=self.dtype, device=DEVICE)

    def forward_call(self) -> tuple:
        """Arguments shared by the op and its choice."""
        return self.pattern.handle, self.call, matrix(self.x), (address(self.values), address(self.bias))

    def forward(self, pre: bool = False) -> None:
        """Y, and the pre-activation on request."""
        outputs = address(self.y), address(self.pre if pre else None)
        self.pattern.ops.linear_forward(*self.forward_call(), outputs, run())

    def backward_call(self, wanted: str) -> tuple:
        """Arguments shared by the op and its choice."""
        tensors = {"x": self.grad_x, "w": self.grad_values, "b": self.grad_bias}
        grads = tuple(address(tensor if name in wanted else None) for name, tensor in tensors.items())
        upstream = matrix(self.grad_y), address(self.saved)
        return self.pattern.handle, self.call, matrix(self.x), address(self.values), upstream, grads

    def backward(self, wanted: str = "xwb") -> None:
        """The wanted gradients."""
        self.pattern.ops.linear_backward(*self.backward_call(wanted), run())
