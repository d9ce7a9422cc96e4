"""Optimizer state that follows its blocks: one rule for every optimizer, and no list of known ones.

An optimizer keeps, for each parameter, tensors with one entry per block, which follow their blocks, and others, which
are left alone. What it keeps elsewhere, or in a form that does not say which block it belongs to, is refused by name:
training on moments of other places would be wrong without a sign.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsenet.functional.blocks import take_blocks
from sparsenet.layers import SparseLinear
from sparsenet.pattern import BlockPattern, carried_from
from sparsenet.schedules import number_of

__all__ = [
    "LayerMove",
    "StatesOfLayers",
    "as_optimizers",
    "carry_state",
    "check_followable",
    "first_state",
    "scratch_twin",
    "state_by_block",
    "state_bytes",
    "with_inner_optimizers",
]

_GROWN_SHARES = {"zero": 0.0, "mean": 1.0}

_REFUSED = {
    "LBFGS": "it keeps a history of whole steps, which no rewire can mend; take one that keeps state per weight",
    "ZeroRedundancyOptimizer": "its state is sharded over the ranks; give each rank a plain optimizer",
}


def as_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """None, one or several as a tuple.

    Example:
        >>> import torch
        >>> from sparsenet.optimizer_state import as_optimizers
        >>> len(as_optimizers(None)), len(as_optimizers(torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])))
        (0, 1)
    """
    if optimizer is None:
        return ()
    return tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)


def with_inner_optimizers(optimizers: Sequence[Optimizer]) -> tuple[Optimizer, ...]:
    """``optimizers`` and those that they hold as attributes, as wrappers such as sharpness-aware minimisation do.

    Raises:
        TypeError: something that is no ``torch.optim.Optimizer``. ValueError: one whose state cannot follow.

    Example:
        >>> import torch
        >>> from sparsenet.optimizer_state import with_inner_optimizers
        >>> inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
        >>> outer = torch.optim.SGD(inner.param_groups)
        >>> outer.base_optimizer = inner
        >>> len(with_inner_optimizers([outer]))
        2
    """
    found: list[Optimizer] = []
    waiting = list(optimizers)
    while waiting:
        optimizer = waiting.pop(0)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"Sparsifier: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if any(optimizer is known for known in found):
            continue
        for kind in type(optimizer).__mro__:
            if kind.__name__ in _REFUSED:
                raise ValueError(f"Sparsifier: optimizer must not be {kind.__name__}: {_REFUSED[kind.__name__]}")
        found.append(optimizer)
        waiting += [value for _, value in _leaves(_own_attributes(optimizer)) if isinstance(value, Optimizer)]
    return tuple(found)


def _own_attributes(optimizer: Optimizer) -> dict[str, Any]:
    return {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups", "defaults")}


def _leaves(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """What dicts, lists and tuples hold, a few levels deep, with the name of where it stands."""
    if isinstance(value, Mapping) and depth < 4:
        for key, inner in value.items():
            yield from _leaves(inner, name or (key if isinstance(key, str) else ""), depth + 1)
    elif isinstance(value, (list, tuple)) and depth < 4:
        for inner in value:
            yield from _leaves(inner, name, depth + 1)
    else:
        yield name, value


def holds(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether ``parameter`` is in one of the optimizer's groups."""
    return _group_of(optimizer, parameter) is not None


def _group_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any] | None:
    for group in optimizer.param_groups:
        if any(p is parameter for p in group["params"]):
            return group
    return None


