"""Stable Diffusion and its relatives: latent images, cross attention, variance preserving (or EDM) processes."""

from functools import lru_cache

import diffusers as d
import torch

from tiny_pipelines.common import (
    IMAGE_SIZE,
    LATENT_SIZE,
    TEXT_DIM,
    finish,
    generator,
    half_mask,
    random_image,
    register,
    seeded,
    sized_call,
    stock,
    text_call,
)
from tiny_pipelines.text import clip_text, clip_text_encoder_with_projection, clip_tokenizer, sdxl_text


@lru_cache
def image_vae(latent_channels=4, **kwargs):
    """Two levels, so that images are twice as large as latents."""
    return seeded(
        d.AutoencoderKL,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latent_channels,
        norm_num_groups=2,
        sample_size=IMAGE_SIZE,
        **kwargs,
    )


@lru_cache
def cross_attention_unet(in_channels=4, out_channels=4, cross_attention_dim=TEXT_DIM, **kwargs):
    return seeded(
        d.UNet2DConditionModel,
        sample_size=LATENT_SIZE,
        in_channels=in_channels,
        out_channels=out_channels,
        block_out_channels=(4, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=2,
        norm_num_groups=2,
        **kwargs,
    )


def sdxl_unet(cross_attention_dim, time_ids):
    return cross_attention_unet(
        cross_attention_dim=cross_attention_dim,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * time_ids + TEXT_DIM,
    )


def sd_parts(in_channels=4):
    scheduler = stock(
        "PNDMScheduler",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        skip_prk_steps=True,
        steps_offset=1,
    )
    parts = {"vae": image_vae(), "unet": cross_attention_unet(in_channels), "scheduler": scheduler, **clip_text()}
    return parts | {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@register
def sd():
    pipe = d.StableDiffusionPipeline(**sd_parts())
    return finish(pipe), text_call(4), (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def sd_img2img():
    pipe = d.StableDiffusionImg2ImgPipeline(**sd_parts())
    return finish(pipe), text_call(5, image=random_image(), strength=0.7), (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def sd_inpaint():
    """Four input channels: the known region is noised by `add_noise` at every step."""
    pipe = d.StableDiffusionInpaintPipeline(**sd_parts())
    kwargs = sized_call(5, image=random_image(), mask_image=half_mask(), strength=0.7)
    return finish(pipe), kwargs, (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def sd_inpaint_9_channels():
    pipe = d.StableDiffusionInpaintPipeline(**sd_parts(in_channels=9))
    mask = torch.ones(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    kwargs = sized_call(4, image=random_image(), mask_image=mask, strength=1.0)
    return finish(pipe), kwargs, (1, 4, LATENT_SIZE, LATENT_SIZE)


def ddim_scheduler():
    return stock(
        "DDIMScheduler",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def sdxl_scheduler():
    return stock(
        "EulerDiscreteScheduler",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        use_karras_sigmas=False,
    )


def sdxl_parts(scheduler=None):
    unet, scheduler = sdxl_unet(2 * TEXT_DIM, 6), scheduler or sdxl_scheduler()
    return {"vae": image_vae(), "unet": unet, "scheduler": scheduler, "add_watermarker": False, **sdxl_text()}


@register
def sdxl():
    return finish(d.StableDiffusionXLPipeline(**sdxl_parts())), text_call(4), (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def sdxl_refiner():
    """The second half of base + refiner: starts in the middle of the schedule, from latents that carry noise."""
    pipe = d.StableDiffusionXLImg2ImgPipeline(
        vae=image_vae(),
        unet=sdxl_unet(TEXT_DIM, 5),
        scheduler=sdxl_scheduler(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=clip_text_encoder_with_projection(),
        tokenizer_2=clip_tokenizer(),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )
    latents = torch.randn(1, 4, LATENT_SIZE, LATENT_SIZE, generator=generator(2))
    return finish(pipe), text_call(5, image=latents, denoising_start=0.6), tuple(latents.shape)


@register
def playground():
    """Playground v2.5: SDXL trained in EDM coordinates."""
    scheduler = stock("EDMDPMSolverMultistepScheduler", sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    return finish(d.StableDiffusionXLPipeline(**sdxl_parts(scheduler))), text_call(4), (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def playground_euler():
    scheduler = stock("EDMEulerScheduler", sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    return finish(d.StableDiffusionXLPipeline(**sdxl_parts(scheduler))), text_call(4), (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def sd_latent_upscale():
    """Reads `sigmas[i]` and preconditions the network by itself, in VE coordinates."""
    scheduler = stock(
        "EulerDiscreteScheduler",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="sample",
    )
    unet = cross_attention_unet(8, 5, time_cond_proj_dim=128 + TEXT_DIM)
    pipe = d.StableDiffusionLatentUpscalePipeline(vae=image_vae(), unet=unet, scheduler=scheduler, **clip_text())
    latents = torch.randn(1, 4, LATENT_SIZE, LATENT_SIZE, generator=generator(2))
    return finish(pipe), text_call(4, image=latents), (1, 4, 2 * LATENT_SIZE, 2 * LATENT_SIZE)


@register
def sdxl_img2img():
    """The stand-alone image-to-image of the base model."""
    pipe = d.StableDiffusionXLImg2ImgPipeline(**sdxl_parts())
    return finish(pipe), text_call(5, image=random_image(), strength=0.7), (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def sdxl_inpaint():
    pipe = d.StableDiffusionXLInpaintPipeline(**sdxl_parts())
    kwargs = sized_call(5, image=random_image(), mask_image=half_mask(), strength=0.7)
    return finish(pipe), kwargs, (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def panorama():
    """Two overlapping views of a wide picture, a saved copy of `scheduler.__dict__` for each."""
    pipe = d.StableDiffusionPanoramaPipeline(**sd_parts() | {"scheduler": ddim_scheduler()})
    kwargs = text_call(4, height=128, width=144)
    return finish(pipe), kwargs, (1, 4, 64, 72)


@lru_cache
def lcm_unet():
    return cross_attention_unet(time_cond_proj_dim=8)


def lcm_scheduler():
    return stock(
        "LCMScheduler",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        original_inference_steps=50,
        timestep_scaling=10.0,
    )


@register
def latent_consistency():
    """Passes `original_inference_steps` and ends on the denoised sample."""
    parts = sd_parts() | {"scheduler": lcm_scheduler(), "unet": lcm_unet()}
    kwargs = text_call(4, original_inference_steps=200, height=IMAGE_SIZE, width=IMAGE_SIZE)
    return finish(d.LatentConsistencyModelPipeline(**parts)), kwargs, (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def latent_consistency_img2img():
    """The same; `strength` is passed to `set_timesteps`, which lays the whole grid below it."""
    parts = sd_parts() | {"scheduler": lcm_scheduler(), "unet": lcm_unet()}
    kwargs = text_call(4, original_inference_steps=200, image=random_image(), strength=0.8)
    return finish(d.LatentConsistencyModelImg2ImgPipeline(**parts)), kwargs, (1, 4, LATENT_SIZE, LATENT_SIZE)
