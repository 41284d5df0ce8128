"""``diffusers-sde bench --sections lora``: a style learned from 16 pictures, before and after side by side.

Knows how to make a folder of pictures in a style (white on blue) and how the training script is called; loads the
result as anybody would.  Writes ``lora.png`` and prints a table; asserts nothing.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diffusers_sde.assets import DEFAULT_MODEL, EXAMPLE_PROMPTS, load_default_model
from diffusers_sde.benchmarks.captions import features, read, samples
from diffusers_sde.benchmarks.common import print_table
from diffusers_sde.comparison.report import montage
from diffusers_sde.schedulers import ProbabilityFlowScheduler

COUNT, STEPS, RANK, SCALE = 16, 300, 8, 5.0
BLUE = (0.07, 0.23, 0.55)


def measure(seed: int = 0, training_images: str | None = None) -> None:
    """Train on ``COUNT`` pictures in the style and draw the example prompts with and without what was learned."""
    if training_images is None:
        print("\nlora: pass the emoji as --training_images, see diffusers-sde prepare noto-emoji.")
        return
    from diffusers_sde.training.command import main as train

    with tempfile.TemporaryDirectory() as folder:
        style = make_style(Path(training_images), Path(folder) / "style", seed)
        words = {
            "pretrained_model_name_or_path": DEFAULT_MODEL, "train_data_dir": Path(folder) / "style", "rank": RANK,
            "max_train_steps": STEPS, "train_batch_size": COUNT, "learning_rate": 2e-3, "num_validation_images": 0,
            "report_to": "none", "output_dir": Path(folder) / "out",
        }  # fmt: skip
        train([*(f"--{name}={value}" for name, value in words.items()), "--cache_latents"])
        pipe = load_default_model()
        pipe.scheduler = ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
        before = samples(pipe, list(EXAMPLE_PROMPTS), SCALE, seed)
        pipe.load_lora_weights(Path(folder) / "out")
        after = samples(pipe, list(EXAMPLE_PROMPTS), SCALE, seed)
    rows = [[name, f"{distance(made, style):.3f}"] for name, made in (("before", before), ("after", after))]
    print_table(f"Mean colours, distance to those of {COUNT} pictures of a style", ["", "distance"], rows)
    sheet = np.concatenate([montage(made * 2 - 1, 4) for made in (before, after)])
    picture = Image.fromarray((sheet * 255).round().astype(np.uint8))
    picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST).save("lora.png", optimize=True)
    print("Written to lora.png: above the model as it is, below with its LoRA weights.")


def make_style(source: Path, target: Path, seed: int) -> torch.Tensor:
    """A folder of ``COUNT`` of the pictures in ``source`` as white on blue, with their captions; returns them,
    (N, 3, H, W) in [0, 1]."""
    pictures, captions = read(source)
    chosen = np.random.default_rng(seed).choice(len(captions), COUNT, replace=False)
    target.mkdir(parents=True)
    drawn, lines = [], []
    for number in chosen:
        drawn.append(blueprint(pictures[number].numpy()))
        Image.fromarray((drawn[-1] * 255).round().astype(np.uint8)).save(target / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": captions[number][0]}))
    (target / "metadata.jsonl").write_text("\n".join(lines))
    return torch.from_numpy(np.stack(drawn)).movedim(-1, 1).float()


def blueprint(picture: np.ndarray) -> np.ndarray:
    """A picture (3, H, W) in [0, 1] as a print of one ink, its brightness inverted, (H, W, 3) in [0, 1]."""
    light = 1 - picture.mean(0)[..., None]
    return (1 - light) * np.array(BLUE) + light


def distance(made: torch.Tensor, style: torch.Tensor) -> float:
    """Root mean square difference of the mean colours of fields, over all pictures, of two sets."""
    return float((features(made).mean(0) - features(style).mean(0)).square().mean().sqrt())
