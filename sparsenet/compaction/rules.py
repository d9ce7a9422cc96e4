"""How units pass through modules and functions: one rule each, listed in ``MODULE_RULES`` and ``FUNCTION_RULES``.

A rule takes what is known of the channels of a tensor, an :class:`Axis`, and says what is known after the module or
function. None means that it is not understood: the units stay. Adding a rule: one function and one line at the end.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from sparsenet.compaction.modules import CompactLayerNorm, ConstantBranch
from sparsenet.compaction.operands import METHODS

__all__ = ["FUNCTION_RULES", "MODULE_RULES", "Axis", "Graph", "Shape", "gated", "name_of", "variable"]


@dataclass(frozen=True)
class Axis:
    """The channels of one tensor.

    Attributes:
        units: int64 [n], ids in the order they stand along the dimension.
        dim: that dimension, counted from the end.
        constant: float64 [n]: the value of a unit that is the same for every input and place, NaN for the others.
        ndim: dimensions of the tensor, where known.
        spread: each unit stands an as yet unknown number of times in a row (flattened maps).
    """

    units: Tensor
    dim: int
    constant: Tensor
    ndim: int | None = None
    spread: bool = False

    def sized(self, n: int) -> Axis | None:
        """The axis with ``n`` positions, a spread one resolved; None where that does not fit."""
        if not self.spread:
            return self if len(self.units) == n else None
        if not len(self.units) or n % len(self.units):
            return None
        times = n // len(self.units)
        units, constant = self.units.repeat_interleave(times), self.constant.repeat_interleave(times)
        return replace(self, units=units, constant=constant, spread=False)


@dataclass(frozen=True)
class Shape:
    """The ``shape`` of a tensor."""

    axis: Axis | None


class Graph(Protocol):
    """What rules do to the graph they are walked by; see :class:`sparsenet.compaction.graph.UnitGraph`."""

    model: nn.Module
    inference: bool

    def seen(self, axis: Axis) -> Tensor:
        """float64 [n]: the constants that a reader of ``axis`` sees."""

    def join(self, a: Axis, b: Axis) -> None:
        """The units of both, position by position, are one."""

    def pin(self, axis: Axis, reason: str, which: Tensor | None = None, *, read: bool = True) -> None:
        """Units of ``axis`` stay, though their values may not be ``read``."""

    def pin_all(self, inputs: list, reason: str) -> None:
        """All units of all inputs stay."""

    def closed(self, name: str, module: nn.Module) -> Tensor:
        """Bool [n]: units that the gates of a module switch off for good."""

    def own(self, name: str, module: nn.Module, outputs: Axis, inputs: Axis | None = None) -> Axis:
        """Records a module that has something per unit and is as wide as its input; returns ``outputs``."""


def variable(n: int) -> Tensor:
    """float64 [n]: no constants."""
    return torch.full((n,), math.nan, dtype=torch.float64)


def name_of(function) -> str:
    """For messages."""
    return getattr(function, "__name__", str(function))


# --- modules --------------------------------------------------------------------------------------------------------


def gated(graph: Graph, name: str, module: nn.Module, x: Axis) -> Axis | None:
    """A gate per unit: those that are closed are zero."""
    closed = graph.closed(name, module)
    if x.spread or len(x.units) != len(closed) or not _dim_is(x, module.dim):
        return None
    out = replace(x, constant=torch.where(closed, 0.0, _elementwise(module, x.constant)))
    return graph.own(name, module, out)


def _elementwise(function: Callable[[Tensor], Tensor], constant: Tensor) -> Tensor:
    """The constants after an elementwise function; what was variable or becomes infinite is variable."""
    known = constant.isfinite()
    if not known.any():
        return constant
    parameter = next(function.parameters(), None) if isinstance(function, nn.Module) else None
    given = torch.where(known, constant, 0.0).unsqueeze(0)
    given = given if parameter is None else given.to(parameter)
    training = isinstance(function, nn.Module) and function.training
    if training:
        function.eval()
    try:
        with torch.no_grad():
            result = function(given)[0].double().cpu()
    finally:
        if training:
            function.train()
    return torch.where(known & result.isfinite(), result, math.nan)


def _activation(graph: Graph, name: str, module: nn.Module, x: Axis) -> Axis:
    return replace(x, constant=_elementwise(module, x.constant))


def _prelu(graph: Graph, name: str, module: nn.PReLU, x: Axis) -> Axis | None:
    if module.num_parameters == 1:
        return replace(x, constant=_elementwise(module, x.constant))
    if x.spread or len(x.units) != module.num_parameters or not _dim_is(x, 1):
        return None
    out = replace(x, constant=_elementwise(module, x.constant))
    return graph.own(name, module, out)


def _dropout(graph: Graph, name: str, module: nn.Module, x: Axis) -> Axis:
    return x if module.p == 0 or graph.inference else _only_zero(x)


def _only_zero(x: Axis) -> Axis:
    """Constants other than zero are lost."""
    return replace(x, constant=torch.where(x.constant == 0, 0.0, math.nan))


def _batch_norm(graph: Graph, name: str, module: nn.modules.batchnorm._BatchNorm, x: Axis) -> Axis | None:
    """Keeps units apart. A constant stays one only where training (batch statistics) and inference agree on it."""
    sized = x.sized(module.num_features)
    spatial = {nn.BatchNorm2d: -3, nn.BatchNorm3d: -4}.get(type(module))
    fits = x.dim == spatial if spatial else x.dim == -1 or (x.dim == -2 and x.ndim in (3, None))
    if sized is None or not fits:
        return None
    n = module.num_features
    gamma = module.weight.detach().double().cpu() if module.affine else torch.ones(n, dtype=torch.float64)
    beta = module.bias.detach().double().cpu() if module.affine else torch.zeros(n, dtype=torch.float64)
    constant = torch.where(gamma == 0, beta, math.nan)
    if module.track_running_stats:
        mean, variance = module.running_mean.double().cpu(), module.running_var.double().cpu()
        settled = sized.constant == mean
        constant = torch.where(settled, beta, constant)
        if graph.inference:
            constant = (sized.constant - mean) / (variance + module.eps).sqrt() * gamma + beta
    elif not graph.inference:
        constant = torch.where(sized.constant.isnan(), constant, beta)
    out = replace(sized, constant=constant)
    return graph.own(name, module, out)


def _layer_norm(graph: Graph, name: str, module: nn.LayerNorm | CompactLayerNorm, x: Axis) -> Axis | None:
    """Mixes units: one leaves only if it is constant before (the statistics keep it) and unread or constant after."""
    n = len(x.units)
    if x.spread or x.dim != -1 or tuple(module.normalized_shape) != (n,):
        return None
    constant = variable(n)
    if module.weight is not None:
        beta = module.bias.detach().double().cpu() if module.bias is not None else torch.zeros(n, dtype=torch.float64)
        constant = torch.where(module.weight.detach().cpu() == 0, beta, math.nan)
    graph.pin(x, f"module {name!r} ({type(module).__name__}) normalises over it", graph.seen(x).isnan())
    return graph.own(name, module, replace(x, constant=constant), inputs=x)


def _constant_branch(graph: Graph, name: str, module: ConstantBranch, x: Axis) -> Axis | None:
    """Adds to what it branched off from, unit by unit."""
    if module.bias is None:
        return replace(x, constant=torch.zeros(len(x.units), dtype=torch.float64))
    if x.spread or len(module.bias) != len(x.units):
        return None
    return graph.own(name, module, replace(x, constant=module.bias.detach().double().cpu()))


def _pool(graph: Graph, name: str, module: nn.Module, x: Axis) -> Axis | None:
    spatial = int(type(module).__name__[-2])
    if x.dim != -1 - spatial or x.spread or getattr(module, "return_indices", False):
        return None
    if getattr(module, "divisor_override", None) or (
        isinstance(module, nn.AvgPool1d | nn.AvgPool2d | nn.AvgPool3d)
        and module.count_include_pad
        and any(torch.as_tensor(module.padding).reshape(-1).tolist())
    ):
        return _only_zero(x)
    return x


def _flatten_module(graph: Graph, name: str, module: nn.Flatten, x: Axis) -> Axis | None:
    return _flattened(x, module.start_dim, module.end_dim)


def _flattened(x: Axis, start: int, end: int) -> Axis | None:
    """Dimension 1 to the end made one."""
    if start != 1 or (end != -1 and end + 1 != x.ndim) or x.spread:
        return None
    if x.dim == -1:  # [batch, n] already; a longer tensor shows by its size at the next layer
        return replace(x, ndim=2) if x.ndim in (2, None) else None
    return replace(x, dim=-1, ndim=2, spread=True) if x.ndim == 1 - x.dim else None


def _dim_is(x: Axis, dim: int) -> bool:
    """Whether ``dim`` of a module's input is the channel dimension."""
    if dim < 0:
        return x.dim == dim
    return x.ndim + x.dim == dim if x.ndim is not None else (x.dim == -1 and dim == 1)


_ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Hardtanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink),
    *(nn.Tanhshrink, nn.LogSigmoid, nn.Threshold, nn.Identity),
)
_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
MODULE_RULES: dict[type, Callable[[Graph, str, nn.Module, Axis], Axis | None]] = {
    **dict.fromkeys(_ELEMENTWISE_MODULES, _activation),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), _dropout),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm),
    **dict.fromkeys((nn.LayerNorm, CompactLayerNorm), _layer_norm),
    **dict.fromkeys(_POOLS, _pool),
    ConstantBranch: _constant_branch,
    nn.PReLU: _prelu,
    nn.Flatten: _flatten_module,
}


# --- functions and methods ------------------------------------------------------------------------------------------


def _argument(node: fx.Node, position: int, name: str, default):
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _elementwise_function(graph: Graph, node: fx.Node, inputs: list, values: dict) -> Axis | None:
    (x,) = inputs if len(inputs) == 1 else (None,)
    if not isinstance(x, Axis) or not node.args or not isinstance(node.args[0], fx.Node):
        return graph.pin_all(inputs, f"{name_of(node.target)} reads it")
    others = [a for a in node.args if not isinstance(a, fx.Node)]
    function = METHODS.get(node.target, node.target)
    apply = lambda t: function(t, *others, **node.kwargs)  # noqa: E731 - closes over the call's own settings
    return replace(x, constant=_elementwise(apply, x.constant))


