"""Schedules against values worked by hand, and every message they can raise."""

import dataclasses
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsenet.schedules import Constant, Cosine, Cubic, Exponential, Linear, Piecewise, Polynomial, as_schedule

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
