"""Measures everything again, in parts of at most a few minutes, into bench/results/, and writes the tables anew.

    python bench/run.py                       # about 15 minutes on an idle machine
    python bench/run.py training memory       # only the parts whose names contain one of these
    python bench/run.py --before "nice -n -5" # a command put before each part, such as one that waits for quiet

The parts named avx2 force that instruction set on both sides: ours by SPARSENET_ISA, torch's by ONEDNN_MAX_CPU_ISA,
MKL_ENABLE_INSTRUCTIONS and ATEN_CPU_CAPABILITY.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results"
AVX2 = {
    "SPARSENET_ISA": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
}
LINEAR = "bench_block_sparse_linear.py"
PARTS: dict[str, tuple[str, str]] = {  # name: file, what of it
    "training": ("bench_training_step.py", ""),
    "density-forward": (LINEAR, "density_float32 and (forward or grad_input)"),
    "density-backward": (LINEAR, "density_float32 and (grad_weight or step)"),
    "rivals": (LINEAR, "rivals or small_blocks or pattern"),
    "operations": ("bench_block_gradient_squared_norms.py bench_compact_blocks.py bench_block_pattern.py", ""),
    "update": ("bench_update.py", ""),
    "batch": (LINEAR, "small_batch or large_batch or largest_batch"),
    "bfloat16": (LINEAR, "bfloat16"),
    "shape": (LINEAR, "test_shape"),
    "large-shape": (LINEAR, "large_shape"),
    "memory": ("bench_memory.py", ""),
    "avx2": (LINEAR, "density_float32 and not step and (0.1 or 0.2 or 0.5) and (16-float32 or 32-float32)"),
}


def main() -> int:
    """Runs the parts, then bench/tables.py; the exit status is that of the first part that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all")
    parser.add_argument("--before", default="", help="a command put before each part")
    parser.add_argument("--seconds", default="1.0", help="for each row (1)")
    options = parser.parse_args()
    chosen = [name for name in PARTS if not options.parts or any(part in name for part in options.parts)]
    if not chosen:
        parser.error(f"parts must be of {', '.join(PARTS)}, got {' '.join(options.parts)}")
    status = 0
    for name in chosen:
        files, what = PARTS[name]
        print(f"== {name}", flush=True)
        command = [
            *shlex.split(options.before), sys.executable, "-m", "pytest", "-q", "--benchmark-columns=median,iqr,rounds",
            *(str(BENCH / file) for file in files.split()), "-k", what,
            "--contest-seconds", options.seconds, "--results", str(RESULTS),
        ]  # fmt: skip
        avx2 = name == "avx2"
        command += ["--suffix", "_avx2"] if avx2 else []
        done = subprocess.run(command, cwd=BENCH, env={**os.environ, **(AVX2 if avx2 else {})}, check=False)
        status = status or done.returncode
    return status or subprocess.run([sys.executable, str(BENCH / "tables.py")], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
