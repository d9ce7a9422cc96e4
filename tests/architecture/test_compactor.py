"""The Compactor: when it acts, that training is as without it and gets cheaper, patience, folding, the Sparsifier."""

import copy
import re
import time

import numpy as np
import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.architecture import compactor as compactor_module
from sparsenet.architecture.compactor import Compactor
from sparsenet.compaction.compacting import CompactionError


def gated(*open_, depth_start=0.0):
    start = torch.tensor([float(o) for o in open_])
    model = nn.Sequential(
        nn.Linear(3, len(open_)), sn.TriStateReLU(len(open_), width_start=start, depth_start=depth_start)
    )
    return model.append(nn.Linear(len(open_), 2))


def weights(model):
    return [p for n, p in model.named_parameters() if "gate" not in n]


def train(model, optimizer, compactor=None, steps=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    reports = []
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=generator)).square().sum().backward()
        optimizer.step()
        if compactor is not None:
            reports.append(compactor.step())
    return reports


def test_acts_at_its_steps_only_and_keeps_count():
    model = gated(1, 0, 1, 0)
    optimizer = torch.optim.SGD(weights(model), lr=0.01, momentum=0.9)
    compactor = Compactor(model, optimizer, every=2, begin=1, end=6)
    reports = train(model, optimizer, compactor, steps=9)
    assert [r is not None for r in reports] == [False, False, True, False, True, False, False, False, False]
    assert [r.removed for r in reports if r] == [2, 0]
    first, second = compactor.intervals
    assert (first.begin, first.end, second.begin, second.end) == (1, 3, 3, 5)
    assert (first.units, second.units) == ({"0": 4, "2": 2}, {"0": 2, "2": 2})
    assert (first.removed, second.removed) == (2, 0)
    assert (first.parameters, second.parameters) == (16 + 4 + 1 + 10, 8 + 2 + 1 + 6)
    assert first.bytes == reports[2].bytes[0] > second.bytes == reports[2].bytes[1]
    assert 0 < first.seconds_per_step < 1 and 0 < first.check_seconds < 5


@pytest.mark.parametrize("make", [torch.optim.Adam, lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)])
def test_training_is_that_of_the_network_with_its_dead_units(make):
    torch.manual_seed(1)
    model = gated(1, 0, 1, 1, 0, 1).double()
    whole = copy.deepcopy(model)
    optimizer, other = make(weights(model)), make(weights(whole))
    x = torch.randn(20, 5, 3, dtype=torch.float64)
    compactor = Compactor(model, optimizer, every=4)
    for batch in x:
        for net, opt in ((model, optimizer), (whole, other)):
            opt.zero_grad()
            net(batch).square().sum().backward()
            opt.step()
        compactor.step()
    assert model[0].out_features == 4
    for p, q in ((model[0].weight, whole[0].weight[[0, 2, 3, 5]]), (model[2].weight, whole[2].weight[:, [0, 2, 3, 5]])):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model(x[0]), whole(x[0]), rtol=1e-10, atol=1e-12)


def test_bytes_fall_with_the_units():
    torch.manual_seed(0)
    gate = sn.TriStateReLU(1024, width_start=(torch.arange(1024) < 32).float(), depth=False)
    model = nn.Sequential(nn.Linear(256, 1024), gate, nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))
    optimizer = torch.optim.Adam(weights(model))
    compactor, x = Compactor(model, optimizer, every=8), torch.randn(64, 256)
    for _ in range(16):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        compactor.step()
    first, second = compactor.intervals
    assert second.units["0"] == 32 and first.bytes > 10 * second.bytes


def test_the_time_of_checks_is_not_in_the_steps(monkeypatch):
    def slow(*args, **kwargs):
        time.sleep(0.2)
        return real(*args, **kwargs)

    real = compactor_module.compact
    monkeypatch.setattr(compactor_module, "compact", slow)
    model = gated(1, 0, 1)
    optimizer = torch.optim.SGD(weights(model), lr=0.01)
    compactor = Compactor(model, optimizer, every=1)
    train(model, optimizer, compactor, steps=3)
    assert max(i.seconds_per_step for i in compactor.intervals) < 0.15
    assert min(i.check_seconds for i in compactor.intervals) > 0.2


