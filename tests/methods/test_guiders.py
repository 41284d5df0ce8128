"""CFG++ in a modular pipeline with the embedded text-to-image model: guider and scheduler are the paper's step."""

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.stable_diffusion_xl.denoise import StableDiffusionXLDenoiseStep

import diffusers_sde
from diffusers_sde.assets import load_default_model
from diffusers_sde.guiders import CFGPlusPlusGuidance

STEPS, STRENGTH = 3, 0.7


@pytest.fixture(scope="module")
def model():
    pipe = load_default_model()
    texts = pipe.encode_prompt(["red apple"], "cpu", 1, True)
    return pipe, {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}


def modular(pipe, components, **inputs):
    """The denoising loop of diffusers' modular blocks on the network of the model."""
    loop = StableDiffusionXLDenoiseStep().init_pipeline()
    loop.update_components(unet=pipe.unet, **components)
    loop.set_progress_bar_config(disable=True)
    scheduler = components["scheduler"]
    scheduler.set_timesteps(STEPS)
    given = {"timesteps": scheduler.timesteps, "num_inference_steps": STEPS, "output": "latents"}
    texts = inputs.pop("texts")
    return loop(**given, **inputs, denoiser_input_fields=texts)


def test_the_pair_is_the_step_of_cfg_plus_plus(model):
    """``alpha' (D_null + w (D - D_null)) + sigma' eps_null`` at every step, from the network's own predictions."""
    pipe, texts = model
    pair = diffusers_sde.cfg_plus_plus(pipe.scheduler.config, STRENGTH, grid="karras")
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    found = modular(pipe, pair, latents=start, texts=texts)
    at, x = pair["scheduler"].levels, start
    with torch.no_grad():
        for i, t in enumerate(pair["scheduler"].timesteps):
            alpha, sigma = float(at.alpha[i]), float(at.sigma[i])
            embeds = torch.cat([texts["negative_prompt_embeds"], texts["prompt_embeds"]])
            null, conditional = pipe.unet(torch.cat([x, x]), t, embeds).sample.chunk(2)  # v predictions
            data, noise = alpha * x - sigma * torch.lerp(null, conditional, STRENGTH), sigma * x + alpha * null
            x = float(at.alpha[i + 1]) * data + float(at.sigma[i + 1]) * noise
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-4)


def test_at_no_strength_it_is_unconditional_and_at_one_it_is_not_plain_guidance(model):
    pipe, texts = model
    start = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    nothing = modular(pipe, diffusers_sde.cfg_plus_plus(pipe.scheduler.config, 0.0), latents=start, texts=texts)
    null = {"prompt_embeds": texts["negative_prompt_embeds"], "negative_prompt_embeds": texts["negative_prompt_embeds"]}
    ddim = diffusers_sde.sampler("ddim", pipe.scheduler.config)
    plain = {"guider": diffusers.ClassifierFreeGuidance(1.0), "scheduler": ddim}
    torch.testing.assert_close(nothing, modular(pipe, plain, latents=start, texts=null), rtol=1e-4, atol=1e-4)
    whole = modular(pipe, diffusers_sde.cfg_plus_plus(pipe.scheduler.config, 1.0), latents=start, texts=texts)
    assert (whole - modular(pipe, plain, latents=start, texts=texts)).norm() > 0.05 * whole.norm()


def test_a_guider_alone_says_what_it_lacks(tmp_path):
    guider = CFGPlusPlusGuidance(0.5)
    guider.save_pretrained(tmp_path)
    again = CFGPlusPlusGuidance.from_pretrained(tmp_path)
    assert again.config.strength == 0.5
    with pytest.raises(ValueError, match=r"set guider\.scheduler"):
        again.set_state(0, 10, torch.tensor(999.0))
    with pytest.raises(ValueError, match="between 0 and 1"):
        CFGPlusPlusGuidance(7.5)
