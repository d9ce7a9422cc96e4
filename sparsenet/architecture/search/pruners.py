"""When to stop a trial early: Optuna's halving, Hyperband and median rule, and learning-curve extrapolation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sparsenet.architecture.search.estimators import extrapolate

if TYPE_CHECKING:
    import optuna

__all__ = ["PRUNERS", "make_pruner"]

PRUNERS = ("none", "halving", "hyperband", "median", "extrapolation")


def make_pruner(kind: str, epochs: int, reduction_factor: int = 3) -> optuna.pruners.BasePruner:
    """The pruner called ``kind`` for trials of ``epochs`` epochs.

    ``halving`` is ASHA (Li et al. 2020): after 1, eta, eta^2, ... epochs only the best 1 / eta of a rung go on.
    ``hyperband`` (Li et al. 2018) runs several such brackets. ``extrapolation`` stops a trial whose learning curve,
    fitted by a power law, is expected to end worse than the median finished trial. ValueError for another name.
    """
    if kind not in PRUNERS:
        raise ValueError(f"make_pruner: pruner must be one of {', '.join(PRUNERS)}, got {kind!r}")
    import optuna

    if kind == "none":
        return optuna.pruners.NopPruner()
    if kind == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=reduction_factor)
    if kind == "hyperband":
        return optuna.pruners.HyperbandPruner(1, epochs, reduction_factor)
    if kind == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=max(1, epochs // 5))

    class ExtrapolationPruner(optuna.pruners.BasePruner):
        """Prunes by the fitted end of the learning curve."""

        def prune(self, study, trial):
            done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
            curve = [v for _, v in sorted(trial.intermediate_values.items())]
            if len(done) < 4 or len(curve) < 3:
                return False
            ends = sorted(t.value for t in done)
            return min(extrapolate(curve, epochs), curve[-1]) > ends[len(ends) // 2]

    return ExtrapolationPruner()
