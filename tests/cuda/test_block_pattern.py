"""Pattern work on the device, emulated: build, transpose, rank, rewire, gather, work lists. All exact."""

from __future__ import annotations

import cuda_emulated as emulated
import numpy as np
import pytest
from bad_indices import BAD_INDICES
from cuda_emulated import Pattern, pointer

pytestmark = pytest.mark.usefixtures("emulator_defaults")

NAMES = ("crow", "col", "row", "t_crow", "t_row", "t_block")


def outputs(block_rows, block_cols, count):
    sizes = (block_rows + 1, count, count, block_cols + 1, count, count)
    return {name: np.full(size, -9, dtype=np.int32) for name, size in zip(NAMES, sizes, strict=True)}


def workspace_for(module, count, block_rows, block_cols):
    return emulated.aligned((module.pattern_workspace_bytes(count, block_rows, block_cols),), np.uint8)


def build(module, rows, cols, block_rows, block_cols, count):
    """Through pattern_from_places."""
    out, order = outputs(block_rows, block_cols, count), np.full(count, -9, dtype=np.int32)
    workspace = workspace_for(module, count, block_rows, block_cols)
    with emulated.memory(module, {"rows": rows, "cols": cols}, {**out, "order": order, "workspace": workspace}):
        module.pattern_from_places(
            pointer(rows),
            pointer(cols),
            *map(pointer, out.values()),
            block_rows,
            block_cols,
            count,
            pointer(order),
            pointer(workspace),
            workspace.nbytes,
            0,
        )
    return out, order


