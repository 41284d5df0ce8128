"""pipelines/posterior_sampling.py and methods/posterior.py, against the exact posteriors of mixtures."""

import functools
import itertools
import math

import pytest
import torch
from pipeline_parts import (
    PROCESSES,
    ZERO_SNR,
    RelabelledModel,
    ddpm,
    oracle,
    relabelled_grid,
    save_oracle,
    tiny_unet,
    tiny_vae,
)
from snippets import load, run
from stated import stated

from diffusers_sde import GaussianMixtureModel, ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.assets import FASHION_MODEL
from diffusers_sde.methods.fields import network_field
from diffusers_sde.methods.posterior import (
    Measurement,
    adjoint,
    check_observation,
    conditional_mean,
    conjugate_gradients,
    gaussian_blur,
    inpainting,
    linear_map,
    super_resolution,
)
from diffusers_sde.sampling import network_denoiser, sample
from diffusers_sde.weights import Point

NOISE = 0.1


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(path):
    """Three noise levels, from nearly pure noise to nearly none."""
    return [Point(*(float(v) for v in path.alpha_sigma_of(log_snr))) for log_snr in (-3.0, 0.0, 3.0)]


def gaussian(process="vp"):
    """``x_0 ~ N(m, C)`` with a full covariance, a 2 x 4 operator, and one observation."""
    g = seeded(1)
    root = torch.randn(4, 4, generator=g, dtype=torch.float64) / 2
    process = ZERO_SNR if process == "zero_snr" else PROCESSES[process]
    model = GaussianMixtureModel([1.0], [[0.5, -0.3, 0.2, 0.0]], [(root @ root.T).tolist()], process=process)
    matrix = torch.randn(2, 4, generator=g, dtype=torch.float64)
    y = matrix @ model.sample(1, g).flatten() + NOISE * torch.randn(2, generator=g, dtype=torch.float64)
    return model, matrix, y


def field_of(model):
    return network_field(model, ReverseSDEScheduler(**model.config.process).config)


def sliced_wasserstein(a, b):
    """W2 over 200 directions; equal numbers of samples."""
    directions = torch.nn.functional.normalize(
        torch.randn(a[0].numel(), 200, dtype=torch.float64, generator=seeded(9)), dim=0
    )
    left, right = ((v.double().flatten(1) @ directions).sort(0).values for v in (a, b))
    return float((left - right).square().mean().sqrt())


@pytest.mark.parametrize("process", ["vp", "flow", "zero_snr"])
def test_mmps_is_exact_for_gaussian_data(process):
    """``E[x_0 | x_t, y]`` of the formula is that of the joint Gaussian, at every noise level; pigdm's is off by 1e-3
    and more where C is not isotropic."""
    model, matrix, y = gaussian(process)
    model.double()
    field = field_of(model)
    posterior = model.posterior(matrix, y, NOISE)
    x = torch.randn(5, 1, 1, 4, dtype=torch.float64, generator=seeded(2))
    measurement = Measurement(linear_map(matrix), y.expand(5, -1), NOISE)
    options = {"data_std": 0.6, "iterations": 8, "max_noise": math.inf}
    for point in points(field.path):
        exact = posterior.posterior_mean(x, point.alpha, point.sigma)
        mmps = conditional_mean(field, x, point, measurement, method="mmps", **options)[0]
        torch.testing.assert_close(mmps, exact, rtol=1e-5, atol=1e-5)  # the tolerance of conjugate gradients
    noisy = points(field.path)[0]
    pigdm = conditional_mean(field, x, noisy, measurement, method="pigdm", **options)[0]
    assert float((pigdm - posterior.posterior_mean(x, noisy.alpha, noisy.sigma)).abs().max()) > 1e-3


