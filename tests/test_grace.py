"""Grown blocks outlast ``grace`` rewires, whatever their scores."""

import pytest
import torch

import sparsenet as sn


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
    del state["young"]
    sparsifier.load_state_dict(state)
    assert sparsifier.step().dropped == 32


def test_a_pattern_that_was_set_by_hand():
    """Places that are no longer there protect nothing; those that are still do."""
    model = network()
    sparsifier = sn.Sparsifier(model, None, sn.SET(0.25), every=1, grace=1)
    sparsifier.step()
    model[0].set_pattern(sn.BlockPattern.random((64, 64), 0.5, 4, generator=torch.Generator().manual_seed(5)))
    young = set(model[0].pattern.linear_places().tolist()) & set(sparsifier.state_dict()["young"]["0"][0].tolist())
    sparsifier.step()  # says that the pattern was replaced
    assert sparsifier.step().dropped == 32 and young


def test_bad_input():
    with pytest.raises(ValueError, match="Sparsifier: grace must be an integer >= 0, got -1"):
        sn.Sparsifier(network(), None, sn.SET(0.25), grace=-1)
    sparsifier = sn.Sparsifier(network(), None, sn.SET(0.25), grace=1)
    state = {**sparsifier.state_dict(), "young": {"0": [3]}}
    with pytest.raises(ValueError, match="must have int64 places by layer in 'young'"):
        sparsifier.load_state_dict(state)


def test_a_share_of_the_mean_for_what_is_born():
    model = network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(4, 64)).sum().backward()
    optimizer.step()
    before = optimizer.state[model[0].values]["exp_avg_sq"].clone()
    sparsifier = sn.Sparsifier(model, optimizer, sn.SET(0.25), every=1, grown_state={"exp_avg_sq": 0.5})
    old = model[0].pattern.linear_places()
    update = sparsifier.step().layers["0"]
    new = model[0].pattern.linear_places()
    kept = before[~torch.isin(old, update.dropped_places)]
    born = optimizer.state[model[0].values]["exp_avg_sq"][torch.isin(new, update.grown_places)]
    assert torch.equal(born, torch.full_like(born, 0.5 * float(kept.mean())))
    for bad in (-0.5, float("inf"), float("nan"), True, "half"):
        with pytest.raises(ValueError, match="must be zero or mean or a share of the mean"):
            sn.Sparsifier(model, optimizer, sn.SET(0.25), grown_state={"exp_avg_sq": bad})
