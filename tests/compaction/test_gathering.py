"""Gathering: the function stays, all that goes with a unit moves bit for bit, kept blocks never hold less."""

import copy
import re
import warnings
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import Residual, random_network
from scipy.optimize import linear_sum_assignment
from torch import nn

import sparsenet as sn
from sparsenet.compaction import CompactionError, gathering
from sparsenet.compaction.assignment import exchanged
from sparsenet.compaction.cuts import active_elements
from sparsenet.compaction.gathering import gather_units
from sparsenet.functional.blocks import zero_outside

SETTINGS = {"density": 0.3, "block_size": 4}


def mlp(*sizes, dtype=torch.float64):
    """Linear layers with ReLU between them; the biases of hidden layers number their units."""
    layers = []
    for inp, out in pairwise(sizes):
        layers += [nn.Linear(inp, out, dtype=dtype), nn.ReLU()]
    with torch.no_grad():
        for layer in layers[:-2:2]:
            layer.bias.copy_(torch.arange(len(layer.bias)) / 100)
    return nn.Sequential(*layers[:-1])


def numbering(layer):
    """The old number of each unit, from its bias."""
    return (layer.bias.detach() * 100).round().long()


def trained(model, optimizer, width, steps=3, dtype=torch.float64):
    """Some steps, and the gradient of one more."""
    for step in range(steps + 1):
        optimizer.zero_grad()
        model(torch.randn(16, width, dtype=dtype)).square().mean().backward()
        if step < steps:
            optimizer.step()


# --- who stands with whom -------------------------------------------------------------------------------------------


def test_four_units_by_hand():
    """Units 0 and 2 belong in the first block, 1 and 3 in the second; the exchange of 1 and 2 gains 3 + 2."""
    gains = torch.tensor([[4.0, 0.0], [0.0, 3.0], [2.0, 0.0], [0.0, 1.0]])
    assert exchanged(gains, torch.arange(4), 2).tolist() == [0, 2, 1, 3]
    assert exchanged(gains, torch.tensor([2, 0, 3, 1]), 2).tolist() == [2, 0, 3, 1]  # as good already: nobody moves


def test_the_last_group_stays_short():
    """Five units in groups of two: the last has one place, which the unit that gains most there takes."""
    gains = torch.tensor([[0.0, 0.0, 5.0], [0.0, 0.0, 1.0], [0.0, 0.0, 2.0], [0.0, 0.0, 3.0], [0.0, 0.0, 0.0]])
    order = exchanged(gains, torch.arange(5), 2)
    assert int(order[4]) == 0 and sorted(order.tolist()) == list(range(5))


@given(st.integers(0, 2**31), st.integers(1, 60), st.sampled_from([2, 4, 16]))
def test_an_exchange_never_loses_and_comes_close_to_the_best(seed, n, b):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-n // b)
    gains = torch.rand(n, groups, generator=generator).square()
    start = torch.randperm(n, generator=generator)
    group = torch.arange(n) // b
    order = exchanged(gains, start, b)
    assert sorted(order.tolist()) == list(range(n))
    found, before = (float(gains[o, group].sum()) for o in (order, start))
    best = float(gains.T[group].numpy()[linear_sum_assignment(-gains.T[group].numpy())].sum())
    assert before - 1e-5 <= found <= best + 1e-5
    assert found >= 0.9 * best
    assert torch.equal(order, exchanged(gains, start, b))


def test_equal_gains_end():
    order = exchanged(torch.ones(12, 3), torch.arange(12), 4)
    assert order.tolist() == list(range(12))


# --- what is gathered -----------------------------------------------------------------------------------------------


