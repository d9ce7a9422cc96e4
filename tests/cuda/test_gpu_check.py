"""bench/gpu_check.py on the emulated device, before it meets a GPU: its cases, its budgets, its JSON, its processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import cuda_emulated as emulated
import pytest
import torch

from sparsenet.functional import native

CHECK = emulated.ROOT / "bench" / "gpu_check.py"
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


def start(out: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    """gpu_check.py on the emulated device."""
    line = [sys.executable, str(CHECK), "--module", str(emulated.build()), "--tiny", "--out", str(out), *arguments]
    package = str(Path(native.__file__).resolve().parents[2])
    environment = dict(os.environ, PYTHONPATH=package, **variables)
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


# --- cases, budgets and the file --------------------------------------------------------------------------------------


class Clock:
    """Moves on by what cases say they take."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def made(clock: Clock, name: str, kind: str, seconds: float, **result):
    from gpu_cases import Case

    def run() -> dict:
        clock.now += seconds
        if "error" in result:
            raise RuntimeError(result["error"])
        return {"passed": True, **result}

    return Case(name, kind, run)


def test_a_case_is_not_begun_when_its_kind_takes_longer_than_what_is_left(tmp_path):
    from gpu_cases import Journal, read, run_cases

    clock, out = Clock(), tmp_path / "report.json"
    cases = [made(clock, f"long {i}", "long", 4.0) for i in range(3)] + [made(clock, "short", "short", 1.0)]
    assert run_cases(Journal(out, "bench"), cases, 10.0, clock=clock)
    part = read(out)["parts"]["bench"]
    assert [(c["name"], c["seconds"]) for c in part["cases"]] == [("long 0", 4.0), ("long 1", 4.0), ("short", 1.0)]
    assert part["left_out"] == [{"name": "long 2", "reason": "no time left"}] and part["running"] is None


def test_a_failing_case_is_recorded_and_the_next_one_runs(tmp_path):
    from gpu_cases import Journal, failures, read, run_cases

    clock, out = Clock(), tmp_path / "report.json"
    cases = [made(clock, "bad", "a", 1.0, error="the launch failed"), made(clock, "good", "a", 1.0, figure=3)]
    assert run_cases(Journal(out, "correct"), cases, 10.0, clock=clock)
    part = read(out)["parts"]["correct"]
    assert failures(part) == ["bad: RuntimeError: the launch failed"]
    assert part["cases"][1] == {"name": "good", "kind": "a", "seconds": 1.0, "passed": True, "figure": 3}


def test_a_lost_device_ends_the_process_and_the_next_one_goes_on_behind_it(tmp_path):
    from gpu_cases import Journal, read, run_cases

    clock, out = Clock(), tmp_path / "report.json"
    fatal = [made(clock, f"fatal {i}", "a", 1.0, error="illegal address") for i in range(3)]
    cases = [made(clock, "first", "a", 1.0), *fatal, made(clock, "last", "b", 1.0)]
    for _ in range(2):
        assert not run_cases(Journal(out, "correct"), cases, 10.0, lambda: False, clock)
    assert run_cases(Journal(out, "correct"), cases, 10.0, lambda: False, clock)
    part = read(out)["parts"]["correct"]
    assert [c["name"] for c in part["cases"]] == ["first", "fatal 0", "fatal 1", "last"]
    assert [c.get("fatal", False) for c in part["cases"]] == [False, True, True, False]
    assert part["left_out"] == [{"name": "fatal 2", "reason": "others of its kind cost their process"}]


def test_the_file_is_whole_while_a_case_runs_and_names_it(tmp_path):
    from gpu_cases import Case, Journal, read, run_cases

    out, seen = tmp_path / "report.json", []
    cases = [Case(name, "a", lambda: seen.append(read(out)["parts"]["bench"]) or {}) for name in ("one", "two")]
    run_cases(Journal(out, "bench"), cases, 10.0)
    assert [part["running"]["name"] for part in seen] == ["one", "two"]
    assert [[c["name"] for c in part["cases"]] for part in seen] == [[], ["one"]]
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    journal = Journal(out, "bench")
    journal.begin(Case("three", "a", dict))
    Journal(out, "bench").bury("its process ended: exit status -11", 2.0)
    last = read(out)["parts"]["bench"]["cases"][-1]
    assert last == {
        **{"name": "three", "kind": "a", "seconds": 2.0, "passed": False, "fatal": True},
        "error": "its process ended: exit status -11",
    }


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


