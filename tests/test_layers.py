"""SparseLinear: how it starts, how its pattern changes, how it is copied, saved and loaded, and swapping nn.Linear."""

from __future__ import annotations

import copy
import gc
import io
import itertools
import pickle
import sys
import threading
import time

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import sparsenet as sn
from sparsenet import BlockPattern, SparseLinear, densify_, sparsify_
from sparsenet.functional import StaleTopologyError
from sparsenet.functional.blocks import dense_blocks, take_blocks
from sparsenet.topology import replace_data

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
}


class NoisyDescent(torch.optim.Optimizer):
    """An optimizer nobody knows, which adds noise to every element."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(0.1 * p.grad + torch.randn_like(p))


def random_pattern(layer, density=0.5):
    return BlockPattern.random(layer.pattern.shape, density, layer.block_size)


def outside(layer):
    """bool [num_blocks, b, b]: elements of edge blocks outside the matrix."""
    return dense_blocks(torch.ones(layer.pattern.shape), layer.pattern) == 0


def by_hand(layer):
    """The weight [out, in] put together block by block, with a loop and nothing of the library."""
    (out, inputs), b = layer.pattern.shape, layer.block_size
    whole = torch.zeros(out + b, inputs + b, dtype=layer.values.dtype)
    row_of = [row for row, n in enumerate(layer.pattern.crow_indices.diff().tolist()) for _ in range(n)]
    for row, col, block in zip(row_of, layer.pattern.col_indices.tolist(), layer.values.detach(), strict=True):
        whole[row * b : (row + 1) * b, col * b : (col + 1) * b] = block
    return whole[:out, :inputs]


def by_hand_masked(layer, mask):
    """The same, elements where ``mask`` [num_blocks, b, b] is False being zero."""
    twin = SparseLinear(layer.in_features, layer.out_features, pattern=layer.pattern)
    with torch.no_grad():
        twin.values.copy_(torch.where(mask, layer.values, torch.zeros(())))
    return by_hand(twin)


def train(layer, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(20, layer.in_features, dtype=layer.values.dtype)).square().mean().backward()
        optimizer.step()


# --- construction ---------------------------------------------------------------------------------------------------


def test_defaults():
    layer = SparseLinear(1000, 300)
    assert (layer.block_size, layer.pattern.shape) == (32, (300, 1000))
    assert layer.density == pytest.approx(0.1, abs=1 / 320) and layer.values.shape == (layer.pattern.num_blocks, 32, 32)
    assert layer.bias.shape == (300,) and layer.element_mask is None and layer.values.dtype == torch.float32
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"] and not list(layer.buffers())
    assert SparseLinear(10, 20, bias=False).bias is None
    assert "1000, 300, density=0.1" in repr(layer)
    assert "bias=False" in repr(SparseLinear(4, 4, False, activation="gelu")) and "gelu" in repr(
        SparseLinear(4, 4, activation="gelu")
    )


def test_pattern_wins_and_contradictions_raise():
    pattern = BlockPattern.random((30, 50), 0.5, 8)
    layer = SparseLinear(50, 30, pattern=pattern)
    assert layer.pattern == pattern and layer.pattern is not pattern and layer.block_size == 8
    SparseLinear(50, 30, pattern=pattern, density=pattern.density, block_size=8)
    for change, message in (
        ({"density": 0.1}, "density must be the pattern's 0.5"),
        ({"block_size": 16}, "block_size must be the pattern's 8, got 16"),
        ({"in_features": 51}, r"pattern must have shape \(30, 51\) \(out, in\), got \(30, 50\)"),
        ({"in_features": 30, "out_features": 50}, r"pattern must have shape \(50, 30\)"),
        ({"element_mask": torch.ones(3, 8, 8, dtype=torch.bool)}, "element_mask must be bool"),
        ({"element_mask": torch.ones(pattern.num_blocks, 8, 8)}, "element_mask must be bool"),
        ({"activation": "tanh"}, "activation must be one of none, relu, gelu, silu, got 'tanh'"),
    ):
        with pytest.raises(ValueError, match="SparseLinear: " + message):
            SparseLinear(**{"in_features": 50, "out_features": 30, "pattern": pattern, **change})
    for sizes in ((-1, 4), (4, -1), (4.5, 4), (2**31, 4)):
        with pytest.raises(ValueError, match="BlockPattern: shape must"):
            SparseLinear(*sizes)


@pytest.mark.parametrize("density", [0.0, 1.0])
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0), (1, 1), (784, 10), (33, 70)])
def test_sizes_and_densities_at_the_edge(sizes, density):
    layer = SparseLinear(*sizes, density=density)
    x = torch.randn(4, sizes[0], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (4, sizes[1]) and layer.values.grad.shape == layer.values.shape
    weight = by_hand(layer)
    assert weight.count_nonzero() == density * sizes[0] * sizes[1]
    torch.testing.assert_close(y.detach(), x.detach() @ weight.T + layer.bias.detach())
    torch.testing.assert_close(x.grad, weight.sum(0).expand(4, -1))
    torch.testing.assert_close(layer.bias.grad, torch.full((sizes[1],), 4.0))


@pytest.mark.parametrize("activation", ["none", "relu"])
def test_initial_variance_follows_the_active_fan_in(activation):
    """He et al.: Var(w) = 2 / fan_in before relu, nn.Linear's 1 / (3 fan_in) else, fan_in counted row by row."""
    mask = torch.zeros(4, 40, dtype=torch.bool)
    fans = (40, 10, 2, 0)  # blocks in each block row
    for row, fan in enumerate(fans):
        mask[row, :fan] = True
    pattern = BlockPattern.from_mask(mask, 32, (4 * 32, 40 * 32 - 16))
    layer = SparseLinear(40 * 32 - 16, 128, pattern=pattern, activation=activation)
    inputs = [40 * 32 - 16, 320, 64, 0]
    assert layer.active_fan_in().view(4, 32).tolist() == [[n] * 32 for n in inputs]
    for row, fan in enumerate(inputs):
        mine = layer.values[layer.pattern.row_indices == row].detach()
        if fan == 0:
            assert mine.numel() == 0 and not layer.bias[row * 32 : (row + 1) * 32].any()
            continue
        expected = (2 if activation == "relu" else 1 / 3) / fan
        inside = mine[~outside(layer)[layer.pattern.row_indices == row]]
        assert inside.var().item() == pytest.approx(expected, rel=0.1)
        assert inside.abs().max() <= (3 * expected) ** 0.5 * 1.0001
    before = layer.values.detach().clone()
    layer.reset_parameters()  # draws anew, by the same rule
    assert not torch.equal(layer.values, before) and not layer.values[outside(layer)].any()
    first = layer.values[layer.pattern.row_indices == 0][~outside(layer)[layer.pattern.row_indices == 0]]
    assert first.var().item() == pytest.approx((2 if activation == "relu" else 1 / 3) / inputs[0], rel=0.1)


