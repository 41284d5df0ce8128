"""pipelines/likelihood.py and methods/likelihood.py: the change of variables along the probability-flow ODE."""

import math

import pytest
import torch
from PIL import Image
from pipeline_parts import bars_of, ddpm, oracle, save_oracle, tiny_unet, tiny_vae
from snippets import load, run
from stated import stated

from diffusers_sde.assets import FASHION_MODEL
from diffusers_sde.methods.fields import network_field
from diffusers_sde.methods.likelihood import (
    _prior,
    bits_per_dimension,
    dequantized,
    log_likelihood,
    output_and_traces,
)
from diffusers_sde.weights import Point


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(process="vp", count=16, dim=4):
    """``(field, data, its exact log-density at the smallest noise level, that of the clean data)``."""
    model, scheduler = oracle(process, dim)
    field, x = network_field(model, scheduler.config), model.sample(count, seeded())
    alpha, sigma = (float(v) for v in field.path.alpha_sigma(field.path.cleanest))
    return field, x, model.log_density(alpha * x, alpha, sigma) + dim * math.log(alpha), model.log_density(x)


def off(found, exact):
    return float((found.log_density - exact).abs().mean() / exact.abs().mean())


@pytest.mark.parametrize("process", ["vp", "flow"])
def test_it_is_the_log_density_of_the_mixture(process):
    """Within 1e-3 relative of the exact log-density, with the default tolerances; 1e-4 at the smallest noise level,
    and 1e-3 of the clean data's when the run goes on to s = 1e-3."""
    field, x, exact, clean = problem(process)
    assert off(log_likelihood(field, x, divergence="exact"), exact) < 1e-4
    assert off(log_likelihood(field, x, divergence="exact", noise_std=1e-3), clean) < 1e-3


def test_it_falls_with_the_tolerance():
    """Flow matching, whose prior is exact: error and NFE follow rtol."""
    field, x, exact, _ = problem("flow")
    found = [log_likelihood(field, x, divergence="exact", rtol=tol, atol=tol) for tol in (1e-3, 1e-5, 1e-7)]
    errors = [off(f, exact) for f in found]
    assert errors[2] < 1e-6 and errors[1] < 0.1 * errors[0] and errors[2] < 0.1 * errors[1]
    assert errors[1] < 1e-5
    stated("relative error of the log-density of a mixture 1e-5 at rtol 1e-5")
    assert found[0].evaluations < found[1].evaluations < found[2].evaluations < 400


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("tol", [1e-3, 1e-4, 1e-5])
def test_the_error_estimate_is_an_error_estimate(process, tol):
    """Not a bound: 9 of 10 true errors lie below three times the estimate of their sample, none above ten times; and
    not vacuous: the mean estimate is within a factor of 10 of the mean error."""
    field, x, exact, _ = problem(process, 64)
    found = log_likelihood(field, x, divergence="exact", rtol=tol, atol=tol)
    error = (found.log_density - exact).abs()
    assert float((error <= 3 * found.error).double().mean()) >= 0.9
    assert bool((error <= 10 * found.error).all())
    assert 0.1 * error.mean() <= found.error.mean() <= 10 * error.mean()


def test_the_prior_is_part_of_the_error():
    """Linear betas leave alpha_T = 0.006 of the data: N(0, 1) is wrong by more than 1e-3 relative, the matched prior by
    50 times less, and ``prior_error`` says so."""
    field, x, exact, _ = problem("vp", 32)
    tight = {"divergence": "exact", "rtol": 1e-6, "atol": 1e-6}
    standard, matched = (log_likelihood(field, x, prior=p, **tight) for p in ("standard", "matched"))
    assert off(standard, exact) > 1e-3 and off(matched, exact) < off(standard, exact) / 50
    assert 0.3 < float(standard.prior_error.mean() / (standard.log_density - exact).abs().mean()) < 3
    assert float(matched.prior_error.mean()) < 0.1 * float(standard.prior_error.mean())


