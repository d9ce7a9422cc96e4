"""grad_input, grad_weight and grad_bias of block_sparse_linear on CUDA, emulated, against float64; both directions."""

from __future__ import annotations

import cuda_emulated as emulated
import numpy as np
import pytest
import torch
from cuda_emulated import Pattern, fetched, matrix, pointer, rounded, run, stored, tolerance
from test_block_sparse_linear import SHAPES, run_forward

pytestmark = pytest.mark.usefixtures("emulator_defaults")


def derivative(saved: np.ndarray, activation: str) -> np.ndarray:
    if activation == "none":
        return np.ones_like(saved)
    if activation == "relu":
        return (saved > 0).astype(np.float64)
    t = torch.from_numpy(saved).requires_grad_()
    getattr(torch.nn.functional, activation)(t).sum().backward()
    return t.grad.numpy()


def run_backward(module, pattern, grad_y, saved, x, values, dtype, activation, pads=(0, 0, 0), wanted="xwb", work=None):
    """``pads``: elements behind the rows of x, of grad_y and saved, of grad_x; the last only the C++ op offers."""
    batch, b = len(grad_y), pattern.block_size
    in_pad, out_pad, grad_pad = pads
    arrays = {
        "grad_y": stored(grad_y, dtype, out_pad),
        "x": stored(x, dtype, in_pad),
        "values": stored(values, dtype),
        "saved": None if activation == "none" else stored(saved, dtype, out_pad if grad_pad else 0),
        **pattern.arrays,
    }
    grad_x = emulated.empty((batch, pattern.cols), dtype, grad_pad) if "x" in wanted else None
    grad_values = emulated.empty((pattern.num_blocks, b, b), dtype) if "w" in wanted else None
    grad_bias = emulated.empty((pattern.rows,), dtype) if "b" in wanted else None
    handle = pattern.handle(module)
    if work is not None:
        arrays["items"] = work[0]
        handle.set_transposed_work(pointer(work[0]), *work[1:])
    call = (emulated.DTYPE_CODES[dtype], emulated.ACTIVATION_CODES[activation], 1)
    operands = handle, call, matrix(arrays["x"], pattern.cols), pointer(arrays["values"])
    grads = tuple(map(pointer, (grad_x, grad_values, grad_bias)))
    g, saved = matrix(arrays["grad_y"], pattern.rows), arrays["saved"]
    with emulated.memory(module, arrays, {"grad_x": grad_x, "grad_values": grad_values, "grad_bias": grad_bias}):
        if grad_pad:
            upstream, grads = (g, matrix(saved, pattern.rows)), (matrix(grad_x, pattern.cols), *grads[1:])
            module.linear_backward_into(*operands, upstream, grads, run(module))
        else:
            module.linear_backward(*operands, (g, pointer(saved)), grads, run(module))
    kernels = [launch["kernel"] for launch in module.launches()]
    return (
        None if grad_x is None else fetched(grad_x, dtype, pattern.cols),
        None if grad_values is None else fetched(grad_values, dtype, b),
        None if grad_bias is None else fetched(grad_bias, dtype, pattern.rows),
        kernels,
    )


def check_backward(module, dtype, block, batch, rows, cols, kind, activation, pads=(0, 0, 0), seed=0, split=None):
    rng = np.random.default_rng(seed)
    pattern = Pattern.random(kind, rows, cols, block, rng)
    grad_y = rounded(rng.standard_normal((batch, rows)), dtype)
    saved = rounded(rng.standard_normal((batch, rows)), dtype)
    x = rounded(rng.standard_normal((batch, cols)), dtype)
    values = pattern.values(rng, dtype)
    work = None
    if split is not None:
        group = module.preferred_rows_per_group(emulated.DTYPE_CODES[dtype], block)
        work = (*emulated.work_list(module, pattern.t_crow, pattern.num_blocks, group, split), group)
        module.launches()
    grad_x, grad_values, grad_bias, kernels = run_backward(
        module, pattern, grad_y, saved, x, values, dtype, activation, pads, work=work
    )
    grad_z = grad_y * derivative(saved, activation)
    if activation != "none":  # the kernels round it to dtype; the derivative itself has fp32's error
        exact, grad_z = grad_z, rounded(grad_z, dtype)
        slack = np.abs(exact) * 4 * emulated.OPERAND_UNIT[dtype] + 1e-6 * np.abs(grad_y)
    else:
        slack = np.zeros_like(grad_z)
    weight = pattern.dense(values)
    magnitude = np.abs(grad_z)
    for got, expected, bound in (
        (grad_x, grad_z @ weight, tolerance(dtype, rows, magnitude @ np.abs(weight)) + slack @ np.abs(weight)),
        (
            grad_values,
            pattern.blocks_of(grad_z.T @ x),
            pattern.blocks_of(tolerance(dtype, batch, magnitude.T @ np.abs(x)) + slack.T @ np.abs(x)),
        ),
        (grad_bias, grad_z.sum(0), tolerance(dtype, batch, magnitude.sum(0)) + slack.sum(0)),
    ):
        assert (np.abs(got - expected) <= bound).all(), (np.abs(got - expected) - bound).max()
    return kernels


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("block", SHAPES)
def test_backward_simt(module, dtype, block):
    module.force_variant(1)
    seed = block + emulated.DTYPE_CODES[dtype]
    activation = list(emulated.ACTIVATION_CODES)[seed % 4]
    kernels = check_backward(module, dtype, block, *SHAPES[block], "random", activation, (1, 2, 3), seed)
    assert "grad_input_simt" in kernels or "grad_input_rows_simt" in kernels
    assert "grad_weight_simt" in kernels or "grad_weight_small_simt" in kernels


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("block", [16, 32, 64])
def test_backward_simt_small_batches(module, dtype, block):
    module.force_variant(1)
    check_backward(module, dtype, block, 7, 2 * block - 1, 2 * block + 5, "random", "none", seed=block)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "tf32"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
