"""Builds the native module for one GPU architecture with nvcc and g++ alone: no CMake, no ninja, no network, no torch.

Every source is compiled by a process of its own, as many at once as there are processors. Objects are kept in
``build/gpu_check/objects`` under a name that is made from the source, its headers, the flags and the compiler's
version. A folder that was filled on another machine can therefore be carried along: objects of ``.cu`` files depend on
no Python, so only the two files that speak to Python are compiled again there. Of the CPU's kernels only the portable
set is built.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from gpu_cases import Journal, failures

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "gpu_check"
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^">]+)[">]', re.MULTILINE)
SLOWEST = ("_sm90", "_sm80", "_simt")  # stems of the sources that take longest: they start first


def module_path() -> Path:
    """Where the module of this Python is built."""
    return BUILD / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def nvcc_path() -> str | None:
    """The toolkit's compiler."""
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def architecture() -> str:
    """What the first card needs, such as ``90a``; a Hopper card's where there is none."""
    tool = shutil.which("nvidia-smi")
    if tool is not None:
        command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0].strip()
        if re.fullmatch(r"\d+\.\d+", found):
            return found.replace(".", "") + ("a" if found == "9.0" else "")
    return "90a"


def pybind11_include() -> str:
    """The folder of pybind11's headers: the package's own, else the copy that comes with torch."""
    for package, parts in (("pybind11", ("include",)), ("torch", ("include",))):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            folder = Path(spec.origin).parent.joinpath(*parts)
            if (folder / "pybind11" / "pybind11.h").is_file():
                return str(folder)
    sys.exit("gpu_check: needs the headers of pybind11, found them neither in pybind11 nor in torch")