def test_initial_variance_counts_masked_elements_out():
    mask = torch.rand(4, 32, 32) < 0.25
    layer = SparseLinear(64, 64, density=1.0, block_size=32, element_mask=mask)
    assert layer.values[mask].var().item() == pytest.approx(1 / (3 * 64 * 0.25), rel=0.15)


def test_activations_keep_their_scale_through_depth():
    """With fan-in counted over the dense matrix the signal would vanish: 0.1 ** 6."""
    layers = nn.Sequential(*[SparseLinear(1024, 1024, density=0.1, activation="relu") for _ in range(6)])
    rms = layers(torch.randn(64, 1024)).square().mean().sqrt().item()
    assert 0.3 < rms < 3


def test_generator_decides_everything():
    def build(seed):
        return SparseLinear(100, 80, density=0.3, block_size=8, generator=torch.Generator().manual_seed(seed))

    a, b, c = build(1), build(1), build(2)
    assert a.pattern == b.pattern != c.pattern
    assert torch.equal(a.values, b.values) and torch.equal(a.bias, b.bias)


def test_num_active_of_many():
    """More weights than float32 can count, 5001 * 5001."""
    assert SparseLinear(5001, 5001, density=1.0, block_size=128, device="meta").num_active == 5001 * 5001


def test_outside_the_matrix_starts_zero():
    layer = SparseLinear(33, 47, density=1.0, block_size=16)
    assert outside(layer).any() and not layer.values[outside(layer)].any()
    assert layer.num_active == 33 * 47


def test_same_as_dense():
    for activation, function in (("none", lambda z: z), ("gelu", nn.functional.gelu), ("silu", nn.functional.silu)):
        layer = SparseLinear(33, 47, density=0.5, block_size=16, activation=activation)
        x = torch.randn(5, 33)
        torch.testing.assert_close(layer(x), function(nn.functional.linear(x, by_hand(layer), layer.bias)))
        torch.testing.assert_close(layer.weight_dense(), by_hand(layer))
        torch.testing.assert_close(layer(x), function(layer.to_linear()(x)))


def test_blocks_by_hand():
    """The helpers that other tests expect results with: a 3 x 5 matrix in blocks of 4 at places (0, 0) and (0, 1)."""
    pattern = BlockPattern([0, 2], [0, 1], shape=(3, 5), block_size=4)
    weight = torch.arange(1.0, 16.0).reshape(3, 5)
    first = [[1, 2, 3, 4], [6, 7, 8, 9], [11, 12, 13, 14], [0, 0, 0, 0]]
    second = [[5, 0, 0, 0], [10, 0, 0, 0], [15, 0, 0, 0], [0, 0, 0, 0]]
    blocks = torch.tensor([first, second], dtype=torch.float32)
    assert torch.equal(dense_blocks(weight, pattern), blocks)
    assert torch.equal(take_blocks(blocks, torch.tensor([1, -1, 0]), 7.0)[[0, 2]], blocks[[1, 0]])
    assert take_blocks(blocks, torch.tensor([1, -1, 0]), 7.0)[1].eq(7).all()
    layer = SparseLinear(5, 3, pattern=pattern)
    layer.set_pattern(pattern, values=blocks)
    assert torch.equal(by_hand(layer), weight) and torch.equal(layer.weight_dense(), weight)
    assert torch.equal(layer.to_linear().weight, weight) and layer.num_active == 15


