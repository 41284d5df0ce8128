"""The error decomposition: closed forms, attained orders, and the inequality that it is."""

import math

import pytest
import torch
from helpers import order_of

from diffusers_sde import ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.benchmarks.errors import (
    METHODS,
    STD,
    WRONG_STD,
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


def test_early_stopping():
    """W2^2 between the law at the cleanest time and the data <= (1 - alpha)^2 E|x_0|^2 + sigma^2 d (Lu, chapter 6), for
    N(0, STD^2) in one dimension, where W2 is the difference of standard deviations."""
    path = ProbabilityFlowScheduler().path
    for t in (0.0, 50.0, 300.0):
        alpha, sigma = (float(v) for v in path.alpha_sigma(t))
        w2 = math.hypot(alpha * STD, sigma) - STD
        assert w2**2 <= (1 - alpha) ** 2 * STD**2 + sigma**2


@pytest.mark.parametrize("method, order", [("ODE order 1 (DDIM)", 1), ("ODE order 2", 2)])
def test_mixture_decomposition(method, order):
    """The distances of the three brackets add up to at least the total; initialisation and score do not depend on the
    steps, discretisation falls with the order of the method."""
    columns = mixture_errors(method, (10, 20, 40), seed=0)
    for column in columns:
        parts = [column[name] for name in ("initialisation", "discretisation", "score")]
        assert max(parts) < 2 and min(parts) > 0
        assert column["together"] <= sum(parts) * (1 + 1e-9)
        for name in ("initialisation", "score"):
            assert column[name] == columns[0][name]
    assert order_of([c["discretisation"] for c in columns])[-1] > order - 0.3


@pytest.mark.slow
def test_measure_prints_both_tables(capsys):
    measure(0)
    printed = capsys.readouterr().out
    for word in (*METHODS, "initialisation", "discretisation", "score", "together", "W2", str(WRONG_STD)):
        assert word in printed
