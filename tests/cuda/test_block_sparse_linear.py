"""block_sparse_linear's CUDA kernels, emulated, against float64: every variant, block size, dtype and pattern shape."""

from __future__ import annotations

import cuda_emulated as emulated
import numpy as np
import pytest
import torch
from cuda_emulated import Pattern, fetched, pointer, rounded, stored, tolerance

pytestmark = pytest.mark.usefixtures("emulator_defaults")


def activate(z: np.ndarray, activation: str) -> np.ndarray:
    t = torch.from_numpy(z)
    return {
        "none": lambda: t,
        "relu": t.relu,
        "gelu": lambda: torch.nn.functional.gelu(t),
        "silu": lambda: torch.nn.functional.silu(t),
    }[activation]().numpy()


def run_forward(
    module, pattern, x, values, bias, dtype, activation="none", pads=(0, 0), offset=0, pre=False, work=None
):
    batch = len(x)
    arrays = {
        "x": stored(x, dtype, pads[0], offset),
        "values": stored(values, dtype),
        "bias": None if bias is None else stored(bias, dtype),
        **pattern.arrays,
    }
    y = emulated.empty((batch, pattern.rows), dtype, pads[1])
    z = emulated.empty((batch, pattern.rows), dtype, pads[1]) if pre else None
    handle = pattern.handle(module)
    if work is not None:
        items, num_items, num_slots, rows_per_group = work
        arrays["items"] = items
        handle.set_forward_work(pointer(items), num_items, num_slots, rows_per_group)
    code, x_stride = emulated.DTYPE_CODES[dtype], pattern.cols + pads[0]
    operands = (pointer(arrays["x"]), x_stride, pointer(arrays["values"]))
    workspace = emulated.aligned((module.linear_forward_workspace_bytes(handle, code, batch, *operands),), np.uint8)
    with emulated.memory(module, arrays, {"y": y, "pre_activation": z, "workspace": workspace}):
        module.linear_forward(
            handle,
            code,
            emulated.ACTIVATION_CODES[activation],
            batch,
            *operands,
            pointer(arrays["bias"]),
            pointer(y),
            pattern.rows + pads[1],
            pointer(z),
            pattern.rows + pads[1],
            pointer(workspace),
            workspace.nbytes,
            0,
        )
    kernels = [launch["kernel"] for launch in module.launches()]
    return fetched(y, dtype, pattern.rows), None if z is None else fetched(z, dtype, pattern.rows), kernels


def check_forward(module, dtype, block, batch, rows, cols, kind, activation, pads=(0, 0), seed=0, offset=0, split=None):
    rng = np.random.default_rng(seed)
    pattern = Pattern.random(kind, rows, cols, block, rng)
    x = rounded(rng.standard_normal((batch, cols)), dtype)
    values = pattern.values(rng, dtype)
    bias = rounded(rng.standard_normal(rows), dtype) if seed % 2 == 0 else None
    work = None
    if split is not None:
        group = module.preferred_rows_per_group(emulated.DTYPE_CODES[dtype], block)
        work = (*emulated.work_list(module, pattern.crow, pattern.num_blocks, group, split), group)
        module.launches()
    y, pre, kernels = run_forward(
        module, pattern, x, values, bias, dtype, activation, pads, offset, pre=True, work=work
    )
    weight = pattern.dense(values)
    shift = 0 if bias is None else bias
    z = x @ weight.T + shift
    bound = tolerance(dtype, cols, np.abs(x) @ np.abs(weight).T + np.abs(shift))
    assert (np.abs(pre - z) <= bound).all(), np.abs(pre - z).max()
    assert (np.abs(y - activate(z, activation)) <= 1.2 * bound).all()
    return kernels


