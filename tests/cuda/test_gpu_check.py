"""bench/gpu_check.py before it meets a GPU: budgets, the JSON, its processes, its parts on the emulated device."""

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


def start(out: Path, *arguments: str) -> subprocess.Popen:
    """gpu_check.py on the emulated device."""
    line = [sys.executable, str(CHECK), "--module", str(emulated.build()), "--tiny", "--out", str(out), *arguments]
    package = str(Path(native.__file__).resolve().parents[2])
    environment = dict(os.environ, PYTHONPATH=package)
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


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


STUB = """
import os, sys, time
sys.path.insert(0, {bench!r})
from pathlib import Path
from gpu_cases import Case, Journal, run_cases
def crash(): os.kill(os.getpid(), 11)
def wait(): time.sleep(60)
runs = {{"good": dict, "crash": crash, "wait": wait, "wrong": lambda: {{"passed": False, "error": "off by one"}}}}
cases = [Case(f"{{i}} {{what}}", what, runs[what]) for i, what in enumerate({whats!r}.split())]
sys.exit("no cases") if not cases else run_cases(Journal(Path({out!r}), {part!r}), cases, {seconds!r})
"""


@pytest.fixture
def check(monkeypatch, tmp_path):
    """``check(whats, seconds)``: gpu_check.py's main with processes that do what the words say; (status, part)."""
    import gpu_check

    def run(whats: str, seconds: float, part: str = "correct") -> tuple[int, dict]:
        def command(options, part: str, out: Path, left: float) -> list[str]:
            stub = STUB.format(bench=str(CHECK.parent), whats=whats, out=str(out), part=part, seconds=left)
            return [sys.executable, "-c", stub]

        out = tmp_path / "report.json"
        monkeypatch.setattr(gpu_check, "command", command)
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--parts", part, "--out", str(out)])
        monkeypatch.setitem(gpu_check.PARTS, part, seconds)
        return gpu_check.main(), json.loads(out.read_text())["parts"][part]

    return run


def test_a_process_that_dies_costs_the_case_it_ran(check, capsys):
    status, part = check("good crash good crash crash wrong good", 60.0)
    assert status == 1 and not part["passed"] and part["state"] == "finished"
    assert [(c["name"], c.get("passed", True)) for c in part["cases"]] == [
        *[("0 good", True), ("1 crash", False), ("2 good", True), ("3 crash", False), ("5 wrong", False)],
        ("6 good", True),
    ]
    assert part["cases"][1]["error"] == "its process ended: exit status -11" and part["cases"][1]["fatal"]
    assert part["left_out"] == [{"name": "4 crash", "reason": "others of its kind cost their process"}]
    output = capsys.readouterr().out
    assert "correct: finished after" in output and "5 wrong: off by one" in output and "FAILED" in output


def test_a_case_that_hangs_is_given_up(check, monkeypatch):
    import gpu_check

    monkeypatch.setattr(gpu_check, "STUCK", 0.6)
    status, part = check("good wait good", 60.0)
    assert status == 1 and part["state"] == "finished" and part["seconds"] < 30
    assert [c["name"] for c in part["cases"]] == ["0 good", "1 wait", "2 good"]
    assert part["cases"][1]["error"] == "its process ended: stuck for 1 s"


def test_a_part_ends_when_its_seconds_are_over(check, monkeypatch):
    import gpu_check

    monkeypatch.setattr(gpu_check, "GRACE", 0.5)
    status, part = check("good wait good", 2.0)
    assert status == 1 and part["seconds"] < 15 and part["budget_s"] == 2.0
    assert [c["name"] for c in part["cases"]] == ["0 good", "1 wait"]
    assert part["state"] == "still running at the end of the part; no time to go on"


def test_a_process_that_runs_no_case_fails_its_part(check):
    status, part = check("", 60.0)
    assert status == 1 and not part["passed"] and not part["cases"]
    assert part["state"].startswith("exit status 1 before any case was finished") and "no cases" in part["state"]


SANITIZER = """#!/bin/sh
# A stand-in: runs the program behind its own options, and finds nothing or what its name says.
while [ "$1" != "{python}" ]; do [ "$1" = --tool ] && tool=$2; shift; done
"$@" || exit $?
[ $tool = racecheck ] && echo "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)" && exit 99
echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(SANITIZER.format(python=sys.executable))
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")


def test_what_a_sanitizer_reports_is_the_result(check, sanitizer):
    status, part = check("good good", 60.0, part="sanitize")
    results = {case["name"]: case for case in part["cases"]}
    assert set(results) == {"memcheck", "racecheck", "synccheck"} and status == 1
    assert all(case["cases"] == 2 for case in results.values())
    assert [name for name, case in results.items() if not case["passed"]] == ["racecheck"]
    assert "1 hazard" in results["racecheck"]["error"] and "1 hazard" in results["racecheck"]["report"]


def test_a_sanitizer_that_says_nothing_did_not_pass():
    from gpu_check import sanitized

    part = {"cases": [{"name": "a", "passed": True}], "left_out": []}
    clean = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert sanitized("racecheck", part, "", clean)["passed"]
    assert not sanitized("racecheck", part, "", "")["passed"]
    assert not sanitized("racecheck", {**part, "cases": []}, "", clean)["passed"]
    assert not sanitized("memcheck", part, "", "========= ERROR SUMMARY: 10 errors")["passed"]
    assert not sanitized("memcheck", part, "exit status 1", "========= ERROR SUMMARY: 0 errors")["passed"]
    assert not sanitized("memcheck", {**part, "cases": [{"name": "a", "passed": False}]}, "", clean)["passed"]


def worker(monkeypatch, *line: str) -> int:
    """What a part's process does, in this one."""
    import gpu_check

    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--worker", *line])
    return gpu_check.main()


def test_the_sanitizers_run_the_small_cases(monkeypatch, tmp_path):
    import gpu_cases
    import gpu_ops

    monkeypatch.setattr(native, "kernels_of", native.kernels_of)  # the emulated device displaces it
    monkeypatch.setattr(gpu_ops, "_cpu_kernels", [])
    monkeypatch.setattr(gpu_ops, "load", lambda path: gpu_ops.serve(emulated.load()) or emulated.load())
    out = tmp_path / "memcheck.json"
    gpu_cases.write(out, {"parts": {"memcheck": {"cases": [], "left_out": [], "running": None}}})
    line = ["--tiny", "--module", str(emulated.build()), "--seconds", "sanitize=200"]
    assert worker(monkeypatch, "memcheck", "--out", str(out), *line) == 0
    part = gpu_cases.read(out)["parts"]["memcheck"]
    assert len(part["cases"]) == 5 and not gpu_cases.failures(part)
    assert part["machine"]["device"]["name"] == "emulated"


def test_without_a_gpu_the_script_says_so(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="needs a CUDA GPU that torch can use, found none"):
        worker(monkeypatch, "correct", "--out", str(tmp_path / "report.json"))


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
