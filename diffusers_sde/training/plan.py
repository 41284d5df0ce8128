"""What is to be trained, on what and for how long: the arguments resolved.

Knows how arguments become a task (network, pipeline, process), a data set and a number of steps, and refuses what does
not fit.  Knows nothing of processes but their number, and nothing of optimizers.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffusers_sde.conditioning import takes_prompts
from diffusers_sde.errors import UsageError
from diffusers_sde.loading import load_pipeline
from diffusers_sde.sampling import CLASS_NAMES
from diffusers_sde.training import autoencoders, embedding_language, language, networks, text, text_pipelines
from diffusers_sde.training.arguments import TEXT
from diffusers_sde.training.data import Images, TrainingData, load_images
from diffusers_sde.training.framing import Framing
from diffusers_sde.training.learner import frozen_start
from diffusers_sde.training.networks import Task
from diffusers_sde.training.objectives import check_objective
from diffusers_sde.training.parts import add_lora
from diffusers_sde.training.randomness import seed_of
from diffusers_sde.training.settings import Settings
from diffusers_sde.training.wishes import make_wishes

MAX_SHOWN_CLASSES = 100


def build_task(settings: Settings) -> tuple[Task, TrainingData, int]:
    """The network with its pipeline, the data, and the number of classes that it is conditioned on (0: none)."""
    if settings.objective in TEXT:
        make = None
        if settings.objective == "embedding":
            process = networks.process_scheduler("vp" if settings.path == "from_model" else settings.path, "sample")
            make = functools.partial(embedding_language.embedding_task, settings, scheduler=process)
        return *language.build(settings, make), 0
    pipe = vae = None
    if settings.pretrained_model_name_or_path:
        pipe = load_pipeline(
            settings.pretrained_model_name_or_path, revision=settings.revision, variant=settings.variant
        )
    elif settings.vae_model_name_or_path:
        vae = text_pipelines.load_autoencoder(settings.vae_model_name_or_path)
    resolution = settings.resolution or (native_resolution(pipe) if pipe else 64)
    images = training_data(settings, pipe, resolution, image_channels(pipe, vae, settings.model_config))
    classes = len(images.class_names or ())
    torch.manual_seed(seed_of(settings.seed))  # of the weights of new networks
    if settings.objective == "autoencoder":
        return autoencoders.autoencoder_task(new_network(settings, images, vae, 0)), images, 0
    if settings.objective == "classifier":
        scheduler = pipe.scheduler if pipe else new_scheduler(settings)
        task = networks.classifier_task(scheduler, resolution, images.framing.channels, classes)
        return task, images, classes
    if pipe is not None:
        task = networks.pipeline_task(pipe, classes, images.captions, resolution)
        if settings.prediction_type not in (None, task.prediction_type):
            raise UsageError(
                f"The pretrained network predicts {task.prediction_type}: leave out --prediction_type "
                f"{settings.prediction_type}."
            )
    elif vae is not None:
        network = new_network(settings, images, vae, 0)
        side = resolution / vae_factor(vae)
        pipe = text_pipelines.new_pipeline(vae, network, new_scheduler(settings), all_captions(settings, images), side)
        task = networks.pipeline_task(pipe, 0, images.captions, resolution)
        task.told_frames = False  # a new network learns what it is sampled with
    else:
        task = networks.fresh_task(new_network(settings, images, vae, classes), new_scheduler(settings), classes)
    check_objective(task.path, task.prediction_type, settings.loss_weighting, settings.loss)
    if settings.cache_latents and task.vae is None:
        raise UsageError("--cache_latents is for latent models, this one has no vae: leave it out.")
    if settings.objective in ("consistency", "mean_flow"):
        task = networks.flow_map_task(task, settings.objective)
    if settings.train_text_encoder:
        task = text.with_text_encoder(task)
    if settings.rank is not None:
        add_lora(task, settings.rank)
    if settings.gradient_checkpointing:
        if not getattr(task.network, "_supports_gradient_checkpointing", False):
            raise UsageError(f"{type(task.network).__name__} has no gradient checkpointing: leave it out.")
        task.network.enable_gradient_checkpointing()
    if takes_prompts(task.pipe):
        return task, images, 0
    if classes and not settings.rewarded:  # else it has the names that it came with
        task.network.register_to_config(**{CLASS_NAMES: images.class_names})
    return task, images, classes


def training_data(settings: Settings, pipe: Any, resolution: int, channels: int | None) -> TrainingData:
    """The images, or, of an objective that makes its own, what they are to be of."""
    images = None
    if settings.data_source:
        images = load_images(
            settings.data_source,
            resolution=resolution,
            channels=channels,
            center_crop=settings.center_crop,
            random_flip=settings.random_flip,
            caption_column=settings.caption_column,
            image_column=settings.image_column,
            label_column=settings.label_column,
            streaming=settings.streaming,
        )
    if not settings.rewarded:
        assert images is not None  # other objectives have data
        return images
    framing = Framing(resolution, channels or 3, center_crop=True, random_flip=False)
    captions = images.all_captions() if isinstance(images, Images) else None
    group = 1 if settings.objective == "adjoint_matching" else settings.group_size
    return make_wishes(pipe, framing, group, settings.prompt_file, captions)


def new_network(settings: Settings, images: TrainingData, vae: Any, classes: int) -> Any:
    """The network of ``--model_config``, or one that fits the objective and the data."""
    resolution, channels = images.framing.resolution, images.framing.channels
    if settings.model_config:
        return networks.network_from_config(settings.model_config, classes)
    if settings.objective == "autoencoder":
        return autoencoders.default_autoencoder(resolution, channels)
    if vae is not None:
        flow = settings.path == "flow"
        return text_pipelines.default_text_network(resolution // vae_factor(vae), vae.config.latent_channels, flow)
    return networks.default_network(resolution, channels, classes)


def new_scheduler(settings: Settings) -> Any:
    """The forward process of a new network, as a scheduler."""
    latent = settings.vae_model_name_or_path is not None
    path = ("scaled_linear" if latent else "vp") if settings.path == "from_model" else settings.path
    usual = {"flow": "flow_prediction", "scaled_linear": "v_prediction"}.get(path, "epsilon")
    return networks.process_scheduler(path, settings.prediction_type or usual)


def all_captions(settings: Settings, images: TrainingData) -> list[str]:
    """Every caption of the data, which the vocabulary of a new text encoder is made of.

    Raises:
        UsageError: for data without captions, and for a stream, whose captions are not known.
    """
    if not images.captions:
        raise UsageError(
            f"A new text-to-image model needs captions, {settings.data_source} has none named "
            f"{settings.caption_column!r}: add a metadata.jsonl, or pass another --caption_column."
        )
    if not isinstance(images, Images):
        raise UsageError("The vocabulary of a new text encoder is made of all captions: leave out --streaming.")
    return images.all_captions()


def build_teacher(settings: Settings, task: Task, classes: int, captions: bool) -> Task | None:
    """The frozen network that a flow map is distilled from, or that learning from rewards starts from.

    Raises ``ValueError`` for one of another process or shape: its trajectories would not be the student's.
    """
    if settings.rewarded:
        return frozen_start(settings, task)
    if not settings.teacher_model_name_or_path:
        return None
    pipe = load_pipeline(settings.teacher_model_name_or_path)
    teacher = networks.pipeline_task(pipe, classes, captions, settings.resolution)
    teacher.network.requires_grad_(False).eval()
    mine, its = (p.log_snr(np.linspace(p.noisiest, p.cleanest, 9)) for p in (task.path, teacher.path))
    if type(task.path) is not type(teacher.path) or not np.allclose(mine, its):
        raise UsageError("Teacher and student have different forward processes: start the student from the teacher.")
    sizes = [t.network.config.get("sample_size") for t in (task, teacher)]
    if sizes[0] != sizes[1] or task.channels != teacher.channels:
        raise UsageError(f"Teacher and student differ in size ({sizes[1]} and {sizes[0]}): use the same resolution.")
    return teacher


def native_resolution(pipe: Any) -> int:
    """Side of the images a pipeline's network was made for."""
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    size = getattr(getattr(network, "config", None), "sample_size", None) or getattr(pipe, "default_sample_size", None)
    if not isinstance(size, int):
        raise UsageError("This model does not say its resolution: pass --resolution.")
    vae = getattr(pipe, "vae", None)
    return size * (getattr(pipe, "vae_scale_factor", None) or vae_factor(vae) if vae is not None else 1)


