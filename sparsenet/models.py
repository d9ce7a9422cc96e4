"""Models of sparse layers: one built of them, and any model whose Linear layers are swapped for them and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from sparsenet.densities import block_places, choose_block_size, distribute
from sparsenet.layers import SparseLinear, refuse_other_keys, refuse_unfit_state, sparse_layers, warn_unreached
from sparsenet.pattern import BlockPattern

__all__ = ["SparseMLP", "densify_", "sparsify_"]


class SparseMLP(nn.Sequential):
    """A multilayer perceptron of :class:`SparseLinear` layers, activations fused.

    Args:
        sizes: feature counts, input first: ``[784, 4096, 4096, 10]``.
        density: share of active block places over all layers, or one number per layer.
        block_size: 1, 4, 8, 16, 32, 64 or 128, one per layer, or None: the largest up to 32 that leaves every row of a
            layer's blocks 1.5 blocks on average (:func:`sparsenet.densities.choose_block_size`).
        activation: of the hidden layers, ``relu``, ``gelu``, ``silu`` or ``none``; the last layer has none.
        distribution: how one density is spread over the layers: ``erdos_renyi`` or ``uniform``.
        bias, device, dtype, generator: as for SparseLinear.

    Raises:
        ValueError: fewer than two sizes, or as many densities or block sizes as do not fit the layers.

    A warning says how many outputs and inputs of which layer have no weight, where there are too few blocks for all.

    Shape: [batch, ...] is flattened to [batch, sizes[0]] -> [batch, sizes[-1]].

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([784, 1024, 10], density=0.1)
        >>> model(torch.randn(5, 28, 28)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        density: float | Sequence[float] = 0.1,
        block_size: int | Sequence[int] | None = None,
        activation: str = "relu",
        distribution: str = "erdos_renyi",
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ):
        if isinstance(sizes, str) or len(sizes) < 2:
            raise ValueError(f"SparseMLP: sizes must name at least input and output, got {sizes!r}")
        shapes = [(out, inp) for inp, out in pairwise(sizes)]
        densities = _per_layer("density", density, len(shapes))
        if block_size is None:
            block_size = [choose_block_size(inp, d) for (_, inp), d in zip(shapes, densities, strict=True)]
        sides = _per_layer("block_size", block_size, len(shapes))
        if densities is density:
            each = zip(shapes, densities, sides, strict=True)
            counts = [distribute([shape], d, "uniform", block_size=b)[0] for shape, d, b in each]
        else:
            counts = distribute(shapes, density, distribution, block_size=sides)
        layers = []
        for i, ((out, inp), count, b) in enumerate(zip(shapes, counts, sides, strict=True)):
            pattern = BlockPattern.random((out, inp), block_size=b, generator=generator, num_blocks=count)
            layers.append(
                SparseLinear(
                    inp,
                    out,
                    bias,
                    pattern=pattern,
                    activation=activation if i + 1 < len(shapes) else "none",
                    device=device,
                    dtype=dtype,
                    generator=generator,
                )
            )
            layers[-1].topology.label = f"block_sparse_linear ({i})"
        super().__init__(*layers)
        if any(densities):
            warn_unreached("SparseMLP", {str(i): layer.pattern for i, layer in enumerate(layers)}, stacklevel=3)
        self.register_load_state_dict_pre_hook(refuse_unfit_state)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Feature counts, input first; compaction makes them smaller."""
        return (self[0].in_features, *(layer.out_features for layer in self))

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As of any module; a load that fails has changed nothing."""
        if strict:
            refuse_unfit_state(self, state_dict, "")
            refuse_other_keys(self, state_dict)
        return super().load_state_dict(state_dict, strict, assign)

    def __getitem__(self, index):
        """A layer, or for a slice an ``nn.Sequential`` of layers."""
        return nn.Sequential(*list(self)[index]) if isinstance(index, slice) else super().__getitem__(index)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, ...] -> [batch, sizes[-1]]."""
        x = x.flatten(1) if type(x) is Proxy or x.dim() > 2 else x
        return super().forward(x)


def _per_layer(name: str, value, count: int) -> Sequence:
    """``value`` if it has one entry per layer, else as many of it."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"SparseMLP: {name} must have {count} entries, one per layer, got {len(value)}")
    return value


