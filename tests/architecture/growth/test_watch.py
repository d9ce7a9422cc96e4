"""What is read off training: products against dense autograd, operands, and what a copy does not watch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.architecture.growth.step_watch import StepWatch, rows_of
from sparsenet.architecture.growth.watch import MOST_ROWS, IntervalScores, Operands, unit_and_block_products


def trained(layer: nn.Module, rows: int = 6) -> nn.Module:
    torch.manual_seed(1)
    layer(torch.randn(rows, layer.in_features)).square().sum().backward()
    return layer


def test_products_of_a_dense_layer():
    layer = trained(nn.Linear(5, 3))
    units, blocks = unit_and_block_products(layer)
    expected = (layer.weight * layer.weight.grad).sum(1) + layer.bias * layer.bias.grad
    torch.testing.assert_close(units, expected.detach())
    assert blocks is None


def test_products_of_a_block_sparse_layer_whose_edges_are_not_whole():
    generator = torch.Generator().manual_seed(0)
    layer = trained(sn.SparseLinear(10, 7, density=0.6, block_size=4, generator=generator))
    units, blocks = unit_and_block_products(layer)
    products = (layer.values * layer.values.grad).detach()
    torch.testing.assert_close(blocks, products.sum((1, 2)))
    dense = torch.zeros(8, 12)
    for i, (r, c) in enumerate(
        zip(layer.pattern.row_indices.tolist(), layer.pattern.col_indices.tolist(), strict=True)
    ):
        dense[4 * r : 4 * r + 4, 4 * c : 4 * c + 4] = products[i]
    torch.testing.assert_close(units, (dense.sum(1)[:7] + layer.bias * layer.bias.grad).detach())


def test_a_layer_without_gradient_has_no_products():
    assert unit_and_block_products(nn.Linear(2, 2)) is None


def test_scores_are_means_over_the_looks_that_saw_the_layer():
    a, b, scores = trained(nn.Linear(5, 3)), trained(nn.Linear(5, 3)), IntervalScores()
    scores.observe({"a": a, "b": b})
    once = scores.units("b")
    b.weight.grad = None
    scores.observe({"a": a, "b": b})
    torch.testing.assert_close(scores.units("a"), unit_and_block_products(a)[0].square())
    torch.testing.assert_close(scores.units("b"), once)
    assert scores.not_finite() == ""
    a.weight.grad[0, 0] = torch.nan
    scores.observe({"a": a})
    assert scores.not_finite() == "a"


def test_gradients_that_are_all_zero_are_seen_as_such():
    layer, scores = trained(nn.Linear(5, 3)), IntervalScores()
    layer.zero_grad(set_to_none=False)
    assert scores.observe({"a": layer})
    assert scores.all_zero()


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_operands_are_those_before_the_activation(kind):
    torch.manual_seed(0)
    first = nn.Linear(6, 8)
    if kind == "sparse":
        layer = sn.SparseLinear.from_linear(first, density=1.0, block_size=4)
        layer.activation = "relu"
        model = nn.Sequential(layer, nn.Linear(8, 2))
    else:
        model = nn.Sequential(first, nn.ReLU(), nn.Linear(8, 2))
    operands, x = Operands(model.named_modules()), torch.randn(5, 6)
    model(x).square().sum().backward()
    operands.close()
    pre = (x @ first.weight.T + first.bias).detach().requires_grad_(True)
    model[-1](torch.relu(pre)).square().sum().backward()
    kept = operands.kept["0"]
    torch.testing.assert_close(kept.x, x)
    torch.testing.assert_close(kept.grad_output, pre.grad)
    assert kept.total == 5
    model(x).sum().backward()
    assert operands.kept["0"].total == 5  # it is closed


def test_several_backward_passes_add_up_and_many_rows_are_thinned():
    layer = nn.Linear(3, 2)
    operands, x = Operands([("0", layer)]), torch.randn(MOST_ROWS, 3)
    for part in (x[:100], x):
        (layer(part) * 2.0).sum().backward()
    kept = operands.kept["0"]
    assert kept.total == MOST_ROWS + 100
    assert len(kept.x) <= MOST_ROWS
    torch.testing.assert_close(kept.grad_output.sum(0), torch.full((2,), 2.0 * kept.total))


def test_copies_are_not_watched():
    model = nn.Sequential(nn.Linear(3, 2))
    watch, operands = StepWatch(model, 20), Operands(model.named_modules())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(torch.ones(4, 3)).sum().backward()
    assert not watch.seen
    assert operands.kept == {}
    operands.close()
    watch.close()


def test_a_watch_finds_inputs_by_name_and_ignores_evaluation():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x, scale=1.0, *, shift=None):
            return self.layer(x) * scale

    model = Named()
    watch = StepWatch(model, 20)
    model.eval()(torch.ones(4, 3))
    assert not watch.seen
    with watch.paused():
        model.train()(torch.ones(4, 3))
    assert not watch.seen
    with pytest.raises(TypeError, match=r"Grower: model must take its inputs by position .* \['shift'\]"):
        model(x=torch.ones(4, 3))
    assert rows_of(({"a": torch.ones(4, 3)}, 1)) == 4
