"""The policies' criteria with numbers worked by hand, and criteria exchanged between policies."""

import copy
import logging
import pickle

import pytest
import torch

import sparsenet as sn
from sparsenet.policies import Combination, places
from sparsenet.policies.growth import steps_watched

VALUES = torch.tensor([[[3.0, 4.0], [0.0, 0.0]], [[1.0, -1.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, -2.0]]])
GRADIENT = torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[-2.0, 0.0], [0.0, 2.0]], [[4.0, 0.0], [0.0, 0.0]]])


class View:
    """A layer as a policy sees it, with fixed answers: three blocks at places 0, 2 and 3."""

    name, step = "hidden", 1

    def __init__(self, values=VALUES, gradient=GRADIENT):
        self.values, self.given, self.state = values.clone(), gradient, {}
        self.pattern = sn.BlockPattern.from_linear_places(torch.tensor([0, 2, 3]), (8, 8), 4)

    @property
    def gradient(self):
        if self.given is None:
            raise places.BadScores("no gradient")
        return self.given

    def put(self, values):
        self.values.copy_(values)

    def random(self, where):
        return where.float() / 10


def test_random_drops_by_numbers_of_the_places():
    assert sn.Random().drop_scores(View()).tolist() == pytest.approx([0.0, 0.2, 0.3])


def test_mest_adds_the_gradient_to_the_magnitude():
    """(|w| + |g| / 2)^2: 3^2 + 4^2; 2^2 + 1 + 1 + 2^2; 2^2 + 2^2."""
    assert sn.MEST(weight=0.5).drop_scores(View()).tolist() == pytest.approx([25.0, 10.0, 8.0])
    assert sn.MEST(weight=0.0).drop_scores(View()).tolist() == pytest.approx([25.0, 4.0, 4.0])


def test_movement_sums_minus_weight_times_gradient():
    """-w g: 0; -(1 * -2 + 1 * 2) = 0 and then -(1 * -2) = 2; a gradient that is not finite counts nothing."""
    view, policy = View(), sn.Movement()
    policy.after_step(view)
    assert policy.drop_scores(view).tolist() == [0.0, 0.0, 0.0]
    view.given = torch.zeros_like(GRADIENT)
    view.given[1, 0, 0], view.given[2, 1, 1] = -2.0, -3.0
    policy.after_step(view)
    assert policy.drop_scores(view).tolist() == [0.0, 2.0, -6.0]
    view.given = torch.full_like(GRADIENT, torch.inf)
    policy.after_step(view)
    assert policy.drop_scores(view).tolist() == [0.0, 2.0, -6.0]


def test_topkast_puts_the_smallest_to_sleep_and_wakes_the_largest():
    """Norms 25, 4, 4 with two of three awake: block 2 sleeps; what the optimizer adds to it is kept aside."""
    view, policy = View(), sn.TopKAST(awake=0.67, refresh=2)
    policy.after_step(view)
    assert view.state["awake"].tolist() == [True, True, False]
    assert torch.equal(view.values[:2], VALUES[:2]) and not view.values[2].any()
    assert policy.drop_scores(view).tolist() == pytest.approx([25.0, 4.0, 4.0])
    view.values[2, 0, 0], view.step = 5.0, 2  # a step of the optimizer
    policy.after_step(view)
    assert not view.values[2].any() and view.state["latent"][2].tolist() == [[5.0, 0.0], [0.0, -2.0]]
    view.step = 3
    policy.after_step(view)  # 29 is more than 4: block 2 wakes, block 1 goes to sleep
    assert view.state["awake"].tolist() == [True, False, True]
    assert view.values[2].tolist() == [[5.0, 0.0], [0.0, -2.0]] and not view.values[1].any()
    assert policy.drop_scores(view).tolist() == pytest.approx([25.0, 4.0, 29.0])


