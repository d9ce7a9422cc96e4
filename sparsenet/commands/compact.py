"""``sparsenet compact``: removes dead or unimportant units from a saved network and writes the smaller one."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsenet import data as datasets
from sparsenet.checkpoint.saving import FileContents, describe, load, save
from sparsenet.compaction.compacting import compact
from sparsenet.compaction.criteria import Magnitude, RarelyActive, Taylor
from sparsenet.compaction.resize import resize_to
from sparsenet.layers import sparse_layers
from sparsenet.memory.budget import format_bytes
from sparsenet.models import SparseMLP

__all__ = ["add_arguments", "run"]

CRITERIA = ("none", "magnitude", "rarely-active", "taylor")
EXAMPLES = 2048  # training examples that criteria look at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sparsenet compact``."""
    add = parser.add_argument
    add("file", type=Path, help="a file of sparsenet.save, or the folder of a run")
    add("--out", type=Path, help="the file to write (default: FILE with -compact in its name)")
    add("--criterion", choices=CRITERIA, default="none", help="units to remove besides the dead ones (none)")
    add("--share", type=float, default=0.2, help="of each layer's units that magnitude and taylor remove (0.2)")
    add("--data", help="data set to judge by (default: the run's, if it is on this machine)")
    add("--model", metavar="MODULE:CALLABLE", help="builds the model, where it is not the network of sparsenet train")
    add("--fill-in", choices=("masked", "trainable"), default="masked", help="what fills blocks up (masked)")
    add("--no-permute", dest="permute", action="store_false", help="hidden units keep their order")


def run(options: argparse.Namespace) -> int:
    """Runs the command; returns the exit status."""
    path = _file(options.file)
    contents = describe(path)
    out = options.out or path.with_name(f"{path.stem}-compact.safetensors")
    if out.resolve() == path.resolve():
        raise ValueError(f"compact: --out must be another file than the one that is read, got {out}")
    model = _build(contents, options.model)
    load(path, model)
    model.eval()
    judge = _Judge.find(options, contents, model)
    criterion = _criterion(options, judge, model)
    x = judge.test_x[:256] if judge else torch.randn(256, *_input_shape(model), dtype=next(model.parameters()).dtype)
    whole = copy.deepcopy(model)
    report = compact(model, criterion=criterion, fill_in=options.fill_in, permute=options.permute)
    print(report)
    _print_comparison(whole, model, x, judge)
    extra = dict(contents.extra) if isinstance(contents.extra, dict) else {}
    if isinstance(model, SparseMLP):
        extra["sizes"] = list(model.sizes)
    save(out, model, step=contents.step, extra=extra)
    print(f"{'file':<24}{format_bytes(contents.file_bytes)} -> {format_bytes(out.stat().st_size)}: {out}")
    return 0


def _file(path: Path) -> Path:
    if path.is_dir():
        inside = [path / name for name in ("model.safetensors", "checkpoint.safetensors")]
        return next((file for file in inside if file.is_file()), path)
    return path


# --- the model ------------------------------------------------------------------------------------------------------


def _build(contents: FileContents, builder: str | None) -> nn.Module:
    if builder is not None:
        model = _call(builder)
        resize_to(model, contents.path)  # the file may hold a network that was compacted already
        return model
    layers = list(contents.layers.values())
    chain = list(contents.layers) == [str(i) for i in range(len(layers))] and len(layers) > 0
    ends = pairwise(layers)
    known = {
        f"{i}.{key}"
        for i in range(len(layers))
        for key in ("values", "bias", "crow_indices", "col_indices", "element_mask", "element_rule")
    }
    others = {name for name in contents.tensors if not name.startswith("@")} - known
    if not chain or others or any(a["out_features"] != b["in_features"] for a, b in ends):
        raise ValueError(
            f"compact: {contents.path} must hold a network of sparsenet train, or --model must build it; "
            f"got layers {', '.join(contents.layers) or 'none'}"
        )
    sizes = [layers[0]["in_features"], *(layer["out_features"] for layer in layers)]
    dtype = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    model = SparseMLP(
        sizes,
        density=0.0,
        block_size=[layer["block_size"] for layer in layers],
        activation=layers[0]["activation"] if len(layers) > 1 else "none",
        bias="0.bias" in contents.tensors,
        dtype=dtype[contents.tensors["0.values"][0]],
    )
    return model


