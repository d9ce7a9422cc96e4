"""The Sparsifier: what moves, what stays bit for bit, and what an error leaves behind."""

import copy
import logging

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet import functional
from sparsenet.policies.exchange import Quota, Units
from sparsenet.policies.places import best_places, hash_uniform, layer_key
from sparsenet.policies.policy import Policy, block_squared_norms


class SignMomentum(torch.optim.Optimizer):
    """An optimizer that sparsenet has never heard of: sign of a momentum, and a sum of squares per row."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(calls=0, direction=torch.zeros_like(p), rows=torch.zeros(p.shape[:-1]), note="kept")
                state["calls"] += 1
                state["direction"].mul_(0.9).add_(p.grad)
                state["rows"].add_(p.grad.square().sum(-1))
                p.add_(state["direction"].sign(), alpha=-group["lr"])


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "adamw_amsgrad": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 1e-2, fused=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-2, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "own": SignMomentum,
}


def small_model(block_size=8, seed=0, density=0.4, **kwargs):
    torch.manual_seed(seed)
    return sn.SparseMLP([30, 50, 40, 10], density=density, block_size=block_size, distribution="uniform", **kwargs)


def train(model, optimizer, sparsifier=None, steps=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    updates = []
    for _ in range(steps):
        x = torch.randn(20, 30, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if sparsifier is not None:
            updates.append(sparsifier.step())
    return updates


def by_place(layer, tensor):
    return dict(zip(layer.pattern.linear_places().tolist(), tensor.detach().clone(), strict=True))


def tensors_of(state):
    return {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and v.dim() > 0}


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("density", [None, 0.25, 0.6])
def test_optimizer_state_follows_its_blocks(name, density):
    """Survivors keep their moments bit for bit, grown blocks start at zero, scalars and unrelated state stay."""
    model = small_model()
    optimizer = OPTIMIZERS[name](model.parameters())
    sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(0.3), density=density, every=3)
    train(model, optimizer, sparsifier, steps=2)
    identities = [id(p) for p in model.parameters()]
    generator = torch.Generator().manual_seed(9)
    optimizer.zero_grad()
    model(torch.randn(20, 30, generator=generator)).square().mean().backward()
    optimizer.step()
    before = []
    for layer in model:
        state = optimizer.state[layer.values]
        before.append(
            {
                "values": by_place(layer, layer.values),
                "state": {k: by_place(layer, v) for k, v in tensors_of(state).items()},
                "scalars": {k: copy.deepcopy(v) for k, v in state.items() if k not in tensors_of(state)},
                "bias": copy.deepcopy(optimizer.state[layer.bias]),
            }
        )
    update = sparsifier.step()
    assert update.grown > 0 and update.dropped > 0
    assert [id(p) for p in model.parameters()] == identities
    survivors = 0
    for layer, old, change in zip(model, before, update.layers.values(), strict=True):
        state = optimizer.state[layer.values]
        assert layer.values.grad is None
        assert set(tensors_of(state)) == set(old["state"]) and old["state"]
        for label, tensor in [("values", layer.values), *tensors_of(state).items()]:
            was = old["values"] if label == "values" else old["state"][label]
            for place, now in by_place(layer, tensor).items():
                if place in was:
                    assert torch.equal(now, was[place])
                    survivors += 1
                else:
                    assert place in change.grown_places.tolist()
                    assert not now.any()
        for key, value in old["scalars"].items():
            assert same(state[key], value)
        for key, value in old["bias"].items():
            assert same(optimizer.state[layer.bias][key], value)
        dropped = set(change.dropped_places.tolist())
        assert dropped.isdisjoint(layer.pattern.linear_places().tolist())
        assert dropped <= set(old["values"])
    assert survivors > 0
    train(model, optimizer, sparsifier, steps=4)  # and training goes on


def test_grown_state_may_start_at_the_mean():
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=2, grown_state={"exp_avg_sq": "mean"})
    update = train(model, optimizer, sparsifier, steps=2)[-1]
    layer, change = model[1], update.layers["1"]
    grown = torch.isin(layer.pattern.linear_places(), change.grown_places)
    second = optimizer.state[layer.values]["exp_avg_sq"]
    assert torch.allclose(second[grown], second[~grown].mean().expand_as(second[grown]))
    assert not optimizer.state[layer.values]["exp_avg"][grown].any()
    with pytest.raises(
        ValueError, match=r"grown_state\['exp_avg'\] must be zero or mean or a share of the mean, got 'average'"
    ):
        sn.Sparsifier(model, optimizer, sn.SET(), grown_state={"exp_avg": "average"})


def test_rigl_grows_where_the_dense_gradient_is_largest():
    torch.manual_seed(0)
    layer = sn.SparseLinear(24, 16, density=0.75, block_size=4, activation="relu")
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    sparsifier = sn.Sparsifier(layer, optimizer, sn.RigL(1 / 6), every=1)
    x, target = torch.randn(9, 24), torch.randn(9, 16)
    pattern, values = layer.pattern, layer.values.detach().clone()
    weight = layer.weight_dense().detach().double().requires_grad_()
    (torch.relu(x.double() @ weight.T + layer.bias.detach().double()) - target).square().sum().backward()
    (layer(x) - target).square().sum().backward()
    optimizer.step()
    update = sparsifier.step().layers[""]
    norms = weight.grad.reshape(4, 4, 6, 4).square().sum((1, 3)).flatten()
    norms[pattern.linear_places()] = -1
    assert update.grown == 3
    assert update.grown_places.tolist() == sorted(norms.argsort(descending=True)[:3].tolist())
    smallest = block_squared_norms(values).argsort(stable=True)[:3]
    assert update.dropped_places.tolist() == sorted(pattern.linear_places()[smallest].tolist())


def test_rewires_when_the_schedule_says():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.2), every=3, begin=2, end=9)
    updates = train(model, optimizer, sparsifier, steps=14)
    assert [u.step for u in updates if u is not None] == [5, 8]


def test_density_follows_its_schedule_and_never_exceeds_the_places():
    model = small_model(density=0.9)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = sn.Linear(0.9, 0.1, 8)
    sparsifier = sn.Sparsifier(model, optimizer, sn.GMP(), density=schedule, every=2)
    for update in train(model, optimizer, sparsifier, steps=10):
        if update is not None:
            blocks = sum(u.num_blocks for u in update.layers.values())
            places = sum(layer.pattern.block_rows * layer.pattern.block_cols for layer in model)
            assert blocks == pytest.approx(schedule(update.step) * places, abs=1)
            assert update.grown == 0
    assert sum(layer.pattern.num_blocks for layer in model) < 0.15 * places


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_extreme_densities(density):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.5), density=density, every=2)
    train(model, optimizer, sparsifier, steps=6)
    assert all(layer.density == density for layer in model)
    assert torch.isfinite(model(torch.randn(4, 30))).all()


def test_sparsity_is_an_alias():
    model = small_model()
    sparsifier = sn.Sparsifier(model, None, sn.SET(), sparsity=0.8)
    assert sparsifier.density(0) == pytest.approx(0.2)
    with pytest.raises(ValueError, match="density or its alias sparsity, not both"):
        sn.Sparsifier(model, None, sn.SET(), density=0.1, sparsity=0.9)


@pytest.mark.parametrize(
    ("blocks", "target", "fraction", "expected"),
    [
        (10, 10, 0.3, (3, 3, 0)),
        (10, 6, 0.5, (7, 3, 0)),  # 6 stay, 3 of them exchanged
        (10, 14, 0.2, (2, 6, 0)),
        (10, 10, 0.0, (0, 0, 0)),
        (14, 14, 0.5, (2, 2, 5)),  # only two places are free
        (10, 16, 0.5, (0, 6, 5)),  # all six free places are needed for the higher count
        (0, 4, 0.5, (0, 4, 0)),
        (10, 0, 0.5, (10, 0, 0)),
    ],
)
def test_quota(blocks, target, fraction, expected):
    """16 places; drop, grow, clamped worked by hand."""
    places = torch.arange(blocks)
    pattern = sn.BlockPattern.from_places(places // 4, places % 4, (16, 16), 4)
    quota = Quota.of(Units.of_blocks(pattern), target, fraction)
    assert (quota.drop, quota.grow, quota.clamped) == expected
    assert blocks - quota.drop + quota.grow == target


def test_clamped_growth_is_reported():
    model = sn.SparseLinear(16, 16, density=0.9, block_size=4)
    sparsifier = sn.Sparsifier(model, None, sn.SET(0.5), every=1)
    update = sparsifier.step().layers[""]
    assert update.grown == 2 and update.clamped == 5


def test_ties_go_to_the_smaller_place():
    layer = sn.SparseLinear(32, 32, density=0.5, block_size=4)
    with torch.no_grad():
        layer.values.fill_(1.0)
    before = layer.pattern

    class Tied(sn.SET):
        def grow_scores(self, layer, places):
            return torch.zeros(len(places))

    update = sn.Sparsifier(layer, None, Tied(0.0625), every=1).step().layers[""]
    active = before.linear_places().tolist()
    free = [p for p in range(64) if p not in active]
    assert update.dropped_places.tolist() == active[:2]
    assert update.grown_places.tolist() == free[:2]


def test_scoring_in_slices_changes_nothing(monkeypatch):
    pattern = sn.BlockPattern.random((96, 40), 0.3, 4)

    def score(places):
        return ((places * 7919) % 101).float()  # many ties

    whole = best_places(pattern, score, 17, (0, pattern.block_rows))
    monkeypatch.setattr("sparsenet.policies.places.PLACES_AT_ONCE", 25)
    sliced = best_places(pattern, score, 17, (0, pattern.block_rows))
    assert torch.equal(whole[0], sliced[0]) and torch.equal(whole[1], sliced[1])
    assert not set(whole[0].tolist()) & set(pattern.linear_places().tolist())


def test_random_numbers_depend_on_seed_step_layer_and_place_only():
    places = torch.arange(100_000)
    u = hash_uniform(places, layer_key(0, 100, "a"))
    assert torch.equal(u[5_000:6_000], hash_uniform(places[5_000:6_000], layer_key(0, 100, "a")))
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    for other in (layer_key(1, 100, "a"), layer_key(0, 101, "a"), layer_key(0, 100, "b")):
        v = hash_uniform(places, other)
        assert abs(torch.corrcoef(torch.stack([u, v]))[0, 1]) < 0.02


@pytest.mark.parametrize("policy", [sn.SET(0.3), sn.RigL(0.3)])
def test_same_seed_same_run(policy):
    def run():
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        train(model, optimizer, sn.Sparsifier(model, optimizer, policy, every=2, seed=5), steps=6)
        return [layer.pattern.fingerprint for layer in model], [layer.values.detach() for layer in model]

    (patterns, values), (patterns2, values2) = run(), run()
    assert patterns == patterns2
    assert all(torch.equal(a, b) for a, b in zip(values, values2, strict=True))


def test_resuming_continues_alike():
    def make():
        model = small_model()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        return model, optimizer, sn.Sparsifier(model, optimizer, sn.RigL(0.3), every=3)

    whole = make()
    train(*whole, steps=4)
    state = copy.deepcopy([part.state_dict() for part in whole])
    train(*whole, steps=4, seed=2)
    resumed = make()
    for part, saved in zip(resumed, state, strict=True):
        part.load_state_dict(saved)
    train(*resumed, steps=4, seed=2)
    for a, b in zip(whole[0], resumed[0], strict=True):
        assert a.pattern == b.pattern
        assert torch.equal(a.values, b.values)
    with pytest.raises(ValueError, match="state must have an integer 'steps', got None"):
        resumed[2].load_state_dict({})


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_scores_keep_the_topology(bad, caplog):
    """Row 33: refused, logged, topology kept; the other layers are rewired."""
    model = small_model()
    with torch.no_grad():
        model[1].values[3, 0, 0] = bad
    before = [layer.pattern.fingerprint for layer in model]
    with caplog.at_level(logging.WARNING):
        update = sn.Sparsifier(model, None, sn.SET(0.3), every=1).step()
    assert update.layers["1"].skipped == "its drop scores hold NaN or Inf"
    assert "layer 1 keeps its topology: its drop scores hold NaN or Inf" in caplog.text
    after = [layer.pattern.fingerprint for layer in model]
    assert [a == b for a, b in zip(before, after, strict=True)] == [False, True, False]


def test_bad_gradients_keep_the_topology():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(0.3), every=1)
    (model(torch.randn(8, 30)) * float("nan")).sum().backward()
    before = [layer.pattern.fingerprint for layer in model]
    update = sparsifier.step()
    assert all(u.skipped == "its grow scores hold NaN or Inf" for u in update.layers.values())
    assert before == [layer.pattern.fingerprint for layer in model]


def test_a_layer_without_gradient_is_skipped():
    update = sn.Sparsifier(small_model(), None, sn.RigL(0.3), every=1).step()
    assert all(u.skipped == "no backward ran through it before this step" for u in update.layers.values())


def test_gradient_accumulation_counts_the_last_micro_batch():
    """Row 37: the rewire happens at the step, with the last backward's scores."""
    torch.manual_seed(0)
    layer = sn.SparseLinear(32, 32, density=0.3, block_size=4)
    twin = copy.deepcopy(layer)
    x = torch.randn(3, 6, 32)
    accumulating = sn.Sparsifier(layer, None, sn.RigL(0.5), every=1)
    for part in x:
        layer(part).square().sum().backward()
    last_only = sn.Sparsifier(twin, None, sn.RigL(0.5), every=1)
    twin(x[-1]).square().sum().backward()
    assert torch.equal(accumulating.step().layers[""].grown_places, last_only.step().layers[""].grown_places)


