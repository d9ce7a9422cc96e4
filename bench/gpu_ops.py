"""The CUDA ops as gpu_check runs them: every call of the native CUDA module that this check makes is in this file.

``load`` makes the built module serve the package of this checkout. The calls go through the same ``CudaKernels`` as
those of ``sparsenet.functional``. Where there is no GPU the emulated module of ``tests/cuda`` can stand in, on CPU
tensors.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
TF32 = 4  # dtype code: float32 tensors whose products tensor cores may take
CODES = {"float32": 0, "bfloat16": 1, "float16": 2, "float64": 3, "tf32": TF32}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "silu": 3}
VARIANTS = {"automatic": 0, "simt": 1, "sm80": 2}
GUARD = 256  # elements on both sides of an output that nobody may write

_cpu_kernels: list = []  # what the emulated device displaced


def torch_dtype(name: str) -> torch.dtype:
    """Of the tensors; tf32 has float32's."""
    return torch.float32 if name == "tf32" else getattr(torch, name)


def load(path: Path):
    """Import the built module, or the emulated one, make it serve ``sparsenet``, and return its CUDA ops."""
    emulated = path.name.startswith("cuda_emulated")
    spec = importlib.util.spec_from_file_location(path.name.split(".")[0] if emulated else "sparsenet._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not emulated:
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))  # the package of this checkout, which need not be built or installed
        sys.modules["sparsenet._C"] = module
        return module.cuda
    module.configure(seed=0)
    module.set_device()
    serve(module)
    return module