def _call(builder: str) -> nn.Module:
    """What ``package.module:callable`` returns."""
    module, _, name = builder.partition(":")
    sys.path.insert(0, "")
    try:
        make = getattr(importlib.import_module(module), name, None) if module and name else None
    finally:
        sys.path.remove("")
    model = make() if callable(make) else None
    if not isinstance(model, nn.Module):
        raise ValueError(f"compact: --model must be MODULE:CALLABLE that returns a torch module, got {builder!r}")
    return model


def _input_shape(model: nn.Module) -> tuple[int, ...]:
    if isinstance(model, SparseMLP):
        return (model.sizes[0],)
    first = next((m for m in model.modules() if hasattr(m, "in_features")), None)
    convolution = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    if convolution is not None or first is None:
        raise ValueError("compact: --data must name a data set, for a network that does not begin with a linear layer")
    return (first.in_features,)


# --- judging --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judge:
    """The data that the network was trained on, standardised as then."""

    name: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor

    @classmethod
    def find(cls, options: argparse.Namespace, contents: FileContents, model: nn.Module) -> _Judge | None:
        """What ``--data`` or the run's configuration names; None where only the latter does and it is not here."""
        config = contents.path.with_name("config.json")
        name = options.data or (json.loads(config.read_text()).get("data") if config.is_file() else None)
        if name is None:
            return None
        try:
            data = datasets.load(name, download=False, fallback=False)
        except FileNotFoundError:
            if options.data:
                raise
            return None
        extra = contents.extra if isinstance(contents.extra, dict) else {}
        if {"mean", "std"} <= extra.keys():
            norm = datasets.Normalization(extra["mean"], extra["std"])
        else:
            norm = datasets.Normalization.from_data(data.train_x)
        dtype = next(model.parameters()).dtype

        def ready(x: Tensor) -> Tensor:
            x = ((x.flatten(1).float() - norm.mean) / norm.std).to(dtype)
            if isinstance(model, SparseMLP):
                return x
            shape = data.train_x.shape[1:]
            return x.reshape(len(x), *((1,) if len(shape) == 2 else ()), *shape)

        train = ready(data.train_x[:EXAMPLES])
        return cls(data.name, train, data.train_y[:EXAMPLES], ready(data.test_x), data.test_y)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Share of the test examples that the model names right."""
        right = [
            (model(x).argmax(1) == y).sum() for x, y in zip(self.test_x.split(512), self.test_y.split(512), strict=True)
        ]
        return int(torch.stack(right).sum()) / len(self.test_y)


def _criterion(options: argparse.Namespace, judge: _Judge | None, model: nn.Module) -> Callable | None:
    group = max((layer.block_size for layer in sparse_layers(model).values()), default=1)
    if options.criterion == "none":
        return None
    if options.criterion == "magnitude":
        return Magnitude(options.share, group)
    if judge is None:
        raise ValueError(f"compact: --data must name a data set for the criterion {options.criterion}, got none")
    if options.criterion == "rarely-active":
        return RarelyActive(list(judge.train_x.split(256)))
    batches = list(zip(judge.train_x.split(256), judge.train_y.split(256), strict=True))
    return Taylor(batches, nn.functional.cross_entropy, options.share, group)


@torch.no_grad()
def _print_comparison(whole: nn.Module, small: nn.Module, x: Tensor, judge: _Judge | None) -> None:
    """Time of a forward pass (the best of several, in turns), accuracy, and the change of outputs."""
    best = {whole: float("inf"), small: float("inf")}
    for _ in range(20):
        for model in best:
            began = time.perf_counter()
            model(x)
            best[model] = min(best[model], time.perf_counter() - began)
    print(f"{'forward of ' + str(len(x)):<24}{1e3 * best[whole]:>6.2f} -> {1e3 * best[small]:.2f} ms")
    if judge is not None:
        accuracy = [judge.accuracy(model) for model in best]
        print(f"{'test accuracy':<24}{accuracy[0]:>6.2%} -> {accuracy[1]:.2%} ({judge.name})")
    expected = whole(x)
    change, largest = (float(t.abs().max()) for t in (small(x) - expected, expected))
    print(f"{'largest change':<24}{change:>6.1e} of an output, the largest being {largest:.1e}")
