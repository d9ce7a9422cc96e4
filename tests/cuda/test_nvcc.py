"""Every .cu compiles for sm_80 and sm_90a; the matrix kernels spill nothing and use tensor cores. Needs no GPU."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulator_report import readable

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"
NVCC = shutil.which("nvcc") or ("/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").exists() else None)
ARCHS = ("80", "90a")
MATRIX = re.compile(r"product_\w*kernel|grad_weight_\w*kernel|gradient_norms_\w*kernel")
ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\S+)' for '(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="needs nvcc")]


def demangled(symbols: list[str]) -> list[str]:
    """Readable names where binutils are there, else the symbols."""
    tool = shutil.which("c++filt")
    if tool is None:
        return symbols
    names = subprocess.run([tool], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    return [readable(name) for name in names.splitlines()]


def disassembler() -> str | None:
    """cuobjdump of the toolkit, of the nvidia-cuda-cuobjdump package, or of Triton."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    for folder in sys.path:
        for pattern in ("nvidia/*/bin/cuobjdump", "triton/backends/nvidia/bin/cuobjdump"):
            for candidate in Path(folder or ".").glob(pattern):
                return str(candidate)
    return None


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{stem: (object, ptxas report)}"""
    folder = tmp_path_factory.mktemp("nvcc")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS] + ["-gencode=arch=compute_80,code=compute_80"]

    def compile_one(source: Path):
        target = folder / f"{source.stem}.o"
        done = subprocess.run(
            [
                NVCC,
                "-std=c++20",
                "-O3",
                *targets,
                "-Xptxas",
                "-v",
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden,-Wall",
                "-c",
                str(source),
                "-o",
                str(target),
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{source.name}:\n{done.stderr[-4000:]}"
        return source.stem, (target, done.stderr)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(pool.map(compile_one, sorted(CUDA.rglob("*.cu"))))


@pytest.fixture(scope="module")
def report(compiled):
    """{readable name: {arch: registers, bytes spilled, HMMA instructions}}, written for emulator_report.py, too."""
    rows = [match.groupdict() for _, text in compiled.values() for match in ENTRY.finditer(text)]
    found: dict[str, dict] = {}
    for row, name in zip(rows, demangled([row["symbol"] for row in rows]), strict=True):
        found.setdefault(name, {})[row["arch"]] = {
            "registers": int(row["registers"]),
            "spill_bytes": int(row["stores"]) + int(row["loads"]),
        }
    yield found
    target = ROOT / "build" / "nvcc_report.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(dict(sorted(found.items())), indent=1))


def test_no_spills_in_the_matrix_kernels(report):
    assert len(report) > 100 and all(set(on_archs) == {f"sm_{a}" for a in ARCHS} for on_archs in report.values())
    spilled = {
        (name, arch): entry["spill_bytes"]
        for name, on_archs in report.items()
        for arch, entry in on_archs.items()
        if entry["spill_bytes"] and MATRIX.search(name)
    }
    assert not spilled


def test_no_warnings(compiled):
    for stem, (_, report) in compiled.items():
        assert "warning" not in report, f"{stem}:\n{report[-2000:]}"


def test_the_tensor_core_kernels_use_tensor_cores_and_asynchronous_copies(compiled, report):
    tool = disassembler()
    if tool is None:
        pytest.skip("needs cuobjdump (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm)")
    environment = {"PATH": f"{Path(tool).parent}:/usr/bin:/bin"}
    kernels = 0
    for stem, (target, _) in compiled.items():
        if not stem.endswith("_sm80"):
            continue
        sass = subprocess.run(
            [tool, "-sass", str(target)], capture_output=True, text=True, check=True, env=environment
        ).stdout
        for arch, code in re.findall(r"^\s*arch = (\w+)$(.*?)(?=^\s*arch = |\Z)", sass, re.MULTILINE | re.DOTALL):
            sections = [section for section in code.split("Function : ")[1:] if MATRIX.search(section.split()[0])]
            names = demangled([section.split()[0] for section in sections])
            for name, section in zip(names, sections, strict=True):
                kernels += 1
                tf32 = re.search(r"kernel<float\b", name) is not None
                count = section.count("HMMA.1688.F32.TF32" if tf32 else "HMMA.16816.F32")
                report[name][arch]["hmma"] = count
                assert count > 0, name
                assert "LDL" not in section and "STL" not in section, f"{name} uses local memory"
                if "small" not in name:
                    assert "LDGSTS" in section, name
                    # tf32 operands whose k runs down the rows are read word by word: both of an outer product.
                    assert "LDSM" in section or (tf32 and "product_sm80" not in name), name
    # Per arch and type (bfloat16, float16, tf32):
    # 8 forward, 12 small-batch forward, 8 grad_input, 4 grad_weight, 4 norms.
    assert kernels == len(ARCHS) * 3 * (8 + 12 + 8 + 4 + 4)


def test_no_symbol_but_the_ops_leaves_the_objects(compiled):
    """No framework, and nothing of the runtime linked twice: the objects need only cudart and libstdc++."""
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("needs nm")
    for target, _ in compiled.values():
        undefined = subprocess.run([tool, "-u", str(target)], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"torch|c10|at::|Py", undefined)
