"""Grown blocks outlast ``grace`` rewires, whatever their scores."""

import numpy as np
import pytest
import torch

import sparsenet as sn
from sparsenet.policies.exchange import Newborn, Quota


def network(seed=0):
    return sn.SparseMLP([64, 64], density=0.5, block_size=4, generator=torch.Generator().manual_seed(seed))


def rewires(count, model=None, optimizer=None, policy=None, **options):
    """Updates of so many rewires of a layer whose weights nobody changes: what was grown stays zero."""
    model = model or network()
    sparsifier = sn.Sparsifier(model, optimizer, policy or sn.SET(0.125), every=1, **options)
    return [sparsifier.step().layers["0"] for _ in range(count)]


def places(update, which):
    return set(getattr(update, f"{which}_places").tolist())


def test_without_grace_what_was_grown_is_dropped_first():
    first, second = rewires(2, grace=0)
    assert places(second, "dropped") == places(first, "grown")


@pytest.mark.parametrize("grace", [1, 2, 3])
def test_what_was_grown_stays_for_so_many_rewires(grace):
    found = rewires(grace + 2, grace=grace)
    assert all(update.dropped == update.grown == 16 for update in found)
    for n in range(1, grace + 1):
        assert not places(found[0], "grown") & places(found[n], "dropped")
    assert places(found[0], "grown") == places(found[grace + 1], "dropped")  # all zero, and now old enough


@pytest.mark.parametrize(
    ("fraction", "grace"),
    [(0.25, 0), (sn.Constant(0.25), 0), (sn.Cosine(0.25, 0.0, 100), 1), (sn.Piecewise((5,), (0.25, 0.0)), 1)],
)
def test_the_default_is_one_rewire_where_fewer_and_fewer_blocks_are_exchanged(fraction, grace):
    assert sn.Sparsifier(network(), None, sn.SET(fraction)).grace == grace


def test_young_blocks_are_not_exchanged_where_no_old_ones_are_left():
    model = network()
    first, second = rewires(2, model, policy=sn.SET(1.0), grace=1)
    assert first.grown > 100
    assert not places(first, "grown") & places(second, "dropped")
    assert second.dropped == second.grown <= 128 - first.grown
    assert second.held == 128 - second.dropped


def test_young_blocks_stay_where_the_others_are_the_last_of_their_rows():
    """Worked by hand: the diagonal of 4 x 4 may not leave, so that the three others are held, too young to go."""
    places_now = torch.tensor([0, 1, 2, 3, 5, 10, 15])
    model = sn.SparseMLP([16, 16], 0.5, block_size=4)
    model[0].set_pattern(sn.BlockPattern.from_linear_places(places_now, (16, 16), 4))
    with torch.no_grad():
        model[0].values.copy_(torch.tensor([9.0, 1, 1, 1, 9, 9, 9]).reshape(7, 1, 1))
    sparsifier = sn.Sparsifier(model, None, sn.SET(0.43), every=1, grace=1)
    first, second = (sparsifier.step().layers["0"] for _ in range(2))
    assert places(first, "dropped") == {1, 2, 3} and first.grown == 3
    assert (second.dropped, second.grown, second.held) == (0, 0, 3)
    assert sparsifier.step().dropped == 3  # they have had their time


def test_where_young_blocks_must_go_the_lowest_do():
    """8 of 16 blocks leave for the density: the 4 old ones, and the 4 young ones of the lowest scores."""
    pattern = sn.BlockPattern.from_linear_places(torch.arange(16), (4, 64), 4)
    young, scores = torch.arange(12), torch.tensor([5.0, 1, 7, 2, 8, 3, 9, 4, 6, 10, 11, 12, 20, 21, 22, 23])
    quota = Quota(drop=8, grow=0, clamped=0, must_drop=8)
    assert quota.leaving(pattern, scores, young).tolist() == [1, 3, 5, 7, 12, 13, 14, 15]


def test_a_place_that_was_grown_twice_is_one_young_block():
    newborn = Newborn(2)
    newborn.add("0", torch.tensor([2]))
    newborn.add("0", torch.tensor([2]))
    assert newborn.among("0", torch.tensor([1, 2, 5])).tolist() == [1]


