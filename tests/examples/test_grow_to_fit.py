"""examples/grow_to_fit.py runs on a small made set from the command line, and ends inside the halved budget."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_images import write_idx

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_it_grows_shrinks_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    write_idx(tmp_path / "data", train=20_000, test=500, side=12)
    command = [sys.executable, str(ROOT / "examples/grow_to_fit.py"), "--data", str(tmp_path / "data"), "--epochs", "1"]
    command += ["--budget", "1MiB", "--step-ms", "1000", "--plot", str(tmp_path / "fit.png")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "the limits are halved" in done.stdout
    grown = re.search(r"^grown +([\d.]+) %, ([\d.]+) (\w+) of 512 KiB, [\d.]+ ms$", done.stdout, re.MULTILINE)
    assert grown and grown[3] == "KiB" and 100 < float(grown[2]) <= 512
    assert float(grown[1]) > 15.0  # of ten classes, after 140 steps
    assert re.search(r"^dense +[\d.]+ %, \d+ units per layer, equal bytes$", done.stdout, re.MULTILINE)
    assert (tmp_path / "fit.png").stat().st_size > 1000
