"""Giving a freshly built model the structure that a saved one had grown to, so that a checkpoint can be loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from sparsenet.architecture.growth.deepening import deepen
from sparsenet.compaction.resize import resize_to
from sparsenet.layers import SparseLinear
from sparsenet.topology import replace_data

__all__ = ["fit_structure"]


def fit_structure(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    insertions: Sequence[Mapping],
    path: str | Path,
) -> Callable[[], None]:
    """Inserts layers and gives every layer the size that it has in a checkpoint; returns what takes all of that back.

    Args:
        insertions: arguments of :func:`deepen`, in the order they were made. path: written by :func:`sparsenet.save`.

    Raises:
        ValueError: the file is not of this model; nothing was changed.

    Example:
        >>> import tempfile, torch, sparsenet as sn
        >>> from sparsenet.architecture.growth import widen
        >>> from sparsenet.architecture.growth.restoring import fit_structure
        >>> build = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model, again = build(), build()
        >>> _ = widen(model, None, {"0": 3})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     sn.save(f"{folder}/wide.safetensors", model)
        ...     back = fit_structure(again, (), [], f"{folder}/wide.safetensors")
        >>> wide = again[0].out_features
        >>> back()
        >>> wide, again[0].out_features
        (11, 8)
    """
    undo = _structure_of(model, optimizer)
    try:
        for insertion in insertions:
            deepen(model, optimizer if optimizer else None, **insertion)
        resize_to(model, path)
    except BaseException:
        undo()
        raise
    return undo


def _structure_of(model: nn.Module, optimizer) -> Callable[[], None]:
    """Remembers modules, sizes and memory; returns what restores them."""
    optimizers = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
    groups = [(group, list(group["params"])) for o in optimizers for group in o.param_groups]
    modules = []
    for module in model.modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, int)}
        parameters = [(p, p.data, p.grad) for p in module._parameters.values() if p is not None]
        sparse = (module.pattern, module.element_mask, module.elements) if isinstance(module, SparseLinear) else None
        modules.append((module, dict(module._modules), dict(module._buffers), plain, parameters, sparse))

    def undo() -> None:
        for group, members in groups:
            group["params"][:] = members
        for module, children, buffers, plain, parameters, sparse in modules:
            module._modules.clear()
            module._modules.update(children)
            module._buffers.update(buffers)
            vars(module).update(plain)
            for parameter, data, grad in parameters:
                parameter.grad = None
                if sparse is not None and parameter is module.values:
                    module._install(sparse[0].copy(), data, *sparse[1:])
                else:
                    replace_data(parameter, data)
                parameter.grad = grad

    return undo
