"""``set_timesteps``: what a run's timesteps and sigmas are, for every way in which pipelines lay one out."""

import inspect
import math

import diffusers
import numpy as np
import pytest
import torch
from contract_helpers import (
    EDM,
    FLOW,
    PUBLIC,
    SHAPE,
    VP,
    by_class,
    by_every,
    by_process,
    laid_out,
    loop,
    point,
    randn,
    relative,
)
from diffusers.pipelines.flux.pipeline_flux import retrieve_timesteps

from diffusers_sde import DPMSolverScheduler, ProbabilityFlowScheduler


@pytest.mark.parametrize("cls", PUBLIC, ids=lambda cls: cls.__name__)
def test_set_timesteps_signature(cls):
    """``sigmas``, ``timesteps`` and ``mu`` are found by introspection, and all arguments are optional."""
    parameters = inspect.signature(cls.set_timesteps).parameters
    assert {"num_inference_steps", "device", "sigmas", "mu", "timesteps"} <= set(parameters)
    assert all(p.default is None for name, p in parameters.items() if name != "self")


@by_every
@by_process
def test_steps_terminal_and_types(process, cls):
    """``n`` timesteps and ``n + 1`` sigmas, float32 tensors, the last sigma 0."""
    scheduler = laid_out(cls, 7, **process)
    assert scheduler.timesteps.shape == (7,) and scheduler.sigmas.shape == (8,)
    assert scheduler.timesteps.dtype == scheduler.sigmas.dtype == torch.float32
    assert scheduler.sigmas[-1] == 0
    assert (scheduler.sigmas.diff() < 0).all()
    assert scheduler.num_inference_steps == 7


@by_class
@pytest.mark.parametrize("n", [1, 2, 3, 50, 999, 1000])
@by_process
def test_any_number_of_steps(process, n, cls):
    """From one step to as many as were trained: distinct timesteps of decreasing noise."""
    scheduler = laid_out(cls, n, **process)
    assert len(scheduler.timesteps) == n
    assert (scheduler.sigmas.diff() < 0).all()


@by_every
def test_sigmas_without_number_of_steps(cls):
    """Flow pipelines pass ``sigmas`` and ``num_inference_steps=None``, by way of ``retrieve_timesteps``."""
    scheduler = cls(**FLOW)
    timesteps, n = retrieve_timesteps(scheduler, None, "cpu", sigmas=np.linspace(1.0, 0.25, 4))
    assert n == len(timesteps) == 4


@by_every
def test_timesteps_without_number_of_steps(cls):
    """The same for ``timesteps``."""
    timesteps, n = retrieve_timesteps(cls(**VP), None, "cpu", timesteps=[999, 600, 100])
    assert n == 3 and timesteps.tolist() == [999, 600, 100]


@by_every
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor], ids=["list", "numpy", "torch"])
def test_sigmas_of_any_type(kind, cls):
    """Lists, arrays and tensors of sigmas are the same."""
    scheduler = cls(use_flow_sigmas=True)
    scheduler.set_timesteps(sigmas=kind([1.0, 0.5, 0.25]))
    assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.25, 0.0]


@by_every
def test_mu_without_dynamic_shifting(cls):
    """Pipelines pass ``mu`` also where dynamic shifting is off: it changes nothing, on any process."""
    for process in (VP, FLOW, EDM):
        plain, given = cls(**process), cls(**process)
        plain.set_timesteps(5)
        given.set_timesteps(5, mu=1.7)
        assert torch.equal(plain.sigmas, given.sigmas) and torch.equal(plain.timesteps, given.timesteps)


@by_every
@pytest.mark.parametrize("terminal", [[0.0], []], ids=["with_terminal", "without"])
def test_sigma_list_of_vp(terminal, cls):
    """Euler and AYS lists include the terminal 0; without it one is added.  No evaluation is spent on it."""
    sigmas = [14.615, 6.475, 1.886, 0.399, 0.029]
    scheduler = cls(**VP)
    scheduler.set_timesteps(sigmas=sigmas + terminal)
    assert len(scheduler.timesteps) == 5
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([*sigmas, 0.0]))


def test_sigma_list_of_vp_means_stock_timesteps():
    """Its timesteps are those of EulerDiscrete within the error of that class's rule (linear in log sigma)."""
    sigmas = [14.0, 6.475, 1.886, 0.399, 0.04]
    theirs, ours = diffusers.EulerDiscreteScheduler(**VP), ProbabilityFlowScheduler(**VP)
    theirs.set_timesteps(sigmas=[*sigmas, 0.0])
    ours.set_timesteps(sigmas=[*sigmas, 0.0])
    torch.testing.assert_close(ours.timesteps, theirs.timesteps.float(), atol=0.02, rtol=1e-4)


@by_every
def test_timestep_list_of_vp(cls):
    """Custom timesteps have the noise levels of training."""
    times = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24]
    scheduler = cls(**VP)
    scheduler.set_timesteps(timesteps=times)
    abar = diffusers.DDIMScheduler(**VP).alphas_cumprod.double()[times]
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), ((1 - abar) / abar).sqrt(), rtol=1e-5, atol=0)


