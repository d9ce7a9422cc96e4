"""Builds the native module with CMake; everything else is declared in pyproject.toml."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if sys.version_info < (3, 10):
    sys.exit(f"sparsenet needs Python 3.10 or newer, this is {sys.version.split()[0]}")


ROOT = Path(__file__).resolve().parent
source_digest = runpy.run_path(str(ROOT / "sparsenet" / "files.py"))["source_digest"]


class CMakeBuild(build_ext):
    """Runs CMake and Ninja; the module lands in the sparsenet package."""

    def build_extension(self, ext: Extension) -> None:
        """Configures, builds and installs ``_C`` next to where setuptools expects it."""
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            sys.exit("sparsenet needs a C++20 compiler (g++ 11 or clang++ 14 and newer): none found; set CXX")
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        import pybind11

        configure = [
            "cmake",
            "-G",
            "Ninja",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            # pip's build environment is gone after a build, and CMake would go on looking for its ninja there.
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja') or 'ninja'}",
            f"-DSPARSENET_VERSION={self.distribution.get_version()}",
            f"-DSPARSENET_SOURCES={source_digest(ROOT)}",
            f"-DCMAKE_INSTALL_PREFIX={target.parent}",
            *os.environ.get("SPARSENET_CMAKE_ARGS", "").split(),
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--parallel", str(os.cpu_count() or 1)], check=True)
        subprocess.run(["cmake", "--install", str(build)], check=True)


setup(ext_modules=[Extension("sparsenet._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
