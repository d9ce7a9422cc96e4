"""Giving a freshly built model the sizes of a compacted one in a checkpoint, so that the checkpoint can be loaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sparsenet.checkpoint.saving import FileContents, describe
from sparsenet.compaction.compacting import plain_model
from sparsenet.compaction.modules import CompactLayerNorm
from sparsenet.compaction.moves import set_sizes
from sparsenet.layers import SparseLinear
from sparsenet.pattern import BlockPattern
from sparsenet.topology import replace_data

__all__ = ["resize_to"]


def resize_to(model: nn.Module, path: str | Path) -> None:
    """Gives the layers of ``model`` the sizes that they have in a checkpoint, in place; then :func:`sparsenet.load` it.

    Args:
        model: built as the saved one was before it was compacted. Parameters stay the same objects; what is in them
            is lost where a size changes.
        path: written by :func:`sparsenet.save`.

    Raises:
        ValueError: the file is damaged, or is not of this model; nothing was changed.

    Layers that :func:`sparsenet.fold_depth` merged are another structure: build the model without them.

    Example:
        >>> import tempfile, torch, sparsenet as sn
        >>> build = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = build()
        >>> _ = sn.compact(model, remove={"0": [1, 5]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sn.save(f"{folder}/small.safetensors", model)
        ...     again = build()
        ...     sn.resize_to(again, f"{folder}/small.safetensors")
        ...     _ = sn.load(f"{folder}/small.safetensors", again)
        >>> again[0].out_features
        6
    """
    contents = describe(path)
    changes: list[Callable[[], None]] = []
    for name, module in plain_model(model).named_modules():
        changes += _changes(plain_model(model), name, module, contents)
    for change in changes:
        change()


def _changes(model: nn.Module, name: str, module: nn.Module, contents: FileContents) -> list[Callable[[], None]]:
    """What has to be done to one module."""
    prefix = f"{name}." if name else ""
    if isinstance(module, SparseLinear):
        layer = contents.layers.get(name)
        if layer is None or layer["block_size"] != module.block_size:
            raise ValueError(
                f"resize_to: {contents.path} must hold the layer {name!r} in blocks of {module.block_size}"
            )
        return [partial(_resize_sparse, module, layer["out_features"], layer["in_features"])]
    changes, rows = [], None
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for key, tensor in own:
        if key in module._non_persistent_buffers_set:
            continue
        there = contents.tensors.get(prefix + key)
        if there is None or len(there[1]) != tensor.dim():
            found = "none" if there is None else list(there[1])
            raise ValueError(
                f"resize_to: {contents.path} must hold {prefix + key} of {tensor.dim()} sizes, got {found}"
            )
        if there[1] != tuple(tensor.shape):
            changes.append(partial(_resize_tensor, module, key, there[1]))
            rows = there[1][0]
    weight = contents.tensors.get(f"{prefix}weight")
    if rows is not None and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
        depthwise = getattr(module, "groups", 1) > 1
        changes.append(partial(set_sizes, module, rows, rows if depthwise else weight[1][1]))
    for attribute in ("num_features", "num_parameters"):
        if rows is not None and hasattr(module, attribute):
            changes.append(partial(setattr, module, attribute, rows))
    if isinstance(module, nn.LayerNorm) and f"{prefix}left" in contents.tensors:
        changes.append(partial(_become_compact, model, module))
    return changes


def _resize_sparse(layer: SparseLinear, rows: int, cols: int) -> None:
    """No blocks at all: loading brings them."""
    b = layer.block_size
    empty = BlockPattern(
        torch.zeros(-(-rows // b) + 1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), (rows, cols), b
    )
    layer._install(empty.to(layer.values.device), layer.values.new_zeros(0, b, b), None)
    layer.out_features, layer.in_features = rows, cols
    if layer.bias is not None and len(layer.bias) != rows:
        replace_data(layer.bias, layer.bias.new_zeros(rows))


def _resize_tensor(module: nn.Module, key: str, shape: tuple[int, ...]) -> None:
    tensor = getattr(module, key).detach()
    if key in module._parameters:
        module._parameters[key].grad = None
        replace_data(module._parameters[key], tensor.new_zeros(shape))
    else:
        module._buffers[key] = tensor.new_zeros(shape)


def _become_compact(model: nn.Module, norm: nn.LayerNorm) -> None:
    """The LayerNorm lost units; what is left of them comes with loading."""
    twin = CompactLayerNorm(norm, torch.arange(len(norm.weight)), torch.zeros(0, dtype=torch.float64))
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is norm:
                parent._modules[name] = twin.to(norm.weight.device)
