"""The correctness stage of bench/gpu_check.py, on the emulated kernels, before the script meets a GPU."""

from __future__ import annotations

import subprocess
import sys

import cuda_emulated as emulated
import pytest
import torch


@pytest.fixture
def stage(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("with a GPU, run bench/gpu_check.py itself")
    monkeypatch.syspath_prepend(str(emulated.ROOT / "bench"))
    import gpu_correctness

    module = emulated.load()
    module.configure(seed=0)
    module.set_device()
    yield gpu_correctness
    module.force_variant(0)
    module.launches()


def test_the_small_stage_passes_and_reaches_every_variant(stage):
    module = emulated.load()
    module.launches()
    report = stage.correctness(module, small=True)
    assert report["passed"] and report["cases"] > 30, report["failures"]
    kernels = {launch["kernel"] for launch in module.launches()}
    assert kernels >= {
        "forward_simt",
        "forward_rows_simt",
        "forward_sm80",
        "forward_small_sm80",
        "forward_tf32_sm80",
        "forward_small_tf32_sm80",
        "grad_input_tf32_sm80",
        "grad_weight_tf32_sm80",
        "gradient_norms_tf32_sm80",
        "copy_rows",
        "grad_input_simt",
        "grad_input_rows_simt",
        "grad_input_sm80",
        "grad_weight_simt",
        "grad_weight_small_simt",
        "grad_weight_sm80",
        "gradient_norms_simt",
        "gradient_norms_sm80",
        "activation_gradient",
        "column_sums",
        "add_partials",
        "radix_scatter",
        "work_list",
    }


def test_an_error_is_measured_against_its_rounding_bound(stage):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    near, far = (exact + 2.0**-9).bfloat16(), (exact + 0.1).bfloat16()
    assert stage.excess(near, exact, exact, 1, 4) <= 1 < stage.excess(far, exact, exact, 1, 4)
    assert stage.excess(exact * float("nan"), exact, exact, 3, 4) == float("inf")


def test_without_a_gpu_the_script_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, str(emulated.ROOT / "bench" / "gpu_check.py")], capture_output=True, text=True
    )
    assert done.returncode != 0 and "needs a CUDA GPU that torch can use, found none" in done.stderr
