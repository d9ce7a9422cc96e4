"""Holding a budget of bytes while a network trains: how many blocks fit, and letting the lowest-scored go.

What a training step takes is what stays (values, gradients, optimizer state and indices of every block; other
parameters, buffers and averaged copies) and, above it, the larger of two moments: the activations of the forward pass,
as far as one was seen, and a rewire, which has new values and state of one layer beside the old ones and keeps what was
dropped until it has succeeded.
"""

from __future__ import annotations

import itertools
import logging
import math
import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparsenet import distributed, functional
from sparsenet.densities import apportion
from sparsenet.functional.bits import mask_bytes
from sparsenet.layers import SparseLinear
from sparsenet.limits import Limit, MemoryBudget, SavedBytes, format_bytes, process_limit, release_heap
from sparsenet.optimizer_state import state_by_block, state_bytes
from sparsenet.pattern import INDEX_BYTES, BlockPattern, carried_from
from sparsenet.policies.exchange import Quota
from sparsenet.policies.places import BadScores, checked_scores
from sparsenet.policies.policy import Policy, block_squared_norms
from sparsenet.policies.views import View

__all__ = ["Holding"]

logger = logging.getLogger(__name__)

# Per block, of a rewire: places, orders and masks; and per block that it exchanges, its place until it is old enough to
# leave (sparsenet.memory.planning has the same).
_BOOKKEEPING_BYTES, _YOUNG_BYTES = 58, 8
_SHARE_OF_A_TIGHT_LIMIT = 0.75  # what a network that shrinks for the process's limit takes of it, so as to stay

Counts = Mapping[str, int]


@dataclass(frozen=True)
class _Unit:
    """Bytes of one block of a layer: all that stays, its gradient alone, and what is there twice while it is moved."""

    stays: int
    gradient: int
    moved: int


