"""From numbers to kernels: one table, one list of block sizes, one file in which run-time numbers become constants."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from sparsenet import _C
from sparsenet.functional.checks import BLOCK_SIZES

CPU = Path(__file__).resolve().parents[2] / "csrc" / "cpu"
# a comparison of a dtype, an activation or a block size with one value
DISPATCH = re.compile(r"\bswitch \(|\bcase \w|[!=]= (DType|Activation)::|\b(b|block|block_size|width) == \d")
# constants of a template are compared freely: these run while compiling
WHILE_COMPILING = re.compile(r"if constexpr|static_assert|constexpr \w+ \w+ =|: public")


def chosen_by_hand(source: str) -> list[str]:
    lines = [line.split("//")[0] for line in source.splitlines()]
    return [line.strip() for line in lines if DISPATCH.search(line) and not WHILE_COMPILING.search(line)]


def test_numbers_become_constants_in_one_file():
    sources = [p for p in CPU.iterdir() if p.suffix in (".h", ".cpp")]
    assert len(sources) > 15 and chosen_by_hand((CPU / "dispatch.h").read_text())
    found = {p.name: chosen_by_hand(p.read_text()) for p in sources if p.name != "dispatch.h"}
    assert not {name: lines for name, lines in found.items() if lines}


def test_a_choice_by_hand_shows():
    assert chosen_by_hand("  switch (op.dtype) {") and chosen_by_hand("  return b == 16 ? f<16> : f<32>;")
    assert chosen_by_hand("  if (dtype == DType::float64) return;")
    assert not chosen_by_hand("  if constexpr (A == Activation::none) return; // a switch (of nothing)")


def test_native_and_python_allow_the_same_block_sizes():
    allowed = []
    for b in range(1, 257):
        try:
            _C.Pattern(np.array([0, 1], np.int32), np.array([0], np.int32), b, b, b)
            allowed.append(b)
        except ValueError as error:
            assert f"must be one of {', '.join(map(str, BLOCK_SIZES))}, got {b}" in str(error)
    assert tuple(allowed) == BLOCK_SIZES


@pytest.mark.parametrize("dtype", [-1, 4])
def test_a_number_that_is_no_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match=f"dtype: must be a number from 0 to 3, got {dtype}"):
        _C.linear_workspace((dtype, 0, 1), (0, 8, 64, 64), 64, 4, 16)
