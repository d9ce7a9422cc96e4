"""``sparsenet doctor``: shows what this machine and this build offer."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from sparsenet import data, functional
from sparsenet.functional.build import build_info
from sparsenet.memory.budget import available_bytes, format_bytes

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def run(_: argparse.Namespace) -> int:
    """Prints a line per thing to know."""
    info = build_info()
    archs = ", ".join(info["cuda_archs"]) if info["cuda_archs"] else "none: this build is for the CPU only"
    rows = [
        ("sparsenet", f"{info['version']}, native module {functional.native._C.__file__}"),
        ("python, torch", f"{sys.version.split()[0]}, {info['torch']}"),
        ("instruction set", f"{info['isa']} in use; this machine has {', '.join(info['isa_available'])}"),
        ("compiler", str(info["compiler"])),
        ("CUDA built", archs),
        ("CUDA here", "yes" if info["cuda_available"] else "no"),
        ("threads", f"{info['threads']} of {os.cpu_count()} processors"),
        ("OpenMP", _openmp()),
        ("free memory", format_bytes(available_bytes())),
    ]
    for name in ("fashion-mnist", "mnist", "cifar10", "cifar100", "digits"):
        try:
            rows.append((name, f"found: {data.load(name, download=False, fallback=False).source}"))
        except (OSError, ModuleNotFoundError):
            rows.append((name, "not on this machine"))
        except (ValueError, TypeError) as error:
            rows.append((name, f"damaged: {error}"))
    print("\n".join(f"{name:<18}{text}" for name, text in rows))
    return 0


def _openmp() -> str:
    """Whether torch and the kernels share one OpenMP runtime: two would fight for the processors."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "unknown: no /proc here"
    found = sorted(set(re.findall(r"\S*/lib(?:gomp|omp|iomp5)\S*", maps)))
    if len(found) == 1:
        return f"one runtime, shared with torch: {found[0]}"
    return f"{len(found)} runtimes, which slow each other down: {', '.join(found)}"
