"""Test the tester: kernels with one planted bug each, and the same kernels without it."""

from __future__ import annotations

import os
import re
import shutil

import cuda_emulated as emulated
import emulator_report
import numpy as np
import pytest

SEEDS = range(5)
ORDERS = ("random", "forward", "backward")

# What the emulator says about each bug, whatever the order of threads.
REPORTED = {
    "missing_barrier": "that nobody wrote|race on shared offset",
    "race_hidden_by_order": "that nobody wrote|race on shared offset",
    "missing_warp_barrier": "that nobody wrote|race on shared offset",
    "missing_barrier_before_reuse": "race on shared offset .* read with no barrier|race on shared offset .* wrote with",
    "tile_past_global_end": "global memory out of bounds: read of 4 bytes at byte 256 of 'input', which has 256",
    "tile_past_shared_end": "shared memory out of bounds: write of 4 bytes at offset 256 of 256",
    "read_unwritten": "read of shared offset 28 that nobody wrote",
    "barrier_skipped": "barrier misuse: 24 of 64 threads have returned, 40 wait at the block barrier of planted.cpp",
    "barrier_elsewhere": "barrier misuse: thread .* waits at planted.cpp:.*, thread .* at planted.cpp",
    "shuffle_lacks_lanes": "barrier misuse: 32 of 64 threads have returned, 32 wait in shuffle_xor",
    "warp_disagrees": "barrier misuse: lane .* calls shuffle_.* while others of its warp wait in shuffle_",
    "two_ctas_write_same": "race on global memory: byte .* of 'output' was written by CTA",
    "write_input": "write to the input 'input'",
    "wait_one_group_short": "destination of a cp.async that was not waited for|copies that nobody waited for",
    "missing_barrier_after_wait": "race on shared offset|cp.async that was not waited for|that nobody wrote",
    "copy_never_committed": "cp.async that was not waited for|never committed",
    "misaligned_copy": "cp.async source is not 16-byte aligned",
    "too_much_shared_memory": "1048576 bytes of shared memory failed: too many resources requested",
}


@pytest.fixture(scope="module")
def module():
    return emulated.load()


@pytest.fixture(autouse=True)
def defaults(module):
    yield
    module.configure()
    module.launches()


def run(module, name):
    data = emulated.aligned((64,), np.float32)
    data[:] = np.arange(64)
    output = emulated.aligned((64,), np.float32)
    with emulated.memory(module, {"input": data}, {"output": output}):
        module.run_planted(name, data.ctypes.data, output.ctypes.data, 64)
    return output


def test_every_planted_kernel_has_a_test(module):
    elsewhere = {"wrong_swizzle", "no_swizzle", "column_in_one_bank"}
    names = set(module.planted_names())
    assert {n for n in names if not n.startswith("right_")} == set(REPORTED) | elsewhere


@pytest.mark.parametrize("name", REPORTED)
def test_a_planted_bug_is_caught_in_every_order(module, name):
    for order in ORDERS:
        for seed in SEEDS if order == "random" else (0,):
            module.configure(seed=seed, order=order)
            with pytest.raises(RuntimeError, match=REPORTED[name]) as caught:
                run(module, name)
            assert name in str(caught.value)