def _dropout_function(graph: Graph, node: fx.Node, inputs: list, values: dict) -> Axis | None:
    (x,) = inputs if len(inputs) == 1 else (None,)
    if not isinstance(x, Axis):
        return graph.pin_all(inputs, "dropout reads it")
    return x if _argument(node, 1, "p", 0.5) == 0 or graph.inference else _only_zero(x)


def _pool_function(graph: Graph, node: fx.Node, inputs: list, values: dict) -> Axis | None:
    """Pooling; the number of spatial dimensions is in the name."""
    (x,) = inputs if len(inputs) == 1 else (None,)
    spatial = int(name_of(node.target).removesuffix("_with_indices")[-2])
    if not isinstance(x, Axis) or x.spread or x.dim != -1 - spatial or node.kwargs.get("return_indices"):
        return graph.pin_all(inputs, f"{name_of(node.target)} reads it")
    padded_average = node.target in (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d) and _argument(node, 3, "padding", 0) != 0
    return _only_zero(x) if padded_average else x


def _flatten_function(graph: Graph, node: fx.Node, inputs: list, values: dict) -> Axis | None:
    (x,) = inputs if len(inputs) == 1 else (None,)
    out = None
    if isinstance(x, Axis):
        out = _flattened(x, _argument(node, 1, "start_dim", 0), _argument(node, 2, "end_dim", -1))
    return out if out is not None else graph.pin_all(inputs, "flatten from another dimension than 1 reads it")


