"""What must hold of one layer after one rewire, told from the layer before and after and from what the update says.

Everything here is computed from dense tables of the two moments and from torch's own optimizers, not with the functions
that rewire.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from sparsenet.elements import NM
from sparsenet.layers import SparseLinear
from sparsenet.policies.exchange import LayerUpdate
from sparsenet.testing.snapshots import LayerSnapshot, is_by_block

__all__ = ["Rewire", "check_masked", "check_rewire", "new_block_state"]


@dataclass(frozen=True)
class Rewire:
    """One rewire of one layer.

    Attributes:
        name: of the layer; step: of the Sparsifier.
        before, after: the layer; update: what the Sparsifier says.
        fraction: the policy's drop fraction. young: places that must not leave unless the density wants it.
        adjusted: what ``adjust`` returned for the units before, if anything. named_fewer: whether ``grow_places``
            returned fewer places than it was asked for.
        drop_scores: of the units before. grow_scores: by place, of those that were scored.
    """

    name: str
    step: int
    layer: SparseLinear
    before: LayerSnapshot
    after: LayerSnapshot
    update: LayerUpdate
    fraction: float
    young: Tensor
    adjusted: Tensor | None = None
    named_fewer: bool = False
    drop_scores: Tensor | None = None
    grow_scores: Mapping[int, float] = field(default_factory=dict)

    def require(self, holds: bool | Tensor, what: str) -> None:
        """AssertionError with the layer and the step."""
        if not bool(holds):
            raise AssertionError(f"{what} (step {self.step}, layer {self.name!r})")

    @property
    def keeps_groups(self) -> bool:
        """Whether units are elements that change places inside groups."""
        return self.before.by_elements and isinstance(self.layer.elements, NM)

    @cached_property
    def dropped(self) -> Tensor:
        """Bool [rows, columns] of units: were there and are not."""
        return self.before.units & ~self.after.units

    @cached_property
    def grown(self) -> Tensor:
        """Bool [rows, columns] of units: are there and were not."""
        return self.after.units & ~self.before.units

    @cached_property
    def numbers(self) -> tuple[int, int]:
        """Units before and after."""
        return int(self.before.units.sum()), int(self.after.units.sum())


def check_rewire(rewire: Rewire, first_states: Sequence[dict[str, Tensor]]) -> None:
    """Raises AssertionError for the first property that does not hold.

    Args:
        rewire: what happened.
        first_states: for each optimizer, the state [1, ...] of a new block by name.
    """
    _check_places(rewire)
    _check_counts(rewire)
    _check_coverage(rewire)
    if not (rewire.keeps_groups or rewire.named_fewer or rewire.update.skipped):
        _check_leaving(rewire)
        _check_entering(rewire)
    _check_parameter(rewire)
    _check_values(rewire)
    for first, before, after in zip(first_states, rewire.before.states, rewire.after.states, strict=True):
        _check_state(rewire, first, before, after)


def _check_places(r: Rewire) -> None:
    """The update names exactly the places that left and that came."""
    units = r.before.units
    for which, said, found in (
        ("dropped", r.update.dropped_places, r.dropped),
        ("grown", r.update.grown_places, r.grown),
    ):
        inside = bool(((said >= 0) & (said < units.numel())).all())
        r.require(inside and bool((said[1:] > said[:-1]).all()), f"{which} places must ascend inside the layer")
        was = units.flatten()[said]
        if which == "dropped":
            r.require(was.all(), f"dropped places must have been active, got {int((~was).sum())} that were not")
        else:
            r.require(~was.any(), f"grown places must have been inactive, got {int(was.sum())} that were active")
        expected = found.flatten().nonzero().flatten()
        r.require(
            torch.equal(said.cpu(), expected),
            f"the update must name the places that were {which}, got {len(said)} where {len(expected)} were",
        )
    outside = int((r.grown & ~r.before.stored).sum()) if r.before.by_elements else 0
    r.require(not outside, f"elements must grow inside stored blocks, got {outside} outside")
    blocks, density = r.after.pattern.num_blocks, r.numbers[1] / max(units.numel(), 1)
    r.require(
        r.update.num_blocks == blocks and abs(r.update.density - density) < 1e-9,
        f"the update must say {blocks} blocks and density {density:.6g}, got {r.update.num_blocks} and "
        f"{r.update.density:.6g}",
    )


def _check_counts(r: Rewire) -> None:
    """Exactly the share of the units is exchanged that the drop fraction asks for, but for what the update says."""
    now, after = r.numbers
    left, came, u = int(r.dropped.sum()), int(r.grown.sum()), r.update
    if u.skipped:
        r.require(not left and not came, f"a skipped layer must stay as it is, got -{left} +{came}")
        return
    most = int(r.before.stored.sum()) if r.before.by_elements else r.before.units.numel()
    asked, free = round(r.fraction * min(now, after)), most - now
    exchanged = max(0, min(asked, free - max(0, after - now)))
    leave, enter = exchanged + max(0, now - after), exchanged + max(0, after - now)
    if not r.named_fewer:
        r.require(
            left + u.held == leave and came + u.held == enter,
            f"drop_fraction {r.fraction:.4g} of {now} units, {after} afterwards, must drop {leave} and grow {enter} "
            f"less those held, got {left} and {came} with {u.held} held",
        )
        r.require(u.clamped == asked - exchanged, f"clamped must be {asked - exchanged}, got {u.clamped}")
    if after >= now:
        young = int(r.dropped.flatten()[r.young].sum())
        r.require(not young, f"units that are too young must stay, got {young} that left")


def _check_coverage(r: Rewire) -> None:
    """No row or column of units loses its last one while there are enough of them.

    While the count falls below rows + columns, those that are left can all be the last of a row or a column: then the
    density decides.
    """
    now, after = r.numbers
    rows, cols = r.before.units.shape
    if after < now and after < rows + cols:
        return
    for which, axis, lines in (("row", 1, rows), ("column", 0, cols)):
        if after < lines:
            continue
        lost = int((r.before.units.any(axis) & ~r.after.units.any(axis)).sum())
        r.require(not lost, f"the last unit of a {which} must stay while {after} are left, got {lost} {which}s without")


def _check_leaving(r: Rewire) -> None:
    """Those of the lowest scores leave, but for the young and for the last of a row or column; no others are held."""
    rows, cols = r.before.units.shape
    stays, after = r.before.units & ~r.dropped, r.numbers[1]
    may_leave = stays.clone()
    may_leave.view(-1)[r.young] = False
    if after >= rows:
        may_leave &= stays.sum(1, keepdim=True) > 1
    if after >= cols:
        may_leave &= stays.sum(0, keepdim=True) > 1
    r.require(not r.update.held or not may_leave.any(), f"{int(may_leave.sum())} units may leave, got some held")
    if r.drop_scores is None or not r.dropped.any():
        return
    scores = torch.full(r.before.units.shape, torch.inf)
    scores[r.before.units] = r.drop_scores
    lower = int((may_leave & (scores < scores[r.dropped].max())).sum())
    r.require(not lower, f"units of the lowest drop scores must leave, got {lower} lower ones that stay")


def _check_entering(r: Rewire) -> None:
    """Those of the highest scores come."""
    if not r.grow_scores or not r.grown.any():
        return
    scores = torch.full((r.before.units.numel(),), -torch.inf)
    scores[torch.tensor(list(r.grow_scores))] = torch.tensor(list(r.grow_scores.values()))
    grown = r.grown.flatten()
    higher = int((~grown & (scores > scores[grown].min())).sum())
    r.require(not higher, f"units of the highest grow scores must come, got {higher} higher ones that do not")


def _check_parameter(r: Rewire) -> None:
    r.require(r.after.parameter is r.before.parameter, "values must stay the same Parameter, got another")
    changed = bool((r.dropped | r.grown).any())
    r.require(not (changed and r.after.has_gradient), "values.grad must be None after a rewire, got a gradient")
    r.require(changed or r.after.has_gradient == r.before.has_gradient, "a layer that stays must keep its gradient")
    shape = (r.after.pattern.num_blocks, r.before.pattern.block_size, r.before.pattern.block_size)
    r.require(tuple(r.after.values.shape) == shape, f"values must be {list(shape)}, got {list(r.after.values.shape)}")


def _check_values(r: Rewire) -> None:
    """What stays is bit for bit what it was, or what ``adjust`` made of it; what came is zero."""
    before, after = r.before.dense(r.before.values), r.after.dense(r.after.values)
    stays, came = (_elements(r, units) for units in (r.before.units & r.after.units, r.grown))
    if r.adjusted is not None:
        before = r.before.dense(_blocks_of_adjusted(r)).to(before)
    wrong = stays & (before != after)
    what = "what adjust returned" if r.adjusted is not None else "bit for bit what they were"
    r.require(~wrong.any(), f"values of units that stay must be {what}, got {int(wrong.sum())} others")
    wrong = came & (after != 0)
    r.require(~wrong.any(), f"values of grown units must be zero, got {int(wrong.sum())} others")


def _blocks_of_adjusted(r: Rewire) -> Tensor:
    """[num_blocks, b, b] of what ``adjust`` returned, which is [active, 1, 1] where units are elements."""
    if not r.before.by_elements:
        return r.adjusted
    dense = torch.zeros(r.before.units.shape)
    dense[r.before.units] = r.adjusted.flatten().to(dense)
    p, b = r.before.pattern, r.before.pattern.block_size
    padded = nn.functional.pad(dense, (0, -dense.shape[1] % b, 0, -dense.shape[0] % b))
    blocks = padded.view(p.block_rows, b, p.block_cols, b).permute(0, 2, 1, 3).reshape(-1, b, b)
    return blocks[r.before.block_places]


def _elements(r: Rewire, units: Tensor) -> Tensor:
    """Bool [out, in] of the elements in units [rows, columns]."""
    if r.before.by_elements:
        return units
    b, (out_features, in_features) = r.before.pattern.block_size, r.before.pattern.shape
    return units.repeat_interleave(b, 0).repeat_interleave(b, 1)[:out_features, :in_features]


# --- the optimizer's state ---


def _check_state(r: Rewire, first: dict[str, Tensor], before: dict[str, Any], after: dict[str, Any]) -> None:
    r.require(before.keys() == after.keys(), f"state must keep its names {sorted(before)}, got {sorted(after)}")
    for key, old in before.items():
        new = after[key]
        if not is_by_block(old, r.before.pattern.num_blocks):
            same = torch.equal(old, new) if isinstance(old, Tensor) else old == new
            r.require(same, f"state {key!r} is of no block and must stay {old}, got {new}")
            continue
        expected = (r.after.pattern.num_blocks, *old.shape[1:])
        r.require(tuple(new.shape) == expected, f"state {key!r} must be {list(expected)}, got {list(new.shape)}")
        _check_moments(r, key, first.get(key), old, new)


def _check_moments(r: Rewire, key: str, first: Tensor | None, old: Tensor, new: Tensor) -> None:
    """Of blocks that stay, and of elements that stay in them, bit for bit; of others what a new one has."""
    carried = torch.isin(r.after.block_places, r.before.block_places)
    here, was = new[carried], r.before.by_place(old)[r.after.block_places[carried]]
    changed = torch.zeros_like(here, dtype=torch.bool)
    if r.before.mask is not None and new.shape == r.after.values.shape:
        places = r.after.block_places[carried]
        changed = r.after.active[carried] ^ r.before.by_place(r.before.active)[places]
    wrong = (here != was) & ~changed & ~(here.isnan() & was.isnan())
    r.require(~wrong.any(), f"state {key!r} of units that stay must be what it was, got {int(wrong.sum())} others")
    first = torch.zeros_like(old[:1]) if first is None else first.to(old)
    fresh, one = new[~carried], first.flatten()[0] if first.numel() else torch.tensor(0.0)
    wrong = int((fresh != first).sum()) + int((here[changed] != one).sum())
    got = torch.cat([fresh.flatten(), here[changed]])
    r.require(
        not wrong,
        f"state {key!r} of grown units must be what the optimizer gives a new parameter, {float(one):.4g}, got "
        f"{float(got.abs().max()) if got.numel() else 0.0:.4g} as the largest of {wrong} others",
    )


# --- element masks ---


def check_masked(layer: SparseLinear, name: str, step: int, now: LayerSnapshot) -> None:
    """Raises AssertionError where a masked element is other than zero, or a mask does not keep its rule."""
    wrong = int((now.values[~now.active] != 0).sum())
    if wrong:
        raise AssertionError(f"masked elements must be exactly zero, got {wrong} others (step {step}, layer {name!r})")
    if now.mask is None or layer.elements is None:
        return
    n, m = layer.elements.n, layer.elements.m
    inside, stored = (now.dense(t) for t in (now.active, torch.ones_like(now.values, dtype=torch.bool)))
    groups = [nn.functional.pad(t.float(), (0, -t.shape[1] % m)).view(len(t), -1, m).sum(2) for t in (inside, stored)]
    wrong = int((groups[0] != groups[1].clamp(max=n)).sum())
    if wrong:
        raise AssertionError(
            f"every {m} elements must have {n} active, got {wrong} groups with others (step {step}, layer {name!r})"
        )


def new_block_state(make_optimizer: Callable, layer: SparseLinear) -> dict[str, Tensor]:
    """An optimizer's state [1, ...] of a new block, after one step in which it had no gradient."""
    block = nn.Parameter(torch.zeros(1, *layer.values.shape[1:], dtype=layer.values.dtype))
    block.grad = torch.zeros_like(block)
    optimizer = make_optimizer([block])
    optimizer.step()
    return dict(optimizer.state.get(block, {}))
