"""The weights of a layer that gets rows and columns: dense ones, convolutions', and block-sparse ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenet.architecture.growth.block_lines import (
    GrownPattern,
    Lines,
    fill_following,
    fill_leading,
    share_out,
    uneven_shares,
)
from sparsenet.architecture.growth.newborn import (
    DISTURBANCE,
    Directions,
    generator,
    mixture,
    usual_incoming,
    usual_outgoing,
)
from sparsenet.architecture.growth.placing import Birth, Placing
from sparsenet.compaction.graph import Stage
from sparsenet.compaction.moves import gather_lines
from sparsenet.functional.blocks import take_blocks
from sparsenet.layers import SparseLinear

Given = tuple[Tensor, Tensor]

__all__ = ["Brood", "grown_blocks", "grown_dense"]


@dataclass(frozen=True)
class Brood:
    """All that are born together.

    Attributes:
        births: in the order of their numbers.
        copied: whether they are copies of other units. mixed: whether random weights are mixtures of old ones.
        directions: by layer; empty: random ones. seed: of all random numbers.
        density: of a block-sparse layer's new rows and columns, at most.
    """

    births: tuple[Birth, ...]
    copied: bool
    mixed: bool
    directions: dict[str, Directions]
    seed: int
    density: float = 1.0

    def speaks(self, axis: Placing) -> Tensor:
        """Bool by position: whether its outgoing weights are not zero."""
        return self._by_position(axis, [birth.speaks for birth in self.births], False)

    def children(self, axis: Placing) -> Tensor:
        """int64 by position: how many copies of its parent are born."""
        counts = [(birth.parent[:, None] == birth.parent[None, :]).sum(1) for birth in self.births]
        return self._by_position(axis, counts, 0)

    def given(self, stage: Stage, axis: Placing, across: Placing | None, outgoing: bool) -> Given | None:
        """Directions of the new rows (or columns) of a layer.

        Returns:
            [n, positions across, 1 or places of the kernel], and int64 by position of ``axis``: which of them it has.
            The first is zero: none. None instead of all that where no direction is for this layer.
        """
        found, which, count = [], torch.zeros(len(axis.born), dtype=torch.int64), 1
        for birth in self.births:
            own = self.directions.get(birth.stage.name)
            if own is None or stage.name != (own.reader if outgoing else birth.stage.name):
                continue
            towards = own.outgoing if outgoing else own.incoming
            found.append(towards)
            leads = torch.from_numpy(birth.twin < 0).long().cumsum(0) - 1
            mine = (axis.born >= birth.first) & (axis.born < birth.first + birth.count)
            which[mine] = count + leads[axis.born[mine] - birth.first]
            count += len(towards)
        if not found:
            return None
        towards = torch.cat([found[0].new_zeros(1, found[0].shape[1]), *found])
        width = stage.weights.rows if outgoing else 1 if stage.weights.per_channel else stage.weights.columns
        towards = towards.reshape(count, width, -1)
        if across is not None:
            towards = towards[:, across.index().to(towards.device)]
            towards = towards * (across.old >= 0).view(1, -1, 1).to(towards.device)
        return towards, which

    @staticmethod
    def _by_position(axis: Placing, parts: list, otherwise) -> Tensor:
        values = torch.cat([torch.as_tensor(part) for part in parts])
        return torch.where(axis.born >= 0, values[axis.born.clamp(min=0)], otherwise)


def grown_dense(stage: Stage, module: nn.Module, rows: Placing | None, cols: Placing | None, brood: Brood) -> Tensor:
    """The weight [rows, columns, ...] of ``module`` with new rows and columns."""
    index = {d: axis.index() for d, axis in enumerate((rows, cols)) if axis is not None}
    data = gather_lines(module.weight.detach(), index)  # new places hold anything
    if rows is not None:
        draw, lead = generator(brood.seed, stage.name, 5), rows.new[rows.source[rows.new] < 0]
        if len(lead):
            fresh = _leading(data, rows, lead, brood.given(stage, rows, cols, False), cols, brood.mixed, draw)
            data[lead.to(data.device)] = _sized(fresh, usual_incoming(stage)).to(data)
        follows = (rows.source >= 0).nonzero().flatten()
        data[follows.to(data.device)] = data[rows.source[follows].to(data.device)]
    if cols is None:
        return data
    turned = data.transpose(0, 1)  # the same memory
    speaks, draw = brood.speaks(cols), generator(brood.seed, stage.name, 6)
    follows = ((cols.source >= 0) & speaks).nonzero().flatten()
    source, follows = cols.source[follows].to(data.device), follows.to(data.device)
    turned[cols.new.to(data.device)] = 0.0
    if brood.copied:
        given = turned[source]
        children = brood.children(cols)[follows.cpu()].view(-1, *[1] * (data.dim() - 1))
        taken = given * uneven_shares(tuple(given.shape), children, draw).to(given)
        turned[follows] = taken
        turned.index_add_(0, source, taken, alpha=-1)
        return data
    lead = cols.new[speaks[cols.new] & (cols.source[cols.new] < 0)]
    if len(lead):
        fresh = _leading(turned, cols, lead, brood.given(stage, cols, rows, True), rows, brood.mixed, draw)
        turned[lead.to(data.device)] = _sized(fresh, usual_outgoing(stage)).to(data)
        turned[follows] = -turned[source]
    return data


def _leading(
    data: Tensor,
    axis: Placing,
    lead: Tensor,
    given: Given | None,
    across: Placing | None,
    mixed: bool,
    draw: torch.Generator,
) -> Tensor:
    """Like ``data[lead]``: random or as given, zero where a unit is born across as well."""
    fresh = torch.randn(len(lead), *data.shape[1:], generator=draw, dtype=torch.float64)
    if mixed:
        old, factor = mixture(axis, lead, draw)
        sums = torch.einsum("kmx,km->kx", data[old.to(data.device)].flatten(2).double().cpu(), factor)
        fresh = F.normalize(sums, dim=1) + DISTURBANCE * F.normalize(fresh.flatten(1), dim=1)
    fresh = fresh.reshape(len(lead), data.shape[1], -1)
    if given is not None:
        towards, which = given
        towards = towards[which[lead].to(towards.device)].double().cpu().expand(-1, -1, fresh.shape[2])
        known = towards.flatten(1).abs().sum(1) > 0
        fresh = torch.where(known.view(-1, 1, 1), towards, fresh)
    if across is not None:
        fresh = fresh * (across.old >= 0).view(1, -1, 1)
    return fresh.reshape(len(lead), *data.shape[1:])


def _sized(fresh: Tensor, norm: float) -> Tensor:
    """Each of the first dimension of norm ``norm``."""
    return (F.normalize(fresh.flatten(1), dim=1, eps=1e-300) * norm).reshape(fresh.shape)


def grown_blocks(
    stage: Stage, layer: SparseLinear, grown: GrownPattern, rows: Placing | None, cols: Placing | None, brood: Brood
) -> Tensor:
    """The values of ``layer`` on the grown pattern, new rows and columns filled."""
    values, pattern, b = take_blocks(layer.values.detach(), grown.carried, 0.0), grown.pattern, layer.block_size
    row, col = pattern.row_indices.long(), pattern.col.long()
    if rows is not None:
        inside = _inside(cols, pattern.shape[1], b)
        lines = Lines(values, row, col, rows, pattern.block_cols, inside)
        heard = torch.ones(len(rows.old), dtype=torch.bool)
        given = _flat(brood.given(stage, rows, cols, False))
        draw = generator(brood.seed, stage.name, 5)
        fill_leading(lines, usual_incoming(stage), heard, given, brood.mixed, draw)
        fill_following(lines, 1.0, heard)
    if cols is not None:
        inside = _inside(rows, pattern.shape[0], b)
        lines = Lines(values.transpose(1, 2), col, row, cols, pattern.block_rows, inside)
        heard, draw = brood.speaks(cols), generator(brood.seed, stage.name, 6)
        if not heard.any():
            return values
        if brood.copied:
            share_out(lines, brood.children(cols), draw)
            return values
        given = _flat(brood.given(stage, cols, rows, True))
        fill_leading(lines, usual_outgoing(stage), heard, given, brood.mixed, draw)
        fill_following(lines, -1.0, heard)
    return values


def _inside(across: Placing | None, n: int, b: int) -> Tensor:
    """Bool [multiple of b]: positions in the matrix that are not new."""
    old = torch.ones(n, dtype=torch.bool) if across is None else across.old >= 0
    return F.pad(old, (0, -n % b))


def _flat(given: Given | None) -> Given | None:
    return None if given is None else (given[0].squeeze(2), given[1])
