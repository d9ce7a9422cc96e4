"""Whose blocks move: optimizers and their state of every kind, frozen layers, followers, restored states."""

import copy
import logging
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import sparsenet as sn

pytestmark = pytest.mark.filterwarnings("ignore:Sparse(MLP|Linear)")

X, Y = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 10


def network(density=0.3, seed=0):
    return sn.SparseMLP([64, 128, 128, 10], density, 16, generator=torch.Generator().manual_seed(seed))


def train(model, optimizer, sparsifier=None, steps=1):
    update = None
    for _ in range(steps):
        for one in optimizer if isinstance(optimizer, list) else [optimizer]:
            one.zero_grad()
        cross_entropy(model(X), Y).backward()
        for one in optimizer if isinstance(optimizer, list) else [optimizer]:
            one.step()
        update = sparsifier.step() if sparsifier is not None else None
    return update


def by_place(layer, tensor):
    """[rows, cols, ...] of a tensor with one entry per block; places without a block are NaN."""
    pattern = layer.pattern
    out = torch.full((pattern.block_rows, pattern.block_cols, *tensor.shape[1:]), torch.nan)
    out[pattern.row_indices.long(), pattern.col_indices.long()] = tensor.detach().float()
    return out


def assert_followed(before, after, grown=0.0):
    """Blocks that stayed have the same numbers at the same places, blocks that came have ``grown``."""
    stayed = ~before.isnan() & ~after.isnan()
    came = before.isnan() & ~after.isnan()
    assert stayed.any() and came.any()
    assert torch.equal(before[stayed], after[stayed])
    assert torch.all(after[came] == grown)


# --- optimizers -----------------------------------------------------------------------------------------------------


def test_row65_an_optimizer_made_before_sparsify_is_refused_by_name():
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    sn.sparsify_(net, 0.5, 16)
    before = [net[0].pattern, net[0].values.detach().clone()]
    with pytest.raises(ValueError, match=r"must hold the values of every trainable layer, got none for '0'; make"):
        sn.Sparsifier(net, optimizer, sn.RigL(0.3), every=2)
    assert net[0].pattern is before[0] and torch.equal(net[0].values, before[1]) and net[0].topology.observer is None


def test_row65_an_optimizer_of_another_layer_is_refused_and_of_all_but_frozen_is_not():
    model = network()
    optimizer = torch.optim.AdamW([*model[0].parameters(), *model[2].parameters()])
    with pytest.raises(ValueError, match="got none for '1'"):
        sn.Sparsifier(model, optimizer, sn.SET(0.3))
    model[1].requires_grad_(False)
    sn.Sparsifier(model, optimizer, sn.SET(0.3))
    sn.Sparsifier(network(), None, sn.SET(0.3))  # nobody trains it: every layer is rewired


@pytest.mark.parametrize("together", [list, tuple])
def test_row66_state_of_several_optimizers_follows(together):
    model = network()
    optimizers = [torch.optim.Adam(model[0].parameters()), torch.optim.SGD(model[1:].parameters(), 0.1, momentum=0.9)]
    sparsifier = sn.Sparsifier(model, together(optimizers), sn.SET(0.3), every=2)
    train(model, optimizers, sparsifier)
    states = [(0, 0, "exp_avg"), (0, 0, "exp_avg_sq"), (1, 1, "momentum_buffer")]

    def now():
        return [by_place(model[i], optimizers[o].state[model[i].values][key]) for o, i, key in states]

    before = now()
    assert sparsifier.step().grown
    for a, b in zip(before, now(), strict=True):
        assert_followed(a, b)
    train(model, optimizers, sparsifier, 3)


class Sharpness(torch.optim.Optimizer):
    """Keeps its moments in an optimizer of its own, as sharpness-aware minimisation does."""

    def __init__(self, params, base):
        super().__init__(params, {})
        self.helpers = {"base": [base(self.param_groups)]}

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.clone()
        self.helpers["base"][0].step()


