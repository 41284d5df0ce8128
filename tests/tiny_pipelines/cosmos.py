"""Cosmos: EDM and steps taken twice (1), EDM called flow matching (2), flow matching on a Karras ramp (2.5)."""

from functools import lru_cache

import diffusers as d
import torch

from tiny_pipelines.common import (
    IMAGE_SIZE,
    TEXT_DIM,
    finish,
    generator,
    latent_call,
    random_image,
    register,
    seeded,
    sized_call,
    stock,
)
from tiny_pipelines.text import t5_text


class Unchecked:
    """In place of the guardrail, which these pipelines do not run without."""

    def to(self, device):
        return self

    def check_text_safety(self, prompt):
        return True

    def check_video_safety(self, video):
        return video


@lru_cache
def cosmos_transformer(in_channels, **kwargs):
    return seeded(
        d.CosmosTransformer3DModel,
        in_channels=in_channels,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        mlp_ratio=2,
        text_embed_dim=TEXT_DIM,
        adaln_lora_dim=4,
        max_size=(4, 16, 16),
        patch_size=(1, 2, 2),
        concat_padding_mask=False,
        **kwargs,
    )


@lru_cache
def cosmos_vae():
    return seeded(
        d.AutoencoderKLCosmos,
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,),
        resolution=64,
        num_layers=1,
        patch_size=2,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )


@lru_cache
def small_wan_vae():
    """Four latent channels in place of 16."""
    return seeded(
        d.AutoencoderKLWan,
        base_dim=3,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        z_dim=4,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def edm_scheduler():
    return stock(
        "EDMEulerScheduler",
        sigma_min=0.002,
        sigma_max=80.0,
        sigma_data=0.5,
        sigma_schedule="karras",
        final_sigmas_type="sigma_min",
    )


def video_call(steps, **kwargs):
    return sized_call(steps, max_sequence_length=16, **kwargs)


@register
def cosmos_text2world():
    """Asks `step` for the denoised sample, puts the step index back, and takes the step again, guided."""
    pipe = d.CosmosTextToWorldPipeline(
        transformer=cosmos_transformer(4, extra_pos_embed_type="learnable"),
        vae=cosmos_vae(),
        scheduler=edm_scheduler(),
        safety_checker=Unchecked(),
        **t5_text(),
    )
    return finish(pipe), video_call(4, num_frames=9), (1, 4, 3, 4, 4)


@register
def cosmos_video2world():
    """The same from a first frame; it also asks the scheduler for the input scale of any sigma."""
    pipe = d.CosmosVideoToWorldPipeline(
        transformer=cosmos_transformer(5, extra_pos_embed_type="learnable"),
        vae=cosmos_vae(),
        scheduler=edm_scheduler(),
        safety_checker=Unchecked(),
        **t5_text(),
    )
    return finish(pipe), video_call(4, num_frames=9, image=random_image()), (1, 4, 3, 4, 4)


def cosmos_2(cls, in_channels):
    """`FlowMatchEulerDiscreteScheduler` on sigmas up to 80: its step is Euler's in variance exploding coordinates."""
    return cls(
        transformer=cosmos_transformer(in_channels),
        vae=small_wan_vae(),
        scheduler=stock("FlowMatchEulerDiscreteScheduler", use_karras_sigmas=True),
        safety_checker=Unchecked(),
        **t5_text(),
    )


@register
def cosmos2_text2image():
    pipe = cosmos_2(d.Cosmos2TextToImagePipeline, 4)
    return finish(pipe), video_call(4), (1, 4, 2, 2)


@register
def cosmos2_video2world():
    pipe = cosmos_2(d.Cosmos2VideoToWorldPipeline, 5)
    return finish(pipe), video_call(4, num_frames=9, image=random_image()), (1, 4, 3, 2, 2)


@register
def cosmos2_5():
    """Karras and flow sigmas together: the flow levels s / (1 + s) of a Karras ramp."""
    scheduler = stock(
        "UniPCMultistepScheduler",
        use_karras_sigmas=True,
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        sigma_max=200.0,
        sigma_min=0.01,
    )
    pipe = d.Cosmos2_5_PredictBasePipeline(
        transformer=cosmos_transformer(5),
        vae=small_wan_vae(),
        scheduler=scheduler,
        safety_checker=Unchecked(),
        text_encoder=None,
        tokenizer=None,
    )
    embeds = torch.randn(2, 1, 8, TEXT_DIM, generator=generator(3))
    kwargs = latent_call(4, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], guidance_scale=4.0)
    kwargs |= {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_frames": 9}
    return finish(pipe), kwargs, (1, 4, 3, 2, 2)