def test_eight_units_by_hand():
    """Even units read and write the first half, odd units the second: gathered, half of the blocks hold everything.

    In the given order each block of 4 x 4 has 8 ones of 32 in its layer, so two of four blocks hold half.
    """
    model = mlp(8, 8, 8)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.zero_()
        for unit in range(8):
            half = slice(0, 4) if unit % 2 == 0 else slice(4, 8)
            model[0].weight[unit, half] = 1.0
            model[2].weight[half, unit] = 1.0
    report = gather_units(model, density=0.5, block_size=4)
    assert (report.before, report.after) == (0.5, 1.0)
    assert sorted(numbering(model[0])[:4].tolist()) in ([0, 2, 4, 6], [1, 3, 5, 7])
    assert report.layers["0"].blocks == 2 and report.layers["0"].in_a_row == 1.0
    assert report.moved == report.layers["0"].moved == 4


@pytest.mark.parametrize("distribution", ["uniform", "erdos_renyi"])
def test_sparsify_keeps_the_blocks_that_were_gathered(distribution):
    model = mlp(40, 64, 48, 10, dtype=torch.float32)
    settings = {"density": 0.2, "block_size": 8, "distribution": distribution}
    report = gather_units(model, **settings)
    sn.sparsify_(model, **settings)
    assert {name: model.get_submodule(name).pattern for name in report.patterns} == report.patterns
    assert report.after > 1.1 * report.before


def test_no_sweep_moves_nothing_and_tells_what_would_be_kept():
    model = mlp(40, 64, 10)
    whole = copy.deepcopy(model.state_dict())
    report = gather_units(model, **SETTINGS, sweeps=0)
    assert report.moved == 0 and report.before == report.after
    assert all(torch.equal(t, whole[name]) for name, t in model.state_dict().items())
    assert gather_units(model, **SETTINGS).before == report.before


@given(st.integers(0, 2**31), st.sampled_from([4, 8, 16]), st.floats(0.01, 1.0), st.booleans())
def test_kept_blocks_never_hold_less(seed, b, density, single):
    torch.manual_seed(seed)
    sizes = [int(n) for n in torch.randint(1, 50, (4,))]
    model = sn.SparseMLP(sizes, 0.5, 1, dtype=torch.float64) if single else mlp(*sizes)
    x = torch.randn(3, sizes[0], dtype=torch.float64)
    before = model(x)
    report = gather_units(model, density=density, block_size=b)
    assert report.after >= report.before
    assert torch.allclose(model(x), before, rtol=1e-12, atol=1e-12)
    again = gather_units(model, density=density, block_size=b)
    assert again.before == pytest.approx(report.after) and again.after >= again.before


def test_the_same_network_is_gathered_in_the_same_way():
    torch.manual_seed(3)
    models = [copy.deepcopy(mlp(50, 70, 33, 9))] * 2
    models[1] = copy.deepcopy(models[0])
    reports = [gather_units(model, **SETTINGS) for model in models]
    assert reports[0].patterns == reports[1].patterns
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_layers_that_will_not_be_cut_move_along_and_count_nothing():
    model = mlp(32, 64, 64, 8)
    x = torch.randn(4, 32, dtype=torch.float64)
    before = model(x)
    report = gather_units(model, **SETTINGS, filter_fn=lambda name, layer: name == "2")
    assert list(report.layers) == ["2"] and report.layers["2"].moved > 0
    assert not torch.equal(numbering(model[0]), torch.arange(64))  # its units are the inputs of layer 2
    assert torch.allclose(model(x), before, rtol=1e-12, atol=1e-12)


def test_importance_is_what_the_user_says():
    model = mlp(16, 32, 16)
    model(torch.randn(9, 16, dtype=torch.float64)).square().sum().backward()
    twin = copy.deepcopy(model)
    for mine, own in zip(twin, model, strict=True):
        if isinstance(own, nn.Linear):
            mine.weight.grad = own.weight.grad.clone()
    named = gather_units(model, **SETTINGS, importance="taylor")
    given = gather_units(twin, **SETTINGS, importance=lambda layer: (layer.weight * layer.weight.grad).float().square())
    assert named.patterns == given.patterns
    assert named.patterns != gather_units(mlp(16, 32, 16), **SETTINGS).patterns
    assert torch.equal(model[0].weight, twin[0].weight) and torch.equal(model[0].weight.grad, twin[0].weight.grad)


