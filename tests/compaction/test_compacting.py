"""Compaction: the function stays, moments follow, training goes on; by hand, at random, and with bad input."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import Residual, random_network
from torch import nn
from torch.nn.utils import prune

import sparsenet as sn
from sparsenet.architecture.gates import TriStateReLU
from sparsenet.compaction.compacting import CompactionError, compact
from sparsenet.compaction.criteria import Magnitude, RarelyActive, Taylor
from sparsenet.compaction.modules import CompactLayerNorm


def gate(*open_):
    """A TriStateReLU with these gates open."""
    return TriStateReLU(len(open_), width_start=torch.tensor([float(o) for o in open_]))


def assert_same_function(model, whole, x, bound):
    """In eval mode, in train mode, and in eval mode with the statistics of that training pass."""
    for training in (False, True, False):
        got, expected = model.train(training)(x), whole.train(training)(x)
        difference = (got - expected).abs().max() / (1 + expected.abs().max())
        assert difference <= bound, f"training={training}: {difference:.3g}"


# --- the function at random -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("family", ["dense", "block_sparse", "mixed", "cnn"])
@settings(max_examples=15)
@given(seed=st.integers(0, 2**31))
def test_the_function_is_unchanged(family, dtype, seed):
    """120 random architectures."""
    model, x = random_network(seed, family, dtype)
    whole = copy.deepcopy(model)
    report = compact(model)
    assert_same_function(model, whole, x, 1e-12 if dtype == torch.float64 else 1e-5)
    assert report.bytes[1] <= report.bytes[0] and report.parameters[1] <= report.parameters[0]
    for name, change in report.layers.items():
        module = model.get_submodule(name)
        width = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
        assert change.after == width >= 1 and change.before - change.after == sum(change.removed.values())
    again = compact(copy.deepcopy(model))
    assert again.bytes[1] <= again.bytes[0]
    assert again.removed == 0 or again.reblocked  # nothing is left to do, except that new blocks may pack better


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
@pytest.mark.parametrize("family", ["dense", "block_sparse", "mixed", "cnn"])
def test_the_function_over_many_networks(family, dtype, bound, capsys):
    """150 architectures; prints the largest change of an output, and over 1 + the largest output, for each mode."""
    worst = {"train": (0.0, 0.0), "eval": (0.0, 0.0)}
    for seed in range(9000, 9150):
        model, x = random_network(seed, family, dtype)
        whole = copy.deepcopy(model)
        compact(model)
        for mode in ("eval", "train", "eval"):
            got, expected = (net.train(mode == "train")(x).detach() for net in (model, whole))
            change = float((got - expected).abs().max())
            both = (change, change / (1 + float(expected.abs().max())))
            worst[mode] = tuple(map(max, worst[mode], both))
    with capsys.disabled():
        print(f"\n{family}, {dtype}: " + "; ".join(f"{m} {a:.1e}, relative {r:.1e}" for m, (a, r) in worst.items()))
    assert max(relative for _, relative in worst.values()) <= bound


# --- the function by hand -------------------------------------------------------------------------------------------


def test_a_closed_gate_takes_row_column_and_gate():
    model = nn.Sequential(nn.Linear(3, 4), gate(1, 0, 1, 0), nn.Linear(4, 2))
    first, second = copy.deepcopy(model[0]), copy.deepcopy(model[2])
    identities = [id(p) for p in model.parameters()]
    report = compact(model)
    assert torch.equal(model[0].weight, first.weight[[0, 2]]) and torch.equal(model[0].bias, first.bias[[0, 2]])
    assert torch.equal(model[2].weight, second.weight[:, [0, 2]]) and torch.equal(model[2].bias, second.bias)
    assert model[1].width_gate.tolist() == [1, 1] and model[1].num_features == 2
    assert (model[0].out_features, model[2].in_features) == (2, 2)
    assert [id(p) for p in model.parameters()] == identities
    change = report.layers["0"]
    assert (change.before, change.after, change.removed, change.kept) == (4, 2, {"closed gate": 2}, {})
    assert change.kept_units.tolist() == [0, 2]
    assert report.parameters == (3 * 4 + 4 + 4 + 1 + 8 + 2, 3 * 2 + 2 + 2 + 1 + 4 + 2)


def test_a_constant_unit_moves_into_the_next_bias():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[1.0, 2.0], [0.0, 0.0], [0.0, 0.0]])
        model[0].bias[:] = torch.tensor([0.5, 3.0, -3.0])  # unit 1 is always 3, unit 2 always 0
        model[2].weight[:] = torch.tensor([[1.0, 10.0, 100.0]])
        model[2].bias[:] = 0.25
    report = compact(model)
    assert model[2].weight.tolist() == [[1.0]] and model[2].bias.tolist() == [30.25]
    assert report.layers["0"].removed == {"constant": 2} and report.folded == 1


def test_death_spreads_forwards_and_backwards():
    # unit 0 of layer 0 is read only by unit 1 of layer 2, which nothing reads: both go; then layer 4's inputs shrink
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[4].weight[:, 1] = 0
        model[2].weight[0, 0] = model[2].weight[2, 0] = 0
    report = compact(model)
    assert report.layers["0"].kept_units.tolist() == [1, 2] and report.layers["2"].kept_units.tolist() == [0, 2]
    assert report.layers["0"].removed == {"unread": 1}
    # a constant reaching a unit with no other input makes that unit constant as well
    model = nn.Sequential(nn.Linear(2, 2), nn.Sigmoid(), nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[2].weight[:] = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    whole, x = copy.deepcopy(model), torch.randn(5, 2)
    report = compact(model)
    assert report.layers["2"].kept_units.tolist() == [0] and report.folded == 2
    assert_same_function(model, whole, x, 1e-6)


def test_a_reader_without_bias_keeps_the_constant_and_says_so():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[0].bias[1] = 2.0
    report = compact(model)
    assert report.layers["0"].after == 2
    assert report.layers["0"].kept == {"a reader has no bias to take it, or pads with zeros": 1}
    with torch.no_grad():
        model[0].bias[1] = -2.0  # zero after ReLU: no bias needed
    assert compact(model).layers["0"].after == 1


def test_zero_padding_keeps_a_constant_channel_and_reflection_does_not():
    for mode, after in (("zeros", 2), ("reflect", 1)):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 1, 3, padding=1, padding_mode=mode))
        with torch.no_grad():
            model[0].weight[1] = 0
            model[0].bias[1] = 2.0
        whole, x = copy.deepcopy(model), torch.randn(2, 1, 8, 8)
        assert compact(model).layers["0"].after == after
        assert_same_function(model, whole, x, 1e-6)


def test_convolution_batch_norm_flatten_and_linear():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), gate(0, 1, 1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
    )
    whole, x = copy.deepcopy(model), torch.randn(4, 1, 6, 6)
    compact(model)
    assert model[0].weight.shape == (2, 1, 3, 3) and model[0].out_channels == 2
    assert model[1].num_features == 2 and model[1].running_mean.shape == (2,)
    assert torch.equal(model[5].weight, whole[5].weight[:, 4:])  # each channel is four columns
    assert_same_function(model, whole, x, 1e-6)


def test_batch_norm_does_not_fold_what_training_would_see_otherwise():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.ReLU(), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight[1] = 0
        model[1].running_mean[:] = torch.tensor([0.3, 0.4])
    x = torch.randn(6, 2)
    whole = copy.deepcopy(model)
    assert compact(model).layers["0"].after == 2  # batch statistics and running statistics disagree about unit 1
    assert compact(model, inference=True).layers["0"].after == 1
    torch.testing.assert_close(model.eval()(x), whole.eval()(x))
    whole[1].running_mean[1] = whole[0].bias[1]
    assert compact(whole).layers["0"].after == 1  # settled: both modes give beta


def test_dropout_keeps_a_constant_in_training_but_not_zero():
    def model(bias):
        net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Dropout(0.5), nn.Linear(2, 1))
        with torch.no_grad():
            net[0].weight[1] = 0
            net[0].bias[1] = bias
        return net

    assert compact(model(1.0)).layers["0"].after == 2
    assert compact(model(1.0), inference=True).layers["0"].after == 1
    assert compact(model(-1.0)).layers["0"].after == 1


def test_residual_units_leave_together():
    branch = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 4))
    model = nn.Sequential(nn.Linear(2, 4), Residual(branch), nn.Linear(4, 1))
    with torch.no_grad():
        model[2].weight[:, 1] = 0  # not read at the end, but by the branch
        model[2].weight[:, 3] = 0
        branch[0].weight[:, 3] = 0  # nobody reads unit 3
    whole, x = copy.deepcopy(model), torch.randn(5, 2)
    report = compact(model)
    assert report.layers["0"].kept_units.tolist() == report.layers["1.branch.2"].kept_units.tolist() == [0, 1, 2]
    assert branch[0].in_features == 3 and branch[2].out_features == 3
    assert_same_function(model, whole, x, 1e-6)


def test_layer_norm_goes_on_counting_what_left():
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.ReLU(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        model[0].weight[[1, 4]] = 0  # constants bias[1] and bias[4] stay in mean and variance
        model[1].weight[[1, 4]] = 0  # and beta follows
        model[0].bias[4] = 0
    whole, x = copy.deepcopy(model), torch.randn(7, 3, dtype=torch.float64)
    report = compact(model)
    assert isinstance(model[1], CompactLayerNorm) and report.layers["0"].after == 3
    assert model[1].weight is not whole[1].weight and model[1].left[0] == 2
    assert "normalising as 5" in repr(model[1])
    assert_same_function(model, whole, x, 1e-14)
    with torch.no_grad():  # once more, on top
        for net, unit in ((model, 0), (whole, 0)):
            net[0].weight[unit] = 0
            net[1].weight[unit] = 0
    assert compact(model).layers["0"].after == 2
    assert_same_function(model, whole, x, 1e-14)
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), model(x))


def test_layer_norm_keeps_units_that_are_not_constant():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), gate(1, 0, 1, 1), nn.Linear(4, 2))
    report = compact(model)
    assert report.layers["0"].after == 4
    assert report.layers["0"].kept == {"module '1' (LayerNorm) normalises over it": 1}


def test_products_die_with_either_factor():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.gate, self.out = nn.Linear(2, 3), nn.Linear(2, 3), gate(1, 0, 1), nn.Linear(3, 1)

        def forward(self, x):
            return self.out(self.a(x) * self.gate(self.b(x)))

    model = Product()
    whole, x = copy.deepcopy(model), torch.randn(4, 2)
    report = compact(model)
    assert report.layers["a"].kept_units.tolist() == report.layers["b"].kept_units.tolist() == [0, 2]
    assert_same_function(model, whole, x, 1e-6)


def test_functions_methods_and_a_view():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.gate, self.out = nn.Conv2d(1, 3, 3, padding=1), gate(1, 0, 1), nn.Linear(2 * 3 * 4, 2)
            self.other = nn.Conv2d(1, 3, 3, padding=1)

        def forward(self, x):
            a = torch.nn.functional.max_pool2d(torch.relu(self.gate(self.conv(x))), 2)
            b = torch.nn.functional.avg_pool2d(self.other(x).sigmoid(), 2) * 2
            both = torch.cat((a, b), dim=1)
            both = torch.nn.functional.dropout(both, 0.0, self.training)
            return self.out(both.view(both.shape[0], -1))

    model = Functional()
    with torch.no_grad():
        model.out.weight[:, 12:16] = 0  # channel 0 of the other convolution
    whole, x = copy.deepcopy(model), torch.randn(3, 1, 4, 4)
    report = compact(model)
    assert report.layers["conv"].after == 2 and report.layers["other"].after == 2
    assert_same_function(model, whole, x, 1e-6)


def test_units_in_what_is_not_understood_stay():
    class Softmax(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 3), nn.Linear(3, 1)

        def forward(self, x):
            return self.b(torch.softmax(self.a(x), 1))

    model = Softmax()
    with torch.no_grad():
        model.a.weight[1] = 0
        model.b.weight[:, 1] = 0
    assert compact(model).layers["a"].after == 3


def test_asking_for_the_number_of_channels_pins_them():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.gate, self.b = nn.Linear(2, 4), gate(1, 0, 1, 1), nn.Linear(4, 1)

        def forward(self, x):
            h = self.gate(self.a(x))
            return self.b(h / h.shape[1])

    with pytest.raises(CompactionError, match="closed unit of 'gate' cannot be removed"):
        compact(Scaled())
    assert compact(Scaled(), strict=False).layers["a"].after == 4


def test_zeros_can_be_told_not_to_count():
    model = nn.Sequential(nn.Linear(3, 4), gate(1, 1, 0, 1), nn.Linear(4, 2))
    nn.init.zeros_(model[2].weight)  # as residual branches often start
    assert compact(model, zeros=False).layers["0"].after == 3


def test_a_sparse_mlp_knows_its_new_sizes():
    model = sn.SparseMLP([8, 12, 9, 3], density=1.0, block_size=1)
    with torch.no_grad():
        model[1].values[model[1].pattern.col_indices.long() == 5] = 0
    compact(model)
    assert model.sizes == (8, 11, 9, 3)


# --- the last unit --------------------------------------------------------------------------------------------------


def test_a_layer_keeps_its_strongest_unit_and_says_so():
    model = nn.Sequential(nn.Linear(3, 4), gate(0, 0, 0, 0), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[2] *= 10
    whole, x = copy.deepcopy(model), torch.randn(5, 3)
    report = compact(model)
    assert report.layers["0"].kept_units.tolist() == [2]
    assert report.layers["0"].kept == {"a layer keeps at least one unit": 1}
    assert "stay: a layer keeps at least one unit" in str(report)
    assert_same_function(model, whole, x, 1e-6)
    assert compact(model).removed == 0


def test_a_last_unit_that_is_constant_stays_what_it_is():
    """Layer b is constant and keeps one unit; it has no bias to take the constants of a, which must stay as well."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.zero_()
    whole, x = copy.deepcopy(model), torch.randn(5, 2)
    report = compact(model)
    assert report.layers["2"].after == 1 and report.layers["0"].after == 3
    assert_same_function(model, whole, x, 1e-6)


