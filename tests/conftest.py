"""Shared by all tests: fixed seeds, quiet OpenMP threads, and running code in a child process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads libgomp: waiting threads do not spin

import hypothesis
import pytest
import torch

import sparsenet

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores in what it starts in the background

PACKAGE_PARENT = Path(sparsenet.__file__).resolve().parent.parent  # of the package under test, installed or not

if os.environ.get("SPARSENET_TEST_DEVICE") == "cuda-emulated":  # cuda/test_python.py runs the op tests so
    import cuda_emulated

    device = cuda_emulated.serving()  # closed when the last reference to it goes
    device.__enter__()

examples = 8 if "SPARSENET_TEST_DEVICE" in os.environ else 50  # the emulated device takes its time
hypothesis.settings.register_profile("sparsenet", deadline=None, derandomize=True, max_examples=examples, database=None)
hypothesis.settings.load_profile("sparsenet")


@pytest.fixture(autouse=True)
def fixed_seed_and_threads():
    """The same random numbers for every test; what a test does to the number of threads is undone."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """One thread, for small matrices: a second costs more than it gives."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def module():
    """The CUDA kernels compiled for the emulator."""
    import cuda_emulated

    return cuda_emulated.load()


@pytest.fixture
def emulator_defaults(module, request):
    """The test's own order of threads, the default device, kernels chosen by the product, and no launches yet."""
    import cuda_emulated

    module.configure(seed=cuda_emulated.seed_of(request))
    module.set_device()
    module.force_variant(0)
    module.launches()
    yield
    module.force_variant(0)
    module.set_device()


@pytest.fixture
def run_child(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """``run_child(code, *arguments, timeout=120, check=True, **environment)``: Python code in a process of its own.

    ``SPARSENET_ISA`` and other variables are given by keyword (None removes one). The child imports the same sparsenet,
    from the parent folder ``package`` if given. A child that outlives ``timeout`` seconds fails the test.
    """

    def run(
        code: str, *arguments: str, timeout: float = 120, check: bool = True, package=PACKAGE_PARENT, **environment
    ):
        full = {**os.environ, "PYTHONPATH": str(package), **environment}
        full = {name: value for name, value in full.items() if value is not None}
        command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=full, cwd=tmp_path)
        except subprocess.TimeoutExpired as error:
            pytest.fail(f"the child process hung for {timeout} s; stderr: {(error.stderr or b'').decode()[-2000:]}")
        if check and done.returncode != 0:
            pytest.fail(f"the child process ended with {done.returncode}\n{done.stdout[-1000:]}\n{done.stderr[-4000:]}")
        return done

    return run