# --- the function and the state -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["dense", "block_sparse", "mixed", "cnn"])
@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_the_function_of_random_networks_is_unchanged(family, seed):
    model, x = random_network(seed, family, torch.float64)
    whole = copy.deepcopy(model)
    report = gather_units(model, **SETTINGS)
    for training in (False, True, False):
        got, expected = model.train(training)(x), whole.train(training)(x)
        assert (got - expected).abs().max() <= 1e-12 * (1 + expected.abs().max())
    assert report.after >= report.before
    for name, layer in model.named_modules():
        if isinstance(layer, sn.SparseLinear):
            assert layer.num_active == whole.get_submodule(name).num_active
    assert all(layer.stays or layer.moved >= 0 for layer in report.layers.values())


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_gradients_and_moments_move_bit_for_bit(name):
    model = mlp(24, 40, 12)
    optimizer = OPTIMIZERS[name](model.parameters())
    trained(model, optimizer, 24)
    with torch.no_grad():
        model[0].bias.copy_(torch.arange(40) / 100)
    whole, other = copy.deepcopy((model, optimizer))
    for twin, own in zip(whole.parameters(), model.parameters(), strict=True):
        twin.grad = own.grad.clone()
    parameters = list(model.parameters())
    assert gather_units(model, optimizer, **SETTINGS).moved > 0
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    order = numbering(model[0])
    places = {"0.weight": (0,), "0.bias": (0,), "2.weight": (1,), "2.bias": ()}
    for key, dims in places.items():
        now, before = model.get_parameter(key), whole.get_parameter(key)
        state, old = optimizer.state[now], other.state[before]
        for got, expected in [(now, before), (now.grad, before.grad), *((state[k], old[k]) for k in old)]:
            if isinstance(expected, torch.Tensor):
                for dim in dims:
                    moves = expected.dim() > dim and expected.shape[dim] == 40
                    expected = expected.index_select(dim, order) if moves else expected
                assert torch.equal(got, expected), key
    for m, o in ((model, optimizer), (whole, other)):
        o.step()
        trained(m, o, 24, steps=0)
    order = order.argsort()
    assert torch.allclose(model[0].weight[order], whole[0].weight, rtol=1e-12, atol=1e-12)


def picture(layer, t):
    """``t``, shaped as the layer's values, as a dense [out, in] matrix of its active elements."""
    at, rows, cols = active_elements(layer)
    dense = t.new_zeros(layer.out_features, layer.in_features)
    dense[rows, cols] = t.detach().flatten()[at]
    return dense


def numbered_twin(model, optimizer):
    """Numbers the units of hidden layers by their biases; a copy of both, with gradients."""
    with torch.no_grad():
        for layer in list(model)[:-1]:
            layer.bias.copy_(torch.arange(len(layer.bias)) / 100)
    twin, other = copy.deepcopy((model, optimizer))
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        a.grad = b.grad.clone()
    return twin, other


def assert_moved_alike(model, optimizer, twin, other):
    """Every layer is what it was with rows and columns in the order that the biases tell, and so is all its state."""
    cols = torch.arange(model[0].in_features)
    for now, before in zip(model, twin, strict=True):
        rows = numbering(now) if now is not model[-1] else torch.arange(now.out_features)
        assert now.num_active == before.num_active
        state, old = optimizer.state[now.values], other.state[before.values]
        pairs = [(state[key], t) for key, t in old.items() if isinstance(t, torch.Tensor) and t.dim() == 3]
        for got, expected in [(now.values, before.values), (now.values.grad, before.values.grad), *pairs]:
            assert torch.equal(picture(now, got), picture(before, expected)[rows][:, cols])
        cols = rows


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_single_weights_move_with_their_moments(name):
    generator = torch.Generator().manual_seed(0)
    model = sn.SparseMLP([40, 66, 35, 10], 0.2, 1, dtype=torch.float64, generator=generator)
    optimizer = OPTIMIZERS[name](model.parameters())
    trained(model, optimizer, 40)
    twin, other = numbered_twin(model, optimizer)
    report = gather_units(model, optimizer, **SETTINGS)
    assert report.after > 1.15 * report.before and report.layers["0"].moved > 0 and report.layers["1"].moved > 0
    assert_moved_alike(model, optimizer, twin, other)


