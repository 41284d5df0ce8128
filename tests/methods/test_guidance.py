"""Guidance against the exact conditional and tilted laws of mixtures, its formulas, the classifier, the pipeline."""

import functools
import math

import diffusers
import numpy as np
import pytest
import torch
from contract_helpers import randn, relative, seeded
from diffusers import DDPMPipeline
from helpers import COSINE, LINEAR, MIXTURE, PATHS, mixture, nodes_of, run_table
from pipeline_parts import RelabelledModel, relabelled_grid, tiny_unet
from scipy.stats import norm
from snippets import load, run
from stated import stated

from diffusers_sde import (
    DPMSolverScheduler,
    FlowMapScheduler,
    GaussianMixtureModel,
    NoisyClassifierModel,
    ProbabilityFlowScheduler,
    ReverseSDEScheduler,
)
from diffusers_sde.assets import FASHION_MODEL
from diffusers_sde.methods.control import estimate, scheduler_kernel, twisted_smc
from diffusers_sde.methods.guidance import (
    adaptive_projection,
    cfg_plus_plus_scale,
    classifier_free,
    classifier_gradient,
    data_shift,
    interval_scale,
    rescaled,
)
from diffusers_sde.sampling import network_denoiser
from diffusers_sde.tables import build_multistep

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
PROCESSES = {"linear": LINEAR, "v_prediction": {**COSINE, "prediction_type": "v_prediction"}, "flow": FLOW}
by_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def exact_classifier(model):
    """Logits log w_k N(x; alpha m_k, S_k) of the component, differentiable."""

    def classify(x, t):
        alpha, sigma = (float(v) for v in model.path.alpha_sigma(float(t)))
        return model.mixture._components(x.double().reshape(len(x), -1), alpha, sigma)[0]

    return classify


def oracle(tmp_path, scheduler, process=None, model=None):
    model = model or mixture(**(process or {}))
    DDPMPipeline(unet=model, scheduler=scheduler).save_pretrained(tmp_path)
    return load("guided_generation", tmp_path)


# -- the statements --


@pytest.mark.parametrize("alpha, sigma", [(0.999, 0.045), (0.8, 0.6), (0.3, 0.7), (0.05, 1.0), (1.0, 20.0)])
def test_the_exact_classifier_gives_the_conditional_prediction(alpha, sigma):
    """D_null + sigma^2/alpha grad log p_t(y | x) = D_y (Fu & Wang, arXiv:2605.22586, section 6): Bayes' rule."""
    model, x, labels = mixture(), randn(30, 1, 1, 3, dtype=torch.float64), torch.arange(30) % 3
    x = x * math.hypot(alpha, sigma)

    def classify(x, t):
        return model.mixture._components(x.reshape(len(x), -1), alpha, sigma)[0]

    gradient = classifier_gradient(classify, lambda y: y, x, None, labels)
    found = model.posterior_mean(x, alpha, sigma) + data_shift(gradient, alpha, sigma)
    torch.testing.assert_close(found, model.posterior_mean(x, alpha, sigma, labels), rtol=1e-7, atol=1e-7)


@by_process
@pytest.mark.parametrize("cls", [ProbabilityFlowScheduler, ReverseSDEScheduler, DPMSolverScheduler])
def test_classifier_guidance_at_scale_one_is_conditional_sampling(cls, process, tmp_path):
    """Unconditional network and exact classifier, from the same noise, against the conditional network: the same
    pictures with every scheduler, ODE and SDE."""
    pipe, labels = oracle(tmp_path, cls(**process), process), [0, 1, 2, 2]
    # below alpha = 0, where a classifier's gradient says nothing
    common = {"class_labels": labels, "timesteps": [990, 700, 400, 200, 60, 5], "output_type": "latent"}
    conditional = pipe(guidance_scale=1.0, generator=seeded(), **common).images
    found = pipe(guidance_scale=0.0, classifier=exact_classifier(pipe.unet), generator=seeded(), **common).images
    assert relative(found, conditional) < 1e-3  # float32 states and outputs
    assert relative(pipe(guidance_scale=0.0, generator=seeded(), **common).images, conditional) > 0.1