def test_a_layers_call_takes_the_pattern_and_the_mask_of_its_topology():
    layer = SparseLinear(33, 47, density=0.5, block_size=16)
    x = torch.randn(5, 33)
    for mask in (None, torch.rand(layer.values.shape) < 0.5):
        if mask is not None:
            layer.set_pattern(layer.pattern, values=layer.values.detach(), element_mask=mask)
            with torch.no_grad():
                layer.values.add_(1.0)  # the mask holds between steps, too
        weight = by_hand(layer) if mask is None else by_hand_masked(layer, mask)
        y = sn.functional.layer_linear(x, layer.values, layer.topology, layer.bias, "relu")
        torch.testing.assert_close(y, (x @ weight.T + layer.bias).relu())
        grad = torch.autograd.grad(y.sum(), layer.bias)[0]
        assert grad.tolist() == (y > 0).sum(0).tolist()


def test_weight_dense_is_differentiable():
    layer = SparseLinear(10, 7, density=0.5, block_size=4)
    layer.weight_dense().square().sum().backward()
    torch.testing.assert_close(layer.values.grad, 2 * layer.values.detach() * ~outside(layer))


# --- set_pattern ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("densities", [(0.5, 0.5), (0.2, 0.9), (0.9, 0.2), (0.0, 0.5), (0.5, 0.0), (0.5, 1.0)])
def test_set_pattern_carries_survivors_bit_for_bit(densities):
    layer = SparseLinear(100, 80, density=densities[0], block_size=8)
    parameter, before, old = layer.values, layer.values.detach().clone(), layer.pattern
    layer.values.grad = torch.ones_like(layer.values)
    new = random_pattern(layer, densities[1])
    carried = layer.set_pattern(new)
    assert layer.values is parameter and layer.values.grad is None and layer.values.requires_grad
    assert layer.pattern == new and layer.values.shape == (new.num_blocks, 8, 8) and layer.density == new.density
    assert torch.equal(layer.values.detach(), take_blocks(before, carried, 0.0))
    places = dict(zip(old.linear_places().tolist(), before, strict=True))
    for place, block in zip(new.linear_places().tolist(), layer.values.detach(), strict=True):
        assert torch.equal(block, places.get(place, torch.zeros(8, 8)))


def test_set_pattern_refuses_and_leaves_all_as_it_was():
    layer = SparseLinear(100, 80, density=0.5, block_size=8)
    layer.values.grad = torch.ones_like(layer.values)
    before, old, grad = layer.values.detach().clone(), layer.pattern, layer.values.grad
    n = random_pattern(layer).num_blocks
    for arguments in (
        (BlockPattern.random((80, 101), 0.5, 8),),
        (BlockPattern.random((80, 100), 0.5, 16),),
        (random_pattern(layer), torch.zeros(n + 1, 8, 8)),
        (random_pattern(layer), torch.zeros(n, 8)),
        (random_pattern(layer), None, torch.ones(n, 8, 8)),
        (random_pattern(layer), None, torch.ones(n + 1, 8, 8, dtype=torch.bool)),
    ):
        y = layer(torch.randn(3, 100))
        with pytest.raises(ValueError, match="must"):
            layer.set_pattern(*arguments)
        assert layer.pattern is old and torch.equal(layer.values, before) and layer.values.grad is grad
        assert layer.element_mask is None
        y.sum().backward()  # the graph from before the refused change is still good


def test_set_pattern_takes_a_copy_of_given_values():
    layer = SparseLinear(40, 40, density=0.5, block_size=16)
    new = BlockPattern.random((40, 40), 1.0, 16)
    given = torch.ones(9, 16, 16)
    layer.set_pattern(new, values=given)
    given.zero_()
    assert layer.values[0].eq(1).all()
    assert not layer.values[outside(layer)].any(), "the part outside the matrix must be zero"
    strided = torch.randn(16, 16, 9).permute(2, 0, 1)
    layer.set_pattern(new, values=strided)
    x = torch.randn(4, 40)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight_dense(), layer.bias))
    layer.set_pattern(new, values=given.double() + 1)
    assert layer.values.dtype == torch.float32


def test_number_of_blocks_may_change_while_an_old_loss_is_alive():
    """Autograd's accumulator remembers sizes: assigning .data alone would make the next backward fail."""
    layer = SparseLinear(100, 80, density=0.3, block_size=8)
    x = torch.randn(5, 100)
    old_losses = [layer(x).sum() for _ in range(3)]
    old_losses[0].backward(retain_graph=True)
    for density in (0.6, 0.1, 0.1, 1.0, 0.0, 0.3):
        layer.set_pattern(random_pattern(layer, density))
        loss = layer(x).sum()
        loss.backward()
        assert layer.values.grad.shape == layer.values.shape
        dense = nn.Linear(100, 80)
        dense.weight.data, dense.bias.data = layer.weight_dense().detach(), layer.bias.detach()
        dense(x).sum().backward()
        torch.testing.assert_close(layer.values.grad, dense_blocks(dense.weight.grad, layer.pattern))
        old_losses.append(loss)
        for old in old_losses:
            if old is not loss:
                with pytest.raises((StaleTopologyError, RuntimeError), match="rewired since this forward"):
                    old.backward(retain_graph=True)


