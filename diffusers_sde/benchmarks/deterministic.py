"""``diffusers-sde bench --sections oracle network``: error to the exact ODE solution against evaluations.

Knows our settings and what they are measured on: mixture oracles and the embedded networks, all from the same noise.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_sde.assets import embedded_models
from diffusers_sde.benchmarks.common import (
    PROCESSES,
    mean_error,
    network_start,
    oracle,
    print_left_out,
    print_table,
    prompt_start,
    reference_solution,
)
from diffusers_sde.benchmarks.competition import PUBLISHED_ODES, best_stock_ode, published
from diffusers_sde.comparison.problems import prompts_for
from diffusers_sde.conditioning import takes_prompts
from diffusers_sde.loading import load_pipeline
from diffusers_sde.sampling import Denoiser, network_denoiser, prompt_denoiser, sample
from diffusers_sde.schedulers import DPMSolverScheduler, ProbabilityFlowScheduler

ERROR_STEPS = (5, 6, 8, 10, 15, 20)
NETWORK_GUIDANCE = (1.0, 3.0, 5.0, 7.5, 12.0)


def measure_oracles(seed: int, candidates: bool) -> None:
    """The mixture under each process."""
    for name, process_config in PROCESSES.items():
        model = oracle(seed=seed, process=process_config)
        noise = torch.randn(64, *model.sample_shape, generator=torch.Generator().manual_seed(seed + 1))
        errors(f"mixture oracle, {name} betas", network_denoiser(model), noise, process_config, candidates)


def measure_network(
    seed: int, num_images: int, candidates: bool, guidance_scales: Sequence[float] | None = None
) -> None:
    """The embedded networks at each guidance scale: the two text-to-image models, in latents, with the example prompts
    in turn, and Fashion-MNIST with its classes in turn."""
    for name in embedded_models():
        pipe = load_pipeline(name)
        if takes_prompts(pipe):
            noise = prompt_start(pipe, num_images, seed)
            guided = functools.partial(prompt_denoiser, pipe, prompts_for(num_images))
        else:
            noise, labels = network_start(pipe.unet, num_images, seed)
            guided = functools.partial(network_denoiser, pipe.unet, labels)
        for scale in guidance_scales or NETWORK_GUIDANCE:
            errors(f"{name}, guidance {scale:g}", guided(scale), noise, dict(pipe.scheduler.config), candidates)


def ours(config: dict[str, Any], candidates: bool) -> dict[str, Any]:
    """Our deterministic schedulers with their defaults and, if asked for, the settings these were chosen from."""
    made = {
        "ProbabilityFlow (default)": ProbabilityFlowScheduler.from_config(config, clip_sample=False),
        "DPMSolver (default)": DPMSolverScheduler.from_config(config, clip_sample=False),
    }
    grids = [("balanced", r) for r in (1.0, 1.1, 1.25)] + [("power", r) for r in (1.0, 1.25, 1.5, 2.0)]
    settings = [(g, r, c, 2) for g, r in [*grids, ("karras", 7.0), ("log_snr", None)] for c in (0.5, 1.0)]
    settings += [("balanced", 1.1, 0.0, 2), ("balanced", 1.1, 1.0, 3), ("balanced", 1.1, 1.0, 1)]
    if candidates:
        made["default, no corrector"] = ProbabilityFlowScheduler.from_config(config, clip_sample=False, corrector=False)
    for grid, rho, data_std, order in settings if candidates else ():
        name = f"{grid}{'' if rho is None else f' {rho:g}'}, data_std {data_std:g}, order {order}"
        options: dict[str, Any] = {"grid": grid, "rho": rho, "data_std": data_std, "solver_order": order}
        made[name] = ProbabilityFlowScheduler.from_config(config, clip_sample=False, **options)
    return made


def _best_published(
    name: str, config: dict[str, Any], n: int, denoiser: Denoiser, noise: torch.Tensor, reference: torch.Tensor
) -> float:
    """The error of a published sampler with its best schedule, at ``n`` evaluations or as many as its stages allow."""
    found = []
    for _, make in published([name], config):
        scheduler = make()
        scheduler.set_timesteps(n)
        found.append(mean_error(sample(denoiser, scheduler, noise), reference))
    return min(found)


def errors(title: str, denoiser: Denoiser, noise: torch.Tensor, config: dict[str, Any], candidates: bool) -> None:
    """Error versus NFE: our settings against the best of all stock settings at each NFE."""
    reference = reference_solution(denoiser, noise, config, 240)
    uncertainty = mean_error(reference_solution(denoiser, noise, config, 120), reference)
    best: list[tuple[float, str]] = []
    left_out: list[str] = []
    found: dict[str, list[float]] = {name: [] for name in (*ours(config, candidates), *PUBLISHED_ODES)}
    for n in tqdm(ERROR_STEPS, desc=title, leave=False):
        error, setting, missing = best_stock_ode(config, n, denoiser, noise, reference)
        best.append((error, setting))
        left_out += missing
        for name, scheduler in ours(config, candidates).items():
            scheduler.set_timesteps(n)
            found[name].append(mean_error(sample(denoiser, scheduler, noise), reference))
        for name in PUBLISHED_ODES:
            found[name].append(_best_published(name, config, n, denoiser, noise, reference))
    rows = [["best of diffusers, error", *(f"{e:.4f}" for e, _ in best), ""]]
    for name, values in found.items():
        if "(default)" in name:
            rows.append([f"{name}, error", *(f"{v:.4f}" for v in values), ""])
        ratios = [v / e for v, (e, _) in zip(values, best, strict=True)]
        mean = statistics.geometric_mean(ratios)
        rows.append([f"{name}, ratio", *(f"{r:.2f}" for r in ratios), f"{mean:.2f}"])
    header = ["", *(f"{n} NFE" for n in ERROR_STEPS), "mean"]
    print_table(f"Error to the exact ODE solution: {title} (reference converged to {uncertainty:.1e})", header, rows)
    print("best of diffusers was: " + "; ".join(f"{n}: {name}" for n, (_, name) in zip(ERROR_STEPS, best, strict=True)))
    print_left_out(left_out)
