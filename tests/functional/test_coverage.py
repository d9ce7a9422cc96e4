"""Drops and picks that leave no block row and no block column empty: worked by hand, and against asking one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsenet import functional
from sparsenet.functional import largest_reaching_all, lowest_to_spare


def one_by_one(scores, rows, cols, count):
    """The rule in its plainest form: in the order of scores, each block goes unless it is the last of a line."""
    row_left, col_left = (torch.bincount(lines).tolist() for lines in (rows, cols))
    gone = []
    for block in scores.argsort(stable=True).tolist():
        row, col = int(rows[block]), int(cols[block])
        if len(gone) < count and row_left[row] > 1 and col_left[col] > 1:
            row_left[row] -= 1
            col_left[col] -= 1
            gone.append(block)
    return sorted(gone)


def test_row81_the_last_block_of_a_line_stays():
    # blocks at (0,0) (0,1) (1,1) (2,0) with scores 1 2 3 4: (1,1) and (2,0) are alone in their rows; once (0,0) has
    # gone, (0,1) is alone in row 0
    rows, cols, scores = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert lowest_to_spare(scores, 1, rows, cols).tolist() == [0]
    assert lowest_to_spare(scores, 3, rows, cols).tolist() == [0]
    assert lowest_to_spare(scores, 0, rows, cols).tolist() == []
    assert lowest_to_spare(torch.tensor([9.0, 2.0, 3.0, 4.0]), 2, rows, cols).tolist() == [1]


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_row81_drops_as_if_asked_one_by_one(seed, height, width, density, share, ties):
    draw = torch.Generator().manual_seed(seed)
    places = (torch.rand(height * width, generator=draw) < density).nonzero().flatten()
    scores = torch.rand(len(places), generator=draw)
    scores = (scores * 3).round() if ties else scores
    rows, cols, count = places // width, places % width, round(share * len(places))
    gone = lowest_to_spare(scores, count, rows, cols)
    assert gone.tolist() == one_by_one(scores, rows, cols, count)
    stays = torch.ones(len(places), dtype=torch.bool)
    stays[gone] = False
    for lines in (rows, cols):
        assert set(lines[stays].tolist()) == set(lines.tolist())  # no line that had a block has lost its last


def test_row81_many_blocks_are_asked_together():
    """Only blocks on lines that would be emptied are looked at one by one; the answer is the same."""
    draw = torch.Generator().manual_seed(3)
    places = torch.randperm(400 * 400, generator=draw)[:1500].sort().values
    rows, cols, scores = places // 400, places % 400, torch.rand(1500, generator=draw)
    assert lowest_to_spare(scores, 900, rows, cols).tolist() == one_by_one(scores, rows, cols, 900)


@given(st.integers(0, 2**31), st.integers(1, 9), st.integers(1, 9), st.floats(0, 1), st.booleans())
def test_row81_the_largest_reach_every_line_where_they_suffice(seed, height, width, density, ties):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(height, width, generator=draw)
    scores = (scores * 2).round() if ties else scores
    count = round(density * height * width)
    picked = largest_reaching_all(scores, count)
    assert len(picked) == len(picked.unique()) == count
    if count >= max(height, width):
        assert len((picked // width).unique()) == height and len((picked % width).unique()) == width
    elif count:
        assert scores.flatten()[picked].min() >= scores.flatten().sort(descending=True).values[count - 1]


def test_row81_stars_and_zeros_reach_every_line():
    """The largest all in one row and one column, so that none of them can be spared; all scores the same."""
    scores = torch.zeros(50, 50)
    scores[0], scores[:, 0] = 5.0, 5.0
    for count in (50, 60, 99):
        picked = largest_reaching_all(scores, count)
        assert len(picked.unique()) == count and len((picked // 50).unique()) == len((picked % 50).unique()) == 50
    assert len((largest_reaching_all(torch.zeros(300, 200), 300) // 200).unique()) == 300


@pytest.mark.parametrize(("density", "moved"), [(0.5, 0), (0.1, 0)])
def test_nothing_moves_where_the_largest_reach_all(density, moved):
    scores = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    count = round(density * 64 * 64)
    assert sorted(largest_reaching_all(scores, count).tolist()) == sorted(scores.flatten().topk(count).indices.tolist())


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1), st.floats(0, 1))
def test_row81_scores_that_stay_on_their_device_give_the_same(seed, height, width, density, share):
    """Where the kernels of a device do not ask, the order of the scores is found there, and no score leaves it."""
    draw = torch.Generator().manual_seed(seed)
    places = (torch.rand(height * width, generator=draw) < density).nonzero().flatten()
    scores = (torch.rand(len(places), generator=draw) * 4).round() - 2  # with ties, and zeros of both signs
    lines, count = (places // width, places % width), round(share * len(places))
    here = lowest_to_spare(scores, count, *lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional.native, "kernels_of", lambda device: object())
        assert torch.equal(lowest_to_spare(scores, count, *lines), here)
        if len(scores):
            with pytest.raises(ValueError, match="scores must not be NaN"):
                lowest_to_spare(scores * torch.nan, count, *lines)
