"""Build and drive the emulated CUDA module: every op of csrc/cuda as host code, checked by tests/cuda/emulator.

``load()`` compiles the CUDA sources with g++ (only what changed) into ``build/emulator/<flavour>`` and imports the
result. The ``asan`` flavour must run in a process started with ``LD_PRELOAD`` of libasan: ``run_child`` does that.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import mmap
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsenet import functional
from sparsenet.functional.cuda import CudaKernels

ROOT = Path(__file__).resolve().parents[2]
CSRC = Path(os.environ.get("SPARSENET_EMULATOR_CSRC", ROOT / "csrc"))  # the mutation tests point it at changed sources
QUICK = "SPARSENET_EMULATOR_QUICK" in os.environ  # what has to be compiled is compiled without optimising
EMULATOR = ROOT / "tests" / "cuda" / "emulator"
BUILD = Path(os.environ.get("SPARSENET_EMULATOR_BUILD", ROOT / "build" / "emulator"))
FLAVOURS = {
    "release": ["-O2"],
    "asan": [
        "-O1",
        "-g1",
        "-fno-omit-frame-pointer",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
    ],
}
NOT_EMULATED = {"device.cu"}  # speaks to the CUDA runtime only; device_host.cpp stands in
_INCLUDE = re.compile(r'^\s*#\s*include "([^"]+)"', re.MULTILINE)

_loaded = {}
_registered = False  # whether kernels may touch registered memory only
_scratch: list[np.ndarray] = []  # what calls asked for, kept until the next block of registered memory


def sources() -> list[Path]:
    cuda = CSRC / "cuda"
    kernels = [p for p in sorted(cuda.rglob("*.cu")) if p.name not in NOT_EMULATED]
    return kernels + sorted(cuda.rglob("*.cpp")) + sorted(EMULATOR.glob("*.cpp"))


def _with_includes(source: Path, seen: dict) -> dict:
    """The source and every project header it reaches: path -> contents."""
    if source not in seen:
        seen[source] = source.read_bytes()
        for name in _INCLUDE.findall(seen[source].decode()):
            for folder in (source.parent, CSRC, EMULATOR.parent):
                if (folder / name).is_file():
                    _with_includes((folder / name).resolve(), seen)
                    break
    return seen


def build(flavour: str = "release") -> Path:
    """Compile what changed and link; returns the module's path. Skips the test where there is no compiler."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("the CUDA emulator needs g++")
    import pybind11

    folder = BUILD / flavour
    folder.mkdir(parents=True, exist_ok=True)
    name = f"cuda_emulated_{flavour}"
    flags = [
        "-std=c++20",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-DSPARSENET_EMULATOR",
        f"-DMODULE_NAME={name}",
        f"-I{EMULATOR.parent}",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}",
        *FLAVOURS[flavour],
    ]

    def compile_one(source: Path) -> Path:
        parts = _with_includes(source.resolve(), {})
        key = hashlib.sha256(b"\0".join([compiler.encode(), *map(str.encode, flags), *parts.values()])).hexdigest()[:16]
        stem = f"{source.stem}-{source.suffix[1:]}"
        target = folder / f"{stem}-{key}.o"
        if target.exists():
            os.utime(target)
            return target
        for old in sorted(folder.glob(f"{stem}-*.o"), key=lambda p: p.stat().st_mtime)[:-2]:
            old.unlink(missing_ok=True)
        scratch = target.with_suffix(f".{os.getpid()}.tmp")
        optimised = [f for f in flags if not QUICK or f != "-O2"]
        command = [compiler, *optimised, f"-I{CSRC}", "-x", "c++", "-c", str(source), "-o", str(scratch)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{source.name} does not build for the emulator:\n{done.stderr[-6000:]}")
        if "warning:" in done.stderr:
            print(done.stderr, file=sys.stderr)
        scratch.replace(target)
        return target

    with (folder / "lock").open("w") as lock, ThreadPoolExecutor(max_workers=2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another test process may be building the same
        objects = list(pool.map(compile_one, sources()))
    key = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
    module = folder / f"{name}.{key}.so"
    if not module.exists():
        for old in sorted(folder.glob(f"{name}.*.so"), key=lambda p: p.stat().st_mtime)[:-1]:
            old.unlink(missing_ok=True)
        scratch = module.with_suffix(f".{os.getpid()}.tmp")
        subprocess.run([compiler, "-shared", *FLAVOURS[flavour], *map(str, objects), "-o", str(scratch)], check=True)
        scratch.replace(module)
    return module


def load(flavour: str | None = None):
    """The emulated module, built if need be."""
    flavour = flavour or os.environ.get("SPARSENET_EMULATOR_FLAVOUR", "release")
    if flavour not in _loaded:
        spec = importlib.util.spec_from_file_location(f"cuda_emulated_{flavour}", build(flavour))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        _loaded[flavour] = module
    return _loaded[flavour]


def seed_of(request) -> int:
    """The seed of a test's thread order, by its name: another one for every test, the same on every run."""
    return zlib.crc32(request.node.name.encode())


def kernels() -> CudaKernels:
    """The emulated device behind the calls that sparsenet.functional makes; its memory is the CPU's."""
    return CudaKernels(load(), torch.device("cpu"))


@contextmanager
def serving():
    """Inside the block the emulated CUDA kernels serve CPU tensors, for everything in sparsenet."""
    emulated, native = kernels(), functional.native.kernels_of
    functional.native.kernels_of = lambda device: emulated
    try:
        yield emulated.ops
    finally:
        functional.native.kernels_of = native


def run_child(*arguments: str, asan: bool = False, **variables: str) -> subprocess.CompletedProcess:
    """Run ``python *arguments`` in tests/cuda/ with other environment variables; with `asan`, on the sanitized flavour.

    Not in the root, which Python would search first: the package there need not be the one that is tested.
    """
    package = Path(functional.__file__).resolve().parents[2]
    environment = dict(os.environ, PYTHONPATH=str(package), **variables)
    if asan:
        build("asan")
        compiler = os.environ.get("CXX") or "g++"
        libraries = [
            subprocess.run([compiler, f"-print-file-name={lib}"], capture_output=True, text=True).stdout.strip()
            for lib in ("libasan.so", "libubsan.so")
        ]
        environment |= {
            "SPARSENET_EMULATOR_FLAVOUR": "asan",
            "LD_PRELOAD": ":".join(libraries),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        }
    command, folder = [sys.executable, *arguments], Path(__file__).resolve().parent
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)


@contextmanager
def memory(module, inputs: dict, outputs: dict):
    """Only these arrays may be touched by kernels inside the block, and only `outputs` written."""
    global _registered
    module.clear_memory()
    _scratch.clear()
    _registered = True
    for arrays, writable in ((inputs, False), (outputs, True)):
        for name, array in arrays.items():
            if array is not None and array.nbytes > 0:
                low, high = np.lib.array_utils.byte_bounds(array)
                module.add_memory(low, high - low, writable, name)
    try:
        yield
    finally:
        _registered = False
        module.clear_memory()


def aligned(shape, dtype, offset: int = 0) -> np.ndarray:
    """An uninitialised-looking array (all bytes 0xff: NaN) that starts `offset` elements past a 256-byte boundary."""
    count = int(np.prod(shape, dtype=np.int64))
    item = np.dtype(dtype).itemsize
    raw = np.full((count + offset) * item + 256, 0xFF, dtype=np.uint8)
    start = -raw.ctypes.data % 256 + offset * item
    return raw[start : start + count * item].view(dtype).reshape(shape)


def reserved(elements: int, dtype) -> np.ndarray:
    """Zeros whose pages take no memory until they are written: arrays of many GiB of which a few rows are used."""
    no_reserve = 0x4000
    count = elements * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    return np.frombuffer(mmap.mmap(-1, count, flags=flags), dtype=dtype)


def pointer(array: np.ndarray | None) -> int:
    return 0 if array is None or array.size == 0 else array.ctypes.data


def matrix(array: np.ndarray | None, columns: int) -> tuple[int, int, int, int]:
    """(address, rows, columns, stride) of a 2-dimensional array whose rows are padded behind ``columns``."""
    return (0, 0, 0, 0) if array is None else (pointer(array), len(array), columns, array.strides[0] // array.itemsize)


def indices(array: np.ndarray) -> tuple[int, int]:
    """(address, length) of an index array."""
    return pointer(array), len(array)


def run(module):
    """``(stream, allocate)``: inside ``memory`` kernels may touch exactly the bytes that a call asked for."""

    def allocate(nbytes: int) -> int:
        scratch = aligned((nbytes,), np.uint8)
        _scratch.append(scratch)
        if _registered:
            module.add_memory(pointer(scratch), nbytes, True, "workspace")
        return pointer(scratch)

    return 0, allocate


# Operands ---------------------------------------------------------------------------------------------------------

DTYPE_CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3, "tf32": 4}  # tf32: float32 in memory
ACTIVATION_CODES = {"none": 0, "relu": 1, "gelu": 2, "silu": 3}
VARIANTS = {"automatic": 0, "simt": 1, "sm80": 2}
_TORCH = {name: getattr(torch, name if name != "tf32" else "float32") for name in DTYPE_CODES}
_STORAGE = {
    "float32": np.float32,
    "bfloat16": np.uint16,
    "float16": np.uint16,
    "float64": np.float64,
    "tf32": np.float32,
}
_UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float64": 2.0**-53, "tf32": 2.0**-24}
# half a last place of a result; operands in tf32 tests are numbers of 10 bits, so that their products are exact
OPERAND_UNIT = {**_UNIT, "tf32": 2.0**-11}


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values after rounding to dtype."""
    if dtype == "tf32":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        return ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32).astype(np.float64)
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(_TORCH[dtype]).double().numpy()


def stored(values: np.ndarray, dtype: str, pad: int = 0, offset: int = 0) -> np.ndarray:
    """The device array of float64 values: [..., columns + pad], the padding NaN; bits as uint16 for 16-bit types."""
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(_TORCH[dtype])
    bits = tensor.view(torch.int16).numpy().view(np.uint16) if _STORAGE[dtype] is np.uint16 else tensor.numpy()
    array = empty(values.shape, dtype, pad, offset)
    array[..., : values.shape[-1]] = bits
    return array


def empty(shape, dtype: str, pad: int = 0, offset: int = 0) -> np.ndarray:
    """An output: every byte 0xff (NaN), rows `pad` elements apart, starting `offset` elements past an aligned place."""
    return aligned((*shape[:-1], shape[-1] + pad), _STORAGE[dtype], offset)


def fetched(array: np.ndarray, dtype: str, columns: int) -> np.ndarray:
    """float64 of what a kernel wrote; fails when the padding behind the rows was touched."""
    padding = np.ascontiguousarray(array[..., columns:]).view(np.uint8)
    assert (padding == 0xFF).all(), "a kernel wrote behind the end of a row"
    data = np.ascontiguousarray(array[..., :columns])
    if _STORAGE[dtype] is np.uint16:
        return torch.from_numpy(data.view(np.int16)).view(_TORCH[dtype]).double().numpy()
    return data.astype(np.float64)


def tolerance(dtype: str, reduction: int, magnitude: np.ndarray) -> np.ndarray:
    """Largest error of a sum of `reduction` products whose absolute values add up to `magnitude`.

    Products and sums round in fp32 (float64 for float64), the result once more to dtype.
    """
    accumulate = _UNIT["float64" if dtype == "float64" else "float32"]
    return (2 * (reduction + 2) * accumulate + 2 * _UNIT[dtype]) * (magnitude + 2.0**-14)


class Pattern:
    """Index arrays of a pattern made on the host, the oracle of the device's."""

    def __init__(self, mask: np.ndarray, block_size: int, rows: int, cols: int) -> None:
        self.block_size, self.rows, self.cols, self.mask = block_size, rows, cols, mask
        self.row, self.col = (a.astype(np.int32) for a in np.nonzero(mask))
        self.crow = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int32)
        self.t_crow = np.concatenate([[0], np.cumsum(mask.sum(0))]).astype(np.int32)
        order = np.lexsort((self.row, self.col))
        self.t_row, self.t_block = self.row[order], order.astype(np.int32)

    @classmethod
    def random(cls, kind: str, rows: int, cols: int, block_size: int, rng: np.random.Generator) -> Pattern:
        shape = (-(-rows // block_size), -(-cols // block_size))
        mask = rng.random(shape) < 0.4
        if kind == "none":
            mask[:] = False
        elif kind == "dense":
            mask[:] = True
        elif kind == "empty_rows":
            mask[::2] = False
            mask[:, 1::3] = False
        elif kind == "full_row":
            mask[:] = rng.random(shape) < 0.15
            mask[shape[0] // 2] = True
            mask[:, shape[1] // 3] = True
        elif kind == "power_law":
            keep = np.maximum(1, shape[1] / (1 + np.arange(shape[0]))).astype(int)
            mask = np.stack([rng.permutation(shape[1]) < k for k in keep])
        else:
            assert kind == "random"
        return cls(mask, block_size, rows, cols)

    @property
    def num_blocks(self) -> int:
        return len(self.col)

    @property
    def arrays(self) -> dict:
        return {name: getattr(self, name) for name in ("crow", "col", "row", "t_crow", "t_row", "t_block")}

    def values(self, rng: np.random.Generator, dtype: str) -> np.ndarray:
        """[num_blocks, b, b]; zero outside the matrix, as the layer keeps them."""
        b = self.block_size
        values = rounded(rng.standard_normal((self.num_blocks, b, b)), dtype)
        inside_rows = self.row[:, None] * b + np.arange(b) < self.rows
        inside_cols = self.col[:, None] * b + np.arange(b) < self.cols
        return values * inside_rows[:, :, None] * inside_cols[:, None, :]

    def dense(self, values: np.ndarray) -> np.ndarray:
        b, (block_rows, block_cols) = self.block_size, self.mask.shape
        weight = np.zeros((block_rows, block_cols, b, b))
        weight[self.row, self.col] = values
        return weight.transpose(0, 2, 1, 3).reshape(block_rows * b, block_cols * b)[: self.rows, : self.cols]

    def blocks_of(self, dense: np.ndarray) -> np.ndarray:
        """[num_blocks, b, b] of a [rows, cols] matrix, zeros outside it."""
        b, (block_rows, block_cols) = self.block_size, self.mask.shape
        padded = np.zeros((block_rows * b, block_cols * b))
        padded[: self.rows, : self.cols] = dense
        return padded.reshape(block_rows, b, block_cols, b).transpose(0, 2, 1, 3)[self.row, self.col]

    def handle(self, module):
        return module.Pattern(
            tuple(pointer(array) for array in self.arrays.values()),
            rows=self.rows,
            cols=self.cols,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
        )


def work_list(module, pointers: np.ndarray, num_blocks: int, rows_per_group: int, split_length: int):
    """(items [capacity, 4], num_items, num_slots) built by the device kernel."""
    lines, shape = (pointer(pointers), len(pointers) - 1, num_blocks), (rows_per_group, split_length)
    items = np.full((max(module.work_list_capacity(lines, shape), 1), 4), -7, dtype=np.int32)
    with memory(module, {"crow": pointers}, {"items": items}):
        counts = module.build_work_list(lines, shape, pointer(items), run(module))
    return items, *counts
