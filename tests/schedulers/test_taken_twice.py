"""A step that is taken twice, as Cosmos takes all its steps: `step(...)[1]` for the data prediction of a doubled
batch, the step index put back by one, then the step again with the guided data prediction."""

import numpy as np
import pytest
import torch
from contract_helpers import gaussian, randn, relative, says
from five_schedulers import FIVE, build, by_each

from diffusers_sde import DPMSolverScheduler, FlowMapScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler

EDM = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
PROCESSES = {
    "edm": EDM,
    "vp": {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "shift": 3.0},
}
GUIDANCE = 2.0
SHAPE = (2, 4, 8, 8)  # two videos, so that the doubled batch has four
SOLVERS = [
    (ProbabilityFlowScheduler, {}),
    (ProbabilityFlowScheduler, {"solver_order": 3}),
    (ProbabilityFlowScheduler, {"corrector": False}),
    (DPMSolverScheduler, {"solver_order": 2}),
    (DPMSolverScheduler, {"solver_order": 3}),
    (DPMSolverScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    (ReverseSDEScheduler, {}),
    (ReverseSDEScheduler, {"noise_seed": 3}),
    (FlowMapScheduler, {}),
]
by_solver = pytest.mark.parametrize("cls, settings", SOLVERS, ids=lambda v: getattr(v, "__name__", str(v)))
by_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def data_predictions(scheduler):
    """Exact data predictions with and without a condition: of `N(.3, .25)` and `N(-.2, .49)`."""
    return gaussian(scheduler, std=0.5, mean=0.3), gaussian(scheduler, std=0.7, mean=-0.2)


def guided(scheduler, x0, x, t):
    """The network output that says this data prediction."""
    alpha, sigma = (float(v) for v in scheduler.path.alpha_sigma(float(t)))
    return says(scheduler, x0, x, alpha, sigma).to(x.dtype)


def run_twice(scheduler, x, **step):
    conditional, unconditional = data_predictions(scheduler)
    n = len(x)
    for t in scheduler.timesteps:
        output = torch.cat([unconditional(x, t), conditional(x, t)])
        x0 = scheduler.step(output, t, torch.cat([x, x]), return_dict=False, **step)[1]
        scheduler._step_index -= 1
        x0 = x0[n:] + GUIDANCE * (x0[n:] - x0[:n])
        x = scheduler.step(x0, t, x, return_dict=False, pred_original_sample=x0, **step)[0]
    return x


def run_once(scheduler, x, **step):
    """The same sampler without repetition: the network says the guided data prediction at once."""
    conditional, unconditional = data_predictions(scheduler)
    for t in scheduler.timesteps:
        output = conditional(x, t) + GUIDANCE * (conditional(x, t) - unconditional(x, t))
        x = scheduler.step(output, t, x, return_dict=False, **step)[0]
    return x


def laid_out(cls, process, steps, **settings):
    scheduler = build(cls, process, (steps,), **settings)
    scheduler.set_timesteps(steps)
    return scheduler


@by_process
@by_solver
def test_twice_is_once(cls, settings, process):
    """The repeated, guided run is the run of the same sampler on the guided network, noise included."""
    once, twice = (laid_out(cls, process, 12, **settings) for _ in range(2))
    x = randn(*SHAPE, dtype=torch.float64) * once.init_noise_sigma
    expected = run_once(once, x)
    assert expected.isfinite().all()
    assert relative(run_twice(twice, x), expected) < 1e-9


def test_twice_is_once_calibrated():
    """The same for learned rows, which reach back further than exact ones."""
    once, twice = (laid_out(FIVE[3], PROCESSES["vp"], 12) for _ in range(2))
    x = randn(*SHAPE, dtype=torch.float64)
    assert relative(run_twice(twice, x), run_once(once, x)) < 1e-9


@by_solver
def test_the_first_of_the_two_says_the_data_prediction(cls, settings):
    """`[1]` is `E[x_0 | x_t]` of each half of the doubled batch, at every step of the run."""
    scheduler = laid_out(cls, EDM, 6, **settings)
    x = randn(*SHAPE, dtype=torch.float64) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        sigma = float(scheduler.path.alpha_sigma(float(t))[1])
        denoised = [mean + std**2 / (std**2 + sigma**2) * (x - mean) for std, mean in ((0.7, -0.2), (0.5, 0.3))]
        conditional, unconditional = data_predictions(scheduler)
        output = torch.cat([unconditional(x, t), conditional(x, t)])
        x0 = scheduler.step(output, t, torch.cat([x, x]), return_dict=False)[1]
        torch.testing.assert_close(x0, torch.cat(denoised), atol=1e-6, rtol=1e-5)
        scheduler._step_index -= 1
        x = scheduler.step(x0[2:], t, x, return_dict=False, pred_original_sample=x0[2:])[0]


def exact(scheduler, x, std=0.5, mean=0.3):
    """Where the probability-flow ODE of `N(mean, std^2)` data takes `x` from the first level of the grid."""
    alpha, sigma = scheduler.levels.alpha[0], scheduler.levels.sigma[0]
    return mean + std * (x - alpha * mean) / np.hypot(alpha * std, sigma)


def unguided_error(cls, settings, process, steps):
    """Relative error of the run in which each step is taken twice with the same data prediction."""
    scheduler = laid_out(cls, process, steps, **settings)
    x = randn(1, 4, 8, 8, dtype=torch.float64) * scheduler.init_noise_sigma
    wanted, model = exact(scheduler, x), gaussian(scheduler, std=0.5, mean=0.3)
    for t in scheduler.timesteps:
        x0 = scheduler.step(model(x, t), t, x, return_dict=False)[1]
        scheduler._step_index -= 1
        x = scheduler.step(x0, t, x, return_dict=False, pred_original_sample=x0)[0]
    return relative(x, wanted)


@pytest.mark.parametrize("order", [1, 2])
def test_the_order_is_kept(order):
    """DPM-Solver++ of order p on the exact EDM Gaussian converges with order p though every step is taken twice."""
    settings = {"solver_order": order, "grid": "log_snr", "solver_type": "exact"}
    errors = [unguided_error(DPMSolverScheduler, settings, EDM, n) for n in (35, 70, 140)]
    orders = np.log2(errors[:-1] / np.array(errors[1:]))
    assert np.all(orders > order - 0.3), (errors, orders)


@pytest.mark.parametrize("cls, settings", SOLVERS[5:8], ids=lambda v: getattr(v, "__name__", str(v)))
@by_process
def test_the_noise_is_the_same_both_times(cls, settings, process):
    """A step repeated with its own data prediction is the same step, of each sample, doubled batch or not."""
    scheduler = laid_out(cls, process, 6, **settings)
    x = randn(*SHAPE, dtype=torch.float64) * scheduler.init_noise_sigma
    model = gaussian(scheduler)
    for t in scheduler.timesteps[:-1]:
        first = scheduler.step(model(torch.cat([x, x]), t), t, torch.cat([x, x]))
        scheduler._step_index -= 1
        x0 = first.pred_original_sample[:2]
        second = scheduler.step(x0, t, x, pred_original_sample=x0)
        assert second.noise_std == first.noise_std > 0
        torch.testing.assert_close(second.prev_sample, first.prev_sample[:2], atol=1e-9, rtol=1e-9)
        x = second.prev_sample


@pytest.mark.parametrize("cls, settings", SOLVERS[5:8], ids=lambda v: getattr(v, "__name__", str(v)))
def test_the_noise_of_a_generator_is_the_same_both_times(cls, settings):
    """The generator of the pipeline seeds the run at its first step only: once and twice draw alike, so a guided run
    has the noise of the unguided one."""
    once, twice = (laid_out(cls, EDM, 6, **settings) for _ in range(2))
    x = randn(1, 4, 8, 8, dtype=torch.float64) * once.init_noise_sigma
    expected = run_once(once, x, generator=torch.Generator().manual_seed(5))
    found = run_twice(twice, x, generator=torch.Generator().manual_seed(5))
    assert relative(found, expected) < 1e-9


@by_each
def test_a_repeated_step_may_be_given_up(cls):
    """The index put back and a new run laid out: the next run is that of a new scheduler."""
    used, fresh = (laid_out(cls, PROCESSES["vp"], 6) for _ in range(2))
    x = randn(*SHAPE, dtype=torch.float64)
    run_twice(used, x)
    used._step_index -= 1
    for scheduler in (used, fresh):
        scheduler.set_timesteps(6)
    assert torch.equal(run_once(used, x), run_once(fresh, x))
