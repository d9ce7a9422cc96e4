"""Every example in a docstring runs, and every public name has one.

The public names are those of ``sparsenet.__all__``, of the ``__all__`` of each package and module at the root of
sparsenet and of each package below, and of the modules that these hand on (``sn.architecture.gates``, ...) or that the
docs tell users to import from. An example is run once, from the module that defines it.
"""

from __future__ import annotations

import doctest
import importlib.util
import inspect
import pkgutil
import re
import types
from pathlib import Path

import pytest
import torch

import sparsenet as sn

# Public names whose docstrings need no example, and why: mostly what a call returns (the call has the example).
# Exceptions are left out by their type: an example of one is an example of a mistake.
WITHOUT_EXAMPLE = {
    "Checkpoint": "returned by load",
    "CompactionReport": "returned by compact",
    "Evaluation": "returned by Trainer.evaluate",
    "FileContents": "returned by describe",
    "FitResult": "returned by Trainer.fit",
    "DeepenReport": "returned by deepen",
    "FoldReport": "returned by fold_depth",
    "FoldedPair": "part of a FoldReport",
    "Interval": "part of Compactor.intervals",
    "LayerUpdate": "part of an Update",
    "LayerView": "a protocol: what a policy is handed",
    "MemoryPlan": "returned by plan",
    "SearchOutcome": "returned by search_embedding",
    "SearchReport": "returned by search",
    "SparsifyReport": "returned by sparsify_",
    "StepBytes": "returned by step_bytes",
    "SwappedLayer": "part of a SparsifyReport",
    "TrialRecord": "part of a SearchReport",
    "TrialResult": "returned by retrain",
    "UnitStatistics": "returned by UnitView.statistics",
    "UnitView": "what a criterion is handed",
    "Update": "returned by Sparsifier.step",
    "WidenReport": "returned by widen",
    "release_freed_memory": "changes how the whole process allocates",
}
MODULES = sorted(
    {"sparsenet"}
    | {
        module.name
        for module in pkgutil.walk_packages(sn.__path__, "sparsenet.")
        if not module.name.endswith(("__main__", "._C"))
    }
)
DOCUMENTED = ["sparsenet.compaction.criteria"]
FINDER = doctest.DocTestFinder()


def source_of(name: str) -> str:
    return Path(importlib.util.find_spec(name).origin).read_text()


def chapters() -> list[str]:
    """What a reader takes names from: the modules at the root of sparsenet, and every package."""
    return [name for name in MODULES if name.count(".") < 2 or hasattr(importlib.import_module(name), "__path__")]


def public_objects() -> dict[str, object]:
    """Public classes and functions, by one public name each."""
    found: dict[int, tuple[str, object]] = {}
    waiting = [importlib.import_module(name) for name in [*chapters(), *DOCUMENTED] if name != "sparsenet.cli"]
    seen = set()
    while waiting:
        module = waiting.pop(0)
        if module.__name__ in seen:
            continue
        seen.add(module.__name__)
        for name in getattr(module, "__all__", ()):
            member = getattr(module, name)
            if isinstance(member, types.ModuleType):
                waiting.append(member)
            elif inspect.isclass(member) or inspect.isroutine(member):
                found.setdefault(id(member), (f"{module.__name__}.{name}", member))
    return {name: member for name, member in found.values()}


PUBLIC = public_objects()


def needs_example(member: object) -> bool:
    is_exception = inspect.isclass(member) and issubclass(member, Exception)
    return not is_exception and member.__name__ not in WITHOUT_EXAMPLE


def number_of_examples(member: object) -> int:
    """Those of a class or function and, for a class, of its methods."""
    return sum(len(test.examples) for test in FINDER.find(member, member.__name__, globs={}))


def run_examples(module: types.ModuleType) -> tuple[int, str]:
    """Runs the examples that ``module`` defines: how many, and what those that failed printed."""
    runner = doctest.DocTestRunner()
    printed: list[str] = []
    attempted = sum(runner.run(test, out=printed.append).attempted for test in FINDER.find(module))
    return attempted, "".join(printed)


@pytest.mark.parametrize("name", [name for name in MODULES if ">>> " in source_of(name)])
def test_examples_run(name, tmp_path, monkeypatch, run_child):
    monkeypatch.chdir(tmp_path)
    if name == "sparsenet.memory.budget":  # what other tests have left in memory would count
        code = f"import doctest, importlib\nprint(doctest.testmod(importlib.import_module({name!r})).attempted)"
        *printed, attempted = run_child(code).stdout.splitlines()
        printed, attempted = "\n".join(printed), int(attempted)
    else:
        torch.manual_seed(0)
        attempted, printed = run_examples(importlib.import_module(name))
    assert not printed, printed
    assert attempted == len(re.findall(r"^ *>>> ", source_of(name), re.MULTILINE)), "an example is not found by doctest"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_name_has_an_example(name):
    member = PUBLIC[name]
    assert (member.__doc__ or "").strip(), f"{name} has no docstring"
    if needs_example(member):
        assert number_of_examples(member), f"{name} has no example in its docstring"
        assert member.__module__ in MODULES, f"{name} is defined in {member.__module__}, where no example is run"


def test_the_list_of_exceptions_names_what_is_there_and_has_no_example():
    members = {member.__name__: member for member in PUBLIC.values()}
    assert set(WITHOUT_EXAMPLE) <= set(members)
    assert [name for name in WITHOUT_EXAMPLE if number_of_examples(members[name])] == []


def test_public_names_are_found_in_packages_and_in_modules_they_hand_on():
    assert {"sparsenet.SparseLinear", "sparsenet.functional.compact_blocks", "sparsenet.data.split"} <= set(PUBLIC)
    assert {"sparsenet.reference.compact_blocks", "sparsenet.architecture.gates.clip_gates_"} <= set(PUBLIC)


def test_a_missing_and_a_wrong_example_are_noticed():
    """The check itself: a function without an example, and one whose example prints something else."""
    module = types.ModuleType("made_up")
    source = 'def plain():\n    """Nothing."""\n\ndef wrong():\n    """Adds.\n\n    >>> 1 + 1\n    3\n    """\n'
    exec(compile(source, "made_up.py", "exec"), vars(module))
    module.plain.__module__ = module.wrong.__module__ = "made_up"
    assert needs_example(module.plain) and number_of_examples(module.plain) == 0
    assert number_of_examples(module.wrong) == 1
    attempted, printed = run_examples(module)
    assert attempted == 1 and "Expected:\n    3" in printed
