"""Milliseconds of a step: interpolation, the file of measurements, following what is observed, saving."""

import json
import math
import time

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.memory import LayerCost, MeasuredTimes, StepTimeModel, layer_costs, measured_times

DENSE = LayerCost("dense", 96, 80, 24, optimizer_elements=7776)


@pytest.fixture
def made_times(tmp_path, monkeypatch):
    """A model of step times whose measurements are a power law; ``made_times.measured`` counts them."""

    def seconds(work):
        work()
        model.measured += 1
        return 1e-3

    monkeypatch.setattr(measured_times, "_least_seconds", seconds)
    model = StepTimeModel(folder=tmp_path / "cache")
    model.measured = 0
    return model


def test_a_power_of_the_sizes_is_interpolated_exactly(monkeypatch, tmp_path):
    def seconds(self, fixed, sizes, call):
        return 1e-9 * sizes["out"] ** 0.9 * sizes["in"] ** 1.1 * sizes["rows"] ** 0.5

    monkeypatch.setattr(MeasuredTimes, "_at", seconds)
    times = MeasuredTimes(tmp_path)
    assert times.layer_seconds(DENSE) == pytest.approx(1e-9 * 96**0.9 * 80**1.1 * 24**0.5, rel=1e-9)
    inside, beyond = (times.layer_seconds(LayerCost("dense", out, 64, 8)) for out in (2048, 8192))
    assert beyond == pytest.approx(4 * inside), "beyond what is measured, time grows with the work"


def test_only_what_is_needed_is_measured_and_kept(made_times, tmp_path):
    made_times.predict([LayerCost("dense", 64, 32, 16)])
    assert made_times.measured == 2, "one layer at powers of two, and a step of the optimizer"
    made_times.predict([LayerCost("dense", 64, 48, 16)])
    assert made_times.measured == 3, "48 lies between 32, which is known, and 64"
    other = StepTimeModel(folder=tmp_path / "cache")
    assert other.times.seconds == made_times.times.seconds
    content = json.loads(made_times.times.path.read_text())
    assert content["machine"] == measured_times.machine() and len(content["seconds"]) == 3


def test_what_took_longer_than_twice_the_size_is_measured_again(made_times, tmp_path):
    """Another program ran at the time; the file would keep it for ever."""
    small, large = LayerCost("dense", 64, 32, 16), LayerCost("dense", 128, 32, 16)
    made_times.predict([small])
    made_times.predict([large])
    key = next(key for key in made_times.times.seconds if "out=64" in key)
    made_times.times.seconds[key] = 1.0
    assert made_times.predict([small]) == pytest.approx(2.0)  # 1 ms, and the optimizer's step
    assert made_times.measured == 4
    made_times.predict([small])
    assert made_times.measured == 4, "once"
    assert StepTimeModel(folder=tmp_path / "cache").times.seconds[key] == 1e-3


@pytest.mark.parametrize("kept", ["", "{", '{"format": 1}', "[]", '{"format": 1, "machine": {"cpu": "other"}, "seconds": {"a": 1.0}}', "\udcff"])  # fmt: skip # noqa: E501
def test_a_file_that_cannot_be_used_is_made_anew(made_times, kept):
    made_times.times.folder.mkdir()
    made_times.times.path.write_bytes(kept.encode(errors="surrogateescape"))
    fresh = StepTimeModel(folder=made_times.times.folder)
    assert fresh.times.seconds == {}
    fresh.predict([LayerCost("dense", 64, 32, 16)])
    assert len(json.loads(fresh.times.path.read_text())["seconds"]) == 2


def test_entries_that_are_no_times_are_left_out(made_times):
    made_times.predict([LayerCost("dense", 64, 32, 16)])
    content = json.loads(made_times.times.path.read_text())
    content["seconds"] |= {"a": -1.0, "b": math.nan, "c": "1", "d": 0.0}
    made_times.times.path.write_text(json.dumps(content))
    assert StepTimeModel(folder=made_times.times.folder).times.seconds == made_times.times.seconds


def test_a_folder_that_cannot_be_written_is_said_once(made_times, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    model = StepTimeModel(folder=tmp_path / "file" / "cache")
    for width in (64, 128):
        assert model.predict([LayerCost("dense", width, 32, 16)]) > 0
    assert [record.message.split(":")[0] for record in caplog.records] == ["StepTimeModel"]


def test_measuring_disturbs_nothing(tmp_path):
    random = torch.get_rng_state()
    layers = [
        LayerCost("dense", 32, 16, 8), LayerCost("block", 32, 32, 8, block_size=8, num_blocks=9),
        LayerCost("conv", 4, 3, 98, kernel=(3, 3), places=49), LayerCost("pool", 4, 4, 32, kernel=(2, 2), places=16),
        LayerCost("norm", 8, 8, 32), LayerCost("block", 16, 16, 8, block_size=64, num_blocks=1),
        LayerCost("conv", 4, 4, 40, kernel=(3,), places=20, groups=2), LayerCost("dense", 0, 4, 4),
    ]  # fmt: skip
    with torch.inference_mode(), torch.autocast("cpu"):
        assert StepTimeModel(folder=tmp_path).predict(layers) > 0
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), random)


