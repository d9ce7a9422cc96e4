"""``sparsenet reproduce gates``, shrunk onto toy images: parts run and resume, tables and figures come out."""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from sparsenet import data as datasets
from sparsenet.reproduce import gate_cells, gate_mechanics, gate_tables, gate_training
from sparsenet.reproduce import gates as reproduce_gates
from sparsenet.reproduce import parts as reproduce_parts
from sparsenet.reproduce.gate_training import TrainingSettings, held_out, of_classes, prepare, train
from sparsenet.reproduce.gated_networks import caffenet_parameters, lenet, lenet_parameters, truncated_svd

WITHOUT_PICTURE = {"b1_gates_alone", "b9_parameters", "b2_fashion", "al_mnist", "pretrained", "caffenet"}


def arguments(out, *extra):
    parser = argparse.ArgumentParser()
    reproduce_gates.add_arguments(parser)
    return parser.parse_args(["--out", str(out), *extra])


@pytest.fixture
def small_images(monkeypatch):
    """Stands for MNIST and Fashion-MNIST: 28 x 28 pictures of ten patterns with noise, 700 + 200; LeNet in small."""
    g = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, 28, 28, generator=g) * 255
    y = torch.arange(900) % 10
    x = (0.5 * prototypes[y] + 0.5 * 255 * torch.rand(900, 28, 28, generator=g)).to(torch.uint8)
    dataset = datasets.Dataset("toy", x[:700], y[:700], x[700:], y[700:], 10, "here")
    monkeypatch.setattr(gate_cells.Reproduction, "load", lambda self, name: replace(dataset, name=name))
    monkeypatch.setattr(gate_mechanics, "SPARSE_WIDTH", 64)


@pytest.mark.slow
def test_gates_alone(tmp_path, capsys):
    assert reproduce_gates.run(arguments(tmp_path, "--parts", "b1_gates_alone")) == 0
    assert "| B1 | gates alone, k = .4: 150 ± 15 of 500 | 150, 157, 136 | met |" in capsys.readouterr().out


def test_counts(tmp_path, capsys):
    assert reproduce_gates.run(arguments(tmp_path, "--parts", "b9_parameters")) == 0
    printed = capsys.readouterr().out
    assert "| B9 | CaffeNet 60.97M, AL-fc 19.83M | 60.97M, 19.83M | met |" in printed
    assert (tmp_path / "tables.md").read_text().strip() in printed


def test_published_architectures_are_counted():
    assert lenet_parameters((20, 50, 500)) == 431_080 and lenet_parameters((16, 26)) == 15_012
    assert lenet_parameters((20, 50, 20)) == 41_800 and caffenet_parameters() == 60_965_224
    model = lenet((4, 5, 6))
    assert gate_cells.weights_and_biases(model) == lenet_parameters((4, 5, 6))


