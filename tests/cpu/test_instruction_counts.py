"""Instruction counts of small fixed cases, which do not depend on the clock, against those on record.

callgrind counts what the native module executes in a Python process without torch, on one thread, once with the AVX2
and once with the portable kernels (valgrind knows no AVX-512; those kernels are the same sources).
``instruction_counts.json`` holds the counts and the compiler of the module they were taken from. A change that means to
need more instructions writes it anew:

    python tests/cpu/test_instruction_counts.py
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sparsenet import _C

RECORD = Path(__file__).with_name("instruction_counts.json")
MORE_ALLOWED = 0.03
MORE_WITH_ANOTHER_COMPILER = 0.25
ISAS = ("avx2", "portable")
OPERATIONS = (
    *("Pattern", "linear_forward", "linear_backward", "gradient_norms", "candidate_gradients", "compact_blocks"),
    "select_extreme",
)
# what callgrind calls them: the functions of csrc/bindings.cpp, or of csrc/cpu where a lambda binds them
FUNCTIONS = {
    "Pattern": "sparsenet::cpu::Pattern::Pattern(",
    "select_extreme": "sparsenet::cpu::select_extreme(",
} | {name: f"(anonymous namespace)::{name}(" for name in OPERATIONS if name not in ("Pattern", "select_extreme")}

CASES = """
import importlib.util, sys
import numpy as np

spec = importlib.util.spec_from_file_location("sparsenet._C", sys.argv[1])
C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(C)
assert C.build_info()["isa"] == sys.argv[2], C.build_info()
rng = np.random.default_rng(0)


