"""Tab 3, computed: particles in two dimensions under the exact score of a Gaussian mixture.  No network.

Knows the distributions, the flow of particles, densities and scores on a grid, and guidance two ways with the true
tilted law.  Knows no interface.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from diffusers_sde import GaussianMixtureModel, ProbabilityFlowScheduler, ReverseSDEScheduler, TableScheduler
from diffusers_sde.errors import UsageError
from diffusers_sde.methods.control import scheduler_kernel, systematic_resample, twisted_smc
from diffusers_sde.methods.guidance import classifier_free
from diffusers_sde.named_grids import GRIDS
from diffusers_sde.sampling import network_denoiser, sample
from diffusers_sde.weights import CLOCKS
from space import inputs
from space.recording import Recording, record

EXTENT, RESOLUTION, ARROWS = 2.6, 48, 11
WIDE, WIDE_RESOLUTION = 2 * EXTENT, 4 * RESOLUTION  # of a tilted law, which may lie beyond the data
DEFAULT_GRID = "default"
GRID_CHOICES = (DEFAULT_GRID, *(name for name in GRIDS if name not in ("exponential", "ays")))
MAX_PARTICLES, MAX_POINTS = 1000, 400


# -- distributions --


def _isotropic(means: Sequence[Sequence[float]], std: float, weights: Sequence[float] | None = None) -> Any:
    return GaussianMixtureModel(list(weights or [1.0] * len(means)), [list(m) for m in means], [std**2] * len(means))


def _ring() -> GaussianMixtureModel:
    angles = np.arange(8) * math.pi / 4
    return _isotropic(np.stack([1.6 * np.cos(angles), 1.6 * np.sin(angles)], 1).tolist(), 0.16)


def _moons() -> GaussianMixtureModel:
    angles = np.linspace(0, math.pi, 7)
    upper = np.stack([1.2 * np.cos(angles) - 0.6, 1.2 * np.sin(angles) - 0.3], 1)
    return _isotropic(np.concatenate([upper, -upper]).tolist(), 0.14)


def _spiral() -> GaussianMixtureModel:
    u = np.linspace(0.12, 1, 18)
    angle = 3.2 * math.pi * np.sqrt(u)
    return _isotropic(np.stack([1.9 * u * np.cos(angle), 1.9 * u * np.sin(angle)], 1).tolist(), 0.11)


def _clusters() -> GaussianMixtureModel:
    turned = [[0.18, 0.12], [0.12, 0.14]]
    means = [[-1.2, 0.9], [1.3, 0.6], [0.1, -1.2]]
    return GaussianMixtureModel(
        [0.5, 0.2, 0.3], means, [turned, [[0.05, 0.0], [0.0, 0.25]], [[0.35, 0.0], [0.0, 0.05]]]
    )


def _checkers() -> GaussianMixtureModel:
    return _isotropic([[1.2 * i, 1.2 * j] for i in (-1, 0, 1) for j in (-1, 0, 1) if (i + j) % 2 == 0], 0.2)


DISTRIBUTIONS: dict[str, Callable[[], GaussianMixtureModel]] = {
    "ring": _ring,
    "moons": _moons,
    "spiral": _spiral,
    "clusters": _clusters,
    "checkers": _checkers,
}
DRAWN = "drawn"


def from_points(points: Any, components: int = 24, std: float = 0.12) -> GaussianMixtureModel:
    """A mixture along drawn points (a list of [x, y], or its JSON text): ``components`` of them, as far apart as they
    can be, weighted by how many points are nearest.  Raises :class:`UsageError`."""
    try:
        values = json.loads(points) if isinstance(points, str) else points
        array = np.asarray(values, np.float64)
    except (ValueError, TypeError):
        array = np.zeros(0)
    if array.ndim != 2 or array.shape[1:] != (2,) or len(array) > MAX_POINTS or not np.isfinite(array).all():
        raise UsageError(f"Draw something first: 1 to {MAX_POINTS} points are needed.")
    array = array.clip(-EXTENT, EXTENT)
    chosen, gap = [0], np.full(len(array), np.inf)
    for _ in range(min(components, len(array)) - 1):  # farthest point first
        gap = np.minimum(gap, np.linalg.norm(array - array[chosen[-1]], axis=1))
        if gap.max() < std / 2:
            break
        chosen.append(int(gap.argmax()))
    centres = array[chosen]
    nearest = np.linalg.norm(array[:, None] - centres, axis=2).argmin(1)
    return _isotropic(centres.tolist(), std, np.bincount(nearest, minlength=len(centres)).clip(1).tolist())


# -- requests --


@dataclass(frozen=True)
class Request:
    """What a visitor asked for, checked by :func:`checked`; ``clock`` None and ``grid`` "default" are the measured
    defaults.  ``component``: the class that guidance of ``scale`` asks for, None for no guidance."""

    distribution: str = "moons"
    points: Any = None
    tau: float = 0.0
    order: int = 2
    clock: str | None = None
    grid: str = DEFAULT_GRID
    steps: int = 20
    particles: int = 300
    seed: int = 0
    component: int | None = None
    scale: float = 3.0


def checked(**values: Any) -> Request:
    """A :class:`Request` of raw inputs; raises :class:`UsageError` that says what to change."""
    clock, component = values.get("clock"), values.get("component")
    request = Request(
        distribution=inputs.choice(values.get("distribution", "moons"), [*DISTRIBUTIONS, DRAWN], "The distribution"),
        points=values.get("points"),
        tau=inputs.number(values.get("tau", 0.0), 0, 2, "The noise level tau"),
        order=inputs.integer(values.get("order", 2), 1, 3, "The order"),
        clock=None if clock in (None, "", DEFAULT_GRID) else inputs.choice(clock, CLOCKS, "The clock"),
        grid=inputs.choice(values.get("grid") or DEFAULT_GRID, GRID_CHOICES, "The grid"),
        steps=inputs.steps(values.get("steps", 20)),
        particles=inputs.integer(values.get("particles", 300), 10, MAX_PARTICLES, "The number of particles"),
        seed=inputs.seed(values.get("seed", 0)),
        scale=inputs.number(values.get("scale", 3.0), 0, 8, "The guidance scale"),
    )
    if component in (None, ""):
        return request
    last = len(mixture(request).config.weights) - 1
    return replace(request, component=inputs.integer(component, 0, last, "The component"))


def mixture(request: Request) -> GaussianMixtureModel:
    """The distribution of a request."""
    return from_points(request.points) if request.distribution == DRAWN else DISTRIBUTIONS[request.distribution]()


def scheduler_of(request: Request, config: dict[str, Any] | None = None) -> TableScheduler:
    """The sampler of a request with its steps laid out, on DDPM's process."""
    options: dict[str, Any] = {"solver_order": request.order, "clock": request.clock}
    if request.grid != DEFAULT_GRID:
        options["grid"] = request.grid
    scheduler: TableScheduler
    if request.tau:
        scheduler = ReverseSDEScheduler(tau=request.tau, noise_seed=request.seed, **options)
    else:
        scheduler = ProbabilityFlowScheduler(**options)
    scheduler.set_timesteps(request.steps)
    return scheduler


