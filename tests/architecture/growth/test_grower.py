"""The Grower: it grows where it pays, holds its budget, shrinks when told to, and refuses what it cannot do."""

from __future__ import annotations

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import sparsenet as sn
from sparsenet.architecture.growth.grower import Grower


def data(n: int = 256, features: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A problem that needs hidden units: which of four products of two features is largest."""
    x = torch.randn(n, features, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :4] * x[:, 4:8]).argmax(1)


def mlp(*sizes: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inp, out in pairwise(sizes):
        layers += [nn.Linear(inp, out), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def run(model, grower, optimizer, steps: int, shape=None, before=None) -> list:
    """Trains and returns the events."""
    x, y = data()
    x = x if shape is None else x[:, : math.prod(shape)].reshape(len(x), *shape)
    events = []
    for step in range(steps):
        rows = slice(32 * (step % 8), 32 * (step % 8) + 32)
        if before is not None:
            before(step)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        event = grower.step(loss)
        if event is not None:
            events.append(event)
    return events


def test_it_grows_to_the_limit_and_never_passes_it():
    model = mlp(16, 4, 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    grower = Grower(model, optimizer, "96KiB", steps=200, every=10, levels=("units",))
    events = run(model, grower, optimizer, 200)
    assert all(event.bytes <= 96 << 10 for event in events)
    assert grower.bytes > 0.9 * (96 << 10)
    assert model[0].out_features > 4
    assert model[2].out_features > 4
    assert grower.done


def test_bytes_are_those_of_the_model_its_state_and_its_activations():
    model = mlp(16, 32, 4)
    optimizer = torch.optim.Adam(model.parameters())
    grower = Grower(model, optimizer, "1MiB", levels=("units",), every=100)
    run(model, grower, optimizer, 1)
    parameters = sum(p.numel() for p in model.parameters())
    least = 16 * parameters + 4 * 32 * 32  # weights, gradients, two moments; the hidden activations of 32 examples
    assert least <= grower.bytes <= least + 8192


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_decision_that_only_adds_keeps_the_function(mode):
    model = mlp(16, 8, 8, 4).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    grower = Grower(model, optimizer, "1MiB", steps=100, every=10, idle=0.0)
    x = torch.randn(64, 16, dtype=torch.float64)
    seen, decide = [], grower._decide

    def watched():
        getattr(model, mode)()
        before = model(x)
        event = decide()
        seen.append((event.grown, float((model(x) - before).detach().abs().max())))
        model.train()
        return event

    grower._decide = watched
    inputs, targets = data()
    for step in range(50):
        rows = slice(32 * (step % 8), 32 * (step % 8) + 32)
        loss = nn.functional.cross_entropy(model(inputs[rows].double()), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        grower.step(loss)
    assert sum(grown for grown, _ in seen) > 0
    assert max(change for _, change in seen) < 1e-10


def test_continuous_growth_and_growth_in_phases_are_one_code():
    sizes = {}
    for every in (5, 50):
        model = mlp(16, 4, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        grower = Grower(model, optimizer, "1MiB", parameters=900, steps=200, every=every, levels=("units",))
        events = run(model, grower, optimizer, 200)
        sizes[every] = model[0].out_features, sum(event.grown > 0 for event in events)
    assert abs(sizes[5][0] - sizes[50][0]) <= 0.15 * sizes[5][0], sizes
    assert sizes[5][1] > 2 * sizes[50][1] >= 2


def test_a_halved_budget_holds_at_once_and_survivors_keep_their_moments():
    model = mlp(16, 48, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    grower = Grower(model, optimizer, "1MiB", every=200, levels=("units",), idle=0.0)
    run(model, grower, optimizer, 20)
    bytes_before, weight = grower.bytes, model[0].weight
    grower.budget = bytes_before // 2
    rows = {tuple(row.tolist()) for row in optimizer.state[weight]["exp_avg"]}
    event = grower.step(0.5)  # no optimizer step in between: what stays must be bit for bit what it was
    assert event.pruned > 0
    assert grower.bytes <= bytes_before // 2
    assert model[0].weight is weight
    assert {tuple(row.tolist()) for row in optimizer.state[weight]["exp_avg"]} < rows
    run(model, grower, optimizer, 5)


def test_what_goes_first_is_worth_least():
    model = mlp(16, 12, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    grower = Grower(model, optimizer, "1MiB", every=80, levels=("units",), idle=0.0)
    with torch.no_grad():
        model[2].weight[:, 3:9] *= 1e-3
    run(model, grower, optimizer, 40)
    strong = {tuple(row.tolist()) for row in model[0].weight.detach()[[0, 1, 2, 9, 10, 11]]}
    grower.budget = round(
        grower.bytes - 5 * (8 * (16 + 1 + 4) + 2 * 4 * 32)
    )  # five units, what they keep for 32 rows and gradients of it
    grower.step(1.0)
    left = {tuple(row.tolist()) for row in model[0].weight.detach()}
    assert strong < left
    assert len(left) <= 7


def test_block_sparse_networks_grow_and_exchange_blocks():
    generator = torch.Generator().manual_seed(0)
    model = sn.SparseMLP([16, 64, 64, 4], 0.3, 4, distribution="uniform", generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    options = {"parameters": 2500, "density": 0.6, "steps": 300, "every": 10, "levels": ("blocks", "units")}
    grower = Grower(model, optimizer, "1MiB", **options)
    events = run(model, grower, optimizer, 300)
    levels = {change.level for event in events for change in event.changes if change.grown}
    exchanged = sum(change.pruned for event in events for change in event.changes if change.level == "blocks")
    assert levels == {"blocks", "units"}
    assert exchanged > 10
    assert all(layer.out_features % 4 == 0 for layer in model)
    assert 2200 < max(event.parameters for event in events) <= 2500


def test_convolutions_with_norms_and_sums_grow():
    class Residual(nn.Module):
        def __init__(self, branch):
            super().__init__()
            self.branch = branch

        def forward(self, x):
            return x + self.branch(x)

    torch.manual_seed(0)
    branch = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    model = nn.Sequential(
        *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), Residual(branch)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    grower = Grower(model, optimizer, "4MiB", parameters=3000, steps=100, every=10, levels=("units",))
    run(model, grower, optimizer, 100, shape=(1, 4, 4))
    assert model[0].out_channels == model[3].branch[3].out_channels > 4
    assert model[3].branch[0].out_channels > 4
    assert 1500 < sum(p.numel() for p in model.parameters()) <= 3000


def test_layers_are_added_and_train():
    model = mlp(16, 12, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    grower = Grower(model, optimizer, "256KiB", steps=200, every=10, levels=("layers",))
    events = run(model, grower, optimizer, 200)
    added = [change for event in events for change in event.changes if change.level == "layers"]
    assert added
    assert len(grower.insertions) == len(added)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for p in model.parameters())


def test_growth_ends_when_the_held_out_loss_gains_nothing():
    model = mlp(16, 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = iter([2.0, 1.0] + [0.5] * 100)
    options = {"steps": 1000, "every": 10, "levels": ("units",), "validate": lambda: next(losses)}
    grower = Grower(model, optimizer, "1MiB", **options)
    events = run(model, grower, optimizer, 300)
    assert "gain" in events[-1].reason
    assert events[-1].grown == 0
    assert grower.bytes < (1 << 20) / 2


def test_without_a_number_of_steps_it_ends_by_itself():
    model = mlp(16, 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    grower = Grower(model, optimizer, "48KiB", every=5, levels=("units",), idle=0.0)
    run(model, grower, optimizer, 400)
    assert grower.done
    assert 0.8 * (48 << 10) < grower.bytes <= 48 << 10


def test_a_falling_budget_is_followed_all_the_way():
    model = mlp(16, 64, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    falling = lambda step: max(16 << 10, (64 << 10) - 400 * step)  # noqa: E731
    grower = Grower(model, optimizer, falling, steps=200, every=10, levels=("units",))
    events = run(model, grower, optimizer, 200)
    assert all(event.bytes <= falling(event.step) for event in events)
    assert model[0].out_features < 64


def test_attempts_shrink_until_memory_suffices():
    model = mlp(16, 64, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    grower = Grower(model, optimizer, "1MiB", every=100, levels=("units",), idle=0.0)
    run(model, grower, optimizer, 3)
    tries = []

    def closure():
        optimizer.zero_grad()
        tries.append(model[0].out_features)
        if model[0].out_features > 40:
            raise torch.OutOfMemoryError("no")
        loss = model(torch.randn(8, 16)).square().mean()
        loss.backward()
        return loss

    grower.attempt(closure)
    assert tries[0] == 64
    assert tries[-1] <= 40
    assert len(tries) > 1
    with pytest.raises(RuntimeError, match="another error"):
        grower.attempt(lambda: (_ for _ in ()).throw(RuntimeError("another error")))


def test_followers_grow_alike():
    model = mlp(16, 4, 4)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    grower = Grower(model, optimizer, "64KiB", steps=100, every=10, levels=("units",), followers=[average])
    x, y = data()
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        grower.step(loss)
        average.update_parameters(model)
    assert average.module[0].out_features == model[0].out_features > 4
    assert average(x).shape == (256, 4)


def test_events_say_what_happened():
    model = mlp(16, 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    grower = Grower(model, optimizer, "64KiB", steps=100, every=10, levels=("units",))
    events = run(model, grower, optimizer, 40)
    assert [event.step for event in events] == [10, 20, 30, 40]
    assert "+" in str(events[0])
    assert events[0].predicted < 0
    assert events[0].seen is None
    assert events[1].seen == pytest.approx(grower.events[1].seen)
    assert events[1].newborn_ratio > 0
    assert events[1].units == {"0": events[1].units["0"], "2": 4}


# --- resumed ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "sparse", "layers"])
def test_saved_and_resumed_bit_for_bit(kind, tmp_path):
    def build():
        if kind == "sparse":
            model = sn.SparseMLP([16, 8, 8, 4], 1.0, 4, generator=torch.Generator().manual_seed(0))
        else:
            model = mlp(16, 6, 6, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        levels = ("layers", "units") if kind == "layers" else ("blocks", "units")
        return model, optimizer, Grower(model, optimizer, "320KiB", steps=160, every=10, levels=levels)

    x, y = data()

    def steps(model, optimizer, grower, begin, end):
        for step in range(begin, end):
            rows = slice(32 * (step % 8), 32 * (step % 8) + 32)
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            grower.step(loss)

    whole = build()
    steps(*whole, 0, 67)
    sn.save(tmp_path / "a.safetensors", whole[0], whole[1], grower=whole[2], step=67)
    steps(*whole, 67, 120)
    resumed = build()
    checkpoint = sn.load(tmp_path / "a.safetensors", resumed[0], resumed[1], grower=resumed[2])
    steps(*resumed, checkpoint.step, 120)
    assert [str(e) for e in whole[2].events if e.step > 67] == [str(e) for e in resumed[2].events]
    one, other = whole[0].state_dict(), resumed[0].state_dict()
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_limits_that_were_set_in_mid_training_are_resumed(tmp_path):
    def build():
        model = mlp(16, 24, 4)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        return model, optimizer, Grower(model, optimizer, "64KiB", steps=100, every=10, levels=("units",))

    model, optimizer, grower = build()
    run(model, grower, optimizer, 5)
    grower.budget, grower.parameters = grower.bytes - 100, 400
    run(model, grower, optimizer, 1)
    sn.save(tmp_path / "a.safetensors", model, optimizer, grower=grower)
    resumed = build()
    sn.load(tmp_path / "a.safetensors", *resumed[:2], grower=resumed[2])
    assert resumed[2].budget(6) == grower.budget(6) < 64 << 10
    assert (resumed[2].parameters, resumed[2].step_ms) == (400, math.inf)


def test_a_load_that_fails_leaves_the_structure_as_it_was(tmp_path):
    model = mlp(16, 6, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    grower = Grower(model, optimizer, "64KiB", steps=100, every=10, levels=("units",))
    run(model, grower, optimizer, 50)
    sn.save(tmp_path / "a.safetensors", model, optimizer, grower=grower)
    other = mlp(16, 6, 4)
    sgd = torch.optim.SGD(other.parameters(), lr=0.1)
    again = Grower(other, sgd, "64KiB", steps=100, every=10, levels=("units",))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="load"):
        sn.load(tmp_path / "a.safetensors", nn.Sequential(other, nn.Linear(4, 4)), sgd, grower=again)
    assert all(torch.equal(other.state_dict()[name], t) for name, t in before.items())
    assert other[0].out_features == 6


# --- refusals ---------------------------------------------------------------------------------------------------------


def refused(match: str, model: nn.Module | None = None, optimizer=None, **options) -> None:
    """Asserts that a Grower is refused with this sentence and that nothing has changed."""
    model = mlp(16, 8, 4) if model is None else model
    optimizer = torch.optim.Adam(model.parameters()) if optimizer is None else optimizer
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises((ValueError, TypeError), match=match):
        Grower(model, optimizer, **{"budget": "1MiB", **options})
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


def test_a_budget_below_the_seed_network_is_refused():
    refused("budget must be at least", budget="1KiB")
    refused("parameters", parameters=10)


def test_a_budget_that_activations_break_is_refused_at_the_first_step():
    model = mlp(16, 8, 4)
    optimizer = torch.optim.Adam(model.parameters())
    stored = sum(16 * p.numel() for p in model.parameters())
    grower = Grower(model, optimizer, stored + 100)
    with pytest.raises(ValueError, match="budget must be at least"):
        run(model, grower, optimizer, 1)


def test_a_later_budget_that_nothing_would_fit_is_refused():
    model = mlp(16, 8, 4)
    optimizer = torch.optim.Adam(model.parameters())
    grower = Grower(model, optimizer, "1MiB", levels=("units",))
    run(model, grower, optimizer, 2)
    with pytest.raises(ValueError, match="smallest network"):
        grower.budget = 100
    assert grower.budget(0) == 1 << 20


def test_models_that_cannot_be_traced_are_refused():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(16, 4)

        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    refused("traceable", Branching())


def test_models_that_cannot_grow_are_refused():
    refused("the model returns it", nn.Sequential(nn.Linear(16, 4)))
    tied = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    refused("shares a parameter", tied)
    shared = nn.Linear(4, 4)
    refused("called 2 times", nn.Sequential(shared, nn.ReLU(), shared))


def test_compiled_models_are_refused():
    model = mlp(16, 8, 4)
    with pytest.raises(ValueError, match="compiled"):
        Grower(torch.compile(model), torch.optim.Adam(model.parameters()))


def test_optimizers_that_hold_too_little_are_refused():
    model = mlp(16, 8, 4)
    refused("optimizer must hold every trainable parameter", model, torch.optim.Adam(model[0].parameters()))
    with pytest.raises(ValueError, match="got None"):
        Grower(model, None)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"levels": ("neurons",)}, "levels must be one of"),
        ({"grow": "wildly"}, "grow must be one of"),
        ({"prune": "never"}, "prune must be one of"),
        ({"every": 1}, "every must be"),
        ({"every": 10, "ramp": 10}, "ramp must be below"),
        ({"turnover": 2.0}, "turnover must"),
        ({"steps": 0}, "steps must"),
        ({"budget": "lots"}, "amount must be"),
        ({"budget": lambda step: math.nan}, "budget must be"),
        ({"step_ms": -1.0}, "step_ms must"),
    ],
)
def test_numbers_out_of_range_are_refused(options, match):
    refused(match, **options)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_what_is_not_finite_changes_nothing(poison, caplog):
    model = mlp(16, 8, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    grower = Grower(model, optimizer, "1MiB", steps=100, every=10, levels=("units",))
    x, y = data()
    for step in range(10):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        if poison == "gradient" and step == 5:
            model[0].weight.grad[0, 0] = math.nan
        event = grower.step(math.nan if poison == "loss" else loss)
    assert event.changes == ()
    assert "NaN" in event.reason
    assert model[0].out_features == 8
    assert "keeps the network" in caplog.text