def test_hooks_and_accumulation_survive_a_change_of_size():
    layer = SparseLinear(64, 64, density=0.5, block_size=8)
    seen = []
    layer.values.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    layer.values.register_post_accumulate_grad_hook(lambda p: seen.append(("accumulated", len(p.grad))))
    for density in (0.5, 0.25):
        layer.set_pattern(random_pattern(layer, density))
        for _ in range(2):
            layer(torch.randn(3, 64)).sum().backward()
        n = layer.pattern.num_blocks
        assert seen == [(n, 8, 8), ("accumulated", n)] * 2
        seen.clear()


def test_one_pattern_in_two_layers():
    """Layers own their indices: a rewire of one leaves the other's graphs alone."""
    pattern = BlockPattern.random((64, 64), 0.5, 8)
    a, b = SparseLinear(64, 64, pattern=pattern), SparseLinear(64, 64, pattern=pattern)
    x = torch.randn(3, 64)
    y = b(x)
    a.set_pattern(random_pattern(a))
    y.sum().backward()
    a.set_pattern(b.pattern)
    y = a(x)
    b.set_pattern(random_pattern(b))
    y.sum().backward()
    c = SparseLinear(64, 64, pattern=pattern)  # and the pattern itself was never taken over
    c.set_pattern(random_pattern(c))
    sn.functional.block_sparse_linear(x, torch.zeros(pattern.num_blocks, 8, 8), pattern)


def test_the_label_follows_a_rewire():
    model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
    for _ in range(2):
        y = model(torch.randn(3, 64))
        model[1].set_pattern(random_pattern(model[1]))
        with pytest.raises(StaleTopologyError, match=r"block_sparse_linear \(1\): the layer was rewired"):
            y.sum().backward()


def test_replace_data_works_for_every_dtype():
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        parameter = nn.Parameter(torch.ones(4, 2, dtype=dtype))
        old = (parameter * 2).sum()
        replace_data(parameter, torch.ones(6, 2, dtype=dtype))
        (parameter * 2).sum().backward()
        assert parameter.grad.shape == (6, 2) and parameter.dtype == dtype
        del old


# --- what stays zero ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_outside_the_matrix_stays_zero(name):
    layer = SparseLinear(33, 47, density=0.7, block_size=16)
    optimizer = OPTIMIZERS[name](layer.parameters())
    train(layer, optimizer)
    assert outside(layer).any() and not layer.values[outside(layer)].any()
    assert not layer.values.grad[outside(layer)].any()
    layer.set_pattern(random_pattern(layer, 0.7))
    train(layer, OPTIMIZERS[name](layer.parameters()))
    assert not layer.values[outside(layer)].any()


@pytest.mark.parametrize("name", [*OPTIMIZERS, "noisy"])
@pytest.mark.parametrize("block_size", [4, 32])
def test_masked_elements_are_zero_after_every_step(name, block_size):
    layer = SparseLinear(70, 47, density=0.7, block_size=block_size, element_mask=None)
    mask = torch.rand(layer.values.shape) < 0.5
    layer = SparseLinear(70, 47, pattern=layer.pattern, element_mask=mask)
    mask &= ~outside(layer)
    assert torch.equal(layer.element_mask, mask) and not layer.values[~mask].any() and layer.values[mask].all()
    assert layer.num_active == int(mask.sum())
    optimizer = NoisyDescent(layer.parameters()) if name == "noisy" else OPTIMIZERS[name](layer.parameters())
    before = layer.values.detach().clone()
    for _ in range(4):
        train(layer, optimizer, 1)
        assert not layer.values[~mask].any(), "masked elements must be exactly zero"
        assert not layer.values.grad[~mask].any()
    assert (layer.values != before)[mask].float().mean() > 0.9


def test_masks_of_n_to_m_compute_as_dense():
    pattern = BlockPattern.random((32, 64), 0.5, 16)
    mask = torch.zeros(pattern.num_blocks, 16, 4, 4, dtype=torch.bool)
    mask[..., :2] = True  # 2:4
    layer = SparseLinear(64, 32, pattern=pattern, element_mask=mask.flatten(2))
    with torch.no_grad():
        layer.values.add_(1.0)  # even between steps the mask holds in forward and backward
    x = torch.randn(5, 64)
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight_dense(), layer.bias))
    y.sum().backward()
    assert not layer.values.grad[~layer.element_mask].any()
    assert (layer.weight_dense() != 0).float().mean() <= 0.25


def test_masks_follow_a_rewire():
    layer = SparseLinear(64, 64, density=0.5, block_size=16)
    layer = SparseLinear(64, 64, pattern=layer.pattern, element_mask=torch.rand(8, 16, 16) < 0.5)
    old = layer.element_mask.clone()
    carried = layer.set_pattern(random_pattern(layer, 0.75))
    assert torch.equal(layer.element_mask, take_blocks(old, carried, True))  # grown blocks are whole
    layer.set_pattern(random_pattern(layer, 0.5), element_mask=torch.zeros(8, 16, 16, dtype=torch.bool))
    assert not layer.values.any() and layer.num_active == 0
    train(layer, NoisyDescent(layer.parameters()))
    assert not layer.values.any()


def test_masks_hold_in_copies():
    source = SparseLinear(64, 64, density=0.5, block_size=16, element_mask=torch.rand(8, 16, 16) < 0.5)
    loaded = SparseLinear(64, 64, density=0.25, block_size=16)
    loaded.load_state_dict(source.state_dict())
    for twin in (copy.deepcopy(source), pickle.loads(pickle.dumps(source)), copy.deepcopy(loaded), loaded):
        assert torch.equal(twin.element_mask, source.element_mask) and torch.equal(twin.values, source.values)
        train(twin, NoisyDescent(twin.parameters()))
        assert not twin.values[~twin.element_mask].any() and twin.values.any()
    assert not torch.equal(loaded.values, source.values)