def test_right_kernels_pass_in_every_order(module):
    values = np.arange(64, dtype=np.float32)
    expected = {
        "right_reverse": values[::-1],
        "right_shift": np.r_[0, values[:-1]],
        "right_reuse": 2 * np.roll(values, -1),
        "right_shift_in_warp": np.where(values % 32 == 0, values, values - 1),
        "right_copy_tile": values,
        "right_write_halves": values,
        "right_stream_in": values,
        "right_swizzled": (np.arange(32) // 4 * 64 + np.arange(32) % 4 * 2).astype(np.float32),
        "right_column_reads": np.arange(32) * 32,
    }
    assert set(expected) == {n for n in module.planted_names() if n.startswith("right_")}
    for name, result in expected.items():
        for order in ORDERS:
            for seed in SEEDS:
                module.configure(seed=seed, order=order)
                np.testing.assert_array_equal(run(module, name)[: len(result)], result)


def test_the_hidden_race_gives_the_right_result_in_one_order(module):
    """Why the detector is needed: without it the bug passes in ascending order, and shows in others."""
    values = np.arange(64, dtype=np.float32)
    module.configure(order="forward", detect_races=False)
    np.testing.assert_array_equal(run(module, "race_hidden_by_order"), np.r_[0, values[:-1]])
    module.configure(order="backward", detect_races=False)
    with pytest.raises(module.EmulatorError, match="nobody wrote"):
        run(module, "race_hidden_by_order")
    module.configure(order="forward")
    with pytest.raises(module.EmulatorError, match="race on shared offset"):
        run(module, "race_hidden_by_order")


def test_the_wrong_swizzle_gives_wrong_values(module):
    right, wrong = run(module, "right_swizzled"), run(module, "wrong_swizzle")
    assert not np.array_equal(right, wrong)


def test_bank_conflicts_are_counted(module):
    module.configure(count_bank_conflicts=True)
    reports = {}
    for name in ("right_column_reads", "column_in_one_bank", "right_swizzled", "no_swizzle"):
        run(module, name)
        (reports[name],) = module.launches()
    clean, one_bank = reports["right_column_reads"], reports["column_in_one_bank"]
    assert clean["conflicts"] == 0 and clean["instructions"] == 64 and clean["wavefronts"] == 64
    assert one_bank["conflicts"] == 32 * 31  # 32 reads, 32 lanes in one bank each
    # ldmatrix: four matrices, eight rows each in one bank group without the swizzle. The stores conflict in both.
    assert reports["no_swizzle"]["conflicts"] - reports["right_swizzled"]["conflicts"] >= 4 * 7


def test_a_fault_leaves_the_emulator_usable(module):
    for _ in range(20):
        with pytest.raises(RuntimeError):
            run(module, "barrier_skipped")
        np.testing.assert_array_equal(run(module, "right_reverse"), np.arange(64, dtype=np.float32)[::-1])


def test_16_bit_conversions_are_exact(module):
    """Every float16 and bfloat16 through forward with an identity block: what comes out is what went in."""
    for dtype in ("float16", "bfloat16"):
        bits = np.arange(65536, dtype=np.uint16).reshape(4096, 16)
        values = emulated.fetched(bits.copy(), dtype, 16)
        bits = np.where(np.isfinite(values), bits, 0).astype(np.uint16)
        pattern = emulated.Pattern(np.ones((1, 1), bool), 16, 16, 16)
        x, w = emulated.aligned(bits.shape, np.uint16), emulated.stored(np.eye(16)[None], dtype)
        x[:] = bits
        y = emulated.empty((4096, 16), dtype)
        module.force_variant(1)
        call, weight = (emulated.DTYPE_CODES[dtype], 0, 1), (w.ctypes.data, 0)
        module.linear_forward(
            pattern.handle(module), call, emulated.matrix(x, 16), weight, (y.ctypes.data, 0), emulated.run(module)
        )
        module.force_variant(0)
        same = (y == bits) | ((bits & 0x7FFF) == 0)  # -0 + 0 is +0
        assert same.all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_matches_torch(module, dtype):
    """float32 sums of two halves rounded to 16 bits: ties, subnormals, overflow."""
    rng = np.random.default_rng(0)
    exponents = rng.integers(-26, 17, (512, 16)) if dtype == "float16" else rng.integers(-40, 40, (512, 16))
    a = emulated.rounded(np.ldexp(rng.integers(1, 2048, (512, 16)).astype(float), exponents - 11), dtype)
    b = emulated.rounded(np.ldexp(a, -rng.integers(8, 13, a.shape)), dtype)
    x = np.where(np.isfinite(np.concatenate([a, b], 1)), np.concatenate([a, b], 1), 0)
    pattern = emulated.Pattern(np.ones((1, 2), bool), 16, 16, 32)
    xs, w = emulated.stored(x, dtype), emulated.stored(np.stack([np.eye(16)] * 2), dtype)
    y = emulated.empty((512, 16), dtype)
    module.force_variant(1)
    call, weight = (emulated.DTYPE_CODES[dtype], 0, 1), (w.ctypes.data, 0)
    module.linear_forward(
        pattern.handle(module), call, emulated.matrix(xs, 32), weight, (y.ctypes.data, 0), emulated.run(module)
    )
    module.force_variant(0)
    expected = emulated.rounded((x[:, :16] + x[:, 16:]).astype(np.float32).astype(np.float64), dtype)
    np.testing.assert_array_equal(emulated.fetched(y, dtype, 16), expected)


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm")
@pytest.mark.skipif(os.environ.get("SPARSENET_EMULATOR_FLAVOUR") == "asan", reason="one flavour is enough")
def test_the_page_of_variants_is_not_stale():
    """It lists each instantiation, planted bug and mutant that there is; emulator_report.py writes it anew."""
    text = emulator_report.PAGE.read_text()
    listed = re.findall(r"^\| \w+ \| `(\w+_kernel[^`]*)` \| [1-9]", text, re.MULTILINE)
    assert sorted(listed) == sorted(emulator_report.instantiations(emulated.build()))
    assert text.endswith("\n".join(emulator_report.bugs_lines()) + "\n")


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("SPARSENET_EMULATOR_FLAVOUR") == "asan", reason="is what runs it")
def test_the_kernels_under_address_and_undefined_behaviour_sanitizers():
    """Every op and variant in bfloat16, tf32 and float32; float16 and float64 are the same templates."""
    files = [
        f"{name}.py"
        for name in (
            "test_emulator",
            "test_block_sparse_linear",
            "test_block_sparse_linear_backward",
            "test_block_gradient_squared_norms",
            "test_block_pattern",
            "test_compact_blocks",
        )
    ]
    tests = [*files, "-k", "not stale and not [float16 and not -float16 and not float64"]
    done = emulated.run_child(
        "-m", "pytest", "-o", "addopts=", "-m", "not slow", "-q", "-p", "no:cacheprovider", *tests, asan=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("SPARSENET_EMULATOR_FLAVOUR") == "asan", reason="is what runs it")
def test_the_sanitized_flavour_sees_memory_nobody_registered():
    """One element past a plain allocation, on a fiber: the address sanitizer ends the process and says where."""
    script = (
        "import cuda_emulated as e, numpy as np; m = e.load()\n"
        "a, b = np.zeros(64, np.float32), np.zeros(64, np.float32)\n"
        "m.run_planted('right_copy_tile', a.ctypes.data, b.ctypes.data, 64); print('right one passed', flush=True)\n"
        "m.run_planted('tile_past_global_end', a.ctypes.data, b.ctypes.data, 64); print('not seen')"
    )
    done = emulated.run_child("-c", script, asan=True)
    assert done.returncode != 0 and "right one passed" in done.stdout and "not seen" not in done.stdout
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr and "copy_tile" in done.stderr
