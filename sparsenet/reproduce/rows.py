"""Rows that outlive a killed run: one JSON object a line, computed once and read again afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sparsenet.files import replace_text

__all__ = ["kept_row", "kept_rows"]


def kept_rows(file: Path) -> list[dict]:
    """The rows in ``file``, none if there is no such file; a line that a kill cut short is passed over."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def kept_row(file: Path, key: dict, compute: Callable[[], dict]) -> dict:
    """The row of ``key`` in ``file``, or ``{**key, **compute()}``, which is added to it and flushed to the disk.

    What is returned is as it will be read again: tuples are lists. The folder of ``file`` is made if need be.
    """
    for row in kept_rows(file):
        if key.items() <= row.items():
            return row
    line = json.dumps({**key, **compute()})
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and not file.read_text(encoding="utf-8").endswith("\n"):  # the end of a line that was cut short
        replace_text(file, "".join(json.dumps(row) + "\n" for row in kept_rows(file)))
    with file.open("a", encoding="utf-8") as out:
        out.write(line + "\n")
        out.flush()
        os.fsync(out.fileno())
    return json.loads(line)
