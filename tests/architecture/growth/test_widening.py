"""Widening: the function stays, old state stays, training goes on; by hand, at random, and with bad input."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import Concat, Residual, random_network
from torch import nn

import sparsenet as sn
from sparsenet.architecture.growth import GrowthError, growable, multiple_of, readers, widen
from sparsenet.architecture.growth.newborn import HOW
from sparsenet.compaction.graph import UnitGraph


def recorded_operands(model, graph, name, x):
    """(what the layer reads, the gradient at its first reader), by hooks; of convolutions, made-up ones."""
    layer, reader = (model.get_submodule(n) for n in (name, readers(graph, name)[0]))
    out = reader.weight.shape[0]
    if isinstance(layer, nn.Conv2d):
        generator = torch.Generator().manual_seed(5)
        given = (layer.weight[0].numel(), out)
        return tuple(torch.randn(40, n, generator=generator, dtype=x.dtype) for n in given)
    seen = []
    handle = layer.register_forward_hook(lambda m, args, result: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    rows = seen[0].reshape(-1, layer.in_features)
    return rows, torch.randn(len(rows), out, generator=torch.Generator().manual_seed(6), dtype=x.dtype)


def assert_same_function(model, before, x, bound):
    """In eval mode, in train mode, and in eval mode with the statistics of that training pass."""
    for training in (False, True, False):
        got, expected = model.train(training)(x).detach(), before.train(training)(x).detach()
        assert expected.isfinite().all(), "the network itself is not finite"
        difference = float((got - expected).abs().max() / (1 + expected.abs().max()))
        assert difference <= bound, f"training={training}: {difference:.3g}"


def train(model, optimizer, x, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(x).square().mean().backward()
        optimizer.step()


def tensors_of(model, optimizer=None):
    """Everything that a refusal must leave alone."""
    found = {name: t.clone() for name, t in model.state_dict().items()}
    for i, p in enumerate(model.parameters()):
        for key, t in (optimizer.state.get(p, {}) if optimizer else {}).items():
            found[f"state {i} {key}"] = torch.as_tensor(t).clone()
    return found


def assert_unchanged(before, after):
    assert before.keys() == after.keys()
    assert all(torch.equal(t, after[name]) for name, t in before.items())


# --- at random ------------------------------------------------------------------------------------------------------


def chosen_units(model, graph, rng):
    """Some layer that can grow and by how much; a multiple of what its readers need."""
    names = [name for name, reason in growable(model, graph).items() if reason is None]
    if not names:
        return None
    name = rng.choice(names)
    step = multiple_of(graph, name)
    return name, step * rng.randint(1, max(1, 5 // step))


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("family", ["dense", "block_sparse", "mixed", "cnn"])
@settings(max_examples=12)
@given(seed=st.integers(0, 2**31), double=st.booleans())
def test_the_function_is_unchanged_at_random(family, how, seed, double):
    """240 random architectures: the function, a training step, old state, compaction."""
    rng, dtype = random.Random(seed), torch.float64 if double else torch.float32
    model, x = random_network(seed, family, dtype)
    graph = UnitGraph(model, zeros=False)
    chosen = chosen_units(model, graph, rng)
    if chosen is None:
        return
    name, count = chosen
    if how in ("gradient", "firefly") and not readers(graph, name):
        return
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train(model, optimizer, x)
    operands = {name: recorded_operands(model, graph, name, x)} if how in ("gradient", "firefly") else None
    before, parameters = copy.deepcopy(model), dict(model.named_parameters())
    report = widen(model, optimizer, {name: count}, how=how, operands=operands, graph=graph, seed=seed)
    assert_same_function(model, before, x, 1e-10 if double else 1e-4)
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert len(report.new[name]) >= count and report.parameters[0] <= report.parameters[1]
    train(model, optimizer, x, 1)
    whole = copy.deepcopy(model)
    sn.compact(model, optimizer)
    assert_same_function(model, whole, x, 1e-9 if double else 1e-4)


# --- by hand --------------------------------------------------------------------------------------------------------


def mlp(width=6, **kwargs):
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3), **kwargs)


def test_pairs_are_equal_and_heard_with_opposite_signs():
    model = mlp()
    rows, columns = model[0].weight.detach().norm(dim=1).mean(), model[2].weight.detach().norm(dim=0).mean()
    report = widen(model, None, {"0": 3})
    assert report.new["0"].tolist() == report.columns["2"].tolist() == [6, 7, 8]
    weight, outgoing, bias = model[0].weight.detach(), model[2].weight.detach(), model[0].bias.detach()
    assert torch.equal(weight[6], weight[7]) and torch.equal(outgoing[:, 6], -outgoing[:, 7])
    assert not outgoing[:, 8].any() and weight[8].any() and not torch.equal(weight[6], weight[8])
    assert torch.allclose(weight[6:].norm(dim=1), rows) and torch.allclose(outgoing[:, 6].norm(), columns)
    assert not bias[6:].any() and (model[0].out_features, model[2].in_features) == (9, 9)
    assert report.parameters == (51, 51 + 3 * (4 + 1 + 3)) and report.how == {"0": "pairs"}


def test_a_split_shares_what_the_strongest_unit_said():
    model = mlp()
    with torch.no_grad():
        model[2].weight[:, 4] *= 100
    before = model[2].weight.detach().clone()
    widen(model, None, {"0": 1}, how="split")
    weight, outgoing = model[0].weight.detach(), model[2].weight.detach()
    assert torch.equal(weight[6], weight[4]) and model[0].bias[6] == model[0].bias[4]
    assert torch.allclose(outgoing[:, 4] + outgoing[:, 6], before[:, 4])
    share = outgoing[:, 6] / before[:, 4]
    assert (share > 0.37).all() and (share < 0.63).all() and share.unique().numel() == 3  # uneven: they part


def test_gradient_pairs_lie_along_the_largest_singular_vectors():
    model = mlp()
    x, grad = torch.randn(50, 4), torch.randn(50, 3)
    u, s, v = torch.linalg.svd(grad.T @ x, full_matrices=False)
    widen(model, None, {"0": 4}, how="gradient", operands={"0": (x, grad)})
    for unit, k in ((6, 0), (8, 1)):
        incoming, outgoing = model[0].weight[unit].detach(), model[2].weight[:, unit].detach()
        assert abs(torch.cosine_similarity(incoming, v[k], 0)) > 0.999
        assert abs(torch.cosine_similarity(outgoing, u[:, k], 0)) > 0.999
        assert outgoing @ (grad.T @ x) @ incoming > 0  # signs belong together
    assert s[0] > s[1]


def test_firefly_takes_the_candidate_with_the_largest_pull():
    """Only x[:, 2] > 0 goes with the gradient: a unit that sees it is chosen, and speaks against the gradient."""
    model = mlp()
    x = torch.randn(400, 4)
    grad = torch.relu(x[:, 2:3]) * torch.tensor([[1.0, 0.0, -2.0]])
    widen(model, None, {"0": 2}, how="firefly", operands={"0": (x, grad)})
    said = torch.relu(x @ model[0].weight[6].detach())
    assert torch.corrcoef(torch.stack([said, torch.relu(x[:, 2])]))[0, 1] > 0.5
    assert torch.cosine_similarity(model[2].weight[:, 6].detach(), torch.tensor([-1.0, 0.0, 2.0]), 0) > 0.95


def test_the_same_seed_gives_the_same_bits_and_leaves_the_global_state_alone():
    first, second = mlp(), mlp()
    second.load_state_dict(first.state_dict())
    other = copy.deepcopy(first)
    state = torch.get_rng_state()
    for model, seed in ((first, 3), (second, 3), (other, 4)):
        widen(model, None, {"0": 3}, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    assert_unchanged(first.state_dict(), second.state_dict())
    assert not torch.equal(first[0].weight, other[0].weight)


def test_where_dropout_draws_for_each_unit_new_ones_are_silent_and_the_report_says_so():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
    for how in ("pairs", "split"):
        report = widen(model, None, {"0": 2}, how=how)
        assert report.how["0"] == f"{how} with outgoing weights of zero: '2' (Dropout) draws for each unit"
        assert not model[3].weight[:, report.columns["3"]].any()


def test_what_stands_between_grows_along():
    model = nn.Sequential(
        *(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.PReLU(3), nn.Conv2d(3, 3, 3, padding=1, groups=3)),
        *(sn.TriStateReLU(3), nn.Flatten(), nn.Linear(27, 4)),
    )
    report = widen(model, None, {"0": 2})
    assert [len(report.new[name]) for name in ("0", "3")] == [2, 2] and report.columns["6"].tolist() == list(
        range(27, 45)
    )
    assert model[1].num_features == model[2].num_parameters == model[4].num_features == model[3].groups == 5
    assert model[1].running_mean[3:].tolist() == [0, 0] and model[1].running_var.shape == (5,)
    assert not model[4].closed_units()[3:].any()
    assert model(torch.randn(2, 2, 5, 5)).shape == (2, 4)


def test_all_that_are_added_to_each_other_grow_together():
    model = nn.Sequential(
        nn.Linear(4, 6), Residual(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 6))), nn.Linear(6, 2)
    )
    report = widen(model, None, {"0": 2, "1.branch.0": 1})
    assert {n: at.tolist() for n, at in report.new.items()} == {"0": [6, 7], "1.branch.0": [5], "1.branch.2": [6, 7]}
    assert {n: at.tolist() for n, at in report.columns.items()} == {
        "1.branch.0": [6, 7],
        "1.branch.2": [5],
        "2": [6, 7],
    }


def test_units_in_the_middle_of_a_concatenation():
    model = nn.Sequential(Concat(nn.Linear(4, 8), nn.Linear(4, 3)), sn.SparseLinear(11, 16, density=0.6, block_size=4))
    graph = UnitGraph(model)
    assert (multiple_of(graph, "0.a"), multiple_of(graph, "0.b")) == (4, 1)
    model.append(nn.Linear(16, 2))
    x = torch.randn(3, 4)
    before = model(x)
    report = widen(model, None, {"0.a": 4})
    assert report.columns["1"].tolist() == [8, 9, 10, 11] and torch.allclose(model(x), before, atol=1e-6)


# --- optimizer state ------------------------------------------------------------------------------------------------


class SignAverage(torch.optim.Optimizer):
    """Keeps a momentum, a second moment and a vector per row, under names of its own."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                s = self.state[p]
                if not s:
                    s.update(drift=torch.zeros_like(p), heat=torch.zeros_like(p), row=p.new_zeros(len(p)), count=0)
                s["drift"].mul_(0.9).add_(p.grad)
                s["heat"].mul_(0.9).addcmul_(p.grad, p.grad)
                s["row"].add_(p.grad.flatten(1).abs().sum(1) if p.dim() > 1 else p.grad.abs())
                p.sub_(group["lr"] * s["drift"] / (1 + s["heat"].sqrt()))


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.02),
    "adagrad": lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.25),
    "adafactor": torch.optim.Adafactor,
    "own": SignAverage,
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_state_of_old_weights_stays_bit_for_bit(kind):
    model = nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), sn.SparseLinear(6, 7, density=0.7, block_size=4), nn.ReLU(), nn.Linear(7, 1)
    )
    optimizer = OPTIMIZERS[kind](model.parameters())
    x = torch.randn(9, 5)
    train(model, optimizer, x)
    old = {p: {k: torch.as_tensor(t).clone() for k, t in optimizer.state[p].items()} for p in model.parameters()}
    shapes = {p: p.shape for p in model.parameters()}
    widen(model, optimizer, {"0": 1, "2": 2})
    for p, state in old.items():
        for key, before in state.items():
            now = torch.as_tensor(optimizer.state[p][key])
            if p is model[2].values:
                if before.dim() == 3 and before.shape[1:] == (4, 4):
                    assert now.shape == p.shape and set(before[before != 0].tolist()) <= set(now.flatten().tolist())
            elif before.dim():
                assert torch.equal(now[tuple(slice(n) for n in before.shape)], before), (key, shapes[p])
                along = [b if a == s else a for a, s, b in zip(before.shape, shapes[p], p.shape, strict=False)]
                if before.dim() == p.dim() and (p.dim() == 1 or min(shapes[p]) > 1):
                    assert list(now.shape) == along
            else:
                assert torch.equal(now, before)
    train(model, optimizer, x, 3)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("state", "factor"), [("scaled", 0.03), ("zero", 0.0), ("mean", 1.0), (0.3, 0.3)])
