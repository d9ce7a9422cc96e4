"""What one training step of the growing model takes, counted once and kept up to date while the model changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch
from torch import nn

from sparsenet import distributed
from sparsenet.architecture.growth.ledger import Cost, Ledger, as_is
from sparsenet.architecture.growth.step_watch import rows_of
from sparsenet.architecture.growth.watch import MOST_ROWS
from sparsenet.compaction.graph import UnitGraph
from sparsenet.limits import is_out_of_memory
from sparsenet.memory.costs import LayerCost, layer_costs
from sparsenet.memory.network import step_bytes
from sparsenet.memory.step_time import StepTimeModel

__all__ = ["Account", "agreed"]

logger = logging.getLogger(__name__)


def agreed(cost: Cost) -> Cost:
    """The largest of all ranks, part by part.

    Example:
        >>> from sparsenet.architecture.growth.account import agreed
        >>> from sparsenet.architecture.growth.ledger import Cost
        >>> agreed(Cost(3.0)).bytes   # with one rank it is what it was
        3.0
    """
    return Cost(*distributed.highest(cost.parts)) if distributed.is_active() else cost


class Account:
    """Counts activations by a forward pass of its own, and follows them through changes of the model.

    Args:
        net: the model. optimizers: whose state counts. times: predicts milliseconds; None: they do not matter.
        batch_size: rows that the budget is to hold for, where they are more than those seen.
        operands: whether the gradients of all linear layers' outputs are kept in the step before a decision.

    Attributes:
        by_module: bytes kept for backward that grow with a module's outputs; ``fixed``: the others;
            ``temporary``: what the optimizer takes for a moment.
        layers: calls of layers in a step. stale: whether the model has changed since they were
            counted; ``counted``: whether they ever were.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.growth.account import Account
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> account = Account(net, [torch.optim.SGD(net.parameters())], operands=False)
        >>> account.measure((torch.ones(16, 4),), most_rows=16)
        True
        >>> account.by_module   # [16, 8] float32
        {'0': 512}
    """

    def __init__(
        self,
        net: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        times: StepTimeModel | None = None,
        batch_size: int | None = None,
        operands: bool = True,
    ):
        self.net, self.optimizers, self.times = net, tuple(optimizers), times
        self.batch_size, self.operands = batch_size, operands
        self.by_module: dict[str, int] = {}
        self.fixed = self.temporary = 0
        self.layers: list[LayerCost] = []
        self.stale, self.counted = True, False

    @property
    def needed(self) -> int:
        """Bytes that a step takes beside what stays: activations first, then what the optimizer takes for a moment."""
        return max(self.activations, self.temporary)

    @property
    def activations(self) -> int:
        """Bytes of all activations of a step."""
        return self.fixed + sum(self.by_module.values())

    def measure(self, batch: tuple, most_rows: int) -> bool:
        """Counts a step with ``batch``, as if it had ``most_rows`` (or the batch size to hold for); whether it could.

        Where there is no memory for a forward pass, what was known stays.
        """
        try:
            counted = step_bytes(self.net, self.optimizers, batch)
            layers = layer_costs(self.net, batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("Grower: no memory to count the activations of a step: the last count stays")
            return False
        rows = max(rows_of(batch), 1)
        factor = max(1.0, max(self.batch_size or 0, most_rows) / rows)
        kept = dict(counted.activation_bytes)
        others = counted.items["activations"] - sum(kept.values()) + counted.items["outputs"]
        for cost in layers if self.operands else ():
            if cost.kind in ("dense", "block") and cost.optimizer_elements:
                size = torch.empty((), dtype=getattr(torch, cost.dtype)).element_size()
                kept[cost.name] = kept.get(cost.name, 0) + min(cost.positions, MOST_ROWS) * cost.out_features * size
        stays = sum(counted.items.values()) - counted.items["activations"]
        self.temporary = max(0, counted.moments["optimizer step"] - stays)
        self.by_module = {name: round(n * factor) for name, n in kept.items()}
        self.fixed = round(others * factor)
        self.layers, self.stale, self.counted = layers, False, True  # milliseconds are of the batch that was seen
        return True

    def agree(self) -> None:
        """The largest activations of all ranks count on each of them: prices are alike then."""
        names = sorted(self.by_module)
        distributed.assert_same("the layers whose activations are counted", sum(map(ord, " ".join(names))))
        sizes = distributed.highest([float(self.fixed), *(float(self.by_module[name]) for name in names)])
        self.fixed, self.by_module = round(sizes[0]), dict(zip(names, map(round, sizes[1:]), strict=True))

    def ledger(self, graph: UnitGraph) -> Ledger:
        """Prices in the model as it is; ``graph`` is of it."""
        kept = self.by_module, self.fixed, self.layers
        return Ledger(graph, self.optimizers, *kept, self.times, self.temporary)

    def total(self, graph: UnitGraph) -> Cost:
        """Of one step; with several ranks the largest."""
        return agreed(self.ledger(graph).total())

    def follow(self, before: Mapping[str, int], graph: UnitGraph) -> None:
        """Activations go with the outputs of the modules that they are of, until they are counted again.

        ``before``: outputs by stage before the change, of :meth:`sizes`. ``graph``: of the model after it.
        """
        after = self.sizes(graph)
        grown = {name: after[name] / max(size, 1) for name, size in before.items() if name in after}
        self.by_module = {name: round(n * grown.get(name, 1.0)) for name, n in self.by_module.items()}
        elements = sum(cost.weights for cost in self.layers)
        self.layers = [as_is(cost, self.net) for cost in self.layers]
        self.temporary = round(self.temporary * sum(cost.weights for cost in self.layers) / max(elements, 1))
        self.stale = True

    @staticmethod
    def sizes(graph: UnitGraph) -> dict[str, int]:
        """Outputs by stage."""
        return {stage.name: len(stage.outputs.units) for stage in graph.stages}

    def state_dict(self) -> dict:
        """What was counted."""
        layers = [{**asdict(cost), "kernel": list(cost.kernel)} for cost in self.layers]
        return {
            "by_module": dict(self.by_module),
            "fixed": self.fixed,
            "temporary": self.temporary,
            "layers": layers,
            "stale": self.stale,
            "counted": self.counted,
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Takes over what was counted."""
        layers = [LayerCost(**{**fields, "kernel": tuple(fields["kernel"])}) for fields in state["layers"]]
        self.by_module, self.fixed = dict(state["by_module"]), state["fixed"]
        self.temporary = state["temporary"]
        self.layers, self.stale, self.counted = layers, state["stale"], state["counted"]
