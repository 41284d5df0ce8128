"""HunyuanVideo, SkyReels and ChronoEdit, whose text comes as embeddings."""

from functools import lru_cache

import diffusers as d
import torch

from tiny_pipelines.common import (
    IMAGE_SIZE,
    TEXT_DIM,
    embedded_call,
    finish,
    generator,
    latent_call,
    random_image,
    register,
    seeded,
    stock,
)
from tiny_pipelines.text import clip_image_processor, clip_vision_model, t5_tokenizer, umt5_encoder
from tiny_pipelines.videos import wan_scheduler, wan_vae


@lru_cache
def hunyuan_transformer():
    return seeded(
        d.HunyuanVideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=8,
        rope_axes_dim=(2, 4, 4),
    )


@lru_cache
def hunyuan_vae():
    return seeded(
        d.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


@register
def hunyuan_video():
    """Its sigmas go from 1 towards 0, which it leaves out; text as embeddings, in place of a Llama."""
    pipe = d.HunyuanVideoPipeline(
        transformer=hunyuan_transformer(),
        scheduler=stock("FlowMatchEulerDiscreteScheduler", shift=7.0),
        vae=hunyuan_vae(),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    g = generator(3)
    kwargs = latent_call(4, prompt_embeds=torch.randn(1, 7, TEXT_DIM, generator=g), height=IMAGE_SIZE, width=IMAGE_SIZE)
    kwargs |= {"pooled_prompt_embeds": torch.randn(1, 8, generator=g), "prompt_attention_mask": torch.ones(1, 7)}
    return finish(pipe), kwargs | {"num_frames": 9}, (1, 4, 3, 2, 2)


def skyreels(prediction_type):
    scheduler = stock(
        "UniPCMultistepScheduler",
        prediction_type=prediction_type,
        use_flow_sigmas=True,
        flow_shift=8.0,
        num_train_timesteps=1000,
    )
    pipe = d.SkyReelsV2Pipeline(
        transformer=skyreels_transformer(),
        scheduler=scheduler,
        vae=wan_vae(),
        text_encoder=umt5_encoder(),
        tokenizer=t5_tokenizer(),
    )
    return finish(pipe), embedded_call(4, num_frames=9), (1, 16, 3, 2, 2)


@lru_cache
def skyreels_transformer():
    return seeded(
        d.SkyReelsV2Transformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        rope_max_seq_len=32,
    )


@register
def skyreels_flow():
    return skyreels("flow_prediction")


@register
def skyreels_sample():
    """Flow sigmas with a network that predicts the data."""
    return skyreels("sample")


@register
def skyreels_forcing():
    """Deep copies of the scheduler, one a frame, each stepped with a scalar timestep on one frame."""
    pipe = d.SkyReelsV2DiffusionForcingPipeline(
        transformer=skyreels_transformer(),
        scheduler=wan_scheduler(8.0),
        vae=wan_vae(),
        text_encoder=umt5_encoder(),
        tokenizer=t5_tokenizer(),
    )
    kwargs = embedded_call(4, num_frames=9, base_num_frames=9, prompt=None)
    return finish(pipe), kwargs, (1, 16, 3, 2, 2)


@lru_cache
def chronoedit_transformer():
    return seeded(
        d.ChronoEditTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=36,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=32,
        num_layers=1,
        image_dim=TEXT_DIM,
        rope_max_seq_len=32,
    )


@register
def chronoedit():
    """After two steps of temporal reasoning only the first and the last frame go on, in the scheduler's memory too."""
    pipe = d.ChronoEditPipeline(
        transformer=chronoedit_transformer(),
        scheduler=wan_scheduler(2.0),
        vae=wan_vae(),
        text_encoder=umt5_encoder(),
        tokenizer=t5_tokenizer(),
        image_encoder=clip_vision_model(),
        image_processor=clip_image_processor(),
    )
    kwargs = embedded_call(5, image=random_image(), num_frames=13)
    kwargs |= {"enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 2}
    return finish(pipe), kwargs, (1, 16, 2, 2, 2)