@pytest.mark.parametrize("process", ["flow", "zero_snr"])
def test_without_signal_the_conditional_mean_is_that_of_the_data(process):
    """At alpha = 0: ``E[x_0 | y]``, whatever x is, with the exact covariance of the data (mmps, max_noise = inf), with
    an isotropic one (a finite max_noise), and the step of dps is 0."""
    model, matrix, y = gaussian(process)
    field, measurement = field_of(model), Measurement(linear_map(matrix), y.expand(5, -1), NOISE)
    x, pure = torch.randn(5, 1, 1, 4, dtype=torch.float64, generator=seeded(2)), Point(0.0, 1.0)
    mean, covariance = model.mixture.means[0], model.covariances[0]

    def kalman(c):
        gain = c @ matrix.T @ torch.linalg.inv(matrix @ c @ matrix.T + NOISE**2 * torch.eye(2))
        return (mean + gain @ (y - matrix @ mean)).reshape(1, 1, 1, 4).expand(5, -1, -1, -1)

    for max_noise, c in ((math.inf, covariance), (5.0, 0.36 * torch.eye(4, dtype=torch.float64))):
        options = {"data_std": 0.6, "iterations": 8, "max_noise": max_noise}
        found = conditional_mean(field, x, pure, measurement, method="mmps", **options)[0]
        torch.testing.assert_close(found, kalman(c), rtol=1e-3, atol=1e-3)
    assert float(conditional_mean(field, x, pure, measurement, method="dps", max_noise=math.inf)[1].abs().max()) == 0.0


def test_the_ode_finds_the_posterior_of_gaussian_data():
    """Flow matching from alpha = 0: the probability-flow ODE of N(m, C) maps noise z to ``m + C^(1/2) z``, here with
    the posterior's m and C of each of three observations; the error falls with the order of the solver, 2."""
    model, matrix, _ = gaussian("flow")
    y = matrix @ model.sample(3, seeded(4)).reshape(3, 4, 1) + 0.0
    z = torch.randn(6, 1, 1, 4, generator=seeded(3))
    exact = []
    for k, observation in enumerate(y):
        posterior = model.posterior(matrix, observation, NOISE)
        values, vectors = torch.linalg.eigh(posterior.covariances[0])
        root = vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
        exact.append(posterior.mixture.means[0] + z[2 * k : 2 * k + 2].flatten(1).double() @ root)
    pipe = pipeline()(unet=model, scheduler=ProbabilityFlowScheduler(**PROCESSES["flow"]))
    pipe.set_progress_bar_config(disable=True)
    errors = []
    for steps in (20, 40):
        found = pipe(
            y[..., 0].float(),
            linear_map(matrix),
            NOISE,
            num_inference_steps=steps,
            num_images=2,
            solver_iterations=8,
            max_noise=math.inf,
            latents=z,
            output_type="latent",
        ).images
        errors.append(float((found.flatten(1) - torch.cat(exact)).abs().max()))
    assert errors[0] < 0.06 and 1.5 < math.log2(errors[0] / errors[1]) < 2.5


def test_the_levels_are_those_of_the_run_whatever_the_network_is_given():
    """``timesteps`` and ``sigmas`` of the user's own: a network that counts its time differently, on the grid that says
    so, gives the samples of the usual network on the usual grid.  Levels computed from the times would be those of 200
    earlier."""
    _, matrix, y = gaussian()
    times = [950, 800, 600, 450, 300, 210]
    model, scheduler = oracle("vp")
    relabelled = RelabelledModel(**{k: v for k, v in model.config.items() if not k.startswith("_")})
    found = []
    for network, grid in ((model, {"timesteps": times}), (relabelled, relabelled_grid(model.path, times))):
        pipe = pipeline()(unet=network, scheduler=ReverseSDEScheduler.from_config(scheduler.config))
        pipe.set_progress_bar_config(disable=True)
        options = {"num_images": 4, "max_noise": math.inf, "generator": seeded(), "output_type": "latent"}
        found.append(pipe(y[None].float(), linear_map(matrix), NOISE, **grid, **options).images)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_pigdm_is_exact_for_isotropic_data():
    """``x_0 ~ N(m, c^2 I)``: r^2 I is the covariance of x_0 given x_t."""
    model = GaussianMixtureModel([1.0], [[0.5, -0.3, 0.2, 0.0]], [0.36], process=PROCESSES["vp"]).double()
    _, matrix, y = gaussian()
    field, posterior = field_of(model), model.posterior(matrix, y, NOISE)
    x = torch.randn(5, 1, 1, 4, dtype=torch.float64, generator=seeded(2))
    for point in points(field.path):
        measurement = Measurement(linear_map(matrix), y.expand(5, -1), NOISE)
        found = conditional_mean(field, x, point, measurement, method="pigdm", data_std=0.6)[0]
        torch.testing.assert_close(found, posterior.posterior_mean(x, point.alpha, point.sigma), rtol=1e-6, atol=1e-6)


