"""Strength keeps its meaning: a run that starts inside the grid on noised data starts where equal steps of time would.

Image-to-image drops the first steps of a grid by their number, so the grid decides what `strength` means; the answer is
that of a stock scheduler with equal steps of time, whatever grid our defaults spend a whole run on.
"""

import diffusers
import numpy as np
import pytest
import torch
from five_schedulers import FIVE, build_from, by_each
from tiny_pipelines import PIPELINES
from watching import watched

from diffusers_sde import CalibratedScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler

STRENGTHS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
LATENT = ["sd_img2img", "sd_inpaint", "sdxl_img2img", "sdxl_refiner", "sdxl_inpaint"]
FLOW = ["sd3_img2img", "sd3_inpaint", "flux_img2img", "flux_inpaint"]
# These never set a begin index: only the timestep that they noise at says where the run starts.
WITHOUT_BEGIN_INDEX = ["kandinsky_2_2_img2img", "wan_video2video", "cogvideox_video2video"]
NAMES = [*LATENT, *FLOW, *WITHOUT_BEGIN_INDEX]
INPAINTING = ["sd_inpaint", "sdxl_inpaint", "sd3_inpaint", "flux_inpaint"]


def swapped(name, cls, steps, **changes):
    pipe, kwargs, _ = PIPELINES[name]()
    pipe.scheduler = build_from(cls, pipe.scheduler.config, (steps,), **changes)
    kwargs.pop("denoising_start", None)  # the refiner as a stand-alone image-to-image pipeline
    if name == "sdxl_refiner":
        kwargs["image"] = PIPELINES["sd_img2img"]()[1]["image"]
    return pipe, kwargs | {"num_inference_steps": steps}


def equal_steps(scheduler, steps, remaining):
    """The time of the first of the last ``remaining`` of equal steps of time from pure noise to data."""
    path, mu = scheduler.path, None
    if scheduler.config.use_dynamic_shifting:
        tokens, c = 16, scheduler.config  # of the tiny Flux
        slope = (c.max_shift - c.base_shift) / (c.max_image_seq_len - c.base_image_seq_len)
        mu = c.base_shift + slope * (tokens - c.base_image_seq_len)
    if not scheduler.config.use_flow_sigmas:
        return scheduler.config.num_train_timesteps * remaining / steps - 1
    u = remaining / steps
    shift = scheduler.config.shift if mu is None else np.exp(mu)
    return path.scale * shift * u / (1 + (shift - 1) * u)


@by_each
@pytest.mark.parametrize("name", NAMES)
def test_starts_at_the_level_of_equal_steps(name, cls):
    """At all strengths the network first sees a level within 2 % of that of equal steps, and the data was noised to
    the level that it sees."""
    if cls is CalibratedScheduler and name != "sd_img2img":
        pytest.skip("a calibration holds for one process: one pipeline shows it")
    steps = 50
    for strength in STRENGTHS:
        pipe, kwargs = swapped(name, cls, steps)
        levels, (time,) = watched(pipe, kwargs | {"strength": strength}, stop=True)
        path = pipe.scheduler.path
        sigma = float(path.alpha_sigma(time)[1])
        wanted = float(path.alpha_sigma(equal_steps(pipe.scheduler, steps, round(strength * steps)))[1])
        assert sigma == pytest.approx(wanted, rel=0.02), f"strength {strength}: t = {time}"
        for level, _ in levels:
            np.testing.assert_allclose(level, np.hstack(path.alpha_sigma(time)), atol=2e-4)
        assert levels or strength == 1.0  # some inpainting pipelines then start from noise alone


