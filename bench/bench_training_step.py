"""The whole training step of 784-4096-4096-4096-10 with rewiring, per-call overhead, and threads."""

import pytest

from sparsenet.benchmark import linear
from sparsenet.benchmark.cases import Case
from sparsenet.benchmark.networks import OPTIMIZERS
from sparsenet.benchmark.training import loader_trial, overhead_trial, threads_trial, training_trial


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("density", [0.1, 0.05])
def test_training_step(contest, optimizer, density):
    contest(training_trial(optimizer, density))


@pytest.mark.parametrize("density", [0.1, 0.05])
def test_training_step_of_rivals(contest, density):
    rivals = ("dense", "equal_parameter_dense", "masked_dense", "sparselab")
    contest(training_trial("adamw", density, rivals, batch=128))


@pytest.mark.parametrize("phase", ["forward", "step"])
def test_overhead(contest, phase):
    contest(overhead_trial(phase))


@pytest.mark.parametrize("phase", linear.PHASES)
def test_threads(contest, phase):
    contest(threads_trial(phase, Case()))


def test_data_loader_workers(contest):
    contest(loader_trial())
