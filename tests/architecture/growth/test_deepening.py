"""Deepening: the function stays, the new layer trains, the structure is built again from the report."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import Concat, random_network
from torch import nn
from torch.nn import functional as F

import sparsenet as sn
from sparsenet.architecture.growth import GrowthError, ResidualLayer, deepen, growable, multiple_of, widen
from sparsenet.compaction.graph import UnitGraph


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


class Forward(nn.Module):
    """Layers as attributes, activations as functions."""

    def __init__(self, activation=F.relu):
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(4, 6), nn.Linear(6, 3), activation

    def forward(self, x):
        return self.last(self.activation(self.first(x)))


class Summed(nn.Module):
    """Runs a Sequential's children by itself."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


def same(model, before, x, bound):
    for training in (False, True, False):
        got, expected = model.train(training)(x).detach(), before.train(training)(x).detach()
        assert expected.isfinite().all()
        assert float((got - expected).abs().max() / (1 + expected.abs().max())) <= bound


def train(model, optimizer, x, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()


def state_of(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_equal(before, after):
    assert list(before) == list(after)
    assert all(torch.equal(t, after[name]) for name, t in before.items())


@pytest.mark.parametrize("kind", ["identity", "residual"])
@pytest.mark.parametrize("family", ["dense", "block_sparse", "mixed", "cnn"])
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), double=st.booleans())
def test_the_function_is_unchanged_at_random(family, kind, seed, double):
    """96 random architectures: the function, a training step, widening, compaction."""
    model, x = random_network(seed, family, torch.float64 if double else torch.float32)
    bound = 1e-10 if double else 1e-4
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train(model, optimizer, x)
    graph = UnitGraph(model, zeros=False)
    names = [n.target for n in graph.graph.nodes if n.op == "call_module" and n in graph.nodes]
    after = random.Random(seed).choice(names)
    before, state = copy.deepcopy(model), state_of(model)
    try:
        report = deepen(model, optimizer, after, kind=kind, seed=seed)
    except GrowthError as error:
        assert any(said in str(error) for said in ("must be residual behind", "module with units", "called"))
        return assert_equal(state, state_of(model))
    same(model, before, x, bound)
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert set(model.parameters()) == held and report.parameters > 0
    train(model, optimizer, x, 1)
    again = copy.deepcopy(model)
    if (
        growable(model)[report.neighbour] is None
        and growable(model)[report.layer] is None
        and family in ("dense", "cnn")
    ):
        widen(model, optimizer, {report.layer: 2 * multiple_of(UnitGraph(model), report.layer)})
        same(model, again, x, bound)
    sn.compact(model, optimizer, zeros=False)
    same(model, again, x, bound)


# --- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "after", "name", "layer"),
    [
        (mlp, "1", "1_1", "1_1.0"),  # behind the ReLU: layer, ReLU
        (mlp, "0", "0_1", "0_1.1"),  # before it: ReLU, layer
        (mlp, "2", "2_1", "2_1"),  # nothing follows
        (Forward, "first", "first.1", "first.1.1"),
        (Summed, "layers.0", "layers.0.1", "layers.0.1"),  # its children are not run one after the other
        (lambda: sn.SparseMLP([16, 24, 8], density=0.7, block_size=8), "0", "0_1", "0_1"),
    ],
)
def test_where_an_identity_goes(build, after, name, layer):
    model = build()
    x = torch.randn(5, 16 if isinstance(model, sn.SparseMLP) else 4)
    before = model(x)
    report = deepen(model, None, after)
    assert (report.name, report.layer) == (name, layer)
    assert torch.equal(model(x), before)
    new = model.get_submodule(layer)
    weight = new.weight_dense() if isinstance(new, sn.SparseLinear) else new.weight
    assert torch.equal(weight, torch.eye(len(weight)))


def test_names_stay_and_twice_is_fine():
    model = mlp()
    names = [deepen(model, None, "1").name, deepen(model, None, "1").name]
    assert names == ["1_1", "1_2"]
    assert list(dict(model.named_children())) == ["0", "1", "1_2", "1_1", "2"]


def test_a_sparse_mlp_stays_one():
    model = sn.SparseMLP([16, 24, 8], density=0.7, block_size=8)
    deepen(model, None, "0")
    deepen(model, None, "0_1", kind="residual")
    assert model.sizes == (16, 24, 24, 24, 8)
    assert isinstance(model.get_submodule("0_1_1"), ResidualLayer)
    assert model.get_submodule("0_1").density == pytest.approx(model[0].density, abs=0.2)


