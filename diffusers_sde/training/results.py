"""What a training leaves behind: sample sheets, the model with its card and curve, a repository on the Hub.

Knows a :class:`Session` and the files of its output folder.  Knows nothing of losses or steps.
"""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_sde.class_conditional import ClassConditionalPipeline
from diffusers_sde.training import autoencoders, card
from diffusers_sde.training.arguments import FLOW_MAPS
from diffusers_sde.training.checkpoints import publish_into
from diffusers_sde.training.parts import save_weights
from diffusers_sde.training.session import Session
from diffusers_sde.training.validation import sample_sheet


def validate(session: Session, name: str) -> Any:
    """A sample sheet of the (averaged) weights in ``samples/<name>.png`` and in the tracker."""
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

        measured = autoencoders.measure(task, session.measured) if task.name == autoencoders.NAME else {}

        def write(folder: Path) -> None:
            save_weights(task, state, folder, lora=settings.rank is not None, dtype=dtype)
            rows = card.read_curve(session.output / "loss.csv")
            if rows:
                card.draw_curve(rows, folder / "loss.png")
            if sheet is not None:
                sheet.save(folder / "samples.png", optimize=True)
            card.write_card(folder, **card_content(session, command, rows, measured))

        publish_into(session.output, write)
    print(f"Saved to {session.output} ({time.perf_counter() - start:.0f} s).", flush=True)
    if settings.push_to_hub:
        upload(session)


def card_content(
    session: Session, command: str, rows: list[tuple[int, float, float]], measured: dict[str, str]
) -> dict[str, Any]:
    """The arguments of :func:`card.write_card`; ``measured`` are further facts."""
    settings, task, length = session.settings, session.task, session.length
    conditional = isinstance(task.pipe, ClassConditionalPipeline)
    if settings.rank is not None:
        kind = "lora"
    elif task.vae is not None:
        kind = "pipeline"
    elif settings.objective == "denoising":
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
        "Length": f"{length.steps} steps of {length.global_batch * length.accumulate} images"
        + ("" if length.epochs is None else f", {length.epochs:.3g} epochs"),
        "Weights": f"average with a power-function profile, width {settings.ema_sigma_rel}"
        if settings.use_ema
        else "the last",
        **measured,
        "Loss": f"{sum(late) / max(len(late), 1):.4f} (mean of the last tenth; the curve is in `loss.csv`)",
    }
    name = settings.hub_model_id or session.output.resolve().name
    condition = 'prompt="..."' if not session.classes else "class_labels=[0, 1, 2]"
    return {
        "title": name,
        "what": f"Trained with `diffusers_sde.train` on {settings.data_source}"
        + (f" ({session.classes} classes)." if session.classes else "."),
        "facts": facts,
        "command": f"accelerate launch -m diffusers_sde.train {command}",
        "kind": kind,
        "values": {
            "name": name,
            "channels": task.channels,
            "size": task.network.config.sample_size,
            "condition": condition,
            "shown": list(task.pipe.labels)[:3] if conditional else [],
            "target": ", target_timestep=scheduler.target_timestep(t)" if settings.objective == "mean_flow" else "",
        },
        "base_model": settings.pretrained_model_name_or_path,
    }


def upload(session: Session) -> None:
    """Create the repository and upload everything but checkpoints, logs and caches."""
    from huggingface_hub import HfApi

    api = HfApi(token=session.settings.hub_token)
    name = session.settings.hub_model_id or session.output.resolve().name
    repository = api.create_repo(name, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repository,
        folder_path=session.output,
        ignore_patterns=["checkpoint-*/**", ".*/**", f"{session.settings.logging_dir}/**", "latents/**"],
    )
