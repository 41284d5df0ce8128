"""The public transition: bit for bit the scheduler's step, exact in law on Gaussian data, replayed with ratio 1."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers import LINEAR, gaussian_law

import diffusers_sde
from diffusers_sde import FlowMapScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler, transition
from diffusers_sde.transitions import sum_per_sample

STD = 0.6
EPSILON = {**LINEAR, "prediction_type": "epsilon"}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
EDM = {"sigma_data": STD, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_schedule": "karras"}
V = {**LINEAR, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
PROCESSES = {"vp": EPSILON, "vp, v, zero SNR": V, "flow": FLOW, "edm": {**EDM, "prediction_type": "epsilon"}}


def chain(config: dict, steps: int = 6, **options: object) -> ReverseSDEScheduler:
    """A laid out first-order sampler that is exact for N(0, STD^2) data."""
    scheduler = ReverseSDEScheduler.from_config(
        config, **{"solver_order": 1, "data_std": STD, "final": "exact", **options}
    )
    scheduler.set_timesteps(steps)
    return scheduler


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", PROCESSES)
def test_mean_and_std_are_those_of_the_step_to_the_last_bit(name: str, dtype: torch.dtype) -> None:
    scheduler = chain(PROCESSES[name], clip_sample=name == "vp")
    x = normals(2, 3, 4).to(dtype) * scheduler.init_noise_sigma
    for k, t in enumerate(scheduler.timesteps):
        m = normals(2, 3, 4, seed=k).to(dtype)
        ours, theirs = transition(scheduler, m, t, x), scheduler.step(m, t, x)
        assert torch.equal(ours.mean.to(dtype), theirs.prev_sample_mean) and ours.std == theirs.noise_std
        x = theirs.prev_sample


def test_scoring_takes_no_step_and_goes_in_any_order() -> None:
    scheduler = chain(EPSILON)
    x = normals(2, 3)
    forwards = [transition(scheduler, x, t, x).mean for t in scheduler.timesteps]
    backwards = [transition(scheduler, x, t, x).mean for t in scheduler.timesteps.flip(0).tolist()]
    assert scheduler.step_index is None
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))


@pytest.mark.parametrize("steps", [4, 6, 10, 50])
@pytest.mark.parametrize("name", PROCESSES)
def test_a_rollout_has_the_exact_variance_at_every_number_of_steps(name: str, steps: int) -> None:
    """Gaussian data: variances of the chain in closed form, started from the exact law of the first level.  The
    stochastic steps of Flow-GRPO keep 0.81 of the standard deviation at 6."""
    scheduler = chain(PROCESSES[name], steps)
    points, variance = scheduler.levels, None
    for k, t in enumerate(scheduler.timesteps):
        alpha, sigma = float(points.alpha[k]), float(points.sigma[k])
        exact = (alpha * STD) ** 2 + sigma**2
        variance = exact if variance is None else variance
        assert variance == pytest.approx(exact, rel=1e-9)
        x = torch.ones(1, 1, dtype=torch.float64)
        step = transition(scheduler, said_of_gaussian(scheduler, x, alpha, sigma), t, x)
        variance = float(step.mean) ** 2 * variance + step.std**2
    assert variance == pytest.approx(STD**2, rel=1e-9)


def said_of_gaussian(scheduler: ReverseSDEScheduler, x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """The exact network of N(0, STD^2) data."""
    from diffusers_sde.prediction import to_model

    k_x, k_d = to_model(scheduler.path, scheduler.config.prediction_type, alpha, sigma)
    return k_x * x + k_d * alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2) * x


def test_without_the_scale_of_the_data_variance_is_lost_at_few_steps() -> None:
    """What the exact chain is compared with: data prediction, DDPM's step."""
    losses = []
    for data_std in (0.0, STD):
        scheduler = chain(FLOW, data_std=data_std)
        table = scheduler._table(scheduler.path, scheduler.levels, [1.0] * 6)
        losses.append(math.sqrt(gaussian_law(table, STD, 1.0)) / STD)
    assert losses[0] < 0.9 and losses[1] == pytest.approx(1, abs=1e-9)