@pytest.mark.parametrize("name", [*LATENT, "flux_img2img", "flux_inpaint"])
def test_starts_where_stock_starts(name):
    """The same against stock: DDIM with trailing steps, or FlowMatchEuler on the equal sigmas that Flux passes."""
    for strength in (0.2, 0.5, 0.8):
        starts = []
        for swap in (False, True):
            pipe, kwargs = swapped(name, ProbabilityFlowScheduler, 50)
            path = pipe.scheduler.path
            if not swap:
                stock = PIPELINES[name]()[0].scheduler
                if not pipe.scheduler.config.use_flow_sigmas:
                    stock = diffusers.DDIMScheduler.from_config(stock.config, timestep_spacing="trailing")
                pipe.scheduler = stock
            levels, (time,) = watched(pipe, kwargs | {"strength": strength}, stop=True)
            starts.append([path.alpha_sigma(time)[1], *(level[1] for level, _ in levels)])
        expected, found = starts
        np.testing.assert_allclose(found, expected, rtol=0.02)


@pytest.mark.parametrize("cls", [ProbabilityFlowScheduler, ReverseSDEScheduler])
@pytest.mark.parametrize("name", ["sd_img2img", "sd3_img2img"])
def test_does_not_depend_on_the_number_of_steps(name, cls):
    """Strength .5 is one level at 10, 20 and 50 steps."""
    sigmas = []
    for steps in (10, 20, 50):
        pipe, kwargs = swapped(name, cls, steps)
        _, (time,) = watched(pipe, kwargs | {"strength": 0.5}, stop=True)
        sigmas.append(float(pipe.scheduler.path.alpha_sigma(time)[1]))
    np.testing.assert_allclose(sigmas, sigmas[0], rtol=0.02)


