"""Carrying a decision out: blocks, units and layers of a model, its averaged copies and its optimizers together."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sparsenet import distributed
from sparsenet.architecture.growth.blocks import move_blocks
from sparsenet.architecture.growth.deepening import deepen
from sparsenet.architecture.growth.events import Change
from sparsenet.architecture.growth.gains import NewBlocks
from sparsenet.architecture.growth.placing import GrowthError
from sparsenet.architecture.growth.watch import IntervalScores
from sparsenet.architecture.growth.widening import widen
from sparsenet.compaction.compacting import compact, plain_model
from sparsenet.layers import SparseLinear
from sparsenet.optimizer_state import as_optimizers

__all__ = ["Surgery"]

_BY_OPERANDS = ("gradient", "firefly")
_NONE = torch.empty(0, dtype=torch.int64)


class Surgery:
    """Changes a model; the interval's scores stay with what they are of.

    Args:
        model, optimizer, followers, opaque, sparsifier: as of :class:`sparsenet.Grower`.
        grow: how units are born. scores: of the interval. density: of new units in block-sparse layers, at most.

    Attributes:
        young: report of the last widening or deepening, while what it added is where it was born.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
        followers: Sequence[nn.Module],
        opaque: Iterable[str],
        sparsifier,
        grow: str,
        scores: IntervalScores,
        density: float = 1.0,
    ):
        self.model, self.optimizer, self.followers, self.sparsifier = model, optimizer, followers, sparsifier
        self.opaque, self.grow, self.scores, self.density = tuple(opaque), grow, scores, density
        self.young = None

    def blocks(self, layers: Mapping[str, SparseLinear], leaving: Mapping[str, Tensor], why: str) -> list[Change]:
        """Blocks of these numbers leave."""
        changes = []
        for name, leave in leaving.items():
            changes += self._move(name, layers[name], leave, _NONE, torch.empty(0), why)
        return changes

    def exchange(
        self,
        layers: Mapping[str, SparseLinear],
        leaving: Mapping[str, Tensor],
        counts: Mapping[str, int],
        known: Container[str],
        new_blocks: NewBlocks,
    ) -> list[Change]:
        """Blocks leave, and ``counts`` others come where the gradient is largest; where none can, the layer waits.

        ``known``: layers that ``new_blocks`` can tell of.
        """
        changes = []
        for name, layer in layers.items():
            leave, grow = leaving.get(name, _NONE), counts.get(name, 0)
            if not len(leave) and not grow:
                continue
            enter, norms = new_blocks.best(name, layer, grow) if grow and name in known else (_NONE, torch.zeros(0))
            if grow and not bool(norms.any()):
                continue
            changes += self._move(name, layer, leave, enter, norms, "largest gradient")
        return changes

    def _move(self, name: str, layer: SparseLinear, leave: Tensor, enter: Tensor, norms: Tensor, why: str) -> list:
        followers = [plain_model(follower).get_submodule(name) for follower in self.followers]
        old = move_blocks(name, layer, as_optimizers(self.optimizer), followers, leave, enter)
        self.scores.carry_blocks(name, old, layer.pattern)
        if old.num_blocks != layer.pattern.num_blocks:
            distributed.rebuild(self.model)
        if self.sparsifier is not None:
            self.sparsifier.refresh()
        gain = float(norms.mean()) if len(norms) else 0.0
        return [Change("blocks", name, len(enter), len(leave), why, gain)]

    def remove_units(self, leaving: Mapping[str, Tensor], why: str) -> list[Change]:
        """Units leave weights, optimizers and readers through compaction."""
        if not leaving:
            return []
        report = compact(
            self.model,
            self.optimizer,
            remove={name: units.tolist() for name, units in leaving.items()},
            copies=self.followers,
            sparsifier=self.sparsifier,
            opaque=self.opaque,
            zeros=False,
            permute=False,
        )
        changes = []
        for name, change in report.layers.items():
            if change.after != change.before:
                changes.append(Change("units", name, pruned=change.before - change.after, why=why))
                self.scores.keep_units(name, change.kept_units)
        self.young = None
        return changes

    def widen(self, units: Mapping[str, int], operands: Mapping, gains: Mapping[str, float], seed: int) -> list[Change]:
        """New units, of all layers at once. ``gains``: of one unit, by layer."""
        changes: list[Change] = []
        by_how: dict[str, dict[str, int]] = {}
        for name, count in units.items():
            how = self.grow if self.grow not in _BY_OPERANDS or name in operands else "pairs"
            by_how.setdefault(how, {})[name] = count
        for how, some in by_how.items():
            report = widen(
                self.model,
                self.optimizer,
                some,
                how=how,
                operands=operands if how in _BY_OPERANDS else None,
                density=self.density,
                copies=self.followers,
                sparsifier=self.sparsifier,
                opaque=self.opaque,
                seed=seed,
            )
            self.young = report
            for name, positions in report.new.items():
                self.scores.add_units(name, len(positions))
                changes.append(Change("units", name, len(positions), why="largest gain", gain=gains.get(name, 0.0)))
        return changes

    def deepen(self, name: str, gain: float, seed: int) -> tuple[list[Change], dict]:
        """A new layer after ``name``; also what repeats it."""
        options = {"copies": self.followers, "sparsifier": self.sparsifier, "seed": seed}
        try:
            report = deepen(self.model, self.optimizer, after=name, kind="identity", **options)
        except GrowthError:  # another activation than relu
            report = deepen(self.model, self.optimizer, after=name, kind="residual", **options)
        self.young = report
        return [Change("layers", report.name, 1, why=f"after {name}", gain=gain)], report.insertion
