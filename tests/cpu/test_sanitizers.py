"""Address and undefined-behaviour sanitizers over every CPU kernel, once per instruction set.

Builds the module with ``-DSPARSENET_SANITIZE=address,undefined`` into ``build/sanitize`` (minutes the first time, only
what changed later) and runs the suite below in children with libasan loaded first. Torch's allocations pass through it
as well: a kernel that reads or writes one element beside a tensor is stopped with a report.

By hand: ``pytest -m slow tests/cpu/test_sanitizers.py``
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sparsenet as sn
from sparsenet import _C

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitize"
PACKAGE = BUILD / "package"

SUITE = """
    import sys, threading
    import numpy as np
    import torch
    import sparsenet as sn
    from sparsenet import _C, testing
    from sparsenet import functional
    from sparsenet.testing import LinearCase

    isa = sys.argv[1]
    assert sn.build_info()["isa"] == isa and "sanitize" in _C.__file__
    dtypes = testing.DTYPES if isa == "portable" else (torch.float32, torch.bfloat16)
    checked = testing.self_test(dtypes=dtypes)
    for dtype in dtypes:
        for shape, block, batch, kind in (
            ((96, 2100), 32, 530, "few"), ((130, 100), 4, 513, "few"), ((64, 1500), 8, 1, "half"),
            ((70, 90), 16, 1100, "half"), ((300, 257), 128, 70, "half"), ((100, 130), 1, 300, "few"),
            ((130, 200), 64, 70, "dense"), ((784, 10), 32, 65, "dense"),
        ):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                case = LinearCase(shape, block, dtype, batch, kind, ("relu", "gelu", "silu")[threads % 3], True, batch)
                testing.check_linear(case)
                testing.check_norms(case)
                testing.check_candidates(case)

    # rows that end where the memory ends, begin in its middle, or are all one row
    pattern = sn.BlockPattern.random((33, 70), 0.6, 16)
    for dtype in dtypes:
        values = torch.randn(pattern.num_blocks, 16, 16).to(dtype).requires_grad_()
        bias = torch.randn(33).to(dtype).requires_grad_()
        memory = torch.randn(7 * 75).to(dtype)
        at_the_end = memory[5:].view(-1)[: 6 * 75 + 70].as_strided((7, 70), (75, 1))
        for x in (at_the_end, memory[:70].expand(7, 70), memory[3:493].view(7, 70)):
            x = x.detach().requires_grad_()
            for activation in functional.ACTIVATIONS:
                y = sn.functional.block_sparse_linear(x, values, pattern, bias, activation)
                y.sum().backward()  # an expanded gradient

    # every kind of bad index, refused without touching what is not there
    rng = np.random.default_rng(0)
    accepted = 0
    for _ in range(5000):
        crow = np.sort(rng.integers(-1, 5, rng.integers(0, 6))).astype(np.int32)
        col = rng.integers(-2, 5, rng.integers(0, 7)).astype(np.int32)
        if len(crow) and rng.random() < 0.7:
            crow[0], crow[-1] = 0, len(col)
        if rng.random() < 0.1 and len(col):
            col[rng.integers(len(col))] = rng.choice([2**31 - 1, -(2**31), 10**6])
        try:
            native = _C.Pattern(crow, col, int(rng.integers(0, 17)), int(rng.integers(0, 17)), 4)
            accepted += 1
            assert len(native.row) == len(native.t_row) == len(native.t_block) == len(col)
        except ValueError:
            pass
    assert accepted > 20
    for k in (0, 1, 500, 999, 1000):
        functional.select_extreme(torch.randint(0, 50, (1000,)).float(), k, bool(k % 2))

    # layers: rewires, masks, threads, scratch memory of threads that end
    layer = sn.SparseLinear(130, 75, density=0.5, block_size=16, element_mask=None, activation="silu")
    def work():
        for _ in range(5):
            layer(torch.randn(9, 130)).sum().backward()
    for _ in range(3):
        threads = [threading.Thread(target=work) for _ in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
        layer.set_pattern(sn.BlockPattern.random((75, 130), 0.4, 16))
    functional.trim_workspace()
    if hasattr(sn, "compact_blocks"):
        pass
    print("clean", checked, flush=True)
"""


def run(*command, **kwargs) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def runtime(name: str) -> str | None:
    """Path of a sanitizer's runtime library of the compiler that builds the module."""
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    path = run(compiler, f"-print-file-name={name}").strip()
    return path if os.path.isabs(path) and os.path.exists(path) else None


@pytest.fixture(scope="module")
def sanitized_package() -> Path:
    """A folder from which a child imports this package with the sanitized module."""
    if runtime("libasan.so") is None or shutil.which("cmake") is None:
        pytest.skip("needs cmake and a compiler with libasan")
    import pybind11

    run(
        "cmake", "-G", "Ninja", "-S", ROOT, "-B", BUILD, "-DSPARSENET_SANITIZE=address,undefined",
        "-DSPARSENET_WITH_CUDA=OFF", "-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_CXX_FLAGS_DEBUG=-O1 -g1",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DSPARSENET_VERSION={sn.__version__}",
    )  # fmt: skip
    run("cmake", "--build", BUILD, "--target", "_C", "--parallel", "2")
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(
        Path(sn.__file__).parent, PACKAGE / "sparsenet", ignore=shutil.ignore_patterns("_C*", "__pycache__")
    )
    (module,) = BUILD.glob("_C*.so")
    shutil.copy2(module, PACKAGE / "sparsenet")
    return PACKAGE


@pytest.fixture
def run_sanitized(sanitized_package, run_child):
    """Runs code with the sanitized module; the report, if any, is in stderr."""

    def run(code, *arguments, **kwargs):
        options = (
            "detect_leaks=0:halt_on_error=1:exitcode=99:detect_stack_use_after_return=0:allocator_may_return_null=1"
        )
        return run_child(
            code,
            *arguments,
            package=sanitized_package,
            timeout=1200,
            LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
            ASAN_OPTIONS=options,
            UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
            PYTHONMALLOC="malloc",
            OMP_WAIT_POLICY="passive",
            **kwargs,
        )

    return run


@pytest.mark.slow
@pytest.mark.parametrize("isa", _C.build_info()["isa_available"])
def test_kernels_run_clean(isa, run_sanitized):
    child = run_sanitized(SUITE, isa, SPARSENET_ISA=isa, check=False)
    report = "\n".join(line for line in child.stderr.splitlines() if "Warning" not in line)
    assert child.returncode == 0 and child.stdout.startswith("clean"), report[:6000]
    assert "runtime error" not in report and "AddressSanitizer" not in report, report[:6000]


@pytest.mark.slow
def test_the_sanitizers_see(run_sanitized):
    """One element too few behind a tensor's address, and the report comes: the runs above mean something."""
    child = run_sanitized(
        """
        import torch, sparsenet as sn
        from sparsenet import _C
        pattern = sn.BlockPattern.random((8, 16), 1.0, 8)
        x, values, y = torch.randn(3, 16), torch.randn(2, 8, 8), torch.empty(3 * 8 - 1)
        _C.linear_forward(
            pattern.native, (0, 0, 1), (x.data_ptr(), 3, 16, 16), (values.data_ptr(), 0), (y.data_ptr(), 0)
        )
        """,
        check=False,
    )
    # A vector of 32 bytes that begins inside and ends outside is an "unknown-crash" to this sanitizer (AVX2).
    assert child.returncode == 99, child.stderr[-3000:]
    assert re.search("AddressSanitizer: (heap-buffer-overflow|unknown-crash)", child.stderr), child.stderr[-3000:]
    assert "in store" in child.stderr
