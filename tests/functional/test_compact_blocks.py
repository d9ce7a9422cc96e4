"""compact_blocks: rows and columns gathered into another pattern, bit for bit, against the reference and by hand."""

import os
import platform
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sparsenet as sn
from sparsenet import functional, reference
from sparsenet.pattern import BLOCK_SIZES, BlockPattern

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool, torch.int64)


def random_tensor(pattern, dtype, generator):
    shape = (pattern.num_blocks, pattern.block_size, pattern.block_size)
    numbers = torch.randint(-100, 100, shape, generator=generator)
    return numbers > 0 if dtype == torch.bool else numbers.to(dtype)


def dense(values, pattern):
    b = pattern.block_size
    out = values.new_zeros(pattern.block_rows, pattern.block_cols, b, b)
    out[pattern.row_indices.long(), pattern.col_indices.long()] = values
    out = out.permute(0, 2, 1, 3).reshape(pattern.block_rows * b, pattern.block_cols * b)
    return out[: pattern.shape[0], : pattern.shape[1]]


def test_by_hand():
    # the picture in csrc/cpu/compact_blocks.cpp: rows 0 2 5 7 and columns 4 to 7 of an 8 x 8 matrix with 4 x 4 blocks
    old = BlockPattern([0, 1, 2], [1, 1], shape=(8, 8), block_size=4)
    new = BlockPattern([0, 1], [0], shape=(4, 4), block_size=4)
    values = torch.arange(32.0).reshape(2, 4, 4)
    (got,) = functional.compact_blocks([values], old, torch.tensor([0, 2, 5, 7]), torch.arange(4, 8), new)
    assert got[0].tolist() == [[0, 1, 2, 3], [8, 9, 10, 11], [20, 21, 22, 23], [28, 29, 30, 31]]


@st.composite
def cases(draw):
    b = draw(st.sampled_from(BLOCK_SIZES[:5]))
    out, inp = (draw(st.integers(1, 6 * b)) for _ in range(2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    pattern = BlockPattern.random((out, inp), draw(st.sampled_from([0.0, 0.2, 0.6, 1.0])), b, generator)
    kinds = st.sampled_from(["subset", "permutation", "repeated"])
    chosen = []
    for n, kind in ((out, draw(kinds)), (inp, draw(kinds))):
        order = torch.randperm(n, generator=generator)
        if kind == "subset":
            order = order[: draw(st.integers(1, n))].sort().values
        elif kind == "repeated":
            order = torch.randint(n, (draw(st.integers(1, 2 * n)),), generator=generator)
        chosen.append(order)
    shape = tuple(len(c) for c in chosen)
    target = BlockPattern.random(shape, draw(st.sampled_from([0.0, 0.5, 1.0])), b, generator)
    return pattern, *chosen, target, generator


@given(cases())
def test_equals_the_reference_and_the_dense_gather(case):
    pattern, rows, cols, target, generator = case
    tensors = [random_tensor(pattern, dtype, generator) for dtype in DTYPES]
    got = functional.compact_blocks(tensors, pattern, rows, cols.int(), target)
    expected = reference.compact_blocks(tensors, pattern, rows, cols, target)
    for t, g, e in zip(tensors, got, expected, strict=True):
        assert g.dtype == t.dtype and torch.equal(g, e)
        covered = target.to_mask().repeat_interleave(pattern.block_size, 0).repeat_interleave(pattern.block_size, 1)
        wanted = dense(t, pattern)[rows][:, cols] * covered[: len(rows), : len(cols)]
        assert torch.equal(dense(g, target), wanted)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_large_blocks_and_threads(block_size, threads):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(block_size)
    pattern = BlockPattern.random((700, 900), 0.4, block_size, generator)
    rows, cols = torch.randperm(700)[:433].sort().values, torch.randperm(900)[:611].sort().values
    target = BlockPattern.random((433, 611), 1.0, block_size)
    tensors = [random_tensor(pattern, torch.float32, generator), random_tensor(pattern, torch.bfloat16, generator)]
    got = functional.compact_blocks(tensors, pattern, rows, cols, target)
    for g, e in zip(got, reference.compact_blocks(tensors, pattern, rows, cols, target), strict=True):
        assert torch.equal(g, e)


def test_special_values_travel_bit_for_bit():
    pattern = BlockPattern.random((8, 8), 1.0, 4)
    values = torch.zeros(4, 4, 4)
    values.view(-1)[:4] = torch.tensor([float("nan"), -0.0, float("inf"), 1e-42])
    (got,) = functional.compact_blocks([values], pattern, torch.arange(8), torch.arange(8), pattern)
    assert torch.equal(got.view(torch.int32), values.view(torch.int32))


def test_non_contiguous_tensors_empty_lists_and_no_blocks():
    pattern = BlockPattern.random((8, 8), 1.0, 4)
    values = torch.randn(4, 4, 4).transpose(1, 2)
    (got,) = functional.compact_blocks([values], pattern, torch.arange(8), torch.arange(8), pattern)
    assert torch.equal(got, values)
    assert functional.compact_blocks([], pattern, torch.arange(8), torch.arange(8), pattern) == []
    empty = BlockPattern([0, 0, 0], [], shape=(8, 8), block_size=4)
    (got,) = functional.compact_blocks([torch.empty(0, 4, 4)], empty, torch.arange(8), torch.arange(8), pattern)
    assert torch.equal(got, torch.zeros(4, 4, 4))
    (got,) = functional.compact_blocks([values], pattern, torch.arange(8), torch.arange(8), empty)
    assert got.shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rows": torch.arange(7)}, ValueError, "compact_blocks: rows must have shape [8], got [7]"),
        ({"rows": torch.arange(1, 9)}, ValueError, "compact_blocks: rows must lie in [0, 8), got 1 to 8"),
        ({"cols": torch.arange(-1, 7)}, ValueError, "compact_blocks: cols must lie in [0, 8), got -1 to 6"),
        ({"cols": torch.full((8,), 2**40)}, ValueError, "cols must lie in [0, 8), got 1099511627776"),
        ({"cols": torch.arange(8.0)}, TypeError, "compact_blocks: cols must be integers, got torch.float32"),
        ({"rows": torch.ones(8, dtype=torch.bool)}, TypeError, "rows must be integers, got torch.bool"),
        ({"tensors": [torch.zeros(3, 4, 4)]}, ValueError, "tensors must have shape [4, 4, 4], got [3, 4, 4]"),
        ({"tensors": [torch.zeros(4, 4, 4, device="meta")]}, ValueError, "on the device of pattern, cpu, got meta"),
        ({"new_pattern": BlockPattern.random((8, 8), 1.0, 8)}, ValueError, "block_size must stay 4, got 8"),
    ],
)
def test_bad_input_is_refused(change, error, message):
    pattern = BlockPattern.random((8, 8), 1.0, 4)
    arguments = {
        "tensors": [torch.zeros(4, 4, 4)],
        "pattern": pattern,
        "rows": torch.arange(8),
        "cols": torch.arange(8),
    }
    with pytest.raises(error, match=re.escape(message)):
        sn.functional.compact_blocks(**{**arguments, "new_pattern": pattern, **change})