def test_row66_state_in_an_inner_optimizer_follows():
    model = network()
    optimizer = Sharpness(model.parameters(), lambda groups: torch.optim.Adam(groups, 1e-2))
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=2)
    train(model, optimizer, sparsifier)
    inner, values = optimizer.helpers["base"][0], model[1].values
    before = [by_place(model[1], t) for t in (optimizer.state[values]["old"], inner.state[values]["exp_avg"])]
    assert sparsifier.step().grown
    after = [by_place(model[1], t) for t in (optimizer.state[values]["old"], inner.state[values]["exp_avg"])]
    for a, b in zip(before, after, strict=True):
        assert_followed(a, b)
    train(model, optimizer, sparsifier, 3)


class StandsFor(torch.optim.Optimizer):
    """Is an optimizer by name only: everything is that of the one inside, as in accelerate's wrapper."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        self.optimizer.step()

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)


def test_row66_a_wrapper_that_only_stands_for_an_optimizer():
    model = network()
    optimizer = StandsFor(torch.optim.Adam(model.parameters(), 1e-2))
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=2)
    train(model, optimizer, sparsifier)
    before = by_place(model[1], optimizer.state[model[1].values]["exp_avg"])
    assert sparsifier.step().grown
    assert_followed(before, by_place(model[1], optimizer.state[model[1].values]["exp_avg"]))
    train(model, optimizer, sparsifier, 3)


class Elsewhere(torch.optim.SGD):
    """Keeps its momentum in a list of its own."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.buffers = [torch.zeros_like(p) for group in self.param_groups for p in group["params"]]


class Histories(torch.optim.SGD):
    """Keeps the last gradients in a list in its state."""

    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("history", []).append(p.grad.clone())


class Flat(torch.optim.SGD):
    """Keeps a flattened copy of the gradient."""

    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["flat"] = p.grad.flatten().clone()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            Elsewhere,
            "state 'buffers' of layer 0 in Elsewhere cannot follow its blocks: it is kept outside optimizer.state",
        ),
        (Histories, "state 'history' of layer 0 in Histories cannot follow its blocks: it is inside a list or dict"),
        (Flat, r"state 'flat' of layer 0 in Flat cannot follow its blocks: its shape is \[\d+\]"),
    ],
)
def test_row66_state_that_cannot_follow_is_refused_before_anything_moves(kind, message):
    model = network()
    optimizer = kind(model.parameters(), lr=0.01)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=1)
    optimizer.zero_grad()
    cross_entropy(model(X), Y).backward()
    optimizer.step()
    before = [(layer.pattern, layer.values.detach().clone()) for layer in model]
    with pytest.raises(RuntimeError, match=message):
        sparsifier.step()
    for layer, (pattern, values) in zip(model, before, strict=True):
        assert layer.pattern is pattern and torch.equal(layer.values, values)


def test_row73_optimizers_with_a_history_are_refused_with_the_reason():
    model = network()
    with pytest.raises(ValueError, match="must not be LBFGS: it keeps a history of whole steps"):
        sn.Sparsifier(model, torch.optim.LBFGS(model.parameters()), sn.SET(0.3))
    with pytest.raises(ValueError, match="must not be LBFGS"):
        sn.Sparsifier(
            model, Sharpness(model.parameters(), lambda g: torch.optim.LBFGS(model.parameters())), sn.SET(0.3)
        )
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got dict"):
        sn.Sparsifier(model, {}, sn.SET(0.3))


class SignSteps(torch.optim.Optimizer):
    """Step sizes per weight, with a constructor of its own and one argument without a default."""

    def __init__(self, params, first):
        super().__init__(params, {"first": first})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if "size" not in state:
                    state["size"] = torch.full_like(p, group["first"])
                p.sub_(p.grad.sign() * state["size"])


