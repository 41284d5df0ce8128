"""A pipeline's network outside its loop, told what the pipeline would tell it."""

import pytest
import torch
from tiny_pipelines import PIPELINES

from diffusers_sde import ProbabilityFlowScheduler
from diffusers_sde.conditioning import capture
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


def test_the_network_is_as_before_whatever_the_pipeline_says() -> None:
    pipe = PIPELINES["sd"]()[0]
    forward = pipe.unet.forward
    with pytest.raises(ValueError, match="has to be of type"):
        capture(pipe, prompt=3)
    assert pipe.unet.forward == forward


def test_packed_latents_are_refused() -> None:
    pipe, inputs, _ = PIPELINES["flux"]()
    with pytest.raises(ValueError, match="packs its latents"):
        capture(pipe, prompt=["a cat"], height=inputs["height"], width=inputs["width"])