def test_second_moments_of_new_weights(state, factor):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, torch.randn(20, 4))
    mean = optimizer.state[model[0].weight]["exp_avg_sq"].mean()
    widen(model, optimizer, {"0": 2}, state=state)
    after = optimizer.state[model[0].weight]
    assert torch.allclose(after["exp_avg_sq"][6:], factor * mean) and not after["exp_avg"][6:].any()


def test_a_factored_moment_of_one_row_grows_along_the_right_side():
    model = nn.Sequential(nn.Linear(5, 1), nn.ReLU(), nn.Linear(1, 3))
    optimizer = torch.optim.Adafactor(model.parameters())
    train(model, optimizer, torch.randn(9, 5))
    columns = optimizer.state[model[0].weight]["col_var"].clone()
    widen(model, optimizer, {"0": 2})
    state = optimizer.state[model[0].weight]
    assert state["row_var"].shape == (3, 1) and torch.equal(state["col_var"], columns)
    assert optimizer.state[model[2].weight]["col_var"].shape == (1, 3)


def test_gradients_are_carried_and_old_graphs_refuse():
    model = mlp()
    loss = model(torch.randn(3, 4)).sum()
    loss.backward(retain_graph=True)
    before = model[0].weight.grad.clone()
    widen(model, None, {"0": 2})
    assert torch.equal(model[0].weight.grad[:6], before) and not model[0].weight.grad[6:].any()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- with others ----------------------------------------------------------------------------------------------------


