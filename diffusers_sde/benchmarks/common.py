"""What the benchmarks share: processes, the mixture oracle, the converged solution, measures of error, the table.

Knows problems and measures; knows no competitor and no figure.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from diffusers_sde.conditioning import capture
from diffusers_sde.models.gaussian_mixture import GaussianMixtureModel
from diffusers_sde.sampling import Denoiser, rmse, sample
from diffusers_sde.schedulers import ProbabilityFlowScheduler

BETAS = {"num_train_timesteps": 1000, "prediction_type": "epsilon"}
PROCESSES = {
    "linear": {**BETAS, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"},
    "scaled linear": {**BETAS, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
}


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A plain aligned table."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [header, ["-" * w for w in widths], *rows]:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )


def print_left_out(settings: list[str]) -> None:
    """The settings that took no part in a comparison, each with its reason; nothing where there are none."""
    if settings:
        print(f"left out, since they refuse or crash: {', '.join(settings)}")


def oracle(
    dimension: int = 36, components: int = 10, seed: int = 0, process: dict[str, Any] | None = None
) -> GaussianMixtureModel:
    """A random anisotropic mixture with the scale of image data (standard deviation about 0.6)."""
    g = torch.Generator().manual_seed(seed)
    means = 0.5 * torch.randn(components, dimension, generator=g, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(components, dimension, dimension, generator=g, dtype=torch.float64))[0]
    spread = 0.02 + 0.3 * torch.rand(components, dimension, generator=g, dtype=torch.float64) ** 3
    covariances = torch.einsum("kij,kj,klj->kil", basis, spread, basis)
    weights = 0.5 + torch.rand(components, generator=g, dtype=torch.float64)
    return GaussianMixtureModel(weights.tolist(), means.tolist(), covariances.tolist(), process=process)


def network_start(network: Any, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise (N, C, H, W) and labels (N,) of a class-conditional network, every class but the null one equally often."""
    config = network.config
    shape = (count, config.in_channels, config.sample_size, config.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise, torch.arange(count) % (config.num_class_embeds - 1)


def prompt_start(pipe: Any, count: int, seed: int) -> torch.Tensor:
    """Noise (N, C, H, W) of a text-to-image pipeline's latents."""
    latents, _, _ = capture(pipe, prompt=[""])
    return torch.randn((count, *latents.shape[1:]), generator=torch.Generator().manual_seed(seed))


def mean_error(x: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean over samples of the root mean square difference; inf where it is not a number."""
    value = rmse(x, reference).mean().item()
    return value if np.isfinite(value) else float("inf")


def reference_solution(denoiser: Denoiser, noise: torch.Tensor, config: dict[str, Any], n: int) -> torch.Tensor:
    """A converged solution of the probability-flow ODE from this noise."""
    options: dict[str, Any] = {"grid": "balanced", "rho": 1.25, "solver_order": 2, "data_std": 0.5, "final": "exact"}
    scheduler = ProbabilityFlowScheduler.from_config(config, clip_sample=False, **options)
    scheduler.set_timesteps(n)
    return sample(denoiser, scheduler, noise)


def sliced_wasserstein(x: torch.Tensor, y: torch.Tensor, projections: int = 256) -> float:
    """Sliced 2-Wasserstein distance of two equally large sample sets over fixed random directions."""
    x, y = x.double().flatten(1), y.double().flatten(1)
    directions = torch.randn(x.shape[1], projections, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    directions /= directions.norm(dim=0)
    gap = (x @ directions).sort(0).values - (y @ directions).sort(0).values
    return gap.square().mean().sqrt().item()
