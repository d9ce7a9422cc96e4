"""What the figures were measured on, and what that machine can do at most."""

from __future__ import annotations

import ctypes
import datetime
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from sparsenet.benchmark.timing import Quartiles, last_level_cache_bytes
from sparsenet.functional.build import build_info

__all__ = ["Ceilings", "ceilings", "describe"]

_SOURCE = Path(__file__).with_name("fma_peak.c")
_VECTOR_BYTES = {"avx512bf16": 64, "avx512": 64, "avx2": 32, "portable": 16}
_FLAGS = {
    "avx512bf16": ("-mavx512f", "-mavx512vl", "-mavx512bf16", "-mfma", "-DDOT_BFLOAT16"),
    "avx512": ("-mavx512f", "-mfma"),
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}


@dataclass(frozen=True)
class Ceilings:
    """What this machine can do at most, measured: GFLOP/s by dtype; GB a second of a copy, read and written together.

    ``fma_gflops`` is None where no C compiler was found to measure it with.
    """

    fma_gflops: dict[str, float] | None
    copy_gbytes: float

    def roofline_seconds(self, dtype: str, flops: float, bytes_moved: float) -> float | None:
        """The least time for so much arithmetic and traffic; None if the arithmetic has no measured ceiling."""
        if self.fma_gflops is None or dtype not in self.fma_gflops:
            return None
        return max(flops / self.fma_gflops[dtype], bytes_moved / self.copy_gbytes) * 1e-9


def describe() -> dict[str, object]:
    """Processor, instruction set in use, versions and threads; nothing that names the machine."""
    info = build_info()
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "last_level_cache_bytes": last_level_cache_bytes(),
        "isa": info["isa"],
        "isa_available": list(info["isa_available"]),
        "threads": torch.get_num_threads(),
        "compiler": info["compiler"],
        "sparsenet": info["version"],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "forced": {
            name: os.environ[name]
            for name in ("SPARSENET_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")
            if name in os.environ
        },
    }


def today() -> str:
    """ISO date and hour, UTC."""
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ")


def _cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


# --- ceilings -------------------------------------------------------------------------------------------------------


def ceilings(seconds: float = 0.4) -> Ceilings:
    """Measured once per process, number of threads and instruction set."""
    return _ceilings(torch.get_num_threads(), build_info()["isa"], seconds)


@cache
def _ceilings(threads: int, isa: str, seconds: float) -> Ceilings:
    return Ceilings(_fma_gflops(threads, isa, seconds), _copy_gbytes(seconds))


def _copy_gbytes(seconds: float) -> float:
    """GB a second, read and written, of torch's copy between buffers past the caches."""
    count = max(4 * last_level_cache_bytes(), 64 << 20)
    source, target = torch.ones(count, dtype=torch.uint8), torch.zeros(count, dtype=torch.uint8)
    return 2e-9 * count / _best_seconds(lambda: target.copy_(source), seconds)


def _best_seconds(call: Callable[[], object], seconds: float) -> float:
    """The lower quartile over calls for about ``seconds``: a ceiling is what the machine does when left alone."""
    call()
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < 5 or time.perf_counter() < until:
        begin = time.perf_counter()
        call()
        taken.append(time.perf_counter() - begin)
    return Quartiles.of(taken).lower


def _fma_gflops(threads: int, isa: str, seconds: float) -> dict[str, float] | None:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        flags = (*_FLAGS[isa], f"-DVECTOR_BYTES={_VECTOR_BYTES[isa]}", "-ffp-contract=fast")
        command = [compiler, "-O3", "-shared", "-fPIC", *flags, "-o", str(library), str(_SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True)
            functions = ctypes.CDLL(str(library))
        except (OSError, subprocess.CalledProcessError) as error:
            said = (getattr(error, "stderr", b"") or str(error).encode()).decode(errors="replace").splitlines()
            warnings.warn(f"bench: no roofline, {compiler} failed: {said[0] if said else error}", stacklevel=2)
            return None
        peaks = {"float32": _peak(functions.fma_float32, threads, seconds)}
        if hasattr(functions, "fma_bfloat16"):
            peaks["bfloat16"] = _peak(functions.fma_bfloat16, threads, seconds)
    return peaks


def _peak(function, threads: int, seconds: float) -> float:
    """GFLOP/s of ``threads`` cores at once. ctypes lets go of the interpreter's lock."""
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_long, ctypes.POINTER(ctypes.c_float)]
    rounds = 2_000_000
    operations = function(rounds // 100, ctypes.byref(ctypes.c_float())) * 100

    def work() -> None:
        function(rounds, ctypes.byref(ctypes.c_float()))

    def all_cores() -> None:
        workers = [threading.Thread(target=work) for _ in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    return 1e-9 * operations * threads / _best_seconds(all_cores, seconds)