def test_dps_follows_the_gradient_of_the_misfit():
    """``grad_x ||y - A D(x)||`` by finite differences."""
    model, matrix, y = gaussian()
    model.double()
    field = field_of(model)
    x, point = torch.randn(1, 1, 1, 4, dtype=torch.float64, generator=seeded(2)), points(field.path)[1]
    measurement = Measurement(linear_map(matrix), y[None], NOISE)
    gradient = conditional_mean(field, x, point, measurement, method="dps")[1].flatten()
    misfit = lambda v: (y - matrix @ field(v, point).flatten()).norm()  # noqa: E731
    for k, e in enumerate(torch.eye(4, dtype=torch.float64).reshape(4, 1, 1, 1, 4)):
        assert float(gradient[k]) == pytest.approx(float(misfit(x + 1e-5 * e) - misfit(x - 1e-5 * e)) / 2e-5, rel=1e-5)


def test_dps_steps_downhill():
    """Two steps of the pipeline on Gaussian data are ``alpha' D + sigma' eps + scale K A' r/||r||`` (Chung et al. 2023,
    algorithm 1, with DDIM), ``r = y - A D``, ``K = alpha C (alpha^2 C + sigma^2)^-1``."""
    model, matrix, y = gaussian()
    mean, covariance = model.mixture.means[0], model.covariances[0]
    pipe = pipeline()(unet=model, scheduler=ProbabilityFlowScheduler(solver_order=1))
    pipe.set_progress_bar_config(disable=True)
    x = torch.randn(1, 1, 1, 4, generator=seeded(3))
    found = pipe(
        y[None].float(),
        linear_map(matrix),
        NOISE,
        method="dps",
        timesteps=[600, 300],
        dps_scale=0.7,
        max_noise=math.inf,
        latents=x,
        output_type="latent",
    ).images
    x, levels = x.double().flatten(), [*(model.path.alpha_sigma(float(t)) for t in (600, 300)), (1.0, 0.0)]
    for (alpha, sigma), (next_alpha, next_sigma) in itertools.pairwise(levels):
        gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(4))
        data = mean + gain @ (x - alpha * mean)
        residual = y - matrix @ data
        x = next_alpha * data + next_sigma * (x - alpha * data) / sigma
        x = x + 0.7 * gain @ matrix.T @ residual / residual.norm()
    torch.testing.assert_close(found.flatten().double(), x, rtol=1e-4, atol=1e-4)


def test_a_linear_decoder_is_part_of_the_operator():
    """Gaussian latents z, pixels B z: the conditional mean for A after B is the exact one of the matrix A B."""
    model, matrix, y = gaussian()
    model.double()
    decoder = torch.randn(4, 4, dtype=torch.float64, generator=seeded(5))
    x, point = torch.randn(5, 1, 1, 4, dtype=torch.float64, generator=seeded(2)), points(model.path)[1]
    decode = lambda z: (z.flatten(1) @ decoder.T).reshape(z.shape)  # noqa: E731
    measurement = Measurement(linear_map(matrix), y.expand(5, -1), NOISE, decode)
    found = conditional_mean(field_of(model), x, point, measurement, iterations=8)[0]
    exact = model.posterior(matrix @ decoder, y, NOISE).posterior_mean(x, point.alpha, point.sigma)
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)


@functools.cache
def runs(process="vp", method="mmps", steps=40, seed=5, count=500):
    """``(truth, samples, exact posterior samples, prior samples)`` of one observation of the mixture."""
    model, scheduler = oracle(process)
    g = seeded(seed)
    matrix = torch.randn(2, 4, generator=g, dtype=torch.float64) / 2
    truth = model.sample(1, g)
    y = matrix @ truth.flatten() + NOISE * torch.randn(2, generator=g, dtype=torch.float64)
    pipe = pipeline()(unet=model, scheduler=ReverseSDEScheduler.from_config(scheduler.config, data_std=0.5))
    pipe.set_progress_bar_config(disable=True)
    options = {
        "method": method,
        "num_inference_steps": steps,
        "data_std": 0.6,
        "dps_scale": 0.5,
        "solver_iterations": 8,
    }
    own = seeded(seed + 96)
    found = pipe(
        y[None].float(), linear_map(matrix), NOISE, num_images=count, generator=own, output_type="latent", **options
    )
    posterior = model.posterior(matrix, y, NOISE)
    return found.images, posterior.sample(count, seeded(7)), posterior.sample(count, seeded(8)), model.sample(count, g)


