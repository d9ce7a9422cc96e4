"""Samplers by ask and tell: random, grid, and Bayesian through Optuna (TPE, Gaussian process, NSGA-II).

What a sampler proposes for its n-th trial depends on the seed, on n and on what it was told before, on nothing else:
each proposal draws from a generator of its own. So the same seed gives the same trials, random search even with several
workers and after a kill. The Bayesian samplers start from the same random trials as random search.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sparsenet.architecture.search.space import Architecture, SearchSpace

if TYPE_CHECKING:
    import optuna

__all__ = ["SAMPLERS", "GridSampler", "Proposal", "RandomSampler", "Sampler", "StudySampler", "make_sampler"]

SAMPLERS = ("random", "tpe", "gp", "nsga2")
STARTUP_TRIALS = 8


@dataclass(frozen=True)
class Proposal:
    """The ``number``-th trial: its parameters and the architecture that they mean."""

    number: int
    parameters: dict[str, object]
    architecture: Architecture


class Sampler(Protocol):
    """What every sampler does."""

    def ask(self) -> Proposal:
        """The next trial."""
        ...

    def tell(self, proposal: Proposal, loss: float) -> None:
        """What the trial reached; smaller is better."""
        ...


def random_parameters(space: SearchSpace, seed: int, number: int) -> dict[str, object]:
    """Depth uniform, densities log-uniform, the rest uniform; a function of (seed, number) alone."""
    draw = np.random.default_rng([seed, number])
    low, high = math.log(space.min_density), math.log(space.max_density)
    parameters: dict[str, object] = {"depth": int(draw.integers(space.min_depth, space.max_depth + 1))}
    for i in range(space.max_depth):
        parameters[f"density_{i}"] = _within(math.exp(draw.uniform(low, high)), space)
    parameters["density_out"] = _within(math.exp(draw.uniform(low, high)), space)
    parameters["pattern_seed"] = int(draw.integers(space.pattern_seeds))
    if len(space.activations) > 1:
        parameters["activation"] = space.activations[int(draw.integers(len(space.activations)))]
    if space.allow_linear:
        for i in range(space.max_depth):
            parameters[f"linear_{i}"] = bool(draw.integers(2))
    return parameters


def _within(density: float, space: SearchSpace) -> float:
    return float(min(max(density, space.min_density), space.max_density))


def architecture_of(space: SearchSpace, parameters: dict[str, object]) -> Architecture:
    """The architecture that a sampler's parameters mean: layers beyond ``depth`` have density 0, they are skipped."""
    depth = parameters["depth"]
    hidden = [parameters[f"density_{i}"] if i < depth else 0.0 for i in range(space.max_depth)]
    linear = tuple(bool(parameters[f"linear_{i}"]) for i in range(space.max_depth)) if space.allow_linear else ()
    activation = parameters.get("activation", space.activations[0])
    return space.architecture((*hidden, parameters["density_out"]), activation, linear, parameters["pattern_seed"])


class RandomSampler:
    """Independent trials (METHODS: the strategy of the published result). Needs no Optuna."""

    def __init__(self, space: SearchSpace, seed: int = 0):
        self.space, self.seed, self.asked = space, seed, 0

    def ask(self) -> Proposal:
        """The next random trial."""
        number, self.asked = self.asked, self.asked + 1
        parameters = random_parameters(self.space, self.seed, number)
        return Proposal(number, parameters, architecture_of(self.space, parameters))

    def tell(self, proposal: Proposal, loss: float) -> None:
        """Nothing is learned from it."""


class GridSampler:
    """Every depth with every one of ``levels`` common densities, as the authors plot it; it ends in StopIteration."""

    def __init__(self, space: SearchSpace, levels: int = 19):
        step = (space.max_density - space.min_density) / max(1, levels - 1)
        densities = [space.min_density + i * step for i in range(levels)]
        self.space = space
        self.points = enumerate(itertools.product(range(space.min_depth, space.max_depth + 1), densities))

    def ask(self) -> Proposal:
        """The next point of the grid."""
        number, (depth, density) = next(self.points)
        parameters = {"depth": depth, "density_out": density, "pattern_seed": 0}
        parameters |= {f"density_{i}": density for i in range(self.space.max_depth)}
        parameters |= {f"linear_{i}": False for i in range(self.space.max_depth)}
        return Proposal(number, parameters, architecture_of(self.space, parameters))

    def tell(self, proposal: Proposal, loss: float) -> None:
        """Nothing is learned from it."""


