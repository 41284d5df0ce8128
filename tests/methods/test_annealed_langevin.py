"""Annealed Langevin dynamics (NCSN): the published algorithm, its exact law on Gaussian data, and the pipeline.

Song & Ermon 2019: arXiv:1907.05600.  Lai et al.: arXiv:2510.21890, chapter 3.
"""

import math

import numpy as np
import pytest
import torch
from contract_helpers import gaussian, randn, seeded
from diffusers import DDPMPipeline
from helpers import LINEAR, mixture
from snippets import load

from diffusers_sde import ProbabilityFlowScheduler
from diffusers_sde.methods import langevin
from diffusers_sde.methods.langevin import annealed_langevin

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PROCESSES = {"vp": LINEAR, "flow": FLOW, "edm": {"sigma_data": 0.5}}
by_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def laid_out(process, rows):
    scheduler = ProbabilityFlowScheduler(**process, grid="log_snr")
    scheduler.set_timesteps(rows)
    return scheduler


def test_it_is_the_published_algorithm():
    """``x <- x + alpha_i/2 s(x, sigma_i) + sqrt(alpha_i) z``, ``alpha_i = eps sigma_i^2/sigma_L^2``, T steps at each
    level, on variance exploding data, where nothing happens between the levels (algorithm 1); then
    ``x + sigma_L^2 s`` (arXiv:2009.05475, section 3.1)."""
    scheduler = laid_out(PROCESSES["edm"], 4)
    sigmas, model, steps = scheduler.levels.sigma[:-1], mixture(), 3
    step = 0.1 * sigmas[-1] ** 2  # eps
    x = start = 80 * randn(5, 1, 1, 3, dtype=torch.float64)
    generator = seeded(7)
    for sigma in sigmas:
        size = step * sigma**2 / sigmas[-1] ** 2
        for _ in range(steps):
            z = torch.randn(x.shape, generator=generator, dtype=x.dtype)
            x = x + size / 2 * model.score(x, 1.0, sigma) + math.sqrt(size) * z
    expected = x + sigmas[-1] ** 2 * model.score(x, 1.0, sigmas[-1])

    def predict(x, row):
        scaled = scheduler.scale_model_input(x, scheduler.timesteps[row])
        return edm_network(scaled, x, sigmas[row])

    def edm_network(scaled, x, sigma):  # F of D = c_skip x + c_out F (Karras et al. 2022, table 1)
        total = math.hypot(0.5, sigma)
        torch.testing.assert_close(scaled, x / total)
        return (model.posterior_mean(x, 1.0, sigma) - (0.5 / total) ** 2 * x) / (sigma * 0.5 / total)

    snr = math.sqrt(step) / (2 * sigmas[-1])
    found = annealed_langevin(predict, scheduler, start, steps_per_level=steps, snr=snr, generator=seeded(7))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def exact_variance(monkeypatch, process, start, rows, std, **options):
    """At the end, of N(0, std^2) data started from N(0, start): the state is linear in the start and in every normal,
    so that basis vectors are run instead of samples."""
    scheduler = laid_out(process, rows)
    basis = iter(torch.eye(rows * options["steps_per_level"] + 1, dtype=torch.float64))
    monkeypatch.setattr(langevin, "randn_tensor", lambda *_, **__: next(basis)[None, None, None])
    x, model = next(basis)[None, None, None] * math.sqrt(start), gaussian(scheduler, std)
    evaluations = []

    def predict(x, row):
        evaluations.append(row)
        return model(x, scheduler.timesteps[row])

    found = annealed_langevin(predict, scheduler, x, **options)
    assert evaluations == [row for row in range(rows) for _ in range(options["steps_per_level"])] + [rows - 1]
    return float(found.square().sum())


@by_process
def test_its_law_is_exact_on_gaussian_data(process, monkeypatch):
    """Level by level: the variance v' of ``x/alpha`` carried on, then ULA's recursion ``v <- (1 - h/p)^2 v + 2 h`` with
    ``h = 2 (snr sigma)^2`` and p that of p_t (Lu, arXiv:2607.01693, chapter 2); at the end ``E[x_0|x] = alpha c^2
    x/p``."""
    rows, steps, snr, std, v = 6, 3, 0.35, 0.5, 2.3
    levels = laid_out(process, rows).levels
    alpha, sigma = levels.alpha[:-1], levels.sigma[:-1]
    start = v
    for i in range(rows):
        if i:
            v *= (alpha[i] / alpha[i - 1] if alpha[i - 1] else sigma[i] / sigma[i - 1]) ** 2
        p, h = (alpha[i] * std) ** 2 + sigma[i] ** 2, 2 * (snr * sigma[i]) ** 2
        for _ in range(steps):
            v = (1 - h / p) ** 2 * v + 2 * h
    expected = (alpha[-1] * std**2 / p) ** 2 * v
    found = exact_variance(monkeypatch, process, start, rows, std, steps_per_level=steps, snr=snr)
    assert found == pytest.approx(expected, rel=1e-5)


@by_process
def test_it_forgets_a_wrong_start_and_finds_the_data(process, monkeypatch):
    """N(0, 1/4) data from a start of four times the right variance: too wide by 7 to 10 % after 20 levels of 40 steps,
    and four times as many steps leave a quarter of it: the limit of many steps is the data."""
    levels = laid_out(process, 20).levels
    start = 4 * ((levels.alpha[0] / 2) ** 2 + levels.sigma[0] ** 2)
    few, many = (
        exact_variance(monkeypatch, process, start, 20, 0.5, steps_per_level=steps, snr=0.3) / 0.25 - 1
        for steps in (40, 160)
    )
    assert 0.06 < few < 0.11
    assert few / many == pytest.approx(4.3, abs=0.2)


def test_wrong_steps_are_refused():
    scheduler = laid_out(LINEAR, 3)
    for wrong in ({"steps_per_level": 0}, {"steps_per_level": 2, "snr": 1.0}):
        with pytest.raises(ValueError, match="1 or more steps and 0 < snr < 1"):
            annealed_langevin(lambda x, row: x, scheduler, randn(1, 1, 2, 2), **wrong)


def test_the_pipeline_samples_a_mixture(tmp_path):
    """``annealed=True`` of guided_generation, 20 levels of 40 steps: mean and standard deviation of the mixture, and of
    a component with a label."""
    DDPMPipeline(unet=mixture(), scheduler=ProbabilityFlowScheduler(grid="log_snr")).save_pretrained(tmp_path)
    pipe = load("guided_generation", tmp_path)
    options = {"num_inference_steps": 20, "annealed": True, "corrector_steps": 40, "corrector_snr": 0.3}
    common = {**options, "num_images": 600, "generator": seeded(), "output_type": "latent"}
    exact = mixture().sample(20000, seeded(9)).flatten(1).float()
    found = pipe(guidance_scale=0.0, **common).images.flatten(1)
    torch.testing.assert_close(found.mean(0), exact.mean(0), rtol=0, atol=0.12)
    torch.testing.assert_close(found.std(0), exact.std(0), rtol=0, atol=0.12)
    found = pipe(guidance_scale=1.0, class_labels=[1] * 600, **common).images.flatten(1)
    torch.testing.assert_close(found.mean(0), torch.tensor([-1.5, 0.3, 0.0]), rtol=0, atol=0.06)
    np.testing.assert_allclose(found.std(0), math.sqrt(0.2), rtol=0.1)
    with pytest.raises(ValueError, match="no steps to restart"):
        pipe(guidance_scale=0.0, restart=(0.1, 2.0, 1), **common)
