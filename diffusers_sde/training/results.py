"""What a training leaves behind: sample sheets, the model with its card and curve, a repository on the Hub.

Knows a :class:`Session` and the files of its output folder.  Knows nothing of losses or steps.
"""

from __future__ import annotations

import importlib
import json
import shlex
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import validate_repo_id

from diffusers_sde.class_conditional import ClassConditionalPipeline
from diffusers_sde.errors import UsageError
from diffusers_sde.training import autoencoders, card, language
from diffusers_sde.training.arguments import FLOW_MAPS
from diffusers_sde.training.checkpoints import NotWritten, publish_into
from diffusers_sde.training.parts import save_weights
from diffusers_sde.training.session import Session
from diffusers_sde.training.settings import LAUNCH, Settings
from diffusers_sde.training.validation import sample_sheet

SHOWN_CLASSES = 3  # that a card's snippet asks for at most


def validate(session: Session, name: str) -> Any:
    """A sample sheet of the (averaged) weights in ``samples/<name>.png`` and in the tracker; of text, as text."""
    if isinstance(session.task, language.LanguageTask):
        return validate_text(session, session.task, name)
    with session.averaged():
        sheet = sample_sheet(session.settings, session.task, session.classes, session.accelerator, session.measured)
    if sheet is not None and session.accelerator.is_main_process:
        folder = session.output / "samples"
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"{name}.png", optimize=True)
        for tracker in session.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("samples", np.asarray(sheet), session.progress.step, dataformats="HWC")
            else:  # wandb and trackio
                image = importlib.import_module(tracker.name).Image(sheet)
                tracker.log({"samples": image}, step=session.progress.step)
    return sheet


def validate_text(session: Session, task: language.LanguageTask, name: str) -> None:
    """Texts of the (averaged) weights in ``samples/<name>.txt`` and in the tracker."""
    network, accelerator = task.network, session.accelerator
    if not session.settings.num_validation_images or not accelerator.is_main_process:
        return
    training = network.training
    network.eval()
    with torch.no_grad(), session.averaged(), accelerator.autocast():
        texts = task.sample_texts(session.settings)
    network.train(training)
    folder = session.output / "samples"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.txt").write_text("\n---\n".join(texts) + "\n", encoding="utf-8")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.writer.add_text("samples", "\n\n".join(texts), session.progress.step)


def finish(session: Session, command: str) -> None:
    """Write the model, its card, curve and samples, all of them complete, and upload them if asked to."""
    settings, accelerator, task = session.settings, session.accelerator, session.task
    start = time.perf_counter()
    sheet = validate(session, f"step-{session.progress.step:06d}")
    with session.averaged():
        state = accelerator.get_state_dict(session.network)
        if not accelerator.is_main_process:
            return
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[settings.save_precision]
        if not all(value.to(dtype).isfinite().all() for value in state.values() if value.is_floating_point()):
            raise UsageError(
                f"The weights are too large for --save_precision {settings.save_precision}: the training itself is "
                f"complete, pass fp32 or bf16 and {session.last_good()}."
            )
        measured = measure(session)

        rewards = card.read_curve(session.output / "rewards.csv") if settings.rewarded else []
        if rewards:
            measured |= describe_rewards(rewards)

        def write(folder: Path) -> None:
            save_weights(task, state, folder, lora=settings.rank is not None, dtype=dtype)
            if isinstance(task, language.LanguageTask):
                language.save_tokenizer(task, folder)
                written = session.output / "samples" / f"step-{session.progress.step:06d}.txt"
                if written.exists():
                    (folder / "samples.txt").write_text(written.read_text(encoding="utf-8"), encoding="utf-8")
            rows = card.read_curve(session.output / "loss.csv")
            if rows:
                card.draw_curve(rows, folder / "loss.png")
            if rewards:
                card.draw_rewards(rewards, folder / "rewards.png")
            if sheet is not None:
                sheet.save(folder / "samples.png", optimize=True)
            card.write_card(folder, **card_content(session, command, rows, measured))

        try:
            publish_into(session.output, write)
        except NotWritten as error:
            raise NotWritten(
                f"{error}: the training itself is complete, make room and {session.last_good()}."
            ) from error
    print(f"Saved to {session.output} ({time.perf_counter() - start:.0f} s).", flush=True)
    if settings.push_to_hub:
        upload(session)


def measure(session: Session) -> dict[str, str]:
    """Further facts of the result, for its card."""
    task = session.task
    if task.name == autoencoders.NAME:
        return autoencoders.measure(task, session.measured)
    if isinstance(task, language.LanguageTask):
        task.network.eval()
        return language.measure(session.settings, task, session.measured)
    return {}


