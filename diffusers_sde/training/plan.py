"""What is to be trained, on what and for how long: the arguments resolved.

Knows how arguments become a task (network, pipeline, process), a data set and a number of steps, and refuses what does
not fit.  Knows nothing of processes but their number, and nothing of optimizers.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffusers_sde.comparison.problems import load_pipeline
from diffusers_sde.errors import UsageError
from diffusers_sde.training import networks
from diffusers_sde.training.data import Samples, find_images, load_images
from diffusers_sde.training.networks import Task
from diffusers_sde.training.objectives import check_objective
from diffusers_sde.training.randomness import seed_of


def build_task(args: argparse.Namespace) -> tuple[Task, Samples, int]:
    """The network with its pipeline, the data, and the number of classes (0: none)."""
    pipe = None
    if args.pretrained_model_name_or_path:
        pipe = load_pipeline(args.pretrained_model_name_or_path, revision=args.revision, variant=args.variant)
    resolution = args.resolution or (native_resolution(pipe) if pipe else 64)
    images = load_images(
        args.train_data_dir or args.dataset_name,
        resolution=resolution,
        channels=image_channels(pipe, args.model_config) or own_channels(args.train_data_dir),
        center_crop=args.center_crop,
        random_flip=args.random_flip,
        caption_column=args.caption_column,
        image_column=args.image_column,
        label_column=args.label_column,
        streaming=args.streaming,
    )
    classes = len(images.class_names or ())
    torch.manual_seed(seed_of(args.seed))  # of the weights of new networks
    if args.objective == "classifier":
        scheduler = pipe.scheduler if pipe else networks.process_scheduler(fresh_path(args), fresh_kind(args))
        task = networks.classifier_task(scheduler, resolution, images.framing.channels, classes)
        return task, images, classes
    if pipe is not None:
        task = networks.pipeline_task(pipe, classes, images.captions)
        if args.prediction_type not in (None, task.prediction_type):
            raise UsageError(
                f"The pretrained network predicts {task.prediction_type}: leave out --prediction_type "
                f"{args.prediction_type}."
            )
    else:
        network = (
            networks.network_from_config(args.model_config, classes)
            if args.model_config
            else networks.default_network(resolution, images.framing.channels, classes)
        )
        task = networks.fresh_task(network, networks.process_scheduler(fresh_path(args), fresh_kind(args)), classes)
    check_objective(task.path, task.prediction_type, args.loss_weighting, args.loss)
    if args.cache_latents and task.vae is None:
        raise UsageError("--cache_latents is for latent models, this one has no vae: leave it out.")
    if args.objective in ("consistency", "mean_flow"):
        task = networks.flow_map_task(task, args.objective)
    if args.rank is not None:
        networks.add_lora(task, args.rank)
    if args.gradient_checkpointing:
        if not getattr(task.network, "_supports_gradient_checkpointing", False):
            raise UsageError(f"{type(task.network).__name__} has no gradient checkpointing: leave it out.")
        task.network.enable_gradient_checkpointing()
    return task, images, classes


def build_teacher(args: argparse.Namespace, task: Task, classes: int, captions: bool) -> Task | None:
    """The frozen network that a flow map is distilled from.

    Raises ``ValueError`` for one of another process or shape: its trajectories would not be the student's.
    """
    if not args.teacher_model_name_or_path:
        return None
    teacher = networks.pipeline_task(load_pipeline(args.teacher_model_name_or_path), classes, captions)
    teacher.network.requires_grad_(False).eval()
    mine, its = (p.log_snr(np.linspace(p.noisiest, p.cleanest, 9)) for p in (task.path, teacher.path))
    if type(task.path) is not type(teacher.path) or not np.allclose(mine, its):
        raise UsageError("Teacher and student have different forward processes: start the student from the teacher.")
    sizes = [t.network.config.sample_size for t in (task, teacher)]
    if sizes[0] != sizes[1] or task.channels != teacher.channels:
        raise UsageError(f"Teacher and student differ in size ({sizes[1]} and {sizes[0]}): use the same resolution.")
    return teacher


def fresh_path(args: argparse.Namespace) -> str:
    """The ``--path`` of a new network."""
    return "vp" if args.path == "from_model" else args.path


def fresh_kind(args: argparse.Namespace) -> str:
    """The ``--prediction_type`` of a new network."""
    return args.prediction_type or ("flow_prediction" if fresh_path(args) == "flow" else "epsilon")


def native_resolution(pipe: Any) -> int:
    """Side of the images a pipeline's network was made for."""
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    size = getattr(getattr(network, "config", None), "sample_size", None)
    if not isinstance(size, int):
        raise UsageError("This model does not say its resolution: pass --resolution.")
    vae = getattr(pipe, "vae", None)
    return size * (2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1)


