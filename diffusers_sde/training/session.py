"""A training under way: everything that its loop and what it saves share.

Knows how Accelerate wraps network and optimizer, and when a checkpoint is kept.  Knows no losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler

from diffusers_sde.training.checkpoints import NotWritten, checkpoints, prune, publish, set_aside
from diffusers_sde.training.data import TrainingData, batches, cache_latents
from diffusers_sde.training.ema import PowerEMA
from diffusers_sde.training.networks import Task
from diffusers_sde.training.parts import place
from diffusers_sde.training.plan import Length
from diffusers_sde.training.processes import first_problem, on_main
from diffusers_sde.training.resuming import compare, made_with
from diffusers_sde.training.settings import Settings
from diffusers_sde.training.state import Progress, read_made_with, read_state, write_state


@dataclass
class Session:
    """Everything that the loop and what it saves share."""

    settings: Settings
    accelerator: Accelerator
    task: Task
    network: Any  # as Accelerate prepared it
    optimizer: Any
    lr_scheduler: Any
    ema: PowerEMA | None
    progress: Progress
    length: Length
    classes: int
    output: Path
    measured: TrainingData  # what an autoencoder's quality is measured on
    made_with: dict[str, Any]  # what a checkpoint says of the settings

    def averaged(self) -> Any:
        """The weights to validate and to save, in place."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def save_checkpoint(self) -> None:
        """A complete checkpoint of this step, then fewer old ones.

        Raises:
            NotWritten: with the checkpoint to go on from.
        """
        main = self.accelerator.is_main_process
        try:
            publish(
                self.output / f"checkpoint-{self.progress.step}",
                lambda folder: write_state(folder, self.accelerator, self.ema, self.progress, self.made_with),
                main=main,
                agree=first_problem,
            )
        except NotWritten as error:
            raise NotWritten(f"{error}: make room, then {self.last_good()}.") from error
        if main:
            prune(self.output, self.settings.checkpoints_total_limit)

    def last_good(self) -> str:
        """What to do after a failure, in words that name the checkpoint to go on from."""
        kept = checkpoints(self.output)
        if not kept:
            return "start anew (there is no checkpoint yet)"
        return f"go on with --resume_from_checkpoint latest (the last good checkpoint is {kept[-1]})"


def prepare(
    settings: Settings,
    accelerator: Accelerator,
    task: Task,
    images: TrainingData,
    classes: int,
    length: Length,
    resumed: Path | None,
    held_out: TrainingData | None = None,
) -> tuple[Session, Iterator[dict[str, Any]]]:
    """Optimizer, schedule and averages around the network, as they were at the checkpoint; the stream of batches.

    Args:
        images: what is trained on.
        resumed: the checkpoint to go on from, None to begin.
        held_out: what is never trained on.

    Raises:
        UsageError: for a checkpoint of another training.
    """
    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    asked = made_with(settings, task, images, length)
    changes = [] if resumed is None else compare(read_made_with(resumed), asked, resumed.name)
    place(task, accelerator.device)
    if settings.cache_latents:
        with accelerator.main_process_first():
            images = cache_latents(
                images,
                task.vae,
                directory=output / "latents",
                batch_size=settings.train_batch_size,
                device=accelerator.device,
                progress=accelerator.is_main_process,
            )
    task.trained.train()
    trainable = [p for p in task.trained.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
        fused=True,
    )
    asked_of_optimizer = dict(optimizer.defaults)
    network, prepared = accelerator.prepare(task.trained, optimizer)
    ema = PowerEMA(network.parameters(), settings.ema_sigma_rel) if settings.use_ema else None
    progress = Progress()
    if resumed is not None:
        progress = read_state(resumed, accelerator, ema)
        aside = on_main(accelerator, lambda: set_aside(output, progress.step))
        if accelerator.is_main_process:
            otherwise = f" with other settings: {', '.join(changes)}" if changes else ""
            print(f"Resumed from {resumed.name}{otherwise}.", flush=True)
            if aside:
                print(f"Set aside, for this training goes another way: {', '.join(p.name for p in aside)}.", flush=True)
    for group in optimizer.param_groups:  # those asked for now, not those of the checkpoint
        group.update(asked_of_optimizer, initial_lr=settings.learning_rate)
    # A function of the optimizer steps made, whatever the accumulation and the number of processes: not prepared by
    # Accelerate, and no part of a checkpoint.
    schedule = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=length.warm_up,
        num_training_steps=length.steps,
        last_epoch=progress.step - 1,
    )
    if images.damage is not None:
        images.damage.name_in(
            output / settings.logging_dir / "unreadable_images.txt", begin=accelerator.is_main_process
        )
    session = Session(
        settings,
        accelerator,
        task,
        network,
        prepared,
        schedule,
        ema,
        progress,
        length,
        classes,
        output,
        images if held_out is None else held_out,
        asked,
    )
    stream = batches(
        images,
        batch_size=settings.train_batch_size,
        seed=settings.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        first_batch=length.batches_before(progress.step),
        num_workers=settings.dataloader_num_workers,
    )
    return session, stream