def test_a_criterion_cannot_empty_a_layer_either():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    report = compact(model, criterion=lambda view: view.removable)
    assert [report.layers[n].after for n in ("0", "2", "4")] == [1, 1, 2]


# --- optimizers -----------------------------------------------------------------------------------------------------


class RowMomentum(torch.optim.Optimizer):
    """Written here: a velocity like the parameter and a running scale per row."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["steps"], state["velocity"] = 0, torch.zeros_like(p)
                    state["row_scale"] = torch.zeros(p.shape[0]) if p.dim() else torch.zeros(())
                state["steps"] += 1
                state["velocity"].mul_(0.9).add_(p.grad)
                size = p.grad.flatten(1).norm(dim=1) if p.dim() > 1 else p.grad.abs()
                state["row_scale"].mul_(0.5).add_(size)
                scale = state["row_scale"].view([-1] + [1] * (p.dim() - 1)) if p.dim() else state["row_scale"]
                p.sub_(group["lr"] * state["velocity"] / (1 + scale))


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True, momentum=0.5),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "written here": lambda p: RowMomentum(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "SGD plain": lambda p: torch.optim.SGD(p, lr=1e-2),
}


def convnet():
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), gate(1, 0, 1, 1), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(16, 6), gate(0, 1, 1, 0, 1, 1), nn.Linear(6, 5), nn.PReLU(5), nn.Linear(5, 2)),
    )


KEPT = {  # parameter -> (rows, columns) that stay in convnet, unit 3 of layer 7 being unread
    "0.weight": ([0, 2, 3], None),
    "1.weight": ([0, 2, 3], None),
    "1.bias": ([0, 2, 3], None),
    "5.weight": ([1, 2, 4, 5], [0, 1, 2, 3, 8, 9, 10, 11, 12, 13, 14, 15]),
    "5.bias": ([1, 2, 4, 5], None),
    "7.weight": ([0, 1, 2, 4], [1, 2, 4, 5]),
    "7.bias": ([0, 1, 2, 4], None),
    "8.weight": ([0, 1, 2, 4], None),
    "9.weight": ([0, 1], [0, 1, 2, 4]),
    "9.bias": ([0, 1], None),
}


def trainable(model):
    """Weights, not gates: the dead stay dead."""
    return [p for n, p in model.named_parameters() if "gate" not in n]


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        x = torch.randn(8, 1, 6, 6, generator=generator).to(dtype)
        optimizer.zero_grad()
        model(x).square().sum().backward()
        if model[9].weight.shape[1] == 5:  # nothing reads unit 3, for good
            model[9].weight.grad[:, 3] = 0
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_follow_their_units_bit_for_bit(name):
    model = convnet()
    optimizer = OPTIMIZERS[name](trainable(model))
    with torch.no_grad():
        model[9].weight[:, 3] = 0
    train(model, optimizer, 3, seed=1)
    before = {n: (p.detach().clone(), copy.deepcopy(optimizer.state.get(p, {}))) for n, p in model.named_parameters()}
    groups = [list(map(id, g["params"])) for g in optimizer.param_groups]
    compact(model, optimizer)
    assert [list(map(id, g["params"])) for g in optimizer.param_groups] == groups
    for n, (rows, cols) in KEPT.items():
        p = model.get_parameter(n)
        data, state = before[n]
        pick = lambda t, rows=rows, cols=cols: t[rows] if cols is None else t[rows][:, cols]  # noqa: E731
        assert torch.equal(p, pick(data)), n
        for key, value in state.items():
            now = optimizer.state[p][key]
            if not isinstance(value, torch.Tensor) or value.numel() == 1:
                assert now == value
            elif value.shape == data.shape:
                assert torch.equal(now, pick(value)), (n, key)
            elif value.dim() == 1 or value.shape[1] == 1:  # one entry per row
                assert torch.equal(now, value[rows]), (n, key)
            else:  # Adafactor's column factor
                assert torch.equal(now, value if cols is None else value[:, cols]), (n, key)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_that_of_the_network_with_frozen_dead_units(name):
    model = convnet().double()
    with torch.no_grad():
        model[9].weight[:, 3] = 0
    optimizer = OPTIMIZERS[name](trainable(model))
    train(model, optimizer, 2, seed=1)
    whole, other = copy.deepcopy((model, optimizer))
    compact(model, optimizer)
    if name == "Adafactor":  # clips by the norm of a whole tensor: its updates depend on how many weights there are
        return
    train(model, optimizer, 4, seed=2)
    train(whole, other, 4, seed=2)
    for n, (rows, cols) in KEPT.items():
        if name == "written here" and cols is not None:
            continue  # its row scale counts columns that have left
        expected = whole.get_parameter(n)[rows]
        expected = expected if cols is None else expected[:, cols]
        torch.testing.assert_close(model.get_parameter(n), expected, rtol=1e-9, atol=1e-11)


def test_training_goes_on_bit_for_bit_where_sums_are_exact():
    """Whole numbers and powers of two: every sum is exact in any order, so three steps agree in every bit."""

    def net():
        generator = torch.Generator().manual_seed(5)
        model = nn.Sequential(nn.Conv2d(1, 3, 2), gate(1, 0, 1), nn.Flatten(), nn.Linear(27, 6), gate(1, 1, 0, 0, 1, 0))
        model = model.append(nn.Linear(6, 2)).double()
        with torch.no_grad():
            for p in trainable(model):
                p.copy_(torch.randint(-2, 3, p.shape, generator=generator))
        return model

    def step(model, optimizer, seed):
        x = torch.randint(-1, 2, (3, 1, 4, 4), generator=torch.Generator().manual_seed(seed)).double()
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    model, whole = net(), net()
    optimizer, other = (torch.optim.SGD(trainable(m), lr=2**-4, momentum=0.5) for m in (model, whole))
    step(model, optimizer, seed=0)
    step(whole, other, seed=0)
    compact(model, optimizer)
    for seed in (1, 2):  # 28 bits below the point by then; a fourth step would need 60
        step(model, optimizer, seed)
        step(whole, other, seed)
    rows, columns = [0, 1, 4], [*range(9), *range(18, 27)]
    assert torch.equal(model[0].weight, whole[0].weight[[0, 2]])
    assert torch.equal(model[3].weight, whole[3].weight[rows][:, columns])
    assert torch.equal(model[5].weight, whole[5].weight[:, rows]) and torch.equal(model[5].bias, whole[5].bias)
    assert model[3].weight.abs().sum() > 0


def test_several_optimizers_groups_and_no_state_yet():
    model = nn.Sequential(nn.Linear(3, 4), gate(1, 0, 1, 1), nn.Linear(4, 2))
    a = torch.optim.Adam([{"params": [model[0].weight]}, {"params": [model[0].bias], "lr": 0.1}])
    b = torch.optim.SGD([model[2].weight], lr=0.1, momentum=0.9)
    model(torch.randn(2, 3)).sum().backward()
    a.step()  # b has no state yet
    compact(model, [a, b])
    assert a.state[model[0].weight]["exp_avg"].shape == (3, 3)
    model(torch.randn(2, 3)).sum().backward()
    a.step()
    b.step()
    assert b.state[model[2].weight]["momentum_buffer"].shape == (2, 3)


def test_copies_lose_the_same_units():
    model = nn.Sequential(nn.Linear(3, 4), gate(1, 0, 1, 1), nn.Linear(4, 2))
    average = torch.optim.swa_utils.AveragedModel(model)
    with torch.no_grad():
        for p in average.parameters():
            p.add_(1.0)
    expected = copy.deepcopy(average.module)
    compact(model, copies=[average])
    assert torch.equal(average.module[0].weight, expected[0].weight[[0, 2, 3]])
    average.update_parameters(model)
    with pytest.raises(CompactionError, match="'0' of a copy must have the model's sizes"):
        compact(close(copy.deepcopy(model), 0), copies=[expected])
    with pytest.raises(CompactionError, match="one has no '2'"):
        compact(close(copy.deepcopy(model), 0), copies=[nn.Sequential(nn.Linear(3, 3), gate(1, 1, 1))])


def close(model, unit):
    with torch.no_grad():
        model[1].width_gate[unit] = 0
    return model


# --- when it is called ----------------------------------------------------------------------------------------------


def test_between_backward_and_step_gradients_come_along():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), gate(1, 0, 1, 1), nn.Linear(4, 2))
    whole = copy.deepcopy(model)
    x = torch.randn(5, 3)
    for net, early in ((model, True), (whole, False)):
        optimizer = torch.optim.SGD(trainable(net), lr=0.1, momentum=0.9)
        net(x).square().sum().backward()
        if early:
            compact(net, optimizer)
            assert model[0].weight.grad.shape == (3, 3)
        optimizer.step()
        if not early:
            compact(net, optimizer)
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(p, q)


def test_between_forward_and_backward_the_old_graph_refuses():
    model = nn.Sequential(nn.Linear(3, 4), gate(1, 0, 1, 1), nn.Linear(4, 2))
    loss = model(torch.randn(5, 3)).sum()
    compact(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    model(torch.randn(5, 3)).sum().backward()
    assert model[0].weight.grad.shape == (3, 3)


def test_an_old_loss_still_alive_does_no_harm():
    model = nn.Sequential(nn.Linear(3, 4), gate(1, 0, 1, 1), nn.Linear(4, 2))
    old = model(torch.randn(5, 3)).sum()
    old.backward()
    compact(model)
    model(torch.randn(5, 3)).sum().backward()
    assert old.item() is not None and model[2].weight.grad.shape == (2, 3)


def test_nothing_changes_when_it_fails_half_way(monkeypatch):
    model = convnet()
    optimizer = torch.optim.Adam(trainable(model))
    train(model, optimizer, 2, seed=1)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()]))
    puts = 0

    def failing(parameter, data):
        nonlocal puts
        puts += 1
        if puts == 5:
            raise MemoryError("no memory")
        return replace_data(parameter, data)

    from sparsenet.compaction import moves as compaction_moves
    from sparsenet.topology import replace_data

    monkeypatch.setattr(compaction_moves, "replace_data", failing)
    with pytest.raises(MemoryError):
        compact(model, optimizer)
    assert puts > 5  # some had been put in place, and were taken back
    now = (model.state_dict(), optimizer.state_dict(), [p.grad for p in model.parameters()])
    torch.testing.assert_close(now, state, rtol=0, atol=0)
    assert model[0].out_channels == 4 and model[5].in_features == 16


def test_with_torch_compile():
    model = nn.Sequential(nn.Linear(3, 4), gate(1, 0, 1, 1), nn.Linear(4, 2))
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(5, 3)
    expected = compiled(x)
    compact(compiled)
    torch.testing.assert_close(compiled(x), expected)
    assert model[0].out_features == 3


# --- criteria -------------------------------------------------------------------------------------------------------


def mlp():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


def test_removed_units_count_as_zero_for_their_readers():
    model = mlp()
    frozen, x = copy.deepcopy(model), torch.randn(4, 5)
    with torch.no_grad():
        frozen[2].weight[:, [0, 3]] = 0
        frozen[4].weight[:, [5]] = 0
    report = compact(model, remove={"0": [0, 3], "2": [5]})
    assert report.layers["0"].removed == {"criterion": 2} and report.layers["2"].removed == {"criterion": 1}
    assert_same_function(model, frozen, x, 1e-6)


def test_magnitude_by_hand():
    model = mlp()
    product = model[0].weight.norm(dim=1) * model[2].weight.norm(dim=0)
    keep = product.argsort()[2:].sort().values.tolist()
    report = compact(model, criterion=Magnitude(0.25))
    assert report.layers["0"].kept_units.tolist() == keep
    assert report.layers["2"].after == 6 - round(0.25 * 6) and report.layers["4"].after == 3


def test_rarely_active_units_by_hand():
    model = mlp()
    x = torch.randn(64, 5)
    with torch.no_grad():
        model[0].bias[6] = -9.0  # never active
        model[2].bias[1] = -9.0
    first = model[:2](x)
    shares = [(h == 0).float().mean(0) for h in (first, model[2:4](first))]
    report = compact(model, criterion=RarelyActive([x[:32], x[32:]], above=0.7))
    for name, share in zip(("0", "2"), shares, strict=True):
        assert report.layers[name].kept_units.tolist() == (share <= 0.7).nonzero().flatten().tolist()
    assert (shares[0] > 0.7)[6] and (shares[1] > 0.7)[1]
    share = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.9])  # mean .26, deviation .36: only the last is above .62
    view = type("View", (), {"removable": torch.ones(5, dtype=torch.bool)})()
    view.statistics = lambda batches: type("S", (), {"zero_share": share})()
    assert RarelyActive([])(view).tolist() == [False] * 4 + [True]


def test_taylor_saliency_is_value_times_gradient():
    model = mlp()
    x, y = torch.randn(16, 5), torch.randint(3, (16,))
    loss = nn.CrossEntropyLoss(reduction="sum")
    seen = {}

    def look(view):
        seen[view.name] = view.statistics([(x, y)], loss)
        return torch.zeros(view.num_units, dtype=torch.bool)

    compact(model, criterion=look)
    assert all(p.grad is None for p in model.parameters())
    hidden = torch.relu(model[0](x)).detach().requires_grad_()
    loss(model[2:](hidden), y).backward()
    expected = (hidden.detach() * hidden.grad).abs().mean(0)
    torch.testing.assert_close(seen["0"].taylor, expected.double())
    torch.testing.assert_close(seen["0"].mean, hidden.detach().double().mean(0))
    torch.testing.assert_close(seen["0"].mean_square, hidden.detach().double().square().mean(0))
    report = compact(model, criterion=Taylor([(x, y)], loss, share=0.5))
    assert report.layers["0"].kept_units.tolist() == expected.argsort()[4:].sort().values.tolist()


def test_statistics_over_channels_of_a_convolution():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(5, 1, 6, 6)
    seen = []
    compact(model, criterion=lambda v: seen.append(v.statistics([x])) or torch.zeros(v.num_units, dtype=torch.bool))
    maps = torch.relu(model[0](x)).double()
    torch.testing.assert_close(seen[0].zero_share, (maps == 0).double().mean((0, 2, 3)))


def test_criterion_on_closed_gates_of_every_kind():
    for kind in ("straight_through", "hard_concrete", "slimming"):
        unit = TriStateReLU(4, gates=kind, width_start=1.0)
        unit.kind.close_(unit.width_gate.data, torch.tensor([False, True, True, False]))
        model = nn.Sequential(nn.Linear(3, 4), unit, nn.Linear(4, 2)).eval()
        whole, x = copy.deepcopy(model), torch.randn(5, 3)
        assert compact(model).layers["0"].kept_units.tolist() == [0, 3]
        torch.testing.assert_close(model(x), whole(x))


# --- bad input ------------------------------------------------------------------------------------------------------


def test_a_module_called_twice_keeps_its_units_and_says_so():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.shared, self.gate, self.b = nn.Linear(3, 3), nn.Linear(3, 3), gate(1, 0, 1), nn.Linear(3, 1)

        def forward(self, x):
            return self.b(self.shared(self.gate(self.shared(self.a(x)))))

    with pytest.raises(
        CompactionError, match="closed unit of 'gate' cannot be removed: module 'shared' is called 2 times"
    ):
        compact(Twice())
    model = Twice()
    whole, x = copy.deepcopy(model), torch.randn(4, 3)
    report = compact(model, strict=False)
    assert report.removed == 0 and "shared" not in report.layers
    assert_same_function(model, whole, x, 0)


def test_tied_parameters_keep_their_modules_whole():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    model[2].weight = model[0].weight
    with torch.no_grad():
        model[4].weight[:, 1] = 0
    assert compact(model).removed == 0


def test_a_shared_activation_is_no_obstacle():
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 4), act, nn.Linear(4, 4), act, nn.Linear(4, 2))
    with torch.no_grad():
        model[2].weight[:, 1] = 0
    assert compact(model).layers["0"].after == 3


def test_computed_weights_keep_their_modules_whole():
    pruned = prune.ln_structured(nn.Linear(3, 4), "weight", 0.5, n=2, dim=0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    for layers in ((pruned, gate(1, 0, 1, 1), nn.Linear(4, 2)), (nn.Linear(3, 4), gate(1, 0, 1, 1), normed)):
        model = nn.Sequential(*layers)
        with pytest.raises(CompactionError, match="computes its weight from other parameters"):
            compact(model)
        assert compact(model, strict=False).removed == 0


def test_what_cannot_be_traced_is_refused_by_name():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.odd, self.b = nn.Linear(2, 3), Branching(), nn.Linear(3, 1)

        def forward(self, x):
            return self.b(self.odd(self.a(x)))

    model = Outer()
    with pytest.raises(CompactionError, match=r"module 'odd' must be traceable by torch.fx, got TraceError"):
        compact(model)
    assert compact(model, opaque=["odd"]).removed == 0
    with pytest.raises(CompactionError, match="opaque must name modules of the model, got 'od'"):
        compact(model, opaque=["od"])


def test_an_optimizer_whose_state_is_not_understood_is_refused_before_any_change():
    model = nn.Sequential(nn.Linear(3, 4), gate(1, 0, 1, 1), nn.Linear(4, 2))
    optimizer = torch.optim.LBFGS(trainable(model))
    x = torch.randn(4, 3)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with pytest.raises(CompactionError, match="of LBFGS must have the shape of '0'"):
        compact(model, optimizer)
    assert model[0].weight.shape == (4, 3)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"fill_in": "zero"}, ValueError, "fill_in must be masked or trainable, got 'zero'"),
        ({"remove": {"9": [0]}}, CompactionError, "remove must name layers of the model (0, 2, 4), got '9'"),
        ({"remove": {"0": [8]}}, CompactionError, "units of '0' must lie in [0, 8), got 8"),
        ({"remove": {"4": [0]}}, CompactionError, "unit 0 of '4' cannot be removed: the model returns it"),
        (
            {"criterion": lambda v: torch.ones(2)},
            CompactionError,
            "the criterion must return bool [8] for '0', got torch",
        ),
        ({"criterion": Magnitude(1.5)}, ValueError, "share must lie in [0, 1], got 1.5"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=re.escape(message)):
        compact(model, **options)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_distributed_data_parallel_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(mlp())
        with pytest.raises(CompactionError, match=r"wrap the model with sparsenet\.distributed\.DataParallel"):
            compact(wrapped, criterion=Magnitude(0.5))
        own = sn.distributed.DataParallel(mlp())
        compact(own, criterion=Magnitude(0.5))
        own(torch.randn(2, 5)).sum().backward()
        assert own.module[0].weight.grad.shape == (4, 5)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_feed_forward_part_of_torchs_encoder_layer_loses_its_dead_units(norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 24, 0.0, batch_first=True, norm_first=norm_first, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8, dtype=torch.float64), enable_nested_tensor=False)
    with torch.no_grad():
        for each in model.layers:
            each.linear2.weight[:, ::3] = 0.0  # nobody reads a third of the units
    whole, x = copy.deepcopy(model), torch.randn(3, 5, 8, dtype=torch.float64)
    report = compact(model)
    assert {name: change.after for name, change in report.layers.items() if change.after != change.before} == {
        "layers.0.linear1": 16,
        "layers.1.linear1": 16,
    }
    for training in (False, True):
        assert_same_function(model.train(training), whole.train(training), x, 1e-12)
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    assert torch.allclose(model(x, mask=mask), whole(x, mask=mask), rtol=1e-12, atol=1e-12)
