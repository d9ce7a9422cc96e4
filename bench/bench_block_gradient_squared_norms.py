"""Block norms of the dense weight gradient, and gradients of candidate blocks, against a dense weight gradient."""

import pytest

from sparsenet.benchmark.cases import Case
from sparsenet.benchmark.operations import norms_trial


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("batch", [64, 128, 256, 512, 1024])
def test_norms(contest, batch, block_size, dtype):
    contest(norms_trial("norms", Case(batch=batch, block_size=block_size, dtype=dtype)))


@pytest.mark.parametrize("density", [0.001, 0.01, 0.1])
@pytest.mark.parametrize("block_size", [16, 32, 64])
def test_candidates(contest, block_size, density):
    contest(norms_trial("candidates", Case(density=density, block_size=block_size)))
