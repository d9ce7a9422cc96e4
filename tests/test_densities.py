"""Distributions of a density over layers: hand-worked cases, properties, and every message."""

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparsenet.densities import DISTRIBUTIONS, apportion, block_places, choose_block_size, distribute, proportions

MLP = [(4096, 784), (4096, 4096), (10, 4096)]


@pytest.mark.parametrize(
    ("shape", "block_size", "places"),
    [
        ((4, 6), 1, 24),
        ((4, 6), 4, 2),
        ((10, 4096), 32, 128),  # 1 row of 10 x 32 blocks, stored whole
        ((33, 1), 32, 2),
        ((8, 3, 3, 3), 4, 2 * 7),  # 27 columns in 7 blocks
        ((8, 3, 5), 1, 120),
        ((0, 5), 4, 0),
        (torch.Size([2, 3]), 1, 6),
    ],
)
def test_block_places(shape, block_size, places):
    assert block_places(shape, block_size) == places


def test_uniform_by_hand():
    assert distribute([(10, 10), (20, 20)], 0.25) == [25, 100]
    # places 6, 6, 4: 1.8, 1.8 and 1.2 of a total of round(4.8) = 5: remainders .8, .8 win
    assert distribute([(2, 3), (3, 2), (2, 2)], 0.3) == [2, 2, 1]
    # 3 x 1.5 of round(4.5) = 5 (half up): the earlier layers win the tie
    assert distribute([(1, 3)] * 3, 0.5) == [2, 2, 1]


def test_erdos_renyi_by_hand():
    # counts = eps (in + out): 20, 110, 101 -> 231 eps = 0.21 * 1200 = 252 -> eps = 12 / 11; the last layer needs
    # 110.18 of its 100 places: dense; then eps = 152 / 130: 23.4 and 128.6
    assert distribute([(10, 10), (100, 10), (1, 100)], 0.21, "erdos_renyi") == [23, 129, 100]


def test_erdos_renyi_caps_more_than_once():
    # 4, 11, 101, 200 of places 4, 10, 100, 10000, total round(0.03 * 10114) = 303: eps = 303 / 316 caps layer 1
    # (10.5 > 10); 293 / 305 leaves 3.8, 97.03, 192.1
    assert distribute([(2, 2), (10, 1), (100, 1), (100, 100)], 0.03, "er") == [4, 10, 97, 192]
    # total 506: eps = 1.60 caps the first three at once, the last takes 506 - 114
    assert distribute([(2, 2), (10, 1), (100, 1), (100, 100)], 0.05, "er") == [4, 10, 100, 392]


def test_capping_one_layer_can_cap_another():
    # ten layers of weight 2 and 1 place, then weights 101, 200 of 100, 10000 places; total 311: eps = 311 / 321 = 0.969
    # caps only the ten (1.94 > 1; 97.9 < 100); then eps = 301 / 301 = 1 caps the next (101 > 100); the last takes 201
    assert distribute([(1, 1)] * 10 + [(100, 1), (100, 100)], 311 / 10110, "er") == [1] * 10 + [100, 201]


def test_erdos_renyi_of_blocks_counts_block_rows_and_columns():
    # block grids 128 x 25, 128 x 128, 1 x 128: 153, 256, 129 of 0.1 * 19712 -> eps = 3.66 caps the last at 128;
    # then eps = (1971 - 128) / 409 = 4.506: 689.4 and 1153.6
    assert distribute(MLP, 0.1, "erdos_renyi", block_size=32) == [689, 1154, 128]


def test_aliases_and_kernels():
    assert distribute(MLP, 0.05, "er", block_size=16) == distribute(MLP, 0.05, "erdos_renyi", block_size=16)
    assert distribute(MLP, 0.05, "erk", block_size=16) == distribute(MLP, 0.05, "erdos_renyi", block_size=16)
    # places 4*2*9 = 72 and 8*4 = 32; total 52. er: 72 (6/8), 32 (12/32) = 54, 12 -> eps = 52/66: 42.5, 9.5 (tie: first)
    assert distribute([(4, 2, 3, 3), (8, 4)], 0.5, "er") == [43, 9]
    # erk: 4+2+3+3 = 12 and 12: 26 each
    assert distribute([(4, 2, 3, 3), (8, 4)], 0.5, "erk") == [26, 26]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_density_zero_and_one_are_exact(distribution):
    shapes = [*MLP, (16, 8, 3, 3), (0, 7)]
    places = [block_places(shape, 32) for shape in shapes]
    assert distribute(shapes, 0, distribution, block_size=32) == [0] * 5
    assert distribute(shapes, 0.0, distribution, block_size=32) == [0] * 5
    assert distribute(shapes, 1, distribution, block_size=32) == places
    assert distribute([], 0.5, distribution) == []


