"""``sparsenet reproduce embedding``, shrunk: every part runs, tables and figures come out, errors are named."""

import argparse
import json
from pathlib import Path

import pytest

from sparsenet.reproduce import embedding as reproduce_embedding
from sparsenet.reproduce import embedding_tables
from sparsenet.reproduce import parts as reproduce_parts


def arguments(out, *extra):
    parser = argparse.ArgumentParser()
    reproduce_embedding.add_arguments(parser)
    return parser.parse_args(["--out", str(out), "--scale", "0.004", *extra])


PARTS = "c1_fixture,c2_leaky_relu,c7_leaky_relu,c4_leaky_relu_14_seed0,c6_sparsity_weights"


def test_the_quick_look(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert reproduce_embedding.run(arguments(tmp_path, "--parts", PARTS)) == 0
    printed = capsys.readouterr().out
    for expected in ("Acceptance checks", "| C1 |", "| C2 |", "| C3 |", "| C4 |", "| C6 |", "| C7 |", "FVU"):
        assert expected in printed
    one = json.loads((tmp_path / "c1_fixture.json").read_text())
    assert one["largest_error"] <= 1e-5 and one["lossless"] and one["module_error"] <= 1e-4
    assert json.loads((tmp_path / "c7_leaky_relu.json").read_text())["permutation_distance"] <= 1e-4
    for name in ("embedding_fronts.png", "embedding_training.png"):
        assert (tmp_path / name).stat().st_size > 1000
    before = (tmp_path / "c1_fixture.json").stat().st_mtime_ns
    assert reproduce_embedding.run(arguments(tmp_path, "--parts", "c1_fixture")) == 0
    assert (tmp_path / "c1_fixture.json").stat().st_mtime_ns == before  # done parts are not run again


@pytest.mark.slow
def test_every_part(tmp_path, capsys):
    assert reproduce_embedding.run(arguments(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "SWAT-NN's mode" in printed and "transformer / transformer" in printed
    assert {p.stem for p in tmp_path.glob("*.json")} == {*reproduce_embedding.PARTS, "results"}


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match=r"parts must be some of c1_fixture, .* got c9"):
        reproduce_embedding.run(arguments(tmp_path, "--parts", "c9"))
    args = arguments(tmp_path)
    args.scale = 0.0
    with pytest.raises(ValueError, match=r"scale must lie in \(0, 1\], got 0.0"):
        reproduce_embedding.run(args)


def test_no_parts_no_tables():
    assert "Acceptance checks" in embedding_tables.tables({})


def test_the_page_shows_the_results_that_are_kept():
    root = Path(__file__).resolve().parents[2]
    tables = embedding_tables.tables(reproduce_parts.read_results(root / "bench/results/reproduce_embedding.json"))
    assert tables in (root / "docs/results/embedding.md").read_text()
