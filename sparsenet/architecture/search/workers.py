"""The processes of a search: each asks the shared study, trains, tells. The study lives in a file and survives a kill.

One process with ``workers=1``, else that many spawned ones, each with ``threads`` threads, so that a search never uses
more than workers x threads cores. A lock file admits one search per storage. Trials that were running when a search was
killed are queued again, first thing, when it is resumed.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from sparsenet.architecture.search.pruners import make_pruner
from sparsenet.architecture.search.samplers import (
    architecture_of,
    distributions,
    has_parameters,
    optuna_sampler,
    require_optuna,
)
from sparsenet.architecture.search.space import Architecture, DensityMLP, SearchSpace
from sparsenet.architecture.search.trials import TrialConfig, TrialData, train_trial
from sparsenet.files import replace_file
from sparsenet.schedules import as_integer

if TYPE_CHECKING:
    import optuna

__all__ = ["SearchConfig", "open_study", "requeue_lost", "run_workers"]


@dataclass(frozen=True)
class SearchConfig:
    """How to search.

    Attributes:
        trials: how many, finished or pruned.
        sampler: ``random``, ``tpe``, ``gp`` or ``nsga2``.
        pruner: ``none``, ``halving``, ``hyperband``, ``median`` or ``extrapolation``.
        multi_objective: minimise (loss, active weights) together; takes no pruner.
        workers, threads: processes, and threads of each.
        inherit: start a trial from the weights of the most similar finished one.
        seed: of the sampler.
        trial: hyper-parameters of every trial.

    Raises ValueError for a number below 1, or a pruner with several objectives.

    Example:
        >>> from sparsenet.architecture.search import SearchConfig, TrialConfig
        >>> SearchConfig(trials=50, sampler="gp", trial=TrialConfig(epochs=3)).trials
        50
        >>> SearchConfig(multi_objective=True)   # the default pruner would need a single objective
        Traceback (most recent call last):
        ValueError: SearchConfig: pruner must be none with several objectives, got 'halving'
    """

    trials: int = 30
    sampler: str = "tpe"
    pruner: str = "halving"
    multi_objective: bool = False
    workers: int = 1
    threads: int = 1
    inherit: bool = False
    seed: int = 0
    trial: TrialConfig = field(default_factory=TrialConfig)

    def __post_init__(self) -> None:
        for name in ("trials", "workers", "threads"):
            object.__setattr__(self, name, as_integer("SearchConfig", name, getattr(self, name), at_least=1))
        if self.multi_objective and self.pruner != "none":
            raise ValueError(f"SearchConfig: pruner must be none with several objectives, got {self.pruner!r}")


def identity(space: SearchSpace, config: SearchConfig) -> dict[str, object]:
    """What a study must agree on to be resumed: everything but the number of trials and processes."""
    return json.loads(
        json.dumps(
            {
                "space": asdict(space),
                "trial": asdict(config.trial),
                "search": [config.sampler, config.pruner, config.multi_objective, config.inherit, config.seed],
            }
        )
    )


def open_study(space: SearchSpace, config: SearchConfig, storage: str | Path | None) -> optuna.Study:
    """The study in the SQLite file ``storage`` (created, or resumed), or one in memory.

    Raises ValueError when the file holds a study of other bounds or settings.
    """
    optuna = require_optuna()
    directions = ["minimize", "minimize"] if config.multi_objective else ["minimize"]
    study = optuna.create_study(
        study_name="density",
        storage=None if storage is None else sqlite(storage),
        directions=directions,
        sampler=optuna_sampler(space, config.sampler, config.seed),
        pruner=make_pruner(config.pruner, config.trial.epochs),
        load_if_exists=True,
    )
    known, wanted = study.user_attrs.get("identity"), identity(space, config)
    if known is None:
        study.set_user_attr("identity", wanted)
    elif known != wanted:
        differs = [key for key in wanted if known.get(key) != wanted[key]]
        rule = f"storage must hold a search of the same {', '.join(differs)}"
        raise ValueError(f"search: {rule}; name another file or repeat the settings of {storage}")
    return study


def sqlite(path: str | Path) -> optuna.storages.RDBStorage:
    """Optuna's storage in an SQLite file; waits for other processes' locks."""
    import optuna

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 60}})


@contextmanager
def only_search(storage: str | Path | None) -> Iterator[None]:
    """Holds the storage's lock file; OSError when another search holds it. The lock ends with the process."""
    if storage is None:
        yield
        return
    Path(storage).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{storage}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise OSError(f"search: {storage} is in use by another search; wait for it or name another") from error
        yield


def requeue_lost(study: optuna.Study, space: SearchSpace) -> int:
    """Queues again, with the same parameters, what was running when the search was killed; returns how many.

    A trial killed before it had its parameters has lost nothing and is not queued.
    """
    import optuna

    lost = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
    for trial in lost:
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if has_parameters(space, trial):
            study.enqueue_trial(trial.params, user_attrs={"retry_of": trial.number})
    return sum(has_parameters(space, trial) for trial in lost)


