"""A pytest plugin: which tests ran which emulated kernel, as a table at the end.

PYTHONPATH=tests pytest -p emulator_report tests/test_cuda_*.py
"""

from __future__ import annotations

import collections

import cuda_emulated
import pytest

_tests: dict[str, set[str]] = collections.defaultdict(set)


def _launches() -> dict[str, int]:
    return {kernel: total["launches"] for kernel, total in cuda_emulated.load().totals().items()}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Notes the kernels whose number of launches grew."""
    before = _launches()
    result = yield
    for kernel, count in _launches().items():
        if count > before.get(kernel, 0):
            _tests[kernel].add(item.nodeid)
    return result


def pytest_terminal_summary(terminalreporter):
    """The table, without the kernels of planted bugs."""
    write = terminalreporter.write_line
    write("| kernel | tests | launches | CTAs | seeds | threads | shared bytes, most |")
    write("|---|---|---|---|---|---|---|")
    planted = set(cuda_emulated.load().planted_names())
    for kernel, t in cuda_emulated.load().totals().items():
        if kernel not in planted:
            counts = f"{len(_tests[kernel])} | {t['launches']} | {t['ctas']} | {t['seeds']}"
            write(f"| {kernel} | {counts} | {t['threads']} | {t['shared_bytes']} |")
