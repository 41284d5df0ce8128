"""Twisted sequential Monte Carlo against the exact tilted mixture: the theorem, its parts, kernels, the pipeline."""

import dataclasses
import math

import diffusers
import numpy as np
import pytest
import torch
from contract_helpers import randn, seeded
from diffusers import DDPMPipeline
from helpers import mixture
from hypothesis import given
from hypothesis import strategies as st
from pipeline_parts import tiny_unet
from snippets import load
from snippets import run as run_snippet
from stated import stated

from diffusers_sde import DPMSolverScheduler, FlowMapScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.assets import FASHION_MODEL
from diffusers_sde.methods.control import (
    Transition,
    best_of,
    draw,
    effective_sample_size,
    estimate,
    evaluate_reward,
    log_normalizer,
    scheduler_kernel,
    systematic_resample,
    twisted_smc,
)
from diffusers_sde.sampling import network_denoiser

V, BETA, STEPS = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64), 1.5, 20
# the mixture is smooth: 20 steps reach its law, with a table that is followed as it is
SETTINGS = {"solver_order": 2, "data_std": 0.5, "tau": 1.0, "trust": False}


def reward(x):
    return x.flatten(1) @ V.to(x.dtype)


def exact_mean(beta=BETA):
    tilted = mixture().tilted(V, beta)
    return (tilted.mixture.weights[:, None] * tilted.mixture.means).sum(0)


def exact_log_normalizer(beta=BETA):
    """log E exp(beta v.x) of the mixture: log sum_k w_k exp(beta v.m_k + beta^2/2 v.C_k v)."""
    model, v = mixture(), beta * V
    return float((model.mixture.weights.log() + model.mixture.means @ v + 0.5 * model.covariances @ v @ v).logsumexp(0))


def run(populations, n, *, seed=0, scheduler=None, steps=STEPS, score=reward, beta=BETA, **options):
    """Particles on the mixture."""
    scheduler = scheduler or ReverseSDEScheduler(**SETTINGS)
    scheduler.set_timesteps(steps)
    generator = seeded(seed)
    x = torch.randn(populations, n, 1, 1, 3, dtype=torch.float64, generator=generator)
    kernel = scheduler_kernel(network_denoiser(mixture()), scheduler)
    return twisted_smc(
        kernel, score, x, steps=steps, beta=beta, generator=generator, reorder=scheduler.reorder, **options
    )


def vectors(particles):
    return particles.samples.flatten(2)


def population_means(particles):
    return torch.einsum("pn,pnd->pd", particles.log_weights.exp(), vectors(particles))


# -- the theorem --


@pytest.mark.parametrize("gradient", [False, True], ids=["black_box", "differentiable"])
def test_converges_to_the_tilted_law_at_the_monte_carlo_rate(gradient):
    """Mean of p exp(beta r)/Z from populations of 16, 64, 256 particles: root mean square error ~ N^-1/2 (Lu,
    arXiv:2607.01693, section 8; Wu et al. 2023, arXiv:2306.17775, theorem 1)."""
    errors = []
    for n, populations in ((16, 128), (64, 64), (256, 48)):
        means = population_means(run(populations, n, gradient=gradient))
        errors.append(float((means - exact_mean()).square().sum(1).mean().sqrt()))
    rates = np.log(np.divide(errors[:-1], errors[1:])) / math.log(4)
    assert 0.35 < rates.mean() < 0.65, errors
    assert errors == pytest.approx([0.17, 0.10, 0.05], rel=0.12)
    assert float((exact_mean() - exact_mean(0.0)).norm()) == pytest.approx(1.9, abs=0.05)
    stated("error of the tilted mean .17, .10, .05 with 16, 64, 256 particles (it moves by 1.9)")


def test_pooled_estimate_agrees_within_its_error_bar():
    """32 populations of 256: mean and covariance of the tilted mixture within three standard errors."""
    particles, tilted = run(32, 256, seed=3), mixture().tilted(V, BETA)
    mean, error = estimate(vectors(particles), particles)
    assert error.max() < 0.02
    assert ((mean - exact_mean()).abs() < 3 * error + 0.01).all(), (mean, exact_mean(), error)  # 0.01: 20 steps
    second = torch.einsum("pni,pnj->pnij", vectors(particles), vectors(particles))
    expected = (
        tilted.mixture.weights[:, None, None]
        * (tilted.covariances + torch.einsum("ki,kj->kij", tilted.mixture.means, tilted.mixture.means))
    ).sum(0)
    found, error = estimate(second, particles)
    assert ((found - expected).abs() < 3 * error + 0.02).all(), (found, expected, error)


