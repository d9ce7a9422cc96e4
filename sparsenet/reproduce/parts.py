"""A reproduction is a list of named parts. Each is run once and kept in a file, so that a killed run goes on where it
was; the numbers of all parts together, with machine and versions, make the tables and figures.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from tqdm import tqdm

from sparsenet.files import replace_text
from sparsenet.functional.build import build_info

__all__ = [
    "Part",
    "add_arguments",
    "kept_row",
    "markdown",
    "read_results",
    "reproduce",
    "spread",
    "times_table",
    "verdict",
]

Part = Callable[..., dict]


def add_arguments(parser: argparse.ArgumentParser, out: str, parts: Iterable[str]) -> None:
    """``--out``, ``--parts`` and ``--scale``."""
    parser.add_argument("--out", default=out, help=f"folder of numbers, tables and figures ({out})")
    parser.add_argument("--parts", default="all", help=f"comma-separated, of {', '.join(parts)}")
    parser.add_argument("--scale", type=float, default=1.0, help="below 1: less data, fewer steps; a quick look")


def reproduce(
    name: str,
    args: argparse.Namespace,
    parts: dict[str, Part],
    task: object,
    tables: Callable[[dict[str, dict]], str],
    figures: Callable[[dict[str, dict], Path], list[Path]],
) -> int:
    """Runs the parts that are missing on one thread; prints and writes ``tables.md``, ``results.json`` and figures.

    Raises ValueError for an unknown part, a scale outside (0, 1], or a folder that holds parts of another scale.
    """
    chosen = list(parts) if args.parts == "all" else args.parts.split(",")
    unknown = [part for part in chosen if part not in parts]
    if unknown:
        raise ValueError(f"reproduce {name}: parts must be some of {', '.join(parts)}, got {', '.join(unknown)}")
    if not 0 < args.scale <= 1:
        raise ValueError(f"reproduce {name}: scale must lie in (0, 1], got {args.scale}")
    out = Path(args.out)
    for part, numbers in read_parts(out, parts).items():
        if numbers.get("scale", args.scale) != args.scale:
            got = f"{part} of scale {numbers['scale']}"
            raise ValueError(f"reproduce {name}: out must be a folder of parts of scale {args.scale}, got {got}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices: a second thread costs more than it gives
    try:
        run_parts(chosen, parts, task, out, args.scale)
    finally:
        torch.set_num_threads(threads)
    numbers = read_parts(out, parts)
    text = tables(numbers)
    print(text)
    replace_text(out / "tables.md", text + "\n")
    replace_text(out / "results.json", results_text(numbers))
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        tqdm.write(f"reproduce {name}: no figures, {error}; pip install 'sparsenet[plot]'")
    else:
        figures(numbers, out)
    return 0


def run_parts(names: list[str], parts: dict[str, Part], task: object, out: Path, scale: float) -> None:
    """Runs the named parts that have no file yet, each into ``<out>/<part>.json`` with its seconds."""
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        file = out / f"{name}.json"
        if file.exists():
            continue
        print(f"[{time.strftime('%H:%M:%S')}] {name} ...", flush=True)
        started, cpu = time.perf_counter(), cpu_seconds()
        numbers = parts[name](task)
        wall = time.perf_counter() - started
        replace_text(
            file,
            json.dumps({**numbers, "scale": scale, "wall_seconds": wall, "cpu_seconds": cpu_seconds() - cpu}),
        )
        print(f"[{time.strftime('%H:%M:%S')}] {name}: {wall:.0f} s", flush=True)


def kept_row(file: Path, key: dict, compute: Callable[[], dict]) -> dict:
    """``{**key, **compute()}``, or the row of ``key`` that a run that was killed left in ``file`` (JSON lines).

    A line that a kill cut short is passed over. The part removes the file at its end; its seconds are the last run's.
    """
    for line in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if key.items() <= row.items():
                return row
    row = {**key, **compute()}
    with file.open("a") as rows:
        rows.write(f"\n{json.dumps(row)}")
    return row


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    return sum(os.times()[:4])


def read_parts(out: Path, parts: Iterable[str]) -> dict[str, dict]:
    """The numbers of every part that has been run."""
    return {name: json.loads((out / f"{name}.json").read_text()) for name in parts if (out / f"{name}.json").exists()}


def results_text(numbers: dict[str, dict]) -> str:
    """JSON: one line about the machine, then a line for each part."""
    built = build_info()
    machine = {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{key: built[key] for key in ("version", "isa", "torch")},
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in {"made": machine, **numbers}.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_results(file: Path) -> dict[str, dict]:
    """The parts in a ``results.json``."""
    numbers = json.loads(file.read_text())
    del numbers["made"]
    return numbers


# --- tables ---


def markdown(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |"]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def verdict(good: bool) -> str:
    """``met`` or ``NOT met``."""
    return "met" if good else "NOT met"


def spread(values: list[float], digits: int = 2) -> str:
    """Mean ± standard deviation."""
    half = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.{digits}f} ± {half:.{digits}f}"


def times_table(numbers: dict[str, dict]) -> str:
    """Seconds of every part, and their sum."""
    rows = [[name, n["wall_seconds"], n["cpu_seconds"]] for name, n in numbers.items()]
    rows.append(["all", *(sum(row[i] for row in rows) for i in (1, 2))])
    return "### Time (s)\n\n" + markdown(["part", "wall", "CPU"], [[n, f"{w:.0f}", f"{c:.0f}"] for n, w, c in rows])
