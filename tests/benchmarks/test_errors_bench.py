"""The error decomposition: closed forms and attained orders."""

import itertools
import math

import pytest
import torch
from helpers import order_of

from diffusers_sde import GaussianMixtureModel, ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.benchmarks.errors import (
    METHODS,
    SHORT,
    STD,
    WRONG_STD,
    coupled_errors,
    final_variance,
    gaussian_errors,
    gaussian_kl,
    measure,
    mixture_errors,
)
from diffusers_sde.configs import path_from_config

by_method = pytest.mark.parametrize("method", METHODS)


def test_gaussian_kl():
    """Against torch.distributions."""
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(0.0, 0.7), normal(0.0, 1.2))
    assert gaussian_kl(0.49, 1.44) == pytest.approx(float(expected))


@pytest.mark.parametrize("cls", [ProbabilityFlowScheduler, ReverseSDEScheduler])
@pytest.mark.parametrize("steps", [2, 7])
def test_matched_data_scale_is_exact(cls, steps):
    """With data_std the data's scale the variance at the end is the data's, at any number of steps."""
    scheduler = cls(data_std=0.5, final="exact")
    path = scheduler.path
    alpha, sigma = (float(v) for v in path.alpha_sigma(999.0))
    found = final_variance(scheduler, steps, 0.5, (alpha * 0.5) ** 2 + sigma**2)
    assert found == pytest.approx(0.25, rel=1e-5)  # sigmas are float32


@by_method
def test_sources_do_not_depend_on_the_number_of_steps(method):
    """Initialisation and score errors are those of the exact process."""
    few, many = gaussian_errors(method, 4), gaussian_errors(method, 40)
    for name in ("initialisation", "score"):
        assert few[name] == pytest.approx(many[name], rel=1e-3, abs=1e-9)


def test_ode_carries_the_initial_error_and_the_sde_forgets_it():
    """The ODE keeps the ratio of variances at T; the SDE shrinks it (the reason for its robustness)."""
    path = path_from_config(
        {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.008, "beta_schedule": "linear"}
    )
    alpha, sigma = (float(v) for v in path.alpha_sigma(999.0))
    kept = gaussian_errors("ODE order 1 (DDIM)", 5)["initialisation"]
    assert kept == pytest.approx(gaussian_kl(1 / ((alpha * STD) ** 2 + sigma**2), 1.0), rel=1e-3)
    assert gaussian_errors("SDE order 1 (DDPM)", 5)["initialisation"] < 1e-3 * kept


@by_method
def test_discretisation_has_its_order(method):
    """First-order methods: variance error O(1/n), KL O(1/n^2) (Lu, arXiv:2607.01693, chapter 6: one step O(h^2)); the
    second-order ones do better."""
    kl = [gaussian_errors(method, n)["discretisation"] for n in (20, 40, 80)]
    if "order 1" in method:
        assert 1.5 < order_of(kl)[-1] < 2.3
    else:
        assert kl[-1] < 1e-5


@by_method
def test_square_roots_of_divergences_add_at_most(method):
    """sqrt(KL together) <= sum of the sqrt(KL) alone, up to the curvature of KL (20 %)."""
    for n in (5, 10, 40):
        errors = gaussian_errors(method, n)
        total = math.sqrt(errors.pop("together"))
        assert total < 1.2 * sum(math.sqrt(v) for v in errors.values())


def test_coupled_errors_are_those_of_closed_forms():
    """Data N(m, s^2) and a network for N(m', s'^2): every flow is ``alpha_0 m + rho_0/rho_T (x - alpha_T m)`` and DDIM
    is a product of 2 x 2 steps, so each of the four distances is known for the very samples that were drawn."""
    right, wrong = ((0.7, 0.5), (0.9, 0.6))  # (mean, standard deviation) of data and of the network's opinion
    models = [GaussianMixtureModel([1.0], [[m] * 2], [s**2], process=SHORT) for m, s in (right, wrong)]
    scheduler = ProbabilityFlowScheduler(**SHORT, solver_order=1, grid="trailing", final_sigmas_type="sigma_min")
    (found,) = coupled_errors(*models, [(scheduler, 6)], seed=0, n=64)

    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(64, 1, 1, 2, dtype=torch.float64, generator=generator)
    times = [1000 * (6 - i) / 6 - 1 for i in range(6)] + [0.0]
    levels = [tuple(map(float, models[0].path.alpha_sigma(t))) for t in times]
    x_t = levels[0][0] * models[0].sample(64, generator) + levels[0][1] * eps

    def flow(law, x):
        (mean, std), (alpha, sigma), (alpha_0, sigma_0) = law, levels[0], levels[-1]
        ratio = math.hypot(alpha_0 * std, sigma_0) / math.hypot(alpha * std, sigma)
        return alpha_0 * mean + ratio * (x - alpha * mean)

    solved, (mean, std) = eps, wrong
    for (alpha, sigma), (alpha_next, sigma_next) in itertools.pairwise(levels):
        gain = alpha * std**2 / ((alpha * std) ** 2 + sigma**2)
        data = mean + gain * (solved - alpha * mean)
        solved = alpha_next * data + sigma_next * (solved - alpha * data) / sigma
    truth = flow(right, x_t)
    expected = {
        "initialisation": flow(right, eps) - truth,
        "discretisation": solved - flow(wrong, eps),
        "score": flow(wrong, eps) - flow(right, eps),
        "together": solved - truth,
    }
    for name, difference in expected.items():
        assert found[name] == pytest.approx(float(difference.flatten(1).norm(dim=1).square().mean().sqrt()), rel=1e-4)


@pytest.mark.parametrize("method, least, most", [("ODE order 1 (DDIM)", 0.8, 1.2), ("ODE order 2", 1.8, 3.2)])
def test_discretisation_on_a_mixture_has_the_order_of_the_method(method, least, most):
    """And only discretisation follows the steps; order 2 is corrected, which is up to one more."""
    columns = mixture_errors(method, (10, 20, 40), seed=0)
    for name in ("initialisation", "score"):
        assert len({column[name] for column in columns}) == 1
    assert least < order_of([c["discretisation"] for c in columns])[-1] < most


@pytest.mark.slow
def test_measure_prints_both_tables(capsys):
    measure(0)
    printed = capsys.readouterr().out
    for word in (*METHODS, "initialisation", "discretisation", "score", "together", "W2", str(WRONG_STD)):
        assert word in printed
