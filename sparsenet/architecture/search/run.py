"""Density search: the user gives a maximum depth, width and number of active weights; the search finds the densities.

    sparsenet search --max-depth 8 --max-width 1024 --max-active 60000 --trials 100 --sampler tpe

Space, sampler, pruner and storage are separate pieces (``search_space``, ``samplers``, ``pruners``,
``search_workers``); this module puts them together: run, report, retrain the winner, draw.
"""

from __future__ import annotations

import argparse
import json
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from sparsenet import data as datasets
from sparsenet.architecture.search.pruners import PRUNERS
from sparsenet.architecture.search.samplers import SAMPLERS, architecture_of, has_parameters
from sparsenet.architecture.search.space import ACTIVATIONS, Architecture, DensityMLP, SearchSpace
from sparsenet.architecture.search.trials import TrialConfig, TrialData, TrialResult, train_trial
from sparsenet.architecture.search.workers import (
    SearchConfig,
    only_search,
    open_study,
    requeue_lost,
    run_workers,
    work,
)
from sparsenet.files import replace_file, replace_text

if TYPE_CHECKING:
    import optuna

__all__ = ["SearchConfig", "SearchReport", "SearchSpace", "TrialRecord", "add_arguments", "retrain", "run", "search"]


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


def search(
    space: SearchSpace,
    data: TrialData,
    config: SearchConfig | None = None,
    *,
    folder: str | Path | None = None,
    progress: bool = False,
) -> SearchReport:
    """Searches ``space`` on ``data``; a search in ``folder`` that was killed goes on where it was.

    Args:
        space: bounds.
        data: training and validation examples.
        config: sampler, pruner, workers, the trials' hyper-parameters.
        folder: where ``search.db`` (Optuna, SQLite) is kept; None keeps nothing and allows one worker.
        progress: a bar with the best loss so far.

    Raises:
        ValueError: bounds and data do not fit, several workers without a folder, or a folder of another search.
        OSError: the folder is in use by another search.
        RuntimeError: a worker failed; the search can be resumed.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.search.run import SearchConfig, SearchSpace, search
        >>> from sparsenet.architecture.search.trials import TrialConfig, TrialData
        >>> x = torch.randn(300, 8); y = (x[:, 0] * x[:, 1] > 0).long()
        >>> space = SearchSpace(8, 2, max_depth=2, max_width=16, min_density=0.1, max_active=200)
        >>> config = SearchConfig(trials=3, sampler="random", trial=TrialConfig(epochs=2))
        >>> search(space, TrialData.from_arrays(x, y), config).best().active_weights <= 200
        True
    """
    config = config or SearchConfig()
    if (data.features, data.num_classes) != (space.in_features, space.out_features):
        got = f"{data.features} features and {data.num_classes} classes"
        rule = f"data must have the space's {space.in_features} features and {space.out_features} classes"
        raise ValueError(f"search: {rule}, got {got}")
    if folder is None and (config.workers > 1 or config.inherit):
        raise ValueError("search: folder must be given with several workers or inherited weights, got None")
    cores = len(os.sched_getaffinity(0))
    if config.workers * config.threads > cores:
        got = f"{config.workers} x {config.threads}"
        warnings.warn(f"search: workers x threads should be at most the {cores} cores, got {got}", stacklevel=2)
    storage = None if folder is None else Path(folder, "search.db")
    started = time.perf_counter()
    with only_search(storage):
        study = open_study(space, config, storage)
        requeued = requeue_lost(study, space)
        with _Progress(config.trials, progress) as bar:
            weights = None if folder is None else Path(folder, "weights")
            bar.begin(study, requeued)
            if config.workers == 1:
                with _threads(config.threads):
                    work(study, space, data, config, None, weights, bar.show)
            else:
                run_workers(space, data, config, storage, weights, lambda: bar.show(study))
            bar.show(study)
        records = [record_of(space, t) for t in study.get_trials(deepcopy=False)]
    seconds = time.perf_counter() - started
    return SearchReport(space, [r for r in records if r], seconds, requeued, None if folder is None else Path(folder))


class _threads:
    """torch's number of threads, for a while."""

    def __init__(self, count: int):
        self.count = count

    def __enter__(self) -> None:
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def __exit__(self, *_) -> None:
        torch.set_num_threads(self.before)


class _Progress:
    """A tqdm bar over the trials of a study, whoever runs them."""

    def __init__(self, trials: int, shown: bool):
        self.bar = tqdm(total=trials, desc="search", unit="trial", disable=not shown)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()

    def begin(self, study: optuna.Study, requeued: int) -> None:
        """The first view; what an earlier run has done is said, and does not count for the speed."""
        self.show(study)
        self.bar.initial = self.bar.n
        if self.bar.n or requeued:
            self.bar.write(f"search: goes on after {self.bar.n} trials; {requeued} that were running are queued again")

    def show(self, study: optuna.Study) -> None:
        """Reads the study and redraws."""
        if self.bar.disable:
            return
        trials = study.get_trials(deepcopy=False)
        done = [t for t in trials if t.state.name == "COMPLETE"]
        pruned = sum(t.state.name == "PRUNED" for t in trials)
        failed = sum(t.state.name == "FAIL" and "reason" in t.user_attrs for t in trials)
        self.bar.n = min(self.bar.total, len(done) + pruned + failed)
        notes = {"pruned": pruned}
        if done:
            best = min(done, key=lambda t: t.values[0])
            result = best.user_attrs["result"]
            accuracy, active = f"{100 * result['accuracy']:.2f} %", str(result["active_weights"])
            notes = {"best": f"{best.values[0]:.4f}", "acc": accuracy, "active": active, **notes}
        self.bar.set_postfix(notes)