def test_masked_layers_leave_nothing_behind():
    """Neither layers nor optimizer hooks pile up."""
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    from sparsenet.after_step import _mends

    mask = torch.ones(2, 32, 32, dtype=torch.bool)
    SparseLinear(64, 64, density=0.5, block_size=32, element_mask=mask)
    before = len(hooks)
    for _ in range(20):
        SparseLinear(64, 64, density=0.5, block_size=32, element_mask=mask)
    gc.collect()
    assert len(hooks) == before
    assert not [module for module in _mends if isinstance(module, SparseLinear)]


# --- state_dict -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("masked", [False, True])
def test_state_dict_round_trip_into_another_pattern(density, masked):
    mask = torch.rand(25, 16, 16) < 0.5 if masked else None
    source = SparseLinear(70, 80, density=1.0, block_size=16, element_mask=mask)
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state) == {"values", "bias", "crow_indices", "col_indices"} | ({"element_mask"} if masked else set())
    target = SparseLinear(70, 80, density=density, block_size=16)
    parameter, x = target.values, torch.randn(5, 70)
    old = target(x)
    assert target.load_state_dict(state) == ([], [])
    assert target.values is parameter and target.pattern == source.pattern
    assert torch.equal(target.values, source.values) and torch.equal(target(x), source(x))
    with pytest.raises(StaleTopologyError):
        old.sum().backward()
    target(x).sum().backward()
    state["values"].zero_()
    assert target.values.any(), "loading must copy"


def test_state_dict_of_nested_models_and_other_dtypes():
    def build():
        return nn.ModuleDict(
            {
                "a": nn.Sequential(nn.LayerNorm(70), SparseLinear(70, 40, density=0.3, block_size=8)),
                "b": nn.Linear(3, 3),
            }
        )

    source, target = build(), build().double()
    target.load_state_dict(source.state_dict())
    assert target["a"][1].values.dtype == torch.float64 and target["a"][1].pattern == source["a"][1].pattern
    torch.testing.assert_close(target["a"][1].values.float(), source["a"][1].values)
    assert set(source.state_dict()) == set(target.state_dict())
    assert {"a.1.crow_indices", "a.1.col_indices", "a.1.values", "a.1.bias"} <= set(source.state_dict())


def test_loading_reports_keys_as_torch_does():
    layer = SparseLinear(70, 80, density=0.3, block_size=16)
    state = layer.state_dict()
    for key in ("values", "bias", "crow_indices", "col_indices"):
        partial = {k: v for k, v in state.items() if k != key}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
            layer.load_state_dict(partial)
        assert layer.load_state_dict(partial, strict=False).missing_keys in ([key], [])
    with pytest.raises(RuntimeError, match='Unexpected key.*"extra"'):
        layer.load_state_dict({**state, "extra": torch.ones(1)})
    layer.load_state_dict({**state, "extra": torch.ones(1)}, strict=False)
    without_bias = SparseLinear(70, 80, False, density=0.3, block_size=16)
    with pytest.raises(RuntimeError, match='Unexpected key.*"bias"'):
        without_bias.load_state_dict(state)


BAD_STATES = [
    ("column out of range", lambda s: s["col_indices"].__setitem__(0, 99), r"col_indices must lie in \[0, 5\), got 99"),
    ("negative", lambda s: s["col_indices"].__setitem__(0, -1), "col_indices must lie"),
    ("int64 overflow", lambda s: s.update(col_indices=s["col_indices"].long() + 2**32), "must fit in int32"),
    ("float indices", lambda s: s.update(col_indices=s["col_indices"].float()), "must be integers"),
    ("pointer", lambda s: s["crow_indices"].__setitem__(1, 10**6), "crow_indices must"),
    ("count", lambda s: s.update(values=s["values"][1:]), "one block per index, got"),
    ("block size", lambda s: s.update(values=s["values"][:, :8]), r"values must have shape \[num_blocks, 16, 16\]"),
    ("rank", lambda s: s.update(values=s["values"].flatten()), "values must have shape"),
    ("integer values", lambda s: s.update(values=s["values"].int()), "values must be floating-point"),
    ("bias size", lambda s: s.update(bias=torch.ones(3)), r"bias must have shape \[80\], got \[3\]"),
    ("mask", lambda s: s.update(element_mask=torch.ones(2, 16, 16)), "element_mask must be bool"),
]


@pytest.mark.parametrize(("what", "spoil", "message"), BAD_STATES, ids=[w for w, *_ in BAD_STATES])
def test_hostile_states_are_refused_and_nothing_changes(what, spoil, message):
    """Also when the layers before the spoiled one would have been fine."""

    def build():
        return sn.SparseMLP([70, 70, 80], density=0.4, block_size=16)

    swapped = sparsify_(nn.Sequential(nn.Linear(70, 70), nn.Linear(70, 80)), 0.4, 16).model
    for model in (build(), swapped):
        before = {k: v.clone() for k, v in model.state_dict().items()}
        state = build().state_dict()
        last = {k.removeprefix("1."): v for k, v in state.items() if k.startswith("1.")}
        spoil(last)
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict({**state, **{"1." + k: v for k, v in last.items()}})
        if what != "bias size":
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        layer = SparseLinear(70, 80, density=0.4, block_size=16)
        kept = layer.values.detach().clone()
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(last)
        assert what == "bias size" or torch.equal(layer.values, kept)


