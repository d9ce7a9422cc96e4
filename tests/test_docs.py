"""The documentation says what is so: its Python runs, its links lead somewhere, its tests and commands exist."""

import re
from pathlib import Path

import pytest

import sparsenet as sn

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text())], ids=name)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page run in order, in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    text, scope = page.read_text(), {"__name__": "page"}
    for found in BLOCK.finditer(text):
        line = text[: found.start()].count("\n") + 1
        exec(compile("\n" * line + found[1], str(page), "exec"), scope)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{name(page)} links to {target}"


def test_every_public_name_has_a_docstring():
    for public in sn.__all__:
        assert (getattr(sn, public).__doc__ or "").strip(), f"sparsenet.{public}"


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
    assert rows == set(range(1, 65)) - WITHOUT_A_GPU
