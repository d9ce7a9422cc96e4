"""Gradients and Hessians over batches against dense copies, on edge blocks, masks and layers that are called twice."""

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.saliency import Call, batch_derivatives
from sparsenet.saliency.second_order import differentiable_layer, replaced_forwards

pytestmark = pytest.mark.usefixtures("one_thread")


class Recurrent(nn.Module):
    """A layer with edge blocks, no bias and a mask, called three times."""

    def __init__(self, masked):
        super().__init__()
        self.layer = sn.SparseLinear(10, 10, bias=not masked, density=0.7, block_size=4, dtype=torch.float64)
        if masked:
            self.layer.set_element_mask(0.5)

    def forward(self, x, weight=None):
        for _ in range(3):
            x = self.layer(x) if weight is None else nn.functional.linear(x, weight, self.layer.bias)
            x = x.tanh()
        return x


@pytest.mark.parametrize("masked", [False, True])
def test_both_are_those_of_a_dense_copy(masked):
    torch.manual_seed(0)
    model = Recurrent(masked)
    batches = [(Call((torch.randn(rows, 10, dtype=torch.float64),), {}), torch.zeros(1)) for rows in (5, 3)]

    def loss(y, _):
        return y.pow(4).sum(1).mean()

    dense = model.layer.weight_dense().detach()
    places = dense != 0

    def mean_loss(active):
        weight = torch.zeros_like(dense).index_put(places.nonzero(as_tuple=True), active)
        return sum(len(c.args[0]) * loss(model(c.args[0], weight), None) for c, _ in batches) / 8

    active = dense[places]
    gradient = torch.autograd.functional.jacobian(mean_loss, active)
    hessian = torch.autograd.functional.hessian(mean_loss, active)
    (found,), rows = batch_derivatives(model, [model.layer], batches, loss)
    assert rows == 8
    torch.testing.assert_close(dense_of(model.layer, found / rows)[places], gradient, rtol=1e-11, atol=1e-14)
    (product,), _ = batch_derivatives(model, [model.layer], batches, loss, [found / rows])
    torch.testing.assert_close(
        dense_of(model.layer, product / rows)[places], hessian @ gradient, rtol=1e-11, atol=1e-14
    )
    stored = sn.functional.blocks.dense_blocks(dense_of(model.layer, found), model.layer.pattern)
    assert torch.equal(stored, found), "a gradient outside the matrix, or of a masked element"


def dense_of(layer, values):
    p, b = layer.pattern, layer.block_size
    dense = values.new_zeros(p.block_rows, p.block_cols, b, b)
    dense[p.row_indices.long(), p.col_indices.long()] = values
    return dense.permute(0, 2, 1, 3).reshape(p.block_rows * b, p.block_cols * b)[
        : layer.out_features, : layer.in_features
    ]


def test_second_derivatives_by_finite_differences():
    """Of each of the three products, by both of its operands."""
    torch.manual_seed(0)
    layer = sn.SparseLinear(6, 5, density=0.7, block_size=4, dtype=torch.float64, activation="silu")
    inside = (layer.values.detach() != 0).double()  # of the matrix

    def run(x, values):
        return torch.func.functional_call(Wrapped(layer), {"layer.values": values * inside}, (x,))

    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(run, (x, layer.values.detach().clone().requires_grad_()))


class Wrapped(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return differentiable_layer(self.layer, x)


def test_a_layer_with_a_forward_of_its_own_is_not_computed_by_another():
    """Its own kernels have no second derivative, which is said, and a first, which is right."""

    class Doubled(sn.SparseLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = Doubled(8, 4, bias=False, density=1.0, block_size=4, dtype=torch.float64)
    batch = (torch.randn(3, 8, dtype=torch.float64), torch.zeros(3))
    (gradient,), rows = batch_derivatives(layer, [layer], [batch], lambda y, _: y.square().sum())
    layer(batch[0]).square().sum().backward()
    torch.testing.assert_close(gradient / rows, layer.values.grad)
    with pytest.raises(RuntimeError, match="batch_derivatives: something in the model or the loss .* only once"):
        batch_derivatives(layer, [layer], [batch], lambda y, _: y.square().sum(), [gradient])


def test_a_loss_that_is_linear_in_the_values_has_no_hessian():
    layer = sn.SparseLinear(8, 4, density=1.0, block_size=4)
    batch = (torch.randn(3, 8), torch.zeros(3))
    (product,), _ = batch_derivatives(layer, [layer], [batch], lambda y, _: y.sum(), [torch.ones_like(layer.values)])
    assert not product.any()


def test_wrong_operands_are_refused_as_by_the_layer():
    layer = sn.SparseLinear(8, 4, density=1.0, block_size=4)
    with pytest.raises(ValueError, match=r"block_sparse_linear: x must have 8 columns, got \[2, 4\]"):
        differentiable_layer(layer, torch.randn(2, 4))


def test_forwards_come_back_also_where_a_module_has_its_own():
    model = nn.Sequential(nn.Tanh(), nn.Tanh())
    own = model[1].forward = lambda x: x + 1
    with pytest.raises(ZeroDivisionError), replaced_forwards(model, lambda m: torch.relu if m is not model else None):
        assert model(torch.tensor(-2.0)) == 0
        raise ZeroDivisionError
    assert "forward" not in model[0].__dict__ and model[1].__dict__["forward"] is own
