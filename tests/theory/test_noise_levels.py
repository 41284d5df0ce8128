"""Falling noise levels of the reverse SDE: where they lie, what they keep exact, and that they reach the floor."""

import math

import numpy as np
import pytest
import torch
from contract_helpers import EDM, FLOW, VP

from diffusers_sde import ReverseSDEScheduler
from diffusers_sde.benchmarks.common import PROCESSES, oracle, sliced_wasserstein
from diffusers_sde.defaults import falling_noise_levels, multistep_table
from diffusers_sde.sampling import network_denoiser, sample

ZERO_SNR = VP | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}


def levels(n=10, **config):
    scheduler = ReverseSDEScheduler(**{"tau": None, **config})
    scheduler.set_timesteps(n)
    return scheduler.path, scheduler.levels, scheduler._taus(scheduler.levels)


def test_on_a_variance_preserving_path_tau_is_sigma():
    """Half-way in log-SNR."""
    path, nodes, taus = levels(**VP)
    middle = 0.5 * (nodes.log_snr[:-2] + nodes.log_snr[1:-1])
    np.testing.assert_allclose(taus[:-1], path.alpha_sigma_of(middle)[1], rtol=1e-9)


def test_an_edm_model_says_the_scale_of_its_data():
    """tau = sigma / sqrt(sigma_data^2 + sigma^2) at the geometric mean of the noise levels of a step."""
    _, nodes, taus = levels(**EDM)
    sigma = np.sqrt(nodes.sigma[:-2] * nodes.sigma[1:-1])
    np.testing.assert_allclose(taus[:-1], sigma / np.hypot(EDM.get("sigma_data", 0.5), sigma), rtol=1e-9)


@pytest.mark.parametrize("config", [VP, FLOW, EDM, ZERO_SNR], ids=["vp", "flow", "edm", "zero snr"])
@pytest.mark.parametrize("n", [1, 2, 10])
def test_levels_fall_from_one_to_zero(config, n):
    """Finite at infinite ends too."""
    _, _, taus = levels(n, **config)
    assert all(0 <= tau <= 1 for tau in taus)
    assert taus == sorted(taus, reverse=True)
    if n == 10:
        assert taus[0] > 0.9 and taus[-1] < 1e-6


def test_first_order_is_ddpm_with_full_noise():
    assert levels(solver_order=1, **VP)[2] == [1.0] * 10


def test_a_named_level_is_taken_as_it_is():
    assert levels(tau=0.3, **VP)[2] == [0.3] * 10
    assert levels(tau=[0.1 * k for k in range(10)], **VP)[2] == [0.1 * k for k in range(10)]


@pytest.mark.parametrize("n", [3, 10])
def test_falling_levels_are_exact_for_normal_data_of_scale_data_std(n):
    """F is zero there, and each row takes the standard deviation rho_s to rho_t."""
    scheduler = ReverseSDEScheduler(**VP, data_std=0.5)
    scheduler.set_timesteps(n)
    nodes = scheduler.levels
    taus = falling_noise_levels(scheduler.path, nodes)
    table = multistep_table(scheduler.config, scheduler.path, nodes, tau=taus, final="denoise", stochastic=True)
    rho = np.hypot(0.5 * nodes.alpha, nodes.sigma)
    for row, start, end in zip(table.rows[:-1], rho[:-2], rho[1:-1], strict=True):
        assert math.hypot(row.a * start, row.c) == pytest.approx(end, rel=1e-9)
        assert row.c > 0


def test_ten_evaluations_reach_the_sampling_floor():
    """Sliced Wasserstein of a 36-dimensional mixture: that of true samples within a fifth, which is their spread, where
    constant noise has a third as much again."""
    model, count = oracle(process=PROCESSES["linear"]), 2500
    generator = torch.Generator().manual_seed(1)
    truth = model.sample(count, generator)
    floor = np.mean([sliced_wasserstein(model.sample(count, generator), truth) for _ in range(4)])
    noises = [torch.randn(count, *model.sample_shape, generator=generator) for _ in range(2)]

    def distance(**how):
        scheduler, found = ReverseSDEScheduler.from_config(PROCESSES["linear"], **how), []
        for noise in noises:
            scheduler.set_timesteps(10)
            found.append(sliced_wasserstein(sample(network_denoiser(model), scheduler, noise), truth))
        return np.mean(found)

    assert distance(tau=None) < 1.2 * floor
    assert distance() > 1.3 * floor
