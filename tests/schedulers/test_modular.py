"""Modular Diffusers: `update_components(scheduler=ours)` in pipelines made of blocks, with their guiders.

A guider combines its predictions before `step`, which sees only the sum; blocks look at the scheduler as pipelines do.
"""

import functools
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from five_schedulers import CalibratedScheduler, build_from, by_each
from tiny_pipelines import flow_images, generator, latent_images
from tiny_pipelines.common import IMAGE_SIZE, PROMPT, half_mask, random_image
from watching import watched

from diffusers_sde import ProbabilityFlowScheduler

TASKS = {
    "text2image": {},
    "image2image": {"image": random_image(), "strength": 0.5},
    "inpaint": {"image": random_image(), "mask_image": half_mask(), "strength": 0.5},
}
GUIDERS = {
    "classifier_free": functools.partial(diffusers.ClassifierFreeGuidance, guidance_scale=4.0),
    "adaptive_projected": functools.partial(diffusers.AdaptiveProjectedGuidance, guidance_scale=4.0),
    "tangential": functools.partial(diffusers.TangentialClassifierFreeGuidance, guidance_scale=4.0),
}
by_task = pytest.mark.parametrize("task", TASKS)
by_guider = pytest.mark.parametrize("guider", GUIDERS)


def sdxl():
    parts = latent_images.sdxl_parts()
    parts.pop("add_watermarker")
    pipe = diffusers.StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux():
    pipe = diffusers.FluxAutoBlocks().init_pipeline()
    pipe.update_components(**flow_images.flux_parts())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call(task, steps, **changes):
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    common = {"prompt": PROMPT, "generator": generator(), "num_inference_steps": steps, "output": "latents"}
    return {**common, **size, **TASKS[task], **changes}


@by_each
@by_guider
@by_task
def test_runs(task, guider, cls):
    """The blocks take our scheduler: finite latents, and one pair of evaluations a step that is left."""
    pipe = sdxl()
    pipe.update_components(scheduler=build_from(cls, pipe.scheduler.config, (10,)), guider=GUIDERS[guider]())
    assert type(pipe.scheduler) is cls
    steps = []
    step = functools.wraps(cls.step)(lambda *a, step=cls.step, **k: steps.append(1) or step(*a, **k))
    with mock.patch.object(cls, "step", step):
        latents = pipe(**call(task, 10))
    assert latents.shape == (1, 4, 8, 8) and latents.isfinite().all()
    assert len(steps) == (10 if task == "text2image" else 5)


@by_guider
@by_task
def test_first_order_on_the_grid_of_stock_is_stock(task, guider):
    """At order 1 on the stock timesteps the latents are those of DDIM, whatever the guider makes of the predictions."""
    pipe = sdxl()
    settings = {"set_alpha_to_one": True, "timestep_spacing": "trailing", "clip_sample": False}
    stock = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    ours = ProbabilityFlowScheduler.from_config(pipe.scheduler.config, solver_order=1)
    pipe.update_components(scheduler=stock, guider=GUIDERS[guider]())
    expected = pipe(**call(task, 10))  # a divisor of 1000: DDIM takes the next level to be T/n further on
    pipe.update_components(scheduler=ours, guider=GUIDERS[guider]())
    lay_out = ProbabilityFlowScheduler.set_timesteps

    @functools.wraps(lay_out)
    def on_stock_timesteps(self, num_inference_steps=None, device=None, **_):
        lay_out(self, timesteps=stock.timesteps, device=device)

    with mock.patch.object(ProbabilityFlowScheduler, "set_timesteps", on_stock_timesteps):
        found = pipe(**call(task, 10))
    assert (found - expected).norm() < 1e-3 * expected.norm()


@by_each
@pytest.mark.parametrize("task", ["text2image", "image2image"])
def test_flux_runs(task, cls):
    """The blocks of a flow model, whose sigmas are passed only to schedulers without flow sigmas of their own."""
    pipe = flux()
    pipe.update_components(scheduler=build_from(cls, pipe.scheduler.config, (10,)))
    latents = pipe(**call(task, 10, max_sequence_length=16))
    assert latents.isfinite().all()


@pytest.mark.parametrize("make", [sdxl, flux])
@pytest.mark.parametrize("strength", [0.2, 0.5, 0.8])
@by_each
def test_strength_keeps_its_meaning(cls, strength, make):
    """Image-to-image starts within 2 % of the level of equal steps, and noises the image to the level that the network
    first sees."""
    if cls is CalibratedScheduler and make is flux:
        pytest.skip("a calibration holds for one process: one pipeline shows it")
    pipe = make()
    pipe.update_components(scheduler=build_from(cls, pipe.scheduler.config, (20,)))
    text = {"max_sequence_length": 16} if make is flux else {}
    levels, times = watched(pipe, call("image2image", 20, strength=strength, **text), stop=True)
    path = pipe.scheduler.path
    if make is sdxl:
        wanted = path.alpha_sigma(1000 * strength - 1)[1]
    else:
        mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * (16 - 256)
        wanted = np.exp(mu) * strength / (1 + (np.exp(mu) - 1) * strength)
    assert path.alpha_sigma(times[0])[1] == pytest.approx(wanted, rel=0.02)
    np.testing.assert_allclose(levels[0][0], np.hstack(path.alpha_sigma(times[0])), atol=2e-4)


def test_changing_the_scheduler_between_calls():
    """Stock, ours, stock again on one pipeline: the third call is the first."""
    pipe = sdxl()
    stock = pipe.scheduler
    first = pipe(**call("text2image", 4))
    pipe.update_components(scheduler=ProbabilityFlowScheduler.from_config(stock.config))
    ours = pipe(**call("text2image", 4))
    again = pipe(**call("text2image", 4))
    pipe.update_components(scheduler=type(stock).from_config(pipe.scheduler.config))
    assert torch.equal(pipe(**call("text2image", 4)), first)
    assert torch.equal(ours, again) and not torch.equal(ours, first)


def test_saved_pipeline_names_our_class(tmp_path):
    """`save_pretrained` of the blocks' pipeline writes the scheduler, and loading it restores class and config."""
    pipe = sdxl()
    pipe.update_components(scheduler=ProbabilityFlowScheduler.from_config(pipe.scheduler.config, solver_order=3))
    pipe.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    again = diffusers.ModularPipeline.from_pretrained(str(tmp_path))
    again.load_components(names=["scheduler"])
    assert type(again.scheduler) is ProbabilityFlowScheduler
    assert again.scheduler.config.solver_order == 3
