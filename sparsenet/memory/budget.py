"""Bytes: measuring how much memory something needed. Amounts and limits by name are in :mod:`sparsenet.limits`.

What a network will need is predicted by :mod:`sparsenet.memory.planning`. What it did need is the high-water mark of
resident memory above a baseline. Two things make the two agree. The baseline is taken after a warm-up, because the
first call of anything loads code pages; and large freed tensors go back to the system at once
(:func:`release_freed_memory`), because glibc otherwise keeps their memory in a heap that tensors of changing sizes
fragment: the main job then needs a quarter more, and more the longer it runs (measured: 112 against 139 MiB).
"""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
import weakref
from pathlib import Path

import torch
from torch import nn

from sparsenet import functional
from sparsenet.limits import MemoryBudget, available_bytes, format_bytes, release_heap
from sparsenet.models import SparseMLP
from sparsenet.policies.rewiring import RigL
from sparsenet.sparsifier import Sparsifier

__all__ = ["MemoryBudget", "PeakMemory", "available_bytes", "format_bytes", "measure_peak", "release_freed_memory"]

RELEASED_FROM_BYTES = 128 << 10  # glibc's first threshold, before it grows to the largest tensor freed
_M_MMAP_THRESHOLD = -3  # malloc.h


def release_freed_memory() -> bool:
    """From now on, freed tensors of 128 KiB or more go back to the system at once; the whole process is affected.

    Turns off glibc's growing threshold, above which it maps memory instead of carving it from its heap, and asks torch
    for huge pages, which pay most of the page faults back (only before torch's first large allocation).

    Returns:
        Whether the C library has such a setting (glibc does, musl and macOS do not).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, RELEASED_FROM_BYTES))
    except (AttributeError, OSError, TypeError):
        return False


# --- measuring ------------------------------------------------------------------------------------------------------


class PeakMemory:
    """The peak of memory between :meth:`start` and :meth:`stop`, above what was in use at the start.

    Attributes:
        baseline_bytes: in use at the start.
        phases: bytes above the baseline by the names given to :meth:`mark`.
        method: how it is measured: ``VmHWM`` (Linux, the kernel's own high-water mark, exact), ``cuda`` (torch's
            allocator, exact), ``VmHWM without reset`` or ``ru_maxrss`` (where the mark cannot be set back: exact once
            the process uses more than it ever did, before that what :attr:`bytes` happened to see).
    """

    def __init__(self, device: torch.device | str = "cpu", warm_up: bool = True):
        self.device = torch.device(device)
        self.baseline_bytes = 0
        self.phases: dict[str, int] = {}
        self.method = ""
        self._warm_up = warm_up
        self._seen = 0  # the highest mark known
        self._ignored = 0  # the mark left by what ran before, where it cannot be set back
        self._running = False

    def start(self) -> PeakMemory:
        """Warms up, gives free memory of the heap back, takes the baseline and sets the high-water mark back."""
        if self._warm_up:
            _run_tiny_network(self.device)
        release_heap()  # else what is needed next could hide in it
        for other in _running:  # theirs is set back too: let them remember it
            other._look()
        self.method = self._reset()
        if self.method == "cuda":
            self.baseline_bytes = torch.cuda.memory_allocated(self.device)
        else:
            self.baseline_bytes = _resident_bytes()
            self._ignored = 0 if self.method == "VmHWM" else _high_water_bytes()
        self._seen, self._running = self.baseline_bytes, True
        _running.add(self)
        return self

    def stop(self) -> int:
        """Ends the measurement and returns :attr:`bytes`."""
        if self._running:
            self._look()
            self._running = False
            _running.discard(self)
        return self.bytes

    @property
    def bytes(self) -> int:
        """The peak so far, or after :meth:`stop` the final one, in bytes above the baseline."""
        if self._running:
            self._look()
        return self._seen - self.baseline_bytes

    def mark(self, phase: str = "") -> None:
        """Ends a phase: its peak since the last mark goes to :attr:`phases`, if it has a name. Takes 0.1 ms.

        Where the high-water mark cannot be set back, only :attr:`bytes` is kept.
        """
        mark = self._look()
        if self.method not in ("VmHWM", "cuda"):
            return
        if phase:
            self.phases[phase] = max(self.phases.get(phase, 0), mark - self.baseline_bytes)
        for other in _running:
            other._look()
        self._reset()

    def _reset(self) -> str:
        """Sets the high-water mark back to what is in use now and says how it is measured."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return "cuda"
        return _reset_high_water_mark()

    def _look(self) -> int:
        if self.device.type == "cuda":
            mark = torch.cuda.max_memory_allocated(self.device)
        else:
            mark = _high_water_bytes()
            mark = mark if mark > self._ignored else _resident_bytes()
        self._seen = max(self._seen, mark)
        return mark

    def __enter__(self) -> PeakMemory:
        return self.start()

    def __exit__(self, *_) -> None:
        self.stop()


_running: weakref.WeakSet[PeakMemory] = weakref.WeakSet()  # one that nobody holds is measured for nobody


def measure_peak(device: torch.device | str = "cpu", warm_up: bool = True) -> PeakMemory:
    """Measures the peak of memory in a ``with`` block, in bytes above what was in use before it.

    Args:
        device: ``cpu`` (resident memory of the process) or a CUDA device (torch's allocator).
        warm_up: first train a tiny network, so that code and thread stacks loaded at first use do not count.

    Example:
        >>> import torch, sparsenet as sn
        >>> released = sn.memory.release_freed_memory()  # what was freed before could serve the tensor unseen
        >>> with sn.measure_peak() as peak:
        ...     total = torch.ones(4 << 20).sum()
        >>> 15 << 20 < peak.bytes < 24 << 20
        True
    """
    return PeakMemory(device, warm_up)


def _status_bytes(field: str) -> int | None:
    try:
        found = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def _high_water_bytes() -> int:
    mark = _status_bytes("VmHWM")
    if mark is not None:
        return mark
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _resident_bytes() -> int:
    resident = _status_bytes("VmRSS")
    return _high_water_bytes() if resident is None else resident


def _reset_high_water_mark() -> str:
    """Sets the process's high-water mark back to what is resident now and says how peaks are then measured."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return "ru_maxrss" if _status_bytes("VmHWM") is None else "VmHWM without reset"
    return "VmHWM"


def _run_tiny_network(device: torch.device) -> None:
    """Trains, rewires and evaluates networks of a few kilobytes; leaves torch's random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        x, y = torch.randn(64, 64, device=device), torch.arange(64, device=device) % 8
        for activation in ("relu", "gelu", "silu"):
            model = SparseMLP([64, 64, 64, 8], 0.5, 16, activation, device=device)
            optimizer = torch.optim.AdamW(model.parameters(), fused=True)
            sparsifier = Sparsifier(model, optimizer, RigL(0.3), every=2)
            for _ in range(2):
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                sparsifier.step()
                optimizer.zero_grad()
            with torch.no_grad():
                model(x).argmax(1)
    functional.trim_workspace()
