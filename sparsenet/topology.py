"""Topology: what changes of a layer while it trains. Patterns themselves are immutable and carry no run state."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsenet.elements import NM
from sparsenet.elements.masks import read_mask
from sparsenet.functional import native, registry
from sparsenet.functional.bits import pack_mask, unpack_mask
from sparsenet.pattern import BlockPattern

__all__ = ["DenseWeight", "LayerState", "Topology", "read_state", "replace_data"]

Observer = Callable[[Tensor, Tensor], None]


class Topology:
    """The pattern that a layer has now, and everything about it that is not for ever. One object per layer, for life.

    Attributes:
        pattern: the active blocks; :meth:`replace` exchanges it, nothing changes it.
        mask_bits: uint8 [num_blocks, ceil(b*b/8)] on the pattern's device, which elements of the blocks are there
            (:func:`sparsenet.functional.bits.pack_mask`); None: all of them. Replaced, never written to.
        elements: the N:M rule that the mask keeps, or None: the mask follows none, or there is no mask.
        label: how errors name the layer.
        expected_calls: calls of the layer in eager forward passes since the observer began to watch, whose backward it
            has not seen; 0 where they were not counted.
        recomputed_in: autograd's number of the backward pass within which the layer was last called in an eager forward
            pass since the observer began to watch, as checkpointing does; -1: within none.
        trained: whether a backward pass has ever made a gradient for the values.
        family: the layers that are copies of each other; a weak set that they share.
        written: how often the values' memory had been written to when the layer last knew what is in it.
        observer: called in every backward pass through the layer with ``(x, grad_output before the activation)``, both
            2-D, as often as the layer was called in it; None: nobody watches. An observer watches one pattern: a
            replacement takes it away.

    Example:
        >>> import torch, sparsenet as sn
        >>> layer, seen = sn.SparseLinear(32, 16, density=0.5, block_size=8), []
        >>> layer.topology.observer = lambda x, grad_output: seen.append(list(grad_output.shape))
        >>> layer(torch.randn(5, 32)).sum().backward()
        >>> seen
        [[5, 16]]
    """

    __slots__ = (
        "__weakref__", "elements", "expected_calls", "family", "label", "mask_bits", "observer", "pattern",
        "recomputed_in", "trained",
        "written",
    )  # fmt: skip

    def __init__(
        self,
        pattern: BlockPattern,
        element_mask: Tensor | None = None,
        label: str = "block_sparse_linear",
        elements: NM | None = None,
    ):
        self.pattern = pattern
        self.mask_bits = None if element_mask is None else pack_mask(element_mask)
        self.elements = elements
        self.label = label
        self.observer: Observer | None = None
        self.expected_calls = 0
        self.recomputed_in = -1
        self.trained = False
        self.family: weakref.WeakSet = weakref.WeakSet()
        self.written = -1
        registry.installed(pattern, self)

    @property
    def element_mask(self) -> Tensor | None:
        """A fresh bool [num_blocks, b, b], or None where every element of the blocks is there."""
        bits, b = self.mask_bits, self.pattern.block_size
        return None if bits is None else unpack_mask(bits, b)

    def replace(
        self,
        pattern: BlockPattern,
        mask_bits: Tensor | None,
        parameter: nn.Parameter,
        values: Tensor,
        elements: NM | None = None,
    ) -> None:
        """Exchanges pattern, mask and the parameter's memory together: a forward pass sees all of them old or all new.

        Graphs recorded before keep the old tensors, and their backward raises ``StaleTopologyError``.
        """
        with native.storage_lock:
            registry.retire(self.pattern, self.label)
            _exchange(parameter, values)
            self.pattern, self.mask_bits, self.elements, self.observer = pattern, mask_bits, elements, None
            registry.installed(pattern, self)

    def move(self, device: torch.device) -> None:
        """Takes pattern and mask to ``device``, where the parameters are already."""
        pattern = self.pattern.to(device)
        if pattern is not self.pattern:
            registry.release(self.pattern)
            self.pattern = pattern
            registry.installed(pattern, self)
        if self.mask_bits is not None:
            self.mask_bits = self.mask_bits.to(device)

    def __deepcopy__(self, memo) -> Topology:
        return _topology(self.pattern.copy(), self.mask_bits, self.label, self.elements)

    def __reduce__(self):
        return _topology, (self.pattern, self.mask_bits, self.label, self.elements)


def _topology(pattern: BlockPattern, mask_bits: Tensor | None, label: str, elements: NM | None) -> Topology:
    topology = Topology(pattern, None, label, elements)
    topology.mask_bits = None if mask_bits is None else mask_bits.clone()
    return topology


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Gives a Parameter new memory, perhaps of another size.

    The optimizer, hooks and everybody else keep the same object.

    Example:
        >>> import torch
        >>> from sparsenet.topology import replace_data
        >>> parameter = torch.nn.Parameter(torch.ones(2, 3))
        >>> loss = parameter.sum()   # a graph that still knows the old size
        >>> replace_data(parameter, torch.ones(5, 3))
        >>> parameter.sum().backward()
        >>> parameter.grad.shape
        torch.Size([5, 3])
    """
    with native.storage_lock:
        _exchange(parameter, data)


