"""block_sparse_linear over density, shape, batch and pattern, each phase alone and the step, and against its rivals.

pytest bench/bench_block_sparse_linear.py -k density --results bench/results
"""

import pytest

from sparsenet.benchmark import linear
from sparsenet.benchmark.cases import Case
from sparsenet.benchmark.rivals import RIVALS

DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
SQUARE = [(n, n) for n in (1024, 2048, 8192, 16384)]
PAIRS = [(3072, 768), (768, 3072), (4096, 1024), (11008, 4096), (4096, 11008), (3000, 1000), (5000, 5000)]


def phases(*names):
    return pytest.mark.parametrize("phase", names or linear.PHASES)


def cases(name, grid):
    return pytest.mark.parametrize(name, grid, ids=lambda c: "-".join(map(str, c.fields().values())))


@phases()
@cases("case", [Case(density=d, block_size=b) for b in (16, 32, 64, 128) for d in DENSITIES])
def test_density_float32(contest, phase, case):
    contest(linear.trial(phase, case))


@phases("forward", "grad_input", "grad_weight")
@cases("case", [Case(density=d, block_size=b, dtype="bfloat16") for b in (16, 32, 64, 128) for d in DENSITIES[3:]])
def test_density_bfloat16(contest, phase, case):
    contest(linear.trial(phase, case))


@phases("forward", "grad_input", "grad_weight")
@cases("case", [Case(shape, density=d) for shape in SQUARE[:3] + PAIRS for d in (0.05, 0.1, 0.2)])
def test_shape(contest, phase, case):
    contest(linear.trial(phase, case))


@phases("forward", "grad_input", "grad_weight")
@cases("case", [Case(SQUARE[3], batch=256, density=d) for d in (0.01, 0.05)])
def test_large_shape(contest, phase, case):
    contest(linear.trial(phase, case))


@phases("forward", "grad_input", "grad_weight")
@cases("case", [Case(batch=m, density=d, block_size=b) for m in (1, 8, 16, 128) for d in (0.05, 0.1) for b in (16, 32)])
def test_small_batch(contest, phase, case):
    contest(linear.trial(phase, case))


@phases("forward", "grad_input", "grad_weight")
@cases("case", [Case(batch=2048, density=d) for d in (0.01, 0.02, 0.05, 0.1)])
def test_large_batch(contest, phase, case):
    contest(linear.trial(phase, case))


@phases("forward", "grad_input", "grad_weight")
@cases("case", [Case((2048, 2048), batch=8192, density=d) for d in (0.05, 0.1)])
def test_largest_batch(contest, phase, case):
    contest(linear.trial(phase, case))


@phases("forward", "grad_input", "grad_weight")
@cases("case", [Case(pattern=p) for p in ("power_law", "rigl", "empty_rows", "full_row", "lone_row")])
def test_pattern(contest, phase, case):
    contest(linear.trial(phase, case))


@phases("forward", "grad_input", "step")
@cases("case", [Case(density=d) for d in (0.01, 0.05, 0.1, 0.2, 0.5)])
def test_rivals(contest, phase, case):
    contest(linear.trial(phase, case, tuple(RIVALS)))


@phases("forward", "step")
@cases("case", [Case((2048, 2048), 256, d, b) for b in (1, 4, 8) for d in (0.1, 0.05, 0.01)])
def test_small_blocks(contest, phase, case):
    contest(linear.trial(phase, case, ("dense", "sparselab")))