@pytest.mark.parametrize("cls", [ProbabilityFlowScheduler, ReverseSDEScheduler])
def test_scale_one_samples_the_component(cls, tmp_path):
    """Classifier-free guidance at scale 1: mean and standard deviation of component 1, in ODE and SDE form."""
    pipe = oracle(tmp_path, cls(solver_order=2, data_std=0.5))
    x = pipe(class_labels=[1] * 2000, guidance_scale=1.0, generator=seeded(), output_type="latent").images.flatten(1)
    torch.testing.assert_close(x.mean(0).double(), torch.tensor([-1.5, 0.3, 0.0]).double(), atol=0.04, rtol=0)
    torch.testing.assert_close(x.std(0), torch.full((3,), math.sqrt(0.2)), atol=0.03, rtol=0)


LINE = {"weights": [0.5, 0.5], "means": [[-0.6], [0.6]], "covariances": [0.25, 0.25]}


def tilted_moments(scale):
    """Mean and standard deviation of p(x) p(y = 1 | x)^scale / Z on the line, by the trapezoid rule."""
    x = np.linspace(-6, 6, 20001)
    parts = [0.5 * np.exp(-0.5 * (x - m[0]) ** 2 / c) for m, c in zip(LINE["means"], LINE["covariances"], strict=True)]
    density = sum(parts) * (parts[1] / sum(parts)) ** scale
    density /= density.sum()
    mean = (density * x).sum()
    return mean, math.sqrt((density * (x - mean) ** 2).sum())


def line_sample(scale, n=4000, steps=60):
    """Classifier-free guidance on the line, solved accurately."""
    model, scheduler = GaussianMixtureModel(**LINE), ProbabilityFlowScheduler(grid="log_snr")
    scheduler.set_timesteps(steps)
    x, labels = randn(n, 1, 1, 1, dtype=torch.float64), torch.ones(n, dtype=torch.int64)
    for t in scheduler.timesteps:
        null, conditional = model(x, t).sample, model(x, t, labels).sample
        x = scheduler.step(classifier_free(null, conditional, scale), t, x).prev_sample
    return x.flatten()


def test_guidance_above_one_is_not_the_tilted_law():
    """p(x) p(y|x)^w at w = 5: classifier-free guidance misses its mean and spread by many standard errors (0.01), in
    the limit of small steps; twisted Monte Carlo with the reward log p(y|x) has both (Lu, arXiv:2607.01693, section 8).
    At w = 1 the two laws agree."""
    mean, std = tilted_moments(1.0)
    x = line_sample(1.0)
    assert float(x.mean()) == pytest.approx(mean, abs=0.03) and float(x.std()) == pytest.approx(std, abs=0.03)

    mean, std = tilted_moments(5.0)
    x = line_sample(5.0)
    assert float(x.mean()) > mean + 0.2 and float(x.std()) < 0.8 * std
    finer = line_sample(5.0, steps=120)  # it is the law of the guided ODE, no error of its solution
    assert float(finer.mean()) == pytest.approx(float(x.mean()), abs=0.02)

    model, scheduler = GaussianMixtureModel(**LINE), ReverseSDEScheduler(data_std=0.5)
    scheduler.set_timesteps(30)

    def reward(x):
        return model.mixture._components(x.double().reshape(-1, 1), 1.0, 0.0)[0].log_softmax(1)[:, 1]

    start = randn(16, 256, 1, 1, 1, dtype=torch.float64)
    particles = twisted_smc(
        scheduler_kernel(network_denoiser(model), scheduler),
        reward,
        start,
        steps=30,
        beta=5.0,
        generator=seeded(),
        reorder=scheduler.reorder,
    )
    values = particles.samples.reshape(16, 256)
    found, error = estimate(values, particles)
    assert abs(float(found) - mean) < 3 * float(error) + 0.02
    second, error = estimate(values**2, particles)
    assert math.sqrt(float(second) - float(found) ** 2) == pytest.approx(std, abs=0.05)


