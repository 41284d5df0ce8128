r"""Langevin dynamics: ULA and MALA for densities, annealed Langevin, correctors and Restart for reverse processes.

Knows ``dx = grad log p dt + sqrt(2) dw``, which leaves p as it is, its discretisations, and how to run a scheduler that
says its noise levels with corrector steps between its steps, with these alone or with stretches of the grid repeated.
Knows no network and no pipeline.

* ULA, ``x <- x + h grad log p(x) + sqrt(2 h) z``, is biased; on N(0, v) its stationary variance is
  ``v / (1 - h/(2v))`` (Lu, arXiv:2607.01693, chapter 2).  MALA accepts or rejects the same proposal and has no bias
  (Roberts & Tweedie 1996).
* Predictor-corrector (Song et al. 2021, arXiv:2011.13456, algorithms 2 to 5): after each step to a noise level, ULA
  steps for the law there, of size ``h = 2 (snr sigma)^2``; the relative bias in variance is at most
  ``snr^2/(1 - snr^2)``.
* Annealed Langevin (NCSN; Song & Ermon 2019, arXiv:1907.05600, algorithm 1): the correctors alone, at every level in
  turn, each started from what the level before left.
* Restart (Xu et al. 2023, arXiv:2306.14878, algorithm 1): from the low end of an interval of noise levels go back to
  its high end by adding noise, and come down again.  On N(0, c^2) data an error in variance shrinks each time by
  ``(c^2 + s_low^2)/(c^2 + s_high^2)``, s = sigma/alpha.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusers_sde.errors import is_real, is_whole
from diffusers_sde.prediction import NOISE, from_model
from diffusers_sde.tables import points_of
from diffusers_sde.weights import Point

Function = Callable[[torch.Tensor], torch.Tensor]


# -- for a density --


def ula(
    score: Function, x: torch.Tensor, step: float, num_steps: int, generator: torch.Generator | None = None
) -> torch.Tensor:
    """The unadjusted Langevin algorithm: ``num_steps`` times ``x <- x + step score(x) + sqrt(2 step) z``.

    Args:
        score: ``grad log p``, (N, ...) to (N, ...).
        x: where to start (N, ...).
        step: h, in squared units of x; positive.
        num_steps: how often.
        generator: of z.

    Returns:
        The states (N, ...).

    Raises:
        ValueError: for a step that is not positive and finite.
    """
    _check_step(step)
    for _ in range(num_steps):
        x = x + step * score(x) + math.sqrt(2 * step) * randn_tensor(x.shape, generator, x.device, x.dtype)
    return x


def mala(
    log_density: Function,
    score: Function,
    x: torch.Tensor,
    step: float,
    num_steps: int,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, float]:
    """The Metropolis-adjusted Langevin algorithm (Roberts & Tweedie 1996): ULA's proposal y, accepted with probability
    ``min(1, p(y) q(x|y) / (p(x) q(y|x)))``, ``log q(y|x) = -|y - x - step score(x)|^2 / (4 step)``.  The law p is
    stationary at any step.

    Args:
        log_density: ``log p`` up to a constant, (N, ...) to (N,).
        score: ``grad log p``, (N, ...) to (N, ...).
        x: where to start (N, ...).
        step: h, in squared units of x; positive.
        num_steps: how often.
        generator: of proposals and acceptances, on the CPU.

    Returns:
        The states (N, ...), and the share of accepted proposals.

    Raises:
        ValueError: for a step that is not positive and finite.
    """
    _check_step(step)
    log_p, slope, accepted = log_density(x), score(x), 0.0
    for _ in range(num_steps):
        y = x + step * slope + math.sqrt(2 * step) * randn_tensor(x.shape, generator, x.device, x.dtype)
        log_p_y, slope_y = log_density(y), score(y)
        forward, backward = (
            (a - b - step * g).flatten(1).square().sum(1) for a, b, g in ((y, x, slope), (x, y, slope_y))
        )
        log_ratio = log_p_y - log_p + (forward - backward) / (4 * step)
        chosen = torch.rand(len(x), generator=generator, dtype=log_p.dtype).to(x.device).log() < log_ratio
        accepted += float(chosen.double().mean())
        each = chosen.reshape(-1, *[1] * (x.ndim - 1))
        x, slope = torch.where(each, y, x), torch.where(each, slope_y, slope)
        log_p = torch.where(chosen, log_p_y, log_p)
    return x, accepted / max(num_steps, 1)


# -- for a reverse process --


class Visit(NamedTuple):
    """One evaluation of a run: the row of the grid, and the row whose state is noised up to it first, if any."""

    row: int
    back_from: int | None = None


def restart_visits(
    noise_levels: Sequence[float] | np.ndarray, interval: tuple[float, float], repeats: int
) -> list[Visit]:
    """The rows of a grid in the order of Restart (Xu et al. 2023, arXiv:2306.14878, algorithm 1): down to the lowest
    level in the interval, ``repeats`` times back to the highest one in it and down again, then on.

    Args:
        noise_levels: ``sigma/alpha`` of the n rows, decreasing.
        interval: (low, high) noise levels.
        repeats: how often, 0 or more.

    Returns:
        The visits, in order.

    Raises:
        ValueError: where the interval holds fewer than two of the levels, or repeats is negative.
    """
    if not (is_whole(repeats) and repeats >= 0):
        raise ValueError(f"Restart repeats an interval 0 or more times, not {repeats!r}.")
    inside = [i for i, s in enumerate(noise_levels) if interval[0] <= s <= interval[1]]
    if len(inside) < 2:
        raise ValueError(
            f"The restart interval {interval} holds {len(inside)} of the noise levels: widen it or take more steps."
        )
    first, last = inside[0], inside[-1]
    down = [Visit(first, last), *(Visit(i) for i in range(first + 1, last))]
    return [*(Visit(i) for i in range(last)), *(down * repeats), *(Visit(i) for i in range(last, len(noise_levels)))]


def planned_visits(scheduler: Any, restart: tuple[float, float, int] | None) -> list[Visit]:
    """The visits that :func:`sample_with_correctors` makes.

    Args:
        scheduler: with ``levels``, its timesteps set.
        restart: (low, high, repeats) of :func:`restart_visits`; None: each row once.

    Returns:
        The visits, in order.

    Raises:
        ValueError: as :func:`restart_visits`.
    """
    if restart is None:
        return [Visit(i) for i in range(len(scheduler.timesteps))]
    if not isinstance(restart, Sequence) or len(restart) != 3 or not all(map(is_real, restart)):
        raise ValueError(f"restart must be (low, high, repeats), not {restart!r}.")
    low, high, repeats = restart
    return restart_visits(np.exp(-scheduler.levels.log_snr[:-1]), (low, high), repeats)


def renoise(x: torch.Tensor, start: Point, end: Point, z: torch.Tensor) -> torch.Tensor:
    """The forward process between two noise levels: ``x' = (alpha'/alpha) x + c z``,
    ``c^2 = sigma'^2 - (alpha' sigma/alpha)^2``.

    Args:
        x: the state (N, ...) at ``start``.
        start: alpha, sigma; alpha positive.
        end: alpha', sigma', noisier.
        z: unit normals (N, ...).

    Returns:
        The state (N, ...) at ``end``.
    """
    shrink = end.alpha / start.alpha
    return shrink * x + math.sqrt(max(end.sigma**2 - (shrink * start.sigma) ** 2, 0.0)) * z


def corrector_step(x: torch.Tensor, eps: torch.Tensor, sigma: float, snr: float, z: torch.Tensor) -> torch.Tensor:
    """One ULA step at a noise level, ``x - 2 snr^2 sigma eps + 2 snr sigma z``: ``h = 2 (snr sigma)^2`` and
    ``score = -eps/sigma`` (Song et al. 2021, arXiv:2011.13456, algorithms 4 and 5).

    Args:
        x: the state (N, ...).
        eps: ``E[eps|x]`` (N, ...).
        sigma: noise level of x.
        snr: size of the step relative to sigma.
        z: unit normals (N, ...).

    Returns:
        The state (N, ...), at the same noise level.
    """
    return x - 2 * snr**2 * sigma * eps + 2 * snr * sigma * z


def sample_with_correctors(
    predict: Callable[[torch.Tensor, int], torch.Tensor],
    scheduler: Any,
    x: torch.Tensor,
    *,
    corrector_steps: int = 0,
    corrector_snr: float = 0.1,
    restart: tuple[float, float, int] | None = None,
    generator: Any = None,
    callback: Callable[[], Any] | None = None,
) -> torch.Tensor:
    """Run a scheduler with Langevin correctors and Restart.

    Args:
        predict: ``predict(x, row)``, the model output (N, ...) for the state x at that row of the grid.
        scheduler: one with ``levels``, ``path`` and ``rewind``, as those of this package, whose timesteps are set.
        x: the state to start from (N, ...).
        corrector_steps: ULA steps at each level but the first and the last one.
        corrector_snr: their size, ``h = 2 (corrector_snr sigma)^2``; in (0, 1), where correctors converge.
        restart: (low, high, repeats) of :func:`restart_visits`; None: each row once.
        generator: of all noise.
        callback: called after each step, as often as there are :func:`planned_visits`.

    Returns:
        The state (N, ...) after the last step, in x's dtype.

    Raises:
        ValueError: as :func:`restart_visits`, and for correctors that do not converge.
    """
    right = is_whole(corrector_steps) and corrector_steps >= 0 and is_real(corrector_snr)
    if not right or (corrector_steps and not 0 < corrector_snr < 1):
        raise ValueError(
            f"Correctors need 0 or more steps and 0 < snr < 1, not {corrector_steps!r} and {corrector_snr!r}."
        )
    points, rows = points_of(scheduler.levels), len(scheduler.timesteps)
    dtype = x.dtype
    for row, back_from in planned_visits(scheduler, restart):
        if back_from is not None:
            z = randn_tensor(x.shape, generator=generator, device=x.device, dtype=dtype)
            x = renoise(x, points[back_from], points[row], z)
            scheduler.rewind(row)
        t = scheduler.timesteps[row]
        x = scheduler.step(predict(x, row), t, x, generator=generator, return_dict=False)[0]
        if corrector_steps and row + 1 < rows:
            x = _corrected(predict, scheduler, x, row + 1, corrector_steps, corrector_snr, generator)
        if callback is not None:
            callback()
    return x


def annealed_langevin(
    predict: Callable[[torch.Tensor, int], torch.Tensor],
    scheduler: Any,
    x: torch.Tensor,
    *,
    steps_per_level: int,
    snr: float = 0.2,
    generator: Any = None,
    callback: Callable[[], Any] | None = None,
) -> torch.Tensor:
    """Annealed Langevin dynamics (NCSN; Song & Ermon 2019, arXiv:1907.05600, algorithm 1): ULA steps at each noise
    level of a grid, no solver between them, and at the end the data prediction in place of the last noise
    (Jolicoeur-Martineau et al. 2020, arXiv:2009.05475, section 3.1).

    From one level to the next ``x/alpha`` stays as it is, so that every path is sampled as its variance exploding image
    (at alpha = 0, where there is none, the noise is scaled to the next level).  The published step, ``alpha_i/2 = eps
    sigma_i^2/(2 sigma_L^2)``, is that of ``snr = sqrt(eps)/(2 sigma_L)``.

    Args:
        predict: ``predict(x, row)``, the model output (N, ...) for the state x at that row of the grid.
        scheduler: one with ``levels`` and ``path``, as those of this package, whose timesteps are set.  Levels whose
            sigma/alpha fall by a constant factor (``grid="log_snr"``) are the published ones.
        x: the state to start from (N, ...), at the first level.
        steps_per_level: ULA steps at each level; with rows levels the run has ``rows * steps_per_level + 1``
            evaluations.
        snr: their size, ``h = 2 (snr sigma)^2``; in (0, 1), where they converge.
        generator: of all noise.
        callback: called after each level.

    Returns:
        The data prediction (N, ...) at the last level, in x's dtype.

    Raises:
        ValueError: for no steps, and for steps that do not converge.
    """
    if not (is_whole(steps_per_level) and steps_per_level >= 1 and is_real(snr) and 0 < snr < 1):
        raise ValueError(
            f"Annealed Langevin needs 1 or more steps and 0 < snr < 1, not {steps_per_level!r} and {snr!r}."
        )
    points, dtype = points_of(scheduler.levels)[:-1], x.dtype
    for row, point in enumerate(points):
        if row:
            before = points[row - 1]
            x = x * (point.alpha / before.alpha if before.alpha else point.sigma / before.sigma)
        x = _corrected(predict, scheduler, x, row, steps_per_level, snr, generator)
        if callback is not None:
            callback()
    k_x, k_m = from_model(scheduler.path, scheduler.config.prediction_type, points[-1].alpha, points[-1].sigma)
    return (k_x * x + k_m * predict(x, len(points) - 1)).to(dtype)


def _corrected(
    predict: Callable[[torch.Tensor, int], torch.Tensor],
    scheduler: Any,
    x: torch.Tensor,
    row: int,
    steps: int,
    snr: float,
    generator: Any,
) -> torch.Tensor:
    """``steps`` corrector steps at a row of the grid, in x's dtype."""
    alpha, sigma, dtype = float(scheduler.levels.alpha[row]), float(scheduler.levels.sigma[row]), x.dtype
    k_x, k_m = from_model(scheduler.path, scheduler.config.prediction_type, alpha, sigma, NOISE)
    for _ in range(steps):
        eps = k_x * x + k_m * predict(x, row)
        z = randn_tensor(x.shape, generator=generator, device=x.device, dtype=dtype)
        x = corrector_step(x, eps, sigma, snr, z).to(dtype)
    return x


def _check_step(step: float) -> None:
    if not (is_real(step) and 0 < step < math.inf):
        raise ValueError(f"The step of Langevin dynamics must be positive, not {step!r}.")
