"""Policies and Sparsifiers that break a rule: check_policy says which."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
import torch

import sparsenet as sn
from sparsenet import sparsifier
from sparsenet.functional import select_extreme
from sparsenet.optimizer_state import LayerMove
from sparsenet.policies import SNFS, exchange
from sparsenet.policies.census import Census
from sparsenet.policies.exchange import Newborn, Quota
from sparsenet.policies.growth import Growth
from sparsenet.testing import check_policy

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"steps": 9, "every": 3}


# --- policies ---


class Shrinking(sn.SET):
    def drop_scores(self, layer):
        return layer.values.detach().flatten()


class Counting(sn.SET):
    def drop_scores(self, layer):
        return layer.pattern.linear_places()


class Undefined(sn.SET):
    def drop_scores(self, layer):
        return super().drop_scores(layer).log() * torch.nan


class UndefinedGrowth(sn.RigL):
    def grow_scores(self, layer, places):
        return super().grow_scores(layer, places) / 0.0


class Writing(sn.SET):
    def drop_scores(self, layer):
        layer.values.detach().mul_(0.5)
        return super().drop_scores(layer)


class Clearing(sn.SET):
    def drop_scores(self, layer):
        layer.layer.values.grad.zero_()
        return super().drop_scores(layer)


class Rolling(sn.SET):
    def drop_scores(self, layer):
        return torch.rand(layer.pattern.num_blocks)


class RollingPython(sn.SET):
    def grow_scores(self, layer, places):
        return layer.random(places) + random.random()


class RollingNumPy(sn.SET):
    def grow_places(self, layer, count):
        np.random.rand()
        return layer.random_places(count)


class Overlapping(sn.SET):
    def grow_places(self, layer, count):
        return layer.pattern.linear_places()[:count]


class Unordered(sn.SET):
    def grow_places(self, layer, count):
        return layer.random_places(count).flip(0)


class Remembering(sn.SET):
    """Keeps what it knows in itself, where nobody saves it."""

    def drop_scores(self, layer):
        calls = vars(self).setdefault("calls", [])
        calls.append(layer.name)
        return super().drop_scores(layer) * (1 if len(calls) < 3 else -1)


class Global(sn.SET):
    calls = itertools.count()

    def drop_scores(self, layer):
        return torch.roll(super().drop_scores(layer), next(self.calls))


class Listing(sn.SET):
    every_step = True

    def after_step(self, layer):
        layer.state["seen"] = torch.zeros(3)


class Rolling2(sn.SET):
    every_step = True

    def after_step(self, layer):
        torch.rand(1)


class Measuring(sn.SET):
    measures = True

    def measure(self, model, call, layers, seed):
        model.eval()


class Uncopyable(sn.SET):
    def __deepcopy__(self, memo):
        raise TypeError("it holds an open file")


class Silent(sn.SET):
    """Never gives a score that counts."""

    def drop_scores(self, layer):
        from sparsenet.policies.places import BadScores

        raise BadScores("it has no opinion")


class Keyed(sn.Policy):
    """Depends on the seed behind the view's back."""

    def drop_scores(self, layer):
        return (layer.pattern.linear_places() * (layer.key % 97) % 31).float()

    def grow_scores(self, layer, places):
        return -places.float()


BROKEN = {
    Shrinking: r"drop_scores must be floating-point \[89\], got torch.float32 \[1424\] \(step 3, layer '0'\)",
    Counting: r"drop_scores must be floating-point \[89\], got torch.int64 \[89\]",
    Undefined: r"drop_scores must be finite, got 89 of 89 that are not; the layer kept its topology \(step 3",
    UndefinedGrowth: r"grow_scores must be finite, got \d+ of \d+ that are not; the layer kept its topology \(step 3",
    Writing: r"drop_scores of layer '0' must leave values as it is, got others \(step 3\)",
    Clearing: r"drop_scores of layer '0' must leave the gradient of values as it is",
    Rolling: r"drop_scores of layer '0' must not use torch's global random numbers, but layer.random",
    RollingPython: r"grow_scores of layer '0' must not use Python's global random numbers",
    RollingNumPy: r"grow_places of layer '0' must not use NumPy's global random numbers",
    Overlapping: r"grow_places must be inactive, got 27 active ones \(step 3, layer '0'\)",
    Unordered: r"grow_places must ascend, each once",
    Remembering: r"a run that goes on from step 4 must be the same, got another .* at step [69]",
    Global: r"a second run from the same seed must be the same, got another .* at step 3",
    Listing: r"state 'seen' must have one entry for each of 89 blocks, got \[3\] \(step 1, layer '0'\)",
    Rolling2: r"after_step of layer '0' must not use torch's global random numbers",
    Measuring: r"measure must leave buffers and modes as they are \(step 3\)",
    Uncopyable: r"the policy must survive copy.deepcopy, got TypeError\('it holds an open file'\)",
    Silent: r"a rewire must change the pattern, got 6 that were skipped: it has no opinion",
    Keyed: r"another seed of the Sparsifier must change only what is drawn, got another .* at step 3",
}


