"""What bench/gpu_check.py checks and times, on the emulated device: its cases, the Python path, benches, roofline."""

from __future__ import annotations

import cuda_emulated as emulated
import pytest
import torch

from sparsenet.functional import native

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, run bench/gpu_check.py itself")


@pytest.fixture(autouse=True)
def bench_folder(monkeypatch):
    monkeypatch.syspath_prepend(str(emulated.ROOT / "bench"))


@pytest.fixture
def ops(monkeypatch):
    """The emulated ops, serving the package; what they displaced serves again afterwards."""
    import gpu_ops

    monkeypatch.setattr(native, "kernels_of", native.kernels_of)
    module = emulated.load()
    module.configure(seed=0)
    module.set_device()
    module.launches()
    gpu_ops.serve(module)
    yield module
    gpu_ops._cpu_kernels.clear()
    module.force_variant(0)
    module.launches()


# --- what is checked --------------------------------------------------------------------------------------------------


def test_the_small_cases_pass_and_reach_every_kernel(ops):
    """Every third one of what the sanitizers run; the passes take turns."""
    from gpu_correctness import PASSES, op_cases

    cases = list(op_cases(ops, small=True))
    assert len(cases) == len({case.name for case in cases}) and len(cases) % len(PASSES) == 0
    results = {case.name: case.run() for case in cases[::3]}
    assert len(results) > 60 and not {name: r for name, r in results.items() if not r["passed"]}
    assert all(r["errors"] for r in results.values())
    kernels = {launch["kernel"] for launch in ops.launches()}
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


def test_the_full_list_has_every_op_dtype_block_size_and_variant_the_most_important_first(ops):
    from gpu_correctness import BLOCKS, DTYPES, KINDS, PASSES, configurations, op_cases

    cases = [case.name for case in op_cases(ops)]
    assert len(cases) == len(set(cases)) and cases[0] == "forward sm80 bfloat16 b=32 random batch=130 277x301"
    assert all("sm80 bfloat16" in name for name in cases[: 2 * len(BLOCKS["sm80"]) * len(PASSES)])
    found = {(c.variant, c.dtype, c.block, c.kind) for c in configurations(small=False)}
    for variant, dtypes in DTYPES.items():
        assert found >= {(variant, d, b, k) for d in dtypes for b in BLOCKS[variant] for k in KINDS}
    assert {c.split()[0] for c in cases} == set(PASSES)


def test_an_error_is_measured_against_its_rounding_bound():
    from gpu_correctness import excess

    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    near, far = (exact + 2.0**-9).bfloat16(), (exact + 0.1).bfloat16()
    assert excess(near, exact, exact, 1, 4) <= 1 < excess(far, exact, exact, 1, 4)
    assert excess(exact * float("nan"), exact, exact, 3, 4) == float("inf")


@pytest.mark.parametrize("fault", ["value", "bits", "beside"])
def test_a_wrong_kernel_is_seen(ops, fault, monkeypatch):
    """An output off in its last bits, one that differs between runs, and one written past its end."""
    import gpu_correctness
    from gpu_ops import Layer, make_pattern

    layer = Layer(make_pattern(ops, "random", 40, 50, 16, 0.5), 9, "float32")
    runs = iter(range(2))

    def broken(layer: Layer) -> None:
        layer.forward(pre=True)
        if fault == "value":
            layer.y[3, 5] *= 1 + 1e-4
        elif fault == "bits" and next(runs):
            layer.y[3, 5] = torch.nextafter(layer.y[3, 5], torch.tensor(float("inf")))
        elif fault == "beside":
            layer._whole[0][-200] = 0.0

    assert gpu_correctness.check_pass(layer, "forward")["passed"]
    monkeypatch.setitem(gpu_correctness.RUNS, "forward", (broken, *gpu_correctness.RUNS["forward"][1:]))
    found = gpu_correctness.check_pass(layer, "forward")
    expected = {
        "value": "times its rounding bound",
        "bits": "two runs differ in their bits",
        "beside": "it wrote beside its outputs",
    }
    assert not found["passed"] and expected[fault] in found["error"]


@pytest.mark.parametrize(("dtype", "off"), [("float32", 1e-4), ("tf32", 2e-2), ("float64", 1e-5)])
def test_a_wrong_norm_is_seen(ops, dtype, off):
    import gpu_correctness
    from gpu_ops import Layer, make_pattern

    layer = Layer(make_pattern(ops, "random", 40, 56, 1 if dtype == "float64" else 16, 0.5), 33, dtype)
    assert gpu_correctness.check_pass(layer, "gradient_norms")["passed"]
    layer.norms[1, 2] *= 1 + off
    assert gpu_correctness.norms_errors(layer)["norms"] > 1


def python_cases(chosen) -> dict:
    from gpu_package import package_cases

    return {case.name: case.run() for case in package_cases() if chosen(case)}


def test_the_python_path_is_checked(ops):
    quick = ("SparseLinear float32 b=16 gelu", "compaction", "checkpoint", "CUDA graph")
    results = python_cases(lambda case: case.name in quick)
    assert len(results) == 4 and all(r["passed"] for r in results.values()), results
    assert "forward_simt" in {launch["kernel"] for launch in ops.launches()}


@pytest.mark.slow
def test_all_of_the_python_path_is_checked(ops):
    results = python_cases(lambda case: True)
    assert len(results) == 11 and all(r["passed"] for r in results.values()), results


def test_training_that_ends_elsewhere_is_seen():
    from gpu_package import differences

    ours = (["a", "b"], [torch.ones(3)])
    assert differences(ours, ours) == []
    assert differences(ours, (["a", "c"], [torch.ones(3)])) == ["layer 1: other blocks"]
    assert differences(ours, (["a", "b"], [torch.ones(3) + 1e-3])) == ["tensor 0: 0.001 apart"]
    assert len(differences((["a"], [torch.full((3,), torch.nan)]), (["a"], [torch.ones(3)]))) == 1


# --- what is timed ----------------------------------------------------------------------------------------------------


def test_the_benches_begin_with_the_most_telling(ops):
    import gpu_benches

    names = [case.name for case in gpu_benches.bench_cases(ops)]
    assert len(names) == len(set(names)) > 50
    assert names[:5] == ["ceilings", *(f"4096x4096 batch=2048 10% b={b} bfloat16 random" for b in (32, 64, 128, 16))]
    assert gpu_benches.goal((4096, 4096, 2048, 0.1, 64, "bfloat16", "random"), "forward") == 0.70
    assert gpu_benches.goal((4096, 4096, 16, 0.1, 64, "bfloat16", "random"), "forward") is None


def test_the_roofline_is_the_largest_of_three_bounds(ops):
    """Two block rows of 64 share a CTA: three blocks in two columns, counted by hand."""
    import gpu_ops
    import gpu_timing

    p = gpu_ops.Pattern(ops, torch.tensor([[True, True], [False, True]]), 128, 128, 64)
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