def vae_factor(vae: Any) -> int:
    """Pixels of an image in a latent number, along a side."""
    return int(2 ** (len(vae.config.block_out_channels) - 1))


def image_channels(pipe: Any, vae: Any, model_config: str | None) -> int | None:
    """Channels that the network (or the encoder before it) takes; None: those of the images."""
    if vae is not None:
        return networks.image_channels(vae)
    if pipe is not None:
        vae = getattr(pipe, "vae", None)
        network = vae if vae is not None else getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
        return networks.image_channels(network) if network is not None else None
    if model_config:
        channels = networks.read_model_config(model_config).get("in_channels")
        return int(channels or networks.network_from_config(model_config, 0).config.in_channels)
    return None


@dataclass(frozen=True)
class Length:
    """How long the training is: ``steps`` optimizer steps of ``global_batch`` images (all processes together, without
    accumulation), ``accumulate`` of them each; the learning rate grows over the first ``warm_up`` steps.  A batch has
    ``parts`` losses, and the same batches serve ``updates`` steps."""

    steps: int
    global_batch: int
    accumulate: int
    images: int | None
    warm_up: int
    parts: int = 1
    updates: int = 1

    def batches_before(self, step: int) -> int:
        """How many batches of a process are used up after so many optimizer steps."""
        return step // self.updates * self.accumulate

    @property
    def epochs(self) -> float | None:
        return None if self.images is None else self.steps * self.global_batch * self.accumulate / self.images


