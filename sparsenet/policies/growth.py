"""Where a layer grows: the view of it that a policy sees, and the search for places while a backward pass runs.

A policy that wants to see that pass for the sake of what leaves is shown it here as well.

The gradient that counts is that of one backward pass, the last before the rewire. A layer that is called several times
in it (recurrence, shared blocks) has the sum of its calls' gradients; as the weight gradient is ``grad_output.T @ x``,
that is the gradient of all calls' rows put together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sparsenet import distributed, functional
from sparsenet.layers import SparseLinear
from sparsenet.pattern import BlockPattern
from sparsenet.policies.places import BadScores, best_places, checked_places, hash_uniform, random_places
from sparsenet.policies.policy import Policy

__all__ = ["KEPT_BYTES", "Growth", "View"]

KEPT_BYTES = 256 << 20  # of the operands of several calls of one layer; above it only drawn candidates are scored
_CANDIDATES = 8  # for each place that grows

Operands = tuple[Tensor, Tensor]  # x [batch, in], gradient of the output before the activation [batch, out]


class View:
    """One layer as a policy sees it; see :class:`sparsenet.policies.LayerView`."""

    def __init__(self, name: str, layer: SparseLinear, key: int, drop: int = 0):
        self.name = name
        self.layer = layer
        self.key = key
        self.drop = drop
        self.measured: dict[str, Any] = {}
        self.operands: Operands | None = None

    @property
    def values(self) -> nn.Parameter:
        """[num_blocks, b, b]."""
        return self.layer.values

    @property
    def pattern(self) -> BlockPattern:
        """The active blocks."""
        return self.layer.pattern

    @property
    def element_mask(self) -> Tensor | None:
        """Bool [num_blocks, b, b] or None."""
        return self.layer.element_mask

    def random(self, places: Tensor) -> Tensor:
        """float32 [n] in [0, 1), a function of seed, step, layer and place."""
        return hash_uniform(places, self.key)

    def random_places(self, count: int) -> Tensor:
        """int64 [<= count]: inactive places, ascending, drawn without looking at the others."""
        return random_places(self.pattern, count, self.key)

    def gradient_squared_norms(self, places: Tensor) -> Tensor:
        """float32 [n]: of the dense weight gradient's blocks at int64 ``places`` [n], ascending."""
        if self.operands is None:
            raise RuntimeError(
                f"Sparsifier: no gradient of layer {self.name} at hand; set needs_gradient in the policy"
            )
        if not len(places):
            return torch.empty(0, device=places.device)
        cols = self.pattern.block_cols
        rows = (int(places[0]) // cols, int(places[-1]) // cols + 1)
        norms = functional.block_gradient_squared_norms(*self.operands, self.pattern.block_size, rows)
        return norms.flatten()[places - rows[0] * cols]


class Growth:
    """Finds the places that a layer will grow, during the backward passes before a rewire if that needs gradients.

    ``places`` and their ``scores``: ascending places, the best of the inactive ones; None where none were found, for
    the reason ``error``.
    """

    def __init__(self, view: View, policy: Policy, count: int):
        self.view = view
        self.pattern = view.pattern  # that ``count`` is for
        self.policy = policy
        self.count = count
        self.places: Tensor | None = None
        self.scores: Tensor | None = None
        self.error = ""
        self._pass = -1  # autograd's number of the backward pass that ``_kept`` is from
        self._kept: list[Operands] = []
        self._candidates: tuple[Tensor, Tensor] | None = None  # places and their gradient so far

    def is_current(self) -> bool:
        """Whether the layer still has the pattern that the counts are for."""
        return self.pattern is self.view.pattern

    # --- in backward ---

    @property
    def watches_growth(self) -> bool:
        """Whether growth is scored in backward."""
        return bool(self.policy.needs_gradient and self.count)

    @property
    def watches_drops(self) -> bool:
        """Whether the policy is shown the backward pass for what leaves."""
        return bool(self.policy.observes and self.view.drop)

    def observe(self, x: Tensor, grad_output: Tensor) -> None:
        """Called by the layer's backward, as often as the layer was called."""
        this_pass = torch._C._current_graph_task_id()
        if this_pass != self._pass or this_pass < 0:
            self._forget()
            self._pass = this_pass
            if this_pass >= 0:
                torch.autograd.Variable._execution_engine.queue_callback(self._end_of_pass)
        if self.watches_drops:
            self.policy.observe(self.view, x.detach(), grad_output.detach())
        if not self.watches_growth:
            return
        self._kept.append((x.detach(), grad_output.detach()))
        kept = sum(t.nbytes for operands in self._kept for t in operands)
        if self._candidates is not None or (len(self._kept) > 1 and kept > KEPT_BYTES):
            self._sum_candidates()
        if this_pass < 0 or len(self._kept) == self.view.layer.topology.expected_calls:
            self._all_seen()

    def _forget(self) -> None:
        self._kept, self._candidates = [], None
        self.places = self.scores = None
        self.error = ""
        self.view.measured = {}

    def _all_seen(self) -> None:
        """Scores at once, so that the operands of one layer at a time are kept; several ranks score at the rewire."""
        if not distributed.is_active() and self._candidates is None:
            self._select(_together(self._kept))
            self._kept = []

    def _end_of_pass(self) -> None:
        """Autograd calls this when the backward pass is over, whether or not all calls were foreseen."""
        topology = self.view.layer.topology
        topology.expected_calls = 0
        if self._kept:
            self._all_seen()

    def _sum_candidates(self) -> None:
        """Instead of the operands of ever more calls, keeps the sum of their gradients at places drawn by the seed."""
        pattern, b = self.view.pattern, self.view.pattern.block_size
        if self._candidates is None:
            places = self.view.random_places(_CANDIDATES * self.count)
            self._candidates = places, torch.zeros(len(places), b, b, device=places.device)
        places, gradient = self._candidates
        where = places // pattern.block_cols, places % pattern.block_cols
        for operands in self._kept:
            gradient += functional.candidate_gradients(*operands, *where, b)
        self._kept = []

    # --- at the rewire ---

    def settle(self, count: int) -> None:
        """Finds ``count`` places now, where backward has left that to the rewire. Every rank calls it."""
        self.count = count
        if not self.policy.needs_gradient:
            self._select(None)
        elif distributed.any_rank(self._candidates is not None):
            self._sum_candidates()  # as the others do
            self._choose_candidates()
        elif distributed.is_active():
            pattern, values = self.view.pattern, self.view.values
            nothing = tuple(values.new_empty(0, features) for features in reversed(pattern.shape))
            self._select(distributed.gather_operands(*(_together(self._kept) if self._kept else nothing)))
            self._kept = []
        elif self.places is None and not self.error:
            self.error = "no backward ran through it before this step"

    def best(self, count: int) -> Tensor:
        """int64 [count], ascending: the best of what was found."""
        if count >= len(self.places):
            return self.places
        scores = self.view.random(self.places) if self.scores is None else self.scores
        return self.places[functional.select_extreme(scores, count, largest=True)]

    def _select(self, operands: Operands | None) -> None:
        """Asks the policy for places, or scores every inactive one, a slice of block rows at a time, for the best."""
        pattern = self.view.pattern
        self.places, self.error = None, ""
        if operands is not None and not len(operands[0]):
            self.error = "the batch of the last backward was empty"
            return
        self.view.operands = operands
        try:
            chosen = self.policy.grow_places(self.view, self.count)
            if chosen is not None:
                self.places, self.scores = checked_places(pattern, chosen, self.count), None
                return
            share = distributed.share_of(pattern.block_rows) if operands is not None else (0, pattern.block_rows)
            best = best_places(pattern, lambda places: self.policy.grow_scores(self.view, places), self.count, share)
            if operands is not None:
                best = distributed.gather_best(*best, self.count)
            self._found(*best, by_gradient=operands is not None)
        except BadScores as error:
            self.error = str(error)
        finally:
            self.view.operands = None

    def _choose_candidates(self) -> None:
        places, gradient = self._candidates
        gradient = distributed.averaged(gradient)
        scores = gradient.flatten(1).square().sum(1)
        if not bool(torch.isfinite(scores).all()):
            self.error = "its grow scores hold NaN or Inf"
            return
        kept = functional.select_extreme(scores, min(self.count, len(scores)), largest=True)
        self._found(places[kept], scores[kept], by_gradient=True)

    def _found(self, places: Tensor, scores: Tensor, by_gradient: bool) -> None:
        if by_gradient and len(scores) and not bool(scores.any()):
            self.error = "the gradient of every inactive place was zero"
        else:
            self.places, self.scores = places, scores


def _together(kept: list[Operands]) -> Operands:
    """All calls' rows as one batch."""
    if len(kept) == 1:
        return kept[0]
    return tuple(torch.cat(parts) for parts in zip(*kept, strict=True))
