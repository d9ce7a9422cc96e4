"""Files are there whole or not at all: replace_file and replace_text."""

import os

import pytest

from sparsenet.files import replace_file, replace_text


def test_the_new_file_takes_the_place_of_the_old_one_and_nothing_is_left_beside_it(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")
    path.chmod(0o640)
    seen = []

    def write(part):
        seen.append((part.name, path.read_bytes()))
        part.write_bytes(b"new")
        part.with_suffix(".log").write_text("what a library leaves beside it")

    replace_file(path, write)
    assert seen == [("weights.bin", b"old")], "the writer gets the same name elsewhere, and the old file is still there"
    assert path.read_bytes() == b"new" and path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("not a tensor")])
def test_a_writer_that_fails_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "weights.bin"
    path.write_bytes(b"old")

    def write(part):
        part.write_bytes(b"half of the n")
        raise error

    with pytest.raises(type(error), match="No space|not a tensor") as caught:
        replace_file(path, write)
    if isinstance(error, OSError):
        assert f"{path} could not be written, what was there is untouched" in str(caught.value)
        assert caught.value.errno == 28
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    path = tmp_path / "note.txt"
    host = os.uname().nodename
    dead, alive = (tmp_path / f".note.txt.{host}.{process}.0123abcd.part" for process in (2**22 + 1, os.getppid()))
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "note.txt").write_text("unfinished")
    replace_text(path, "ä whole text\n")
    assert path.read_bytes() == "ä whole text\n".encode()
    assert not dead.exists() and alive.exists()


def test_text_into_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(OSError, match="could not be written"):
        replace_text(tmp_path / "nowhere" / "note.txt", "text")
    assert not (tmp_path / "nowhere").exists()
