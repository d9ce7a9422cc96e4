"""Check and time the CUDA kernels on a GPU machine, in parts of at most 100 seconds, the most important things first.

    python bench/gpu_check.py --out gpu.json                          # all parts
    python bench/gpu_check.py --parts correct,bench --seconds correct=30
    python bench/gpu_check.py --parts build --arch 90a                # without a GPU: what a visit carries along

build     compiles the native module for this card; objects that are there already are kept.
correct   checks every op, dtype, block size and variant against float64, then the Python path.
sanitize  runs small cases under compute-sanitizer: memcheck, racecheck, synccheck, at the same time.
bench     times the passes against cuBLAS, a training step, a rewire, and other libraries.

Each part is a process of its own and keeps to its seconds. The JSON file is complete after every case, so a stop at any
moment loses one case at most. A case that fails is recorded and the next one runs; if it took the CUDA context or the
whole process with it, a new process goes on behind it. What there was no time for is listed in ``left_out``. Exit
status: 0 only if every part that was asked for ran and nothing in it failed. Needs this checkout, torch, nvcc and g++;
docs/contributing.md has more.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import gpu_build
from gpu_cases import CONTEXT_LOST, Journal, failures, read, run_cases, write

PARTS = {"build": 90.0, "correct": 60.0, "sanitize": 60.0, "bench": 95.0}  # seconds
TOOLS = ("memcheck", "racecheck", "synccheck")
GRACE = 5.0  # seconds that a part's last case may take beyond the part's end
STUCK = 40.0  # seconds after which a single case of a part is given up
SANITIZED = 0.85  # share of its time that a sanitized process begins cases in: ending takes it long
HIDDEN = argparse.SUPPRESS


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, in the order in which they run")
    parser.add_argument("--out", type=Path, default=gpu_build.ROOT / "build" / "gpu_check.json", help="the JSON file")
    parser.add_argument("--seconds", default="", help="other times for parts, such as bench=60,correct=30")
    parser.add_argument("--arch", help="build for this architecture, such as 90a, instead of the card's own")
    parser.add_argument("--module", type=Path, help="check this module instead of the one that build makes")
    parser.add_argument("--tiny", action="store_true", help="a few small cases: for the emulated device")
    parser.add_argument("--worker", help=HIDDEN)  # the part that this process runs
    options = parser.parse_args()
    options.parts = [part for part in options.parts.split(",") if part]
    options.limits = dict(PARTS)
    try:
        options.limits |= {k: float(v) for k, v in (pair.split("=") for pair in options.seconds.split(",") if pair)}
    except ValueError:
        parser.error(f"--seconds must be like bench=60,correct=30, got {options.seconds}")
    if unknown := [part for part in (*options.parts, *options.limits) if part not in PARTS]:
        parser.error(f"parts are {', '.join(PARTS)}, got {', '.join(unknown)}")
    return options


# --- what runs in a part's own process --------------------------------------------------------------------------------


def work(options: argparse.Namespace, seconds: float) -> int:
    """Run one part's cases in this process; its exit status."""
    end = time.monotonic() + seconds
    import torch

    if not torch.cuda.is_available() and not (options.module and options.module.name.startswith("cuda_emulated")):
        sys.exit("gpu_check: needs a CUDA GPU that torch can use, found none")
    import gpu_ops

    module = options.module or gpu_build.module_path()
    if not module.exists():
        sys.exit(f"gpu_check: there is no {module.name} yet: run --parts build first")
    ops = gpu_ops.load(module)
    journal = Journal(options.out, options.worker)
    journal.part["machine"] = {
        "device": gpu_ops.device_info(ops),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(),
    }
    if options.worker == "bench":
        from gpu_benches import bench_cases

        cases = bench_cases(ops, options.tiny)
    else:
        from gpu_correctness import BLOCKS, PASSES, op_cases
        from gpu_package import package_cases

        operations = list(op_cases(ops, small=options.tiny or options.worker != "correct"))
        python = list(package_cases()) if options.worker == "correct" else []
        if options.tiny:
            operations, python = operations[:5], [case for case in python if case.kind == "layer"][1:2]
        first = 2 * len(BLOCKS["sm80"]) * len(PASSES)  # the Python path comes right after these
        cases = [*operations[:first], *python, *operations[first:]]
    if not run_cases(journal, cases, end - time.monotonic(), gpu_ops.healthy):
        os._exit(CONTEXT_LOST)  # torch's own way out would ask the lost device
    return 0