def test_every_layer_gets_a_block_and_the_rest_pays_for_it():
    # total round(0.02 * 202) = 4; the small layers' shares are 0.02 each, yet each gets its block
    assert distribute([(1, 1), (10, 20), (1, 1)], 0.02) == [1, 2, 1]
    assert distribute([(1, 1), (10, 20), (1, 1)], 1e-12) == [1, 1, 1]  # more than asked, never an empty layer
    assert distribute([(1, 2), (10, 20)], 0.1, min_blocks=5) == [2, 18]
    # total 15 of 303: shares 0.05 x 3, 4.95, 9.90; floors with the minimum are 1 x 3, 4, 9 = 16: the last, which has
    # the least claim to more, gives one
    assert distribute([(1, 1), (1, 1), (1, 1), (10, 10), (10, 20)], 0.05) == [1, 1, 1, 4, 8]


@given(
    st.lists(st.lists(st.integers(0, 200), min_size=2, max_size=4), min_size=1, max_size=6),
    st.floats(0, 1),
    st.sampled_from(sorted(DISTRIBUTIONS)),
    st.sampled_from([1, 4, 32]),
)
def test_counts_are_in_range_and_sum_to_the_target(shapes, density, distribution, block_size):
    counts = distribute(shapes, density, distribution, block_size=block_size)
    places = [block_places(shape, block_size) for shape in shapes]
    least = [min(1, p) if density > 0 else 0 for p in places]
    assert all(low <= n <= p for low, n, p in zip(least, counts, places, strict=True))
    assert sum(counts) == max(math.floor(density * sum(places) + 0.5), sum(least))
    assert counts == distribute(shapes, density, distribution, block_size=block_size)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=2, max_size=6), st.floats(0.01, 0.99))
def test_erdos_renyi_layers_below_density_one_share_one_eps(shapes, density):
    counts = distribute(shapes, density, "er")
    slack = len(shapes)  # rounding, and what the one-block minimum of the others can take
    open_layers = [(n, o + i) for (o, i), n in zip(shapes, counts, strict=True) if 1 < n < o * i - slack]
    assert max(((n - slack) / w for n, w in open_layers), default=0) <= min(
        ((n + slack) / w for n, w in open_layers), default=0
    )


def test_row69_apportioning_by_hand():
    """Proportions 5, 3, 1: block k is due at (k + 1/2) / p: .1 .17 .3 .5 .5 .5 .7 .83 .9; ties to the earlier layer."""
    room, none, ones = [9, 9, 9], [0, 0, 0], [1, 1, 1]
    by_total = [apportion([5, 3, 1], total, none, room, ones) for total in range(10)]
    assert by_total[:6] == [[0, 0, 0], [1, 0, 0], [1, 1, 0], [2, 1, 0], [3, 1, 0], [3, 2, 0]]
    assert by_total[6:] == [[3, 2, 1], [4, 2, 1], [4, 3, 1], [5, 3, 1]]
    assert apportion([5, 3, 1], 9, none, [2, 9, 9], ones) == [
        2,
        5,
        2,
    ]  # what a bound takes, the others get
    assert apportion([5, 3, 1], 2, ones, room, ones) == [1, 1, 1]  # the least alone is more
    assert apportion([5, 0, 1], 9, [0, 2, 0], room, ones) == [6, 2, 1]
    assert apportion([1, 4], 24, [0, 0], [9, 99], [16, 4]) == [1, 2]  # weights: due at .125 (4), .375 (4), .5 (16)
    assert apportion([1, 4], 15, [0, 0], [9, 99], [16, 4]) == [0, 2]  # 7 left are less than half of 16


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(1, 60), st.sampled_from([1, 16, 64])), min_size=1, max_size=6),
    st.lists(st.floats(0, 1), min_size=2, max_size=5),
)
def test_row69_no_count_rises_where_the_total_falls(layers, shares):
    wanted, most, sizes = zip(*layers, strict=True)
    full = sum(m * size for m, size in zip(most, sizes, strict=True))
    before = list(most)
    for share in sorted(shares, reverse=True):
        now = apportion(wanted, share * full, [0] * len(most), most, sizes)
        assert all(a <= b for a, b in zip(now, before, strict=True))
        before = now


