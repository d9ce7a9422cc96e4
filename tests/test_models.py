"""SparseMLP: shapes, densities, and that it trains, saves and rewires as a whole."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet import BlockPattern, SparseLinear, SparseMLP
from sparsenet.densities import distribute


def test_layers_and_their_activations():
    model = SparseMLP([784, 256, 128, 10], density=0.2, block_size=16, activation="silu")
    assert model.sizes == (784, 256, 128, 10) and len(model) == 3
    assert all(isinstance(layer, SparseLinear) for layer in model)
    assert [(m.in_features, m.out_features) for m in model] == [(784, 256), (256, 128), (128, 10)]
    assert [m.activation for m in model] == ["silu", "silu", "none"]
    assert all(m.bias is not None for m in model)
    assert all(m.bias is None for m in SparseMLP([8, 8, 8], bias=False, block_size=4))


@pytest.mark.parametrize("distribution", ["uniform", "erdos_renyi", "er", "erk"])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
def test_blocks_follow_the_distribution(distribution, density):
    sizes = [784, 1000, 300, 10]
    model = SparseMLP(sizes, density, 16, distribution=distribution)
    expected = distribute([(1000, 784), (300, 1000), (10, 300)], density, distribution, block_size=16)
    assert [m.pattern.num_blocks for m in model] == expected
    places = sum(m.pattern.block_rows * m.pattern.block_cols for m in model)
    assert sum(expected) == round(density * places)


def test_one_density_per_layer():
    model = SparseMLP([64, 128, 64], [0.5, 0.25], 16)
    assert [m.density for m in model] == [0.5, 0.25]
    with pytest.raises(ValueError, match="SparseMLP: density must have 2 entries, one per layer, got 3"):
        SparseMLP([64, 128, 64], [0.5, 0.25, 0.1], 16)


def test_refusals():
    with pytest.raises(ValueError, match=r"SparseMLP: sizes must name at least input and output, got \[5\]"):
        SparseMLP([5])
    with pytest.raises(ValueError, match="SparseMLP: sizes must name at least input and output, got '64-10'"):
        SparseMLP("64-10")
    for change, message in (
        ({"density": 1.5}, "density must"),
        ({"density": float("nan")}, "density must"),
        ({"distribution": "even"}, "distribution must be one of"),
        ({"activation": "tanh"}, "activation must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            SparseMLP(**{"sizes": [8, 8, 8], "block_size": 4, **change})
    for sizes in ([8, -1, 8], [8, 4.5, 8]):
        with pytest.raises((ValueError, TypeError), match="must"):
            SparseMLP(sizes, block_size=4)


def test_computes_as_its_dense_twin():
    model = SparseMLP([33, 70, 50, 7], 0.5, 16, "gelu")
    x = torch.randn(5, 33)
    z = x
    for i, layer in enumerate(model):
        z = nn.functional.linear(z, layer.weight_dense(), layer.bias)
        z = nn.functional.gelu(z) if i < 2 else z
    torch.testing.assert_close(model(x), z)
    z.sum().backward()
    dense = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for ours, theirs in zip(model.parameters(), dense, strict=True):
        torch.testing.assert_close(ours.grad, theirs)


@pytest.mark.parametrize("shape", [(5, 28, 28), (5, 1, 28, 28), (5, 784), (0, 28, 28), (1, 784)])
def test_images_are_flattened(shape):
    model = SparseMLP([784, 64, 10])
    x = torch.randn(shape)
    assert torch.equal(model(x), model(x.reshape(shape[0], 784)))


def test_generator_dtype_and_device():
    def build(seed, **kwargs):
        return SparseMLP([64, 64, 10], 0.5, 16, generator=torch.Generator().manual_seed(seed), **kwargs)

    a, b, c = build(1), build(1), build(2)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert any(p.shape != q.shape or not torch.equal(p, q) for p, q in zip(a.parameters(), c.parameters(), strict=True))
    assert build(1, dtype=torch.float64)(torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64
    assert build(1, device="meta")(torch.empty(2, 64, device="meta")).shape == (2, 10)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_learns_through_rewires(optimizer):
    """A labelled cloud is learnt although the pattern is redrawn while it trains."""
    torch.manual_seed(3)
    centers = torch.randn(4, 30)
    labels = torch.randint(4, (400,))
    x = centers[labels] + 0.3 * torch.randn(400, 30)
    model = SparseMLP([30, 128, 64, 4], 0.4, 16)
    optimizer_ = optimizer(model.parameters(), lr=0.05 if optimizer is torch.optim.SGD else 0.003)
    for step in range(150):
        loss = nn.functional.cross_entropy(model(x), labels)
        model.zero_grad()
        loss.backward()
        optimizer_.step()
        if step in (30, 60):
            layer = model[1]
            keep = layer.pattern.to_mask()
            spare = (~keep).nonzero()[:3]
            drop = keep.nonzero()[:3]
            keep[drop[:, 0], drop[:, 1]] = False
            keep[spare[:, 0], spare[:, 1]] = True
            layer.set_pattern(BlockPattern.from_mask(keep, 16, layer.pattern.shape))
            optimizer_.state.pop(layer.values, None)
    assert (model(x).argmax(1) == labels).float().mean() > 0.97


def test_state_dict_round_trip_and_deepcopy():
    source, target = SparseMLP([64, 96, 10], 0.5, 16), SparseMLP([64, 96, 10], 0.1, 16)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(3, 64)
    assert torch.equal(target(x), source(x)) and torch.equal(copy.deepcopy(source)(x), source(x))
    assert sn.layers.sparse_layers(target).keys() == {"0", "1"}
    file = io.BytesIO()
    torch.save(source, file)
    file.seek(0)
    whole = torch.load(file, weights_only=False)
    assert torch.equal(whole(x), source(x)) and whole.sizes == source.sizes
    whole.load_state_dict(target.state_dict())
    with pytest.raises(RuntimeError, match=r"nothing was loaded:\n\t1: .*values must have shape"):
        whole.load_state_dict({**target.state_dict(), "1.values": torch.ones(3)})
