"""Peak memory of training, and of scoring growth without the dense gradient. Each figure is a process of its own."""

import pytest

from sparsenet.benchmark.memory import norms_memory_row, training_memory_row


@pytest.mark.parametrize("density", [0.1, 0.05])
def test_training(record, density):
    row = record(training_memory_row("adamw", density))
    assert row.metrics["sparsenet_bytes"] > 0


@pytest.mark.parametrize("batch", [256, 1024])
def test_block_norms(record, batch):
    assert record(norms_memory_row(batch=batch)).metrics["sparsenet_bytes"] > 0