def test_loaded_values_are_zero_outside_the_matrix():
    source, target = (SparseLinear(33, 47, density=1.0, block_size=16) for _ in range(2))
    state = source.state_dict()
    state["values"] = torch.ones_like(state["values"])
    target.load_state_dict(state)
    assert not target.values[outside(target)].any() and target.values[~outside(target)].all()


# --- copies and conversions -----------------------------------------------------------------------------------------


def test_copies_are_independent():
    layer = SparseLinear(70, 80, density=0.3, block_size=16, activation="gelu")
    x = torch.randn(5, 70)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)):
        assert twin.pattern == layer.pattern and torch.equal(twin(x), layer(x))
        y = layer(x)
        twin.set_pattern(random_pattern(twin))
        with torch.no_grad():
            twin.values.fill_(7.0)
        y.sum().backward()
        layer.zero_grad()
        assert not layer.values.eq(7.0).any()


@pytest.mark.parametrize("convert", ["double", "half", "bfloat16", "float", torch.float64])
def test_conversion(convert):
    layer = SparseLinear(70, 80, density=0.3, block_size=16)
    parameter, x = layer.values, torch.randn(5, 70)
    expected = layer(x)
    converted = layer.to(convert) if isinstance(convert, torch.dtype) else getattr(layer, convert)()
    assert converted is layer and layer.values is parameter
    dtype = layer.values.dtype
    y = layer(x.to(dtype))
    assert y.dtype == dtype == layer.bias.dtype
    torch.testing.assert_close(y.float(), expected, rtol=0.02, atol=0.02)
    y.sum().backward()
    assert layer.values.grad.dtype == dtype
    layer.set_pattern(random_pattern(layer))
    assert layer.values.dtype == dtype
    layer(x.to(dtype)).sum().backward()


def test_meta_device():
    """No data touched (ROBUSTNESS 32): shapes only, and to_empty brings it to life."""
    for layer in (SparseLinear(70, 80, density=0.3, device="meta"), SparseLinear(70, 80, density=0.3).to("meta")):
        y = layer(torch.empty(5, 70, device="meta"))
        assert y.is_meta and y.shape == (5, 80) and layer.values.is_meta and layer.bias.is_meta
        y.sum().backward()
        assert layer.values.grad.is_meta and layer.values.grad.shape == layer.values.shape
        with pytest.raises(ValueError, match="device of x, cpu, got meta"):
            layer(torch.ones(5, 70))
        layer = layer.to_empty(device="cpu")
        layer.reset_parameters()
        x = torch.randn(5, 70)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight_dense(), layer.bias))
    with torch.device("meta"):
        assert SparseLinear(70, 80).values.is_meta


def test_autocast():
    layer = SparseLinear(70, 80, density=0.3, block_size=16)
    x = torch.randn(5, 70, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, dense = layer(x), layer.to_linear()(x)
        assert y.dtype == dense.dtype == torch.bfloat16
        assert layer.double()(x.double()).dtype == torch.float64
    layer.float()
    torch.testing.assert_close(y.float(), nn.functional.linear(x, by_hand(layer), layer.bias), rtol=0.02, atol=0.03)
    y.float().sum().backward()
    assert layer.values.grad.dtype == x.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        assert layer(x).dtype == torch.float32


def test_pruned_by_torch():
    """torch.nn.utils.prune puts a plain attribute in a parameter's place."""
    layer = SparseLinear(16, 8, density=0.5, block_size=4)
    torch.nn.utils.prune.l1_unstructured(layer, "bias", amount=4)
    torch.nn.utils.prune.l1_unstructured(layer, "values", amount=0.5)
    zeros = [int((t == 0).sum()) for t in (layer.bias, layer.values)]
    assert zeros[0] == 4 and zeros[1] == layer.values.numel() // 2
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight_dense(), layer.bias))


def test_module_habits():
    layer = SparseLinear(70, 80, density=0.3, block_size=16)
    assert layer.eval() is layer and not layer.training
    layer.requires_grad_(False)
    assert not layer(torch.randn(3, 70)).requires_grad
    layer.set_pattern(random_pattern(layer))
    assert not layer.values.requires_grad
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    layer(torch.randn(3, 70))
    assert seen == [(3, 80)]
    y = torch.func.functional_call(layer, {"values": torch.zeros_like(layer.values)}, torch.randn(3, 70))
    assert torch.equal(y, layer.bias.expand(3, 80))
    layer.share_memory()
    assert layer.values.is_shared()
    nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    vector = nn.utils.parameters_to_vector(layer.parameters())
    assert vector.numel() == layer.values.numel() + 80


# --- swapping -------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One Linear in two places, beside others nested deeper."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(40, 40)
        self.again = self.first
        self.nested = nn.Sequential(nn.Linear(40, 40, bias=False), nn.ReLU(), nn.ModuleList([nn.Linear(40, 7)]))

    def forward(self, x):
        return self.nested[2][0](self.nested[1](self.nested[0](self.again(self.first(x)))))


