"""Layers that get whole blocks of another size in training: values, moments, groups, and what is refused."""

import copy
import re

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.compaction import CompactionError
from sparsenet.compaction.cutting import reblock_


def trained(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(16, 24)).square().mean().backward()
        optimizer.step()


def dense_network():
    return nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 10))


def half(layer, b):
    return sn.BlockPattern.random((layer.out_features, layer.in_features), 0.5, b)


def dense(layer, t):
    """A tensor shaped as the layer's values, as a matrix [out, in]; zero where there is no block."""
    twin = sn.SparseLinear(layer.in_features, layer.out_features, pattern=layer.pattern)
    with torch.no_grad():
        twin.values.copy_(t)
    return twin.weight_dense().detach()


def inside(pattern):
    """Bool [out, in]: what the blocks cover."""
    mask = pattern.to_mask().repeat_interleave(pattern.block_size, 0).repeat_interleave(pattern.block_size, 1)
    return mask[: pattern.shape[0], : pattern.shape[1]]


def test_four_weights_by_hand():
    """Single weights at (0, 0), (1, 5) and (6, 6) of an 8 x 8 matrix; the blocks (0, 1) and (1, 1) of 4 take two."""
    layer = sn.SparseLinear(8, 8, pattern=sn.BlockPattern.from_places(
        torch.tensor([0, 1, 6]), torch.tensor([0, 5, 6]), (8, 8), 1))  # fmt: skip
    with torch.no_grad():
        layer.values.copy_(torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1, 1))
    pattern = sn.BlockPattern.from_places(torch.tensor([0, 1]), torch.tensor([1, 1]), (8, 8), 4)
    reblock_(nn.Sequential(layer), {"0": pattern})
    expected = torch.zeros(8, 8)
    expected[1, 5], expected[6, 6] = 2.0, 3.0
    assert torch.equal(layer.weight_dense(), expected) and layer.num_active == 32


@pytest.mark.parametrize("b", [1, 4, 16])
@pytest.mark.parametrize("old", [1, 8])
def test_values_and_moments_stay_where_they_are(old, b):
    model = sn.SparseMLP([24, 37, 10], 0.5, old)
    if old > 1:
        mask = torch.rand(model[0].values.shape) < 0.5
        model[0].set_pattern(model[0].pattern, element_mask=mask)
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    trained(model, optimizer)
    twin, other = copy.deepcopy((model, optimizer))
    values = [layer.values for layer in model]
    patterns = {str(i): half(layer, b) for i, layer in enumerate(model)}
    assert reblock_(model, patterns, optimizer) is model
    for i, (now, before) in enumerate(zip(model, twin, strict=True)):
        covered = inside(patterns[str(i)])
        assert now.values is values[i] and now.pattern == patterns[str(i)] and now.element_mask is None
        assert torch.equal(now.weight_dense(), before.weight_dense() * covered)
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            t = other.state[before.values][key]
            t = t if before.element_mask is None else t * before.element_mask
            assert torch.equal(dense(now, optimizer.state[now.values][key]), dense(before, t) * covered)
        assert optimizer.state[now.values]["step"] == 3 and now.values.grad is None
    trained(model, optimizer)
    assert all(bool(layer.values.isfinite().all()) for layer in model)


@pytest.mark.parametrize("kind", ["adam", "sgd", "fused"])
def test_dense_layers_take_their_moments_along(kind):
    model = dense_network()
    groups = [{"params": list(model[0].parameters()), "lr": 0.01}, {"params": list(model[2].parameters())}]
    make = {
        "adam": lambda: torch.optim.Adam(groups, lr=0.02),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.02, momentum=0.9),
        "fused": lambda: torch.optim.AdamW(groups, lr=0.02, fused=True),
    }
    optimizer = make[kind]()
    trained(model, optimizer)
    weights, state = [model[i].weight for i in (0, 2)], copy.deepcopy(optimizer.state_dict()["state"])
    kept = [w.detach().clone() for w in weights]
    patterns = {name: half(model.get_submodule(name), 8) for name in ("0", "2")}
    reblock_(model, patterns, optimizer)
    for place, (name, number, weight) in enumerate(zip("02", (0, 2), kept, strict=True)):
        layer, covered = model.get_submodule(name), inside(patterns[name])
        assert isinstance(layer, sn.SparseLinear) and torch.equal(layer.weight_dense(), weight * covered)
        group = optimizer.param_groups[place]
        assert group["lr"] == (0.01, 0.02)[place] and len(group["params"]) == 2 and group["params"][0] is layer.values
        for key, t in state[number].items():
            got = optimizer.state[layer.values][key]
            same = torch.equal(dense(layer, got), t * covered) if t.dim() == 2 else torch.equal(got, t)
            assert same, key
    assert not any(p is w for w in weights for group in optimizer.param_groups for p in group["params"])
    assert len(optimizer.state) == 4
    before = model[0].values.detach().clone()
    trained(model, optimizer, steps=1)
    assert not torch.equal(model[0].values, before)