class FailsOn(Policy):
    """Raises when it scores the named layer."""

    def __init__(self, name):
        super().__init__(0.3)
        object.__setattr__(self, "fails_on", name)

    def drop_scores(self, layer):
        if layer.name == self.fails_on:
            raise KeyError("broken policy")
        return super().drop_scores(layer)

    def grow_scores(self, layer, places):
        return layer.random(places)


def snapshot(model, optimizer):
    return [
        (
            layer.pattern.fingerprint,
            layer.values.detach().clone(),
            {k: v.clone() for k, v in tensors_of(optimizer.state[layer.values]).items()},
        )
        for layer in model
    ]


def assert_same_snapshot(a, b):
    for (pattern, values, state), (pattern2, values2, state2) in zip(a, b, strict=True):
        assert pattern == pattern2
        assert torch.equal(values, values2)
        assert state.keys() == state2.keys()
        assert all(torch.equal(state[k], state2[k]) for k in state)


def test_an_error_in_a_policy_changes_nothing():
    """Row 38."""
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, steps=2)
    before = snapshot(model, optimizer)
    sparsifier = sn.Sparsifier(model, optimizer, FailsOn("2"), every=1)
    with pytest.raises(KeyError, match="broken policy"):
        sparsifier.step()
    assert_same_snapshot(before, snapshot(model, optimizer))


