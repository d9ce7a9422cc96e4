"""The command line: ``sparsenet train|plan|bench|search|reproduce|compact|inspect|doctor``.

Every command is a module of :mod:`sparsenet.commands`, which is loaded only when that command is called. A mistake of
the user, a training that diverges and memory that cannot be had are one line on the standard error and exit status 2;
an interrupted training, which can be resumed, is exit status 130.
"""

from __future__ import annotations

import argparse
import os
import re
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

_OURS = re.compile(r"(sparsenet|Trainer|train|Sparsifier|bench|search|compact): ")  # RuntimeErrors that are sentences
_NO_MEMORY = re.compile(
    r"can't allocate memory|CUDA out of memory|annot allocate memory|failed to map segment|can't start new thread"
)
_WANTED = re.compile(r"tried to allocate (\d+) bytes")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    try:
        options = _parser().parse_args(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: print(f"sparsenet: {message}", file=sys.stderr)
            return options.command(options)
    except KeyboardInterrupt:
        print("sparsenet: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        told = _told(error)
        if told is None or os.environ.get("SPARSENET_TRACEBACK"):
            raise
        print(f"sparsenet: error: {told}", file=sys.stderr)
        return 2


def _told(error: Exception) -> str | None:
    """The line for an error that the user can do something about; None for one of the program, which wants a traceback.

    torch has no type of its own for memory that the CPU's allocator refuses, nor has the loader of libraries.
    """
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or (isinstance(error, (RuntimeError, ImportError)) and _NO_MEMORY.search(text)):
        wanted = _WANTED.search(text)
        what = f"{int(wanted[1]) / 2**20:,.0f} MiB could not be had" if wanted else text or "an allocation was refused"
        return f"out of memory: {what}; a smaller network, batch or data set needs less"
    if isinstance(error, (ValueError, TypeError, OSError, ModuleNotFoundError)):
        return text or type(error).__name__
    return text if isinstance(error, RuntimeError) and _OURS.match(text) else None


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="sparsenet", description="Sparse training for PyTorch inside a memory budget.")
    parser.add_argument("--version", action="version", version=f"sparsenet {sparsenet.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command", parser_class=CommandParser)
    for name, text in COMMANDS.items():
        commands.add_parser(name, help=text, module=f"sparsenet.commands.{name}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