@pytest.mark.parametrize("policy", BROKEN, ids=lambda kind: kind.__name__)
def test_a_broken_policy_is_named_with_its_rule(policy):
    with pytest.raises(AssertionError, match=f"^{policy.__name__}: {BROKEN[policy]}"):
        check_policy(policy, **SHORT)


def test_a_policy_that_cannot_be_pickled_is_named():
    with pytest.raises(AssertionError, match="^SET: the policy must survive pickle, got .*lambda"):
        check_policy(sn.SET(lambda step: 0.3), **SHORT)


def test_a_policy_that_names_fewer_places_is_not_broken():
    class Modest(sn.SET):
        def grow_places(self, layer, count):
            return layer.random_places(count // 2)

    report = check_policy(Modest, **SHORT)
    assert 0 < report.grown < report.dropped


# --- the Sparsifier ---


class Changing(LayerMove):
    """A move that afterwards does what ``change(layer, optimizers, carried)`` does."""

    change = None

    def __init__(self, layer, optimizers, *arguments, **options):
        super().__init__(layer, optimizers, *arguments, **options)
        with torch.no_grad():
            type(self).change(layer, optimizers, self.carried)


def moments(layer, optimizers):
    return [state for o in optimizers for state in (o.state[layer.values],) if "exp_avg" in state]


def shuffle_moments(layer, optimizers, carried):
    for state in moments(layer, optimizers):
        state["exp_avg"] = state["exp_avg"].roll(1, 0)


def lose_a_digit(layer, optimizers, carried):
    for state in moments(layer, optimizers):
        state["exp_avg_sq"] *= 1 + 1e-6


def warm_grown_moments(layer, optimizers, carried):
    for state in moments(layer, optimizers):
        state["exp_avg_sq"][carried < 0] = 0.5


def count_a_step(layer, optimizers, carried):
    for state in moments(layer, optimizers):
        state["step"] += 1


def fill_grown_values(layer, optimizers, carried):
    layer.values.detach()[carried < 0] = 1e-3


def change_values(layer, optimizers, carried):
    layer.values.detach()[carried >= 0] += 1e-3


def keep_the_gradient(layer, optimizers, carried):
    layer.values.grad = torch.zeros_like(layer.values)


def replace_the_parameter(layer, optimizers, carried):
    layer.values = torch.nn.Parameter(layer.values.detach().clone())


MOVES = {
    shuffle_moments: "state 'exp_avg' of units that stay must be what it was",
    lose_a_digit: "state 'exp_avg_sq' of units that stay must be what it was",
    warm_grown_moments: "state 'exp_avg_sq' of grown units must be what the optimizer gives a new parameter, 0, got",
    count_a_step: "state 'step' is of no block and must stay 3.0, got 4.0",
    fill_grown_values: "values of grown units must be zero",
    change_values: "values of units that stay must be bit for bit what they were",
    keep_the_gradient: "values.grad must be None after a rewire",
    replace_the_parameter: "values must stay the same Parameter",
}


@pytest.mark.parametrize("change", MOVES, ids=lambda change: change.__name__)
def test_a_move_that_goes_wrong_is_noticed(change, monkeypatch):
    monkeypatch.setattr(Changing, "change", staticmethod(change))
    monkeypatch.setattr(sparsifier, "LayerMove", Changing)
    with pytest.raises(AssertionError, match=f"^SET: {MOVES[change]}.*(step 3, layer '0')"):
        check_policy(sn.SET, **SHORT)


def test_moments_of_elements_that_leave_are_noticed_where_they_stay(monkeypatch):
    def nothing(move, mask, moved, grown_state):
        move.changed, move.changed_state = None, []

    monkeypatch.setattr(LayerMove, "_set_elements", nothing)
    with pytest.raises(AssertionError, match="state 'exp_avg' of grown units must be what the optimizer gives"):
        check_policy(sn.SET, elements=0.5, **SHORT)


def quota_of(**less):
    """``Quota.of`` with some of its numbers smaller."""
    right = Quota.of

    def of(units, target, fraction):
        quota = right(units, target, fraction)
        return dataclasses.replace(quota, **{key: max(0, getattr(quota, key) - number) for key, number in less.items()})

    return of


def without_lines(scores, count, *lines):
    return select_extreme(scores, count, largest=False)


def nobody(newborn, layer, places):
    return places[:0]


def no_target(census, step, layers, *arguments, **options):
    return census.counts(layers)


def by_number(census, layers):
    return list(range(1, len(layers) + 1))


leaving = Quota.leaving


def the_largest(quota, pattern, scores, young):
    return leaving(quota, pattern, -scores, young)


def few_leave(quota, pattern, scores, young):
    return select_extreme(scores, quota.drop // 2, largest=False)


def the_first(growth, count):
    return growth.places[growth.scores_found().topk(count, largest=False).indices.sort().values]


quota_and_growth = Census.quota_and_growth


def twice_the_growth(census, layer, target, drop_fraction):
    quota, count = quota_and_growth(census, layer, target, drop_fraction)
    return quota, 2 * count


WRONG = {
    "the largest leave": (Quota, "leaving", the_largest, r"of the lowest drop scores must leave, got \d+ lower ones"),
    "units are held": (Quota, "leaving", few_leave, r"\d+ units may leave, got some held"),
    "one is not grown": (Quota, "of", quota_of(grow=1), r"must drop \d+ and grow \d+ less those held, got"),
    "one stays": (Quota, "of", quota_of(drop=1, grow=1), r"must drop 27 and grow 27 less those held, got 26 and 26"),
    "lines die": (exchange, "lowest_to_spare", without_lines, "the last unit of a (row|column) must stay while"),
    "the young leave": (Newborn, "among", nobody, "units that are too young must stay, got"),
    "no density": (Census, "targets", no_target, "density 0.4.* must leave .* weights in units to half a unit"),
    "another spread": (Census, "wanted", by_number, "units must be spread as the distribution says, got"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_sparsifier_that_goes_wrong_is_noticed(what, monkeypatch):
    owner, attribute, wrong, message = WRONG[what]
    monkeypatch.setattr(owner, attribute, wrong)
    schedule = {"density": sn.Linear(0.5, 0.2, 9), "distribution": "uniform"} if "Census" in repr(owner) else {}
    fraction = sn.Constant(0.3) if what != "the young leave" else sn.Linear(0.5, 0.4, 100)
    dense = what != "lines die"
    model = None if dense else lambda: sn.SparseMLP([40, 40, 40], 0.2, 4)
    with pytest.raises(AssertionError, match=message):
        check_policy(sn.SET(fraction), model=model, **schedule, **SHORT)


def test_growth_where_scores_are_not_highest_is_noticed(monkeypatch):
    """More places are found than come in, and the worst of them are taken."""
    monkeypatch.setattr(Growth, "settle", lambda self, count: setattr(self, "count", count))
    monkeypatch.setattr(Growth, "best", the_first)
    monkeypatch.setattr("sparsenet.policies.census.Census.quota_and_growth", twice_the_growth)
    with pytest.raises(AssertionError, match=r"units of the highest grow scores must come, got \d+ higher ones"):
        check_policy(sn.RigL, **SHORT)


def test_a_step_between_rewires_that_changes_a_layer_is_noticed(monkeypatch):
    right = sn.Sparsifier.step

    def step(self):
        update = right(self)
        self.layers["1"].values.detach().mul_(1 - 1e-6)
        return update

    monkeypatch.setattr(sn.Sparsifier, "step", step)
    with pytest.raises(AssertionError, match=r"a layer must stay as it is, got another \(step 1, layer '1'\)"):
        check_policy(sn.SET, **SHORT)


def test_a_step_that_changes_a_bias_is_noticed(monkeypatch):
    right = sn.Sparsifier.step

    def step(self):
        self.layers["1"].bias.detach().mul_(1 - 1e-6)
        return right(self)

    monkeypatch.setattr(sn.Sparsifier, "step", step)
    with pytest.raises(AssertionError, match="must leave other parameters and their state as they are"):
        check_policy(sn.SET, **SHORT)


def test_an_update_that_lies_is_noticed(monkeypatch):
    right = sparsifier.planned

    def planned(*arguments):
        plan = right(*arguments)
        return dataclasses.replace(
            plan, update=dataclasses.replace(plan.update, grown_places=plan.update.grown_places[1:])
        )

    monkeypatch.setattr(sparsifier, "planned", planned)
    with pytest.raises(AssertionError, match="the update must name the places that were grown, got 26 where 27 were"):
        check_policy(sn.SET, **SHORT)


def test_masked_elements_that_are_trained_are_noticed(monkeypatch):
    monkeypatch.setattr("sparsenet.layers._zero_masked_elements", lambda layer: layer.values.detach().add_(1e-6))
    with pytest.raises(
        AssertionError, match=r"masked elements must be exactly zero, got \d+ others \(step 1, layer '0'"
    ):
        check_policy(sn.SET, elements=0.5, **SHORT)


def test_a_momentum_that_is_not_saved_is_noticed(monkeypatch):
    right = sn.Sparsifier.state_dict

    def state_dict(self):
        return {key: value for key, value in right(self).items() if key != "watched"}

    monkeypatch.setattr(sn.Sparsifier, "state_dict", state_dict)
    with pytest.raises(AssertionError, match="^SNFS: a run that goes on from step 4 must be the same"):
        check_policy(SNFS, **SHORT)