def test_error_bars_are_calibrated():
    """Over 60 pools of 8 populations the errors of the estimate, in units of their error bars, have mean square 1.4
    (Student's t) within a factor of two."""
    particles, z = run(480, 32, seed=7), []
    for k in range(60):
        pool = slice(8 * k, 8 * k + 8)
        part = dataclasses.replace(
            particles,
            samples=particles.samples[pool],
            rewards=particles.rewards[pool],
            log_weights=particles.log_weights[pool],
            log_normalizer=particles.log_normalizer[pool],
        )
        mean, error = estimate(vectors(part), part)
        z.append((mean - exact_mean()) / error)
    assert 0.7 < float(torch.stack(z).square().mean()) < 2.8


@pytest.mark.parametrize("gradient", [False, True], ids=["black_box", "differentiable"])
def test_normalizer(gradient):
    """log Z = log E exp(beta r) within three standard errors of the closed form; the estimate of Z is unbiased, so
    populations of 8 have it too."""
    particles = run(400, 8, gradient=gradient)
    found, error = log_normalizer(particles)
    assert error < 0.12
    assert abs(found - exact_log_normalizer()) < 3 * error


def test_guidance_alone_is_not_the_tilted_law():
    """The same gradient without weights, r(x) = x_2, beta = 3, in 80 steps: the mean is off by more than eight standard
    errors, three times the error of as many weighted particles in 20 steps."""

    def second(x):
        return x.flatten(1)[:, 1]

    tilted = mixture().tilted(torch.tensor([0.0, 1.0, 0.0]), 3.0)
    exact = (tilted.mixture.weights[:, None] * tilted.mixture.means).sum(0)
    particles = run(16, 250, score=second, beta=3.0, gradient=True)
    corrected, _ = estimate(vectors(particles), particles)
    guided = vectors(run(1, 4000, score=second, beta=3.0, gradient=True, threshold=0.0, steps=80))[0]
    bias = float((guided.mean(0) - exact).norm())
    assert bias > 8 * float(guided.std(0).norm()) / math.sqrt(len(guided))
    assert float((corrected - exact).norm()) < bias / 3


def test_best_of_n_has_its_own_law():
    """The best of N plain samples: P(reward <= q) = F(q)^N, which is not the tilted law."""
    n, exact = 8, reward(mixture().sample(20000, generator=seeded(1))).sort().values
    particles = run(300, n, beta=0.0)
    assert not particles.resampled.any()
    best = particles.rewards.gather(1, best_of(particles)[:, None])[:, 0]
    for level in (0.25, 0.5, 0.75):
        quantile = float(exact[int(level ** (1 / n) * len(exact))])
        assert float((best <= quantile).double().mean()) == pytest.approx(level, abs=0.09)  # 3 standard errors


def test_weights_do_not_need_the_twist():
    """Without twists before the end (schedule 0) it is importance sampling: exp(beta r) at the last state."""
    particles = run(2, 64, schedule=[0.0] * STEPS)
    torch.testing.assert_close(particles.log_weights, (BETA * particles.rewards).log_softmax(-1))
    assert not particles.resampled.any()


def test_negative_beta_tilts_the_other_way():
    mean, error = estimate(vectors(particles := run(16, 128, beta=-1.0)), particles)
    assert ((mean - exact_mean(-1.0)).abs() < 3 * error + 0.01).all()


# -- its parts --


@given(st.lists(st.floats(-20, 5), min_size=1, max_size=30), st.integers(0, 100))
def test_systematic_resampling(log_weights, seed):
    """Particle i has floor(N w_i) or ceil(N w_i) children."""
    log_weights = torch.tensor([log_weights], dtype=torch.float64)
    n = log_weights.shape[1]
    counts = systematic_resample(log_weights, seeded(seed))[0].bincount(minlength=n).double()
    expected = n * log_weights[0].softmax(0)
    assert ((counts > expected - 1 - 1e-9) & (counts < expected + 1 + 1e-9)).all()


def test_systematic_resampling_is_unbiased():
    weights = torch.tensor([[0.05, 0.6, 0.15, 0.2]], dtype=torch.float64)
    index = systematic_resample(weights.log().expand(4000, 4), seeded())
    counts = torch.nn.functional.one_hot(index, 4).double().sum(1).mean(0)
    torch.testing.assert_close(counts, 4 * weights[0], atol=0.02, rtol=0)


def test_effective_sample_size():
    """N for equal weights, 1 for a single one, (sum w)^2 / sum w^2 between."""
    assert float(effective_sample_size(torch.zeros(7))) == pytest.approx(7)
    assert float(effective_sample_size(torch.tensor([0.0, -1e9]))) == pytest.approx(1)
    w = torch.tensor([0.5, 0.25, 0.25])
    assert float(effective_sample_size(w.log() + 3)) == pytest.approx(1 / (0.25 + 2 * 0.0625))