@pytest.mark.parametrize("prior", ["standard", "matched"])
def test_the_error_of_the_prior_is_by_its_score(prior):
    """``|(score + z - centre) . z|`` in the units of z = x/rho, with the mixture's exact score, halfway to the data."""
    model, scheduler = oracle("vp", 4)
    field, end, like = network_field(model, scheduler.config), Point(0.6, 0.8), torch.zeros(8, 1, 1, 4).double()
    rho = math.hypot(2 * end.alpha, end.sigma)  # data_std = 2
    z = torch.randn(8, 4, dtype=torch.float64, generator=seeded())
    mean = model.posterior_mean(torch.zeros(8, 4, dtype=torch.float64), end.alpha, end.sigma)
    exact_centre = mean * (end.alpha / rho if prior == "matched" else 0)
    exact = ((rho * model.score(z * rho, end.alpha, end.sigma) + z - exact_centre) * z).sum(1).abs()
    centre, error, evaluations = _prior(field, z, end, 2.0, prior, like, 5)
    torch.testing.assert_close(centre, exact_centre, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(error, exact, rtol=1e-4, atol=1e-4)
    assert evaluations == (7 if prior == "matched" else 6)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_with_the_error_it_reports(distribution):
    """Standardised by the reported standard error, deviations from the exact density have a variance of about 1."""
    field, x, exact, _ = problem("flow", 32)
    found = log_likelihood(field, x, num_probes=48, distribution=distribution, generator=seeded(1))
    standardised = (found.log_density - exact) / found.trace_error
    assert abs(float(standardised.mean())) < 4 / math.sqrt(32)
    assert 0.6 < float(standardised.square().mean().sqrt()) < 1.5


def test_traces_are_traces():
    """Exact and stochastic traces of a nonlinear function with a known Jacobian, in any batching of the probes."""
    w = torch.randn(5, 5, dtype=torch.float64, generator=seeded())
    x = torch.randn(3, 5, dtype=torch.float64, generator=seeded(1))
    jacobian = torch.stack([torch.autograd.functional.jacobian(lambda v: (v @ w).tanh(), row) for row in x])
    trace = jacobian.diagonal(dim1=1, dim2=2).sum(1)
    for batch in (1, 2, 64):
        m, exact = output_and_traces(lambda v: (v @ w).tanh(), x, None, batch)
        torch.testing.assert_close(m, (x @ w).tanh())
        torch.testing.assert_close(exact[:, 0], trace)
        probes = torch.randn(7, 3, 5, dtype=torch.float64, generator=seeded(2))
        estimates = output_and_traces(lambda v: (v @ w).tanh(), x, probes, batch)[1]
        torch.testing.assert_close(estimates, torch.einsum("pni,nij,pnj->np", probes, jacobian, probes))


def test_samples_do_not_influence_each_other():
    """One at a time or in a batch: the same within tolerance."""
    field, x, _, _ = problem("flow", 4)
    batch = log_likelihood(field, x, divergence="exact").log_density
    alone = [float(log_likelihood(field, x[k : k + 1], divergence="exact").log_density) for k in range(4)]
    torch.testing.assert_close(batch, torch.tensor(alone, dtype=torch.float64), rtol=1e-4, atol=1e-3)


def test_labels_condition(tmp_path):
    """Label k: the density of component k, ``N(m_k, C_k)``."""
    model = save_oracle(tmp_path, "flow")
    pipe, x = load("likelihood", tmp_path), model.sample(6, seeded())
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    law = [torch.distributions.MultivariateNormal(model.mixture.means[k], model.covariances[k]) for k in range(3)]
    exact = torch.stack([law[k].log_prob(v.flatten()) for k, v in zip(labels, x, strict=True)])
    found = pipe(x, labels, divergence="exact", rtol=1e-6, noise_std=1e-4)
    torch.testing.assert_close(found.log_likelihood, exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.bits_per_dim, -found.log_likelihood / (4 * math.log(2)))
    assert found.num_evaluations > 50 and found.noise.shape == x.shape


def test_the_pipeline_passes_its_tolerance_on_and_says_how_far_it_is(tmp_path):
    """``rtol`` is the absolute tolerance too, where none is given; the progress bar ends at 100 per cent."""
    model = save_oracle(tmp_path)
    pipe = load("likelihood", tmp_path)
    bars, x = bars_of(pipe), model.sample(2, seeded())
    options = ({}, {"atol": 1e-2}, {"atol": 1e-6})
    spent = [pipe(x, divergence="exact", rtol=1e-2, **o).num_evaluations for o in options]
    assert spent[0] == spent[1] < spent[2]
    assert [(bar.n, bar.total) for bar in bars] == [(100, 100)] * 3


def test_bits_per_dimension_with_dequantization():
    """Uniform on the 256 bins of [-1 - 1/255, 1 + 1/255] has 8 bits; dequantised values stay in their bins."""
    x = 2 * torch.randint(0, 256, (4, 1, 8, 8), generator=seeded()).double() / 255 - 1
    y = dequantized(x, 2 / 255, seeded(1))
    assert (((y + 1) * 255 / 2).round().clamp(0, 255) == ((x + 1) * 255 / 2).round()).all() and not torch.equal(x, y)
    log_density = torch.tensor([-64 * math.log(2 + 2 / 255)], dtype=torch.float64)
    torch.testing.assert_close(bits_per_dimension(log_density, 64, 2 / 255), torch.tensor([8.0], dtype=torch.float64))


def test_pictures_latents_foreign_schedulers_and_half_precision():
    """8-bit pictures are dequantised, latents are not; any scheduler's process; bfloat16 networks."""
    cls = type(load("likelihood", FASHION_MODEL))
    picture = Image.new("L", (8, 8), 100)
    pixel, latent = cls(tiny_unet(), ddpm()), cls(tiny_unet(channels=4), ddpm(), tiny_vae())
    half = cls(tiny_unet().bfloat16(), ddpm())
    for pipe in (pixel, latent, half):
        pipe.set_progress_bar_config(disable=True)
    options = {"rtol": 1e-2, "num_probes": 2}
    found = pixel([picture, picture], generator=seeded(), **options)
    nats = -found.log_likelihood / (64 * math.log(2))
    torch.testing.assert_close(found.bits_per_dim, nats + math.log2(255 / 2))
    assert found.trace_error.min() > 0 and found.error.isfinite().all()
    again = pixel([picture, picture], generator=seeded(), **options)
    assert torch.equal(again.log_likelihood, found.log_likelihood)
    assert latent(torch.zeros(1, 3, 16, 16), **options).noise.shape == (1, 4, 8, 8)
    single = {"rtol": 0.03, "num_probes": 1, "dequantize": False}
    rough, fine = (pipe(picture, generator=seeded(), **single) for pipe in (half, pixel))
    assert abs(float(rough.log_likelihood - fine.log_likelihood)) < 0.05 * abs(float(fine.log_likelihood))
    assert rough.trace_error.isnan().all() and rough.error.isnan().all()
    with pytest.raises(ValueError, match="A latent has no bins"):
        latent(torch.zeros(1, 3, 16, 16), dequantize=True)


def test_a_result_says_its_numbers_in_short_and_that_the_error_of_one_probe_is_unknown(tmp_path):
    save_oracle(tmp_path)
    pipe, picture = load("likelihood", tmp_path), 0.1 * torch.ones(2, 1, 1, 4)
    found = pipe(picture, num_probes=8, generator=seeded())
    bits, error = float(found.bits_per_dim[1]), float(found.error[1]) / (4 * math.log(2))
    said = repr(found)
    assert f"{bits:.4f} +- {error:.2g} bits per dimension" in said and said.count("\n") == 2 and "unknown" not in said
    single = pipe(picture, num_probes=1, generator=seeded())
    assert single.error.isnan().all() and single.solver_error.isfinite().all()
    assert "+- unknown nats" in repr(single) and "pass num_probes of at least 2" in repr(single)
    assert pipe(picture, divergence="exact").error.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"divergence": "full"}, "divergence must be 'exact' or 'hutchinson'"),
        ({"num_probes": 0}, "num_probes must be at least 1"),
        ({"distribution": "uniform"}, "distribution must be"),
        ({"prior": "flat"}, "prior must be"),
        ({"rtol": 0.0}, "rtol and atol must be positive"),
        ({"noise_std": 0.0}, "noise_std must be a positive noise level"),
        ({"noise_std": -1.0}, "noise_std must be a positive noise level"),
        ({"noise_std": 1e9}, "noise_std must be a positive noise level"),
        ({"data_std": 0.0}, "data_std must be positive"),
        ({"class_labels": 9}, "class_labels must be"),
        ({"image": torch.zeros(2, 1, 1, 5)}, "this model works on"),
    ],
)
def test_wrong_inputs_get_a_sentence(tmp_path, arguments, message):
    save_oracle(tmp_path)
    with pytest.raises(ValueError, match=message):
        load("likelihood", tmp_path)(**{"image": torch.zeros(2, 1, 1, 4), **arguments})


@pytest.mark.slow
def test_the_docstring_snippet_runs():
    """Verbatim; on average the pictures are more likely as what they are than as what the other one is."""
    variables = run("likelihood")
    bits = variables["bits"]
    assert bits.shape == variables["errors"].shape == (3, 2) and bool((bits > 1).all()) and bool((bits < 8).all())
    assert float(bits[0, 0] + bits[2, 1]) < float(bits[2, 0] + bits[0, 1])
