"""``diffusers-sde bench --sections adaptive``: error and evaluations of steps chosen by their error.

Knows mixture oracles, whose flow it solves with many steps, and the fixed grids to compare with; asserts nothing.
"""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_sde.benchmarks.common import PROCESSES, mean_error, oracle, print_table
from diffusers_sde.class_conditional import ClassConditionalPipeline
from diffusers_sde.generation import sample_adaptive
from diffusers_sde.sampling import network_denoiser, sample
from diffusers_sde.schedulers import ProbabilityFlowScheduler

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
FLOW = {"num_train_timesteps": 1000, "use_flow_sigmas": True, "prediction_type": "flow_prediction"}
COUNTS = (5, 6, 7, 8, 10, 12, 14, 17, 20, 24, 30, 37, 46, 58)
GRIDS = [("power", 1.25), ("power", 1.5), ("power", 2.0), ("balanced", 1.0), ("balanced", 1.25), ("karras", 7.0)]


def measure(seed: int = 0) -> None:
    """A table for each process: of each tolerance the error, the evaluations, and those of the best fixed grid with
    this error, interpolated between numbers of steps: of all grids and orders, chosen with hindsight for each number,
    and of the defaults."""
    for name, process in {**PROCESSES, "flow matching": FLOW}.items():
        model = oracle(seed=seed, process=process)
        pipe = ClassConditionalPipeline(model, ProbabilityFlowScheduler.from_config(process))
        pipe.set_progress_bar_config(disable=True)
        noise = torch.randn(3, *model.sample_shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        options: dict[str, Any] = {"num_images": 3, "latents": noise, "output_type": "latent"}
        exact = sample_adaptive(pipe, tolerance=1e-7, max_evaluations=4000, **options).images
        best, default = [], []
        for n in tqdm(COUNTS, desc=name, leave=False):
            default.append(_error(pipe, noise, exact, n))
            settings = itertools.product((2, 3, 4), GRIDS, ("corrected", "second_order"))
            best.append(min(_error(pipe, noise, exact, n, *setting) for setting in settings))
        rows = []
        for tolerance in TOLERANCES:
            made = sample_adaptive(pipe, tolerance=tolerance, **options)
            error, spent = mean_error(made.images, exact), [report.evaluations for report in made.reports]
            rejected = statistics.mean(report.rejected for report in made.reports)
            needed = [_evaluations(errors, error) for errors in (best, default)]
            shares = [f"{n:.0f} ({statistics.mean(spent) / n:.2f})" if np.isfinite(n) else "more" for n in needed]
            measured = [f"{tolerance:g}", f"{error:.1e}", f"{error / tolerance:.2f}", f"{statistics.mean(spent):.0f}"]
            rows.append([*measured, f"{rejected:.1f}", *shares])
        header = ["tolerance", "error", "in tolerances", "evaluations", "rejected", "best fixed grid", "default grid"]
        print_table(f"Steps chosen by their error: mixture oracle, {name}", header, rows)


def _error(
    pipe: Any,
    noise: torch.Tensor,
    exact: torch.Tensor,
    n: int,
    order: int = 2,
    grid: tuple[str | None, float | None] = (None, None),
    final: str | None = None,
) -> float:
    """Of a fixed grid with n evaluations."""
    options: dict[str, Any] = {"grid": grid[0], "rho": grid[1], "solver_order": order, "final": final}
    scheduler = ProbabilityFlowScheduler.from_config(pipe.scheduler.config, **options)
    scheduler.set_timesteps(n)
    return mean_error(sample(network_denoiser(pipe.unet), scheduler, noise), exact)


def _evaluations(errors: list[float], error: float) -> float:
    """How many evaluations bring the errors at :data:`COUNTS` down to ``error``; inf where none of them do."""
    falling = np.minimum.accumulate(np.log(errors))
    if np.log(error) < falling[-1]:
        return float("inf")
    return float(np.exp(np.interp(-np.log(error), -falling, np.log(COUNTS))))