def test_sparsify_at_density_1_changes_nothing():
    model, x = Twice().double(), torch.randn(5, 40, dtype=torch.float64)
    expected = model(x)
    assert sparsify_(model, 1.0, 16).model is model
    assert model.first is model.again and isinstance(model.first, SparseLinear)
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == 3
    torch.testing.assert_close(model(x), expected)
    assert densify_(model) is model
    assert not any(isinstance(m, SparseLinear) for m in model.modules()) and model.first is model.again
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("distribution", ["uniform", "erdos_renyi"])
def test_sparsify_keeps_the_largest_blocks(distribution):
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    weights = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    sparsify_(model, 0.25, 16, distribution)
    blocks = sum(m.pattern.num_blocks for m in (model[0], model[2]))
    assert blocks == round(0.25 * (16 * 32 + 32 * 16))
    for layer, weight in zip((model[0], model[2]), weights, strict=True):
        out, inputs = weight.shape
        norms = weight.reshape(out // 16, 16, inputs // 16, 16).square().sum((1, 3)).flatten()
        largest = norms.topk(layer.pattern.num_blocks).indices.sort().values
        assert torch.equal(layer.pattern.linear_places().long(), largest)
        active = torch.zeros_like(norms).index_fill_(0, largest, 1.0).reshape(out // 16, inputs // 16)
        kept = weight * active.repeat_interleave(16, 0).repeat_interleave(16, 1)
        assert torch.equal(by_hand(layer), kept)


def test_sparsify_a_single_linear_and_a_filter():
    linear = nn.Linear(40, 20).eval()
    layer = sparsify_(linear, 1.0, 8).model
    assert isinstance(layer, SparseLinear) and not layer.training
    x = torch.randn(3, 40)
    torch.testing.assert_close(layer(x), linear(x))
    back = densify_(layer)
    assert isinstance(back, nn.Linear) and not back.training and torch.equal(back.weight, linear.weight)
    model = sparsify_(
        Twice(), 0.5, 8, filter_fn=lambda name, linear: "nested" in name and linear.out_features > 7
    ).model
    assert [type(m) for m in (model.first, model.nested[0], model.nested[2][0])] == [nn.Linear, SparseLinear, nn.Linear]
    with pytest.warns(UserWarning, match="no layer was swapped .*left out by filter_fn"):
        untouched = sparsify_(Twice(), 0.5, 8, filter_fn=lambda *_: False).model
    assert not any(isinstance(m, SparseLinear) for m in untouched.modules())


def test_swapping_keeps_what_is_frozen_frozen():
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 7))
    model[0].requires_grad_(False)
    sparsify_(model, 0.5, 8)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    densify_(model)
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_sparsify_refuses_tied_weights_and_leaves_the_model():
    tied = nn.ModuleDict(
        {"embed": nn.Embedding(40, 16), "head": nn.Linear(16, 40, bias=False), "free": nn.Linear(16, 16)}
    )
    tied["head"].weight = tied["embed"].weight
    two = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    two[1].weight = two[0].weight
    for model, names in (
        (tied, "'head' must not be shared, got it in 'embed.weight' too"),
        (two, "'0' must not be shared"),
    ):
        with pytest.raises(ValueError, match="sparsify_: the weight of " + names):
            sparsify_(model, 0.5, 8)
        assert not any(isinstance(m, SparseLinear) for m in model.modules())
    sparsify_(tied, 0.5, 8, filter_fn=lambda name, _: name == "free")
    assert isinstance(tied["free"], SparseLinear) and tied["head"].weight is tied["embed"].weight


def test_sparsify_is_all_or_nothing():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    for arguments, message in (
        ((1.5, 8), "density"),
        ((0.5, 5), "block_size"),
        ((0.5, 8, "x"), "distribution"),
    ):
        with pytest.raises(ValueError, match=message):
            sparsify_(model, *arguments)
        assert type(model[0]) is nn.Linear and type(model[1]) is nn.Linear
    with torch.no_grad():
        model[1].weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="sparsify_: weight of '1' must not contain NaN"):
        sparsify_(model, 0.5, 8)
    assert type(model[0]) is nn.Linear and type(model[1]) is nn.Linear


def test_sparsify_leaves_subclasses_alone():
    attention = nn.MultiheadAttention(16, 2)  # its out_proj is a subclass of Linear that torch reads weights from
    with pytest.warns(UserWarning, match="no layer was swapped"):
        sparsify_(attention, 0.5, 8)
    assert not any(isinstance(m, SparseLinear) for m in attention.modules())
    x = torch.randn(4, 1, 16)
    assert attention(x, x, x)[0].shape == (4, 1, 16)