def test_topkast_computes_with_what_is_awake_and_trains_what_sleeps():
    torch.manual_seed(0)
    model = sn.SparseMLP([32, 16], density=0.5, block_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier = sn.Sparsifier(model, optimizer, sn.TopKAST(0.25, awake=0.5, refresh=3), every=4)
    for _ in range(9):
        optimizer.zero_grad()
        model(torch.randn(8, 32)).square().sum().backward()
        assert (model[0].values.grad.flatten(1) != 0).any(1).all()  # of the stored blocks, asleep or not
        optimizer.step()
        sparsifier.step()
        state = sparsifier.state_dict()["policy"]["0"]
        asleep = ~state["awake"]
        assert not model[0].values[asleep].any() and not state["latent"][~asleep].any()
    assert state["latent"][asleep].any() and int(state["awake"].sum()) <= 8


def test_granet_falls_and_exchanges_and_acdc_alternates():
    torch.manual_seed(0)
    for policy in (sn.GraNet(0.5), sn.ACDC()):
        model = sn.SparseMLP([32, 32], density=1.0, block_size=4)
        schedule = policy.density_schedule(1.0, 0.25, steps=20)
        sparsifier = sn.Sparsifier(model, None, policy, density=schedule, every=2)
        counts, grown = [], 0
        for _ in range(22):
            model(torch.randn(8, 32)).square().sum().backward()
            update = sparsifier.step()
            if update is not None:
                counts.append(model[0].pattern.num_blocks)
                grown += update.grown
        if isinstance(policy, sn.GraNet):
            assert counts == sorted(counts, reverse=True) and grown > 0
        else:
            assert counts == [16, 64, 16, 64, 16, 64, 16, 64, 16, 16, 16] or set(counts) == {16, 64}
        assert counts[-1] == 16


def test_snfs_grows_where_the_momentum_of_the_gradient_is_largest():
    """Of all places as candidates, by autograd of a dense copy: the sum of 0.5^age times a gradient."""
    torch.manual_seed(0)
    layer = sn.SparseLinear(32, 32, density=0.25, block_size=4, bias=False)
    policy = sn.SNFS(0.5, momentum=0.5, candidates=100)
    assert steps_watched(policy) == 4
    sparsifier = sn.Sparsifier(layer, None, policy, every=6)
    momentum, active = torch.zeros(32, 32, dtype=torch.float64), layer.pattern.linear_places()
    for step in range(1, 7):
        x = torch.randn(8, 32)
        weight = layer.weight_dense().detach().double().requires_grad_()
        (x.double() @ weight.T).square().sum().backward()
        layer(x).square().sum().backward()
        if step > 2:  # the last four
            momentum = 0.5 * momentum + weight.grad
        update = sparsifier.step()
    norms = momentum.reshape(8, 4, 8, 4).square().sum((1, 3)).flatten()
    norms[active] = -1
    grown = update.layers[""].grown_places.tolist()
    assert grown and grown == sorted(norms.topk(len(grown)).indices.tolist())


def test_snfs_watches_nothing_before_its_steps():
    model = sn.SparseMLP([32, 32], density=0.25, block_size=4)
    sparsifier = sn.Sparsifier(model, None, sn.SNFS(momentum=0.5), every=10)
    watched = []
    for _ in range(20):
        watched.append(model[0].topology.observer is not None)
        model(torch.randn(8, 32)).square().sum().backward()
        sparsifier.step()
    assert watched == ([False] * 6 + [True] * 4) * 2


# --- criteria exchanged ---


def test_any_drop_goes_with_any_grow():
    policy = sn.Policy(drop=sn.MEST(weight=0.5), grow=sn.RigL, drop_fraction=0.2)
    assert isinstance(policy, Combination) and policy.drop_fraction_at(0) == 0.2
    assert policy.drop_scores(View()).tolist() == pytest.approx([25.0, 10.0, 8.0])
    assert policy.needs_gradient and policy.grows() and policy.scores_places() and policy.candidates == 3
    other = sn.Policy(drop=sn.Fisher(), grow=sn.SET())
    assert other.observes and not other.needs_gradient and not other.scores_places()
    assert not sn.Policy(drop=sn.SET()).grows()
    assert sn.Policy(grow=sn.SET()).drop_scores(View()).tolist() == pytest.approx([25.0, 4.0, 4.0])
    for twin in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy)), copy.copy(policy)):
        assert twin == policy and type(twin) is Combination