def check_followable(optimizer: Optimizer, parameter: nn.Parameter, layer: str, blocks: int) -> None:
    """Refuses state of ``parameter``, of which there are ``blocks`` blocks, that a rewire could not carry along.

    Raises:
        RuntimeError: it is kept outside ``optimizer.state``, within a list, flattened, or with blocks on two sides.

    Example:
        >>> import torch
        >>> from sparsenet.optimizer_state import check_followable
        >>> values = torch.nn.Parameter(torch.randn(3, 4, 4))
        >>> optimizer = torch.optim.SGD([values])
        >>> optimizer.state[values]["history"] = [torch.zeros(3, 4, 4)]
        >>> check_followable(optimizer, values, "0", blocks=3)   # doctest: +ELLIPSIS
        Traceback (most recent call last):
        RuntimeError: Sparsifier: state 'history' of layer 0 in SGD cannot follow its blocks: ...
    """
    size = parameter[:1].numel()  # of one block

    def refuse(name: str, why: str) -> None:
        kind = type(optimizer).__name__
        raise RuntimeError(f"Sparsifier: state {name!r} of layer {layer} in {kind} cannot follow its blocks: {why}")

    def by_block(tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and blocks > 1 and tensor.dim() > 1 and tensor.shape[0] == blocks

    for name, value in _leaves(_own_attributes(optimizer)):
        if by_block(value) and not isinstance(value, nn.Parameter) and value.shape[1:] == parameter.shape[1:]:
            refuse(name, "it is kept outside optimizer.state")
    for name, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, (list, tuple, dict)):
            if any(by_block(inner) for _, inner in _leaves(value)):
                refuse(name, "it is inside a list or dict")
        elif not isinstance(value, Tensor) or not value.dim():
            continue
        elif value.shape[0] != blocks and blocks > 1 and value.numel() >= blocks * size:
            refuse(name, f"its shape is {list(value.shape)}, where the first size would be the {blocks} blocks")
        elif by_block(value) and blocks in value.shape[1:] and blocks not in parameter.shape[1:]:
            refuse(name, f"its shape {list(value.shape)} has blocks on two sides")


def state_by_block(
    optimizer: Optimizer | None, parameter: nn.Parameter, blocks: int | None = None
) -> dict[str, Tensor]:
    """The state tensors of ``parameter`` that have one entry per block: those whose first size is the number of blocks.

    Scalars such as ``step`` are not among them. With a single block a one-dimensional tensor could be either; it is
    taken for a scalar. ``blocks``: how many there are; default the first size of ``parameter``.

    Example:
        >>> import torch
        >>> from sparsenet.optimizer_state import state_by_block
        >>> values = torch.nn.Parameter(torch.randn(3, 4, 4))
        >>> optimizer = torch.optim.AdamW([values])
        >>> values.sum().backward()
        >>> optimizer.step()
        >>> sorted(state_by_block(optimizer, values))   # its ``step`` is a scalar
        ['exp_avg', 'exp_avg_sq']
    """
    if optimizer is None or parameter not in optimizer.state:
        return {}
    blocks = parameter.shape[0] if blocks is None else blocks
    return {
        key: value
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
        and value.dim() > 0
        and value.shape[0] == blocks
        and (value.dim() > 1 or blocks > 1)
    }


def first_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """What the optimizer gives a new block: the state of a scratch parameter after one step with a zero gradient.

    Zero for moments; a step size starts at the learning rate, an accumulator at its initial value. The scratch
    parameter belongs to a new optimizer of the same kind and options; where none can be made, the result is empty, and
    grown blocks start at zero.

    Returns:
        Tensors [1, ...] by the names of the state.

    Example:
        >>> import torch
        >>> from sparsenet.optimizer_state import first_state
        >>> values = torch.nn.Parameter(torch.randn(3, 4, 4))
        >>> first_state(torch.optim.Rprop([values], lr=0.5), values)["step_size"].unique()
        tensor([0.5000])
    """
    like = (_options(optimizer, parameter), parameter.shape[1:], parameter.dtype, parameter.device)
    known = _first_states.setdefault(optimizer, [])
    for options, state in known:
        if like[0] is not None and options == like:
            return state
    twin, scratch = scratch_twin(optimizer, parameter, 1)
    state = {} if twin is None else twin.state.get(scratch, {})
    first = {key: t for key, t in state.items() if isinstance(t, Tensor) and t.dim() and len(t) == 1}
    known[:] = [(like, first), *known[:_FIRST_STATES_KEPT]]
    return first