def test_copies_and_followers_get_the_same_new_weights():
    model = sn.SparseMLP([16, 24, 8], density=0.6, block_size=8)
    follower, average = copy.deepcopy(model), torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        follower[0].values.mul_(0.5)
    optimizer = torch.optim.Adam(model.parameters())
    sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(), every=1, followers=[follower])
    x = torch.randn(5, 16)
    before = follower(x)
    train(model, optimizer, x, 1)
    average.update_parameters(model)
    average.module.load_state_dict(model.state_dict())
    before = follower(x)
    report = widen(model, None, {"0": 6}, sparsifier=sparsifier, copies=[average])  # the sparsifier knows the optimizer
    assert optimizer.state[model[0].values]["exp_avg"].shape == model[0].values.shape
    assert torch.allclose(follower(x), before, atol=1e-6) and not torch.allclose(follower(x), model(x))
    assert_unchanged(model.state_dict(), average.module.state_dict())
    assert follower[0].pattern == model[0].pattern
    new = report.columns["1"]
    assert torch.equal(follower[1].weight_dense()[:, new], model[1].weight_dense()[:, new])
    train(model, optimizer, x, 1)
    assert sparsifier.step() is not None and follower[0].pattern == model[0].pattern


def small_cnn():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 2))


def in_blocks():
    return sn.SparseMLP([24, 24, 24], density=0.6, block_size=8, distribution="uniform")


