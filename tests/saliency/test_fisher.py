"""Saliencies of blocks against loops over rows in float64."""

import pytest
import torch

import sparsenet as sn
from sparsenet.saliency import block_fisher, diagonal_fisher, first_order, obd_saliency, rerank
from sparsenet.saliency import fisher as formulas


def case(b, shape=(13, 18), rows=7, density=0.5, dtype=torch.float64):
    pattern = sn.BlockPattern.random(shape, density, b, torch.Generator().manual_seed(b))
    x, grad_output = torch.randn(rows, shape[1], dtype=dtype), torch.randn(rows, shape[0], dtype=dtype) / rows
    layer = sn.SparseLinear(shape[1], shape[0], pattern=pattern, dtype=dtype)
    return x, grad_output, layer.values.detach(), pattern


def gradients(x, grad_output, pattern):
    """[rows, num_blocks, b, b]: each row's own gradient, of a loss that is not divided by the rows."""
    b = pattern.block_size
    out = []
    for row, delta in zip(x, grad_output * len(x), strict=True):
        dense = torch.zeros(pattern.block_rows * b, pattern.block_cols * b, dtype=x.dtype)
        dense[: len(delta), : len(row)] = torch.outer(delta, row)
        tiles = dense.reshape(pattern.block_rows, b, pattern.block_cols, b).transpose(1, 2)
        out.append(tiles[pattern.row_indices.long(), pattern.col_indices.long()])
    return torch.stack(out)


@pytest.mark.parametrize("b", [1, 4, 8])
def test_all_are_what_a_loop_over_rows_gives(b, monkeypatch):
    monkeypatch.setattr(formulas, "WORKSPACE_BYTES", 4000)  # several chunks of blocks
    x, grad_output, values, pattern = case(b)
    each = gradients(x, grad_output, pattern)
    torch.testing.assert_close(diagonal_fisher(x, grad_output, pattern), each.square().mean(0))
    by_hand = (each.square().mean(0) * values.square()).sum((1, 2)) / 2
    torch.testing.assert_close(obd_saliency(x, grad_output, values, pattern), by_hand)
    pull = (each * values).sum((2, 3))
    torch.testing.assert_close(block_fisher(x, grad_output, values, pattern), pull.square().mean(0) / 2)
    torch.testing.assert_close(first_order(x, grad_output, values, pattern), pull.mean(0))


def test_rows_beyond_a_slice_count_alike():
    """More rows than are summed at a time: twice the same rows are the same mean."""
    x, grad_output, values, pattern = case(4, rows=700)
    once = block_fisher(x, grad_output, values, pattern)
    twice = block_fisher(torch.cat([x, x]), torch.cat([grad_output, grad_output]) / 2, values, pattern)
    torch.testing.assert_close(once, twice)


def test_half_types_are_squared_in_float32():
    """1e-4 squared is zero in float16."""
    x, grad_output, values, pattern = case(4, dtype=torch.float32)
    half = x.half(), (grad_output * 1e-3).half()
    expected = block_fisher(half[0].double(), half[1].double(), values.double(), pattern)
    torch.testing.assert_close(block_fisher(*half, values.half(), pattern), expected.float(), rtol=2e-3, atol=0)
    assert bool(diagonal_fisher(*half, pattern).any())


def test_operands_stay_as_they_are():
    x, grad_output, values, pattern = case(4)
    before = [t.clone() for t in (x, grad_output, values)]
    for call in (obd_saliency, block_fisher, first_order):
        call(x, grad_output, values, pattern)
    assert all(torch.equal(a, b) for a, b in zip(before, (x, grad_output, values), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, g, v: (x[:, 1:], g, v), r"block_fisher: x must have shape \[rows, 18\], got \[7, 17\]"),
        (lambda x, g, v: (x, g[0], v), r"block_fisher: grad_output must have shape \[rows, 13\], got \[13\]"),
        (lambda x, g, v: (x[:0], g[:0], v), r"the same rows, at least one, got 0 and 0"),
        (lambda x, g, v: (x, g[1:], v), r"the same rows, at least one, got 7 and 6"),
        (lambda x, g, v: (x, g, v[1:]), r"block_fisher: values must have shape"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    x, grad_output, values, pattern = case(4)
    with pytest.raises(ValueError, match=message):
        block_fisher(*change(x, grad_output, values), pattern)


def test_a_shortlist_goes_by_the_expensive_score_and_the_rest_by_the_cheap_one():
    cheap, expensive = torch.tensor([4.0, 1.0, 3.0, 2.0]), torch.tensor([0.0, 9.0, 5.0, 5.0])
    listed = torch.tensor([False, True, True, True])
    assert rerank(cheap, expensive, listed).tolist() == [3.0, 2.0, 0.0, 1.0]
    with pytest.raises(ValueError, match=r"must have one shape \[n\], got \[4\], \[3\] and \[4\]"):
        rerank(cheap, expensive[1:], listed)