@lru_cache(maxsize=1)
def kernels_class() -> type:
    """The package's own door to the ops, even where the rest of the package can't be imported."""
    try:
        from sparsenet.functional.cuda import CudaKernels
    except Exception:  # its cases say why; the kernels are checked all the same
        spec = importlib.util.spec_from_file_location("cuda_kernels", ROOT / "sparsenet" / "functional" / "cuda.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.CudaKernels
    return CudaKernels


def serve(emulated) -> None:
    """The emulated kernels serve the package's CPU tensors from here on."""
    from sparsenet.functional import native

    kernels = kernels_class()(emulated, DEVICE)
    _cpu_kernels.append(native.kernels_of)
    native.kernels_of = lambda device: kernels


@contextlib.contextmanager
def on_cpu() -> Iterator[torch.device]:
    """Inside the block the CPU's own kernels serve the CPU, the emulated device or not."""
    from sparsenet.functional import native

    serving = native.kernels_of
    native.kernels_of = _cpu_kernels[0] if _cpu_kernels else serving
    try:
        yield torch.device("cpu")
    finally:
        native.kernels_of = serving


def synchronize() -> None:
    """Waits for the device; an error of an earlier launch surfaces here."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def healthy() -> bool:
    """Whether the device still computes for this process: after a faulting kernel it never does again."""
    try:
        synchronize()
        return torch.ones(4, device=DEVICE).sum().item() == 4.0
    except RuntimeError:
        return False


def force_variant(ops, name: str) -> None:
    """Which kernels may run, process-wide: automatic, simt or sm80."""
    ops.force_variant(VARIANTS[name])


def device_info(ops) -> dict:
    """Name, architecture and sizes of the current device."""
    return dict(ops.device_info())


def matrix(tensor: torch.Tensor) -> tuple[int, int, int, int]:
    """A matrix as the ops take it: address, rows, columns, stride."""
    return tensor.data_ptr(), *tensor.shape, tensor.stride(0)


class _Split:
    """The ops, with work lists that cut a line of blocks after `split` of them."""

    def __init__(self, ops, split: int):
        self._ops, self._split = ops, split

    def __getattr__(self, name: str):
        return getattr(self._ops, name)

    def preferred_work(self, *call):
        """The number of lines that a CTA shares, and where longer ones are cut; 0 stays: no list is read."""
        group, split = self._ops.preferred_work(*call)
        return group, split and self._split


class Pattern:
    """A pattern on the device. `split` overrides where long lines of blocks are cut, so that small ones are, too."""

    def __init__(self, ops, mask: torch.Tensor, rows: int, cols: int, block: int, split: int | None = None):
        self.kernels = kernels_class()(_Split(ops, split) if split else ops, DEVICE)
        self.rows, self.cols, self.block, self.shape = rows, cols, block, tuple(mask.shape)
        self.row, self.col = (places.contiguous() for places in mask.nonzero().T)  # int64, by row, then column
        crow = torch.zeros(len(mask) + 1, dtype=torch.int32, device=mask.device)
        crow[1:] = mask.sum(1).cumsum(0)
        self.native = self.kernels.Pattern(crow, self.col.int(), rows, cols, block)

    @property
    def num_blocks(self) -> int:
        """Active blocks."""
        return len(self.row)

    def dense(self, values: torch.Tensor) -> torch.Tensor:
        """[rows, cols], float64."""
        b = self.block
        full = torch.zeros(*self.shape, b, b, dtype=torch.float64, device=DEVICE)
        full[self.row, self.col] = values.double()
        return full.permute(0, 2, 1, 3).reshape(self.shape[0] * b, self.shape[1] * b)[: self.rows, : self.cols]

    def all_blocks(self, dense: torch.Tensor) -> torch.Tensor:
        """[block rows, block cols, b, b] of a [rows, cols] matrix, zeros outside it."""
        b = self.block
        full = torch.zeros(self.shape[0] * b, self.shape[1] * b, dtype=dense.dtype, device=DEVICE)
        full[: self.rows, : self.cols] = dense
        return full.view(self.shape[0], b, self.shape[1], b).permute(0, 2, 1, 3)

    def blocks_of(self, dense: torch.Tensor) -> torch.Tensor:
        """The pattern's blocks of a matrix."""
        return self.all_blocks(dense)[self.row, self.col]


def make_pattern(
    ops, kind: str, rows: int, cols: int, block: int, density: float, seed: int = 0, split: int | None = None
) -> Pattern:
    """Of kind random, power_law, empty_rows, full_row, none or dense."""
    generator = torch.Generator(device=DEVICE).manual_seed(seed)
    shape = (-(-rows // block), -(-cols // block))
    chance = torch.rand(shape, device=DEVICE, generator=generator)
    mask = chance < density
    if kind == "power_law":
        keep = shape[1] / (1 + torch.arange(shape[0], device=DEVICE, dtype=torch.float64))
        mask = chance < (keep / shape[1]).clamp(max=1)[:, None]
    elif kind == "empty_rows":
        mask[::2] = False
    elif kind == "full_row":
        mask[shape[0] // 2] = True
        mask[:, shape[1] // 2] = True
    elif kind in ("none", "dense"):
        mask[:] = kind == "dense"
    return Pattern(ops, mask, rows, cols, block, split)


class Layer:
    """One call's tensors: x, values, bias and gradients; runs the ops. `dtype` is a key of CODES."""

    def __init__(self, pattern: Pattern, batch: int, dtype: str, activation="none", bias=True, pads=(0, 0), seed=0):
        generator = torch.Generator(device=DEVICE).manual_seed(seed)
        self.pattern, self.batch, self.activation = pattern, batch, activation
        self.dtype, self.code = torch_dtype(dtype), CODES[dtype]

        def draw(*shape, pad=0):
            full = torch.full((*shape[:-1], shape[-1] + pad), float("nan"), dtype=self.dtype, device=DEVICE)
            full[..., : shape[-1]] = torch.randn(shape, device=DEVICE, generator=generator)
            return full[..., : shape[-1]]

        b, count = pattern.block, pattern.num_blocks
        self.x, self.grad_y = draw(batch, pattern.cols, pad=pads[0]), draw(batch, pattern.rows, pad=pads[1])
        self.saved, self.bias = draw(batch, pattern.rows), draw(pattern.rows) if bias else None
        inside = pattern.blocks_of(torch.ones(pattern.rows, pattern.cols, device=DEVICE))
        self.values = (draw(count, b, b) * inside).to(self.dtype)
        self._whole: list[torch.Tensor] = []
        self.y, self.pre = self.blank(batch, pattern.rows), self.blank(batch, pattern.rows)
        self.grad_x, self.grad_bias = self.blank(batch, pattern.cols), self.blank(pattern.rows)
        self.grad_values = self.blank(count, b, b)
        self.norms, self.candidates = self.blank(*pattern.shape, dtype=torch.float32), self.blank(count, b, b)

    def blank(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An output that nobody wrote, between two guards."""
        size = torch.Size(shape).numel()
        whole = torch.full((size + 2 * GUARD,), float("nan"), dtype=dtype or self.dtype, device=DEVICE)
        self._whole.append(whole)
        return whole[GUARD : GUARD + size].view(shape)

    def clear(self) -> None:
        """Makes every output NaN again."""
        for whole in self._whole:
            whole.fill_(float("nan"))

    def guards_hold(self) -> bool:
        """Whether nobody wrote beside an output."""
        return all(bool(w[:GUARD].isnan().all() and w[-GUARD:].isnan().all()) for w in self._whole)

    @property
    def _call(self) -> tuple:
        return self.code, ACTIVATIONS[self.activation], 1

    def forward(self, pre: bool = False) -> None:
        """Y, and the pre-activation on request."""
        outputs = self.y.data_ptr(), self.pre.data_ptr() if pre else 0
        self.pattern.kernels.linear_forward(self.pattern.native, *self._operands(), outputs)

    def backward(self, wanted: str = "xwb") -> None:
        """The wanted gradients: of x, of the weights (w), of the bias."""
        self.pattern.kernels.linear_backward(self.pattern.native, *self._backward_call(wanted))

    def _operands(self) -> tuple:
        weight = self.values.data_ptr(), 0 if self.bias is None else self.bias.data_ptr()
        return self._call, matrix(self.x), weight

    def _backward_call(self, wanted: str) -> tuple:
        tensors = {"x": self.grad_x, "w": self.grad_values, "b": self.grad_bias}
        grads = tuple(tensor.data_ptr() if name in wanted else 0 for name, tensor in tensors.items())
        upstream = matrix(self.grad_y), self.saved.data_ptr()
        return self._call, matrix(self.x), self.values.data_ptr(), upstream, grads

    def gradient_norms(self) -> None:
        """Squared norms of all blocks of the dense gradient of the weights; the activation is not asked for."""
        call, rows = (self.code, self.pattern.block, 1), (0, self.pattern.shape[0])
        self.pattern.kernels.gradient_norms(call, matrix(self.x), matrix(self.grad_y), rows, self.norms.data_ptr())

    def candidate_gradients(self) -> None:
        """The dense gradient's blocks at the pattern's own places, last place first."""
        p, call = self.pattern, (self.code, self.pattern.block, 1)
        at = tuple(places.flip(0).int() for places in (p.row, p.col))
        p.kernels.candidate_gradients(call, matrix(self.x), matrix(self.grad_y), at, self.candidates.data_ptr())

    def kernel_names(self) -> dict[str, str]:
        """Which kernel serves each pass."""
        ops, handle = self.pattern.kernels.ops, self.pattern.native.handle
        grad_input, grad_weight = ops.choose_linear_backward(handle, *self._backward_call("xw"))
        forward = ops.choose_linear_forward(handle, *self._operands())
        return {"forward": forward, "grad_input": grad_input, "grad_weight": grad_weight}
