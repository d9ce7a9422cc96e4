"""Check and time the CUDA kernels on a GPU machine, in one command and under nine minutes.

    python bench/gpu_check.py --out bench/results/gpu.json

It builds the native module for this GPU, checks every op and variant against float64 on random and adversarial
patterns (and that results repeat bit for bit), runs the same checks on small shapes under compute-sanitizer (memcheck,
racecheck, synccheck), measures the machine's ceilings, and times forward, grad_input, grad_weight and the growth norms
against cuBLAS, torch BSR, cuSPARSE (through cupy) and a dense layer of as many parameters. The last lines are the
table; the JSON holds everything. What there was no time for is listed in ``left_out``. Exit status: 0 only if every
check passed.

Needs the repository, nvcc, torch, pybind11, cmake and ninja; cupy for the cuSPARSE column. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_correctness import correctness
from gpu_ops import BUILD, ROOT, build, load
from gpu_timing import bench_case, bench_cases, bench_rewire, ceilings, table

START = time.monotonic()


def seconds() -> float:
    """Seconds since the start of the program."""
    return time.monotonic() - START


def sanitizers(limit_s: float) -> dict:
    """The small correctness run under compute-sanitizer's three tools."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {"left_out": "compute-sanitizer is not installed"}
    report = {}
    for name in ("memcheck", "racecheck", "synccheck"):
        for filters in (["--kernel-name", "kns=sparsenet"], []):
            command = [
                tool,
                "--tool",
                name,
                "--error-exitcode",
                "99",
                *filters,
                sys.executable,
                __file__,
                "--stage",
                "small",
            ]
            try:
                done = subprocess.run(
                    command,
                    capture_output=True,
                    text=True,
                    timeout=limit_s,
                    env=dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1"),
                )
            except subprocess.TimeoutExpired:
                report[name] = {"passed": False, "reason": f"not finished after {limit_s:.0f} s"}
                break
            text = done.stdout + done.stderr
            ran = "SMALL CHECK" in text
            report[name] = {
                "passed": done.returncode == 0 and ran,
                "summary": [line for line in text.splitlines() if "SUMMARY" in line or "SMALL CHECK" in line][-4:],
            }
            if ran:
                break
            report[name]["tail"] = text[-1500:]
    return report


def machine(ops) -> dict:
    """Where the figures come from."""
    return {
        "device": ops.device_info(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(),
    }


def main() -> int:
    """Run the stages within the time limit; write JSON; print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu_check.json", help="where the JSON goes")
    parser.add_argument("--limit", type=float, default=520, help="seconds for everything")
    parser.add_argument("--stage", choices=("all", "small"), default="all", help="small: what the sanitizers run")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu_check: needs a CUDA GPU that torch can use, found none")
    if options.stage == "small":
        report = correctness(load(next(iter(BUILD.glob("_C*.so")))), small=True)
        print("SMALL CHECK", report["cases"], "cases,", len(report["failures"]), "failures", *report["failures"][:3])
        return 0 if report["passed"] else 1

    major, minor = torch.cuda.get_device_capability()
    ops = load(build(f"{major}{minor}a" if major == 9 else f"{major}{minor}"))
    report = {"machine": machine(ops), "build_s": seconds(), "left_out": []}
    print(f"built in {seconds():.0f} s for {report['machine']['device']['name']}", flush=True)
    report["correctness"] = correctness(ops, small=False)
    print(
        f"correctness: {report['correctness']['cases']} cases, failures: {report['correctness']['failures'][:8]}",
        flush=True,
    )
    report["sanitizers"] = sanitizers(limit_s=max(30.0, (options.limit - seconds()) * 0.17))
    print(
        f"sanitizers: { {k: v.get('passed') if isinstance(v, dict) else v for k, v in report['sanitizers'].items()} } "
        f"({seconds():.0f} s)",
        flush=True,
    )
    report["ceilings"], report["benches"], dense = ceilings(), [], {}
    for case in bench_cases():
        if seconds() > options.limit - 20:
            report["left_out"].append(str(case))
            continue
        try:
            report["benches"].append(bench_case(ops, case, report["ceilings"], dense))
        except (RuntimeError, torch.cuda.OutOfMemoryError) as error:
            report["left_out"].append(f"{case}: {str(error)[:200]}")
    report["rewire"] = bench_rewire(ops) if seconds() < options.limit else None
    report["total_s"] = seconds()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1, default=str))
    print(table(report["benches"]))
    print(
        json.dumps(
            {
                "ceilings": report["ceilings"],
                "rewire": report["rewire"],
                "left_out": len(report["left_out"]),
                "total_s": round(report["total_s"]),
            },
            default=str,
        )
    )
    clean = report["correctness"]["passed"] and all(
        r.get("passed") for r in report["sanitizers"].values() if isinstance(r, dict)
    )
    print("PASSED" if clean else "FAILED: see correctness and sanitizers in the JSON")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