def test_the_short_table_and_the_race(tmp_path, capsys, small_images, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(gate_cells.Reproduction, "count", lambda self, full, least=1: least)  # one epoch
    assert reproduce_gates.run(arguments(tmp_path, "--parts", "b2_fashion,running_process", "--scale", "0.01")) == 0
    printed = capsys.readouterr().out
    for expected in ("| B2 |", "| B3 |", "| B5 |", "| B7 |", "running process", "SVD, rank 10"):
        assert expected in printed
    assert (tmp_path / "running_process.png").stat().st_size > 1000
    part = json.loads((tmp_path / "b2_fashion.json").read_text())
    learnt, again = part["learnt"][0], part["direct"][0]
    assert learnt["parameters"] == again["parameters"] == lenet_parameters(learnt["widths"])
    assert learnt["largest_change"]["float64"] < 1e-10


@pytest.mark.slow
def test_every_part(tmp_path, capsys, small_images):
    pytest.importorskip("optuna")
    assert reproduce_gates.run(arguments(tmp_path, "--scale", "0.01")) == 0
    printed = capsys.readouterr().out
    assert "| B8 |" in printed and "| B4 |" in printed and "Bayesian" in printed and "CaffeNet-shaped" in printed
    assert {p.stem for p in tmp_path.glob("*.json")} == {*reproduce_gates.PARTS, "results"}
    pictures = {p.stem for p in tmp_path.glob("*.png")}
    assert pictures == {n for n in reproduce_gates.PARTS if n not in WITHOUT_PICTURE}


def test_a_kill_loses_one_cell(tmp_path):
    task = gate_cells.Reproduction(tmp_path)
    assert task.cell("part", "a", lambda: {"n": 1})["n"] == 1
    assert task.cell("part", "b", lambda: {"n": 2})["n"] == 2
    file = tmp_path / "cells" / "part.jsonl"
    file.write_text(file.read_text() + '{"key": "c", "sca')  # killed while writing
    assert task.cell("part", "a", lambda: {"n": 9})["n"] == 1
    assert task.cell("part", "c", lambda: {"n": 3})["n"] == 3
    assert [json.loads(line)["key"] for line in file.read_text().splitlines()] == ["a", "b", "c"]
    quick = gate_cells.Reproduction(tmp_path, scale=0.5)
    assert quick.cell("part", "a", lambda: {"n": 4})["n"] == 4  # another scale is another experiment
    assert "open" not in task.cell("part", "d", lambda: {"n": 1, "open": [[3]]})
    assert task.cell("part", "d", dict, curves=True)["open"] == [[3]]


def test_training_with_gates_gets_smaller_and_the_penalty_warms_up(small_images):
    images = prepare(gate_cells.Reproduction(None).load("mnist"))
    settings = TrainingSettings(images=640, epochs=3, lambda_3=0.02, lambda_1=1e-3, compact_every=4)
    runs = {}
    for warmup in (0.0, 1.0):
        torch.manual_seed(0)
        model = lenet((4, 5, 40), gate_cells.ALL, generator=torch.Generator().manual_seed(0), map_start=1.0)
        runs[warmup] = train(model, images, settings.with_(warmup=warmup), seed=0)
        assert model[7].out_features == runs[warmup].intervals[-1].units["7"] - runs[warmup].intervals[-1].removed
    assert sum(runs[0.0].open[-1]) < sum(runs[1.0].open[-1]) < 49
    with pytest.raises(RuntimeError, match="train: the loss must be finite, got (nan|inf)"):
        train(lenet((4, 5, 40)), images, settings.with_(lr=1e6), seed=0)


def test_rates_of_gates_rise_and_may_settle():
    model = lenet((2, 2, 2), gate_cells.ALL)
    rates = {}
    for settle in (False, True):
        settings = TrainingSettings(lr=2.0, gate_lr=1.0, warmup=0.5, settle=settle)
        optimizer = gate_training._optimizer(model, settings)
        rates[settle] = []
        for done in (0.0, 0.25, 0.5, 1.0):
            gate_training._set_rates(optimizer, settings, done)
            rates[settle].append(tuple(group["lr"] for group in optimizer.param_groups))
    at_quarter = 0.5 + 2**0.5 / 4
    assert rates[False] == [(2.0, 0.0), pytest.approx((2 * at_quarter, 0.5)), pytest.approx((1.0, 1.0)), (0.0, 1.0)]
    assert rates[True] == [
        (2.0, 0.0),
        pytest.approx((2 * at_quarter, at_quarter / 2)),
        (pytest.approx(1.0), 0.5),
        (0, 0),
    ]


def test_images_of_some_classes_and_held_out(small_images):
    images = prepare(gate_cells.Reproduction(None).load("mnist"))
    few = of_classes(images, 3)
    assert few.num_classes == 3 and int(few.train_y.max()) == 2 and len(few.train_x) == 210
    held = held_out(images, 500, 100)
    assert torch.equal(held.test_x, images.train_x[500:600]) and len(held.train_y) == 500


def test_truncated_svd_of_full_rank_is_the_layer():
    layer = torch.nn.Linear(6, 4)
    x = torch.randn(3, 6)
    torch.testing.assert_close(truncated_svd(layer, 4)(x), layer(x))
    assert (truncated_svd(layer, 1)(x) - layer(x)).abs().max() > 0.01


def test_data_from_a_folder_of_its_own_or_of_mnists_files(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(gate_cells, "load_dataset", lambda name, folder, fallback: asked.append((name, folder)))
    monkeypatch.setattr(gate_cells.datasets, "load", lambda folder: asked.append(("direct", folder)))
    (tmp_path / "fashion-mnist").mkdir()
    task = gate_cells.Reproduction(tmp_path, str(tmp_path))
    task.load("fashion-mnist")
    task.load("mnist")
    gate_cells.Reproduction(tmp_path, str(tmp_path / "fashion-mnist")).load("fashion-mnist")
    assert asked == [("fashion-mnist", str(tmp_path)), ("direct", str(tmp_path)), ("fashion-mnist", None)]


def test_bad_arguments(tmp_path, small_images):
    with pytest.raises(ValueError, match=r"parts must be some of b1_gates_alone, .* got b99"):
        reproduce_gates.run(arguments(tmp_path, "--parts", "b99"))
    with pytest.raises(ValueError, match=r"scale must lie in \(0, 1\], got 2.0"):
        reproduce_gates.run(arguments(tmp_path, "--scale", "2"))
    with pytest.raises(ValueError, match=r"pretrained must follow al_mnist"):
        reproduce_gates.run(arguments(tmp_path, "--parts", "pretrained", "--quick"))


# --- tables by hand -------------------------------------------------------------------------------------------------


def cell(widths, accuracy, **more):
    change = {"largest_change": {"float32": 2e-6, "float64": 1e-12}, "largest_output": 20.0, "folded": []}
    shape = {"widths": widths, "parameters": lenet_parameters(widths)}
    return {**shape, "accuracy": accuracy, **change, "wall_seconds": 1.0, **more}


def test_checks_by_hand():
    svd = [{"rank": 10, "parameters": 44_080, "accuracy": 86.0, "tuned": 87.0}]
    part = {
        "baseline": [{"accuracy": 88.0, "svd": svd}],
        "learnt": [cell([20, 50, 20], 87.0, name="fc"), cell([9, 17, 33], 86.0, name="all")],
        "direct": [cell([20, 50, 20], 87.5, name="fc"), cell([9, 17, 33], 87.5, name="all")],
        "epochs": 6,
        "images": 15_000,
    }
    part |= {"wall_seconds": 1.0, "cpu_seconds": 1.0}
    text = gate_tables.tables({"b2_fashion": part})
    assert "| B2 | <= 25 neurons, within 1.5 points of ungated | 20 neurons; 87.00 % against 88.00 % without" in text
    assert "| B3 | all layers: <= 15K parameters, >= 85.5 % | 13.4K; 86.00 % | met |" in text
    assert "all layers: AL against direct <= 1.0 | 1.50 | NOT met |" in text
    assert "| B7 | AL >= SVD of rank 10 + .3 | 87.00 % against 86.00 % (87.00 % tuned) | met |" in text
    assert "| 2.0e-06, 1.0e-12 (2 networks, 0 collapsed layers); float32, of the largest logit: 1.0e-07 | met |" in text


def test_depth_and_class_checks_by_hand():
    rows = [cell([20, 50], 99.0, hidden=h, initial=h + 3, final=f) for h, f in ((2, 4), (8, 8))]
    timing = {"wall_seconds": 1.0, "cpu_seconds": 1.0}
    text = gate_tables.tables({"b8_depth": {"rows": rows, **timing}})
    assert "| B8 | final depths within 3 of each other | 4.0 (initial 6; means over seeds) | NOT met |" in text
    rows = [cell([20, 50, n], 99.0, classes=c) for c, n in ((2, 3), (3, 5), (4, 4))]
    assert gate_tables.classes_spearman(rows) == pytest.approx(0.5)


def test_relatives_check_takes_the_best_setting_that_is_small_enough():
    reference = [cell([20, 50, 20], 88.0)]
    rows = [cell([20, 50, n], a, gates="slimming", lambda_3=s) for s, n, a in ((1.0, 40, 89.0), (2.0, 18, 87.6))]
    ((_, target, ours, verdict),) = gate_tables._relative_checks(rows, reference)
    assert target.startswith("slimming: >= 87.50 % at <= 41.8K") and ours == "87.60 % at 40.2K" and verdict == "met"


def test_cells_times_are_summed_however_deep():
    numbers = {"a": [{"cell_cpu_seconds": 1.0}, {"b": {"cell_cpu_seconds": 2.0, "c": 1}}], "d": 4}
    assert gate_tables._all_of(numbers, "cell_cpu_seconds") == [1.0, 2.0]
    assert partial(gate_tables._all_of, numbers)("absent") == []


def test_the_page_shows_the_results_that_are_kept():
    root = Path(__file__).resolve().parents[2]
    tables = gate_tables.tables(reproduce_parts.read_results(root / "bench/results/reproduce_gates.json"))
    assert tables in (root / "docs/results/gates.md").read_text()
