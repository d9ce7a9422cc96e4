"""The places that grow: random ones, each set equally likely and at the cost of what grows; the best by score."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsenet as sn
from sparsenet.functional import draw_free_places
from sparsenet.policies.places import best_places, checked_places, layer_key, random_places


def draws_of(pattern, count, times):
    """int64 [times, count]: one draw for each of as many layers."""
    return torch.stack([random_places(pattern, count, layer_key(3, 7, f"layer{i}")) for i in range(times)])


def assert_uniform(counts, expected):
    """Chi-square over classes that are equally likely; five standard deviations off is one in millions."""
    freedom = len(counts) - 1
    chi2 = ((counts - expected).square() / expected).sum().item()
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom), (chi2, freedom)


@given(
    active=st.sets(st.integers(0, 59)),
    share=st.floats(0, 1),
    key=st.integers(0, 2**63 - 1),
)
def test_random_growth_has_exact_counts_at_every_density(active, share, key):
    kept = torch.tensor(sorted(active), dtype=torch.int64)
    count = round(share * (60 - len(kept)))
    places = draw_free_places(kept, 60, count, key).tolist()
    assert len(places) == count and places == sorted(set(places))
    assert not active & set(places) and all(0 <= place < 60 for place in places)
    assert places == draw_free_places(kept, 60, count, key).tolist()


@pytest.mark.parametrize("count", [3, 17, 30])  # few of the free places, half, and so many that the others are drawn
def test_random_growth_takes_every_free_place_equally_often(count):
    pattern = sn.BlockPattern.random((7, 9), num_blocks=28, block_size=1, generator=torch.Generator().manual_seed(0))
    free = sorted(set(range(63)) - set(pattern.linear_places().tolist()))
    times = 4000
    hits = draws_of(pattern, count, times).flatten().bincount(minlength=63)[free].float()
    expected = times * count / len(free)
    variance = expected * (1 - count / len(free))
    chi2 = ((hits - expected).square() / variance).sum().item() * (len(free) - 1) / len(free)
    assert abs(chi2 - (len(free) - 1)) < 5 * math.sqrt(2 * (len(free) - 1)), chi2


@pytest.mark.parametrize("count", [2, 3, 5])
def test_random_growth_takes_every_set_equally_often(count):
    """All pairs, triples and quintuples of seven free places among nine, so nothing depends on what else grows."""
    pattern = sn.BlockPattern.from_linear_places(torch.tensor([2, 6]), (3, 3), 1)
    sets = list(itertools.combinations([0, 1, 3, 4, 5, 7, 8], count))
    times = 200 * len(sets)
    seen = draws_of(pattern, count, times).tolist()
    counts = torch.zeros(len(sets))
    number = {places: i for i, places in enumerate(sets)}
    for places in seen:
        counts[number[tuple(places)]] += 1
    assert_uniform(counts, times / len(sets))


def test_random_growth_is_uniform_over_a_wide_layer():
    """10,000 draws from 9e10 places fall evenly into 100 stripes of rows, of columns, and of the last digits."""
    pattern = sn.BlockPattern.random((300_000, 300_000), block_size=1, num_blocks=2000)
    places = random_places(pattern, 10_000, layer_key(0, 1, "wide"))
    for classes in (places // (9 * 10**8), places % 300_000 // 3000, places % 100):
        assert_uniform(classes.bincount(minlength=100).float(), 100.0)


def test_random_growth_reaches_places_beyond_float_precision():
    """Of 2^61 places float64 would name every 256th only."""
    places = draw_free_places(torch.tensor([0, 5]), 2**61, 20_000, 9)
    assert_uniform((places % 64).bincount(minlength=64).float(), 20_000 / 64)
    assert_uniform((places >> 55).bincount(minlength=64).float(), 20_000 / 64)


def test_random_growth_depends_on_seed_step_layer_and_pattern_only():
    pattern = sn.BlockPattern.random((100, 100), 0.1, 1)
    first = random_places(pattern, 50, layer_key(0, 100, "a"))
    torch.manual_seed(77)
    assert torch.equal(first, random_places(pattern.copy(), 50, layer_key(0, 100, "a")))
    for other in (layer_key(1, 100, "a"), layer_key(0, 101, "a"), layer_key(0, 100, "b")):
        assert len(set(first.tolist()) & set(random_places(pattern, 50, other).tolist())) < 10
    # what today's answer is, so that a saved run continues alike with the next version
    known = sn.BlockPattern.from_linear_places(torch.tensor([1, 4, 7]), (3, 4), 1)
    assert random_places(known, 4, layer_key(0, 1, "0")).tolist() == KNOWN


KNOWN = [0, 2, 9, 11]


def test_random_growth_gives_all_there_are_where_more_are_asked_for():
    pattern = sn.BlockPattern.from_linear_places(torch.tensor([0, 3]), (2, 2), 1)
    assert random_places(pattern, 10, 5).tolist() == [1, 2]
    assert random_places(sn.BlockPattern.random((2, 2), 1.0, 1), 10, 5).tolist() == []
    assert random_places(sn.BlockPattern.random((0, 8), 1.0, 4), 1, 5).tolist() == []


def test_random_growth_refuses_what_it_cannot_draw():
    active = torch.tensor([1, 3])
    with pytest.raises(ValueError, match=r"draw_free_places: count must lie in \[0, 2\], got 3"):
        draw_free_places(active, 4, 3, 0)
    with pytest.raises(ValueError, match=r"draw_free_places: active must ascend in \[0, 4\), got 1 at 1"):
        draw_free_places(torch.tensor([3, 1]), 4, 1, 0)
    with pytest.raises(ValueError, match=r"draw_free_places: active must ascend in \[0, 3\), got 3 at 1"):
        draw_free_places(active, 3, 1, 0)


def test_random_growth_costs_what_grows(run_child):
    """A rewire of 4e10 places, which took hours and now has to fit the test's time limit, in a few megabytes."""
    child = run_child(
        """
        import torch, sparsenet as sn
        def high_water():
            lines = open("/proc/self/status").read().splitlines()
            return int(next(l for l in lines if l.startswith("VmHWM")).split()[1]) // 1024
        layer = sn.SparseLinear(200_000, 200_000, density=2e-6, block_size=1)
        sparsifier = sn.Sparsifier(layer, None, sn.SET(0.3), every=1)
        open("/proc/self/clear_refs", "w").write("5")
        before = high_water()
        update = sparsifier.step()
        assert update.dropped == update.grown == 24_000, update
        assert layer.pattern.num_blocks == 80_000
        print(high_water() - before)
        """
    )
    assert int(child.stdout) < 40, child.stdout


