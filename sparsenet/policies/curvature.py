"""Policies that drop what changes the loss least, by gradients and by curvature, and grow where RigL does.

Each takes its measurements from one of three sources. By default (but for :class:`OBD`) it is the training's own
backward pass, the last before the rewire: no further pass. With ``targets`` it is one more pass over the inputs of the
last forward, with targets drawn from the model's own prediction. With ``batches`` it is a pass over those, with
``loss`` or ``targets``. Such passes run in eval mode and leave gradients, buffers and random numbers alone.

With ``drop_fraction=0.0`` and a falling density they only prune: ``OBD(0.0)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from sparsenet import distributed, saliency
from sparsenet.policies.places import BadScores
from sparsenet.policies.policy import LayerView
from sparsenet.policies.rewiring import GrowsByGradient
from sparsenet.saliency.measuring import TARGETS
from sparsenet.saliency.woodfisher import DAMP
from sparsenet.schedules import as_integer, as_number

__all__ = ["OBD", "Curvature", "Fisher", "Taylor", "WoodFisher", "informative"]


@dataclass(frozen=True)
class Curvature(GrowsByGradient):
    """What policies have in common whose scores are sums over rows of a layer's input and output gradient.

    A subclass answers ``terms``; what it returns is summed over calls, batches and ranks, and ``drop_scores`` turns the
    means over all rows into scores.

    Attributes:
        drop_fraction: share of the active blocks exchanged at a rewire.
        batches: what to measure on, readable more than once: inputs, (input, target) pairs or
            :class:`sparsenet.saliency.Call`; None: what the training itself runs on.
        loss: ``loss(output, target)``, a mean over examples, for ``batches``; it wins over ``targets``.
        targets: ``softmax`` or ``gaussian``: drawn from the model's prediction, see
            :func:`sparsenet.saliency.sampled_loss`.
        samples: backward passes for each batch of a pass of its own.

    Under DDP every rank measures its own data, and all use the mean over the ranks.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.policies.curvature import Curvature
        >>> class BusyInputs(Curvature):
        ...     def terms(self, layer, x, grad_output):
        ...         b, cols = layer.pattern.block_size, layer.pattern.col_indices.long()
        ...         return torch.nn.functional.pad(x, (0, -x.shape[1] % b)).square().sum(0).view(-1, b).sum(1)[cols]
        >>> model = sn.SparseMLP([32, 32, 4], density=0.5, block_size=4)
        >>> model(torch.randn(8, 32)).square().mean().backward()   # nothing watches yet
        >>> sparsifier = sn.Sparsifier(model, None, BusyInputs(), every=1)
        >>> model(torch.randn(8, 32)).square().mean().backward()
        >>> sparsifier.step().dropped > 0
        True
    """

    drop_fraction: float | Callable[[int], float] = 0.3
    batches: saliency.Batches | None = field(default=None, compare=False, repr=False)
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    targets: str | None = None
    samples: int = 1

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if self.targets is not None and self.targets not in TARGETS:
            raise ValueError(f"{name}: targets must be None or one of {', '.join(TARGETS)}, got {self.targets!r}")
        if self.batches is None and self.loss is not None:
            raise ValueError(f"{name}: batches must be given with a loss, got none")
        if self.batches is not None:
            if self.loss is None and self.targets is None:
                raise ValueError(f"{name}: batches must come with a loss or targets, got neither")
            if not hasattr(self.batches, "__iter__") or iter(self.batches) is self.batches:
                kind = type(self.batches).__name__
                raise ValueError(f"{name}: batches must be readable more than once, as a list is, got {kind}")
        as_integer(name, "samples", self.samples, at_least=1)

    @property
    def measures(self) -> bool:
        """Whether it runs a pass of its own at the rewire."""
        return self.batches is not None or self.targets is not None

    @property
    def observes(self) -> bool:
        """Whether it watches the training's backward."""
        return not self.measures

    def terms(self, layer: LayerView, x: Tensor, grad_output: Tensor) -> Tensor:
        """[num_blocks]: the sum over these rows of what ``drop_scores`` needs the mean of."""
        raise NotImplementedError

    def observe(self, layer: LayerView, x: Tensor, grad_output: Tensor) -> None:
        """Adds one call's rows."""
        if not len(x):
            return
        sums = layer.measured.setdefault("sums", torch.zeros((), device=x.device))
        rows = layer.measured.setdefault("rows", torch.zeros((), device=x.device))
        layer.measured["sums"] = sums + self.terms(layer, x, grad_output)
        layer.measured["rows"] = rows + len(x)

    def measure(self, model: nn.Module, call: saliency.Call | None, layers: Mapping[str, LayerView], seed: int) -> None:
        """A pass of its own over ``batches``, or over the inputs of the last forward."""
        batches = self.batches if self.batches is not None else [call] if call is not None else None
        for view in layers.values():
            view.measured = {}
        if batches is not None:
            saliency.show_backward_passes(
                model,
                {name: view.layer for name, view in layers.items()},
                batches,
                lambda name, x, grad_output: self.observe(layers[name], x, grad_output),
                loss=self.loss,
                targets=None if self.loss is not None else self.targets,
                samples=self.samples,
                seed=seed,
            )

    def share(self, layer: LayerView) -> None:
        """The mean over ranks, of sums and rows alike."""
        _refuse_unmeasured(layer)
        layer.measured = {name: distributed.averaged(t) for name, t in layer.measured.items()}

    def drop_scores(self, layer: LayerView) -> Tensor:
        """The means over the rows."""
        return informative(layer.measured["sums"] / layer.measured["rows"])


