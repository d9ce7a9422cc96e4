"""What the Grower reads off training: saliency of what is there, and what a step's backward says of what is not.

*Interval scores.* After every so many optimizer steps, ``weight x gradient`` is summed over each unit and each block
and squared: the importance of Molchanov et al. ("Importance Estimation for Neural Network Pruning", 2019), which is
the Fisher information of a gate at that unit or block. It takes one pass over the gradients and no memory of their
size.

*Operands.* In the step before a decision, hooks keep each layer's input and the gradient of its output before the
activation; what units, blocks and layers that do not exist would gain is computed from those two alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparsenet.compaction.weights import unit_weights
from sparsenet.layers import SparseLinear
from sparsenet.pattern import BlockPattern, carried_from

__all__ = ["IntervalScores", "Operands", "Seen", "unit_and_block_products"]

MOST_ROWS = 4096  # of operands kept per layer: gains are averages, more rows do not change a ranking


def unit_and_block_products(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """Sums of weight x gradient: over each output's incoming weights [out], and over each block [num_blocks] or None.

    None where the layer has no gradient. float32, on the layer's device.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.watch import unit_and_block_products
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> layer.weight.data, layer.weight.grad = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])
        >>> unit_and_block_products(layer)[0]
        tensor([11.])
    """
    weight = module.values if isinstance(module, SparseLinear) else module.weight
    if weight.grad is None or weight.grad.shape != weight.shape:
        return None
    if isinstance(module, SparseLinear):
        n, b = weight.shape[0], module.block_size
        lines = _dots(weight.detach().reshape(n * b, b), weight.grad.reshape(n * b, b)).reshape(n, b)
        by_row = torch.zeros(module.pattern.block_rows, b, device=lines.device)
        by_row.index_add_(0, module.pattern.row_indices.long(), lines)
        units, blocks = by_row.flatten()[: module.out_features], lines.sum(1)
    else:
        units, blocks = _dots(weight.detach().flatten(1), weight.grad.flatten(1)), None
    if module.bias is not None and module.bias.grad is not None:
        units = units + (module.bias.detach() * module.bias.grad).float()
    return units, blocks


def _dots(a: Tensor, b: Tensor) -> Tensor:
    """float32 [n]: row by row, without a tensor of the products."""
    if not a.shape[1]:
        return a.new_zeros(len(a), dtype=torch.float32)
    return torch.bmm(a.unsqueeze(1), b.unsqueeze(2)).flatten().float()


class IntervalScores:
    """Mean squared products of every unit and block since the last decision.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.watch import IntervalScores
        >>> layer, scores = torch.nn.Linear(4, 3), IntervalScores()
        >>> layer(torch.randn(8, 4)).square().mean().backward()
        >>> _ = scores.observe({"layer": layer})
        >>> scores.units("layer").shape, scores.count
        (torch.Size([3]), 1)
    """

    def __init__(self):
        self.count = 0
        self._looks: dict[str, int] = {}
        self._units: dict[str, Tensor] = {}
        self._blocks: dict[str, Tensor] = {}

    def observe(self, layers: dict[str, nn.Module]) -> bool:
        """Adds what the present gradients say; whether there were any."""
        seen = False
        for name, module in layers.items():
            found = unit_and_block_products(module)
            if found is None:
                continue
            seen = True
            self._looks[name] = self._looks.get(name, 0) + 1
            for sums, products in zip((self._units, self._blocks), found, strict=True):
                if products is not None:
                    squares = products.square()
                    sums[name] = squares if name not in sums else sums[name].add_(squares)
        self.count += seen
        return seen

    def units(self, name: str) -> Tensor | None:
        """float32 [out], or None where nothing was seen."""
        return self._units[name] / self._looks[name] if name in self._units else None

    def blocks(self, name: str) -> Tensor | None:
        """float32 [num_blocks], or None where nothing was seen."""
        return self._blocks[name] / self._looks[name] if name in self._blocks else None

    def not_finite(self) -> str:
        """The first layer of which a gradient held NaN or Inf; empty if none."""
        if not self._units or bool(torch.stack([sums.sum().cpu() for sums in self._units.values()]).isfinite().all()):
            return ""
        return next((name for name, sums in self._units.items() if not bool(torch.isfinite(sums).all())), "")

    def all_zero(self) -> bool:
        """Whether gradients were seen and not one differed from zero."""
        return bool(self._units) and not any(bool(sums.any()) for sums in self._units.values())

    # --- what changes of the model ask ---

    def carry_blocks(self, name: str, old: BlockPattern, new: BlockPattern) -> None:
        """Blocks that stayed keep their score; new ones are infinite: too young to judge."""
        if name not in self._blocks or len(self._blocks[name]) != old.num_blocks:
            return
        carried = carried_from(old, new).to(self._blocks[name].device)
        scores = self._blocks[name][carried.clamp(min=0)]
        self._blocks[name] = torch.where(carried >= 0, scores, torch.inf)

    def keep_units(self, name: str, kept: Tensor) -> None:
        """Units that stayed keep their score; those of its blocks are not known any more."""
        if name in self._units:
            self._units[name] = self._units[name][kept.to(self._units[name].device)]
        self._blocks.clear()

    def add_units(self, name: str, count: int) -> None:
        """New units, behind the others, are infinite: too young to judge."""
        if name in self._units:
            self._units[name] = nn.functional.pad(self._units[name], (0, count), value=torch.inf)
        self._blocks.clear()

    def forget_blocks(self) -> None:
        """Blocks were moved by others: their numbers mean other blocks now."""
        self._blocks.clear()

    def clear(self) -> None:
        """Begins the next interval."""
        self.count = 0
        self._looks, self._units, self._blocks = {}, {}, {}

    def state_dict(self) -> dict:
        """The sums of the interval that has begun."""
        return {
            "count": self.count,
            "looks": dict(self._looks),
            "units": {name: t.clone() for name, t in self._units.items()},
            "blocks": {name: t.clone() for name, t in self._blocks.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues the interval."""
        self.count, self._looks = state["count"], dict(state["looks"])
        self._units, self._blocks = dict(state["units"]), dict(state["blocks"])


