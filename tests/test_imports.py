"""No import of the library runs up, none in a circle; see docs/design.md for the layers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import sparsenet

PACKAGE = Path(sparsenet.__file__).resolve().parent
MOST_FILES_AT_THE_ROOT = 16

TIERS = (  # from top to bottom: a file may import its own tier and those below
    ("__init__", "__main__", "cli", "commands"),
    ("reproduce", "benchmark"),
    ("training", "compaction", "architecture", "integrations", "testing"),
    ("memory", "checkpoint", "sparsifier"),
    ("policies", "saliency", "models", "swapping", "distributed", "optimizer_state"),
    ("layers",),
    ("topology", "after_step", "elements"),
    ("pattern",),
    ("functional",),
    ("_C",),
)
GROUND_FLOOR = ("schedules", "densities", "files", "limits", "data", "reference", "plotting")  # stands on itself
TIER = {name: number for number, names in enumerate((*TIERS, GROUND_FLOOR)) for name in names}


def modules_of(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module; a package is its ``__init__.py``."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = (package.name, *file.relative_to(package).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports_of(module: str, file: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of this package that ``file`` imports anywhere: for type checkers and inside functions as well.

    ``from a import b`` is an arrow to ``a.b`` where that is a module, otherwise to ``a``.
    """
    root, names = module.split(".")[0], set()
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                inside = f"{base}.{alias.name}"
                names.add(inside if inside in modules or inside == f"{root}._C" else base)
    return {name for name in names if name == root or name.startswith(root + ".")} - {module}


def arrows_of(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports."""
    modules = modules_of(package)
    return {name: imports_of(name, file, modules) for name, file in modules.items()}


def tier_of(module: str) -> int:
    """Number of the tier, the top being 0; the package itself, which hands the public names on, is at the top."""
    part = module.split(".")[1] if "." in module else "__init__"
    if part not in TIER:
        raise KeyError(f"{module} has no place in the tiers: add {part} to TIERS in tests/test_imports.py")
    return TIER[part]


def upward(arrows: dict[str, set[str]]) -> list[str]:
    """Every import of a module of a higher tier, as ``importer -> imported``."""
    return [f"{a} -> {b}" for a, found in sorted(arrows.items()) for b in sorted(found) if tier_of(b) < tier_of(a)]


def circles(arrows: dict[str, set[str]]) -> list[str]:
    """Chains of imports that come back to where they began; told from its first file by name."""
    found, done = [], set()

    def visit(module: str, chain: list[str]) -> None:
        if module in chain:
            circle = chain[chain.index(module) :]
            first = circle.index(min(circle))
            found.append(" -> ".join([*circle[first:], *circle[:first], circle[first]]))
        elif module not in done:
            for imported in sorted(arrows.get(module, ())):
                visit(imported, [*chain, module])
            done.add(module)

    for module in sorted(arrows):
        visit(module, [])
    return found


def test_no_import_runs_up():
    assert upward(arrows_of(PACKAGE)) == []


def test_no_import_runs_in_a_circle():
    assert circles(arrows_of(PACKAGE)) == []


def test_every_tier_is_read():
    """An arrow that is known to be there, for the file, the package and the native module: the reader sees them."""
    arrows = arrows_of(PACKAGE)
    assert len(arrows) > 100
    assert "sparsenet.pattern" in arrows["sparsenet.layers"]
    assert "sparsenet._C" in arrows["sparsenet.functional.native"]
    assert "sparsenet.functional.native" in arrows["sparsenet.functional.autograd"]


def test_few_files_at_the_root():
    files = sorted(file.name for file in PACKAGE.glob("*.py"))
    assert len(files) <= MOST_FILES_AT_THE_ROOT, files


# --- the test of the test ---

CLEAN = {
    "__init__.py": "from tower.layers import Layer",
    "layers.py": "import torch\nfrom tower import pattern\nfrom tower.files import write",
    "pattern.py": "from tower._C import Pattern\nfrom tower.functional.ops import op",
    "files.py": "import os",
    "functional/__init__.py": "from tower.functional.ops import op",
    "functional/ops.py": "from .checks import check",
    "functional/checks.py": "",
}


def tower(folder: Path, **changes: str) -> dict[str, set[str]]:
    """Arrows of a made-up package; ``changes`` replaces files, ``__`` in a name being a folder."""
    files = CLEAN | {name.replace("__", "/") + ".py": text for name, text in changes.items()}
    for name, text in files.items():
        (folder / "tower" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "tower" / name).write_text(text)
    return arrows_of(folder / "tower")


def test_a_clean_tower_passes(tmp_path):
    arrows = tower(tmp_path)
    assert upward(arrows) == circles(arrows) == []
    assert arrows["tower.layers"] == {"tower.pattern", "tower.files"}
    assert arrows["tower.pattern"] == {"tower._C", "tower.functional.ops"}
    assert arrows["tower.functional.ops"] == {"tower.functional.checks"}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pattern": "from tower.layers import Layer"}, "tower.pattern -> tower.layers"),
        ({"pattern": "def late():\n    import tower.layers"}, "tower.pattern -> tower.layers"),
        ({"pattern": "if TYPE_CHECKING:\n    from .layers import Layer"}, "tower.pattern -> tower.layers"),
        ({"functional__checks": "from tower import pattern"}, "tower.functional.checks -> tower.pattern"),
        ({"functional__checks": "import tower"}, "tower.functional.checks -> tower"),
        ({"files": "from tower.functional import op"}, "tower.files -> tower.functional"),
        (
            {"memory__plan": "from tower.training import job", "training__job": ""},
            "tower.memory.plan -> tower.training.job",
        ),
    ],
)
def test_an_arrow_upward_is_reported(tmp_path, changes, expected):
    found = upward(tower(tmp_path, **changes))
    assert found == [expected]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"functional__checks": "from tower.functional.ops import op"},
            "tower.functional.checks -> tower.functional.ops -> tower.functional.checks",
        ),
        (
            {
                "memory____init__": "",
                "memory__a": "from .b import b",
                "memory__b": "def late():\n    from . import c",
                "memory__c": "from .a import a",
            },
            "tower.memory.a -> tower.memory.b -> tower.memory.c -> tower.memory.a",
        ),
        (
            {"functional__checks": "from tower.functional import op"},
            "tower.functional -> tower.functional.ops -> tower.functional.checks -> tower.functional",
        ),
    ],
)
def test_a_circle_is_reported_with_its_chain(tmp_path, changes, expected):
    found = circles(tower(tmp_path, **changes))
    assert found == [expected]


def test_a_file_without_a_tier_is_reported(tmp_path):
    with pytest.raises(KeyError, match=r"tower\.attic has no place in the tiers: add attic"):
        upward(tower(tmp_path, attic="from tower import files"))


def test_everything_can_be_imported_from_the_architecture_package():
    scope = {}
    exec("from sparsenet.architecture import *", scope)
    assert {"compactor", "embedding", "folding", "gates", "search"} <= set(scope)


def test_names_that_the_architecture_package_had_before():
    from sparsenet import architecture

    assert architecture.embedding_search.search_embedding is architecture.embedding.search_embedding
    assert architecture.search_space.SearchSpace is architecture.search.SearchSpace
    assert callable(architecture.estimators.spearman)
    with pytest.raises(AttributeError, match="'sparsenet.architecture' has no attribute 'attic'"):
        _ = architecture.attic