def distributions(space: SearchSpace) -> dict[str, optuna.distributions.BaseDistribution]:
    """The space for Optuna. It is fixed: densities beyond the depth are drawn but not used (padding)."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    density = FloatDistribution(space.min_density, space.max_density, log=True)
    known: dict[str, optuna.distributions.BaseDistribution] = {
        "depth": IntDistribution(space.min_depth, space.max_depth),
        **{f"density_{i}": density for i in range(space.max_depth)},
        "density_out": density,
        "pattern_seed": IntDistribution(0, space.pattern_seeds - 1),
    }
    if len(space.activations) > 1:
        known["activation"] = CategoricalDistribution(space.activations)
    if space.allow_linear:
        known |= {f"linear_{i}": CategoricalDistribution((False, True)) for i in range(space.max_depth)}
    return known


def require_optuna() -> ModuleType:
    """Optuna, or ModuleNotFoundError with the command that installs it."""
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("search: optuna must be installed: pip install 'sparsenet[search]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def optuna_sampler(space: SearchSpace, kind: str, seed: int) -> optuna.samplers.BaseSampler:
    """An Optuna sampler whose n-th proposal depends on (seed, n, history) alone.

    Raises ValueError for an unknown kind, ModuleNotFoundError without Optuna.
    """
    if kind not in SAMPLERS:
        raise ValueError(f"make_sampler: sampler must be one of {', '.join(SAMPLERS)}, got {kind!r}")
    optuna = require_optuna()

    class ReseededSampler(optuna.samplers.BaseSampler):
        """Draws each trial with a fresh sampler, seeded by the trial's slot."""

        def infer_relative_search_space(self, study, trial):
            return distributions(space)

        def sample_relative(self, study, trial, search_space):
            slot = trial_slot(space, study, trial)
            inner = _fresh_sampler(kind, hash_seed(seed, slot))
            found = inner.sample_relative(study, trial, search_space) if inner is not None else {}
            return found or random_parameters(space, seed, slot)

        def sample_independent(self, study, trial, param_name, param_distribution):
            return random_parameters(space, seed, trial_slot(space, study, trial))[param_name]

    return ReseededSampler()


def has_parameters(space: SearchSpace, trial) -> bool:
    """Whether the trial has all its parameters; one killed while it was asked for has none, or some."""
    return distributions(space).keys() <= trial.params.keys()


def trial_slot(space: SearchSpace, study: optuna.Study, trial) -> int:
    """The trial's place in the sequence of proposals: a kill leaves no hole in it, a trial queued again no copy."""
    earlier = (t for t in study.get_trials(deepcopy=False) if t.number < trial.number)
    return sum("retry_of" not in t.user_attrs and has_parameters(space, t) for t in earlier)


def hash_seed(seed: int, slot: int) -> int:
    """A 31-bit seed for one trial."""
    return int(np.random.default_rng([seed, slot]).integers(2**31))


def _fresh_sampler(kind: str, seed: int) -> optuna.samplers.BaseSampler | None:
    import warnings

    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if kind == "tpe":
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True
            )
        if kind == "gp":
            return optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=STARTUP_TRIALS, warn_independent_sampling=False
            )
        if kind == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=2 * STARTUP_TRIALS)
    return None


class StudySampler:
    """Ask and tell over an Optuna study in memory; with ``multi_objective`` it minimises (loss, active weights)."""

    def __init__(self, space: SearchSpace, kind: str = "tpe", seed: int = 0, multi_objective: bool = False):
        sampler = optuna_sampler(space, kind, seed)
        optuna = require_optuna()
        directions = ["minimize", "minimize"] if multi_objective else ["minimize"]
        self.space, self.multi_objective = space, multi_objective
        self.study = optuna.create_study(directions=directions, sampler=sampler)
        self._open: dict[int, optuna.Trial] = {}

    def ask(self) -> Proposal:
        """The trial that the sampler expects most of."""
        trial = self.study.ask(distributions(self.space))
        self._open[trial.number] = trial
        return Proposal(trial.number, trial.params, architecture_of(self.space, trial.params))

    def tell(self, proposal: Proposal, loss: float) -> None:
        """What the trial reached. ValueError for a proposal that was not asked for, or told already."""
        if proposal.number not in self._open:
            raise ValueError(f"StudySampler: proposal must be open, got number {proposal.number}")
        trial = self._open.pop(proposal.number)
        values = [loss, float(proposal.architecture.active_weights)] if self.multi_objective else [loss]
        if all(math.isfinite(v) for v in values):
            self.study.tell(trial, values)
        else:
            import optuna

            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)


def make_sampler(kind: str, space: SearchSpace, seed: int = 0, multi_objective: bool = False) -> Sampler:
    """The sampler called ``random``, ``tpe``, ``gp`` or ``nsga2``. ValueError for another name."""
    if kind == "random" and not multi_objective:
        return RandomSampler(space, seed)
    return StudySampler(space, kind, seed, multi_objective)
