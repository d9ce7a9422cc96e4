"""compact_blocks on CUDA, emulated: values and every moment gathered in one launch, bit for bit."""

from __future__ import annotations

import cuda_emulated as emulated
import numpy as np
import pytest
from cuda_emulated import Pattern, indices, pointer, run

pytestmark = pytest.mark.usefixtures("emulator_defaults")

BYTES = {np.uint8: 1, np.uint16: 2, np.float32: 4, np.float64: 8, np.complex128: 16}


def compact(module, old, new, rows, cols, tensors):
    """The op on [num_blocks, b, b] arrays; returns the new ones and what was launched."""
    b = old.block_size
    targets = [emulated.aligned((new.num_blocks, b, b), t.dtype) for t in tensors]
    inputs = {f"from {i}": t for i, t in enumerate(tensors)} | {"rows": rows, "cols": cols}
    inputs |= {f"old {n}": a for n, a in old.arrays.items()} | {f"new {n}": a for n, a in new.arrays.items()}
    with emulated.memory(module, inputs, {f"to {i}": t for i, t in enumerate(targets)}):
        module.compact_blocks(
            old.handle(module),
            new.handle(module),
            (indices(rows), indices(cols)),
            [(pointer(t), pointer(target), t.dtype.itemsize) for t, target in zip(tensors, targets, strict=True)],
            run(module),
        )
    return targets, [launch["kernel"] for launch in module.launches()]


def stored_like(pattern, dtype, rng):
    """[num_blocks, b, b] of any bits, zero outside the matrix."""
    b, item = pattern.block_size, np.dtype(dtype).itemsize
    raw = rng.integers(0, 256, (pattern.num_blocks, b, b, item), dtype=np.uint8)
    inside = (pattern.row[:, None] * b + np.arange(b) < pattern.rows)[:, :, None]
    inside = inside & (pattern.col[:, None] * b + np.arange(b) < pattern.cols)[:, None, :]
    return (raw * inside[..., None]).view(dtype)[..., 0]


def expected(old, new, rows, cols, tensor):
    """By the dense matrix, in bytes."""
    b, item = old.block_size, tensor.dtype.itemsize
    raw = np.ascontiguousarray(tensor).view(np.uint8).reshape(old.num_blocks, b, b, item)
    planes = [new.blocks_of(old.dense(raw[..., i].astype(np.float64))[rows][:, cols]) for i in range(item)]
    return np.stack(planes, -1).astype(np.uint8)


def chosen(kind, n, rng):
    if kind == "subset":
        return np.sort(rng.permutation(n)[: max(1, 2 * n // 3)]).astype(np.int32)
    if kind == "permutation":
        return rng.permutation(n).astype(np.int32)
    return rng.integers(0, n, n + 3).astype(np.int32)  # repeated


@pytest.mark.parametrize("kind", ["subset", "permutation", "repeated"])
@pytest.mark.parametrize("block", [1, 4, 8, 16, 32, 64, 128])
def test_equals_the_dense_gather(module, block, kind):
    rng = np.random.default_rng(block)
    old = Pattern.random("random", 3 * block + block // 2 + 1, 4 * block + block // 3, block, rng)
    rows, cols = chosen(kind, old.rows, rng), chosen(kind, old.cols, rng)
    new = Pattern.random("dense" if kind == "permutation" else "random", len(rows), len(cols), block, rng)
    tensors = [stored_like(old, dtype, rng) for dtype in BYTES]
    got, kernels = compact(module, old, new, rows, cols, tensors)
    for g, t in zip(got, tensors, strict=True):
        raw = np.ascontiguousarray(g).view(np.uint8).reshape(new.num_blocks, block, block, t.dtype.itemsize)
        np.testing.assert_array_equal(raw, expected(old, new, rows, cols, t))
    assert kernels == ["compact_blocks"]


@pytest.mark.parametrize("old_kind,new_kind", [("none", "dense"), ("dense", "none"), ("full_row", "power_law")])
def test_patterns(module, old_kind, new_kind):
    rng = np.random.default_rng(0)
    old = Pattern.random(old_kind, 70, 50, 8, rng)
    rows, cols = chosen("subset", 70, rng), chosen("subset", 50, rng)
    new = Pattern.random(new_kind, len(rows), len(cols), 8, rng)
    (got,), _ = compact(module, old, new, rows, cols, [stored_like(old, np.float32, rng)])
    assert got.shape == (new.num_blocks, 8, 8) and (old_kind != "none" or (got == 0).all())


def test_more_tensors_than_one_launch_takes(module):
    rng = np.random.default_rng(0)
    old = Pattern.random("random", 20, 20, 4, rng)
    order = np.arange(20, dtype=np.int32)
    tensors = [stored_like(old, np.float32, rng) for _ in range(11)]
    got, kernels = compact(module, old, old, order, order, tensors)
    assert kernels == ["compact_blocks"] * 2
    for g, t in zip(got, tensors, strict=True):
        np.testing.assert_array_equal(g.view(np.uint8), t.view(np.uint8))


def test_refusals(module):
    rng = np.random.default_rng(0)
    old, other = Pattern.random("random", 20, 20, 4, rng), Pattern.random("random", 20, 20, 8, rng)
    gathered = (0, 20), (0, 20)
    with pytest.raises(ValueError, match="compact_blocks: block_size must stay 4, got 8"):
        module.compact_blocks(old.handle(module), other.handle(module), gathered, [], run(module))
    with pytest.raises(ValueError, match="compact_blocks: elements must have 1, 2, 4, 8 or 16 bytes, got 3"):
        module.compact_blocks(old.handle(module), old.handle(module), gathered, [(256, 256, 3)], run(module))
    with pytest.raises(ValueError, match="compact_blocks: rows and cols must have 20 and 20 entries, got 20 and 19"):
        module.compact_blocks(old.handle(module), old.handle(module), ((0, 20), (0, 19)), [], run(module))
