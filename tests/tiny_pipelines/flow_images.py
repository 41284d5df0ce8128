"""Images by flow matching: SD3, Flux, Sana, Qwen-Image, Z-Image."""

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
    latent_call,
    random_image,
    register,
    seeded,
    sized_call,
    stock,
    text_call,
)
from tiny_pipelines.latent_images import image_vae
from tiny_pipelines.text import (
    clip_text,
    clip_text_encoder_with_projection,
    clip_tokenizer,
    gemma,
    t5_encoder,
    t5_tokenizer,
)


def flow_vae(channels=4):
    scale = {"shift_factor": 0.0609, "scaling_factor": 1.5035}
    return image_vae(channels, use_quant_conv=False, use_post_quant_conv=False, **scale)


@lru_cache
def sd3_transformer(channels=4):
    return seeded(
        d.SD3Transformer2DModel,
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=channels,
        out_channels=channels,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=2 * TEXT_DIM,
        pos_embed_max_size=LATENT_SIZE,
    )


@lru_cache
def flux_transformer():
    return seeded(
        d.FluxTransformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        pooled_projection_dim=TEXT_DIM,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )


@lru_cache
def sana_transformer():
    return seeded(
        d.SanaTransformer2DModel,
        sample_size=LATENT_SIZE,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=TEXT_DIM,
    )


@lru_cache
def sana_vae():
    return seeded(
        d.AutoencoderDC,
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "ResBlock"),
        decoder_block_types=("ResBlock", "ResBlock"),
        encoder_block_out_channels=(4, 8),
        decoder_block_out_channels=(4, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
    )


def sd3_parts(channels=4):
    return {
        "transformer": sd3_transformer(channels),
        "scheduler": stock("FlowMatchEulerDiscreteScheduler", shift=3.0),
        "vae": flow_vae(channels),
        "text_encoder": clip_text_encoder_with_projection(),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": clip_text_encoder_with_projection(seed=1),
        "tokenizer_2": clip_tokenizer(),
        "text_encoder_3": t5_encoder(),
        "tokenizer_3": t5_tokenizer(),
    }


@register
def sd3():
    pipe = d.StableDiffusion3Pipeline(**sd3_parts())
    return finish(pipe), text_call(4, max_sequence_length=16), (1, 4, LATENT_SIZE, LATENT_SIZE)