# --- the program ------------------------------------------------------------------------------------------------------


def test_all_parts_run_in_order_and_a_stop_in_the_middle_loses_one_case(tmp_path):
    """A complete run beside one that is killed during its first cases."""
    out, stopped = tmp_path / "report.json", tmp_path / "stopped.json"
    whole = start(out, "--parts", "build,correct,bench", "--seconds", "correct=300,bench=300")
    killed = start(stopped, "--parts", "correct", "--seconds", "correct=300")
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        report = json.loads(stopped.read_text()) if stopped.exists() else {"parts": {}}
        if len(report["parts"].get("correct", {"cases": []})["cases"]) >= 2:
            break
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    left = json.loads(stopped.read_text())["parts"]["correct"]
    assert len(left["cases"]) >= 2 and all(case["passed"] for case in left["cases"]) and "state" not in left

    output, _ = whole.communicate(timeout=300)
    report = json.loads(out.read_text())
    assert whole.returncode == 0 and output.strip().endswith("PASSED"), output
    assert list(report["parts"]) == ["build", "correct", "bench"]
    assert [line.split(":")[0] for line in output.splitlines()[:3]] == ["build", "correct", "bench"]
    assert "is given" in report["parts"]["build"]["state"]
    for part in ("correct", "bench"):
        entry = report["parts"][part]
        assert entry["state"] == "finished" and entry["passed"] and entry["machine"]["device"]["name"] == "emulated"
        assert entry["running"] is None and not entry["left_out"] and len(entry["cases"]) >= 6
    assert report["parts"]["correct"]["cases"][0]["name"].startswith("forward sm80 bfloat16 b=32")
    benches = report["parts"]["bench"]["cases"]
    assert benches[0]["name"] == "ceilings" and {c["kind"] for c in benches} >= {"linear", "step", "overhead", "rivals"}
    linear = [case for case in benches if case["kind"] == "linear"]
    assert [case["kernels"] for case in linear] == [
        {name: f"{name}_{kind}" for name in ("forward", "grad_input", "grad_weight")}
        for kind in ("sm80", "simt", "tf32_sm80")
    ]
    assert all(case["of_roofline"][name] > 0 for case in linear for name in case["times"])
    assert output.count("| 96x64 | 40 | 50% | 32 |") == 3
    assert left["cases"][0]["name"] == report["parts"]["correct"]["cases"][0]["name"]


SANITIZER = """#!/bin/sh
# A stand-in: runs the program, and reports what its name says.
while [ "$1" != "{python}" ]; do [ "$1" = --tool ] && tool=$2; shift; done
"$@" || exit $?
[ $tool = racecheck ] && echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)" && exit 99
echo "========= ERROR SUMMARY: 0 errors"
"""


def test_what_a_sanitizer_reports_is_the_result(tmp_path):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER.format(python=sys.executable))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    out = tmp_path / "report.json"
    path = f"{tool.parent}:{os.environ['PATH']}"
    done = start(out, "--parts", "sanitize", "--seconds", "sanitize=200", PATH=path)
    output, _ = done.communicate(timeout=300)
    part = json.loads(out.read_text())["parts"]["sanitize"]
    results = {case["name"]: case for case in part["cases"]}
    assert set(results) == {"memcheck", "racecheck", "synccheck"} and done.returncode == 1, output
    assert all(case["cases"] == 5 for case in results.values())
    assert [name for name, case in results.items() if not case["passed"]] == ["racecheck"]
    assert "1 hazard" in results["racecheck"]["error"] and "racecheck: racecheck says" in output


