"""Policies made for a network that nobody has trained yet: they find its initial pattern.

Each only drops, as a falling density wants it; :func:`sparsenet.prune_at_initialization` does all of it at once. As
criteria they serve any policy and any moment: ``sn.Policy(drop=sn.SNIP(), grow=sn.RigL())``. Measurements of their own
run the model in eval mode and leave no trace in it, bit for bit: values, gradients, buffers, modes, random numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenet import distributed, functional, saliency
from sparsenet.layers import SparseLinear, sparse_layers
from sparsenet.limits import is_out_of_memory
from sparsenet.policies.curvature import informative
from sparsenet.policies.gradual import Falling
from sparsenet.policies.places import BadScores
from sparsenet.policies.policy import LayerView, Schedule
from sparsenet.policies.views import ElementView

__all__ = ["SNIP", "GraSP", "SynFlow"]

Layers = Mapping[str, LayerView]


@dataclass(frozen=True)
class _AtStart(Falling):
    """What the three have in common.

    Attributes:
        rounds_at_start: in how many stages a network is pruned at initialization.
        pass_copies: how many float32 copies of all values a pass of its own holds.
        pass_activations: how many times a training step's activations.
    """

    drop_fraction: float | Schedule = field(default=0.0, kw_only=True)
    rounds_at_start: ClassVar[int] = 1
    pass_copies: ClassVar[int] = 0
    pass_activations: ClassVar[int] = 0


@dataclass(frozen=True)
class _OfBatches(_AtStart):
    """A criterion that may be given data: ``batches`` and ``loss`` together."""

    batches: saliency.Batches | None = field(default=None, compare=False, repr=False)
    loss: Callable[[Tensor, Tensor], Tensor] | None = None

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if (self.batches is None) != (self.loss is None):
            given = "batches" if self.loss is None else "a loss"
            raise ValueError(f"{name}: batches and loss must be given together, got {given} alone")
        if self.batches is not None and (not hasattr(self.batches, "__iter__") or iter(self.batches) is self.batches):
            kind = type(self.batches).__name__
            raise ValueError(f"{name}: batches must be readable more than once, as a list is, got {kind}")

    @property
    def observes(self) -> bool:
        """Whether it watches the training's backward, where ``.grad`` may be gone at the rewire."""
        return self.batches is None

    def observe(self, layer: LayerView, x: Tensor, grad_output: Tensor) -> None:
        """Adds the gradient of one call; in the dtype of sums."""
        where = layer.pattern.row_indices, layer.pattern.col_indices
        more = functional.candidate_gradients(x, grad_output, *where, layer.pattern.block_size)
        more = more.to(_wide(more))
        layer.measured["gradient"] = layer.measured["gradient"].add_(more) if "gradient" in layer.measured else more

    def mean_over_batches(
        self, model: nn.Module, layers: list[SparseLinear], vectors: list[Tensor] | None = None
    ) -> list[Tensor]:
        """Of each layer's values the gradient of the mean loss, or its product with the Hessian; over all ranks."""
        return _mean(model, layers, self.batches, self.loss, vectors, type(self).__name__)


@dataclass(frozen=True)
class SNIP(_OfBatches):
    """Single-shot network pruning (Lee, Ajanthan & Torr, 2019): drops the least of ``|w dL/dw|``, summed over a block.

    The gradient is that of the mean over all data, taken before the absolute value. Their scores are divided by the sum
    over all weights, which changes no order.

    Args:
        batches: (input, target) pairs, readable more than once; the input may be a :class:`sparsenet.saliency.Call`.
            Batches count by their rows. None: ``.grad``, as the training has left it, all accumulated passes of a step
            together; where it is gone (``zero_grad``), the gradient of the last backward pass, which is watched.
        loss: ``loss(output, target)``, a mean over examples, for ``batches``.

    Under DDP the mean over all ranks' gradients counts. A layer without a gradient keeps its topology and says so.

    Raises:
        ValueError: one of ``batches`` and ``loss`` without the other, or batches that can be read once.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=1.0, block_size=8)
        >>> batches = [(torch.randn(50, 64), torch.randint(10, (50,)))]
        >>> policy = sn.SNIP(batches, torch.nn.functional.cross_entropy)
        >>> sn.prune_at_initialization(model, policy, density=0.25).dropped
        60
        >>> sum(layer.pattern.num_blocks for layer in model)   # of 80
        20
    """

    @property
    def measures(self) -> bool:
        """Whether it has data of its own."""
        return self.batches is not None

    def measure(self, model: nn.Module, call: saliency.Call | None, layers: Layers, seed: int) -> None:
        """The gradient over ``batches``."""
        views = list(layers.values())
        for view, gradient in zip(views, self.mean_over_batches(model, [v.layer for v in views]), strict=True):
            view.measured = {"gradient": _of_units(view, gradient)}

    def drop_scores(self, layer: LayerView) -> Tensor:
        """The sum of ``|w dL/dw|``."""
        gradient = _measured(layer, "gradient") if self.measures else _last_gradient(layer)
        return informative(_products(layer, gradient).abs().flatten(1).sum(1))