def describe_rewards(rows: list[tuple[Any, ...]]) -> dict[str, str]:
    """What a fine-tuning on rewards has reached, from its curve: means of the first and last tenth of the rollouts."""
    tenth = max(len(rows) // 10, 1)
    (first, *_), (last, spread, kl) = (
        [sum(column) / tenth for column in list(zip(*part, strict=True))[1:]] for part in (rows[:tenth], rows[-tenth:])
    )
    return {
        "Reward": f"{first:.4g} at the start, {last:.4g} at the end with a spread of {spread:.2g} (`rewards.csv`)",
        "KL to the start": f"{kl:.3g} nats",
    }


def card_content(
    session: Session, command: str, rows: list[tuple[Any, ...]], measured: dict[str, str]
) -> dict[str, Any]:
    """The arguments of :func:`card.write_card`; ``measured`` are further facts."""
    settings, task, length = session.settings, session.task, session.length
    conditional = isinstance(task.pipe, ClassConditionalPipeline)
    if settings.rank is not None:
        kind = "lora"
    elif task.vae is not None:
        kind = "pipeline"
    elif settings.objective in ("denoising", "rectification") or settings.rewarded:
        kind = "class" if conditional else "unconditional"
    else:
        flow_map = "class_flow_map" if conditional else "flow_map"
        kind = flow_map if settings.objective in FLOW_MAPS else settings.objective
    late = [loss for step, loss, _ in rows if step > 0.9 * length.steps]
    networks = (
        f"{type(p).__name__}, {sum(v.numel() for v in p.parameters()):,} parameters" for p in task.parts.values()
    )
    facts = {
        "Network": "; ".join(networks)
        + (f", LoRA of rank {settings.rank}" if settings.rank is not None else f", saved as {settings.save_precision}"),
        "Process": task.forward_process,
        "Objective": settings.axes,
        "Length": f"{length.steps} steps of {length.global_batch * length.accumulate} {session.measured.unit}"
        + ("" if length.epochs is None else f", {length.epochs:.3g} epochs"),
        "Weights": f"average with a power-function profile, width {settings.ema_sigma_rel}"
        if settings.use_ema
        else "the last",
        **measured,
        "Loss": f"{sum(late) / max(len(late), 1):.4f} (mean of the last tenth; the curve is in `loss.csv`)",
    }
    name = repository_name(settings)
    names = task.pipe.class_names if conditional else None
    shown = (names or list(range(session.classes)))[:SHOWN_CLASSES]
    condition = f"class_labels={shown}" if shown else 'prompt="..."'
    return {
        "title": name,
        "what": f"Trained with `diffusers_sde.train` on {'rewards' if settings.rewarded else settings.data_source}"
        + (f" ({session.classes} classes)." if session.classes else "."),
        "facts": facts,
        "command": f"{LAUNCH} {command}",
        "kind": kind,
        "values": {
            "name": json.dumps(name, ensure_ascii=False),
            **task.card_values,
            "condition": condition,
            "shown": shown,
            "target": ", target_timestep=scheduler.target_timestep(t)" if settings.objective == "mean_flow" else "",
        },
        "base_model": settings.pretrained_model_name_or_path,
        "hide": settings.redacted,
    }


class UploadFailed(Exception):
    """The result is saved but not uploaded; the message says where it is and how to upload it."""


def repository_name(settings: Settings) -> str:
    """What the result is called on the Hub."""
    return settings.hub_model_id or Path(settings.output_dir).resolve().name


def check_repository(settings: Settings) -> None:
    """Raise ``UsageError`` for a name that the Hub would not take."""
    try:
        validate_repo_id(repository_name(settings))
    except ValueError as error:
        raise UsageError(
            f"The result cannot be uploaded under this name, pass another --hub_model_id: {error}"
        ) from error


def upload(session: Session) -> None:
    """Create the repository and upload everything but checkpoints, logs and caches.

    Raises:
        UploadFailed: for whatever kept it from being done.
    """
    from huggingface_hub import HfApi

    name = repository_name(session.settings)
    own = ["checkpoint-*/**", ".*", ".*/**", f"{session.settings.logging_dir}/**", "latents/**"]
    try:
        api = HfApi(token=session.settings.hub_token)
        repository = api.create_repo(name, exist_ok=True).repo_id
        api.upload_folder(repo_id=repository, folder_path=session.output, ignore_patterns=own)
    except Exception as error:  # whatever it is (connection, token, quota): hours of training are behind us
        later = ["hf", "upload", name, str(session.output), ".", *(w for p in own for w in ("--exclude", p))]
        raise UploadFailed(
            f"The model is saved in {session.output} but could not be uploaded ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}): later, `{shlex.join(later)}` does it."
        ) from error
