"""Schedules against values worked by hand, and every message they can raise."""

import dataclasses
import functools
import json
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsenet as sn
from sparsenet.densities import block_places, distribute
from sparsenet.schedules import (
    SCHEDULES,
    Complement,
    Constant,
    Cosine,
    Cubic,
    Exponential,
    Linear,
    OneShot,
    Periodic,
    Piecewise,
    Polynomial,
    as_integer,
    as_number,
    as_schedule,
    last_step,
    number_of,
    numbers_of,
    schedule_from_state,
)

RAMPS = [Linear, Cosine, Cubic, Exponential, lambda *a, **k: Polynomial(*a, **k, power=0.5)]
finite = st.floats(1e-6, 1e6)


def test_constant():
    assert [Constant(0.3)(step) for step in (0, 1, 10**9)] == [0.3, 0.3, 0.3]


@pytest.mark.parametrize(
    ("schedule", "expected"),  # at steps 10 + (0, 1, 2, 3, 4) of begin=10, steps=4
    [
        (Linear(0.9, 0.1, 4, begin=10), [0.9, 0.7, 0.5, 0.3, 0.1]),
        (Cosine(1.0, 0.0, 4, begin=10), [1.0, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4, 0.0]),
        (Cubic(1.0, 0.0, 4, begin=10), [1.0, 27 / 64, 8 / 64, 1 / 64, 0.0]),
        (Polynomial(1.0, 0.0, 4, begin=10, power=2), [1.0, 9 / 16, 4 / 16, 1 / 16, 0.0]),
        (Exponential(16.0, 1.0, 4, begin=10), [16.0, 8.0, 4.0, 2.0, 1.0]),
    ],
)
def test_ramp_values_by_hand(schedule, expected):
    assert [schedule(10 + i) for i in range(5)] == pytest.approx(expected, abs=1e-15)
    assert schedule(0) == schedule(9) == expected[0]  # clamped before
    assert schedule(15) == schedule(10**9) == expected[-1]  # and after


def test_cubic_is_zhu_and_guptas_sparsity_in_terms_of_density():
    """s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3 with s_i = 0, s_f = 0.9, t_0 = 100, n dt = 800."""
    schedule = Cubic(start=1.0, end=0.1, steps=800, begin=100)
    for step in (100, 300, 500, 700, 900):
        sparsity = 0.9 + (0.0 - 0.9) * (1 - (step - 100) / 800) ** 3
        assert schedule(step) == pytest.approx(1 - sparsity, abs=1e-15)


def test_cosine_is_rigls_drop_fraction():
    """f(t) = alpha / 2 (1 + cos(t pi / T_end)), alpha = 0.3, T_end = 75000 (Evci et al. 2020)."""
    schedule = Cosine(0.3, 0.0, 75_000)
    for step in (0, 100, 25_000, 74_900):
        assert schedule(step) == pytest.approx(0.15 * (1 + math.cos(step * math.pi / 75_000)), abs=1e-15)
    assert schedule(25_000) == pytest.approx(0.225)


def test_polynomial_of_power_1_and_3_are_linear_and_cubic():
    for step in range(12):
        assert Polynomial(0.7, 0.2, 10, power=1)(step) == pytest.approx(Linear(0.7, 0.2, 10)(step), abs=1e-15)
        assert Polynomial(0.7, 0.2, 10, power=3)(step) == pytest.approx(Cubic(0.7, 0.2, 10)(step), abs=1e-15)


def test_ramps_may_rise():
    assert Linear(0.0, 1.0, 4)(1) == 0.25
    assert Exponential(1.0, 4.0, 2)(1) == 2.0


@pytest.mark.parametrize("ramp", RAMPS)
@given(start=finite, end=finite, steps=st.integers(1, 10**6), begin=st.integers(0, 10**6))
def test_ends_are_exact_and_the_ramp_is_monotone_between_them(ramp, start, end, steps, begin):
    schedule = ramp(start, end, steps, begin)
    assert schedule(begin) == start
    assert schedule(begin + steps) == end
    values = [schedule(begin + steps * i / 16) for i in range(17)]
    ordered = sorted(values, reverse=start > end)
    assert values == pytest.approx(ordered, rel=1e-9)
    assert all(min(start, end) * (1 - 1e-9) <= v <= max(start, end) * (1 + 1e-9) for v in values)