# -- the formulas --


def test_cfg_plus_plus_is_the_published_step():
    """alpha' (D_0 + s (D_y - D_0)) + sigma' eps_0 (arXiv:2406.08070, algorithm 2) = a DDIM step with the scale."""
    alpha, sigma, alpha_next, sigma_next, strength = 0.6, 0.8, 0.8, 0.6, 0.7
    x, null, conditional = (randn(2, 1, 2, 2, seed=i, dtype=torch.float64) for i in range(3))
    expected = alpha_next * torch.lerp(null, conditional, strength) + sigma_next * (x - alpha * null) / sigma
    scale = cfg_plus_plus_scale(strength, math.log(alpha / sigma), math.log(alpha_next / sigma_next))
    guided = classifier_free(null, conditional, scale)
    torch.testing.assert_close(alpha_next * guided + sigma_next * (x - alpha * guided) / sigma, expected)
    assert cfg_plus_plus_scale(strength, -1.0, math.inf) == strength  # the step to clean data


def test_interval():
    """The scale inside (low, high], 1 outside, everywhere without an interval."""
    assert [interval_scale(5.0, s, (0.3, 2.0)) for s in (0.3, 0.31, 2.0, 2.1)] == [1.0, 5.0, 5.0, 1.0]
    assert interval_scale(5.0, math.inf, None) == 5.0