def test_a_combination_rewires_as_its_parts_do():
    torch.manual_seed(0)
    model, x = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8), torch.randn(16, 64)
    twin = copy.deepcopy(model)
    updates = []
    for network, policy in (
        (model, sn.Policy(drop=sn.SET(), grow=sn.RigL(), drop_fraction=0.25)),
        (twin, sn.RigL(0.25)),
    ):
        sparsifier = sn.Sparsifier(network, None, policy, every=1)
        network(x).square().sum().backward()
        updates.append(sparsifier.step())
    assert updates[0].grown and model[0].pattern == twin[0].pattern and model[1].pattern == twin[1].pattern


@pytest.mark.parametrize("drop", [sn.Movement(), sn.TopKAST()])
def test_a_criterion_with_a_state_keeps_it_in_a_combination(drop):
    torch.manual_seed(0)
    model = sn.SparseMLP([64, 64, 10], density=0.5, block_size=8)
    sparsifier = sn.Sparsifier(model, None, sn.Policy(drop=drop, grow=sn.SET(), drop_fraction=0.25), every=2)
    for _ in range(4):
        model(torch.randn(16, 64)).square().sum().backward()
        update = sparsifier.step()
    assert update.dropped == update.grown > 0 and sparsifier.state_dict()["policy"]["0"]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sn.Policy(drop="magnitude"), TypeError, "Policy: drop must be a sparsenet Policy, got 'magnitude'"),
        (lambda: sn.Policy(grow=3), TypeError, "Policy: grow must be a sparsenet Policy, got 3"),
        (
            lambda: sn.Policy(drop=sn.Movement(), grow=sn.TopKAST()),
            ValueError,
            "Policy: only one of drop and grow must act after every step, got Movement and TopKAST",
        ),
        (lambda: sn.MEST(weight=-1), ValueError, "MEST: weight must be at least 0, got -1"),
        (lambda: sn.SNFS(momentum=1.0), ValueError, "SNFS: momentum must lie between 0 and 1, got 1.0"),
        (lambda: sn.SNFS(candidates=0), ValueError, "SNFS: candidates must be an integer >= 1, got 0"),
        (lambda: sn.RigL(candidates=0.5), TypeError, "RigL: candidates must be an integer >= 1, got 0.5"),
        (lambda: sn.TopKAST(awake=0.0), ValueError, r"TopKAST: awake must lie in \(0, 1\], got 0.0"),
        (lambda: sn.TopKAST(refresh=0), ValueError, "TopKAST: refresh must be an integer >= 1, got 0"),
    ],
)
def test_what_makes_no_policy_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("policy", [sn.MEST(), sn.Movement()])
def test_without_the_gradient_of_the_values_the_topology_is_kept_and_it_is_said(policy, caplog):
    model = sn.SparseMLP([64, 64, 64], density=0.5, block_size=8)
    density = sn.Linear(0.5, 0.25, 2) if policy.follows_density else None
    sparsifier = sn.Sparsifier(model, None, policy, density=density, every=2)
    before = [layer.pattern for layer in model]
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            model(torch.randn(5, 64)).square().sum().backward()
            model.zero_grad()
            update = sparsifier.step()
    assert all("call Sparsifier.step() before zero_grad()" in u.skipped for u in update.layers.values())
    assert all(layer.pattern is pattern for layer, pattern in zip(model, before, strict=True))
    assert "call Sparsifier.step() before zero_grad()" in caplog.text


# --- what a policy remembers ---


class Age(sn.Policy):
    """How many steps a block has been there; the youngest leave."""

    every_step = True

    def after_step(self, layer):
        layer.state["age"] = layer.state.get("age", torch.zeros(layer.pattern.num_blocks)) + 1

    def drop_scores(self, layer):
        return layer.state["age"]

    def grow_places(self, layer, count):
        return layer.random_places(count)


