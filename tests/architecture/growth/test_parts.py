"""The small parts of the Grower, each with numbers worked out here."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.architecture.growth.blocks import move_blocks, spared
from sparsenet.architecture.growth.candidates import candidates, growable_layers, reasons_against
from sparsenet.architecture.growth.checking import check_fits, one_number
from sparsenet.architecture.growth.controller import Candidate, Flow, allotted
from sparsenet.architecture.growth.events import Change, Event, together
from sparsenet.architecture.growth.gains import (
    NewBlocks,
    best_new_blocks,
    grad_input_of,
    layer_gain,
    squared_gradient,
    unit_gain,
)
from sparsenet.architecture.growth.holding import Limits
from sparsenet.architecture.growth.idle import fading_blocks, idle_units
from sparsenet.architecture.growth.ledger import Cost, Ledger
from sparsenet.architecture.growth.losses import Losses
from sparsenet.architecture.growth.pace import Pace
from sparsenet.architecture.growth.shrinking import choose_leaving
from sparsenet.architecture.growth.spending import agreed_offers, room, spent
from sparsenet.architecture.growth.stopping import ExtrapolatedGain
from sparsenet.architecture.growth.watch import Seen
from sparsenet.architecture.growth.worth import row_squares
from sparsenet.compaction.graph import UnitGraph

NO = math.inf


def mlp(*sizes: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


# --- gains -------------------------------------------------------------------------------------------------------


def test_the_gain_of_units_against_a_loop():
    x, gs = torch.randn(7, 5), [torch.randn(7, 3), torch.randn(7, 2)]
    incoming = torch.randn(5, 16, generator=torch.Generator().manual_seed(4)) * (2 / 5) ** 0.5
    total = 0.0
    for unit in incoming.double().T:
        h = (x.double() @ unit).clamp(min=0)
        total += sum(float((g.double().T @ h).square().sum()) for g in gs)
    assert unit_gain(x, gs, seed=4) == pytest.approx(total / 16, rel=1e-5)
    assert math.isfinite(unit_gain((1e3 * x).half(), [1e3 * g.half() for g in gs], seed=4))


@pytest.mark.parametrize("rows", [3, 40])
def test_the_gain_of_a_layer_by_both_formulas(rows):
    x, g = torch.randn(rows, 8), torch.randn(rows, 8)
    assert layer_gain(x, g) == pytest.approx(float((g.double().T @ x.double()).square().sum()), rel=1e-5)
    assert math.isfinite(layer_gain(x, g.bfloat16()))


def test_gradients_by_inputs_and_the_best_new_blocks():
    layer = sn.SparseLinear(12, 8, density=0.5, block_size=4, generator=torch.Generator().manual_seed(0))
    g, x = torch.randn(5, 8), torch.randn(5, 12)
    torch.testing.assert_close(grad_input_of(layer, g), g @ layer.weight_dense())
    dense = (g.T @ x).reshape(2, 4, 3, 4).square().sum((1, 3)).flatten()
    free = (~layer.pattern.to_mask().flatten()).nonzero().flatten()
    best = free[dense[free].topk(2).indices].sort().values
    places, norms = best_new_blocks(layer, (x, g), 2)
    assert places.tolist() == best.tolist()
    torch.testing.assert_close(norms, dense[best])


def test_rows_of_other_places_are_not_paired():
    graph = UnitGraph(mlp(4, 8, 2))
    kept = {"0": Seen(torch.ones(16, 4), torch.ones(16, 8), 32), "2": Seen(torch.ones(16, 8), torch.ones(16, 2), 16)}
    [offer] = candidates(graph, Ledger(graph, (), {}), kept, ["units"], 0.1, seed=0)
    assert offer.gain == 0.0  # by the gradients of what is there: none


# --- who may change ----------------------------------------------------------------------------------------------


def test_frozen_layers_and_what_they_read_stay():
    model = mlp(4, 8, 8, 8, 2)
    model[4].requires_grad_(False)
    graph = UnitGraph(model)
    assert growable_layers(graph) == ["0"]
    assert reasons_against(graph)["2"] == reasons_against(graph)["4"] == "'4' is frozen"


def test_idle_units_are_far_below_the_mean_and_never_young():
    graph = UnitGraph(mlp(4, 5, 2))
    fade = idle_units(graph, "0", torch.tensor([1.0, 0.001, math.inf, 1.0, 0.5]), share=0.01)
    assert fade.items.tolist() == [1]
    assert fade.columns["2"].tolist() == [1]
    assert idle_units(graph, "0", torch.zeros(5), share=0.01) is None


def test_the_last_block_of_a_line_does_not_fade():
    pattern = sn.BlockPattern.from_mask(torch.tensor([[True, True], [True, False]]), block_size=4)
    layer = sn.SparseLinear(8, 8, pattern=pattern)
    scores = torch.tensor([2.0, 1.0, 0.5])
    assert spared(layer, scores, 3).tolist() == [0]
    assert fading_blocks("0", layer, scores, 3).items.tolist() == [0]
    assert fading_blocks("0", layer, torch.tensor([math.inf, 1.0, 0.5]), 3) is None
    assert fading_blocks("0", layer, None, 3) is None


def test_blocks_move_with_their_state():
    pattern = sn.BlockPattern.from_mask(torch.tensor([[True, True], [True, False]]), block_size=4)
    layer = sn.SparseLinear(8, 8, pattern=pattern)
    optimizer = torch.optim.Adam(layer.parameters())
    layer(torch.randn(3, 8)).square().sum().backward()
    optimizer.step()
    before, moments = layer.values.detach().clone(), optimizer.state[layer.values]["exp_avg"].clone()
    move_blocks("0", layer, [optimizer], (), leave=torch.tensor([0]), enter=torch.tensor([3]))
    assert layer.pattern.to_mask().tolist() == [[False, True], [True, True]]
    assert torch.equal(layer.values[:2], before[1:])
    assert not layer.values[2].any()
    assert torch.equal(optimizer.state[layer.values]["exp_avg"][:2], moments[1:])


# --- controller --------------------------------------------------------------------------------------------------


def test_room_goes_by_gain_per_cost_over_width_squared():
    a, b = (Candidate("units", n, 1.0, Cost(10.0), count=w, most=100) for n, w in (("a", 1), ("b", 2)))
    assert allotted([a, b], Cost(100.0, NO, NO), Cost(1000.0, NO, NO), Flow()) == {"units a": 8, "units b": 2}
    one = Candidate("units", "a", 1.0, Cost(10.0), count=1, most=3)
    assert allotted([one, b], Cost(100.0, NO, NO), Cost(1000.0, NO, NO), Flow()) == {"units a": 3, "units b": 7}
    assert allotted([a], Cost(-5.0, NO, NO), Cost(1000.0, NO, NO), Flow()) == {}


def test_room_goes_by_gain_over_that_of_items_that_are_there():
    """The last layer's gradients are larger; it gets no more for that."""
    options = {"cost": Cost(10.0), "count": 4, "most": 100}
    near = Candidate("units", "near the loss", 80.0, usual=40.0, **options)
    far = Candidate("units", "far from it", 2.0, usual=1.0, **options)
    counts = allotted([near, far], Cost(80.0, NO, NO), Cost(1000.0, NO, NO), Flow())
    assert counts == {near.key: 4, far.key: 4}


