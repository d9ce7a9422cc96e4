"""What the Grower reads off training: saliency of what is there, and what a step's backward says of what is not.

*Interval scores.* After every so many optimizer steps, ``weight x gradient`` is summed over each unit and each block
and squared: the importance of Molchanov et al. ("Importance Estimation for Neural Network Pruning", 2019), which is
the Fisher information of a gate at that unit or block. It takes one pass over the gradients and no memory of their
size.

*Operands.* In the step before a decision, hooks keep each layer's input and the gradient of its output before the
activation; what units, blocks and layers that do not exist would gain is computed from those two alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparsenet.compaction.weights import unit_weights
from sparsenet.layers import SparseLinear
from sparsenet.pattern import BlockPattern, carried_from

__all__ = ["IntervalScores", "Operands", "unit_and_block_products"]

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
        >>> scores.observe({"layer": layer})
        >>> scores.units("layer").shape, scores.count
        (torch.Size([3]), 1)
    """

    def __init__(self):
        self.count = 0
        self._units: dict[str, Tensor] = {}
        self._blocks: dict[str, Tensor] = {}

    def observe(self, layers: dict[str, nn.Module]) -> None:
        """Adds what the present gradients say."""
        seen = False
        for name, module in layers.items():
            found = unit_and_block_products(module)
            if found is None:
                continue
            seen = True
            for sums, products in zip((self._units, self._blocks), found, strict=True):
                if products is not None:
                    squares = products.square()
                    sums[name] = squares if name not in sums else sums[name].add_(squares)
        self.count += seen

    def units(self, name: str) -> Tensor | None:
        """float32 [out], or None where nothing was seen."""
        return self._units[name] / self.count if name in self._units else None

    def blocks(self, name: str) -> Tensor | None:
        """float32 [num_blocks], or None where nothing was seen."""
        return self._blocks[name] / self.count if name in self._blocks else None

    def not_finite(self) -> str:
        """The first layer of which a gradient held NaN or Inf; empty if none."""
        return next((name for name, sums in self._units.items() if not bool(torch.isfinite(sums).all())), "")

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

    def clear(self) -> None:
        """Begins the next interval."""
        self.count = 0
        self._units, self._blocks = {}, {}

    def state_dict(self) -> dict:
        """The sums of the interval that has begun."""
        return {
            "count": self.count,
            "units": {name: t.clone() for name, t in self._units.items()},
            "blocks": {name: t.clone() for name, t in self._blocks.items()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Continues the interval."""
        self.count = state["count"]
        self._units, self._blocks = dict(state["units"]), dict(state["blocks"])


class Operands:
    """Keeps, for one training step, (x [rows, in], gradient of the output before the activation [rows, out]) by layer.

    Linear and block-sparse layers only; a convolution's would have to be unfolded. :meth:`close` takes the hooks off.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.watch import Operands
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> operands = Operands(dict(model.named_modules()).items())
        >>> model(torch.randn(16, 4)).square().mean().backward()
        >>> operands.close()
        >>> [tuple(t.shape) for t in operands.kept["2"]]
        [(16, 8), (16, 2)]
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]):
        self.kept: dict[str, tuple[Tensor, Tensor]] = {}
        self._handles = []
        self._watched: list[SparseLinear] = []
        for name, module in modules:
            if isinstance(module, SparseLinear) and unit_weights(module) is not None:
                if module.topology.observer is None:  # a Sparsifier's comes first
                    module.topology.observer = self._observer(name)
                    self._watched.append(module)
            elif isinstance(module, nn.Linear) and unit_weights(module) is not None:
                self._handles.append(module.register_forward_hook(self._hook(name)))

    def _observer(self, name: str):
        def seen(x: Tensor, grad_output: Tensor) -> None:
            self._keep(name, x, grad_output)

        return seen

    def _hook(self, name: str):
        def called(module: nn.Module, given: tuple, output: Tensor) -> None:
            if output.requires_grad:
                x = given[0].detach().reshape(-1, module.in_features)
                output.register_hook(lambda g: self._keep(name, x, g.detach().reshape(-1, module.out_features)))

        return called

    def _keep(self, name: str, x: Tensor, grad_output: Tensor) -> None:
        step = -(-len(x) // MOST_ROWS)
        self.kept[name] = (x.detach()[::step], grad_output.detach()[::step])

    def close(self) -> None:
        """Takes the hooks off; what was kept stays."""
        for handle in self._handles:
            handle.remove()
        for module in self._watched:
            module.topology.observer = None
        self._handles, self._watched = [], []
