"""``sparsenet reproduce growth`` on made data: every part runs and goes on where it was killed; tables and figures."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from made_images import write_cifar, write_idx

from sparsenet import cli
from sparsenet.reproduce import growth, growth_rivals, growth_tables
from sparsenet.reproduce.growth_cells import Growth
from sparsenet.reproduce.growth_pruning import _dense
from sparsenet.reproduce.growth_stops import DENSITIES


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """Fashion-MNIST and MNIST of 10 x 10 pixels."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("fashion-mnist", "mnist"):
        write_idx(folder / name)
    return folder


def run(out, data_dir, parts: str, *more: str) -> int:
    arguments = ["reproduce", "growth", "--data-dir", str(data_dir), "--out", str(out), "--parts", parts]
    return cli.main([*arguments, "--scale", "0.02", "--seeds", "1", *more])


def rows_of(out, part: str) -> list[dict]:
    return json.loads((out / f"{part}.json").read_text())["rows"]


# --- every part -------------------------------------------------------------------------------------------------------

CELLS = {  # how many trainings each part has, with one seed
    "d1_one_shot": 3,
    "d2_gradual": 6,
    "d3_rewired_fashion": 21,
    "d4_rewired_digits": 4,
    "d5_growth": 10,
    "d7_budgets": 4,
    "d10_mlp": 1,
    "d10_convolutional": 1,
    "start_points": 4,
}
LONG = {"d2_gradual", "d4_rewired_digits", "d7_budgets"}
GROWING = {"d5_growth", "d10_mlp", "d10_convolutional", "start_points"}  # a few decisions, where 0.02 leaves no step


@pytest.mark.parametrize("part", [pytest.param(p, marks=pytest.mark.slow if p in LONG else ()) for p in CELLS])
def test_a_part_runs_from_the_command_line(part, tmp_path, data_dir, capsys):
    pytest.importorskip("matplotlib")
    assert run(tmp_path, data_dir, part, "--scale", "0.2" if part in GROWING else "0.02") == 0
    rows = rows_of(tmp_path, part)
    assert len(rows) == CELLS[part]
    assert all(0.0 <= row["score"] <= 100.0 for row in rows)
    printed = capsys.readouterr().out
    assert part == "start_points" or f"| {part.split('_')[0].upper()} |" in printed
    assert (tmp_path / "tables.md").read_text().strip() in printed