def test_a_falling_density_takes_young_blocks_where_no_others_are_left():
    model = network()
    sparsifier = sn.Sparsifier(model, None, sn.SET(1.0), sn.Piecewise((2,), (0.5, 0.125)), every=1, grace=1)
    assert sparsifier.step().grown > 100
    assert sparsifier.step().layers["0"].num_blocks == 32
    assert model[0].pattern.unreached() == (0, 0)  # and every output and input keeps one


def test_young_blocks_are_saved(tmp_path):
    def step(sparsifier):
        return sparsifier.step().layers["0"].dropped_places

    model = network()
    sparsifier = sn.Sparsifier(model, None, sn.SET(0.25), every=1, grace=1)
    step(sparsifier)
    sn.save(tmp_path / "run.safetensors", model, sparsifier=sparsifier)
    expected = step(sparsifier)
    other = network(1)
    again = sn.Sparsifier(other, None, sn.SET(0.25), every=1, grace=1)
    sn.load(tmp_path / "run.safetensors", other, sparsifier=again)
    assert torch.equal(step(again), expected)


def test_a_state_of_before_there_was_grace():
    sparsifier = sn.Sparsifier(network(), None, sn.SET(0.25), every=1, grace=1)
    sparsifier.step()
    state = sparsifier.state_dict()
    assert len(state.pop("young")["0"][0]) == 32
    sparsifier.load_state_dict(state)
    assert "young" not in sparsifier.state_dict()
    assert sparsifier.step().dropped == 32


def test_a_pattern_that_was_set_by_hand():
    """Places that are no longer there protect nothing; those that are still do, though no block is smaller."""
    model = network()
    sparsifier = sn.Sparsifier(model, None, sn.SET(0.25), every=2, grace=1)
    sparsifier.step()
    grown = places(sparsifier.step().layers["0"], "grown")
    model[0].set_pattern(sn.BlockPattern.random((64, 64), 0.5, 4, generator=torch.Generator().manual_seed(5)))
    now = model[0].pattern.linear_places().tolist()
    with torch.no_grad():
        for block, place in enumerate(now):
            model[0].values[block] = 0.0 if place in grown else 1.0
    sparsifier.step()
    dropped = places(sparsifier.step().layers["0"], "dropped")
    assert len(dropped) == 32 and 0 < len(grown & set(now)) < 32
    assert not grown & dropped


def test_bad_input():
    with pytest.raises(ValueError, match="Sparsifier: grace must be an integer >= 0, got -1"):
        sn.Sparsifier(network(), None, sn.SET(0.25), grace=-1)
    sparsifier = sn.Sparsifier(network(), None, sn.SET(0.25), grace=1)
    for young in ({"0": [3]}, {"0": 3}, {"0": None}, [], {"0": [torch.ones(2)]}):
        with pytest.raises(ValueError, match="must have int64 places by layer in 'young'"):
            sparsifier.load_state_dict({**sparsifier.state_dict(), "young": young})


@pytest.mark.parametrize("share", [0.5, torch.tensor(0.5), np.array(0.5), np.float32(0.5)])
def test_a_share_of_the_mean_for_what_is_born(share):
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4, 64)).sum().backward()
    optimizer.step()
    before = optimizer.state[model[0].values]["exp_avg_sq"].clone()
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.25), every=1, grown_state={"exp_avg_sq": share})
    old = model[0].pattern.linear_places()
    update = sparsifier.step().layers["0"]
    new = model[0].pattern.linear_places()
    kept = before[~torch.isin(old, update.dropped_places)]
    born = optimizer.state[model[0].values]["exp_avg_sq"][torch.isin(new, update.grown_places)]
    assert torch.equal(born, torch.full_like(born, 0.5 * float(kept.mean())))
    for bad in (-0.5, float("inf"), float("nan"), True, "half"):
        with pytest.raises(ValueError, match="must be zero or mean or a share of the mean"):
            sn.Sparsifier(model, optimizer, sn.SET(0.25), grown_state={"exp_avg_sq": bad})
