"""Checkpoints: one safetensors file with model, topology, optimizer, schedules and random state. Nothing is unpickled.

Layout. Tensors of the model stand under their ``state_dict`` names; tensors of everything else begin with ``@``
(``@optimizer/state/state/0/exp_avg``). Whatever is not a tensor is JSON in the header's metadata under ``sparsenet``. A
file appears whole or not at all: it is written beside its place, flushed to the disk and renamed. On loading,
everything is checked before anything is changed.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from sparsenet.checkpoint.encoding import encode
from sparsenet.checkpoint.file import FORMAT_VERSION, CheckpointFile, is_elementwise, is_index, is_meta, parameter_names
from sparsenet.distributed import unwrap, unwrapped_name, wrapper_path
from sparsenet.files import replace_file
from sparsenet.layers import sparse_layers
from sparsenet.schedules import as_integer

__all__ = ["FORMAT_VERSION", "Checkpoint", "FileContents", "describe", "load", "save"]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What :func:`load` returns: the step and the ``extra`` of :func:`save`, and torch's random state at that time.

    ``missing_keys``, ``unexpected_keys``: what ``strict=False`` did not find in the file, and found in it for nothing.
    """

    step: int
    extra: Any = None
    random_state: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()

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
    grower: Any = None,
    step: int = 0,
    extra: Any = None,
) -> None:
    """Writes a checkpoint: all of it, or an error and the file that was there before.

    Args:
        path: the file, by custom ``*.safetensors``.
        model: its parameters, buffers and patterns are saved. Wrappers are looked through (``torch.compile``, DDP,
            ``nn.DataParallel``, AveragedModel): names in the file are those of the model inside.
        optimizer: any ``torch.optim`` optimizer over parameters of ``model``.
        sparsifier, scheduler: whatever has ``state_dict()`` and ``load_state_dict()``.
        grower: the :class:`sparsenet.Grower` of the model.
        step: of the training.
        extra: numbers, text, None, lists, tuples, dicts and tensors.

    Raises:
        OSError: the file cannot be written; TypeError: something that is neither a tensor nor JSON;
        ValueError: the optimizer holds a parameter that the model does not.

    Example:
        >>> import tempfile, torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 128, 10], density=0.5, block_size=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sn.save(f"{folder}/a.safetensors", model, step=7)
        ...     sn.load(f"{folder}/a.safetensors", sn.SparseMLP([64, 128, 10], density=0.2, block_size=16)).step
        7
    """
    step = as_integer("save", "step", step, at_least=0)
    tensors: dict[str, Tensor] = {}
    header: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": step, "layers": _layer_table(unwrap(model))}
    header["model"] = _model_values(model, tensors)
    inside = wrapper_path(model)
    header["wrapper"] = [unwrapped_name(model, name) for name in model.state_dict() if not name.startswith(inside)]
    if optimizer is not None:
        names = parameter_names(model, optimizer, "save")
        header["optimizer"] = encode({"names": names, "state": optimizer.state_dict()}, "@optimizer", tensors)
    for part, thing in (("sparsifier", sparsifier), ("scheduler", scheduler), ("grower", grower)):
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
    for raw, value in model.state_dict().items():
        name = unwrapped_name(model, raw)
        if name.startswith("@"):
            raise ValueError(f"save: names in the model must not begin with @, got {name!r}")
        if name in tensors or name in values:
            raise ValueError(f"save: names in the model must differ without wrappers, got {name!r} twice")
        if isinstance(value, Tensor) and value.is_meta:
            raise ValueError(f"save: {name} must hold data, got a meta tensor")
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
    grower: Any = None,
    *,
    strict: bool = True,
) -> Checkpoint:
    """Reads a checkpoint into a model and, where given, optimizer, sparsifier and scheduler.

    Args:
        path: written by :func:`save`.
        model: of the same layers and sizes; its patterns and numbers of blocks may differ and become the file's.
            Wrappers are looked through. A model on meta gets the file's tensors, in its own dtypes, on the CPU.
        optimizer: over the same parameters; its state is replaced, its parameters stay the same objects.
        sparsifier, scheduler: made as they were for the saved run.
        grower: the :class:`sparsenet.Grower` of the model, made as for the saved run: it first gives the model the
            layers and sizes that it had.
        strict: refuse a file that lacks names of the model or has others; False loads what is there.

    Returns:
        Step, ``extra`` and random state (which is not restored: see :meth:`Checkpoint.restore_random_state`).

    Raises:
        FileNotFoundError: no such file. ValueError: a file that is damaged, no safetensors file (a pickle is never
        read), of a newer format, with indices out of range, or that does not fit.

    Whatever is raised, also by one of the things that are loaded: nothing has been changed then.

    Example:
        >>> import tempfile, torch, sparsenet as sn
        >>> saved, fresh = (sn.SparseMLP([64, 128, 10], density=d, block_size=16) for d in (0.5, 0.1))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sn.save(f"{folder}/a.safetensors", saved, extra={"note": "ours"})
        ...     checkpoint = sn.load(f"{folder}/a.safetensors", fresh)
        >>> checkpoint.extra, fresh[0].pattern == saved[0].pattern, torch.equal(fresh[0].values, saved[0].values)
        ({'note': 'ours'}, True, True)
    """
    undo: list[Callable[[], Any]] = []
    with CheckpointFile(path) as file:
        try:
            if grower is not None:
                file.check_part("grower", grower)
                undo.append(grower.fit_to(path, file.decoded("grower")))
            missing, unexpected = file.check_model(model, strict)
            if optimizer is not None:
                file.check_optimizer(model, optimizer)
            given = (("sparsifier", sparsifier), ("scheduler", scheduler), ("grower", grower))
            things = {part: thing for part, thing in given if thing is not None}
            for part, thing in things.items():
                file.check_part(part, thing)
            drawn = {n.removeprefix("@random/"): file.tensor(n) for n in file.names() if n.startswith("@random/")}
            extra = file.decoded("extra")
            checkpoint = Checkpoint(file.header["step"], extra, drawn, tuple(missing), tuple(unexpected))
            parts = {part: file.decoded(part) for part in things}
            if things or file.header["model"] or not (optimizer is None or is_elementwise(optimizer)):
                undo.append(_copy_of(model))  # what follows is the code of others
            _load_model(model, file, strict)
            if optimizer is not None:
                undo.append(partial(_load_optimizer, optimizer, optimizer.state_dict()))
                _load_optimizer(optimizer, file.decoded("optimizer")["state"])
            for part, thing in things.items():
                undo.append(partial(thing.load_state_dict, copy.deepcopy(thing.state_dict())))
                thing.load_state_dict(parts[part])
        except BaseException:
            for back in reversed(undo):
                back()
            raise
    return checkpoint