@pytest.mark.parametrize(
    ("make", "key", "grown"),
    [
        (lambda p: torch.optim.Rprop(p, lr=0.02), "step_size", 0.02),
        (lambda p: torch.optim.Adagrad(p, 0.01, initial_accumulator_value=0.25), "sum", 0.25),
        (lambda p: SignSteps(p, 0.01), "size", 0.01),
        (lambda p: torch.optim.Adam(p), "exp_avg_sq", 0.0),
    ],
)
def test_row73_grown_blocks_start_with_what_the_optimizer_gives_a_new_parameter(make, key, grown):
    """Step sizes that start at zero would never train; what the optimizer gives is asked of it."""
    model = network()
    optimizer = make(model.parameters())
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=2)
    train(model, optimizer, sparsifier)
    layer, steps = model[1], optimizer.state[model[1].values].get("step")
    before = by_place(layer, optimizer.state[layer.values][key])
    steps = copy.deepcopy(steps)
    update = sparsifier.step().layers["1"]
    assert_followed(before, by_place(layer, optimizer.state[layer.values][key]), grown)
    assert steps is None or torch.equal(optimizer.state[layer.values]["step"], steps)
    train(model, optimizer, sparsifier)
    new = torch.isin(layer.pattern.linear_places(), update.grown_places)
    trained = layer.values[new].flatten(1).abs().amax(1) > 0
    assert trained.float().mean() > 0.5, "grown blocks do not train"


def test_row73_an_option_still_decides():
    model = network()
    optimizer = torch.optim.Rprop(model.parameters(), lr=0.02)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=2, grown_state={"step_size": "zero"})
    train(model, optimizer, sparsifier)
    before = by_place(model[1], optimizer.state[model[1].values]["step_size"])
    sparsifier.step()
    assert_followed(before, by_place(model[1], optimizer.state[model[1].values]["step_size"]))


