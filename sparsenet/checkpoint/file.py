"""An open checkpoint file: its header checked, its tensors read one by one, its fit to a model decided beforehand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparsenet.checkpoint.encoding import decode
from sparsenet.distributed import unwrap, unwrapped_name
from sparsenet.layers import SparseLinear, plain_name, sparse_layers
from sparsenet.topology import read_state

__all__ = ["FORMAT_VERSION", "CheckpointFile", "parameter_names"]

FORMAT_VERSION = 1
_LAYER_KEYS = ("values", "crow_indices", "col_indices", "element_mask", "element_rule")
_INDICES = _LAYER_KEYS[1:]
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8},
}


class CheckpointFile:
    """An open checkpoint whose header has been checked; tensors are read one by one."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        _check_beginning(self.path)
        try:
            try:
                self._reader, self._shares_file = safe_open(self.path, "pt", backend="pread"), False
            except TypeError:  # safetensors before 0.8 can only map the file
                self._reader, self._shares_file = safe_open(self.path, "pt"), True
        except SafetensorError as error:
            raise self.error(f"must be a whole safetensors file, got: {error}") from error
        self._names = set(self._reader.keys())
        self.header = self._read_header()
        stored = self._names | set(self.header["aliases"])
        self._by_plain_name = {plain_name(name): name for name in stored if not name.startswith("@")}

    def __enter__(self) -> CheckpointFile:
        self._reader.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._reader.__exit__(*exception)

    def error(self, rule: str) -> ValueError:
        """An error about this file."""
        return ValueError(f"load: {self.path} {rule}")

    def _read_header(self) -> dict[str, Any]:
        text = (self._reader.metadata() or {}).get("sparsenet")
        if text is None:
            raise self.error("must be a checkpoint of sparsenet.save, got another safetensors file")
        try:
            header = json.loads(text)
            version = header["format_version"]
            if not isinstance(version, int) or version < 1:
                raise ValueError(f"format_version {version!r}")
            if version > FORMAT_VERSION:
                rule = f"must have a format version up to {FORMAT_VERSION}, got {version}: a newer sparsenet wrote it"
                raise self.error(rule) from None
            kinds = {"step": int, "layers": dict, "model": dict, "aliases": dict}
            wrong = [key for key, kind in kinds.items() if not isinstance(header[key], kind)]
            if wrong or header["step"] < 0:
                raise ValueError(f"{(wrong or ['step'])[0]} {header[(wrong or ['step'])[0]]!r}")
        except (TypeError, KeyError, RecursionError, ValueError) as error:
            if str(error).startswith("load: "):
                raise
            raise self.error(f"must have a header that sparsenet.save wrote, got: {error!r}") from error
        return header

    # --- reading ---

    def names(self) -> list[str]:
        """All tensors, sorted."""
        return sorted(self._names)

    def model_names(self) -> set[str]:
        """The tensors of the model's state dict, under the names they have without wrappers."""
        return set(self._by_plain_name)

    def _stored(self, name: str) -> str:
        name = self._by_plain_name.get(name, name)
        stored = self.header["aliases"].get(name, name)
        if stored not in self._names:
            raise self.error(f"must hold the tensor {name!r} that its header names")
        return stored

    def tensor(self, name: str) -> Tensor:
        """A tensor by name, in memory of its own."""
        try:
            tensor = self._reader.get_tensor(self._stored(name))
        except SafetensorError as error:
            raise self.error(f"must hold {name!r} readable, got: {error}") from error
        return tensor.clone() if self._shares_file else tensor

    def spec(self, name: str) -> tuple[str, tuple[int, ...], int]:
        """Dtype, shape and bytes of a tensor, from the header."""
        view = self._reader.get_slice(self._stored(name))
        dtype, shape = view.get_dtype(), tuple(view.get_shape())
        return dtype, shape, math.prod(shape) * (_DTYPES[dtype].itemsize if dtype in _DTYPES else 1)

    def _meta(self, name: str) -> Tensor:
        """A tensor without data, of the dtype and shape that the file has."""
        dtype, shape, _ = self.spec(name)
        if dtype not in _DTYPES:
            raise self.error(f"must hold tensors of {', '.join(_DTYPES)}, got {dtype} for {name!r}")
        return torch.empty(shape, dtype=_DTYPES[dtype], device="meta")

    def decoded(self, part: str, tensor: Callable[[str], Tensor] | None = None) -> Any:
        """A part of the header as it was given to ``save``; ``tensor`` finds tensors by name (default: reads them)."""
        tensor = tensor or self.tensor
        try:
            if part == "model":
                return {plain_name(name): decode(value, tensor) for name, value in self.header["model"].items()}
            return decode(self.header.get(part), tensor)
        except (TypeError, ValueError, AttributeError, RecursionError) as error:
            if str(error).startswith("load: "):
                raise
            raise self.error(f"must have a header that sparsenet.save wrote, got in {part}: {error!r}") from error

    # --- checking ---

    def check_model(self, model: nn.Module, strict: bool = True) -> tuple[list[str], list[str]]:
        """Everything in the file for ``model``, against it; changes nothing and reads indices and masks only.

        Returns:
            Names that the file lacks and names that the model lacks; none where ``strict``, which refuses them.
        """
        state = {unwrapped_name(model, name): value for name, value in model.state_dict().items()}
        is_meta(state)
        there, wanted = self.model_names() | {plain_name(name) for name in self.header["model"]}, set(state)
        layers = sparse_layers(unwrap(model))
        rules = {f"{_prefix(name)}element_rule" for name in layers}  # a layer takes mask and rule of the file
        masks = {f"{_prefix(name)}element_mask" for name in layers} | rules
        more = there - wanted - masks - set(self.header.get("wrapper", ()))
        missing = sorted(wanted - there - rules)
        if strict and (missing or more):
            dense = [
                name for name in layers if f"{_prefix(name)}values" in missing and f"{_prefix(name)}weight" in more
            ]
            hint = f"; {dense[0]!r} is dense there: load before sparsify_" if dense else ""
            names = f"missing in the file {missing[:5]}, not in the model {sorted(more)[:5]}"
            raise self.error(f"must hold this model: {names}{hint}")
        for name, layer in layers.items():
            self._check_layer(name, layer)
        of_layers = {f"{p}{key}" for p in map(_prefix, layers) for key in _LAYER_KEYS}
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor) or name in of_layers or name in missing:
                continue
            if self.spec(name)[1] != tuple(tensor.shape):
                raise self.error(f"must hold {name} of shape {list(tensor.shape)}, got {list(self.spec(name)[1])}")
        return missing, sorted(more)

    def _check_layer(self, name: str, layer: SparseLinear) -> None:
        sizes = self.header["layers"].get(name, {})
        if isinstance(sizes, dict) and sizes:
            here = [layer.in_features, layer.out_features, layer.block_size]
            there = [sizes.get(key) for key in ("in_features", "out_features", "block_size")]
            if here != there:
                text = "{} -> {} with blocks of {}"
                raise self.error(f"must hold layer {name!r} as {text.format(*here)}, got {text.format(*there)}")
        prefix, there = _prefix(name), self.model_names()
        data = ("values", self._meta), ("weight", self._meta)
        indices = [(key, self.tensor) for key in _INDICES]
        state = {prefix + key: read(prefix + key) for key, read in (*data, *indices) if prefix + key in there}
        try:
            read_state(layer, state, prefix)
        except (ValueError, TypeError) as error:
            raise self.error(f"must hold layer {name!r}: {error}") from error

    def check_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """The optimizer's part against the parameters that ``optimizer`` holds."""
        if "optimizer" not in self.header:
            raise self.error("must hold an optimizer's state, got none")
        if any(p.is_meta for group in optimizer.param_groups for p in group["params"]):
            raise self.error("must be loaded into a model before its optimizer is made when the model is on meta")
        part = self.decoded("optimizer", self._meta)
        here = parameter_names(model, optimizer, "load")
        there, state = (part.get("names"), part.get("state")) if isinstance(part, dict) else (None, None)
        if isinstance(there, list):
            there = [
                [plain_name(n) if isinstance(n, str) else n for n in g] if isinstance(g, list) else g for g in there
            ]
        if there != here:
            raise self.error(f"must hold the state of an optimizer over {_short(here)}, got {_short(there)}")
        groups, states = (state.get("param_groups"), state.get("state")) if isinstance(state, dict) else (None, None)
        if not isinstance(groups, list) or not isinstance(states, dict) or len(groups) != len(here):
            raise self.error(f"must hold an optimizer's state and its {len(here)} param_groups, got {_short(state)}")
        kind = type(optimizer).__name__
        for group, expected in zip(groups, optimizer.state_dict()["param_groups"], strict=True):
            if not isinstance(group, dict) or set(group) != set(expected) or group["params"] != expected["params"]:
                raise self.error(f"must hold the state of a {kind} with {sorted(expected)}, got {_short(group)}")
        if is_elementwise(optimizer):
            for number, name in enumerate(n for group in here for n in group):
                self._check_state(name, states.get(number, {}))

    def _check_state(self, name: str, state: Any) -> None:
        """One parameter's state: numbers, or tensors that broadcast to the parameter."""
        shape = self.spec(name)[1]
        if not isinstance(state, dict):
            raise self.error(f"must hold the state of {name} by name, got {_short(state)}")
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            fits = value.dim() == len(shape) and all(n in (1, m) for n, m in zip(value.shape, shape, strict=True))
            if not fits:
                raise self.error(f"must hold {key} of {name} with the shape {list(shape)}, got {list(value.shape)}")

    def check_part(self, part: str, thing: Any) -> None:
        """The part of a sparsifier or scheduler: there, and with the entries that ``thing`` itself would save.

        What ``thing`` lists as ``optional_state`` may be there or not.
        """
        if part not in self.header:
            raise self.error(f"must hold a {part}'s state, got none")
        saved, expected = self.decoded(part), thing.state_dict()
        optional = getattr(thing, "optional_state", frozenset())
        if not isinstance(saved, dict) or set(saved) - optional != set(expected) - optional:
            kind = type(thing).__name__
            raise self.error(f"must hold the state of a {kind} with {sorted(expected)}, got {_short(saved)}")


