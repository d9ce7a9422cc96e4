"""block_sparse_linear's CUDA kernels, emulated, against float64: every variant, block size, dtype and pattern shape."""

from __future__ import annotations

import cuda_emulated as emulated
import numpy as np
import pytest
import torch
from cuda_emulated import Pattern, fetched, matrix, pointer, rounded, run, stored, tolerance

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
    """``pads``: elements behind the rows of x and of the results; the latter only the C++ op offers."""
    batch, rows = len(x), pattern.rows
    arrays = {
        "x": stored(x, dtype, pads[0], offset),
        "values": stored(values, dtype),
        "bias": None if bias is None else stored(bias, dtype),
        **pattern.arrays,
    }
    y = emulated.empty((batch, rows), dtype, pads[1])
    z = emulated.empty((batch, rows), dtype, pads[1]) if pre else None
    handle = pattern.handle(module)
    if work is not None:
        items, num_items, num_slots, rows_per_group = work
        arrays["items"] = items
        handle.set_forward_work(pointer(items), num_items, num_slots, rows_per_group)
    call = (emulated.DTYPE_CODES[dtype], emulated.ACTIVATION_CODES[activation], 1)
    operands = matrix(arrays["x"], pattern.cols), (pointer(arrays["values"]), pointer(arrays["bias"]))
    with emulated.memory(module, arrays, {"y": y, "pre_activation": z}):
        if pads[1]:
            outputs = matrix(y, rows), matrix(z, rows)
            module.linear_forward_into(handle, call, *operands, outputs, run(module))
        else:
            module.linear_forward(handle, call, *operands, (pointer(y), pointer(z)), run(module))
    kernels = [launch["kernel"] for launch in module.launches()]
    return fetched(y, dtype, rows), None if z is None else fetched(z, dtype, rows), kernels


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
        kernels = check_forward(module, "bfloat16", 16, batch, 33, 35, "random", "none")  # rows of 70 bytes
        assert kernels == ["copy_rows", kernel]
        kernels = check_forward(module, "bfloat16", 16, batch, 33, 40, "random", "none", offset=1)
        assert kernels == ["copy_rows", kernel]
    module.force_variant(1)
    assert check_forward(module, "bfloat16", 16, 20, 33, 35, "random", "none") == ["forward_simt"]


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
    x = (pointer(row), 20, 48, 0)
    module.linear_forward(pattern.handle(module), (0, 0, 1), x, (pointer(w), 0), (pointer(y), 0), run(module))
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


def refuse(module, match, block_size=16, dtype=0, activation=0, bias=0, columns=32):
    pattern = Pattern.random("random", 32, 32, 16, np.random.default_rng(0))
    pattern.block_size = block_size
    x, y = stored(np.zeros((4, columns)), "float32"), emulated.empty((4, 32), "float32")
    values = stored(np.zeros((pattern.num_blocks, 16, 16)), "float32")
    with pytest.raises(ValueError, match=match):
        module.linear_forward(
            pattern.handle(module),
            (dtype, activation, 1),
            matrix(x, columns),
            (pointer(values), bias),
            (pointer(y), 0),
            run(module),
        )


def test_refusals(module):
    refuse(module, "block_size must be 1, 4, 8, 16, 32, 64 or 128, got 24", block_size=24)
    refuse(module, "dtype must be float32, bfloat16, float16, float64 or tf32, got code 9", dtype=9)
    refuse(module, "activation must be none, relu, gelu or silu, got code 7", activation=7)
    refuse(module, r"x must have shape \[4, 32\], got \[4, 31\]", columns=31)
    refuse(module, "bias must start at a multiple of its element's 4 bytes, got an address 2 past one", bias=4098)
    module.force_variant(2)
    refuse(module, "variant must be able to serve this call, got sm80")
    with pytest.raises(ValueError, match="variant must be automatic, simt or sm80, got 5"):
        module.force_variant(5)


def test_results_whose_rows_overlap_are_refused(module):
    pattern = Pattern.random("random", 32, 32, 16, np.random.default_rng(0))
    x, y, values = (stored(np.zeros((n, 32)), "float32") for n in (4, 4, 16 * pattern.num_blocks))
    operands = pattern.handle(module), (0, 0, 1), matrix(x, 32)
    apart, close, none = (pointer(y), 4, 32, 32), (pointer(y), 4, 32, 31), (0, 0, 0, 0)
    with pytest.raises(ValueError, match="y must have a row stride of at least 32, got 31"):
        module.linear_forward_into(*operands, (pointer(values), 0), (close, none), run(module))
    with pytest.raises(ValueError, match="pre_activation must have a row stride of at least 32, got 31"):
        module.linear_forward_into(*operands, (pointer(values), 0), (apart, close), run(module))
    with pytest.raises(ValueError, match="grad_x must have a row stride of at least 32, got 31"):
        module.linear_backward_into(*operands, pointer(values), (apart, none), (close, 0, 0), run(module))


def test_backward_refusals(module):
    pattern = Pattern.random("random", 32, 32, 16, np.random.default_rng(0))
    g, out = stored(np.zeros((4, 32)), "float32"), emulated.empty((4, 32), "float32")
    x, values = matrix(g, 32), stored(np.zeros((pattern.num_blocks, 16, 16)), "float32")

    address = pointer(out)

    def refused(match, saved=address, grads=(address, 0, 0), x=x):
        operands = pattern.handle(module), (0, 1, 1), x, pointer(values), (matrix(g, 32), saved)
        with pytest.raises(ValueError, match="block_sparse_linear: " + match):
            module.linear_backward(*operands, grads, run(module))

    refused("saved must be given where there is an activation, got null", saved=0)
    refused("grad_values must start at a multiple of its element's 4 bytes", grads=(0, 1, 0))
    refused("grad_bias must start at a multiple of its element's 4 bytes", grads=(0, 0, 2))
    refused(r"saved must have shape \[4, 32\], got \[5, 32\]", grads=(0, address, 0), x=(address, 5, 32, 32))


def test_the_choice_follows_arch_dtype_batch_and_alignment(module):
    pattern = Pattern.random("dense", 64, 64, 16, np.random.default_rng(0))

    def choice(dtype="bfloat16", batch=64, address=256, stride=64):
        x = (address, batch, 64, stride)
        return module.choose_linear_forward(pattern.handle(module), (emulated.DTYPE_CODES[dtype], 0, 1), x, (256, 0))

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