def retrain(
    architecture: Architecture,
    dataset: datasets.Dataset,
    config: TrialConfig,
    seeds: tuple[int, ...] = (0, 1, 2),
    models: list[DensityMLP] | None = None,
    progress: bool = False,
) -> list[TrialResult]:
    """Trains ``architecture`` on the whole training set once per seed, judged on the test set.

    Every seed has its own weights, batches and random pattern (``pattern_seed + seed``). ``config.train_fraction``, a
    device of the search, is not applied. The trained networks are appended to ``models``. ``progress``: a bar over the
    seeds.

    Example:
        >>> import torch
        >>> from sparsenet.architecture.search import Architecture, TrialConfig, retrain
        >>> from sparsenet.data import Dataset
        >>> x = torch.randn(120, 4); y = (x[:, 0] > 0).long()
        >>> data = Dataset("halves", x[:80], y[:80], x[80:], y[80:], 2, "drawn at random")
        >>> results = retrain(Architecture(4, 2, 16, (0.5, 1.0)), data, TrialConfig(epochs=1), seeds=(0, 1))
        >>> len(results)
        2
    """
    config = replace(config, train_fraction=1.0)
    data = TrialData.from_dataset(dataset, validation=0)
    results = []
    for seed in tqdm(seeds, desc="retraining the best", unit="seed", disable=not progress):
        drawn = replace(architecture, pattern_seed=architecture.pattern_seed + seed)
        results.append(train_trial(drawn, data, replace(config, seed=seed), model_out=models))
    return results


def save_network(path: Path, model: DensityMLP, config: TrialConfig) -> None:
    """Writes weights and patterns as safetensors, the architecture in the header, whole or not at all."""
    made = {"norm": config.norm, "residual": config.residual, "block_size": config.block_size}
    header = {"architecture": json.dumps({**asdict(model.architecture), **made})}
    state = {k: v.contiguous() for k, v in model.state_dict().items()}
    replace_file(path, lambda part: save_file(state, str(part), metadata=header))


def load_network(path: str | Path) -> DensityMLP:
    """Builds and loads what :func:`save_network` wrote. ValueError for another file."""
    try:
        with safe_open(str(path), "pt") as file:
            made = json.loads((file.metadata() or {})["architecture"])
        options = {key: made.pop(key) for key in ("norm", "residual", "block_size")}
        made |= {"densities": tuple(made["densities"]), "linear": tuple(made["linear"])}
        model = Architecture(**made).build(**options)
        model.load_state_dict(load_file(str(path)))
    except (KeyError, TypeError, RuntimeError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"load_network: {path} must be a network of sparsenet search, got: {error}") from error
    return model


def load_dataset(name: str, data_dir: str | None, fallback: bool = True) -> datasets.Dataset:
    """A data set by name or path; ``data_dir`` is a folder that holds it, or holds a folder of its name.

    Without ``fallback`` a named data set that is not to be had is an error, not scikit-learn's digits.
    """
    if data_dir is None:
        return datasets.load(name, fallback=fallback)
    inside = Path(data_dir, name)
    return datasets.load(inside if inside.is_dir() else data_dir)


# --- command line ---------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``sparsenet search``."""
    add = parser.add_argument
    add("--method", choices=("density", "embedding"), default="density", help="search densities, or in the embedding")
    add("--data", default="fashion-mnist", help="data set name, file or folder")
    add("--data-dir", help="folder with the data set's files, or with a folder of its name")
    add("--max-depth", type=int, default=3, help="most hidden layers (3)")
    add("--max-width", type=int, default=512, help="neurons of a hidden layer (512)")
    add("--max-active", type=int, help="most active weights (no limit)")
    add("--min-density", type=float, default=0.01, help="of a layer that exists (0.01)")
    add("--max-density", type=float, default=1.0, help="of a layer (1)")
    names = ",".join(ACTIVATIONS)
    add("--activations", default=names, help=f"to choose from ({names})")
    add("--linear", action=argparse.BooleanOptionalAction, default=True, help="hidden layers may have no activation")
    add("--trials", type=int, default=30, help="finished or stopped early (30)")
    add("--sampler", choices=SAMPLERS, default="tpe", help="how trials are proposed (tpe)")
    add("--pruner", choices=PRUNERS, default=None, help="default halving; none with --pareto")
    add("--pareto", action="store_true", help="minimise loss and active weights together")
    add("--epochs", type=int, default=TrialConfig.epochs, help=f"of a whole trial ({TrialConfig.epochs})")
    add("--train-fraction", type=float, default=1.0, help="share of the training examples a trial uses")
    add("--block-size", type=int, default=TrialConfig.block_size, help="of the layers; 1 scatters single weights (16)")
    add("--workers", type=int, default=1, help="processes")
    add("--threads", type=int, default=1, help="threads of each process")
    add("--inherit", action="store_true", help="start trials from the weights of similar finished ones")
    add("--seed", type=int, default=0, help="of the sampler (0)")
    add("--final-seeds", type=int, default=3, help="retrainings of the winner on all the training data; 0 for none")
    add("--out", default="search-results", help="folder of the study, the report and the plots")
    from sparsenet.commands import embedding as embedding_command

    embedding_command.add_arguments(parser.add_argument_group("embedding"))