def build_from_csr(module, crow, col, shape, block):
    """Through pattern_from_csr; `shape` in elements."""
    out = outputs(*(-(-n // block) for n in shape), len(col))
    workspace = workspace_for(module, len(col), 1, 1)
    with emulated.memory(module, {"crow_in": crow, "col_in": col}, {**out, "workspace": workspace}):
        module.pattern_from_csr(
            pointer(crow),
            len(crow),
            pointer(col),
            *shape,
            block,
            *map(pointer, out.values()),
            len(col),
            pointer(workspace),
            workspace.nbytes,
            0,
        )
    return out


def same(out: dict, pattern: Pattern) -> None:
    for name in NAMES:
        np.testing.assert_array_equal(out[name], pattern.arrays[name], err_msg=name)


@pytest.mark.parametrize(
    "block_rows,block_cols,density",
    [(1, 1, 1.0), (5, 7, 0.4), (33, 3, 0.5), (2, 300, 0.9), (90, 110, 0.5), (4, 4, 0.0), (0, 5, 0.0)],
)
def test_places_in_any_order_become_the_canonical_pattern(module, block_rows, block_cols, density):
    rng = np.random.default_rng(0)
    pattern = Pattern(rng.random((block_rows, block_cols)) < density, 1, block_rows, block_cols)
    shuffle = rng.permutation(pattern.num_blocks)
    out, order = build(module, pattern.row[shuffle], pattern.col[shuffle], block_rows, block_cols, pattern.num_blocks)
    same(out, pattern)
    np.testing.assert_array_equal(shuffle[order], np.arange(pattern.num_blocks))


@pytest.mark.parametrize("kind", ["random", "power_law", "empty_rows", "none", "dense"])
@pytest.mark.parametrize("block", [1, 4])
def test_csr_gets_its_transposed_index(module, kind, block):
    pattern = Pattern.random(kind, 40 * block - 1, 60 * block, block, np.random.default_rng(1))
    same(build_from_csr(module, pattern.crow, pattern.col, (pattern.rows, pattern.cols), block), pattern)


@pytest.mark.parametrize(("crow", "col", "message"), BAD_INDICES)
def test_hostile_csr_is_refused_in_the_words_of_the_cpu(module, crow, col, message):
    for seed in (1, 2):
        module.configure(seed=seed)
        with pytest.raises(ValueError, match="^BlockPattern: " + message):
            build_from_csr(module, np.array(crow, np.int32), np.array(col, np.int32), (8, 12), 4)


@pytest.mark.parametrize("shape", [(0, 12), (8, 0), (0, 0)])
def test_blocks_of_an_empty_matrix_are_refused(module, shape):
    crow = np.array([0] * (shape[0] // 4) + [1], np.int32)
    with pytest.raises(ValueError, match="crow_indices must begin with 0, got 1|col_indices must lie in"):
        build_from_csr(module, crow, np.zeros(1, np.int32), shape, 4)


@pytest.mark.parametrize(
    "rows,cols,message",
    [
        ([0, 2], [0, 1], r"rows must lie in \[0, 2\), got 2 at 1"),
        ([-3, 0], [0, 1], r"rows must lie in \[0, 2\), got -3 at 0"),
        ([0, 1], [9, 9], r"cols must lie in \[0, 4\), got 9 at 0"),
        ([1, 1], [2, 2], r"places must differ, got \(1, 2\) twice"),
    ],
)
def test_hostile_places_are_refused(module, rows, cols, message):
    with pytest.raises(ValueError, match=message):
        build(module, np.array(rows, np.int32), np.array(cols, np.int32), 2, 4, 2)


def select(module, scores, k, highest):
    selected, workspace = np.full(k, -9, dtype=np.int32), workspace_for(module, len(scores), 1, 1)
    with emulated.memory(module, {"scores": scores}, {"selected": selected, "workspace": workspace}):
        module.select_scores(
            pointer(scores), len(scores), k, highest, pointer(selected), pointer(workspace), workspace.nbytes, 0
        )
    return selected


@pytest.mark.parametrize("highest", [False, True])
@pytest.mark.parametrize("count", [1, 31, 257, 5000])
def test_ranking_with_ties_by_lower_index(module, count, highest):
    rng = np.random.default_rng(count)
    scores = rng.standard_normal(count).astype(np.float32)
    scores[rng.random(count) < 0.5] = np.float32(rng.integers(-1, 2))  # many ties
    scores[rng.random(count) < 0.1] = -0.0
    scores[rng.random(count) < 0.1] = 1e-42  # denormal
    expected = np.argsort(-scores if highest else scores, kind="stable")
    for k in {0, 1, count // 3, count}:
        np.testing.assert_array_equal(select(module, scores, k, highest), expected[:k])


def test_infinite_scores_rank_and_nan_is_refused(module):
    scores = np.arange(40, dtype=np.float32)
    scores[[5, 17, 30]] = np.inf, -np.inf, np.inf
    assert select(module, scores, 3, True).tolist() == [5, 30, 39]
    assert select(module, scores, 2, False).tolist() == [17, 0]
    scores[[17, 30]] = np.nan, -np.float32(np.nan)
    with pytest.raises(ValueError, match="select_extreme: scores must not be NaN, got NaN at 17"):
        select(module, scores, 3, True)
    with pytest.raises(ValueError, match=r"select_extreme: k must lie in \[0, 40\], got 41"):
        select(module, scores, 41, True)


@pytest.mark.parametrize("kind", ["random", "none", "dense", "empty_rows"])
def test_inactive_places(module, kind):
    pattern = Pattern.random(kind, 21, 34, 1, np.random.default_rng(2))
    count = pattern.mask.size - pattern.num_blocks
    rows, cols = np.full(count, -9, np.int32), np.full(count, -9, np.int32)
    with emulated.memory(module, pattern.arrays, {"rows": rows, "cols": cols}):
        module.inactive_places(pattern.handle(module), pointer(rows), pointer(cols), 0)
    expected = np.nonzero(~pattern.mask)
    np.testing.assert_array_equal(rows, expected[0])
    np.testing.assert_array_equal(cols, expected[1])


def update(module, pattern, dropped, grown_rows, grown_cols):
    shape, count = pattern.mask.shape, pattern.num_blocks - len(dropped) + len(grown_rows)
    out, source = outputs(*shape, count), np.full(count, -9, np.int32)
    workspace = workspace_for(module, pattern.num_blocks + len(grown_rows), *shape)
    inputs = {"dropped": dropped, "grown_rows": grown_rows, "grown_cols": grown_cols, **pattern.arrays}
    with emulated.memory(module, inputs, {**out, "source": source, "workspace": workspace}):
        module.update_pattern(
            pattern.handle(module),
            pointer(dropped),
            len(dropped),
            pointer(grown_rows),
            pointer(grown_cols),
            len(grown_rows),
            *map(pointer, out.values()),
            count,
            pointer(source),
            pointer(workspace),
            workspace.nbytes,
            0,
        )
    return out, source


@pytest.mark.parametrize(
    "shape,num_dropped,num_grown",
    [((12, 17), 20, 20), ((12, 17), 0, 9), ((12, 17), 30, 0), ((3, 5), 2, 3), ((70, 90), 900, 800)],
)
def test_a_rewire_keeps_survivors_and_names_their_source(module, shape, num_dropped, num_grown):
    rng = np.random.default_rng(4)
    pattern = Pattern(rng.random(shape) < 0.4, 1, *shape)
    num_dropped = min(num_dropped, pattern.num_blocks)
    dropped = rng.permutation(pattern.num_blocks)[:num_dropped].astype(np.int32)
    free = np.argwhere(~pattern.mask)
    grown = free[rng.permutation(len(free))[:num_grown]].astype(np.int32)
    out, source = update(module, pattern, dropped, grown[:, 0].copy(), grown[:, 1].copy())
    mask = pattern.mask.copy()
    mask[pattern.row[dropped], pattern.col[dropped]] = False
    mask[grown[:, 0], grown[:, 1]] = True
    same(out, Pattern(mask, 1, *shape))
    for i, s in enumerate(source):
        place = (out["row"][i], out["col"][i])
        assert place == ((pattern.row[s], pattern.col[s]) if s >= 0 else tuple(grown[-1 - s]))

    # Values, and any optimizer moment, follow by one gather; grown blocks start at zero.
    for element_bytes, block in ((4, 16), (2, 1), (1, 3), (2, 6)):
        before = rng.integers(0, 255, (pattern.num_blocks, block * element_bytes), dtype=np.uint8)
        after = emulated.aligned((len(source), block * element_bytes), np.uint8)
        with emulated.memory(module, {"before": before, "source": source}, {"after": after}):
            module.gather_blocks(
                pointer(before), pointer(source), pointer(after), len(source), block * element_bytes, 0
            )
        np.testing.assert_array_equal(after, np.where(source[:, None] >= 0, before[np.maximum(source, 0)], 0))


def test_hostile_rewires_are_refused(module):
    pattern = Pattern(np.eye(4, dtype=bool), 1, 4, 4)
    empty = np.zeros(0, np.int32)

    def i32(*values):
        return np.array(values, np.int32)

    for dropped, rows, cols, message in (
        (i32(4), empty, empty, r"dropped must lie in \[0, 4\), got 4 at 0"),
        (i32(0, -1), empty, empty, r"dropped must lie in \[0, 4\), got -1 at 1"),
        (i32(1, 1), empty, empty, "dropped must list each block once"),
        (empty, i32(2), i32(2), r"places must differ, got \(2, 2\) twice"),
        (empty, i32(0), i32(7), r"grown cols must lie in \[0, 4\), got 7 at 0"),
        (i32(0), i32(0, 1, 1), i32(1, 2, 2), r"places must differ, got \(1, 2\) twice"),
    ):
        with pytest.raises(ValueError, match=message):
            update(module, pattern, dropped, rows, cols)
    out, _ = update(module, pattern, i32(2), i32(2), i32(2))  # a place whose block left is free again
    same(out, pattern)


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
        module.work_list_capacity(4, 4, 0, 5)


def test_sizes_that_do_not_fit_are_refused(module):
    with pytest.raises(ValueError, match=r"count must lie in \[0, 2147483647\], got 2147483648"):
        module.pattern_workspace_bytes(2**31, 4, 4)
    with pytest.raises(ValueError, match=r"num_blocks must lie in \[0, 4\], got 5"):
        build(module, np.zeros(5, np.int32), np.zeros(5, np.int32), 2, 2, 5)
    with pytest.raises(ValueError, match="workspace must have at least"):
        module.pattern_from_places(0, 0, 0, 0, 0, 0, 0, 0, 2, 2, 0, 0, 256, 1, 0)