def image_channels(pipe: Any, model_config: str | None) -> int | None:
    """Channels that the network (or the encoder before it) takes; None: those of the images."""
    if pipe is not None:
        vae = getattr(pipe, "vae", None)
        network = vae if vae is not None else getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        return int(network.config.in_channels) if network is not None else None
    if model_config:
        said = networks.read_model_config(model_config).get("in_channels")
        return int(said or networks.network_from_config(model_config, 0).config.in_channels)
    return None


def own_channels(folder: str | None) -> int:
    """1 where the first image of a folder is grey, else 3."""
    if folder is not None and Path(folder).is_dir():
        for name in find_images(Path(folder))[:1]:
            with Image.open(Path(folder) / name) as image:
                return 1 if image.mode in ("1", "L", "LA", "I", "I;16", "F") else 3
    return 3


@dataclass(frozen=True)
class Plan:
    """How long the training is: ``steps`` optimizer steps of ``global_batch`` images (all processes together, without
    accumulation), ``accumulate`` of them each."""

    steps: int
    global_batch: int
    accumulate: int
    images: int | None

    @property
    def epochs(self) -> float | None:
        return None if self.images is None else self.steps * self.global_batch * self.accumulate / self.images


def make_plan(args: argparse.Namespace, images: Samples, processes: int) -> Plan:
    """``max_train_steps``, or the number of optimizer steps in ``num_train_epochs`` passes over the data."""
    global_batch, accumulate = args.train_batch_size * processes, args.gradient_accumulation_steps
    count = None if args.streaming else len(images)
    steps = args.max_train_steps
    if steps is None:
        assert count is not None  # a stream has max_train_steps
        steps = math.ceil(args.num_train_epochs * count / (global_batch * accumulate))
    return Plan(steps, global_batch, accumulate, count)


def describe(args: argparse.Namespace, task: Task, images: Samples, classes: int, plan: Plan, processes: int) -> str:
    """The resolved plan, a line each."""
    trainable = sum(p.numel() for p in task.network.parameters() if p.requires_grad)
    total = sum(p.numel() for p in task.network.parameters())
    epochs = "" if plan.epochs is None else f" ({plan.epochs:.1f} epochs)"
    # weights and their average, gradients, two moments
    floats = total + trainable * (3 + args.use_ema)
    lines = {
        "network": f"{type(task.network).__name__}, {trainable:,} of {total:,} parameters trained",
        "pipeline": f"{type(task.pipe).__name__} with {type(task.scheduler).__name__}",
        "process": f"{type(task.path).__name__}, prediction_type {task.prediction_type}",
        "objective": f"{args.objective}, weighting {args.loss_weighting}, times {args.time_sampling}, loss {args.loss}",
        "data": f"{plan.images if plan.images is not None else 'a stream of'} images, {classes or 'no'} classes, "
        f"{'with' if images.captions else 'no'} captions, {getattr(images, 'skipped', 0)} unreadable ones skipped",
        "length": f"{plan.steps} optimizer steps of {plan.global_batch} x {plan.accumulate} images{epochs}",
        "processes": f"{processes}",
        "memory": f"about {floats * 4 / 2**20:.0f} MB for weights, average, gradients and moments, per process",
        "learning rate": f"{args.learning_rate:g}, {args.lr_scheduler}, {args.lr_warmup_steps} steps of warm-up",
        "output": f"{args.output_dir}, a checkpoint every {args.checkpointing_steps} steps",
    }
    return "\n".join(f"{key + ':':15}{value}" for key, value in lines.items())
