"""A rewire of a layer and its optimizer state, scores excluded."""

import pytest

from sparsenet.benchmark.cases import Case
from sparsenet.benchmark.training import rewire_trial


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize(
    ("features", "density"), [(8192, 0.01), (4096, 0.1), (16384, 0.05)], ids=["8192-1%", "4096-10%", "16384-5%"]
)
def test_rewire(contest, features, density, block_size):
    contest(rewire_trial(Case((features, features), density=density, block_size=block_size)))
