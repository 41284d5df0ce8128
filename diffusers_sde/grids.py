"""Time grids: where a sampler evaluates the network.

Knows each named grid as a pure function ``(path, n) -> n decreasing-noise times`` (float64, nothing rounded, terminal
node excluded) and how user ``timesteps=`` or ``sigmas=`` become :class:`Nodes`.  Knows nothing of solvers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import betaincinv

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


# -- named grids --
#
# Each takes equal steps, or a power of equal steps, of the path's grid clock (see Path.grid_times) or of its noise.


def power(path: Path, n: int, rho: float = 1.0, mu: float | None = None, start: float = 1.0) -> Array:
    """Trailing power grid ``t_i = T ((n-i)/n)^rho - 1``: starts at pure noise, its last step ends at clean data.

    rho = 1 is diffusers' ``trailing``; rho > 1 puts steps near the data.  When that would pass t = 0 the grid ends
    there instead, ``t_i = (T-1) ((n-1-i)/(n-1))^rho``.  Flow matching: ``u_i = ((n-i)/n)^rho``, then its shift.
    Variance exploding: ``t_i = t_min + (t_max - t_min) ((n-1-i)/(n-1))^rho`` in the network's time.

    Args:
        path: the forward process.
        n: evaluations, at least 2.
        rho: exponent.
        mu: dynamic shift of flow models.
        start: the fraction of equal steps of time at which the grid begins, 1 at pure noise (``strength`` in image to
            image): ``t_i = T start ((n-i)/n)^rho - 1``, and so on.

    Returns:
        (n,) float64, times.
    """
    _, low, clean = path.grid_range
    first = _clock_at(path, start)
    clock = clean + (first - clean) * (np.arange(n, 0, -1) / n) ** rho
    if clean == low or clock[-1] < low:
        clock = low + (first - low) * (np.arange(n - 1, -1, -1) / (n - 1)) ** rho
    return path.grid_times(clock, mu)


def balanced(
    path: Path, n: int, rho: float = 1.0, mu: float | None = None, start: float = 1.0, share: float = 0.5
) -> Array:
    """Trailing power grid in a mean of time and log-SNR: ``G(t_i) = ((n-i)/n)^rho`` with

        G(t) = share (t - t_min)/(t_max - t_min) + (1 - share) (lambda_max - lambda(t))/(lambda_max - lambda_min)

    over the training range.  Equal steps of time starve low noise, equal steps of log-SNR the middle, where pictures
    take shape; with few steps, and under guidance, the middle needs more of them.  For flow matching time is noise: G
    is the unshifted time.

    Args:
        path: the forward process.
        n: evaluations, at least 2.
        rho: exponent.
        mu: dynamic shift of flow models.
        start: as in :func:`power`, the fraction of equal steps of *time*; from there ``G(t_i) = G(t_0) ((n-i)/n)^rho``.
        share: of time in the mean, 0 to 1.

    Returns:
        (n,) float64, times.
    """
    first, target = _clock_at(path, start), (np.arange(n, 0, -1) / n) ** rho
    if path.time_is_noise:
        return path.grid_times(first * target, mu)
    low, high = np.log(path.noise_range())
    span = path.noisiest - path.cleanest
    times = np.linspace(path.cleanest, path.noisiest, max(round(span) + 1, 1000))  # the integers where T = 1000
    level = np.clip(-path.log_snr(times), low, high)
    g = share * (times - path.cleanest) / span + (1 - share) * (level - low) / (high - low)
    t = np.interp(target * np.interp(first, times, g / g[-1]), g, times)
    t[0] = first
    return t


def noise_fraction(path: Path, n: int, rho: float = 1.0, mu: float | None = None, start: float = 1.0) -> Array:
    """Trailing power grid in the fraction of noise: ``u_i = u_0 ((n-i)/n)^rho`` with ``u = s/(s + 4 data_scale)``, s =
    sigma/alpha: for networks of any noise range the grid that flow matching models use, shifted by 4 data scales.

    When that would pass the lowest noise the grid ends there instead, as :func:`power` does.

    Args:
        path: the forward process.
        n: evaluations, at least 2.
        rho: exponent.
        mu: dynamic shift of flow models, of the first time.
        start: as in :func:`power`, the fraction of equal steps of *time* at which the grid begins.

    Returns:
        (n,) float64, times.
    """
    scale, begin = 4 * path.data_scale, path.grid_times(np.array([_clock_at(path, start), path.grid_range[1]]), mu)
    first, low = (1 / (1 + scale * np.exp(path.log_snr(t))) for t in (begin[0], path.cleanest))
    u = first * (np.arange(n, 0, -1) / n) ** rho
    if u[-1] < low:
        u = low + (first - low) * (np.arange(n - 1, -1, -1) / (n - 1)) ** rho
    with np.errstate(divide="ignore"):
        times = path.time(np.log1p(-u) - np.log(scale * u))
    times[0] = begin[0]
    return times


def _clock_at(path: Path, start: float) -> float:
    """The grid clock at a fraction of equal steps of time: ``T start - 1``, ``start`` for flow matching."""
    if not 0 < start <= 1:
        raise ValueError(f"start must lie in (0, 1], the fraction of equal steps of time to begin at, not {start}.")
    high, low, clean = path.grid_range
    return high if start == 1 else max(clean + (high - clean) * start, low)


def trailing(path: Path, n: int, mu: float | None = None) -> Array:
    """``t_i = T (n-i)/n - 1`` (Lin et al. 2023, arXiv:2305.08891, table 2).

    Args:
        path: the forward process.
        n: evaluations.
        mu: dynamic shift of flow models.

    Returns:
        (n,) float64, times.
    """
    return power(path, n, 1.0, mu)


def linspace(path: Path, n: int, mu: float | None = None) -> Array:
    """``n`` equally spaced times, both ends of the training range included.

    Args:
        path: the forward process.
        n: evaluations.
        mu: dynamic shift of flow models.

    Returns:
        (n,) float64, times.
    """
    high, low, _ = path.grid_range
    return path.grid_times(np.linspace(high, low, n), mu)


def leading(path: Path, n: int, mu: float | None = None, steps_offset: int = 0) -> Array:
    """diffusers' ``leading``: ``t_i = (n-1-i) floor(T/n) + steps_offset``; it never sees the highest noise.

    Args:
        path: the forward process.
        n: evaluations.
        mu: dynamic shift of flow models.
        steps_offset: added to each.

    Returns:
        (n,) float64, times.
    """
    total, (high, _, clean) = path.num_train_timesteps, path.grid_range
    if total is None:
        return linspace(path, n, mu)
    steps = np.arange(n - 1, -1, -1) * max(total // n, 1) + 1 + steps_offset  # of T, counted from clean data
    return path.grid_times(np.minimum(clean + steps * (high - clean) / total, high), mu)


def log_snr(path: Path, n: int) -> Array:
    """Equal steps of the log-SNR over the training range (Lu et al. 2022, arXiv:2206.00927; also ``exponential``).

    Args:
        path: the forward process.
        n: evaluations, at least 2.

    Returns:
        (n,) float64, times.
    """
    return _times_of_noise(path, _ramp_levels(*path.noise_range(), np.linspace(0, 1, n), None))


def karras(path: Path, n: int, rho: float = 7.0) -> Array:
    """``s_i = (s_max^(1/rho) + i/(n-1) (s_min^(1/rho) - s_max^(1/rho)))^rho`` (Karras et al. 2022, eq. 5).

    Args:
        path: the forward process.
        n: evaluations, at least 2.
        rho: exponent.

    Returns:
        (n,) float64, times.
    """
    return _times_of_noise(path, _ramp_levels(*path.noise_range(), np.linspace(0, 1, n), rho))


def _ramp_levels(low: float, high: float, ramp: Array, rho: float | None) -> Array:
    """Noise levels from ``high`` to ``low`` along a ramp in [0, 1], linear in ``s^(1/rho)`` or, for None, in log s."""
    if rho is None:
        return np.exp(np.log(high) + ramp * (np.log(low) - np.log(high)))
    return (high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho


def beta(path: Path, n: int, a: float = 0.6, b: float = 0.6) -> Array:
    """Quantiles of Beta(0.6, 0.6) between the smallest and the largest noise level (Lee et al., arXiv:2407.12173).

    Args:
        path: the forward process.
        n: evaluations, at least 2.
        a, b: of the Beta law.

    Returns:
        (n,) float64, times.
    """
    low, high = path.noise_range()
    return _times_of_noise(path, low + (high - low) * betaincinv(a, b, 1 - np.linspace(0, 1, n)))


# Noise levels of the 10-step schedule for Stable Diffusion 1.5 (Sabour et al. 2024, arXiv:2404.14507).
_AYS_NOISE = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)


def ays(path: Path, n: int) -> Array:
    """Align Your Steps: the published noise levels, log-linearly interpolated to ``n`` steps and mapped onto this
    path's range of log-SNR (exact for the betas they were optimised on).

    Args:
        path: the forward process.
        n: evaluations.

    Returns:
        (n,) float64, times.
    """
    published = np.log(_AYS_NOISE)
    levels = np.interp(np.linspace(0, 1, n + 1)[:-1], np.linspace(0, 1, len(published)), published)
    low, high = np.log(path.noise_range())
    unit = (levels - published[-1]) / (published[0] - published[-1])
    return _times_of_noise(path, np.exp(low + (high - low) * unit))


def distilled(path: Path, n: int, original: int, strength: float = 1.0) -> Array:
    """``n`` of the ``original`` equal steps ``t_j = j floor(T/original) - 1`` that a distilled network was trained on,
    the noisiest first, among those below the fraction ``strength`` of time (Luo et al. 2023, arXiv:2310.04378, section
    4.3; diffusers' LCMScheduler).

    Args:
        path: the forward process.
        n: evaluations.
        original: equal steps of the training.
        strength: fraction of equal steps of time to begin at, in (0, 1].

    Returns:
        (n,) float64, times.

    Raises:
        ValueError: where there are fewer than ``n``.
    """
    trained = int(original * strength)
    if path.num_train_timesteps is None or original > path.num_train_timesteps or trained < n:
        raise ValueError(
            f"{n} steps cannot be chosen among the {trained} of original_inference_steps={original} below strength "
            f"{strength:g}: ask for fewer steps."
        )
    chosen = np.floor(np.linspace(0, trained, n, endpoint=False))
    return (trained - chosen) * (path.num_train_timesteps // original) - 1


def _times_of_noise(path: Path, levels: Array) -> Array:
    """The times at noise levels that begin with the highest; the ends are exact up to rounding: made exact here."""
    low, high = sorted((path.cleanest, path.noisiest))
    t = np.clip(path.times_of_noise(levels), low, high)
    t[0] = path.noisiest
    return t


# -- from a config or a user's list to nodes --

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
    "ays": ays,
}
_OPTIONS = {
    "balanced": ("rho", "mu", "start", "share"),
    "power": ("rho", "mu", "start"),
    "noise_fraction": ("rho", "mu", "start"),
    "trailing": ("mu",),
    "leading": ("mu", "steps_offset"),
    "linspace": ("mu",),
    "karras": ("rho",),
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
        ends = np.array([_clock_at(path, chosen.get("start", 1.0)), path.grid_range[1]])
        return path.grid_times(ends, options.get("mu"))[:1]
    return GRIDS[name](path, n, **chosen)


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
            levels = _times_of_noise(path, _ramp_levels(*path.noise_range(), labels, ramp_rho))
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