@pytest.mark.parametrize(("build", "shape"), [(mlp, (4,)), (in_blocks, (24,)), (small_cnn, (1, 5, 5))])
@pytest.mark.parametrize("how", ["pairs", "zero"])
def test_compaction_of_the_same_units_gives_back_what_was(build, shape, how):
    model, x, name = build(), torch.randn(5, *shape), "0"
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, x)
    before = tensors_of(model, optimizer)
    report = widen(model, optimizer, {name: 8}, how=how)
    sn.compact(model, optimizer, remove={name: report.new[name].tolist()}, zeros=False, permute=False)
    assert_unchanged(before, tensors_of(model, optimizer))


def test_a_widened_model_is_saved_and_loaded(tmp_path):
    def build():
        torch.manual_seed(4)
        parts = (
            nn.Conv2d(1, 3, 3),
            nn.BatchNorm2d(3),
            nn.ReLU(),
            nn.Flatten(),
            sn.SparseLinear(27, 16, density=0.5, block_size=4),
        )
        return nn.Sequential(*parts, nn.ReLU(), nn.Linear(16, 2))

    model, x = build(), torch.randn(5, 1, 5, 5)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, x)
    widen(model, optimizer, {"0": 2, "4": 5})
    train(model, optimizer, x)
    sn.save(tmp_path / "wide.safetensors", model, optimizer)
    again = build()
    sn.resize_to(again, tmp_path / "wide.safetensors")
    other = torch.optim.Adam(again.parameters())
    sn.load(tmp_path / "wide.safetensors", again, other)
    assert_unchanged(tensors_of(model, optimizer), tensors_of(again, other))
    for net, opt in ((model, optimizer), (again, other)):
        train(net, opt, x)
    assert_unchanged(tensors_of(model, optimizer), tensors_of(again, other))


def test_blocks_new_lines_and_masks():
    """The last block row was partly outside: it is filled first; each new line has as many blocks as the others."""
    generator = torch.Generator().manual_seed(1)
    pattern = sn.BlockPattern.random((14, 16), 0.5, 4, generator)
    mask = torch.rand(pattern.num_blocks, 4, 4, generator=generator) < 0.5
    layer = sn.SparseLinear(16, 14, pattern=pattern, element_mask=mask)
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(14, 2))
    values, old = layer.values.detach().clone(), layer.element_mask.clone()
    report = widen(model, None, {"0": 8})
    assert layer.pattern.shape == (22, 16) and report.blocks == (8, 12)
    assert layer.pattern.crow.diff().tolist()[4:] == [2, 2]
    new = layer.weight_dense().detach()[14:]
    assert (new != 0).sum(1).tolist() == [int(c) * 4 for c in layer.pattern.crow.diff()[[3, 3, 4, 4, 4, 4, 5, 5]]]
    assert torch.equal(layer.values[:8][old], values[old]) and torch.equal(
        layer.element_mask[:8] & (values != 0), values != 0
    )


