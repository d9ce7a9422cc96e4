"""The command line: ``sparsenet train|plan|bench|search|reproduce|compact|inspect|doctor``.

Every command is a module of :mod:`sparsenet.commands`, which is loaded only when that command is called. A mistake of
the user is one line on the standard error and exit status 2; an interrupted training, which can be resumed, is exit
status 130.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

import sparsenet
from sparsenet.commands.parser import CommandParser

__all__ = ["COMMANDS", "main"]

COMMANDS = {  # module of sparsenet.commands: its line in the list of commands
    "train": "train a sparse network on real data inside a memory budget",
    "plan": "predict the memory of a training run; pick the density that fits",
    "bench": "time the block-sparse operations against dense ones and rivals",
    "compact": "remove dead or unimportant units from a saved network",
    "inspect": "show what a checkpoint holds",
    "doctor": "show what this machine and this build offer",
    "search": "search architectures: densities, or networks in an embedding",
    "reproduce": "repeat published experiments and compare with their numbers",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"sparsenet: {message}", file=sys.stderr)
            return options.command(options)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("SPARSENET_TRACEBACK"):
            raise
        print(f"sparsenet: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sparsenet: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="sparsenet", description="Sparse training for PyTorch inside a memory budget.")
    parser.add_argument("--version", action="version", version=f"sparsenet {sparsenet.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=CommandParser)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, module=f"sparsenet.commands.{name}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
