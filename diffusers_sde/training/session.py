"""A training under way: everything that its loop and what it saves share.

Knows how Accelerate wraps network and optimizer and what a checkpoint holds.  Knows no losses.
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

from diffusers_sde.training.checkpoints import prune, publish
from diffusers_sde.training.data import TrainingData, batches, cache_latents
from diffusers_sde.training.ema import PowerEMA
from diffusers_sde.training.networks import Task
from diffusers_sde.training.parts import place
from diffusers_sde.training.plan import Length
from diffusers_sde.training.settings import Settings


@dataclass
class Progress:
    """Optimizer steps made; a checkpoint object of Accelerate."""

    step: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


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

    def averaged(self) -> Any:
        """The weights to validate and to save, in place."""
        return nullcontext() if self.ema is None else self.ema.applied()

    def save_checkpoint(self) -> None:
        """A complete checkpoint of this step, then fewer old ones."""
        main = self.accelerator.is_main_process
        publish(
            self.output / f"checkpoint-{self.progress.step}",
            lambda folder: self.accelerator.save_state(str(folder), safe_serialization=True),
            main=main,
            wait=self.accelerator.wait_for_everyone,
        )
        if main:
            prune(self.output, self.settings.checkpoints_total_limit)


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
    """
    output = Path(settings.output_dir)
    output.mkdir(parents=True, exist_ok=True)
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
    # by optimizer steps, whatever the accumulation and the number of processes: not prepared by Accelerate
    schedule = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=length.steps,
    )
    network, optimizer = accelerator.prepare(task.trained, optimizer)
    progress = Progress()
    ema = PowerEMA(network.parameters(), settings.ema_sigma_rel) if settings.use_ema else None
    accelerator.register_for_checkpointing(schedule, progress, *([ema] if ema else []))
    if resumed is not None:
        accelerator.load_state(str(resumed))
        if accelerator.is_main_process:
            print(f"Resumed from {resumed.name}.", flush=True)
    if images.damage is not None:
        images.damage.name_in(
            output / settings.logging_dir / "unreadable_images.txt", begin=accelerator.is_main_process
        )
    session = Session(
        settings,
        accelerator,
        task,
        network,
        optimizer,
        schedule,
        ema,
        progress,
        length,
        classes,
        output,
        images if held_out is None else held_out,
    )
    stream = batches(
        images,
        batch_size=settings.train_batch_size,
        seed=settings.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        first_batch=progress.step * length.accumulate,
        num_workers=settings.dataloader_num_workers,
    )
    return session, stream