def test_nothing_is_ever_dense():
    """As a dense matrix the layer would take 64 GiB."""
    n = 1 << 17
    pattern = sn.BlockPattern.random((n, n), block_size=16, num_blocks=n // 16 * 2)
    model = nn.Sequential(
        nn.Linear(2, n), nn.ReLU(), sn.SparseLinear(n, n, pattern=pattern), nn.ReLU(), nn.Linear(n, 2)
    )
    report = widen(model, None, {"0": 16, "2": 16})
    assert model[2].pattern.shape == (n + 16, n + 16) and report.blocks[1] - report.blocks[0] <= 6


# --- bad input ------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.out = nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.relu(self.b(torch.relu(self.a(x)))))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.relu(self.a(torch.relu(self.a(x)))))


class Listed(torch.optim.SGD):
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["history"] = [p.grad.clone()]


def block_concat():
    return nn.Sequential(
        Concat(nn.Linear(4, 6), nn.Linear(4, 2)), sn.SparseLinear(8, 8, density=1.0, block_size=4), nn.Linear(8, 2)
    )


def normalised():
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2))


def grouped():
    return nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1))


def summed():
    return nn.Sequential(nn.Linear(4, 6), Residual(nn.Linear(6, 6)), nn.Linear(6, 2))


def given(x, grad, how="firefly"):
    return {"units": {"0": 1}, "how": how, "operands": {"0": (x, grad)}}


ONE = {"units": {"0": 1}}
NO_NUMBERS = torch.full((5, 4), torch.nan)
BAD = [
    (mlp, {"units": {"7": 1}}, "units must name layers that can grow, got '7': the model has no module of that name"),
    (mlp, {"units": {"1": 1}}, "got '1': ReLU is no linear layer or convolution"),
    (mlp, {"units": {"2": 1}}, "got '2': the model returns it"),
    (mlp, {"units": {"0": 0}}, r"widen: units\['0'\] must be an integer >= 1, got 0"),
    (mlp, {"units": {}}, "widen: units must name at least one layer, got {}"),
    (mlp, {**ONE, "how": "magic"}, "widen: how must be one of zero, pairs, split, gradient, firefly, got 'magic'"),
    (mlp, {**ONE, "state": "cold"}, "widen: state must be one of zero, scaled, mean or a number, got 'cold'"),
    (mlp, {**ONE, "state": -1.0}, "widen: state must"),
    (mlp, {**ONE, "how": "gradient"}, r"operands must hold \(x, grad_output\) of layer '0', got none"),
    (mlp, given(torch.ones(5, 3), torch.ones(5, 3)), r"x \[n, 4\], got \[5, 3\]"),
    (mlp, given(torch.ones(5, 4), torch.ones(5, 4)), r"grad_output \[5, 3\] of '2', got \[5, 4\]"),
    (mlp, given(NO_NUMBERS, torch.ones(5, 3), "gradient"), "must be finite, got NaN or Inf"),
    (Tied, {"units": {"a": 1}}, "got 'a': it shares a parameter with another module"),
    (Twice, {"units": {"a": 1}}, "got 'a': it is called 2 times"),
    (normalised, ONE, r"'1' \(LayerNorm\) normalises over it"),
    (grouped, ONE, "got '0': it has 2 groups"),
    (block_concat, {"units": {"0.a": 4}}, "others follow its units in '1' at 6, inside a block of 4"),
    (summed, {"units": {"0": 1, "1.branch": 1}}, "units must name units once, got '0' and '1.branch'"),
]


@pytest.mark.parametrize(("build", "arguments", "message"), BAD)
def test_bad_input_is_refused_and_nothing_has_changed(build, arguments, message):
    model = build()
    before = tensors_of(model)
    with pytest.raises(ValueError, match=message):
        widen(model, None, **arguments)
    assert_unchanged(before, tensors_of(model))