def _view(graph: Graph, node: fx.Node, inputs: list, values: dict) -> Axis | None:
    """``x.view(batch, -1)`` is a flattening; any other is not followed."""
    x = values.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
    sizes = node.args[1] if len(node.args) == 2 and isinstance(node.args[1], (tuple, list)) else node.args[1:]
    keeps_batch = len(sizes) == 2 and sizes[1] == -1 and isinstance(sizes[0], fx.Node) and _is_batch_size(sizes[0])
    out = _flattened(x, 1, -1) if isinstance(x, Axis) and keeps_batch else None
    return out if out is not None else graph.pin_all([x], "view to a fixed size reads it (flatten(1) would do)")


def _is_batch_size(node: fx.Node) -> bool:
    if node.target == "size":
        return _argument(node, 1, "dim", None) == 0
    if node.target is operator.getitem:
        source = node.args[0]
        of_shape = (source.target is getattr and source.args[1] == "shape") or source.target == "size"
        return of_shape and node.args[1] == 0
    return node.target is len


def _shape_of(graph: Graph, node: fx.Node, inputs: list, values: dict) -> Shape | None:
    """``x.size()``, ``x.size(0)``, ``x.shape``; asking for the number of channels pins them."""
    axis = values.get(node.args[0])
    if node.target is getattr and node.args[1] != "shape":
        return (
            None if node.args[1] in ("dtype", "device", "ndim") else graph.pin_all(inputs, f"{node.args[1]} reads it")
        )
    dim = _argument(node, 1, "dim", None) if node.target == "size" else None
    if not isinstance(axis, Axis):
        return None
    if dim is None:
        return Shape(axis)
    return _ask_size(graph, axis, dim)


def _ask_size(graph: Graph, axis: Axis, dim) -> None:
    counts = not isinstance(dim, int) or (dim != 0 and (axis.ndim is None or dim % axis.ndim == axis.ndim + axis.dim))
    if counts:
        graph.pin(axis, "its number of channels is asked for", read=False)


def _getitem(graph: Graph, node: fx.Node, inputs: list, values: dict) -> None:
    source = values.get(node.args[0])
    if isinstance(source, Shape):
        return _ask_size(graph, source.axis, node.args[1])
    return graph.pin_all(inputs, "indexing reads it")


def _nothing(graph: Graph, node: fx.Node, inputs: list, values: dict) -> None:
    return None


def _binary(graph: Graph, node: fx.Node, inputs: list, values: dict) -> Axis | None:
    """+, -, * and /: of two tensors alike, or with a number; ``alpha`` and ``rounding_mode`` go along."""
    function = METHODS.get(node.target, node.target)
    a, b = ((values.get(v) if isinstance(v, fx.Node) else v) for v in (*node.args, None, None)[:2])
    numbers = [v for v in (a, b) if isinstance(v, (int, float))]
    axes = [v for v in (a, b) if isinstance(v, Axis)]
    settings = [v for name, v in node.kwargs.items() if name in ("alpha", "rounding_mode")]
    understood = len(settings) == len(node.kwargs) and not any(isinstance(v, fx.Node) for v in settings)
    if not understood or len(node.args) != 2 or len(numbers) + len(axes) != 2 or not axes:
        return graph.pin_all(inputs, f"{name_of(function)} with something not understood reads it")

    def compute(left, right):
        return function(left, right, **node.kwargs)

    if numbers:
        once = (lambda t: compute(t, b)) if isinstance(a, Axis) else (lambda t: compute(torch.full_like(t, a), t))
        return replace(axes[0], constant=_elementwise(once, axes[0].constant))
    if a.spread != b.spread:  # the other one says how often each unit stands
        a, b = (a.sized(len(b.units)), b) if a.spread else (a, b.sized(len(a.units)))
    if a is None or b is None or a.dim != b.dim or len(a.units) != len(b.units):
        return graph.pin_all(inputs, f"{name_of(function)} with a tensor of another form reads it")
    graph.join(a, b)
    constant = compute(a.constant.clone(), b.constant)  # the function may work in place
    if function in _PRODUCTS:
        constant = torch.where((a.constant == 0) | (b.constant == 0), 0.0, constant)
    constant = torch.where(constant.isfinite(), constant, math.nan)
    return replace(a, constant=constant, ndim=a.ndim if a.ndim is not None else b.ndim)