def test_row66_asking_for_first_states_steps_no_real_optimizer():
    """A learning-rate schedule wraps ``optimizer.step``; a scratch copy must not reach the real one through it."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=2)
    train(model, optimizer, sparsifier)
    schedule.step()
    bias = model[0].bias.detach().clone()
    sparsifier.step()
    assert torch.equal(bias, model[0].bias) and int(optimizer.state[model[0].values]["step"]) == 1


# --- frozen layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [sn.SET(0.3), sn.RigL(0.3), sn.GMP()])
def test_row67_frozen_layers_are_left_alone_and_said_once(policy, caplog):
    model = network()
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model[1:].parameters(), 1e-2)
    with caplog.at_level(logging.WARNING):
        density = sn.Linear(0.3, 0.1, 4) if policy.follows_density else None
        sparsifier = sn.Sparsifier(model, optimizer, policy, density, every=1)
        before = model[0].pattern, model[0].values.detach().clone()
        update = train(model, optimizer, sparsifier, 4)
    assert "0" not in update.layers and update.dropped
    assert model[0].pattern is before[0] and torch.equal(model[0].values, before[1])
    assert caplog.text.count("frozen layers keep their topology: '0'") == 1


def test_row67_a_layer_that_is_frozen_or_thawed_later():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=2)
    train(model, optimizer, sparsifier)
    model[1].requires_grad_(False)
    before = model[1].pattern
    update = train(model, optimizer, sparsifier)
    assert model[1].pattern is before and ("1" not in update.layers or not update.layers["1"].grown)
    model[1].requires_grad_(True)
    assert train(model, optimizer, sparsifier, 2).layers["1"].grown


# --- averaged copies ------------------------------------------------------------------------------------------------


def averaged(model, kind):
    if kind == "AveragedModel":
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        return average, average.module, lambda: average.update_parameters(model)
    average = copy.deepcopy(model)

    @torch.no_grad()
    def update():
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            mine.mul_(0.9).add_(theirs, alpha=0.1)

    return average, average, update


@pytest.mark.parametrize("kind", ["AveragedModel", "deepcopy"])
@pytest.mark.parametrize("policy", [sn.RigL(0.3), sn.GMP()])
def test_row68_followers_average_the_same_places(kind, policy):
    """Against an average of the dense weights in float64, where a weight that leaves takes its average with it."""
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    average, inside, update_average = averaged(model, kind)
    density = sn.Linear(0.3, 0.1, 12) if policy.follows_density else None
    sparsifier = sn.Sparsifier(model, optimizer, policy, density, every=2, followers=[average])
    expected = [layer.weight_dense().detach().double() for layer in model]
    for step in range(12):
        train(model, optimizer, sparsifier)
        for i, layer in enumerate(model):
            alive = layer.pattern.to_mask().repeat_interleave(16, 0).repeat_interleave(16, 1)
            expected[i] *= alive[: layer.out_features, : layer.in_features]
        update_average()
        for i, layer in enumerate(model):
            now = layer.weight_dense().detach().double()
            first = kind == "AveragedModel" and step == 0
            expected[i] = now if first else 0.9 * expected[i] + 0.1 * now
            assert inside[i].pattern == layer.pattern and inside[i].pattern is not layer.pattern
            torch.testing.assert_close(inside[i].weight_dense().double(), expected[i], atol=1e-6, rtol=1e-5)
    assert not any(p.grad is not None for p in average.parameters())


def test_row68_followers_must_be_copies():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters())
    for follower, message in (
        (network(seed=1), r"followers\[0\] must be a copy of layer '0', got another pattern"),
        (model, "got the layer itself"),
        (nn.Linear(3, 3), "got no such layer"),
    ):
        with pytest.raises(ValueError, match=message):
            sn.Sparsifier(model, optimizer, sn.SET(), followers=[follower])
    with pytest.raises(TypeError, match="followers must be modules, got OrderedDict"):
        sn.Sparsifier(model, optimizer, sn.SET(), followers=[model.state_dict()])


@pytest.mark.parametrize("kind", ["AveragedModel", "deepcopy"])
def test_row68_an_average_that_does_not_follow_is_noticed_once(kind):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    _average, _, update_average = averaged(model, kind)
    sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(0.3), every=2)
    with pytest.warns(UserWarning, match=r"averages over different places.*followers=\[average\]") as seen:
        for _ in range(10):
            train(model, optimizer, sparsifier)
            update_average()
    assert len([w for w in seen if "followers" in str(w.message)]) == 2  # one for each layer whose blocks move


def test_row68_an_average_that_begins_after_the_last_rewire_is_noticed():
    """Stochastic weight averaging: the copy is from the start, and written to when the blocks have moved away."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    average = AveragedModel(model)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=2, end=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, sparsifier, 6)
    average.update_parameters(model)
    with pytest.warns(UserWarning, match="followers"):
        train(model, optimizer, sparsifier)


def test_row68_snapshots_and_copies_that_train_are_left_alone():
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        snapshot, best, twin = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
        unpickled = pickle.loads(pickle.dumps(model))
        before = [layer.weight_dense().clone() for layer in snapshot]
        for one in (model, twin, unpickled, model):
            optimizer = torch.optim.AdamW(one.parameters(), 1e-2)
            sparsifier = sn.Sparsifier(one, optimizer, sn.SET(0.3), every=1)
            for _ in range(3):
                train(one, optimizer, sparsifier)
                best.load_state_dict(one.state_dict())  # a snapshot that is taken again and again
    assert all(torch.equal(a, layer.weight_dense()) for a, layer in zip(before, snapshot, strict=True))
    assert all(a.pattern == b.pattern and torch.equal(a.values, b.values) for a, b in zip(best, model, strict=True))