def test_proportions_by_hand():
    assert proportions([(64, 32), (8, 64)], [8, 4], "uniform") == [32, 32]
    # places times (out + in) / (out * in), sizes in whole blocks: 32 * 96 / 2048 and 32 * 72 / 512
    assert proportions([(64, 32), (8, 64)], [8, 4], "erdos_renyi") == [1.5, 4.5]


def test_the_same_memory_by_hand():
    # 252 weights of 1200: 84 each; the layer of 100 places is not full yet
    assert distribute([(10, 10), (100, 10), (1, 100)], 0.21, "memory") == [84, 84, 84]
    # 600 weights: two layers are full with 100, the third takes 400
    assert distribute([(10, 10), (100, 10), (1, 100)], 0.5, "memory") == [100, 400, 100]
    # blocks of 8 and 4, 2560 weights in all, 1280 to share: 640 each, and so 10 blocks of 64 and 40 of 16; but the
    # second layer has 32 places, 512 weights, and 768 are left to the first: 12
    assert distribute([(64, 32), (8, 64)], 0.5, "memory", block_size=[8, 4]) == [12, 32]
    assert proportions([(64, 32), (8, 64)], [8, 4], "memory") == [1 / 64, 1 / 16]


def test_the_same_memory_counts_what_is_stored_of_convolutions():
    # 3 inputs under a kernel of 3 x 3 are 27 columns: 2 blocks of 16, not the 9 that 3 inputs and a kernel need apart
    assert proportions([(64, 3, 3, 3), (64, 64, 3, 3), (10, 64)], [16, 16, 16], "memory") == [1 / 256] * 3
    # places 8, 144, 4: 40 % of 156 is 62: 8 and 4 are full, 50 remain
    assert distribute([(64, 3, 3, 3), (64, 64, 3, 3), (10, 64)], 0.4, "memory", block_size=16) == [8, 50, 4]


def test_relative_densities_of_ones_own_by_hand():
    # densities 1 : 2 : 4 of places 100, 200, 50: 100 + 400 + 200 = 700 shares of 175 blocks
    shapes = [(10, 10), (20, 10), (5, 10)]
    assert distribute(shapes, 0.5, [1, 2, 4]) == [25, 100, 50]
    assert distribute(shapes, 0.5, (0.1, 0.2, 0.4)) == distribute(shapes, 0.5, torch.tensor([1, 2, 4])) == [25, 100, 50]
    assert distribute(shapes, 0.5, [1, 1, 1]) == distribute(shapes, 0.5, "uniform")
    assert distribute([], 0.5, []) == distribute([], 0.5, ()) == []
    # very different scales are scales all the same
    assert distribute(shapes, 0.5, [1e300, 2e300, 4e300]) == distribute(shapes, 0.5, [1e-300, 2e-300, 4e-300])


