"""Tiny text-to-image pipelines in training: one step of a task, and the picture that its pipeline makes."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import torch
from tiny_pipelines import PIPELINES
from tiny_pipelines.common import TEXT_DIM
from training_helpers import TINY_TEXT_TRANSFORMER, TINY_VAE

from diffusers_sde.training import text_pipelines
from diffusers_sde.training.arguments import read_settings
from diffusers_sde.training.losses import make_loss
from diffusers_sde.training.networks import pipeline_task, process_scheduler

CAPTIONS = ["a cat on a mat", "two dogs"]
SIDES = {"sana": 32}  # of pictures, where not 16


def text_task(name: str) -> Any:
    """The task of a fresh copy of a tiny pipeline, at the size of its pictures."""
    return pipeline_task(copy.deepcopy(text_pipeline(name)), 0, captions=True, resolution=SIDES.get(name, 16))


def text_pipeline(name: str) -> Any:
    """A tiny pipeline of this name."""
    if name == "cogview4":
        torch.manual_seed(0)
        network = diffusers.CogView4Transformer2DModel.from_config(TINY_TEXT_TRANSFORMER)
        vae = diffusers.AutoencoderKL.from_config(TINY_VAE)
        return text_pipelines.new_pipeline(vae, network, process_scheduler("flow", "flow_prediction"), CAPTIONS, 8)
    pipe = PIPELINES[name]()[0]
    if name in STAND_INS:
        pipe.encode_prompt = STAND_INS[name]
    return pipe


def embedding(prompt: str) -> torch.Tensor:
    """One random vector for each character (length, width)."""
    return torch.stack([torch.randn(TEXT_DIM, generator=torch.Generator().manual_seed(ord(c))) for c in prompt or " "])


def masked_embeddings(prompt: list[str], **ignored: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In place of Qwen2.5-VL, as its pipeline has it: no mask for equal lengths."""
    texts = [embedding(text) for text in prompt]
    lengths = torch.tensor([len(text) for text in texts])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return torch.nn.utils.rnn.pad_sequence(texts, batch_first=True), None if mask.all() else mask


def listed_embeddings(
    prompt: list[str], do_classifier_free_guidance: bool = False, **ignored: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """In place of Qwen3, as lists of prompts and negative ones."""
    negative = [embedding("") for _ in prompt] if do_classifier_free_guidance else []
    return [embedding(text) for text in prompt], negative


STAND_INS = {"qwen_image": masked_embeddings, "z_image": listed_embeddings}


def settings(**options: Any) -> Any:
    """Those of a short training of a pipeline."""
    words = {"train_data_dir": "d", "output_dir": "o", "pretrained_model_name_or_path": "m", **options}
    return read_settings([word for key, value in words.items() for word in (f"--{key}", str(value))])


def loss_of(task: Any, **options: Any) -> torch.Tensor:
    """The loss of one batch of two random images with captions."""
    side = SIDES.get(next((n for n in SIDES if n in type(task.pipe).__name__.lower()), ""), 16)
    pixels = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
    batch = {"pixel_values": pixels, "positions": torch.arange(2), "caption": CAPTIONS}
    return make_loss(settings(label_dropout=0, **options), task, None, 2)(task.trained, batch)


def one_step(task: Any, learning_rate: float) -> None:
    """One step of Adam on this loss."""
    trainable = [p for p in task.trained.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=learning_rate)
    loss_of(task).backward()
    optimizer.step()


def picture(name: str, pipe: Any) -> torch.Tensor:
    """Latents that a pipeline makes in two steps."""
    pipe.set_progress_bar_config(disable=True)
    side = SIDES.get(name, 16)
    options: dict[str, Any] = {"use_resolution_binning": False} if name == "sana" else {}
    return pipe(
        prompt=CAPTIONS[:1],
        height=side,
        width=side,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images