def is_done(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether the trial counts: finished, pruned, failed for a stated reason, or under way; not lost in a kill."""
    import optuna

    states = optuna.trial.TrialState
    return trial.state in (states.COMPLETE, states.PRUNED, states.RUNNING) or "reason" in trial.user_attrs


def work(
    study: optuna.Study,
    space: SearchSpace,
    data: TrialData,
    config: SearchConfig,
    lock=None,
    weights: Path | None = None,
    after: Callable[[optuna.Study], None] | None = None,
) -> None:
    """Asks, trains and tells until ``config.trials`` trials are done or under way."""
    while True:
        with lock if lock is not None else nullcontext():
            if sum(is_done(t) for t in study.get_trials(deepcopy=False)) >= config.trials:
                return
            trial = study.ask(distributions(space))
        run_one(study, trial, space, data, config, weights)
        if after is not None:
            after(study)


def run_one(
    study: optuna.Study,
    trial: optuna.Trial,
    space: SearchSpace,
    data: TrialData,
    config: SearchConfig,
    weights: Path | None,
) -> None:
    """Trains one trial and tells the study; a pruned or diverged trial is told as such."""
    import optuna

    architecture = architecture_of(space, trial.params)
    seen: list[float] = []

    def report(epoch: int, loss: float, accuracy: float) -> None:
        seen.append(accuracy)
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss {loss} after epoch {epoch}")
        if not config.multi_objective:
            trial.report(loss, epoch)
            if trial.should_prune():
                raise optuna.TrialPruned

    donor = nearest_donor(study, space, architecture, config, weights) if config.inherit else None
    models: list[DensityMLP] = []
    try:
        result = train_trial(architecture, data, config.trial, report, donor, models)
    except optuna.TrialPruned:
        trial.set_user_attr("result", {"accuracy": seen[-1]})
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return
    except FloatingPointError as error:
        trial.set_user_attr("reason", str(error))
        study.tell(trial, state=optuna.trial.TrialState.FAIL)
        return
    trial.set_user_attr("result", asdict(result))
    if config.inherit:
        weights.mkdir(parents=True, exist_ok=True)
        state = models[0].state_dict()
        replace_file(weights / f"trial_{trial.number}.safetensors", lambda part: save_file(state, str(part)))
    values = [result.loss, float(result.active_weights)] if config.multi_objective else [result.loss]
    study.tell(trial, values)


def nearest_donor(
    study: optuna.Study, space: SearchSpace, architecture: Architecture, config: SearchConfig, weights: Path
) -> DensityMLP | None:
    """The trained network of the most similar finished trial of the same depth; None before there is one."""
    import optuna

    found: list[tuple[float, int, Architecture]] = []
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)):
        other = architecture_of(space, trial.params)
        distance = architecture.distance(other)
        if distance < math.inf and (weights / f"trial_{trial.number}.safetensors").is_file():
            found.append((distance, trial.number, other))
    if not found:
        return None
    _, number, other = min(found, key=lambda f: f[:2])
    build = config.trial
    donor = other.build(block_size=build.block_size, norm=build.norm, residual=build.residual, seed=build.seed)
    donor.load_state_dict(load_file(str(weights / f"trial_{number}.safetensors")))
    return donor


def _worker(space: SearchSpace, data: TrialData, config: SearchConfig, storage: str, lock, weights, errors) -> None:
    """Body of one spawned process; it ends at once with its parent, a SIGKILL of the parent included."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(config.threads)
    try:
        work(open_study(space, config, storage), space, data, config, lock, weights)
    except KeyboardInterrupt:
        pass
    except BaseException:
        errors.put(traceback.format_exc())
        raise


def _end_with_parent() -> None:
    """Orphans would go on training trials that the resumed search has queued again."""
    torch.multiprocessing.parent_process().join()
    os._exit(1)


def run_workers(
    space: SearchSpace,
    data: TrialData,
    config: SearchConfig,
    storage: str | Path,
    weights: Path | None,
    poll: Callable[[], None],
) -> None:
    """Runs ``config.workers`` processes to the end; ``poll`` is called about twice a second.

    Raises RuntimeError with the traceback when a worker fails; the study stays and can be resumed. Workers end with the
    caller, whatever way it ends.
    """
    spawn = torch.multiprocessing.get_context("spawn")
    lock, errors = spawn.Lock(), spawn.SimpleQueue()
    arguments = (space, data, config, str(storage), lock, weights, errors)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(config.threads)
    processes = [spawn.Process(target=_worker, args=arguments, daemon=True) for _ in range(config.workers)]
    try:
        for process in processes:
            process.start()
        while any(p.is_alive() for p in processes):
            processes[0].join(0.5)
            next((p for p in processes if p.is_alive()), processes[0]).join(0.1)
            poll()
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
            process.join()
        if threads is None:
            os.environ.pop("OMP_NUM_THREADS", None)
        else:
            os.environ["OMP_NUM_THREADS"] = threads
    failed = [p.exitcode for p in processes if p.exitcode]
    if failed:
        cause = errors.get() if not errors.empty() else f"exit code {failed[0]}"
        raise RuntimeError(f"search: a worker failed; run again to resume. {cause}")
