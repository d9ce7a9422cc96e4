"""Everyday training practices around a rewire: micro-batches, loss scales, clipping, averages, kinds of optimizers."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.policies import views
from sparsenet.policies.growth import thinned
from sparsenet.policies.views import ElementView, likely_places

SIZES, ROWS = (64, 64, 32), 128

POLICIES = {
    "rigl": sn.RigL(0.3),
    "candidates": sn.RigL(0.1),  # with views.CHEAP = 0
    "snfs": sn.SNFS(0.3, momentum=0.5),
    "mest": sn.MEST(0.3, weight=1.0),
    "movement": sn.Movement(),
    "topkast": sn.TopKAST(0.3, refresh=2),
    "granet": sn.GraNet(0.3),
    "taylor": sn.Taylor(0.3),
    "fisher": sn.Fisher(0.3),
    "elements": sn.RigL(0.3),
    "2:4": sn.RigL(0.3),
}
MASKS = {"elements": 0.3, "2:4": "2:4"}
KINDS = {"default": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def network(mask=None, seed=0, density=0.3):
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for i, (n, m) in enumerate(pairwise(SIZES)):
        activation = "none" if i else "relu"
        layers.append(
            sn.SparseLinear(
                n, m, density=density, block_size=4, activation=activation, element_mask=mask, generator=generator
            )
        )
    return nn.Sequential(*layers)


def sparsifier_of(name, model, optimizer, every=3, followers=()):
    """Rewires at every third step."""
    density, distribution = None, None
    if POLICIES[name].follows_density:
        now = sum(layer.num_active for layer in model) / sum(n * m for n, m in pairwise(SIZES))
        density = sn.Linear(now, now / 2, 9)
        distribution = "global" if name == "granet" else None
    return sn.Sparsifier(
        model,
        optimizer,
        POLICIES[name],
        density,
        distribution,
        every,
        followers=followers,
        elements=name in MASKS,
        grace=0,
    )


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(ROWS, SIZES[0], generator=generator), torch.randn(ROWS, SIZES[-1], generator=generator)


def loss_of(model, x, y):
    return (model(x) - y).square().mean()


def operands(model, x, y):
    """By layer, input and gradient before the activation, of dense copies in float64."""
    found, h = [], x.double()
    for layer in model:
        weight, bias = layer.weight_dense().detach().double(), layer.bias.detach().double()
        before = h @ weight.T + bias.requires_grad_()
        found.append((h.detach(), before))
        h = torch.relu(before) if layer.activation == "relu" else before
    gradients = torch.autograd.grad((h - y).square().mean(), [before for _, before in found])
    return [(x, gradient) for (x, _), gradient in zip(found, gradients, strict=True)]


def dense_gradients(model, x, y):
    """By layer, the gradient of the dense weight in float64."""
    return [g.T @ x for x, g in operands(model, x, y)]


def stored(layer, dense):
    """[num_blocks, b, b]: a dense matrix at the layer's blocks, zero at masked elements."""
    b, p = layer.block_size, layer.pattern
    tiles = dense.view(p.block_rows, b, p.block_cols, b).transpose(1, 2)
    blocks = tiles[p.row_indices.long(), p.col.long()]
    return blocks if layer.element_mask is None else blocks * layer.element_mask


def block_norms(layer, dense):
    b, p = layer.block_size, layer.pattern
    return dense.view(p.block_rows, b, p.block_cols, b).square().sum((1, 3)).flatten()


def best_inactive(layer, dense, count):
    """The ``count`` inactive blocks of the largest norms."""
    return sorted(
        block_norms(layer, dense).index_fill(0, layer.pattern.linear_places(), -1).topk(count).indices.tolist()
    )


@pytest.fixture
def candidates(monkeypatch):
    monkeypatch.setattr(views, "CHEAP", 0)


def all_places(name, monkeypatch):
    monkeypatch.setattr(views, "CHEAP", 0 if name == "candidates" else 1 << 62)


# --- micro-batches ---


@pytest.mark.parametrize("micro", [2, 4])
@pytest.mark.parametrize("mean", [True, False])
def test_growth_counts_the_last_micro_batch(micro, mean):
    model, parts = network(), list(batches(micro))
    sparsifier = sparsifier_of("rigl", model, None, every=1)
    for x, y in parts:
        (loss_of(model, x, y) / (micro if mean else 1)).backward()
    gradients, before = dense_gradients(model, *parts[-1]), copy.deepcopy(model)
    for i, change in enumerate(sparsifier.step().layers.values()):
        assert change.grown_places.tolist() == best_inactive(before[i], gradients[i], change.grown)
        assert change.grown > 5 * (1 - i)


