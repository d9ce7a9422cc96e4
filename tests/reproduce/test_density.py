"""``sparsenet reproduce density``, shrunk onto digits-sized data: parts run, resume, tables and figures come out."""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("optuna")

from sparsenet import data as datasets
from sparsenet.reproduce import density as reproduce_density
from sparsenet.reproduce import density_tables
from sparsenet.reproduce import parts as reproduce_parts


def arguments(out, *extra):
    parser = argparse.ArgumentParser()
    reproduce_density.add_arguments(parser)
    return parser.parse_args(["--out", str(out), *extra])


@pytest.fixture
def small_images(monkeypatch):
    """Stands for MNIST and Fashion-MNIST: 28 x 28 pictures of ten patterns with noise, 600 + 200."""
    g = torch.Generator().manual_seed(0)
    prototypes = torch.rand(10, 28, 28, generator=g) * 255
    y = torch.arange(800) % 10
    x = (0.5 * prototypes[y] + 0.5 * 255 * torch.rand(800, 28, 28, generator=g)).to(torch.uint8)
    dataset = datasets.Dataset("toy", x[:600], y[:600], x[600:], y[600:], 10, "here")
    monkeypatch.setattr(reproduce_density.Reproduction, "load", lambda self, name: replace(dataset, name=name))


def test_counts_formula_and_seeds(tmp_path, capsys):
    args = arguments(tmp_path, "--parts", "a1_counts,a7_gradient_flow,same_seed")
    assert reproduce_density.run(args) == 0
    printed = capsys.readouterr().out
    assert printed.count("| met |") == 3 and "NOT met" not in printed
    assert json.loads((tmp_path / "a1_counts.json").read_text())["u35_in_blocks_of_16"] == 794 * 35
    before = (tmp_path / "a1_counts.json").stat().st_mtime_ns
    assert reproduce_density.run(args) == 0
    assert (tmp_path / "a1_counts.json").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="out must be a folder of parts of scale 0.5, got a1_counts of scale 1.0"):
        reproduce_density.run(arguments(tmp_path, "--scale", "0.5"))


def test_parts_that_train(tmp_path, capsys, small_images):
    pytest.importorskip("matplotlib")
    names = "a2_fashion,a3_mnist_random,a4_estimators,a6_mnist"
    args = arguments(tmp_path, "--parts", names, "--scale", "0.05", "--workers", "1")
    assert reproduce_density.run(args) == 0
    printed = capsys.readouterr().out
    for expected in ("| A2 |", "| A3 |", "| A4 |", "1 to 32 hidden layers, MNIST", "poster", "NASWOT"):
        assert expected in printed
    for name in ("a2_fashion.png", "a6_mnist.png", "search_mnist_random_0/accuracy_against_weights.png"):
        assert (tmp_path / name).stat().st_size > 1000
    assert (tmp_path / "tables.md").read_text() in printed
    assert density_tables.tables(reproduce_parts.read_results(tmp_path / "results.json")) in printed
    (found,) = json.loads((tmp_path / "a3_mnist_random.json").read_text())["searches"]
    assert found["active"] <= 60000 and found["trials"] == 7


@pytest.mark.slow
def test_every_part(tmp_path, capsys, small_images):
    assert reproduce_density.run(arguments(tmp_path, "--scale", "0.05", "--workers", "1")) == 0
    printed = capsys.readouterr().out
    assert "two workers" in printed and "| A5 |" in printed
    assert {p.stem for p in tmp_path.glob("*.json")} == {*reproduce_density.PARTS, "results"}


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"parts must be some of a1_counts, .* got a9"):
        reproduce_density.run(arguments(tmp_path, "--parts", "a9"))
    with pytest.raises(ValueError, match=r"scale must lie in \(0, 1\], got 2.0"):
        reproduce_density.run(arguments(tmp_path, "--scale", "2"))


def test_tables_by_hand():
    rows = [
        {"active": 7940, "kind": kind, "seed": s, "accuracy": a, "loss": 0.5, "mean_accuracy": a}
        for kind, values in (("sparse", (80.0, 82.0)), ("dense", (81.0, 82.0)))
        for s, a in enumerate(values)
    ]
    part = {"rows": rows, "epochs": 2, "p_value": 0.5, "wall_seconds": 1.0, "cpu_seconds": 1.0}
    assert density_tables.capacity_gaps(part, 7940) == {7940: 0.5}
    text = density_tables.tables({"a2_fashion": part})
    assert "| A2 | Fashion-MNIST gap: mean <= 0.7, max <= 1.2 | 0.50, 0.50 | met |" in text
    assert "81.00 ± 1.41" in text and "p = 0.50" in text
    more = [{**r, "seed": r["seed"] + 2, "accuracy": r["accuracy"] - 1} for r in rows]
    p_value = reproduce_density.wilcoxon([*rows, *more], "active")
    assert p_value == pytest.approx(0.5)  # two pairs differ, in the same way: 2 * (1 / 2)^2


def test_data_are_shrunk(monkeypatch):
    pytest.importorskip("sklearn")
    task = reproduce_density.Reproduction(out=None, scale=0.5)
    assert 700 <= len(task.load("digits").train_y) <= 740
    assert (task.count(30, 6), task.seeds) == (21, (0,))


def test_the_page_shows_the_results_that_are_kept():
    root = Path(__file__).resolve().parents[2]
    tables = density_tables.tables(reproduce_parts.read_results(root / "bench/results/reproduce_density.json"))
    assert tables in (root / "docs/results/density_search.md").read_text()
