"""The training script: one loop for training from scratch, fine-tuning, LoRA and distillation.

Knows the order of things: arguments, model, data, plan, loop, checkpoints, result.  Accelerate is the distributed
engine (processes, sharding, mixed precision, gradient accumulation, saved states).  Everything random is a function of
(seed, position of the sample), so that a run killed and resumed is, bit for bit on a CPU, the uninterrupted one.
"""

from __future__ import annotations

import argparse
import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers.optimization import get_scheduler
from PIL import Image
from tqdm.auto import tqdm

from diffusers_sde.named_samplers import UsageError
from diffusers_sde.problems import load_pipeline
from diffusers_sde.training import card, networks
from diffusers_sde.training.arguments import parse_args
from diffusers_sde.training.checkpoints import (
    checkpoints,
    find_checkpoint,
    prune,
    publish,
    publish_into,
)
from diffusers_sde.training.data import Samples, batches, cache_latents, find_images, load_images
from diffusers_sde.training.ema import PowerEMA
from diffusers_sde.training.losses import Loss, make_loss
from diffusers_sde.training.networks import Task
from diffusers_sde.training.objectives import check_objective
from diffusers_sde.training.randomness import seed_of
from diffusers_sde.training.validation import sample_sheet

_DROPOUT = 4  # the stream of the network's own random numbers
STOPPED = 128 + signal.SIGTERM  # exit status after a checkpoint on SIGTERM


class NotFinite(Exception):
    """The loss is not a number; the message names the last good checkpoint."""


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


# -- what is to be done --


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
        return int(networks.network_from_config(model_config, 0).config.in_channels)
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


# -- the training --


@dataclass
class Progress:
    """Optimizer steps made; a checkpoint object of Accelerate."""

    step: int = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]


