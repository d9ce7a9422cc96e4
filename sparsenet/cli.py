"""The command line: ``sparsenet train|plan|bench|search|reproduce|compact|inspect|doctor``.

Flags of ``train`` follow from the fields of :class:`sparsenet.TrainConfig`. A mistake of the user is one line on the
standard error and exit status 2; an interrupted training, which can be resumed, is exit status 130.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sparsenet
from sparsenet import data, functional
from sparsenet.architecture.search import run as search_command
from sparsenet.checkpoint import FileContents, describe
from sparsenet.commands import bench as bench_command
from sparsenet.commands import compact as compact_command
from sparsenet.memory import available_bytes, format_bytes, release_freed_memory
from sparsenet.reproduce import density as reproduce_density
from sparsenet.reproduce import embedding as reproduce_embedding
from sparsenet.reproduce import gates as reproduce_gates
from sparsenet.training.config import TrainConfig
from sparsenet.training.job import Interrupted, report, run

__all__ = ["main"]

_PLAN_FIELDS = (
    "hidden", "activation", "budget", "density", "block_size", "distribution", "dtype", "policy", "drop_fraction",
    "batch_size", "optimizer", "momentum", "threads",
)  # fmt: skip
_WITH_RESUME = ("resume", "plots", "progress", "dense_steps", "out")  # the only flags that --resume does not fix


class _Parser(argparse.ArgumentParser):
    """Errors are one line."""

    def error(self, message: str) -> None:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"sparsenet: {message}", file=sys.stderr)
            return options.command(options)
    except Interrupted as stop:
        print(f"sparsenet: {stop}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("SPARSENET_TRACEBACK"):
            raise
        print(f"sparsenet: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sparsenet: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="sparsenet", description="Sparse training for PyTorch inside a memory budget.")
    parser.add_argument("--version", action="version", version=f"sparsenet {sparsenet.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=_Parser)
    train = commands.add_parser("train", help="train a sparse network on real data inside a memory budget")
    _add_config_flags(train, [field.name for field in dataclasses.fields(TrainConfig)])
    train.set_defaults(command=_train)
    plan = commands.add_parser("plan", help="predict the memory of a training run; pick the density that fits")
    plan.add_argument("--features", type=int, default=784, help="inputs of the network (784)")
    plan.add_argument("--classes", type=int, default=10, help="outputs of the network (10)")
    plan.add_argument("--json", action="store_true", help="print JSON")
    _add_config_flags(plan, _PLAN_FIELDS)
    plan.set_defaults(command=_plan)
    bench = commands.add_parser("bench", help="time the block-sparse operations against dense ones and rivals")
    bench_command.add_arguments(bench)
    bench.set_defaults(command=bench_command.run)
    compact = commands.add_parser("compact", help="remove dead or unimportant units from a saved network")
    compact_command.add_arguments(compact)
    compact.set_defaults(command=compact_command.run)
    inspect = commands.add_parser("inspect", help="show what a checkpoint holds")
    inspect.add_argument("file", type=Path, help="a file of sparsenet.save, or the folder of a run")
    inspect.set_defaults(command=_inspect)
    doctor = commands.add_parser("doctor", help="show what this machine and this build offer")
    doctor.set_defaults(command=_doctor)
    _add_architecture_commands(commands)
    return parser


def _add_architecture_commands(commands) -> None:
    """``search`` and ``reproduce``: each module adds its own flags and runs itself."""
    search = commands.add_parser("search", help="search architectures: densities, or networks in an embedding")
    reproduce = commands.add_parser("reproduce", help="repeat published experiments and compare with their numbers")
    what = reproduce.add_subparsers(required=True, metavar="what", parser_class=_Parser)
    for parser, module in (
        (search, search_command),
        (what.add_parser("density", help="Tessera and Rosman's density search"), reproduce_density),
        (what.add_parser("embedding", help="networks in a continuous space"), reproduce_embedding),
        (what.add_parser("gates", help="tri-state ReLU, compaction, depth collapse"), reproduce_gates),
    ):
        module.add_arguments(parser)
        parser.set_defaults(command=module.run)


def _add_config_flags(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """A flag per field; absent flags leave no attribute, so that the dataclass's defaults hold."""
    for field in dataclasses.fields(TrainConfig):
        if field.name not in names:
            continue
        kind, default = type(field.default), field.default
        shown = " ".join(map(str, default)) if kind is tuple else default
        how: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        how["help"] = f"{field.metadata['help']} ({shown})".replace("%", "%%")
        if kind is bool:
            how["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            how |= {"type": int, "nargs": "+", "metavar": "N"}
        else:
            how |= {"type": kind, "choices": field.metadata["choices"]}
        if field.name == "resume":
            how |= {"nargs": "?", "const": "latest", "metavar": "FOLDER"}
        parser.add_argument("--" + field.name.replace("_", "-"), **how)


def _config(options: argparse.Namespace) -> tuple[TrainConfig, set[str]]:
    """The configuration that the flags mean, and which were given."""
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name: value for name, value in vars(options).items() if name in known}
    return TrainConfig(**given), set(given)


# --- commands -------------------------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    release_freed_memory()  # before torch allocates anything large
    config, given = _config(options)
    fixed = sorted(given - set(_WITH_RESUME))
    if config.resume and fixed:
        flags = ", ".join("--" + name.replace("_", "-") for name in fixed)
        raise ValueError(f"train: --resume takes the settings of the interrupted run, got {flags} as well")
    summary = run(config)
    print("\n" + report(summary))
    return 0


def _plan(options: argparse.Namespace) -> int:
    config, _ = _config(options)
    plan = config.plan(options.features, options.classes)
    if options.json:
        fields = dataclasses.asdict(plan) | {"predicted_peak_bytes": plan.predicted_peak_bytes, "moment": plan.moment}
        print(json.dumps(fields, indent=2))
        return 0
    print(plan.table())
    print(f"\n  {'at the least':<28}{format_bytes(plan.minimum_bytes):>12}")
    print(f"  {'the same network dense':<28}{format_bytes(plan.dense_bytes):>12}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    path = options.file
    if path.is_dir():
        inside = [path / name for name in ("model.safetensors", "checkpoint.safetensors")]
        path = next((file for file in inside if file.is_file()), path)
    print(_contents(describe(path)))
    return 0


def _contents(found: FileContents) -> str:
    parts = ", ".join(("model", *found.parts))
    lines = [
        f"{found.path}: {format_bytes(found.file_bytes)}, format {found.format_version}, step {found.step}, {parts}",
        "",
        f"{'layer':<12}{'out x in':>14}{'block':>7}{'blocks':>9}{'density':>10}{'activation':>12}{'values':>12}",
    ]
    for name, layer in found.layers.items():
        shape = f"{layer['out_features']} x {layer['in_features']}"
        values = found.tensors[f"{name}.values" if name else "values"]
        lines.append(
            f"{name:<12}{shape:>14}{layer['block_size']:>7}{layer['num_blocks']:>9}{layer['density']:>10.2%}"
            f"{layer['activation']:>12}{format_bytes(values[2]):>12}"
        )
    sizes: dict[str, int] = {}
    for name, (_, _, count) in found.tensors.items():
        part = name[1:].split("/")[0] if name.startswith("@") else "model"
        sizes[part] = sizes.get(part, 0) + count
    lines += ["", *(f"{part:<12}{format_bytes(count):>14}" for part, count in sizes.items())]
    return "\n".join(lines)


def _doctor(_: argparse.Namespace) -> int:
    info = sparsenet.build_info()
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


if __name__ == "__main__":
    sys.exit(main())
