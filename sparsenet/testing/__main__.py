"""``python -m sparsenet.testing`` checks the operations; with ``--policies FILE`` the policies, into a table."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from sparsenet.functional import native_build_info
from sparsenet.testing import conformance_table, self_test
from sparsenet.testing.combinations import FACTORS, combinations

TEXT = """# Results: conformance of the policies

Written by `python -m sparsenet.testing --policies docs/results/conformance.md`.

In {count} combinations every two values of these factors meet, unless the library refuses the pair:

{factors}

Each combination is seven trainings of a few steps. A number says in how many combinations a policy was checked and
everything held. `mest+rigl` drops as the one and grows as the other. The columns `blocks`, `half` and `2:4` say what
was rewired: blocks, or elements under masks that keep half of a block or two of four. The last ones count rewires of
single layers, the blocks or elements that left and that came, and the rewires that left their layer as it was. You can
check a policy of your own with `sparsenet.testing.check_policy`.

{table}"""


def main() -> None:
    """Checks what the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m sparsenet.testing", description=__doc__)
    parser.add_argument("--policies", metavar="FILE", type=Path, help="check the policies and write the table there")
    file = parser.parse_args().policies
    if file is None:
        print(f"sparsenet self test: {self_test()} cases right with {native_build_info()['isa']}", file=sys.stdout)
        return
    torch.set_num_threads(1)
    rows = combinations()
    factors = "\n".join(f"- {name.replace('_', ' ')}: {', '.join(values)}" for name, values in FACTORS.items())
    table = conformance_table(rows, said=print)
    file.write_text(TEXT.format(count=len(rows), factors=factors, table=table), encoding="utf-8")


if __name__ == "__main__":
    main()
