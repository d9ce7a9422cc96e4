"""Density search: exact counts, samplers, storage that survives a kill, errors."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_search import QUICK, SMALL, toy_data

from sparsenet.architecture.search.space import Architecture, SearchSpace
from sparsenet.architecture.search.trials import TrialConfig, TrialData

optuna = pytest.importorskip("optuna")

from sparsenet.architecture.search.pruners import PRUNERS, make_pruner  # noqa: E402
from sparsenet.architecture.search.run import (  # noqa: E402
    SearchConfig,
    load_dataset,
    load_network,
    retrain,
    search,
    write_report,
)
from sparsenet.architecture.search.samplers import (  # noqa: E402
    GridSampler,
    RandomSampler,
    StudySampler,
    architecture_of,
    make_sampler,
    random_parameters,
)
from sparsenet.architecture.search.workers import only_search, open_study, requeue_lost  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


# --- bad input ---


def test_data_nothing_can_be_learned_from():
    x = torch.randn(50, 4)
    with pytest.raises(ValueError, match="labels must have 2 classes or more, got 1"):
        TrialData.from_arrays(x, torch.zeros(50, dtype=torch.int64))
    labels = torch.zeros(50)
    labels[7] = float("nan")
    with pytest.raises(ValueError, match="labels must be class indices, got nan at 7"):
        TrialData.from_arrays(x, labels)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (TrialConfig, {"epochs": 0}, "epochs and batch_size must be at least 1, got 0, 128"),
        (TrialConfig, {"train_fraction": 0.0}, r"train_fraction must lie in \(0, 1\], got 0.0"),
        (TrialConfig, {"init": "xavier"}, "init must be he or small, got 'xavier'"),
        (TrialConfig, {"schedule": "step"}, "schedule must be cosine or constant, got 'step'"),
        (SearchConfig, {"trials": 0}, "trials must be an integer >= 1, got 0"),
        (SearchConfig, {"workers": True}, "workers must be an integer >= 1, got True"),
        (SearchConfig, {"multi_objective": True}, "pruner must be none with several objectives, got 'halving'"),
    ],
)
def test_bad_settings(kind, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        kind(**change)


def test_bad_names_of_samplers_and_pruners():
    with pytest.raises(ValueError, match="sampler must be one of random, tpe, gp, nsga2, got 'grid'"):
        make_sampler("grid", SMALL)
    with pytest.raises(ValueError, match="pruner must be one of none, halving"):
        make_pruner("asha", 5)


def test_without_optuna_one_line_says_how(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'sparsenet\[search\]'"):
        search(SMALL, toy_data())
    assert RandomSampler(SMALL, 0).ask().number == 0  # random search by itself needs none


def test_data_and_space_must_fit():
    with pytest.raises(ValueError, match="data must have the space's 9 features and 2 classes, got 8 features"):
        search(replace(SMALL, in_features=9), toy_data())


def test_more_threads_than_cores_are_named():
    cores = len(os.sched_getaffinity(0))
    config = SearchConfig(trials=1, sampler="random", pruner="none", threads=cores + 1, trial=QUICK)
    with pytest.warns(UserWarning, match=f"workers x threads should be at most the {cores} cores, got 1 x {cores + 1}"):
        search(SMALL, toy_data(), config)


def test_several_workers_need_a_folder():
    with pytest.raises(ValueError, match="folder must be given with several workers"):
        search(SMALL, toy_data(), SearchConfig(workers=2))


# --- samplers ---


@pytest.mark.parametrize("kind", ["random", "tpe", "gp", "nsga2"])
def test_ask_and_tell_conformance(kind):
    if kind == "gp":
        pytest.importorskip("scipy")
    space = replace(SMALL, allow_linear=True, activations=("relu", "silu"))
    runs = []
    for _ in range(2):
        sampler, seen = make_sampler(kind, space, seed=3), []
        for number in range(10):
            proposal = sampler.ask()
            assert proposal.number == number
            assert proposal.architecture.active_weights <= 200
            assert all(d == 0 or d > 0 for d in proposal.architecture.densities)
            assert 1 <= proposal.architecture.depth <= 3
            sampler.tell(proposal, float(proposal.parameters["density_out"]))
            seen.append(proposal.parameters)
        runs.append(seen)
    assert runs[0] == runs[1]  # same seed, same trials
    assert runs[0] != [make_sampler(kind, space, seed=4).ask().parameters for _ in range(10)]


def test_tpe_learns_and_random_does_not():
    space = replace(SMALL, max_active=None)

    def last_losses(sampler):
        losses = []
        for _ in range(40):
            proposal = sampler.ask()
            losses.append(abs(proposal.parameters["density_out"] - 0.1))
            sampler.tell(proposal, losses[-1])
        return sum(losses[20:]) / 20

    assert last_losses(StudySampler(space, "tpe", 0)) < 0.5 * last_losses(RandomSampler(space, 0))


def test_multi_objective_finds_small_networks():
    sampler = StudySampler(replace(SMALL, max_active=None), "tpe", 0, multi_objective=True)
    for _ in range(12):
        proposal = sampler.ask()
        sampler.tell(proposal, 1.0 / proposal.architecture.active_weights)
    assert len(sampler.study.best_trials) >= 6  # every size is a trade-off here


def test_a_diverged_trial_is_told_as_failed():
    sampler = StudySampler(SMALL, "tpe", 0)
    sampler.tell(sampler.ask(), float("nan"))
    assert sampler.study.trials[0].state == optuna.trial.TrialState.FAIL
    proposal = sampler.ask()
    sampler.tell(proposal, 1.0)
    with pytest.raises(ValueError, match="proposal must be open, got number 1"):
        sampler.tell(proposal, 1.0)


def test_grid_covers_depths_and_levels():
    sampler = GridSampler(SearchSpace(8, 2, max_depth=2, max_width=10, min_density=0.2), levels=3)
    points = []
    with pytest.raises(StopIteration):
        while True:
            proposal = sampler.ask()
            sampler.tell(proposal, 0.0)
            points.append((proposal.architecture.depth, round(proposal.architecture.densities[-1], 2)))
    assert points == [(1, 0.2), (1, 0.6), (1, 1.0), (2, 0.2), (2, 0.6), (2, 1.0)]


def test_random_parameters_stay_inside_the_space():
    for number in range(200):
        p = random_parameters(SMALL, 0, number)
        assert 1 <= p["depth"] <= 3 and 0 <= p["pattern_seed"] < 4
        assert all(0.05 <= p[k] <= 1 for k in p if k.startswith("density"))


# --- the search ---


@pytest.mark.parametrize("pruner", PRUNERS)
def test_search_with_every_pruner(pruner):
    config = SearchConfig(trials=6, sampler="random", pruner=pruner, trial=replace(QUICK, epochs=4))
    report = search(SMALL, toy_data(), config)
    assert len(report.trials) == 6
    assert report.best().loss == min(t.loss for t in report.finished())
    assert all(len(t.live_widths) == t.depth and max(t.live_widths) <= 16 for t in report.finished())
    front = report.pareto()
    assert [t.accuracy for t in front] == sorted(t.accuracy for t in front)
    again = search(SMALL, toy_data(), config)
    assert [t.parameters for t in again.trials] == [t.parameters for t in report.trials]


def test_search_goes_on_and_refuses_another(tmp_path, capsys):
    config = SearchConfig(trials=2, sampler="tpe", pruner="none", trial=QUICK)
    search(SMALL, toy_data(), config, folder=tmp_path)
    more = search(SMALL, toy_data(), replace(config, trials=4), folder=tmp_path, progress=True)
    assert "search: goes on after 2 trials; 0 that were running are queued again" in capsys.readouterr().out
    assert [t.number for t in more.trials] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="storage must hold a search of the same space"):
        search(replace(SMALL, max_width=32), toy_data(), config, folder=tmp_path)
    with only_search(tmp_path / "search.db"), pytest.raises(OSError, match="in use by another search"):
        search(SMALL, toy_data(), config, folder=tmp_path)


def test_multi_objective_search_and_inheritance(tmp_path):
    config = SearchConfig(trials=4, sampler="nsga2", pruner="none", multi_objective=True, trial=QUICK)
    assert len(search(SMALL, toy_data(), config).finished()) == 4
    config = SearchConfig(trials=4, sampler="random", pruner="none", inherit=True, trial=QUICK)
    report = search(SMALL, toy_data(), config, folder=tmp_path)
    assert len(list((tmp_path / "weights").glob("trial_*.safetensors"))) == len(report.finished()) == 4


def test_a_diverging_trial_fails_and_the_search_goes_on():
    config = SearchConfig(
        trials=3, sampler="random", pruner="none", trial=replace(QUICK, learning_rate=1e30, norm="none")
    )
    report = search(SMALL, toy_data(), config)
    assert [t.state for t in report.trials] == ["failed"] * 3
    with pytest.raises(ValueError, match="at least one trial must finish, got none of 3"):
        report.best()


def test_lost_trials_are_queued_again_first(tmp_path):
    config = SearchConfig(trials=4, sampler="random", pruner="none", trial=QUICK)
    study = open_study(SMALL, config, tmp_path / "search.db")
    from sparsenet.architecture.search.samplers import distributions

    lost = study.ask(distributions(SMALL))  # as if killed while it ran
    study.ask()  # as if killed before it had parameters
    study.ask({"depth": distributions(SMALL)["depth"]})  # ... and in the middle of them
    assert requeue_lost(study, SMALL) == 1
    report = search(SMALL, toy_data(), config, folder=tmp_path)
    assert [t.state for t in report.trials] == ["lost", *["finished"] * 4]
    assert report.trials[1].parameters == lost.params
    straight = search(SMALL, toy_data(), config)  # no kill: the same four trials
    assert [t.parameters for t in report.finished()] == [t.parameters for t in straight.trials]


KILLED = """
import sys
import torch
sys.path.insert(0, {tests!r})
import test_run as t
if __name__ == "__main__":
    torch.set_num_threads(1)
    t.search(t.SMALL, t.toy_data(), t.replace(t.KILL_CONFIG, workers={workers}, trials=100000), folder={folder!r})
