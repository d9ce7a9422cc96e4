"""The native module: no torch in it, nothing of one instruction set linked into another, one OpenMP runtime."""

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
from sparsenet.files import source_digest

ROOT = Path(__file__).resolve().parent.parent
MODULE = Path(_C.__file__)


def tool(*command) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def newest_build() -> Path:
    """The folder with the objects that the latest ordinary build left."""
    found = []
    for cache in (ROOT / "build").glob("*/**/CMakeCache.txt") if (ROOT / "build").is_dir() else []:
        sanitized = re.search(r"^SPARSENET_SANITIZE:\w+=(.+)$", cache.read_text(), re.MULTILINE)
        objects = list(cache.parent.glob("CMakeFiles/kernels_portable.dir/**/*.o"))
        if objects and not sanitized:
            found.append((max(o.stat().st_mtime for o in objects), cache.parent))
    if not found:
        pytest.skip("no build folder with objects here")
    return max(found)[1]


def objects(build: Path, target: str) -> list[Path]:
    return sorted(build.glob(f"CMakeFiles/{target}.dir/**/*.o"))


def test_native_sources_include_no_torch_header():
    """One native build for every PyTorch version."""
    sources = [p for pattern in ("*.h", "*.cpp", "*.cu", "*.cuh") for p in (ROOT / "csrc").rglob(pattern)]
    assert len(sources) > 10
    for source in sources:
        included = re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)', source.read_text(), re.MULTILINE)
        assert not [i for i in included if re.match(r"(torch|ATen|c10|caffe2)/", i)], source


def test_module_needs_only_the_c_and_cxx_runtimes():
    needed = re.findall(r"NEEDED.*\[(.+)\]", tool("readelf", "-d", str(MODULE)))
    allowed = re.compile(
        r"(libgomp|libomp|libstdc\+\+|libm|libgcc_s|libc|ld-linux[\w-]*|libpthread|libdl|librt|libcudart|libcuda)\.so"
    )
    assert needed and all(allowed.match(n) for n in needed), needed


def test_module_exports_only_its_entry():
    """Nothing of ours can be interposed; the C++ library's own templates stay weak, as in any extension."""
    exported = tool("nm", "-D", "--defined-only", str(MODULE)).splitlines()
    strong = [line.split()[-1] for line in exported if line.split()[-2] not in "WVu"]
    assert strong == ["PyInit__C"]
    assert not [line for line in exported if "sparsenet" in line]


def test_instruction_sets_share_no_symbol():
    """A weak or global function compiled with AVX-512 flags could be the copy that the portable path gets."""
    build = newest_build()
    targets = [p.name.removesuffix(".dir") for p in build.glob("CMakeFiles/kernels_*.dir")]
    assert "kernels_portable" in targets
    for target in targets:
        isa = target.removeprefix("kernels_")
        for path in objects(build, target):
            for line in tool("nm", "-C", "--defined-only", str(path)).splitlines():
                _, kind, name = line.split(maxsplit=2)
                if kind.islower() and kind not in "vwu":
                    continue  # local
                if name == "DW.ref.__gxx_personality_v0":
                    continue  # a pointer, the same everywhere
                assert name.startswith(f"sparsenet::cpu::{isa}::"), f"{path.name}: {line}"


def test_code_for_every_machine_uses_no_wide_registers():
    """Outside the kernels of a set, and in the portable ones, there is no AVX instruction."""
    build = newest_build()
    paths = objects(build, "kernels_portable") + objects(build, "_C")
    assert len(paths) >= 5
    for path in paths:
        code = tool("objdump", "-d", "--no-show-raw-insn", str(path))
        wide = re.findall(r"^.*(?:%[yz]mm\d|\tv(?:add|mul|mov|fmadd)\w*).*$", code, re.MULTILINE)
        assert not wide, f"{path}: {wide[:3]}"


def test_kernels_use_what_they_are_named_after():
    """The converse: had the flags been lost, every set would silently be the portable one."""
    build = newest_build()
    expected = {"avx2": r"vfmadd\w+ps .*%ymm", "avx512": r"vfmadd\w+ps .*%zmm", "avx512bf16": r"vdpbf16ps .*%zmm"}
    for isa, instruction in expected.items():
        paths = objects(build, f"kernels_{isa}")
        if paths:
            code = "".join(tool("objdump", "-d", "--no-show-raw-insn", str(p)) for p in paths)
            assert len(re.findall(instruction, code)) > 50, isa


def test_one_openmp_runtime_in_the_process(run_child):
    """Two would mean two thread pools: twice the threads, and hangs after a fork."""
    child = run_child(
        """
        import torch, sparsenet as sn
        torch.randn(500, 500) @ torch.randn(500, 500)
        sn.SparseLinear(256, 256)(torch.randn(300, 256)).sum().backward()
        print(*{line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.split()[-1]}, sep="\\n")
        """
    )
    libraries = [line for line in child.stdout.split() if re.search(r"lib(g|i)?omp", line)]
    assert len(libraries) == 1, libraries


def test_build_info():
    info = sn.build_info()
    assert info["version"] == sn.__version__ and re.match(r"\d+\.\d+\.\d+", sn.__version__)
    assert info["isa"] in info["isa_available"] and info["isa_available"][-1] == "portable"
    assert info["threads"] >= 1 and info["torch"] and info["compiler"]
    forced = os.environ.get("SPARSENET_ISA")
    assert forced in (None, "") or info["isa"] == forced
    pyproject = ROOT / "pyproject.toml"
    assert f'version = "{sn.__version__}"' in pyproject.read_text()


