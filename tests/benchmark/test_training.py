"""The benches of fixed size, at sizes that take no time; pytest-benchmark drives the bench files."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import sparsenet as sn
from sparsenet import cli
from sparsenet.benchmark import machine, memory, networks, results, timing, training
from sparsenet.benchmark.cases import Case
from sparsenet.benchmark.goals import GOALS
from sparsenet.benchmark.timing import Timings
from sparsenet.benchmark.trial import Unavailable
from sparsenet.commands import bench as command

ROOT = Path(__file__).resolve().parents[2]
SIZES = (32, 64, 64, 10)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(timing, "_SAMPLE_SECONDS", 1e-6)
    monkeypatch.setattr(machine, "ceilings", lambda: machine.Ceilings(None, 10.0))


def test_a_training_step_is_amortised_over_a_hundred():
    trial = training.training_trial("adamw", 0.2, ("dense",), SIZES, batch=8, block_size=16)
    assert set(trial.contenders) == {"sparsenet", "rewiring_step", "dense"} and trial.goal is None
    times = {"sparsenet": [1e-3] * 3, "rewiring_step": [11e-3] * 3, "dense": [5.5e-3] * 3}
    metrics = trial.derive(Timings(times))
    assert metrics["amortised_ms"] == pytest.approx(1.1) and metrics["speedup"] == pytest.approx(5.0)
    assert metrics["eff"] == pytest.approx(1.0)
    row = trial.run(1e-9)
    assert row.metrics["speedup"] > 0 and row.case["sizes"] == "32-64-64-10"


def test_the_rewiring_contender_rewires_and_the_plain_one_does_not(monkeypatch):
    steps = []
    original = sn.Sparsifier.step

    def step(self):
        update = original(self)
        steps.append((self.every, update is not None and update.grown > 0))
        return update

    monkeypatch.setattr(sn.Sparsifier, "step", step)
    trial = training.training_trial("adamw_fused", 0.2, (), SIZES, batch=8, block_size=16)
    for name in ("sparsenet", "rewiring_step"):
        for _ in range(2):
            trial.contenders[name].call()
    assert [grew for every, grew in steps if every > 1] == [False] * 2
    assert all(grew for every, grew in steps if every == 1)


def test_every_goal_of_training_has_a_trial():
    named = {f"training {o} {d}" for o in networks.OPTIMIZERS for d in (0.1, 0.05)}
    assert {name for name in GOALS if name.startswith("training")} <= named


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_learn(name):
    torch.manual_seed(0)
    try:
        model = networks.NETWORKS[name](SIZES, 0.5, 16)
    except Unavailable as reason:
        pytest.skip(f"{name}: {reason}")
    x, y = torch.randn(64, 32), torch.randint(10, (64,))
    step = networks.training_step(model, torch.optim.AdamW(model.parameters(), lr=1e-2), x, y)
    before = torch.nn.functional.cross_entropy(model(x), y).item()
    for _ in range(30):
        step()
    assert torch.nn.functional.cross_entropy(model(x), y).item() < 0.8 * before


def test_equal_parameters():
    sizes = (784, 4096, 4096, 4096, 10)
    narrow = networks.equal_parameter_sizes(sizes, 0.1)
    wanted = 0.1 * sum(a * b for a, b in pairwise(sizes))
    assert sum(a * b for a, b in pairwise(narrow)) == pytest.approx(wanted, rel=2e-3)
    assert (narrow[0], narrow[-1], len(narrow)) == (784, 10, 5)


def test_a_rewire_moves_blocks_every_time():
    trial = training.rewire_trial(Case((256, 256), density=0.2, block_size=16))
    for _ in range(3):
        update = trial.contenders["sparsenet"].call()
        assert update.grown == update.dropped == round(0.3 * trial.case["num_blocks"])
    assert trial.derive(Timings({"sparsenet": [2e-3] * 3}))["milliseconds"] == pytest.approx(2.0)
    assert trial.goal is None and next(training.trials("update")).goal == GOALS["rewire"]


def test_overhead_is_the_difference_per_call():
    trial = training.overhead_trial("step")
    metrics = trial.derive(Timings({"sparsenet": [30e-6, 50e-6, 31e-6], "dense": [20e-6, 20e-6, 20e-6]}))
    assert metrics["overhead_us"] == pytest.approx(11.0)
    for phase in ("forward", "step"):
        row = training.overhead_trial(phase, features=16).run(1e-9)
        assert row.case["threads"] == 1 and row.goal is None


def test_scaling_over_threads():
    trial = training.threads_trial("forward", Case((96, 64), 20, 0.3, 16))
    seconds = {"sparsenet": [1.0], "sparsenet_1_thread": [1.8], "dense": [1.0], "dense_1_thread": [2.0]}
    metrics = trial.derive(Timings(seconds))
    assert metrics == pytest.approx({"scaling": 1.8, "dense_scaling": 2.0, "share_of_dense_scaling": 0.9})
    seen = {}
    for name, contender in trial.contenders.items():
        contender.before()
        seen[name] = torch.get_num_threads()
    assert seen == {"sparsenet": 2, "sparsenet_1_thread": 1, "dense": 2, "dense_1_thread": 1}


def test_loaders_with_and_without_workers():
    trial = training.loader_trial((32, 64, 10), batch=8, workers=1)
    assert set(trial.contenders) == {"sparsenet", "sparsenet_no_workers", "dense", "dense_no_workers"}
    row = trial.run(1e-9)
    assert row.metrics["slowdown"] > 0 and row.metrics["dense_slowdown"] > 0


@pytest.mark.slow
def test_memory_is_measured_in_children():
    row = memory.training_memory_row("adamw", 0.1, ("sparsenet", "dense"), (64, 2048, 2048, 10), batch=16)
    dense = 4 * (64 * 2048 + 2048 * 2048 + 2048 * 10)  # weights; gradients and moments come to them
    assert 3.5 * dense < row.metrics["dense_bytes"] < 7 * dense
    assert row.metrics["share_of_dense"] < 0.4
    norms = memory.norms_memory_row(2048, batch=64)
    assert 0 <= norms.metrics["share_of_dense_gradient"] < 0.5


def test_a_measuring_process_that_fails_says_why():
    with pytest.raises(RuntimeError, match="bench: the measuring process must end well, got .*KeyError"):
        memory._in_child({"network": "no such", "sizes": [8, 8], "density": 1.0, "block": 8, "batch": 1})


def test_fixed_benches_from_the_command_line(tmp_path, monkeypatch, capsys):
    tiny = lambda op: iter([training.rewire_trial(Case((64, 64), density=0.5, block_size=16))])  # noqa: E731
    monkeypatch.setattr(command.training, "trials", tiny)
    assert cli.main(["bench", "--op", "update", "--seconds", "0.001", "--json", str(tmp_path / "a.json")]) == 0
    assert "update rewire" in capsys.readouterr().out


# --- bench/ ---


def test_a_bench_file_is_driven_by_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    options = ["-q", "-p", "no:cacheprovider", "--contest-seconds", "0.001", "--results", str(tmp_path)]
    which = ["bench_training_step.py", "-k", "overhead", "--benchmark-json", str(tmp_path / "benchmark.json")]
    command = [sys.executable, "-m", "pytest", *which, *options]
    # told that it runs beside other tests, pytest-benchmark would measure nothing
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT / "bench", capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = results.read(tmp_path / "training_step.json").rows
    assert [row.phase for row in rows] == ["forward", "step"]
    theirs = json.loads((tmp_path / "benchmark.json").read_text())["benchmarks"]
    for bench, row in zip(theirs, rows, strict=True):
        assert bench["extra_info"]["overhead_us"] == pytest.approx(row.metrics["overhead_us"], rel=1e-4)
        assert bench["stats"]["rounds"] == row.rounds