def _check_beginning(path: Path) -> None:
    """Refuses what is not there, pickles, and header lengths that the file cannot hold."""
    if path.is_dir():
        raise IsADirectoryError(f"load: {path} must be a file, got a folder")
    try:
        with path.open("rb") as file:
            beginning = file.read(8)
            size = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"load: {path} does not exist") from None
    length = int.from_bytes(beginning, "little")
    whole = len(beginning) == 8 and length <= size - 8
    pickled = beginning[:1] == b"\x80" and beginning[1:2] in b"\x02\x03\x04\x05"  # or the length of a small header
    if beginning[:4] == b"PK\x03\x04" or (pickled and not whole):
        raise ValueError(f"load: {path} must be a safetensors file, got a pickle (torch.save), which is never read")
    if not whole:
        raise ValueError(
            f"load: {path} must be a whole safetensors file, got {size} bytes for a header of {length} bytes"
        )


def parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer, op: str) -> list[list[str]]:
    """The names of the optimizer's parameters, by group."""
    named = reversed(list(model.named_parameters(remove_duplicate=False)))
    names = {id(p): unwrapped_name(model, name) for name, p in named}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                shape = list(parameter.shape)
                raise ValueError(f"{op}: optimizer must hold parameters of the model, got another of shape {shape}")
    return [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def is_meta(state: Mapping[str, Any]) -> bool:
    """Whether a model with this ``state_dict`` holds no data yet; its indices do."""
    tensors = {name: t for name, t in state.items() if isinstance(t, Tensor) and not is_index(name)}
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta and len(meta) < len(tensors):
        raise ValueError(f"load: model must be on meta as a whole or not at all, got {meta[0]} there and others not")
    return bool(meta)


def is_index(name: str) -> bool:
    """Whether ``name`` is of a pattern or a mask: these hold data, and have their own dtypes, also on meta."""
    return name.split(".")[-1] in _INDICES


def _prefix(name: str) -> str:
    return f"{name}." if name else ""


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether all state tensors have their parameter's shape or broadcast to it: torch's optimizers except LBFGS."""
    return type(optimizer).__module__.startswith("torch.optim") and not isinstance(optimizer, torch.optim.LBFGS)


def _short(value: Any) -> str:
    text = str(sorted(value, key=str) if isinstance(value, dict) else value)
    return text if len(text) <= 200 else f"{text[:200]}..."
