"""What the process may still take: a real RLIMIT_AS in a child process, and cgroups in a made folder."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsenet import limits
from sparsenet.limits import process

MIB = 1 << 20


@pytest.fixture
def made_system(tmp_path, monkeypatch):
    """``made_system(membership, {file below the cgroup root: text})`` in the place of /proc and /sys/fs/cgroup."""

    def make(membership, files, available_kib=1 << 20):
        for name, text in {
            "proc/self/cgroup": membership,
            "proc/meminfo": f"MemTotal: 9 kB\nMemAvailable:  {available_kib} kB\n",
            **{f"cgroup/{name}": text for name, text in files.items()},
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.setattr(process, "_PROC", str(tmp_path / "proc"))
        monkeypatch.setattr(process, "_CGROUPS", str(tmp_path / "cgroup"))
        return tmp_path / "cgroup"

    return make


def test_available_memory_is_the_limit_where_nothing_else_is(made_system):
    made_system("", {})
    assert limits.process_limit() == limits.Limit(1 << 30, "available memory")


def test_version_2_the_tightest_folder_counts(made_system):
    root = made_system(
        "0::/user/job\n",
        {
            "user/job/memory.max": "max\n",
            "user/job/memory.current": "5\n",
            "user/memory.max": f"{100 * MIB}\n",
            "user/memory.current": f"{70 * MIB}\n",
        },
    )
    assert limits.process_limit() == limits.Limit(30 * MIB, f"cgroup {root / 'user'}")


def test_file_pages_that_can_be_dropped_are_not_in_use(made_system):
    stat = f"anon 1\ninactive_file {20 * MIB}\n"
    files = {"memory.max": f"{100 * MIB}", "memory.current": f"{95 * MIB}", "memory.stat": stat}
    made_system("0::/not/here\n", files)  # in a container: the group is the top of the mount
    assert limits.process_limit().bytes_left == 25 * MIB


def test_version_1_and_a_limit_that_tightens(made_system):
    files = {"memory/a/memory.limit_in_bytes": str(2**63 - 4096), "memory/a/memory.usage_in_bytes": str(MIB)}
    root = made_system("4:cpu,memory:/a\n0::/\n", files)
    assert limits.process_limit().why == "available memory"
    (root / "memory/a/memory.limit_in_bytes").write_text(str(3 * MIB))
    assert limits.process_limit().bytes_left == 2 * MIB
    (root / "memory/a/memory.limit_in_bytes").write_text("10")
    assert limits.process_limit().bytes_left == 0, "never below nothing"


def test_a_folder_that_vanishes_is_passed_over(made_system):
    files = {"memory.max": f"{MIB}", "memory.current": "0"}
    root = made_system("0::/\n", files)
    assert limits.process_limit().bytes_left == MIB
    (root / "memory.max").unlink()
    assert limits.process_limit().why == "available memory"


def test_address_space_of_a_child(run_child):
    said = run_child("""
        import resource, numpy
        from sparsenet.limits import process_limit
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (300 << 20), resource.RLIM_INFINITY))
        before = process_limit()
        held = numpy.ones(100 << 20, numpy.uint8)
        print(before.why, before.bytes_left, before.bytes_left - process_limit().bytes_left)
    """).stdout.split()
    assert said[0] == "RLIMIT_AS"
    assert 250 * MIB < int(said[1]) <= 300 * MIB
    assert abs(int(said[2]) - 100 * MIB) < 8 * MIB


def test_a_call_reads_a_handful_of_small_files(made_system, monkeypatch):
    """The Grower asks at every look: the folders of cgroups are found once, and a call searches for none of them."""
    root = made_system("0::/user/job\n", {"user/job/memory.max": f"{MIB}\n", "user/job/memory.current": "5\n"})
    assert limits.process_limit().bytes_left == MIB - 5
    opened, plain_open = [], os.open
    monkeypatch.setattr(process.os, "open", lambda path, *flags: opened.append(path) or plain_open(path, *flags))
    monkeypatch.setattr(Path, "is_file", lambda path: pytest.fail(f"looked for {path} again"))
    assert limits.process_limit().bytes_left == MIB - 5
    assert len(opened) <= 5 and str(root / "user/job/memory.current") in opened


def test_running_out_of_memory_is_recognised(run_child):
    said = run_child("""
        import resource, torch, sparsenet as sn
        from sparsenet.limits import is_out_of_memory
        x, model = torch.randn(64, 8192), sn.SparseMLP([8192, 8192], 0.05, 32)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))
        for call in (lambda: torch.empty(1 << 30), lambda: bytearray(1 << 30), lambda: model(x)):
            try:
                call()
                print("no error")
            except BaseException as error:
                print(is_out_of_memory(error), type(error).__name__)
    """).stdout.splitlines()
    assert [line.split()[0] for line in said] == ["True"] * 3, said


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError("std::bad_alloc"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: not enough memory: 4 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("not enough memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_errors(error, expected):
    assert limits.is_out_of_memory(error) is expected


def test_numpy_raises_a_memory_error():
    with pytest.raises(MemoryError) as raised:
        np.empty(1 << 60, np.uint8)
    assert limits.is_out_of_memory(raised.value)


def test_available_bytes_without_the_file(made_system):
    made_system("", {})
    (process.Path(process._PROC) / "meminfo").unlink()
    assert limits.available_bytes() > 16 * MIB


def test_free_memory_of_the_heap_goes_back(run_child):
    """In a process of its own: many small pieces, one of which at the top keeps the rest in the heap."""
    said = run_child("""
        import ctypes, os
        from sparsenet.limits import release_heap
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        pieces = [bytearray(60_000) for _ in range(1500)]
        top = pieces[-1]
        del pieces
        before = resident()
        release_heap()
        print(before - resident())
    """)
    assert int(said.stdout) > 50 * MIB


def test_a_c_library_without_such_a_call(monkeypatch):
    asked = []
    monkeypatch.setattr(process.ctypes, "CDLL", lambda name: asked.append(name) or object())
    limits.release_heap()
    assert asked == [None]
