"""Top-KAST: blocks that are trained without taking part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsenet.functional import select_extreme
from sparsenet.policies.policy import LayerView, block_squared_norms
from sparsenet.policies.rewiring import GrowsAtRandom
from sparsenet.schedules import as_integer, as_number

__all__ = ["TopKAST"]


@dataclass(frozen=True)
class TopKAST(GrowsAtRandom):
    """Always sparse training (Jayakumar et al., 2020): of the stored blocks only the largest compute the output.

    The others are asleep: they hold zeros, so that the network's outputs, saved files and exports are those of the
    blocks that are awake, but they have gradients, and what the optimizer makes of these adds up in the policy's state.
    Every ``refresh`` steps the largest of all stored blocks, latent values counted, are the ones that are awake. At a
    rewire those leave that are smallest, and random ones come, asleep. The Sparsifier's density is that of all stored
    blocks (their backward density); ``awake`` of them compute. Weight decay sees what is awake.

    Attributes:
        drop_fraction: share of the stored blocks exchanged at a rewire.
        awake: share of the stored blocks that compute, in (0, 1].
        refresh: steps between two choices.

    Example:
        >>> import torch, sparsenet as sn
        >>> model = sn.SparseMLP([64, 64], density=0.5, block_size=8)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = sn.Sparsifier(model, optimizer, sn.TopKAST(awake=0.25), every=100)
        >>> model(torch.randn(16, 64)).square().sum().backward()
        >>> optimizer.step()
        >>> update = sparsifier.step()
        >>> int((model[0].values.abs().sum((1, 2)) > 0).sum()), model[0].pattern.num_blocks
        (8, 32)
    """

    drop_fraction: float | object = 0.3
    awake: float = 0.5
    refresh: int = 100
    every_step = True
    kept_copies = 1

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 < as_number("TopKAST", "awake", self.awake) <= 1.0:
            raise ValueError(f"TopKAST: awake must lie in (0, 1], got {self.awake}")
        as_integer("TopKAST", "refresh", self.refresh, at_least=1)

    def after_step(self, layer: LayerView) -> None:
        """Takes what the optimizer made of sleeping blocks out of the values; chooses anew when it is time."""
        values, state = layer.values.detach(), layer.state
        if "awake" not in state:
            state["awake"] = torch.ones(len(values), dtype=torch.bool, device=values.device)
            state["latent"] = torch.zeros_like(values)
        whole = state["latent"] + values  # of a block one of them is zero, but for what the optimizer has just added
        if (layer.step - 1) % self.refresh == 0:
            count = max(1, round(self.awake * len(values))) if len(values) else 0
            state["awake"] = torch.zeros_like(state["awake"])
            state["awake"][select_extreme(block_squared_norms(whole), count, largest=True)] = True
        awake = state["awake"].view(-1, 1, 1)
        layer.put(whole * awake)
        state["latent"] = whole * ~awake

    def drop_scores(self, layer: LayerView) -> Tensor:
        """Squared norms, latent values counted."""
        latent = layer.state.get("latent")
        return block_squared_norms(layer.values if latent is None else layer.values.detach() + latent)
