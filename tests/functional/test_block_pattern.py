"""block_pattern's native part: index checks, the transposed index, sorting places, choosing the k extreme scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bad_indices import BAD_INDICES
from hypothesis import given
from hypothesis import strategies as st

import sparsenet as sn
from sparsenet import _C, functional
from sparsenet.functional import registry, select_extreme

MASKS = st.tuples(st.integers(0, 12), st.integers(0, 12), st.integers(0, 2**32), st.floats(0, 1))


def random_mask(rows, cols, seed, density):
    return np.random.default_rng(seed).random((rows, cols)) < density


# --- the transposed index -------------------------------------------------------------------------------------------


@given(MASKS)
def test_transposed_index(drawn):
    """Column by column, the same blocks: their rows and their numbers."""
    mask = random_mask(*drawn)
    pattern = sn.BlockPattern.from_mask(torch.from_numpy(mask), 4)
    row, col = mask.nonzero()
    by_column = np.lexsort((row, col))
    native = pattern.native
    assert native.row.tolist() == row.tolist()
    assert native.t_crow.tolist() == [0, *mask.sum(0).cumsum().tolist()]
    assert native.t_row.tolist() == row[by_column].tolist()
    assert native.t_block.tolist() == by_column.tolist()


def test_what_python_gets_are_copies():
    """Writing into anything that can be reached does not reach the kernels (ROBUSTNESS 11)."""
    pattern = sn.BlockPattern([0, 2, 3], [0, 1, 1], (8, 8), 4)
    values, x = torch.randn(3, 4, 4), torch.randn(5, 8)
    expected = sn.functional.block_sparse_linear(x, values, pattern)
    native = pattern.native
    for array in (native.row, native.t_crow, native.t_row, native.t_block):
        array[:] = 10**9
    for tensor in (
        pattern.crow_indices,
        pattern.col_indices,
        pattern.row_indices,
        pattern.crow,
        pattern.col,
    ):
        tensor.fill_(10**9)
    assert torch.equal(sn.functional.block_sparse_linear(x, values, pattern), expected)
    values.requires_grad_()
    sn.functional.block_sparse_linear(x, values, pattern).sum().backward()
    torch.testing.assert_close(values.grad[0], x[:, :4].sum(0).expand(4, 4))


# --- checks (ROBUSTNESS 1 to 8), below everything that Python might check first --------------------------------------

INT32_MAX = 2**31 - 1


@pytest.mark.parametrize(("crow", "col", "message"), BAD_INDICES)
def test_bad_indices_are_refused(crow, col, message):
    arrays = np.array(crow, dtype=np.int32), np.array(col, dtype=np.int32)
    with pytest.raises(ValueError, match="^BlockPattern: " + message):
        _C.Pattern(*arrays, 8, 12, 4)
    with pytest.raises(ValueError, match="^BlockPattern: " + message):
        registry.pattern_behind(*(torch.from_numpy(a) for a in arrays), (8, 12), 4)
    with pytest.raises(ValueError, match="^BlockPattern: " + message):
        sn.BlockPattern(crow, col, (8, 12), 4)


@given(
    crow=st.lists(st.integers(-2, 6) | st.sampled_from([INT32_MAX, -INT32_MAX - 1]), max_size=6),
    col=st.lists(st.integers(-2, 6) | st.sampled_from([INT32_MAX, -INT32_MAX - 1]), max_size=6),
    shape=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    block_size=st.sampled_from(sn.pattern.BLOCK_SIZES),
)
def test_any_indices_are_refused_or_computed(crow, col, shape, block_size):
    """No list of integers does harm: either a ValueError, or a pattern that computes what its indices say."""
    try:
        pattern = sn.BlockPattern(crow, col, shape, block_size)
    except ValueError as error:
        assert str(error).startswith("BlockPattern: ")
        return
    assert pattern.crow_indices.tolist() == crow and pattern.col_indices.tolist() == col
    values, x = torch.ones(len(col), block_size, block_size), torch.ones(2, shape[1])
    y = sn.functional.block_sparse_linear(x, values, pattern)
    torch.testing.assert_close(y, sn.reference.block_sparse_linear(x, values, pattern))


def test_arrays_of_other_types_are_refused_by_the_binding():
    good = np.array([0, 1, 2], dtype=np.int32), np.array([0, 2], dtype=np.int32)
    _C.Pattern(*good, 8, 12, 4)
    for dtype in (np.int64, np.float32, np.uint32, bool, np.int16):
        with pytest.raises(TypeError):
            _C.Pattern(good[0].astype(dtype), good[1], 8, 12, 4)
        with pytest.raises(TypeError):
            _C.Pattern(good[0], good[1].astype(dtype), 8, 12, 4)
    with pytest.raises(TypeError):
        _C.Pattern(np.repeat(good[0], 2)[::2], good[1], 8, 12, 4)
    for rows, cols, block in (
        (8, 12, 5),
        (8, 12, 0),
        (8, 12, -4),
        (-8, 12, 4),
        (8, -12, 4),
        (2**31, 12, 4),
        (8, 2**62, 4),
    ):
        with pytest.raises(ValueError, match="BlockPattern: (block_size|shape) must"):
            _C.Pattern(*good, rows, cols, block)


# --- sorting places -------------------------------------------------------------------------------------------------


@given(MASKS, st.randoms(use_true_random=False))
def test_places_in_any_order(drawn, random):
    """Ascending, two ascending runs as a rewire has them, and shuffled: the same rows and columns."""
    mask = random_mask(*drawn)
    row, col = mask.nonzero()
    places = (row * mask.shape[1] + col).tolist()
    shuffled = random.sample(places, len(places))
    for order in (places, places[::2] + places[1::2], shuffled):
        crow, columns = _C.csr_from_places(np.array(order, dtype=np.int64), *mask.shape)
        assert crow.tolist() == [0, *mask.sum(1).cumsum().tolist()] and columns.tolist() == col.tolist()
        assert crow.dtype == columns.dtype == np.int32


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([5, 3, 5], r"places must differ, got \(1, 2\) twice"),
        ([3, 5, 5], r"places must differ, got \(1, 2\) twice"),
        ([0, 6], r"places must lie in \[0, 6\), got 6"),
        ([-1, 0], r"places must lie in \[0, 6\), got -1"),
        ([2**32, 0], r"places must lie in \[0, 6\), got 4294967296"),  # never cut down to 0
    ],
)
def test_places_are_refused(places, message):
    with pytest.raises(ValueError, match=f"^BlockPattern: {message}"):
        _C.csr_from_places(np.array(places, dtype=np.int64), 2, 3)


def test_many_free_places_are_sorted():
    """More than a radix pass takes at least, and more digits than one."""
    drawn = _C.draw_free_places(np.arange(0, 900, 3), 2**40, 50_000, 11)
    assert (np.diff(drawn) > 0).all() and not np.isin(drawn, np.arange(0, 900, 3)).any()
    assert drawn[0] >= 0 and drawn[-1] < 2**40 and abs(drawn.mean() / 2**39 - 1) < 0.02


# --- top k ----------------------------------------------------------------------------------------------------------


def brute_force(scores, k, largest):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i] if largest else scores[i], i))
    return sorted(order[:k])


@given(
    scores=st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.0, -3.0, float("inf"), float("-inf")]), max_size=40),
    k=st.integers(0, 40),
    largest=st.booleans(),
)
def test_select_extreme_with_ties(scores, k, largest):
    k = min(k, len(scores))
    assert select_extreme(torch.tensor(scores), k, largest).tolist() == brute_force(scores, k, largest)


@pytest.mark.parametrize("largest", [False, True])
def test_select_extreme_of_many(largest):
    scores = torch.randint(0, 500, (20_000,)).float()  # 40 of each
    for k in (0, 1, 7000, 19_999, 20_000):
        picked = select_extreme(scores, k, largest)
        assert picked.dtype == torch.int64
        assert picked.tolist() == brute_force(scores.tolist(), k, largest)


def test_select_extreme_refuses():
    scores = torch.tensor([1.0, float("nan"), 2.0])
    with pytest.raises(ValueError, match="select_extreme: scores must not be NaN, got NaN at 1"):
        select_extreme(scores, 1, True)
    for k in (-1, 4):
        with pytest.raises(ValueError, match=rf"select_extreme: k must lie in \[0, 3\], got {k}"):
            select_extreme(torch.ones(3), k, True)


def test_select_extreme_takes_any_float_and_stride():
    scores = torch.tensor([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])[:, 0]
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        assert select_extreme(scores.to(dtype), 2, False).tolist() == [1, 2]
    close = torch.tensor([1.0 + 2e-10, 1.0 + 1e-10, 1.0 + 3e-10], dtype=torch.float64)
    assert select_extreme(close, 1, False).tolist() == [1]  # not a tie in float64


def test_places_by_row_of_candidates_allocate_by_their_number():
    """Candidates of a matrix with a million block rows: the list is what counts."""
    x, grad = torch.randn(2, 64), torch.randn(2, 2**20)
    rows = torch.tensor([2**20 - 1, 0, 77])
    blocks = functional.candidate_gradients(x, grad, rows, torch.tensor([63, 0, 5]), 1)
    torch.testing.assert_close(blocks.flatten(), (grad[:, rows] * x[:, [63, 0, 5]]).sum(0))
