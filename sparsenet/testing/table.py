"""The table of conformance: which policies were checked in how many combinations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sparsenet.testing.combinations import FACTORS, check_combination, combinations
from sparsenet.testing.conformance import PROPERTIES

__all__ = ["conformance_table"]

_COLUMNS = ("optimizer", "elements")


def conformance_table(
    rows: Sequence[Mapping[str, str]] | None = None, said: Callable[[str], None] = lambda line: None
) -> str:
    """Runs combinations and writes down how many held, in Markdown: a row per policy, a column per optimizer and mask.

    Args:
        rows: of :func:`sparsenet.testing.combinations.combinations`; default: all, which takes minutes.
        said: is given a line for each one that is done.

    Returns:
        A table, the properties that every combination was checked for, and what failed, if anything.

    Example:
        >>> from sparsenet.testing import conformance_table
        >>> from sparsenet.testing.combinations import combinations
        >>> "✓ 1" in conformance_table([row for row in combinations() if row["policy"] == "static"][:1])
        True
    """
    rows = combinations() if rows is None else list(rows)
    failed: dict[int, str] = {}
    for number, row in enumerate(rows):
        try:
            check_combination(row)
        except AssertionError as error:
            failed[number] = str(error)
        said(f"{number + 1} of {len(rows)}: {', '.join(row.values())}: {failed.get(number, 'holds')}")
    columns = [(factor, value) for factor in _COLUMNS for value in FACTORS[factor]]
    lines = [
        f"| policy | all | {' | '.join(value for _, value in columns)} |",
        f"| --- | ---: | {' | '.join('---:' for _ in columns)} |",
    ]
    for policy in (name for name in FACTORS["policy"] if any(row["policy"] == name for row in rows)):
        mine = [number for number, row in enumerate(rows) if row["policy"] == policy]
        cells = [_cell(mine, failed)]
        cells += [_cell([n for n in mine if rows[n][factor] == value], failed) for factor, value in columns]
        lines.append(f"| `{policy}` | {' | '.join(cells)} |")
    checked = ["", "Each combination was checked for:", "", *(f"- {name}: {what}" for name, what in PROPERTIES.items())]
    problems = [f"- {', '.join(rows[number].values())}: {what}" for number, what in failed.items()]
    return "\n".join([*lines, *checked, *(["", "What did not hold:", "", *problems] if problems else [])]) + "\n"


def _cell(numbers: Sequence[int], failed: Mapping[int, str]) -> str:
    wrong = sum(number in failed for number in numbers)
    return f"✗ {wrong} of {len(numbers)}" if wrong else f"✓ {len(numbers)}" if numbers else ""
