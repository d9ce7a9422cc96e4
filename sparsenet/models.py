"""Models of sparse layers: one built of them, and any model whose Linear layers are swapped for them and back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from sparsenet.densities import block_places, choose_block_size, distribute
from sparsenet.functional.checks import check_block_size
from sparsenet.layers import SparseLinear, refuse_other_keys, refuse_unfit_state, sparse_layers
from sparsenet.pattern import BlockPattern, warn_unreached
from sparsenet.schedules import as_number, number_of, numbers_of
from sparsenet.swapping.refusals import (
    check_swappable,
    refuse_computed,
    refuse_own_forward,
    refuse_shared_weights,
    refuse_watched,
    refuse_wrapped,
)
from sparsenet.swapping.report import SparsifyReport, announce, describe, quoted

__all__ = ["SparseMLP", "densify_", "sparsify_"]


class SparseMLP(nn.Sequential):
    """A multilayer perceptron of :class:`SparseLinear` layers, activations fused.

    Args:
        sizes: feature counts, input first: ``[784, 4096, 4096, 10]``.
        density: share of active block places over all layers, or one number per layer.
        block_size: 1, 4, 8, 16, 32, 64 or 128, one per layer, or None: the largest up to 32 that leaves every row of a
            layer's blocks 3 blocks on average, for 4 half of that (:func:`sparsenet.densities.choose_block_size`).
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
        shapes = [(out, inp) for inp, out in pairwise(numbers_of(sizes))]
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
    if number_of(value) is not None or isinstance(value, str):
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
) -> SparsifyReport:
    """Swaps every ``nn.Linear`` of ``model`` in place for a SparseLinear that keeps its largest blocks.

    Args:
        model: any module; a Linear used in several places stays one layer.
        density: over all swapped layers together.
        block_size: 1, 4, 8, 16, 32, 64 or 128; None: chosen for each layer, as in :class:`SparseMLP`.
        distribution: how the density is spread, ``uniform`` or ``erdos_renyi``.
        filter_fn: ``filter_fn(name, linear)`` says which are swapped; default all.

    Returns:
        A :class:`SparsifyReport`: which layers were swapped, and which modules with a matrix were left and why. It is
        also logged (level INFO, on rank 0); where nothing was swapped, a warning gives the reasons.
        ``report.model`` is ``model``, or the new layer if ``model`` itself is a Linear.

    Raises:
        ValueError, TypeError: a layer that cannot be swapped rightly, by name and with what to do: its weight is shared
            with another module, pruned, parametrized, normalised, lazy, on meta, sharded, not floating-point or watched
            by hooks; it has a forward of its own; the model is wrapped in DistributedDataParallel. Nothing was changed.

    Hooks of a swapped layer, what was added to it (attributes, buffers, parameters, submodules), its mode, and what is
    frozen are carried over. Its bias stays the same Parameter; ``values`` is a new one without ``.grad``, so make
    optimizers after the swap. References to the Linear in attributes, lists and dicts of the model's modules are
    replaced as well; the ones that others keep are not.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> report = sn.sparsify_(model, density=0.25, block_size=16)
        >>> [layer.density for layer in model if isinstance(layer, sn.SparseLinear)]
        [0.25, 0.25]
        >>> report.layers["0"].num_blocks, report.left
        (16, {})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"sparsify_: model must be a torch.nn.Module, got {type(model).__name__}")
    block_size = None if block_size is None else check_block_size("sparsify_", block_size)
    density = as_number("sparsify_", "density", density, within=(0, 1))
    refuse_wrapped("sparsify_", model)
    chosen, left = _choose(model, filter_fn)
    for name, linear in chosen.items():
        check_swappable(name, linear)
    refuse_shared_weights(model, chosen)
    shapes = [(m.out_features, m.in_features) for m in chosen.values()]
    sides = [choose_block_size(inp, density) if block_size is None else block_size for _, inp in shapes]
    counts = distribute(shapes, density, distribution, block_size=sides)
    swapped: dict[nn.Module, nn.Module] = {}
    for (name, linear), shape, count, b in zip(chosen.items(), shapes, counts, sides, strict=True):
        pattern = BlockPattern.from_dense(linear.weight, count / max(block_places(shape, b), 1), b)
        layer = SparseLinear.from_linear(linear, pattern=pattern)
        layer.topology.label = f"block_sparse_linear ({name})"
        swapped[linear] = layer
    for name, linear in chosen.items():
        _carry("sparsify_", name, linear, swapped[linear])
    report = SparsifyReport(
        _swap(model, swapped), {name: describe(linear, swapped[linear]) for name, linear in chosen.items()}, left
    )
    warn_unreached("sparsify_", {name: swapped[m].pattern for name, m in chosen.items()}, stacklevel=3)
    if swapped and not isinstance(report.model, SparseLinear):
        model.register_load_state_dict_pre_hook(refuse_unfit_state)
    announce(report)
    return report


def densify_(model: nn.Module) -> nn.Module:
    """Swaps every SparseLinear of ``model`` in place for an ``nn.Linear`` (and its fused activation's module).

    Hooks and what was added to a layer are carried over as by :func:`sparsify_`; with a fused activation the hooks go
    to the pair of both modules.

    Raises:
        ValueError: by name, a layer that a Linear cannot replace: a subclass with a forward of its own, or ``values``
            that are pruned or parametrized. Nothing was changed.

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
    if not isinstance(model, nn.Module):
        raise TypeError(f"densify_: model must be a torch.nn.Module, got {type(model).__name__}")
    refuse_wrapped("densify_", model)
    modules = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
    layers = sparse_layers(model)
    for name, layer in layers.items():
        refuse_computed("densify_", name, layer, "values")
        refuse_own_forward("densify_", name, layer, SparseLinear)
        refuse_watched("densify_", name, layer.values, "values")
    swapped: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        linear = layer.to_linear()
        swapped[layer] = linear
        if layer.activation != "none":
            swapped[layer] = nn.Sequential(linear, modules[layer.activation]())
        swapped[layer].train(layer.training)
        _carry("densify_", name, layer, linear, hooks_to=swapped[layer])
    return _swap(model, swapped)


def _swap(model: nn.Module, swapped: dict[nn.Module, nn.Module]) -> nn.Module:
    """Puts the new modules in the places of the old ones."""
    for old, new in swapped.items():
        for hook in old._load_state_dict_pre_hooks.values():
            if getattr(hook, "module", None) is not None:  # a weak reference to the module it is called with
                hook.module = weakref.ref(new)
    for module in [*model.modules(), *swapped.values()]:
        for holder in (vars(module), *(v for v in vars(module).values() if isinstance(v, (dict, list)))):
            for key, child in list(holder.items() if isinstance(holder, dict) else enumerate(holder)):
                if isinstance(child, nn.Module) and child in swapped:
                    holder[key] = swapped[child]
                    if isinstance(module, nn.TransformerEncoderLayer):
                        module.activation_relu_or_gelu = 0  # its fused inference path would ask for dense weights
    new = set(swapped.values())
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(m in new for m in module.modules()):
            module.use_nested_tensor = False  # likewise
    return swapped.get(model, model)


def _choose(
    model: nn.Module, filter_fn: Callable[[str, nn.Linear], bool] | None
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """By name: the Linears to swap, and why each other module that holds a matrix is left."""
    chosen, left = {}, {}
    parts: list[str] = []  # prefixes of modules that are parts of another one
    for name, module in model.named_modules():
        kind, prefix = type(module).__name__, f"{name}." if name else ""
        if name.startswith(tuple(parts)):
            continue
        if parametrize.is_parametrized(module):
            parts.append(f"{prefix}parametrizations.")
        if parametrize.type_before_parametrizations(module) in (nn.Linear, nn.LazyLinear):
            if filter_fn is None or filter_fn(name, module):
                chosen[name] = module
            else:
                left[name] = "left out by filter_fn"
        elif isinstance(module, SparseLinear):
            left[name] = "sparse already"
        elif isinstance(module, nn.Linear):
            left[name] = f"{kind} is a subclass of nn.Linear, which other code may know"
        elif hasattr(module, "_packed_params"):
            left[name] = f"{kind} is quantized"
            parts.append(f"{prefix}_packed_params")
        elif _holds_a_matrix(module):
            left[name] = f"{kind} is not an nn.Linear"
    return chosen, left


def _holds_a_matrix(module: nn.Module) -> bool:
    """Whether it has one as a parameter, or is called a linear layer and keeps it in another form."""
    packed = "Linear" in type(module).__name__ and not any(True for _ in module.children())
    return packed or any(is_lazy(p) or p.dim() > 1 for p in module.parameters(recurse=False))


def _carry(op: str, name: str, old: nn.Module, new: nn.Module, hooks_to: nn.Module | None = None) -> None:
    """Gives ``new`` the bias of ``old``, its hooks and all that was added to it; ``old`` stays as it is.

    The dictionaries of hooks become common to both, so that handles which users keep go on removing them.
    """
    fresh = nn.Linear(1, 1, device="meta") if isinstance(old, nn.Linear) else _empty_layer()
    state = ("_parameters", "_buffers", "_modules")
    added = {key: {k: v for k, v in vars(old)[key].items() if k not in vars(fresh)[key]} for key in state}
    attributes = {key: value for key, value in vars(old).items() if key not in vars(fresh) and key != "bias"}
    kept = {"crow_indices", "col_indices", "element_mask", "element_rule"} if isinstance(new, SparseLinear) else set()
    for key in (*attributes, *(key for group in added.values() for key in group)):
        if hasattr(new, key) or key in kept:
            raise ValueError(f"{op}: {quoted(name)} must not hold a {key!r} of its own, which {type(new).__name__} has")
    for key, group in added.items():
        vars(new)[key].update(group)
    vars(new).update(attributes)
    new._non_persistent_buffers_set.update(old._non_persistent_buffers_set)
    if old.bias is not None:
        new._parameters["bias"] = old.bias
    theirs, ours = (m._parameters["weight" if isinstance(m, nn.Linear) else "values"] for m in (old, new))
    vars(ours).update(vars(theirs))
    target = new if hooks_to is None else hooks_to
    vars(target).update({key: value for key, value in vars(old).items() if key in vars(fresh) and "hook" in key})


def _empty_layer() -> SparseLinear:
    """One that draws no random numbers."""
    return SparseLinear(1, 1, pattern=BlockPattern([0, 0], [], (1, 1), 1), device="meta")