def test_piecewise_of_numbers_changes_at_the_boundary():
    schedule = Piecewise((10, 20), (0.3, 0.2, 0.1))
    assert [schedule(step) for step in (0, 9, 10, 19, 20, 99)] == [0.3, 0.3, 0.2, 0.2, 0.1, 0.1]


def test_piecewise_pieces_count_steps_from_their_own_start():
    schedule = Piecewise([4, 8], [Linear(0.0, 1.0, 4), 1.0, Linear(1.0, 0.0, 4)])
    assert [schedule(step) for step in range(13)] == [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0]


def test_piecewise_without_boundaries_and_nested():
    assert Piecewise((), (0.5,))(7) == 0.5
    assert Piecewise((2,), (0.1, Piecewise((2,), (0.2, 0.3))))(4) == 0.3


def test_one_shot_by_hand():
    assert [OneShot(1.0, 0.1, at=10)(step) for step in (0, 9, 9.5, 10, 11, 10**9)] == [1.0, 1.0, 1.0, 0.1, 0.1, 0.1]
    assert OneShot(1.0, 0.1, at=0)(0) == 0.1


def test_periodic_is_acdc_by_hand():
    """Dense to epoch 10, then 5 epochs compressed and 5 dense in turn, compressed to the end (Peste et al. 2021)."""
    density = Periodic(before=1.0, after=0.1, period=10, after_steps=5, begin=10, end=32)
    expected = [1.0] * 10 + [0.1] * 5 + [1.0] * 5 + [0.1] * 5 + [1.0] * 5 + [0.1] * 10
    assert [density(epoch) for epoch in range(40)] == expected
    sparsity = Periodic(before=0.0, after=0.9, period=10, after_steps=5, begin=10, end=32)
    assert [Complement(sparsity)(epoch) for epoch in range(40)] == pytest.approx(expected)


def test_periodic_in_odd_sizes():
    """2 of 5 steps; the end cuts a phase of what was before, and it is no multiple of the period."""
    schedule = Periodic(0.5, 0.25, period=5, after_steps=2, begin=1, end=11)
    assert [schedule(step) for step in range(14)] == [0.5, *([0.25] * 2 + [0.5] * 3) * 2, 0.25, 0.25, 0.25]
    for_ever = Periodic(0.5, 0.25, period=5, after_steps=2)
    assert [for_ever(10**6 + i) for i in (0, 1, 1.5, 2, 4, 5)] == [0.25, 0.25, 0.25, 0.5, 0.5, 0.25]
    at_once = Periodic(0.5, 0.25, period=5, after_steps=2, begin=7, end=7)
    assert [at_once(step) for step in range(20)] == [OneShot(0.5, 0.25, at=7)(step) for step in range(20)]


def test_schedules_inside_a_periodic_one_see_the_step_itself():
    schedule = Periodic(before=1, after=Linear(0.5, 0.1, steps=40), period=10, after_steps=5, begin=10, end=30)
    steps = (9, 10, 20, 25, 30, 40)
    assert [schedule(step) for step in steps] == pytest.approx([1.0, 0.4, 0.3, 1.0, 0.2, 0.1])


