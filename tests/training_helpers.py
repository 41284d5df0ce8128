"""Small images, a small network, and the training script run in this process or through Accelerate's launcher."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image

from diffusers_sde.training.command import main

TINY = {
    "_class_name": "UNet2DModel",
    "sample_size": 16,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}

TINY_VAE = {
    "_class_name": "AutoencoderKL",
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "mid_block_add_attention": False,
}
TINY_TEXT_UNET = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
}
TINY_TEXT_TRANSFORMER = {
    "_class_name": "CogView4Transformer2DModel",
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "text_embed_dim": 32,
    "time_embed_dim": 8,
    "condition_dim": 4,
    "pos_embed_max_size": 8,
}
RGB = {"resolution": 8, "channels": 3}  # of load_images
CAPTIONS = (["a red bar", "bar, upright"], "lying bar")  # of the classes a and b; several are drawn from


def make_captioned(folder: Path, count: int = 16) -> Path:
    """Colour images of :func:`make_images` with the captions of their class in ``metadata.jsonl``."""
    make_images(folder, count, channels=3)
    files = sorted(p.relative_to(folder) for p in folder.rglob("*.png"))
    lines = [json.dumps({"file_name": str(f), "text": CAPTIONS["ab".index(f.parts[0])]}) for f in files]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def make_images(folder: Path, count: int = 64, size: int = 16, classes: int = 2, channels: int = 1) -> Path:
    """``count`` images of bars, horizontal ones in class a, vertical ones in class b."""
    draw = np.random.default_rng(0)
    for i in range(count):
        label = i % max(classes, 1)
        pixels = draw.integers(0, 60, (size, size)).astype(np.uint8)
        line, at = draw.integers(100, 255), draw.integers(0, size - 3)
        pixels[(slice(at, at + 3), slice(None)) if label else (slice(None), slice(at, at + 3))] = line
        image = Image.fromarray(pixels)
        target = folder / ("ab"[label] if classes else "") / f"{i:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        (image if channels == 1 else image.convert("RGB")).save(target)
    return folder


def tiny_config(folder: Path, **changes: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "tiny.json"
    file.write_text(json.dumps({**TINY, **changes}))
    return file


def config_file(folder: Path, config: dict[str, object]) -> Path:
    """The JSON file of a model config."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{config['_class_name']}.json"
    file.write_text(json.dumps(config))
    return file


def common(data: Path, output: Path, config: Path | None, steps: int, **options: object) -> list[str]:
    """Arguments of a short training."""
    values: dict[str, object] = {
        "train_data_dir": data,
        "output_dir": output,
        "max_train_steps": steps,
        "train_batch_size": 4,
        "lr_warmup_steps": 2,
        "learning_rate": 1e-3,
        "checkpointing_steps": 2,
        "num_validation_images": 0,
        "report_to": "none",
        "logging_steps": 1,
        **({} if config is None else {"model_config": config, "resolution": 16}),
        **options,
    }
    arguments = []
    for key, value in values.items():
        if value is not None and value is not False:
            arguments += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return arguments


def train_here(arguments: list[str]) -> int:
    """The script in this process; its exit status."""
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state(*([True] if state is AcceleratorState else []))
    os.environ["ACCELERATE_USE_CPU"] = "true"
    return main(arguments)


def launch(arguments: list[str], processes: int = 1, **environment: str) -> subprocess.Popen[str]:
    """The script through ``accelerate launch``, in its own process group."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--num_processes",
        str(processes),
        "--cpu",
    ]
    command += ["--main_process_port", "0", "-m", "diffusers_sde.train", *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def losses(output: Path) -> dict[int, float]:
    """The loss of each step."""
    with open(output / "loss.csv", newline="") as file:
        return {int(row[0]): float(row[1]) for row in list(csv.reader(file))[1:]}


def picture(number: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> Image.Image:
    """An image that is known by its constant value."""
    return Image.new("RGB", size, (number, 255 - number, 7)).convert(mode)


def png(image: Image.Image) -> bytes:
    image.save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


def write(folder: Path, files: dict[str, Image.Image | bytes]) -> Path:
    """A folder with these files."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else png(content))
    return folder