# --- what starts and watches them -------------------------------------------------------------------------------------


def command(options: argparse.Namespace, part: str, out: Path, seconds: float) -> list[str]:
    """The command line of a part's process."""
    more = ["--tiny"] if options.tiny else []
    more += ["--module", str(options.module)] if options.module else []
    budget = ["--seconds", f"{part if part in PARTS else 'sanitize'}={seconds:.1f}"]
    return [sys.executable, "-u", __file__, "--worker", part, "--out", str(out), *budget, *more]


def watch(child: subprocess.Popen, out: Path, part: str, end: float) -> str:
    """Wait for a part's process; kill it when it runs over its time or one case is stuck. Why it was killed, or ''."""
    seen, since, reason = None, time.monotonic(), ""
    try:
        while not reason:
            try:
                child.wait(timeout=0.5)
                return ""
            except subprocess.TimeoutExpired:
                now = time.monotonic()
            entry = read(out)["parts"][part]
            state = (len(entry["cases"]), (entry["running"] or {}).get("name"))
            if state != seen:
                seen, since = state, now
            if now > end + GRACE:
                reason = "still running at the end of the part"
            elif state[1] is not None and now - since > STUCK:
                reason = f"stuck for {STUCK:.0f} s"
        return reason
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def run_part(options: argparse.Namespace, part: str, out: Path, seconds: float, prefix: tuple[str, ...] = ()) -> str:
    """Run a part in processes of its own until its cases or its seconds are over; what ended it early, or ''."""
    end, reason, log = time.monotonic() + seconds, "", options.scratch / f"{part}.log"
    environment = dict(os.environ, PYTORCH_NO_CUDA_MEMORY_CACHING="1") if prefix else dict(os.environ)
    while (left := end - time.monotonic()) > 0:
        before, start = len(read(out)["parts"][part]["cases"]), time.monotonic()
        with log.open("ab") as stream:
            own = left * SANITIZED if prefix else left
            line = [*prefix, *command(options, part, out, own)]
            child = subprocess.Popen(line, env=environment, stdout=stream, stderr=stream, start_new_session=True)
            killed = watch(child, out, part, end)
        if child.returncode == 0:
            return ""
        reason = killed or f"exit status {child.returncode}"
        journal = Journal(out, part)
        journal.bury(f"its process ended: {reason}", time.monotonic() - start)
        if len(journal.cases) == before:
            return f"{reason} before any case was finished: {text_of(log)[-1500:]}"
        if prefix and not killed and child.returncode != CONTEXT_LOST:
            return ""  # the sanitizer's own exit status: its log says what it found
    return f"{reason}; no time to go on"


def sanitize(options: argparse.Namespace, seconds: float) -> str:
    """The small cases under each of compute-sanitizer's tools, at the same time; one case of the part for each tool."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return "compute-sanitizer is not installed"
    start, end = time.monotonic(), time.monotonic() + seconds
    outs = {name: options.scratch / f"{name}.json" for name in TOOLS}
    journal = Journal(options.out, "sanitize")

    def run(name: str) -> str:
        reason = ""
        for filters in (("--kernel-name", "kns=sparsenet"), ()):  # torch's own kernels are not our business
            fresh(outs[name], name)
            prefix = (tool, "--tool", name, "--error-exitcode", "99", *filters)
            reason = run_part(options, name, outs[name], end - time.monotonic(), prefix)
            if read(outs[name])["parts"][name]["cases"]:
                break
        return reason

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        pending = {pool.submit(run, name): name for name in TOOLS}
        while pending:
            for future in wait(pending, timeout=2, return_when=FIRST_COMPLETED).done:
                name = pending.pop(future)
                log = text_of(options.scratch / f"{name}.log")
                result = sanitized(name, read(outs[name])["parts"][name], future.result(), log)
                journal.record(name, "sanitizer", time.monotonic() - start, result)
            journal.part["running"] = {name: read(outs[name])["parts"].get(name) for name in pending.values()} or None
            journal.save()
    return ""


def sanitized(name: str, part: dict, reason: str, log: str) -> dict:
    """A tool's result: clean only if it says so, every case passed, and there was one."""
    found = [line.strip() for line in log.splitlines() if "SUMMARY" in line]
    clean = bool(found) and all(" 0 errors" in line or " 0 hazards" in line for line in found)
    wrong = failures(part) + ([reason] if reason else []) + ([] if part["cases"] else ["no case ran"])
    wrong += [] if clean else [f"{name} says: {found[-3:] or log[-1500:]}"]
    result = {
        "passed": not wrong,
        "cases": len(part["cases"]),
        "left_out": len(part["left_out"]),
        "summary": found[-3:],
    }
    return {**result, **({"error": "; ".join(wrong)[:3000], "report": log[:6000]} if wrong else {})}


