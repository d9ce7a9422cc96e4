"""The argument parser of all commands: errors are one line, and a command's module is loaded when it is called."""

from __future__ import annotations

import argparse
from importlib import import_module

__all__ = ["CommandParser"]


class CommandParser(argparse.ArgumentParser):
    """Errors are one line; with ``module``, that module's flags are added when the parser first parses.

    Args:
        module: has ``add_arguments(parser)`` and ``run(options) -> int``. Until the command is called it is not
            imported, so that the list of all commands costs nothing.
    """

    def __init__(self, *arguments, module: str = "", **options):
        super().__init__(*arguments, **options)
        self._module = module

    def parse_known_args(self, args=None, namespace=None):
        """Loads the command, if that has not been done, and parses."""
        if self._module:
            command = import_module(self._module)
            self._module = ""
            command.add_arguments(self)
            if hasattr(command, "run"):
                self.set_defaults(command=command.run)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> None:
        """Exits with status 2 and one line."""
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")
