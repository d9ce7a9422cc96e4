"""Search space and trials: exact counts, bounds, gradient flow, training, inheritance."""

import math
from dataclasses import replace

import pytest
import torch
from small_search import QUICK, SMALL, toy_data

from sparsenet.architecture.search.space import Architecture, SearchSpace, covering_order
from sparsenet.architecture.search.trials import (
    TrialConfig,
    calibrate_,
    effective_gradient_flow,
    inherit_,
    learning_rate_at,
    train_trial,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- A1: exact counts ---


@pytest.mark.parametrize("units", range(5, 100, 5))
def test_counts_of_the_poster_are_exact(units):
    architecture = Architecture(784, 10, 100, (units / 100, units / 100))
    assert architecture.active_weights == 794 * units
    assert architecture.build().active_weights() == 794 * units


def test_two_full_hidden_layers_have_89400_weights():
    assert Architecture(784, 10, 100, (1.0, 1.0, 1.0)).build().active_weights() == 89400


@pytest.mark.parametrize("block_size", [1, 4, 16, 32])
def test_counts_are_exact_in_every_block_size(block_size):
    architecture = Architecture(50, 7, 33, (0.37, 0.21, 0.9))
    model = architecture.build(block_size=block_size)
    masks = model.masks()
    assert [int(m.sum()) for m in masks] == architecture.active_per_layer == [610, 229, 208]
    assert [list(m.shape) for m in masks] == [[33, 50], [33, 33], [7, 33]]
    for mask, layer in zip(masks, model.linears, strict=True):
        dense = layer.weight_dense() if hasattr(layer, "weight_dense") else layer.weight
        assert torch.equal(dense != 0, mask)


def test_masked_weights_stay_zero_while_training():
    data = toy_data()
    models = []
    train_trial(
        Architecture(8, 2, 20, (0.3, 0.3, 0.5)), data, replace(QUICK, block_size=4, norm="none"), model_out=models
    )
    model = models[0]
    assert model.active_weights() == 48 + 120 + 20
    for mask, layer in zip(model.masks(), model.linears, strict=True):
        assert torch.all(layer.weight_dense()[~mask] == 0)


def test_a_layer_of_density_zero_is_skipped():
    architecture = Architecture(12, 3, 10, (0.5, 0.0, 0.2, 0.4), linear=(False, False, True))
    assert architecture.depth == 2
    assert [shape for shape, _, _ in architecture.layers] == [(10, 12), (10, 10), (3, 10)]
    assert [activation for _, _, activation in architecture.layers] == ["relu", "none", "none"]
    assert Architecture(12, 3, 10, (0.0, 0.5)).build()(torch.randn(4, 12)).shape == (4, 3)


def test_patterns_of_one_seed_are_nested():
    low, high = (Architecture(30, 5, 20, (d, d), pattern_seed=3).build().masks() for d in (0.2, 0.6))
    assert all(torch.all(b[a]) for a, b in zip(low, high, strict=True))
    other = Architecture(30, 5, 20, (0.2, 0.2), pattern_seed=4).build().masks()
    assert not torch.equal(low[0], other[0])


def test_live_widths_count_neurons_with_input_and_output():
    model = Architecture(4, 2, 3, (1 / 12, 1 / 6)).build()
    first, last = model.masks()
    expected = int((first.any(1) & last.any(0)).sum())
    assert model.live_widths() == [expected]
    assert Architecture(4, 2, 3, (1.0, 1.0)).build().live_widths() == [3]


def test_distance_is_the_log_ratio_of_layer_sizes():
    a, b = Architecture(10, 2, 10, (0.1, 0.5)), Architecture(10, 2, 10, (0.4, 0.5))
    assert a.distance(b) == b.distance(a) == pytest.approx(math.log(4))
    assert a.distance(Architecture(10, 2, 10, (0.1, 0.1, 0.5))) == math.inf


def test_architectures_are_scaled_to_the_limit():
    space = SearchSpace(784, 10, max_depth=3, max_width=512, max_active=60000)
    architecture = space.architecture((1.0, 0.5, 0.0, 1.0))
    assert 59990 <= architecture.active_weights <= 60000
    assert architecture.depth == 2
    wider = space.architecture((0.01, 0.0, 0.0, 0.05)).scaled_to(50000)
    assert 49990 <= wider.active_weights <= 50000
    assert Architecture(4, 2, 3, (0.5, 0.5)).scaled_to(10**6).active_weights == 18
    small = space.architecture((0.01, 0.0, 0.0, 0.05))
    assert small.densities == (0.01, 0.0, 0.0, 0.05)


# --- bad input ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_depth": 0}, "max_depth must be an integer >= 1, got 0"),
        ({"min_depth": 4}, "min_depth must be at most max_depth 3, got 4"),
        ({"min_density": 0.5, "max_density": 0.1}, "0 < min_density <= max_density <= 1, got 0.5 and 0.1"),
        ({"min_density": float("nan")}, "0 < min_density <= max_density <= 1, got nan"),
        ({"max_active": 5}, "max_active must be at least 8, the weights of the smallest network .* got 5"),
        ({"activations": ("tanh",)}, "activations must be some of relu, silu, gelu"),
    ],
)
def test_contradictory_bounds(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"densities": (0.5, 0.0)}, r"densities must lie in \[0, 1\], the output layer's above 0"),
        ({"densities": (1.5, 0.5)}, r"densities must lie in \[0, 1\]"),
        ({"densities": (0.5, 0.5), "linear": (True, False)}, "linear must have 1 entries"),
        ({"densities": (0.5, 0.5), "activation": "tanh"}, "activation must be one of relu, silu, gelu, got 'tanh'"),
    ],
)
def test_bad_architectures(arguments, message):
    with pytest.raises(ValueError, match=message):
        Architecture(8, 2, 16, **arguments)