@pytest.mark.parametrize("density", [None, 0.2])
def test_running_out_of_memory_half_way_rolls_back(monkeypatch, density):
    """Row 38: the third layer fails after two were moved; all three are as before, bit for bit."""
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, steps=2)
    before = snapshot(model, optimizer)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.4), density=density, every=1)
    original, calls = sn.SparseLinear.set_pattern, []

    def fails_third(self, *args, **kwargs):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError("third layer")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(sn.SparseLinear, "set_pattern", fails_third)
    with pytest.raises(MemoryError):
        sparsifier.step()
    assert len(calls) == 5
    assert_same_snapshot(before, snapshot(model, optimizer))
    monkeypatch.undo()
    train(model, optimizer, sparsifier, steps=2)


def test_optimizer_without_state_and_several_groups():
    """Row 39."""
    model = small_model()
    optimizer = torch.optim.AdamW([{"params": model[0].parameters()}, {"params": model[1:].parameters(), "lr": 1e-2}])
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=1)
    assert sparsifier.step().grown > 0
    assert not optimizer.state
    train(model, optimizer, sparsifier, steps=2)


def test_one_parameter_in_two_layers_is_refused():
    """Row 39."""
    model = small_model()
    model[2].values = model[1].values
    with pytest.raises(ValueError, match="one Parameter must not serve two layers, got '1' and '2'"):
        sn.Sparsifier(model, None, sn.SET())


