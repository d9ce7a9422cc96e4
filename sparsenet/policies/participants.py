"""Who takes part in rewiring: the layers of a model, their copies in followers, and who must hold their values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from torch.optim import Optimizer

from sparsenet import distributed
from sparsenet.layers import SparseLinear, sparse_layers
from sparsenet.optimizer_state import holds

__all__ = ["distinct_layers", "follower_layers", "refuse_unheld"]


def refuse_unheld(layers: Mapping[str, SparseLinear], optimizers: Sequence[Optimizer]) -> None:
    """ValueError where the values of a trainable layer are in none of the optimizers, if there is one."""
    for name, layer in layers.items() if optimizers else ():
        if layer.values.requires_grad and not any(holds(o, layer.values) for o in optimizers):
            raise ValueError(
                f"Sparsifier: optimizer must hold the values of every trainable layer, got none for {name!r}; make "
                "the optimizer after sparsify_, or freeze the layer (requires_grad_(False))"
            )


def follower_layers(followers: Sequence[nn.Module], layers: Mapping[str, SparseLinear]) -> dict[str, list]:
    """By layer name, the layers of the followers that go along."""
    found: dict[str, list[SparseLinear]] = {name: [] for name in layers}
    for number, follower in enumerate(followers):
        if not isinstance(follower, nn.Module):
            raise TypeError(f"Sparsifier: followers must be modules, got {type(follower).__name__}")
        copies = sparse_layers(distributed.unwrap(follower))
        for name, layer in layers.items():
            copy = copies.get(name)
            if copy is None or copy is layer or copy.pattern != layer.pattern:
                what = "no such layer" if copy is None else "the layer itself" if copy is layer else "another pattern"
                raise ValueError(f"Sparsifier: followers[{number}] must be a copy of layer {name!r}, got {what}")
            found[name].append(copy)
    return found


def distinct_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """The sparse layers by name; ValueError where there is none, or where two share their values."""
    layers = sparse_layers(model)
    if not layers:
        raise ValueError("Sparsifier: model must hold at least one SparseLinear; see sparsify_")
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        other = owners.setdefault(id(layer.values), name)
        if other != name:
            raise ValueError(f"Sparsifier: one Parameter must not serve two layers, got {other!r} and {name!r}")
        layer.topology.label = f"block_sparse_linear ({name})"
    return layers