def run(args: argparse.Namespace) -> int:
    """``sparsenet search``: searches, retrains the winner, writes ``report.json`` and plots, prints a summary."""
    if args.method == "embedding":
        from sparsenet.commands import embedding as embedding_command

        return embedding_command.run(args)
    dataset = load_dataset(args.data, args.data_dir)
    data = TrialData.from_dataset(dataset)
    space = SearchSpace(
        data.features,
        data.num_classes,
        max_depth=args.max_depth,
        max_width=args.max_width,
        min_density=args.min_density,
        max_density=args.max_density,
        max_active=args.max_active,
        allow_linear=args.linear,
        activations=tuple(args.activations.split(",")),
    )
    config = SearchConfig(
        trials=args.trials,
        sampler=args.sampler,
        pruner=args.pruner or ("none" if args.pareto else "halving"),
        multi_objective=args.pareto,
        workers=args.workers,
        threads=args.threads,
        inherit=args.inherit,
        seed=args.seed,
        trial=TrialConfig(epochs=args.epochs, train_fraction=args.train_fraction, block_size=args.block_size),
    )
    report = search(space, data, config, folder=args.out, progress=True)
    finals = []
    if args.final_seeds:
        models: list[DensityMLP] = []
        seeds = tuple(range(args.final_seeds))
        with _threads(args.threads):
            finals = retrain(report.architecture(report.best()), dataset, config.trial, seeds, models, progress=True)
        save_network(Path(args.out, "network.safetensors"), models[0], config.trial)  # choosing would need a third set
    write_report(report, finals, Path(args.out))
    print_summary(report, finals, print)
    return 0


def write_report(report: SearchReport, finals: list[TrialResult], folder: Path) -> None:
    """``report.json`` (whole or not at all) and, with matplotlib, the plots."""
    folder.mkdir(parents=True, exist_ok=True)
    body = {
        "space": asdict(report.space),
        "seconds": report.seconds,
        "requeued": report.requeued,
        "trials": [asdict(t) for t in report.trials],
        "best": asdict(report.best()),
        "final": [asdict(f) for f in finals],
    }
    replace_text(folder / "report.json", json.dumps(body, indent=1))
    try:
        from sparsenet.architecture.search.plots import plot_search

        plot_search(report, folder)
    except ModuleNotFoundError as error:
        tqdm.write(f"search: no plots, {error}; pip install 'sparsenet[plot]'")


def print_summary(report: SearchReport, finals: list[TrialResult], write: Callable[[str], None]) -> None:
    """The winner, the Pareto front and the final test results."""
    best, states = report.best(), [t.state for t in report.trials]
    counts = ", ".join(f"{states.count(s)} {s}" for s in ("finished", "pruned", "failed", "lost") if s in states)
    again = f", {report.requeued} queued again" if report.requeued else ""
    write(f"{len(states)} trials ({counts}{again}) in {report.seconds:.0f} s")
    write(f"best: trial {best.number}, {best.active_weights} active weights, {best.depth} hidden layers")
    write(f"validation loss {best.loss:.4f}, accuracy {100 * best.accuracy:.2f} %")
    architecture = report.architecture(best)
    live = [*best.live_widths, architecture.out_features]
    write("  layer  out x in      density  active weights  activation  live neurons")
    rows = zip(architecture.layers, architecture.active_per_layer, live, strict=True)
    for i, (((out, inp), density, activation), active, alive) in enumerate(rows, start=1):
        write(f"  {i:5d}  {f'{out} x {inp}':11s}  {density:7.4f}  {active:14d}  {activation:10s}  {alive:12d}")
    write("Pareto front (active weights: accuracy):")
    write("  " + "  ".join(f"{t.active_weights}: {100 * t.accuracy:.2f} %" for t in report.pareto()))
    if finals:
        write("retrained on all training data, judged on the test set:")
    for seed, final in enumerate(finals):
        write(f"  seed {seed}: accuracy {100 * final.accuracy:.2f} %, loss {final.loss:.4f}")
    if report.folder is not None:
        network = ", network.safetensors (seed 0)" if finals else ""
        write(f"in {report.folder}: report.json, plots{network}")