def python_include() -> str:
    """The folder of this Python's own headers."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    folders = [sysconfig.get_paths()["include"], f"{sys.base_prefix}/include/{version}", f"/usr/include/{version}"]
    for folder in folders:
        if Path(folder, "Python.h").is_file():
            return folder
    sys.exit(f"gpu_check: needs Python.h of {version}, found it in none of {', '.join(folders)}")


def listed(pattern: str) -> list[Path]:
    """The C++ sources that a command of the top CMakeLists.txt lists."""
    found = re.search(pattern + r"([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    if found is None:
        sys.exit(f"gpu_check: CMakeLists.txt has no {pattern}")
    return [ROOT / name for name in found.group(1).split() if name.endswith(".cpp")]


def commands(arch: str, nvcc: str, gxx: str) -> list[tuple[Path, list[str], str]]:
    """(source, command without source and target, what the object depends on beside the sources)."""
    host = [gxx, "-std=c++20", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-DNDEBUG", "-ffp-contract=fast"]
    # The CPU's kernels are not what is measured here: the least optimising compiles fastest.
    defines = [f'-DSPARSENET_CUDA="{arch}"', '-DSPARSENET_VERSION="gpu_check"', "-DSPARSENET_HAVE_PORTABLE"]
    headers = [f"-I{pybind11_include()}", f"-I{python_include()}"]
    device = ["-std=c++20", "-O3", "-DNDEBUG", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    device += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
    release = re.search(r"release [\d.]+", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    work = []
    for source in sorted((CSRC / "cuda").rglob("*.cu")):
        work.append((source, [nvcc, *device, "-c"], " ".join([release.group() if release else "", *device])))
    machine = " ".join([os.uname().machine, *host[1:], *defines])
    for source in listed(r"set\(SPARSENET_OPS"):
        flags = ["-O1", "-DSPARSENET_PORTABLE", "-DSPARSENET_ISA=portable"]
        work.append((source, [*host, *defines, *flags, "-c"], machine + " ".join(flags)))
    for source in listed(r"pybind11_add_module\(_C") + sorted((CSRC / "cuda").rglob("*.cpp")):
        speaks_python = any(b"<pybind11/" in text for text in with_headers(source, {}).values())
        version = sys.implementation.cache_tag if speaks_python else ""
        work.append((source, [*host, *defines, "-O1", *headers, "-c"], f"{machine} {version}"))
    slow = {stem: i for i, stem in enumerate(SLOWEST)}
    return sorted(work, key=lambda w: min((slow[s] for s in slow if s in w[0].stem), default=len(slow)))


def with_headers(source: Path, seen: dict[str, bytes]) -> dict[str, bytes]:
    """The source and every header of the project that it reaches: path in the project -> contents."""
    name = str(source.relative_to(ROOT))
    if name not in seen:
        seen[name] = source.read_bytes()
        for header in INCLUDE.findall(seen[name].decode()):
            for folder in (source.parent, CSRC):
                if (folder / header).is_file():
                    with_headers((folder / header).resolve(), seen)
                    break
    return seen


def object_path(source: Path, depends: str) -> Path:
    """Where the object lies: the name changes with everything that the object depends on."""
    parts = with_headers(source, {})
    key = hashlib.sha256(b"\0".join([depends.encode(), *(n.encode() + b"\0" + parts[n] for n in sorted(parts))]))
    return BUILD / "objects" / f"{source.stem}.{source.suffix[1:]}.{key.hexdigest()[:16]}.o"


def compiled(item: tuple[Path, list[str], str], end: float) -> tuple[Path, bool, float, str]:
    """(object, whether it was there already, seconds, error) of one source."""
    source, command, depends = item
    target, start = object_path(source, depends), time.monotonic()
    if target.exists():
        return target, True, 0.0, ""
    scratch = target.with_suffix(f".{os.getpid()}.o")
    error = run([*command, str(source), "-o", str(scratch)], end)
    if error:
        scratch.unlink(missing_ok=True)
    else:
        scratch.replace(target)
    return target, False, time.monotonic() - start, error


def run(command: list[str], end: float) -> str:
    """Runs a compiler until `end` at the latest; what it complained of if it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(end - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        return "not finished when the time of this part was over; what is finished is kept for the next build"
    return (done.stderr[-2000:] or f"exit status {done.returncode}") if done.returncode else ""


def build(journal: Journal, seconds: float, arch: str | None = None) -> bool:
    """Compile what is not there, link, and record the seconds of every file; True if the module is there."""
    end = time.monotonic() + seconds
    arch, nvcc, gxx = arch or architecture(), nvcc_path(), os.environ.get("CXX") or shutil.which("g++")
    journal.part["arch"] = arch
    missing = [name for name, found in (("nvcc", nvcc), ("g++", gxx)) if found is None]
    if missing:
        journal.record("compilers", "compile", 0.0, {"passed": False, "error": f"not installed: {', '.join(missing)}"})
        journal.save()
        return False
    (BUILD / "objects").mkdir(parents=True, exist_ok=True)
    objects, carried = [], []
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 2) as pool:
        pending = {pool.submit(compiled, item, end): item[0] for item in commands(arch, nvcc, gxx)}
        for future in as_completed(pending):
            target, kept, taken, error = future.result()
            objects.append(target)
            carried += [target] if kept else []
            result = {"passed": not error, "kept": kept, **({"error": error} if error else {})}
            journal.record(str(pending[future].relative_to(ROOT)), "compile", taken, result)
            journal.save()
    if failures(journal.part):
        return False
    start, target = time.monotonic(), module_path()
    scratch = target.with_name(f".{os.getpid()}.so")
    options = ["-shared", "-cudart=static", "-Xcompiler", "-fopenmp", "-Xlinker", "--exclude-libs,ALL"]
    error = run([nvcc, *options, *map(str, sorted(objects)), "-o", str(scratch)], end)
    if error:
        scratch.unlink(missing_ok=True)
        for path in carried:  # from another machine, perhaps: the next build makes them here
            path.unlink()
    else:
        scratch.replace(target)
    result = {"passed": not error, "module": str(target.relative_to(ROOT)), **({"error": error} if error else {})}
    journal.record("link", "link", time.monotonic() - start, result)
    journal.save()
    return not error