def _exchange(parameter: nn.Parameter, data: Tensor) -> None:
    """The only place that gives a Parameter other memory; the caller holds the lock.

    Autograd's gradient accumulator remembers the old size for as long as an old loss is alive. Assigning data of
    another dtype first makes autograd drop it (it checks the dtype, not the size).
    """
    if parameter.shape != data.shape:
        other = torch.float64 if data.dtype != torch.float64 else torch.float32
        parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data


# --- copies of a layer ------------------------------------------------------------------------------------------------


def times_written(layer: nn.Module) -> int:
    """How often the memory of the layer's values was written to."""
    values = layer.values
    return 0 if values.is_inference() else values._version


def warn_about_averages(layers: Mapping[str, nn.Module], followers: Mapping[str, Sequence[nn.Module]]) -> None:
    """Warns, once per copy, where a copy of a layer is averaged with values of other places.

    Such a copy was written to from outside, never had a gradient, and has another pattern than the layer. Snapshots are
    not written to, and copies that are trained have had a gradient.
    """
    for name, layer in layers.items():
        family = layer.topology.family
        if len(family) < 2:
            continue
        for twin in list(family):
            topology = twin.topology
            if twin is layer or topology.trained or topology.written < 0 or twin in followers.get(name, ()):
                continue
            if times_written(twin) != topology.written and twin.pattern != layer.pattern:
                topology.written = -1  # said
                warnings.warn(
                    f"Sparsifier: a copy of layer {name} was written to without being trained, and its blocks are not "
                    "where those of the layer are: its values are averages over different places. Give averaged copies "
                    "(EMA, SWA) to the Sparsifier: followers=[average]",
                    stacklevel=3,
                )


# --- what a state dict holds for a layer ----------------------------------------------------------------------------


class LayerState(NamedTuple):
    """Pattern, values and mask that go together, and the names that the state dict lacks. No values: no change.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.topology import read_state
        >>> layer = sn.SparseLinear(64, 48, density=0.5, block_size=16)
        >>> read_state(layer, {"bias": layer.bias}).absent
        ['values', 'crow_indices', 'col_indices']
    """

    pattern: BlockPattern
    values: Tensor | None
    element_mask: Tensor | None
    absent: list[str]
    elements: NM | None = None


def read_state(layer: nn.Module, state_dict, prefix: str = "") -> LayerState:
    """What ``state_dict`` holds for a SparseLinear under names that begin with ``prefix``, checked; changes nothing.

    Indices and values come together, or what is there has to fit the pattern that the layer has.

    Raises:
        ValueError, TypeError: indices out of range, sizes that do not fit the layer or each other, a dense weight.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.topology import read_state
        >>> layer, other = (sn.SparseLinear(64, 48, density=d, block_size=16) for d in (0.5, 0.25))
        >>> state = read_state(layer, other.state_dict())
        >>> state.pattern == other.pattern, state.absent
        (True, [])
    """
    names = ("values", "crow_indices", "col_indices", "element_mask")
    values, crow, col, mask = given = [state_dict.get(prefix + name) for name in names]
    rule = state_dict.get(prefix + "element_rule")  # goes with the mask: a mask without it follows no rule
    computed = "values" not in layer._parameters  # torch keeps what they are computed from under names of its own
    wanted = [not computed, True, True, layer.topology.mask_bits is not None]
    absent = [name for name, tensor, want in zip(names, given, wanted, strict=True) if want and tensor is None]
    _check_dense(state_dict, prefix)
    bias = state_dict.get(prefix + "bias")
    if layer._parameters.get("bias") is not None and bias is not None and bias.shape != layer.bias.shape:
        raise ValueError(f"SparseLinear: bias must have shape {list(layer.bias.shape)}, got {list(bias.shape)}")
    pattern = layer.pattern
    if values is not None and not computed:
        _check_values(values, pattern.block_size)
    if computed or values is None or crow is None or col is None:
        own = layer.element_mask
        _check_part(pattern, None if computed else values, crow, col, (mask, own), (rule, layer.elements))
        return LayerState(pattern, None if computed else values, own, absent, layer.elements)
    pattern = BlockPattern(crow, col, pattern.shape, pattern.block_size)
    if pattern.num_blocks != values.shape[0]:
        raise ValueError(
            f"SparseLinear: values must have one block per index, got {values.shape[0]} for {pattern.num_blocks}"
        )
    mask, elements = read_mask(mask, rule, pattern)
    return LayerState(pattern, values, mask, absent, elements)


