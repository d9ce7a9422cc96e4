"""Pattern work on the device, emulated: index arrays checked, copied and transposed, work lists. All exact."""

from __future__ import annotations

import cuda_emulated as emulated
import numpy as np
import pytest
from bad_indices import BAD_INDICES
from cuda_emulated import Pattern, indices, pointer, run

pytestmark = pytest.mark.usefixtures("emulator_defaults")

NAMES = ("crow", "col", "row", "t_crow", "t_row", "t_block")


def outputs(block_rows, block_cols, count):
    sizes = (block_rows + 1, count, count, block_cols + 1, count, count)
    return {name: np.full(size, -9, dtype=np.int32) for name, size in zip(NAMES, sizes, strict=True)}


def build(module, crow, col, shape, block, order=None):
    """Through pattern_from_csr; `shape` in elements."""
    out = outputs(*(-(-n // block) for n in shape), len(col))
    order = np.argsort(col, kind="stable") if order is None else np.array(order, np.int64)
    with emulated.memory(module, {"crow_in": crow, "col_in": col, "order": order}, out):
        addresses = tuple(map(pointer, out.values()))
        module.pattern_from_csr(indices(crow), indices(col), pointer(order), (*shape, block), addresses, run(module))
    return out


def same(out: dict, pattern: Pattern) -> None:
    for name in NAMES:
        np.testing.assert_array_equal(out[name], pattern.arrays[name], err_msg=name)


@pytest.mark.parametrize(
    "block_rows,block_cols,density",
    [(1, 1, 1.0), (5, 7, 0.4), (33, 3, 0.5), (2, 300, 0.9), (90, 110, 0.5), (4, 4, 0.0), (0, 5, 0.0)],
)
def test_every_index_array_equals_the_hosts(module, block_rows, block_cols, density):
    pattern = Pattern(np.random.default_rng(0).random((block_rows, block_cols)) < density, 1, block_rows, block_cols)
    same(build(module, pattern.crow, pattern.col, (block_rows, block_cols), 1), pattern)


@pytest.mark.parametrize("kind", ["random", "power_law", "empty_rows", "none", "dense"])
@pytest.mark.parametrize("block", [1, 4])
def test_csr_gets_its_transposed_index(module, kind, block):
    pattern = Pattern.random(kind, 40 * block - 1, 60 * block, block, np.random.default_rng(1))
    same(build(module, pattern.crow, pattern.col, (pattern.rows, pattern.cols), block), pattern)


@pytest.mark.parametrize(("crow", "col", "message"), BAD_INDICES)
def test_hostile_csr_is_refused_in_the_words_of_the_cpu(module, crow, col, message):
    for seed in (1, 2):
        module.configure(seed=seed)
        with pytest.raises(ValueError, match="^BlockPattern: " + message):
            build(module, np.array(crow, np.int32), np.array(col, np.int32), (8, 12), 4)


@pytest.mark.parametrize("shape", [(0, 12), (8, 0), (0, 0)])
def test_blocks_of_an_empty_matrix_are_refused(module, shape):
    crow = np.array([0] * (shape[0] // 4) + [1], np.int32)
    with pytest.raises(ValueError, match="crow_indices must begin with 0, got 1|col_indices must lie in"):
        build(module, crow, np.zeros(1, np.int32), shape, 4)


@pytest.mark.parametrize(
    ("order", "block", "at"),
    [
        ([1, 0, 2], 0, 1),  # columns descend
        ([0, 2, 1], 1, 2),  # of one column, not by number
        ([0, 0, 2], 0, 1),  # twice
        ([0, 1, 3], 3, 2),
        ([-1, 1, 2], -1, 0),
        ([2**32, 1, 2], 2**32, 0),
    ],
)
def test_an_order_that_does_not_sort_the_columns_stably_is_refused(module, order, block, at):
    crow, col = np.array([0, 2, 3], np.int32), np.array([0, 2, 2], np.int32)
    with pytest.raises(
        ValueError, match=f"BlockPattern: order must sort the columns stably, got block {block} at {at}"
    ):
        build(module, crow, col, (8, 12), 4, order)
    assert build(module, crow, col, (8, 12), 4, [0, 1, 2])["t_crow"].tolist() == [0, 1, 1, 3]


@pytest.mark.parametrize("rows_per_group", [1, 2, 8])
@pytest.mark.parametrize("split_length", [1, 3, 100])
@pytest.mark.parametrize("kind", ["power_law", "full_row", "none"])
def test_work_lists(module, kind, split_length, rows_per_group):
    pattern = Pattern.random(kind, 600 if kind == "power_law" else 37, 41, 1, np.random.default_rng(0))
    rows = len(pattern.crow) - 1
    items, num_items, num_slots = emulated.work_list(
        module, pattern.crow, pattern.num_blocks, rows_per_group, split_length
    )
    starts = np.arange(0, rows, rows_per_group)
    lengths = pattern.crow[np.minimum(starts + rows_per_group, rows)] - pattern.crow[starts]
    pieces = np.maximum(1, -(-lengths // split_length))
    assert num_items == pieces.sum() <= len(items) and num_slots == pieces[pieces > 1].sum()
    used = items[:num_items]
    assert sorted(map(tuple, used[:, :2])) == [(g, p) for g, n in enumerate(pieces) for p in range(n)]
    np.testing.assert_array_equal(used[:, 2], pieces[used[:, 0]])
    slots = used[used[:, 3] >= 0]
    assert sorted(slots[:, 3] + slots[:, 1]) == list(range(num_slots))  # every slot once
    assert ((used[:, 3] >= 0) == (used[:, 2] > 1)).all()
    classes = np.minimum(lengths, split_length)[used[:, 0]] * 16 // (split_length + 1)
    assert (np.diff(classes) <= 0).all()  # longest first
    assert (items[num_items:] == -7).all()


def test_empty_work_list(module):
    assert emulated.work_list(module, np.zeros(1, np.int32), 0, 4, 5)[1:] == (0, 0)
    with pytest.raises(ValueError, match="rows_per_group and split_length must be at least 1, got 0 and 5"):
        module.work_list_capacity((0, 4, 4), (0, 5))


def test_sizes_that_do_not_fit_are_refused(module):
    def made(crow_length, num_blocks, shape):
        module.pattern_from_csr((0, crow_length), (0, num_blocks), 0, shape, (0,) * 6, run(module))

    with pytest.raises(ValueError, match="there must be at most 2147483647 blocks, got 2147483648"):
        made(3, 2**31, (8, 12, 4))
    with pytest.raises(ValueError, match=r"crow_indices must have 3 entries \(block rows \+ 1\), got 5"):
        made(5, 4, (8, 12, 4))
    with pytest.raises(ValueError, match="block_size must be one of 1, 4, 8, 16, 32, 64, 128, got 0"):
        made(5, 4, (8, 12, 0))
    with pytest.raises(ValueError, match="the list must have at most 2147483647 items, got 2147483649"):
        module.build_work_list((0, 2, 2**31 - 1), (1, 1), 0, run(module))