@pytest.mark.parametrize("seed", range(20))
def test_the_best_places_are_those_of_a_full_sort(seed, monkeypatch):
    """Whatever the slices, with many ties: places of an earlier slice win against equal ones of a later slice."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols, at_once = torch.randint(1, 40, (3,), generator=generator).tolist()
    pattern = sn.BlockPattern.random((rows, cols), 0.3, 1, generator)
    scores = torch.randint(0, 5, (rows * cols,), generator=generator).float()
    free = sorted(set(range(rows * cols)) - set(pattern.linear_places().tolist()))
    count = len(free) // 3
    monkeypatch.setattr("sparsenet.policies.places.PLACES_AT_ONCE", at_once)
    places, kept = best_places(pattern, lambda places: scores[places], count, (0, rows))
    assert places.tolist() == sorted(sorted(free, key=lambda place: (-scores[place].item(), place))[:count])
    assert torch.equal(kept, scores[places])


@dataclass(frozen=True)
class Named(sn.Policy):
    """Grows the places it was made with."""

    places: object = None

    def grow_places(self, layer, count):
        return self.places


def test_a_policy_may_name_the_places_that_grow():
    layer = sn.SparseLinear(16, 16, pattern=sn.BlockPattern.from_linear_places(torch.arange(8), (16, 16), 4))
    assert Named().grows()
    update = sn.Sparsifier(layer, None, Named(0.25, torch.tensor([9, 13])), every=1).step().layers[""]
    assert update.grown_places.tolist() == [9, 13] and update.dropped == 2 and layer.pattern.num_blocks == 8


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([5, 9], r"return int64 \[at most 2\], got list"),
        (torch.tensor([5.0, 9.0]), r"return int64 \[at most 2\], got torch.float32 \[2\]"),
        (torch.tensor([[5], [9]]), r"return int64 \[at most 2\], got torch.int64 \[2, 1\]"),
        (torch.tensor([5, 9, 10]), r"return int64 \[at most 2\], got torch.int64 \[3\]"),
        (torch.tensor([9, 5]), "of places that ascend, each once, got two that do not"),
        (torch.tensor([9, 9]), "of places that ascend, each once, got two that do not"),
        (torch.tensor([9, 16]), r"of places in \[0, 16\), got 9 to 16"),
        (torch.tensor([-1, 9]), r"of places in \[0, 16\), got -1 to 9"),
        (torch.tensor([2, 9]), "of inactive places, got 2, which is active"),
    ],
)
def test_places_that_cannot_grow_are_refused_before_anything_changes(places, message):
    layer = sn.SparseLinear(16, 16, pattern=sn.BlockPattern.from_linear_places(torch.arange(8), (16, 16), 4))
    before, values = layer.pattern, layer.values.detach().clone()
    with pytest.raises(ValueError, match=message):
        sn.Sparsifier(layer, None, Named(0.25, places), every=1).step()
    assert layer.pattern is before and torch.equal(layer.values.detach(), values)


def test_no_places_are_fine():
    pattern = sn.BlockPattern.random((0, 8), 1.0, 4)
    assert checked_places(pattern, torch.empty(0, dtype=torch.int64), 0).tolist() == []


def test_scores_of_a_subclass_are_not_passed_over():
    """A policy built on SET that scores places itself gets what it scored best, not random places."""

    class First(sn.SET):
        def grow_scores(self, layer, places):
            return -places.float()

    class StillFirst(First):
        pass

    for policy in (First, StillFirst):
        layer = sn.SparseLinear(16, 16, pattern=sn.BlockPattern.from_linear_places(torch.arange(8, 16), (16, 16), 4))
        update = sn.Sparsifier(layer, None, policy(0.25), every=1).step().layers[""]
        assert update.grown_places.tolist() == [0, 1]
