"""Nodes of a run: the noise levels between which it steps.

Knows how the times of a named grid (:mod:`diffusers_sde.named_grids`) and a user's ``timesteps=`` or ``sigmas=`` become
:class:`Nodes` (float64).  Knows nothing of solvers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffusers_sde.named_grids import ramp_levels, times_of_noise
from diffusers_sde.paths import Path

Array = np.ndarray


@dataclass(frozen=True)
class Nodes:
    """Points of a path: ``n`` evaluations and the terminal node; float64 arrays of length n + 1.

    ``time`` is what the network sees; at the terminal node it is never evaluated and may be any number.
    """

    time: Array
    alpha: Array
    sigma: Array

    @property
    def log_snr(self) -> Array:
        """Half log-SNR; -inf where alpha = 0, +inf where sigma = 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.alpha) - np.log(self.sigma)

    def __len__(self) -> int:
        return len(self.time)

    def __getitem__(self, index: slice) -> Nodes:
        return Nodes(self.time[index], self.alpha[index], self.sigma[index])


def distinct_integers(times: Array) -> Array:
    """Decreasing times rounded, without repetitions (a repeated timestep would be an empty step): each the nearest
    integer, or else the next one below, or above where there is no room below.

    Raises ``ValueError`` where there are too few integers.
    """
    n = len(times)
    rounded = np.round(times)
    for i in range(1, n):
        rounded[i] = min(rounded[i], rounded[i - 1] - 1)
    if rounded[0] < n - 1:
        raise ValueError("round_timesteps leaves too few distinct timesteps: ask for fewer steps.")
    return np.maximum(rounded, np.arange(n - 1, -1, -1))


def check_final(final: str) -> None:
    """Raise ``ValueError`` for a ``final_sigmas_type`` that does not exist."""
    if final not in ("zero", "sigma_min"):
        raise ValueError(f"final_sigmas_type must be 'zero' or 'sigma_min', not {final!r}.")


def nodes_from_times(path: Path, times: Any, final: str = "zero") -> Nodes:
    """Evaluation times plus the terminal node.

    Args:
        path: the forward process.
        times: (n,), of decreasing noise.
        final: where the last step ends: ``zero`` (sigma = 0) or ``sigma_min`` (the cleanest training time).

    Returns:
        n + 1 nodes.

    Raises:
        ValueError: for another ``final``.
    """
    times = np.asarray(times, np.float64)
    check_final(final)
    end = path.cleanest
    alpha, sigma = path.alpha_sigma(np.append(times, end))
    if final == "zero":
        alpha[-1], sigma[-1] = 1.0, 0.0
    return Nodes(np.append(times, end), alpha, sigma)


def nodes_from_user(
    path: Path,
    timesteps: Sequence[float] | None,
    sigmas: Sequence[float] | None,
    *,
    mu: float | None = None,
    final: str = "zero",
    ramp_rho: float | None = 7.0,
) -> Nodes:
    """Nodes of a user's ``timesteps`` and/or ``sigmas``, in the meaning that diffusers' pipelines give them.

    Args:
        path: the forward process.
        timesteps: what the network sees, (n,) or None.
        sigmas: (n,) or None: ``sigma/alpha`` for variance preserving and exploding paths; unshifted sigmas for flow
            matching (the shift is applied here, once); a ramp that rises from 0 to 1 for EDM.  A terminal 0 is
            recognised and not evaluated.  With both, the network sees ``timesteps`` and the state has ``sigmas``.
        mu: dynamic shift of flow models.
        final: see :func:`nodes_from_times`.
        ramp_rho: exponent of the Karras law along which a ramp runs; None: along the log of sigma.

    Returns:
        n + 1 nodes.

    Raises:
        ValueError: for lists that are empty, of unequal length, not finite, or not of decreasing noise.
    """
    levels = times = np.zeros(0)  # times at the states' levels, times that the network sees
    if timesteps is not None:
        levels = times = _as_list(timesteps, "timesteps")
        low, high = sorted((path.cleanest, path.noisiest))
        slack = 1e-3 + (path.num_train_timesteps is not None)  # some lists count timesteps from 1
        if times.min() < low - slack or times.max() > high + slack:
            raise ValueError(f"timesteps must lie in the training range, {low:g} to {high:g}.")
    if sigmas is not None:
        labels = _as_list(sigmas, "sigmas")
        if len(labels) > 1 and labels[-1] == 0 and np.all(np.diff(labels) <= 0):
            labels = labels[:-1]
        if path.is_sigma_ramp(labels):
            levels = times_of_noise(path, ramp_levels(*path.noise_range(), labels, ramp_rho))
        else:
            levels = path.times_of_sigmas(labels, mu)
        if timesteps is not None and len(times) != len(levels):
            raise ValueError(f"{len(times)} timesteps but {len(levels)} sigmas: pass as many of one as of the other.")
    # a level that does not exist has no finite time or no log-SNR, clean data cannot be evaluated
    log_snr = path.log_snr(levels) if np.all(np.isfinite(levels)) else np.full(len(levels), np.nan)
    nodes = nodes_from_times(path, levels, final) if np.all(log_snr < np.inf) else None
    if nodes is None or not np.all(nodes.log_snr[1:] >= nodes.log_snr[:-1]):
        raise ValueError("timesteps and sigmas must be noise levels of this model, from high to low.")
    return nodes if timesteps is None else replace(nodes, time=np.append(times, nodes.time[-1]))


def _as_list(values: Any, name: str) -> Array:
    array = np.asarray(values.cpu() if hasattr(values, "cpu") else values, np.float64)
    if array.ndim != 1 or len(array) == 0 or not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be a non-empty list of finite numbers.")
    return array