def test_rescale_is_diffusers():
    """rescale_noise_cfg of diffusers' Stable Diffusion pipeline."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    guided, conditional = 3 * randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
    for amount in (0.0, 0.7, 1.0):
        expected = rescale_noise_cfg(guided, conditional, guidance_rescale=amount)
        torch.testing.assert_close(rescaled(guided, conditional, amount), expected)
    torch.testing.assert_close(rescaled(guided, conditional, 1.0).std((1, 2, 3)), conditional.std((1, 2, 3)))


def test_adaptive_projection():
    """parallel = 1 is classifier-free guidance; parallel = 0 moves orthogonally to D_y; the threshold bounds the move;
    momentum adds the running average (Sadat et al. 2024, arXiv:2410.02416, algorithm 1)."""
    null, conditional = (randn(3, 1, 4, 4, seed=i, dtype=torch.float64) for i in range(2))
    found, average = adaptive_projection(null, conditional, 4.0, parallel=1.0)
    torch.testing.assert_close(found, classifier_free(null, conditional, 4.0))
    torch.testing.assert_close(average, conditional - null)
    moved = adaptive_projection(null, conditional, 4.0)[0] - conditional
    assert (moved * conditional).flatten(1).sum(1).abs().max() < 1e-12
    assert moved.abs().max() > 0.1
    short = adaptive_projection(null, conditional, 4.0, parallel=1.0, norm_threshold=0.5)[0] - conditional
    torch.testing.assert_close(short.flatten(1).norm(dim=1), torch.full((3,), 1.5, dtype=torch.float64))
    again, average = adaptive_projection(null, conditional, 4.0, parallel=1.0, momentum=-0.5, average=average)
    torch.testing.assert_close(average, 0.5 * (conditional - null))
    torch.testing.assert_close(again, conditional + 1.5 * (conditional - null))


def test_wrong_classifiers():
    x, labels = randn(2, 1, 4, 4), torch.tensor([0, 3])
    with pytest.raises(ValueError, match="logits"):
        classifier_gradient(lambda y, t: y.sum(), lambda y: y, x, 0, labels)
    with pytest.raises(ValueError, match="labels 0 to 2 only"):
        classifier_gradient(lambda y, t: y.flatten(1)[:, :3], lambda y: y, x, 0, labels)
    with pytest.raises(ValueError, match="zero SNR"):
        data_shift(x, 0.0, 1.0)


# -- the classifier --


def test_noisy_classifier_learns_saves_and_loads(tmp_path):
    """Two classes of 8x8 pictures at many noise levels: the loss falls well below log 2; saves and loads."""
    torch.manual_seed(0)
    model = NoisyClassifierModel(sample_size=8, num_classes=2, block_out_channels=(8, 16), norm_num_groups=4)
    pattern, path = torch.ones(1, 1, 8, 8), ProbabilityFlowScheduler().path
    pattern[..., 4:] = -1
    optimizer, losses = torch.optim.Adam(model.parameters(), 5e-3), []
    for _ in range(60):
        labels, t = torch.randint(2, (32,)), torch.randint(400, (32,))
        alpha, sigma = (torch.from_numpy(v).float().reshape(-1, 1, 1, 1) for v in path.alpha_sigma(t.numpy()))
        x = alpha * pattern * (2 * labels - 1).reshape(-1, 1, 1, 1) + sigma * torch.randn(32, 1, 8, 8)
        loss = torch.nn.functional.cross_entropy(model(x, t), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert np.mean(losses[-10:]) < 0.2 < np.mean(losses[:3])
    model.save_pretrained(tmp_path)
    loaded = NoisyClassifierModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(x, 5.0), model(x, torch.full((32,), 5.0)))


def test_noisy_classifier_is_small():
    assert sum(p.numel() for p in NoisyClassifierModel().parameters()) < 500_000


def test_guidance_is_not_the_tilted_law():
    """Two Gaussians on a line, w = 5: the ODE of the guided data prediction against ``p(x) p(y|x)^5`` by a sum over x
    (Lu, arXiv:2607.01693, section 8)."""
    model = GaussianMixtureModel([0.5, 0.5], [[-0.5], [0.5]], [0.25, 0.25])
    edm = PATHS["edm"]
    nodes = nodes_of(edm, np.linspace(-6, 8, 400))

    def guided(x, row):
        null, conditional = (
            model.posterior_mean(x, row.alpha, row.sigma, label)
            for label in (None, torch.ones(len(x), dtype=torch.long))
        )
        return null + 5 * (conditional - null)

    start = norm.ppf((np.arange(2000) + 0.5) / 2000) * nodes.sigma[0]
    found = run_table(build_multistep(edm, nodes, order=3), guided, torch.from_numpy(start)[:, None])
    assert [float(found.mean()), float(found.std())] == pytest.approx([1.30, 0.28], abs=0.01)
    x = np.linspace(-5, 5, 4001)
    low, high = norm.pdf(x, -0.5, 0.5), norm.pdf(x, 0.5, 0.5)
    tilted = (low + high) * (high / (low + high)) ** 5
    mean = np.average(x, weights=tilted)
    assert [mean, np.average((x - mean) ** 2, weights=tilted) ** 0.5] == pytest.approx([0.81, 0.37], abs=0.005)
    stated(
        "CFG is not the tilted law: on two Gaussians of std .5 at -.5 and .5 it has mean 1.30 and std .28 at w = 5, "
        "`p(x) p(y given x)^5` .81 and .37"
    )


# -- the pipeline --
# Each option against the published algorithm, written out on the exact data predictions of the mixture.


def published(option, model, x, t, label, average):
    """``(D, eps, average)`` of one evaluation of a published algorithm: what a DDIM step goes to and re-noises with."""
    path, kind = model.path, model._process["prediction_type"]
    alpha, sigma = (float(v) for v in path.alpha_sigma(t))
    conditional, null = (model.posterior_mean(x, alpha, sigma, torch.full((len(x),), k)) for k in (label, 3))
    level = sigma / alpha if alpha else math.inf

    def noise(data):
        return (x - alpha * data) / sigma

    if option == "plain":
        data = null + 4.0 * (conditional - null)
    elif option == "cfg_plus_plus":  # Chung et al. 2024, arXiv:2406.08070, algorithm 2
        return null + 0.6 * (conditional - null), noise(null), None
    elif option == "interval":  # Kynkaanniemi et al. 2024, arXiv:2404.07724, eq. 5
        data = null + (4.0 if 0.5 < level <= 5.0 else 1.0) * (conditional - null)
    elif option == "rescale":  # Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16, on what the network returns
        guided = null + 4.0 * (conditional - null)
        output, own = (noise(v) if kind == "epsilon" else noise(v) - v for v in (guided, conditional))
        ratio = own.flatten(1).std(1) / output.flatten(1).std(1)
        output = output * (0.3 + 0.7 * ratio).reshape(-1, 1, 1, 1)
        data = (x - sigma * output) / (alpha if kind == "epsilon" else 1.0)
    elif option == "momentum":  # Sadat et al. 2024, arXiv:2410.02416, algorithm 1, parallel part kept by 0.3
        average = (conditional - null) - 0.5 * (0 if average is None else average)
        size = average.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        move = average * torch.where(size > 1.5, 1.5 / size, 1.0)
        inner = (move * conditional).flatten(1).sum(1) / conditional.flatten(1).square().sum(1)
        along = inner.reshape(-1, 1, 1, 1) * conditional
        data = conditional + (4.0 - 1) * ((move - along) + 0.3 * along)
    return data, noise(data), average


OPTIONS = {
    "plain": {},
    "cfg_plus_plus": {"guidance_scale": 0.6, "cfg_plus_plus": True},
    "interval": {"guidance_interval": (0.5, 5.0)},
    "rescale": {"guidance_rescale": 0.7},
    "momentum": {"apg_parallel": 0.3, "apg_norm_threshold": 1.5, "apg_momentum": -0.5},
}


@pytest.mark.parametrize("process", [LINEAR, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_pipeline_runs_the_published_algorithm(option, process, tmp_path):
    """Five DDIM steps with each option, from the same noise: the states of the publication, sample by sample."""
    pipe, x = oracle(tmp_path, ProbabilityFlowScheduler(**process, solver_order=1), process), randn(6, 1, 1, 3)
    times = [980.0, 750.0, 500.0, 250.0, 60.0]
    levels = [pipe.unet.path.alpha_sigma(t) for t in times] + [(1.0, 0.0)]
    found = pipe(
        [1] * 6,
        timesteps=times,
        latents=x,
        output_type="latent",
        **{"guidance_scale": 4.0, **OPTIONS[option]},
    ).images
    expected, average = x.double(), None
    for t, (alpha, sigma) in zip(times, levels[1:], strict=True):
        data, eps, average = published(option, pipe.unet, expected, t, 1, average)
        expected = float(alpha) * data + float(sigma) * eps
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("process", [LINEAR, FLOW], ids=["vp", "flow"])
def test_an_exact_classifier_guides_as_the_network_does(process, tmp_path):
    """From the unconditional prediction, classifier_scale s with the exact classifier is classifier-free guidance of
    scale s: ``D_0 + s (D_y - D_0)``, as Bayes' rule has it at s = 1."""
    pipe = oracle(tmp_path, ProbabilityFlowScheduler(**process, solver_order=1), process)
    common = {"class_labels": [0, 1, 2], "timesteps": [950, 600, 200], "output_type": "latent"}
    latents = randn(3, 1, 1, 3)
    free = pipe(guidance_scale=2.5, latents=latents, **common).images
    guided = {"guidance_scale": 0.0, "classifier": exact_classifier(pipe.unet), "classifier_scale": 2.5}
    torch.testing.assert_close(pipe(**guided, latents=latents, **common).images, free, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_loop_guides_a_network_by_the_formula(scale):
    """``m_0 + w (m_y - m_0)`` with the labels of each sample, as tools outside pipelines sample a network."""
    model, x, labels = mixture(), randn(4, 1, 1, 3), torch.tensor([2, 0, 1, 1])
    null, conditional = model(x, 400).sample, model(x, 400, labels).sample
    found = network_denoiser(model, labels, scale)(x, 400)
    torch.testing.assert_close(found, null + scale * (conditional - null))


def test_guidance_is_computed_at_the_levels_of_the_run():
    """``timesteps`` and ``sigmas`` of the user's own: a network that counts its time differently, on the grid that says
    so, is guided as the usual network on the usual grid, with every option that knows the level."""
    times = [950, 800, 600, 450, 300, 210]
    model = mixture()
    relabelled = RelabelledModel(*MIXTURE)
    for options in (
        {"guidance_scale": 0.6, "cfg_plus_plus": True},
        {"guidance_scale": 4.0, "guidance_interval": (0.5, 5.0)},
        {"guidance_scale": 4.0, "apg_parallel": 0.0},
        {"guidance_scale": 4.0, "corrector_steps": 1},
        {"guidance_scale": 4.0, "restart": (0.5, 5.0, 1)},
    ):
        found = []
        for network, grid in ((model, {"timesteps": times}), (relabelled, relabelled_grid(model.path, times))):
            pipe = pipeline()(unet=network, scheduler=ReverseSDEScheduler())
            pipe.set_progress_bar_config(disable=True)
            found.append(pipe([0, 1, 2], generator=seeded(), output_type="latent", **grid, **options).images)
        torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-3)