def test_schedules_are_frozen_hashable_and_comparable():
    schedule = Cosine(0.3, 0, 1000)
    assert schedule == Cosine(0.3, 0.0, 1000) and hash(schedule) == hash(Cosine(0.3, 0.0, 1000))
    assert schedule != Linear(0.3, 0.0, 1000)
    assert dataclasses.asdict(schedule) == {"start": 0.3, "end": 0.0, "steps": 1000, "begin": 0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.start = 0.5
    hash(Piecewise([3], [0.1, 0.2]))


def test_numpy_numbers_become_plain_ones():
    schedule = Linear(np.float32(0.5), np.int64(0), np.int32(10))
    assert [type(getattr(schedule, f.name)) for f in dataclasses.fields(schedule)] == [float, float, int, int]


def test_as_schedule():
    assert as_schedule(0.3) == Constant(0.3)
    assert as_schedule(1) == Constant(1.0)
    schedule = Cosine(0.3, 0.0, 10)
    assert as_schedule(schedule) is schedule
    assert as_schedule(lambda step: 2.0 * step)(3) == 6.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Constant(math.nan), ValueError, "Constant: value must be a finite number, got nan"),
        (lambda: Constant("0.3"), TypeError, "Constant: value must be a finite number, got '0.3'"),
        (lambda: Constant(True), TypeError, "Constant: value must be a finite number, got True"),
        (lambda: Constant(0.1)(math.nan), ValueError, "Constant: step must be a finite number, got nan"),
        (lambda: Linear(math.inf, 0.0, 10), ValueError, "Linear: start must be a finite number, got inf"),
        (lambda: Cosine(0.3, None, 10), TypeError, "Cosine: end must be a finite number, got None"),
        (lambda: Cubic(1.0, 0.1, 0), ValueError, "Cubic: steps must be an integer >= 1, got 0"),
        (lambda: Cubic(1.0, 0.1, 10.0), TypeError, "Cubic: steps must be an integer >= 1, got 10.0"),
        (lambda: Linear(1.0, 0.1, 10, begin=-1), ValueError, "Linear: begin must be an integer >= 0, got -1"),
        (lambda: Linear(1.0, 0.1, 10, begin=True), TypeError, "Linear: begin must be an integer >= 0, got True"),
        (lambda: Linear(1.0, 0.1, 10)(math.nan), ValueError, "Linear: step must be a finite number, got nan"),
        (lambda: Linear(1.0, 0.1, 10)("3"), TypeError, "Linear: step must be a finite number, got '3'"),
        (lambda: Polynomial(1.0, 0.1, 10, power=0), ValueError, "Polynomial: power must be > 0, got 0.0"),
        (lambda: Polynomial(1.0, 0.1, 10, power="2"), TypeError, "Polynomial: power must be a finite number, got '2'"),
        (lambda: Exponential(0.0, 0.1, 10), ValueError, "Exponential: start must be > 0, got 0.0"),
        (lambda: Exponential(0.1, -1, 10), ValueError, "Exponential: end must be > 0, got -1.0"),
        (lambda: Piecewise(5, (1, 2)), TypeError, "Piecewise: boundaries must be a tuple, got 5"),
        (lambda: Piecewise((5,), 1.0), TypeError, "Piecewise: pieces must be a tuple, got 1.0"),
        (lambda: Piecewise((0,), (1, 2)), ValueError, "Piecewise: boundaries must be an integer >= 1, got 0"),
        (lambda: Piecewise((5, 5), (1, 2, 3)), ValueError, "Piecewise: boundaries must be increasing, got (5, 5)"),
        (lambda: Piecewise((5,), (1,)), ValueError, "Piecewise: pieces must be one more than boundaries (2), got 1"),
        (
            lambda: Piecewise((5,), (1, "2")),
            TypeError,
            "Piecewise: pieces must be a finite number or a schedule, got '2'",
        ),
        (lambda: OneShot(math.nan, 0.1, 5), ValueError, "OneShot: before must be a finite number, got nan"),
        (lambda: OneShot(1.0, Linear(1, 0, 2), 5), TypeError, "OneShot: after must be a finite number, got Linear("),
        (lambda: OneShot(1.0, 0.1, -1), ValueError, "OneShot: at must be an integer >= 0, got -1"),
        (lambda: OneShot(1.0, 0.1, 5.0), TypeError, "OneShot: at must be an integer >= 0, got 5.0"),
        (lambda: OneShot(1.0, 0.1, 5)(None), TypeError, "OneShot: step must be a finite number, got None"),
        (
            lambda: Periodic("1", 0.1, 4, 2),
            TypeError,
            "Periodic: before must be a finite number or a schedule, got '1'",
        ),
        (lambda: Periodic(1, math.inf, 4, 2), ValueError, "Periodic: after must be a finite number or a schedule, got"),
        (lambda: Periodic(1, 0.1, 1, 1), ValueError, "Periodic: period must be an integer >= 2, got 1"),
        (lambda: Periodic(1, 0.1, 4, 0), ValueError, "Periodic: after_steps must be an integer >= 1, got 0"),
        (lambda: Periodic(1, 0.1, 4, 4), ValueError, "Periodic: after_steps must be below period (4), got 4"),
        (lambda: Periodic(1, 0.1, 4, 2, -1), ValueError, "Periodic: begin must be an integer >= 0, got -1"),
        (lambda: Periodic(1, 0.1, 4, 2, 9, 8), ValueError, "Periodic: end must be None or at least begin (9), got 8"),
        (lambda: Periodic(1, 0.1, 4, 2, 9, 9.5), TypeError, "Periodic: end must be an integer, got 9.5"),
        (lambda: Periodic(1, 0.1, 4, 2)(math.nan), ValueError, "Periodic: step must be a finite number, got nan"),
        (lambda: Complement(None), TypeError, "Complement: schedule must be a finite number or a schedule, got None"),
        (lambda: Piecewise((), (1,))(math.inf), ValueError, "Piecewise: step must be a finite number, got inf"),
        (lambda: as_schedule(True), TypeError, "as_schedule: value must be a finite number or a schedule, got True"),
        (lambda: as_schedule("0.3"), TypeError, "as_schedule: value must be a finite number or a schedule, got '0.3'"),
        (lambda: as_schedule(None), TypeError, "as_schedule: value must be a finite number or a schedule, got None"),
        (
            lambda: as_schedule(Cosine),
            TypeError,
            "as_schedule: value must be a finite number or a schedule, got <class",
        ),
        (
            lambda: as_schedule(math.nan),
            ValueError,
            "as_schedule: value must be a finite number or a schedule, got nan",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


# --- states ---

numbers = st.floats(-1e6, 1e6) | st.integers(-100, 100)
ramps = st.one_of(
    *(st.builds(kind, numbers, numbers, st.integers(1, 50), st.integers(0, 50)) for kind in (Linear, Cosine, Cubic)),
    st.builds(Polynomial, numbers, numbers, st.integers(1, 50), power=st.floats(0.1, 5)),
    st.builds(Exponential, finite, finite, st.integers(1, 50), st.integers(0, 50)),
)
simple = st.one_of(st.builds(Constant, numbers), ramps, st.builds(OneShot, numbers, numbers, st.integers(0, 90)))


@st.composite
def periodic(draw, values):
    period, begin = draw(st.integers(2, 20)), draw(st.integers(0, 40))
    end = draw(st.none() | st.integers(begin, 90))
    return Periodic(draw(values), draw(values), period, draw(st.integers(1, period - 1)), begin, end)


@st.composite
def piecewise(draw, values):
    boundaries = sorted(draw(st.sets(st.integers(1, 90), max_size=3)))
    return Piecewise(boundaries, [draw(values) for _ in range(len(boundaries) + 1)])


schedules = st.recursive(
    simple,
    lambda inner: st.one_of(periodic(inner | numbers), piecewise(inner | numbers), st.builds(Complement, inner)),
    max_leaves=6,
)


@given(schedules, st.lists(st.integers(0, 200) | st.floats(0, 200), min_size=1, max_size=5))
def test_every_schedule_comes_back_from_its_state(schedule, steps):
    again = schedule_from_state(json.loads(json.dumps(schedule.state_dict())))
    assert again == schedule and repr(again) == repr(schedule) and hash(again) == hash(schedule)
    assert [again(step) for step in steps] == [schedule(step) for step in steps]


@given(schedules, st.lists(st.integers(0, 300), min_size=1, max_size=5))
def test_a_schedule_stays_the_same_from_its_last_step_on(schedule, later):
    last = last_step(schedule)
    if last is None:
        assert "end=None" in repr(schedule), "without an end it alternates for ever"
    else:
        assert {schedule(last + more) for more in later} == {schedule(last)}


ONE_OF_EACH = (
    Constant(0.3),
    Linear(1, 0.5, 7, begin=3),
    Cosine(0.3, 0, 9),
    Cubic(1, 0.1, 9),
    Polynomial(1, 0.1, 9, power=2),
    Exponential(1, 0.1, 9),
    Piecewise((), (0.3,)),
    OneShot(1, 0.1, at=0),
    Periodic(1, Cosine(0.3, 0, 9), 5, 3, end=11),
    Complement(0.25),
)


def test_one_of_each_comes_back_from_its_state():
    assert [type(schedule) for schedule in ONE_OF_EACH] == list(SCHEDULES.values())
    for schedule in ONE_OF_EACH:
        again = schedule_from_state(json.loads(json.dumps(schedule.state_dict())))
        assert again == schedule and [again(step) for step in range(15)] == [schedule(step) for step in range(15)]


def test_states_by_hand():
    assert OneShot(1, 0.1, at=5).state_dict() == {"kind": "OneShot", "before": 1.0, "after": 0.1, "at": 5}
    schedule = Complement(Piecewise((3,), (1, Linear(1, 0, 2))))
    assert schedule.state_dict() == {
        "kind": "Complement",
        "schedule": {
            "kind": "Piecewise",
            "boundaries": [3],
            "pieces": [
                {"kind": "Constant", "value": 1.0},
                {"kind": "Linear", "start": 1.0, "end": 0.0, "steps": 2, "begin": 0},
            ],
        },
    }


@dataclasses.dataclass(frozen=True)
class Twice(Linear):
    """Somebody's own schedule."""

    def __call__(self, step):
        return 2 * super().__call__(step)


@pytest.mark.parametrize(
    "own",
    [lambda step: 0.5, functools.partial(max, 0.1), Twice(1.0, 0.0, 4)],
    ids=["function", "partial", "subclass"],
)
def test_a_function_has_no_state(own):
    for schedule in (Complement(own), Piecewise((3,), (0.5, own)), Periodic(own, 0.1, 4, 2)):
        with pytest.raises(
            TypeError, match="state_dict: a schedule must be one of sparsenet's own to have a state, got"
        ):
            schedule.state_dict()


LINEAR = {"kind": "Linear", "start": 1.0, "end": 0.0, "steps": 4, "begin": 0}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (0.3, TypeError, "schedule_from_state: state must be what state_dict gives, got 0.3"),
        ([LINEAR], TypeError, "schedule_from_state: state must be what state_dict gives, got [{"),
        ({}, ValueError, "schedule_from_state: kind must be one of Constant, Linear, "),
        ({"kind": "Sawtooth"}, ValueError, "Periodic, Complement, got 'Sawtooth'"),
        ({"kind": ["Linear"]}, ValueError, "Complement, got ['Linear']"),
        (
            {"kind": "Linear"},
            ValueError,
            "schedule_from_state: the arguments of Linear must be start, end, steps, begin, got none",
        ),
        (LINEAR | {"power": 2}, ValueError, "must be start, end, steps, begin, got start, end, steps, begin, power"),
        (LINEAR | {"steps": 0}, ValueError, "Linear: steps must be an integer >= 1, got 0"),
        (LINEAR | {"start": LINEAR}, TypeError, "Linear: start must be a finite number, got Linear("),
        (
            {"kind": "Complement", "schedule": {"kind": "Sawtooth"}},
            ValueError,
            "schedule_from_state: kind must be one of",
        ),
        ({"kind": "Piecewise", "boundaries": [[3]], "pieces": [1, 2]}, TypeError, "Piecewise: boundaries must be an"),
    ],
)
def test_a_state_of_something_else_is_refused(state, error, message):
    with pytest.raises(error, match=re.escape(message)):
        schedule_from_state(state)