def _concatenation(graph: Graph, node: fx.Node, inputs: list, values: dict) -> Axis | None:
    given = node.args[0] if node.args and isinstance(node.args[0], (tuple, list)) else ()
    parts = [values.get(n) for n in given]
    dim = _argument(node, 1, "dim", 0)
    whole = parts and all(isinstance(p, Axis) and not p.spread for p in parts)
    if not whole or any(p.dim != parts[0].dim or not _dim_is(p, dim) for p in parts):
        return graph.pin_all(inputs, "a concatenation that is not understood reads it")
    ndim = next((p.ndim for p in parts if p.ndim is not None), None)
    units, constant = torch.cat([p.units for p in parts]), torch.cat([p.constant for p in parts])
    return Axis(units, parts[0].dim, constant, ndim)


def _mean(graph: Graph, node: fx.Node, inputs: list, values: dict) -> Axis | None:
    """The mean over all spatial dimensions."""
    (x,) = inputs if len(inputs) == 1 else (None,)
    dims = _argument(node, 1, "dim", None)
    keep = _argument(node, 2, "keepdim", False)
    if isinstance(x, Axis) and x.ndim is not None and not x.spread and dims is not None:
        dims = {d % x.ndim for d in ((dims,) if isinstance(dims, int) else dims)}
        if dims == set(range(x.ndim + x.dim + 1, x.ndim)):
            return x if keep else replace(x, dim=-1, ndim=x.ndim - len(dims))
    return graph.pin_all(inputs, "a mean that is not over places reads it")


_PRODUCTS = (operator.mul, operator.imul, torch.mul)
_ELEMENTWISE_FUNCTIONS = (
    *(torch.relu, torch.sigmoid, torch.tanh, F.relu, F.relu6, F.leaky_relu, F.elu, F.selu, F.celu, F.gelu, F.silu),
    *(F.mish, F.hardtanh, F.hardswish, F.hardsigmoid, F.sigmoid, F.tanh, F.softplus, F.softsign, F.logsigmoid),
    *(torch.neg, operator.neg, torch.abs, torch.square, torch.exp, torch.clamp),
)
_POOL_FUNCTIONS = (
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(torch.max_pool1d, torch.max_pool2d, torch.max_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
)
FUNCTION_RULES: dict[object, Callable[[Graph, fx.Node, list, dict], Axis | Shape | None]] = {
    **dict.fromkeys((*_ELEMENTWISE_FUNCTIONS, torch.clone), _elementwise_function),
    **dict.fromkeys((*_PRODUCTS, operator.add, operator.iadd, torch.add), _binary),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, operator.truediv, operator.itruediv, torch.div), _binary),
    torch.cat: _concatenation,
    **dict.fromkeys((F.dropout, F.dropout1d, F.dropout2d, F.dropout3d), _dropout_function),
    **dict.fromkeys(_POOL_FUNCTIONS, _pool_function),
    **dict.fromkeys((getattr, "size"), _shape_of),
    **dict.fromkeys(("dim", len), _nothing),
    torch.flatten: _flatten_function,
    torch.reshape: _view,
    torch.mean: _mean,
    operator.getitem: _getitem,
}
