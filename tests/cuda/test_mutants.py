"""Break the real kernels in one place each, and require that the op tests notice: are the tests any good?"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cuda_emulated as emulated
import pytest

LINEAR, NORMS, PATTERN = (
    "test_block_sparse_linear",
    "test_block_gradient_squared_norms",
    "test_block_pattern",
)

# name: (file, the line's text, what stands there instead, tests that must fail, what the emulator or the test says)
MUTANTS = {
    "sm80 without its pipeline barrier": (
        "block_sparse_linear_product_sm80.cuh",
        "sync_block(); // the stage is complete for all, and the stage read last is free again",
        "",
        f"{LINEAR}.py::test_forward_sm80",
        "race on shared|cp.async that was not waited|nobody wrote",
    ),
    "sm80 waits for one group too few": (
        "block_sparse_linear_product_sm80.cuh",
        "async_wait<Config::kStages - 2>();",
        "async_wait<Config::kStages - 1>();",
        f"{LINEAR}.py::test_forward_sm80",
        "cp.async that was not waited for",
    ),
    "sm80 with another swizzle in its copies": (
        "block_sparse_linear_product_sm80.cuh",
        "async_copy_16(a_s + row * Config::kDepth + (chunk ^ (row & 7)) * kChunk, source",
        "async_copy_16(a_s + row * Config::kDepth + (chunk ^ (row & 3)) * kChunk, source",
        f"{LINEAR}.py::test_forward_sm80",
        "assert|nobody wrote",
    ),
    "sm80 reads its staged result too early": (
        "block_sparse_linear_product_sm80.cuh",
        "      }\n    }\n    sync_block();\n  }",
        "      }\n    }\n  }",
        f"{LINEAR}.py::test_forward_sm80",
        "race on shared|nobody wrote",
    ),
    "sm80 reads one batch row too many": (
        "block_sparse_linear_product_sm80.cuh",
        "const bool inside = m0 + row < p.batch && columns > 0;",
        "const bool inside = m0 + row <= p.batch && columns > 0;",
        f"{LINEAR}.py::test_forward_sm80",
        "out of bounds",
    ),
    "sm80 forgets the ragged columns": (
        "block_sparse_linear_product_sm80.cuh",
        "inside ? static_cast<int>(sizeof(T)) * columns : 0);",
        "inside ? 16 : 0);",
        f"{LINEAR}.py::test_forward_sm80",
        "out of bounds|assert",
    ),
    "pieces of a split line overlap": (
        "block_sparse_linear_product_sm80.cuh",
        "      begin = first;\n",
        "",
        f"{LINEAR}.py::test_forward_splits_long_rows",
        "assert",
    ),
    "tf32 words read from another swizzle": (
        "device/fragments_sm80.cuh",
        "return row * kColumns + swizzled<float>(column / 4, row) * 4 + column % 4;",
        "return row * kColumns + column;",
        f"{LINEAR}_backward.py::test_backward_sm80",
        "assert|nobody wrote",
    ),
    "tf32 operands cut off instead of rounded": (
        "device/fragments_sm80.cuh",
        "words[i] = round_to_tf32(float_of(words[i]));",
        "words[i] &= 0xffffe000u;",
        f"{LINEAR}.py::test_tf32_rounds_its_operands_to_nearest",
        "assert",
    ),
    "simt without the barrier before a tile is overwritten": (
        "block_sparse_linear_product_simt.cuh",
        "sync_block(); // the last step's tiles have been read",
        "",
        f"{LINEAR}.py::test_forward_simt",
        "race on shared",
    ),
    "simt tile off by one": (
        "block_sparse_linear_product_simt.cuh",
        "if (m0 + m < p.batch && k_global < p.k_size)",
        "if (m0 + m < p.batch && k_global <= p.k_size)",
        f"{LINEAR}.py::test_forward_simt",
        "assert|out of bounds",
    ),
    "small batch kernel without its barrier": (
        "block_sparse_linear_small_batch_sm80.cuh",
        "  sync_block();\n  for (int i = thread_index()",
        "  for (int i = thread_index()",
        f"{LINEAR}.py::test_forward_small_sm80",
        "race on shared|nobody wrote",
    ),
    "partial sums added from the wrong slot": (
        "block_sparse_linear_product.cuh",
        "(item.slot + piece) * p.batch * params.width",
        "item.slot * p.batch * params.width",
        f"{LINEAR}.py::test_forward_splits_long_rows",
        "assert",
    ),
    "column sums without their barrier": (
        "block_sparse_linear_elementwise_simt.cuh",
        "  partial[thread_index()] = sum;\n  sync_block();",
        "  partial[thread_index()] = sum;",
        f"{LINEAR}_backward.py::test_backward_simt",
        "race on shared|nobody wrote",
    ),
    "grad_weight reads past its split": (
        "block_sparse_linear_grad_weight_sm80.cuh",
        "const bool g_inside = m < end_row && g_valid > 0",
        "const bool g_inside = m <= end_row && g_valid > 0",
        f"{LINEAR}_backward.py::test_backward_sm80",
        "out of bounds|assert",
    ),
    "grad_weight without its pipeline barrier": (
        "block_sparse_linear_grad_weight_sm80.cuh",
        "sync_block(); // the stage is complete for all, and the stage read last is free again",
        "",
        f"{NORMS}.py::test_norms_sm80",
        "race on shared|cp.async that was not waited|nobody wrote",
    ),
    "norms of the neighbouring block": (
        "block_gradient_squared_norms_sm80.cuh",
        "col = col0 + (k_part + k) / kBlock;",
        "col = col0 + (k_part + k) / kBlock + 1;",
        f"{NORMS}.py::test_norms_sm80",
        "assert|race on global|out of bounds",
    ),
    "compaction takes the neighbouring block": (
        "compact_blocks_simt.cuh",
        "if (block == end || load_global(p.from_col + block) != block_col) return -1;",
        "if (block == end) return -1;",
        "test_compact_blocks.py",
        "AssertionError|Arrays are not equal",
    ),
    "compaction reads rows of the padding": (
        "compact_blocks_simt.cuh",
        "if (i < p.to_rows && j < p.to_cols)",
        "if (i <= p.to_rows && j < p.to_cols)",
        "test_compact_blocks.py",
        "out of bounds|AssertionError|Arrays are not equal",
    ),
    "columns may descend": (
        "block_pattern_simt.cuh",
        "load_global(p.source.col + i - 1) >= col)",
        "load_global(p.source.col + i - 1) > col)",
        f"{PATTERN}.py",
        "DID NOT RAISE",
    ),
    "an order may name a block twice": (
        "block_pattern_simt.cuh",
        "before < block);",
        "before <= block);",
        f"{PATTERN}.py",
        "DID NOT RAISE",
    ),
    "the transposed index takes a neighbour's row": (
        "block_pattern_simt.cuh",
        "store_global(p.out.t_row + j, sorted ? load_global(p.out.row + block) : 0);",
        "store_global(p.out.t_row + j, sorted ? load_global(p.out.row + j) : 0);",
        f"{PATTERN}.py",
        "AssertionError|Arrays are not equal",
    ),
    "transposed pointers count the block column itself": (
        "block_pattern_simt.cuh",
        "load_global(p.source.col + block) < line)",
        "load_global(p.source.col + block) <= line)",
        f"{PATTERN}.py",
        "AssertionError|Arrays are not equal",
    ),
    "scan uses its scratch again too early": (
        "device/scan.cuh",
        "sync_block(); // scratch may be used again",
        "",
        f"{PATTERN}.py",
        "race on shared",
    ),
}


def run_mutant(name: str, folder: Path) -> subprocess.CompletedProcess:
    """Its tests, on a copy of the sources in which one line is another."""
    file, text, instead, tests, _ = MUTANTS[name]
    shutil.copytree(emulated.ROOT / "csrc" / "cuda", folder / "csrc" / "cuda")
    for header in (emulated.ROOT / "csrc").glob("*.h"):
        shutil.copy(header, folder / "csrc")
    source = folder / "csrc" / "cuda" / file
    assert source.read_text().count(text) == 1, f"the line to break is not in {file} exactly once"
    source.write_text(source.read_text().replace(text, instead))
    objects = folder / "build" / "release"
    objects.mkdir(parents=True)
    for built in (emulated.BUILD / "release").glob("*.o"):
        (objects / built.name).symlink_to(built)
    done = emulated.run_child(
        *("-m", "pytest", "-o", "addopts=", "-x", "-q", "-p", "no:cacheprovider", tests),
        SPARSENET_EMULATOR_CSRC=str(folder / "csrc"),
        SPARSENET_EMULATOR_BUILD=str(folder / "build"),
        SPARSENET_EMULATOR_QUICK="1",
    )
    shutil.rmtree(folder)
    return done


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: a future of its tests}: two at a time, while the tests below look at them one by one."""
    emulated.load()  # the objects that the mutants share
    folder = tmp_path_factory.mktemp("mutants")
    pool = ThreadPoolExecutor(max_workers=2)
    yield {name: pool.submit(run_mutant, name, folder / str(i)) for i, name in enumerate(MUTANTS)}
    pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("SPARSENET_EMULATOR_FLAVOUR") == "asan", reason="one flavour is enough")
@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, runs):
    done = runs[name].result()
    assert done.returncode == 1 and "1 failed" in done.stdout, f"survived:\n{(done.stdout + done.stderr)[-3000:]}"
    assert re.search(MUTANTS[name][-1], done.stdout), done.stdout[-3000:]
