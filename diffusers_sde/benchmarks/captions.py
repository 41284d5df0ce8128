"""``diffusers-sde bench --sections captions``: how often a text-to-image model draws what it is asked for.

Knows the embedded text-to-image models and how to find the training picture that a sample is nearest to.  Prints a
table; asserts nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from diffusers_sde.assets import embedded_models
from diffusers_sde.benchmarks.common import print_table
from diffusers_sde.conditioning import takes_prompts
from diffusers_sde.loading import load_pipeline
from diffusers_sde.schedulers import ProbabilityFlowScheduler

COUNT, BATCH, STEPS, SCALES = 100, 20, 20, (1.0, 5.0, 7.5)


def measure(seed: int = 0, training_images: str | None = None) -> None:
    """For ``COUNT`` captions, drawn from the names of the training pictures: how many samples are nearest to a picture
    that has this caption, in percent, by :func:`features`."""
    if training_images is None:
        print("\ncaptions: pass the emoji as --training_images, see diffusers-sde prepare noto-emoji.")
        return
    pictures, captions = read(Path(training_images))
    chosen = np.random.default_rng(seed).choice(len(captions), COUNT, replace=False)
    prompts = [captions[i][0] for i in chosen]
    known = features(pictures)
    rows = []
    for name in embedded_models():
        pipe = load_pipeline(name)
        if not takes_prompts(pipe):
            continue
        pipe.scheduler = ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
        right = []
        for scale in SCALES:
            nearest = torch.cdist(features(samples(pipe, prompts, scale, seed)), known).argmin(1).tolist()
            right.append(sum(prompt in captions[i] for prompt, i in zip(prompts, nearest, strict=True)))
        rows.append([name, *(f"{100 * number / COUNT:.0f} %" for number in right)])
    title = f"Samples nearest to a training picture of their caption: {COUNT} captions, {STEPS} evaluations"
    print_table(title, ["", *(f"guidance {scale:g}" for scale in SCALES)], rows)


def read(folder: Path) -> tuple[torch.Tensor, list[list[str]]]:
    """The training pictures (N, 3, H, W) in [0, 1], on white, and the captions of each, its name first."""
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    pictures = []
    for entry in entries:
        with Image.open(folder / entry["file_name"]) as image:
            pictures.append(torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0) / 255)
    return torch.stack(pictures), [entry["captions"] for entry in entries]


def features(pictures: torch.Tensor) -> torch.Tensor:
    """What pictures (N, 3, H, W) are compared by: the mean colours of 16x16 fields, (N, 768)."""
    return torch.nn.functional.adaptive_avg_pool2d(pictures, 16).flatten(1)


def samples(pipe: Any, prompts: list[str], scale: float, seed: int) -> torch.Tensor:
    """A picture (N, 3, H, W) in [0, 1] for each prompt, each with a seed of its own."""
    pipe.set_progress_bar_config(disable=True)
    made = []
    for first in tqdm(range(0, len(prompts), BATCH), desc=f"captions, guidance {scale:g}", leave=False):
        part = prompts[first : first + BATCH]
        generators = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        options: dict[str, Any] = {"num_inference_steps": STEPS, "guidance_scale": scale, "output_type": "np"}
        made.append(torch.from_numpy(pipe(part, generator=generators, **options).images).movedim(-1, 1))
    return torch.cat(made)