def _load_model(model: nn.Module, file: CheckpointFile, strict: bool) -> None:
    """Loads what the file holds for ``model``, which fits."""
    here = model.state_dict()
    raw = {unwrapped_name(model, name): name for name in here}
    for name in [n for n in raw if n.split(".")[-1] == "crow_indices"]:  # a layer without a mask takes that of the file
        for key in ("element_mask", "element_rule"):
            raw.setdefault(_beside(name, key), _beside(raw[name], key))
    meta = is_meta(here)
    state = {raw[name]: file.tensor(name) for name in file.model_names() if name in raw}
    if meta:  # torch then takes the tensors as they are
        state = {k: v if k not in here or is_index(k) else v.to(here[k].dtype) for k, v in state.items()}
    state |= {raw[name]: value for name, value in file.decoded("model").items() if name in raw}
    model.load_state_dict(state, strict, assign=meta)


def _beside(crow_indices: str, key: str) -> str:
    return crow_indices.removesuffix("crow_indices") + key


def _copy_of(model: nn.Module) -> Callable[[], Any]:
    """Copies what ``model`` holds; returns what puts it back."""
    here = model.state_dict(keep_vars=True)
    copies = {k: v.detach().clone() if isinstance(v, Tensor) and not v.is_meta else v for k, v in here.items()}
    topologies = [layer.topology for layer in sparse_layers(model).values()]
    masks = [(topology, topology.mask_bits, topology.elements) for topology in topologies]

    def back() -> None:
        for topology, bits, elements in masks:
            topology.mask_bits, topology.elements = bits, elements
        model.load_state_dict(copies, assign=is_meta(here))

    return back


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
            parts=tuple(part for part in ("optimizer", "sparsifier", "scheduler", "grower") if part in header),
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
