"""Every public function is called by name in some test: the sources of the tests are read, not run.

A call counts where the name resolves, through the imports of that file, to the function itself: ``text.split()`` is no
call of ``sparsenet.data.split``, and ``sn.functional.trim_workspace()`` is one wherever ``sn`` is sparsenet.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_doctests import PUBLIC

TESTS = Path(__file__).resolve().parent
FUNCTIONS = {name: member for name, member in PUBLIC.items() if not inspect.isclass(member)}


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Names that a file's imports bind, with what they stand for: ``sn`` -> ``sparsenet``."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.split(".")[0]
                names[alias.asname or package] = alias.name if alias.asname else package
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.AST) -> list[str]:
    """``a.b.c`` as its parts; empty for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return [node.id, *reversed(parts)] if isinstance(node, ast.Name) else []


def resolve(path: str) -> object:
    """The object at ``sparsenet.a.b``, or None."""
    found, parts = importlib.import_module("sparsenet"), path.split(".")[1:]
    for i, part in enumerate(parts):
        if not hasattr(found, part) and inspect.ismodule(found):
            try:
                importlib.import_module(".".join(["sparsenet", *parts[: i + 1]]))
            except ImportError:
                return None
        found = getattr(found, part, None)
    return found


def called(source: str) -> Iterator[object]:
    """What of sparsenet ``source`` calls by name."""
    tree = ast.parse(source)
    names = imported_names(tree)
    for node in ast.walk(tree):
        parts = dotted(node.func) if isinstance(node, ast.Call) else []
        if parts and names.get(parts[0], "").split(".")[0] == "sparsenet":
            yield resolve(".".join([names[parts[0]], *parts[1:]]))


@pytest.fixture(scope="module")
def called_by_tests() -> set[int]:
    return {id(member) for file in TESTS.rglob("*.py") for member in called(file.read_text())}


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_is_called_by_name_in_some_test(name, called_by_tests):
    assert id(FUNCTIONS[name]) in called_by_tests, f"no test calls {name}"


def test_a_call_counts_only_where_the_name_is_the_function():
    import sparsenet

    found = list(called("import sparsenet as sn\nsn.data.split(y, 0.5)\nfrom sparsenet import memory as m\nm.plan()\n"))
    assert found == [sparsenet.data.split, sparsenet.plan]
    assert list(called("from sparsenet.data import split\n'a b'.split()\ntext.split()\nsplit\n")) == []
    assert list(called("def split(): ...\nsplit()\n")) == []
