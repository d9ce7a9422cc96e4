"""Checkpoints: one safetensors file with model, topology, optimizer, schedules and random state. Nothing is unpickled.

Layout. Tensors of the model stand under their ``state_dict`` names; tensors of everything else begin with ``@``
(``@optimizer/state/state/0/exp_avg``). Whatever is not a tensor is JSON in the header's metadata under ``sparsenet``. A
file appears whole or not at all: it is written beside its place, flushed to the disk and renamed. On loading,
everything is checked before anything is changed.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsenet.checkpoint.encoding import encode
from sparsenet.checkpoint.file import FORMAT_VERSION, CheckpointFile, parameter_names
from sparsenet.distributed import unwrap
from sparsenet.files import replace_file
from sparsenet.layers import sparse_layers
from sparsenet.schedules import as_integer

__all__ = ["FORMAT_VERSION", "Checkpoint", "FileContents", "describe", "load", "save"]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What :func:`load` returns: the step and the ``extra`` of :func:`save`, and torch's random state at that time."""

    step: int
    extra: Any = None
    random_state: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def restore_random_state(self) -> None:
        """Sets torch's generators, of the CPU and of CUDA devices that are there, to what they were at the save."""
        for device, state in self.random_state.items():
            if device == "cpu":
                torch.set_rng_state(state)
            elif torch.cuda.is_available() and int(device.removeprefix("cuda.")) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, int(device.removeprefix("cuda.")))


@dataclass(frozen=True)
class FileContents:
    """What a checkpoint holds, from its header alone.

    ``layers``: per sparse layer ``in_features``, ``out_features``, ``block_size``, ``num_blocks``, ``density``,
    ``activation``. ``tensors``: (dtype, shape, bytes) by name. ``parts``: which of optimizer, sparsifier and scheduler.
    """

    path: Path
    file_bytes: int
    format_version: int
    step: int
    layers: Mapping[str, Mapping[str, Any]]
    tensors: Mapping[str, tuple[str, tuple[int, ...], int]]
    parts: tuple[str, ...]
    extra: Any


# --- saving ---------------------------------------------------------------------------------------------------------


