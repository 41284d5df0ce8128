"""Images in other ways: transformers without flow, pixel space, Kandinsky and its prior."""

from functools import lru_cache

import diffusers as d
import torch
from diffusers.pipelines.kandinsky.text_encoder import MCLIPConfig, MultilingualCLIP

from tiny_pipelines.common import (
    IMAGE_SIZE,
    LATENT_SIZE,
    PROMPT,
    TEXT_DIM,
    finish,
    generator,
    latent_call,
    random_image,
    register,
    seeded,
    stock,
    text_call,
)
from tiny_pipelines.latent_images import cross_attention_unet, image_vae
from tiny_pipelines.text import (
    clip_image_encoder,
    clip_image_processor,
    clip_text_encoder_with_projection,
    clip_tokenizer,
    t5_text,
    t5_tokenizer,
)


@lru_cache
def pixart_transformer():
    return seeded(
        d.PixArtTransformer2DModel,
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=3,
        cross_attention_dim=24,
        caption_channels=TEXT_DIM,
    )


@lru_cache
def dit_transformer():
    return seeded(
        d.DiTTransformer2DModel,
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        norm_num_groups=2,
    )


@lru_cache
def ddpm_unet():
    return seeded(
        d.UNet2DModel,
        sample_size=LATENT_SIZE,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


@lru_cache
def kandinsky_unet():
    return seeded(
        d.UNet2DConditionModel,
        sample_size=LATENT_SIZE,
        out_channels=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        addition_embed_type="image",
        encoder_hid_dim=TEXT_DIM,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )


@lru_cache
def kandinsky_text_unet():
    return seeded(
        d.UNet2DConditionModel,
        sample_size=LATENT_SIZE,
        out_channels=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        addition_embed_type="text_image",
        addition_embed_type_num_heads=2,
        encoder_hid_dim=TEXT_DIM,
        encoder_hid_dim_type="text_image_proj",
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
    )


@lru_cache
def multilingual_clip():
    config = MCLIPConfig(
        transformerDimSize=TEXT_DIM,
        imageDimSize=TEXT_DIM,
        hidden_size=TEXT_DIM,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=1,
        vocab_size=128,
    )
    return seeded(MultilingualCLIP, config)


@lru_cache
def kandinsky_movq():
    return seeded(
        d.VQModel,
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_type="spatial",
        num_vq_embeddings=8,
    )


@lru_cache
def kandinsky_prior_transformer():
    prior = seeded(
        d.PriorTransformer,
        num_attention_heads=2,
        attention_head_dim=8,
        embedding_dim=TEXT_DIM,
        num_layers=1,
        num_embeddings=16,
        additional_embeddings=4,
    )
    prior.clip_std.data.fill_(1.0)  # zero as built, and the embedding is multiplied by it
    return prior


@register
def pixart_alpha():
    """Learned sigma: the transformer returns 2C channels and the pipeline keeps the first half."""
    scheduler = stock(
        "DPMSolverMultistepScheduler", beta_start=0.0001, beta_end=0.02, beta_schedule="linear", solver_order=2
    )
    pipe = d.PixArtAlphaPipeline(transformer=pixart_transformer(), scheduler=scheduler, vae=image_vae(), **t5_text())
    kwargs = text_call(4, use_resolution_binning=False, clean_caption=False, max_sequence_length=16)
    return finish(pipe), kwargs, (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def dit():
    scheduler = stock("DDIMScheduler", beta_start=0.0001, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    pipe = d.DiTPipeline(transformer=dit_transformer(), scheduler=scheduler, vae=image_vae())
    kwargs = {"class_labels": [1], "generator": generator(), "num_inference_steps": 4, "output_type": "np"}
    return finish(pipe), kwargs, (1, IMAGE_SIZE, IMAGE_SIZE, 3)


@register
def ddpm():
    pipe = d.DDPMPipeline(unet=ddpm_unet(), scheduler=stock("DDPMScheduler", beta_schedule="linear"))
    kwargs = {"generator": generator(), "num_inference_steps": 5, "output_type": "np"}
    return finish(pipe), kwargs, (1, LATENT_SIZE, LATENT_SIZE, 3)


@register
def ddim():
    """Clips the data prediction; passes `use_clipped_model_output` and, where the signature has it, `eta`."""
    pipe = d.DDIMPipeline(unet=ddpm_unet(), scheduler=stock("DDIMScheduler", beta_schedule="linear"))
    kwargs = {"generator": generator(), "num_inference_steps": 5, "output_type": "np"}
    return finish(pipe), kwargs | {"use_clipped_model_output": True}, (1, LATENT_SIZE, LATENT_SIZE, 3)


@register
def kandinsky_decoder():
    """Learned-range variance: the scheduler itself is given 2C channels."""
    scheduler = stock(
        "DDPMScheduler",
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=True,
        clip_sample_range=2.0,
        thresholding=True,
        sample_max_value=2.0,
        variance_type="learned_range",
    )
    pipe = d.KandinskyV22Pipeline(unet=kandinsky_unet(), scheduler=scheduler, movq=kandinsky_movq())
    embeds = torch.randn(2, 1, TEXT_DIM, generator=generator(3))
    kwargs = latent_call(
        4, image_embeds=embeds[0], negative_image_embeds=embeds[1], height=IMAGE_SIZE, width=IMAGE_SIZE
    )
    return finish(pipe), kwargs, (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def kandinsky_prior():
    """Predicts the sample, passes `prev_timestep`, and has a diffusion over vectors instead of images."""
    scheduler = stock(
        "UnCLIPScheduler",
        variance_type="fixed_small_log",
        prediction_type="sample",
        num_train_timesteps=1000,
        clip_sample_range=5.0,
    )
    pipe = d.KandinskyV22PriorPipeline(
        prior=kandinsky_prior_transformer(),
        image_encoder=clip_image_encoder(),
        text_encoder=clip_text_encoder_with_projection(),
        tokenizer=clip_tokenizer(),
        scheduler=scheduler,
        image_processor=clip_image_processor(),
    )
    kwargs = {"prompt": PROMPT, "generator": generator(), "num_inference_steps": 4, "output_type": "pt"}
    return finish(pipe), kwargs, (1, TEXT_DIM)


@register
def deepfloyd_if():
    """Pixel space, cosine betas, learned-range variance; reads `variance_type` unguarded."""
    scheduler = stock(
        "DDPMScheduler",
        beta_schedule="squaredcos_cap_v2",
        dynamic_thresholding_ratio=0.95,
        sample_max_value=1.5,
        thresholding=True,
        variance_type="learned_range",
    )
    pipe = d.IFPipeline(
        unet=cross_attention_unet(3, 6),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        watermarker=None,
        requires_safety_checker=False,
        **t5_text(),
    )
    kwargs = text_call(4, clean_caption=False, height=LATENT_SIZE, width=LATENT_SIZE) | {"output_type": "pt"}
    return finish(pipe), kwargs, (1, 3, LATENT_SIZE, LATENT_SIZE)


@register
def kandinsky_img2img():
    """Kandinsky 2.1: noises the image by itself, from `alphas_cumprod` at a timestep that it computes by itself."""
    scheduler = stock(
        "DDIMScheduler",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        thresholding=False,
    )
    pipe = d.KandinskyImg2ImgPipeline(
        text_encoder=multilingual_clip(),
        movq=kandinsky_movq(),
        tokenizer=t5_tokenizer(),
        unet=kandinsky_text_unet(),
        scheduler=scheduler,
    )
    embeds = torch.randn(2, 1, TEXT_DIM, generator=generator(3))
    kwargs = text_call(5, image=random_image(), strength=0.7, height=IMAGE_SIZE, width=IMAGE_SIZE)
    kwargs |= {"image_embeds": embeds[0], "negative_image_embeds": embeds[1], "output_type": "pt"}
    return finish(pipe), kwargs, (1, 3, IMAGE_SIZE, IMAGE_SIZE)


@register
def kandinsky_2_2_img2img():
    scheduler = stock("DDPMScheduler", beta_start=0.00085, beta_end=0.012, beta_schedule="linear", clip_sample=False)
    pipe = d.KandinskyV22Img2ImgPipeline(unet=kandinsky_unet(), scheduler=scheduler, movq=kandinsky_movq())
    embeds = torch.randn(2, 1, TEXT_DIM, generator=generator(3))
    kwargs = latent_call(5, image_embeds=embeds[0], negative_image_embeds=embeds[1], image=random_image())
    return (
        finish(pipe),
        kwargs | {"strength": 0.7, "height": IMAGE_SIZE, "width": IMAGE_SIZE},
        (1, 4, LATENT_SIZE, LATENT_SIZE),
    )
