"""The training script: one way through training from scratch, fine-tuning, LoRA and distillation.

Knows the order of things: settings, plan, session, loop, results.  Accelerate is the distributed engine (processes,
sharding, mixed precision, gradient accumulation, saved states).  Everything random is a function of (seed, position of
the sample), so that a run killed and resumed is, bit for bit on a CPU, the uninterrupted one.
"""

from __future__ import annotations

import errno
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from diffusers_sde.training.arguments import check, read_settings
from diffusers_sde.training.checkpoints import clean_up, find_candidates, first_whole
from diffusers_sde.training.experience import teach
from diffusers_sde.training.learner import Learner
from diffusers_sde.training.locking import alone
from diffusers_sde.training.loop import run_steps
from diffusers_sde.training.losses import make_loss
from diffusers_sde.training.parts import place
from diffusers_sde.training.plan import build_task, build_teacher, describe, training_length
from diffusers_sde.training.processes import on_main
from diffusers_sde.training.results import UploadFailed, check_repository, finish, validate
from diffusers_sde.training.rewards import find_rewards
from diffusers_sde.training.samples import hold_out
from diffusers_sde.training.session import prepare
from diffusers_sde.training.settings import Settings
from diffusers_sde.training.soundness import Diverged


def main(argv: Sequence[str] | None = None) -> int:
    """Read the settings from the command line (None: of this process) and :func:`run`; returns the exit status."""
    words = sys.argv[1:] if argv is None else argv
    return run(read_settings(words), words)


def run(settings: Settings, words: Sequence[str]) -> int:
    """Train; returns the exit status: 0, 1 for a training that has diverged, 2 for what cannot be done, 143 after a
    checkpoint on SIGTERM.

    Args:
        settings: what to do.
        words: the command line that says so; the model card shows it without secrets.
    """
    try:
        return train(settings, shlex.join(map(settings.redacted, words)))
    except (Diverged, UploadFailed, ValueError, OSError) as error:
        if int(os.environ.get("RANK", 0)) == 0:  # every process stops for the same reason
            print(f"diffusers_sde.train: {settings.redacted(describe_error(error))}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, Diverged) else 2


def describe_error(error: Exception) -> str:
    """One line, with what to do where the system does not say it."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"{error.strerror}: make room, then go on with --resume_from_checkpoint latest, or start anew."
    return " ".join(str(error).split())


def train(settings: Settings, command: str) -> int:
    """Start Accelerate, train, and part in an orderly way; returns the exit status."""
    output = Path(settings.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.gradient_accumulation_steps * settings.parts,
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
    output, resume_from = Path(settings.output_dir), settings.resume_from_checkpoint
    if resume_from:
        find_candidates(output, resume_from)  # before anything is loaded
    if settings.push_to_hub:
        check_repository(settings)
    rewards = find_rewards(settings.reward, settings.reward_weights) if settings.reward else []
    task, images, classes = build_task(settings)
    held_out = None
    if settings.num_held_out_images:
        images, held_out = hold_out(images, settings.num_held_out_images)
    length = training_length(settings, images, accelerator.num_processes)
    if accelerator.is_main_process:
        plan = describe(settings, task, images, classes, length, accelerator.num_processes)
        print(settings.redacted(plan), flush=True)
    if settings.dry_run:
        return 0
    teacher = build_teacher(settings, task, classes, images.captions)
    if teacher is not None:
        place(teacher, accelerator.device)
        teacher.network.to(accelerator.device)
    with alone(accelerator, output):
        resumed = on_main(accelerator, lambda: enter(settings, output))
        session, stream = prepare(settings, accelerator, task, images, classes, length, resumed, held_out)
        if settings.rewarded:
            assert teacher is not None
            learner = Learner(settings, task, teacher, accelerator.autocast)
            stream = teach(session, stream, learner, rewards)
            if session.progress.step == 0:
                validate(session, "step-000000")  # what it is to be compared with
        loss_of = make_loss(settings, task, teacher, length.global_batch)
        status = run_steps(session, stream, loss_of)
        if status == 0 and session.progress.step >= length.steps:
            finish(session, command)
    return status


def enter(settings: Settings, output: Path) -> Path | None:
    """Clear what killed trainings have left in the output folder, which is ours alone; the checkpoint to go on from."""
    clean_up(output)
    if not settings.resume_from_checkpoint:
        check(settings)  # once more, now that no other training can end in here
        return None
    checkpoint, damage = first_whole(find_candidates(output, settings.resume_from_checkpoint))
    for folder, problem in damage.items():
        print(f"Going on from {checkpoint.name}: {folder.name} is damaged ({problem}).", file=sys.stderr, flush=True)
    return checkpoint
