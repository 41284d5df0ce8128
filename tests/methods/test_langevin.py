"""ULA's exact bias, MALA, Langevin correctors and Restart on exact Gaussians, and the loop that runs them."""

import math

import numpy as np
import pytest
import torch
from contract_helpers import gaussian, loop, randn, seeded
from diffusers import DDPMPipeline
from helpers import LINEAR, mixture
from snippets import load

from diffusers_sde import DPMSolverScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.methods import langevin
from diffusers_sde.methods.langevin import (
    Visit,
    corrector_step,
    mala,
    renoise,
    restart_visits,
    sample_with_correctors,
    ula,
)
from diffusers_sde.weights import Point

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PROCESSES = {"vp": LINEAR, "flow": FLOW, "edm": {"sigma_data": 0.5}}
by_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


# -- ULA and MALA --


def ula_gaussian_variance(variance, step, num_steps=math.inf, start=0.0):
    """The exact variance of ULA on N(0, v): ``v_inf + q^(2k) (start - v_inf)``, ``q = 1 - step/v``,
    ``v_inf = v / (1 - step/(2 v))`` (Lu, arXiv:2607.01693, chapter 2)."""
    limit = variance / (1 - step / (2 * variance))
    remembered = 0.0 if math.isinf(num_steps) else (1 - step / variance) ** (2 * num_steps)
    return limit + remembered * (start - limit)


@pytest.mark.parametrize("h", [0.1, 0.5, 1.2])
@pytest.mark.parametrize("start", [0.0, 3.0])
def test_ula_has_its_exact_bias(monkeypatch, start, h):
    """The variance of N(0, 0.8)'s ULA after 0, 1, 3 and 60 steps: the formula's, and after 60 not that of the law.  The
    state is linear in the first one and in every normal: sample k of the batch follows the k-th of these."""
    variance = 0.8
    for k in (0, 1, 3, 60):
        basis = torch.eye(k + 1, dtype=torch.float64)[:, :, None]
        draws = iter(basis[1:])
        monkeypatch.setattr(langevin, "randn_tensor", lambda *_, draws=draws: next(draws))
        x = ula(lambda y: -y / variance, math.sqrt(start) * basis[0], h, k)
        assert float(x.square().sum()) == pytest.approx(ula_gaussian_variance(variance, h, k, start), rel=1e-12)
    assert float(x.square().sum()) / variance == pytest.approx(1 / (1 - h / (2 * variance)), rel=1e-3)


def test_ula_refuses_a_step_of_zero():
    with pytest.raises(ValueError, match="positive"):
        ula(lambda y: -y, torch.zeros(1, 1), 0.0, 1)


@pytest.mark.parametrize("h", [0.3, 1.2])
def test_mala_has_no_bias(h):
    """At steps where ULA's variance is off by 23 % and 300 %: within three standard errors of N(0, 0.8)."""
    n, variance = 20000, 0.8
    assert ula_gaussian_variance(variance, h) > 1.2 * variance
    x, accepted = mala(
        lambda y: -(y[:, 0] ** 2) / (2 * variance),
        lambda y: -y / variance,
        torch.zeros(n, 1, dtype=torch.float64),
        h,
        80,
        seeded(),
    )
    assert float(x.var()) == pytest.approx(variance, abs=3 * variance * math.sqrt(2 / n))
    assert 0.2 < accepted < 1


def test_mala_keeps_a_mixture():
    """Started from the mixture, it stays: mean and covariance after 40 steps (densities up to a constant)."""
    model, n = mixture(), 6000
    start = model.sample(n, seeded())
    x, _ = mala(lambda y: model.log_density(y) + 7.0, lambda y: model.score(y, 1.0, 1e-6), start, 0.05, 40, seeded(1))
    a, b = start.flatten(1), x.flatten(1)
    assert (a.mean(0) - b.mean(0)).abs().max() < 0.06
    assert (torch.cov(a.T) - torch.cov(b.T)).abs().max() < 0.06
    assert not torch.equal(a, b)


# -- correctors and restart on exact Gaussians --
# The state is linear in the first state and in every normal: run basis vectors instead of samples, so that the variance
# at the end is exact.