class Seen(NamedTuple):
    """What one layer saw in a step.

    Attributes:
        x: [rows, in]. grad_output: of the output before the activation, [rows, out], so that sums over rows are those
            of all ``total`` rows.
        total: rows that there were: two layers saw the same places only where these agree.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.watch import Seen
        >>> Seen(torch.ones(2, 4), torch.ones(2, 8), 2).total
        2
    """

    x: Tensor
    grad_output: Tensor
    total: int


class Operands:
    """Keeps, for one training step, what each layer reads and the gradient of its output before the activation.

    Linear and block-sparse layers only; a convolution's would have to be unfolded. Where a step has several backward
    passes, their gradients are added up, and so are these. :meth:`close` takes the hooks off.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.watch import Operands
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> operands = Operands(dict(model.named_modules()).items())
        >>> model(torch.randn(16, 4)).square().mean().backward()
        >>> operands.close()
        >>> [tuple(t.shape) for t in operands.kept["2"][:2]]
        [(16, 8), (16, 2)]
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]):
        self._calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._handles = []
        self._watched: list[tuple[SparseLinear, object]] = []
        for name, module in modules:
            if isinstance(module, SparseLinear) and unit_weights(module) is not None:
                if module.topology.observer is None:  # a Sparsifier's comes first
                    seen = partial(self._keep, name)
                    module.topology.observer = seen
                    self._watched.append((module, seen))
            elif isinstance(module, nn.Linear) and unit_weights(module) is not None:
                self._handles.append(module.register_forward_hook(_Hook(self, name, module)))

    @property
    def kept(self) -> dict[str, Seen]:
        """By layer: of more than ``MOST_ROWS`` rows some, evenly spread, with gradients so much larger."""
        found = {}
        for name, calls in self._calls.items():
            x, grad_output = (torch.cat(parts) if len(calls) > 1 else parts[0] for parts in zip(*calls, strict=True))
            step = -(-len(x) // MOST_ROWS)
            some = grad_output[::step]
            found[name] = Seen(x[::step], some * (len(x) / len(some)) if step > 1 else some, len(x))
        return found

    def _keep(self, name: str, x: Tensor, grad_output: Tensor) -> None:
        self._calls.setdefault(name, []).append((x.detach(), grad_output.detach()))

    def close(self) -> None:
        """Takes the hooks off; what was kept stays."""
        for handle in self._handles:
            handle.remove()
        for module, seen in self._watched:
            if module.topology.observer is seen:
                module.topology.observer = None
        self._handles, self._watched = [], []


class _Hook:
    """On a dense layer; a copy of the layer watches nothing."""

    def __init__(self, owner: Operands, name: str, module: nn.Linear):
        self._owner, self._name, self._module = weakref.ref(owner), name, weakref.ref(module)

    def __call__(self, module: nn.Module, given: tuple, output: Tensor) -> None:
        owner = self._owner()
        if owner is None or module is not self._module() or not output.requires_grad:
            return
        x = given[0].detach().reshape(-1, module.in_features)
        output.register_hook(lambda g: owner._keep(self._name, x, g.reshape(-1, module.out_features)))

    def __reduce__(self):
        return _nobody, ()


def _nobody():
    return _ignored


def _ignored(module: nn.Module, given: tuple, output: Tensor) -> None:
    """In a copy."""
