"""A pipeline's network outside its loop, told what the pipeline would tell it."""

import diffusers
import pytest
import torch
from tiny_pipelines import PIPELINES
from training_tasks import text_pipeline

from diffusers_sde import ProbabilityFlowScheduler
from diffusers_sde.conditioning import bytes_of, capture, pack, remembered, unpack
from diffusers_sde.sampling import prompt_denoiser, sample

PROMPTS = ["a cat on a mat", "two dogs"]


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
def test_a_network_called_outside_its_pipeline_makes_the_pipelines_picture(name: str, scale: float) -> None:
    """Same start, same scheduler, guidance against the empty prompt."""
    pipe = PIPELINES[name]()[0]
    pipe.scheduler = ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 3, "guidance_scale": scale, "output_type": "latent"}
    expected = pipe(PROMPTS, latents=noise, negative_prompt=["", ""], **options).images
    denoiser = prompt_denoiser(pipe, PROMPTS, scale)
    pipe.scheduler.set_timesteps(3)
    torch.testing.assert_close(sample(denoiser, pipe.scheduler, noise), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["flux", "qwen_image", "z_image"])
def test_networks_that_do_not_take_pictures_make_the_pipelines_picture_too(name: str) -> None:
    """Packed latents with shapes or ids, lists with time running backwards; prompts of different lengths."""
    pipe = text_pipeline(name)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 3, "output_type": "latent", "height": 16, "width": 16}
    given = noise if name == "z_image" else pack(noise)
    unguided = {"guidance_scale": 0.0} if name == "z_image" else {}
    expected = pipe(PROMPTS, latents=given, **options, **unguided).images
    timesteps = pipe.scheduler.timesteps  # with the shift of this size
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    denoiser = prompt_denoiser(pipe, PROMPTS, height=16, width=16)
    pipe.scheduler.set_timesteps(sigmas=(timesteps / 1000).tolist())
    made = sample(denoiser, pipe.scheduler, noise)
    torch.testing.assert_close(made if name == "z_image" else pack(made), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("cls", [diffusers.FluxPipeline, diffusers.QwenImagePipeline])
def test_packed_latents_are_those_of_the_pipelines(cls: type) -> None:
    latents = torch.randn(2, 3, 4, 6)
    packed = cls._pack_latents(latents, 2, 3, 4, 6)
    assert torch.equal(pack(latents), packed) and torch.equal(unpack(packed, latents.shape), latents)


def test_a_pipelines_random_numbers_are_not_drawn_from_the_global_generator() -> None:
    pipe = PIPELINES["sd"]()[0]
    before = torch.get_rng_state()
    capture(pipe, prompt=["a cat"])
    assert torch.equal(before, torch.get_rng_state())


def test_conditions_are_kept_within_their_bytes_those_used_last() -> None:
    made = []

    def make(key: int) -> dict:
        made.append(key)
        return {"text": torch.zeros(10), "more": {"list": [torch.zeros(5, dtype=torch.float16)]}}

    given = remembered(make, 120)
    assert bytes_of(given(0)) == 50
    for key in (1, 0, 2, 0, 1):  # 2 takes the place of 1, for 0 was used since
        given(key)
    assert made == [0, 1, 2, 1]


def test_the_network_is_as_before_whatever_the_pipeline_says() -> None:
    pipe = PIPELINES["sd"]()[0]
    forward = pipe.unet.forward
    with pytest.raises(ValueError, match="has to be of type"):
        capture(pipe, prompt=3)
    assert pipe.unet.forward == forward


def test_packed_latents_are_refused() -> None:
    pipe, inputs, _ = PIPELINES["flux2"]()
    with pytest.raises(ValueError, match="packs its latents"):
        capture(pipe, **{key: inputs[key] for key in ("prompt_embeds", "height", "width")})
