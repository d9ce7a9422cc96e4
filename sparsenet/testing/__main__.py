"""``python -m sparsenet.testing`` checks the operations; with ``--policies FILE`` the policies, into a table."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import torch

from sparsenet.functional import native_build_info
from sparsenet.testing import conformance_table, self_test
from sparsenet.testing.combinations import FACTORS, combinations

TEXT = """# Results: conformance of the policies

Written by `python -m sparsenet.testing --policies docs/results/conformance.md`.

{count} short trainings, in which every two values meet of: {factors}. Pairs that the library refuses are left out. A
number says in how many combinations a policy was checked and everything held; `mest+rigl` drops as the one and grows
as the other. The last columns say what was rewired: blocks, or elements under masks that keep half of a block or two of
four. A policy of your own is checked with `sparsenet.testing.check_policy`.

{table}"""


def main() -> None:
    """Checks what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m sparsenet.testing", description=__doc__)
    parser.add_argument("--policies", metavar="FILE", type=Path, help="check the policies and write the table there")
    file = parser.parse_args().policies
    if file is None:
        print(f"sparsenet self test: {self_test()} cases right with {native_build_info()['isa']}", file=sys.stdout)
        return
    logging.getLogger("sparsenet").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = combinations()
    factors = ", ".join(
        f"{len(values)} {name.replace('_', ' ')}s".replace("ys", "ies") for name, values in FACTORS.items()
    )
    table = conformance_table(rows, said=print)
    file.write_text(TEXT.format(count=len(rows), factors=factors, table=table), encoding="utf-8")


if __name__ == "__main__":
    main()