def test_whole_groups_only_and_gains_that_are_not_finite_get_nothing():
    flow = Flow()
    offer = Candidate("units", "a", 1.0, Cost(1.0), count=1, group=4, most=100)
    got = [allotted([offer], Cost(3.0, NO, NO), Cost(100.0, NO, NO), flow).get("units a", 0) for _ in range(3)]
    assert got == [0, 0, 0]  # a group costs 4, more than there is room for
    bad = Candidate("units", "a", math.nan, Cost(1.0), count=1)
    assert allotted([bad], Cost(3.0, NO, NO), Cost(100.0, NO, NO), Flow()) == {}


def test_room_follows_the_flow_and_milliseconds():
    flow, limit = Flow(progress=0.25), Cost(500.0, NO, 10.0)
    free = room(Cost(100.0), limit, Cost(150.0, 0.0, 20.0), flow, Pace())
    assert free.bytes == pytest.approx(100 + 0.25 * 400 - 150)
    assert free.milliseconds < 0
    early = room(Cost(100.0), limit, Cost(150.0, 0.0, 2.0), Flow(progress=0.0), Pace())
    assert early.milliseconds == pytest.approx(0.6 * (0.95 * 10.0 - 2.0)), "no target of milliseconds on the way"


def test_nothing_is_spent_beyond_what_is_left_and_an_inserted_layer_counts():
    model = mlp(4, 8, 8, 2)
    ledger = Ledger(UnitGraph(model), (), {})
    units = Candidate("units", "0", 1.0, ledger.unit("0"), count=8, most=8)
    layers = [Candidate("layers", n, 1.0, ledger.layer(n), count=8, most=1) for n in ("0", "2")]
    flow, free, limit = Flow(), Cost(1e4, NO, NO), Cost(1e5, NO, NO)
    born = spent([units, *layers], ledger, free, limit, free, flow)
    assert born.layer == "0"
    assert flow.credit["layers 2"] >= 1
    assert spent([units], ledger, free, limit, Cost(100.0, NO, NO), Flow()).units.get("0", 0) <= 1
    assert agreed_offers([units]) == [units]


