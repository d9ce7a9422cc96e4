"""The native module and what every call into it needs: which kernels serve a device, dtype codes, memory in one piece.

Kernels read indices only from memory that a pattern validated and owns.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from sparsenet.files import source_digest
from sparsenet.functional.cuda import kernels_by_device


def _of_the_installed_package():
    """The native module of an installed sparsenet that the folder of the sources hides; None where there is none.

    It is taken only where it was built from the native sources that lie in this folder.
    """
    package = Path(__file__).resolve().parents[1]
    if any((package / f"_C{suffix}").exists() for suffix in EXTENSION_SUFFIXES):
        return None  # there is one here, and it does not load
    others = (Path(entry or ".", "sparsenet", f"_C{suffix}") for entry in sys.path for suffix in EXTENSION_SUFFIXES)
    file = next((other for other in others if other.is_file()), None)
    if file is None:
        return None
    spec = importlib.util.spec_from_file_location("sparsenet._C", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    built_from = module.build_info().get("sources")
    if not (package.parent / "csrc").is_dir() or built_from != source_digest(package.parent):
        raise ImportError(
            f"sparsenet: the native module is missing in {package}, which hides the sparsenet installed in "
            f"{file.parent}, whose native module was built from other sources; run Python in another folder or with "
            "python -P, or build these sources: pip install --force-reinstall ."
        )
    sys.modules["sparsenet._C"] = sys.modules["sparsenet"]._C = module
    return module


try:
    from sparsenet import _C
except ImportError as error:  # pragma: no cover - exercised by a child process in the tests
    _C = _of_the_installed_package()
    if _C is None:
        raise ImportError(
            f"sparsenet: the native module is missing or does not load ({error}); "
            "build it: pip install --force-reinstall ."
        ) from error
_NATIVE = (
    *("Pattern", "linear_forward", "linear_backward", "gradient_norms", "candidate_gradients", "compact_blocks"),
    *("csr_from_places", "draw_free_places", "lowest_to_spare", "carried_blocks", "select_extreme", "build_info"),
    *("workspace_bytes", "trim_workspace", "linear_workspace", "norms_workspace"),
)
if _absent := [name for name in _NATIVE if not hasattr(_C, name)]:
    raise ImportError(
        f"sparsenet: the native module is older than the package, it has no {', '.join(_absent)}; "
        "build it: pip install --force-reinstall ."
    )

draw_free_places = _C.draw_free_places  # on the CPU for every device, so that all draw alike
lowest_to_spare = _C.lowest_to_spare  # one block after the other, whatever the device
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
ACTIVATIONS = {"none": 0, "relu": 1, "gelu": 2, "silu": 3}
NEEDS_PRE_ACTIVATION = ("gelu", "silu")

# --- devices ---------------------------------------------------------------------------------------------------------

_cuda_ops = getattr(_C, "cuda", None)  # absent where there was no nvcc
_cuda_kernels = None if _cuda_ops is None else kernels_by_device(_cuda_ops)


def kernels_of(device: torch.device):
    """What serves ``device``: the native module itself on the CPU, else the kernels of one GPU with the same calls."""
    if device.type == "cpu":
        return _C
    if device.type == "cuda" and _cuda_kernels is not None:
        return _cuda_kernels(device)
    served = "cpu" if _cuda_kernels is None else "cpu, cuda"
    hint = "; build it where nvcc is: pip install --force-reinstall ." if device.type == "cuda" else ""
    raise RuntimeError(f"sparsenet: no kernels for device {device}; this build serves: {served}{hint}")


def handed(indices: Tensor):
    """Indices as the kernels of their device take them: a numpy array on the CPU, the tensor itself elsewhere."""
    return indices.numpy(force=True) if indices.device.type == "cpu" else indices


def as_int32(indices: Tensor):
    """Indices of any integer type as the kernels of their device take them."""
    return handed(indices.to(torch.int32).contiguous())


# --- memory ----------------------------------------------------------------------------------------------------------


def rows_of(t: Tensor, columns: int) -> Tensor:
    """``t`` as [M, columns] with contiguous columns."""
    if t.dim() == 2 and t.is_contiguous() and not t.is_neg():
        return t
    t = t.resolve_neg()
    if t.dim() != 2:
        t = t.reshape(t.numel() // columns if columns else t.shape[:-1].numel(), columns)
    return t if t.stride(1) == 1 or columns == 1 else t.contiguous()


# Torch reads a tensor's storage without the GIL: another thread may not swap it (see sparsenet.topology) meanwhile.
storage_lock = threading.Lock()
os.register_at_fork(
    before=storage_lock.acquire, after_in_parent=storage_lock.release, after_in_child=storage_lock.release
)


def matrix(t: Tensor) -> tuple[int, int, int, int]:
    """A 2-D tensor with contiguous columns as the native calls take it: address, rows, columns, stride."""
    return t.data_ptr(), *t.shape, t.stride(0)


def packed(t: Tensor) -> Tensor:
    """``t`` in one piece. Callers keep it: an address alone does not keep a copy alive."""
    return t if t.is_contiguous() and not t.is_neg() else t.resolve_neg().contiguous()


# --- what the native module says -------------------------------------------------------------------------------------


def native_build_info() -> dict:
    """What the native module says of itself: version, instruction sets, CUDA architectures, compiler.

    Example:
        >>> from sparsenet.functional import native_build_info
        >>> "version" in native_build_info()
        True
    """
    info = dict(_C.build_info())
    info["cuda_archs"] = info["cuda_archs"].split() if info["cuda_archs"] else []
    info["cuda_device"] = None if _cuda_ops is None else _cuda_ops.device_info()
    return info


def linear_workspace(
    dtype: torch.dtype, shape: tuple[int, int], block_size: int, num_blocks: int, batch: int, threads: int
) -> list[int]:
    """Bytes of each scratch buffer that forward and backward of one layer [out, in] take; calls share buffers.

    Example:
        >>> import torch
        >>> from sparsenet.functional import linear_workspace
        >>> small, large = (
        ...     sum(linear_workspace(torch.float32, (512, 512), 32, 64, batch, threads=1)) for batch in (64, 512)
        ... )
        >>> 0 < small <= large
        True
    """
    out_features, in_features = shape
    x = (0, batch, in_features, in_features)
    return _C.linear_workspace((DTYPES[dtype], 0, threads), x, out_features, num_blocks, block_size)


def norms_workspace(
    dtype: torch.dtype, shape: tuple[int, int], block_size: int, batch: int, block_rows: int, threads: int
) -> list[int]:
    """The same of ``block_gradient_squared_norms`` for ``block_rows`` block rows of a layer [out, in].

    Example:
        >>> import torch
        >>> from sparsenet.functional import norms_workspace
        >>> sum(norms_workspace(torch.float32, (512, 512), 32, batch=64, block_rows=16, threads=1)) > 0
        True
    """
    out_features, in_features = shape
    operands = ((0, batch, features, features) for features in (in_features, out_features))
    return _C.norms_workspace((DTYPES[dtype], block_size, threads), *operands, (0, block_rows))


def workspace_bytes() -> int:
    """Bytes of scratch memory the CPU kernels hold, of all threads.

    Example:
        >>> from sparsenet.functional import workspace_bytes
        >>> workspace_bytes() >= 0
        True
    """
    return _C.workspace_bytes()


def trim_workspace() -> None:
    """Gives back the scratch memory that the calling thread keeps for its next call.

    Example:
        >>> from sparsenet.functional import trim_workspace, workspace_bytes
        >>> before = workspace_bytes()
        >>> trim_workspace()
        >>> workspace_bytes() <= before
        True
    """
    _C.trim_workspace()
