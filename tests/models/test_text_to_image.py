"""What a picture means, on the embedded text-to-image model: the tests that random weights cannot fail."""

import os
import subprocess
import sys

import diffusers
import pytest
import torch

from diffusers_sde import ProbabilityFlowScheduler
from diffusers_sde.assets import DEFAULT_MODEL, EXAMPLE_PROMPTS, load_default_model
from diffusers_sde.sampling import prompt_denoiser

STEPS = 8


@pytest.fixture(scope="module")
def pipe() -> diffusers.StableDiffusionPipeline:
    pipe = load_default_model()
    pipe.scheduler = ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: diffusers.DiffusionPipeline, prompts: list[str], seed: int = 0, **options: object) -> torch.Tensor:
    """Pictures (N, 3, 64, 64) in [0, 1], the same noise for the same seed."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    made = pipe(prompts, generator=generators, output_type="pt", **{"num_inference_steps": STEPS, **options}).images
    return made.float()


def test_it_is_stable_diffusion_in_the_small_and_stock_diffusers_alone_can_call_it() -> None:
    """At most 24 MB; a 64x64 picture from five words of code, without this package."""
    assert sum(file.stat().st_size for file in DEFAULT_MODEL.rglob("*") if file.is_file()) < 24e6
    program = f"""
import sys
from diffusers import DiffusionPipeline
image = DiffusionPipeline.from_pretrained({str(DEFAULT_MODEL)!r})("red apple", num_inference_steps=2).images[0]
print(image.size, image.mode, "diffusers_sde" in sys.modules)"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "(64, 64) RGB False"


def test_the_default_model_can_simply_be_called() -> None:
    pipe = load_default_model()
    assert type(pipe) is diffusers.StableDiffusionPipeline
    image = pipe("red apple", num_inference_steps=2).images[0]
    assert image.size == (64, 64)
    assert {p.dtype for p in pipe.unet.parameters()} == {p.dtype for p in pipe.text_encoder.parameters()}
    assert pipe.unet.dtype == pipe.vae.dtype == torch.float32


def test_colours_asked_for_are_drawn(pipe: diffusers.StableDiffusionPipeline) -> None:
    """The mean of what is not white is reddest for the red prompt, and so on."""
    words = ["red heart", "green heart", "blue heart"]
    images = draw(pipe, words, guidance_scale=5.0)
    drawn = (images.amin(1) < 0.8).float()
    colour = (images * drawn[:, None]).sum((2, 3)) / drawn.sum((1, 2))[:, None]
    assert colour.argmax(1).tolist() == [0, 1, 2]


@torch.no_grad()
def agreement(pipe: diffusers.StableDiffusionPipeline, images: torch.Tensor, prompts: list[str]) -> float:
    """How much better the network explains noised pictures with their prompts than without, the classifier that a
    guided model implies (Ho & Salimans 2022, arXiv:2207.12598, section 3.2): mean of ``|v - m_empty|^2 -
    |v - m_prompt|^2`` over five levels and a fixed noise."""
    latents = pipe.vae.encode(2 * images - 1).latent_dist.mean * pipe.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    told, untold = prompt_denoiser(pipe, prompts), prompt_denoiser(pipe, [""] * len(prompts))
    gains = []
    for t in (300, 450, 600, 750, 900):
        times = torch.full((len(prompts),), t)
        noised = pipe.scheduler.add_noise(latents, noise, times)
        velocity = pipe.scheduler.get_velocity(latents, noise, times)
        errors = [(velocity - denoiser(noised, t)).square().mean() for denoiser in (untold, told)]
        gains.append(float(errors[0] - errors[1]))
    return sum(gains) / len(gains)


def test_guidance_raises_agreement_with_the_prompt(pipe: diffusers.StableDiffusionPipeline) -> None:
    prompts = list(EXAMPLE_PROMPTS)
    found = [agreement(pipe, draw(pipe, prompts, guidance_scale=scale), prompts) for scale in (1.0, 3.0, 7.5)]
    shuffled = agreement(pipe, draw(pipe, prompts, guidance_scale=7.5), [*prompts[1:], prompts[0]])
    assert 0 < found[0] < found[1] < found[2] and shuffled < 0


def test_image_to_image_keeps_what_strength_promises(pipe: diffusers.StableDiffusionPipeline) -> None:
    """The more strength, the farther from the picture: from nearly itself to another one."""
    prompts = ["red apple", "tiger face"]
    given = draw(pipe, prompts, guidance_scale=5.0)
    change = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    change.set_progress_bar_config(disable=True)

    def distance(strength: float) -> float:
        made = draw(change, ["blue circle"] * 2, seed=7, image=given, strength=strength, num_inference_steps=10)
        return float((made - given).square().mean().sqrt())

    little, some, much, all_of_it = (distance(strength) for strength in (0.1, 0.4, 0.7, 1.0))
    assert little < some < much and min(much, all_of_it) > 2 * little  # from .7 on it is another picture


def test_inpainting_keeps_the_rest(pipe: diffusers.StableDiffusionPipeline) -> None:
    """The left half stays as the autoencoder has it, the right half is drawn anew."""
    given = draw(pipe, ["red apple"], guidance_scale=5.0)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    paint = diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    paint.set_progress_bar_config(disable=True)
    options = {"image": given, "mask_image": mask, "height": 64, "width": 64, "guidance_scale": 5.0}
    made = draw(paint, ["blue circle"], seed=7, **options)
    change = (made - given).square().mean((0, 1, 2)).sqrt()  # by column
    assert change[:28].max() < 0.1 and change[36:].mean() > 2 * change[:28].mean()
