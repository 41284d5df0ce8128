"""Tab 4, computed: how fast errors fall, and what they are made of.

Knows two problems (an exact mixture and the embedded network), fitted slopes, and the budget of three sources of error.
Knows no interface.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from diffusers_sde import GaussianMixtureModel, ProbabilityFlowScheduler
from diffusers_sde.benchmarks.errors import coupled_errors
from diffusers_sde.comparison.engine import Comparison, compare
from diffusers_sde.comparison.problems import Problem, Tick, make_problem
from diffusers_sde.sampler_names import DEFAULT_SAMPLERS, SAMPLERS
from space import inputs, models

PROBLEMS = {"mixture": "exact mixture", "network": "Fashion-MNIST network"}
NFES = {"mixture": (5, 7, 10, 14, 20, 28, 40), "network": (5, 8, 12, 20)}
REFERENCE_STEPS = {"mixture": 400, "network": 80}
DIMENSION, COMPONENTS, SAMPLES = 16, 5, {"mixture": 64, "network": 2}
BUDGET_STEPS = (5, 10, 20, 40)
SOURCES = ("initialisation", "discretisation", "score")
DETERMINISTIC = tuple(name for name, s in SAMPLERS.items() if not s.stochastic and not s.learned)
PRESELECTED = tuple(name for name in DEFAULT_SAMPLERS["variance preserving"] if name in DETERMINISTIC)[:4]


# -- error against evaluations --


@dataclass(frozen=True)
class Curves:
    """The errors of one problem as far as they are known."""

    problem: str
    comparison: Comparison

    @property
    def points(self) -> dict[str, list[tuple[int, float]]]:
        """Mean errors ``{sampler: [(evaluations, error), ...]}``."""
        found: dict[str, list[tuple[int, float]]] = {}
        for result in self.comparison.by_sampler:
            if result.mean is not None:
                found.setdefault(result.sampler, []).append((result.nfe, result.mean))
        return found

    def slope(self, sampler: str) -> float | None:
        """The fitted order, from errors well above that of the reference; None until that is known."""
        floor = self.comparison.reference_error
        return None if floor is None else fit_slope(self.points.get(sampler, []), 4 * floor)


def oracle(seed: int = 0) -> GaussianMixtureModel:
    """A mixture in 16 dimensions with components of different widths."""
    generator = torch.Generator().manual_seed(seed)
    means = 0.6 * torch.randn(COMPONENTS, DIMENSION, dtype=torch.float64, generator=generator)
    variances = 0.02 + 0.1 * torch.rand(COMPONENTS, DIMENSION, dtype=torch.float64, generator=generator)
    return GaussianMixtureModel([1.0] * COMPONENTS, means.tolist(), variances.tolist())


def problem_of(key: str, seed: int) -> Problem:
    """The problem of this key; raises :class:`UsageError` for an unknown one."""
    inputs.choice(key, list(PROBLEMS), "The problem")
    if key == "network":
        return models.problem("fashion", seed=seed, guidance=1.0, images=SAMPLES[key])
    pipe = DDPMPipeline(unet=oracle(), scheduler=DDPMScheduler(clip_sample=False))
    return make_problem(pipe, num_images=SAMPLES[key], seed=seed)


def curves(key: str, samplers: Sequence[str], seed: int, tick: Tick = lambda: None) -> Generator[Curves]:
    """Errors, a number of evaluations at a time; ``tick`` is called after each evaluation.  Raises :class:`UsageError`
    for wrong inputs, and for samplers that do not fit."""
    names, seed = inputs.samplers(samplers, allow_stochastic=False), inputs.seed(seed)
    for state in compare(problem_of(key, seed), names, NFES[key], reference_steps=REFERENCE_STEPS[key], tick=tick):
        column_ends = bool(state.results) and state.results[-1].sampler == names[-1]
        if state.finished or (column_ends and state.reference is not None):
            yield Curves(key, state)


def fit_slope(points: Sequence[tuple[int, float]], floor: float = 0.0, used: int = 4) -> float | None:
    """The order p of ``error ~ C nfe^-p``: least squares on the logarithms of the last ``used`` points above ``floor``;
    None for fewer than three."""
    kept = [(math.log(n), math.log(e)) for n, e in points if math.isfinite(e) and e > max(floor, 0.0)][-used:]
    if len(kept) < 3:
        return None
    x, y = np.array(kept).T
    return float(-np.polyfit(x, y, 1)[0])


# -- the budget --


@dataclass(frozen=True)
class Dials:
    """``noise``: the largest noise level sigma/alpha at which sampling starts; ``score``: how much too large the
    network believes the means to be; ``order`` of the solver."""

    noise: float = 8.0
    score: float = 0.05
    order: int = 2


@dataclass(frozen=True)
class Budget:
    """For each of ``steps``: the three root mean squares, and that of the whole error, at most their sum."""

    dials: Dials
    steps: tuple[int, ...]
    parts: list[dict[str, float]]


def checked_dials(noise: Any = 8.0, score: Any = 0.05, order: Any = 2) -> Dials:
    """Dials of raw inputs; raises :class:`UsageError`."""
    return Dials(
        noise=inputs.number(noise, 2, 150, "The largest noise level"),
        score=inputs.number(score, 0, 0.3, "The score error"),
        order=inputs.integer(order, 1, 3, "The order"),
    )


def beta_end(noise: float, beta_start: float = 1e-4, steps: int = 1000) -> float:
    """The last of linear betas whose process ends at the noise level ``noise``: ``sum -log(1 - beta_k) = log(1 +
    s^2)``, by bisection."""
    low, high = beta_start, 0.5
    for _ in range(60):
        middle = 0.5 * (low + high)
        reached = -np.log1p(-np.linspace(beta_start, middle, steps)).sum()
        low, high = (middle, high) if reached < math.log1p(noise**2) else (low, middle)
    return low


def budget(dials: Dials, seed: int = 0, samples: int = 96) -> Budget:
    """The sources of error of the probability flow on a mixture in four dimensions, from coupled samples
    (:mod:`diffusers_sde.benchmarks.errors`)."""
    process = {"beta_end": beta_end(dials.noise)}
    weights, variances = [0.4, 0.35, 0.25], [0.05, 0.2, 0.1]
    means = [[1.0, -1.0, 0.5, 0.0], [-1.2, 0.3, 0.0, 0.8], [0.2, 1.1, -1.0, -0.6]]

    def network(error: float) -> GaussianMixtureModel:
        wrong = [[(1 + error) * v for v in mean] for mean in means]
        return GaussianMixtureModel(weights, wrong, variances, process=process)

    options = {"solver_order": dials.order, "final_sigmas_type": "sigma_min", **process}
    schedulers = [(ProbabilityFlowScheduler(**options), n) for n in BUDGET_STEPS]
    parts = coupled_errors(network(0.0), network(dials.score), schedulers, seed, samples, tolerance=1e-6)
    return Budget(dials, BUDGET_STEPS, parts)


# -- the table --


def as_csv(found: Curves, made_of: Budget) -> str:
    """Both results as one table: ``part, name, nfe, value``."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("part", "name", "nfe", "value"))
    for name, points in found.points.items():
        writer.writerows(("error", name, n, f"{e:.6g}") for n, e in points)
        slope = found.slope(name)
        writer.writerow(("slope", name, "", "" if slope is None else f"{slope:.3f}"))
    for n, parts in zip(made_of.steps, made_of.parts, strict=True):
        writer.writerows(("budget", source, n, f"{value:.6g}") for source, value in parts.items())
    return text.getvalue()