def text_of(log: Path) -> str:
    """What a process wrote; nothing if it never started."""
    return log.read_text(errors="replace") if log.exists() else ""


def fresh(out: Path, part: str) -> None:
    """An empty entry for a part; what other parts wrote stays."""
    report = read(out)
    report["parts"][part] = {"cases": [], "left_out": [], "running": None}
    write(out, report)


def summary(options: argparse.Namespace, report: dict) -> list[str]:
    """The last lines of the output: what failed, what there was no time for, and the times."""
    lines = []
    for part in options.parts:
        entry = report["parts"][part]
        wrong = failures(entry)
        lines.append(
            f"{part}: {entry['state']} after {entry['seconds']:.0f} s, {len(entry['cases'])} cases, {len(wrong)} "
            f"failures, {len(entry['left_out'])} left out"
        )
        lines += [f"  {line[:300]}" for line in wrong[:12]]
    if "bench" in options.parts:
        from gpu_benches import table

        cases = report["parts"]["bench"]["cases"]
        lines.append(table([c for c in cases if "eff" in c]))
        lines += [json.dumps(c) for c in cases if c["kind"] not in ("linear", "large")]
    return lines


def run_whole(options: argparse.Namespace, part: str, seconds: float) -> str:
    """One part; what ended it early, or ''."""
    if part == "build":
        gpu_build.build(Journal(options.out, part), seconds, options.arch)
        return ""
    return sanitize(options, seconds) if part == "sanitize" else run_part(options, part, options.out, seconds)


def run_parts(options: argparse.Namespace) -> bool:
    """The parts one after the other; whether everything that was asked for ran and passed."""
    passed = True
    for part in options.parts:
        start, seconds = time.monotonic(), options.limits[part]
        fresh(options.out, part)
        given = part == "build" and options.module is not None
        try:
            ended = f"not needed: {options.module.name} is given" if given else run_whole(options, part, seconds)
        except (Exception, SystemExit) as error:  # recorded like everything else; the next part may still work
            ended = f"{type(error).__name__}: {error}"
        report = read(options.out)
        entry = report["parts"][part]
        good = given or (bool(entry["cases"]) and not ended and not failures(entry))
        taken = round(time.monotonic() - start, 1)
        entry |= {"passed": good, "state": ended or "finished", "seconds": taken, "budget_s": seconds}
        if not good:
            entry["log"] = text_of(options.scratch / f"{part}.log")[-4000:]
        passed = passed and good
        write(options.out, report)
        print(f"{part}: {'passed' if good else 'FAILED'} in {taken:.0f} s {ended[:1500]}", flush=True)
    return passed


def main() -> int:
    """Run the parts, print the table, say whether everything passed."""
    options = arguments()
    if options.worker:
        return work(options, options.limits[options.worker if options.worker in PARTS else "sanitize"])
    with tempfile.TemporaryDirectory(prefix="gpu_check_") as folder:
        options.scratch = Path(folder)
        passed = run_parts(options)
    print("\n".join(summary(options, read(options.out))))
    print("PASSED" if passed else "FAILED: see the JSON")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