@pytest.mark.parametrize("batch", [3, 130])
def test_backward_sm80(module, dtype, block, batch):
    module.force_variant(2)
    seed = block + batch
    rows, cols = 2 * max(block, 64) + 24, 128 + block // 2 + 5
    activation = list(emulated.ACTIVATION_CODES)[(block // 16 + batch) % 4]
    kernels = check_backward(
        module, dtype, block, batch, rows, cols, "random", activation, (-cols % 8, -rows % 8, 3), seed
    )
    type_name = "_tf32" if dtype == "tf32" else ""
    assert f"grad_input{type_name}_sm80" in kernels and f"grad_weight{type_name}_sm80" in kernels


@pytest.mark.parametrize("kind", ["none", "dense", "empty_rows", "full_row", "power_law"])
@pytest.mark.parametrize(
    "dtype,block", [("float32", 4), ("float32", 32), ("bfloat16", 16), ("bfloat16", 64), ("tf32", 32)]
)
def test_backward_patterns(module, kind, dtype, block):
    check_backward(module, dtype, block, 34, 4 * block, 6 * block, kind, "relu")


@pytest.mark.parametrize("dtype,block", [("float32", 16), ("bfloat16", 32), ("bfloat16", 128), ("tf32", 64)])
def test_grad_input_splits_long_columns(module, dtype, block):
    kernels = check_backward(module, dtype, block, 20, 6 * block, 2 * block + 8, "full_row", "none", split=2)
    assert "add_partials" in kernels


@pytest.mark.parametrize(
    "dtype,block,batch",
    [("float32", 16, 600), ("bfloat16", 32, 600), ("tf32", 16, 600), ("float16", 8, 513), ("float64", 1, 530)],
)
def test_grad_weight_splits_the_batch(module, dtype, block, batch):
    """Few blocks and a long batch on a large device: several splits, added in order, the same bits every time."""
    module.set_device(num_multiprocessors=64)
    kernels = check_backward(module, dtype, block, batch, 2 * block, 2 * block, "dense", "none")
    assert "reduce_splits" in kernels
    rng = np.random.default_rng(3)
    pattern = Pattern.random("dense", 2 * block, 2 * block, block, rng)
    g, x = (rounded(rng.standard_normal((batch, 2 * block)), dtype) for _ in range(2))
    results = []
    for seed in (1, 2):
        module.configure(seed=seed)
        results.append(run_backward(module, pattern, g, g, x, pattern.values(rng, dtype), dtype, "none", wanted="w")[1])
    assert (results[0] == results[1]).all()


@pytest.mark.parametrize("wanted", ["x", "w", "b", "xb", "wb"])
def test_backward_computes_only_what_is_wanted(module, wanted):
    rng = np.random.default_rng(0)
    pattern = Pattern.random("random", 40, 48, 16, rng)
    g, x = rounded(rng.standard_normal((40, 40)), "bfloat16"), rounded(rng.standard_normal((40, 48)), "bfloat16")
    *results, kernels = run_backward(
        module, pattern, g, g, x, pattern.values(rng, "bfloat16"), "bfloat16", "relu", wanted=wanted
    )
    assert [r is not None for r in results] == [w in wanted for w in "xwb"]
    assert len(kernels) == 1 + len(wanted)


def test_batch_of_zero(module):
    rng = np.random.default_rng(0)
    pattern = Pattern.random("random", 40, 48, 16, rng)
    empty = np.zeros((0, 40)), np.zeros((0, 48))
    y, _, _ = run_forward(module, pattern, empty[1], pattern.values(rng, "float32"), None, "float32")
    assert y.shape == (0, 40)
    _, grad_values, grad_bias, _ = run_backward(
        module, pattern, empty[0], empty[0], empty[1], pattern.values(rng, "float32"), "float32", "relu"
    )
    assert (grad_values == 0).all() and (grad_bias == 0).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "tf32"])
