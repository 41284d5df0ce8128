r"""``diffusers-sde bench --errors``: where the error of a sampler comes from, on exact oracles.

Knows three sources and how to switch each on alone: *initialisation* (starting from N(0, I) instead of p_T),
*discretisation* (n steps instead of the exact process) and *score* (a network that is slightly wrong).

* Gaussian data: everything is Gaussian, so the laws at the end and their KL divergences from the data's are closed
  forms (Lu, arXiv:2607.01693, chapter 6: ``KL <= init + discretisation + score`` up to constants; KL is quadratic in
  small errors, so that square roots of it add).
* A mixture: samples of both flows from coupled starts.  With ``flow`` the exact map of a denoiser, ``solver`` its
  discretisation and ``x_T ~ p_T`` coupled to its own noise eps,

      solver(wrong, eps) - flow(right, x_T) = [solver(wrong, eps) - flow(wrong, eps)]        discretisation
                                            + [flow(wrong, eps) - flow(right, eps)]          score
                                            + [flow(right, eps) - flow(right, x_T)],         initialisation

  so the root mean squares of the brackets add up to at least that of the total, an upper bound of the Wasserstein
  distance W2 to the data (at the cleanest training time).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from diffusers_sde.benchmarks.common import PROCESSES
from diffusers_sde.configs import path_from_config
from diffusers_sde.flow_maps import exact_flow_map
from diffusers_sde.models.gaussian_mixture import GaussianMixtureModel
from diffusers_sde.prediction import to_model
from diffusers_sde.sampling import network_denoiser, sample
from diffusers_sde.schedulers import ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.schedulers.base import SchedulerOutput, TableScheduler

STEPS = (5, 10, 20, 40, 80)
STD, WRONG_STD = 0.5, 0.475  # of the Gaussian data, and as a network 5 % off thinks
SHORT = {"beta_end": 0.008}  # betas that stop early: alpha_T = 0.13, so that the start is visibly wrong
# tables as they are: the laws are read off runs that are linear in their noise
METHODS: dict[str, tuple[type[TableScheduler], dict[str, Any]]] = {
    "ODE order 1 (DDIM)": (ProbabilityFlowScheduler, {"solver_order": 1, "grid": "trailing"}),
    "ODE order 2": (ProbabilityFlowScheduler, {"solver_order": 2, "trust": False}),
    "SDE order 1 (DDPM)": (ReverseSDEScheduler, {"solver_order": 1, "grid": "trailing"}),
    "SDE order 2": (ReverseSDEScheduler, {"solver_order": 2, "trust": False}),
}


# -- Gaussian data, closed form --


def final_variance(scheduler: TableScheduler, steps: int, thinks: float, start: float) -> float:
    """The exact variance that a scheduler ends with, started from N(0, start), on a network for N(0, thinks^2) data.

    The state is linear in the first state and in each step's noise: run the basis vectors of these instead of samples.
    """
    scheduler.set_timesteps(steps)
    basis = torch.eye(steps + 1, dtype=torch.float64)[:, None, None, None]
    x = basis[0] * math.sqrt(start)
    levels = scheduler.levels
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = float(levels.alpha[i]), float(levels.sigma[i])
        gain = alpha * thinks**2 / ((alpha * thinks) ** 2 + sigma**2)
        k_x, k_d = to_model(scheduler.path, scheduler.config.prediction_type, alpha, sigma)
        out = scheduler.step((k_x + k_d * gain) * x, t, x)
        assert isinstance(out, SchedulerOutput) and out.prev_sample_mean is not None
        x = out.prev_sample_mean + out.noise_std * basis[i + 1]
    return float(x.square().sum())


def gaussian_kl(variance: float, reference: float) -> float:
    """``KL(N(0, variance) || N(0, reference))`` of one dimension, nats."""
    ratio = variance / reference
    return 0.5 * (ratio - 1 - math.log(ratio))


def gaussian_errors(method: str, steps: int) -> dict[str, float]:
    """KL divergence from the data N(0, STD^2), per dimension, with each source of error alone and with all of them."""
    kind, options = METHODS[method]
    alpha, sigma = _last_level()
    right = (alpha * STD) ** 2 + sigma**2

    def exact(thinks: float) -> TableScheduler:  # the linear part is the whole process: exact at any number of steps
        return kind(**SHORT, **{**options, "data_std": thinks, "final": "exact"})

    runs = {
        "initialisation": (exact(STD), STD, 1.0),
        "discretisation": (kind(**SHORT, **options), STD, right),
        "score": (exact(WRONG_STD), WRONG_STD, right),
        "together": (kind(**SHORT, **options), WRONG_STD, 1.0),
    }
    return {
        name: gaussian_kl(final_variance(scheduler, steps, thinks, start), STD**2)
        for name, (scheduler, thinks, start) in runs.items()
    }


# -- a mixture, coupled samples --

WEIGHTS = [0.4, 0.35, 0.25]
MEANS = [[1.0, -1.0, 0.5, 0.0], [-1.2, 0.3, 0.0, 0.8], [0.2, 1.1, -1.0, -0.6]]
VARIANCES = [0.05, 0.2, 0.1]


def mixture(error: float = 0.0) -> GaussianMixtureModel:
    """The oracle, or a network whose component means are ``error`` too large."""
    means = [[(1 + error) * v for v in mean] for mean in MEANS]
    return GaussianMixtureModel(WEIGHTS, means, VARIANCES, process=SHORT)


def mixture_errors(method: str, steps: Sequence[int], seed: int, n: int = 256) -> list[dict[str, float]]:
    """:func:`coupled_errors` of a deterministic method for each of ``steps``."""
    kind, options = METHODS[method]
    schedulers = [(kind(**SHORT, **options, final_sigmas_type="sigma_min"), count) for count in steps]
    return coupled_errors(mixture(), mixture(0.05), schedulers, seed, n)


def coupled_errors(
    right: GaussianMixtureModel,
    wrong: GaussianMixtureModel,
    schedulers: Sequence[tuple[TableScheduler, int]],
    seed: int,
    n: int,
    tolerance: float = 1e-8,
) -> list[dict[str, float]]:
    """Root mean square of each bracket of the module docstring, per sample (not per dimension), for each deterministic
    ``(scheduler, steps)``, which ends at the cleanest training time; ``tolerance`` is that of the exact flow."""
    path, generator = right.path, torch.Generator().manual_seed(seed)
    eps = torch.randn(n, *right.sample_shape, dtype=torch.float64, generator=generator)
    alpha, sigma = (float(v) for v in path.alpha_sigma(path.noisiest))
    x_t = alpha * right.sample(n, generator) + sigma * eps

    def flow(model: GaussianMixtureModel, x: torch.Tensor) -> torch.Tensor:
        accuracy = {"rtol": tolerance, "atol": tolerance}
        return exact_flow_map(path, model.posterior_mean, x, path.noisiest, path.cleanest, **accuracy)

    truth, from_noise, wrong_flow = flow(right, x_t), flow(right, eps), flow(wrong, eps)
    results = []
    for scheduler, count in schedulers:
        scheduler.set_timesteps(count)
        solved = sample(network_denoiser(wrong), scheduler, eps)
        results.append(
            {
                "initialisation": _rms(from_noise - truth),
                "discretisation": _rms(solved - wrong_flow),
                "score": _rms(wrong_flow - from_noise),
                "together": _rms(solved - truth),
            }
        )
    return results


def measure(seed: int = 0) -> None:
    """Print both decompositions."""
    print(f"KL divergence from N(0, {STD}^2) data, nats per dimension, closed form (alpha_T = {_last_level()[0]:.2f},")
    print(f"score of a network that thinks {WRONG_STD})\n")
    _print_header("steps", STEPS)
    for method in METHODS:
        _print_block(method, [gaussian_errors(method, n) for n in STEPS])
    print("\nRoot mean square distance of coupled samples on a mixture in 4 dimensions, an upper bound of W2")
    print("(component means of the network 5 % too large)\n")
    _print_header("steps", STEPS)
    for method in [name for name in METHODS if name.startswith("ODE")]:
        _print_block(method, mixture_errors(method, STEPS, seed))


def _rms(difference: torch.Tensor) -> float:
    return float(difference.flatten(1).square().sum(1).mean().sqrt())


def _last_level() -> tuple[float, float]:
    """``(alpha_T, sigma_T)`` of the betas that stop early."""
    alpha, sigma = path_from_config({**PROCESSES["linear"], **SHORT}).alpha_sigma(999)
    return float(alpha), float(sigma)


def _print_header(label: str, steps: Sequence[int]) -> None:
    print(f"{label:>36} " + " ".join(f"{n:>9}" for n in steps))


def _print_block(method: str, columns: list[dict[str, float]]) -> None:
    for i, name in enumerate(columns[0]):
        print(f"{method if not i else '':<20} {name:>15} " + " ".join(f"{column[name]:9.2g}" for column in columns))
