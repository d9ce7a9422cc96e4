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
        "transpose_index",
        "work_list",
    }


def test_an_error_is_measured_against_its_rounding_bound(stage):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    near, far = (exact + 2.0**-9).bfloat16(), (exact + 0.1).bfloat16()
    assert stage.excess(near, exact, exact, 1, 4) <= 1 < stage.excess(far, exact, exact, 1, 4)
    assert stage.excess(exact * float("nan"), exact, exact, 3, 4) == float("inf")


def test_the_benches_run_on_small_shapes(stage, monkeypatch):
    """What a GPU machine will time, once each and with a clock that stands still."""
    import gpu_timing

    monkeypatch.setattr(gpu_timing, "time_us", lambda run, **_: (run(0), {"median_us": 2.0})[1])
    module = emulated.load()
    ceiling = {"copy_gb_per_s": 1.0, "l2_copy_gb_per_s": 4.0, "dense_tflop_per_s": dict.fromkeys(gpu_timing.TYPES, 0.1)}
    dense: dict = {}
    results = [
        gpu_timing.bench_case(module, (96, 64, 40, 0.5, 32, name, "random", True), ceiling, dense)
        for name in gpu_timing.TYPES
    ]
    kernels = [r["kernels"] for r in results]
    assert kernels[0] == ["forward_sm80", "grad_input_sm80", "grad_weight_sm80"]
    assert kernels[1] == ["forward_simt", "grad_input_simt", "grad_weight_simt"]
    assert kernels[2] == ["forward_tf32_sm80", "grad_input_tf32_sm80", "grad_weight_tf32_sm80"]
    assert all(r["of_roofline"][n] == r["of_roofline"][n] > 0 for r in results for n in r["times"])
    assert gpu_timing.table(results).count("| 96x64 | 40 | 50% | 32 |") == 3
    rewire = gpu_timing.bench_rewire(module, side=640, batch=8)
    assert rewire["rewire_over_step"] == 1.0 and rewire["side"] == 640
    assert {launch["kernel"] for launch in module.launches()} >= {"transpose_index", "work_list"}
    cases = list(gpu_timing.bench_cases())
    assert len(cases) == len(set(cases)) and {case[5] for case in cases} == set(gpu_timing.TYPES)


def test_the_roofline_is_the_largest_of_three_bounds(stage):
    """Two block rows of 64 share a CTA: three blocks in two columns, counted by hand."""
    import gpu_ops
    import gpu_timing

    places = (torch.tensor(t, dtype=torch.int32) for t in ([0, 0, 1], [0, 1, 1]))
    p = gpu_ops.Pattern(emulated.load(), *places, 128, 128, 64, 1, 256)
    free = {"copy_gb_per_s": 1e12, "l2_copy_gb_per_s": 1e12, "dense_tflop_per_s": {"bfloat16": 1e12}}
    blocks, matrix = 3 * 64 * 64 * 2, 256 * 128 * 2
    flop = {**free, "dense_tflop_per_s": {"bfloat16": 1.0}}
    assert gpu_timing.roofline_us(p, 256, "bfloat16", flop)["forward"] == 2 * 256 * 3 * 64 * 64 / 1e6
    memory = {**free, "copy_gb_per_s": 1.0}
    assert gpu_timing.roofline_us(p, 256, "bfloat16", memory)["grad_input"] == (2 * matrix + blocks) / 1e3
    assert gpu_timing.roofline_us(p, 256, "bfloat16", memory)["gradient_norms"] == 2 * matrix / 1e3
    cached = gpu_timing.roofline_us(p, 256, "bfloat16", {**free, "l2_copy_gb_per_s": 1.0})
    assert cached["forward"] == cached["grad_input"] == (2 * blocks + 2 * 256 * 64 * 2) / 1e3  # two tiles; two columns
    assert cached["grad_weight"] == 3 * 256 * 2 * 64 * 2 / 1e3
    assert cached["gradient_norms"] == 2 * 256 * 128 * 2 / 1e3


def test_without_a_gpu_the_script_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(
        [sys.executable, str(emulated.ROOT / "bench" / "gpu_check.py")], capture_output=True, text=True
    )
    assert done.returncode != 0 and "needs a CUDA GPU that torch can use, found none" in done.stderr
