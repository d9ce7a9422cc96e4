"""``sparsenet inspect``: shows what a checkpoint holds."""

from __future__ import annotations

import argparse
from pathlib import Path

from sparsenet.checkpoint.saving import FileContents, describe
from sparsenet.memory.budget import format_bytes

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file."""
    parser.add_argument("file", type=Path, help="a file of sparsenet.save, or the folder of a run")


def run(options: argparse.Namespace) -> int:
    """Prints layers and sizes."""
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
