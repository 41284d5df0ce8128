"""New text-to-image pipelines: an autoencoder that is there, a fresh network, and a text encoder made of the captions.

Knows the stock pipelines that are content with one small text encoder: ``StableDiffusionPipeline`` around a
``UNet2DConditionModel`` and, for flow matching, ``CogView4Pipeline`` around a ``CogView4Transformer2DModel``.  Knows
nothing of losses, data sets or optimizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers

from diffusers_sde.configs import path_from_config
from diffusers_sde.errors import UsageError
from diffusers_sde.stock_configs import canonical_config
from diffusers_sde.training.text import make_text_encoder, make_tokenizer

COGVIEW_MULTIPLE = 16  # CogView4Pipeline fills prompts up to a multiple of so many tokens, from the left
COGVIEW_LONGEST = 1024  # and cuts them here


def load_autoencoder(source: str) -> diffusers.AutoencoderKL:
    """The autoencoder of a folder or of the Hub, or that of a pipeline there; frozen.

    Raises:
        UsageError: where there is none.
    """
    subfolder = "vae" if (Path(source) / "vae").is_dir() else None
    try:
        vae = diffusers.AutoencoderKL.from_pretrained(source, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--vae_model_name_or_path {source} holds no AutoencoderKL: pass the folder of one."
        ) from error
    return vae.float().requires_grad_(False).eval()


def default_text_network(sample_size: int, channels: int, flow: bool) -> Any:
    """A network for small latents that attends to a text of width 128: for ``flow`` a ``CogView4Transformer2DModel`` of
    5 layers of width 256 on patches of 2x2 (4.8 M parameters), else a ``UNet2DConditionModel`` of widths 64, 96, 160
    with one layer a block and attention below the first level (7.4 M).

    Raises:
        UsageError: for a side that does not halve as often.
    """
    divisor = 2 if flow else 4
    if sample_size % divisor:
        raise UsageError(
            f"Latents of {sample_size}x{sample_size} do not fit the default network: pass a --resolution that makes "
            f"their side a multiple of {divisor}, or --model_config."
        )
    if flow:
        return diffusers.CogView4Transformer2DModel(
            sample_size=sample_size,
            in_channels=channels,
            out_channels=channels,
            num_layers=5,
            num_attention_heads=8,
            attention_head_dim=32,
            text_embed_dim=128,
            time_embed_dim=48,
            condition_dim=16,
            pos_embed_max_size=sample_size,
        )
    return diffusers.UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(64, 96, 160),
        layers_per_block=1,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        norm_num_groups=16,
        attention_head_dim=(2, 3, 5),  # diffusers' name for the number of heads
        cross_attention_dim=128,
    )


def new_pipeline(vae: Any, network: Any, scheduler: Any, captions: Sequence[str], side: float) -> Any:
    """A stock pipeline of an autoencoder and a new network, with a tokenizer and a new text encoder made for
    ``captions`` and for the width that the network attends to.

    Args:
        side: of the latents of the training images.

    Raises:
        UsageError: for a network that does not attend to text or fits neither the latents nor the forward process.
    """
    make = {
        diffusers.UNet2DConditionModel: _stable_diffusion,
        diffusers.CogView4Transformer2DModel: _cogview,
    }.get(type(network))
    if make is None:
        raise UsageError(
            "A new text-to-image model needs a UNet2DConditionModel or a CogView4Transformer2DModel, not a "
            f"{type(network).__name__}: correct --model_config, or leave it out."
        )
    flow = path_from_config(canonical_config(scheduler.config)).family == "flow matching"
    if flow != (make is _cogview):
        raise UsageError(
            f"{type(network).__name__} does not go with this --path: a new flow model is a CogView4Transformer2DModel, "
            "one of another process a UNet2DConditionModel; correct --model_config, or leave it out."
        )
    if network.config.in_channels != vae.config.latent_channels:
        raise UsageError(
            f"The network takes {network.config.in_channels} channels, the latents have {vae.config.latent_channels}: "
            "correct --model_config, or leave it out."
        )
    if network.config.sample_size != side:
        raise UsageError(
            f"The network makes latents of side {network.config.sample_size}, those of the training images have "
            f"{side:g}: pass another --resolution, or correct --model_config."
        )
    return make(vae, network, scheduler, captions)


def _stable_diffusion(vae: Any, network: Any, scheduler: Any, captions: Sequence[str]) -> Any:
    tokenizer = make_tokenizer(captions)
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=make_text_encoder(tokenizer, network.config.cross_attention_dim),
        tokenizer=tokenizer,
        unet=network,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _cogview(vae: Any, network: Any, scheduler: Any, captions: Sequence[str]) -> Any:
    # padded on the left, as the pipeline goes on to pad, so that a prompt's tokens stand where they do in any batch
    tokenizer = make_tokenizer(captions, COGVIEW_MULTIPLE, padding_side="left")
    return diffusers.CogView4Pipeline(
        vae=vae,
        text_encoder=make_text_encoder(tokenizer, network.config.text_embed_dim, positions=COGVIEW_LONGEST),
        tokenizer=tokenizer,
        transformer=network,
        scheduler=scheduler,
    )
