"""Real diffusers pipelines with tiny random weights, built without the Hub.

Every builder in `PIPELINES` returns `(pipe, call_kwargs, expected_shape)`: a pipeline with the stock scheduler of its
published checkpoint, the arguments of one call, and the shape of `pipe(**call_kwargs)[0]`. Weights are cached and
shared (nothing here trains them); the scheduler and the generator are new at every call.
"""

import importlib
import importlib.util
import string
import sys
import types
from functools import lru_cache
from unittest import mock

import diffusers as d
import torch
import transformers as tr

PROMPT = "a cat on a mat"
TEXT_DIM = 32
IMAGE_SIZE = 16
LATENT_SIZE = 8
PIPELINES = {}


def register(builder):
    PIPELINES[builder.__name__] = builder
    return builder


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def seeded(build, *args, seed=0, **kwargs):
    """Build a module from a fixed seed, leaving the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(*args, **kwargs).eval()


def finish(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock(name, **config):
    """A scheduler as `from_pretrained` makes it: its config has `_class_name`, and marks the keys that are defaults."""
    cls = cosine_dpm_solver() if name == "CosineDPMSolverMultistepScheduler" else getattr(d, name)
    return cls.from_config({"_class_name": name, "_diffusers_version": "0.30.0", **config})


def cosine_dpm_solver():
    """Its module imports torchsde, which need not be installed; independent increments do for one run."""
    if importlib.util.find_spec("torchsde"):
        return d.CosineDPMSolverMultistepScheduler

    class BrownianInterval:
        def __init__(self, size, entropy=0, **kwargs):
            self.size, self.generator = size, generator(entropy % 2**31)

        def __call__(self, t0, t1):
            return torch.randn(self.size, generator=self.generator) * abs(float(t1) - float(t0)) ** 0.5

    torchsde = types.ModuleType("torchsde")
    torchsde.BrownianInterval = BrownianInterval
    with mock.patch.dict(sys.modules, torchsde=torchsde):
        module = importlib.import_module("diffusers.schedulers.scheduling_cosine_dpmsolver_multistep")
    return module.CosineDPMSolverMultistepScheduler


def latent_call(steps, **kwargs):
    return {"generator": generator(), "num_inference_steps": steps, "output_type": "latent", **kwargs}


def text_call(steps, **kwargs):
    return latent_call(steps, prompt=PROMPT, guidance_scale=4.0, **kwargs)


def sized_call(steps, **kwargs):
    return text_call(steps, height=IMAGE_SIZE, width=IMAGE_SIZE, **kwargs)


def random_image(size=IMAGE_SIZE):
    return torch.rand(1, 3, size, size, generator=generator(1))


# --- text ------------------------------------------------------------------------------------------------------------


@lru_cache
def clip_tokenizer():
    characters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    pieces = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    return tr.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)


@lru_cache
def clip_text_config():
    tokenizer = clip_tokenizer()
    return tr.CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=TEXT_DIM,
        projection_dim=TEXT_DIM,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=16,
    )


@lru_cache
def clip_text_encoder():
    return seeded(tr.CLIPTextModel, clip_text_config())


@lru_cache
def clip_text_encoder_with_projection(seed=0):
    return seeded(tr.CLIPTextModelWithProjection, clip_text_config(), seed=seed)


@lru_cache
def clip_image_encoder():
    config = tr.CLIPVisionConfig(
        hidden_size=TEXT_DIM,
        projection_dim=TEXT_DIM,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    return seeded(tr.CLIPVisionModelWithProjection, config)


@lru_cache
def clip_image_processor():
    return tr.CLIPImageProcessor(size=IMAGE_SIZE, crop_size=IMAGE_SIZE)


@lru_cache
def t5_tokenizer():
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *(("▁" + c, -2.0) for c in string.ascii_lowercase)]
    vocab += [(c, -3.0) for c in string.ascii_lowercase + "▁"]
    return tr.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=16)


@lru_cache
def t5_encoder(encoder=tr.T5EncoderModel, config=tr.T5Config):
    config = config(vocab_size=128, d_model=TEXT_DIM, d_kv=8, d_ff=37, num_layers=2, num_heads=4)
    return seeded(encoder, config)


def umt5_encoder():
    return t5_encoder(tr.UMT5EncoderModel, tr.UMT5Config)


@lru_cache
def gemma():
    tokenizer = tr.GemmaTokenizer()
    config = tr.Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_DIM,
        head_dim=8,
        intermediate_size=37,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=2,
    )
    return tokenizer, seeded(tr.Gemma2Model, config)


def t5_text():
    return {"text_encoder": t5_encoder(), "tokenizer": t5_tokenizer()}


def clip_text():
    return {"text_encoder": clip_text_encoder(), "tokenizer": clip_tokenizer()}


def sdxl_text():
    second = {"text_encoder_2": clip_text_encoder_with_projection(), "tokenizer_2": clip_tokenizer()}
    return clip_text() | second


# --- autoencoders and denoisers --------------------------------------------------------------------------------------


@lru_cache
def image_vae(**kwargs):
    """Two levels, so that images are twice as large as latents."""
    return seeded(
        d.AutoencoderKL,
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=IMAGE_SIZE,
        **kwargs,
    )


def flow_vae():
    return image_vae(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.0609, scaling_factor=1.5035)


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
def sd3_transformer():
    return seeded(
        d.SD3Transformer2DModel,
        sample_size=LATENT_SIZE,
        patch_size=2,
        in_channels=4,
        out_channels=4,
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


@lru_cache
def wan_transformer():
    return seeded(
        d.WanTransformer3DModel,
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


# --- pipelines -------------------------------------------------------------------------------------------------------


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
    mask = torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    mask[..., : IMAGE_SIZE // 2] = 1
    kwargs = sized_call(5, image=random_image(), mask_image=mask, strength=0.7)
    return finish(pipe), kwargs, (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def sd_inpaint_9_channels():
    pipe = d.StableDiffusionInpaintPipeline(**sd_parts(in_channels=9))
    mask = torch.ones(1, 1, IMAGE_SIZE, IMAGE_SIZE)
    kwargs = sized_call(4, image=random_image(), mask_image=mask, strength=1.0)
    return finish(pipe), kwargs, (1, 4, LATENT_SIZE, LATENT_SIZE)


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


def sdxl_base(scheduler):
    return d.StableDiffusionXLPipeline(
        vae=image_vae(), unet=sdxl_unet(2 * TEXT_DIM, 6), scheduler=scheduler, add_watermarker=False, **sdxl_text()
    )


@register
def sdxl():
    return finish(sdxl_base(sdxl_scheduler())), text_call(4), (1, 4, LATENT_SIZE, LATENT_SIZE)


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
    return finish(sdxl_base(scheduler)), text_call(4), (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def playground_euler():
    scheduler = stock("EDMEulerScheduler", sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, rho=7.0)
    return finish(sdxl_base(scheduler)), text_call(4), (1, 4, LATENT_SIZE, LATENT_SIZE)


@register
def sd3():
    pipe = d.StableDiffusion3Pipeline(
        transformer=sd3_transformer(),
        scheduler=stock("FlowMatchEulerDiscreteScheduler", shift=3.0),
        vae=flow_vae(),
        text_encoder=clip_text_encoder_with_projection(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text_encoder_with_projection(seed=1),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(),
        tokenizer_3=t5_tokenizer(),
    )
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
def wan():
    pipe = d.WanPipeline(
        transformer=wan_transformer(),
        scheduler=stock(
            "UniPCMultistepScheduler",
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=3.0,
            num_train_timesteps=1000,
        ),
        vae=wan_vae(),
        text_encoder=umt5_encoder(),
        tokenizer=t5_tokenizer(),
    )
    return finish(pipe), sized_call(4, num_frames=9, max_sequence_length=16), (1, 16, 3, 2, 2)


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


@register
def cogvideox():
    scheduler = stock(
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
    pipe = d.CogVideoXPipeline(
        transformer=cogvideox_transformer(), scheduler=scheduler, vae=cogvideox_vae(), **t5_text()
    )
    return finish(pipe), sized_call(4, num_frames=9, max_sequence_length=16), (1, 3, 4, 2, 2)


@register
def mochi():
    """Inverted sigmas: the network is given 1 - sigma."""
    scheduler = stock("FlowMatchEulerDiscreteScheduler", invert_sigmas=True)
    pipe = d.MochiPipeline(transformer=mochi_transformer(), scheduler=scheduler, vae=mochi_vae(), **t5_text())
    return finish(pipe), sized_call(4, num_frames=7, max_sequence_length=16), (1, 12, 2, 2, 2)


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
