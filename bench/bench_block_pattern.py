"""Building patterns, and choosing the best places."""

import pytest

from sparsenet.benchmark.cases import Case
from sparsenet.benchmark.operations import PATTERN_PHASES, pattern_trial


@pytest.mark.parametrize("phase", PATTERN_PHASES)
@pytest.mark.parametrize(
    "case",
    [Case(density=0.1), Case((8192, 8192), density=0.01), Case((16384, 16384), density=0.05, block_size=16)],
    ids=["4096-10%-b32", "8192-1%-b32", "16384-5%-b16"],
)
def test_build(contest, phase, case):
    contest(pattern_trial(phase, case))