def exact_variance(monkeypatch, process, start, steps=8, std=0.5, **options):
    """Of N(0, std^2) data through the exact ODE flow and the options, from variance ``start`` times the right one."""
    scheduler = ProbabilityFlowScheduler(**process, solver_order=1, data_std=std, final="exact")
    scheduler.set_timesteps(steps)
    first, width = float(scheduler.timesteps[0]), 400
    alpha, sigma = (float(v) for v in scheduler.path.alpha_sigma(first))
    basis = iter(torch.eye(width, dtype=torch.float64))
    monkeypatch.setattr(langevin, "randn_tensor", lambda *_, **__: next(basis)[None, None, None])
    x = next(basis)[None, None, None] * math.sqrt(start * ((alpha * std) ** 2 + sigma**2))
    model = gaussian(scheduler, std)
    x = sample_with_correctors(lambda x, row: model(x, scheduler.timesteps[row]), scheduler, x, **options)
    return float(x.square().sum())


@by_process
def test_restart_contracts_the_error_by_its_factor(process, monkeypatch):
    """An initial variance that is 50 % too large: each repeat of [s_low, s_high] leaves
    (c^2 + s_low^2)/(c^2 + s_high^2) of the error at the end (Xu et al. 2023, arXiv:2306.14878, theorem 1, exact)."""
    scheduler = ProbabilityFlowScheduler(**process)
    scheduler.set_timesteps(8)
    levels = np.exp(-scheduler.levels.log_snr[:-1])
    interval = (levels[6] * 0.999, levels[4] * 1.001)
    errors = [exact_variance(monkeypatch, process, 1.5, restart=(*interval, k)) / 0.25 - 1 for k in range(3)]
    factor = (0.25 + levels[6] ** 2) / (0.25 + levels[4] ** 2)
    assert errors[0] == pytest.approx(0.5, rel=1e-4)
    np.testing.assert_allclose(errors[1:], [0.5 * factor, 0.5 * factor**2], rtol=1e-3)


@by_process
def test_correctors_have_ulas_law(process, monkeypatch):
    """At each level the variance moves towards v/(1 - h/(2v)), h = 2 (snr sigma)^2, exactly as ULA's formula says."""
    steps, count, snr, std = 8, 3, 0.4, 0.5
    scheduler = ProbabilityFlowScheduler(**process)
    scheduler.set_timesteps(steps)
    alpha, sigma = scheduler.levels.alpha, scheduler.levels.sigma
    v = (alpha * std) ** 2 + sigma**2
    expected = 1.5 * v[0]
    for i in range(steps):
        expected *= v[i + 1] / v[i]
        if i + 1 < steps:
            expected = ula_gaussian_variance(v[i + 1], 2 * (snr * sigma[i + 1]) ** 2, count, expected)
    found = exact_variance(monkeypatch, process, 1.5, steps, corrector_steps=count, corrector_snr=snr)
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(found / 0.25 - 1) < 0.35  # 0.5 without correctors


def test_corrector_step_is_ula():
    """x + h score + sqrt(2h) z with score = -eps/sigma, h = 2 (snr sigma)^2."""
    x, eps, z = (randn(2, 1, 2, 2, seed=i, dtype=torch.float64) for i in range(3))
    h = 2 * (0.3 * 0.7) ** 2
    torch.testing.assert_close(corrector_step(x, eps, 0.7, 0.3, z), x - h * eps / 0.7 + math.sqrt(2 * h) * z)


def test_renoise_is_the_forward_process():
    """From (alpha, sigma) with x = alpha x0 + sigma e1 to the law of (alpha', sigma')."""
    start, end = Point(0.8, 0.6), Point(0.3, 0.95)
    x0, e1, e2 = torch.eye(3, dtype=torch.float64)
    x = renoise(0.8 * x0 + 0.6 * e1, start, end, e2)
    assert float(x[0]) == pytest.approx(0.3) and float(x[1:].norm()) == pytest.approx(0.95)


# -- the loop --


def test_visits():
    """Down to the low end, back to the high end, down again, on."""
    rows = restart_visits([10.0, 5.0, 2.0, 1.0, 0.3], (0.9, 5.0), 2)
    down = [Visit(1, 3), Visit(2)]
    assert rows == [Visit(0), Visit(1), Visit(2), *down, *down, Visit(3), Visit(4)]
    assert restart_visits([3.0, 1.0], (0.5, 4.0), 0) == [Visit(0), Visit(1)]
    with pytest.raises(ValueError, match="widen it"):
        restart_visits([10.0, 1.0], (0.9, 2.0), 1)
    with pytest.raises(ValueError, match="0 or more"):
        restart_visits([10.0, 1.0], (0.9, 20.0), -1)


