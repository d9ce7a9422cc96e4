"""Writes docs/kernels/cuda_variants.md: every kernel variant, the emulated tests that ran it, the bugs caught.

    PYTHONPATH=. python tests/cuda/emulator_report.py                 # runs the everyday CUDA tests, a minute
    pytest -m slow tests/cuda/test_nvcc.py                       # before it: adds registers, spills and HMMA

As a pytest plugin (``-p emulator_report``) it notes which instantiations of the kernels each test launched. Exit status
0 only if all tests passed and ran every instantiation that there is.
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
from pathlib import Path

import cuda_emulated
import pytest

PAGE = cuda_emulated.ROOT / "docs" / "kernels" / "cuda_variants.md"
COMPILED = cuda_emulated.ROOT / "build" / "nvcc_report.json"  # written by test_nvcc.py
TESTS = sorted(str(path) for path in (cuda_emulated.ROOT / "tests" / "cuda").glob("test_*.py"))

HEAD = [
    "Written by `python tests/cuda/emulator_report.py`. **Nothing has run on hardware**: tests, launches and CTAs",
    "are the emulator's. Shapes: how many, smallest … largest, batch×n×k of a product, else CTAs. Registers, bytes",
    "spilled and HMMA instructions are nvcc's and the disassembler's for sm_80 / sm_90a. Shared: the most bytes a CTA.",
]
COLUMNS = (
    *("kernel", "instantiation", "tests", "launches", "CTAs", "shapes", "seeds", "threads", "shared"),
    *("registers", "spilled", "HMMA"),
)
PLANTED = [
    "Small kernels with one bug each (`tests/cuda/emulator/planted.cpp`). Each is caught in ascending, descending and",
    "five random orders of threads; `race_hidden_by_order` is right in ascending order while the detector is off.",
    "Three more are told apart by what they compute or count: `wrong_swizzle`, `no_swizzle`, `column_in_one_bank`.",
]

_tests: dict[int, set[str]] = collections.defaultdict(set)


def readable(symbol: str) -> str:
    """A demangled kernel without namespaces, parameters and the element type's second mention."""
    name = re.sub(r"sparsenet::cuda::|void |unsigned (?=char|short|int)", "", symbol)
    name = name.split("(", 1)[0].replace("__nv_bfloat16", "bfloat16").replace("__half", "float16").replace(" >", ">")
    return re.sub(r"<(\w+)(.*), (\w+Config)<\1, ", r"<\1\2, \3<", name)


def instantiations(module: Path) -> dict[str, int]:
    """Readable name -> offset of every kernel in the emulator's module."""
    listing = subprocess.run(["nm", "-C", str(module)], capture_output=True, text=True, check=True).stdout
    kernel = re.compile(r"^(\w+) [tTwW] (?:void )?(sparsenet::cuda::\w+_kernel(?:<.*>)?)\([^()]*\)$", re.MULTILINE)
    return {readable(symbol): int(offset, 16) for offset, symbol in kernel.findall(listing)}


def _launches() -> dict[int, int]:
    return {offset: total["launches"] for offset, total in cuda_emulated.load().totals().items()}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Notes the kernels whose number of launches grew."""
    before = _launches()
    result = yield
    for offset, count in _launches().items():
        if count > before.get(offset, 0):
            _tests[offset].add(item.nodeid)
    return result


def sizes_text(sizes: set[tuple[int, int, int]]) -> str:
    """How many, the smallest and the largest: batch x n x k of a product, else CTAs."""
    ordered = sorted(sizes, key=lambda s: (s[0] * max(s[1], 1) * max(s[2], 1), s))
    shown = ["×".join(str(n) for n in s if n) or "0" for s in (ordered[0], ordered[-1])]
    return f"{len(ordered)}: {shown[0]}" + (f" … {shown[1]}" if len(ordered) > 1 else "")


def variants_table(names: dict[str, int]) -> tuple[list[str], list[str]]:
    """Table lines, and the instantiations that no test ran."""
    compiled = json.loads(COMPILED.read_text()) if COMPILED.exists() else {}
    totals, lines, missing = cuda_emulated.load().totals(), [], []
    for name, offset in sorted(names.items(), key=lambda pair: (totals.get(pair[1], {}).get("kernel", ""), pair[0])):
        total = totals.get(offset)
        if total is None:
            missing.append(name)
            continue
        on_archs = compiled.get(name, {})
        registers = " / ".join(str(entry["registers"]) for entry in on_archs.values()) or "–"
        spills = str(sum(entry["spill_bytes"] for entry in on_archs.values())) if on_archs else "–"
        hmma = " / ".join(str(entry["hmma"]) for entry in on_archs.values() if "hmma" in entry) or "–"
        lines.append(
            f"| {total['kernel']} | `{name}` | {len(_tests[offset])} | {total['launches']} | {total['ctas']} "
            f"| {sizes_text(total['sizes'])} | {total['seeds']} | {total['threads']} | {total['shared_bytes']} "
            f"| {registers} | {spills} | {hmma} |"
        )
    return lines, missing


def bugs_lines() -> list[str]:
    """The planted bugs and the mutants, with the report that the tests demand."""
    import test_emulator
    import test_mutants

    planted = [f"| `{name}` | {said.replace('|', ' or ')} |" for name, said in test_emulator.REPORTED.items()]
    mutants = [
        f"| {name} | `{file}` | `{tests}` | {said.replace('|', ' or ')} |"
        for name, (file, _, _, tests, said) in test_mutants.MUTANTS.items()
    ]
    return [
        f"## Planted bugs: {len(planted)}",
        "",
        *PLANTED,
        "",
        "| kernel | the emulator says |",
        "|---|---|",
        *planted,
        "",
        f"## Mutants of the real kernels: {len(mutants)}",
        "",
        "`tests/cuda/test_mutants.py` (slow) breaks one line of the real sources; the named op tests must fail so.",
        "",
        "| mutant | file | tests | what they say |",
        "|---|---|---|---|",
        *mutants,
    ]


def page(passed: int, names: dict[str, int], lines: list[str]) -> str:
    """The whole document."""
    head = [
        "# Every CUDA kernel variant and what has run it",
        "",
        *HEAD,
        "",
        f"{len(names)} instantiations, all of them run by {passed} emulated tests.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
        *lines,
        "",
    ]
    return "\n".join(head + bugs_lines()) + "\n"


class _Passed:
    count = 0

    def pytest_runtest_logreport(self, report):
        self.count += report.when == "call" and report.passed


def main() -> int:
    """Run the tests and write the page."""
    sys.modules["emulator_report"] = sys.modules[__name__]
    passed = _Passed()
    options = ["-q", "-p", "no:cacheprovider", "-k", "not stale"]  # the page is what this writes
    status = pytest.main([*options, *TESTS], plugins=[sys.modules[__name__], passed])
    names = instantiations(cuda_emulated.build())
    lines, missing = variants_table(names)
    for name in missing:
        print(f"no test ran {name}")
    if status != 0 or missing:
        return 1
    PAGE.write_text(page(passed.count, names, lines))
    print(f"wrote {PAGE.relative_to(cuda_emulated.ROOT)}: {len(names)} instantiations, {passed.count} tests")
    return 0


if __name__ == "__main__":
    sys.exit(main())
