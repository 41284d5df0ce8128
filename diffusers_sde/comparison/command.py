"""``diffusers-sde compare``: several samplers, the same noise, one model; pictures, errors and a table.

Knows the command's arguments and what is compared with what.  Knows no solver, no network, no plotting.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_sde.assets import DEFAULT_MODEL
from diffusers_sde.comparison.problems import Problem, load_pipeline, make_problem
from diffusers_sde.comparison.report import Comparison, Result, format_table, write
from diffusers_sde.errors import UsageError
from diffusers_sde.named_samplers import (
    DEFAULT_SAMPLERS,
    SAMPLERS,
    make_scheduler,
    process_kind,
    reference_scheduler,
)
from diffusers_sde.sampling import lay_out, sample
from diffusers_sde.schedulers import CalibratedScheduler


def rmse(images: torch.Tensor, reference: torch.Tensor) -> np.ndarray:
    """Root mean square difference of each image, (N,)."""
    return (images - reference).double().flatten(1).square().mean(1).sqrt().numpy()


def choose_samplers(names: Sequence[str] | None, problem: Problem) -> list[str]:
    """``names`` without repetitions; for None the default set of the model's process, as far as it fits the model."""
    if names:
        return list(dict.fromkeys(names))
    fitting = []
    for name in DEFAULT_SAMPLERS[process_kind(problem.config)]:
        with contextlib.suppress(UsageError):
            make_scheduler(name, problem.config)
            fitting.append(name)
    return fitting


def check_samplers(names: Sequence[str], steps: Sequence[int], problem: Problem) -> None:
    """Raise :class:`UsageError` for a sampler that cannot run on this model's process or with these numbers of
    evaluations: each makes a dry run without the network (a pipeline lays out its steps itself and cannot)."""
    for name in names:
        scheduler, n = make_scheduler(name, problem.config), steps[0]
        if not any(offered(name, n, problem) for n in steps):
            known = ", ".join(map(str, sorted(scheduler.errors)))
            raise UsageError(f"Sampler {name} was learned for {known} evaluations: add one of them to --steps.")
        try:
            for n in steps if problem.own_loop else ():
                lay_out(scheduler, SAMPLERS[name].steps(n))
                if not sample(lambda x, t: torch.zeros_like(x), scheduler, torch.ones(1, 1, 1, 1)).isfinite().all():
                    raise ValueError("its coefficients are not finite")
        except (ValueError, IndexError, ArithmeticError) as error:
            reason = f"Sampler {name} cannot run with {n} evaluations on this model's process: {error}"
            raise UsageError(f"{reason}; leave it out of --samplers or change --steps.") from error


def offered(name: str, n: int, problem: Problem) -> bool:
    """Whether a sampler is itself at ``n`` evaluations: a calibrated one elsewhere is the exact solver."""
    scheduler = make_scheduler(name, problem.config)
    return not isinstance(scheduler, CalibratedScheduler) or n in scheduler.errors


def compare(problem: Problem, names: Sequence[str], steps: Sequence[int], reference_steps: int = 100) -> Comparison:
    """Solve ``problem`` with every sampler at every number of evaluations, and with the reference."""
    jobs = [(name, n) for name in names for n in steps if offered(name, n, problem)]
    total = sum(SAMPLERS[name].evaluations(n) for name, n in jobs)
    with tqdm(total=total + reference_steps + reference_steps // 2, unit="eval", leave=False) as bar:

        def solve(label: str, scheduler: Any, n: int) -> tuple[torch.Tensor, float]:
            bar.set_description(f"{label}, {n}")
            start = time.perf_counter()
            images = problem.solve(scheduler, n, bar.update)
            return images, time.perf_counter() - start

        reference, coarse = (
            solve("reference", reference_scheduler(problem.config), n)[0]
            for n in (reference_steps, reference_steps // 2)
        )
        results = []
        for name, n in jobs:
            sampler, scheduler = SAMPLERS[name], make_scheduler(name, problem.config)
            images, seconds = solve(name, scheduler, sampler.steps(n))
            errors = None if sampler.stochastic else rmse(images, reference)
            results.append(Result(name, n, len(scheduler.timesteps), seconds, images, errors))
    return Comparison(results, reference, reference_steps, float(rmse(coarse, reference).mean()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="Embedded model, folder or hub id of a pipeline.")
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
    parser.add_argument("--prompt", default=None, help="Prompt of a text-to-image pipeline.")
    parser.add_argument("--output_dir", default="compare", help="Gets grid.png, error.png, results.csv.")
    parser.add_argument(
        "--reference_steps",
        type=int,
        default=None,
        help="Evaluations of the reference solution. Default: 100, or twice the largest of --steps.",
    )
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="Device of the model.",
    )


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
        kind = "cannot be written to" if existing.is_dir() else "is a file"
        raise UsageError(f"--output_dir {args.output_dir}: {existing} {kind}, pass another folder.")


def run(args: argparse.Namespace) -> int:
    """The subcommand: check, sample, write, print; returns the exit status."""
    try:
        check_arguments(args)
        if args.model == str(DEFAULT_MODEL) and not DEFAULT_MODEL.exists():
            raise UsageError(
                f"The embedded model is missing from {DEFAULT_MODEL}: reinstall the package or pass --model."
            )
        pipe = load_pipeline(args.model).to(args.device)
        problem = make_problem(
            pipe, num_images=args.num_images, seed=args.seed, guidance_scale=args.guidance_scale, prompt=args.prompt
        )
        names, steps = choose_samplers(args.samplers, problem), sorted(set(args.steps))
        if args.samplers is None:
            names = [name for name in names if any(offered(name, n, problem) for n in steps)]
        check_samplers(names, steps, problem)
        reference_steps = args.reference_steps or max(100, 2 * steps[-1])
        comparison = compare(problem, names, steps, reference_steps)
        write(comparison, Path(args.output_dir))
    except UsageError as error:
        print(f"diffusers-sde compare: {error}", file=sys.stderr)
        return 2
    print(format_table(comparison))
    return 0