@functools.cache
def pipeline():
    return type(load("posterior_sampling", FASHION_MODEL))


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_samples_are_near_the_exact_posterior(process):
    """Sliced Wasserstein distance to the exact posterior of a mixture: within three sampling floors for mmps and pigdm,
    a tenth of the prior's; dps is farther away."""
    distance = {}
    for method in ("mmps", "pigdm", "dps"):
        found, exact, again, prior = runs(process, method)
        distance[method] = sliced_wasserstein(found, exact)
    floor, prior_distance = sliced_wasserstein(exact, again), sliced_wasserstein(prior, exact)
    assert distance["mmps"] < 3 * floor + 0.02 and distance["mmps"] < 0.1 * prior_distance
    assert distance["pigdm"] < 0.15 * prior_distance
    assert distance["dps"] > 1.8 * distance["mmps"]
    # four seeds of 500 samples: mmps .065 to .126, pigdm .081 to .131, dps .123 to .218
    assert 0.055 < distance["mmps"] < distance["pigdm"] < 0.13
    assert 0.12 < distance["dps"] < 0.225
    assert 0.02 < floor < 0.04 and 0.65 < prior_distance < 1.05
    stated(
        "sliced Wasserstein to the exact posterior .06 to .13 by MMPS and PiGDM, .12 to .22 by DPS "
        "(floor .02 to .04, prior .7 to 1.0)"
    )


def calibration_of(method, problems=150, samples=40, seed=0):
    """Over draws of truth and observation: how often the central 80 % interval of the samples holds the truth, and the
    root mean square deviation of their mean from the exact posterior's, in units of its standard error."""
    model, scheduler = oracle("vp")
    g = seeded(seed)
    matrix = torch.randn(2, 4, generator=g, dtype=torch.float64) / 2
    truth = model.sample(problems, g)
    y = truth.flatten(1) @ matrix.T + NOISE * torch.randn(problems, 2, generator=g, dtype=torch.float64)
    posteriors = [model.posterior(matrix, v, NOISE) for v in y]
    if method == "exact":
        found = torch.stack([posterior.sample(samples, g) for posterior in posteriors])
    else:
        pipe = pipeline()(unet=model, scheduler=ReverseSDEScheduler.from_config(scheduler.config, data_std=0.5))
        pipe.set_progress_bar_config(disable=True)
        options = {"method": method, "num_inference_steps": 20, "data_std": 0.6, "output_type": "latent"}
        found = pipe(y.float(), linear_map(matrix), NOISE, num_images=samples, generator=g, **options).images
        found = found.reshape(problems, samples, *found.shape[1:]).double()
    low, high = (torch.quantile(found, q, dim=1) for q in (0.1, 0.9))
    covered = float(((truth >= low) & (truth <= high)).double().mean())
    weights = torch.stack([posterior.mixture.weights for posterior in posteriors])
    means = torch.stack([posterior.mixture.means for posterior in posteriors])
    variances = torch.stack([posterior.covariances.diagonal(dim1=1, dim2=2) for posterior in posteriors])
    mean = torch.einsum("nk,nki->ni", weights, means)
    variance = torch.einsum("nk,nki->ni", weights, means**2 + variances) - mean**2
    deviation = (found.flatten(2).mean(1) - mean) / (variance / samples).sqrt()
    return covered, float(deviation.square().mean().sqrt())


def test_credible_intervals_cover():
    """The central 80 % intervals of exact posterior samples hold the truth in 80 % of cases (78 % with 40 samples);
    those of mmps come within 7 points of the exact ones.  Samples of all observations mixed cover as often, but their
    means are 20 standard errors from the exact posterior's; those of mmps are within 1.5."""
    (exact, unit), (mmps, deviation) = calibration_of("exact"), calibration_of("mmps")
    assert abs(exact - 0.78) < 0.05  # 600 coordinates: standard error 1.7 points
    assert abs(mmps - exact) < 0.07
    assert unit == pytest.approx(1.0, abs=0.1) and deviation < 1.5