@dataclass(frozen=True)
class Taylor(Curvature):
    """Drops the blocks whose removal changes the loss least, to first order: by (sum of weight times gradient) squared.

    Mozer & Smolensky (1989); squared, and summed over a group before, as Molchanov et al. (2019) do it. The gradient is
    that of the whole batch. At a minimum it says nothing: see :class:`OBD` and :class:`Fisher`.

    Raises:
        ValueError: ``targets``, with which the expected gradient is zero.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> sparsifier = sn.Sparsifier(model, None, sn.Taylor(drop_fraction=0.25), every=1)
        >>> model(torch.randn(16, 64)).square().sum().backward()
        >>> update = sparsifier.step()
        >>> update.dropped == update.grown > 0
        True
    """

    def __post_init__(self):
        super().__post_init__()
        if self.targets is not None:
            raise ValueError(f"Taylor: targets must be None, got {self.targets!r}: the mean of its gradients is zero")

    def terms(self, layer: LayerView, x: Tensor, grad_output: Tensor) -> Tensor:
        """Weight times gradient."""
        return saliency.first_order(x, grad_output, layer.values, layer.pattern) * len(x)

    def drop_scores(self, layer: LayerView) -> Tensor:
        """The square of its mean."""
        return informative((layer.measured["sums"] / layer.measured["rows"]).square())


@dataclass(frozen=True)
class OBD(Curvature):
    """Optimal Brain Damage (LeCun, Denker & Solla, 1989): drops the least of half h w^2, summed over a block.

    h is the diagonal of the Gauss-Newton matrix, estimated without bias by one more backward pass at every rewire, over
    the inputs of the last forward, with classes drawn from the model's softmax (``targets="softmax"``); the model's
    outputs have to be logits. For regression ``targets="gaussian"``; ``OBD(batches=..., loss=...)`` takes the empirical
    Fisher of labelled data instead. Means most near a minimum. Where several rewires prune little by little h is fresh
    for each; in one shot OBD need not beat magnitude.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
        >>> sparsifier = sn.Sparsifier(model, None, sn.OBD(drop_fraction=0.25), every=1)
        >>> model(torch.randn(16, 64)).square().sum().backward()   # growth comes from this, OBD from its inputs
        >>> update = sparsifier.step()
        >>> update.dropped == update.grown > 0
        True
    """

    targets: str | None = "softmax"

    def terms(self, layer: LayerView, x: Tensor, grad_output: Tensor) -> Tensor:
        """Half h w^2 by block."""
        return saliency.obd_saliency(x, grad_output, layer.values, layer.pattern) * len(x)


@dataclass(frozen=True)
class Fisher(Curvature):
    """Drops the least of ``w' F w / 2``, F being each block's own piece of the Fisher matrix, never formed.

    By default the empirical Fisher of the training's own backward pass, at no further pass; over whole blocks as in
    Kurtic et al. (2022), or with ``diagonal=True`` as :class:`OBD` has it (Theis et al., 2018).

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=1.0, block_size=8)
        >>> sparsifier = sn.Sparsifier(model, None, sn.Fisher(0.0), density=0.5, every=1)   # prunes only
        >>> model(torch.randn(16, 64)).square().sum().backward()
        >>> update = sparsifier.step()
        >>> update.grown, model[0].density
        (0, 0.5)
    """

    diagonal: bool = False

    def terms(self, layer: LayerView, x: Tensor, grad_output: Tensor) -> Tensor:
        """Half the squared directional derivatives."""
        measure = saliency.obd_saliency if self.diagonal else saliency.block_fisher
        return measure(x, grad_output, layer.values, layer.pattern) * len(x)


