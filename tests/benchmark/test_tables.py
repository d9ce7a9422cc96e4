"""The tables of README and docs are what bench/results says, and nothing that was not measured is shown."""

import importlib.util
import json
from pathlib import Path

import pytest

from sparsenet.benchmark.cases import Case
from sparsenet.benchmark.goals import Goal
from sparsenet.benchmark.machine import Ceilings
from sparsenet.benchmark.results import Results
from sparsenet.benchmark.timing import Quartiles
from sparsenet.benchmark.trial import Row

ROOT = Path(__file__).resolve().parents[2]
HOST = {"cpu": "a processor", "cores": 2, "isa": "avx2", "torch": "2"}


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("bench_tables", ROOT / "bench" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(density, speedup, goal=None, rivals=()):
    case = Case((4096, 4096), 512, density).fields()
    speedups = {"sparsenet": speedup} | {name: 0.5 for name in rivals}
    return Row(
        op="block_sparse_linear", phase="step", case=case, reference="dense",
        times={name: Quartiles(1.0, 1.0, 1.0) for name in ("sparsenet", "dense", *rivals)},
        speedups={name: Quartiles(value, value, value) for name, value in speedups.items()},
        metrics={"eff": density * speedup}, goal=goal, rounds=5, date="2026-01-02T00:00Z",
    )  # fmt: skip


def test_pages_are_what_the_results_say(tables, capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().err


def test_a_stale_page_is_found_and_written_anew(tables, tmp_path, monkeypatch, capsys):
    (tmp_path / "docs/results").mkdir(parents=True)
    stale = "a\n<!-- performance: begin -->\nold\n<!-- performance: end -->\nb\n"
    demo = "<!-- demo: begin -->\n<!-- demo: end -->\n"
    (tmp_path / "README.md").write_text(stale + demo)
    (tmp_path / "docs/results/benchmarks.md").write_text(stale)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.main(["--check"]) == 1 and "README.md, benchmarks.md" in capsys.readouterr().err
    assert tables.main([]) == 0 and tables.main(["--check"]) == 0
    assert (tmp_path / "README.md").read_text() == stale.replace("old\n", "") + demo
    (tmp_path / "run").mkdir()
    summary = {
        "folder": "/of/this/machine", "sizes": [64, 32, 10], "environment": {"threads": 2}, "budget_bytes": 2**20,
        "measured_peak_bytes": 2**19, "dense_peak_bytes": 2**22, "rewires": 7, "test_accuracy": 0.987,
        "seconds_total": 12.3, "speedup_over_dense": 3.21, "density": 0.25,
    }  # fmt: skip
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert tables.main(["--main-job", str(tmp_path / "run")]) == 0
    assert "**1 MiB** (measured 512 KiB; dense with the same optimizer: 4 MiB)" in (tmp_path / "README.md").read_text()
    assert "/of/this" not in (tmp_path / "main_job.json").read_text()
    with pytest.raises(ValueError, match="tables: the page must hold the markers 'x: begin' and 'x: end'"):
        tables.with_section("no markers", "x", "")


def test_figures_come_from_the_rows(tables):
    rivals = ("masked_dense", "torch_bsr")
    found = Results(
        HOST, Ceilings({"float32": 100.0}, 10.0), (row(0.1, 8.0, rivals=rivals), row(0.5, 1.5, rivals=rivals))
    )
    text = tables.readme({"block_sparse_linear": found})
    assert "| **sparsenet** | **8×** | **1.5×** |" in text and "| masked dense | 0.5× | 0.5× |" in text
    assert "SparseLab" not in text, "it was not measured"
    assert "a processor, 2 cores, avx2" in text and "2026-01-02" in text
    plain = (row(0.1, 8.0, Goal("eff", 0.9)), row(1.0, 1.5, Goal("eff", 1.1)))
    text = tables.benchmarks({"block_sparse_linear": Results(HOST, found.ceilings, plain)}, {})
    assert "0.80 ≥ 0.9 ✗ | 1.50 ≥ 1.1 ✓" in text and "none: 1.50x at 100%" in text
    assert text.startswith("1 of 2 rows with a goal reach it")
    assert tables.readme({}) == "" and tables.benchmarks({}, {}) == ""