def test_the_native_module_checks_indices_itself():
    import numpy as np

    from sparsenet import _C

    pattern = BlockPattern.random((8, 8), 1.0, 4).native
    good, bad = np.arange(8, dtype=np.int32), np.full(8, 8, dtype=np.int32)
    with pytest.raises(ValueError, match=re.escape("compact_blocks: rows must lie in [0, 8), got 8 at 0")):
        _C.compact_blocks(pattern, pattern, (bad, good), [], 1)
    with pytest.raises(ValueError, match="rows and cols must have 8 and 8 entries, got 8 and 3"):
        _C.compact_blocks(pattern, pattern, (good, good[:3]), [], 1)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or torch.version.cuda is not None or "asan" in os.environ.get("LD_PRELOAD", ""),
    reason="needs glibc's malloc, and address space that nobody reserves",
)
def test_row41_an_allocation_that_fails_among_the_threads_is_an_exception(run_child):
    """All memory is taken, then given back half a kilobyte at a time: every place where the call allocates fails once.

    One heap for all threads, without caches, so that what is free is known. Python itself allocates nothing meanwhile.
    """
    code = """
        import ctypes, os, resource, torch
        import sparsenet as sn
        from sparsenet import _C

        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        pattern = sn.BlockPattern([0, 1], [0], shape=(128, 128), block_size=128)
        values, out = torch.rand(1, 128, 128), torch.empty(1, 128, 128)
        every = torch.arange(128, dtype=torch.int32).numpy()
        moved = [(values.data_ptr(), out.data_ptr(), 4)]
        _C.compact_blocks(pattern.native, pattern.native, (every, every), moved, 2)  # the threads are started here
        kept = []
        for _ in range(40):
            kept.append(libc.malloc(512))
            libc.malloc(24)  # between two of them, so that they do not become one
        used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (used, used))
        for size in (1 << 20, 1 << 16, 1 << 12, 256, 64, 24):
            while libc.malloc(size):
                pass
        refused = served = 0
        for chunk in kept:
            try:
                _C.compact_blocks(pattern.native, pattern.native, (every, every), moved, 2)
                served += 1
            except MemoryError:
                refused += 1
            libc.free(chunk)
        os.write(1, b"both" if refused and served else b"only one")
        os._exit(0)
    """
    tunables = "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1"
    assert run_child(code, GLIBC_TUNABLES=tunables).stdout == "both"