def save(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    sparsifier: Any = None,
    scheduler: Any = None,
    step: int = 0,
    extra: Any = None,
) -> None:
    """Writes a checkpoint: all of it, or an error and the file that was there before.

    Args:
        path: the file, by custom ``*.safetensors``.
        model: its parameters, buffers and patterns are saved (a DDP wrapper is looked through).
        optimizer: any ``torch.optim`` optimizer over parameters of ``model``.
        sparsifier, scheduler: whatever has ``state_dict()`` and ``load_state_dict()``.
        step: of the training.
        extra: numbers, text, None, lists, tuples, dicts and tensors.

    Raises:
        OSError: the file cannot be written; TypeError: something that is neither a tensor nor JSON;
        ValueError: the optimizer holds a parameter that the model does not.

    Example:
        >>> import tempfile, torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 128, 10], density=0.5)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sn.save(f"{folder}/a.safetensors", model, step=7)
        ...     sn.load(f"{folder}/a.safetensors", sn.SparseMLP([64, 128, 10], density=0.1)).step
        7
    """
    step = as_integer("save", "step", step, at_least=0)
    model = unwrap(model)
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step, "layers": _layer_table(model)}
    header["model"] = _model_values(model, tensors)
    if optimizer is not None:
        names = parameter_names(model, optimizer, "save")
        header["optimizer"] = encode({"names": names, "state": optimizer.state_dict()}, "@optimizer", tensors)
    for part, thing in (("sparsifier", sparsifier), ("scheduler", scheduler)):
        if thing is not None:
            header[part] = encode(thing.state_dict(), f"@{part}", tensors)
    header["extra"] = encode(extra, "@extra", tensors)
    tensors["@random/cpu"] = torch.get_rng_state()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        tensors |= {f"@random/cuda.{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    header["aliases"] = _separate(tensors)
    metadata = {"format": "pt", "sparsenet": json.dumps(header)}
    replace_file(path, lambda part: _write(part, tensors, metadata))


def _write(part: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, part, metadata)
    except SafetensorError as error:  # the library's own type, whatever the system said
        found = re.search(r"os error (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1]))) from error


def _layer_table(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "block_size": layer.block_size,
            "num_blocks": layer.pattern.num_blocks,
            "density": layer.density,
            "activation": layer.activation,
        }
        for name, layer in sparse_layers(model).items()
    }


def _model_values(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Puts the state dict's tensors into ``tensors``; returns its other entries (extra states) as JSON."""
    values = {}
    for name, value in model.state_dict().items():
        if name.startswith("@"):
            raise ValueError(f"save: names in the model must not begin with @, got {name!r}")
        if isinstance(value, Tensor):
            tensors[name] = value
        else:
            values[name] = encode(value, f"@model/{name}", tensors)
    return values


def _separate(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Makes every tensor contiguous and alone in its memory; returns name -> the name it equals, and drops those."""
    aliases: dict[str, str] = {}
    owners: dict[tuple, str] = {}
    for name, tensor in list(tensors.items()):
        tensor = tensor.detach()
        place = (str(tensor.device), tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in owners:
            aliases[name] = owners[place]
            del tensors[name]
            continue
        owners[place] = name
        alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        tensors[name] = tensor if alone else tensor.clone(memory_format=torch.contiguous_format)
    return aliases


# --- loading --------------------------------------------------------------------------------------------------------


def load(
    path: str | Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    sparsifier: Any = None,
    scheduler: Any = None,
) -> Checkpoint:
    """Reads a checkpoint into a model and, where given, optimizer, sparsifier and scheduler.

    Args:
        path: written by :func:`save`.
        model: of the same layers and sizes; its patterns and numbers of blocks may differ and become the file's.
        optimizer: over the same parameters; its state is replaced, its parameters stay the same objects.
        sparsifier, scheduler: made as they were for the saved run.

    Returns:
        Step, ``extra`` and random state (which is not restored: see :meth:`Checkpoint.restore_random_state`).

    Raises:
        FileNotFoundError: no such file. ValueError: a file that is damaged, no safetensors file (a pickle is never
        read), of a newer format, with indices out of range, or that does not fit; nothing has been changed then.

    Example:
        >>> import tempfile, torch, sparsenet as sn
        >>> saved, fresh = (sn.SparseMLP([64, 128, 10], density=d, block_size=16) for d in (0.5, 0.1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sn.save(f"{folder}/a.safetensors", saved, extra={"note": "ours"})
        ...     checkpoint = sn.load(f"{folder}/a.safetensors", fresh)
        >>> checkpoint.extra, fresh[0].pattern == saved[0].pattern, torch.equal(fresh[0].values, saved[0].values)
        ({'note': 'ours'}, True, True)
    """
    model = unwrap(model)
    with CheckpointFile(path) as file:
        file.check_model(model)
        if optimizer is not None:
            file.check_optimizer(model, optimizer)
        for part, thing in (("sparsifier", sparsifier), ("scheduler", scheduler)):
            if thing is not None:
                file.check_part(part, thing)
        random_state = {n.removeprefix("@random/"): file.tensor(n) for n in file.names() if n.startswith("@random/")}
        checkpoint = Checkpoint(file.header["step"], file.decoded("extra"), random_state)
        parts = {p: file.decoded(p) for p, t in (("sparsifier", sparsifier), ("scheduler", scheduler)) if t is not None}
        model.load_state_dict({name: file.tensor(name) for name in file.model_names()} | file.decoded("model"))
        if optimizer is not None:
            _load_optimizer(optimizer, file.decoded("optimizer")["state"])
        if sparsifier is not None:
            sparsifier.load_state_dict(parts["sparsifier"])
        if scheduler is not None:
            scheduler.load_state_dict(parts["scheduler"])
    return checkpoint


def describe(path: str | Path) -> FileContents:
    """What a checkpoint holds, read from its header; raises as :func:`load`.

    Example:
        >>> import tempfile, sparsenet as sn
        >>> from sparsenet.checkpoint import describe
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sn.save(f"{folder}/a.safetensors", sn.SparseMLP([64, 128, 10], density=0.5), step=7)
        ...     describe(f"{folder}/a.safetensors").step
        7
    """
    with CheckpointFile(path) as file:
        header = file.header
        return FileContents(
            path=file.path,
            file_bytes=file.path.stat().st_size,
            format_version=header["format_version"],
            step=header["step"],
            layers=header["layers"],
            tensors={name: file.spec(name) for name in file.names()},
            parts=tuple(part for part in ("optimizer", "sparsifier", "scheduler") if part in header),
            extra=file.decoded("extra"),
        )


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads by the optimizer's own method, then puts back what that changes: text, and other dtypes."""
    optimizer.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, parameter in enumerate(parameters):
        live = optimizer.state[parameter] if number in state["state"] else {}
        for key, saved in state["state"].get(number, {}).items():
            if not isinstance(saved, Tensor):
                live[key] = saved
            elif isinstance(live.get(key), Tensor) and live[key].dtype != saved.dtype:
                live[key] = saved.to(live[key].device)
