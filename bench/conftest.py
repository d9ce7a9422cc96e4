"""Shared by the bench files: pytest-benchmark drives the rounds, and rows are written as JSON.

    pytest bench/bench_block_sparse_linear.py --results bench/results

``--results FOLDER`` writes ``FOLDER/<stem>.json``, keeping rows measured there before on the same machine and versions.
``--contest-seconds`` is the time for each row. Nothing here fails on a time.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsenet.benchmark import results
from sparsenet.benchmark.timing import Race, Timings
from sparsenet.benchmark.trial import Row, Trial

_rows: dict[str, list[Row]] = {}


def pytest_addoption(parser):
    parser.addoption("--results", type=Path, help="folder for the rows as JSON")
    parser.addoption("--contest-seconds", type=float, default=1.0, help="about how long each row is measured")
    parser.addoption("--suffix", default="", help="appended to the names of the result files")


@pytest.fixture
def record(request):
    """Keeps a row that was measured."""

    def keep(row: Row) -> Row:
        stem = request.path.stem.removeprefix("bench_") + request.config.getoption("--suffix")
        _rows.setdefault(stem, []).append(row)
        return row

    return keep


@pytest.fixture
def contest(request, benchmark, record):
    """``contest(trial)``: pytest-benchmark times ours, its untimed set-up of each round times everybody else."""
    benchmark.name = request.node.name

    def run(trial: Trial) -> Row:
        def drive(race: Race) -> Timings:
            benchmark.pedantic(race.run_subject, setup=race.run_others, rounds=race.rounds)
            stats = benchmark.stats
            return race.run() if stats is None else race.timings(stats.stats.data)  # None: --benchmark-disable

        row = record(trial.run(request.config.getoption("--contest-seconds"), drive))
        benchmark.extra_info.update(row.metrics)
        return row

    return run


def pytest_sessionfinish(session):
    folder = session.config.getoption("--results")
    if folder is None:
        return
    for stem, rows in _rows.items():
        path, found = folder / f"{stem}.json", results.Results.of(rows)
        if path.exists():
            found = found.merged_into(results.read(path))
        found.write(path)


def pytest_terminal_summary(terminalreporter):
    for stem, rows in _rows.items():
        terminalreporter.section(stem)
        terminalreporter.write_line(results.table(rows))
