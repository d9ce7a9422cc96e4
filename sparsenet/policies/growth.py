"""Where a layer grows: the search for places while backward passes run.

A policy that wants to see a pass for the sake of what leaves is shown it here as well.

The gradient that counts is that of one backward pass, the last before the rewire (of micro-batches the last one), and
before it is clipped; or, for a policy with ``momentum``, the sum of those of the last steps before it, the older the
less: of all passes of a step, but for places where it is not finite. A layer that is called several times in a pass
(recurrence, shared blocks) has the sum of its calls' gradients; as the weight gradient is ``grad_output.T @ x``, that
is the gradient of all calls' rows put together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sparsenet import distributed, functional
from sparsenet.policies import views
from sparsenet.policies.places import BadScores, best_of, checked_places, checked_scores
from sparsenet.policies.policy import Policy
from sparsenet.policies.views import Operands, View

__all__ = ["KEPT_BYTES", "Growth", "is_sparing", "rows_scored", "steps_watched", "thinned"]

KEPT_BYTES = 256 << 20  # of the operands of several calls of one layer; above it only drawn candidates are scored
_CANDIDATES = 8  # of several calls, for each place that grows
# Candidates are scored on every fourth row of a batch that leaves so many; docs/policies.md has what that costs.
_ROWS_EVERY, _LEAST_ROWS = 4, 64

_IN_PARTS = "it was called in several reentrant checkpoints of one backward pass; give checkpoint use_reentrant=False"


def steps_watched(policy: Policy) -> int:
    """Steps before a rewire at which gradients count: with momentum, until an older one would count less than a tenth.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.policies.growth import steps_watched
        >>> steps_watched(sn.RigL()), steps_watched(sn.SNFS(momentum=0.9))
        (1, 22)
    """
    return math.ceil(math.log(0.1) / math.log(policy.momentum)) if policy.needs_gradient and policy.momentum else 1


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
        self._of_layer = view.layer.pattern
        self._pass = -1  # autograd's number of the backward pass that ``_kept`` is from
        self._whole = -1  # of the pass that this one is part of, with reentrant checkpoints; else the same
        self._in_parts = False  # whether that whole pass has come in parts, which do not tell their sum
        self._kept: list[Operands] = []
        self._candidates: tuple[Tensor, Tensor] | None = None  # places and their gradient so far

    def is_current(self) -> bool:
        """Whether the layer still has the pattern that the counts are for."""
        return self._of_layer is self.view.layer.pattern

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
        this_pass, within = torch._C._current_graph_task_id(), self.view.layer.topology.recomputed_in
        if this_pass != self._pass or this_pass < 0:
            self._begin_pass()
            whole = within if within >= 0 else this_pass
            self._in_parts = whole == self._whole >= 0
            self._pass, self._whole = this_pass, whole
            if this_pass >= 0:
                torch.autograd.Variable._execution_engine.queue_callback(self._end_of_pass)
        if self._in_parts:
            self.error = _IN_PARTS
            return
        if self.watches_drops:
            self.policy.observe(self.view, x.detach(), grad_output.detach())
        if not self.watches_growth:
            return
        self._kept.append((x.detach(), grad_output.detach()))
        kept = sum(t.nbytes for operands in self._kept for t in operands)
        if self.policy.momentum or self._candidates is not None or (len(self._kept) > 1 and kept > KEPT_BYTES):
            self._sum_candidates()
        if this_pass < 0 or len(self._kept) == self.view.layer.topology.expected_calls:
            self._all_seen()

    def _begin_pass(self) -> None:
        """Of an earlier pass only a momentum is left, to which all passes of a step add."""
        self._kept, self.view.measured, self.error = [], {}, ""
        self.places = self.scores = None
        if not self.policy.momentum:
            self._candidates = None

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
        """Instead of the operands of ever more calls, keeps the sum of their gradients at some candidate places.

        They are drawn by the seed alone where every rank must have the same without asking the others.
        """
        if self._candidates is None:
            view, side = self.view, self.view.pattern.block_size
            if self.policy.momentum and self._kept and not distributed.is_active():
                try:
                    places = view.likely_places((self.policy.candidates or _CANDIDATES) * self.count, self._kept[0])
                except BadScores as error:  # as when a loss scale is too large: the next pass draws
                    self._kept, self.error = [], str(error)
                    return
            else:
                places = view.random_places((self.policy.candidates or _CANDIDATES) * self.count)
            self._candidates = places, torch.zeros(len(places), side, side, device=places.device)
        places, gradient = self._candidates
        for operands in self._kept:
            more = self.view.gradients(places, operands)
            gradient += more.nan_to_num_(0.0, 0.0, 0.0) if self.policy.momentum else more
        self._kept = []

    # --- between steps: what a momentum becomes, and is saved as ---

    def grow_older(self) -> None:
        """The optimizer has made a step: what the momentum is of so far counts less from now on."""
        if self.policy.momentum and self._candidates is not None:
            self._candidates[1].mul_(self.policy.momentum)

    def state(self) -> dict[str, Tensor]:
        """The candidates and their gradient so far; empty where there are none."""
        return {} if self._candidates is None else dict(zip(("places", "gradient"), self._candidates, strict=True))

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Goes on from a :meth:`state`; ValueError where it is none of this layer's pattern."""
        if not state:
            return
        places, gradient = (state.get(key) for key in ("places", "gradient"))
        side = self.pattern.block_size
        fits = isinstance(places, Tensor) and isinstance(gradient, Tensor) and places.dim() == 1
        if not fits or gradient.shape != (len(places), side, side) or not gradient.is_floating_point():
            raise ValueError(f"Sparsifier: state must have places and gradients of layer {self.view.name}, got {state}")
        places = checked_places(self.pattern, places, len(places))
        self.view.check_growable(places)
        self._candidates = places, gradient.to(places.device, torch.float32, copy=True)

    # --- at the rewire ---

    def settle(self, count: int) -> None:
        """Finds ``count`` places now, where backward has left that to the rewire. Every rank calls it."""
        self.count = count
        if self._in_parts:
            self.error = _IN_PARTS
        elif not self.policy.needs_gradient:
            self._select(None)
        elif distributed.any_rank(self._candidates is not None):
            self._sum_candidates()  # as the others do
            self._choose_candidates()
        elif distributed.is_active():
            shape, values = self.view.layer.pattern.shape, self.view.layer.values
            nothing = tuple(values.new_empty(0, features) for features in reversed(shape))
            self._select(distributed.gather_operands(*(_together(self._kept) if self._kept else nothing)))
            self._kept = []
        elif self.places is None and not self.error:
            self.error = "no backward ran through it before this step"

    def best(self, count: int) -> Tensor:
        """int64 [count], ascending: the best of what was found."""
        if count >= len(self.places):
            return self.places
        return self.places[functional.select_extreme(self.scores_found(), count, largest=True)]

    def scores_found(self) -> Tensor:
        """float32, of :attr:`places`; random ones where a policy named the places itself."""
        return self.view.random(self.places) if self.scores is None else self.scores

    def _select(self, operands: Operands | None) -> None:
        """Asks the policy for places, or scores the inactive ones, or candidates among them, for the best."""
        self.places, self.error = None, ""
        if operands is not None and not len(operands[0]):
            self.error = "the batch of the last backward was empty"
            return
        view = self.view
        sparing = operands is not None and self._is_sparing(len(operands[0]))
        view.operands = thinned(operands) if sparing else operands
        try:
            chosen = self.policy.grow_places(view, self.count)
            if chosen is not None:
                self.places, self.scores = checked_places(self.pattern, chosen, self.count), None
                view.check_growable(self.places)
                return
            best = best_of(self._parts(sparing), lambda p: self.policy.grow_scores(view, p), self.count, view.device)
            if operands is not None:
                best = distributed.gather_best(*best, self.count)
            self._found(*best, by_gradient=operands is not None)
        except BadScores as error:
            self.error = str(error)
        finally:
            view.operands = None

    def _is_sparing(self, rows: int) -> bool:
        """Whether candidates are scored, on some of the rows, because all places on all rows would cost too much."""
        return is_sparing(self.policy, rows, self.view.layer.pattern.shape, self.count, self.view.inactive)

    def _parts(self, sparing: bool) -> Iterable[Tensor]:
        """The places that this rank scores, in ascending parts."""
        view = self.view
        if sparing:
            places = view.likely_places(self.policy.candidates * self.count)
            return [places[slice(*distributed.share_of(len(places)))]]
        rows = distributed.share_of(view.block_rows) if view.operands is not None else (0, view.block_rows)
        return view.inactive_places(rows)

    def _choose_candidates(self) -> None:
        places, gradient = self._candidates
        self.view.summed = places, distributed.averaged(gradient)
        try:
            scores = checked_scores(self.policy.grow_scores(self.view, places), len(places), "grow")
        except BadScores as error:
            self.error = str(error)
            return
        finally:
            self.view.summed = None
        kept = functional.select_extreme(scores, min(self.count, len(scores)), largest=True)
        self._found(places[kept], scores[kept], by_gradient=True)

    def _found(self, places: Tensor, scores: Tensor, by_gradient: bool) -> None:
        if by_gradient and len(scores) and not bool(scores.any()):
            self.error = "the gradient of every inactive place was zero"
        else:
            self.places, self.scores = places, scores