def test_a_block_sparse_identity_has_its_diagonal_and_more_blocks():
    model = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Linear(30, 2))
    state = torch.get_rng_state()
    deepen(model, None, "1", density=0.5, block_size=8, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    layer = model.get_submodule("1_1")
    mask = layer.pattern.to_mask()
    assert mask.diagonal().all() and layer.pattern.num_blocks == 8 and layer.activation == "relu"
    assert torch.equal(layer.weight_dense(), torch.eye(30))
    with pytest.raises(RuntimeError, match="load_state_dict: nothing was loaded"):
        model.load_state_dict({**model.state_dict(), "1_1.values": torch.zeros(3, 8, 8)})


def test_a_convolution_is_followed_by_one():
    model = nn.Sequential(nn.Conv2d(1, 3, (3, 2)), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
    x = torch.randn(2, 1, 5, 5)
    before = model(x)
    report = deepen(model, None, "1")
    assert model.get_submodule(report.layer).kernel_size == (3, 1) and torch.equal(model(x), before)


def test_copies_get_the_layer_too():
    model = mlp()
    average = torch.optim.swa_utils.AveragedModel(model)
    deepen(model, None, "1", copies=[average])
    assert_equal(state_of(model), state_of(average.module))
    assert average.module.get_submodule("1_1.0").weight is not model.get_submodule("1_1.0").weight


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.SGD])
def test_parameters_join_the_group_of_the_layer_in_front(kind):
    model = mlp()
    groups = [{"params": model[0].parameters(), "lr": 0.5}, {"params": model[2].parameters(), "lr": 0.1}]
    optimizer = kind(groups, lr=0.01)
    x = torch.randn(5, 4)
    train(model, optimizer, x)
    report = deepen(model, optimizer, "1")
    new = model.get_submodule(report.layer)
    assert [id(p) for p in optimizer.param_groups[0]["params"][2:]] == [id(new.weight), id(new.bias)]
    before = new.weight.detach().clone()
    train(model, optimizer, x)
    assert not torch.equal(new.weight, before)


def test_names_of_parameters_are_kept_in_step():
    model = mlp()
    optimizer = torch.optim.Adam(model.named_parameters())
    deepen(model, optimizer, "1")
    assert optimizer.param_groups[0]["param_names"][-2:] == ["1_1.0.weight", "1_1.0.bias"]


def test_the_structure_is_built_again_from_the_report_and_loaded(tmp_path):
    def build():
        torch.manual_seed(3)
        return nn.Sequential(sn.SparseLinear(16, 24, density=0.7, block_size=8), nn.ReLU(), nn.Linear(24, 3))

    model, x = build(), torch.randn(5, 16)
    optimizer = torch.optim.Adam(model.parameters())
    insertions = [deepen(model, optimizer, "1").insertion, deepen(model, optimizer, "1_1", kind="residual").insertion]
    widen(model, optimizer, {"0": 8})
    train(model, optimizer, x)
    sn.save(tmp_path / "deep.safetensors", model, optimizer, extra={"insertions": insertions})
    again = build()
    other = torch.optim.Adam(again.parameters())
    for insertion in insertions:
        deepen(again, other, **insertion)
    sn.resize_to(again, tmp_path / "deep.safetensors")
    sn.load(tmp_path / "deep.safetensors", again, other)
    for net, opt in ((model, optimizer), (again, other)):
        train(net, opt, x)
    assert_equal(state_of(model), state_of(again))
    assert torch.equal(model.eval()(x), again.eval()(x))


# --- bad input ------------------------------------------------------------------------------------------------------


def tanh():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))


BAD = [
    (mlp, {"after": "7"}, "deepen: after must name a module of the model, got '7'"),
    (mlp, {}, "deepen: after must name a module of the model, got ''"),
    (mlp, {"after": "1", "kind": "magic"}, "deepen: kind must be one of identity, residual, got 'magic'"),
    (mlp, {"after": "1", "density": 2.0}, "deepen: density must"),
    (mlp, {"after": "1", "block_size": 8}, "deepen: block_size must be None for a dense layer, got 8"),
    (tanh, {"after": "1"}, r"deepen: kind must be residual behind '1' \(Tanh\)"),
    (cnn, {"after": "1", "density": 0.5}, "deepen: density must be None behind a convolution, got 0.5"),
    (cnn, {"after": "2"}, "deepen: after must name a module with units, got '2'"),
    (lambda: nn.Sequential(nn.ReLU(), *mlp()), {"after": "0"}, "must name a module with units|must stand behind"),
    (lambda: Concat(mlp(), mlp()), {"after": "a"}, "called once, got 'a', a part that is not called as a whole"),
]


@pytest.mark.parametrize(("build", "arguments", "message"), BAD)
def test_bad_input_is_refused_and_nothing_has_changed(build, arguments, message):
    model = build()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        deepen(model, None, **arguments)
    assert_equal(before, state_of(model))


def test_a_module_of_two_places_or_an_optimizer_of_others_is_refused():
    model = mlp()
    model.register_module("other", model[1])
    with pytest.raises(GrowthError, match="deepen: after must name a (layer|module)"):
        deepen(model, None, "1")
    model, stranger = mlp(), nn.Parameter(torch.ones(1))
    before = state_of(model)
    with pytest.raises(GrowthError, match="deepen: optimizer must hold the parameters of '0', got none that does"):
        deepen(model, torch.optim.SGD([stranger], lr=0.1), "1")
    with pytest.raises(GrowthError, match="deepen: every copy must have the model's modules, one has no '1'"):
        deepen(model, None, "1", copies=[nn.Sequential(nn.Linear(4, 6))])
    assert_equal(before, state_of(model))