class Holding:
    """The bytes of one model's training step against a budget; see :class:`sparsenet.Sparsifier`.

    Args:
        model: without wrappers.
        layers: those whose blocks come and go, by name.
        followers: averaged copies of each layer.
        copies: the models that the followers belong to.
        budget: of all together.
        seen: what an earlier Holding had seen of activations and scratch memory.
        policy_copies: tensors of the size of the values that the policy keeps.

    Example:
        >>> import torch, sparsenet as sn
        >>> from sparsenet.policies.holding import Holding
        >>> model = sn.SparseMLP([64, 256, 10], density=0.5, block_size=16)
        >>> layers = {"0": model[0], "1": model[1]}
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> holding = Holding(model, layers, [optimizer], {}, (), sn.MemoryBudget("1MiB"))
        >>> holding.fits(holding.counts(), share=0.3), holding.bytes(share=0.3) < 1 << 20
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, SparseLinear],
        optimizers: Sequence[Optimizer],
        followers: Mapping[str, Sequence[SparseLinear]],
        copies: Sequence[nn.Module],
        budget: MemoryBudget,
        seen: Mapping[str, int] | None = None,
        policy_copies: int = 0,
    ):
        self._policy_copies = policy_copies
        self.layers, self.optimizers, self.followers = dict(layers), tuple(optimizers), followers
        self.budget = budget
        self.seen = {"activations": 0, "workspace": 0} | dict(seen or {})
        self._copies = tuple(copies)
        self._model = weakref.ref(model)
        self._left = Limit(1 << 62, "")
        self._tight = math.inf  # the process's limit for which the network last shrank
        self._said = False
        self.measure()
        if not self.seen["activations"]:
            self._watch = model.register_forward_pre_hook(_FirstForward(self), with_kwargs=True)
            weakref.finalize(self, self._watch.remove)

    def check(self) -> Holding:
        """Itself.

        Raises:
            ValueError: the budget is below what the sparsest network takes that reaches every neuron.
        """
        fewest = self.total(self.fewest(), 0.0)
        if fewest > self.budget.bytes:
            raise ValueError(
                f"Sparsifier: budget must be at least {format_bytes(fewest)} for the sparsest network that reaches "
                f"every neuron, got {self.budget}"
            )
        return self

    # --- what it takes ---

    def measure(self) -> None:
        """Asks anew what a block takes in each layer, and what everything else does."""
        self._units = {name: self._unit(name, layer) for name, layer in self.layers.items()}
        values = {id(layer.values) for layer in self.layers.values()}
        values |= {id(copy.values) for name in self.layers for copy in self.followers.get(name, ())}
        model, others, fixed = self._model(), {}, 0
        for module in (model, *self._copies):
            others |= {id(p): p for p in module.parameters() if id(p) not in values}
            fixed += sum(buffer.nbytes for buffer in module.buffers())
            frozen = (m for m in module.modules() if isinstance(m, SparseLinear) and id(m.values) not in values)
            fixed += sum(m.pattern.num_blocks * _index_bytes(m) for m in frozen)
        own = {id(p) for p in model.parameters()}
        for parameter in others.values():
            each, whole = state_bytes(self.optimizers, parameter) if id(parameter) in own else (0, 0)
            trained = parameter.requires_grad and id(parameter) in own
            fixed += parameter.nbytes * (1 + trained) + each * (parameter.shape[0] if parameter.dim() else 1) + whole
        self._fixed = fixed

    def _unit(self, name: str, layer: SparseLinear) -> _Unit:
        block = layer.values.element_size() * layer.block_size**2
        state, _ = state_bytes(self.optimizers, layer.values)
        copies = len(self.followers.get(name, ()))
        stays = (2 + copies + self._policy_copies) * block + state + (1 + copies) * _index_bytes(layer)
        return _Unit(stays, gradient=block, moved=block + state)

    def counts(self) -> dict[str, int]:
        """Blocks of each layer now."""
        return {name: layer.pattern.num_blocks for name, layer in self.layers.items()}

    def fewest(self) -> dict[str, int]:
        """Blocks of each layer in the sparsest network that reaches every neuron; not more than there are."""
        patterns = {name: layer.pattern for name, layer in self.layers.items()}
        return {name: min(p.num_blocks, max(p.block_rows, p.block_cols)) for name, p in patterns.items()}

    def stays(self, counts: Counts) -> int:
        """Bytes of what is there between steps, gradients included."""
        return self._fixed + self.seen["workspace"] + sum(self._units[name].stays * n for name, n in counts.items())

    def room(self, counts: Counts, share: float) -> int:
        """Bytes that a rewire takes beside it which exchanges ``share`` of the blocks, layer after layer."""
        most = beside = 0
        for name, n in counts.items():
            unit = self._units[name]
            beside += math.ceil(share * n) * (unit.moved + _YOUNG_BYTES)
            most = max(most, beside + n * unit.moved)
            beside -= n * unit.gradient
        return most + _BOOKKEEPING_BYTES * sum(counts.values())

    def total(self, counts: Counts, share: float) -> int:
        """Bytes at the peak of a step."""
        return self.stays(counts) + max(self.seen["activations"], self.room(counts, share))

    def bytes(self, share: float) -> int:
        """Bytes at the peak of a step of the network as it is."""
        return self.total(self.counts(), share)

    # --- what fits ---

    def look(self) -> None:
        """Asks what the process may still take, and agrees on all amounts with the other ranks: the tightest count."""
        self._left = process_limit()
        if distributed.is_active():
            names = list(self._units)
            units = [amount for name in names for amount in vars(self._units[name]).values()]
            agreed = distributed.largest(
                [-self.budget.bytes, -self._left.bytes_left, self._fixed, *self.seen.values(), *units]
            )
            self.budget, self._left = MemoryBudget(-agreed[0]), Limit(-agreed[1], self._left.why)
            self._fixed, self.seen = agreed[2], dict(zip(self.seen, agreed[3:5], strict=True))
            self._units = {name: _Unit(*agreed[5 + 3 * i : 8 + 3 * i]) for i, name in enumerate(names)}

    def fits(self, counts: Counts, share: float, of_limit: float = 1.0) -> bool:
        """Whether so many blocks keep within the budget, and the way there within what the process may take."""
        return self.total(counts, share) <= self.budget.bytes and self._can_be_reached(counts, share, of_limit)

    def _can_be_reached(self, counts: Counts, share: float, of_limit: float = 1.0) -> bool:
        more = self.stays(counts) - self.stays(self.counts()) + self.room(counts, share)
        return more <= of_limit * self._left.bytes_left

    def _is_tight(self, now: Counts, share: float) -> bool:
        """Whether the process's limit leaves too little for a rewire, and less than when the network last shrank so.

        What a network gives up may stay in the heap, where the system does not see it, and serve the next rewire. So
        one limit makes the network shrink once; should a rewire fail all the same, the Sparsifier shrinks it then.
        """
        if self._can_be_reached(now, share):
            self._tight = math.inf
            return False
        release_heap()
        self.look()
        return not self._can_be_reached(now, share) and self._left.bytes_left < 0.9 * self._tight

    def within(self, targets: Counts, wanted: Sequence[float], share: float) -> dict[str, int]:
        """``targets``, or as much of them as fits: growth ends where the budget does."""
        if self.fits(targets, share):
            return dict(targets)
        now = self.counts()
        least = {name: min(now[name], count) for name, count in targets.items()}
        return self._largest(wanted, least, targets, lambda counts: self.fits(counts, share))

    def shrunk(self, wanted: Sequence[float], share: float) -> dict[str, int] | None:
        """How many blocks are left where those there are do not fit; None where they do, or no fewer can be."""
        now, least = self.counts(), self.fewest()
        tight = self._is_tight(now, share)
        if not tight and self.total(now, share) <= self.budget.bytes:
            self._said = False
            return None
        self._tight = self._left.bytes_left if tight else self._tight
        counts = self._largest(wanted, least, now, lambda c: self.fits(c, share, _SHARE_OF_A_TIGHT_LIMIT))
        if counts != now:
            return counts
        if not self._said:
            self._said = True
            logger.warning("Sparsifier: no fewer blocks can be: the sparsest network takes %s", self._told(now, share))
        return None

    def _largest(
        self, wanted: Sequence[float], least: Counts, most: Counts, fits: Callable[[Counts], bool]
    ) -> dict[str, int]:
        """The most blocks, in the wanted proportions, that fit; ``least`` where none do."""
        sizes = [self.layers[name].block_size ** 2 for name in most]
        bounds = [[of[name] for name in most] for of in (least, most)]
        low, high = (sum(map(operator.mul, bound, sizes)) for bound in bounds)

        def at(total: int) -> dict[str, int]:
            return dict(zip(most, apportion(wanted, total, *bounds, sizes), strict=True))

        while high - low > min(sizes) / 2:
            middle = (low + high) / 2
            low, high = (middle, high) if fits(at(middle)) else (low, middle)
        found = at(low)
        return found if fits(found) else dict(least)

    def _told(self, counts: Counts, share: float) -> str:
        return f"{format_bytes(self.total(counts, share))}, the budget is {self.budget}, {self._left.why} leaves " + (
            format_bytes(self._left.bytes_left)
        )

    # --- letting go ---

    @torch.no_grad()
    def shrink(
        self, counts: Counts, policy: Policy, step: int, views: Mapping[str, View], share: float
    ) -> dict[str, tuple[BlockPattern, BlockPattern]]:
        """Takes the lowest-scored blocks away until ``counts`` are left; what stays keeps values and state.

        Gradients go first, to make room, and the smallest layers before the largest: each is there old and new for a
        moment, none of the dropped blocks is kept.

        Returns:
            The pattern before and after, by layer.
        """
        before, was = self.bytes(share), self.counts()
        fewer = sorted((n for n in counts if counts[n] < was[n]), key=lambda n: self.layers[n].values.nbytes)
        plans = {name: self._kept(name, counts[name], policy, views[name]) for name in fewer}
        for name in sorted(plans) if distributed.is_active() else ():
            distributed.assert_same(f"the new topology of layer {name}", int(plans[name].fingerprint[:15], 16))
        for name in fewer:
            self.layers[name].values.grad = None
        done = {}
        for name in fewer:
            layer = self.layers[name]
            done[name] = layer.pattern, plans[name]
            for follower in self.followers.get(name, ()):
                _take_away(follower, (), plans[name])
            _take_away(layer, self.optimizers, plans[name])
        logger.warning(
            "Sparsifier: step %d: the network shrinks by %d of %d blocks, a step from %s to %s",
            step, sum(was.values()) - sum(self.counts().values()), sum(was.values()), format_bytes(before),
            self._told(self.counts(), share),
        )  # fmt: skip
        return done

    def _kept(self, name: str, count: int, policy: Policy, view: View) -> BlockPattern:
        layer = self.layers[name]
        pattern = layer.pattern
        try:
            scores = checked_scores(policy.drop_scores(view), pattern.num_blocks, "drop")
        except (BadScores, RuntimeError) as error:  # no scores at this moment: the memory is needed all the same
            logger.warning("Sparsifier: layer %s loses its blocks of smallest norm: %s", name, error)
            scores = block_squared_norms(layer.values).nan_to_num(nan=-1.0)
        leaves = pattern.num_blocks - count
        dropped = Quota(leaves, 0, 0, must_drop=leaves).leaving(pattern, scores, young=pattern.col[:0].long())
        stays = torch.ones(pattern.num_blocks, dtype=torch.bool, device=scores.device)
        stays[dropped] = False
        return BlockPattern.from_linear_places(pattern.linear_places()[stays], pattern.shape, pattern.block_size)


def _index_bytes(layer: SparseLinear) -> int:
    return INDEX_BYTES + (0 if layer.topology.mask_bits is None else mask_bytes(layer.block_size))


def _take_away(layer: SparseLinear, optimizers: Sequence[Optimizer], pattern: BlockPattern) -> None:
    """Leaves of a layer, and of its state, the blocks of ``pattern``; where memory fails, nothing has changed."""
    carried = carried_from(layer.pattern, pattern)
    states = [(o, state_by_block(o, layer.values)) for o in optimizers]
    kept: list[tuple[Optimizer, dict[str, Tensor]]] = [
        (o, {key: tensor.index_select(0, carried) for key, tensor in state.items()}) for o, state in states if state
    ]
    layer.set_pattern(pattern)
    for optimizer, state in kept:
        optimizer.state[layer.values].update(state)


class _FirstForward:
    """A hook of the model that counts what its first training forward pass keeps for the backward, and goes.

    Copies of the model have none: neither deep copies nor pickles take it along.
    """

    def __init__(self, holding: Holding | None = None):
        self._holding = None if holding is None else weakref.ref(holding)

    def __deepcopy__(self, memo) -> _FirstForward:
        return _FirstForward()

    def __reduce__(self):
        return _FirstForward, ()

    def __call__(self, module: nn.Module, arguments: tuple, keywords: Mapping) -> None:
        holding = None if self._holding is None else self._holding()
        if holding is None or not torch.is_grad_enabled() or torch.compiler.is_compiling() or not module.training:
            return
        given = [t for t in (*arguments, *keywords.values()) if isinstance(t, Tensor)]
        saved = SavedBytes([*module.parameters(), *module.buffers(), *given])
        rows: dict[str, int] = {}

        def note(name: str):
            return lambda layer, called_with, y: rows.update({name: y.numel() // max(1, layer.out_features)})

        def after(*_) -> None:
            saved.__exit__(None, None, None)
            for hook in (*hooks, holding._watch):
                hook.remove()
            holding.seen = {"activations": saved.bytes, "workspace": _workspace_bytes(holding.layers, rows)}

        hooks = [layer.register_forward_hook(note(name)) for name, layer in holding.layers.items()]
        hooks.append(module.register_forward_hook(after, always_call=True))
        saved.__enter__()


def _workspace_bytes(layers: Mapping[str, SparseLinear], rows: Mapping[str, int]) -> int:
    """Scratch memory that the CPU kernels keep for the layers, by dry runs of their calls."""
    sizes = []
    for name, batch in rows.items():
        layer = layers[name]
        if layer.values.device.type == "cpu" and batch:
            call = (layer.values.dtype, layer.pattern.shape, layer.block_size, layer.pattern.num_blocks)
            sizes.append(functional.linear_workspace(*call, batch, torch.get_num_threads()))
    return sum(max(buffer) for buffer in itertools.zip_longest(*sizes, fillvalue=0))