def _check_dense(state_dict, prefix: str) -> None:
    if prefix + "weight" in state_dict and prefix + "values" not in state_dict:
        raise ValueError(
            "SparseLinear: the state must hold values, crow_indices and col_indices, got the weight of a dense layer; "
            "load it before sparsify_, or make the layer with SparseLinear.from_linear"
        )


def _check_values(values: Tensor, b: int) -> None:
    if values.dim() != 3 or values.shape[1] != values.shape[2]:
        raise ValueError(f"SparseLinear: values must have shape [num_blocks, {b}, {b}], got {list(values.shape)}")
    if values.shape[1] != b:
        raise ValueError(
            f"SparseLinear: values must have shape [num_blocks, {b}, {b}] for the layer's block size {b}, got "
            f"{list(values.shape)} of block size {values.shape[1]}"
        )
    if not values.is_floating_point():
        raise TypeError(f"SparseLinear: values must be floating-point, got {values.dtype}")


def _check_part(pattern: BlockPattern, values, crow, col, masks: tuple, rules: tuple) -> None:
    """Some of the tensors are not there: the others have to be those of ``pattern``, on which the layer stays."""
    (mask, own_mask), (rule, own_rule) = masks, rules
    if mask is not None and mask.dtype == torch.uint8 and own_mask is not None:
        own_mask = pack_mask(own_mask)
    own_rule = None if own_rule is None else own_rule.as_tensor()
    pairs = (("crow_indices", crow, pattern.crow), ("col_indices", col, pattern.col), ("element_mask", mask, own_mask))
    other = [
        name
        for name, tensor, own in (*pairs, ("element_rule", rule, own_rule))
        if tensor is not None
        and (own is None or not torch.equal(tensor.to(own), own) or tensor.dtype.is_floating_point)
    ]
    if values is not None and tuple(values.shape) != pattern.values_shape:
        other.append("values")
    if other:
        raise ValueError(
            "SparseLinear: values, crow_indices and col_indices must come together or fit the layer's pattern of "
            f"{pattern.num_blocks} blocks, got {other[0]} of another pattern alone"
        )


# --- what stands for the weight of a dense layer --------------------------------------------------------------------

NO_WEIGHT = (
    "SparseLinear: weight only stands for the dtype, device and shape of a dense weight and has no data; "
    "use values (the Parameter), weight_dense() (a dense copy) or to_linear()"
)
_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.is_floating_point),
    *(Tensor.is_complex, Tensor.element_size, Tensor.get_device, Tensor.itemsize.__get__),
    *(torch.numel, torch.is_floating_point, torch.is_complex),
}
_OTHERS = {  # make or convert another tensor by dtype and device alone
    *(Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor),
    *(Tensor.to, Tensor.type_as),
}


class DenseWeight(Tensor):
    """Stands for a dense weight [out, in] that does not exist: tells dtype, device and shape, refuses all else.

    Example:
        >>> import sparsenet as sn
        >>> weight = sn.SparseLinear(64, 48, density=0.5, block_size=16).weight
        >>> weight.shape, weight.dtype
        (torch.Size([48, 64]), torch.float32)
    """

    @staticmethod
    def __new__(cls, out_features: int, in_features: int, values: Tensor):
        """Takes no memory; dtype, device and requires_grad are those of ``values``."""
        return torch.Tensor._make_wrapper_subclass(
            cls,
            (out_features, in_features),
            dtype=values.dtype,
            device=values.device,
            requires_grad=values.requires_grad,
        )

    def __init__(self, *_):
        pass

    def __repr__(self) -> str:
        return f"DenseWeight(shape={list(self.shape)}, dtype={self.dtype}, device={self.device}: stands for no data)"

    def __setattr__(self, name, value):
        raise RuntimeError(NO_WEIGHT)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in _OTHERS and (func.__name__.startswith("new_") or not isinstance(args[0], cls)):
            args = [torch.empty(0, dtype=a.dtype, device=a.device) if isinstance(a, cls) else a for a in args]
        elif func not in _FACTS:
            raise RuntimeError(NO_WEIGHT)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(NO_WEIGHT)