def test_one_gaussian_step_with_gradient_is_exact():
    """For a linear reward and a Gaussian transition the shifted proposal is the tilted law: after the last step the
    weights say nothing."""

    def kernel(k, x):
        return Transition(torch.zeros_like(x), 0.7, x)

    x = torch.zeros(2, 50, 1, dtype=torch.float64)
    found = twisted_smc(kernel, lambda y: 1.3 * y[:, 0], x, steps=1, beta=1.0, gradient=True, generator=seeded())
    torch.testing.assert_close(found.log_weights, torch.full((2, 50), -math.log(50), dtype=torch.float64))
    torch.testing.assert_close(found.log_normalizer, torch.full((2,), 0.5 * (1.3 * 0.7) ** 2, dtype=torch.float64))
    assert float(found.samples.mean()) == pytest.approx(1.3 * 0.49, abs=0.25)


def test_draw_follows_the_weights():
    particles = run(3, 4)
    object.__setattr__(particles, "log_weights", torch.tensor([[0.7, 0.1, 0.1, 0.1]] * 3).log())
    counts = torch.stack([draw(particles, seeded(i)) for i in range(400)]).flatten().bincount(minlength=4) / 1200
    torch.testing.assert_close(counts, torch.tensor([0.7, 0.1, 0.1, 0.1]), atol=0.05, rtol=0)


def test_one_seed_one_result():
    assert torch.equal(run(2, 8, seed=5).samples, run(2, 8, seed=5).samples)
    assert not torch.equal(run(2, 8, seed=5).samples, run(2, 8, seed=6).samples)


@pytest.mark.parametrize(
    "wrong, words",
    [
        (lambda x: x, "one number a sample"),
        (lambda x: 3.0, "one number a sample, not float"),
        (lambda x: x.flatten(1).sum(1) * math.nan, "NaN"),
    ],
)
def test_wrong_rewards(wrong, words):
    """One sentence, before any work is lost: the first evaluation raises."""
    with pytest.raises(ValueError, match=words):
        evaluate_reward(wrong, randn(4, 1, 2, 2))
    for beta in (BETA, 0.0):
        scheduler = ReverseSDEScheduler(**SETTINGS)
        with pytest.raises(ValueError, match=words):
            run(1, 4, score=wrong, scheduler=scheduler, beta=beta)
        assert scheduler.step_index == 1


def test_reward_without_gradient():
    with pytest.raises(ValueError, match="gradient=False"):
        run(1, 4, score=lambda x: (x > 0).double().flatten(1).sum(1), gradient=True)


def test_wrong_shapes():
    with pytest.raises(ValueError, match="populations, particles"):
        twisted_smc(lambda k, x: x, reward, torch.zeros(4, 3), steps=1, beta=1.0)
    with pytest.raises(ValueError, match="one a step"):
        run(1, 4, schedule=[1.0])


# -- the scheduler as a kernel --


@pytest.mark.parametrize("cls, options", [(ReverseSDEScheduler, {}), (ReverseSDEScheduler, {"solver_order": 3})])
def test_reorder_takes_the_history_along(cls, options):
    """After reorder([1, 1, 0]) the multistep states go on as those of samples 1, 1, 0."""
    x, model, means = randn(2, 1, 1, 3, dtype=torch.float64), network_denoiser(mixture()), []
    for batch in (x, x[[1, 1, 0]]):
        scheduler = cls(**options)
        scheduler.set_timesteps(6)
        for k, t in enumerate(scheduler.timesteps[:4]):
            out = scheduler.step(model(batch, t), t, batch)
            batch = out.prev_sample_mean
            if k == 2 and len(batch) == 2:
                scheduler.reorder(torch.tensor([1, 1, 0]))
                batch = batch[[1, 1, 0]]
        means.append(batch)
    torch.testing.assert_close(*means)


def test_gradient_needs_no_graph_of_earlier_steps():
    """A multistep scheduler keeps evaluations: they are cut off from autograd."""
    scheduler = ReverseSDEScheduler(**SETTINGS)
    run(1, 4, scheduler=scheduler, gradient=True)
    assert all(not evaluation.requires_grad for evaluation in scheduler._run.history)


@pytest.mark.parametrize(
    "scheduler",
    [
        DPMSolverScheduler(algorithm_type="sde-dpmsolver++"),
        ReverseSDEScheduler(tau=0.7, solver_order=1),
        ReverseSDEScheduler(data_std=0.5, tau=2.0),
    ],
    ids=["dpm", "order1", "tau2"],
)
def test_every_stochastic_scheduler_can_be_steered(scheduler):
    mean, error = estimate(vectors(particles := run(16, 128, scheduler=scheduler, steps=40)), particles)
    assert ((mean - exact_mean()).abs() < 4 * error + 0.06).all()