def test_log_prob_is_that_of_the_normal_distribution() -> None:
    step = transition(scheduler := chain(EPSILON), normals(3, 2, 5), scheduler.timesteps[2], normals(3, 2, 5, seed=1))
    x = normals(3, 2, 5, seed=2)
    exact = torch.distributions.Normal(step.mean.double(), step.std).log_prob(x.double()).sum((1, 2))
    torch.testing.assert_close(step.log_prob(x), exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(step.log_prob(x, reduction="mean"), exact / 10, rtol=1e-12, atol=0)
    other = transition(scheduler, normals(3, 2, 5, seed=4), scheduler.timesteps[2], normals(3, 2, 5, seed=1))
    pairs = (torch.distributions.Normal(s.mean.double(), s.std) for s in (step, other))
    torch.testing.assert_close(step.kl(other), torch.distributions.kl_divergence(*pairs).sum((1, 2)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", PROCESSES)
def test_the_jacobian_is_that_of_autograd(name: str) -> None:
    scheduler = chain(PROCESSES[name])
    x = normals(2, 3)
    m = normals(2, 3, seed=1).requires_grad_()
    step = transition(scheduler, m, scheduler.timesteps[3], x)
    (slope,) = torch.autograd.grad(step.mean.sum(), m, retain_graph=True)
    torch.testing.assert_close(slope, torch.full_like(m, step.jacobian))
    y = step.draw(normals(2, 3, seed=2)).detach()
    (slope,) = torch.autograd.grad(step.log_prob(y).sum(), m)
    torch.testing.assert_close(slope, step.jacobian * (y - step.mean.detach()) / step.std**2, rtol=1e-4, atol=1e-5)


def test_a_rollout_replayed_at_its_levels_has_the_ratio_one() -> None:
    """In another scheduler, whose own grid would be another one, with the levels that the first one says."""
    network = torch.nn.Linear(4, 4)
    first, second = chain(EPSILON, 5, grid="karras"), chain(EPSILON, 9)
    second.set_timesteps(levels=first.levels)
    x, past = normals(3, 4), []
    with torch.no_grad():
        for k, t in enumerate(first.timesteps):
            step = transition(first, network(x), t, x)
            new = step.draw(normals(3, 4, seed=k))
            past.append((x, new, step.log_prob(new)))
            x = new
    for t, (x, new, log_prob) in zip(second.timesteps, past, strict=True):
        ratio = (transition(second, network(x), t, x).log_prob(new) - log_prob).exp()
        assert bool((ratio == 1).all())


def test_levels_are_passed_alone() -> None:
    scheduler = chain(EPSILON)
    with pytest.raises(ValueError, match="pass them alone"):
        scheduler.set_timesteps(4, levels=scheduler.levels)


@pytest.mark.parametrize("shape", [(3, 64, 64), (7,), (1,)])
def test_a_batch_is_its_samples_one_by_one_to_the_last_bit(shape: tuple[int, ...]) -> None:
    scheduler = chain(EPSILON)
    x, m, y = (normals(5, *shape, seed=k) for k in range(3))
    t = scheduler.timesteps[1]
    whole = transition(scheduler, m, t, x).log_prob(y)
    alone = [transition(scheduler, m[k : k + 1], t, x[k : k + 1]).log_prob(y[k : k + 1]) for k in range(5)]
    assert torch.equal(whole, torch.cat(alone))


def test_sums_of_any_length_are_exact() -> None:
    for count in (0, 1, 2, 3, 5, 64, 1001):
        values = normals(2, count).double()
        torch.testing.assert_close(sum_per_sample(values), values.sum(1), rtol=1e-12, atol=1e-12)


def test_noise_is_switched_on_in_a_window_of_steps() -> None:
    scheduler = chain(FLOW, 5, tau=[0, 1, 1, 0, 0])
    x = normals(2, 3)
    steps = [transition(scheduler, x, t, x) for t in scheduler.timesteps]
    assert [step.std > 0 for step in steps] == [False, True, True, False, False]
    ode = ProbabilityFlowScheduler.from_config(FLOW, solver_order=1, corrector=False, data_std=STD, final="exact")
    ode.set_timesteps(levels=scheduler.levels)
    torch.testing.assert_close(steps[3].mean, transition(ode, x, ode.timesteps[3], x).mean)
    with pytest.raises(ValueError, match="no noise"):
        steps[0].log_prob(x)


@pytest.mark.parametrize(
    "scheduler",
    [
        ReverseSDEScheduler.from_config(EPSILON),
        ReverseSDEScheduler.from_config(EPSILON, solver_order=1, corrector=True),
        ProbabilityFlowScheduler.from_config(EPSILON),
    ],
)
def test_steps_that_read_earlier_evaluations_are_refused_from_the_first_on(scheduler) -> None:
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="solver_order=1 and corrector=False"):
        transition(scheduler, normals(1, 3), scheduler.timesteps[0], normals(1, 3))


def test_other_schedulers_are_refused_and_flow_maps_are_not() -> None:
    import diffusers

    stock = diffusers.DDPMScheduler()
    stock.set_timesteps(5)
    with pytest.raises(ValueError, match=r"use ReverseSDEScheduler\.from_config"):
        transition(stock, normals(1, 3), stock.timesteps[0], normals(1, 3))
    jumps = FlowMapScheduler.from_config(EPSILON)
    jumps.set_timesteps(3)
    x = normals(1, 3)
    assert transition(jumps, x, jumps.timesteps[0], x).std > 0


def test_wrong_reductions_shapes_and_partners_are_refused() -> None:
    scheduler = chain(EPSILON)
    x = normals(2, 3)
    step, later = (transition(scheduler, x, t, x) for t in scheduler.timesteps[:2])
    for call, words in (
        (lambda: step.log_prob(x, reduction="max"), "sum or mean"),
        (lambda: step.log_prob(x[:1]), "has shape"),
        (lambda: step.kl(later), "same levels"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_the_levels_of_a_step_are_exact() -> None:
    scheduler = chain(EPSILON)
    x = normals(1, 2)
    for k, t in enumerate(scheduler.timesteps):
        step = transition(scheduler, x, t, x)
        ends = [step.start.alpha, step.end.alpha], [step.start.sigma, step.end.sigma]
        assert np.array_equal(ends, [scheduler.levels.alpha[k : k + 2], scheduler.levels.sigma[k : k + 2]])


def test_it_is_a_public_name() -> None:
    assert diffusers_sde.transition is transition
