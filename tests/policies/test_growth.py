"""Growth scores: the gradient of one backward pass, summed over the calls of a layer; without gradient, no growth."""

import copy
import logging

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.policies import growth


class Recurrent(nn.Module):
    """One layer, called as often as there are steps."""

    def __init__(self, block_size=8, size=64):
        super().__init__()
        self.layer = sn.SparseLinear(size, size, density=0.3, block_size=block_size)

    def forward(self, x, steps=4):
        for _ in range(steps):
            x = torch.tanh(self.layer(x))
        return x


def grown_by_dense_gradient(model, x, count, steps=4):
    """The places of the largest blocks of the dense weight's gradient, by autograd in float64."""
    layer = model.layer
    weight = layer.weight_dense().detach().double().requires_grad_()
    h = x.double()
    for _ in range(steps):
        h = torch.tanh(h @ weight.T + layer.bias.detach().double())
    h.square().sum().backward()
    b = layer.block_size
    n = weight.shape[0] // b
    norms = weight.grad.reshape(n, b, n, b).square().sum((1, 3)).flatten()
    norms[layer.pattern.linear_places()] = -1
    return sorted(norms.topk(count).indices.tolist())


@pytest.mark.parametrize("how", ["eager", "compiled", "checkpointed"])
def test_row71_calls_of_one_backward_pass_are_summed(how):
    torch.manual_seed(0)
    model, x = Recurrent(), torch.randn(6, 64)
    sparsifier = sn.Sparsifier(model, None, sn.RigL(0.3), every=1)
    count = sparsifier._quotas["layer"].grow
    expected = grown_by_dense_gradient(model, x, count)
    if how == "compiled":
        y = torch.compile(model, backend="aot_eager")(x)
    elif how == "checkpointed":
        y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    else:
        y = model(x)
    y.square().sum().backward()
    assert sparsifier.step().layers["layer"].grown_places.tolist() == expected


def test_row71_a_layer_in_several_reentrant_checkpoints_keeps_its_topology_and_it_is_said():
    """Each checkpoint has a backward pass of its own there, and none of them shows the sum of the calls."""
    torch.manual_seed(0)
    model, x = Recurrent(), torch.randn(6, 64, requires_grad=True)
    sparsifier, before = sn.Sparsifier(model, None, sn.RigL(0.3), every=1), model.layer.pattern

    def train(reentrant):
        hidden = x
        for _ in range(2):
            hidden = torch.utils.checkpoint.checkpoint(model, hidden, 2, use_reentrant=reentrant)
        hidden.square().sum().backward()
        return sparsifier.step().layers["layer"]

    assert "give checkpoint use_reentrant=False" in train(reentrant=True).skipped and model.layer.pattern is before
    assert train(reentrant=False).grown > 0
    for layer in (sn.SparseLinear(64, 64, density=0.3, block_size=8), sn.SparseMLP([64, 64, 64], 0.3, 8)):
        sparsifier = sn.Sparsifier(layer, None, sn.RigL(0.3), every=1)  # each layer in one checkpoint: nothing is lost
        for _ in range(2):  # and two micro-batches
            torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=True).square().sum().backward()
        assert sparsifier.step().grown > 0


def test_row71_the_last_pass_counts_and_others_leave_nothing():
    """Two forwards before two backwards, an evaluation with gradients that nobody differentiates, then the real one."""
    torch.manual_seed(0)
    model, x = Recurrent(), torch.randn(3, 6, 64)
    sparsifier = sn.Sparsifier(model, None, sn.RigL(0.3), every=1)
    expected = grown_by_dense_gradient(model, x[2], sparsifier._quotas["layer"].grow)
    first, second = model(x[0]), model(x[1])
    first.square().sum().backward()
    second.square().sum().backward()
    model(x[0])
    model(x[2]).square().sum().backward()
    assert sparsifier.step().layers["layer"].grown_places.tolist() == expected
    assert model.layer.topology.observer is None or not model.layer.topology.expected_calls


def test_row71_operands_of_a_layer_called_once_are_let_go_at_once(monkeypatch):
    """Growth is scored in the layer's own backward, while its operands are alive anyway."""
    held = []
    original = growth.Growth.observe

    def observe(self, x, grad_output):
        original(self, x, grad_output)
        held.append(len(self._kept))

    monkeypatch.setattr(growth.Growth, "observe", observe)
    model = sn.SparseMLP([64, 64, 64], density=0.3, block_size=8)
    sparsifier = sn.Sparsifier(model, None, sn.RigL(0.3), every=1)
    model(torch.randn(5, 64)).square().sum().backward()
    assert held == [0, 0] and sparsifier.step().grown


def test_row71_above_the_limit_drawn_candidates_are_summed(monkeypatch):
    torch.manual_seed(0)
    model, x = Recurrent(), torch.randn(6, 64)
    twin = copy.deepcopy(model)
    monkeypatch.setattr(growth, "KEPT_BYTES", 2 * x.nbytes)
    sparsifier = sn.Sparsifier(model, None, sn.RigL(0.1), every=1, seed=3)
    view = sparsifier._growth["layer"].view
    count = sparsifier._quotas["layer"].grow
    candidates = view.random_places(3 * count)
    weight = twin.layer.weight_dense().detach().double().requires_grad_()
    h = x.double()
    for _ in range(4):
        h = torch.tanh(h @ weight.T + twin.layer.bias.detach().double())
    h.square().sum().backward()
    norms = weight.grad.reshape(8, 8, 8, 8).square().sum((1, 3)).flatten()[candidates]
    model(x).square().sum().backward()
    grown = sparsifier.step().layers["layer"].grown_places.tolist()
    assert 0 < count < len(candidates) and grown == sorted(candidates[norms.topk(count).indices].tolist())


@pytest.mark.parametrize(
    ("batch", "loss", "reason"),
    [
        (0, lambda y: y.sum(), "the batch of the last backward was empty"),
        (5, lambda y: (y * 0).sum(), "the gradient of every inactive place was zero"),
        (None, None, "no backward ran through it before this step"),
    ],
)
def test_row72_without_a_gradient_the_topology_is_kept_and_it_is_said(batch, loss, reason, caplog):
    model = sn.SparseMLP([64, 64, 64], density=0.3, block_size=8)
    sparsifier = sn.Sparsifier(model, None, sn.RigL(0.3), every=1)
    before = [layer.pattern for layer in model]
    if batch is not None:
        loss(model(torch.randn(batch, 64))).backward()
    with caplog.at_level(logging.WARNING):
        update = sparsifier.step()
    assert all(u.skipped == reason and not u.grown and not u.dropped for u in update.layers.values())
    assert all(layer.pattern is pattern for layer, pattern in zip(model, before, strict=True))
    assert f"layer 0 keeps its topology: {reason}" in caplog.text


def test_row72_an_empty_micro_batch_at_the_end_is_said_and_one_before_is_not_minded():
    model = sn.SparseMLP([64, 64, 64], density=0.3, block_size=8)
    sparsifier = sn.Sparsifier(model, None, sn.RigL(0.3), every=1)
    model(torch.randn(0, 64)).sum().backward()
    model(torch.randn(5, 64)).square().sum().backward()
    assert sparsifier.step().grown
    model(torch.randn(5, 64)).square().sum().backward()
    model(torch.randn(0, 64)).sum().backward()
    assert sparsifier.step().layers["0"].skipped == "the batch of the last backward was empty"


def test_row72_policies_that_need_no_gradient_go_on():
    model = sn.SparseMLP([64, 64, 64], density=0.3, block_size=8)
    assert sn.Sparsifier(model, None, sn.SET(0.3), every=1).step().grown
