"""BlockPattern: what it refuses, how it is drawn, and that every way of writing one down comes back the same."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsenet as sn
from sparsenet import BlockPattern
from sparsenet.functional import registry
from sparsenet.pattern import BLOCK_SIZES, blocks_for, carried_from

INT32_MAX = 2**31 - 1


@st.composite
def patterns(draw, largest=60):
    block_size = draw(st.sampled_from(BLOCK_SIZES))
    shape = draw(st.tuples(st.integers(0, largest), st.integers(0, largest)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return BlockPattern.random(shape, draw(st.floats(0, 1)), block_size, generator)


def places_of(pattern):
    return list(zip(pattern.row_indices.tolist(), pattern.col_indices.tolist(), strict=True))


# --- construction ---------------------------------------------------------------------------------------------------


def test_what_it_says():
    """Blocks of 4 at (0, 1), (0, 2), (2, 0) of a 9 x 10 matrix: 3 x 3 places."""
    p = BlockPattern([0, 2, 2, 3], [1, 2, 0], shape=(9, 10), block_size=4)
    assert (p.shape, p.block_size, p.num_blocks, p.block_rows, p.block_cols) == ((9, 10), 4, 3, 3, 3)
    assert p.density == pytest.approx(3 / 9)
    assert places_of(p) == [(0, 1), (0, 2), (2, 0)]
    assert p.linear_places().tolist() == [1, 2, 6] and p.linear_places().dtype == torch.int64
    assert p.crow_indices.dtype == p.col_indices.dtype == p.row_indices.dtype == torch.int32
    assert p.to_mask().tolist() == [[False, True, True], [False] * 3, [True, False, False]]
    assert repr(p) == "BlockPattern(shape=(9, 10), block_size=4, num_blocks=3, density=0.3333)"
    assert p.device == torch.device("cpu") and p.to("cpu") is p


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda v: torch.tensor(v, dtype=torch.int64)])
def test_indices_of_any_integer_kind(kind):
    expected = BlockPattern([0, 2, 3], [0, 2, 1], (8, 12), 4)
    assert BlockPattern(kind([0, 2, 3]), kind([0, 2, 1]), (8, 12), 4) == expected
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8):
        assert (
            BlockPattern(torch.tensor([0, 2, 3], dtype=dtype), torch.tensor([0, 2, 1], dtype=dtype), (8, 12), 4)
            == expected
        )


def test_no_blocks_at_all():
    """ROBUSTNESS 12, 17: also in matrices without rows or columns, also from plain empty lists."""
    for shape, crow in (((8, 12), [0, 0, 0]), ((0, 12), [0]), ((8, 0), [0, 0, 0]), ((0, 0), [0])):
        p = BlockPattern(crow, [], shape, 4)
        assert p.num_blocks == 0 and p.density == 0 and not p.to_mask().any()
        assert p == BlockPattern.random(shape, 0.0, 4) == BlockPattern.from_places([], [], shape, 4)
        assert p == pickle.loads(pickle.dumps(p)) == BlockPattern.from_mask(p.to_mask(), 4, shape)


@pytest.mark.parametrize("argument", ["crow", "col"])
@pytest.mark.parametrize("bad", [torch.float32, torch.float64, torch.float16, torch.bool, torch.complex64])
def test_indices_that_are_no_integers(argument, bad):
    """ROBUSTNESS 10."""
    indices = {"crow": torch.tensor([0, 1, 1]), "col": torch.tensor([1])}
    indices[argument] = indices[argument].to(bad)
    with pytest.raises(TypeError, match=f"BlockPattern: {argument}_indices must be integers, got {bad}"):
        BlockPattern(indices["crow"], indices["col"], (8, 8), 4)


@pytest.mark.parametrize("value", [2**31, 2**32, 2**32 + 1, 2**40, 2**63 - 1, -(2**31) - 1, -(2**63)])
def test_int64_above_int32_is_never_truncated(value):
    """ROBUSTNESS 9: 2^32 + 1 would be a fine column 1 if it were cut to 32 bits."""
    with pytest.raises(ValueError, match=f"BlockPattern: col_indices must fit in int32, got {value}"):
        BlockPattern([0, 1, 1], torch.tensor([value]), (8, 8), 4)
    with pytest.raises(ValueError, match=f"BlockPattern: crow_indices must fit in int32, got {value}"):
        BlockPattern(torch.tensor([0, value, 1]), [1], (8, 8), 4)
    for which in ("rows", "cols"):
        places = {"rows": torch.tensor([0]), "cols": torch.tensor([0]), which: torch.tensor([value])}
        with pytest.raises(ValueError, match=f"BlockPattern: {which} must fit in int32, got {value}"):
            BlockPattern.from_places(**places, shape=(8, 8), block_size=4)


def test_indices_of_wrong_rank():
    for crow, col, name in (([[0, 1, 1]], [1], "crow"), ([0, 1, 1], [[1]], "col"), ([0, 1, 1], 1, "col")):
        with pytest.raises(ValueError, match=f"{name}_indices must have one dimension"):
            BlockPattern(crow, col, (8, 8), 4)


@pytest.mark.parametrize("block_size", [0, -4, 2, 3, 5, 256, 4.0, "4", None, True])
def test_unknown_block_sizes(block_size):
    for make in (lambda b: BlockPattern([0, 0], [], (4, 4), b), lambda b: BlockPattern.random((4, 4), 0.5, b)):
        with pytest.raises(ValueError, match=r"BlockPattern: block_size must be one of 1, 4, 8, 16, 32, 64, 128, got"):
            make(block_size)


@pytest.mark.parametrize("shape", [(4,), (4, 4, 4), 4, None, "ab", (4.5, 4), (4, float("nan")), (4, "x")])
def test_shapes_that_are_no_pair_of_integers(shape):
    """Never truncated: 4.5 is not 4."""
    with pytest.raises(ValueError, match=r"BlockPattern: shape must be two integers \(out, in\), got"):
        BlockPattern.random(shape, 0.5, 4)


@pytest.mark.parametrize("shape", [(-1, 4), (4, -1), (2**31, 4), (4, 2**31), (2**62, 2**62), (2**64, 4)])
def test_shapes_out_of_range(shape):
    with pytest.raises(ValueError, match="BlockPattern: shape must have sizes from 0 to 2147483647, got"):
        BlockPattern.random(shape, 0.0, 4)
    with pytest.raises(ValueError, match="BlockPattern: shape must have sizes from 0 to 2147483647, got"):
        BlockPattern([0], [], shape, 4)


@pytest.mark.parametrize("shape", [(INT32_MAX, INT32_MAX), (INT32_MAX, 4), (INT32_MAX - 127, INT32_MAX)])
@pytest.mark.parametrize("block_size", [1, 128])
def test_products_that_overflow_are_refused_before_allocating(shape, block_size):
    """ROBUSTNESS 15: up to 2^62 places, none of which this machine could hold."""
    for density in (1.0, 0.999, 0.5):
        places = -(-shape[0] // block_size) * -(-shape[1] // block_size)
        if density * places > INT32_MAX:
            with pytest.raises(ValueError, match="there must be at most 2147483647 blocks, got"):
                BlockPattern.random(shape, density, block_size)
    with pytest.raises(ValueError, match="crow_indices must have"):
        BlockPattern([0, 1], [0], shape, block_size)


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan"), float("inf"), "0.5", None, True, 1 + 1e-9])
def test_densities_out_of_range(density):
    for make in (
        lambda d: BlockPattern.random((8, 8), d, 4),
        lambda d: BlockPattern.from_dense(torch.randn(8, 8), d, 4),
    ):
        with pytest.raises(ValueError, match=r"BlockPattern: density must lie in \[0, 1\], got"):
            make(density)


def test_other_refusals():
    with pytest.raises(ValueError, match=r"num_blocks must lie in \[0, 4\], got 5"):
        BlockPattern.random((8, 8), block_size=4, num_blocks=5)
    with pytest.raises(ValueError, match=r"num_blocks must lie in \[0, 4\], got -1"):
        BlockPattern.random((8, 8), block_size=4, num_blocks=-1)
    with pytest.raises(ValueError, match="rows and cols must be of one length, got 2 and 1"):
        BlockPattern.from_places(torch.tensor([0, 1]), torch.tensor([0]), (8, 8), 4)
    with pytest.raises(ValueError, match=r"places must differ, got \(1, 1\) twice"):
        BlockPattern.from_places(torch.tensor([1, 0, 1]), torch.tensor([1, 0, 1]), (8, 8), 4)
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 2\), got 0 to 2"):
        BlockPattern.from_places(torch.tensor([0, 2]), torch.tensor([0, 0]), (8, 8), 4)
    with pytest.raises(ValueError, match=r"rows must lie in \[0, 2\), got -1 to 0"):
        BlockPattern.from_places(torch.tensor([0, -1]), torch.tensor([0, 0]), (8, 8), 4)
    with pytest.raises(ValueError, match=r"cols must lie in \[0, 2\), got 2 to 2"):
        BlockPattern.from_places(torch.tensor([0]), torch.tensor([2]), (8, 8), 4)
    for places, message in (
        (torch.tensor([0, 4]), r"places must lie in \[0, 4\), got 4"),
        (torch.tensor([-1, 0]), r"places must lie in \[0, 4\), got -1"),
        (torch.tensor([3, 0, 3]), r"places must differ, got \(1, 1\) twice"),
    ):
        with pytest.raises(ValueError, match=f"BlockPattern: {message}"):
            BlockPattern.from_linear_places(places, (8, 8), 4)
    for places, got in (
        ([0], "list"),
        (torch.tensor([0.5]), r"torch.float32 \[1\]"),
        (torch.tensor(0), r"torch.int64 \[\]"),
    ):
        with pytest.raises(TypeError, match=f"places must be an int64 tensor with one dimension, got {got}"):
            BlockPattern.from_linear_places(places, (8, 8), 4)
    with pytest.raises(TypeError, match="block_mask must be bool"):
        BlockPattern.from_mask(torch.ones(2, 2), 4)
    with pytest.raises(TypeError, match="block_mask must be bool with two dimensions"):
        BlockPattern.from_mask(torch.ones(2, dtype=torch.bool), 4)
    with pytest.raises(ValueError, match=r"block_mask must have shape \[3, 2\], got \[2, 2\]"):
        BlockPattern.from_mask(torch.ones(2, 2, dtype=torch.bool), 4, (9, 8))
    with pytest.raises(ValueError, match="weight must have two dimensions"):
        BlockPattern.from_dense(torch.ones(2, 2, 2), 0.5, 4)
    with pytest.raises(ValueError, match="weight must not contain NaN"):
        BlockPattern.from_dense(torch.full((8, 8), torch.nan), 0.5, 4)
    with pytest.raises(AttributeError, match="immutable"):
        BlockPattern.random((8, 8), 0.5, 4).shape = (4, 4)
    with pytest.raises(AttributeError):
        BlockPattern.random((8, 8), 0.5, 4).something = 1


def test_changing_the_arguments_afterwards_changes_nothing():
    """ROBUSTNESS 11."""
    for crow, col in (
        (torch.tensor([0, 2, 3], dtype=torch.int32), torch.tensor([0, 1, 1], dtype=torch.int32)),
        (np.array([0, 2, 3], dtype=np.int32), np.array([0, 1, 1], dtype=np.int32)),
    ):
        pattern = BlockPattern(crow, col, (8, 8), 4)
        before = pattern.fingerprint, places_of(pattern)
        crow[:], col[:] = 10**9, 10**9
        assert (pattern.fingerprint, places_of(pattern)) == before
        y = sn.functional.block_sparse_linear(torch.ones(2, 8), torch.ones(3, 4, 4), pattern)
        assert y.tolist() == [[8.0] * 4 + [4.0] * 4] * 2


# --- random ---------------------------------------------------------------------------------------------------------


@given(patterns(200))
def test_random_is_canonical(pattern):
    places = places_of(pattern)
    assert places == sorted(set(places))


@given(
    rows=st.integers(1, 40),
    cols=st.integers(1, 40),
    density=st.floats(0, 1),
    seed=st.integers(0, 2**32),
)
def test_random_has_the_right_number_and_covers_every_row_and_column(rows, cols, density, seed):
    pattern = BlockPattern.random((rows * 4, cols * 4), density, 4, torch.Generator().manual_seed(seed))
    assert pattern.num_blocks == round(density * rows * cols) == blocks_for((rows * 4, cols * 4), density, 4)
    mask = pattern.to_mask()
    covered_rows, covered_cols = int(mask.any(1).sum()), int(mask.any(0).sum())
    if pattern.num_blocks >= max(rows, cols):
        assert (covered_rows, covered_cols) == (rows, cols)
    else:  # too few for all: none is wasted on a line that already has one while another has none
        assert max(covered_rows, covered_cols) == pattern.num_blocks or min(rows, cols) in (covered_rows, covered_cols)


def test_random_follows_its_generator():
    def draw(seed):
        return BlockPattern.random((500, 700), 0.2, 4, torch.Generator().manual_seed(seed))

    assert draw(1) == draw(1) != draw(2)
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(torch.get_rng_state(), state)  # a generator of one's own leaves the global one alone
    torch.manual_seed(5)
    first = BlockPattern.random((500, 700), 0.2, 4)
    torch.manual_seed(5)
    assert BlockPattern.random((500, 700), 0.2, 4) == first != BlockPattern.random((500, 700), 0.2, 4)


@pytest.mark.parametrize("density", [0.1, 0.3, 0.6, 0.9])
def test_random_is_uniform(density):
    """Each place of 12 x 17 is drawn about equally often: chi-square over 600 draws, far out only once in a million."""
    generator = torch.Generator().manual_seed(7)
    draws = 600
    counts = torch.zeros(12, 17)
    for _ in range(draws):
        counts += BlockPattern.random((12, 17), density, 1, generator).to_mask()
    share = round(density * 204) / 204
    chi2 = ((counts - draws * share).square() / (draws * share * (1 - share))).sum().item()
    freedom = 203
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5
    by_row, by_column = counts.sum(1) / counts.sum() * 12, counts.sum(0) / counts.sum() * 17
    assert (by_row - 1).abs().max() < 0.12 and (by_column - 1).abs().max() < 0.12


def test_random_rows_are_independent_of_each_other():
    """No place is drawn together with another much more often than chance has it, beyond the covering first draw."""
    generator = torch.Generator().manual_seed(11)
    draws = torch.stack(
        [BlockPattern.random((8, 8), 0.5, 1, generator).to_mask().flatten() for _ in range(2000)]
    ).float()
    together = draws.T @ draws / 2000
    together.fill_diagonal_(0.25)
    assert (together - 0.25 * 31 / 32).abs().max() < 0.06


def test_random_is_never_dense(run_child):
    """65536 x 65536 at 0.5 % in blocks of 32, and 2^20 x 2^20 single elements: memory grows by tens of megabytes."""
    child = run_child(
        """
        import torch, time
        from sparsenet import BlockPattern
        def high_water():
            lines = open("/proc/self/status").read().splitlines()
            return int(next(l for l in lines if l.startswith("VmHWM")).split()[1]) // 1024
        BlockPattern.random((256, 256), 0.1, 32)
        for shape, density, block in (((65536, 65536), 0.005, 32), ((2**20, 2**20), 1e-6, 1), ((65536, 65536), 2e-5, 1),
                                      ((2**31 - 1, 128 * 3), 1e-3, 128)):
            open("/proc/self/clear_refs", "w").write("5")
            before = high_water()
            pattern = BlockPattern.random(shape, density, block)
            assert pattern.num_blocks == round(density * pattern.block_rows * pattern.block_cols)
            print(high_water() - before)
        """
    )
    few, sparse, scattered, tall = map(int, child.stdout.split())
    assert few < 64, few
    assert sparse < 400, sparse  # a million blocks, a million block rows
    assert scattered < 64, scattered
    assert tall < 1700, tall  # sixteen million block rows: their pointers


@pytest.mark.slow
def test_random_of_many_single_elements(run_child):
    """65536 x 65536 at 0.5 %, block size 1: 21 million blocks; a byte mask of all places would take 4 GiB."""
    child = run_child(
        """
        from sparsenet import BlockPattern
        pattern = BlockPattern.random((65536, 65536), 0.005, 1)
        assert pattern.num_blocks == round(0.005 * 65536**2)
        lines = open("/proc/self/status").read().splitlines()
        print(int(next(l for l in lines if l.startswith("VmHWM")).split()[1]) // 1024)
        """,
        timeout=300,
    )
    assert int(child.stdout) < 3500


# --- from a dense matrix ---------------------------------------------------------------------------------------------


def test_from_dense_keeps_the_largest_blocks():
    weight = torch.zeros(9, 10)
    weight[0, 9], weight[8, 0], weight[4, 4], weight[0:4, 0:4] = 5.0, -4.0, 3.0, 0.5  # norms 5, 4, 3, 2
    expected = [(0, 2), (2, 0), (1, 1), (0, 0)]
    for count in range(5):
        pattern = BlockPattern.from_dense(weight, count / 9, 4)
        assert set(places_of(pattern)) == set(expected[:count])
    assert BlockPattern.from_dense(weight, 1.0, 4).num_blocks == 9


def test_from_dense_breaks_ties_by_index():
    for value in (0.0, 1.0):
        assert places_of(BlockPattern.from_dense(torch.full((8, 12), value), 1 / 3, 4)) == [(0, 0), (0, 1)]
        # three of 2 x 3 reach every row and column: of the first three, (0, 0) gives way to (1, 0)
        assert places_of(BlockPattern.from_dense(torch.full((8, 12), value), 0.5, 4)) == [(0, 1), (0, 2), (1, 0)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_from_dense_of_any_dtype(dtype):
    weight = torch.randn(33, 70).to(dtype)
    assert BlockPattern.from_dense(weight, 0.3, 16) == BlockPattern.from_dense(weight.float(), 0.3, 16)
    assert BlockPattern.from_dense(weight.t().contiguous().t(), 0.3, 16) == BlockPattern.from_dense(weight, 0.3, 16)


def test_from_dense_prefers_infinity():
    weight = torch.randn(8, 8)
    weight[7, 7] = torch.inf
    assert places_of(BlockPattern.from_dense(weight, 0.25, 4)) == [(1, 1)]


# --- round trips ----------------------------------------------------------------------------------------------------


@given(patterns())
def test_round_trips(pattern):
    crow, col = pattern.crow_indices, pattern.col_indices
    rows, shape, b = pattern.row_indices, pattern.shape, pattern.block_size
    backwards = torch.arange(len(col)).flip(0)
    file = io.BytesIO()
    torch.save((crow, col, shape, b), file)
    file.seek(0)
    for twin in (
        BlockPattern(crow, col, shape, b),
        BlockPattern(crow.long(), col.tolist(), shape, b),
        BlockPattern.from_mask(pattern.to_mask(), b, shape),
        BlockPattern.from_places(rows[backwards], col[backwards], shape, b),
        BlockPattern.from_linear_places(pattern.linear_places(), shape, b),
        BlockPattern.from_linear_places(pattern.linear_places()[backwards], shape, b),
        BlockPattern(*torch.load(file, weights_only=True)),
        pattern.copy(),
        copy.copy(pattern),
        copy.deepcopy(pattern),
        pickle.loads(pickle.dumps(pattern)),
        pattern.to("cpu"),
    ):
        assert twin == pattern and hash(twin) == hash(pattern) and twin.fingerprint == pattern.fingerprint
        assert places_of(twin) == places_of(pattern)
    assert pattern.copy() is not pattern and pattern.copy().col is not pattern.col


@given(patterns(20), patterns(20))
def test_equal_exactly_when_the_same_blocks(a, b):
    same = (a.shape, a.block_size, places_of(a)) == (b.shape, b.block_size, places_of(b))
    assert (a == b) == same == (a.fingerprint == b.fingerprint) == (len({a, b}) == 1)


def test_close_relatives_differ():
    base = BlockPattern([0, 1, 1], [0], (8, 8), 4)
    assert base != BlockPattern([0, 1, 1], [0], (8, 7), 4) != BlockPattern([0, 1, 1], [0], (7, 8), 4)
    assert base != BlockPattern([0, 1, 1], [1], (8, 8), 4) and base != BlockPattern([0, 0, 1], [0], (8, 8), 4)
    assert base != BlockPattern([0, 1, 1], [0], (16, 16), 8) and base != "pattern" and base is not None


def test_from_mask_of_whole_blocks():
    mask = torch.tensor([[True, False], [False, True], [False, False]])
    assert BlockPattern.from_mask(mask, 4) == BlockPattern([0, 1, 2, 2], [0, 1], (12, 8), 4)
    assert torch.equal(BlockPattern.from_mask(mask.t().contiguous().t(), 4).to_mask(), mask)


# --- carried_from ---------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1))
def test_carried_from(seed, first, second):
    generator = torch.Generator().manual_seed(seed)
    old, new = (BlockPattern.random((40, 50), d, 8, generator) for d in (first, second))
    number = {place: i for i, place in enumerate(places_of(old))}
    carried = carried_from(old, new)
    assert carried.dtype == torch.int64
    assert carried.tolist() == [number.get(place, -1) for place in places_of(new)]


def test_carried_from_refuses_another_matrix():
    old = BlockPattern.random((40, 50), 0.5, 8)
    for other in (BlockPattern.random((41, 50), 0.5, 8), BlockPattern.random((40, 50), 0.5, 16)):
        with pytest.raises(ValueError, match=r"shape and block_size must stay \(40, 50\), 8, got"):
            carried_from(old, other)


# --- lifetime -------------------------------------------------------------------------------------------------------


def test_dropped_patterns_leave_nothing_behind():
    """The registry that finds indices by tensor forgets what is gone; a tensor that lives on finds no stale index."""
    gc.collect()
    before = len(registry._patterns)
    kept = [BlockPattern.random((64, 64), 0.5, 8).col for _ in range(50)]
    assert len(registry._patterns) - before == 50
    found = registry.pattern_behind(torch.zeros(9, dtype=torch.int32), kept[0][:0], (64, 64), 8)
    assert found.num_blocks == 0
    kept.clear()
    del found
    gc.collect()
    assert len(registry._patterns) == before