@dataclass(frozen=True)
class GraSP(_OfBatches):
    """Gradient signal preservation (Wang, Zhang & Grosse, 2020): what leaves, leaves as much gradient as possible.

    ::

        S = -w (H g)      how much half the squared gradient norm grows to first order when w goes
        drop score        w (H g) = -S, summed with its sign over a block; the lowest leave

    so those weights leave first without which the gradient norm is largest, as in the paper ("the top fraction" by S is
    removed) and in the authors' code; a weight whose removal would lower the norm stays. H and g are over the values of
    all trained sparse layers. H g is exact, by a second backward pass; the memory of activations is about three times
    that of a training step. Theirs divides the outputs by a temperature of 200; do it in ``loss``.

    Args:
        batches, loss: as of :class:`SNIP`; both passes run over all of them. None: g is the training's last gradient,
            as :class:`SNIP` takes it, and H the Gauss-Newton matrix of a softmax cross-entropy over the inputs of the
            last forward, which needs no targets and leaves out the part of H that has the curvature of the network: an
            approximation, which suits no other loss. The model's outputs have to be logits [..., classes].

    Raises:
        ValueError: one of ``batches`` and ``loss`` without the other, or batches that can be read once; at the rewire,
            a model or a loss that has no second derivative.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=1.0, block_size=8)
        >>> batches = [(torch.randn(50, 64), torch.randint(10, (50,)))]
        >>> policy = sn.GraSP(batches, lambda y, target: torch.nn.functional.cross_entropy(y / 200, target))
        >>> sn.prune_at_initialization(model, policy, density=0.25).dropped
        60
    """

    measures = True
    pass_copies = 6
    pass_activations = 3

    def measure(self, model: nn.Module, call: saliency.Call | None, layers: Layers, seed: int) -> None:
        """The Hessian times the gradient, of all sparse layers of the model together."""
        trained = [layer for layer in sparse_layers(model).values() if layer.values.requires_grad]
        if self.batches is not None:
            gradients = self.mean_over_batches(model, trained)
            products = self.mean_over_batches(model, trained, gradients)
        elif distributed.any_rank(call is None):
            return
        else:
            known = {id(view.layer): view.whole(gradient) for view, gradient in _last_gradients(layers.values())}
            if not known:
                return
            gradients = [known.get(id(layer), torch.zeros_like(layer.values)) for layer in trained]
            products = _mean(model, trained, [(call, ())], _own_prediction, gradients, "GraSP")
        found = {id(layer): product for layer, product in zip(trained, products, strict=True)}
        for view in layers.values():
            view.measured = {"product": _of_units(view, found[id(view.layer)])}

    def drop_scores(self, layer: LayerView) -> Tensor:
        """The sum of ``w (H g)``."""
        return informative(_products(layer, _measured(layer, "product")).flatten(1).sum(1))