def pattern(rows, cols, b, kept):
    mask = rng.random((rows // b, cols // b)) < kept
    crow = np.concatenate([[0], mask.sum(1).cumsum()]).astype(np.int32)
    return C.Pattern(crow, np.nonzero(mask)[1].astype(np.int32), rows, cols, b), int(mask.sum())


def at(array):
    return array.ctypes.data


for b, dtype, kind in ((32, 0, np.float32), (16, 0, np.float32), (16, 1, np.uint16)):  # uint16: bfloat16 by its bits
    rows, cols, batch = 256, 384, 72
    p, n = pattern(rows, cols, b, 0.4)
    new = lambda *shape: np.zeros(shape, kind)
    draw = lambda *shape: (rng.random(shape) - 0.5).astype(np.float32).view(np.uint32)
    some = lambda *shape: draw(*shape).view(np.float32) if kind is np.float32 else (draw(*shape) >> 16).astype(kind)
    x, values, bias, y, g = some(batch, cols), some(n, b, b), some(rows), new(batch, rows), some(batch, rows)
    grad_x, grad_values, grad_bias = new(batch, cols), new(n, b, b), new(rows)
    norms = np.zeros((rows // b, cols // b), np.float32)
    places = [np.arange(4, dtype=np.int32), np.arange(4, dtype=np.int32)[::-1].copy()]
    candidates = new(4, b, b)
    for _ in range(2):  # the second call finds its scratch memory
        x_matrix, g_matrix = (at(x), batch, cols, cols), (at(g), batch, rows, rows)
        C.linear_forward(p, (dtype, 1, 1), x_matrix, (at(values), at(bias)), (at(y), 0))
        C.linear_backward(p, (dtype, 1, 1), x_matrix, at(values), (g_matrix, at(y)),
                          (at(grad_x), at(grad_values), at(grad_bias)))
        C.gradient_norms((dtype, b, 1), x_matrix, g_matrix, (0, rows // b), at(norms))
        C.candidate_gradients((dtype, b, 1), x_matrix, g_matrix, tuple(places), at(candidates))
    kept = [np.sort(rng.permutation(k)[: 3 * k // 4]).astype(np.int32) for k in (rows, cols)]
    q, m = pattern(3 * rows // 4, 3 * cols // 4, b, 1.0)
    target = new(m, b, b)
    C.compact_blocks(p, q, tuple(kept), [(at(values), at(target), values.itemsize)], 1)
    C.select_extreme(rng.random(5000).astype(np.float32), 700, True)
"""


def valgrind() -> str:
    """The program; skips the test with the reason where the counts cannot be taken."""
    found = shutil.which("valgrind")
    if found is None:
        pytest.skip("valgrind is not installed (Debian: apt install valgrind)")
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"the counts on record are of x86-64, this is {platform.machine()}")
    return found


def count_instructions(isa: str) -> dict[str, int]:
    """Instructions of each operation, all of its calls together."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind.out"
        toggles = [f"--toggle-collect={name}*" for name in FUNCTIONS.values()]
        environment = os.environ | {
            "SPARSENET_ISA": isa, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0",
        }  # fmt: skip
        environment.pop("LD_PRELOAD", None)
        cases = Path(folder) / "cases.py"
        cases.write_text(CASES)
        command = [valgrind(), "--tool=callgrind", f"--callgrind-out-file={out}", "--collect-atstart=no", *toggles]
        done = subprocess.run(
            [*command, sys.executable, str(cases), _C.__file__, isa], env=environment, capture_output=True, text=True
        )
        if done.returncode and f"no {isa}" in done.stderr:
            pytest.skip(f"valgrind shows a processor without {isa}")
        assert done.returncode == 0, done.stderr[-3000:]
        report = subprocess.run(
            ["callgrind_annotate", "--inclusive=yes", "--threshold=100", "--show-percs=no", str(out)],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
    return {name: inclusive(report, function) for name, function in FUNCTIONS.items()}


def inclusive(report: str, function: str) -> int:
    """The inclusive count of ``function`` in what callgrind_annotate prints."""
    found = [line for line in report.splitlines() if f":{function}" in line and ".cold" not in line]
    assert found, f"callgrind saw no call of {function}\n{report[:3000]}"
    return max(int(re.match(r"\s*([\d,]+)", line)[1].replace(",", "")) for line in found)


def too_many(counted: dict[str, int], record: dict[str, int], allowed: float) -> list[str]:
    """What needs more instructions than ``record`` by more than the share ``allowed``."""
    return [
        f"{name}: {counted[name]:,} instructions, {record[name]:,} on record ({counted[name] / record[name] - 1:+.1%})"
        for name in record
        if counted[name] > record[name] * (1 + allowed)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_no_operation_needs_more_instructions(isa):
    record = json.loads(RECORD.read_text())
    same = record["compiler"] == _C.build_info()["compiler"]
    counted = count_instructions(isa)
    assert set(counted) == set(record["counts"][isa])
    worse = too_many(counted, record["counts"][isa], MORE_ALLOWED if same else MORE_WITH_ANOTHER_COMPILER)
    assert not worse, f"{isa}: {'; '.join(worse)}. If this is meant: python {Path(__file__).name}"


def test_a_regression_shows():
    record = {"linear_forward": 1000, "compact_blocks": 1000}
    assert too_many({"linear_forward": 1030, "compact_blocks": 10}, record, 0.03) == []
    (said,) = too_many({"linear_forward": 1031, "compact_blocks": 1000}, record, 0.03)
    assert said == "linear_forward: 1,031 instructions, 1,000 on record (+3.1%)"


def test_counts_are_read_from_the_report():
    report = (
        "  9,000  ???:(anonymous namespace)::gradient_norms(int) [/x/_C.so]\n"
        " 12,345  /src/b.cpp:(anonymous namespace)::linear_forward(int, int) [/x/_C.so]\n"
        "     12  ???:(anonymous namespace)::linear_forward(int, int) [clone .cold] [/x/_C.so]\n"
    )
    assert inclusive(report, FUNCTIONS["linear_forward"]) == 12345
    with pytest.raises(AssertionError, match="callgrind saw no call of"):
        inclusive(report, FUNCTIONS["compact_blocks"])


if __name__ == "__main__":
    taken = {"compiler": _C.build_info()["compiler"], "counts": {isa: count_instructions(isa) for isa in ISAS}}
    RECORD.write_text(json.dumps(taken, indent=1) + "\n")
    print(json.dumps(taken, indent=1))
