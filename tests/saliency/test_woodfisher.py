"""Optimal Brain Surgeon on groups, against the inverse of whole matrices in float64."""

import pytest
import torch

import sparsenet as sn
from sparsenet.saliency import woodfisher as module
from sparsenet.saliency import woodfisher_saliency, woodfisher_update

DAMP = 0.01


def case(b, shape, rows=30, density=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    pattern = sn.BlockPattern.random(shape, density, b, generator)
    mixed = torch.randn(shape[1], shape[1], dtype=torch.float64, generator=generator)  # inputs that hang together
    x = torch.randn(rows, shape[1], dtype=torch.float64, generator=generator) @ mixed
    grad_output = torch.randn(rows, shape[0], dtype=torch.float64, generator=generator) / rows
    layer = sn.SparseLinear(shape[1], shape[0], pattern=pattern, dtype=torch.float64, generator=generator)
    return x, grad_output, layer.values.detach(), pattern


def dense_fisher(x, grad_output, row, columns, ridge):
    """Of the weights (row, columns), by a loop over rows."""
    matrix = torch.zeros(len(columns), len(columns), dtype=torch.float64)
    for inputs, delta in zip(x, grad_output * len(x), strict=True):
        gradient = delta[row] * inputs[columns]
        matrix += torch.outer(gradient, gradient) / len(x)
    return matrix + ridge * torch.eye(len(columns), dtype=torch.float64)


def ridge_of(x, grad_output, pattern):
    return DAMP * float(sn.saliency.diagonal_fisher(x, grad_output, pattern).mean())


def greedy(matrices, weights, blocks):
    """Losses by block and the surgeon's own weights: the smallest joint cost first, over all rows of the group."""
    matrices, weights, total, losses = [m.clone() for m in matrices], weights.clone(), 0.0, {}
    inverses = [torch.linalg.inv(m) for m in matrices]
    left = dict(enumerate(blocks))
    gone = []
    while left:
        costs = {
            n: sum(
                0.5 * float(w[q] @ torch.linalg.inv(v[q][:, q]) @ w[q]) for v, w in zip(inverses, weights, strict=True)
            )
            for n, q in left.items()
        }
        n = min(costs, key=costs.get)
        q = left.pop(n)
        gone += q.tolist()
        total += costs[n]
        losses[n] = total
        stays = torch.cat([*left.values()]) if left else torch.empty(0, dtype=torch.int64)
        for r, matrix in enumerate(matrices):  # from scratch: no update of an inverse
            shift = -inverses[r][:, q] @ torch.linalg.inv(inverses[r][q][:, q]) @ weights[r][q]
            weights[r] += shift
            weights[r][q] = 0.0
            inverses[r] = torch.zeros_like(matrix)
            if len(stays):
                inverses[r][stays[:, None], stays] = torch.linalg.inv(matrix[stays[:, None], stays])
    return losses


@pytest.mark.parametrize(("b", "shape"), [(1, (2, 9)), (4, (4, 20)), (4, (6, 18)), (16, (16, 48))])
def test_losses_are_those_of_a_greedy_surgeon_with_whole_inverses(b, shape):
    x, grad_output, values, pattern = case(b, shape)
    losses = woodfisher_saliency(x, grad_output, values, pattern, damp=DAMP)
    ridge = ridge_of(x, grad_output, pattern)
    padded_x = torch.nn.functional.pad(x, (0, -shape[1] % b))
    padded_g = torch.nn.functional.pad(grad_output, (0, -shape[0] % b))
    for block_row in range(pattern.block_rows):
        numbers = (pattern.row_indices == block_row).nonzero().flatten()
        columns = (pattern.col_indices[numbers].long()[:, None] * b + torch.arange(b)).flatten()
        rows = range(block_row * b, block_row * b + b)
        matrices = [dense_fisher(padded_x, padded_g, row, columns, ridge) for row in rows]
        weights = values[numbers].transpose(0, 1).reshape(b, -1)
        expected = greedy(matrices, weights, torch.arange(len(columns)).split(b))
        torch.testing.assert_close(losses[numbers], torch.tensor([expected[n] for n in range(len(numbers))]).double())


def test_the_update_is_the_surgeons():
    """dw = -F^-1[:, Q] ([F^-1]_QQ)^-1 w_Q, with the inverse of the whole matrix."""
    x, grad_output, values, pattern = case(4, (4, 24))
    dropped = torch.tensor([1, 4])
    after = woodfisher_update(x, grad_output, values, pattern, dropped, damp=DAMP)
    gone = (dropped[:, None] * 4 + torch.arange(4)).flatten()
    for row in range(4):
        fisher = dense_fisher(x, grad_output, row, torch.arange(24), ridge_of(x, grad_output, pattern))
        inverse, weights = torch.linalg.inv(fisher), values[:, row].flatten()
        moved = weights - inverse[:, gone] @ torch.linalg.inv(inverse[gone][:, gone]) @ weights[gone]
        torch.testing.assert_close(moved[gone], torch.zeros(8, dtype=torch.float64), atol=1e-8, rtol=0)
        expected = moved.reshape(6, 4)
        expected[dropped] = values[dropped, row]  # they leave as they were
        torch.testing.assert_close(after[:, row], expected)


def test_groups_that_lose_nothing_and_groups_that_lose_all_are_left_alone():
    x, grad_output, values, pattern = case(1, (2, 60))  # groups of 48 and 12 in each row
    after = woodfisher_update(x, grad_output, values, pattern, torch.arange(48, 60))
    assert torch.equal(after, values)
    after = woodfisher_update(x, grad_output, values, pattern, torch.tensor([3]))
    assert torch.equal(after[48:], values[48:]) and torch.equal(after[3], values[3])
    assert bool((after[:48] != values[:48]).flatten().sum() == 47)


@pytest.mark.parametrize(("b", "most"), [(1, 48), (4, 12), (8, 6), (16, 3), (32, 2), (64, 1), (128, 1)])
def test_groups_are_consecutive_blocks_of_one_row(b, most):
    pattern = sn.BlockPattern.random((3 * b, 100 * b if b < 16 else 7 * b), 0.8, b)
    x, grad_output = torch.randn(3, pattern.shape[1]), torch.randn(3, pattern.shape[0])
    groups = module._Groups(x, grad_output, torch.zeros(pattern.values_shape), pattern, 0.1, None).blocks
    assert groups.shape[1] == most
    assert groups[groups >= 0].tolist() == list(range(pattern.num_blocks)), "each once, in order"
    for group in groups:
        assert len(pattern.row_indices[group[group >= 0]].unique()) == 1


def test_chunks_do_not_change_the_result(monkeypatch):
    x, grad_output, values, pattern = case(4, (12, 40), density=0.6, rows=300)
    dropped = torch.arange(0, pattern.num_blocks, 3)
    calls = (
        lambda: woodfisher_saliency(x, grad_output, values, pattern),
        lambda: woodfisher_update(x, grad_output, values, pattern, dropped),
    )
    whole = [call() for call in calls]
    monkeypatch.setattr(module, "WORKSPACE_BYTES", 1)
    monkeypatch.setattr(module, "_ROWS", 17)
    for call, expected in zip(calls, whole, strict=True):
        torch.testing.assert_close(call(), expected)


def test_only_eligible_blocks_go_and_the_others_make_up_for_them():
    x, grad_output, values, pattern = case(1, (1, 8))
    eligible = torch.tensor([True, False, True] + [False] * 5)
    losses = woodfisher_saliency(x, grad_output, values, pattern, eligible=eligible, damp=DAMP)
    assert losses.isfinite().tolist() == eligible.tolist()
    fisher = dense_fisher(x, grad_output, 0, torch.arange(8), ridge_of(x, grad_output, pattern))
    inverse = torch.linalg.inv(fisher)
    weights = values.flatten()
    both = torch.tensor([0, 2])
    joint = 0.5 * weights[both] @ torch.linalg.inv(inverse[both][:, both]) @ weights[both]
    torch.testing.assert_close(losses[both].max(), joint)
    with pytest.raises(ValueError, match=r"eligible must be bool \[8\], got torch.bool \[7\]"):
        woodfisher_saliency(x, grad_output, values, pattern, eligible=eligible[1:])


def test_masked_elements_are_not_there():
    """They make up for nothing, and what is left is what a layer without them gives."""
    x, grad_output, values, pattern = case(4, (4, 8))
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[1, :, 1:] = False
    values = values * mask
    after = woodfisher_update(x, grad_output, values, pattern, torch.tensor([0]), element_mask=mask)
    assert not after[1, :, 1:].any() and bool((after[1, :, 0] != values[1, :, 0]).all())
    without = woodfisher_update(x, grad_output, values, pattern, torch.tensor([0]))
    assert bool(without[1, :, 1:].any()), "without the mask they would move"


def test_no_gradient_means_no_cost_and_no_update():
    x, _, values, pattern = case(4, (8, 8))
    nothing = torch.zeros(len(x), 8, dtype=torch.float64)
    assert woodfisher_saliency(x, nothing, values, pattern).tolist() == [0.0] * 4
    assert torch.equal(woodfisher_update(x, nothing, values, pattern, torch.tensor([0])), values)
    nothing[0, 0] = torch.nan
    assert bool(woodfisher_saliency(x, nothing, values, pattern).isnan().all())


def test_damp_must_be_positive():
    x, grad_output, values, pattern = case(4, (8, 8))
    with pytest.raises(ValueError, match="damp must be positive, got 0"):
        woodfisher_saliency(x, grad_output, values, pattern, damp=0.0)
