"""The models that ship with the package.  Knows where they lie; loads them with diffusers, whose text-to-image
pipelines are imported when one is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers

from diffusers_sde.class_conditional import ClassConditionalPipeline
from diffusers_sde.models.classifier import NoisyClassifierModel

ASSETS = Path(__file__).parent
DEFAULT_MODEL = ASSETS / "emoji"
FLOW_MODEL = ASSETS / "emoji_flow"
FASHION_MODEL = ASSETS / "fashion_mnist"
FLOW_MAP_MODEL = ASSETS / "flow_maps" / "fashion_mnist"

# what the text-to-image models are asked for where nobody says what: easy and hard ones of many kinds
EXAMPLE_PROMPTS = (
    "red apple",
    "grinning face with sunglasses",
    "tiger face",
    "rocket",
    "slice of pizza",
    "sunflower",
    "hot air balloon",
    "soccer ball",
)


def embedded_models() -> dict[str, Path]:
    """The folder of each embedded pipeline by its name, the default one first."""
    folders = sorted(file.parent for file in ASSETS.glob("*/model_index.json"))
    return {folder.name: folder for folder in sorted(folders, key=lambda folder: folder != DEFAULT_MODEL)}


def shared_parts(folder: Path) -> dict[str, Any]:
    """The components of an embedded pipeline that lie with another one, to be handed to ``from_pretrained``."""
    if folder != FLOW_MODEL:
        return {}
    return {"vae": diffusers.AutoencoderKL.from_pretrained(DEFAULT_MODEL, subfolder="vae")}


def load_default_model() -> diffusers.StableDiffusionPipeline:
    """The embedded text-to-image model (float32): ``load_default_model()("red apple").images[0]`` is a 64x64 emoji.

    Scaled-linear betas, v prediction, 4x16x16 latents; Stable Diffusion's process and pipeline in the small.
    """
    return diffusers.StableDiffusionPipeline.from_pretrained(DEFAULT_MODEL)


def load_flow_model() -> diffusers.CogView4Pipeline:
    """The flow-matching sibling of the default model (float32): a transformer on the latents of the same autoencoder,
    which is stored once."""
    return diffusers.CogView4Pipeline.from_pretrained(FLOW_MODEL, **shared_parts(FLOW_MODEL))


def load_fashion_model() -> ClassConditionalPipeline:
    """The embedded class-conditional Fashion-MNIST model (float32): labels 0..9, null label 10, 1x32x32 in [-1, 1];
    ``load_fashion_model()("sneaker").images[0]``."""
    return ClassConditionalPipeline.from_pretrained(FASHION_MODEL)


def load_default_classifier() -> NoisyClassifierModel:
    """``log p(label | x_t, t)`` up to a constant for noisy pictures of the Fashion-MNIST model's process, for
    classifier guidance (float32)."""
    return NoisyClassifierModel.from_pretrained(FASHION_MODEL / "classifier")


def load_default_flow_map() -> ClassConditionalPipeline:
    """The few-step form of the Fashion-MNIST model: a ``FlowMapUNet2DModel`` with guidance 2 built in (float32) and its
    :class:`FlowMapScheduler`, distilled from it."""
    return ClassConditionalPipeline.from_pretrained(FLOW_MAP_MODEL)
