"""Density search: the user gives a maximum depth, width and number of active weights; the search finds the densities.

Space, sampler, pruner and storage are separate pieces (``space``, ``samplers``, ``pruners``, ``workers``); this module
puts them together: it runs the search, retrains the winner, and writes the report and the plots.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from sparsenet import data as datasets
from sparsenet.architecture.search.plots import plot_search
from sparsenet.architecture.search.report import SearchReport, record_of
from sparsenet.architecture.search.space import Architecture, DensityMLP, SearchSpace
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

__all__ = [
    "SearchConfig",
    "SearchReport",
    "SearchSpace",
    "load_dataset",
    "load_network",
    "retrain",
    "save_network",
    "search",
    "torch_threads",
    "write_report",
]


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
                with torch_threads(config.threads):
                    work(study, space, data, config, None, weights, bar.show)
            else:
                run_workers(space, data, config, storage, weights, lambda: bar.show(study))
            bar.show(study)
        records = [record_of(space, t) for t in study.get_trials(deepcopy=False)]
    seconds = time.perf_counter() - started
    return SearchReport(space, [r for r in records if r], seconds, requeued, None if folder is None else Path(folder))


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Torch's number of threads within the ``with`` block; afterwards it is what it was."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        plot_search(report, folder)
    except ModuleNotFoundError as error:
        tqdm.write(f"search: no plots, {error.__cause__}; pip install 'sparsenet[plot]'")
