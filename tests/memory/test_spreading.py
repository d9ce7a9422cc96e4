"""Layers that take the same time: hand-worked cases with a made-up model of time, real measurements, every message."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.memory import MeasuredTimes, StepTimeModel, layer_costs
from sparsenet.memory.spreading import equal_time
from sparsenet.policies.spreading import spread


class MadeUp:
    """A millisecond per block and row, ``overhead`` for each call, and ``update`` for each element updated."""

    def __init__(self, overhead=0.0, update=0.0):
        self.overhead, self.update = overhead, update

    def measured_ms(self, costs):
        return 7.0 + sum(c.num_blocks * c.positions + self.overhead + self.update * c.optimizer_elements for c in costs)


def three_layers():
    """Of 32, 16 and 8 places in blocks of 8."""
    sizes = [64, 32, 32, 16]
    return nn.Sequential(*(sn.SparseLinear(i, o, bias=False, block_size=8, density=0.5) for i, o in pairwise(sizes)))


def test_the_same_time_by_hand():
    model = three_layers()
    # 28 of 56 blocks: 10, 10 and 8, which is full
    assert equal_time(model, 5, 0.5, step_time=MadeUp()) == {"0": 10 / 32, "1": 10 / 16, "2": 1.0}
    # the second layer has twice the rows: 2 : 1 : 2, 12 blocks in 60 ms
    rows = {"0": 5, "1": 10, "2": 5}
    assert equal_time(model, rows, 15 / 56, step_time=MadeUp()) == {"0": 6 / 32, "1": 3 / 16, "2": 6 / 8}
    assert equal_time(model, rows, 1, step_time=MadeUp()) == {"0": 1.0, "1": 1.0, "2": 1.0}
    # one block of each takes 5, 10 and 5 ms; no layer is left without
    assert equal_time(model, rows, 1e-9, step_time=MadeUp()) == {"0": 1 / 32, "1": 1 / 16, "2": 1 / 8}
    layers = dict(model.named_children())
    assert spread(equal_time(model, 5, 0.5, step_time=MadeUp()), layers) == [10, 10, 8]


def test_blocks_of_different_sizes_and_updates_by_hand():
    """With an update at 1 ms per weight a block of 8 takes 64 ms more, and one of 4 takes 16 ms more; 1 row each."""
    model = nn.Sequential(
        sn.SparseLinear(64, 64, bias=False, block_size=8, density=0.5),
        sn.SparseLinear(64, 64, bias=False, block_size=4, density=0.5),
    )
    # 2048 of 8192 weights, 64 n + 16 m, at 65 n = 17 m ms: 16.4 and 62.6. Blocks come to 2048 with n from 1040 ms on
    # (the 17th comes at 1105) and m from 1088 ms on
    assert equal_time(model, 1, 0.25, step_time=MadeUp(update=1.0)) == {"0": 16 / 64, "1": 64 / 256}
    model[0].requires_grad_(False)  # nothing to update, 1 ms a block: it is full at 64 ms, for less than 4 of the other
    assert equal_time(model, 1, 0.52, step_time=MadeUp(update=1.0)) == {"0": 1.0, "1": 10 / 256}


def test_a_layer_that_is_called_twice_takes_twice_the_time():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.once = sn.SparseLinear(32, 32, bias=False, block_size=8, density=0.5)
            self.twice = sn.SparseLinear(32, 32, bias=False, block_size=8, density=0.5)

        def forward(self, x):
            return self.twice(self.twice(self.once(x)))

    model = Twice()
    assert equal_time(model, torch.ones(3, 32), 9 / 32, step_time=MadeUp()) == {"once": 6 / 16, "twice": 3 / 16}
    # 2 calls cost 6 ms more than 1, which are two blocks of the layer that is called once: 8 and 3
    found = equal_time(model, torch.ones(3, 32), 11 / 32, step_time=MadeUp(overhead=6.0))
    assert found == {"once": 8 / 16, "twice": 3 / 16}


def test_interpolated_times_are_equal_to_a_block(tmp_path, monkeypatch):
    """As the model of times says for a network of these densities: twice the rows, and 39 % fewer blocks."""

    def seconds(self, fixed, sizes, call):
        return 1e-9 * sizes.get("blocks", 0) ** 0.7 * sizes.get("rows", 0) ** 0.5 + 1e-6

    monkeypatch.setattr(MeasuredTimes, "_at", seconds)
    step_time, sizes, rows = StepTimeModel(folder=tmp_path), [500, 700, 300], {"0": 128, "1": 256}
    found = equal_time(sn.SparseMLP(sizes, 0.25, 4), rows, 0.25, step_time=step_time)
    places = {"0": 125 * 175, "1": 175 * 75}
    blocks = {name: round(found[name] * count) for name, count in places.items()}
    assert sum(blocks.values()) == pytest.approx(0.25 * sum(places.values()), abs=2)
    assert blocks["1"] == pytest.approx(blocks["0"] / 2 ** (0.5 / 0.7), rel=0.01)
    twin = sn.SparseMLP(sizes, list(found.values()), 4)
    assert {name: layer.pattern.num_blocks for name, layer in twin.named_children()} == blocks
    first, second = (step_time.measured_ms([cost]) for cost in layer_costs(twin, rows))
    assert first == pytest.approx(second, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: equal_time(nn.Linear(4, 4), 5, 0.5),
            ValueError,
            "equal_time: model must hold at least one SparseLinear",
        ),
        (lambda: equal_time(4, 5, 0.5), TypeError, "equal_time: model must be a module, got int"),
        (lambda: equal_time(three_layers(), 5, 0), ValueError, "equal_time: density must be above 0, got 0"),
        (lambda: equal_time(three_layers(), 5, 2), ValueError, "equal_time: density must be a number in [0, 1], got 2"),
        (
            lambda: equal_time(nn.ModuleList([*three_layers(), nn.Sequential(sn.SparseLinear(4, 4))]), {"0": 5}, 0.5),
            ValueError,
            "layer_costs: batch must name the rows of every layer, got none for '1'",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_a_layer_that_no_call_reaches_is_named():
    class Idle(nn.Sequential):
        def forward(self, x):
            return self[0](x)

    with pytest.raises(ValueError, match="equal_time: batch must reach every sparse layer, got no call of '1'"):
        equal_time(Idle(*three_layers()), torch.ones(3, 64), 0.5)