def test_a_layer_used_twice_is_one_layer():
    layer = sn.SparseLinear(16, 16, density=0.5, block_size=4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert list(sn.Sparsifier(model, None, sn.SET()).layers) == ["0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"every": 2.5}, "every must be an integer >= 1, got 2.5"),
        ({"begin": -1}, "begin must be an integer >= 0, got -1"),
        ({"density": 1.5}, r"density must lie in \[0, 1\], got 1.5"),
        ({"density": float("nan")}, "NaN|finite|number"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sn.Sparsifier(small_model(), None, sn.SET(), **arguments)


def test_bad_model_and_policy():
    with pytest.raises(ValueError, match="model must hold at least one SparseLinear"):
        sn.Sparsifier(nn.Linear(3, 3), None, sn.SET())
    with pytest.raises(TypeError, match="policy must be a sparsenet Policy, got 'rigl'"):
        sn.Sparsifier(small_model(), None, "rigl")
    sparsifier = sn.Sparsifier(small_model(), None, sn.SET(), density=lambda step: 2.0 if step > 1 else 0.3, every=1)
    with pytest.raises(ValueError, match=r"density must lie in \[0, 1\], got 2.0 at step 2"):
        sparsifier.step()


def test_wrong_score_shape_is_named():
    class Wrong(sn.SET):
        def drop_scores(self, layer):
            return torch.zeros(3)

    with pytest.raises(ValueError, match=r"Policy: drop_scores must have shape \[\d+\], got \[3\]"):
        sn.Sparsifier(small_model(), None, Wrong(), every=1).step()


def test_a_rewire_survives_an_old_loss_with_another_number_of_blocks():
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), density=sn.Linear(0.4, 0.2, 6), every=1)
    alive = []
    for _ in range(5):
        loss = model(torch.randn(4, 30)).square().mean()
        loss.backward(retain_graph=True)
        alive.append(loss)
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
        with pytest.raises(functional.StaleTopologyError, match=r"block_sparse_linear \(2\): the layer was rewired"):
            loss.backward()


@pytest.mark.parametrize("block_size", [1, 4, 16, 32])
def test_training_under_rigl_lowers_the_loss(block_size):
    torch.manual_seed(0)
    model = sn.SparseMLP([64, 256, 10], density=0.3, block_size=block_size)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(sn.Cosine(0.3, 0.0, 60)), every=5, end=60)
    x = torch.randn(256, 64)
    y = (x @ torch.randn(64, 10)).argmax(1)
    losses = []
    for _ in range(80):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparsifier.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_masked_elements_stay_zero_through_rewires():
    torch.manual_seed(0)
    pattern = sn.BlockPattern.random((32, 32), 0.4, 8)
    mask = torch.rand(pattern.num_blocks, 8, 8) < 0.5
    layer = sn.SparseLinear(32, 32, pattern=pattern, element_mask=mask)
    optimizer = SignMomentum(layer.parameters(), 0.1)
    sparsifier = sn.Sparsifier(layer, optimizer, sn.RigL(0.3), every=2)
    for _ in range(6):
        optimizer.zero_grad()
        layer(torch.randn(8, 32)).square().sum().backward()
        optimizer.step()
        assert not layer.values[~layer.element_mask].any()
        sparsifier.step()
        assert not layer.values[~layer.element_mask].any()
    assert not layer.element_mask.all()
