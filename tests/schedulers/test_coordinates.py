"""The coordinates in which the network sees the state: native ones, EDM's preconditioning."""

import math

import diffusers
import pytest
import torch
from contract_helpers import EDM, FLOW, SHAPE, VP, by_class, by_every, laid_out, randn
from tiny_pipelines import cosine_dpm_solver


@by_every
@pytest.mark.parametrize("process", [VP, FLOW], ids=["vp", "flow"])
def test_native_coordinates(process, cls):
    """VP and flow: start from unit noise, and the network sees the state itself."""
    scheduler, x = laid_out(cls, **process), randn(*SHAPE)
    assert scheduler.init_noise_sigma == 1.0
    assert torch.equal(scheduler.scale_model_input(x, scheduler.timesteps[2]), x)
    assert torch.equal(scheduler.scale_model_input(x), x)


@by_class
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_preconditioning(name, kind, cls):
    """Timesteps, input scaling and data prediction are those of the EDM schedulers, at every step."""
    theirs = getattr(diffusers, name)(prediction_type=kind, sigma_max=70.0, sigma_data=0.6)
    ours = cls.from_config(theirs.config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(7)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    output = randn(*SHAPE, seed=3)
    for i, (mine, its) in enumerate(zip(ours.timesteps, theirs.timesteps, strict=True)):
        x = randn(*SHAPE, seed=i) * theirs.sigmas[i]
        torch.testing.assert_close(ours.scale_model_input(x, mine), theirs.scale_model_input(x, its))
        expected = theirs.precondition_outputs(x, output, theirs.sigmas[i])
        found = ours.step(output, mine, x, return_dict=False)[1]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        theirs._step_index += 1


@by_every
def test_edm_initial_noise(cls):
    """The initial state has the standard deviation of the noised data, sqrt(sigma_max^2 + sigma_data^2)."""
    assert cls(**EDM).init_noise_sigma == pytest.approx(math.hypot(80.0, 0.5))


@by_class
def test_cosine_conditioning(cls):
    """CosineDPMSolver's networks see 2/pi atan(sigma)."""
    theirs = cosine_dpm_solver()()
    ours = cls.from_config(theirs.config)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(7)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-6)