def training_length(settings: Settings, images: TrainingData, processes: int) -> Length:
    """``max_train_steps``, or the number of optimizer steps in ``num_train_epochs`` passes over the data."""
    global_batch, accumulate = settings.train_batch_size * processes, settings.gradient_accumulation_steps
    count = None if settings.streaming or settings.rewarded else len(images)
    steps = settings.max_train_steps
    if steps is None:
        assert count is not None  # a stream has max_train_steps, and so have rewards
        steps = math.ceil(settings.num_train_epochs * count / (global_batch * accumulate))
    warm_up = min(500, steps // 10) if settings.lr_warmup_steps is None else settings.lr_warmup_steps
    return Length(steps, global_batch, accumulate, count, warm_up, settings.parts, settings.updates_per_rollout)


def describe(settings: Settings, task: Task, images: TrainingData, classes: int, length: Length, processes: int) -> str:
    """The resolved plan, a line each."""
    trainable = sum(p.numel() for p in task.trained.parameters() if p.requires_grad)
    total = sum(p.numel() for p in task.trained.parameters())
    trained = " and ".join(type(part).__name__ for part in task.parts.values())
    pipeline = "none" if task.scheduler is None else f"{type(task.pipe).__name__} with {type(task.scheduler).__name__}"
    epochs = "" if length.epochs is None else f" ({length.epochs:.1f} epochs)"
    # weights and their average, gradients, two moments
    floats = total + trainable * (3 + settings.use_ema)
    data = (
        {"rollouts": describe_rollouts(settings, images)} if settings.rewarded else {"data": images.describe(classes)}
    )
    lines = {
        "network": f"{trained}, {trainable:,} of {total:,} parameters trained",
        "pipeline": pipeline,
        "process": task.forward_process,
        "objective": settings.axes,
        **data,
        **({"classes": count_classes(images)} if images.class_names else {}),
        "length": f"{length.steps} optimizer steps of {length.global_batch} x {length.accumulate} "
        f"{images.unit}{epochs}",
        "processes": f"{processes}",
        "memory": f"about {floats * 4 / 2**20:.0f} MB for weights, average, gradients and moments, per process",
        "learning rate": describe_rate(settings, length),
        "output": f"{settings.output_dir}, a checkpoint every {settings.checkpointing_steps} steps",
    }
    return "\n".join(f"{key + ':':15}{value}" for key, value in lines.items())


def describe_rollouts(settings: Settings, wishes: TrainingData) -> str:
    """What is rolled out, and what is learned of it, in words."""
    kind = "prompts" if wishes.captions else "classes" if wishes.class_names else "wish"
    groups = "" if settings.objective == "adjoint_matching" else f", groups of {settings.group_size}"
    tau = settings.rollout_tau if settings.rollout_tau is not None else float(settings.objective != "nft")
    return (
        f"{len(wishes)} {kind}{groups}, {settings.rollout_steps} evaluations at tau {tau:g}, data scale "
        f"{settings.rollout_data_std:g}, {settings.parts} losses a picture, optimizer steps a rollout: "
        f"{settings.updates_per_rollout}"
    )


def count_classes(images: TrainingData) -> str:
    """The classes that the data has, each with its number of images where that is known; the first hundred."""
    names = [name.encode("utf-8", "backslashreplace").decode() for name in images.class_names or ()]
    counts = images.class_counts()
    shown = names if counts is None else [f"{name} {count}" for name, count in zip(names, counts, strict=True)]
    return ", ".join(shown[:MAX_SHOWN_CLASSES]) + (", ..." if len(shown) > MAX_SHOWN_CLASSES else "")


def describe_rate(settings: Settings, length: Length) -> str:
    """The learning rate, and whether the training is too short to reach it."""
    rate = f"{settings.learning_rate:g}, {settings.lr_scheduler}"
    if settings.lr_scheduler == "constant":
        return rate
    late = length.warm_up >= length.steps
    return f"{rate}, {length.warm_up} steps to warm up" + (
        ", more than there are, so that it is never reached: pass fewer as --lr_warmup_steps" if late else ""
    )
