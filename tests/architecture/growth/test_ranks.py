"""Two gloo processes grow alike: one structure, the smallest budget, the largest cost, averaged losses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("growth_worker.py")


def launch(case: str, folder: Path) -> tuple[list[int], list[str], list]:
    """Runs both ranks; exit codes, stderr texts, and what they left."""
    out = folder / case
    ranks = [
        subprocess.Popen(
            [sys.executable, str(WORKER), case, str(rank), str(folder / "store"), str(out)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    codes = [rank.returncode for rank in ranks]
    return codes, errors, [] if any(codes) else [torch.load(f"{out}.{r}", weights_only=True) for r in range(2)]


@pytest.mark.parametrize("case", ["dense", "sparse", "budgets", "later", "validate", "milliseconds"])
def test_both_ranks_have_one_structure(case, tmp_path):
    codes, errors, left = launch(case, tmp_path)
    assert codes == [0, 0], errors
    first, second = (each["weights"] for each in left)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert left[0]["bytes"] == left[1]["bytes"]
    assert any("+" in event for event in left[0]["events"])
    if case == "budgets":
        assert left[0]["bytes"] <= 32 << 10
    if case == "later":
        assert any("the budget is" in event for event in left[0]["events"])
    if case == "validate":
        assert left[0]["held"] == left[1]["held"]
        assert left[0]["held"][0][1] == pytest.approx(1.5)


def test_plain_distributed_data_parallel_is_refused(tmp_path):
    codes, errors, _ = launch("plain", tmp_path)
    assert all(codes)
    assert "Grower: parameters must not change size under DistributedDataParallel" in errors[0]
