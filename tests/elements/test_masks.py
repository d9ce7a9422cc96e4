"""Unstructured masks: exact counts, ties by index, nothing outside the matrix; and what a layer may be asked for."""

import pytest
import torch

from sparsenet import NM, BlockPattern
from sparsenet.elements import largest_elements, random_elements
from sparsenet.elements.masks import chosen_mask, elements_inside

CASES = [((64, 64), 16), ((47, 70), 16), ((47, 70), 32), ((5, 3), 8), ((9, 13), 4), ((9, 13), 1)]


def inside(pattern):
    """Bool [num_blocks, b, b], from the dense matrix of ones."""
    b, (out, inp) = pattern.block_size, pattern.shape
    rows = pattern.row_indices.long()[:, None] * b + torch.arange(b) < out
    cols = pattern.col_indices.long()[:, None] * b + torch.arange(b) < inp
    return rows[:, :, None] & cols[:, None, :]


@pytest.mark.parametrize(("shape", "b"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_by_hand(shape, b, dtype):
    pattern = BlockPattern.random(shape, 0.7, b)
    values = torch.randint(-4, 5, pattern.values_shape).to(dtype)
    allowed = inside(pattern)
    assert elements_inside(pattern) == int(allowed.sum())
    flat, places = values.flatten().tolist(), allowed.flatten().nonzero().flatten().tolist()
    ranked = sorted(places, key=lambda i: (-abs(flat[i]), i))
    for count in {0, 1, len(ranked) // 3, len(ranked) - 1, len(ranked)}:
        mask = largest_elements(values, pattern, count)
        assert mask.dtype == torch.bool and mask.flatten().nonzero().flatten().tolist() == sorted(ranked[:count])


@pytest.mark.parametrize(("shape", "b"), CASES)
def test_random_ones_are_exact_and_repeatable(shape, b):
    pattern = BlockPattern.random(shape, 0.7, b)
    most = elements_inside(pattern)
    for count in {0, 1, most // 3, most // 2 + 1, most - 1, most}:
        mask = random_elements(pattern, count, seed=3)
        assert int(mask.sum()) == count and not (mask & ~inside(pattern)).any()
        assert torch.equal(mask, random_elements(pattern, count, seed=3))
    if most > 50:
        assert not torch.equal(random_elements(pattern, most // 3, 3), random_elements(pattern, most // 3, 4))


@pytest.mark.parametrize("count", [4, 11])
def test_every_element_is_drawn_as_often(count):
    pattern = BlockPattern([0, 2], [0, 1], shape=(3, 5), block_size=4)  # 15 elements, in two edge blocks
    drawn = sum(random_elements(pattern, count, seed).double() for seed in range(2000))[inside(pattern)] / 2000
    share = count / 15
    assert len(drawn) == 15 and (drawn - share).abs().max() < 4.5 * (share * (1 - share) / 2000) ** 0.5


def test_an_empty_pattern_has_an_empty_mask():
    pattern = BlockPattern([0, 0], [], (8, 8), 8)
    assert largest_elements(torch.empty(0, 8, 8), pattern, 0).shape == (0, 8, 8)
    assert random_elements(pattern, 0, seed=0).shape == (0, 8, 8)
    assert NM(2, 4).random(pattern).shape == (0, 8, 8) and NM(2, 4).holds(torch.ones(0, 8, 8).bool())


def test_bad_arguments_are_refused():
    pattern = BlockPattern([0, 1], [0], shape=(3, 5), block_size=8)
    values = torch.ones(1, 8, 8)
    for call, error, message in (
        (lambda: largest_elements(values, pattern, 16), ValueError, "count must be at most the 15 elements"),
        (lambda: largest_elements(values, pattern, -1), ValueError, "count must be an integer >= 0"),
        (lambda: largest_elements(values, pattern, 1.5), TypeError, "count must be an integer"),
        (lambda: largest_elements(values[:, :4], pattern, 1), ValueError, r"values must have shape \[1, 8, 8\]"),
        (lambda: largest_elements(values * torch.nan, pattern, 1), ValueError, "values must be numbers, got NaN"),
        (lambda: random_elements(pattern, 16, 0), ValueError, "count must be at most the 15 elements"),
        (lambda: random_elements(pattern, 1, -1), ValueError, "seed must be an integer >= 0"),
        (lambda: random_elements(pattern, 1, 2**63), ValueError, r"seed must lie in \[0, 2\^63\)"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_what_a_layer_may_be_asked_for():
    pattern = BlockPattern.random((47, 70), 0.6, 16)
    values, generator = torch.randn(pattern.values_shape), torch.Generator().manual_seed(0)
    for asked in ("2:4", NM(2, 4)):
        mask, rule = chosen_mask(asked, pattern, values)
        assert rule == NM(2, 4) and torch.equal(mask, rule.mask(values, pattern))
    mask, rule = chosen_mask(0.3, pattern, values)
    count = round(0.3 * elements_inside(pattern))
    assert rule is None and torch.equal(mask, largest_elements(values, pattern, count))
    mask, rule = chosen_mask(0.3, pattern, None, generator)
    assert rule is None and int(mask.sum()) == count
    happens = NM(2, 4).mask(values, pattern)
    mask, rule = chosen_mask(happens, pattern)
    assert rule is None and torch.equal(mask, happens), "a mask that is 2:4 by chance follows no rule"


@pytest.mark.parametrize("asked", [0.0, 1.0, 1.5, -0.1, float("nan"), 2])
def test_a_share_lies_between_zero_and_one(asked):
    with pytest.raises(ValueError, match=r"element_mask must be a share in \(0, 1\) if a number, got"):
        chosen_mask(asked, BlockPattern.random((32, 32), 0.5, 16))