@pytest.mark.parametrize("micro", [2, 4])
def test_candidates_come_from_every_second_row_of_the_last_micro_batch(micro, candidates):
    """Drawn and scored from a float64 reference's operands."""
    model, parts = network(), list(batches(micro))
    sparsifier = sparsifier_of("candidates", model, None, every=1)
    for x, y in parts:
        (loss_of(model, x, y) / micro).backward()
    seen, before = operands(model, *parts[-1]), copy.deepcopy(model)
    keys, counts = zip(*((growth.view.key, growth.count) for growth in sparsifier._growth.values()), strict=True)
    for i, change in enumerate(sparsifier.step().layers.values()):
        sample = thinned(seen[i])
        assert len(sample[0]) == ROWS // 2 and change.grown
        places = likely_places(before[i].pattern, 3 * counts[i], sample, keys[i])
        assert 2 * len(places) < before[i].pattern.block_rows * before[i].pattern.block_cols
        norms = block_norms(before[i], sample[1].T @ sample[0])[places]
        assert change.grown_places.tolist() == sorted(places[norms.topk(change.grown).indices].tolist())


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_a_momentum_ages_by_steps_and_adds_up_all_micro_batches(micro):
    """The sum of 0.5^age times the gradient of a step, over the last four steps; every place is a candidate."""
    model = network()
    sparsifier = sn.Sparsifier(model, None, sn.SNFS(0.3, momentum=0.5, candidates=1000), every=6, grace=0)
    momentum = [torch.zeros(m, n, dtype=torch.float64) for n, m in pairwise(SIZES)]
    for step in range(1, 7):
        momentum = [0.5 * m for m in momentum]
        for x, y in batches(micro, seed=step):
            y = y * (1 + 3 * (step == 3))  # the oldest that counts is large
            loss_of(model, x, y).backward()
            if step > 2:
                momentum = [m + g for m, g in zip(momentum, dense_gradients(model, x, y), strict=True)]
        before = copy.deepcopy(model)
        update = sparsifier.step()
    for i, change in enumerate(update.layers.values()):
        assert change.grown_places.tolist() == best_inactive(before[i], momentum[i], change.grown)
        assert change.grown > 5 * (1 - i)


@pytest.mark.parametrize("micro", [2, 4])
@pytest.mark.parametrize("mean", [True, False])
def test_mest_and_movement_read_the_accumulated_gradient(micro, mean):
    model, parts = network(), list(batches(micro))
    mest = sn.Sparsifier(model, None, POLICIES["mest"], every=1, grace=0)
    movement = sparsifier_of("movement", copy.deepcopy(model), None, every=9)
    share = micro if mean else 1
    for watched in (mest.model, movement.model):
        for x, y in parts:
            (loss_of(watched, x, y) / share).backward()
    sums = [sum(g) / share for g in zip(*(dense_gradients(model, *part) for part in parts), strict=True)]
    expected, moved = [], []
    for layer, gradient in zip(model, sums, strict=True):
        values, gradient = layer.values.detach().double(), stored(layer, gradient)
        expected.append((values.abs() + gradient.abs()).square().sum((1, 2)))
        moved.append(-(values * gradient).sum((1, 2)))
    for growth, scores in zip(mest._growth.values(), expected, strict=True):
        torch.testing.assert_close(mest.policy.drop_scores(growth.view).double(), scores, rtol=1e-4, atol=1e-7)
    movement.step()
    for state, scores in zip(movement.state_dict()["policy"].values(), moved, strict=True):
        torch.testing.assert_close(state["movement"].double(), scores, rtol=1e-4, atol=1e-6)
    assert mest.step().dropped > 5


@pytest.mark.parametrize("name", ["taylor", "fisher", "candidates", "elements", "2:4"])
@pytest.mark.parametrize("micro", [2, 4])
def test_what_watches_backward_forgets_earlier_micro_batches(name, micro, monkeypatch):
    all_places(name, monkeypatch)
    model, parts = network(MASKS.get(name)), list(batches(micro))
    twin = copy.deepcopy(model)
    accumulating, last = (sparsifier_of(name, m, None, every=1) for m in (model, twin))
    for x, y in parts:
        (loss_of(model, x, y) / micro).backward()
    loss_of(twin, *parts[-1]).backward()
    a, b = accumulating.step(), last.step()
    assert a.grown >= 5
    for one, other in zip(a.layers.values(), b.layers.values(), strict=True):
        assert torch.equal(one.grown_places, other.grown_places) and torch.equal(
            one.dropped_places, other.dropped_places
        )


@pytest.mark.parametrize("micro", [2, 4])
def test_elements_grow_by_the_last_micro_batch(micro):
    model, parts = network(0.3), list(batches(micro))
    sparsifier = sparsifier_of("elements", model, None, every=1)
    for x, y in parts:
        (loss_of(model, x, y) / micro).backward()
    gradients = dense_gradients(model, *parts[-1])
    growable = [torch.cat(list(ElementView("", m, 0).inactive_places((0, m.pattern.block_rows)))) for m in model]
    for i, change in enumerate(sparsifier.step().layers.values()):
        best = gradients[i].flatten()[growable[i]].abs().topk(change.grown).indices
        assert change.grown_places.tolist() == growable[i][best].sort().values.tolist() and change.grown > 5


def test_a_window_of_momentum_may_begin_with_infinite_gradients():
    """The backward pass does not fail; candidates are drawn at the next one, and with none the rewire says why."""
    model = network()
    sparsifier = sn.Sparsifier(model, None, sn.SNFS(0.3, momentum=0.5), every=4, grace=0)
    for step, (x, y) in enumerate(batches(8), 1):
        loss = loss_of(model, x, y)
        (loss * torch.inf if step in (1, 5, 6, 7, 8) else loss).backward()
        update = sparsifier.step()
        if step == 4:
            assert update.grown > 10 and not any(change.skipped for change in update.layers.values())
    assert [change.skipped for change in update.layers.values()] == ["its grow scores hold NaN or Inf"] * 2
