"""What the process may still take: the address space, the cgroup and the machine's memory, whichever ends first.

Nothing is kept between calls but paths: limits tighten while a network trains. A call reads a few small files, which
takes about a tenth of a millisecond.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # pragma: no cover - not on Windows
    resource = None

__all__ = ["Limit", "available_bytes", "is_out_of_memory", "process_limit", "release_heap"]

_PROC, _CGROUPS = "/proc", "/sys/fs/cgroup"
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_UNLIMITED_FROM = 1 << 60  # version 1 writes the largest multiple of a page where there is no limit

# By version: limit, use, and what of the use are file pages that the kernel drops before it refuses memory.
_FILES = {
    2: ("memory.max", "memory.current", b"inactive_file "),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", b"total_inactive_file "),
}
# How torch's CPU allocator, numpy and the C++ library word it in errors that are no MemoryError.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "std::bad_alloc")


@dataclass(frozen=True)
class Limit:
    """How much memory is left, and what ends it.

    Attributes:
        bytes_left: at least 0.
        why: ``RLIMIT_AS``, ``cgroup`` with its folder, or ``available memory``.

    Example:
        >>> from sparsenet.limits import Limit
        >>> Limit(1 << 20, "RLIMIT_AS").bytes_left
        1048576
    """

    bytes_left: int
    why: str


def process_limit() -> Limit:
    """The smallest of: RLIMIT_AS minus the address space in use, the cgroups' limits minus their use, MemAvailable.

    File pages that a cgroup has not used lately do not count as use. Limits that the system does not tell are passed
    over.

    Example:
        >>> from sparsenet.limits import process_limit
        >>> process_limit().bytes_left > 0
        True
    """
    limits = [Limit(available_bytes(), "available memory"), *_address_space()]
    least = min(limits, key=lambda limit: limit.bytes_left)
    for folder, version in _cgroups(_read(f"{_PROC}/self/cgroup"), _CGROUPS):
        left = _left_in(folder, version, least.bytes_left)
        if left is not None and left < least.bytes_left:
            least = Limit(left, f"cgroup {folder}")
    return Limit(max(0, least.bytes_left), least.why)


def available_bytes() -> int:
    """Memory that can still be used without swapping, in bytes.

    Example:
        >>> from sparsenet.limits import available_bytes
        >>> available_bytes() > 0
        True
    """
    text = _read(f"{_PROC}/meminfo")
    at = text.find(b"MemAvailable:")
    if at < 0:
        return os.sysconf("SC_PHYS_PAGES") * _PAGE_BYTES
    return int(text[at + len(b"MemAvailable:") :].split(None, 1)[0]) * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory could not be had, in Python, torch (any device) or sparsenet's kernels.

    Example:
        >>> from sparsenet.limits import is_out_of_memory
        >>> is_out_of_memory(MemoryError()), is_out_of_memory(RuntimeError("shapes do not match"))
        (True, False)
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and (
        any(words in str(error) for words in _OUT_OF_MEMORY) or getattr(error, "errno", None) == 12
    )


def release_heap() -> None:
    """Gives free memory of the C library's heap back to the system, where it has a call for that (glibc).

    Example:
        >>> from sparsenet.limits import release_heap
        >>> release_heap()
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def _read(path: str) -> bytes:
    """Empty where the file is not there or may not be read. Plain system calls: a third of the time of ``open``."""
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return b""
    try:
        return os.read(file, 1 << 14)
    except OSError:
        return b""
    finally:
        os.close(file)


def _address_space() -> Iterator[Limit]:
    if resource is None:
        return
    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    if most == resource.RLIM_INFINITY:
        return
    pages = _read(f"{_PROC}/self/statm").split(None, 1)
    if pages:
        yield Limit(most - int(pages[0]) * _PAGE_BYTES, "RLIMIT_AS")


@lru_cache(maxsize=8)
def _cgroups(membership: bytes, root: str) -> tuple[tuple[str, int], ...]:
    """Folders, with their versions, of the memory cgroups that ``/proc/self/cgroup`` says the process is in."""
    found = []
    for line in membership.decode(errors="replace").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version = 1 if controllers else 2
        for mount in [Path(root, "memory")] if controllers else [Path(root), Path(root, "unified")]:
            own = mount.joinpath(*Path(path).parts[1:]) if ".." not in path else mount
            # in a container the path may be the host's, while the mount shows the container's own group at its top
            folders = [own, *(parent for parent in own.parents if parent == mount or mount in parent.parents)]
            found += [(str(f), version) for f in folders if f.joinpath(_FILES[version][0]).is_file()]
    return tuple(dict.fromkeys(found))


def _left_in(folder: str, version: int, least: int) -> int | None:
    """Bytes left in one cgroup; None without a limit. What could be dropped is looked up where it may matter."""
    limit, use, droppable = _FILES[version]
    with suppress(ValueError):  # "max", or the file is gone
        most = int(_read(f"{folder}/{limit}"))
        if most >= _UNLIMITED_FROM:
            return None
        left = most - int(_read(f"{folder}/{use}"))
        if left < least:
            found = re.search(rb"^" + droppable + rb"(\d+)", _read(f"{folder}/memory.stat"), re.MULTILINE)
            left += int(found[1]) if found else 0
        return left
    return None