class StopRequest:
    """Whether the process was asked to stop (SIGTERM, SIGINT); the step under way is finished first."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exc: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: Any) -> None:
        self.requested = True


@dataclass
class Session:
    """Everything that the loop and what it saves share."""

    args: argparse.Namespace
    accelerator: Accelerator
    task: Task
    network: Any  # as Accelerate prepared it
    optimizer: Any
    lr_scheduler: Any
    ema: PowerEMA | None
    progress: Progress
    plan: Plan
    classes: int
    output: Path

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
            prune(self.output, self.args.checkpoints_total_limit)


def train(args: argparse.Namespace, command: str) -> int:
    output = Path(args.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / args.logging_dir)),
    )
    resumed = find_checkpoint(output, args.resume_from_checkpoint) if args.resume_from_checkpoint else None
    task, images, classes = build_task(args)
    plan = make_plan(args, images, accelerator.num_processes)
    if accelerator.is_main_process:
        print(describe(args, task, images, classes, plan, accelerator.num_processes), flush=True)
    if args.dry_run:
        return 0
    teacher = build_teacher(args, task, classes, images.captions)
    if teacher is not None:
        for part in teacher.pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.to(accelerator.device)
    session, stream = prepare(args, accelerator, task, images, classes, plan, resumed)
    loss_of = make_loss(args, task, teacher, plan.global_batch)
    status = run_steps(session, stream, loss_of)
    if status == 0 and session.progress.step >= plan.steps:
        finish(session, command)
    accelerator.end_training()
    return status


def prepare(
    args: argparse.Namespace,
    accelerator: Accelerator,
    task: Task,
    images: Samples,
    classes: int,
    plan: Plan,
    resumed: Path | None,
) -> tuple[Session, Iterator[dict[str, Any]]]:
    """Optimizer, schedule and averages around the network, as they were at the checkpoint; the stream of batches."""
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    for other in task.pipe.components.values():
        if isinstance(other, torch.nn.Module) and other is not task.network:
            other.to(accelerator.device)
    if args.cache_latents:
        with accelerator.main_process_first():
            images = cache_latents(
                images,
                task.vae,
                directory=output / "latents",
                batch_size=args.train_batch_size,
                device=accelerator.device,
                progress=accelerator.is_main_process,
            )
    task.network.train()
    trainable = [p for p in task.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trainable,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,
    )
    # by optimizer steps, whatever the accumulation and the number of processes: not prepared by Accelerate
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=plan.steps,
    )
    network, optimizer = accelerator.prepare(task.network, optimizer)
    progress = Progress()
    ema = PowerEMA(network.parameters(), args.ema_sigma_rel) if args.use_ema else None
    accelerator.register_for_checkpointing(schedule, progress, *([ema] if ema else []))
    if resumed is not None:
        accelerator.load_state(str(resumed))
        if accelerator.is_main_process:
            print(f"Resumed from {resumed.name}.", flush=True)
    session = Session(args, accelerator, task, network, optimizer, schedule, ema, progress, plan, classes, output)
    stream = batches(
        images,
        batch_size=args.train_batch_size,
        seed=args.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        first_batch=progress.step * plan.accumulate,
        num_workers=args.dataloader_num_workers,
    )
    return session, stream


def run_steps(session: Session, stream: Iterator[dict[str, Any]], loss_of: Loss) -> int:
    """Optimizer steps until the end of the plan, the end of the sitting, or a request to stop; returns the status."""
    args, accelerator, progress = session.args, session.accelerator, session.progress
    main = accelerator.is_main_process
    curve = card.LossCurve(session.output / "loss.csv", progress.step) if main else None
    if args.report_to != "none":
        known = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str | bool)}
        accelerator.init_trackers("diffusers_sde", config=known)
    last = session.plan.steps
    if args.stop_after_steps is not None:
        last = min(last, progress.step + args.stop_after_steps)
    losses: list[float] = []
    saved = progress.step
    bar = tqdm(initial=progress.step, total=session.plan.steps, unit="step", disable=not main or None)
    with StopRequest() as stop, bar:
        while progress.step < last:
            rate = session.lr_scheduler.get_last_lr()[0]
            loss, stopping = optimizer_step(session, stream, loss_of, stop)
            losses.append(loss)
            bar.update()
            keep = progress.step % args.checkpointing_steps == 0 or stopping or progress.step == last
            if keep or progress.step % args.logging_steps == 0:
                mean = sum(losses) / len(losses)
                accelerator.log({"loss": mean, "learning_rate": rate}, step=progress.step)
                bar.set_postfix(loss=f"{mean:.4f}", refresh=False)
                if curve is not None:
                    curve.append(progress.step, mean, rate)
                losses.clear()
            if keep:
                session.save_checkpoint()
                saved = progress.step
            if args.validation_steps and progress.step % args.validation_steps == 0 and progress.step < last:
                validate(session, f"step-{progress.step:06d}")
            if stopping:
                if main:
                    print(f"Stopped after step {saved}; go on with --resume_from_checkpoint latest.", flush=True)
                return STOPPED
    return 0


def optimizer_step(
    session: Session, stream: Iterator[dict[str, Any]], loss_of: Loss, stop: StopRequest
) -> tuple[float, bool]:
    """One optimizer step; its mean loss over batches and processes, and whether any process was asked to stop.

    Raises :class:`NotFinite` before the weights are touched if the loss is not finite anywhere.
    """
    args, accelerator, progress = session.args, session.accelerator, session.progress
    total, stopping = 0.0, False
    for k in range(session.plan.accumulate):
        batch = next(stream)
        torch.manual_seed(
            seed_of(args.seed, progress.step * session.plan.accumulate + k, accelerator.process_index, _DROPOUT)
        )
        with accelerator.accumulate(session.network):
            with accelerator.autocast():
                loss = loss_of(session.network, batch)
            said = torch.stack([loss.detach().float(), torch.full_like(loss.detach(), float(stop.requested)).float()])
            mean, asked = accelerator.reduce(said, reduction="mean").tolist()
            if not math.isfinite(mean):
                good = checkpoints(session.output)
                where = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
                raise NotFinite(
                    f"The loss is {mean} at step {progress.step + 1}; {where}. Resume from it with a smaller "
                    "--learning_rate, another --loss_weighting or without --mixed_precision fp16."
                )
            total, stopping = total + mean / session.plan.accumulate, stopping or asked > 0
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(session.network.parameters(), args.max_grad_norm)
            session.optimizer.step()
            session.optimizer.zero_grad(set_to_none=True)
    session.lr_scheduler.step()
    progress.step += 1
    if session.ema is not None:
        session.ema.update()
    return total, stopping


def validate(session: Session, name: str) -> Any:
    """A sample sheet of the (averaged) weights in ``samples/<name>.png`` and in the tracker."""
    with session.averaged():
        sheet = sample_sheet(session.args, session.task, session.classes, session.accelerator)
    if sheet is not None and session.accelerator.is_main_process:
        folder = session.output / "samples"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"{name}.png", optimize=True)
        for tracker in session.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("samples", np.asarray(sheet), session.progress.step, dataformats="HWC")
    return sheet


def finish(session: Session, command: str) -> None:
    """Write the model, its card, curve and samples, all of them complete, and upload them if asked to."""
    args, accelerator, task = session.args, session.accelerator, session.task
    start = time.perf_counter()
    sheet = validate(session, f"step-{session.progress.step:06d}")
    with session.averaged():
        state = accelerator.get_state_dict(session.network)
        if not accelerator.is_main_process:
            return
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.save_precision]

        def write(folder: Path) -> None:
            networks.save_weights(task, state, folder, lora=args.rank is not None, dtype=dtype)
            rows = card.read_curve(session.output / "loss.csv")
            if rows:
                card.draw_curve(rows, folder / "loss.png")
            if sheet is not None:
                sheet.save(folder / "samples.png", optimize=True)
            card.write_card(folder, **card_content(session, command, rows))

        publish_into(session.output, write)
    print(f"Saved to {session.output} ({time.perf_counter() - start:.0f} s).", flush=True)
    if args.push_to_hub:
        upload(session)


def card_content(session: Session, command: str, rows: list[tuple[int, float, float]]) -> dict[str, Any]:
    """The arguments of :func:`card.write_card`."""
    args, task, plan = session.args, session.task, session.plan
    conditional = bool(task.vae is None and task.network.config.get("num_class_embeds"))
    if args.rank is not None:
        kind = "lora"
    elif task.vae is not None:
        kind = "pipeline"
    elif args.objective == "denoising":
        kind = "class" if conditional else "unconditional"
    else:
        kind = "classifier" if args.objective == "classifier" else "flow_map"
    late = [loss for step, loss, _ in rows if step > 0.9 * plan.steps]
    total = sum(p.numel() for p in task.network.parameters())
    facts = {
        "Network": f"{type(task.network).__name__}, {total:,} parameters"
        + (f", LoRA of rank {args.rank}" if args.rank is not None else f", saved as {args.save_precision}"),
        "Process": f"{type(task.path).__name__}, {task.prediction_type}",
        "Objective": f"{args.objective}, weighting {args.loss_weighting}, times {args.time_sampling}, loss {args.loss}",
        "Length": f"{plan.steps} steps of {plan.global_batch * plan.accumulate} images"
        + ("" if plan.epochs is None else f", {plan.epochs:.3g} epochs"),
        "Weights": f"average with a power-function profile, width {args.ema_sigma_rel}" if args.use_ema else "the last",
        "Loss": f"{sum(late) / max(len(late), 1):.4f} (mean of the last tenth; the curve is in `loss.csv`)",
    }
    name = args.hub_model_id or session.output.resolve().name
    condition = 'prompt="..."' if not session.classes else "class_labels=[0, 1, 2]"
    return {
        "title": name,
        "what": f"Trained with `diffusers_sde.train` on {args.train_data_dir or args.dataset_name}"
        + (f" ({session.classes} classes)." if session.classes else "."),
        "facts": facts,
        "command": f"accelerate launch -m diffusers_sde.train {command}",
        "kind": kind,
        "values": {
            "name": name,
            "channels": task.channels,
            "size": task.network.config.sample_size,
            "condition": condition,
            "labels": ", torch.tensor([0, 1, 2])" if conditional else "",
            "target": ", target_timestep=scheduler.target_timestep(t)" if args.objective == "mean_flow" else "",
        },
        "base_model": args.pretrained_model_name_or_path,
    }


def upload(session: Session) -> None:
    """Create the repository and upload everything but checkpoints, logs and caches."""
    from huggingface_hub import HfApi

    api = HfApi(token=session.args.hub_token)
    name = session.args.hub_model_id or session.output.resolve().name
    repository = api.create_repo(name, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repository,
        folder_path=session.output,
        ignore_patterns=["checkpoint-*/**", ".*/**", f"{session.args.logging_dir}/**", "latents/**"],
    )
