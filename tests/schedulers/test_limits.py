"""Clipping, thresholding, zero terminal SNR and DDPM's variances."""

import diffusers
import pytest
import torch
from contract_helpers import (
    FIRST_ORDER,
    SHAPE,
    VP,
    by_class,
    by_every,
    by_process,
    gaussian,
    laid_out,
    loop,
    point,
    randn,
    seeded,
)

from diffusers_sde import DPMSolverScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.benchmarks.errors import final_variance

LIMITS = [
    {"clip_sample": True, "clip_sample_range": 1.0},
    {"clip_sample": True, "clip_sample_range": 0.6},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.5},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0},
    {"thresholding": True, "clip_sample": True, "sample_max_value": 2.0},
]


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_limits_equal_ddim(limits, kind):
    """Clipping and dynamic thresholding give DDIM's data prediction and, at first order, DDIM's step, to the end."""
    limits = {"clip_sample": False, **limits}
    theirs = diffusers.DDIMScheduler(**VP, **limits, prediction_type=kind, timestep_spacing="trailing")
    ours = ProbabilityFlowScheduler.from_config(theirs.config, **FIRST_ORDER, data_std=0.0)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(8)
    assert torch.equal(ours.timesteps, theirs.timesteps.float())
    x = randn(*SHAPE)
    for i, t in enumerate(theirs.timesteps):
        output = randn(*SHAPE, seed=i + 1)
        # DDIM keeps the unlimited noise unless told otherwise: with it the step is not a point of the path
        expected = theirs.step(output, t, x, use_clipped_model_output=True)
        found = ours.step(output, ours.timesteps[i], x)
        torch.testing.assert_close(found.pred_original_sample, expected.pred_original_sample, rtol=1e-4, atol=1e-4)
        if i < 7:  # DDIM's last step goes to its first training timestep, or to clean data
            torch.testing.assert_close(found.prev_sample, expected.prev_sample, rtol=1e-4, atol=1e-4)
        x = expected.prev_sample


@by_class
@by_process
def test_clipping_holds_in_every_class(process, cls):
    """With ``clip_sample`` no data prediction leaves the range, and the last sample is one."""
    scheduler = laid_out(cls, **process, clip_sample=True, clip_sample_range=0.3)
    x = randn(*SHAPE) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x, x0 = scheduler.step(gaussian(scheduler)(x, t), t, x, return_dict=False)
        assert x0.abs().max() <= 0.3 * (1 + 1e-5)


@by_class
@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_zero_terminal_snr(kind, cls):
    """Zero terminal SNR from its first timestep on is finite and right: a network that knows the data finds it."""
    final = {} if cls is DPMSolverScheduler else {"final": "denoise"}
    scheduler = laid_out(cls, 8, **VP, rescale_betas_zero_snr=True, prediction_type=kind, **final)
    assert scheduler.timesteps[0] == 999
    x0 = randn(*SHAPE, seed=1)
    torch.testing.assert_close(loop(scheduler, randn(*SHAPE), point(scheduler, x0)), x0, atol=1e-4, rtol=1e-4)


@by_every
def test_epsilon_at_zero_terminal_snr(cls):
    """There epsilon says nothing about the data: a ValueError that names the remedies instead of NaN."""
    scheduler = laid_out(cls, 8, **VP, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="v_prediction"):
        scheduler.step(randn(*SHAPE), scheduler.timesteps[0], randn(*SHAPE))


@by_every
def test_epsilon_below_zero_terminal_snr(cls):
    """From a first timestep below it, epsilon prediction works."""
    scheduler = cls(**VP, rescale_betas_zero_snr=True)
    scheduler.set_timesteps(timesteps=[980, 700, 400, 100])
    assert loop(scheduler, randn(*SHAPE)).isfinite().all()


def test_fixed_small_is_the_posterior_variance():
    """The first-order reverse SDE has DDPM's mean and fixed_small variance."""
    theirs = diffusers.DDPMScheduler(**VP, clip_sample=False, timestep_spacing="trailing")
    compare_with_ddpm(theirs)


def test_fixed_large():
    """With ``variance_type="fixed_large"`` it has DDPM's fixed_large variance."""
    theirs = diffusers.DDPMScheduler(**VP, clip_sample=False, timestep_spacing="trailing", variance_type="fixed_large")
    compare_with_ddpm(theirs)


@pytest.mark.parametrize("tau", [1.0, 0.5, 0.01])
def test_fixed_large_keeps_the_law_at_every_tau(tau):
    """N(0, 1/4) data keep their standard deviation within the error of 100 first-order steps, 4 %: the upper variance
    belongs to tau = 1, at a smaller one it is that of the same law with less noise."""
    scheduler = ReverseSDEScheduler(**VP, **FIRST_ORDER, variance_type="fixed_large", tau=tau, grid="trailing")
    assert final_variance(scheduler, 100, 0.5, 1.0) ** 0.5 == pytest.approx(0.5, rel=0.04)


def test_fixed_large_noise_shrinks_with_eta():
    """From pure noise DDIM's eta draws eta times DDPM's noise, .277 of a standard deviation at eta = .3 in 10 steps."""
    theirs = diffusers.DDPMScheduler(**VP, timestep_spacing="trailing", variance_type="fixed_large")
    ours = ReverseSDEScheduler.from_config(theirs.config, **FIRST_ORDER, data_std=0.0, eta=0.3)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    found = ours.step(randn(*SHAPE), ours.timesteps[0], randn(*SHAPE)).noise_std
    assert found == pytest.approx(0.3 * float(theirs._get_variance(theirs.timesteps[0])) ** 0.5, rel=2e-3)


def compare_with_ddpm(theirs):
    ours = ReverseSDEScheduler.from_config(theirs.config, **FIRST_ORDER, data_std=0.0)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(10)
    x, output = randn(*SHAPE), randn(*SHAPE, seed=1)
    for i, t in enumerate(theirs.timesteps[:-1]):
        found = ours.step(output, ours.timesteps[i], x)
        assert found.noise_std == pytest.approx(float(theirs._get_variance(t)) ** 0.5, rel=1e-4)
        draws = [theirs.step(output, t, x, generator=seeded()).prev_sample]
        noise = torch.randn(SHAPE, generator=seeded())
        torch.testing.assert_close(found.prev_sample_mean, draws[0] - found.noise_std * noise, atol=1e-4, rtol=1e-4)