@pytest.mark.parametrize("method", ["mmps", "pigdm"])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_an_observation_that_says_nothing_leaves_the_guided_prior(scale, method):
    """With endless noise in y the samples are those of the prior, each observation's with its label and all of them
    with the guidance asked for."""
    model, scheduler = oracle("vp")
    scheduler = ProbabilityFlowScheduler.from_config(scheduler.config)
    pipe = pipeline()(unet=model, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    x, operator = torch.randn(4, 1, 1, 4, generator=seeded(3)), linear_map(torch.eye(4)[:2])
    options = {"num_images": 2, "num_inference_steps": 6, "latents": x, "output_type": "latent", "method": method}
    found = pipe(torch.ones(2, 2), operator, 1e6, class_labels=[0, 2], guidance_scale=scale, **options).images
    scheduler.set_timesteps(6)
    prior = sample(network_denoiser(model, torch.tensor([0, 0, 2, 2]), scale), scheduler, x)
    torch.testing.assert_close(found, prior, rtol=1e-3, atol=1e-3)


def test_conjugate_gradients_solve_each_sample():
    """Random positive definite systems, one a sample, exactly after as many steps as dimensions; an indefinite one
    stops before it diverges."""
    a = torch.randn(4, 6, 6, dtype=torch.float64, generator=seeded())
    a = a @ a.mT + 0.1 * torch.eye(6, dtype=torch.float64)
    right = torch.randn(4, 6, dtype=torch.float64, generator=seeded(1))
    product = lambda v: torch.einsum("nij,nj->ni", a, v)  # noqa: E731
    found = conjugate_gradients(product, right, 30, floor=0.1, tolerance=1e-12)
    torch.testing.assert_close(product(found), right, rtol=1e-6, atol=1e-8)
    assert torch.equal(conjugate_gradients(lambda v: -v, right, 30), torch.zeros_like(right))


@pytest.mark.parametrize(
    "operator",
    [
        inpainting(torch.arange(64).reshape(8, 8) % 3 == 0),
        inpainting(torch.arange(192).reshape(3, 8, 8) % 5 == 0),
        super_resolution(4),
        gaussian_blur(1.0),
        linear_map(torch.randn(7, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(0))),
    ],
)
def test_operators_are_linear_with_their_adjoints(operator):
    """``<A x, y> = <x, A' y>``, and constants stay constants where the operator averages."""
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=seeded())
    y = torch.randn(operator(x).shape, dtype=torch.float64, generator=seeded(1))
    check_observation(operator, y, NOISE, x)
    torch.testing.assert_close((operator(x) * y).sum(), (x * adjoint(operator, y, x)).sum())
    if y.ndim == 4:
        torch.testing.assert_close(operator(torch.ones_like(x)), torch.ones_like(y))


def test_pixels_of_latents_are_as_many_times_larger_as_the_decoder_makes_them():
    unet = tiny_unet(channels=4)
    unet.register_to_config(sample_size=(8, 12))
    assert pipeline()(unet, ddpm(), tiny_vae())._pixel_shape() == (3, 16, 24)


def test_latent_guidance_acts_through_the_decoder():
    """With an autoencoder, the guided decoded mean is nearer to the observation than the unguided one; every method and
    a foreign scheduler run."""
    pipe = pipeline()(tiny_unet(channels=4), ddpm(), tiny_vae())
    pipe.set_progress_bar_config(disable=True)
    operator = super_resolution(4)
    y = operator(torch.rand(1, 3, 16, 16, generator=seeded()) * 2 - 1)
    for method in ("mmps", "pigdm", "dps"):
        found = pipe(y, operator, 0.1, method=method, num_inference_steps=3, num_images=2, generator=seeded())
        assert len(found.images) == 2 and found.images[0].size == (16, 16)
    field = network_field(pipe.unet, pipe.scheduler.config)
    x = torch.randn(1, 4, 8, 8, generator=seeded(1))
    decode = lambda z: pipe.vae.decode(z).sample  # noqa: E731
    measurement = Measurement(operator, y, 0.1, decode)
    point = Point(*(float(v) for v in field.path.alpha_sigma(200.0)))
    with torch.no_grad():
        before = (y - measurement(field(x, point))).norm()
    mean = conditional_mean(field, x, point, measurement, method="pigdm", iterations=20)[0]
    with torch.no_grad():
        assert float((y - measurement(mean)).norm()) < 0.9 * float(before)


