"""The table of conformance: which policies were checked in how many combinations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from sparsenet.testing.combinations import FACTORS, check_combination, combinations
from sparsenet.testing.conformance import PROPERTIES, ConformanceReport

__all__ = ["conformance_table"]

_COLUMNS = ("optimizer", "elements")
_NUMBERS = ("rewires", "dropped", "grown", "skipped")  # of a report


def conformance_table(
    rows: Sequence[Mapping[str, str]] | None = None, said: Callable[[str], None] = lambda line: None
) -> str:
    """Runs combinations and writes down how many held, in Markdown: a row per policy, a column per optimizer and mask.

    The last columns count rewires of single layers whose every property was checked, what left and what grew in them,
    and how many of them left the layer as it was.

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
    reports: dict[int, ConformanceReport] = {}
    for number, row in enumerate(rows):
        try:
            reports[number] = check_combination(row)
        except AssertionError as error:
            failed[number] = str(error)
        said(f"{number + 1} of {len(rows)}: {', '.join(row.values())}: {failed.get(number, 'holds')}")
    columns = [(factor, value) for factor in _COLUMNS for value in FACTORS[factor]]
    lines = [
        f"| policy | all | {' | '.join([*(value for _, value in columns), *_NUMBERS])} |",
        f"| --- | ---: | {' | '.join('---:' for _ in (*columns, *_NUMBERS))} |",
    ]
    for policy in (name for name in FACTORS["policy"] if any(row["policy"] == name for row in rows)):
        mine = [number for number, row in enumerate(rows) if row["policy"] == policy]
        cells = [_cell(mine, failed)]
        cells += [_cell([n for n in mine if rows[n][factor] == value], failed) for factor, value in columns]
        found = [reports[number] for number in mine if number in reports]
        cells += [str(sum(getattr(report, key) for report in found)) for key in _NUMBERS]
        lines.append(f"| `{policy}` | {' | '.join(cells)} |")
    reasons = sorted({reason for report in reports.values() for reason in report.reasons})
    skipped = ["", "Layers were skipped because:", "", *(f"- {reason}" for reason in reasons)] if reasons else []
    checked = ["", "Each combination was checked for:", "", *(f"- {name}: {what}" for name, what in PROPERTIES.items())]
    problems = [f"- {', '.join(rows[number].values())}: {what}" for number, what in failed.items()]
    wrong = ["", "What did not hold:", "", *problems] if problems else []
    return "\n".join([*lines, *skipped, *checked, *wrong]) + "\n"


def _cell(numbers: Sequence[int], failed: Mapping[int, str]) -> str:
    wrong = sum(number in failed for number in numbers)
    return f"✗ {wrong} of {len(numbers)}" if wrong else f"✓ {len(numbers)}" if numbers else ""
