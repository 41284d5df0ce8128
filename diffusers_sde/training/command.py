"""The training script: one way through training from scratch, fine-tuning, LoRA and distillation.

Knows the order of things: settings, plan, session, loop, results.  Accelerate is the distributed engine (processes,
sharding, mixed precision, gradient accumulation, saved states).  Everything random is a function of (seed, position of
the sample), so that a run killed and resumed is, bit for bit on a CPU, the uninterrupted one.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from diffusers_sde.errors import UsageError
from diffusers_sde.training.arguments import read_settings
from diffusers_sde.training.checkpoints import find_checkpoint
from diffusers_sde.training.loop import NotFinite, run_steps
from diffusers_sde.training.losses import make_loss
from diffusers_sde.training.parts import place
from diffusers_sde.training.plan import build_task, build_teacher, describe, training_length
from diffusers_sde.training.results import finish
from diffusers_sde.training.samples import hold_out
from diffusers_sde.training.session import prepare
from diffusers_sde.training.settings import Settings


def main(argv: Sequence[str] | None = None) -> int:
    """Read the settings from the command line (None: of this process) and :func:`run`; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    return run(read_settings(words), words)


def run(settings: Settings, words: Sequence[str]) -> int:
    """Train; returns the exit status: 0, 1 for a loss that is not finite, 2 for what cannot be done, 143 after a
    checkpoint on SIGTERM.

    Args:
        settings: what to do.
        words: the command line that says so; the model card shows it without the token of the Hub.
    """
    secret = (settings.hub_token, f"--hub_token={settings.hub_token}")
    try:
        return train(settings, shlex.join("..." if word in secret else word for word in words))
    except NotFinite as error:
        print(f"diffusers_sde.train: {error}", file=sys.stderr)
        return 1
    except (UsageError, ValueError, FileNotFoundError) as error:
        print(f"diffusers_sde.train: {error}", file=sys.stderr)
        return 2


def train(settings: Settings, command: str) -> int:
    """Start Accelerate, train, and part in an orderly way; returns the exit status."""
    output = Path(settings.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        mixed_precision=settings.mixed_precision,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / settings.logging_dir)),
    )
    status = work(settings, command, accelerator)
    # every process: no one leaves while another still writes, and DDP's reducer goes before its process group, which
    # its destructor would otherwise wait for
    accelerator.wait_for_everyone()
    accelerator.free_memory()
    accelerator.end_training()
    return status


def work(settings: Settings, command: str, accelerator: Accelerator) -> int:
    """Length, session, loop, results; returns the exit status."""
    output = Path(settings.output_dir)
    resumed = find_checkpoint(output, settings.resume_from_checkpoint) if settings.resume_from_checkpoint else None
    task, images, classes = build_task(settings)
    held_out = None
    if settings.num_held_out_images:
        images, held_out = hold_out(images, settings.num_held_out_images)
    length = training_length(settings, images, accelerator.num_processes)
    if accelerator.is_main_process:
        print(describe(settings, task, images, classes, length, accelerator.num_processes), flush=True)
    if settings.dry_run:
        return 0
    teacher = build_teacher(settings, task, classes, images.captions)
    if teacher is not None:
        place(teacher, accelerator.device)
        teacher.network.to(accelerator.device)
    session, stream = prepare(settings, accelerator, task, images, classes, length, resumed, held_out)
    loss_of = make_loss(settings, task, teacher, length.global_batch)
    status = run_steps(session, stream, loss_of)
    if status == 0 and session.progress.step >= length.steps:
        finish(session, command)
    return status
