"""What a training was asked for, as its checkpoints say it, and whether another one may go on from there.

Knows which settings give the saved numbers their meaning (network, process, data and their order), which only change
how the training goes on, and which do neither.  Knows nothing of the numbers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from diffusers_sde.errors import UsageError
from diffusers_sde.training.folders import find_files, is_image
from diffusers_sde.training.networks import Task
from diffusers_sde.training.plan import Length
from diffusers_sde.training.samples import Images, TrainingData
from diffusers_sde.training.settings import OUTPUT, VALIDATION, Settings
from diffusers_sde.training.wishes import Wishes

# What the saved numbers mean.
FIXED = {
    *("objective", "seed", "rank", "train_text_encoder", "use_ema", "guidance_scale", "revision"),
    *("num_held_out_images", "streaming", "image_column", "caption_column", "label_column"),
    *("text_column", "prefix_column", "group_size", "updates_per_rollout"),
}
# Told by a fact instead (`_facts`), or without any influence on the numbers.
LEFT_OUT = {
    *("train_data_dir", "dataset_name", "prompt_file", "resolution", "prediction_type", "path", "model_config"),
    *("ema_sigma_rel", "tokenizer_name_or_path", "sequence_length"),
    *("pretrained_model_name_or_path", "vae_model_name_or_path", "teacher_model_name_or_path"),
    *("train_batch_size", "gradient_accumulation_steps", "dataloader_num_workers", "gradient_checkpointing"),
}
TAIL = 2**16  # bytes at the end of a file that its identity is taken from


def made_with(settings: Settings, task: Task, images: TrainingData, length: Length) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of its training, as JSON has it: ``fixed``, without which its numbers mean something
    else, and ``free``, what only changes how it goes on."""
    values = {
        f.name: getattr(settings, f.name)
        for f in dataclasses.fields(settings)
        if f.metadata["group"] not in (OUTPUT, VALIDATION) and f.name not in LEFT_OUT
    }
    fixed = {f"--{name}": value for name, value in values.items() if name in FIXED}
    free = {f"--{name}": value for name, value in values.items() if name not in FIXED}
    everything = {"fixed": {**fixed, **_facts(settings, task, images, length)}, "free": free}
    return json.loads(settings.redacted(json.dumps(everything)))


def compare(before: dict[str, Any], now: dict[str, Any], name: str) -> list[str]:
    """What goes on otherwise than before, each in words.

    Args:
        before: :func:`made_with` of the checkpoint.
        now: of the training that is to go on.
        name: what the message calls the checkpoint.

    Raises:
        UsageError: in one sentence, for all that would change what the saved numbers mean.
    """
    wrong = differences(before["fixed"], now["fixed"])
    if wrong:
        raise UsageError(
            f"{name} was made with {', '.join(wrong)}: resume with what it was made with, or start anew in another "
            "--output_dir."
        )
    return differences(before["free"], now["free"])


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """``--seed 0 (now 1)`` for each entry of both that differs."""
    both = [key for key in before if key in now]
    return [f"{key} {_said(before[key])} (now {_said(now[key])})" for key in both if before[key] != now[key]]


def _said(value: Any) -> str:
    return "unset" if value is None else "on" if value is True else "off" if value is False else str(value)


def _facts(settings: Settings, task: Task, images: TrainingData, length: Length) -> dict[str, Any]:
    """What was resolved: two ways to say the same are the same."""
    facts: dict[str, Any] = {
        "data of": describe_data(settings, images),
        **images.facts(),
        f"{images.unit} per step": length.global_batch * length.accumulate,
        **{f"{key} of the network": value for key, value in describe_network(task).items()},
    }
    if task.scheduler is not None:
        facts |= task.process_facts
    if settings.use_ema:
        facts["--ema_sigma_rel"] = settings.ema_sigma_rel
    for name in ("pretrained_model_name_or_path", "vae_model_name_or_path", "teacher_model_name_or_path"):
        model = getattr(settings, name)
        facts[f"--{name}"] = model if model is None or not Path(model).is_dir() else f"of content {identity(model)}"
    return facts


def describe_network(task: Task) -> dict[str, Any]:
    """Class and config of what is trained."""
    config = task.network.config
    values = config.to_dict() if isinstance(config, PreTrainedConfig) else dict(config)
    config = {key: value for key, value in values.items() if not key.startswith("_")}
    return {"class": type(task.network).__name__, **config}


def describe_data(settings: Settings, images: TrainingData) -> str:
    """The training data by number and content, wherever they lie; what is asked for where there are none."""
    if isinstance(images, Wishes):
        return f"{len(images)} wishes, content {_digest([images.prompts, images.class_names])}"
    count = "a stream" if settings.streaming else f"{len(images)} {images.unit}"
    classes = f", {len(images.class_names)} classes" if images.class_names else ""
    folder = Path(settings.data_source).expanduser()
    if not folder.is_dir():
        return f"{settings.data_source}, {count}{classes}"
    captions = images.all_captions() if isinstance(images, Images) else []
    pictures = [name for name in find_files(folder) if is_image(name)]
    files = [(name, (folder / name).stat().st_size) for name in pictures if (folder / name).exists()] or identity(
        folder
    )
    return f"{count}{classes}, content {_digest([files, captions])}"


def identity(folder: str | Path) -> str:
    """Eight hexadecimal digits that change with the names, sizes and last bytes of a folder's files."""
    return _digest(sorted(_described(Path(folder))))


def _described(folder: Path) -> Iterable[tuple[str, int, int]]:
    for root, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith((".", "checkpoint-"))]
        for file in (Path(root) / name for name in files if not name.startswith(".")):
            size = file.stat().st_size
            with open(file, "rb") as stream:
                stream.seek(max(0, size - TAIL))
                yield file.relative_to(folder).as_posix(), size, zlib.crc32(stream.read())


def _digest(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=4).hexdigest()
