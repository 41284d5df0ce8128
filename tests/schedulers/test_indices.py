"""Where a run stands: starts, slices, repeated timesteps, and the noise that belongs to a row."""

import math

import diffusers
import pytest
import torch
from contract_helpers import (
    DTYPES,
    EDM,
    SHAPE,
    VP,
    by_every,
    by_process,
    by_solver,
    gaussian,
    laid_out,
    loop,
    randn,
)

from diffusers_sde import DPMSolverScheduler, ReverseSDEScheduler


@by_solver
def test_order_is_one(cls, kwargs):
    """Whatever the solver, one timestep is one evaluation, so that pipelines slice correctly."""
    scheduler = cls(**VP, **kwargs)
    assert cls.order == scheduler.order == 1


@by_solver
@by_process
def test_every_solver_is_finite(process, cls, kwargs):
    """Also from zero signal (flow matching) to clean data."""
    scheduler = laid_out(cls, 7, **process, **kwargs)
    assert loop(scheduler, randn(*SHAPE) * scheduler.init_noise_sigma).isfinite().all()


@by_solver
@by_process
def test_any_index_is_a_start(process, cls, kwargs):
    """``set_begin_index(k)`` is a run of its own over ``timesteps[k:]``: the order ramps up from one, the path of the
    noise apart, which is that of the whole run."""
    kwargs = kwargs | ({"tau": 0.0} if cls is ReverseSDEScheduler else {})
    scheduler, rest = laid_out(cls, 8, **process, **kwargs), cls(**process, **kwargs)
    x = randn(*SHAPE)
    for k in range(1, 8):
        start = x * (scheduler.sigmas[k] if process is EDM else 1)
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(k)
        found = loop(scheduler, start, start=k)
        assert scheduler.begin_index == k and scheduler.step_index == 8
        rest.set_timesteps(timesteps=scheduler.timesteps[k:])
        torch.testing.assert_close(found, loop(rest, start), atol=1e-5, rtol=1e-4)


@by_every
@by_process
def test_start_from_the_first_timestep(process, cls):
    """Pipelines that never set ``begin_index`` start where their first timestep is, with the same result."""
    scheduler, x = laid_out(cls, 8, **process), randn(*SHAPE)
    scheduler.set_begin_index(3)
    expected = loop(scheduler, x, start=3)
    for times in (lambda t: t, torch.clone, lambda t: t.to(torch.float64)):
        scheduler.set_timesteps(8)
        model, y = gaussian(scheduler), x
        for t in times(scheduler.timesteps)[3:]:
            y = scheduler.step(model(y, t), t, y, return_dict=False)[0]
        torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)


@by_every
def test_duplicate_timesteps(cls):
    """A timestep may occur twice: every step has its own index, and the empty step changes nothing but by what a
    corrector learns there."""
    scheduler, x = cls(**VP), randn(*SHAPE)
    scheduler.set_timesteps(timesteps=[999, 600, 600, 200])
    model = gaussian(scheduler)
    for i, t in enumerate(scheduler.timesteps):
        before = x
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
        assert scheduler.step_index == i + 1
        if i == 1 and cls is DPMSolverScheduler:
            assert torch.equal(x, before)
    assert x.isfinite().all()


@by_every
@pytest.mark.parametrize("k", [1, 2])
def test_start_at_a_duplicate(k, cls):
    """A slice of ``timesteps`` that starts at the first or the second of two equal ones starts just there."""
    scheduler, x = cls(**VP), randn(*SHAPE)
    scheduler.set_timesteps(timesteps=[999, 600, 600, 200])
    loop(scheduler, x, start=k, stop=k + 1)
    assert scheduler.step_index == k + 1


def noised(scheduler, alpha, sigma):
    return alpha * randn(*SHAPE, seed=1) + sigma * randn(*SHAPE, seed=2)


def noise_both(scheduler, t):
    """``add_noise``, after checking that ``scale_noise`` is the same with its arguments in the other order."""
    x0, eps = randn(*SHAPE, seed=1), randn(*SHAPE, seed=2)
    out = scheduler.add_noise(x0, eps, t)
    assert torch.equal(out, scheduler.scale_noise(x0, t, eps))
    return out


def level(scheduler, i):
    """(alpha, sigma) of grid index ``i`` from the public sigmas."""
    s = float(scheduler.sigmas[i])
    if scheduler.config.use_flow_sigmas:
        return 1 - s, s
    return (1.0, s) if scheduler.config.sigma_data else (1 / math.hypot(1, s), s / math.hypot(1, s))


@by_every
@by_process
def test_noise_while_stepping(process, cls):
    """Inpainting: once stepping, noise is that of the row reached, whatever timestep is passed."""
    scheduler = laid_out(cls, **process)
    scheduler.set_begin_index(1)
    loop(scheduler, randn(*SHAPE), start=1, stop=3)
    expected = noised(scheduler, *level(scheduler, 3))
    torch.testing.assert_close(noise_both(scheduler, scheduler.timesteps[5:6]), expected, rtol=1e-5, atol=1e-5)


@by_every
@by_process
def test_noise_at_the_start(process, cls):
    """Image to image: before the first step, noise is that of ``begin_index``, whatever timestep is passed."""
    scheduler = laid_out(cls, **process)
    scheduler.set_begin_index(2)
    found = noise_both(scheduler, scheduler.timesteps[4:5])
    torch.testing.assert_close(found, noised(scheduler, *level(scheduler, 2)), rtol=1e-5, atol=1e-5)


@by_every
def test_noise_on_the_grid(cls):
    """Without either index the timestep is looked up in the grid, which need not be that of training."""
    scheduler = cls(use_flow_sigmas=True)
    scheduler.set_timesteps(timesteps=[900.0, 400.0], sigmas=[0.8, 0.5])
    for i in range(2):
        expected = noised(scheduler, *level(scheduler, i))
        torch.testing.assert_close(noise_both(scheduler, scheduler.timesteps[i : i + 1]), expected)


@by_every
@by_process
def test_noise_off_the_grid(process, cls):
    """A timestep that is not on the grid, one number or one a sample, is evaluated on the path."""
    scheduler = laid_out(cls, **process)
    times = torch.tensor([0.8, 0.1]) if process is EDM else torch.tensor([123.4, 801.0])
    alpha, sigma = (
        torch.from_numpy(v).float().reshape(-1, 1, 1, 1) for v in scheduler.path.alpha_sigma(times.double().numpy())
    )
    torch.testing.assert_close(noise_both(scheduler, times), noised(scheduler, alpha, sigma), rtol=1e-5, atol=1e-5)


@by_every
def test_noise_in_training(cls):
    """Before ``set_timesteps``, with a timestep per sample: DDPM's ``add_noise`` and ``get_velocity``."""
    theirs, ours = diffusers.DDPMScheduler(**VP), cls(**VP)
    x0, eps, t = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([3, 871])
    torch.testing.assert_close(ours.add_noise(x0, eps, t), theirs.add_noise(x0, eps, t))
    torch.testing.assert_close(ours.get_velocity(x0, eps, t), theirs.get_velocity(x0, eps, t))


@by_every
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_keeps_dtype(dtype, cls):
    """Half precision latents stay half precision, at a grid index and at a timestep."""
    scheduler, x = laid_out(cls, **VP), randn(*SHAPE, dtype=torch.float64).to(dtype)
    assert scheduler.add_noise(x, x, torch.tensor([7])).dtype == dtype
    scheduler.set_begin_index(1)
    assert scheduler.add_noise(x, x, scheduler.timesteps[1:2]).dtype == dtype
