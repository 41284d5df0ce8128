"""``diffusers-sde calibrate``: learn tables for one model and write its scheduler.

Knows the command's arguments.  Knows nothing of how tables are learned.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from diffusers_sde.errors import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    parser.add_argument(
        "--model",
        default=None,
        help="Embedded model, folder or hub id of a pipeline. Default: emoji, which ships with the package.",
    )
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 5, 6, 8, 10], help="Numbers of evaluations.")
    parser.add_argument("--num_samples", type=int, default=64, help="Training samples, rounded up to whole batches.")
    parser.add_argument("--num_held_out", type=int, default=None, help="Held-out samples. Default: half of the others.")
    parser.add_argument("--batch_size", type=int, default=None, help="Samples in one evaluation. Default: 8.")
    parser.add_argument(
        "--guidance_scale", type=float, nargs="+", default=None, help="One or several. Default: the pipeline's own."
    )
    parser.add_argument("--prompt", nargs="+", default=None, help="Dealt out over the samples. Default: examples.")
    parser.add_argument(
        "--class_labels", type=number_or_name, nargs="+", default=None, help="Classes. Default: all, if it can."
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=None, help="Most evaluations of a training sample to refine by.")
    parser.add_argument("--no_refine", action="store_true", help="Fit only.")
    parser.add_argument("--stochastic", action="store_true", help="Grid and noise levels of the reverse SDE instead.")
    parser.add_argument("--work_dir", default=None, help="Keeps the teacher on disk; the same command resumes.")
    parser.add_argument("--output_dir", default="calibrated", help="Gets scheduler_config.json.")
    parser.add_argument("--compare_with_stock", action="store_true", help="Run diffusers' own samplers too.")
    parser.add_argument("--device", default=None, help="Device of the model. Default: cuda where there is one.")


def number_or_name(label: str) -> int | str:
    """A class as it is written on the command line."""
    return int(label) if label.isdecimal() else label


def run(args: argparse.Namespace) -> int:
    """The subcommand: calibrate, write, print; returns the exit status."""
    # here and not above: help and wrong arguments answer without them
    from diffusers_sde.assets import DEFAULT_MODEL, EXAMPLE_PROMPTS
    from diffusers_sde.calibration.arguments import check_whole, check_work_dir, checked_counts
    from diffusers_sde.calibration.run import calibrate
    from diffusers_sde.calibration.workers import is_main, leave_together
    from diffusers_sde.conditioning import takes_prompts
    from diffusers_sde.loading import default_device, load_pipeline

    inputs: dict[str, Any] = {}
    for name in ("guidance_scale", "prompt", "class_labels"):
        value = getattr(args, name)
        if value is not None:
            inputs[name] = value[0] if len(value) == 1 else value
    try:
        output = Path(args.output_dir).absolute()
        existing = next(p for p in (output, *output.parents) if p.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise UsageError(f"--output_dir {args.output_dir}: {existing} cannot be written to, pass another folder.")
        checked_counts(args.steps)
        check_whole(0, seed=args.seed, budget=args.budget)
        check_whole(1, num_samples=args.num_samples, num_held_out=args.num_held_out, batch_size=args.batch_size)
        check_work_dir(args.work_dir)
        pipe = load_pipeline(args.model or str(DEFAULT_MODEL)).to(args.device or default_device())
        if takes_prompts(pipe):
            inputs.setdefault("prompt", list(EXAMPLE_PROMPTS))
        scheduler = calibrate(
            pipe,
            num_inference_steps=args.steps,
            num_samples=args.num_samples,
            num_held_out=args.num_held_out,
            batch_size=args.batch_size,
            seed=args.seed,
            budget=args.budget,
            refine=not args.no_refine,
            stochastic=args.stochastic,
            compare_with_stock=args.compare_with_stock,
            work_dir=args.work_dir,
            **inputs,
        )
    except ValueError as error:
        print(f"diffusers-sde calibrate: {error}", file=sys.stderr)
        return 2
    if is_main():
        scheduler.save_pretrained(output)
        print(f"Written to {args.output_dir}; use it with CalibratedScheduler.from_pretrained({args.output_dir!r}).")
    leave_together()
    return 0
