"""Pruning at initialization: how much is left and where, and what is refused before anything has changed."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import sparsenet as sn
from sparsenet.training import initial

pytestmark = pytest.mark.usefixtures("one_thread")


def dense_mlp(block_size=4, seed=0, sizes=(64, 128, 64, 10)):
    torch.manual_seed(seed)
    return sn.SparseMLP(sizes, density=1.0, block_size=block_size)


def batches(rows=64, features=64):
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(rows, features, generator=generator), torch.randint(10, (rows,), generator=generator))
        for _ in range(2)
    ]


CRITERIA = {
    "snip": lambda: sn.SNIP(batches(), cross_entropy),
    "grasp": lambda: sn.GraSP(batches(), cross_entropy),
    "synflow": lambda: sn.SynFlow(),
    "magnitude": lambda: sn.GMP(),
    "fisher": lambda: sn.Fisher(0.3, batches(), cross_entropy),
    "combined": lambda: sn.Policy(drop=sn.SNIP(batches(), cross_entropy), grow=sn.RigL()),
}


def blocks(model):
    return [layer.pattern.num_blocks for layer in model]


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("distribution", ["global", "uniform", None])
def test_the_density_is_met(name, distribution):
    model = dense_mlp()
    update = sn.prune_at_initialization(model, CRITERIA[name](), 0.1, distribution=distribution)
    places = sum(layer.pattern.block_rows * layer.pattern.block_cols for layer in model)
    assert abs(sum(blocks(model)) - 0.1 * places) <= (1 if distribution == "global" else 2)
    assert update.dropped == places - sum(blocks(model)) and update.grown == 0
    assert update.step == (100 if name == "synflow" else 1)
    for (layer_name, of_layer), layer in zip(update.layers.items(), model, strict=True):
        assert layer_name in ("0", "1", "2") and of_layer.num_blocks == layer.pattern.num_blocks
        left = set(of_layer.dropped_places.tolist())
        assert left.isdisjoint(layer.pattern.linear_places().tolist())
        assert len(left) + layer.pattern.num_blocks == layer.pattern.block_rows * layer.pattern.block_cols


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.filterwarnings("ignore:Sparsifier. from step")
def test_no_layer_empties_at_two_percent(name):
    model = dense_mlp(sizes=(64, 64, 64, 64, 10))
    sn.prune_at_initialization(model, CRITERIA[name](), 0.02)
    assert min(blocks(model)) > 0


def test_every_row_and_column_of_blocks_keeps_one_where_there_are_enough():
    model = dense_mlp()
    sn.prune_at_initialization(model, sn.SynFlow(), 0.1)
    assert [layer.pattern.unreached() for layer in model] == [(0, 0)] * 3


def test_values_that_stay_and_the_model_are_untouched():
    model = dense_mlp()
    before = [layer.weight_dense().detach().clone() for layer in model]
    sn.prune_at_initialization(model, sn.SynFlow(), 0.2, rounds=5)
    for layer, was in zip(model, before, strict=True):
        now = layer.weight_dense()
        assert torch.equal(now, torch.where(now != 0, was, 0))
        assert layer.topology.observer is None
    assert not model._forward_pre_hooks


def test_rounds_measure_anew():
    one, many = dense_mlp(), dense_mlp()
    sn.prune_at_initialization(one, sn.SynFlow(), 0.1, rounds=1)
    sn.prune_at_initialization(many, sn.SynFlow(), 0.1, rounds=20)
    assert sum(blocks(one)) == sum(blocks(many)) and one[1].pattern != many[1].pattern


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_not_recorded_outside_is_recorded_inside(name, mode):
    one, other = dense_mlp(), dense_mlp()
    sn.prune_at_initialization(one, CRITERIA[name](), 0.3, rounds=1)
    given = CRITERIA[name]()
    with mode():
        sn.prune_at_initialization(other, given, 0.3, rounds=1)
    assert all(a.pattern == b.pattern for a, b in zip(one, other, strict=True))


def test_an_optimizer_follows():
    model = dense_mlp()
    optimizer = torch.optim.AdamW(model.parameters())
    x, target = batches()[0]
    cross_entropy(model(x), target).backward()
    optimizer.step()
    moments = [optimizer.state[layer.values]["exp_avg"].clone() for layer in model]
    update = sn.prune_at_initialization(model, sn.SNIP(), 0.25, optimizer=optimizer)
    for layer, was, of_layer in zip(model, moments, update.layers.values(), strict=True):
        stays = torch.ones(len(was), dtype=torch.bool)
        stays[of_layer.dropped_places] = False  # a whole layer: numbers of blocks are places
        assert torch.equal(optimizer.state[layer.values]["exp_avg"], was[stays])


def test_a_sparsified_model_and_a_frozen_layer():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )
    sn.sparsify_(model, density=1.0, block_size=8)
    model[5].requires_grad_(False)
    update = sn.prune_at_initialization(model, sn.SynFlow(), 0.25)
    assert list(update.layers) == ["0", "3"] and update.dropped == 96
    assert model[5].density == 1.0


def test_networks_that_do_not_serve():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    swap = r"got none; swap its nn.Linear layers first: sparsenet.sparsify_\(model, density=1.0, block_size=16\)"
    with pytest.raises(ValueError, match=f"prune_at_initialization: model must hold SparseLinear layers, {swap}"):
        initial.prune_at_initialization(model, sn.SynFlow(), 0.1)
    with pytest.raises(ValueError, match="must hold SparseLinear layers, got none$"):
        sn.prune_at_initialization(nn.ReLU(), sn.SynFlow(), 0.1)
    with pytest.raises(ValueError, match="must hold trainable sparse layers, got frozen ones"):
        sn.prune_at_initialization(dense_mlp().requires_grad_(False), sn.SynFlow(), 0.1)
    sparse = sn.SparseMLP([64, 64, 64], density=0.25, block_size=8)
    with pytest.raises(
        ValueError, match="density must lie above 0 and below the 0.25 that the model has, got 0.5; pru"
    ):
        sn.prune_at_initialization(sparse, sn.SynFlow(), 0.5)


def test_arguments_that_do_not_serve():
    model = dense_mlp()
    before = blocks(model)
    for error, changes, message in (
        (ValueError, {"density": 0.0}, "density must lie above 0 and below the 1 that the model has, got 0.0"),
        (ValueError, {"density": 1.0}, "density must lie above 0 and below the 1 that the model has, got 1.0$"),
        (ValueError, {"density": 1.5}, r"density must .*\[0, 1\], got 1.5"),
        (ValueError, {"rounds": 0}, "rounds must be"),
        (TypeError, {"policy": sn.SNIP}, "policy must be a sparsenet Policy, got <class"),
        (ValueError, {"policy": sn.SNIP()}, "policy must score .* got no scores of '0': its values have no gradient"),
        (ValueError, {"policy": sn.GraSP()}, ".* got no scores of '0': nothing was measured before this step"),
        (ValueError, {"policy": sn.OBD()}, "policy must score the layers as they are, got no scores of '0'"),
        (ValueError, {"policy": sn.SNIP(), "rounds": 2}, "rounds must be 1 for SNIP without batches, .* got 2"),
    ):
        call = {"policy": sn.SynFlow(), "density": 0.1} | changes
        with pytest.raises(error, match=f"prune_at_initialization: {message}"):
            sn.prune_at_initialization(model, **call)
        assert blocks(model) == before and all(layer.topology.observer is None for layer in model)


def test_scores_that_fail_later_say_how_far_it_came():
    class Twice(sn.GMP):
        def drop_scores(self, layer):
            return super().drop_scores(layer) * (float("nan") if layer.step > 2 else 1.0)

    model = dense_mlp()
    with pytest.raises(RuntimeError, match="got no scores of '0' in round 3 of 4, density 0.3162 being left: .* NaN"):
        sn.prune_at_initialization(model, Twice(), 0.1, rounds=4)
    assert sum(layer.topology.observer is not None for layer in model) == 0


def test_a_layer_without_scores_keeps_its_blocks_and_is_named():
    class Blind(sn.GMP):
        def drop_scores(self, layer):
            return super().drop_scores(layer) * (float("nan") if layer.name == "1" else 1.0)

    model = dense_mlp()
    with pytest.warns(UserWarning, match=r"density 0.\d+ is left: layers kept blocks: '1' \(its drop scores hold NaN"):
        update = sn.prune_at_initialization(model, Blind(), 0.2, distribution="uniform")
    assert model[1].density == 1.0 and "NaN" in update.layers["1"].skipped
