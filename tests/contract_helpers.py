"""What the contract tests share: schedulers, the three families of processes, an exact oracle, and sampling loops."""

import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from five_schedulers import calibration

import diffusers_sde
from diffusers_sde import (
    CalibratedScheduler,
    DPMSolverScheduler,
    FlowMapScheduler,
    ProbabilityFlowScheduler,
    ReverseSDEScheduler,
)
from diffusers_sde.prediction import convert, model_coefficients


class ExactlyCalibrated(CalibratedScheduler):
    """A calibrated scheduler that is given a calibration with the exact tables of its process where none is passed."""

    def __init__(self, **kwargs):
        if kwargs.get("calibration") is None:
            config = ProbabilityFlowScheduler(**{k: v for k, v in kwargs.items() if k != "noise_seed"}).config
            kwargs["calibration"] = calibration(config, steps=(3, 4, 5, 6, 8, 9, 10, 12))
        super().__init__(**kwargs)


CLASSES = [ProbabilityFlowScheduler, ReverseSDEScheduler, DPMSolverScheduler]
EVERY = [*CLASSES, ExactlyCalibrated, FlowMapScheduler]
VP = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "shift": 3.0}
EDM = {"sigma_data": 0.5}
PROCESSES = {"vp": VP, "flow": FLOW, "edm": EDM}

SHAPE = (2, 4, 8, 8)
PUBLIC = [
    cls
    for cls in (getattr(diffusers_sde, name) for name in diffusers_sde.__all__)
    if isinstance(cls, type) and issubclass(cls, diffusers.SchedulerMixin) and cls is not diffusers.SchedulerMixin
]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Settings that are deterministic and that the first-order step of any stock ODE sampler equals.
FIRST_ORDER = {"solver_order": 1, "corrector": False}

by_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
by_every = pytest.mark.parametrize("cls", EVERY, ids=lambda cls: cls.__name__)
by_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)

SOLVERS = [
    (ProbabilityFlowScheduler, {"solver_order": 3}),
    (DPMSolverScheduler, {"solver_order": 3}),
    (DPMSolverScheduler, {"solver_order": 2, "singlestep": True}),
    (DPMSolverScheduler, {"solver_order": 3, "singlestep": True}),
    (ReverseSDEScheduler, {"noise_seed": 1}),
]
by_solver = pytest.mark.parametrize("cls, kwargs", SOLVERS, ids=lambda v: getattr(v, "__name__", str(v)))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def says(scheduler, data_prediction, x, alpha, sigma):
    """What a network of the scheduler's prediction type returns at ``x`` if its data prediction is this one."""
    wanted = model_coefficients(scheduler.path, scheduler.config.prediction_type, alpha, sigma)
    k_x, k_d = convert((1.0, 0.0), wanted, alpha, sigma)
    return k_x * x + k_d * data_prediction


def gaussian(scheduler, std=0.5, mean=0.0):
    """The exact network for data N(mean, std^2), as a function of the (unscaled) state and the timestep."""

    def model(x, t):
        alpha, sigma = (float(v) for v in scheduler.path.alpha_sigma(float(t)))
        gain = std**2 * alpha / (std**2 * alpha**2 + sigma**2)
        return says(scheduler, mean + gain * (x - alpha * mean), x, alpha, sigma).to(x.dtype)

    return model


def point(scheduler, x0):
    """The exact network for data that is always ``x0``."""

    def model(x, t):
        alpha, sigma = (float(v) for v in scheduler.path.alpha_sigma(float(t)))
        return says(scheduler, x0, x, alpha, sigma).to(x.dtype)

    return model


def loop(scheduler, x, model=None, start=0, stop=None, states=None, **kwargs):
    """Step ``x`` through ``timesteps[start:stop]``; ``states`` collects every state."""
    model = gaussian(scheduler) if model is None else model
    for t in scheduler.timesteps[start:stop]:
        if states is not None:
            states.append(x)
        x = scheduler.step(model(x, t), t, x, return_dict=False, **kwargs)[0]
    return x


def sample(scheduler, x, n, **kwargs):
    """Lay out ``n`` steps and run them from unit noise ``x``."""
    scheduler.set_timesteps(n)
    return loop(scheduler, x * scheduler.init_noise_sigma, **kwargs)


def laid_out(cls, n=6, **kwargs):
    scheduler = cls(**kwargs)
    scheduler.set_timesteps(n)
    return scheduler


def one_step(scheduler, i=0, x=None, **kwargs):
    """The step at grid index ``i`` on Gaussian data."""
    x = randn(*SHAPE) if x is None else x
    t = scheduler.timesteps[i]
    return scheduler.step(gaussian(scheduler)(x, t), t, x, **kwargs)


def relative(value, expected):
    """|value - expected| / |expected|."""
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def in_fresh_process(script, *arguments):
    """Run Python code in a new interpreter that finds the package; return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


def same_alphas(ours, theirs, **tolerance):
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod.float(), **tolerance)