@by_class
@pytest.mark.parametrize("settings", [{}, {"rho": 5.0}, {"sigma_schedule": "exponential"}], ids=str)
def test_ramp_of_edm(settings, cls):
    """EDM pipelines pass a ramp from 0 to 1 as ``sigmas``: the timesteps and sigmas of EDMEuler."""
    theirs = diffusers.EDMEulerScheduler(**settings)
    ours = cls.from_config(theirs.config)
    ramp = torch.linspace(0, 1, 9)
    theirs.set_timesteps(sigmas=ramp)
    ours.set_timesteps(sigmas=ramp)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)


@by_class
@by_process
def test_written_sigma_takes_effect(process, cls):
    """``scheduler.sigmas[-1] = scheduler.sigmas[-2]`` before the first step: the last step goes nowhere (a corrector
    would still redo the step before it)."""
    options = {**process} if cls is DPMSolverScheduler else {**process, "corrector": False}
    scheduler = laid_out(cls, **options)
    scheduler.sigmas[-1] = scheduler.sigmas[-2]
    states = []
    end = loop(scheduler, randn(*SHAPE) * scheduler.init_noise_sigma, states=states)
    plain = laid_out(cls, **options)
    unchanged = loop(plain, randn(*SHAPE) * scheduler.init_noise_sigma)
    assert relative(end, unchanged) > (1e-6 if process is EDM else 1e-3)
    torch.testing.assert_close(end, states[-1], atol=1e-5, rtol=1e-5)


def test_written_sigma_is_the_step_to_that_level():
    """Any written sigma is where its step goes: a network that knows the data ends on the path at that level."""
    scheduler = laid_out(ProbabilityFlowScheduler, **VP, data_std=0.0)
    scheduler.sigmas[-1] = 0.05
    x0, eps = randn(*SHAPE, seed=1), randn(*SHAPE)
    x = scheduler.add_noise(x0, eps, scheduler.timesteps[:1])
    alpha = 1 / math.hypot(1, 0.05)
    torch.testing.assert_close(
        loop(scheduler, x, point(scheduler, x0)), alpha * (x0 + 0.05 * eps), atol=1e-4, rtol=1e-4
    )


@by_every
def test_flow_timesteps_are_1000_sigma(cls):
    """As floats, not truncated to integers as in stock UniPC and DPM-Solver."""
    scheduler = laid_out(cls, 7, **FLOW)
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1], rtol=1e-6, atol=0)
    assert (scheduler.timesteps != scheduler.timesteps.round()).any()


@pytest.mark.parametrize(
    "config, mu",
    [
        ({"shift": 3.0}, None),
        ({"shift": 3.0, "use_dynamic_shifting": True}, 0.9),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 1.7),
        ({"shift": 3.0, "shift_terminal": 0.1}, None),
        ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 0.8),
        ({"shift": 2.5, "invert_sigmas": True}, None),
    ],
    ids=str,
)
def test_shifts_of_given_sigmas_equal_stock(config, mu):
    """For given sigmas: static or dynamic shift, then stretched to the terminal, then inverted, as FlowMatchEuler."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    ours = ProbabilityFlowScheduler.from_config(theirs.config)
    sigmas = np.linspace(1.0, 1 / 8, 8)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-5, atol=1e-3)


@by_class
def test_shift_is_applied_once(cls):
    """On the default grid sigma = shift u / (1 + (shift - 1) u) with u = 1, 7/8, ...; FlowMatchEuler shifts twice."""
    scheduler = laid_out(cls, 8, **FLOW, grid="trailing")
    u = torch.arange(8, 0, -1) / 8
    torch.testing.assert_close(scheduler.sigmas[:-1], 3 * u / (1 + 2 * u))


@by_class
def test_dynamic_shifting_needs_mu(cls):
    """Without ``mu`` a ValueError names it."""
    scheduler = cls(use_flow_sigmas=True, use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="mu"):
        scheduler.set_timesteps(5)


@by_every
def test_timesteps_and_sigmas_together(cls):
    """The network sees ``timesteps``, the state has ``sigmas``."""
    scheduler = cls(**{**FLOW, "shift": 1.0})
    scheduler.set_timesteps(timesteps=[900.0, 400.0], sigmas=[1.0, 0.5])
    assert scheduler.timesteps.tolist() == [900.0, 400.0]
    assert scheduler.sigmas.tolist() == [1.0, 0.5, 0.0]
    x, x0 = randn(*SHAPE), randn(*SHAPE, seed=1)
    out = scheduler.step(x - x0, scheduler.timesteps[0], x)  # at sigma = 1 the flow x - x0 says x0
    torch.testing.assert_close(out.pred_original_sample, x0, atol=1e-6, rtol=1e-6)


@by_every
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_inference_steps": 0},
        {"timesteps": []},
        {"num_inference_steps": 5, "timesteps": [999, 500]},
        {"timesteps": [999, 500], "sigmas": [14.0, 3.0, 1.0]},
        {"timesteps": [100, 500, 999]},
        {"sigmas": [1.0, float("nan")]},
    ],
    ids=str,
)
def test_bad_layouts(arguments, cls):
    """No, empty, contradictory, rising or non-finite arguments raise ValueError."""
    with pytest.raises(ValueError):
        cls(**VP).set_timesteps(**arguments)
