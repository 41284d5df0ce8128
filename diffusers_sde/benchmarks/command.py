"""``diffusers-sde bench``: ratios against diffusers' schedulers, all measured side by side in one run.

Knows the sections and their arguments; the modules that measure are imported when the command runs, and torch and
diffusers with them.  Prints tables; asserts nothing.
"""

from __future__ import annotations

import argparse
import warnings

SECTIONS = (
    "speed",
    "memory",
    "oracle",
    "network",
    "sde",
    "robustness",
    "labels",
    "captions",
    "calibration",
    "parallel",
    "adaptive",
    "text",
    "defaults",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the subcommand's arguments."""
    choices = (*SECTIONS, "training", "errors", "lora", "rewards", "stochastic")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=choices,
        default=list(SECTIONS),
        help="What to measure; all of them take over an hour.",
    )
    parser.add_argument("--num_images", type=int, default=10, help="Images of the network section.")
    parser.add_argument(
        "--guidance_scale", type=float, nargs="+", default=None, help="Of the network and calibration sections."
    )
    parser.add_argument(
        "--training_images",
        default=None,
        help="Folder of a model's training images: of Fashion-MNIST for calibration and stochastic, of the emoji for "
        "those of captions and lora (left out without them).",
    )
    for name, text in {"training": "a training step", "errors": "the error budget of a sampler"}.items():
        only = {"dest": "sections", "action": "store_const", "const": [name]}
        parser.add_argument(f"--{name}", **only, help=f"Measure nothing but {text}.")  # type: ignore[arg-type]
    parser.add_argument(
        "--shipped", action="store_true", help="Calibration section: only the scheduler beside the embedded model."
    )
    parser.add_argument("--candidates", action="store_true", help="Also measure the settings the defaults beat.")
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """The subcommand: measure section by section; returns the exit status."""
    import diffusers

    warnings.filterwarnings("ignore")
    diffusers.logging.set_verbosity_error()
    for section in args.sections:
        _measure(section, args)
    return 0


def _measure(section: str, args: argparse.Namespace) -> None:
    from diffusers_sde.benchmarks import (
        adaptive,
        calibration,
        captions,
        defaults,
        deterministic,
        errors,
        labels,
        lora,
        parallel,
        rewards,
        robustness,
        steps,
        stochastic,
        text,
        training,
    )

    if section == "speed":
        steps.step_times()
    elif section == "memory":
        steps.step_memory()
    elif section == "oracle":
        deterministic.measure_oracles(args.seed, args.candidates)
    elif section == "network":
        deterministic.measure_network(args.seed, args.num_images, args.candidates, args.guidance_scale)
    elif section == "sde":
        stochastic.sde_quality(args.seed)
    elif section == "stochastic":
        stochastic.network_quality(args.seed, args.training_images)
    elif section == "robustness":
        robustness.measure(args.seed)
    elif section == "labels":
        labels.measure(args.seed)
    elif section == "captions":
        captions.measure(args.seed, args.training_images)
    elif section == "calibration":
        images = args.num_images if args.shipped else max(args.num_images, 20)
        calibration.measure(args.seed, images, args.guidance_scale, args.training_images, shipped=args.shipped)
    elif section == "text":
        text.measure(args.seed)
    elif section == "lora":
        lora.measure(args.seed, args.training_images)
    elif section == "rewards":
        rewards.measure(args.seed)
    elif section == "defaults":
        defaults.measure(candidates=args.candidates)
    elif section == "errors":
        errors.measure(args.seed)
    elif section == "parallel":
        parallel.measure(args.seed)
    elif section == "adaptive":
        adaptive.measure(args.seed)
    elif section == "training":
        training.measure()
