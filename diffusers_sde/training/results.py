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

from diffusers_sde.training import card, networks
from diffusers_sde.training.checkpoints import publish_into
from diffusers_sde.training.session import Session
from diffusers_sde.training.validation import sample_sheet


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
            else:  # wandb and trackio
                image = importlib.import_module(tracker.name).Image(sheet)
                tracker.log({"samples": image}, step=session.progress.step)
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
