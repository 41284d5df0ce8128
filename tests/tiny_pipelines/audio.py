"""Audio."""

from functools import lru_cache

import diffusers as d

from tiny_pipelines.common import TEXT_DIM, finish, register, seeded, stock, text_call
from tiny_pipelines.text import t5_text


@lru_cache
def stable_audio_models():
    transformer = seeded(
        d.StableAudioDiTModel,
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        num_key_value_attention_heads=1,
        cross_attention_dim=8,
        cross_attention_input_dim=8,
        time_proj_dim=8,
        global_states_input_dim=16,
    )
    vae = seeded(
        d.AutoencoderOobleck,
        encoder_hidden_size=4,
        downsampling_ratios=[1, 2],
        channel_multiples=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        sampling_rate=4,
    )
    projection = seeded(
        d.StableAudioProjectionModel, text_encoder_dim=TEXT_DIM, conditioning_dim=8, min_value=0, max_value=32
    )
    return {"transformer": transformer, "vae": vae, "projection_model": projection}


@register
def stable_audio():
    scheduler = stock(
        "CosineDPMSolverMultistepScheduler",
        sigma_min=0.3,
        sigma_max=500.0,
        sigma_data=1.0,
        sigma_schedule="exponential",
        prediction_type="v_prediction",
    )
    pipe = d.StableAudioPipeline(scheduler=scheduler, **stable_audio_models(), **t5_text())
    return finish(pipe), text_call(4), (1, 4, 16)
