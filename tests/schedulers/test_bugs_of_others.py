"""Bugs of diffusers' schedulers that ours do not have, each with the difference shown."""

import copy

import diffusers
import pytest
import torch
from contract_helpers import (
    FLOW,
    SHAPE,
    SOLVERS,
    VP,
    by_every,
    laid_out,
    loop,
    randn,
)
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

from diffusers_sde import DPMSolverScheduler, ProbabilityFlowScheduler


def test_cosine_betas_with_karras_grid():
    """diffusers 12771: cosine betas and a Karras grid give duplicate integer timesteps, and stock crashes there."""
    kwargs = {"beta_schedule": "squaredcos_cap_v2"}
    theirs = diffusers.DPMSolverMultistepScheduler(**kwargs, use_karras_sigmas=True)
    theirs.set_timesteps(30)
    assert len(theirs.timesteps.unique()) < 30
    ours = laid_out(ProbabilityFlowScheduler, 30, **kwargs, grid="karras")
    assert len(ours.timesteps.unique()) == 30
    assert loop(ours, randn(*SHAPE)).isfinite().all()


@by_every
def test_float_timesteps_are_found(cls):
    """diffusers 11749, 10584: a float timestep that was rounded on its way is not found; ours is."""
    scheduler = laid_out(cls, 7, **FLOW)
    rounded = scheduler.timesteps.to(torch.bfloat16)
    assert (rounded.float() != scheduler.timesteps).any()
    x = randn(*SHAPE)
    for i, t in enumerate(rounded[2:]):
        x = scheduler.step(randn(*SHAPE, seed=i), t, x, return_dict=False)[0]
        assert scheduler.step_index == i + 3


@pytest.mark.parametrize("cls", [DPMSolverScheduler, ProbabilityFlowScheduler])
def test_sigmas_with_dpm_solver_on_flow_models(cls):
    """diffusers 12108: flow pipelines cannot hand their sigmas to DPM-Solver++; to ours they can."""
    theirs = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="sigmas"):
        retrieve_timesteps(theirs, None, "cpu", sigmas=[1.0, 0.5])
    ours = cls.from_config(theirs.config)
    assert retrieve_timesteps(ours, None, "cpu", sigmas=[1.0, 0.5])[1] == 2
    assert loop(ours, randn(*SHAPE)).isfinite().all()


def test_float64_samples():
    """Stock UniPC crashes on float64 samples of a float32 network (noise prediction, order 3); nothing here does."""
    theirs = diffusers.UniPCMultistepScheduler(**VP, solver_order=3, predict_x0=False)
    theirs.set_timesteps(6)
    x = randn(*SHAPE, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="Double"):
        for t in theirs.timesteps:
            theirs.step(x.float(), t, x)
    for cls, kwargs in SOLVERS:
        scheduler = laid_out(cls, **VP, **kwargs)
        y = loop(scheduler, x, lambda x, t: 0.1 * x.float())
        assert y.dtype == torch.float64 and y.isfinite().all()


def test_flow_timesteps_are_not_truncated():
    """Stock UniPC and DPM-Solver truncate flow timesteps to integers while the state has the exact sigma."""
    kwargs = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    theirs = diffusers.UniPCMultistepScheduler(**kwargs)
    theirs.set_timesteps(7)
    assert (theirs.timesteps - 1000 * theirs.sigmas[:-1]).abs().max() > 0.1
    ours = ProbabilityFlowScheduler.from_config(theirs.config)
    ours.set_timesteps(7)
    assert (ours.timesteps - 1000 * ours.sigmas[:-1]).abs().max() < 1e-4


def test_trained_betas_are_not_shared():
    """Schedulers built from one config do not share mutable state: a copy runs on after the original has changed."""
    scheduler = ProbabilityFlowScheduler(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3)
    twin = copy.deepcopy(scheduler)
    scheduler.register_to_config(trained_betas=[0.3, 0.4, 0.5])
    torch.testing.assert_close(twin.betas, torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(scheduler.betas, torch.tensor([0.3, 0.4, 0.5]))
