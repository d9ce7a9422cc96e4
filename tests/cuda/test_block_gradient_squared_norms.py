"""Gradient norms and candidate gradients on CUDA, emulated, against float64."""

from __future__ import annotations

import cuda_emulated as emulated
import numpy as np
import pytest
from cuda_emulated import fetched, indices, matrix, pointer, rounded, run, stored, tolerance

pytestmark = pytest.mark.usefixtures("emulator_defaults")


def blocks(dense: np.ndarray, b: int) -> np.ndarray:
    """[block_rows, block_cols, b, b] of a matrix, zeros outside it."""
    rows, cols = -(-dense.shape[0] // b), -(-dense.shape[1] // b)
    padded = np.zeros((rows * b, cols * b))
    padded[: dense.shape[0], : dense.shape[1]] = dense
    return padded.reshape(rows, b, cols, b).transpose(0, 2, 1, 3)


def check_norms(module, dtype, block, batch, rows, cols, pads=(0, 0), seed=0, row_range=None):
    rng = np.random.default_rng(seed)
    x, g = rounded(rng.standard_normal((batch, cols)), dtype), rounded(rng.standard_normal((batch, rows)), dtype)
    xs, gs = stored(x, dtype, pads[0]), stored(g, dtype, pads[1])
    block_rows, block_cols = -(-rows // block), -(-cols // block)
    begin, end = row_range or (0, block_rows)
    norms = emulated.empty((end - begin, block_cols), "float32")
    call = (emulated.DTYPE_CODES[dtype], block, 1)
    with emulated.memory(module, {"x": xs, "grad_z": gs}, {"norms": norms}):
        module.gradient_norms(call, matrix(xs, cols), matrix(gs, rows), (begin, end), pointer(norms), run(module))
    gradient = blocks(g.T @ x, block)[begin:end]
    # Every element's error enters its square as 2 |G| e + e^2; the squares are then added in fp32.
    error = blocks(tolerance("float32", batch, np.abs(g).T @ np.abs(x)), block)[begin:end]
    bound = (2 * np.abs(gradient) * error + error**2).sum((2, 3)) + (gradient**2).sum((2, 3)) * 2.0**-22 * (block + 8)
    assert (np.abs(norms - (gradient**2).sum((2, 3))) <= bound).all()
    return [launch["kernel"] for launch in module.launches()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("block", [1, 4, 8, 16, 32, 64, 128])
def test_norms_simt(module, dtype, block):
    module.force_variant(1)
    module.configure(seed=block)
    assert check_norms(module, dtype, block, 37, 70 + block // 2, 2 * block + 67, (1, 2), block) == [
        "gradient_norms_simt"
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("batch", [5, 130])
def test_norms_sm80(module, dtype, block, batch):
    module.force_variant(2)
    rows, cols = 150, 2 * block + 77
    kernels = check_norms(module, dtype, block, batch, rows, cols, (-cols % 8, -rows % 8), batch)
    assert kernels == ["gradient_norms_tf32_sm80" if dtype == "tf32" else "gradient_norms_sm80"]


@pytest.mark.parametrize(
    "dtype,block", [("tf32", 32), ("float32", 16), ("bfloat16", 16), ("bfloat16", 128), ("float32", 1)]
)
def test_norms_of_a_range_of_block_rows(module, dtype, block):
    rows = 4 * block + (block + 1) // 2
    for row_range in ((1, 3), (2, 2), (3, 5)):
        check_norms(module, dtype, block, 20, rows, 3 * block, (0, -rows % 8), row_range=row_range)


def test_norms_of_an_empty_batch_are_zero(module):
    for dtype in ("float32", "bfloat16"):
        check_norms(module, dtype, 16, 0, 40, 48)


def check_candidates(module, dtype, block, batch, rows, cols, pads=(0, 0), seed=0, count=7):
    rng = np.random.default_rng(seed)
    x, g = rounded(rng.standard_normal((batch, cols)), dtype), rounded(rng.standard_normal((batch, rows)), dtype)
    xs, gs = stored(x, dtype, pads[0]), stored(g, dtype, pads[1])
    gradient = blocks(g.T @ x, block)
    bound = blocks(tolerance(dtype, batch, np.abs(g).T @ np.abs(x)), block)
    chosen = rng.permutation(gradient.shape[0] * gradient.shape[1])[:count]  # any order
    place_rows, place_cols = (
        (chosen // gradient.shape[1]).astype(np.int32),
        (chosen % gradient.shape[1]).astype(np.int32),
    )
    grads = emulated.empty((count, block, block), dtype)
    call, places = (emulated.DTYPE_CODES[dtype], block, 1), (indices(place_rows), indices(place_cols))
    inputs = {"x": xs, "grad_z": gs, "rows": place_rows, "cols": place_cols}
    with emulated.memory(module, inputs, {"grads": grads}):
        module.candidate_gradients(call, matrix(xs, cols), matrix(gs, rows), places, pointer(grads), run(module))
    got = fetched(grads, dtype, block)
    assert (np.abs(got - gradient[place_rows, place_cols]) <= bound[place_rows, place_cols]).all()
    return [launch["kernel"] for launch in module.launches()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("block", [1, 4, 8, 16, 32, 64])
def test_candidates_simt(module, dtype, block):
    module.force_variant(1)
    kernels = check_candidates(module, dtype, block, 35, 5 * block + 1, 4 * block + 3, (1, 0), block)
    assert kernels == ["grad_weight_small_simt" if block < 16 else "grad_weight_simt"]


@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype,count", [("bfloat16", 1), ("bfloat16", 7), ("tf32", 5)])
def test_candidates_sm80(module, block, dtype, count):
    module.force_variant(2)
    rows, cols = 4 * block + 5, 3 * block + 3
    kernels = check_candidates(module, dtype, block, 70, rows, cols, (-cols % 8, -rows % 8), block, count)
    assert kernels == ["grad_weight_tf32_sm80" if dtype == "tf32" else "grad_weight_sm80"]


def test_candidates_split_the_batch(module):
    module.set_device(num_multiprocessors=64)
    for dtype in ("float32", "bfloat16"):
        assert check_candidates(module, dtype, 32, 600, 96, 96)[1:] == ["reduce_splits"]


def test_misaligned_rows_are_copied_for_the_tensor_cores(module):
    assert check_norms(module, "bfloat16", 16, 40, 45, 51) == ["copy_rows", "copy_rows", "gradient_norms_sm80"]
    assert check_norms(module, "bfloat16", 16, 40, 48, 51) == ["copy_rows", "gradient_norms_sm80"]
    assert check_candidates(module, "float16", 32, 40, 45, 51, count=2) == [
        "copy_rows",
        "copy_rows",
        "grad_weight_sm80",
    ]


def test_no_candidates(module):
    assert check_candidates(module, "float32", 16, 8, 32, 32, count=0) == []


def refused(module, match, dtype=0, block=16, x=0, batch=4, grad_rows=4, block_rows=(0, 1)):
    operands = (x, batch, 32, 32), (0, grad_rows, 48, 48)
    with pytest.raises(ValueError, match=match):
        module.gradient_norms((dtype, block, 1), *operands, block_rows, 0, run(module))


def test_refusals(module):
    refused(module, r"block rows must be a range within 0..3, got 1..5", block_rows=(1, 5))
    refused(module, "block_gradient_squared_norms: block_size must be 1, 4, 8", block=3)
    refused(module, "x must start at a multiple of its element's 2 bytes, got an address 1 past one", dtype=1, x=1)
    refused(module, "grad_output must have as many rows as x, 4, got 5", grad_rows=5)
    x, grad_z = (0, 4, 32, 32), (0, 4, 48, 48)
    with pytest.raises(ValueError, match="candidate_gradients: rows and cols must be of one length, got 3 and 2"):
        module.candidate_gradients((0, 16, 1), x, grad_z, ((0, 3), (0, 2)), 0, run(module))
    with pytest.raises(ValueError, match="candidate_gradients: num_places must not be negative, got -1"):
        module.candidate_gradients((0, 16, 1), x, grad_z, ((0, -1), (0, -1)), 0, run(module))


def test_scratch_memory_is_asked_for_once_and_must_be_aligned(module):
    """Two copies of 20 rows of 64 and 48 aligned elements, and the partial sums of two splits: one piece of memory."""
    module.set_device(num_multiprocessors=64)
    asked = []
    x, grad_z = stored(np.zeros((600, 51)), "bfloat16"), stored(np.zeros((600, 45)), "bfloat16")
    place = np.zeros(1, np.int32)
    grads = emulated.empty((1, 16, 16), "bfloat16")
    call, places = (1, 16, 1), (indices(place), indices(place))

    def candidates(allocate):
        module.candidate_gradients(call, matrix(x, 51), matrix(grad_z, 45), places, pointer(grads), (0, allocate))

    def allocate(nbytes):
        asked.append(emulated.aligned((nbytes,), np.uint8))
        return pointer(asked[-1])

    candidates(allocate)
    assert [a.nbytes for a in asked] == [
        -(-600 * 48 * 2 // 256) * 256 + -(-600 * 56 * 2 // 256) * 256 + 2 * 16 * 16 * 4
    ]
    with pytest.raises(ValueError, match="scratch memory must start at a multiple of 16 bytes, got address 264"):
        candidates(lambda nbytes: 264)
    with pytest.raises(ValueError, match=r"run must be \(stream, allocate\), got 1 entries"):
        module.gradient_norms(call, matrix(x, 51), matrix(grad_z, 45), (0, 1), 0, (0,))
    with pytest.raises(ZeroDivisionError):
        candidates(lambda nbytes: nbytes // 0)


@pytest.mark.parametrize("variant,batch", [(1, 17), (2, 17)])
def test_rows_that_start_past_element_2_to_the_31(module, variant, batch):
    module.force_variant(variant)
    stride, size = 2**31 // (batch - 1) // 8 * 8 + 8, 32
    rng = np.random.default_rng(0)
    operands, arrays = [], []
    for _ in range(2):
        operands.append(rounded(rng.standard_normal((batch, size)), "bfloat16"))
        arrays.append(emulated.reserved((batch - 1) * stride + size, np.uint16))
        view = np.lib.stride_tricks.as_strided(arrays[-1], (batch, size), (2 * stride, 2), writeable=True)
        view[:] = stored(operands[-1], "bfloat16")
    gradient = blocks(operands[1].T @ operands[0], 16)
    norms = emulated.empty((2, 2), "float32")
    place = np.array([1], np.int32)
    grads = emulated.empty((1, 16, 16), "bfloat16")
    call, operands = (1, 16, 1), [(pointer(array), batch, size, stride) for array in arrays]
    inputs = {"x": arrays[0], "grad_z": arrays[1], "place": place}
    with emulated.memory(module, inputs, {"norms": norms, "grads": grads}):
        module.gradient_norms(call, *operands, (0, 2), pointer(norms), run(module))
        module.candidate_gradients(call, *operands, (indices(place), indices(place)), pointer(grads), run(module))
    np.testing.assert_allclose(norms, (gradient**2).sum((2, 3)), rtol=1e-5)
    np.testing.assert_allclose(fetched(grads, "bfloat16", 16)[0], gradient[1, 1], rtol=2**-8, atol=1e-4)