@by_each
@pytest.mark.parametrize("name", ["sd_img2img", "sd3_img2img", "flux_img2img", "wan_video2video"])
def test_the_rest_of_the_grid_is_spent_well(name, cls):
    """The evaluations that are left go strictly down from there, are those that `timesteps` announces, go at least as
    far down as equal steps would, and arrive at clean data."""
    pipe, kwargs = swapped(name, cls, 10)
    _, times = watched(pipe, kwargs | {"strength": 0.5, "guidance_scale": 1.0})
    times = times[:: len(times) // 5]  # some pipelines evaluate twice a step
    assert len(times) == 5
    assert np.all(np.diff(times) < 0)
    np.testing.assert_allclose(times, pipe.scheduler.timesteps[-5:].double(), rtol=1e-5)
    assert times[-1] <= equal_steps(pipe.scheduler, 10, 1) * 1.001
    assert pipe.scheduler.levels.sigma[-1] == 0
    np.testing.assert_allclose(pipe.scheduler.levels.time[-6:-1], times, rtol=1e-5)


@by_each
def test_the_next_call_has_the_whole_grid(cls):
    """An image-to-image call leaves nothing behind: the next layout is that of a new scheduler."""
    pipe, kwargs = swapped("sd_img2img", cls, 10)
    watched(pipe, kwargs | {"strength": 0.5})
    pipe.scheduler.set_timesteps(10)
    fresh = build_from(cls, PIPELINES["sd_img2img"]()[0].scheduler.config, (10,))
    fresh.set_timesteps(10)
    assert torch.equal(pipe.scheduler.timesteps, fresh.timesteps)
    assert torch.equal(pipe.scheduler.sigmas, fresh.sigmas)


@pytest.mark.parametrize("choice", [{"grid": "karras"}, {"grid": "power", "rho": 2.0}, {"use_karras_sigmas": True}])
def test_a_grid_that_the_user_chose_is_kept(choice):
    """Who names a grid gets its steps, from the one at the start index on."""
    pipe, kwargs = swapped("sd_img2img", ProbabilityFlowScheduler, 10, **choice)
    _, times = watched(pipe, kwargs | {"strength": 0.5, "guidance_scale": 1.0})
    pipe.scheduler.set_timesteps(10)
    np.testing.assert_allclose(times, pipe.scheduler.timesteps[5:].double(), rtol=1e-6)


def test_timesteps_that_the_user_passed_are_kept():
    pipe, kwargs = swapped("sd_img2img", ProbabilityFlowScheduler, 10)
    given = [999, 700, 450, 300, 220, 150, 90, 50, 20, 3]
    call = kwargs | {"timesteps": given, "num_inference_steps": None, "strength": 0.5, "guidance_scale": 1.0}
    levels, times = watched(pipe, call)
    assert times == given[5:]
    np.testing.assert_allclose(levels[0][0], np.hstack(pipe.scheduler.path.alpha_sigma(150)), atol=2e-4)


@pytest.mark.parametrize("cls", [cls for cls in FIVE if cls is not CalibratedScheduler])
@pytest.mark.parametrize("strength", [0.6, 1.0])
@pytest.mark.parametrize("name", INPAINTING)
def test_inpainting_noises_the_known_part_to_the_level_of_the_next_step(name, strength, cls):
    """After each step but the last the kept part of the picture is noised to the level that the network sees next."""
    pipe, kwargs = swapped(name, cls, 10)
    levels, times = watched(pipe, kwargs | {"strength": strength, "guidance_scale": 1.0})
    path = pipe.scheduler.path
    assert len(times) == round(10 * strength)
    for level, evaluations in levels:
        np.testing.assert_allclose(level, np.hstack(path.alpha_sigma(times[evaluations])), atol=2e-4)
    assert {evaluations for _, evaluations in levels} >= set(range(1, len(times)))


@by_each
@pytest.mark.parametrize("fraction", [0.4, 0.6, 0.8])
@pytest.mark.parametrize("refine", ["sdxl_refiner", "sdxl_inpaint"])
def test_base_and_refiner_agree_on_one_grid(refine, fraction, cls):
    """`denoising_end` and `denoising_start` hand latents over without noising them: both pipelines are on the grid of
    one whole run, each of its timesteps is evaluated once, in order."""
    base, kwargs = swapped("sdxl", cls, 10)
    whole = base.scheduler
    _, first = watched(base, kwargs | {"denoising_end": fraction, "guidance_scale": 1.0})
    second_pipe, kwargs = swapped(refine, cls, 10)
    kwargs |= {"image": torch.zeros(1, 4, 8, 8) if refine == "sdxl_refiner" else kwargs["image"]}
    _, second = watched(second_pipe, kwargs | {"denoising_start": fraction, "guidance_scale": 1.0})
    whole.set_timesteps(10)
    np.testing.assert_allclose([*first, *second], whole.timesteps.double(), rtol=1e-5)


def test_a_training_loop_is_not_taken_for_a_start():
    """`add_noise` at random timesteps of a batch leaves the grid of a laid-out scheduler alone."""
    scheduler = ProbabilityFlowScheduler()
    scheduler.set_timesteps(10)
    before = scheduler.timesteps.clone()
    data, noise = torch.zeros(4, 1, 8, 8), torch.ones(4, 1, 8, 8)
    noised = scheduler.add_noise(data, noise, torch.tensor([3, 250, 611, 998]))
    sigma = (1 - scheduler.alphas_cumprod[[3, 250, 611, 998]]).sqrt()
    torch.testing.assert_close(noised[:, 0, 0, 0], sigma, atol=1e-6, rtol=1e-5)
    assert torch.equal(scheduler.timesteps, before)


@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
def test_latent_consistency_lays_its_grid_below_the_strength(strength):
    """LCM's image-to-image passes `strength` to `set_timesteps` and runs all its steps: the first is where stock's is,
    and the image is noised to that level."""
    starts = []
    for swap in (False, True):
        pipe, kwargs, _ = PIPELINES["latent_consistency_img2img"]()
        path = ProbabilityFlowScheduler.from_config(pipe.scheduler.config).path
        if swap:
            pipe.scheduler = build_from(FIVE[-1], pipe.scheduler.config)
        levels, times = watched(pipe, kwargs | {"strength": strength})
        assert len(times) == 4
        starts.append([path.alpha_sigma(times[0])[1], levels[0][0][1]])
    np.testing.assert_allclose(starts[1], starts[0], rtol=0.02)