@functools.cache
def pipeline():
    return type(load("guided_generation", FASHION_MODEL))


@pytest.mark.parametrize(
    "scheduler",
    [
        ProbabilityFlowScheduler(),
        ReverseSDEScheduler(),
        DPMSolverScheduler(algorithm_type="sde-dpmsolver++"),
        FlowMapScheduler(),
        ProbabilityFlowScheduler(**FLOW),
        ReverseSDEScheduler(sigma_data=0.5),
        ProbabilityFlowScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
    ],
    ids=["ode", "sde", "dpm", "flow_map", "flow", "edm", "zero_snr"],
)
def test_every_option_with_every_scheduler(scheduler, tmp_path):
    """A network, all options, all kinds of scheduler: they run, and those that must change nothing do not (a weak model
    that is the model itself, an interval without levels)."""
    DDPMPipeline(unet=tiny_unet(classes=5), scheduler=scheduler).save_pretrained(tmp_path)
    pipe = load("guided_generation", tmp_path)

    def run(**options):
        values = pipe(
            class_labels=[0, 3], num_inference_steps=3, generator=seeded(), output_type="latent", **options
        ).images
        assert values.shape == (2, 1, 8, 8) and values.isfinite().all()
        return values

    plain = run(guidance_scale=1.0)
    options = [
        {"guidance_scale": 4.0},
        {"guidance_scale": 0.6, "cfg_plus_plus": True},
        {"guidance_scale": 4.0, "guidance_rescale": 0.7},
        {"guidance_scale": 4.0, "apg_parallel": 0.0, "apg_norm_threshold": 1.0, "apg_momentum": -0.5},
    ]
    alpha = float(scheduler.path.alpha_sigma(scheduler.path.noisiest)[0])
    if alpha > 0:
        classifier = NoisyClassifierModel(sample_size=8, num_classes=4, block_out_channels=(8, 16))
        options.append({"guidance_scale": 1.0, "classifier": classifier, "classifier_scale": 5.0})
    for chosen in options:
        assert not torch.equal(run(**chosen), plain), chosen
    itself = run(guidance_scale=2.0, weak_unet=tiny_unet(classes=5))  # a weak model that is the model changes nothing
    torch.testing.assert_close(itself, plain, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(run(guidance_scale=4.0, guidance_interval=(1e6, 2e6)), plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype, tmp_path):
    """A network in half precision: pictures in its dtype, close to those in float32, with correctors and a classifier
    in float32."""
    DDPMPipeline(unet=tiny_unet(classes=5), scheduler=ReverseSDEScheduler()).save_pretrained(tmp_path)
    classifier, results = NoisyClassifierModel(sample_size=8, num_classes=4, block_out_channels=(8, 16)), []
    for kind in (torch.float32, dtype):
        pipe = load("guided_generation", tmp_path, dtype=kind)
        images = pipe(
            [0, 3],
            num_inference_steps=4,
            apg_parallel=0.5,
            classifier=classifier,
            corrector_steps=1,
            latents=randn(2, 1, 8, 8).to(kind),
            generator=seeded(),
            output_type="latent",
        ).images
        assert images.dtype == kind
        results.append(images.float())
    assert relative(results[1], results[0]) < 0.2


def test_autoguidance_moves_away_from_the_weak_model(tmp_path):
    """m_weak + w (m - m_weak) with the label, in one step."""
    pipe, x = oracle(tmp_path, ProbabilityFlowScheduler()), randn(3, 1, 1, 3)
    weak = GaussianMixtureModel(*[[0.3, 0.5, 0.2], [[0.5, -0.5, 0.2]] * 3, [1.0, 1.0, 1.0]])
    labels = torch.tensor([0, 1, 2])
    found = pipe(
        labels, num_inference_steps=1, guidance_scale=2.5, weak_unet=weak, latents=x, output_type="latent"
    ).images
    m = torch.lerp(weak(x, 999, labels).sample, pipe.unet(x, 999, labels).sample, 2.5)
    pipe.scheduler.set_timesteps(1)
    torch.testing.assert_close(found, pipe.scheduler.step(m, pipe.scheduler.timesteps[0], x).prev_sample)


def test_unconditional_network_with_classifier(tmp_path):
    """A network without classes is guided by a classifier, and by nothing else."""
    DDPMPipeline(unet=tiny_unet(classes=None), scheduler=ReverseSDEScheduler()).save_pretrained(tmp_path)
    pipe = load("guided_generation", tmp_path)
    classifier = NoisyClassifierModel(sample_size=8, num_classes=4, block_out_channels=(8, 16))
    images = pipe([1, 2], guidance_scale=1.0, classifier=classifier, num_inference_steps=2).images
    assert len(images) == 2
    with pytest.raises(ValueError, match="class for 'none'"):
        pipe([1, 2], guidance_scale=3.0)


def test_pipeline_refuses(tmp_path):
    """One sentence that says what to do."""
    pipe = oracle(tmp_path, ProbabilityFlowScheduler())
    for wrong, words in (
        ({}, "class_labels"),
        ({"class_labels": [4]}, "from 0 to 2"),
        ({"class_labels": [0, 1], "num_images": 3}, "one for each"),
        ({"class_labels": 0, "guidance_scale": 3.0, "cfg_plus_plus": True}, "0.6"),
        ({"class_labels": 0, "guidance_scale": 0.5, "cfg_plus_plus": True, "guidance_interval": (0, 1)}, "leave out"),
        ({"class_labels": 0, "guidance_interval": (2, 1)}, "low, high"),
        ({"class_labels": 0, "guidance_rescale": 2.0}, "guidance_rescale"),
        ({"class_labels": 0, "weak_unet": tiny_unet(classes=None)}, "weak_unet"),
        ({"guidance_scale": 0.0, "classifier": exact_classifier(mixture())}, "class_labels"),
        ({"class_labels": 0, "output_type": "jpeg"}, "output_type"),
        ({"class_labels": 0, "latents": randn(1, 3, 2, 2)}, "latents"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe(**wrong)
    pipe.scheduler = diffusers.DDPMScheduler()
    with pytest.raises(ValueError, match=r"ProbabilityFlowScheduler\.from_config"):
        pipe(0)


@pytest.mark.slow
def test_snippet():
    """The usage in the pipeline's docstring runs as it stands; every kind of guidance changes the pictures."""
    found = run("guided_generation")
    assert found["image"].size == (480, 480)
    rows = np.reshape([np.asarray(image) for image in found["rows"]], (5, 5, 32, 32)).astype(float)
    assert all(np.abs(rows[i] - rows[j]).mean() > 1 for i in range(5) for j in range(i))
