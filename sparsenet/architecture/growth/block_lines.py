"""New rows and columns of block-sparse layers: which blocks they get, and what is in them. Never dense.

A *line* is a row of blocks, or a column of blocks: everything here is written once, for rows; columns are the rows of
the transposed blocks. Old blocks keep their elements, bit for bit; where the last line was partly outside the matrix,
its blocks are filled first. A new line gets as many blocks as the old ones have on average, or as a density allows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsenet import functional
from sparsenet.architecture.growth.newborn import DISTURBANCE, MIXED, UNEVEN, mixture
from sparsenet.architecture.growth.placing import GrowthError, Placing
from sparsenet.pattern import BlockPattern
from sparsenet.policies.places import layer_key

__all__ = ["GrownPattern", "grow_pattern"]

LEAST_READ = 64  # inputs that a unit may have at any density


@dataclass(frozen=True)
class GrownPattern:
    """A pattern with new rows and columns.

    Attributes:
        pattern: of the larger shape. carried: int64 [num_blocks]: the old number of each block, -1 for a new one.
    """

    pattern: BlockPattern
    carried: Tensor


def grow_pattern(
    name: str,
    pattern: BlockPattern,
    rows: Placing | None,
    cols: Placing | None,
    copied: bool,
    seed: int,
    density: float = 1.0,
) -> GrownPattern:
    """The blocks of layer ``name`` once it has new rows and columns.

    Args:
        rows, cols: where they stand; None: none are new.
        copied: whether new lines must have every block that those of their parents have.
        density: of new rows, at most, and of the layer once columns are new; a row may read ``LEAST_READ`` elements in
            any case, and every line gets a block.

    Raises:
        GrowthError: new units among old ones would move these inside their blocks.
    """
    b = pattern.block_size
    row, col = (t.long().cpu().numpy() for t in (pattern.row_indices, pattern.col_indices))
    count, tall, wide = len(row), pattern.block_rows, pattern.block_cols
    for axis in (rows, cols):
        _check_whole_blocks(name, axis, b)
    shape = tuple(n if axis is None else len(axis.old) for n, axis in zip(pattern.shape, (rows, cols), strict=True))
    if rows is not None:
        row = _moved_lines(rows, tall, b)[row]
        average = min(max(1, round(count / max(tall, 1))), _most(density, wide, b))
        added = _new_blocks(row, col, rows, b, wide, average, copied, layer_key(seed, 3, name))
        row, col = np.concatenate([row, added[0]]), np.concatenate([col, added[1]])
    if cols is not None:
        col = _moved_lines(cols, wide, b)[col]
        others = -(-shape[0] // b)
        average = max(1, round(count / max(wide, 1)))
        lines = -(-shape[1] // b)
        left = others * _most(density, lines, b) - len(row)  # new rows took theirs
        average = min(average, max(1, left // max(lines - wide, 1)))
        added = _new_blocks(col, row, cols, b, others, average, copied, layer_key(seed, 4, name))
        row, col = np.concatenate([row, added[1]]), np.concatenate([col, added[0]])
    places = torch.from_numpy(row * max(-(-shape[1] // b), 1) + col)
    order = places.argsort()
    carried = torch.where(order < count, order, -1)
    made = BlockPattern.from_linear_places(places, shape, b).to(pattern.device)
    return GrownPattern(made, carried.to(pattern.device))


def _most(density: float, others: int, b: int) -> int:
    """Blocks of a row that crosses ``others`` columns of them."""
    return max(math.ceil(density * others), LEAST_READ // b)


def _check_whole_blocks(name: str, axis: Placing | None, b: int) -> None:
    if axis is None:
        return
    old = int((axis.old >= 0).sum())
    for end, size in axis.inserted:
        if end < old and (end % b or size % b):
            raise GrowthError(
                f"widen: units must be born in blocks of {b} where others follow them in {name!r} (a concatenation or "
                f"sum), got {size} new places behind {end}"
            )


def _moved_lines(axis: Placing, lines: int, b: int) -> np.ndarray:
    """int64 [lines]: the new number of each old line."""
    now = (axis.old >= 0).nonzero().flatten().numpy()
    return now[np.arange(lines) * b] // b


def _new_blocks(
    own: np.ndarray, other: np.ndarray, axis: Placing, b: int, others: int, average: int, copied: bool, key: int
) -> tuple[np.ndarray, np.ndarray]:
    """(line, other line) of the blocks to add, given those that are there."""
    new, source = axis.new.numpy(), axis.source.numpy()
    order = np.argsort(own, kind="stable")
    total = -(-len(axis.old) // b)
    starts = np.searchsorted(own[order], np.arange(total + 1))
    has_old = np.zeros(total, dtype=bool)
    has_old[(axis.old >= 0).nonzero().flatten().numpy() // b] = True
    held: dict[int, np.ndarray] = {}

    def blocks_of(line: int) -> np.ndarray:
        return held[line] if line in held else np.unique(other[order[starts[line] : starts[line + 1]]])

    lines, begins = np.unique(new // b, return_index=True)
    ends = np.append(begins[1:], len(new))
    own_new, other_new = [], []
    for line, begin, end in zip(lines.tolist(), begins, ends, strict=True):
        before = have = blocks_of(line)
        grows = not has_old[line] or not len(have)
        if grows or copied:
            from_lines = np.unique(source[new[begin:end]] // b)
            from_lines = from_lines[(from_lines >= 0) & (from_lines != line)]
            have = np.unique(np.concatenate([have, *(blocks_of(int(s)) for s in from_lines)]))
        if grows and len(have) < min(average, others):
            active, missing = torch.from_numpy(have.astype(np.int64)), min(average, others) - len(have)
            drawn = functional.draw_free_places(active, others, missing, layer_key(key, line, ""))
            have = np.union1d(have, drawn.numpy())
        held[line] = have
        fresh = np.setdiff1d(have, before)
        own_new.append(np.full(len(fresh), line))
        other_new.append(fresh)
    empty = np.zeros(0, dtype=np.int64)
    return np.concatenate([empty, *own_new]), np.concatenate([empty, *other_new]).astype(np.int64)


# --- what is in them ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lines:
    """Blocks seen by the lines that one axis makes of them.

    Attributes:
        blocks: [num_blocks, b, b], the line's own dimension first; written to.
        own, other: int64 [num_blocks]. axis: of the lines. others: how many other lines there are.
        inside: bool [others * b]: positions across that new leading lines may have weights at.
    """

    blocks: Tensor
    own: Tensor
    other: Tensor
    axis: Placing
    others: int
    inside: Tensor

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """(block, offset in it, position) of every piece of a new line."""
        b = self.blocks.shape[1]
        new = torch.nn.functional.pad(self.axis.old < 0, (0, -len(self.axis.old) % b)).reshape(-1, b)
        block, offset = new.to(self.own.device)[self.own].nonzero(as_tuple=True)
        return block, offset, self.own[block] * b + offset

    def find(self, position: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """The block that holds ``position`` and crosses the line ``other``, and whether there is one."""
        keys = self.own * self.others + self.other
        ordered, order = keys.sort()
        wanted = position // self.blocks.shape[1] * self.others + other
        at = torch.searchsorted(ordered, wanted).clamp(max=len(ordered) - 1)
        return order[at], ordered[at] == wanted


def fill_leading(
    lines: Lines,
    norm: float,
    heard: Tensor,
    given: tuple[Tensor, Tensor] | None,
    mixed: bool,
    draw: torch.Generator,
) -> None:
    """Weights of new lines that mirror no other.

    Args:
        norm: of each line. heard: bool by position; the others get zero.
        given: directions [n, others * b or less], and by position which of them it has; None: random.
        mixed: whether random ones are mixtures of old lines, disturbed.
    """
    block, offset, position = lines.entries()
    source = lines.axis.source.to(position.device)
    lead = (source[position] < 0) & heard.to(position.device)[position]
    block, offset, position = block[lead], offset[lead], position[lead]
    if not len(block):
        return
    b = lines.blocks.shape[1]
    weights = torch.randn(len(block), b, generator=draw, dtype=torch.float64).to(position.device)
    n = len(source)
    if mixed:
        old, factor = mixture(lines.axis, torch.arange(n), draw)
        sums = torch.zeros_like(weights)
        for k in range(MIXED):
            found, there = lines.find(old[:, k].to(position.device)[position], lines.other[block])
            share = factor[:, k].to(position.device)[position] * there
            sums += lines.blocks[found, old[:, k].to(position.device)[position] % b] * share.unsqueeze(1)
        weights = _unit_lines(sums, position, n) + DISTURBANCE * _unit_lines(weights, position, n)
    if given is not None:
        towards, which = given
        padded = torch.nn.functional.pad(towards, (0, lines.others * b - towards.shape[1])).to(weights)
        chosen = padded.reshape(len(padded), lines.others, b)[which.to(position.device)[position], lines.other[block]]
        weights = torch.where(_by_line(chosen.square().sum(1), position, n) > 0, chosen, weights)
    weights = weights * lines.inside.to(position.device).reshape(-1, b)[lines.other[block]]
    follower = torch.full_like(source, -1)
    follower[source[source >= 0]] = (source >= 0).nonzero().flatten()
    after = follower[position]
    weights[(after >= 0) & ~lines.find(after.clamp(min=0), lines.other[block])[1]] = 0.0  # its mirror has no such block
    lines.blocks[block, offset] = (norm * _unit_lines(weights, position, n)).to(lines.blocks)


def _unit_lines(t: Tensor, position: Tensor, n: int) -> Tensor:
    """[entries, b] of norm 1 over all entries of the same position."""
    size = _by_line(t.square().sum(1), position, n).sqrt()
    return t / size.clamp(min=torch.finfo(torch.float64).tiny)


def _by_line(t: Tensor, position: Tensor, n: int) -> Tensor:
    """[entries, 1]: the sum of ``t`` over the entries of the same position."""
    return torch.zeros(n, dtype=t.dtype, device=t.device).index_add_(0, position, t)[position].unsqueeze(1)


def fill_following(lines: Lines, sign: float, heard: Tensor) -> None:
    """New lines with a twin or parent become ``sign`` times it; ``heard``: bool by position, the others stay zero."""
    block, offset, position = lines.entries()
    source = lines.axis.source.to(position.device)[position]
    follows = (source >= 0) & heard.to(position.device)[position]
    block, offset, source = block[follows], offset[follows], source[follows]
    if len(block):
        found, there = lines.find(source, lines.other[block])
        copied = lines.blocks[found, source % lines.blocks.shape[1]] * there.unsqueeze(1)
        lines.blocks[block, offset] = sign * copied


def share_out(lines: Lines, children: Tensor, draw: torch.Generator) -> None:
    """New lines take part of the weights of their parents: about an equal share, each element another one.

    ``children``: int64 by position: how many new ones share with the same parent.
    """
    block, offset, position = lines.entries()
    source = lines.axis.source.to(position.device)[position]
    follows = source >= 0
    block, offset, source, position = block[follows], offset[follows], source[follows], position[follows]
    if not len(block):
        return
    b = lines.blocks.shape[1]
    found, there = lines.find(source, lines.other[block])
    share = uneven_shares((len(block), b), children.to(position.device)[position].unsqueeze(1), draw)
    taken = lines.blocks[found, source % b] * there.unsqueeze(1) * share.to(lines.blocks)
    lines.blocks[block, offset] = taken
    lines.blocks.index_put_((found[there], source[there] % b), -taken[there], accumulate=True)


def uneven_shares(shape: tuple[int, ...], children: Tensor, draw: torch.Generator) -> Tensor:
    """float64: about 1 / (children + 1), each a little more or less, so that copies do not stay equal."""
    noise = torch.rand(shape, generator=draw, dtype=torch.float64).to(children.device)
    return (1.0 + UNEVEN * (2.0 * noise - 1.0)) / (children + 1)