def _noise(request: Request) -> torch.Tensor:
    generator = torch.Generator().manual_seed(request.seed)
    return torch.randn(request.particles, 1, 1, 2, dtype=torch.float64, generator=generator)


# -- flow --


@dataclass(frozen=True)
class Flow:
    """Particles (n + 1, N, 2) at n + 1 half log-SNRs, ``(alpha, sigma)`` there, the distance of the last ones to the
    data (:func:`sliced_distance`) and the same of as many exact samples."""

    log_snr: np.ndarray
    levels: list[tuple[float, float]]
    particles: np.ndarray
    distance: float
    floor: float


def flow(request: Request) -> Flow:
    """Run the particles of a request."""
    model, scheduler = mixture(request), scheduler_of(request)
    recording: Recording = record(network_denoiser(model), scheduler, _noise(request))
    particles = recording.states.reshape(request.steps + 1, request.particles, 2).numpy()
    levels = list(zip(recording.levels.alpha.tolist(), recording.levels.sigma.tolist(), strict=True))
    exact, other = (_exact_samples(model, request.particles, seed) for seed in (1, 2))
    return Flow(
        recording.levels.log_snr,
        levels,
        particles,
        sliced_distance(particles[-1], exact),
        sliced_distance(other, exact),
    )


def _exact_samples(model: GaussianMixtureModel, n: int, seed: int) -> np.ndarray:
    return model.sample(n, torch.Generator().manual_seed(seed)).reshape(n, 2).numpy()


def sliced_distance(left: np.ndarray, right: np.ndarray, directions: int = 24) -> float:
    """Sliced Wasserstein distance W2 of two equally large samples (N, 2), over evenly spread directions."""
    angles = (np.arange(directions) + 0.5) * math.pi / directions
    axes = np.stack([np.cos(angles), np.sin(angles)])
    gaps = np.sort(left @ axes, axis=0) - np.sort(right @ axes, axis=0)
    return float(np.sqrt((gaps**2).mean()))


# -- fields --


def axis(resolution: int, half: float = EXTENT) -> np.ndarray:
    """The coordinates of the square of half-width ``half``; fields are shown on that of :data:`EXTENT`."""
    return np.linspace(-half, half, resolution)