def test_an_optimizer_that_is_not_understood_is_refused_and_nothing_has_changed():
    model = mlp()
    optimizer = Listed(model.parameters(), lr=0.1)
    train(model, optimizer, torch.randn(5, 4))
    before = tensors_of(model)
    with pytest.raises(GrowthError, match="widen: state 'history' of Listed must have the shape of '0'"):
        widen(model, optimizer, {"0": 1})
    with pytest.raises(GrowthError, match="widen: optimizer must not be LBFGS"):
        widen(model, torch.optim.LBFGS(model.parameters()), {"0": 1})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.kept = [torch.zeros_like(model[0].weight)]
    with pytest.raises(GrowthError, match="SGD must keep state in optimizer.state, got one of the size of '0' in kept"):
        widen(model, optimizer, {"0": 1})
    assert_unchanged(before, tensors_of(model))


def test_units_among_others_must_fill_blocks_and_graphs_be_fresh():
    model = nn.Sequential(
        Concat(nn.Linear(4, 8), nn.Linear(4, 3)), sn.SparseLinear(11, 8, density=0.6, block_size=4), nn.Linear(8, 2)
    )
    before = tensors_of(model)
    with pytest.raises(GrowthError, match="units must be born in blocks of 4 .* got 3 new places behind 8"):
        widen(model, None, {"0.a": 3})
    assert_unchanged(before, tensors_of(model))
    graph = UnitGraph(model)
    widen(model, None, {"0.a": 4}, graph=graph)
    with pytest.raises(GrowthError, match="widen: graph must be of this model as it is now"):
        widen(model, None, {"0.a": 4}, graph=graph)


def test_a_copy_of_another_size_is_refused_and_nothing_has_changed():
    model = mlp()
    before = tensors_of(model)
    with pytest.raises(GrowthError, match="widen: '0' of a copy must have the model's sizes"):
        widen(model, None, {"0": 1}, copies=[mlp(7)])
    assert_unchanged(before, tensors_of(model))


def test_all_is_taken_back_when_it_fails_half_way(monkeypatch):
    """Only a lack of memory can; here the last of the puts is made to fail."""
    from sparsenet.compaction import compacting

    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), sn.SparseLinear(6, 8, density=0.6, block_size=4), nn.Linear(8, 2)
    )
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, torch.randn(5, 4))
    before = tensors_of(model, optimizer)
    commit = compacting.commit

    def failing(prepared):
        def fail():
            raise MemoryError("none left")

        prepared[-1].puts.append((fail, lambda: None))
        commit(prepared)

    monkeypatch.setattr(compacting, "commit", failing)
    with pytest.raises(MemoryError):
        widen(model, optimizer, {"0": 3, "2": 3})
    assert_unchanged(before, tensors_of(model, optimizer))
    assert (model[0].out_features, model[1].num_features, model[2].in_features) == (6, 6, 6)


def test_growable_and_readers():
    model = mlp()
    assert growable(model) == {"0": None, "2": "the model returns it"}
    assert readers(UnitGraph(model), "0") == ["2"]
    with pytest.raises(GrowthError, match="readers: name must be a layer of the model, got '9'"):
        readers(UnitGraph(model), "9")
    with pytest.raises(GrowthError, match="multiple_of: name must be a layer of the model, got '9'"):
        multiple_of(UnitGraph(model), "9")


def test_new_rows_and_columns_are_no_denser_than_asked():
    """A small full layer would stay full however wide it gets."""
    model = sn.SparseMLP([256, 64, 64, 8], density=1.0, block_size=16)
    x = torch.randn(5, 256)
    before = model(x)
    widen(model, None, {"0": 448, "1": 448}, density=0.1)
    assert torch.allclose(model(x), before, atol=1e-6)
    pattern = model[1].pattern
    assert pattern.to_mask().any(1).all() and pattern.to_mask().any(0).all()
    assert 16 < pattern.num_blocks <= 32 * 4 + 28, "rows of 4 blocks, a fan-in of 64; a block for each new column"
    for _ in range(3):
        widen(model, None, {"0": 512, "1": 512}, density=0.1)
    assert 0.05 < model[1].pattern.density <= 0.1
    small = [sn.SparseMLP([16, 16, 16, 2], 0.5, 1, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    for each, asked in zip(small, (0.1, 1.0), strict=True):
        widen(each, None, {"0": 16, "1": 16}, density=asked)
    assert small[0][1].pattern.num_blocks == small[1][1].pattern.num_blocks, "64 inputs are allowed"
    with pytest.raises(ValueError, match="widen: density must be"):
        widen(model, None, {"0": 16}, density=2.0)
