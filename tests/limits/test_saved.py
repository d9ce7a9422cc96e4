"""What autograd keeps, against what is known of each operation."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sparsenet as sn
from sparsenet.limits import SavedBytes


def saved_by(model, x):
    with SavedBytes([*model.parameters(), *model.buffers(), x]) as saved:
        model(x)
    return saved.bytes


def test_dense_layers_and_relu_keep_one_tensor_together():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    assert saved_by(model, torch.randn(5, 8)) == 4 * 5 * 16


def test_a_block_sparse_layer_keeps_what_its_activation_needs():
    x = torch.randn(5, 64)
    for activation, kept in (("relu", 1), ("gelu", 2)):
        model = sn.SparseMLP([64, 96, 32], density=0.5, block_size=16, activation=activation)
        assert saved_by(model, x) == kept * 4 * 5 * 96, activation


def test_views_of_one_tensor_count_once_and_whole():
    x = torch.randn(6, 4, requires_grad=True)
    with SavedBytes([x]) as saved:
        y = x * 2
        y[:2].square().sum() + y[4:].square().sum()
    assert saved.bytes == y.nbytes


def test_a_checkpointed_block_keeps_its_input_alone():
    inner = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8))
    x = torch.randn(5, 8, requires_grad=True)
    with SavedBytes([*inner.parameters(), x]) as saved:
        checkpoint(inner, x, use_reentrant=False).sum()
    assert saved.bytes < 4 * 5 * 64


def test_claims_and_owners():
    x = torch.randn(3, 8, requires_grad=True)
    with SavedBytes([x]) as saved:
        saved.owner = "first"
        y = x.tanh()
        z = y.detach() * 2
        saved.claim(z, "second")
        (z * x).sum()
        assert (saved.owner_of(z), saved.owner_of(torch.ones(3))) == ("second", "first")
    assert saved.by_owner == {"first": y.nbytes, "second": z.nbytes}


def test_gradients_are_as_without_it():
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(5, 8)
    model(x).square().sum().backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with SavedBytes(model.parameters()):
        loss = model(x).square().sum()
    loss.backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