def test_the_update_is_the_optimizers_own(tmp_path):
    parameter = [nn.Parameter(torch.zeros(64, 8))]
    sgd, adam = torch.optim.SGD(parameter), torch.optim.AdamW(parameter, amsgrad=True)
    times = MeasuredTimes(tmp_path)
    slower, faster = (min(times.update_seconds(1 << 18, o) for _ in range(3)) for o in (adam, sgd))
    assert slower > faster > 0 and times.update_seconds(0, adam) == 0


def test_predictions_follow_what_is_observed(made_times):
    small, large = [DENSE], [LayerCost("dense", 64, 64, 64)] * 12
    raw = {id(layers): made_times.measured_ms(layers) for layers in (small, large)}
    for turn in range(60):
        layers = (small, large)[turn % 2]
        made_times.observe(layers, 2 * raw[id(layers)] + 0.7)
    for layers in (small, large):
        assert made_times.predict(layers) == pytest.approx(2 * raw[id(layers)] + 0.7, rel=0.02)
    for turn in range(60):  # the machine became slower
        layers = (small, large)[turn % 2]
        made_times.observe(layers, 3 * raw[id(layers)] + 0.7)
    assert made_times.predict(large) == pytest.approx(3 * raw[id(large)] + 0.7, rel=0.05)


def test_first_steps_that_were_held_up_are_forgotten(made_times):
    for took in [12.0] * 5 + [5.0] * 30:
        made_times.observe([DENSE], took)
    assert made_times.predict([DENSE]) == pytest.approx(5.0, rel=0.1)


def test_one_step_that_was_held_up_counts_for_little(made_times):
    for _ in range(30):
        made_times.observe([DENSE], 5.0)
    made_times.observe([DENSE], 500.0)
    assert made_times.predict([DENSE]) < 5.5


def test_long_observation_of_one_network_leaves_numbers_finite(made_times):
    for _ in range(5000):
        made_times.observe([DENSE], 5.0)
    assert made_times.predict([DENSE]) == pytest.approx(5.0, rel=1e-3)
    assert all(abs(entry) < 10 for row in made_times._deviations for entry in row)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0, -1.0])
def test_what_is_no_time_is_refused(made_times, value):
    before = made_times.state_dict()
    with pytest.raises(ValueError, match="StepTimeModel: milliseconds must be"):
        made_times.observe([DENSE], value)
    assert made_times.state_dict() == before
    with pytest.raises(TypeError, match="layers must be LayerCosts, got str"):
        made_times.predict(["dense"])


def test_saved_and_resumed_bit_for_bit(made_times, tmp_path):
    for _ in range(5):
        made_times.observe([DENSE], 4.2)
    state = json.loads(json.dumps(made_times.state_dict()))
    other = StepTimeModel(folder=tmp_path / "elsewhere")
    other.load_state_dict(state)
    for model in (made_times, other):
        model.observe([DENSE], 4.4)
    assert other.predict([DENSE]) == made_times.predict([DENSE])
    assert other.state_dict() == made_times.state_dict()


def test_on_another_machine_it_begins_anew_and_damaged_states_are_refused(made_times, tmp_path):
    made_times.observe([DENSE], 40.0)
    state = made_times.state_dict()
    other = StepTimeModel(folder=tmp_path / "elsewhere")
    other.load_state_dict(state | {"machine": {"cpu": "another"}})
    assert (other.scale, other.constant, other.times.seconds) == (1.0, 0.0, {})
    before = made_times.state_dict()
    damaged = [{"scale": math.nan}, {"deviations": [[1.0]]}, {"seconds": None}, {"observations": None}]
    for change in damaged:
        with pytest.raises(ValueError, match="StepTimeModel: state must"):
            made_times.load_state_dict(state | change)
    assert made_times.state_dict() == before


def test_arguments():
    with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got str"):
        StepTimeModel("adamw")
    with pytest.raises(ValueError, match="drift must be a number in"):
        StepTimeModel(drift=2)


def test_a_real_step_is_of_the_predicted_order(tmp_path, one_thread):
    model = sn.SparseMLP([256, 512, 512, 10], density=0.25, block_size=16)
    x, y = torch.randn(128, 256), torch.arange(128) % 10
    optimizer = torch.optim.AdamW(model.parameters())
    predicted = StepTimeModel(optimizer, tmp_path).predict(layer_costs(model, x))
    taken = []
    for _ in range(30):
        begin = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        taken.append(1e3 * (time.perf_counter() - begin))
    assert 0.3 * min(taken) < predicted < 3 * min(taken), "bench/bench_step_time.py looks closer, on a quiet machine"