# --- numbers of every kind ---

KINDS_OF_NUMBER = {
    "python": (int, float),
    "numpy 64": (np.int64, np.float64),
    "numpy 32": (np.int32, np.float32),
    "numpy unsigned, half": (np.uint32, np.float16),
    "numpy array without dimension": (np.array, np.array),
    "tensor": (torch.tensor, torch.tensor),
    "tensor with gradient": (torch.tensor, lambda v: torch.tensor(float(v), requires_grad=True)),
}
MODEL = functools.partial(sn.SparseMLP, [64, 64, 10], 0.5, 8)
TAKERS = {  # name -> called with how an integer and a fraction are made; what it gives is compared and put into JSON
    "schedules": lambda i, f: [
        (s.start, s.end, s.steps, s.begin, s(i(5)), s(f(5.5))) for s in (Linear(f(1), f(0.25), i(8), i(2)),)
    ],
    "Polynomial": lambda i, f: Polynomial(f(1), f(0.25), i(8), power=f(2.0)).power,
    "Constant": lambda i, f: [Constant(f(0.5)).value, Constant(i(1)).value, Constant(0.5)(i(3))],
    "Piecewise": lambda i, f: [
        (s.boundaries, s(i(3)), s(i(4)), s(f(5.0))) for s in (Piecewise((i(4),), (f(0.5), Linear(1.0, 0.0, 2))),)
    ],
    "OneShot": lambda i, f: OneShot(f(1), f(0.25), i(8)).state_dict(),
    "Periodic": lambda i, f: Periodic(f(1), f(0.25), i(8), i(4), i(2), i(20)).state_dict(),
    "as_schedule": lambda i, f: as_schedule(f(0.25)).value,
    "distribute": lambda i, f: distribute([(i(64), i(64)), (i(64), i(32))], f(0.5), block_size=i(8), min_blocks=i(1)),
    "block_places": lambda i, f: block_places((i(64), i(3)), i(8)),
    "BlockPattern": lambda i, f: [
        (p.shape, p.block_size, p.values_shape) for p in (sn.BlockPattern([0, 1], [0], (i(16), i(16)), i(16)),)
    ],
    "BlockPattern.random": lambda i, f: [
        sn.BlockPattern.random((i(64), i(64)), f(0.5), i(8)).num_blocks,
        sn.BlockPattern.random((64, 64), block_size=8, num_blocks=i(9)).num_blocks,
    ],
    "BlockPattern.from_dense": lambda i, f: sn.BlockPattern.from_dense(torch.ones(16, 16), f(0.5), i(8)).num_blocks,
    "BlockPattern.from_mask": lambda i, f: sn.BlockPattern.from_mask(torch.eye(2).bool(), i(8), (i(16), i(16))).shape,
    "SparseLinear": lambda i, f: [
        (m.in_features, m.out_features, m.block_size, m.density)
        for m in (sn.SparseLinear(i(64), i(32), density=f(0.5), block_size=i(8)),)
    ],
    "sparsify_": lambda i, f: [
        layer[:4] for layer in sn.sparsify_(torch.nn.Linear(64, 64), f(0.5), i(8)).layers.values()
    ],
    "policies": lambda i, f: [sn.SET(f(0.25)).drop_fraction, sn.RigL(f(0.25)).drop_fraction_at(i(3))],
    "MemoryBudget": lambda i, f: sn.MemoryBudget(i(4096)).bytes,
    "plan": lambda i, f: [
        (p.sizes, p.batch_size, p.block_sizes, p.budget_bytes)
        for p in (sn.plan([i(64), i(64), i(10)], None, i(16), block_size=i(8), density=f(0.5), drop_fraction=f(0.25)),)
    ],
    "plan of a budget": lambda i, f: sn.plan([64, 64, 10], i(2**25), threads=i(1), input_bytes=i(4)).budget_bytes,
    "norms": lambda i, f: sn.functional.block_gradient_squared_norms(
        torch.ones(2, 8), torch.ones(2, 8), i(4), (i(0), i(1))
    ).tolist(),
    "TriStateReLU": lambda i, f: [
        (g.num_features, g.width_gate.tolist(), g.depth_gate.item())
        for g in (sn.TriStateReLU(i(3), width_start=f(0.5), depth_start=f(0.25)),)
    ],
    "Compactor": lambda i, f: [
        (c.every, c.begin, c.end, c.patience) for c in (sn.Compactor(MODEL(), None, i(3), i(1), i(9), patience=i(2)),)
    ],
    "batches": lambda i, f: [
        x.shape[0] for x, _ in sn.data.batches(torch.ones(5, 2), torch.zeros(5, dtype=torch.int64), i(2))
    ],
    "split": lambda i, f: [
        rows.tolist() for rows in sn.data.split(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), f(0.25), seed=i(3))
    ],
    "TrainConfig": lambda i, f: [
        (c.batch_size, c.density, c.seed, c.hidden, c.lr, c.to_json())
        for c in (sn.TrainConfig(batch_size=i(32), density=f(0.5), seed=i(3), hidden=(i(64), i(32)), lr=f(0.5)),)
    ],
}