def test_a_module_that_does_not_load_is_a_failed_part_and_the_next_one_runs(tmp_path):
    broken, out = tmp_path / "cuda_emulated_broken.so", tmp_path / "report.json"
    broken.write_bytes(b"no library")
    line = [sys.executable, str(CHECK), "--module", str(broken), "--out", str(out), "--parts", "correct"]
    done = subprocess.run(line, capture_output=True, text=True)
    part = json.loads(out.read_text())["parts"]["correct"]
    assert done.returncode == 1 and "FAILED: see the JSON" in done.stdout
    assert not part["passed"] and not part["cases"] and "before any case was finished" in part["state"]


def test_without_a_gpu_the_script_says_so(tmp_path):
    line = [sys.executable, str(CHECK), "--parts", "correct", "--out", str(tmp_path / "report.json")]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1 and "needs a CUDA GPU that torch can use, found none" in done.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (("--parts", "correct,speed"), "parts are build, correct, sanitize, bench, got speed"),
        (("--seconds", "bench"), "--seconds must be like bench=60,correct=30, got bench"),
    ],
)
def test_wrong_arguments_are_refused(argument, message):
    done = subprocess.run([sys.executable, str(CHECK), *argument], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


# --- the build --------------------------------------------------------------------------------------------------------


def test_objects_are_named_by_everything_they_depend_on(tmp_path, monkeypatch):
    import gpu_build

    monkeypatch.setattr(gpu_build, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_build, "CSRC", tmp_path / "csrc")
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    source, header = folder / "a.cu", folder / "a.cuh"
    source.write_text('#include "a.cuh"\n#include <vector>\n')
    header.write_text('#include "../types.h"\n')
    (tmp_path / "csrc" / "types.h").write_text("int a;\n")
    names = [gpu_build.object_path(source, "nvcc -O3")]
    assert gpu_build.object_path(source, "nvcc -O3") == names[0]
    names.append(gpu_build.object_path(source, "nvcc -O2"))
    (tmp_path / "csrc" / "types.h").write_text("int b;\n")
    names.append(gpu_build.object_path(source, "nvcc -O3"))
    assert len(set(names)) == 3


COMPILER = """#!/bin/sh
# A stand-in for nvcc and g++: writes the file it is asked for, fails where the source says so.
[ "$1" = --version ] && echo "release 13.0" && exit 0
for last in "$@"; do case $last in *choose.cu) [ -n "$BROKEN" ] && echo "no such type" >&2 && exit 2;; esac; done
echo compiled > "$last"
"""


def test_a_build_keeps_what_is_there_and_names_what_failed(tmp_path, monkeypatch):
    import gpu_build
    from gpu_cases import Journal, failures, read

    for name in ("nvcc", "g++"):
        tool = tmp_path / "bin" / name
        tool.parent.mkdir(exist_ok=True)
        tool.write_text(COMPILER)
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(gpu_build, "BUILD", emulated.ROOT / "build" / f"gpu_check_test_{os.getpid()}")
    try:
        out = tmp_path / "report.json"
        monkeypatch.setenv("BROKEN", "1")
        assert not gpu_build.build(Journal(out, "build"), 60.0, "90a")
        (failure,) = failures(read(out)["parts"]["build"])
        assert failure.endswith("choose.cu: no such type\n")
        monkeypatch.delenv("BROKEN")
        assert gpu_build.build(Journal(out, "again"), 60.0, "90a") and gpu_build.module_path().exists()
        cases = {case["name"]: case for case in read(out)["parts"]["again"]["cases"]}
        made = [name for name, case in cases.items() if not case.get("kept")]
        assert len(cases) > 15 and sorted(Path(name).name for name in made) == ["choose.cu", "link"]
        sources = {path.name for path in (emulated.ROOT / "csrc" / "cuda").rglob("*.cu")}
        assert sources <= {Path(name).name for name in cases} and "bindings.cpp" in {Path(n).name for n in cases}
    finally:
        shutil.rmtree(gpu_build.BUILD, ignore_errors=True)
