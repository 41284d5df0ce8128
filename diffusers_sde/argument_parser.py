"""How the command lines of this package say what is wrong and what the defaults are.  Knows argparse and no command."""

from __future__ import annotations

import argparse
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but None, which the help text itself explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)