"""
KILL_CONFIG = SearchConfig(trials=5, sampler="random", pruner="none", trial=replace(QUICK, epochs=8))


def states(study) -> list[str]:
    return [t.state.name for t in study.get_trials(deepcopy=False)]


@pytest.mark.parametrize(("workers", "then"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.slow)])
def test_a_killed_search_loses_at_most_the_running_trials(tmp_path, workers, then):
    folder, script = tmp_path / "s", tmp_path / "killed.py"
    script.write_text(KILLED.format(tests=str(Path(__file__).parent), folder=str(folder), workers=workers))
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    try:
        study = wait_for(lambda: process.poll() is None and open_study(SMALL, KILL_CONFIG, folder / "search.db"))
        wait_for(lambda: states(study).count("COMPLETE") >= 3)
        process.kill()  # the parent only: its workers must end by themselves
        process.wait()
        wait_for(lambda: not group_is_alive(process.pid))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    before = {t.number: t.params for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"}
    running = states(study).count("RUNNING")
    assert running <= workers
    again = replace(KILL_CONFIG, workers=then, trials=len(before) + 2)
    report = search(SMALL, toy_data(), again, folder=folder)
    after = {t.number: t.parameters for t in report.finished()}
    assert all(after[n] == p for n, p in before.items())
    assert len(after) == len(before) + 2
    assert sum(t.state == "lost" for t in report.trials) == report.requeued <= running
    # none lost, none twice, and the numbers do not depend on who computed them: as a search that was never killed
    straight = search(SMALL, toy_data(), replace(KILL_CONFIG, trials=len(after)))
    assert sorted(t.loss for t in straight.trials) == sorted(t.loss for t in report.finished())


def wait_for(condition, seconds=300):
    """What ``condition`` returns when it is true; errors (the database is being made) count as not yet."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            if found := condition():
                return found
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {condition}")