@dataclass(frozen=True)
class SynFlow(_AtStart):
    """Iterative synaptic flow (Tanaka et al., 2020): drops what carries least of a flow of ones, without any data.

    A block's score is the sum of ``|w dR/dw|``, R being the sum of the outputs for an input of ones when all parameters
    have their absolute values; what becomes of biases, norms and activations is said at
    :func:`sparsenet.saliency.synaptic_flow`. Scores are measured anew at every rewire, which keeps layers from
    collapsing; at initialization theirs are 100, with densities in geometric progression.

    Args:
        inputs: a batch of the model's input, or a :class:`sparsenet.saliency.Call`, for the shape of one example; its
            numbers do not count. None: that of the last forward that recorded a graph, or if there was none,
            [1, in_features] of the model's first sparse layer.

    Raises:
        TypeError: other inputs. ValueError: at the rewire, a model that :func:`sparsenet.saliency.synaptic_flow`
            refuses, as one with attention.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 64, 10], density=1.0, block_size=8)
        >>> update = sn.prune_at_initialization(model, sn.SynFlow(), density=0.25)
        >>> update.step, update.dropped, [layer.pattern.num_blocks > 0 for layer in model]
        (100, 108, [True, True, True])
    """

    inputs: Tensor | saliency.Call | None = field(default=None, compare=False, repr=False)
    measures = True
    rounds_at_start = 100
    pass_copies = 5

    def __post_init__(self):
        super().__post_init__()
        if self.inputs is not None and not isinstance(self.inputs, (Tensor, saliency.Call)):
            raise TypeError(f"SynFlow: inputs must be a tensor or a Call, got {type(self.inputs).__name__}")

    def measure(self, model: nn.Module, call: saliency.Call | None, layers: Layers, seed: int) -> None:
        """One backward pass of one example through a positive copy of the model's parameters."""
        if self.inputs is not None:
            call = self.inputs if isinstance(self.inputs, saliency.Call) else saliency.Call((self.inputs,), {})
        elif call is None:
            first = next(iter(sparse_layers(model).values()))
            call = saliency.Call((first.values.new_empty(1, first.in_features),), {})
        views = list(layers.values())
        flows = saliency.synaptic_flow(model, [view.layer for view in views], call, type(self).__name__)
        for view, flow in zip(views, flows, strict=True):
            view.measured = {"flow": _of_units(view, flow.float())}

    def share(self, layer: LayerView) -> None:
        """One for all ranks, whatever their last bits were."""
        layer.measured = {name: distributed.averaged(flow) for name, flow in layer.measured.items()}

    def drop_scores(self, layer: LayerView) -> Tensor:
        """The sum of ``|w dR/dw|``, in a unit that all layers share."""
        return informative(_measured(layer, "flow").flatten(1).sum(1))


# --- what they measure ------------------------------------------------------------------------------------------------


def _mean(model, layers, batches, loss, vectors, owner: str) -> list[Tensor]:
    try:
        sums, rows = saliency.batch_derivatives(model, layers, batches, loss, vectors, owner)
    except (RuntimeError, NotImplementedError) as error:
        if vectors is None or is_out_of_memory(error):
            raise
        line = str(error).strip().partition("\n")[0]
        raise ValueError(f"{owner}: model and loss must have second derivatives, got: {line}") from error
    (rows,) = distributed.mean_of([rows])
    return [distributed.averaged(s) / rows for s in sums]


def _own_prediction(logits: Tensor, _) -> Tensor:
    """The cross-entropy with the model's own prediction, held fixed: its gradient is zero, its Hessian Gauss-Newton's.

    For, of the two parts of a Hessian, the one with the second derivative of the network has that gradient as factor.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
        got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"GraSP: the model's output must be logits [..., classes] without batches, got {got}")
    rows = logits.flatten(0, -2)
    return F.cross_entropy(rows, rows.detach().softmax(-1))


def _of_units(view: LayerView, stored: Tensor) -> Tensor:
    """What is known of every stored weight [num_blocks, b, b], for the units that are rewired: blocks or elements."""
    if not isinstance(view, ElementView):
        return stored
    return stored.flatten()[view.stored(view.pattern.linear_places())].view(-1, 1, 1)


def _measured(layer: LayerView, name: str) -> Tensor:
    """BadScores, on every rank, where it was not measured on one of them."""
    if distributed.any_rank(name not in layer.measured):
        raise BadScores("nothing was measured before this step: it has no batches, or no step of training to go by")
    return layer.measured[name]


def _last_gradient(layer: LayerView) -> Tensor:
    """The mean over ranks of ``.grad``, or else of what was watched; BadScores on every rank if one has neither."""
    gradient = None
    with suppress(BadScores):
        gradient = layer.gradient
    if distributed.any_rank(gradient is None or not bool(gradient.any())):
        gradient = layer.measured.get("gradient")
        if distributed.any_rank(gradient is None):
            raise BadScores("its values have no gradient, and no backward pass through it was seen before this step")
    return distributed.averaged(gradient)


def _last_gradients(layers: Iterable[LayerView]) -> Iterator[tuple[LayerView, Tensor]]:
    """Of the layers that have one."""
    for layer in layers:
        with suppress(BadScores):
            yield layer, _last_gradient(layer)


def _wide(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _products(layer: LayerView, factor: Tensor) -> Tensor:
    """[num_blocks, b, b]: the values times ``factor``, float32 or float64."""
    return layer.values.detach().to(_wide(factor)) * factor.to(_wide(factor))
