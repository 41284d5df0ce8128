"""The command line: ``diffusers-sde compare``, ``bench``, ``calibrate``, ``prepare`` and ``samplers``.

Knows the names of the subcommands and the module that each one lives in, imported only when it is asked for; that
imports torch and diffusers only when it runs, so that help and wrong arguments are answered at once.  Knows nothing of
their arguments.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from diffusers_sde.argument_parser import Formatter, Parser

COMMANDS = {
    "compare": "Sample one model with several samplers from the same noise: picture grid, table, error plot.",
    "bench": "Measure this package's samplers against diffusers' own.",
    "calibrate": "Learn a 4-to-10-step sampler for one model, from forward passes only.",
    "prepare": "Make the image folders that the embedded models were trained on.",
    "samplers": "List every sampler and schedule that can be had by name.",
}
MODULES = {
    "compare": "diffusers_sde.comparison.command",
    "bench": "diffusers_sde.benchmarks.command",
    "calibrate": "diffusers_sde.calibration.command",
    "prepare": "diffusers_sde.training.prepare_command",
    "samplers": "diffusers_sde.names.command",
}


def module_of(command: str) -> ModuleType:
    """The module of a subcommand, imported now: its ``add_arguments(parser)`` declares, its ``run(args)`` does."""
    return importlib.import_module(MODULES[command])


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser with the arguments of ``command`` only, so that no other subcommand is imported."""
    parser = Parser(prog="diffusers-sde", description="Diffusion samplers from the unified SDE/ODE view.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="{" + ",".join(COMMANDS) + "}")
    for name, text in COMMANDS.items():
        sub = subparsers.add_parser(name, help=text, description=text, formatter_class=Formatter)
        if name == command:
            module_of(name).add_arguments(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns its exit status, 2 for wrong arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((a for a in arguments if a in COMMANDS), None)
    try:
        args = build_parser(command).parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return int(module_of(args.command).run(args))


if __name__ == "__main__":
    sys.exit(main())