@pytest.mark.parametrize("padded", [False, True])
def test_sparsify_a_transformer(padded):
    """Its fused path for inference would read dense weights: it is left, and the outputs stay what they were."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    x, mask = torch.randn(3, 5, 16), torch.zeros(3, 5, dtype=torch.bool)
    mask[0, 3:] = padded
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=mask)[~mask]
        sparsify_(encoder, 1.0, 8)
        assert isinstance(encoder.layers[1].linear2, SparseLinear)
        torch.testing.assert_close(encoder(x, src_key_padding_mask=mask)[~mask], expected)
    encoder.train()(x).sum().backward()
    assert encoder.layers[0].linear1.values.grad is not None


def test_arguments_of_another_kind():
    with pytest.raises(TypeError, match="sparsify_: model must be a torch.nn.Module, got int"):
        sparsify_(3)
    with pytest.raises(TypeError, match="SparseLinear: pattern must be a BlockPattern, got int"):
        SparseLinear(8, 8, pattern=3)
    for x in ([[1.0] * 8], torch.ones(1, 8).numpy()):
        with pytest.raises(TypeError, match="block_sparse_linear: x must be a torch.Tensor, got (list|ndarray)"):
            SparseLinear(8, 8, block_size=4)(x)


def test_densify_keeps_the_fused_activation():
    model = sn.SparseMLP([40, 24, 7], density=0.5, block_size=8, activation="gelu")
    x = torch.randn(3, 40)
    expected = model(x)
    densify_(model)
    torch.testing.assert_close(model(x), expected)


# --- threads --------------------------------------------------------------------------------------------------------


def run_threads(*functions):
    """Runs each in a thread of its own; raises what any raised."""
    errors = []

    def guarded(function):
        try:
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(f,)) for f in functions]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(t.is_alive() for t in threads), "a thread hangs"
    if errors:
        raise errors[0]


def rewires(enough):
    """0, 1, 2... at least 300 of them, on until ``enough()``; at most 20 seconds."""
    until = time.monotonic() + 20
    for i in itertools.count():
        if (i >= 300 and enough()) or time.monotonic() > until:
            return
        yield i


def test_two_threads_on_one_layer():
    """ROBUSTNESS 55."""
    layer = SparseLinear(200, 150, density=0.3, block_size=16, activation="gelu")
    inputs = [torch.randn(40, 200, requires_grad=True) for _ in range(2)]
    expected = [(layer(x).detach(), torch.autograd.grad(layer(x).sum(), x)[0]) for x in inputs]
    for x, (y, grad) in zip(inputs, expected, strict=True):  # one thread computes what a dense layer does
        dense = nn.functional.gelu(nn.functional.linear(x, by_hand(layer), layer.bias))
        torch.testing.assert_close(y, dense.detach())
        torch.testing.assert_close(grad, torch.autograd.grad(dense.sum(), x)[0])

    def work(i):
        for _ in range(150):
            x = inputs[i].detach().requires_grad_()
            y = layer(x)
            assert torch.equal(y, expected[i][0])
            assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected[i][1])

    run_threads(lambda: work(0), lambda: work(1))


@pytest.mark.parametrize("same_number", [True, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_forward_while_another_thread_rewires(grad, masked, same_number):
    """ROBUSTNESS 56: every output belongs wholly to one of the two states, and nothing raises."""

    def state(density, value):
        pattern = BlockPattern.random((64, 96), density, 16)
        mask = torch.rand(pattern.num_blocks, 16, 16) < 0.5 if masked else None
        return pattern, torch.full((pattern.num_blocks, 16, 16), value), mask

    states = [state(0.5, 1.0), state(0.5 if same_number else 0.75, -2.0)]
    layer = SparseLinear(96, 64, pattern=states[0][0], bias=False)
    x, results = torch.rand(8, 96), []
    for s in states:
        layer.set_pattern(*s)
        results.append(layer(x).detach())
        torch.testing.assert_close(results[-1], x @ by_hand(layer).T)
    done, seen = threading.Event(), [0, 0]

    def rewire():
        for i in rewires(lambda: sum(seen) > 100):
            layer.set_pattern(*states[i % 2])
        done.set()

    def forward():
        while not done.is_set():
            with torch.set_grad_enabled(grad):
                y = layer(x)
            matches = [torch.equal(y, r) for r in results]
            assert any(matches), "an output mixes two patterns"
            seen[matches.index(True)] += 1

    run_threads(rewire, forward, forward)
    assert sum(seen) > 100


def test_backward_while_another_thread_rewires():
    """Either the gradient of the values it started with, or StaleTopologyError."""
    patterns = [BlockPattern.random((64, 96), d, 16) for d in (0.9, 0.1)]
    layer = SparseLinear(96, 64, pattern=patterns[0], bias=False)
    torch.nn.init.ones_(layer.values)
    done, outcomes = threading.Event(), {"right": 0, "stale": 0}

    def rewire():
        for i in rewires(lambda: sum(outcomes.values()) > 100):
            n = patterns[i % 2].num_blocks
            layer.set_pattern(patterns[i % 2], torch.full((n, 16, 16), float(i % 2 + 1)))
        done.set()

    per_pattern = [p.to_mask().float().sum(0).repeat_interleave(16) * 16 for p in patterns]

    def backward():
        while not done.is_set():
            x = torch.ones(4, 96, requires_grad=True)
            y = layer(x)
            try:
                (grad,) = torch.autograd.grad(y.sum(), x)
                assert any(torch.equal(grad[0], per_pattern[i] * (i + 1)) for i in (0, 1)), "half old, half new"
                outcomes["right"] += 1
            except StaleTopologyError:
                outcomes["stale"] += 1

    run_threads(rewire, backward)
    assert sum(outcomes.values()) > 100
