"""Videos: Stable Video Diffusion, Wan, LTX, CogVideoX, Mochi and others."""

from functools import lru_cache

import diffusers as d
import torch

from tiny_pipelines.common import (
    IMAGE_SIZE,
    LATENT_SIZE,
    TEXT_DIM,
    embedded_call,
    finish,
    generator,
    latent_call,
    random_image,
    register,
    seeded,
    sized_call,
    stock,
    text_call,
)
from tiny_pipelines.text import (
    clip_image_encoder,
    clip_image_processor,
    t5_text,
    t5_tokenizer,
    umt5_encoder,
)


@lru_cache
def svd_models():
    unet = seeded(
        d.UNetSpatioTemporalConditionModel,
        sample_size=LATENT_SIZE,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        layers_per_block=1,
        num_attention_heads=(2, 4),
        cross_attention_dim=TEXT_DIM,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        num_frames=2,
    )
    vae = seeded(
        d.AutoencoderKLTemporalDecoder,
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
    )
    return {"unet": unet, "vae": vae}


@lru_cache
def wan_transformer(seed=0):
    return seeded(
        d.WanTransformer3DModel,
        seed=seed,
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )


@lru_cache
def wan_vae():
    return seeded(d.AutoencoderKLWan, base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1)


def random_video():
    return list(torch.rand(9, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator(1)))


@lru_cache
def ltx_transformer():
    return seeded(
        d.LTXVideoTransformer3DModel,
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=8,
        cross_attention_dim=32,
        num_layers=1,
        caption_channels=TEXT_DIM,
    )


@lru_cache
def ltx_vae():
    return seeded(
        d.AutoencoderKLLTXVideo,
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
    )


@lru_cache
def cogvideox_transformer():
    return seeded(
        d.CogVideoXTransformer3DModel,
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        time_embed_dim=4,
        text_embed_dim=TEXT_DIM,
        num_layers=1,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=16,
    )


@lru_cache
def cogvideox_vae():
    return seeded(
        d.AutoencoderKLCogVideoX,
        block_out_channels=(4, 4, 4, 4),
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )


@lru_cache
def mochi_transformer():
    return seeded(
        d.MochiTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        text_embed_dim=TEXT_DIM,
        time_embed_dim=4,
        max_sequence_length=16,
    )


@lru_cache
def mochi_vae():
    return seeded(
        d.AutoencoderKLMochi,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )


def wan_scheduler(shift):
    return stock(
        "UniPCMultistepScheduler",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
        num_train_timesteps=1000,
    )


@register
def wan():
    pipe = d.WanPipeline(
        transformer=wan_transformer(),
        scheduler=wan_scheduler(3.0),
        vae=wan_vae(),
        text_encoder=umt5_encoder(),
        tokenizer=t5_tokenizer(),
    )
    return finish(pipe), sized_call(4, num_frames=9, max_sequence_length=16), (1, 16, 3, 2, 2)


@register
def wan_video2video():
    """Never sets a begin index either; its cleaning of prompts needs a package that is not installed."""
    pipe = d.WanVideoToVideoPipeline(
        transformer=wan_transformer(),
        scheduler=wan_scheduler(3.0),
        vae=wan_vae(),
        text_encoder=umt5_encoder(),
        tokenizer=t5_tokenizer(),
    )
    kwargs = embedded_call(5, video=random_video(), strength=0.7)
    return finish(pipe), kwargs, (1, 16, 3, 2, 2)


@register
def ltx():
    scheduler = stock(
        "FlowMatchEulerDiscreteScheduler",
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    pipe = d.LTXPipeline(transformer=ltx_transformer(), scheduler=scheduler, vae=ltx_vae(), **t5_text())
    kwargs = text_call(4, height=32, width=32, num_frames=9, max_sequence_length=16)
    return finish(pipe), kwargs, (1, 3 * 8 * 8, 8)


def cogvideox_scheduler():
    return stock(
        "CogVideoXDDIMScheduler",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        set_alpha_to_one=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
    )


@register
def cogvideox():
    pipe = d.CogVideoXPipeline(
        transformer=cogvideox_transformer(), scheduler=cogvideox_scheduler(), vae=cogvideox_vae(), **t5_text()
    )
    return finish(pipe), sized_call(4, num_frames=9, max_sequence_length=16), (1, 3, 4, 2, 2)


@register
def cogvideox_video2video():
    """Never sets a begin index: the first timestep says where the run starts."""
    pipe = d.CogVideoXVideoToVideoPipeline(
        transformer=cogvideox_transformer(), scheduler=cogvideox_scheduler(), vae=cogvideox_vae(), **t5_text()
    )
    kwargs = sized_call(5, video=random_video(), strength=0.7, max_sequence_length=16)
    return finish(pipe), kwargs, (1, 3, 4, 2, 2)


@register
def mochi():
    """Inverted sigmas: the network is given 1 - sigma."""
    scheduler = stock("FlowMatchEulerDiscreteScheduler", invert_sigmas=True)
    pipe = d.MochiPipeline(transformer=mochi_transformer(), scheduler=scheduler, vae=mochi_vae(), **t5_text())
    return finish(pipe), sized_call(4, num_frames=7, max_sequence_length=16), (1, 12, 2, 2, 2)


@register
def svd():
    """Image to video, v-prediction in VE coordinates with continuous timesteps and an exact Karras grid."""
    scheduler = stock(
        "EulerDiscreteScheduler",
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        sigma_min=0.002,
        sigma_max=700.0,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    pipe = d.StableVideoDiffusionPipeline(
        scheduler=scheduler,
        image_encoder=clip_image_encoder(),
        feature_extractor=clip_image_processor(),
        **svd_models(),
    )
    kwargs = latent_call(4, image=random_image(), height=8, width=8, num_frames=2)
    return finish(pipe), kwargs, (1, 2, 4, 4, 4)


@register
def wan_2_2():
    """Two networks: one above the boundary of noise, one below it, with guidance scales of their own."""
    pipe = d.WanPipeline(
        transformer=wan_transformer(),
        transformer_2=wan_transformer(seed=1),
        boundary_ratio=0.875,
        scheduler=wan_scheduler(12.0),
        vae=wan_vae(),
        text_encoder=umt5_encoder(),
        tokenizer=t5_tokenizer(),
    )
    kwargs = sized_call(4, num_frames=9, max_sequence_length=16, guidance_scale_2=3.0)
    return finish(pipe), kwargs, (1, 16, 3, 2, 2)
