"""Everyday training practices around a rewire: micro-batches, loss scales, clipping, averages, kinds of optimizers."""

import copy
import logging
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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


# --- loss scales ---


def trained(name, kind, scale=None, steps=9, autocast=None, clip=None, spoilt=(), family=torch.optim.AdamW):
    """A model after some steps, and the updates. ``spoilt``: steps at which the first layer's gradient is infinite."""
    model = network(MASKS.get(name))
    optimizer = family(model.parameters(), lr=1e-2, **KINDS[kind])
    sparsifier = sparsifier_of(name, model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None, growth_interval=1000)
    updates = []
    for step, (x, y) in enumerate(batches(steps), 1):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            hidden = model[0](x)
            if step in spoilt:
                hidden.register_hook(lambda gradient: gradient * torch.inf)
            loss = (model[1](hidden).float() - y).square().mean()
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            clip(model.parameters())
        scaler.step(optimizer)
        scaler.update()
        updates.append(sparsifier.step())
    return model, [u for u in updates if u is not None], sparsifier


def assert_same(one, other, exact=True):
    for a, b in zip(one, other, strict=True):
        assert a.pattern == b.pattern
        if a.element_mask is not None:
            assert torch.equal(a.element_mask, b.element_mask)
        torch.testing.assert_close(a.values, b.values, **({"rtol": 0, "atol": 0} if exact else {}))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_power_of_two_as_loss_scale_changes_nothing(name, kind, monkeypatch):
    all_places(name, monkeypatch)
    plain, updates, _ = trained(name, kind)
    scaled, _, _ = trained(name, kind, scale=2.0**12)
    assert sum(u.dropped for u in updates) > 10
    assert_same(plain, scaled)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", POLICIES)
