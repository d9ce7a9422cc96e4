"""The tables of ``sparsenet reproduce policies``."""

from __future__ import annotations

import statistics

from sparsenet.reproduce.parts import markdown, spread, times_table

__all__ = ["tables"]

Rows = list[dict]

_TITLES = {
    "policies": "Every policy, 5 % in blocks of 4",
    "sparser": "Every policy, 1 % in single weights",
    "elements": "Elements inside stored blocks",
    "candidates": "Growth by candidates and by all places, single weights",
}


def tables(numbers: dict[str, dict]) -> str:
    """Markdown of the parts that there are."""
    found = [_scores(title, numbers[part]["rows"]) for part, title in _TITLES.items() if part in numbers]
    if "cost" in numbers:
        found.append(_costs(numbers["cost"]["rows"]))
    return "\n\n".join([*found, times_table(numbers)])


def _scores(title: str, rows: Rows) -> str:
    """Accuracy of every arm, and its distance from the static pattern and from SET, paired by seed."""
    by_arm: dict[str, Rows] = {}
    for row in rows:
        by_arm.setdefault(row["arm"], []).append(row)
    bases = {name: by_arm[name] for name in ("static", "SET") if name in by_arm}
    lines = []
    for name, of_arm in by_arm.items():
        against = [_difference(of_arm, base) if of_arm is not base else "" for base in bases.values()]
        weights, blocks = (f"{statistics.fmean(r[key] for r in of_arm):,.0f}" for key in ("weights", "blocks"))
        lines.append([name, spread([r["score"] for r in of_arm]), *against, weights, blocks])
    header = ["arm", "test accuracy", *(f"over {name}" for name in bases), "weights", "blocks"]
    return f"### {title}\n\n" + markdown(header, lines)


def _difference(rows: Rows, base: Rows) -> str:
    of_seed = {row["seed"]: row["score"] for row in base}
    differences = [row["score"] - of_seed[row["seed"]] for row in rows if row["seed"] in of_seed]
    return f"{statistics.fmean(differences):+.2f}"


def _costs(rows: Rows) -> str:
    lines = []
    for row in rows:
        base = next(r for r in rows if r["network"] == row["network"] and r["policy"] == "SET")
        share = row["peak_bytes"] / base["peak_bytes"] - 1
        times = f"{row['step_ms']:.0f}", f"{row['rewiring_ms']:.0f}", f"{row['ratio']:.2f}"
        lines.append([row["network"], row["policy"], *times, f"{row['peak_bytes'] / 2**20:.1f}", f"{share:+.1%}"])
    header = ["network", "policy", "step (ms)", "rewiring step (ms)", "ratio", "peak (MiB)", "peak over SET"]
    return "### What a rewire costs\n\n" + markdown(header, lines)
