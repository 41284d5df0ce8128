"""``diffusers-sde compare``: several samplers, the same noise, one model; pictures, errors and a table.

Knows the command's arguments.  Imports neither torch nor diffusers before they are parsed and checked.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from diffusers_sde.errors import UsageError
from diffusers_sde.sampler_names import DEFAULT_SAMPLERS, SAMPLERS

if TYPE_CHECKING:
    from diffusers_sde.comparison.engine import Comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument(
        "--model",
        default=None,
        help="Embedded model, folder or hub id of a pipeline. Default: emoji, which ships with the package.",
    )
    parser.add_argument(
        "--samplers",
        nargs="*",
        default=None,
        help=f"Any of {', '.join(SAMPLERS)}. Default: those of "
        f"{', '.join(DEFAULT_SAMPLERS['variance preserving'])} or their like for the model's process.",
    )
    parser.add_argument("--steps", nargs="*", type=int, default=[5, 10, 20], help="Numbers of network evaluations.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the noise.")
    parser.add_argument("--num_images", type=int, default=8, help="Images per sampler; four are shown.")
    parser.add_argument(
        "--guidance_scale",
        type=float,
        default=None,
        help="Classifier-free guidance. Default: 2 for a class-conditional network, a pipeline's own default.",
    )
    parser.add_argument(
        "--prompt", nargs="+", default=None, help="Prompts of a text-to-image pipeline, dealt out. Default: examples."
    )
    parser.add_argument(
        "--differences", action="store_true", help="Below each image, where it differs from the reference."
    )
    parser.add_argument("--output_dir", default="compare", help="Gets grid.png, error.png, results.csv.")
    parser.add_argument(
        "--reference_steps",
        type=int,
        default=None,
        help="Evaluations of the reference solution. Default: 100, or twice the largest of --steps.",
    )
    parser.add_argument("--device", default=None, help="Device of the model. Default: cuda where there is one.")


def check_arguments(args: argparse.Namespace) -> None:
    """Raise :class:`UsageError` for what is wrong whatever the model is."""
    if args.samplers is not None and not args.samplers:
        raise UsageError(f"--samplers is empty: name any of {', '.join(SAMPLERS)}.")
    unknown = [name for name in args.samplers or () if name not in SAMPLERS]
    if unknown:
        raise UsageError(f"Sampler {unknown[0]!r} is unknown: use any of {', '.join(SAMPLERS)}.")
    if not args.steps:
        raise UsageError("--steps is empty: pass one or more numbers of evaluations, for example --steps 5 10 20.")
    if min(args.steps) < 1:
        raise UsageError(f"--steps must be at least 1, not {min(args.steps)}.")
    if args.num_images < 1:
        raise UsageError(f"--num_images must be at least 1, not {args.num_images}.")
    if args.reference_steps is not None and args.reference_steps < 2 * max(args.steps):
        raise UsageError(
            f"--reference_steps must be at least twice the largest of --steps, {2 * max(args.steps)} here, "
            f"not {args.reference_steps}."
        )
    output = Path(args.output_dir).absolute()
    existing = next(p for p in (output, *output.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        reason = "cannot be written to" if existing.is_dir() else "is a file"
        raise UsageError(f"--output_dir {args.output_dir}: {existing} {reason}, pass another folder.")


def run(args: argparse.Namespace) -> int:
    """The subcommand: check, sample, write, print; returns the exit status."""
    try:
        check_arguments(args)
        comparison = run_comparison(args)
        from diffusers_sde.comparison.report import format_table, write

        write(comparison, Path(args.output_dir), args.differences)
    except UsageError as error:
        print(f"diffusers-sde compare: {error}", file=sys.stderr)
        return 2
    print(format_table(comparison))
    return 0


def run_comparison(args: argparse.Namespace) -> Comparison:
    """The finished comparison that was asked for, with a progress bar on the way."""
    from tqdm.auto import tqdm

    from diffusers_sde.assets import DEFAULT_MODEL
    from diffusers_sde.comparison.engine import compare, default_samplers
    from diffusers_sde.comparison.problems import make_problem
    from diffusers_sde.loading import default_device, load_pipeline

    if args.model is None and not DEFAULT_MODEL.exists():
        raise UsageError(f"The embedded model is missing from {DEFAULT_MODEL}: reinstall the package or pass --model.")
    pipe = load_pipeline(args.model or str(DEFAULT_MODEL)).to(args.device or default_device())
    problem = make_problem(
        pipe, num_images=args.num_images, seed=args.seed, guidance_scale=args.guidance_scale, prompt=args.prompt
    )
    samplers = args.samplers or default_samplers(problem, args.steps)
    with tqdm(unit="eval", leave=False) as bar:
        for state in compare(problem, samplers, args.steps, reference_steps=args.reference_steps, tick=bar.update):
            bar.total = state.total
            bar.refresh()
    return state