def group_is_alive(group):
    """Whether a process of the group runs; zombies nobody waits for do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, its_group = stat.read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state != "Z":
                return True
    return False


@pytest.mark.slow
def test_a_failing_worker_is_named(tmp_path):
    data = toy_data()
    narrow = replace(data.held_out, x=data.held_out.x[:, :5])
    wrong = replace(data, held_out=narrow)  # nothing checks it before a worker evaluates
    with pytest.raises(RuntimeError, match="a worker failed; run again to resume(.|\n)*Traceback"):
        search(SMALL, wrong, SearchConfig(trials=2, sampler="random", workers=2, trial=QUICK), folder=tmp_path)


def test_plots_and_report(tmp_path):
    pytest.importorskip("matplotlib")
    config = SearchConfig(trials=5, sampler="random", trial=replace(QUICK, epochs=3))
    report = search(SMALL, toy_data(), config)
    write_report(report, [], tmp_path)
    for name in ("accuracy_against_weights.png", "parallel_coordinates.png", "best_so_far.png", "report.json"):
        assert (tmp_path / name).stat().st_size > 500


def test_retrain_uses_every_example_and_another_pattern_per_seed():
    from sparsenet.data.datasets import Dataset

    data = toy_data()
    dataset = Dataset("toy", data.train.x, data.train.y, data.held_out.x, data.held_out.y, 2, "here")
    results = retrain(Architecture(8, 2, 16, (0.5, 0.5)), dataset, replace(QUICK, train_fraction=0.1), (0, 1))
    assert [r.active_weights for r in results] == [80, 80]
    assert results[0].curve != results[1].curve


def test_command_line(tmp_path, capsys):
    import argparse

    from sparsenet.commands import search as command

    pytest.importorskip("sklearn")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    line = ["--data", "digits", "--max-depth", "2", "--max-width", "32", "--max-active", "1500", "--trials", "3"]
    line += ["--epochs", "2", "--sampler", "random", "--final-seeds", "1", "--out", str(tmp_path), "--block-size", "4"]
    assert command.run(parser.parse_args(line)) == 0
    printed = capsys.readouterr().out
    assert (
        "3 trials" in printed
        and "Pareto front" in printed
        and "seed 0: accuracy" in printed
        and "live neurons" in printed
    )
    report = json.loads((tmp_path / "report.json").read_text())
    network = load_network(tmp_path / "network.safetensors")
    assert network.active_weights() == report["best"]["active_weights"] <= 1500
    dataset = load_dataset("digits", None)
    accuracy = TrialData.from_dataset(dataset, validation=0).judge(network).accuracy
    assert accuracy == report["final"][0]["accuracy"]
    with pytest.raises(ValueError, match="must be a network of sparsenet search"):
        load_network(tmp_path / "report.json")


def test_architecture_of_ignores_densities_beyond_the_depth():
    parameters = random_parameters(SMALL, 0, 0) | {"depth": 1}
    assert architecture_of(SMALL, parameters).densities[1:3] == (0.0, 0.0)