# What optimizers gave scratch parameters of some kinds: making one takes longer than moving a small layer.
_first_states: weakref.WeakKeyDictionary[Optimizer, list[tuple[Any, dict[str, Tensor]]]] = weakref.WeakKeyDictionary()
_FIRST_STATES_KEPT = 8


def _options(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any] | None:
    """The options of the parameter's group; None where they cannot be compared."""
    group = _group_of(optimizer, parameter) or {}
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    plain = (bool, int, float, str, type(None))
    simple = all(
        isinstance(v, plain) or (isinstance(v, tuple) and all(isinstance(p, plain) for p in v))
        for v in options.values()
    )
    return options if simple else None


def scratch_twin(optimizer: Optimizer, parameter: nn.Parameter, rows: int) -> tuple[Optimizer | None, nn.Parameter]:
    """A new optimizer of the same kind and options after one step with a zero gradient, and the parameter it holds.

    Args:
        rows: first size of its parameter, which otherwise is as ``parameter``; one without dimensions stays so.

    Returns:
        The twin, or None where none can be made so: a wrapper, an optimizer that wants more for a step.

    Example:
        >>> import torch
        >>> from sparsenet.optimizer_state import scratch_twin
        >>> values = torch.nn.Parameter(torch.randn(3, 4, 4))
        >>> twin, scratch = scratch_twin(torch.optim.Adam([values]), values, rows=2)
        >>> twin.state[scratch]["exp_avg"].shape
        torch.Size([2, 4, 4])
    """
    scratch = nn.Parameter(parameter.detach().new_zeros((rows, *parameter.shape[1:]) if parameter.dim() else ()))
    group = _group_of(optimizer, parameter)
    if group is None or any(isinstance(value, Optimizer) for _, value in _leaves(_own_attributes(optimizer))):
        return None, scratch  # a wrapper: what it would step is the real optimizer
    scratch.grad = torch.zeros_like(scratch)
    options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
    kind = type(optimizer)
    try:
        accepted = inspect.signature(kind).parameters
        defaults = {key: value for key, value in optimizer.defaults.items() if key in accepted}
        twin = kind([{**options, "params": [scratch]}], **defaults)
        with torch.no_grad():
            twin.step()
    except Exception:  # an optimizer that cannot be made so, or wants more for a step
        return None, scratch
    return twin, scratch


def state_bytes(optimizers: Sequence[Optimizer], parameter: nn.Parameter) -> tuple[int, int]:
    """Bytes that the optimizers keep for ``parameter``: those that grow with its first size, per entry, and the others.

    Before an optimizer's first step it is what a scratch twin keeps; 0 where none can be made.

    Example:
        >>> import torch
        >>> from sparsenet.optimizer_state import state_bytes
        >>> values = torch.nn.Parameter(torch.randn(3, 4, 4))
        >>> state_bytes([torch.optim.Adam([values])], values)   # two moments of 4 x 4 float32, and ``step``
        (128, 4)
    """
    entries, seen = parameter.shape[0] if parameter.dim() else 1, set()
    per_entry = fixed = 0
    for optimizer in optimizers:
        state = optimizer.state.get(parameter)
        if not state:
            one, two = (_tensor_bytes(scratch_twin(optimizer, parameter, rows)) for rows in (1, 2))
            per_entry, fixed = per_entry + two - one, fixed + 2 * one - two
            continue
        for _, tensor in _leaves(state):
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                grows = tensor.dim() > 0 and entries > 0 and tensor.shape[0] == entries and tensor.numel() > 1
                per_entry += tensor.nbytes // entries if grows else 0
                fixed += 0 if grows else tensor.nbytes
    return per_entry, fixed


def _tensor_bytes(twin: tuple[Optimizer | None, nn.Parameter]) -> int:
    state = {} if twin[0] is None else twin[0].state.get(twin[1], {})
    return sum(tensor.nbytes for _, tensor in _leaves(state) if isinstance(tensor, Tensor))


