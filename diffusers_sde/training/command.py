"""The training script: one way through training from scratch, fine-tuning, LoRA and distillation.

Knows the order of things: arguments, plan, session, loop, results.  Accelerate is the distributed engine (processes,
sharding, mixed precision, gradient accumulation, saved states).  Everything random is a function of (seed, position of
the sample), so that a run killed and resumed is, bit for bit on a CPU, the uninterrupted one.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from diffusers_sde.errors import UsageError
from diffusers_sde.training.arguments import parse_args
from diffusers_sde.training.checkpoints import find_checkpoint
from diffusers_sde.training.loop import NotFinite, run_steps
from diffusers_sde.training.losses import make_loss
from diffusers_sde.training.networks import place
from diffusers_sde.training.plan import build_task, build_teacher, describe, make_plan
from diffusers_sde.training.results import finish
from diffusers_sde.training.session import prepare


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns its exit status: 0, 1 for a loss that is not finite, 2 for what cannot be done, 143 after
    a checkpoint on SIGTERM."""
    args = parse_args(argv)
    try:
        return train(args, shlex.join(sys.argv[1:] if argv is None else argv))
    except NotFinite as error:
        print(f"diffusers_sde.train: {error}", file=sys.stderr)
        return 1
    except (UsageError, ValueError, FileNotFoundError) as error:
        print(f"diffusers_sde.train: {error}", file=sys.stderr)
        return 2


def train(args: argparse.Namespace, command: str) -> int:
    """Start Accelerate, train, and part in an orderly way; returns the exit status."""
    output = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / args.logging_dir)),
    )
    status = work(args, command, accelerator)
    # every process: no one leaves while another still writes, and DDP's reducer goes before its process group, which
    # its destructor would otherwise wait for
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()
    return status


def work(args: argparse.Namespace, command: str, accelerator: Accelerator) -> int:
    """Plan, session, loop, results; returns the exit status."""
    output = Path(args.output_dir)
    resumed = find_checkpoint(output, args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    task, images, classes = build_task(args)
    plan = make_plan(args, images, accelerator.num_processes)
    if accelerator.is_main_process:
        print(describe(args, task, images, classes, plan, accelerator.num_processes), flush=True)
    if args.dry_run:
        return 0
    teacher = build_teacher(args, task, classes, images.captions)
    if teacher is not None:
        place(teacher, accelerator.device)
        teacher.network.to(accelerator.device)
    session, stream = prepare(args, accelerator, task, images, classes, plan, resumed)
    loss_of = make_loss(args, task, teacher, plan.global_batch)
    status = run_steps(session, stream, loss_of)
    if status == 0 and session.progress.step >= plan.steps:
        finish(session, command)
    return status