def test_gathered_then_cut_then_rewired():
    """From a dense network to blocks whose places are exchanged by RigL, with one optimizer all along."""
    model = dense_network()
    optimizer = torch.optim.AdamW(model.parameters())
    trained(model, optimizer)
    report = sn.gather_units(model, optimizer, density=0.4, block_size=8)
    with pytest.warns(UserWarning, match="reblock_: layer 2"):
        reblock_(model, {**report.patterns, "2": sn.BlockPattern.from_places(
            torch.tensor([0]), torch.tensor([0]), (10, 40), 8)}, optimizer)  # fmt: skip
    assert model[0].pattern == report.patterns["0"]
    sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(0.3), every=2)
    for _ in range(4):
        trained(model, optimizer, steps=1)
        sparsifier.step()
    assert model[0].pattern != report.patterns["0"]


def test_copies_and_a_sparsifier_follow():
    model = sn.SparseMLP([24, 40, 10], 0.5, 1)
    average = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=2, followers=[average], seed=0)
    weight = average[0].weight_dense().detach()
    patterns = {str(i): half(layer, 8) for i, layer in enumerate(model)}
    reblock_(model, patterns, optimizer, sparsifier=sparsifier)
    assert average[0].pattern == patterns["0"]
    assert torch.equal(average[0].weight_dense(), weight * inside(patterns["0"]))
    for _ in range(4):
        trained(model, optimizer, steps=1)
        sparsifier.step()
    assert model[0].pattern == average[0].pattern != patterns["0"]


def test_groups_become_whole_blocks_and_come_back_after_a_failure(monkeypatch):
    model = nn.Sequential(sn.SparseLinear(24, 40, density=0.5, block_size=8, element_mask="2:4"), nn.Linear(40, 10))
    weight, patterns = model[0].weight_dense().detach(), {"0": half(model[0], 4), "1": half(model[1], 8)}
    with monkeypatch.context() as patch:
        patch.setattr("sparsenet.compaction.cutting.sparsify_", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reblock_(model, patterns)
    assert str(model[0].elements) == "2:4" and torch.equal(model[0].weight_dense(), weight)
    reblock_(model, patterns)
    assert model[0].elements is None and torch.equal(model[0].weight_dense(), weight * inside(patterns["0"]))


def test_an_optimizer_without_state_or_without_the_layer_gets_none():
    model = sn.SparseMLP([24, 40, 10], 0.5, 1)
    fresh, other = torch.optim.Adam(model[0].parameters()), torch.optim.Adam(model[1].parameters())
    reblock_(model, {"0": half(model[0], 8)}, [fresh, other])
    assert not fresh.state_dict()["state"] and not other.state_dict()["state"]


def test_layers_that_are_not_named_stay():
    model = dense_network()
    weight = model[2].weight
    reblock_(model, {"0": half(model[0], 8)})
    assert isinstance(model[0], sn.SparseLinear) and model[2].weight is weight


def test_a_failure_half_way_takes_everything_back(monkeypatch):
    model = nn.Sequential(sn.SparseLinear(24, 40, density=0.5, block_size=1), nn.Linear(40, 10))
    optimizer = torch.optim.Adam(model.parameters())
    trained(model, optimizer)
    whole, pattern, linear = copy.deepcopy(model.state_dict()), model[0].pattern, model[1]
    state = copy.deepcopy(optimizer.state_dict()["state"])

    def failing(*_, **__):
        raise MemoryError("none left")

    monkeypatch.setattr("sparsenet.compaction.cutting.sparsify_", failing)
    with pytest.raises(MemoryError, match="none left"):
        reblock_(model, {"0": half(model[0], 8), "1": half(model[1], 8)}, optimizer)
    assert model[0].pattern == pattern and model[1] is linear
    assert all(torch.equal(t, whole[name]) for name, t in model.state_dict().items())
    for number, tensors in optimizer.state_dict()["state"].items():
        assert all(torch.equal(t, state[number][key]) for key, t in tensors.items())


def tied():
    model = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    model[1].weight = model[0].weight
    return model


def adafactor(model):
    optimizer = torch.optim.Adafactor(model.parameters())
    trained(model, optimizer, steps=1)
    return optimizer


BAD = [
    (lambda m: reblock_("model", {}), "model must be a torch.nn.Module, got str"),
    (lambda m: reblock_(m, {"7": half(m[0], 8)}), "patterns must name Linear or SparseLinear layers, got '7', no such"),
    (lambda m: reblock_(m, {"1": half(m[0], 8)}), "patterns must name Linear or SparseLinear layers, got '1', ReLU"),
    (lambda m: reblock_(m, {"0": half(m[2], 8)}), "'0' must be a BlockPattern of (40, 24), got (10, 40)"),
    (lambda m: reblock_(m, {"0": 8}), "'0' must be a BlockPattern of (40, 24), got int"),
    (lambda m: reblock_(m, {"0": half(m[0], 8)}, adafactor(m)), "of Adafactor must have one number per weight of '0'"),
    (
        lambda m: reblock_(m, {"0": half(m[0], 8)}, copies=[nn.Sequential(nn.ReLU())]),
        "must name Linear or",
    ),
    (lambda m: reblock_(m[0], {"": half(m[0], 8)}), "model must hold the Linear to cut, got that Linear itself"),
    (lambda m: reblock_(tied(), {"0": half(tied()[0], 8)}), "the weight of '0' must not be shared"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_in_a_sentence_and_changes_nothing(call, message):
    model = dense_network()
    layers = list(model)
    with pytest.raises((CompactionError, ValueError, TypeError), match=re.escape(message)):
        call(model)
    assert all(a is b for a, b in zip(model, layers, strict=True))