def carry_state(blocks: Tensor, carried: Tensor, grown: str | float | Tensor = "zero") -> Tensor:
    """One state tensor after a rewire.

    Args:
        blocks: [old blocks, ...].
        carried: int64 [new blocks], the old number of each new block or -1.
        grown: what grown blocks start with: ``zero``, ``mean`` over the blocks that stayed, a number (that share of the
            mean), or a tensor [1, ...].

    Returns:
        [new blocks, ...]; blocks that stayed are bit for bit what they were.

    Example:
        >>> import torch
        >>> from sparsenet.optimizer_state import carry_state
        >>> moments = torch.tensor([[1.0], [2.0], [3.0]])
        >>> carry_state(moments, torch.tensor([2, -1, 0])).flatten()
        tensor([3., 0., 1.])
        >>> carry_state(moments, torch.tensor([2, -1, 0]), grown="mean").flatten()
        tensor([3., 2., 1.])
    """
    moved = take_blocks(blocks, carried, 0)
    stays = carried >= 0
    if isinstance(grown, Tensor):
        if grown.shape[1:] == moved.shape[1:] and bool(grown.any()):
            moved[~stays] = grown.to(moved)
    elif (share := _GROWN_SHARES.get(grown, grown)) and stays.any() and not stays.all():
        moved[~stays] = share * moved[stays].mean()
    return moved


def check_grown_state(grown_state: Mapping[str, str | float]) -> dict[str, str | float]:
    """``grown_state`` as a dict of names and Python's own numbers, checked."""
    checked = {}
    for key, how in grown_state.items():
        number = None if isinstance(how, str) else number_of(how)
        if not (how in _GROWN_SHARES if isinstance(how, str) else number is not None and 0 <= number < math.inf):
            known = f"{' or '.join(_GROWN_SHARES)} or a share of the mean"
            raise ValueError(f"Sparsifier: grown_state[{key!r}] must be {known}, got {how!r}")
        checked[key] = how if number is None else number
    return checked


