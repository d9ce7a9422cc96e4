"""What a layer costs in a training step, as the model of step times takes it: its kind and its sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet.layers import SparseLinear
from sparsenet.memory.network import undisturbed
from sparsenet.schedules import as_integer

__all__ = ["LayerCost", "layer_costs"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)
_LAYERS = (nn.Linear, SparseLinear, *_CONVOLUTIONS, *_POOLS, *_NORMS)
KINDS = ("dense", "block", "conv", "pool", "norm")


@dataclass(frozen=True)
class LayerCost:
    """One call of a layer in a training step.

    Attributes:
        kind: ``dense``, ``block`` (block-sparse), ``conv``, ``pool`` or ``norm``.
        out_features, in_features: of its weight; of a convolution its channels, of which each group reads its share.
            Pooling and normalisation have the same number of both.
        positions: rows that it is applied to: of a batch, times places in sequences and images (those of its output).
        block_size, num_blocks: of a block-sparse layer.
        dtype: ``float32``, ``bfloat16``, ... of its weight.
        optimizer_elements: what the optimizer updates for it; 0 for a frozen layer, and for further calls of one layer.
        kernel, places, groups: of convolution and pooling: sizes of the kernel, places of the output per example.
        input_gradient: whether the gradient of its input is wanted; not of a first layer.
        name: of the layer in its model.

    Raises:
        ValueError: another kind, or a negative size.

    Example:
        >>> from sparsenet.memory import LayerCost
        >>> LayerCost("dense", out_features=256, in_features=784, positions=64).flops   # forward and both gradients
        77070336
    """

    kind: str
    out_features: int
    in_features: int
    positions: int
    block_size: int = 0
    num_blocks: int = 0
    dtype: str = "float32"
    optimizer_elements: int = 0
    kernel: tuple[int, ...] = ()
    places: int = 1
    groups: int = 1
    input_gradient: bool = True
    name: str = field(default="", compare=False)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"LayerCost: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        for name in ("out_features", "in_features", "positions", "block_size", "num_blocks", "optimizer_elements"):
            as_integer("LayerCost", name, getattr(self, name), at_least=0)
        for name in ("places", "groups"):
            as_integer("LayerCost", name, getattr(self, name), at_least=1)
        if self.kind == "block" and not self.block_size:
            raise ValueError("LayerCost: block_size must be at least 1 for a block-sparse layer, got 0")

    @property
    def weights(self) -> int:
        """Elements of its weight, as far as they are multiplied as a matrix."""
        if self.kind in ("pool", "norm"):
            return 0
        if self.kind == "block":
            return self.num_blocks * self.block_size**2
        taps = 1
        for size in self.kernel:
            taps *= size
        return self.out_features * self.in_features * taps // self.groups

    @property
    def flops(self) -> int:
        """Multiplications and additions of forward and backward."""
        return 2 * self.weights * self.positions * (2 + self.input_gradient)


def layer_costs(model: nn.Module, batch: int | Mapping[str, int] | Tensor | Sequence[Any]) -> list[LayerCost]:
    """The calls of layers in one training step, in their order: those with weights, pooling and normalisation.

    Args:
        model: of any modules; those of other kinds are left out (a model of step times learns their share).
        batch: the inputs of one batch, of which one forward pass is made without gradients that leaves buffers and
            random state as they were; or, for models of linear layers that see one row per example, the number of rows;
            or the rows by the names of the layers.

    Raises:
        ValueError: a convolution without inputs to see its places by, a layer that ``batch`` does not name.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.memory import layer_costs
        >>> model = sn.SparseMLP([64, 128, 16], density=0.5, block_size=16, distribution="uniform")
        >>> [(cost.kind, cost.num_blocks) for cost in layer_costs(model, 32)]
        [('block', 16), ('block', 4)]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"layer_costs: model must be a module, got {type(model).__name__}")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, _LAYERS)}
    if isinstance(batch, (Tensor, tuple, list)):
        calls = _seen_calls(model, layers, batch)
    else:
        calls = [(layer, *_told(name, layer, batch)) for name, layer in layers.items()]
    costs, updated, names = [], set(), {layer: name for name, layer in layers.items()}
    for layer, positions, places, features in calls:
        own = [p for p in layer.parameters(recurse=False) if p.requires_grad and id(p) not in updated]
        updated |= {id(p) for p in own}
        cost = _cost(layer, (positions, places, features), sum(p.numel() for p in own), input_gradient=bool(costs))
        costs.append(replace(cost, name=names[layer]))
    return costs


def _cost(layer: nn.Module, call: tuple[int, int, int], elements: int, input_gradient: bool) -> LayerCost:
    positions, places, features = call
    common = {"positions": positions, "optimizer_elements": elements, "input_gradient": input_gradient}
    if isinstance(layer, SparseLinear):
        pattern, dtype = layer.pattern, _name_of(layer.values.dtype)
        sizes = {"block_size": pattern.block_size, "num_blocks": pattern.num_blocks, "dtype": dtype}
        return LayerCost("block", *pattern.shape, **sizes, **common)
    if isinstance(layer, (*_POOLS, *_NORMS)):
        kind, kernel = ("norm", ()) if isinstance(layer, _NORMS) else ("pool", _sizes_of(layer))
        return LayerCost(kind, features, features, kernel=kernel, places=places, **common)
    dtype = _name_of(layer.weight.dtype)
    if isinstance(layer, nn.Linear):
        return LayerCost("dense", layer.out_features, layer.in_features, dtype=dtype, **common)
    sizes = {"kernel": tuple(layer.kernel_size), "places": places, "groups": layer.groups, "dtype": dtype}
    return LayerCost("conv", layer.out_channels, layer.in_channels, **sizes, **common)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sizes_of(pool: nn.Module) -> tuple[int, ...]:
    dims = int(type(pool).__name__[-2])
    return tuple(pool.kernel_size) if isinstance(pool.kernel_size, tuple) else (pool.kernel_size,) * dims


def _told(name: str, layer: nn.Module, batch: int | Mapping[str, int]) -> tuple[int, int, int]:
    if not isinstance(layer, (nn.Linear, SparseLinear)):
        raise ValueError(f"layer_costs: batch must be inputs for a model with a {type(layer).__name__}, got rows")
    if isinstance(batch, Mapping):
        if name not in batch:
            raise ValueError(f"layer_costs: batch must name the rows of every layer, got none for {name!r}")
        batch = batch[name]
    return as_integer("layer_costs", "batch", batch, at_least=0), 1, 0


def _seen_calls(model: nn.Module, layers: Mapping[str, nn.Module], inputs: Tensor | Sequence[Any]) -> list[tuple]:
    calls: list[tuple[nn.Module, int, int, int]] = []

    def note(layer: nn.Module, arguments: tuple, output: Tensor) -> None:
        """Channels come second where the layer has them, else features last."""
        last = isinstance(layer, (nn.Linear, SparseLinear, nn.LayerNorm))
        features = output.shape[-1] if last or output.dim() < 2 else output.shape[1]
        positions = output.numel() // max(features, 1)
        places = 1 if last else max(1, positions // max(output.shape[0], 1))
        calls.append((layer, positions, places, features))

    hooks = [layer.register_forward_hook(note) for layer in layers.values()]
    try:
        with undisturbed(model), torch.no_grad():
            model(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
    finally:
        for hook in hooks:
            hook.remove()
    return calls