def _plane(resolution: int, half: float = EXTENT) -> torch.Tensor:
    u = torch.from_numpy(axis(resolution, half))
    y, x = torch.meshgrid(u, u, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


def density(model: GaussianMixtureModel, alpha: float = 1.0, sigma: float = 0.0) -> np.ndarray:
    """``p_t`` on the square, [y, x]."""
    return model.log_density(_plane(RESOLUTION), alpha, sigma).exp().reshape(RESOLUTION, RESOLUTION).numpy()


def score_field(model: GaussianMixtureModel, alpha: float, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """Points (M, 2) of the square and ``sigma`` times the score there (minus the mean noise)."""
    points = _plane(ARROWS)
    return points.numpy(), (sigma * model.score(points[:, None, None], alpha, sigma)).reshape(-1, 2).numpy()


# -- guidance --


@dataclass(frozen=True)
class Guided:
    """Particles (N, 2) of classifier-free guidance and of sequential Monte Carlo; the law both aim at, ``p(x) p(y |
    x)^w`` normalised on the square of half-width :data:`WIDE`; the effective sample size of the latter over the steps,
    as a fraction; the distances of both to the law, and that of exact samples of it."""

    free: np.ndarray
    monte_carlo: np.ndarray
    law: np.ndarray
    effective: np.ndarray
    distances: tuple[float, float]
    floor: float


def guided(request: Request) -> Guided:
    """Guidance towards ``request.component`` with ``request.scale``, two ways from the same start.

    Guidance uses the request's sampler; Monte Carlo needs noise, so at tau = 0 it runs at tau = 1.
    """
    if request.component is None:
        raise UsageError("Choose a component to guide towards.")
    model, noise, n = mixture(request), _noise(request), request.particles
    labels = torch.full((n,), request.component)

    def free(x: torch.Tensor, t: Any) -> torch.Tensor:
        null, conditional = model(x, t, return_dict=False)[0], model(x, t, labels, return_dict=False)[0]
        return classifier_free(null, conditional, request.scale)

    particles = sample(free, scheduler_of(request), noise).reshape(n, 2).numpy()
    chosen = conditional_law(model, request.component)

    def log_likelihood(x: torch.Tensor) -> torch.Tensor:
        return chosen.log_density(x) - model.log_density(x)

    scheduler = scheduler_of(replace(request, tau=request.tau or 1.0))
    generator = torch.Generator().manual_seed(request.seed + 1)
    result = twisted_smc(
        scheduler_kernel(network_denoiser(model), scheduler),
        log_likelihood,
        noise[None],
        steps=request.steps,
        beta=request.scale,
        generator=generator,
        reorder=scheduler.reorder,
    )
    index = systematic_resample(result.log_weights, generator)[0]
    weighted = result.samples[0, index].reshape(n, 2).numpy()
    law = tilted_density(model, chosen, request.scale)
    exact, other = (samples_of(law, n, seed) for seed in (1, 2))
    return Guided(
        particles,
        weighted,
        law,
        (result.ess[:, 0] / n).numpy(),
        (sliced_distance(particles, exact), sliced_distance(weighted, exact)),
        sliced_distance(other, exact),
    )


def conditional_law(model: GaussianMixtureModel, component: int) -> GaussianMixtureModel:
    """``p(x | y)``: the component itself."""
    return GaussianMixtureModel([1.0], [model.config.means[component]], [model.covariances[component].tolist()])


def tilted_density(model: GaussianMixtureModel, chosen: GaussianMixtureModel, scale: float) -> np.ndarray:
    """``p(x) (p(x | y)/p(x))^scale`` on the square of half-width :data:`WIDE`, normalised there, [y, x]."""
    plane = _plane(WIDE_RESOLUTION, WIDE)
    base = model.log_density(plane)
    log_law = base + scale * (chosen.log_density(plane) - base)
    weights = (log_law - log_law.max()).exp().reshape(WIDE_RESOLUTION, WIDE_RESOLUTION).numpy()
    cell = (2 * WIDE / (WIDE_RESOLUTION - 1)) ** 2
    return weights / (weights.sum() * cell)


def samples_of(law: np.ndarray, n: int, seed: int) -> np.ndarray:
    """``n`` samples (n, 2) of a density given on the square of half-width :data:`WIDE`, uniform within its cells."""
    rng, size = np.random.default_rng(seed), len(law)
    cells = rng.choice(law.size, n, p=law.ravel() / law.sum())
    width = 2 * WIDE / (size - 1)
    u = axis(size, WIDE)
    jitter = rng.uniform(-width / 2, width / 2, (n, 2))
    return np.stack([u[cells % size], u[cells // size]], 1) + jitter