# --- earlier states -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [sn.SET(0.3), sn.RigL(0.3), sn.GMP()])
@pytest.mark.parametrize("armed", [False, True])
def test_row74_moments_follow_an_earlier_state_of_the_model(policy, armed):
    """Best weights are put back while the optimizer goes on, perhaps before a rewire: moments stay at their places."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    density = sn.Linear(0.3, 0.1, 12) if policy.follows_density else None
    sparsifier = sn.Sparsifier(model, optimizer, policy, density, every=4)
    train(model, optimizer, sparsifier, 3)
    best = copy.deepcopy(model.state_dict())
    train(model, optimizer, sparsifier, 4 if armed else 6)
    layer = model[1]
    before = by_place(layer, optimizer.state[layer.values]["exp_avg"])
    model.load_state_dict(best)
    cross_entropy(model(X), Y).backward()
    gradient = by_place(layer, layer.values.grad)
    optimizer.step()
    after = by_place(layer, optimizer.state[layer.values]["exp_avg"])
    stayed, came = ~before.isnan() & ~after.isnan(), before.isnan() & ~after.isnan()
    assert stayed.any()
    torch.testing.assert_close(after[stayed], 0.9 * before[stayed] + 0.1 * gradient[stayed])
    torch.testing.assert_close(after[came], 0.1 * gradient[came])
    sparsifier.step()
    train(model, optimizer, sparsifier, 6)
    for one in model:
        assert optimizer.state[one.values]["exp_avg"].shape == one.values.shape


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
def test_row74_restoring_model_and_optimizer_together_keeps_what_was_saved(order):
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=2)
    train(model, optimizer, sparsifier, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    moments = by_place(model[1], optimizer.state[model[1].values]["exp_avg"])
    train(model, optimizer, sparsifier, 4)
    parts = [(model, saved[0]), (optimizer, saved[1])]
    for part, state in parts if order == "model first" else reversed(parts):
        part.load_state_dict(copy.deepcopy(state))
    sparsifier._states.follow()  # as the next step of the optimizer does first
    now = by_place(model[1], optimizer.state[model[1].values]["exp_avg"])
    assert torch.equal(now.nan_to_num(7), moments.nan_to_num(7))
    train(model, optimizer, sparsifier, 4)


def test_row74_a_pattern_set_by_hand_takes_the_moments_along():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(0.3), every=3)
    train(model, optimizer, sparsifier, 2)
    layer = model[1]
    before = by_place(layer, optimizer.state[layer.values]["exp_avg"])
    other = sn.BlockPattern.random((128, 128), 0.5, 16, torch.Generator().manual_seed(5))
    layer.set_pattern(other)
    update = train(model, optimizer, sparsifier)
    assert update.layers["1"].skipped == "its pattern was replaced after the rewire was prepared"
    assert update.layers["0"].grown and layer.pattern == other
    after = by_place(layer, optimizer.state[layer.values]["exp_avg_sq"])
    assert (after[before.isnan() & ~after.isnan()] >= 0).all()
    assert train(model, optimizer, sparsifier, 3).layers["1"].grown


def test_row74_who_carries_the_moments_himself_is_not_contradicted():
    """``set_pattern`` says where blocks went; moments that were moved by that are not moved again."""
    from sparsenet.optimizer_state import carry_state

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsifier = sn.Sparsifier(model, optimizer, sn.Static(), every=100)
    train(model, optimizer, sparsifier, 2)
    layer, state = model[1], optimizer.state[model[1].values]
    other = sn.BlockPattern.random((128, 128), None, 16, torch.Generator().manual_seed(5), layer.pattern.num_blocks)
    carried = layer.set_pattern(other)
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = carry_state(state[key], carried)
    expected = state["exp_avg"].clone()
    sparsifier._states.follow()
    assert torch.equal(optimizer.state[layer.values]["exp_avg"], expected)


def test_row74_a_sparsifier_that_is_gone_leaves_no_hook_behind():
    import gc

    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.3), every=2)
    assert len(optimizer._optimizer_step_pre_hooks) == len(optimizer._optimizer_step_post_hooks) == 1
    del sparsifier
    gc.collect()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
