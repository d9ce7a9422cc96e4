"""Every operation has one name, its stem, in Python, the reference, both kernels, tests, benches and docs."""

from __future__ import annotations

from pathlib import Path

import pytest

import sparsenet as sn
from sparsenet import functional, reference

ROOT = Path(__file__).resolve().parent.parent

# stem -> the public functions that belong to it. A function of sparsenet.functional that belongs to none is refused.
OPERATIONS = {
    "block_sparse_linear": ("block_sparse_linear", "layer_linear"),
    "block_gradient_squared_norms": ("block_gradient_squared_norms", "candidate_gradients"),
    "block_pattern": (
        "draw_free_places",
        "largest_reaching_all",
        "lowest_to_spare",
        "select_extreme",
    ),  # and the class BlockPattern
    "compact_blocks": ("compact_blocks",),
}
# What block_pattern does is sorting, drawing and checking: its tests need no second version.
# layer_linear is block_sparse_linear with what a layer's topology holds at the moment.
WITHOUT_REFERENCE = {"layer_linear", *OPERATIONS["block_pattern"]}
NOT_OPERATIONS = {"linear_workspace", "native_build_info", "norms_workspace", "trim_workspace", "workspace_bytes"}

FILES = [
    "csrc/cpu/{stem}.cpp",
    "csrc/cuda/{stem}.cu",
    "tests/functional/test_{stem}.py",
    "tests/cuda/test_{stem}.py",
    "bench/bench_{stem}.py",
    "docs/kernels/{stem}.md",
    "docs/kernels/{stem}_cuda.md",
]
OTHER_PAGES = {"cuda_emulator", "cuda_variants"}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("stem", OPERATIONS)
def test_an_operation_has_its_file(stem, file):
    assert (ROOT / file.format(stem=stem)).is_file(), f"{stem} has no {file.format(stem=stem)}"


@pytest.mark.parametrize("stem", OPERATIONS)
def test_an_operation_has_its_function_and_reference(stem):
    for name in OPERATIONS[stem]:
        assert name in functional.__all__ and callable(getattr(functional, name)), name
        assert (name in reference.__all__) == (name not in WITHOUT_REFERENCE), name
    if stem == "block_pattern":
        assert sn.BlockPattern.__name__ == "BlockPattern"
    else:
        assert stem in OPERATIONS[stem]


def test_every_function_of_functional_belongs_to_a_stem():
    functions = {name for name in functional.__all__ if callable(getattr(functional, name)) and name[0].islower()}
    assert functions - NOT_OPERATIONS == {name for names in OPERATIONS.values() for name in names}


def test_every_kernel_page_belongs_to_a_stem():
    pages = {page.stem.removesuffix("_cuda") for page in (ROOT / "docs" / "kernels").glob("*.md")}
    assert pages - OTHER_PAGES == set(OPERATIONS)


def test_every_page_names_its_sources():
    """A page about a kernel names the file of the kernel, so that a renamed file is noticed."""
    for stem in OPERATIONS:
        text = (ROOT / "docs" / "kernels" / f"{stem}.md").read_text()
        assert f"csrc/cpu/{stem}.cpp" in text, stem
