"""Writing files so that they are there whole or not at all; the digest of the native sources."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

__all__ = ["replace_file", "replace_text", "source_digest"]


def replace_file(path: str | Path, write: Callable[[Path], None]) -> None:
    """Calls ``write`` with a temporary name beside ``path``, flushes what it wrote to the disk, and renames it.

    The temporary name is in a folder of its own, so that whatever a library leaves there goes with it. Such folders of
    processes of this machine that were killed are removed.

    Raises:
        OSError: the file cannot be written; what was there before is untouched.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from sparsenet.files import replace_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(f"{folder}/numbers.bin", lambda part: part.write_bytes(b'123'))
        ...     [file.name for file in Path(folder).iterdir()], Path(folder, "numbers.bin").read_bytes()
        (['numbers.bin'], b'123')
    """
    path = Path(path).expanduser().resolve()
    folder = path.parent / f".{path.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}.part"
    try:
        folder.mkdir()
        part = folder / path.name
        write(part)
        part.chmod((path if path.exists() else folder).stat().st_mode & 0o666)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        _flush_folder(path.parent)
    except OSError as error:
        reason = f"{path} could not be written, what was there is untouched: {error.strerror or error}"
        raise OSError(error.errno or 0, reason) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # the file is there: what is left beside it is not worth an error
        _sweep(path)


def replace_text(path: str | Path, text: str) -> None:
    """Writes a text file whole or not at all; see :func:`replace_file`.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from sparsenet.files import replace_text
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_text(f"{folder}/note.txt", "new")
        ...     Path(folder, "note.txt").read_text()
        'new'
    """
    replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))


def source_digest(root: str | Path) -> str:
    """Hexadecimal digest of the native sources below ``root``: ``CMakeLists.txt`` and ``csrc``, names and contents.

    The build compiles it into the native module, which so can be told from one of other sources. This file imports
    nothing but the standard library, because ``setup.py`` takes the function from it.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from sparsenet.files import source_digest
        >>> with tempfile.TemporaryDirectory() as root:
        ...     empty = source_digest(root)
        ...     _ = Path(root, "CMakeLists.txt").write_text("project(other)")
        ...     source_digest(root) == empty
        False
    """
    root, digest = Path(root), hashlib.sha256()
    for file in sorted([root / "CMakeLists.txt", *(root / "csrc").rglob("*")]):
        if file.is_file() and file.suffix in (".txt", ".h", ".cpp", ".cu", ".cuh"):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:32]


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(path: Path) -> None:
    """Removes temporary folders for ``path`` whose writers no longer live."""
    ours = re.compile(re.escape(f".{path.name}.{socket.gethostname()}.") + r"(\d+)\.[0-9a-f]{8}\.part")
    for file in path.parent.iterdir():
        writer = ours.fullmatch(file.name)
        if writer and not _is_alive(int(writer[1])):
            shutil.rmtree(file, ignore_errors=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
