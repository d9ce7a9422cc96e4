"""Depth folding: products by hand, at random, where they pay, and what rules them out."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import Residual, random_network
from torch import nn

import sparsenet as sn
from sparsenet.architecture.folding import fold_depth
from sparsenet.compaction.compacting import CompactionError, compact
from sparsenet.compaction.modules import ConstantBranch
from sparsenet.pattern import BlockPattern


def identity(*open_):
    """A tri-state ReLU that became the identity."""
    return sn.TriStateReLU(len(open_), width_start=torch.tensor([float(o) for o in open_]), depth_start=1.0)


def same_function(model, whole, x, bound=1e-12):
    for training in (False, True, False):
        got, expected = model.train(training)(x), whole.train(training)(x)
        torch.testing.assert_close(got, expected, rtol=bound, atol=bound * (1 + expected.abs().max().item()))


# --- products -------------------------------------------------------------------------------------------------------


def test_linear_layers_by_hand():
    model = nn.Sequential(nn.Linear(2, 3), identity(1, 0, 1), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight[:] = torch.tensor([[1.0, 2.0], [9.0, 9.0], [0.0, 3.0]])
        model[0].bias[:] = torch.tensor([1.0, 9.0, 2.0])
        model[2].weight[:] = torch.tensor([[10.0, 100.0, 1000.0]])
        model[2].bias[:] = 5.0
    parameter = model[2].weight
    report = fold_depth(model)
    assert model[2].weight.tolist() == [[10.0, 3020.0]] and model[2].bias.tolist() == [2015.0]
    assert model[2].weight is parameter and isinstance(model[0], nn.Identity) and isinstance(model[1], nn.Identity)
    assert [(p.first, p.second, p.elements) for p in report.folded] == [("0", "2", (9, 2))]


@pytest.mark.parametrize(("first_bias", "second_bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_biases(first_bias, second_bias):
    model = nn.Sequential(nn.Linear(4, 9, first_bias), identity(*[1] * 9), nn.Linear(9, 3, second_bias)).double()
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if "gate" not in n])
    model(torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    optimizer.step()
    whole, x = copy.deepcopy(model), torch.randn(7, 4, dtype=torch.float64)
    fold_depth(model, optimizer)
    same_function(model, whole, x)
    assert (model[2].bias is not None) == (first_bias or second_bias)
    held = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()} and {id(p) for p in optimizer.state} <= held
    assert model[2].weight not in optimizer.state
    if second_bias:
        assert "exp_avg" in optimizer.state[model[2].bias]  # its moments are still its own
    model(x).sum().backward()
    optimizer.step()


def test_a_bottleneck_does_not_pay_unless_told():
    model = nn.Sequential(nn.Linear(20, 2), identity(1, 1), nn.Linear(2, 20))
    whole = copy.deepcopy(model)
    report = fold_depth(model)
    assert report.folded == [] and report.kept == {"0": "the product has 400 elements, its factors 80"}
    assert "0 stays: the product has 400 elements" in str(report)
    fold_depth(model, always=True)
    same_function(model, whole, torch.randn(3, 20), 1e-5)


def test_chains_fold_one_by_one_where_it_saves_most():
    model = nn.Sequential(
        *(nn.Linear(6, 30), identity(*[1] * 30), nn.Linear(30, 40), identity(*[1] * 40), nn.Linear(40, 5)),
        *(nn.ReLU(), nn.Linear(5, 2)),
    ).double()
    whole, x = copy.deepcopy(model), torch.randn(7, 6, dtype=torch.float64)
    report = fold_depth(model)
    assert [(p.first, p.second) for p in report.folded] == [("2", "4"), ("0", "4")]
    assert [type(m).__name__ for m in model] == ["Identity"] * 4 + ["Linear", "ReLU", "Linear"]
    same_function(model, whole, x)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(("s1", "s2"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_convolutions(padding, s1, s2):
    model = nn.Sequential(
        nn.Conv2d(2, 16, 3, s1, padding), identity(*[1, 0] * 8), nn.Conv2d(16, 3, (2, 3), s2)
    ).double()
    whole, x = copy.deepcopy(model), torch.randn(2, 2, 17, 19, dtype=torch.float64)
    report = fold_depth(model)
    assert model[2].kernel_size == (3 + s1, 3 + 2 * s1) and model[2].stride == (s1 * s2, s1 * s2)
    assert report.folded[0].elements == (2 * 16 * 9 + 16 * 3 * 6, 2 * 3 * (3 + s1) * (3 + 2 * s1))
    same_function(model, whole, x)


def test_convolutions_in_one_dimension_and_inner_padding():
    model = nn.Sequential(nn.Conv1d(2, 8, 3), identity(*[1] * 8), nn.Conv1d(8, 2, 3, padding=1))
    assert fold_depth(model).kept == {"0": "zero padding between the convolutions would not survive the product"}
    model[2] = nn.Conv1d(8, 2, 3)
    whole, x = copy.deepcopy(model), torch.randn(2, 2, 12)
    assert len(fold_depth(model).folded) == 1
    same_function(model, whole, x, 1e-5)


# --- block-sparse ---------------------------------------------------------------------------------------------------


def sparse(n, out, density, b=8, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return sn.SparseLinear(n, out, density=density, block_size=b, generator=generator, **options)


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.4, 1.0]), st.booleans(), st.booleans())
def test_block_sparse_products(seed, density, first_bias, second_bias):
    generator = torch.Generator().manual_seed(seed)
    n, mid, out = (int(torch.randint(1, 40, (), generator=generator)) for _ in range(3))
    options = {"dtype": torch.float64, "seed": seed}
    gates = (torch.rand(mid, generator=generator) < 0.7).double()
    act = sn.TriStateReLU(mid, width_start=gates, depth_start=1.0).double()
    first = sparse(n, mid, density, bias=first_bias, **options)
    model = nn.Sequential(first, act, sparse(mid, out, density, bias=second_bias, activation="silu", **options))
    whole, x = copy.deepcopy(model), torch.randn(5, n, dtype=torch.float64)
    report = fold_depth(model, always=True)
    assert isinstance(model[2], sn.SparseLinear) and model[2].pattern.shape == (out, n)
    before, after = report.folded[0].elements
    assert after == model[2].values.numel() and before == whole[0].values.numel() + whole[2].values.numel()
    same_function(model, whole, x)


def test_a_sparse_product_is_made_only_where_it_saves():
    # density 0.1 of 16 x 16 blocks: the product of two such matrices has far more blocks than both
    model = nn.Sequential(sparse(128, 128, 0.2), identity(*[1] * 128), sparse(128, 128, 0.2, seed=1))
    assert "the product has" in fold_depth(model).kept["0"]
    eye = BlockPattern.from_mask(torch.eye(16, dtype=torch.bool), 8)
    model = nn.Sequential(
        sn.SparseLinear(128, 128, pattern=eye), identity(*[1] * 128), sn.SparseLinear(128, 128, pattern=eye)
    )
    whole, x = copy.deepcopy(model), torch.randn(3, 128)
    assert fold_depth(model).folded[0].elements == (32 * 64, 16 * 64)
    same_function(model, whole, x, 1e-5)


def test_sparse_with_dense_becomes_dense_where_it_saves():
    for layers in (
        (nn.Linear(4, 64), identity(*[1] * 64), sparse(64, 5, 0.9, activation="relu")),
        (sparse(4, 64, 0.9), identity(*[1] * 64), nn.Linear(64, 5)),
    ):
        model = nn.Sequential(*layers)
        whole, x = copy.deepcopy(model), torch.randn(3, 4)
        fold_depth(model)
        assert sum(p.numel() for p in model.parameters()) == 4 * 5 + 5
        same_function(model, whole, x, 1e-5)


@pytest.mark.parametrize(
    ("first", "second", "why"),
    [
        (lambda: sparse(8, 16, 1.0, activation="relu"), lambda: nn.Linear(16, 2), "its fused relu stands between"),
        (lambda: sparse(8, 16, 1.0, b=4), lambda: sparse(16, 8, 1.0), "block sizes 4 and 8 differ"),
        (
            lambda: sparse(8, 16, 1.0, element_mask=torch.ones(2, 8, 8, dtype=torch.bool)),
            lambda: sparse(16, 8, 1.0),
            "a mask inside the blocks would not survive the product",
        ),
    ],
)
def test_products_that_are_not_made(first, second, why):
    model = nn.Sequential(first(), identity(*[1] * 16), second())
    assert fold_depth(model, always=True).kept == {"0": why}


# --- what stands between --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.BatchNorm1d(16), "module '1' (BatchNorm1d) sees the batch in training"),
        (nn.LayerNorm(16), "module '1' (LayerNorm) stands between"),
        (nn.Dropout(0.3), "module '1' (Dropout) stands between"),
        (nn.Tanh(), "module '1' (Tanh) stands between"),
    ],
)
def test_other_modules_rule_it_out(module, why):
    model = nn.Sequential(nn.Linear(8, 16), identity(*[1] * 16), module, nn.Linear(16, 2))
    assert fold_depth(model).kept == {"0": why.replace("'1'", "'2'")}


def test_pooling_rules_it_out():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), identity(*[1] * 8), nn.MaxPool2d(2), nn.Conv2d(8, 1, 3))
    assert fold_depth(model).kept == {"0": "module '2' (MaxPool2d) stands between"}


def test_harmless_modules_do_not():
    prelu = nn.PReLU(16, init=1.0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.0), prelu, nn.LeakyReLU(1.0), nn.Identity(), nn.Linear(16, 2))
    whole, x = copy.deepcopy(model), torch.randn(3, 8)
    assert len(fold_depth(model).folded) == 1
    same_function(model, whole, x, 1e-5)


def test_relus_random_gates_and_second_readers_stay():
    relu = nn.Sequential(nn.Linear(8, 16), sn.TriStateReLU(16, depth_start=0.49), nn.Linear(16, 2))
    assert fold_depth(relu).folded == []
    hard = nn.Sequential(
        nn.Linear(8, 16), sn.TriStateReLU(16, gates="hard_concrete", depth_start=1.0), nn.Linear(16, 2)
    )
    assert fold_depth(hard).folded == []
    skip = nn.Sequential(Residual(nn.Sequential(nn.Linear(8, 8), identity(*[1] * 8))), nn.Linear(8, 2))
    assert fold_depth(skip).kept == {"0.branch.0": "add stands between"}


def test_the_last_layer_and_shared_modules_stay():
    returned = nn.Sequential(nn.Linear(2, 3), identity(1, 1, 1))
    assert fold_depth(returned).kept == {"0": "the model returns it"}
    layer = nn.Linear(8, 8)
    shared = nn.Sequential(layer, identity(*[1] * 8), layer, nn.Linear(8, 2))
    whole, x = copy.deepcopy(shared), torch.randn(3, 8)
    fold_depth(shared)
    same_function(shared, whole, x, 1e-5)


# --- residual branches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
def test_a_residual_branch_that_is_constant_vanishes(bias):
    branch = nn.Sequential(nn.Linear(6, 4), sn.TriStateReLU(4, width_start=0.0), nn.Linear(4, 6, bias))
    model = nn.Sequential(nn.Linear(3, 6), Residual(branch), nn.ReLU(), nn.Linear(6, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    whole, x = copy.deepcopy(model), torch.randn(5, 3, dtype=torch.float64)
    kept = branch[2].bias
    report = fold_depth(model, optimizer)
    assert report.vanished == ["1.branch.2"] and isinstance(branch[2], ConstantBranch)
    assert branch[2].bias is kept and isinstance(branch[0], nn.Identity)
    same_function(model, whole, x)
    assert len(optimizer.param_groups[0]["params"]) == len(list(model.parameters()))
    with torch.no_grad():  # what is left can still be compacted
        for net in (model, whole):
            net[3].weight[:, [1, 4]] = 0
    assert compact(model).layers["0"].after == 4
    assert fold_depth(model).vanished == []  # it is gone already
    same_function(model, whole, x)


def test_a_constant_convolutional_branch_without_bias_of_its_own():
    branch = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sigmoid())
    nn.init.zeros_(branch[0].weight)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), Residual(branch), nn.Flatten(), nn.Linear(48, 2))
    whole, x = copy.deepcopy(model), torch.randn(2, 1, 6, 6)
    assert fold_depth(model).vanished == ["1.branch.1"]
    assert not branch[1].bias.requires_grad and branch[1](x).shape == (3, 1, 1)
    same_function(model, whole, x, 1e-5)


# --- after compaction, at random, errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_b5_compaction_and_collapse_of_a_deep_network(dtype, bound):
    """B5: at most 1e-5 (float32) and 1e-10 (float64) of change in the outputs; a layer collapses only if it saves."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 5), nn.MaxPool2d(2), sn.TriStateReLU(8, depth=False), nn.Flatten()]
    width = 8 * 12 * 12
    for i in range(5):
        act = sn.TriStateReLU(75, depth_start=float(i % 2))
        layers += [nn.Linear(width, 75), act]
        width = 75
    model = nn.Sequential(*layers, nn.Linear(width, 10)).to(dtype)
    whole, x = copy.deepcopy(model).eval(), torch.randn(16, 1, 28, 28, dtype=dtype)
    compact(model)
    report = fold_depth(model)
    assert len(report.folded) + len(report.kept) >= 2
    assert all(p.elements[1] < p.elements[0] for p in report.folded)
    assert (model.eval()(x) - whole(x)).abs().max() <= bound


@pytest.mark.parametrize("family", ["dense", "mixed", "cnn"])
@settings(max_examples=20)
@given(seed=st.integers(0, 2**31))
def test_random_networks_keep_their_function(family, seed):
    model, x = random_network(seed, family)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, sn.TriStateReLU):
                module.depth_gate.fill_(float(torch.rand(()) < 0.7))
    whole = copy.deepcopy(model)
    fold_depth(model)
    same_function(model, whole, x, 1e-10)


def test_a_graph_recorded_before_refuses():
    model = nn.Sequential(nn.Linear(2, 9), identity(*[1] * 9), nn.Linear(9, 1))
    loss = model(torch.randn(3, 2)).sum()
    fold_depth(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_cannot_be_traced_is_refused_by_name():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(CompactionError, match="module '1' must be traceable"):
        fold_depth(nn.Sequential(nn.Linear(2, 2), Branching()))