def test_half_precision_networks_and_reproducible_seeds(tmp_path):
    """A bfloat16 network guides float32 states; the same generator gives the same samples."""
    pipe = pipeline()(tiny_unet().bfloat16(), ddpm())
    pipe.set_progress_bar_config(disable=True)
    y, operator = torch.zeros(2, 1, 2, 2), super_resolution(4)
    one, two = (
        pipe(y, operator, 0.1, num_inference_steps=3, generator=seeded(3), output_type="latent").images
        for _ in range(2)
    )
    assert torch.equal(one, two) and one.dtype == torch.float32 and bool(one.isfinite().all())


def good(**changes):
    return {"observation": torch.zeros(2, 3), "operator": linear_map(torch.eye(4)[:3]), "noise_std": NOISE, **changes}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (good(noise_std=0.0), "noise_std must be positive"),
        (good(observation=torch.zeros(2, 4)), "they must agree"),
        (good(observation=torch.full((2, 3), math.nan)), "not finite"),
        (good(operator=lambda x: x.flatten(1)[:, :3] + 1), "not linear"),
        (good(operator=lambda x: x.flatten(1)[:, :3] ** 2), "not linear"),
        (good(operator=lambda x: x.flatten(1)[:, :3].detach()), "not differentiable"),
        (good(operator=inpainting(torch.ones(2, 2, dtype=torch.bool))), "The mask has shape"),
        (good(operator=super_resolution(3)), "not divisible by 3"),
        (good(operator=gaussian_blur(3.0)), "use a smaller one"),
        (good(operator=linear_map(torch.eye(5))), "The matrix has 5 columns"),
        (good(method="ddrm"), "method must be one of mmps, pigdm, dps"),
        (good(solver_iterations=0), "solver_iterations must be at least 1"),
        (good(dps_scale=0.0), "dps_scale must be positive"),
        (good(data_std=-1.0), "data_std must be positive"),
        (good(max_noise=0.0), "max_noise must be positive"),
        (good(num_images=0), "num_images must be at least 1"),
        (good(class_labels=[0, 1, 2]), "3 class_labels for 2 images"),
        (good(output_type="jpg"), "output_type 'jpg' is unknown"),
        (good(latents=torch.zeros(1, 1, 1, 4)), "latents have shape"),
    ],
)
def test_wrong_inputs_get_a_sentence(tmp_path, arguments, message):
    save_oracle(tmp_path)
    with pytest.raises(ValueError, match=message):
        load("posterior_sampling", tmp_path)(**arguments)


def test_looking_at_the_observation_draws_nothing_from_the_global_generator():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    check_observation(super_resolution(2), torch.zeros(1, 1, 2, 2), NOISE, torch.zeros(1, 1, 4, 4))
    assert torch.equal(torch.rand(1), expected)


def test_operators_refuse_what_they_cannot_do():
    for wrong, message in [
        (lambda: inpainting(torch.ones(2, 2)), "mask must be boolean"),
        (lambda: inpainting(torch.zeros(2, 2, dtype=torch.bool)), "True where pixels are known"),
        (lambda: super_resolution(1), "factor must be at least 2"),
        (lambda: gaussian_blur(0.0), "std must be positive"),
        (lambda: linear_map(torch.ones(3)), "matrix must have shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong()
    for shape in ((1, 1, 6, 4), (1, 1, 4, 6)):
        with pytest.raises(ValueError, match="not divisible by 4"):
            super_resolution(4)(torch.zeros(shape))


@pytest.mark.slow
def test_the_docstring_snippet_runs():
    """Verbatim: restored pictures have 18 dB on average, each 15 dB or more."""
    variables = run("posterior_sampling")
    assert variables["image"].size == (256, 192)
    assert float(variables["psnr"].mean()) > 18 and float(variables["psnr"].min()) > 15