def masked(n, out, b, seed):
    """A layer of blocks of which a third of the elements is active."""
    generator = torch.Generator().manual_seed(seed)
    layer = sn.SparseLinear(n, out, density=0.6, block_size=b, dtype=torch.float64, generator=generator)
    mask = torch.rand(layer.values.shape, generator=generator) < 0.3
    zero_outside(mask, layer.pattern)
    return sn.SparseLinear(n, out, pattern=layer.pattern, element_mask=mask, activation="relu", dtype=torch.float64)


@pytest.mark.parametrize("b", [4, 8, 16])
def test_masked_elements_stay_as_many(b):
    model = nn.Sequential(masked(20, 37, b, 0), masked(37, 21, b, 1), masked(21, 5, b, 2))
    optimizer = torch.optim.Adam(model.parameters())
    trained(model, optimizer, 20)
    twin, other = numbered_twin(model, optimizer)
    assert gather_units(model, optimizer, **SETTINGS).moved > 0
    assert_moved_alike(model, optimizer, twin, other)
    trained(model, optimizer, 20, steps=1)
    assert all(bool((layer.values[~layer.element_mask] == 0).all()) for layer in model)


def test_outputs_of_a_layer_of_groups_move_and_the_rule_stays():
    model = nn.Sequential(
        sn.SparseLinear(24, 40, density=0.5, block_size=8, element_mask="2:4", activation="relu", dtype=torch.float64),
        nn.Linear(40, 10, dtype=torch.float64),
    )
    x = torch.randn(5, 24, dtype=torch.float64)
    before, active = model(x), model[0].num_active
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gather_units(model, **SETTINGS).layers["0"].moved > 0
    assert str(model[0].elements) == "2:4" and model[0].num_active == active
    assert torch.allclose(model(x), before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_the_feed_forward_part_of_a_transformer(norm_first, whole):
    """Its hidden units move; the residual stream, which attention reads, stays and the report says why."""
    layer = nn.TransformerEncoderLayer(16, 2, 48, 0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) if whole else layer
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    before = [model.train(training)(x).detach() for training in (True, False)]
    report = gather_units(model, **SETTINGS)
    names = ["layers.0.linear", "layers.1.linear"] if whole else ["linear"]
    for name in names:
        assert report.layers[f"{name}1"].moved > 0 and not report.layers[f"{name}1"].stays
        assert report.layers[f"{name}2"].moved == 0 and report.layers[f"{name}2"].stays
    for training, expected in zip((True, False), before, strict=True):
        got = model.train(training)(x)
        assert (got - expected).abs().max() <= 1e-12 * (1 + expected.abs().max())


class Block(nn.Module):
    """A residual stream with a normalisation and a feed-forward part."""

    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width, dtype=torch.float64)
        self.up = nn.Linear(width, hidden, dtype=torch.float64)
        self.down = nn.Linear(hidden, width, dtype=torch.float64)

    def forward(self, x):
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def test_a_residual_stream_under_a_norm_stays():
    model = nn.Sequential(nn.Linear(12, 20, dtype=torch.float64), Block(20, 40), nn.Linear(20, 4, dtype=torch.float64))
    x = torch.randn(6, 12, dtype=torch.float64)
    before, weight = model(x), model[0].weight.detach().clone()
    report = gather_units(model, **SETTINGS)
    stream = "module '1.norm' (LayerNorm) normalises over it"
    assert {name: layer.stays for name, layer in report.layers.items()} == {
        "0": stream,
        "1.up": "",
        "1.down": stream,
        "2": "the model returns it",
    }
    assert torch.equal(model[0].weight, weight) and report.layers["1.up"].moved > 0
    assert torch.allclose(model(x), before, rtol=1e-12, atol=1e-12)
    assert f"stay: {stream}" in str(report) and "moved" in str(report)


