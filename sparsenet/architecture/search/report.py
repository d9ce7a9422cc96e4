"""What a search found: its trials, the best of them, and the Pareto front."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sparsenet.architecture.search.samplers import architecture_of, has_parameters
from sparsenet.architecture.search.space import Architecture, SearchSpace

if TYPE_CHECKING:
    import optuna

__all__ = ["SearchReport", "TrialRecord", "record_of"]


@dataclass(frozen=True)
class TrialRecord:
    """One trial of a finished search.

    ``state``: finished, pruned, failed or lost (killed while it ran). ``live_widths``, of a finished trial: neurons of
    each hidden layer that have an active input and output.
    """

    number: int
    state: str
    depth: int
    densities: tuple[float, ...]
    active_weights: int
    loss: float | None
    accuracy: float | None
    seconds: float
    live_widths: tuple[int, ...]
    parameters: dict[str, object]


@dataclass(frozen=True)
class SearchReport:
    """What a search found; ``seconds`` counts this run only."""

    space: SearchSpace
    trials: list[TrialRecord]
    seconds: float
    requeued: int = 0
    folder: Path | None = field(default=None, compare=False)

    def finished(self) -> list[TrialRecord]:
        """Trials that trained to the end, by number."""
        return [t for t in self.trials if t.state == "finished"]

    def stopped(self) -> list[TrialRecord]:
        """Trials that a pruner stopped, by number; their accuracy is of their last epoch."""
        return [t for t in self.trials if t.state == "pruned" and t.accuracy is not None]

    def best(self) -> TrialRecord:
        """The finished trial of smallest validation loss. ValueError when none finished."""
        if not self.finished():
            raise ValueError(f"search: at least one trial must finish, got none of {len(self.trials)}")
        return min(self.finished(), key=lambda t: (t.loss, t.number))

    def pareto(self) -> list[TrialRecord]:
        """Finished trials that none beats in both active weights and accuracy, by weights."""
        kept: list[TrialRecord] = []
        for t in sorted(self.finished(), key=lambda t: (t.active_weights, -t.accuracy)):
            if not kept or t.accuracy > kept[-1].accuracy:
                kept.append(t)
        return kept

    def architecture(self, trial: TrialRecord) -> Architecture:
        """The architecture of ``trial``."""
        return architecture_of(self.space, trial.parameters)


def record_of(space: SearchSpace, trial: optuna.trial.FrozenTrial) -> TrialRecord | None:
    """Ours of an Optuna trial; None for one that has not got its parameters."""
    states = {"COMPLETE": "finished", "PRUNED": "pruned", "RUNNING": "running"}
    if trial.state.name == "WAITING" or not has_parameters(space, trial):
        return None
    state = states.get(trial.state.name) or ("failed" if "reason" in trial.user_attrs else "lost")
    architecture, result = architecture_of(space, trial.params), trial.user_attrs.get("result", {})
    return TrialRecord(
        trial.number,
        state,
        architecture.depth,
        architecture.densities,
        architecture.active_weights,
        trial.values[0] if trial.values else None,
        result.get("accuracy"),
        result.get("seconds", 0.0),
        tuple(result.get("live_widths", ())),
        dict(trial.params),
    )