class LayerMove:
    """One layer and its state in all optimizers moved to a new pattern; can be taken back.

    ``values`` [old num_blocks, b, b]: what the blocks that stay become; default: what they are. ``element_mask`` bool
    [new num_blocks, b, b]: of the new pattern; elements that come or go begin as new ones, in values and state.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.optimizer_state import LayerMove
        >>> layer = sn.SparseLinear(64, 64, density=0.5, block_size=16)
        >>> before, other = layer.pattern, sn.BlockPattern.random((64, 64), 0.25, 16)
        >>> move = LayerMove(layer, [torch.optim.Adam(layer.parameters())], other, {})
        >>> moved = layer.pattern == other
        >>> move.undo()
        >>> moved, layer.pattern == before
        (True, True)
    """

    def __init__(
        self,
        layer: SparseLinear,
        optimizers: Sequence[Optimizer],
        pattern: BlockPattern,
        grown_state: Mapping[str, str | float],
        values: Tensor | None = None,
        element_mask: Tensor | None = None,
    ):
        self.layer = layer
        self.old_pattern, self.old_mask = layer.pattern, layer.element_mask
        self.carried = carried_from(layer.pattern, pattern)
        leaves = torch.ones(layer.pattern.num_blocks, dtype=torch.bool, device=self.carried.device)
        leaves[self.carried[self.carried >= 0]] = False
        self.left = leaves.nonzero().flatten()
        self.left_values = layer.values.detach().index_select(0, self.left)
        self.old_values = None if values is None else layer.values.detach().clone()
        states = [(o, state) for o in optimizers if (state := state_by_block(o, layer.values))]
        self.optimizers = [optimizer for optimizer, _ in states]
        self.left_state = [{k: t.index_select(0, self.left) for k, t in state.items()} for _, state in states]
        moved = [carried_state(o, layer.values, state, self.carried, grown_state) for o, state in states]
        values = None if values is None else take_blocks(values.to(layer.values), self.carried, 0.0)
        self._set_elements(element_mask, moved, grown_state)
        layer.set_pattern(pattern, values, element_mask)  # nothing below can fail
        for optimizer, state in zip(self.optimizers, moved, strict=True):
            optimizer.state[layer.values].update(state)

    def _set_elements(
        self, mask: Tensor | None, moved: Sequence[dict[str, Tensor]], grown_state: Mapping[str, str | float]
    ) -> None:
        """Lets the state of elements that come or go in blocks that stay begin anew, and remembers what it was."""
        self.changed, self.changed_values, self.changed_state = None, None, []
        if mask is None or self.old_mask is None:
            return
        changed = mask ^ take_blocks(self.old_mask, self.carried, False)
        changed &= (self.carried >= 0).view(-1, 1, 1)
        self.changed = changed.flatten().nonzero().flatten()
        block, inside = self.carried[self.changed // changed[0].numel()], self.changed % changed[0].numel()
        self.changed_values = self.layer.values.detach().flatten(1)[block, inside]
        for optimizer, state in zip(self.optimizers, moved, strict=True):
            first = first_state(optimizer, self.layer.values) if state.keys() - grown_state.keys() else {}
            whole = {key: t.view(-1) for key, t in state.items() if t.shape == changed.shape}
            self.changed_state.append({key: t[self.changed] for key, t in whole.items()})
            for key, tensor in whole.items():
                begin = grown_state.get(key, first.get(key, "zero"))
                if isinstance(begin, Tensor):
                    tensor[self.changed] = begin.to(tensor).flatten()[0] if begin.numel() else 0.0
                else:
                    share = _GROWN_SHARES.get(begin, begin)
                    stays = (mask & ~changed).flatten()
                    tensor[self.changed] = share * tensor[stays].mean() if share and bool(stays.any()) else 0.0

    def undo(self) -> None:
        """Puts the old pattern, values and state back, bit for bit."""
        back = torch.full((self.old_pattern.num_blocks,), -1, dtype=torch.int64, device=self.carried.device)
        stays = self.carried >= 0
        back[self.carried[stays]] = stays.nonzero().flatten()
        values = self.layer.values.detach().clone()
        if self.changed is not None:
            values.view(-1)[self.changed] = self.changed_values
            for optimizer, before in zip(self.optimizers, self.changed_state, strict=True):
                for key, was in before.items():
                    optimizer.state[self.layer.values][key].view(-1)[self.changed] = was
        values = take_blocks(values, back, 0)
        values[self.left] = self.left_values
        values = values if self.old_values is None else self.old_values
        states = []
        for optimizer, left in zip(self.optimizers, self.left_state, strict=True):
            now = optimizer.state[self.layer.values]
            states.append({key: take_blocks(now[key], back, 0) for key in left})
            for key, tensor in states[-1].items():
                tensor[self.left] = left[key]
        self.layer.set_pattern(self.old_pattern, values, self.old_mask)
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.state[self.layer.values].update(state)


def carried_state(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    state: Mapping[str, Tensor],
    carried: Tensor,
    grown_state: Mapping[str, str | float],
) -> dict[str, Tensor]:
    """``state``, all of one parameter's, after a rewire; see :func:`carry_state`."""
    first = first_state(optimizer, parameter) if state.keys() - grown_state.keys() and bool((carried < 0).any()) else {}
    return {
        key: carry_state(tensor, carried, grown_state.get(key, first.get(key, "zero"))) for key, tensor in state.items()
    }


class StatesOfLayers:
    """Keeps the optimizers' state with its blocks when somebody else replaces a layer's pattern.

    Whoever loads an earlier state of the model, or sets a pattern by hand, changes what the optimizer's tensors stand
    for. Before the optimizer's next step they are carried along: unless they too have been replaced or written to since
    its last step, as by ``optimizer.load_state_dict``.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.optimizer_state import StatesOfLayers
        >>> layer = sn.SparseLinear(64, 64, density=0.5, block_size=16)
        >>> optimizer = torch.optim.Adam(layer.parameters())
        >>> states = StatesOfLayers([optimizer], {"layer": layer}, {})
        >>> layer(torch.randn(3, 64)).sum().backward()
        >>> optimizer.step()
        >>> _ = layer.set_pattern(sn.BlockPattern.random((64, 64), 0.25, 16))
        >>> states.follow()
        >>> optimizer.state[layer.values]["exp_avg"].shape == layer.values.shape
        True
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        layers: Mapping[str, SparseLinear],
        grown_state: Mapping[str, str | float],
    ):
        self.optimizers, self.layers, self.grown_state = tuple(optimizers), dict(layers), grown_state
        self.patterns: dict[str, BlockPattern] = {}
        self.marks: dict[tuple[int, str], Mark] = {}
        self._steps: dict[Optimizer, Tensor | None] = {}  # that were made, each with a GradScaler's ``found_inf``
        self._seen: set[Optimizer] = set()  # those that ever made one
        self.mark()
        this = weakref.ref(self)  # the optimizers' hooks keep nothing alive

        def before(*_) -> None:
            if (states := this()) is not None:
                states.follow()

        def after(optimizer: Optimizer, *_) -> None:
            if (states := this()) is not None:
                states.mark()
                states._steps[optimizer] = getattr(optimizer, "found_inf", None)

        for optimizer in self.optimizers:
            if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
                continue  # a wrapper that only stands for the optimizer inside it, which is here too
            for handle in (optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)):
                weakref.finalize(self, handle.remove)

    def mark(self) -> None:
        """Everything belongs together now."""
        for name, layer in self.layers.items():
            self.patterns[name] = layer.pattern
            for number, optimizer in enumerate(self.optimizers):
                self.marks[number, name] = _mark(optimizer, layer.values)

    def without_step(self) -> frozenset[str]:
        """Layers whose values no optimizer has stepped since the last call; their gradients count for nothing new.

        A GradScaler calls no optimizer where gradients are not finite; a fused one it calls all the same, and tells it
        by ``found_inf``: gradients are then left as they are, loss scale and all. Of an optimizer that was never seen
        to step only the gradients tell.
        """
        steps, self._steps = self._steps, {}
        self._seen.update(steps)
        made = {
            o: (steps[o] is None or not bool(steps[o])) if o in steps else o not in self._seen and _all_finite(o)
            for o in self.optimizers
        }
        if all(made.values()):
            return frozenset()
        holders = {name: [o for o in self.optimizers if holds(o, layer.values)] for name, layer in self.layers.items()}
        return frozenset(name for name, found in holders.items() if found and not any(made[o] for o in found))

    @torch.no_grad()
    def follow(self) -> None:
        """Carries along the state of layers whose pattern was replaced since the last mark.

        Raises:
            RuntimeError: a layer has state that cannot follow.
        """
        for name, layer in self.layers.items():
            old = self.patterns[name]
            if layer.pattern is old:
                continue
            for number, optimizer in enumerate(self.optimizers):
                if old == layer.pattern or not _is_as_marked(self.marks[number, name], optimizer, layer.values):
                    continue
                check_followable(optimizer, layer.values, name, old.num_blocks)
                state = state_by_block(optimizer, layer.values, old.num_blocks)
                carried = carried_from(old.to(layer.pattern.device), layer.pattern)
                optimizer.state[layer.values].update(
                    carried_state(optimizer, layer.values, state, carried, self.grown_state)
                )
            self.patterns[name] = layer.pattern
            for number, optimizer in enumerate(self.optimizers):
                self.marks[number, name] = _mark(optimizer, layer.values)


def _all_finite(optimizer: Optimizer) -> bool:
    """Whether all gradients of its parameters are."""
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None)


Mark = dict[str, tuple[weakref.ref, int]]  # by name of the state: the tensor, and how often it was written to


def _mark(optimizer: Optimizer, parameter: nn.Parameter) -> Mark:
    state = optimizer.state.get(parameter) or {}
    return {key: (weakref.ref(t), t._version) for key, t in state.items() if isinstance(t, Tensor) and t.dim()}


def _is_as_marked(mark: Mark, optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether there is state, and none of its tensors was replaced or written to since."""
    state = optimizer.state.get(parameter) or {}
    return bool(mark) and all(
        (t := state.get(key)) is not None and t is reference() and t._version == version
        for key, (reference, version) in mark.items()
    )