def test_the_best_group_and_the_last_blocks_stay():
    graph = UnitGraph(mlp(4, 3, 2))
    scores = torch.tensor([3.0, 1.0, 2.0])
    leaving = choose_leaving(graph, Ledger(graph, (), {}), ["0"], {"0": scores}, {}, lambda freed: False)
    assert leaving.units["0"].tolist() == [1, 2]


# --- limits ------------------------------------------------------------------------------------------------------


def test_limits_refuse_what_is_no_number():
    limits = Limits(lambda step: 100.0 if step < 5 else math.nan)
    assert limits.at(1, 4).bytes == 100.0
    with pytest.raises(ValueError, match="budget must be at least 1 byte, got nan at step 5"):
        limits.at(5)
    with pytest.raises(ValueError, match="step_ms must be above 0"):
        limits.step_ms = 0.0
    with pytest.raises(ValueError, match="budget must be at least 1 byte"):
        limits.set_budget(lambda step: 0.0, 0)
    assert limits.budget(0) == 100.0


def test_a_pace_gives_up_where_shrinking_does_not_help():
    pace = Pace()
    assert not pace.too_slow(10.1, 10.0)
    assert pace.too_slow(20.0, 10.0)
    assert pace.shrunk(1000.0, 20.0, 10.0) == 800.0
    assert not pace.too_slow(19.9, 10.0)
    assert pace.room(5.0, 10.0) == pytest.approx(0.6 * 4.5)


def test_growth_stops_when_the_extrapolated_gain_is_small():
    gain = ExtrapolatedGain(tolerance=0.02)
    for size, loss in ((1, 1.0), (2, 0.5), (4, 0.25)):
        gain.observe(size, loss)
    assert gain.predicted() == pytest.approx(0.25 * 0.5 / 0.25)
    assert gain.useful()
    gain.observe(4.5, 0.24)  # no larger by a quarter: the same point
    assert gain.points[-1] == (4, 0.24)
    with pytest.raises(ValueError, match="validate must return a finite loss"):
        gain.observe(8, math.nan)


def test_a_held_out_loss_leaves_training_as_it_was():
    model = mlp(4, 3, 2)
    losses = Losses(ExtrapolatedGain(), lambda: float(torch.rand(())) + 0 * len(model.eval()))
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    losses.ask(model, step=1)
    assert torch.equal(torch.rand(2), expected)
    assert model.training


# --- words -------------------------------------------------------------------------------------------------------


def test_changes_of_one_layer_are_told_together():
    changes = together([Change("units", "0", grown=2), Change("units", "0", pruned=1), Change("blocks", "0", grown=1)])
    event = Event(3, changes, 10, 5, 0.0, 20)
    assert [str(change) for change in changes] == ["0 +2 -1 units", "0 +1 blocks"]
    assert (event.grown, event.pruned) == (3, 1)


def test_a_loss_is_one_number():
    assert one_number(2) == 2.0
    for bad in (torch.ones(2), "loss", None):
        with pytest.raises(ValueError, match="loss must be one number"):
            one_number(bad)
    check_fits(Cost(1.0, 1.0), Cost(1.0, 1.0, NO))
    with pytest.raises(ValueError, match="budget must be at least"):
        check_fits(Cost(2.0, 1.0), Cost(1.0, 1.0, NO))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_squares_of_weights_and_gradients_in_any_dtype(dtype):
    layer = nn.Linear(3, 2).to(dtype)
    assert squared_gradient(layer) == 0.0
    layer.weight.data.fill_(200.0)
    layer.weight.grad = torch.full((2, 3), 100.0, dtype=dtype)
    assert squared_gradient(layer) == pytest.approx(6e4)
    assert row_squares(layer).tolist() == pytest.approx([1.2e5, 1.2e5])


def test_new_blocks_are_looked_for_in_parts_in_turn_and_everywhere_where_many_are_wanted():
    torch.manual_seed(0)
    layer = sn.SparseLinear(256, 256, density=0.05, block_size=8)
    operands = torch.randn(32, 256), torch.randn(32, 256)
    found = [NewBlocks({"0": operands}, turn).best("0", layer, 4) for turn in range(5)]
    rows = [(places // layer.pattern.block_cols).tolist() for places, _ in found]
    assert [sorted({row // 8 for row in each}) for each in rows] == [[0], [1], [2], [3], [0]]
    whole, norms = best_new_blocks(layer, operands, 1)
    best = max(found, key=lambda pair: float(pair[1].max()))
    assert int(whole) in best[0].tolist() and float(norms) == float(best[1].max())
    many = NewBlocks({"0": operands}, 0).best("0", layer, 500)[0]
    assert len({int(place) // layer.pattern.block_cols for place in many}) > 24
    active = set(layer.pattern.linear_places().tolist())
    assert not active & {int(place) for places, _ in found for place in places}
