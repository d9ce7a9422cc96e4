"""Every policy with every schedule, distribution, optimizer and mask in pairs; and the checker itself, which must fail.

The everyday part takes some of the combinations, so that every policy is there with and without element masks; all of
them run under ``slow``.
"""

import dataclasses
import itertools
import random
import time

import numpy as np
import pytest
import torch

import sparsenet as sn
from sparsenet import sparsifier
from sparsenet.functional import select_extreme
from sparsenet.optimizer_state import LayerMove
from sparsenet.policies import POLICIES, SNFS, exchange
from sparsenet.policies.census import Census
from sparsenet.policies.exchange import Newborn, Quota
from sparsenet.policies.growth import Growth
from sparsenet.testing import PROPERTIES, check_policy, conformance_table
from sparsenet.testing.combinations import FACTORS, check_combination, combinations, is_allowed, pairwise

pytestmark = pytest.mark.usefixtures("one_thread")

SHORT = {"steps": 9, "every": 3}
ALL = combinations()


def name(combination: dict[str, str]) -> str:
    return "-".join(combination.values())


def everyday(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The first with each policy, with and without masks, and the first with any value that these lack."""
    seen, found = set(), []
    for row in rows:
        kind = row["policy"], row["elements"] == "blocks"
        if kind not in seen:
            seen |= {kind, *row.items()}
            found.append(row)
    for row in rows:
        if set(row.items()) - seen:
            seen |= set(row.items())
            found.append(row)
    return found


EVERYDAY = everyday(ALL)


@pytest.mark.parametrize("combination", EVERYDAY, ids=name)
def test_some_combinations(combination):
    check_combination(combination)


@pytest.mark.slow
@pytest.mark.parametrize("combination", [row for row in ALL if row not in EVERYDAY], ids=name)
def test_the_other_combinations(combination):
    check_combination(combination)


# --- what the combinations are ---


def test_every_pair_that_is_allowed_is_in_a_combination_and_no_other():
    items = [(factor, value) for factor, values in FACTORS.items() for value in values]
    wanted = {(a, b) for a, b in itertools.combinations(items, 2) if a[0] != b[0] and is_allowed(a, b)}
    covered = {pair for row in ALL for pair in itertools.combinations(row.items(), 2)}
    assert covered == wanted
    assert set(FACTORS["policy"]) > set(POLICIES)
    assert len({name(row) for row in ALL}) == len(ALL)


def test_the_everyday_combinations_have_every_value():
    assert {item for row in EVERYDAY for item in row.items()} == {
        (f, v) for f, values in FACTORS.items() for v in values
    }
    assert {(row["policy"], row["elements"] == "blocks") for row in EVERYDAY} == {
        (policy, masked) for policy in FACTORS["policy"] for masked in (True, False)
    }


def test_pairwise_by_hand():
    """Two factors have no smaller cover than all pairs; a forbidden pair is in none."""
    assert pairwise({"a": "01", "b": "01"}, lambda one, other: True) == [
        {"a": "0", "b": "0"},
        {"a": "0", "b": "1"},
        {"a": "1", "b": "0"},
        {"a": "1", "b": "1"},
    ]
    found = pairwise({"a": "01", "b": "01"}, lambda one, other: (one[1], other[1]) != ("0", "1"))
    assert {"a": "0", "b": "1"} not in found and len(found) == 3


# --- what the report says ---


def test_a_report_counts_by_hand():
    """24 + 24 + 24 + (24 - 5) + (24 - 8) + (24 - 11) + 8 steps; (6 + 6 + 2) rewires of 3 layers."""
    report = check_policy(sn.SET(0.25), model=lambda: sn.SparseMLP([16, 16, 16, 16], 0.75, 4))
    assert (report.policy, report.steps, report.rewires) == ("SET", 128, 42)
    assert report.dropped == report.grown == 14 * 3 * 3 and report.skipped == 0  # a quarter of 12 blocks
    assert set(report.properties) == set(PROPERTIES) - {"masks"}
    assert "masks" in check_policy(sn.SET, elements="2:4", **SHORT).properties


def test_a_model_data_and_an_optimizer_of_ones_own_and_torchs_generator_is_left_alone():
    model = torch.nn.Sequential(sn.SparseLinear(20, 24, density=0.5, block_size=4), torch.nn.Dropout(0.5))
    before, state = model[0].pattern, torch.get_rng_state()
    data = [(torch.ones(6, 20) * i, torch.zeros(6, 24)) for i in range(1, 3)]
    report = check_policy(sn.RigL(), model=model, data=data, optimizer=lambda p: torch.optim.Adagrad(p, 0.1), **SHORT)
    assert report.grown == report.dropped > 0
    assert model[0].pattern is before and torch.equal(torch.get_rng_state(), state)


def test_layers_that_are_skipped_are_counted_with_the_reason():
    """Without outputs that differ there is no gradient where there is no block."""
    zeros = [(torch.zeros(4, 20), torch.zeros(4, 24)), (torch.ones(4, 20), torch.zeros(4, 24))]
    model = torch.nn.Sequential(sn.SparseLinear(20, 24, density=0.5, block_size=4))
    report = check_policy(sn.RigL, model=model, data=zeros, **SHORT)
    assert 0 < report.skipped < report.rewires
    assert report.reasons == ("the gradient of every inactive place was zero",)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 5, "every": 2}, "steps must be at least three times every (2), got 5"),
        ({"every": 0}, "check_policy: every must be an integer >= 1, got 0"),
    ],
)
def test_bad_numbers_are_refused(arguments, message):
    with pytest.raises(ValueError) as error:
        check_policy(sn.SET, **arguments)
    assert message in str(error.value)


def test_something_else_than_a_policy_is_refused():
    with pytest.raises(TypeError, match="check_policy: make_policy must be or make a sparsenet Policy, got 'set'"):
        check_policy(lambda: "set")


# --- policies that break a rule ---


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
    Remembering: r"a run that goes on from a file of step 4 must be the same, got another .* at step [69]",
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


# --- a Sparsifier that breaks a rule ---


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
    with pytest.raises(AssertionError, match="^SNFS: a run that goes on from a file of step 4 must be the same"):
        check_policy(SNFS, **SHORT)


# --- the table ---


def test_the_table_counts_by_policy_and_says_what_failed(monkeypatch):
    rows = [row for policy in ("static", "set") for row in ALL if row["policy"] == policy][:13:4]
    text = conformance_table(rows)
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    assert [line.split("|")[1].strip() for line in lines] == ["`static`", "`set`"]
    assert "✗" not in text and sum(int(line.split("|")[2].split()[1]) for line in lines) == 4
    began = time.monotonic()
    monkeypatch.setattr(sparsifier, "LayerMove", Changing)
    monkeypatch.setattr(Changing, "change", staticmethod(fill_grown_values))
    text = conformance_table([row for row in ALL if (row["policy"], row["elements"]) == ("set", "blocks")][:1])
    assert "✗" in text and "values of grown units must be zero" in text and time.monotonic() - began < 60
