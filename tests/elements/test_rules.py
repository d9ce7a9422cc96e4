"""N:M rules: groups of m along the inputs, n of largest magnitude, ties by index, nothing outside the matrix."""

import itertools

import numpy as np
import pytest
import torch

import sparsenet as sn
from sparsenet import BlockPattern

RULES = [(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (1, 8), (7, 8), (1, 16), (2, 16)]
SHAPES = [(64, 64), (47, 70), (33, 31), (5, 3)]


def by_hand(scores, rule, pattern):
    """Element by element, in Python."""
    mask = torch.zeros(pattern.values_shape, dtype=torch.bool)
    b, (out, inp) = pattern.block_size, pattern.shape
    places = zip(pattern.row_indices.tolist(), pattern.col_indices.tolist(), strict=True)
    for k, (row, col) in enumerate(places):
        for i, group in itertools.product(range(b), range(0, b, rule.m)):
            inside = [j for j in range(group, group + rule.m) if row * b + i < out and col * b + j < inp]
            for j in sorted(inside, key=lambda j: (-abs(float(scores[k, i, j])), j))[: rule.n]:
                mask[k, i, j] = True
    return mask


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n", "m"), RULES)
def test_the_largest_of_every_group(n, m, shape):
    rule, pattern = sn.NM(n, m), BlockPattern.random(shape, 0.6, 16)
    scores = torch.randint(-3, 4, pattern.values_shape).float()  # many ties
    mask = rule.mask(scores, pattern)
    assert mask.dtype == torch.bool and torch.equal(mask, by_hand(scores, rule, pattern))
    assert rule.holds(mask)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n", "m"), RULES)
def test_random_masks_have_as_many_and_follow_the_generator(n, m, shape):
    rule, pattern = sn.NM(n, m), BlockPattern.random(shape, 0.6, 16)
    first, again, other = (rule.random(pattern, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again) and rule.holds(first)
    expected = by_hand(torch.zeros(pattern.values_shape), rule, pattern)
    assert torch.equal(first.sum(2), expected.sum(2))
    assert shape == (5, 3) or not torch.equal(first, other)


def test_every_pair_of_a_group_is_as_likely():
    pattern = BlockPattern.random((128, 128), 1.0, 32)
    groups = sn.NM(2, 4).random(pattern, torch.Generator().manual_seed(0)).reshape(-1, 4)
    codes = (groups.int() * torch.tensor([1, 2, 4, 8])).sum(1).bincount(minlength=16)
    seen = codes[codes > 0].double() / len(groups)
    assert len(seen) == 6 and (seen - 1 / 6).abs().max() < 4 * (5 / 36 / len(groups)) ** 0.5


def test_chunks_do_not_change_the_mask(monkeypatch):
    pattern = BlockPattern.random((64, 70), 0.6, 16)
    scores = torch.randn(pattern.values_shape)
    whole = sn.NM(2, 4).mask(scores, pattern)
    monkeypatch.setattr("sparsenet.elements.rules._AT_ONCE", 300)
    assert torch.equal(sn.NM(2, 4).mask(scores, pattern), whole) and sn.NM(2, 4).holds(whole)
    whole[-1, -1, :3] = True
    assert not sn.NM(2, 4).holds(whole), "the last chunk is looked at"


def test_holds_counts_groups_and_not_rows():
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[0, 0, 2:6] = True  # two in either group
    assert sn.NM(2, 4).holds(mask) and not sn.NM(1, 4).holds(mask) and sn.NM(4, 8).holds(mask)
    mask[0, 0, 1] = True
    assert not sn.NM(2, 4).holds(mask)


def test_text_and_numbers():
    assert str(sn.NM(2, 4)) == "2:4" and sn.NM.parse("4:8") == sn.NM(4, 8)
    assert sn.NM(np.int64(2), 4) == sn.NM(2, 4)
    assert sn.NM(2, 4).as_tensor().tolist() == [2, 4]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sn.NM(0, 4), ValueError, "n must be an integer >= 1, got 0"),
        (lambda: sn.NM(4, 4), ValueError, r"n must lie in \[1, m\), got 4 of 4"),
        (lambda: sn.NM(5, 4), ValueError, r"n must lie in \[1, m\), got 5 of 4"),
        (lambda: sn.NM(1, 1), ValueError, "m must be an integer >= 2, got 1"),
        (lambda: sn.NM(2.0, 4), TypeError, "n must be an integer"),
        (lambda: sn.NM(True, 4), TypeError, "n must be an integer"),
        (lambda: sn.NM.parse("2-4"), ValueError, "rule must read n:m as in 2:4, got '2-4'"),
        (lambda: sn.NM.parse(" 2:4"), ValueError, "rule must read n:m"),
        (lambda: sn.NM(1, 3).check(BlockPattern.random((32, 32), 0.5, 16)), ValueError, "block size 16, got 3"),
        (lambda: sn.NM(2, 32).random(BlockPattern.random((32, 32), 0.5, 16)), ValueError, "block size 16, got 32"),
        (lambda: sn.NM(1, 2).random(BlockPattern.random((8, 8), 0.5, 1)), ValueError, "block size 1, got 2"),
        (lambda: sn.NM(1, 3).holds(torch.ones(1, 4, 4).bool()), ValueError, "m must divide the block size 4, got 3"),
    ],
)
def test_what_is_no_rule_is_refused(make, error, message):
    with pytest.raises(error, match=f"^NM: .*{message}"):
        make()


def test_bad_scores_are_refused():
    pattern = BlockPattern.random((32, 32), 0.5, 16)
    with pytest.raises(ValueError, match=r"NM: scores must have shape \[2, 16, 16\], got \[1, 16, 16\]"):
        sn.NM(2, 4).mask(torch.ones(1, 16, 16), pattern)
    scores = torch.ones(pattern.values_shape)
    scores[-1, -1, -1] = torch.nan
    with pytest.raises(ValueError, match="NM: scores must be numbers, got NaN"):
        sn.NM(2, 4).mask(scores, pattern)
