"""Widening: the function stays, old state stays, training goes on; by hand, at random, and with bad input."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_networks import random_network
from torch import nn

import sparsenet as sn
from sparsenet.architecture.growth import growable, multiple_of, readers, widen
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
