"""How the command lines of this package say what is wrong and what the defaults are.  Knows argparse and no command."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes flags only in full and whose errors are one line, without the usage.

    A flag that does not exist is told first, by its name alone (what was given to it may be a secret), with the nearest
    one that does.
    """

    def __init__(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **keywords})

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse; a word that belongs to no flag is not repeated either."""
        words = list(sys.argv[1:] if args is None else args)
        namespace, stray = self.parse_known_args(words, namespace)
        if stray:
            before = [word.partition("=")[0] for word in words[: words.index(stray[0])] if word.startswith("--")]
            where = f"after {before[-1]}" if before else "at the beginning"
            self.error(f"a word {where} belongs to no flag: put what has spaces into quotes, or leave it out.")
        return namespace

    def parse_known_args(  # type: ignore[override]
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        """As argparse, after a look at the flags; what follows a subcommand is left to the subcommand's own parser."""
        known = self._option_string_actions
        nested = any(isinstance(action, argparse._SubParsersAction) for action in self._actions)
        words = list(sys.argv[1:] if args is None else args)
        for word in [] if nested else words:
            flag = word.partition("=")[0]
            if word == "--":
                break
            if re.match("--?[A-Za-z]", flag) and " " not in flag and flag not in known:
                near = difflib.get_close_matches(flag, known, n=1)
                self.error(
                    f"there is no {flag}: {f'did you mean {near[0]}?' if near else '--help lists what there is.'}"
                )
        return super().parse_known_args(words, namespace)


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but None, which the help text itself explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)
