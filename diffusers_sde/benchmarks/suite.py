"""The problems that defaults are chosen and judged on: guided mixtures on every kind of process, made from seeds.

Two halves of the same kinds from different seeds: ``development`` for choosing, ``held-out`` for every number that is
quoted.  Knows problems, no sampler.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_sde.analytic import GaussianMixture
from diffusers_sde.benchmarks.common import BETAS
from diffusers_sde.benchmarks.common import PROCESSES as VARIANCE_PRESERVING
from diffusers_sde.configs import path_from_config
from diffusers_sde.prediction import to_model
from diffusers_sde.sampling import Denoiser
from diffusers_sde.stock_configs import canonical_config

_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
PROCESSES: dict[str, dict[str, Any]] = {
    **VARIANCE_PRESERVING,
    "cosine": {**BETAS, "beta_schedule": "squaredcos_cap_v2"},
    "zero SNR": {
        **VARIANCE_PRESERVING["scaled linear"],
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
    },
    "flow": {**_FLOW, "shift": 1.0},
    "flow, shift 3": {**_FLOW, "shift": 3.0},
    "flow, shift 6": {**_FLOW, "shift": 6.0},
    "EDM": {"_class_name": "EDMEulerScheduler", "prediction_type": "epsilon"},
}
GUIDANCE = (1.0, 3.0, 7.5, 12.0)
HALVES = ("development", "held-out")
SAMPLES = 24


@dataclass(frozen=True)
class Problem:
    """A guided network with an exact score, and the noise to start from.

    name: data, process and guidance in words.  family: of the process.  config: of a scheduler for the process.
    guidance: the scale w.  denoiser: what ``config``'s prediction type says of a scaled model input.  noise: unit
    normals (N, 1, 1, d) float64.
    """

    name: str
    family: str
    config: dict[str, Any]
    guidance: float
    denoiser: Denoiser
    noise: torch.Tensor


@dataclass(frozen=True)
class Data:
    """What a network has learned: all of the data, and the part of it that a condition names."""

    name: str
    everything: GaussianMixture
    condition: GaussianMixture


def problems(
    half: str, processes: Sequence[str] | None = None, guidance: Sequence[float] = GUIDANCE
) -> Iterator[Problem]:
    """Every kind of data under every process at every guidance scale.

    Args:
        half: ``development`` or ``held-out``.
        processes: some of :data:`PROCESSES`; None: all.
        guidance: the scales.

    Yields:
        The problems, the same ones in each run.

    Raises:
        ValueError: for another half.
    """
    if half not in HALVES:
        raise ValueError(f"half must be {' or '.join(HALVES)}, not {half!r}.")
    seed = HALVES.index(half)
    for name in processes or PROCESSES:
        config = PROCESSES[name]
        shift = config.get("shift", 1.0)  # models of larger pictures are shifted for them
        for data, scale in itertools.product((_low_rank(seed), _power_law(seed, shift), _separated(seed)), guidance):
            generator = torch.Generator().manual_seed(1000 + seed)
            noise = torch.randn(SAMPLES, 1, 1, data.everything.dimension, generator=generator, dtype=torch.float64)
            title = f"{data.name}, {name}, guidance {scale:g}"
            yield Problem(
                title,
                path_from_config(canonical_config(config)).family,
                config,
                scale,
                guided(data, config, scale),
                noise,
            )


def guided(data: Data, config: dict[str, Any], scale: float) -> Denoiser:
    """``D + (w - 1)(D_condition - D_everything)`` on top of ``D_condition``, as the config's network says it: w = 1 is
    the condition alone (Ho & Salimans 2022, arXiv:2207.12598, in diffusers' scale).

    Args:
        data: with its exact posterior means.
        config: of the process; EDM's input is scaled.
        scale: w.

    Returns:
        ``denoiser(scaled sample, timestep)``, float64.
    """
    known = canonical_config(config)
    path, kind = path_from_config(known), known["prediction_type"]

    def denoiser(sample: torch.Tensor, time: Any) -> torch.Tensor:
        alpha, sigma = (float(v) for v in path.alpha_sigma(float(time)))
        x = sample.double() / path.input_scale(sigma)
        flat = x.reshape(len(x), -1)
        clean = data.condition.posterior_mean(flat, alpha, sigma)
        if scale != 1:
            clean = torch.lerp(data.everything.posterior_mean(flat, alpha, sigma), clean, scale)
        k_x, k_d = to_model(path, kind, alpha, sigma)
        return (k_x * x + k_d * clean.reshape(x.shape)).to(sample.dtype)

    return denoiser


def _data(name: str, means: torch.Tensor, covariances: torch.Tensor, weights: torch.Tensor, part: int) -> Data:
    """The mixture, and that of its first ``part`` components."""
    return Data(
        name,
        GaussianMixture(weights, means, covariances),
        GaussianMixture(weights[:part], means[:part], covariances[:part]),
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _bases(count: int, dimension: int, generator: torch.Generator) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(count, dimension, dimension, generator=generator, dtype=torch.float64))[0]


def _weights(count: int, generator: torch.Generator) -> torch.Tensor:
    return 0.5 + torch.rand(count, generator=generator, dtype=torch.float64)


def _low_rank(seed: int) -> Data:
    """Ten overlapping components in 36 dimensions, each spread along 6 directions of its own: pictures lie near
    surfaces."""
    g = _generator(seed)
    means = 0.4 * torch.randn(10, 36, generator=g, dtype=torch.float64)
    spread = torch.full((10, 36), 0.02**2, dtype=torch.float64)
    spread[:, :6] = (0.3 + 0.9 * torch.rand(10, 6, generator=g, dtype=torch.float64)) ** 2
    basis = _bases(10, 36, g)
    return _data("low rank", means, torch.einsum("kij,kj,klj->kil", basis, spread, basis), _weights(10, g), 3)


def _power_law(seed: int, scale: float = 1.0) -> Data:
    """Eight overlapping components in 64 dimensions whose spectra fall as those of photographs: a few directions, which
    all pixels share, hold most of the variance.  ``scale`` enlarges these, as more pixels do."""
    g = _generator(seed + 100)
    k = torch.arange(1, 65, dtype=torch.float64)
    std = 5 * scale * k ** (-1.0 - 0.5 * torch.rand(8, 1, generator=g, dtype=torch.float64))
    means = std.mean(0) * torch.randn(8, 64, generator=g, dtype=torch.float64)
    turn = torch.linalg.matrix_exp(0.1 * _antisymmetric(8, 64, g))
    return _data("power law", means, torch.einsum("kij,kj,klj->kil", turn, std**2, turn), _weights(8, g), 2)


def _antisymmetric(count: int, dimension: int, generator: torch.Generator) -> torch.Tensor:
    full = torch.randn(count, dimension, dimension, generator=generator, dtype=torch.float64)
    return (full - full.mT) / 2


def _separated(seed: int) -> Data:
    """Twelve components apart from each other in 16 dimensions: the choice of one is made early."""
    g = _generator(seed + 200)
    means = 0.6 * torch.randn(12, 16, generator=g, dtype=torch.float64)
    spread = (0.15 + 0.15 * torch.rand(12, 16, generator=g, dtype=torch.float64)) ** 2
    basis = _bases(12, 16, g)
    return _data("separated", means, torch.einsum("kij,kj,klj->kil", basis, spread, basis), _weights(12, g), 4)