def ages(sparsifier, layer, name="0"):
    age = sparsifier.state_dict()["policy"][name]["age"]
    return dict(zip(layer.pattern.linear_places().tolist(), age.tolist(), strict=False))


def test_a_state_follows_its_blocks_and_is_saved(tmp_path):
    model = sn.SparseMLP([64, 64, 10], density=0.25, block_size=8)
    optimizer = torch.optim.Adam(model.parameters())
    sparsifier = sn.Sparsifier(model, optimizer, Age(0.25), every=3)
    born = dict.fromkeys(model[0].pattern.linear_places().tolist(), 0)
    for step in range(1, 9):
        model(torch.randn(5, 64)).square().sum().backward()
        optimizer.step()
        update = sparsifier.step()
        if update is not None:
            born |= dict.fromkeys(update.layers["0"].grown_places.tolist(), step)
        places_now = model[0].pattern.linear_places().tolist()
        if update is None:
            assert ages(sparsifier, model[0]) == {place: step - born[place] for place in places_now}
    sn.save(tmp_path / "a", model, optimizer, sparsifier)
    fresh = sn.SparseMLP([64, 64, 10], density=0.25, block_size=8)
    again = torch.optim.Adam(fresh.parameters())
    loaded = sn.Sparsifier(fresh, again, Age(0.25), every=3)
    sn.load(tmp_path / "a", fresh, again, loaded)
    assert ages(loaded, fresh[0]) == ages(sparsifier, model[0])
    fresh[0].set_pattern(sn.BlockPattern.from_linear_places(torch.tensor([0, 1, 2]), (64, 64), 8))
    loaded.step()  # a place that was there goes on, another begins anew
    assert (
        ages(loaded, fresh[0]) == {place: ages(sparsifier, model[0]).get(place, 0) + 1 for place in (0, 1, 2)}
        or loaded.steps == 9
    )


def test_a_state_of_other_blocks_is_refused_before_anything_changes():
    model = sn.SparseMLP([64, 64, 10], density=0.25, block_size=8)
    sparsifier = sn.Sparsifier(model, None, Age(0.25), every=3)
    sparsifier.step()
    state = sparsifier.state_dict()
    state["policy"]["0"]["age"] = torch.ones(3)
    state["steps"] = 2
    with pytest.raises(ValueError, match=r"state 'age' of layer 0 must have one entry for each of 12 blocks, got 3"):
        sparsifier.load_state_dict(state)
    state["policy"] = {"0": 7}
    with pytest.raises(ValueError, match="state must have tensors by layer and name in 'policy'"):
        sparsifier.load_state_dict(state)
    assert sparsifier.steps == 1


def test_a_momentum_in_mid_window_is_saved(tmp_path):
    def made(seed):
        torch.manual_seed(seed)
        model = sn.SparseMLP([64, 64, 10], density=0.25, block_size=8)
        optimizer = torch.optim.Adam(model.parameters())
        return model, optimizer, sn.Sparsifier(model, optimizer, sn.SNFS(0.25, momentum=0.7), every=8)

    def train(parts, steps):
        for step in steps:
            parts[1].zero_grad()
            parts[0](torch.randn(5, 64, generator=torch.Generator().manual_seed(step))).square().sum().backward()
            parts[1].step()
            parts[2].step()

    whole, first, second = made(0), made(0), made(1)
    train(whole, range(16))
    train(first, range(6))
    assert first[2].state_dict()["watched"]
    sn.save(tmp_path / "a", *first)
    sn.load(tmp_path / "a", *second)
    train(second, range(6, 16))
    for a, b in zip(whole[0], second[0], strict=True):
        assert a.pattern == b.pattern and torch.equal(a.values, b.values)
    broken = second[2].state_dict() | {"watched": {"0": {"places": torch.tensor([1.5])}}, "steps": 14}
    with pytest.raises(ValueError, match="state must have places and gradients of layer 0"):
        second[2].load_state_dict(broken)