@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_bank_conflicts_of_the_tensor_core_kernels(module, dtype, block):
    """The swizzles: no conflicts in the pipelines nor in the epilogue's stores."""
    module.configure(seed=1, count_bank_conflicts=True)
    rng = np.random.default_rng(0)
    pattern, code = Pattern.random("dense", 128, 256, block, rng), emulated.DTYPE_CODES[dtype]
    xs, gs = (stored(rounded(rng.standard_normal((64, n)), dtype), dtype) for n in (256, 128))
    values, y = stored(pattern.values(rng, dtype), dtype), emulated.empty((64, 128), dtype)
    handle, call = pattern.handle(module), (code, 0, 1)
    x, weight = matrix(xs, 256), (pointer(values), 0)
    module.linear_forward(handle, call, x, weight, (pointer(y), 0), run(module))
    gx, gw = emulated.empty((64, 256), dtype), emulated.empty((pattern.num_blocks, block, block), dtype)
    upstream, grads = (matrix(gs, 128), 0), (pointer(gx), pointer(gw), 0)
    module.linear_backward(handle, call, x, weight[0], upstream, grads, run(module))
    checked = 0
    for launch in module.launches():
        if launch["kernel"].endswith("_sm80"):
            assert launch["instructions"] > 0 and launch["conflicts"] == 0, launch
            checked += 1
    assert checked == 3


@pytest.mark.parametrize("variant,batch", [(1, 33), (2, 33), (2, 9)])
def test_offsets_past_2_to_the_31(module, variant, batch):
    """The only block is number 2^31 / b^2 and the last row of x, y and the gradients starts past element 2^31."""
    module.force_variant(variant)
    block, stride = 128, 2**31 // (batch - 1) // 8 * 8 + 8
    number = 2**31 // block**2 + 1
    rng = np.random.default_rng(0)
    x, w = (
        rounded(rng.standard_normal((batch, block)), "bfloat16"),
        rounded(rng.standard_normal((1, block, block)), "bfloat16"),
    )
    crow, col = np.array([number, number + 1], np.int32), np.zeros(number + 1, np.int32)
    t_block = np.full(number + 1, number, np.int32)
    handle = module.Pattern(
        tuple(map(pointer, (crow, col, col, crow, col, t_block))),
        rows=block,
        cols=block,
        num_blocks=number + 1,
        block_size=block,
    )
    elements = (batch - 1) * stride + block
    xs, ys, gs = (emulated.reserved(elements, np.uint16) for _ in range(3))
    values = emulated.reserved((number + 1) * block * block, np.uint16)

    def rows_of(array):
        return np.lib.stride_tricks.as_strided(array, (batch, block), (2 * stride, 2), writeable=True)

    rows_of(xs)[:] = stored(x, "bfloat16")
    values[number * block * block :] = stored(w, "bfloat16").ravel()
    inputs = {"x": xs, "values": values, "crow": crow, "col": col, "t_block": t_block}
    module.clear_memory()
    for name, array in inputs.items():
        module.add_memory(array.ctypes.data, array.nbytes, False, name)
    for out in (ys, gs):  # only the rows themselves may be written
        for row in range(batch):
            module.add_memory(out.ctypes.data + 2 * row * stride, 2 * block, True, f"row {row}")
    x_matrix, y_matrix, g_matrix = ((pointer(array), batch, block, stride) for array in (xs, ys, gs))
    none, call, weight = (0, 0, 0, 0), (1, 0, 1), pointer(values)
    module.linear_forward_into(handle, call, x_matrix, (weight, 0), (y_matrix, none), run(module))
    got = fetched(np.ascontiguousarray(rows_of(ys)), "bfloat16", block)
    expected, bound = x @ w[0].T, tolerance("bfloat16", block, np.abs(x) @ np.abs(w[0]).T)
    assert (np.abs(got - expected) <= bound).all()
    module.linear_backward_into(handle, call, none, weight, (x_matrix, none), (g_matrix, 0, 0), run(module))
    got = fetched(np.ascontiguousarray(rows_of(gs)), "bfloat16", block)
    assert (np.abs(got - x @ w[0]) <= tolerance("bfloat16", block, np.abs(x) @ np.abs(w[0]))).all()
    module.clear_memory()
    assert elements > 2**31


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_row25_relu_gives_zero_for_what_it_switched_off(module, dtype):
    """Whatever comes from above, Inf and NaN too, where the result was 0; where it was not, they propagate."""
    rng = np.random.default_rng(0)
    pattern = Pattern.random("dense", 8, 16, 8, rng)
    grad_y = np.ones((5, 8))
    grad_y[0, :3], grad_y[1, 7] = (np.inf, -np.inf, np.nan), np.inf
    saved = np.ones((5, 8))
    saved[0, :3] = 0.0, -0.0, 0.0
    x = rounded(rng.standard_normal((5, 16)), dtype)
    _, _, bias, _ = run_backward(
        module, pattern, grad_y, saved, x, pattern.values(rng, dtype), dtype, "relu", wanted="b"
    )
    assert bias.tolist() == [4.0, 4.0, 4.0, 5.0, 5.0, 5.0, 5.0, np.inf]
