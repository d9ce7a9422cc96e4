"""The CUDA kernels without a driver, or with one older than the toolkit: the module loads and says so."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from sparsenet import build_info

INFO = """
import json
import sparsenet
from sparsenet import functional
device = sparsenet.build_info()["cuda_device"]
try:
    functional.native._cuda_ops.preferred_rows_per_group(1, 32)
    refusal = ""
except RuntimeError as error:
    refusal = str(error)
print(json.dumps([device, refusal]))
"""

pytestmark = pytest.mark.skipif(not build_info()["cuda_archs"], reason="this build has no CUDA kernels")


def drivers_folder(tmp_path, source: str) -> str:
    """A folder for LD_LIBRARY_PATH in which libcuda.so.1 is what ``source`` makes of it."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "driver.c").write_text(source)
    subprocess.run([compiler, "-shared", "-fPIC", "driver.c", "-o", "libcuda.so.1"], cwd=tmp_path, check=True)
    return str(tmp_path)


def test_an_older_driver_is_named_with_both_versions(tmp_path, run_child):
    source = "int cuDriverGetVersion(int* v) { *v = 11040; return 0; } int cuInit(unsigned flags) { return 0; }"
    done = run_child(INFO, LD_LIBRARY_PATH=drivers_folder(tmp_path, source))
    device, refusal = json.loads(done.stdout)
    version = f"{device['runtime_version'] // 1000}.{device['runtime_version'] % 1000 // 10}"
    assert device["status"] == (
        f"the NVIDIA driver supports CUDA 11.4, older than CUDA {version} that sparsenet was built with: "
        "update the driver"
    )
    assert device["num_devices"] == 0 and refusal == f"CUDA: {device['status']}"


def test_without_a_driver_the_module_loads_and_says_so(tmp_path, run_child):
    """A library that is no driver hides the machine's own, if there is one."""
    done = run_child(INFO, LD_LIBRARY_PATH=drivers_folder(tmp_path, "int nothing;"))
    device, refusal = json.loads(done.stdout)
    assert device["status"] == "no NVIDIA driver is installed"
    assert device["num_devices"] == 0 and refusal == "CUDA: no NVIDIA driver is installed"