SHAPES = {  # block: (batch, rows, cols): never multiples of anything, at least two blocks each way
    1: (9, 37, 41),
    4: (11, 46, 39),
    8: (5, 70, 61),
    16: (66, 90, 100),
    32: (70, 130, 101),
    64: (65, 150, 200),
    128: (67, 200, 300),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("block", SHAPES)
def test_forward_simt(module, dtype, block):
    module.force_variant(1)
    seed = block + emulated.DTYPE_CODES[dtype]
    activation = list(emulated.ACTIVATION_CODES)[seed % 4]
    kernels = check_forward(module, dtype, block, *SHAPES[block], "random", activation, (3, 2), seed)
    assert kernels == ["forward_rows_simt" if block < 16 else "forward_simt"]


@pytest.mark.parametrize("kind", ["none", "dense", "empty_rows", "full_row", "power_law"])
@pytest.mark.parametrize("block", [4, 16, 32])
def test_forward_simt_patterns(module, kind, block):
    check_forward(module, "float32", block, 18, 5 * block + 3, 6 * block + 1, kind, "relu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("batch", [1, 16])
def test_forward_simt_small_batches(module, dtype, batch):
    module.force_variant(1)
    for block in (16, 32, 64):
        check_forward(module, dtype, block, batch, 2 * block - 1, 3 * block + 5, "random", "none", seed=batch)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("batch", [33, 130])
def test_forward_sm80(module, dtype, block, batch):
    module.force_variant(2)
    seed = block + batch
    rows, cols = 128 + block // 2 + 5, 2 * max(block, 64) + 21
    activation = list(emulated.ACTIVATION_CODES)[(block // 16 + batch) % 4]
    kernels = check_forward(module, dtype, block, batch, rows, cols, "random", activation, (-cols % 8, 3), seed)
    assert kernels == ["forward_tf32_sm80" if dtype == "tf32" else "forward_sm80"]


@pytest.mark.parametrize("kind", ["none", "dense", "empty_rows", "full_row", "power_law"])
@pytest.mark.parametrize(
    "dtype,block", [("bfloat16", 16), ("bfloat16", 32), ("bfloat16", 128), ("tf32", 16), ("tf32", 64)]
)
def test_forward_sm80_patterns(module, kind, dtype, block):
    kernels = check_forward(module, dtype, block, 40, 160, 5 * block, kind, "gelu")
    assert kernels == ["forward_tf32_sm80" if dtype == "tf32" else "forward_sm80"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("batch", [1, 8, 13, 32])
def test_forward_small_sm80(module, dtype, block, batch):
    module.force_variant(2)
    rows, cols = 2 * block + 9, 4 * block + 13
    kind, activation = ("random", "relu") if batch > 7 else ("full_row", "silu")
    kernels = check_forward(module, dtype, block, batch, rows, cols, kind, activation, (3, 1), seed=batch)
    assert kernels == ["forward_small_tf32_sm80" if dtype == "tf32" else "forward_small_sm80"]


@pytest.mark.parametrize(
    "dtype,block",
    [
        ("float32", 16),
        ("float32", 128),
        ("bfloat16", 16),
        ("bfloat16", 32),
        ("bfloat16", 64),
        ("float16", 16),
        ("float64", 32),
        ("tf32", 32),
    ],
)
@pytest.mark.parametrize("kind", ["full_row", "power_law", "none"])
def test_forward_splits_long_rows(module, dtype, block, kind):
    kernels = check_forward(module, dtype, block, 34, 3 * block + 8, 7 * block, kind, "relu", split=3)
    assert kernels[0].startswith("forward_") and ("add_partials" in kernels) == (kind != "none")


def test_split_and_whole_agree_to_rounding_and_each_is_reproducible(module):
    """The same bits for every thread order and seed, split or not."""
    rng = np.random.default_rng(5)
    pattern = Pattern.random("full_row", 100, 320, 32, rng)
    x, values = rounded(rng.standard_normal((34, 320)), "bfloat16"), pattern.values(rng, "bfloat16")
    group = module.preferred_rows_per_group(emulated.DTYPE_CODES["bfloat16"], 32)
    work = (*emulated.work_list(module, pattern.crow, pattern.num_blocks, group, 3), group)
    for use in (None, work):
        results = []
        for seed, order in ((1, "random"), (2, "random"), (0, "forward"), (0, "backward")):
            module.configure(seed=seed, order=order)
            results.append(run_forward(module, pattern, x, values, None, "bfloat16", work=use)[0])
        assert all((r == results[0]).all() for r in results)


def test_misaligned_rows_are_copied_for_the_tensor_cores(module):
    for batch, kernel in ((20, "forward_small_sm80"), (40, "forward_sm80")):
        kernels = check_forward(module, "bfloat16", 16, batch, 33, 35, "random", "none", (0, 0))  # rows of 70 bytes
        assert kernels == ["copy_rows", kernel]
        kernels = check_forward(module, "bfloat16", 16, batch, 33, 40, "random", "none", (0, 0), offset=1)
        assert kernels == ["copy_rows", kernel]
    module.force_variant(1)
    assert check_forward(module, "bfloat16", 16, 20, 33, 35, "random", "none", (0, 0)) == ["forward_simt"]


def test_rows_of_an_input_may_lie_on_each_other(module):
    """An expanded x: row stride 0."""
    rng = np.random.default_rng(0)
    pattern = Pattern.random("random", 32, 48, 16, rng)
    values = pattern.values(rng, "float32")
    row, y, w = (
        stored(rng.standard_normal((1, 48)), "float32"),
        emulated.empty((20, 32), "float32"),
        stored(values, "float32"),
    )
    module.linear_forward(
        pattern.handle(module), 0, 0, 20, pointer(row), 0, pointer(w), 0, pointer(y), 32, 0, 0, 0, 0, 0
    )
    np.testing.assert_allclose(y, np.repeat(row @ pattern.dense(values).T, 20, 0), rtol=1e-5, atol=1e-5)


def test_nan_reaches_only_rows_with_an_active_block(module):
    for variant, batch in ((1, 40), (2, 40), (2, 5)):
        module.force_variant(variant)
        rng = np.random.default_rng(1)
        mask = np.array([[1, 0], [0, 1]], dtype=bool)
        pattern = Pattern(mask, 16, 32, 32)
        x = rounded(rng.standard_normal((batch, 32)), "bfloat16")
        x[2, 3] = np.nan
        y, _, _ = run_forward(module, pattern, x, pattern.values(rng, "bfloat16"), None, "bfloat16")
        expected = np.zeros((batch, 32), dtype=bool)
        expected[2, :16] = True
        assert (np.isnan(y) == expected).all()


# Refusals ------------------------------------------------------------------------------------------------------------


def refuse(module, match, **changes):
    rng = np.random.default_rng(0)
    pattern = Pattern.random("random", 32, 32, 16, rng)
    pattern.block_size = changes.get("block_size", 16)
    x, y = stored(np.zeros((4, 32)), "float32"), emulated.empty((4, 32), "float32")
    values = stored(pattern.values(rng, "float32") if pattern.block_size == 16 else np.zeros((1, 1)), "float32")
    with pytest.raises(ValueError, match=match):
        module.linear_forward(
            pattern.handle(module),
            changes.get("dtype", 0),
            changes.get("activation", 0),
            4,
            pointer(x),
            32,
            pointer(values),
            changes.get("bias", 0),
            pointer(y),
            changes.get("y_stride", 32),
            0,
            0,
            0,
            0,
            0,
        )


def test_refusals(module):
    refuse(module, "block_size must be 1, 4, 8, 16, 32, 64 or 128, got 24", block_size=24)
    refuse(module, "dtype must be float32, bfloat16, float16, float64 or tf32, got code 9", dtype=9)
    refuse(module, "activation must be none, relu, gelu or silu, got code 7", activation=7)
    refuse(module, "y must have a row stride of at least 32, got 31", y_stride=31)
    refuse(module, "bias must start at a multiple of its element's 4 bytes, got an address 2 past one", bias=4098)
    module.force_variant(2)
    refuse(module, "variant must be able to serve this call, got sm80")
    with pytest.raises(ValueError, match="variant must be automatic, simt or sm80, got 5"):
        module.force_variant(5)


def test_workspace_that_is_too_small_is_refused(module):
    rng = np.random.default_rng(0)
    pattern = Pattern.random("random", 32, 32, 16, rng)
    g = stored(np.zeros((4, 32)), "float32")
    out = emulated.empty((4, 32), "float32")
    with pytest.raises(ValueError, match="workspace must have at least 512 bytes, got 511"):
        module.linear_backward(
            pattern.handle(module),
            0,
            1,
            4,
            pointer(g),
            32,
            pointer(g),
            32,
            pointer(g),
            32,
            pointer(stored(pattern.values(rng, "float32"), "float32")),
            pointer(out),
            32,
            0,
            0,
            1,
            511,
            0,
        )
    with pytest.raises(ValueError, match="saved must be given where there is an activation, got null"):
        module.linear_backward(
            pattern.handle(module), 0, 1, 4, pointer(g), 32, 0, 32, 0, 0, 0, pointer(out), 32, 0, 0, 0, 0, 0
        )


def test_the_choice_follows_arch_dtype_batch_and_alignment(module):
    pattern = Pattern.random("dense", 64, 64, 16, np.random.default_rng(0))

    def choice(dtype="bfloat16", batch=64, address=256, stride=64):
        return module.choose_linear_forward(
            pattern.handle(module), emulated.DTYPE_CODES[dtype], batch, address, stride, 256
        )

    assert choice() == "forward_sm80"
    assert choice(batch=8) == "forward_small_sm80"
    assert choice(dtype="float32") == "forward_simt"
    assert choice(address=258) == choice(stride=65) == "forward_sm80"  # after a copy
    assert choice(dtype="tf32") == "forward_tf32_sm80" and choice(dtype="tf32", batch=8) == "forward_small_tf32_sm80"
    assert choice(dtype="float64") == "forward_simt"
    module.set_device(arch=75)
    assert choice() == choice(dtype="tf32") == "forward_simt"


def test_tf32_rounds_its_operands_to_nearest(module):
    """One block of one active element: the product of the rounded operands, bit for bit."""
    rng = np.random.default_rng(0)
    for batch in (40, 5):
        pattern = Pattern(np.ones((1, 1), bool), 16, 16, 16)
        x, values = np.zeros((batch, 16)), np.zeros((1, 16, 16))
        x[:, 3], values[0, :, 3] = (
            rng.standard_normal(batch).astype(np.float32),
            rng.standard_normal(16).astype(np.float32),
        )
        y, _, _ = run_forward(module, pattern, x, values, None, "tf32")
        expected = np.outer(rounded(x[:, 3], "tf32"), rounded(values[0, :, 3], "tf32"))
        assert (y == expected).all() and (y != np.outer(x[:, 3], values[0, :, 3])).any()
