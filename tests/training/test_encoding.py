"""Latents in the units of the network, against what stock pipelines make of an image."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import pytest
import torch
from tiny_pipelines import PIPELINES
from training_tasks import loss_of, text_task

from diffusers_sde.training.encoding import drawn, encoder_output, units_of

PIXELS = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
STATISTICS = {"latents_mean": [0.3, -0.2, 0.1, 1.0], "latents_std": [0.5, 2.0, 1.5, 0.7]}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def latents_of(vae: Any, pixels: torch.Tensor = PIXELS) -> torch.Tensor:
    return units_of(vae)(drawn(encoder_output(vae, pixels), [generator() for _ in pixels]))


def changed(vae: Any, **config: Any) -> Any:
    """A copy with other statistics in its config."""
    vae = copy.deepcopy(vae)
    vae.register_to_config(**config)
    return vae


def image_to_image(name: str, cls: Any, vae: Any, **more: Any) -> Any:
    parts = {**PIPELINES[name]()[0].components, **more, "vae": vae}
    return cls(**parts)


def test_statistics_of_channels_are_those_of_stable_diffusion_xl() -> None:
    """``(z - mean) scaling_factor / std``, as its image-to-image pipeline has it."""
    vae = changed(PIPELINES["sdxl"]()[0].vae, **STATISTICS)
    pipe = image_to_image("sdxl_img2img", diffusers.StableDiffusionXLImg2ImgPipeline, vae)
    expected = pipe.prepare_latents(PIXELS, None, 1, 1, torch.float32, "cpu", generator(), add_noise=False)
    torch.testing.assert_close(latents_of(vae), expected)


def test_latents_of_a_picture_in_an_autoencoder_of_videos_are_those_of_qwen_image() -> None:
    """A video of one frame; ``(z - mean) / std`` without a scaling factor."""
    vae = changed(PIPELINES["qwen_image"]()[0].vae, **STATISTICS)
    pipe = image_to_image("qwen_image", diffusers.QwenImageImg2ImgPipeline, vae)
    expected = pipe._encode_vae_image(PIXELS.unsqueeze(2), generator())
    torch.testing.assert_close(latents_of(vae), expected[:, :, 0])


def test_shift_and_scale_are_those_of_stable_diffusion_3() -> None:
    vae = PIPELINES["sd3"]()[0].vae
    with torch.no_grad():
        z = vae.encode(PIXELS).latent_dist.sample(generator())
    torch.testing.assert_close(latents_of(vae), (z - 0.0609) * 1.5035)


@pytest.mark.parametrize("kind", ["tiny", "deep"])
def test_encoders_without_a_distribution_draw_nothing(kind: str) -> None:
    if kind == "tiny":
        vae = diffusers.AutoencoderTiny(
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
            scaling_factor=0.5,
        )
    else:
        vae = changed(PIPELINES["sana"]()[0].vae, scaling_factor=0.5)
    with torch.no_grad():
        out = vae.encode(PIXELS)
    z = out.latents if kind == "tiny" else out.latent
    torch.testing.assert_close(latents_of(vae), 0.5 * z)


def test_a_pipeline_with_a_small_autoencoder_is_trained_without_a_cache() -> None:
    task = text_task("sd")
    task.pipe.vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    assert loss_of(task).isfinite()
