"""The Compactor: removes what died from a model and its optimizer while they train, and counts what that saves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from sparsenet import distributed
from sparsenet.architecture.folding import fold_depth
from sparsenet.compaction.compacting import CompactionReport, as_optimizers, compact, plain_model
from sparsenet.compaction.history import Interval
from sparsenet.compaction.moves import model_bytes
from sparsenet.compaction.plots import plot_compaction
from sparsenet.compaction.weights import unit_weights
from sparsenet.schedules import as_integer

__all__ = ["Compactor"]

_COUNT = "closed_checks"  # of a gate: int32 [units], checks in a row at which each was closed


class Compactor:
    """Calls :func:`sparsenet.compact` every so many steps, so that training gets faster as the network gets smaller.

    Args:
        model, optimizer: as for ``compact``.
        every, begin, end: the n-th :meth:`step` compacts when ``begin < n <= end`` and ``(n - begin) % every == 0``.
        patience: a gated unit leaves when its gate is closed at that many checks in a row. Until it leaves, a gate can
            open again; what has left cannot come back.
        fold: whether layers that became linear are merged as well (:func:`sparsenet.fold_depth`).
        sparsifier: the Sparsifier of this model; call its ``step`` first.
        zeros: as for ``compact``; None: without a sparsifier only, since blocks that a policy grows start at zero.
        options: for ``compact``: ``criterion``, ``copies``, ``opaque``, ``permute``, ``strict`` and so on.

    Attributes:
        steps: calls so far. intervals: the :class:`Interval` of every check so far.

    Raises:
        ValueError: a number out of range, or a model that cannot be compacted (from the first check, by name).

    Call :meth:`step` after every ``optimizer.step()``. A check takes a few milliseconds when nothing leaves.

    Example:
        >>> import torch, sparsenet as sn
        >>> gate = sn.TriStateReLU(64, depth=False)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 64), gate, torch.nn.Linear(64, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> compactor = sn.Compactor(model, optimizer, every=5)
        >>> for _ in range(20):
        ...     loss = model(torch.randn(32, 8)).square().mean() + sn.architecture_penalty(model, 0.05)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     report = compactor.step()
        >>> model[0].out_features == compactor.intervals[-1].units["0"] - compactor.intervals[-1].removed < 64
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | list[torch.optim.Optimizer] | None = None,
        every: int = 100,
        begin: int = 0,
        end: int | None = None,
        *,
        patience: int = 1,
        fold: bool = False,
        sparsifier=None,
        zeros: bool | None = None,
        **options,
    ):
        every = as_integer("Compactor", "every", every, at_least=1)
        begin = as_integer("Compactor", "begin", begin, at_least=0)
        end = None if end is None else as_integer("Compactor", "end", end, at_least=0)
        patience = as_integer("Compactor", "patience", patience, at_least=1)
        if "spare" in options:
            raise ValueError("Compactor: spare must be left to patience, got it as an option")
        options |= {name: tuple(options[name]) for name in ("copies", "opaque") if name in options}  # for every check
        if fold and (options.get("copies") or getattr(sparsifier, "followers", ())):
            raise ValueError("Compactor: fold must be False where there are copies or followers, which are not folded")
        self.model, self.optimizer, self.sparsifier = model, optimizer, sparsifier
        self.every, self.begin, self.end, self.patience, self.fold = every, begin, end, patience, fold
        self.options = {**options, "zeros": sparsifier is None if zeros is None else zeros}
        self.steps = 0
        self.intervals: list[Interval] = []
        self._last_check = self.begin
        self._seconds: list[float] = []
        self._since = time.perf_counter()

    def step(self) -> CompactionReport | None:
        """Counts one optimizer step and compacts when it is time.

        Returns:
            What went and what was saved; None when this step does not compact.

        Raises:
            CompactionError: as :func:`sparsenet.compact`; nothing was changed. RuntimeError: ranks disagree.
        """
        self.steps += 1
        self._seconds.append(time.perf_counter() - self._since)
        inside = self.begin < self.steps and (self.end is None or self.steps <= self.end)
        due = inside and (self.steps - self.begin) % self.every == 0
        distributed.assert_same("the decision to compact", int(due))
        report = self._check() if due else None
        self._since = time.perf_counter()
        return report

    def plot(self, path: str | Path) -> Path:
        """Draws units per layer, time per step and bytes over the steps so far as a PNG; returns its path."""
        return plot_compaction(self.intervals, Path(path))

    def _check(self) -> CompactionReport:
        began = time.perf_counter()
        net = plain_model(self.model)
        units = {name: w.rows for name, m in net.named_modules() if (w := unit_weights(m)) is not None}
        parameters, size, _ = model_bytes(net, as_optimizers(self.optimizer))
        spare = self._closed_too_shortly(net) if self.patience > 1 else {}
        report = compact(self.model, self.optimizer, spare=spare, sparsifier=self.sparsifier, **self.options)
        folded = self._fold() if self.fold else 0
        self.intervals.append(
            Interval(
                begin=self._last_check,
                end=self.steps,
                units=units,
                parameters=parameters,
                bytes=size,
                seconds_per_step=statistics.median(self._seconds),
                removed=report.removed,
                folded=folded,
                check_seconds=time.perf_counter() - began,
            )
        )
        self._last_check = self.steps
        self._seconds.clear()
        return report

    def _closed_too_shortly(self, net: nn.Module) -> dict[str, list[int]]:
        """Counts this check; gate -> its units that have not been closed for long enough."""
        spare = {}
        for name, gate in _gates(net).items():
            closed = gate.closed_units()
            before = gate._buffers.get(_COUNT, torch.zeros_like(closed, dtype=torch.int32))
            count = torch.where(closed, before + 1, 0)
            gate.register_buffer(_COUNT, count, persistent=False)  # a buffer per unit: compaction takes it along
            spare[name] = (count < self.patience).nonzero().flatten().tolist()
        return spare

    def _fold(self) -> int:
        report = fold_depth(self.model, self.optimizer)
        if self.sparsifier is not None and (report.folded or report.vanished):
            self.sparsifier.refresh()
        return len(report.folded)

    # --- saving ---

    def state_dict(self) -> dict:
        """The step count, the intervals so far, and for how many checks each gate has been closed."""
        gates = _gates(plain_model(self.model))
        counts = {name: gate._buffers[_COUNT].clone() for name, gate in gates.items() if _COUNT in gate._buffers}
        return {
            "steps": self.steps,
            "last_check": self._last_check,
            "intervals": [asdict(interval) for interval in self.intervals],
            "seconds": list(self._seconds),
            "closed_checks": counts,
        }

    def load_state_dict(self, state: Mapping) -> None:
        """Continues where :meth:`state_dict` was taken; the intervals are then of both runs. Load the model first."""
        if set(state) == {"steps", "closed_checks"} and isinstance(state["steps"], int):  # of an older file
            last = self.begin + max(0, state["steps"] - self.begin) // self.every * self.every
            state = {**state, "last_check": last, "intervals": [], "seconds": []}
        for key in ("steps", "last_check"):
            if not isinstance(state.get(key), int):
                raise ValueError(f"Compactor: state must have an integer {key!r}, got {state.get(key)!r}")
        gates = _gates(plain_model(self.model))
        counts = state.get("closed_checks", {})
        for name, count in counts.items():
            if name not in gates or len(count) != len(gates[name].closed_units()):
                raise ValueError(
                    f"Compactor: state must be of a model with the same gates, got {name!r} [{len(count)}]"
                )
        try:
            intervals, seconds = [Interval(**fields) for fields in state["intervals"]], list(state["seconds"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"Compactor: state must have intervals and seconds of a Compactor, got {error}") from error
        self.steps, self._last_check = state["steps"], state["last_check"]
        self.intervals, self._seconds = intervals, seconds
        for gate in gates.values():
            gate._buffers.pop(_COUNT, None)  # counts of before are of another history
            gate._non_persistent_buffers_set.discard(_COUNT)
        for name, count in counts.items():
            gates[name].register_buffer(_COUNT, count.to(gates[name].closed_units().device), persistent=False)
        self._since = time.perf_counter()


def _gates(net: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in net.named_modules() if hasattr(module, "closed_units")}