def copy_of_package(folder: Path) -> Path:
    """``folder`` with the package's Python files, without the native module."""
    shutil.copytree(MODULE.parent, folder / "sparsenet", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return folder


def test_missing_native_module_is_one_line_with_the_remedy(run_child, tmp_path):
    """ROBUSTNESS 64."""
    child = run_child("import sparsenet", package=copy_of_package(tmp_path / "package"), check=False)
    assert child.returncode == 1
    last = child.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: sparsenet: the native module is missing")
    assert "pip install" in last and "Segmentation" not in child.stderr


def test_a_broken_native_module_is_one_line_with_the_remedy(run_child, tmp_path):
    package = copy_of_package(tmp_path / "package")
    (package / "sparsenet" / MODULE.name).write_bytes(b"not an ELF file")
    child = run_child("import sparsenet", package=package, check=False)
    last = child.stderr.strip().splitlines()[-1]
    assert child.returncode == 1 and last.startswith(
        "ImportError: sparsenet: the native module is missing or does not load"
    )
    assert "pip install" in last


def test_a_native_module_that_is_too_old_is_one_line_with_the_remedy(run_child, tmp_path):
    """ROBUSTNESS 64: Python files newer than the module that lies beside them."""
    package = copy_of_package(tmp_path / "package")
    (package / "sparsenet" / "_C.py").write_text("def build_info():\n    return {'version': '0.0.1'}\n")
    child = run_child("import sparsenet; print('imported')", package=package, check=False)
    last = child.stderr.strip().splitlines()[-1]
    assert child.returncode == 1 and last.startswith("ImportError: sparsenet: the native module is older"), last
    assert "pip install" in last
    used = set(re.findall(r"\b_C\.(\w+)", (MODULE.parent / "functional" / "native.py").read_text()))
    assert {n for n in used if not n.startswith("_")} <= set(sn.functional.native._NATIVE)


# --- Python in the folder of the sources, whose native module is in the installed package ---


def checkout(tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the sources without a native module, and a folder with an installed package that has one."""
    folder = copy_of_package(tmp_path / "checkout")
    shutil.copy(ROOT / "CMakeLists.txt", folder)
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    installed = copy_of_package(tmp_path / "site-packages")
    shutil.copy(MODULE, installed / "sparsenet")
    return folder, installed


def import_in(folder: Path, installed: Path, run_child):
    """Python in ``folder`` finds it first, as it does the folder it is started in."""
    code = """
        import sparsenet as sn, torch
        from sparsenet import _C
        sn.SparseLinear(64, 32)(torch.randn(2, 64)).sum().backward()
        print(sn.__file__, _C.__file__, sn.functional.native._C is _C, sep="|")
        """
    return run_child(code, package=f"{folder}{os.pathsep}{installed}", check=False)


def test_row85_sources_without_a_native_module_take_that_of_the_installed_package(run_child, tmp_path):
    if sn.build_info()["sources"] != source_digest(ROOT):
        pytest.skip("the native module under test was built from other sources")
    folder, installed = checkout(tmp_path)
    child = import_in(folder, installed, run_child)
    expected = f"{folder / 'sparsenet' / '__init__.py'}|{installed / 'sparsenet' / MODULE.name}|True"
    assert child.stdout.strip() == expected, child.stderr


@pytest.mark.parametrize("what", ["a source was changed", "a source was added", "there are no native sources"])
def test_row85_a_native_module_of_other_sources_is_never_taken(what, run_child, tmp_path):
    folder, installed = checkout(tmp_path)
    if what == "a source was changed":
        with (folder / "csrc" / "bindings.cpp").open("a") as file:
            file.write("// another line\n")
    elif what == "a source was added":
        (folder / "csrc" / "more.h").write_text("")
    else:
        shutil.rmtree(folder / "csrc")
    child = import_in(folder, installed, run_child)
    last = child.stderr.strip().splitlines()[-1]
    assert child.returncode == 1 and last.startswith(
        f"ImportError: sparsenet: the native module is missing in {folder / 'sparsenet'}, which hides the sparsenet "
        f"installed in {installed / 'sparsenet'}, whose native module was built from other sources; "
    ), child.stderr
    assert "run Python in another folder or with python -P" in last and "pip install" in last


def test_row85_a_broken_native_module_is_not_replaced_by_an_installed_one(run_child, tmp_path):
    folder, installed = checkout(tmp_path)
    (folder / "sparsenet" / MODULE.name).write_bytes(b"not an ELF file")
    child = import_in(folder, installed, run_child)
    last = child.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: sparsenet: the native module is missing or does not load"), child.stderr


def test_row85_the_digest_is_that_of_names_and_contents(tmp_path):
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    seen = {source_digest(tmp_path)}
    for file, text in (("csrc/a.h", "1"), ("csrc/cpu/a.h", "1"), ("csrc/a.h", "2"), ("CMakeLists.txt", "")):
        (tmp_path / file).write_text(text)
        seen.add(source_digest(tmp_path))
    assert len(seen) == 5
    (tmp_path / "csrc" / "a.h.orig").write_text("an editor's")
    assert source_digest(tmp_path) in seen


def test_python_version_is_checked_first():
    source = (ROOT / "sparsenet" / "__init__.py").read_text()
    assert source.index("version_info < (3, 10)") < source.index("import torch")
    assert sys.version_info >= (3, 10)
