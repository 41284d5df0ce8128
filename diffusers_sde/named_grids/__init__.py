"""Named grids: where a sampler evaluates the network.

Knows each of them as a pure function ``(path, n) -> n decreasing-noise times`` (float64, nothing rounded, terminal node
excluded), from its published formula.  Knows nothing of solvers, nor of what becomes of the times
(:mod:`diffusers_sde.grids`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from diffusers_sde.named_grids._in_noise import (
    AYS_SDXL,
    AYS_SVD,
    ays,
    beta,
    bong_tangent,
    karras,
    kl_optimal,
    linear_quadratic,
    log_snr,
    ramp_levels,
    times_of_noise,
)
from diffusers_sde.named_grids._in_time import (
    balanced,
    beta57,
    beta_timesteps,
    clock_at,
    distilled,
    lcm,
    leading,
    linspace,
    noise_fraction,
    power,
    sgm_uniform,
    simple,
    trailing,
)
from diffusers_sde.paths import Path

Array = np.ndarray

__all__ = ["GRIDS", "check_grid", "distilled", "karras", "make_grid", "ramp_levels", "times_of_noise"]

GRIDS: dict[str, Callable[..., Array]] = {
    "balanced": balanced,
    "power": power,
    "noise_fraction": noise_fraction,
    "trailing": trailing,
    "leading": leading,
    "linspace": linspace,
    "log_snr": log_snr,
    "exponential": log_snr,
    "karras": karras,
    "beta": beta,
    "beta_timesteps": beta_timesteps,
    "beta57": beta57,
    "simple": simple,
    "sgm_uniform": sgm_uniform,
    "lcm": lcm,
    "kl_optimal": kl_optimal,
    "linear_quadratic": linear_quadratic,
    "bong_tangent": bong_tangent,
    "ays": ays,
    "ays_sdxl": functools.partial(ays, published_noise=AYS_SDXL),
    "ays_svd": functools.partial(ays, published_noise=AYS_SVD),
}
_OPTIONS = {
    "balanced": ("rho", "mu", "start", "share"),
    "power": ("rho", "mu", "start"),
    "noise_fraction": ("rho", "mu", "start"),
    "trailing": ("mu",),
    "leading": ("mu", "steps_offset"),
    "linspace": ("mu",),
    "karras": ("rho",),
    **dict.fromkeys(("simple", "sgm_uniform", "lcm", "beta_timesteps", "beta57"), ("mu",)),
}


def check_grid(name: str) -> None:
    """Raise ``ValueError`` for a grid that does not exist."""
    if name not in GRIDS:
        raise ValueError(f"grid {name!r} is unknown: use one of {', '.join(GRIDS)}, or pass timesteps= or sigmas=.")


def make_grid(path: Path, name: str, n: int, **options: Any) -> Array:
    """The times of a named grid.

    Args:
        path: the forward process.
        name: a key of ``GRIDS``.
        n: evaluations, at least 1.
        options: of the grid's function; those that it does not have, or that are None, are left out.

    Returns:
        (n,) float64, times.

    Raises:
        ValueError: for an unknown name or ``n < 1``.
    """
    check_grid(name)
    if n < 1:
        raise ValueError(f"num_inference_steps must be at least 1, not {n}.")
    chosen = {k: options[k] for k in _OPTIONS.get(name, ()) if options.get(k) is not None}
    if n == 1:  # the second node keeps a shift that stretches grids to their end from moving the first
        ends = np.array([clock_at(path, chosen.get("start", 1.0)), path.grid_range[1]])
        return path.grid_times(ends, options.get("mu"))[:1]
    return GRIDS[name](path, n, **chosen)