@by_process
@pytest.mark.parametrize("cls", [ProbabilityFlowScheduler, ReverseSDEScheduler, DPMSolverScheduler])
def test_without_options_it_is_the_plain_loop(cls, process):
    results, x = [], randn(2, 1, 4, 4)
    for own in (False, True):
        scheduler = cls(**process)
        scheduler.set_timesteps(5)
        model, start = gaussian(scheduler), x * scheduler.init_noise_sigma
        if own:
            results.append(
                sample_with_correctors(
                    lambda x, i, m=model, s=scheduler: m(x, s.timesteps[i]), scheduler, start, generator=seeded()
                )
            )
        else:
            results.append(loop(scheduler, start, model, generator=seeded()))
    assert torch.equal(*results)


@by_process
def test_restart_draws_new_noise_in_the_sde(process):
    """A repeated stretch of the reverse SDE has noise of its own, and a multistep history that starts afresh: the law
    of N(0, 0.25) data stays exact."""
    scheduler = ReverseSDEScheduler(**process, data_std=0.5, final="exact")
    scheduler.set_timesteps(8)
    levels = np.exp(-scheduler.levels.log_snr[:-1])
    alpha, sigma = (float(v) for v in scheduler.path.alpha_sigma(float(scheduler.timesteps[0])))
    x = randn(4000, 1, 1, 4, dtype=torch.float64) * math.hypot(alpha * 0.5, sigma)
    model = gaussian(scheduler, 0.5)
    ticks = []
    found = sample_with_correctors(
        lambda x, i: model(x, scheduler.timesteps[i]),
        scheduler,
        x,
        restart=(levels[6] * 0.999, levels[2] * 1.001, 3),
        generator=seeded(),
        callback=lambda: ticks.append(1),
    )
    assert len(ticks) == 8 + 3 * 4
    assert float(found.std()) == pytest.approx(0.5, rel=0.02)  # repeated noise: 0.6 and more


def test_rewind_forgets():
    scheduler = ReverseSDEScheduler()
    scheduler.set_timesteps(6)
    x, model = randn(2, 1, 4, 4), gaussian(scheduler)
    loop(scheduler, x, model, stop=4)
    scheduler.rewind(2)
    again = scheduler.step(model(x, scheduler.timesteps[2]), scheduler.timesteps[2], x)
    assert scheduler.step_index == 3
    fresh = ReverseSDEScheduler()
    fresh.set_timesteps(6)
    fresh.set_begin_index(2)
    expected = fresh.step(model(x, fresh.timesteps[2]), fresh.timesteps[2], x)
    torch.testing.assert_close(again.prev_sample_mean, expected.prev_sample_mean)


def test_wrong_correctors():
    scheduler = ProbabilityFlowScheduler()
    scheduler.set_timesteps(2)
    for wrong in ({"corrector_steps": -1}, {"corrector_steps": 1, "corrector_snr": 1.5}):
        with pytest.raises(ValueError, match="snr"):
            sample_with_correctors(lambda x, i: x, scheduler, randn(1, 1, 2, 2), **wrong)


def test_pipeline_options(tmp_path):
    """Correctors and Restart are options of guided_generation; they repair a start that is too wide."""
    DDPMPipeline(unet=mixture(), scheduler=ProbabilityFlowScheduler()).save_pretrained(tmp_path)
    pipe, exact = load("guided_generation", tmp_path), mixture().sample(20000, seeded(9)).flatten(1).std(0)
    latents = 3 * randn(2000, 1, 1, 3)

    def error(**options):
        x = pipe(
            guidance_scale=0.0,
            num_images=2000,
            num_inference_steps=8,
            latents=latents,
            generator=seeded(),
            output_type="latent",
            **options,
        ).images
        return float((x.flatten(1).std(0) - exact).norm())

    plain = error()
    assert error(corrector_steps=3, corrector_snr=0.3) < 0.8 * plain
    assert error(restart=(0.2, 3.0, 3)) < 0.8 * plain