@dataclass(frozen=True)
class WoodFisher(Curvature):
    """Optimal Brain Surgeon on groups of about 48 weights of a row; the weights that stay make up for those that go.

    Hassibi & Stork (1993), Singh & Alistarh (2020), Kuznedelev et al. (2023); see :mod:`sparsenet.saliency.woodfisher`.
    The most expensive policy: seconds for a million weights, and ``rows`` rows of every layer's input and output
    gradient are kept from the backward pass to the rewire. The update changes values only: moments of an optimizer stay
    with their blocks as they are, and averaged copies (``followers``) lose the same blocks and keep their averages.
    Blocks of 64 and more are groups of their own: nothing makes up for them.

    Attributes:
        rows: at most so many gradients are kept, evenly spaced over all that are seen.
        damp: added to the diagonal of the Fisher matrix, as a share of the layer's mean.
        update: whether the weights that stay are updated.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64, 10], density=1.0, block_size=1)
        >>> batches = [(torch.randn(100, 64), torch.randint(10, (100,)))]   # in one shot, without any training
        >>> policy = sn.WoodFisher(0.0, batches, torch.nn.functional.cross_entropy)
        >>> _ = sn.Sparsifier(model, None, policy, density=0.25, every=1).step()
        >>> model[0].density, model[1].density
        (0.25, 0.25)
    """

    rows: int = 1024
    damp: float = DAMP
    update: bool = True

    def __post_init__(self):
        super().__post_init__()
        as_integer("WoodFisher", "rows", self.rows, at_least=1)
        if not as_number("WoodFisher", "damp", self.damp) > 0.0:
            raise ValueError(f"WoodFisher: damp must be positive, got {self.damp}")

    @property
    def kept_rows(self) -> int:
        """At most so many."""
        return self.rows

    def observe(self, layer: LayerView, x: Tensor, grad_output: Tensor) -> None:
        """Keeps every n-th row of all that come, n being doubled when there are too many."""
        kept = layer.measured
        every, seen = kept.get("every", 1), kept.get("seen", 0)
        chosen = slice(-seen % every, None, every)
        parts = {"x": x[chosen], "grad_output": grad_output[chosen].float() * len(x)}
        for name, part in parts.items():
            kept[name] = torch.cat([kept[name], part]) if name in kept else part.clone()
        kept["seen"] = seen + len(x)
        while len(kept["x"]) > self.rows:
            every *= 2
            for name in parts:
                kept[name] = kept[name][::2].clone()
        kept["every"] = every

    def share(self, layer: LayerView) -> None:
        """Every rank's rows."""
        _refuse_unmeasured(layer, "x")
        rows = {name: distributed.gathered(layer.measured[name]) for name in ("x", "grad_output")}
        layer.measured = {"x": rows["x"], "grad_output": rows["grad_output"] / len(rows["x"])}

    def drop_scores(self, layer: LayerView) -> Tensor:
        """The loss by the time each block has gone."""
        return informative(self.saliency(layer))

    def saliency(self, layer: LayerView, eligible: Tensor | None = None) -> Tensor:
        """The same, for some of the blocks (bool [num_blocks]) only; inf for the others."""
        return saliency.woodfisher_saliency(
            *self._operands(layer), damp=self.damp, eligible=eligible, element_mask=layer.element_mask
        )

    def adjust(self, layer: LayerView, dropped: Tensor) -> Tensor | None:
        """The update of Optimal Brain Surgeon."""
        if not self.update:
            return None
        return saliency.woodfisher_update(
            *self._operands(layer), dropped, damp=self.damp, element_mask=layer.element_mask
        )

    def _operands(self, layer: LayerView) -> tuple:
        return layer.measured["x"], layer.measured["grad_output"], layer.values, layer.pattern


def _refuse_unmeasured(layer: LayerView, name: str = "rows") -> None:
    """The same on every rank: nothing was measured on at least one of them."""
    if distributed.any_rank(not layer.measured.get(name, torch.empty(0)).numel()):
        raise BadScores("no backward pass through it was measured before this step")


def informative(scores: Tensor) -> Tensor:
    """``scores``; BadScores for those that say nothing: all zero, NaN, Inf."""
    if len(scores) and not bool(scores.any()):
        raise BadScores("its drop scores are all zero")
    if not bool(torch.isfinite(scores).all()):
        raise BadScores("its drop scores hold NaN or Inf")
    return scores