# --- patience -------------------------------------------------------------------------------------------------------


def test_a_gate_must_stay_closed_for_that_many_checks_in_a_row():
    model = gated(1, 0, 0, 1)
    optimizer = torch.optim.SGD(weights(model), lr=0.01)
    compactor = Compactor(model, optimizer, every=1, patience=3)
    train(model, optimizer, compactor)
    with torch.no_grad():
        model[1].width_gate[2] = 1  # it opens again and closes: its count starts anew
    train(model, optimizer, compactor)
    with torch.no_grad():
        model[1].width_gate[2] = 0
    assert train(model, optimizer, compactor)[0].layers["0"].kept_units.tolist() == [0, 2, 3]
    assert train(model, optimizer, compactor)[0].removed == 0
    assert train(model, optimizer, compactor)[0].layers["0"].kept_units.tolist() == [0, 2]  # counts moved along
    assert "closed_checks" not in model.state_dict()


def test_a_spared_gate_is_open_to_everything():
    # all that layer 2 reads is closed: it would be constant, but the gates may open again
    model = gated(0, 0)
    model.append(nn.ReLU()).append(nn.Linear(2, 1))
    assert sn.compact(copy.deepcopy(model), spare={"1": [0, 1]}).removed == 0
    assert sn.compact(model, spare={"1": [1]}).layers["0"].kept_units.tolist() == [1]


@pytest.mark.parametrize(
    ("spare", "message"),
    [
        ({"0": [0]}, "compact: spare must name gates of the model, got '0'"),
        ({"1": [4]}, "compact: units of '1' must lie in [0, 4), got 4"),
    ],
)
def test_spare_is_checked(spare, message):
    with pytest.raises(CompactionError, match=re.escape(message)):
        sn.compact(gated(1, 0, 1, 1), spare=spare)


def test_the_state_goes_on_after_a_restart():
    model = gated(1, 0, 1, 1)
    optimizer = torch.optim.SGD(weights(model), lr=0.01)
    compactor = Compactor(model, optimizer, every=1, patience=3)
    train(model, optimizer, compactor, steps=2)
    again = copy.deepcopy(model)
    fresh = Compactor(again, None, every=1, patience=3)
    fresh.load_state_dict(compactor.state_dict())
    assert fresh.steps == 2 and fresh.step().removed == 1
    with pytest.raises(ValueError, match="state must be of a model with the same gates, got '1' \\[4\\]"):
        fresh.load_state_dict(compactor.state_dict())
    with pytest.raises(ValueError, match="state must have an integer 'steps', got None"):
        fresh.load_state_dict({})


def test_row84_intervals_are_true_after_a_restart(tmp_path):
    """Saved between two checks: the next interval begins at the last check, and all of its steps are in its median."""
    model = gated(1, 0, 1, 1)
    optimizer = torch.optim.SGD(weights(model), lr=0.01, momentum=0.9)
    compactor = Compactor(model, optimizer, every=4, begin=1)
    train(model, optimizer, compactor, steps=7)
    with torch.no_grad():
        model[1].width_gate[2] = 0
    sn.save(tmp_path / "a.safetensors", model, optimizer, extra=compactor.state_dict())

    again = gated(1, 1, 1, 1)
    sn.resize_to(again, tmp_path / "a.safetensors")
    other = torch.optim.SGD(weights(again), lr=0.01, momentum=0.9)
    fresh = Compactor(again, other, every=4, begin=1)
    fresh.load_state_dict(sn.load(tmp_path / "a.safetensors", again, other).extra)
    assert fresh.intervals == compactor.intervals and len(fresh._seconds) == 2
    reports = train(again, other, fresh, steps=6)
    assert [r is not None for r in reports] == [False, True, False, False, False, True]
    assert [(i.begin, i.end, i.removed) for i in fresh.intervals] == [(1, 5, 1), (5, 9, 1), (9, 13, 0)]
    assert [i.units["0"] for i in fresh.intervals] == [4, 3, 2]
    assert fresh.intervals[1].bytes < fresh.intervals[0].bytes and fresh.intervals[1].seconds_per_step > 0


