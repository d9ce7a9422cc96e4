import json

import pytest

from sparsenet.reproduce.rows import kept_row, kept_rows


def test_a_killed_part_keeps_its_rows(tmp_path):
    file, calls = tmp_path / "rows.jsonl", []

    def compute():
        calls.append(1)
        return {"accuracy": len(calls)}

    assert kept_row(file, {"depth": 1}, compute) == {"depth": 1, "accuracy": 1}
    assert kept_row(file, {"depth": 2}, compute)["accuracy"] == 2
    file.write_text(file.read_text() + '\n{"depth": 3, "acc')  # killed while it wrote
    assert kept_row(file, {"depth": 3}, compute)["accuracy"] == 3
    assert [kept_row(file, {"depth": d}, compute)["accuracy"] for d in (1, 2, 3)] == [1, 2, 3]
    assert [json.loads(line)["depth"] for line in file.read_text().splitlines()] == [1, 2, 3]


def test_a_row_is_found_by_all_of_its_key(tmp_path):
    file = tmp_path / "folder" / "rows.jsonl"
    assert kept_rows(file) == []
    assert kept_row(file, {"key": "a", "scale": 1.0}, lambda: {"widths": (1, 2)}) == {
        "key": "a",
        "scale": 1.0,
        "widths": [1, 2],
    }
    assert kept_row(file, {"key": "a", "scale": 0.5}, lambda: {"widths": [3]})["widths"] == [3]
    assert kept_row(file, {"key": "a", "scale": 1.0}, dict)["widths"] == [1, 2]
    assert [row["scale"] for row in kept_rows(file)] == [1.0, 0.5]


def test_files_of_earlier_versions_are_read_and_added_to(tmp_path):
    """These began every row with the end of a line, and did not end the last one."""
    file = tmp_path / "rows.jsonl"
    file.write_text('\n{"seed": 0, "loss": 1}\n{"seed": 1, "loss": 2}')
    assert kept_row(file, {"seed": 1}, dict)["loss"] == 2
    assert kept_row(file, {"seed": 2}, lambda: {"loss": 3})["loss"] == 3
    assert [row["loss"] for row in kept_rows(file)] == [1, 2, 3]


def test_a_failure_leaves_the_rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    kept_row(file, {"seed": 0}, lambda: {"loss": 1})

    def fails():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        kept_row(file, {"seed": 1}, fails)
    assert kept_rows(file) == [{"seed": 0, "loss": 1}]