def test_bad_norm():
    with pytest.raises(ValueError, match="norm must be none or batch, got 'layer'"):
        Architecture(8, 2, 16, (0.5, 0.5)).build(norm="layer")


# --- gradient flow (A7) ---


def test_effective_gradient_flow_by_hand():
    model = Architecture(2, 1, 2, (1.0,), activation="relu").build()  # one full layer: y = w x + b
    x = torch.tensor([[3.0, 4.0]])
    model(x).sum().backward()
    assert effective_gradient_flow(model, 2) == pytest.approx(5.0)
    assert effective_gradient_flow(model, 1) == pytest.approx(7.0)
    assert effective_gradient_flow(model, 1, "active") == pytest.approx(3.5)


def test_effective_gradient_flow_counts_masked_gradients_only():
    torch.manual_seed(0)
    model = Architecture(12, 4, 8, (0.3, 0.5), linear=(True,)).build(block_size=4).double()
    x, target = torch.randn(6, 12, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    (0.5 * (model(x) - target).square().sum()).backward()
    w1, w2 = (layer.weight_dense().detach() for layer in model.linears)
    m1, m2 = model.masks()
    h = x @ w1.t() + model.linears[0].bias.detach()
    e = h @ w2.t() + model.linears[1].bias.detach() - target
    closed = ((((e @ w2).t() @ x * m1).norm() + (e.t() @ h * m2).norm()) / 2).item()
    assert effective_gradient_flow(model) == pytest.approx(closed, rel=1e-6)


def test_effective_gradient_flow_refuses():
    model = Architecture(2, 1, 2, (1.0,)).build()
    with pytest.raises(ValueError, match="model must have gradients, got none"):
        effective_gradient_flow(model)
    with pytest.raises(ValueError, match="normalise must be None or active, got 'weights'"):
        effective_gradient_flow(model, normalise="weights")


# --- trials ---


def test_a_trial_learns_and_repeats_itself():
    data, config = toy_data(), TrialConfig(epochs=25, batch_size=32, block_size=1)
    architecture = Architecture(8, 2, 24, (0.6, 0.6))
    first, second = (train_trial(architecture, data, config) for _ in range(2))
    assert first.accuracy > 0.8
    assert first.curve == second.curve
    assert len(first.curve) == 25 and first.gradient_flow > 0


def test_networks_are_judged_with_the_statistics_of_the_training_set():
    data, models = toy_data(), []
    train_trial(Architecture(8, 2, 24, (0.6, 0.6)), data, replace(QUICK, norm="batch"), model_out=models)
    (model,) = models
    with torch.no_grad():
        x = (data.train.x - data.normalization.mean) / data.normalization.std
        seen = model.linears[0](x)
    torch.testing.assert_close(model.after[0][0].running_mean, seen.mean(0))
    torch.testing.assert_close(model.after[0][0].running_var, seen.var(0))
    constant = replace(data, train=replace(data.train, x=torch.zeros_like(data.train.x)))
    calibrate_(model, constant, torch.arange(len(data.train.y)))  # what never varied is amplified 32 times at most
    with torch.no_grad():
        rare = model.eval().after[0][0](seen) - model.after[0][0].bias
        gain = (rare / (model.after[0][0].weight * (seen - model.after[0][0].running_mean))).nanmedian()
    assert float(gain) == pytest.approx(1e-3**-0.5, rel=1e-4)
    assert model.after[0][0].momentum == 0.1


def test_train_fraction_and_constant_schedule():
    result = train_trial(
        Architecture(8, 2, 8, (0.5, 0.5)), toy_data(), replace(QUICK, train_fraction=0.2, schedule="constant")
    )
    assert 0 <= result.accuracy <= 1
    assert [learning_rate_at(QUICK, s, 100) for s in (0, 4, 99)] == pytest.approx([0.2, 1.0, 0.0], abs=1e-3)


def test_inherited_weights_are_the_donors():
    donor = Architecture(30, 5, 20, (0.2, 0.3), pattern_seed=3).build(seed=1)
    model = Architecture(30, 5, 20, (0.4, 0.3), pattern_seed=3).build(seed=2)
    assert inherit_(model, donor) == 120 + 30
    old, new = donor.linears[0].weight_dense(), model.linears[0].weight_dense()
    mask = donor.masks()[0]
    torch.testing.assert_close(new[mask], old[mask] * 0.5**0.5)  # twice the fan-in: the variance stays
    torch.testing.assert_close(model.linears[1].weight_dense(), donor.linears[1].weight_dense())


def test_inheriting_between_dense_and_sparse_and_other_shapes():
    dense = Architecture(30, 5, 20, (1.0, 1.0)).build(seed=1)
    sparse = Architecture(30, 5, 20, (0.2, 0.3)).build(seed=2)
    assert inherit_(sparse, dense) == 120 + 30
    assert torch.equal(
        sparse.linears[0].weight_dense()[sparse.masks()[0]], dense.linears[0][0].weight[sparse.masks()[0]]
    )
    assert inherit_(dense, sparse) == 150
    assert inherit_(Architecture(30, 5, 10, (0.5, 0.5)).build(), sparse) == 0


def test_evaluate_leaves_the_mode():
    model = Architecture(8, 2, 8, (0.5, 0.5)).build(norm="batch").train()
    found = toy_data().judge(model)
    assert model.training and found.loss > 0 and 0 <= found.accuracy <= 1


def test_whole_blocks_leave_no_row_or_column_of_blocks_empty():
    order = covering_order(3, 5, torch.Generator().manual_seed(0))
    assert sorted(order.tolist()) == list(range(15))
    assert set((order[:5] // 5).tolist()) == {0, 1, 2} and set((order[:5] % 5).tolist()) == set(range(5))
    model = Architecture(64, 10, 64, (0.2, 0.1, 0.2)).build(block_size=8)
    assert [(layer.block_size, layer.pattern.num_blocks) for layer in model.linears] == [(8, 13), (1, 410), (1, 128)]
    assert model.masks()[0].any(1).all() and model.active_weights() == 819 + 410 + 128