def test_row84_a_state_without_intervals_is_of_the_last_check():
    compactor = Compactor(gated(1, 0, 1, 1), None, every=4, begin=1)
    compactor.load_state_dict({"steps": 7, "closed_checks": {}})
    assert [compactor.step() is not None for _ in range(2)] == [False, True]
    assert [(i.begin, i.end) for i in compactor.intervals] == [(5, 9)]


def test_row84_a_state_that_does_not_fit_changes_nothing():
    compactor = Compactor(gated(1, 0, 1, 1), None, every=1, patience=2)
    compactor.step()
    good, before = compactor.state_dict(), copy.deepcopy(compactor.__dict__["intervals"])
    for change, message in (
        ({"last_check": None}, "state must have an integer 'last_check', got None"),
        ({"intervals": [{"begin": 0}]}, "state must have intervals and seconds of a Compactor"),
        ({"closed_checks": {"0": torch.zeros(4)}}, "state must be of a model with the same gates"),
    ):
        with pytest.raises(ValueError, match=message):
            compactor.load_state_dict({**good, **change})
        assert compactor.intervals == before and compactor.steps == 1


def test_row84_counts_of_another_history_are_forgotten():
    model = gated(1, 0, 1, 1)
    compactor = Compactor(model, None, every=1, patience=2)
    new = compactor.state_dict()
    compactor.step()
    compactor.load_state_dict(new)
    assert compactor.step().removed == 0 and compactor.step().removed == 1


# --- beside others --------------------------------------------------------------------------------------------------


def test_folding_as_it_goes():
    model = gated(*[1] * 30, depth_start=1.0).double()
    optimizer = torch.optim.Adam(weights(model))
    whole, x = copy.deepcopy(model), torch.randn(4, 3, dtype=torch.float64)
    compactor = Compactor(model, optimizer, every=1, fold=True)
    report = compactor.step()
    assert compactor.intervals[0].folded == 1 and report.removed == 0
    assert isinstance(model[0], nn.Identity) and model[2].in_features == 3
    torch.testing.assert_close(model(x), whole(x))
    model(x).sum().backward()
    optimizer.step()
    assert compactor.step() is not None and compactor.intervals[1].units == {"2": 2}


def sparse_model():
    generator = torch.Generator().manual_seed(0)
    options = {"density": 0.5, "block_size": 8, "generator": generator}
    gate = sn.TriStateReLU(64, width_start=1.0, depth=False)
    return nn.Sequential(sn.SparseLinear(40, 64, **options), gate, sn.SparseLinear(64, 16, **options))