def test_a_stream_that_only_linear_layers_read_moves():
    """x = x + relu(f(x)): the same units are rows and columns of f."""
    make = lambda inp, out: nn.Linear(inp, out, dtype=torch.float64)  # noqa: E731 - three of them
    model = nn.Sequential(make(12, 24), Residual(nn.Sequential(make(24, 24), nn.ReLU())), make(24, 4))
    x = torch.randn(6, 12, dtype=torch.float64)
    before = model(x)
    report = gather_units(model, **SETTINGS)
    assert report.after >= report.before and report.layers["0"].moved == report.layers["1.branch.0"].moved
    assert torch.allclose(model(x), before, rtol=1e-12, atol=1e-12)


class Joined(nn.Module):
    """Two branches side by side, read by one layer, one of them by another layer too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(8, 16)
        self.both, self.one = nn.Linear(32, 4), nn.Linear(16, 4)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.both(torch.cat([a, b], 1)) + self.one(a)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.b(self.a(torch.relu(self.a(x))))


def test_what_cannot_move_says_why():
    report = gather_units(Joined(), **SETTINGS)
    assert report.layers["a"].stays == report.layers["b"].stays
    assert report.layers["a"].stays == "they stand beside other units, or in another order, in some tensor"
    assert gather_units(Twice(), **SETTINGS).layers["a"].stays == "module 'a' is called 2 times"
    whole = nn.Sequential(nn.Linear(8, 16), sn.SparseLinear(16, 8, density=0.5, block_size=4))
    assert gather_units(whole, **SETTINGS).layers["0"].stays == "moving them would break up the whole blocks of '1'"
    grouped = nn.Sequential(nn.Linear(8, 16), sn.SparseLinear(16, 8, density=0.5, block_size=4, element_mask="2:4"))
    report = gather_units(grouped, **SETTINGS)
    assert report.layers["0"].stays == "moving them would break the rule 2:4 of '1'"
    assert str(grouped[1].elements) == "2:4"
    opaque = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 8))
    assert "left whole as asked" in gather_units(opaque, **SETTINGS, opaque=["1"]).layers["0"].stays
    images = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    assert gather_units(images, **SETTINGS).layers["3"].moved > 0  # the conv's channels stay, its reader's units move


# --- copies, the sparsifier, failures -------------------------------------------------------------------------------


def test_copies_and_followers_move_alike():
    model = sn.SparseMLP([32, 64, 48, 10], 0.2, 1, dtype=torch.float64)
    average, best = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=2, followers=[average], seed=1)
    trained(model, optimizer, 32, steps=1)
    x = torch.randn(4, 32, dtype=torch.float64)
    before = [m(x) for m in (average, best)]
    assert gather_units(model, optimizer, **SETTINGS, copies=[best], sparsifier=sparsifier).moved > 0
    for twin, expected in zip((average, best), before, strict=True):
        assert all(a.pattern == b.pattern for a, b in zip(twin, model, strict=True))
        assert torch.allclose(twin(x), expected, rtol=1e-12, atol=1e-12)
    for _ in range(4):
        trained(model, optimizer, 32, steps=1)
        sparsifier.step()
    assert all(a.pattern == b.pattern for a, b in zip(average, model, strict=True))


def test_a_failure_half_way_takes_everything_back(monkeypatch):
    model = sn.SparseMLP([32, 64, 48, 10], 0.2, 1, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters())
    trained(model, optimizer, 32)
    whole, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    calls, real = [], gathering.prepare_stage

    def failing(graph, stage, *rest):
        calls.append(stage.name)
        if calls == ["0", "1", "1"]:  # the second family's first module
            raise MemoryError("none left")
        return real(graph, stage, *rest)

    monkeypatch.setattr(gathering, "prepare_stage", failing)
    with pytest.raises(MemoryError, match="none left"):
        gather_units(model, optimizer, **SETTINGS)
    assert len(calls) == 5
    assert all(torch.equal(t, whole[name]) for name, t in model.state_dict().items())
    for number, tensors in optimizer.state_dict()["state"].items():
        assert all(torch.equal(t, state["state"][number][key]) for key, t in tensors.items())


def test_a_graph_recorded_before_refuses_its_backward():
    model = mlp(16, 32, 8)
    loss = model(torch.randn(3, 16, dtype=torch.float64)).sum()
    assert gather_units(model, **SETTINGS).moved > 0
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def branching():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    return Branching()


def odd_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state[model[0].weight]["history"] = torch.zeros(3, 5)
    return optimizer


def negative(layer):
    return -torch.ones(layer.out_features, layer.in_features)


def not_finite():
    model = mlp(8, 16, 8)
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    return model


BAD = [
    (lambda m: gather_units("model", **SETTINGS), "model must be a torch.nn.Module, got str"),
    (lambda m: gather_units(m, density=1.5, block_size=4), "density must be a number in [0, 1], got 1.5"),
    (lambda m: gather_units(m, density=0.5, block_size=1), "block_size must be 4 or more, got 1"),
    (lambda m: gather_units(m, density=0.5, block_size=12), "block_size must be"),
    (lambda m: gather_units(m, **SETTINGS, sweeps=-1), "sweeps must be"),
    (lambda m: gather_units(m, **SETTINGS, distribution="even"), "distribution must be one of"),
    (lambda m: gather_units(m, "adam", **SETTINGS), "optimizer must be a torch.optim.Optimizer, got str"),
    (
        lambda m: gather_units(m, odd_optimizer(m), **SETTINGS),
        "'history' of SGD must have the shape of '0.weight'",
    ),
    (lambda m: gather_units(m, **SETTINGS, importance="size"), "importance must be magnitude, taylor or a function"),
    (
        lambda m: gather_units(m, **SETTINGS, importance="taylor"),
        "taylor must have a gradient of every layer, got",
    ),
    (lambda m: gather_units(m, **SETTINGS, importance=negative), "importance of '0' must be finite and not negative"),
    (
        lambda m: gather_units(m, **SETTINGS, importance=lambda _: torch.ones(3)),
        "be real numbers [16, 8], got [3]",
    ),
    (lambda m: gather_units(m, **SETTINGS, opaque=["z"]), "opaque must name modules of the model, got 'z'"),
    (lambda m: gather_units(m, **SETTINGS, copies=[mlp(8, 12, 8)]), "'0' of a copy must have the model's sizes"),
    (lambda m: gather_units(branching(), **SETTINGS), "the model's forward must be traceable by torch.fx"),
    (lambda m: gather_units(not_finite(), **SETTINGS), "weights must be finite, got NaN or infinity in '2'"),
    (lambda m: gather_units(m.to("meta"), **SETTINGS), "'0' must hold data, got a meta tensor"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_refused_in_a_sentence_and_changes_nothing(call, message):
    model = mlp(8, 16, 8)
    weights = {name: t.detach().clone() for name, t in model.named_parameters()}
    with pytest.raises((ValueError, TypeError), match=re.escape(message)) as error:
        call(model)
    assert "compact: " not in str(error.value) and "\n" not in str(error.value)
    if not model[0].weight.is_meta:
        assert all(torch.equal(t, weights[name]) for name, t in model.named_parameters())


def test_errors_of_the_graph_are_compaction_errors():
    with pytest.raises(CompactionError, match="^gather_units: "):
        gather_units(branching(), **SETTINGS)


def test_a_large_layer_takes_seconds():
    model = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 1024))
    report = gather_units(model, density=0.05, block_size=16)
    assert report.after > report.before and report.seconds < 30