def flux_parts():
    scheduler = stock(
        "FlowMatchEulerDiscreteScheduler",
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        shift=3.0,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    second = {"text_encoder_2": t5_encoder(), "tokenizer_2": t5_tokenizer()}
    return {"transformer": flux_transformer(), "scheduler": scheduler, "vae": flow_vae()} | clip_text() | second


@register
def flux():
    kwargs = sized_call(4, max_sequence_length=16)
    return finish(d.FluxPipeline(**flux_parts())), kwargs, (1, (LATENT_SIZE // 2) ** 2, 16)


@register
def flux_img2img():
    kwargs = sized_call(5, max_sequence_length=16, image=random_image(), strength=0.7)
    return finish(d.FluxImg2ImgPipeline(**flux_parts())), kwargs, (1, (LATENT_SIZE // 2) ** 2, 16)


@register
def sana():
    tokenizer, text_encoder = gemma()
    pipe = d.SanaPipeline(
        transformer=sana_transformer(),
        scheduler=stock("FlowMatchEulerDiscreteScheduler", shift=3.0),
        vae=sana_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
    )
    kwargs = text_call(4, height=32, width=32, max_sequence_length=16, use_resolution_binning=False)
    kwargs |= {"complex_human_instruction": None, "clean_caption": False}
    return finish(pipe), kwargs, (1, 4, 16, 16)


@register
def sd3_img2img():
    pipe = d.StableDiffusion3Img2ImgPipeline(**sd3_parts())
    kwargs = text_call(5, max_sequence_length=16, image=random_image(), strength=0.7)
    return finish(pipe), kwargs, (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def sd3_inpaint():
    """Insists on 16 channels."""
    pipe = d.StableDiffusion3InpaintPipeline(**sd3_parts(channels=16))
    kwargs = sized_call(5, max_sequence_length=16, image=random_image(), mask_image=half_mask(), strength=0.7)
    return finish(pipe), kwargs, (1, 16, LATENT_SIZE, LATENT_SIZE)


@register
def flux_inpaint():
    pipe = d.FluxInpaintPipeline(**flux_parts())
    kwargs = sized_call(5, max_sequence_length=16, image=random_image(), mask_image=half_mask(), strength=0.7)
    return finish(pipe), kwargs, (1, (LATENT_SIZE // 2) ** 2, 16)


@lru_cache
def qwen_transformer():
    return seeded(
        d.QwenImageTransformer2DModel,
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        axes_dims_rope=(4, 4, 8),
    )


@lru_cache
def qwen_vae():
    return seeded(
        d.AutoencoderKLQwenImage,
        base_dim=6,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


@register
def qwen_image():
    """True guidance, rescaled; a terminal shift. Its text comes as embeddings, in place of a Qwen2.5-VL."""
    scheduler = stock(
        "FlowMatchEulerDiscreteScheduler",
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
    )
    pipe = d.QwenImagePipeline(
        scheduler=scheduler, vae=qwen_vae(), text_encoder=None, tokenizer=None, transformer=qwen_transformer()
    )
    embeds = torch.randn(2, 1, 7, TEXT_DIM, generator=generator(3))
    kwargs = latent_call(4, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], true_cfg_scale=4.0)
    kwargs |= dict.fromkeys(["prompt_embeds_mask", "negative_prompt_embeds_mask"], torch.ones(1, 7, dtype=torch.long))
    return finish(pipe), kwargs | {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, (1, (LATENT_SIZE // 2) ** 2, 16)


@lru_cache
def z_image_transformer():
    transformer = seeded(
        d.ZImageTransformer2DModel,
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT_DIM,
        axes_dims=[8, 4, 4],
        axes_lens=[64, 16, 16],
    )
    with torch.no_grad():  # allocated without values
        transformer.x_pad_token.zero_()
        transformer.cap_pad_token.zero_()
    return transformer


@register
def z_image():
    """The network is given 1 - sigma and its output is negated. Its text comes as embeddings, in place of a Qwen3."""
    scheduler = stock("FlowMatchEulerDiscreteScheduler", shift=3.0)
    pipe = d.ZImagePipeline(
        scheduler=scheduler, vae=flow_vae(), text_encoder=None, tokenizer=None, transformer=z_image_transformer()
    )
    embeds = torch.randn(2, 7, TEXT_DIM, generator=generator(3))
    kwargs = latent_call(4, prompt_embeds=[embeds[0]], negative_prompt_embeds=[embeds[1]], guidance_scale=4.0)
    return finish(pipe), kwargs | {"height": IMAGE_SIZE, "width": IMAGE_SIZE}, (1, 4, LATENT_SIZE, LATENT_SIZE)


@lru_cache
def flux2_models():
    transformer = seeded(
        d.Flux2Transformer2DModel,
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_DIM,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    vae = seeded(
        d.AutoencoderKLFlux2,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=IMAGE_SIZE,
        layers_per_block=1,
    )
    return {"transformer": transformer, "vae": vae}


@register
def flux2():
    """An empirical mu; schedulers with flow sigmas are not given the pipeline's own. Text as embeddings."""
    scheduler = stock("FlowMatchEulerDiscreteScheduler", use_dynamic_shifting=True, shift=3.0)
    pipe = d.Flux2Pipeline(scheduler=scheduler, text_encoder=None, tokenizer=None, **flux2_models())
    embeds = torch.randn(1, 7, TEXT_DIM, generator=generator(3))
    kwargs = latent_call(4, prompt_embeds=embeds, guidance_scale=4.0, height=IMAGE_SIZE, width=IMAGE_SIZE)
    return finish(pipe), kwargs, (1, (LATENT_SIZE // 2) ** 2, 16)