# -- the pipeline --


def oracle_pipeline(tmp_path, scheduler=None):
    DDPMPipeline(unet=mixture(), scheduler=scheduler or ReverseSDEScheduler(**SETTINGS)).save_pretrained(tmp_path)
    return load("steering", tmp_path)


def test_pipeline_on_the_oracle(tmp_path):
    """The pipeline's estimates are the closed forms within their error bars."""
    pipe = oracle_pipeline(tmp_path)
    out = pipe(reward, num_images=32, num_particles=128, beta=BETA, generator=seeded(), output_type="latent")
    assert out.images.shape == (32, 1, 1, 3) and out.rewards.shape == (32,)
    assert abs(out.mean_reward - float(exact_mean() @ V)) < 3 * out.mean_reward_error + 0.02
    assert abs(out.log_normalizer - exact_log_normalizer()) < 3 * out.log_normalizer_error + 0.02
    assert float(out.images.double().flatten(1).mean(0) @ V) == pytest.approx(float(exact_mean() @ V), abs=0.3)
    best = pipe(reward, num_images=32, num_particles=8, method="best_of_n", generator=seeded(), output_type="latent")
    assert best.mean_reward == pytest.approx(float(best.rewards.mean()))


def test_a_labelled_law_is_steered_without_guidance_unless_it_is_asked_for(tmp_path):
    """A guided kernel is another law, and the theorem's Z another number."""
    pipe = oracle_pipeline(tmp_path)
    options = {"class_labels": [1], "num_particles": 4, "num_inference_steps": 4, "output_type": "latent"}
    plain, one, two = (
        pipe(reward, **options, **g, generator=seeded()) for g in ({}, {"guidance_scale": 1.0}, {"guidance_scale": 2.0})
    )
    torch.testing.assert_close(plain.images, one.images, rtol=0, atol=0)
    assert (plain.images - two.images).abs().max() > 1e-3


def test_pipeline_refuses(tmp_path):
    """One sentence that says what to do."""
    pipe = oracle_pipeline(tmp_path)
    for wrong, words in (
        ({"method": "mcmc"}, "smc or best_of_n"),
        ({"num_particles": 0}, "at least 1"),
        ({"beta": math.inf}, "finite"),
        ({"generator": [seeded()]}, "one generator"),
        ({"class_labels": [5]}, "from 0 to 2"),
        ({"latents": randn(1, 2, 1, 1, 3)}, "latents"),
        ({"latents": randn(16, 1, 1, 1, 3)}, r"expected \(1, 16\)"),
        ({"output_type": "jpeg"}, "output_type"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe(reward, **wrong)
    for scheduler in (ProbabilityFlowScheduler(), diffusers.DDPMScheduler(), FlowMapScheduler(gamma=0.0)):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=r"ReverseSDEScheduler\.from_config"):
            pipe(reward)


def test_network_batches_do_not_matter(tmp_path):
    """max_batch_size splits the network's calls, not the result; labels and guidance go along."""
    pipe = load("steering", FASHION_MODEL)
    pipe.scheduler = ReverseSDEScheduler.from_config(pipe.scheduler.config)
    images = [
        pipe(
            lambda x: x.mean((1, 2, 3)),
            class_labels=[1, 7],
            num_particles=3,
            num_inference_steps=3,
            guidance_scale=2.0,
            max_batch_size=size,
            generator=seeded(),
            output_type="latent",
        ).images
        for size in (4, 64)
    ]
    torch.testing.assert_close(*images, rtol=1e-3, atol=1e-3)


def test_half_precision(tmp_path):
    """Particles of a bfloat16 network, steered by gradient, are finite, their weights in float64."""
    DDPMPipeline(unet=tiny_unet(classes=5), scheduler=ReverseSDEScheduler()).save_pretrained(tmp_path)
    pipe = load("steering", tmp_path, dtype=torch.bfloat16)
    out = pipe(
        lambda x: x.mean((1, 2, 3)), class_labels=[1, 2], num_particles=3, num_inference_steps=4, use_gradient=True
    )
    assert out.particles.samples.dtype == torch.bfloat16 and out.particles.samples.isfinite().all()
    assert out.particles.log_weights.dtype == torch.float64


@pytest.mark.slow
def test_snippet():
    """The usage in the pipeline's docstring runs as it stands, and steers: dark, plain and bright pictures."""
    found = run_snippet("steering")
    assert found["image"].size == (512, 384)
    dark, plain, bright = np.reshape([np.mean(image) for image in found["rows"]], (3, 4)).mean(1)
    assert dark < plain < bright
