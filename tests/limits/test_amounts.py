"""Amounts by name are tested in tests/memory, where they are also to be had; here: they are the same objects."""

import sparsenet as sn
from sparsenet import limits, memory
from sparsenet.memory import budget


def test_the_names_lead_to_one_thing():
    assert limits.MemoryBudget is memory.MemoryBudget is budget.MemoryBudget is sn.MemoryBudget
    assert limits.format_bytes is memory.format_bytes is budget.format_bytes
    assert limits.available_bytes is memory.available_bytes is budget.available_bytes


def test_bytes_are_told_with_a_unit():
    assert [limits.format_bytes(n) for n in (0, 1023, 1024, 5 << 30)] == ["0 B", "1023 B", "1 KiB", "5 GiB"]