def test_nor_does_it_under_autocast(name, dtype, monkeypatch):
    all_places(name, monkeypatch)
    plain, updates, _ = trained(name, "fused", scale=2.0**6, autocast=dtype)
    scaled, _, _ = trained(name, "fused", scale=2.0**10, autocast=dtype)
    assert sum(u.dropped for u in updates) > 10 and all(layer.values.dtype == torch.float32 for layer in scaled)
    assert_same(plain, scaled, exact=dtype == torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", POLICIES)
def test_a_skipped_step_leaves_nothing_behind(name, kind, monkeypatch, caplog):
    """The third step would rewire, the fifth not; the first layer's gradients are infinite at both."""
    all_places(name, monkeypatch)
    with caplog.at_level(logging.WARNING):
        model, updates, sparsifier = trained(name, kind, scale=2.0**12, spoilt=(3, 5), steps=9)
    if name in ("rigl", "candidates", "granet", "taylor", "fisher", "elements", "2:4", "mest"):
        assert updates[0].layers["0"].skipped and "step 3, layer 0 keeps its topology: its" in caplog.text
    assert bool(updates[0].layers["1"].skipped) == (name == "mest")
    assert not any(change.skipped for update in updates[1:] for change in update.layers.values())
    assert all(update.dropped for update in updates[1:])
    for layer in model:
        assert layer.values.isfinite().all() and layer.values.any()
    for state in sparsifier.state_dict().get("policy", {}).values():
        assert all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point())
    default, _, _ = trained(name, "default", scale=2.0**12, spoilt=(3, 5), steps=9)
    assert_same(model, default, exact=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_moves_no_score(kind):
    """The second layer's gradients are finite, and a fused optimizer leaves them scaled."""
    before = trained("movement", kind, scale=2.0**12, steps=1)
    after = trained("movement", kind, scale=2.0**12, steps=2, spoilt=(2,))
    assert_same(before[0], after[0])
    states = [run[2].state_dict()["policy"] for run in (before, after)]
    for name in "01":
        assert states[0][name]["movement"].any()
        assert torch.equal(states[0][name]["movement"], states[1][name]["movement"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_step_moves_no_sleeping_weight(kind):
    before = trained("topkast", kind, scale=2.0**12, steps=2)
    after = trained("topkast", kind, scale=2.0**12, steps=3, spoilt=(3,))
    refreshed = before[2]
    refreshed.optimizer.zero_grad()
    refreshed.step()  # a step that moves nothing and rewires alike
    assert_same(before[0], after[0])
    states = [run[2].state_dict()["policy"] for run in (before, after)]
    for name in "01":
        assert states[0][name]["latent"].any() and torch.equal(states[0][name]["latent"], states[1][name]["latent"])


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


def test_who_has_skipped_a_step_is_asked_of_the_layers_own_optimizer():
    model = network()
    first, second = (torch.optim.Adam(layer.parameters(), 1e-2) for layer in model)
    sparsifier = sn.Sparsifier(model, [first, second], POLICIES["mest"], every=1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    ((x, y),) = batches(1)
    hidden = model[0](x)
    hidden.register_hook(lambda gradient: gradient * torch.inf)
    scaler.scale((model[1](hidden) - y).square().mean()).backward()
    scaler.step(first)
    scaler.step(second)
    said = [change.skipped for change in sparsifier.step().layers.values()]
    assert said == ["its optimizer made no step since the last Sparsifier.step(): were gradients not finite?", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gradient_counts_once_however_often_the_sparsifier_steps(kind):
    """As where it is called after every micro-batch, or while another optimizer is trained."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2, **KINDS[kind])
    sparsifier = sparsifier_of("movement", model, optimizer, every=100)
    ((x, y),) = batches(1)
    loss_of(model, x, y).backward()
    optimizer.step()
    sparsifier.step()
    once = sparsifier.state_dict()["policy"]
    sparsifier.step()
    again = sparsifier.state_dict()["policy"]
    assert all(
        once[name]["movement"].any() and torch.equal(once[name]["movement"], again[name]["movement"]) for name in "01"
    )


# --- clipping ---

CLIPS = {
    "norm": lambda parameters: nn.utils.clip_grad_norm_(parameters, 1e-3),
    "value": lambda parameters: nn.utils.clip_grad_value_(parameters, 1e-4),
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("mask", [None, 0.3, "2:4"])
def test_growth_is_scored_before_clipping_and_gradients_are_read_after_it(clip, mask):
    """The norm is that of dense gradients without those of masked elements."""
    model, ((x, y),) = network(mask), batches(1)
    mest = sn.Sparsifier(model, None, POLICIES["mest"], every=1)
    movement = sparsifier_of("movement", copy.deepcopy(model), None, every=9)
    rigl = sn.Sparsifier(copy.deepcopy(model), None, sn.RigL(0.3), every=1)
    for watched in (model, movement.model, rigl.model):
        loss_of(watched, x, y).backward()
        norm = CLIPS[clip](watched.parameters())
    dense, biases = dense_gradients(model, x, y), [g.sum(0) for _, g in operands(model, x, y)]
    seen = [stored(layer, gradient) for layer, gradient in zip(model, dense, strict=True)]
    if clip == "norm":
        total = torch.stack([g.square().sum() for g in (*seen, *biases)]).sum().sqrt()
        torch.testing.assert_close(norm.double(), total, rtol=1e-4, atol=0)
        seen = [g * (1e-3 / (total + 1e-6)) for g in seen]
    else:
        seen = [g.clamp(-1e-4, 1e-4) for g in seen]
    movement.step()
    moved = [state["movement"].double() for state in movement.state_dict()["policy"].values()]
    changes = list(rigl.step().layers.values())
    for i, layer in enumerate(model):
        values = layer.values.detach().double()
        scores = mest.policy.drop_scores(mest._growth[str(i)].view).double()
        torch.testing.assert_close(scores, (values.abs() + seen[i].abs()).square().sum((1, 2)), rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(moved[i], -(values * seen[i]).sum((1, 2)), rtol=1e-3, atol=1e-8)
        assert changes[i].grown_places.tolist() == best_inactive(layer, dense[i], changes[i].grown)
        assert changes[i].grown > 5 * (1 - i)


@pytest.mark.parametrize("name", ["mest", "movement", "candidates", "elements"])
def test_a_loss_scale_and_clipping_together(name, monkeypatch):
    """Gradients unscaled by hand, as clipping wants them, are not unscaled again by a fused optimizer."""
    all_places(name, monkeypatch)
    plain = trained(name, "default", clip=CLIPS["norm"])
    for kind in KINDS:
        assert_same(plain[0], trained(name, kind, scale=2.0**12, clip=CLIPS["norm"])[0], exact=kind == "default")


# --- averages ---


@pytest.mark.parametrize("mean", ["ema", "swa"])
@pytest.mark.parametrize("name", ["rigl", "elements", "2:4", "topkast", "masked blocks"])
def test_averages_follow_patterns_and_element_masks(name, mean):
    """Against averages of the dense weights in float64; a weight that leaves takes its average with it."""
    model = network({"masked blocks": 0.3}.get(name, MASKS.get(name)))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9) if mean == "ema" else None)
    sparsifier = sparsifier_of("rigl" if name == "masked blocks" else name, model, optimizer, followers=[average])
    expected, changed = [0.0] * len(model), 0
    for step, (x, y) in enumerate(batches(9)):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        optimizer.step()
        update = sparsifier.step()
        changed += 0 if update is None else update.grown
        average.update_parameters(model)
        share = (1 if step == 0 else 0.1) if mean == "ema" else 1 / (step + 1)
        for i, (layer, twin) in enumerate(zip(model, average.module, strict=True)):
            mask = twin.element_mask
            assert twin.pattern == layer.pattern and (mask is None) == (layer.element_mask is None)
            if mask is not None:
                assert torch.equal(mask, layer.element_mask)
                assert not twin.values[~mask].any() and not (twin.values == 0)[mask].all()
            active = dense_mask(layer)
            expected[i] = (expected[i] + (layer.weight_dense().detach().double() - expected[i]) * share) * active
            torch.testing.assert_close(twin.weight_dense().double(), expected[i], rtol=1e-4, atol=1e-6)
    assert changed > 10


def dense_mask(layer):
    """Bool [out, in]."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.values.fill_(1.0)
    twin.set_element_mask(layer.element_mask)
    return twin.weight_dense() != 0


# --- kinds of optimizers, compiling, checkpointing ---


@pytest.mark.parametrize("family", ["Adam", "AdamW", "SGD"])
@pytest.mark.parametrize("name", POLICIES)
def test_fused_and_foreach_optimizers_make_the_same_choices(name, family, monkeypatch):
    all_places(name, monkeypatch)
    family = getattr(torch.optim, family)
    runs = {kind: trained(name, kind, family=family) for kind in KINDS}
    assert len(runs["default"][1]) == 3 and all(update.dropped for update in runs["default"][1])
    for kind in ("foreach", "fused"):
        assert_same(runs["default"][0], runs[kind][0], exact=False)


@pytest.mark.parametrize("how", ["compiled", "checkpointed"])
@pytest.mark.parametrize("name", ["candidates", "snfs", "elements"])
def test_compiled_and_checkpointed_models_make_the_same_choices(name, how, monkeypatch):
    all_places(name, monkeypatch)
    plain, _, _ = trained(name, "default", steps=6)
    model = network(MASKS.get(name))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False)
    run = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    sparsifier = sparsifier_of(name, run, optimizer)
    grown = 0
    for x, y in batches(6):
        optimizer.zero_grad()
        output = run(x) if how == "compiled" else torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)
        (output - y).square().mean().backward()
        optimizer.step()
        update = sparsifier.step()
        grown += 0 if update is None else update.grown
    assert grown >= 10
    assert_same(plain, model, exact=False)