def test_beside_the_sparsifier():
    model = sparse_model()
    optimizer = torch.optim.Adam(weights(model))
    sparsifier = sn.Sparsifier(model, optimizer, sn.RigL(drop_fraction=0.3), every=2)
    compactor = Compactor(model, optimizer, every=3, sparsifier=sparsifier)
    with torch.no_grad():
        model[1].width_gate[:16] = 0
    moved, left = 0, 0
    for seed in range(12):
        x = torch.randn(7, 40, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        update = sparsifier.step()
        report = compactor.step()
        moved += update.grown if update else 0
        left += report.removed if report else 0
        assert update is None or not any(u.skipped for u in update.layers.values())
    assert left >= 16 and moved > 0 and model[0].out_features == 64 - left  # RigL emptied block rows and columns too
    assert compactor.intervals[-1].bytes < compactor.intervals[0].bytes


def test_blocks_that_grew_from_zero_are_not_dead():
    """A unit whose only readers are blocks grown just now, at zero, stays: the Sparsifier wants it."""
    model = sparse_model()
    with torch.no_grad():
        model[2].values.zero_()
    sparsifier = sn.Sparsifier(model, None, sn.SET(), every=1000)
    assert Compactor(model, None, every=1, sparsifier=sparsifier).step().removed == 0
    assert Compactor(copy.deepcopy(model), None, every=1).step().removed > 0


def test_folding_tells_the_sparsifier():
    generator = torch.Generator().manual_seed(0)
    eye = sn.BlockPattern.from_mask(torch.eye(4, dtype=torch.bool), 8)
    model = nn.Sequential(
        sn.SparseLinear(32, 32, pattern=eye, generator=generator),
        sn.TriStateReLU(32, width_start=1.0, depth_start=1.0),
        sn.SparseLinear(32, 32, pattern=eye, generator=generator),
        nn.ReLU(),
        sn.SparseLinear(32, 8, density=0.5, block_size=8, generator=generator),
    )
    sparsifier = sn.Sparsifier(model, None, sn.SET(), every=1)
    Compactor(model, None, every=1, sparsifier=sparsifier, fold=True).step()
    assert list(sparsifier.layers) == ["2", "4"]
    assert list(sparsifier.step().layers) == ["2", "4"]


def test_options_reach_compact_and_copies_follow():
    model = gated(1, 0, 1, 1)
    average = torch.optim.swa_utils.AveragedModel(model)
    Compactor(model, None, every=1, copies=[average]).step()
    assert average.module[0].out_features == 3
    with pytest.raises(ValueError, match="fill_in must be masked or trainable"):
        Compactor(model, None, every=1, fill_in="zero").step()


def test_row84_copies_that_can_be_read_once_follow_every_check():
    model = gated(1, 0, 1, 1)
    average = copy.deepcopy(model)
    compactor = Compactor(model, None, every=1, copies=iter([average]))
    compactor.step()
    with torch.no_grad():
        model[1].width_gate[0] = 0
    compactor.step()
    assert model[0].out_features == average[0].out_features == 2


def test_row68_followers_are_compacted_and_folding_refuses_them():
    model = sparse_model()
    with torch.no_grad():
        model[1].width_gate[:16] = 0
    average = copy.deepcopy(model)
    sparsifier = sn.Sparsifier(model, None, sn.SET(), every=1000)
    sparsifier.followers = [average]
    Compactor(model, None, every=1, sparsifier=sparsifier).step()
    assert model[0].out_features == average[0].out_features == 48
    message = "Compactor: fold must be False where there are copies or followers"
    with pytest.raises(ValueError, match=message):
        Compactor(model, None, fold=True, sparsifier=sparsifier)
    with pytest.raises(ValueError, match=message):
        Compactor(model, None, fold=True, copies=[average])


def test_row83_numbers_of_numpy():
    compactor = Compactor(gated(1, 1), None, every=np.int64(2), patience=np.int32(1))
    assert type(compactor.every) is int and compactor.step() is None and compactor.step() is not None


def test_two_optimizers():
    model = gated(1, 0, 1)
    both = [torch.optim.Adam([model[0].weight]), torch.optim.SGD([model[2].weight], lr=0.1, momentum=0.9)]
    model(torch.randn(4, 3)).sum().backward()
    for optimizer in both:
        optimizer.step()
    Compactor(model, both, every=1, fold=True).step()
    assert both[0].state[model[0].weight]["exp_avg"].shape == (2, 3)
    assert both[1].state[model[2].weight]["momentum_buffer"].shape == (2, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "Compactor: every must be an integer >= 1, got 0"),
        ({"every": 2.5}, "Compactor: every must be an integer >= 1, got 2.5"),
        ({"begin": -1}, "Compactor: begin must be an integer >= 0, got -1"),
        ({"end": "9"}, "Compactor: end must be an integer >= 0, got '9'"),
        ({"patience": 0}, "Compactor: patience must be an integer >= 1, got 0"),
        ({"spare": {}}, "Compactor: spare must be left to patience"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        Compactor(gated(1, 1), None, **options)


def test_the_plot_and_its_refusal(tmp_path):
    pytest.importorskip("matplotlib")
    model = gated(1, 0, 1, 1)
    compactor = Compactor(model, None, every=1, fold=True)
    with pytest.raises(ValueError, match="intervals must hold at least one check"):
        compactor.plot(tmp_path / "a.png")
    for _ in range(3):
        compactor.step()
    assert compactor.plot(tmp_path / "plots" / "a.png").stat().st_size > 1000
