"""The documentation says what is so: its Python runs, its links lead somewhere, its tests and commands exist."""

import importlib
import inspect
import re
from functools import reduce
from pathlib import Path

import pytest
from test_doctests import MODULES, source_of

from sparsenet import cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=name)
def test_code_blocks_run(page, tmp_path, monkeypatch, run_child):
    """The blocks of a page run in order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    text, scope = page.read_text(), {"__name__": "page"}
    if "measure_peak" in text:  # what other tests have left in memory would count
        run_child("\n".join(BLOCK.findall(text)))
        return
    for found in BLOCK.finditer(text):
        line = text[: found.start()].count("\n") + 1
        exec(compile("\n" * line + found[1], str(page), "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "methods").glob("*.md")), ids=name)
def test_a_method_is_explained_on_two_screens_and_its_tables_stand_apart(page):
    assert len(page.read_text().splitlines()) <= 140, "long tables and discussions belong to docs/results"
    assert f"(../results/{page.name})" in page.read_text() and (ROOT / "docs" / "results" / page.name).is_file()


# --- names that pages and docstrings use ---


def exists(dotted: str, start: object = None) -> bool:
    """Whether ``a.b.c`` is a module, or an attribute of one; looked up in ``start`` first."""
    parts = dotted.split(".")
    if start is not None and reduce(lambda found, part: getattr(found, part, None), parts, start) is not None:
        return True
    for i in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:i]))
        except ImportError:
            continue
        return reduce(lambda found, part: getattr(found, part, None), parts[i:], module) is not None
    return False


def plain_text(page: Path) -> str:
    """A page without the first column of the changelog's table, which says what used to be."""
    text = page.read_text()
    return re.sub(r"^\| `[^|]*\|", "|", text, flags=re.MULTILINE) if page.name == "changelog.md" else text


WRITTEN_PAGES = [page for page in PAGES if page.name != "cuda_variants.md"]  # a program writes that one


@pytest.mark.parametrize("page", WRITTEN_PAGES, ids=name)
def test_files_that_a_page_names_exist(page):
    files = [str(file.relative_to(ROOT)) for top in ("sparsenet", "csrc", "tests", "bench", "docs", "examples")
             for file in (ROOT / top).rglob("*.*")]  # fmt: skip
    for found in re.findall(r"`([\w./]+\.(?:py|h|cpp|cuh|cu|md))(?:::\w+)?`", plain_text(page)):
        if not found.startswith(("OUT/", "_")):  # what a command writes, and endings of names
            assert any(f"/{file}".endswith(f"/{found}") for file in files), f"{name(page)} names {found}"


@pytest.mark.parametrize("page", WRITTEN_PAGES, ids=name)
def test_names_of_sparsenet_that_a_page_uses_exist(page):
    for found in re.findall(r"`(?:sn|sparsenet)\.([A-Za-z_][\w.]*\w)", plain_text(page)):
        if found.rsplit(".", 1)[-1] not in ("py", "md"):
            assert exists(f"sparsenet.{found}"), f"{name(page)} names sparsenet.{found}"


def test_commands_that_pages_name_exist(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    known = set(re.findall(r"^    (\w+)\b", capsys.readouterr().out, re.MULTILINE))
    assert {"train", "plan", "doctor"} <= known
    for page in WRITTEN_PAGES:
        for found in re.findall(r"(?:^    |`)sparsenet ([a-z]+)\b", page.read_text(), re.MULTILINE):
            assert found in known, f"{name(page)}: sparsenet {found}"


@pytest.mark.parametrize("module", MODULES)
def test_references_in_docstrings_lead_somewhere(module):
    for found in re.findall(r":(?:func|class|mod|meth):`~?([\w.]+)`", source_of(module)):
        loaded = importlib.import_module(module)
        classes = [member for member in vars(loaded).values() if inspect.isclass(member)]
        assert exists(found, loaded) or any(hasattr(member, found) for member in classes), f"{module}: {found}"


# --- the page of robustness ---

WITHOUT_A_GPU = {42, 61}  # rows that need one


def test_every_row_of_the_robustness_page_names_a_test_that_exists():
    tests, rows = ROOT / "tests", set()
    for line in (ROOT / "docs" / "robustness.md").read_text().splitlines():
        found = re.match(r"\| (\d*)(?:–(\d+))? \|.*\| `([\w/]+\.py)::(\w+)` \|$", line)
        if found is None:
            assert not line.startswith("| ") or line.startswith("| |"), f"no test in: {line}"
            continue
        first, last, file, function = found.groups()
        assert re.search(rf"^def {function}\(", (tests / file).read_text(), re.MULTILINE), f"{file} has no {function}"
        if first:
            rows.update(range(int(first), int(last or first) + 1))
    assert rows == set(range(1, 86)) - WITHOUT_A_GPU