@pytest.mark.parametrize("kind", KINDS_OF_NUMBER)
@pytest.mark.parametrize("taker", TAKERS)
def test_row83_numbers_of_every_kind_mean_what_python_numbers_mean(taker, kind):
    """And they are stored as Python's own, which JSON can hold."""
    torch.manual_seed(0)
    expected = TAKERS[taker](int, float)
    torch.manual_seed(0)
    got = TAKERS[taker](*KINDS_OF_NUMBER[kind])
    assert got == expected and json.dumps(got) == json.dumps(expected)


def test_row83_a_saved_step_is_a_number_of_the_file(tmp_path):
    sn.save(tmp_path / "a.safetensors", MODEL(), step=np.int64(7))
    assert sn.load(tmp_path / "a.safetensors", MODEL()).step == 7


NO_NUMBERS = [
    True,
    np.True_,
    torch.tensor(True),
    "1",
    None,
    [1],
    np.array([1]),
    torch.tensor([1]),
    1j,
    torch.tensor(1j),
]


@pytest.mark.parametrize("wrong", [*NO_NUMBERS, torch.tensor(1, device="meta")], ids=repr)
def test_row83_what_is_no_number_is_a_sentence(wrong):
    assert number_of(wrong) is None
    for action, message in (
        (lambda: Constant(wrong), "Constant: value must be a finite number, got"),
        (lambda: Linear(1.0, 0.0, wrong), "Linear: steps must be an integer >= 1, got"),
        (lambda: distribute([(8, 8)], wrong), r"distribute: density must be a number in \[0, 1\], got"),
        (lambda: distribute([(8, 8)], 0.5, block_size=[wrong]), "distribute: block_size must be an integer >= 1, got"),
        (lambda: sn.BlockPattern.random((8, 8), wrong, 8), r"BlockPattern: density must lie in \[0, 1\], got"),
        (lambda: sn.BlockPattern.random((8, 8), 0.5, wrong), "BlockPattern: block_size must be one of 1, 4, "),
        (lambda: sn.BlockPattern.random((8, wrong), 0.5, 8), r"BlockPattern: shape must be two integers \(out, in\)"),
        (lambda: sn.BlockPattern.random((8, 8), 0.5, 8, num_blocks=[wrong]), "num_blocks must be an integer, got"),
        (lambda: sn.functional.block_gradient_squared_norms(torch.ones(2, 8), torch.ones(2, 8), wrong), "one of 1, 4"),
        (lambda: sn.data.batches(torch.ones(2, 2), torch.zeros(2), wrong), "batch_size must be an integer >= 1, got"),
        (lambda: sn.plan([8, wrong], density=0.5), "plan: sizes must be integers of at least 1, got"),
        (lambda: sn.plan([8, 8], density=0.5, batch_size=wrong), "plan: batch_size must be an integer >= 1, got"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            action()
    if not isinstance(wrong, str):
        with pytest.raises(
            TypeError, match="MemoryBudget: amount must be text such as '512MiB' or an integer of bytes"
        ):
            sn.MemoryBudget(wrong)


@pytest.mark.parametrize("make", [float, np.float32, np.array, torch.tensor])
def test_row83_nan_and_halves_are_refused_whatever_holds_them(make):
    for value in (math.nan, math.inf):
        for action in (lambda v: Constant(v), lambda v: distribute([(8, 8)], v), lambda v: sn.SET(v)):
            with pytest.raises(ValueError, match="must be"):
                action(make(value))
        with pytest.raises(ValueError, match="BlockPattern: density must lie in"):
            sn.BlockPattern.random((8, 8), make(value), 8)
    with pytest.raises(TypeError, match="Linear: steps must be an integer >= 1, got"):
        Linear(1.0, 0.0, make(3.0))


def test_row70_the_step_from_which_a_schedule_stays_the_same():
    assert last_step(Linear(0.5, 0.1, steps=100, begin=20)) == 120
    assert last_step(Constant(0.3)) == 0
    assert last_step(lambda step: 0.1) is None
    assert last_step(sn.Piecewise((10, 30), (0.5, 0.3, Linear(0.3, 0.1, steps=40)))) == 70
    assert last_step(sn.Piecewise((10,), (0.5, lambda step: 0.1))) is None
    assert last_step(OneShot(1.0, 0.1, at=30)) == 30
    assert last_step(Periodic(1.0, 0.1, 10, 5, begin=20, end=60)) == 60
    assert last_step(Periodic(1.0, 0.1, 10, 5)) is None
    assert last_step(Periodic(1.0, Linear(0.5, 0.1, steps=80), 10, 5, end=60)) == 80
    assert last_step(Periodic(1.0, lambda step: 0.1, 10, 5, end=60)) is None
    assert last_step(Periodic(lambda step: 0.5, 0.1, 10, 5, end=60)) == 60
    complement = Complement(Linear(0.5, 0.9, steps=8))
    assert last_step(complement) == 8 and [complement(step) for step in (0, 4, 9)] == pytest.approx([0.5, 0.3, 0.1])


def test_row83_the_helpers():
    assert as_number("f", "x", np.float32(0.5), within=(0, 1)) == 0.5 and type(as_number("f", "x", 1)) is float
    assert as_integer("f", "x", np.int8(-3)) == -3 and type(as_integer("f", "x", torch.tensor(3))) is int
    assert numbers_of(torch.tensor([1, 2])) == [1, 2] and numbers_of(3) == [None] and numbers_of("12") == [None, None]
