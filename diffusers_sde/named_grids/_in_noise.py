"""Grids in noise levels, in the meaning of :meth:`diffusers_sde.paths.Path.times_of_noise`."""

from __future__ import annotations

import numpy as np
from scipy.special import betaincinv

from diffusers_sde.paths import Path

Array = np.ndarray


def log_snr(path: Path, n: int) -> Array:
    """Equal steps of the log-SNR over the training range (Lu et al. 2022, arXiv:2206.00927; also ``exponential``).

    Args:
        path: the forward process.
        n: evaluations, at least 2.

    Returns:
        (n,) float64, times.
    """
    return times_of_noise(path, ramp_levels(*path.noise_range(), np.linspace(0, 1, n), None))


def karras(path: Path, n: int, rho: float = 7.0) -> Array:
    """``s_i = (s_max^(1/rho) + i/(n-1) (s_min^(1/rho) - s_max^(1/rho)))^rho`` (Karras et al. 2022, eq. 5).

    Args:
        path: the forward process.
        n: evaluations, at least 2.
        rho: exponent.

    Returns:
        (n,) float64, times.
    """
    return times_of_noise(path, ramp_levels(*path.noise_range(), np.linspace(0, 1, n), rho))


def ramp_levels(low: float, high: float, ramp: Array, rho: float | None) -> Array:
    """Noise levels along a ramp, linear in ``s^(1/rho)`` or in log s.

    Args:
        low, high: the ends.
        ramp: (n,) in [0, 1], 0 at ``high``.
        rho: exponent; None: log s.

    Returns:
        (n,) float64.
    """
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
    return times_of_noise(path, low + (high - low) * betaincinv(a, b, 1 - np.linspace(0, 1, n)))


def kl_optimal(path: Path, n: int) -> Array:
    """Equal steps of ``atan s``: the grid of the smallest bound on the Kullback-Leibler divergence for Gaussian data
    (Sabour et al. 2024, arXiv:2404.14507).

    Args:
        path: the forward process.
        n: evaluations, at least 2.

    Returns:
        (n,) float64, times.
    """
    low, high = path.noise_range()
    return times_of_noise(path, np.tan(np.linspace(np.arctan(high), np.arctan(low), n)))


def linear_quadratic(path: Path, n: int) -> Array:
    """``s_max (1 - y_i)``: with ``m = floor(n/2)`` the first m steps cover 2.5 % of the noise, ``y_i = 0.025 i/m``, the
    others follow the parabola with that slope at m that reaches 1 at n (Mochi, Genmo 2024).

    Args:
        path: the forward process.
        n: evaluations, at least 2.

    Returns:
        (n,) float64, times.
    """
    threshold, linear = 0.025, n // 2
    i = np.arange(n)
    beyond, rest, slope = np.maximum(i - linear, 0), n - linear, threshold / linear
    y = slope * i + (1 - threshold - slope * rest) * (beyond / rest) ** 2
    return _times_of_fractions(path, 1 - y)


def bong_tangent(path: Path, n: int) -> Array:
    """Two arcs of ``atan``: over N = n + 2 places x, of which the first k = floor(3N/5) go from ``s_max`` to half of it
    and the others on to 0, each as ``-atan((8/N) (x - k))`` stretched to its ends (RES4LYF; on other processes than
    flow matching too in fractions of the largest noise).

    Args:
        path: the forward process.
        n: evaluations, at least 2.

    Returns:
        (n,) float64, times.
    """
    places = n + 2
    middle = int(0.6 * places)

    def arc(x: Array, first: float, last: float) -> Array:
        y = -np.arctan(8 / places * x)
        return last + (first - last) * (y - y[-1]) / (y[0] - y[-1])

    upper = arc(np.arange(middle) - middle, 1.0, 0.5)[:-1]
    return _times_of_fractions(path, np.append(upper, arc(np.arange(places - middle), 0.5, 0.0)[:-1]))


def _times_of_fractions(path: Path, fractions: Array) -> Array:
    """The times at fractions of the largest noise; of the range of noise where they would leave it."""
    low, high = path.noise_range()
    levels = high * fractions
    return times_of_noise(path, levels if levels[-1] >= low else low + (high - low) * fractions)


# Noise levels of the 10-step schedules of Sabour et al. 2024, arXiv:2404.14507.
AYS_SD = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)
AYS_SVD = (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002)


def ays(path: Path, n: int, published_noise: tuple[float, ...] = AYS_SD) -> Array:
    """Align Your Steps: the noise levels published for Stable Diffusion 1.5, log-linearly interpolated to ``n`` steps
    and mapped onto this path's range of log-SNR (exact for the betas they were optimised on).

    Args:
        path: the forward process.
        n: evaluations.
        published_noise: another model's levels.

    Returns:
        (n,) float64, times.
    """
    published = np.log(published_noise)
    levels = np.interp(np.linspace(0, 1, n + 1)[:-1], np.linspace(0, 1, len(published)), published)
    low, high = np.log(path.noise_range())
    unit = (levels - published[-1]) / (published[0] - published[-1])
    return times_of_noise(path, np.exp(low + (high - low) * unit))


def times_of_noise(path: Path, levels: Array) -> Array:
    """The times at noise levels that begin with the highest.  The ends are exact up to rounding: made exact here.

    Args:
        path: the forward process.
        levels: (n,), see :meth:`diffusers_sde.paths.Path.times_of_noise`.

    Returns:
        (n,) float64, within the training range.
    """
    low, high = sorted((path.cleanest, path.noisiest))
    t = np.clip(path.times_of_noise(levels), low, high)
    t[0] = path.noisiest
    return t
