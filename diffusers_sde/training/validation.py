"""Sample sheets during training: fixed noise, this package's schedulers, the images shared out over the processes.

Knows how to sample the network of a task.  Knows nothing of losses or checkpoints.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_sde.sampling import flow_map_denoiser, network_denoiser, sample, spread_labels
from diffusers_sde.schedulers import FlowMapScheduler, ProbabilityFlowScheduler
from diffusers_sde.training import autoencoders
from diffusers_sde.training.networks import Task
from diffusers_sde.training.randomness import generator_of
from diffusers_sde.training.samples import TrainingData
from diffusers_sde.training.settings import Settings

_VALIDATION = 3  # the stream of the sheets' noise


def sample_sheet(
    settings: Settings, task: Task, classes: int, accelerator: Any, measured: TrainingData
) -> Image.Image | None:
    """``num_validation_images`` images from the task's network as one sheet (on every process), None for 0 of them.

    Process r of W makes images r, r + W, ...; image i starts from the noise of (seed, i), so that sheets of one
    training and of any number of processes show the same samples.  Of an autoencoder: rows of ``measured`` images, each
    above its reconstructions.
    """
    n, world, rank = settings.num_validation_images, accelerator.num_processes, accelerator.process_index
    if not n or task.name == "classifier":
        return None
    if task.name == autoencoders.NAME:
        return contact_sheet(autoencoders.before_and_after(task, measured, n))
    mine = [min(i, n - 1) for i in range(rank, math.ceil(n / world) * world, world)]
    generators = [generator_of(settings.seed, i, _VALIDATION) for i in mine]
    training = task.trained.training
    task.trained.eval()
    try:
        with torch.no_grad(), accelerator.autocast():
            size = settings.train_batch_size  # what is known to fit into memory
            starts = range(0, len(mine), size)
            parts = ((mine[i : i + size], generators[i : i + size]) for i in starts)
            images = torch.cat([_sampled_images(settings, task, classes, *part) for part in parts])
    finally:
        task.trained.train(training)
    images = accelerator.gather(images.to(accelerator.device).contiguous())
    order = [i for r in range(world) for i in range(r, math.ceil(n / world) * world, world)]
    return contact_sheet(images[np.argsort(order)][:n].float().cpu())


def _sampled_images(
    settings: Settings, task: Task, classes: int, numbers: list[int], generators: list[torch.Generator]
) -> torch.Tensor:
    """Images (N, C, H, W) in [-1, 1]."""
    n, scale, steps = (
        settings.num_validation_images,
        settings.validation_guidance_scale,
        settings.validation_inference_steps,
    )
    pipe = task.pipe
    cls = FlowMapScheduler if isinstance(task.scheduler, FlowMapScheduler) else ProbabilityFlowScheduler
    scheduler = cls.from_config(task.scheduler.config)
    labels = [spread_labels(n, classes)[i] for i in numbers] if classes else None
    if task.vae is None:
        size = task.network.config.sample_size
        shape = (task.network.config.in_channels, *((size, size) if isinstance(size, int) else size))
        device = task.network.device
        known = torch.tensor(labels, device=device) if labels and task.network.config.num_class_embeds else None
        if isinstance(scheduler, FlowMapScheduler):
            denoiser = flow_map_denoiser(task.network, scheduler, known)
        else:
            denoiser = network_denoiser(task.network, known, 1.0 if known is None else scale)
        noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
        scheduler.set_timesteps(steps)
        return sample(denoiser, scheduler, noise).clamp(-1, 1)
    inputs: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": scale, "output_type": "np"}
    if labels is None:
        prompts = settings.validation_prompts or [""]
        inputs["prompt"] = [prompts[i % len(prompts)] for i in numbers]
    else:
        inputs["class_labels"] = labels
    if settings.resolution is not None:
        inputs |= {"height": settings.resolution, "width": settings.resolution}
    inputs["use_resolution_binning"] = False  # PixArt, Sana: the trained size
    taken = inspect.signature(pipe.__call__).parameters
    inputs = {name: value for name, value in inputs.items() if name in taken}
    kept, pipe.scheduler = pipe.scheduler, scheduler
    try:
        images = pipe(**inputs, generator=generators).images
    finally:
        pipe.scheduler = kept
    return torch.from_numpy(np.asarray(images)).movedim(-1, 1) * 2 - 1


def contact_sheet(images: torch.Tensor, columns: int = 10, enlarge: int = 2, gap: int = 2) -> Image.Image:
    """(N, C, H, W) in [-1, 1] in rows of ``columns``, small images enlarged without smoothing, on white."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels = (pixels[:, :3] if pixels.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)).movedim(1, -1).numpy()
    scale = enlarge if pixels.shape[1] <= 64 else 1
    pixels = pixels.repeat(scale, 1).repeat(scale, 2)
    height, width = (side + gap for side in pixels.shape[1:3])
    columns = min(columns, len(pixels))
    sheet = np.full((math.ceil(len(pixels) / columns) * height + gap, columns * width + gap, 3), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * height + gap, i % columns * width + gap
        sheet[top : top + height - gap, left : left + width - gap] = image
    return Image.fromarray(sheet)
