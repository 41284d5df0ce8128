"""``diffusers-sde samplers``: every name, what it is and who calls it so.

Knows how the tables of names and of recipes are printed.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator

from diffusers_sde.names.catalogue import FLOW_MAPS, GUIDED, REFUSED, SAMPLERS, SCHEDULES, Entry

_LEGEND = """\
s = sigma/alpha, x stands for x/alpha, D = E[x_0|x], d = (x - D)/s, h = log(s/s_t) in the step from s to s_t, z is
standard normal; brackets say how earlier or inner evaluations enter.  num_inference_steps counts evaluations: of a
method with k a step, N steps are num_inference_steps = k (N - 1) + 1."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments: none."""


def run(args: argparse.Namespace) -> int:
    """The subcommand: print the tables; returns the exit status."""
    print("\n".join(listing()))
    return 0


def listing() -> Iterator[str]:
    """The lines of the tables."""
    from diffusers_sde.named_grids import GRIDS
    from diffusers_sde.published import RECIPES  # these bring torch

    yield 'Samplers: diffusers_sde.sampler("name schedule", pipe.scheduler.config)'
    yield _LEGEND
    for name, recipe in RECIPES.items():
        noise = "stochastic" if recipe.stochastic else "deterministic"
        each = "1 evaluation" if recipe.evaluations == 1 else f"{recipe.evaluations} evaluations"
        yield f"\n{name}: order {recipe.order}, {each} a step, {noise}"
        yield f"    {recipe.formula}"
        yield f"    {recipe.paper}"
        yield from _names(SAMPLERS[name])
    for name, entry in FLOW_MAPS.items():
        yield f"\n{name}: jumps of a distilled network, 1 evaluation a step, stochastic"
        yield f"    x = alpha_t D + sigma_t z, of which a share gamma = {entry.settings['gamma']:g} is drawn anew"
        yield from _names(entry)
    yield "\nSchedules"
    for name, entry in SCHEDULES.items():
        grid = GRIDS[entry.settings["grid"]]
        yield f"\n{name}: grid {entry.settings['grid']!r}"
        yield from _wrapped(_first_paragraph(grid.func if isinstance(grid, functools.partial) else grid))
        yield from _names(entry)
    yield "\nNot to be had"
    for name, reason in (REFUSED | {", ".join(GUIDED): next(iter(GUIDED.values()))}).items():
        yield from _wrapped(f"{name}: {reason}.")


def _names(entry: Entry) -> Iterator[str]:
    """Who calls it what, and the note."""
    called = "; ".join(f"{tool}: {', '.join(names)}" for tool, names in entry.tools.items())
    for text in (called, entry.note):
        yield from _wrapped(text)


def _first_paragraph(function: Callable[..., object]) -> str:
    """What a docstring says of a function, without its markup."""
    text = (inspect.getdoc(function) or "").split("\n\n")[0]
    return re.sub(r":\w+:|`", "", " ".join(text.split()))


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 116, initial_indent="    ", subsequent_indent="        ")