def test_a_relative_density_of_zero_waits_until_the_others_are_full():
    shapes = [(10, 10), (20, 10), (5, 10)]
    assert distribute(shapes, 0.5, [1, 0, 4]) == [100, 25, 50]  # 175: 150 fill two layers
    assert distribute(shapes, 0.2, [1, 0, 4]) == [23, 1, 46]  # 70 less the one block of the second, 1 : 2
    assert distribute(shapes, 0.2, [0, 1, 0], min_blocks=3) == [3, 64, 3]
    assert distribute(shapes, 1, [0, 1, 0]) == [100, 200, 50]
    large = (8192, 8192)
    assert distribute([large, large], 0.5, [0, 1e-6]) == [1, 8192**2 - 1]
    assert distribute([large, large], 0.75, [0, 1e-6]) == [8192**2 // 2, 8192**2]


def test_row81_the_chosen_block_size_by_hand():
    fan_ins = (960, 959, 480, 479, 240, 239, 60, 59)  # 3 blocks of 32, 16 and 8; 1.5 of 4
    assert [choose_block_size(fan_in, 0.1) for fan_in in fan_ins] == [32, 16, 16, 8, 8, 4, 4, 1]
    assert choose_block_size(0, 0.1) == choose_block_size(4096, 0.0) == 1


def test_large_shapes_stay_exact():
    shape = (65_536, 65_536)
    assert distribute([shape], 0.005, block_size=32) == [20_972]  # 2048 * 2048 * 0.005 = 20971.52
    assert distribute([shape, shape], 0.5) == [2**31, 2**31]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: distribute(MLP, 1.5), ValueError, "distribute: density must be a number in [0, 1], got 1.5"),
        (lambda: distribute(MLP, -0.1), ValueError, "distribute: density must be a number in [0, 1], got -0.1"),
        (lambda: distribute(MLP, math.nan), ValueError, "distribute: density must be a number in [0, 1], got nan"),
        (lambda: distribute(MLP, True), TypeError, "distribute: density must be a number in [0, 1], got True"),
        (lambda: distribute(MLP, "0.1"), TypeError, "distribute: density must be a number in [0, 1], got '0.1'"),
        (
            lambda: distribute(MLP, 0.1, "erdos"),
            ValueError,
            "distribute: distribution must be one of uniform, erdos_renyi, er, erk, memory, or one number >= 0 per "
            "shape, got 'erdos'",
        ),
        (lambda: distribute(MLP, 0, "erdos"), ValueError, "distribute: distribution must be one of"),
        (lambda: distribute(MLP, 0.1, ["er"]), TypeError, "or one number >= 0 per shape, got ['er']"),
        (lambda: distribute(MLP, 0.1, {0: 1.0, 1: 1.0, 2: 1.0}), TypeError, "per shape, got {0: 1.0,"),
        (lambda: distribute(MLP, 0.1, {0.1, 0.2, 0.3}), TypeError, "or one number >= 0 per shape, got {0."),
        (lambda: distribute(MLP, 0.1, b"123"), TypeError, "or one number >= 0 per shape, got b'123'"),
        (lambda: distribute(MLP, 0.1, None), TypeError, "or one number >= 0 per shape, got None"),
        (lambda: distribute(MLP, 0.1, [1, 1, True]), TypeError, "or one number >= 0 per shape, got [1, 1, True]"),
        (lambda: distribute(MLP, 0.1, [1, 1]), ValueError, "or one number >= 0 per shape (3), got [1, 1]"),
        (lambda: distribute(MLP, 0.1, [1, 1, -1]), ValueError, "or one number >= 0 per shape (3), got [1, 1, -1]"),
        (lambda: distribute(MLP, 0.1, [1, 1, math.nan]), ValueError, "number >= 0 per shape (3), got [1, 1, nan]"),
        (lambda: distribute(MLP, 0.1, [1, 1, math.inf]), ValueError, "number >= 0 per shape (3), got [1, 1, inf]"),
        (lambda: distribute(MLP, 0.1, [0, 0, 0]), ValueError, "per shape and one above 0, got [0, 0, 0]"),
        (
            lambda: proportions([(4, 4)], [1], "global"),
            ValueError,
            "proportions: distribution must be one of uniform, erdos_renyi, er, erk, memory, or one number",
        ),
        (
            lambda: distribute(MLP, 0.1, block_size=0),
            ValueError,
            "distribute: block_size must be an integer >= 1, got 0",
        ),
        (
            lambda: distribute(MLP, 0.1, block_size=1.5),
            TypeError,
            "distribute: block_size must be an integer >= 1, got 1.5",
        ),
        (
            lambda: distribute(MLP, 0.1, min_blocks=0),
            ValueError,
            "distribute: min_blocks must be an integer >= 1, got 0",
        ),
        (
            lambda: distribute([(4, 4), (4,)], 0.1),
            ValueError,
            "distribute: shapes[1] must be two or more integers >= 0 (out, in, *kernel), got (4,)",
        ),
        (lambda: distribute([(4, -4)], 0.1), ValueError, "distribute: shapes[0] must be two or more integers >= 0"),
        (lambda: distribute([4], 0.1), TypeError, "distribute: shapes[0] must be two or more integers >= 0"),
        (lambda: distribute([(4, 4.0)], 0.1), TypeError, "distribute: shapes[0] must be two or more integers >= 0"),
        (lambda: block_places((4,)), ValueError, "block_places: shape must be two or more integers >= 0"),
        (lambda: block_places((4, 4), True), TypeError, "block_places: block_size must be an integer >= 1, got True"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