# --- swapping -------------------------------------------------------------------------------------------------------


def sparsify_(
    model: nn.Module,
    density: float = 0.1,
    block_size: int | None = None,
    distribution: str = "uniform",
    filter_fn: Callable[[str, nn.Linear], bool] | None = None,
) -> nn.Module:
    """Swaps every ``nn.Linear`` of ``model`` in place for a SparseLinear that keeps its largest blocks.

    Args:
        model: any module; a Linear used in several places stays one layer.
        density: over all swapped layers together.
        block_size: 1, 4, 8, 16, 32, 64 or 128; None: chosen for each layer, as in :class:`SparseMLP`.
        distribution: how the density is spread, ``uniform`` or ``erdos_renyi``.
        filter_fn: ``filter_fn(name, linear)`` says which are swapped; default all.

    Returns:
        ``model`` (or the layer, if ``model`` itself is a Linear).

    Raises:
        ValueError: a weight is shared between different modules, which one pattern cannot serve.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> model = sn.sparsify_(model, density=0.25, block_size=16)
        >>> [layer.density for layer in model if isinstance(layer, sn.SparseLinear)]
        [0.25, 0.25]
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparsify_: model must be a torch.nn.Module, got {type(model).__name__}")
    chosen = {
        name: m
        for name, m in model.named_modules()
        if type(m) is nn.Linear and (filter_fn is None or filter_fn(name, m))
    }
    _refuse_shared_weights(model, chosen)
    shapes = [(m.out_features, m.in_features) for m in chosen.values()]
    sides = [choose_block_size(inp, density) if block_size is None else block_size for _, inp in shapes]
    counts = distribute(shapes, density, distribution, block_size=sides)
    swapped: dict[nn.Module, nn.Module] = {}
    for (name, linear), shape, count, b in zip(chosen.items(), shapes, counts, sides, strict=True):
        pattern = BlockPattern.from_dense(linear.weight, count / max(block_places(shape, b), 1), b)
        layer = SparseLinear.from_linear(linear, pattern=pattern)
        layer.topology.label = f"block_sparse_linear ({name})"
        swapped[linear] = layer
    warn_unreached("sparsify_", {name: swapped[m].pattern for name, m in chosen.items()}, stacklevel=3)
    model = _swap(model, swapped)
    if swapped and not isinstance(model, SparseLinear):
        model.register_load_state_dict_pre_hook(refuse_unfit_state)
    return model


def densify_(model: nn.Module) -> nn.Module:
    """Swaps every SparseLinear of ``model`` in place for an ``nn.Linear`` (and its fused activation's module).

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 128, 10], density=0.5, block_size=16)
        >>> x = torch.randn(3, 64)
        >>> before = model(x)
        >>> torch.allclose(sn.densify_(model)(x), before, atol=1e-5)
        True
        >>> any(isinstance(layer, sn.SparseLinear) for layer in model.modules())
        False
    """
    modules = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
    swapped: dict[nn.Module, nn.Module] = {}
    for layer in sparse_layers(model).values():
        linear = layer.to_linear()
        if layer.activation != "none":
            linear = nn.Sequential(linear, modules[layer.activation]())
        swapped[layer] = linear.train(layer.training)
    return _swap(model, swapped)


def _swap(model: nn.Module, swapped: dict[nn.Module, nn.Module]) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if child in swapped:
                module._modules[name] = swapped[child]
                if isinstance(module, nn.TransformerEncoderLayer):
                    module.activation_relu_or_gelu = 0  # its fused inference path would ask for dense weights
        if isinstance(module, nn.TransformerEncoder) and any(m in swapped for m in module.modules()):
            module.use_nested_tensor = False  # likewise
    return swapped.get(model, model)


def _refuse_shared_weights(model: nn.Module, chosen: dict[str, nn.Linear]) -> None:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    for name, linear in chosen.items():
        others = [n for n in owners[id(linear.weight)] if n != name]
        if others:
            raise ValueError(
                f"sparsify_: the weight of {name!r} must not be shared, got it in {', '.join(map(repr, others))} too"
            )