def is_sparing(policy: Policy, rows: int, shape: tuple[int, int], count: int, inactive: int) -> bool:
    """Whether growth of ``count`` of ``inactive`` places in a layer [out, in] is scored at candidates only.

    Example:
        >>> import sparsenet as sn
        >>> from sparsenet.policies.growth import is_sparing
        >>> [is_sparing(sn.RigL(), 256, (n, n), count=n // 4, inactive=n * n // 64) for n in (128, 4096)]
        [False, True]
    """
    wanted = policy.candidates
    return bool(wanted) and 2 * wanted * count < inactive and rows * math.prod(shape) > views.CHEAP


def rows_scored(rows: int) -> int:
    """How many of a batch's rows candidates are scored on."""
    return -(-rows // max(1, min(_ROWS_EVERY, rows // _LEAST_ROWS)))


def thinned(operands: Operands) -> Operands:
    """Every so many rows, evenly spaced: a sample of the batch.

    Example:
        >>> import torch
        >>> from sparsenet.policies.growth import thinned
        >>> [len(thinned((torch.ones(rows, 4), torch.ones(rows, 3)))[0]) for rows in (0, 32, 128, 256, 1000)]
        [0, 32, 64, 64, 250]
    """
    rows = len(operands[0])
    every = -(-rows // rows_scored(rows)) if rows else 1
    return tuple(t[::every] for t in operands)


def _together(kept: list[Operands]) -> Operands:
    """All calls' rows as one batch."""
    if len(kept) == 1:
        return kept[0]
    return tuple(torch.cat(parts) for parts in zip(*kept, strict=True))