def test_tables_on_two_problems(tmp_path, data_dir, monkeypatch, capsys):
    monkeypatch.setattr(growth_rivals, "TABLES", ("wine", "diabetes"))
    assert run(tmp_path, data_dir, "d8_tables") == 0
    rows = rows_of(tmp_path, "d8_tables")
    assert {(row["task"], row["kind"]) for row in rows} == {
        (task, kind)
        for task in ("wine", "diabetes")
        for kind in ("dense", "grown", "gradient boosting", "scikit-learn's MLP")
    }
    weights = {(row["task"], row["kind"]): row.get("weights") for row in rows}
    assert all(weights[task, "grown"] <= 0.21 * weights[task, "dense"] for task in ("wine", "diabetes"))
    assert "| D8 | wine, accuracy |" in capsys.readouterr().out
    assert (tmp_path / "tables.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_part_with_the_sweep_of_densities(tmp_path, data_dir, capsys):
    assert run(tmp_path, data_dir, "d13_stops") == 0
    assert len(rows_of(tmp_path, "d13_stops")) == 4 * (len(DENSITIES) + 1)
    assert "| D13 | characters, density that stops itself |" in capsys.readouterr().out
    assert (tmp_path / "stops.png").stat().st_size > 1000


def test_gromo_grows_the_same_network(tmp_path, data_dir):
    pytest.importorskip("gromo")
    assert run(tmp_path, data_dir, "d12_gromo") == 0
    assert rows_of(tmp_path, "d12_gromo")[0]["units"] >= 8


def test_without_gromo_its_part_is_skipped_loudly(tmp_path, data_dir, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gromo", None)
    monkeypatch.setattr(growth_rivals.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path, data_dir, "d12_gromo") == 0
    printed = capsys.readouterr().out
    assert "d12_gromo is SKIPPED: gromo is not installed" in printed
    assert "**d12_gromo was skipped**: gromo is not installed." in printed


def test_what_is_called_grown_has_grown(tmp_path, data_dir):
    task = Growth(tmp_path, str(data_dir), scale=0.2, seeds=1)
    sizes = {row["kind"]: row["parameters"] for row in growth.PARTS["d5_growth"](task)["rows"]}
    most = sizes.pop("75 units from the start")
    least = sizes.pop("8 units, not grown")
    assert least == 8 * 101 + 90 and most == 75 * 101 + 760
    assert all(size <= most for size in sizes.values())
    assert sizes["grown, continuous"] > 2 * least
    (row,) = growth.PARTS["d10_convolutional"](task)["rows"]
    assert sum(row["widths"]) > 20 and row["parameters"] <= 6200


# --- CIFAR ------------------------------------------------------------------------------------------------------------


def test_cifar_is_read_from_its_binary_files_and_skipped_loudly_without_them(tmp_path, capsys, monkeypatch):
    for name in ("SPARSENET_DATA", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "nothing"))  # what this machine has is not looked at
    folder, out = tmp_path / "data", tmp_path / "out"
    folder.mkdir()
    assert run(out, folder, "d9_cifar") == 0
    printed = capsys.readouterr().out
    assert "d9_cifar is SKIPPED: load: cifar10 is in none of" in printed
    assert "put the binary version into DATA_DIR/cifar10" in printed and "**d9_cifar was skipped**" in printed
    assert rows_of(out, "d9_cifar") == []
    write_cifar(folder / "cifar10")  # now it is there, and the part is run
    assert run(out, folder, "d9_cifar") == 0
    assert "| D9 | CIFAR-10, 90 % sparse below dense, points |" in capsys.readouterr().out
    assert [row["kind"] for row in rows_of(out, "d9_cifar")] == ["dense", "90 % sparse"]
    dense, sparse = (row["weights"] for row in rows_of(out, "d9_cifar"))
    assert sparse < 0.2 * dense
    write_cifar(folder / "cifar100", classes=100)
    assert run(out, folder, "d9_cifar100") == 0
    assert "| D9 | CIFAR-100, 90 % sparse below dense, points |" in capsys.readouterr().out


# --- kills, seeds, scales ---------------------------------------------------------------------------------------------


def test_a_killed_run_goes_on_from_its_cells(tmp_path, data_dir, monkeypatch):
    trained = []
    train = growth.PARTS["d10_mlp"].__globals__["train"]

    def counted(*args, **options):
        trained.append(options["seed"])
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(*args, **options)

    monkeypatch.setitem(growth.PARTS["d5_growth"].__globals__, "train", counted)
    with pytest.raises(KeyboardInterrupt):
        growth.PARTS["d5_growth"](Growth(tmp_path, str(data_dir), scale=0.02, seeds=1))
    rows = growth.PARTS["d5_growth"](Growth(tmp_path, str(data_dir), scale=0.02, seeds=1))["rows"]
    assert len(rows) == 10 and len(trained) == 3 + 8
    growth.PARTS["d5_growth"](Growth(tmp_path, str(data_dir), scale=0.02, seeds=1))
    assert len(trained) == 3 + 8


def test_another_scale_has_cells_of_its_own_and_more_seeds_are_trained(tmp_path, data_dir, monkeypatch):
    full, quick = Growth(tmp_path), Growth(tmp_path, scale=0.5)
    assert full.cells == tmp_path / "cells"
    assert quick.cell("d5", "a", lambda: {"score": 1})["score"] == 1
    assert full.cell("d5", "a", lambda: {"score": 2})["score"] == 2
    assert quick.cell("d5", "a", lambda: {"score": 3})["score"] == 1
    part = lambda task: {"rows": [{"seed": seed, "score": 1.0} for seed in task.all_seeds]}  # noqa: E731
    monkeypatch.setattr(growth, "PARTS", {"start_points": part})
    monkeypatch.setattr(growth_tables, "tables", lambda numbers: "")
    monkeypatch.setattr(growth_tables, "figures", lambda numbers, folder: [])
    for seeds, found in ((1, [0]), (3, [0, 1, 2]), (2, [0, 1, 2])):  # a part of more seeds stays
        assert run(tmp_path, data_dir, "start_points", "--scale", "1", "--seeds", str(seeds)) == 0
        assert [row["seed"] for row in rows_of(tmp_path, "start_points")] == found


def test_the_dense_network_to_prune_is_trained_once(tmp_path, data_dir, monkeypatch):
    task = Growth(tmp_path, str(data_dir), scale=0.02)
    data = task.images("fashion-mnist")
    first = _dense(task, data, 0).state_dict()
    monkeypatch.setitem(_dense.__globals__, "train", None)
    again = _dense(task, data, 0).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_scales_leave_something_to_do():
    task = Growth("nowhere")
    assert (task.epochs(15), task.every(25), list(task.all_seeds)) == (15, 25, [0, 1, 2])
    task = Growth("nowhere", scale=0.02)
    assert (task.epochs(15), task.epochs(2), task.every(25), list(task.all_seeds)) == (pytest.approx(1.2), 1, 2, [0])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--parts", "d99"), r"parts must be some of d1_one_shot, .* got d99"),
        (("--scale", "0"), r"scale must lie in \(0, 1\], got 0.0"),
        (("--seeds", "0"), "seeds must be at least 1, got 0"),
        (("--data-dir", "not/here"), "data-dir must be a folder, got 'not/here'"),
    ],
)
def test_bad_arguments(more, message, tmp_path, data_dir, capfd):
    import re

    assert run(tmp_path, data_dir, "d10_mlp", *more) == 2
    assert re.search(message, capfd.readouterr().err)
    assert not (tmp_path / "d10_mlp.json").exists()
