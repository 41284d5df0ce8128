"""Grids of equal steps, of powers of equal steps or of quantiles of the path's grid clock, which is time (see
:meth:`diffusers_sde.paths.Path.grid_times`)."""

from __future__ import annotations

import numpy as np
from scipy.special import betaincinv

from diffusers_sde.paths import Path

Array = np.ndarray


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
    first = clock_at(path, start)
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
    first, target = clock_at(path, start), (np.arange(n, 0, -1) / n) ** rho
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
    scale, begin = 4 * path.data_scale, path.grid_times(np.array([clock_at(path, start), path.grid_range[1]]), mu)
    first, low = (1 / (1 + scale * np.exp(path.log_snr(t))) for t in (begin[0], path.cleanest))
    u = first * (np.arange(n, 0, -1) / n) ** rho
    if u[-1] < low:
        u = low + (first - low) * (np.arange(n - 1, -1, -1) / (n - 1)) ** rho
    with np.errstate(divide="ignore"):
        times = path.time(np.log1p(-u) - np.log(scale * u))
    times[0] = begin[0]
    return times


def clock_at(path: Path, start: float) -> float:
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


def simple(path: Path, n: int, mu: float | None = None) -> Array:
    """ComfyUI's ``simple``: the training times ``T - 1 - floor(i T/n)``; ``trailing`` where n divides T.

    Args:
        path: the forward process.
        n: evaluations.
        mu: dynamic shift of flow models.

    Returns:
        (n,) float64, times.
    """
    return _of_trained(path, n, _STEPS, mu)


def lcm(path: Path, n: int, mu: float | None = None) -> Array:
    """``n`` of the 50 equal steps that latent consistency models were distilled on (Luo et al. 2023,
    arXiv:2310.04378): ``(50 - floor(50 i/n)) T/50 - 1``, see :func:`distilled`.

    Args:
        path: the forward process.
        n: evaluations.
        mu: dynamic shift of flow models.

    Returns:
        (n,) float64, times.
    """
    return _of_trained(path, n, 50, mu)


_STEPS = 1000  # training times of a path that counts none, as ComfyUI tabulates EDM's


def _of_trained(path: Path, n: int, steps: int, mu: float | None) -> Array:
    """``n`` of ``steps`` equal steps (at most the training times), the noisiest first; of more steps where there are
    fewer than ``n``."""
    high, low, clean = path.grid_range
    if path.num_train_timesteps is None:
        clean = low - (high - low) / (_STEPS - 1)
    whole = min(path.num_train_timesteps or _STEPS, steps)
    taken = np.arange(n) * whole / n
    left = whole - (np.floor(taken) if n <= whole else taken)
    return path.grid_times(clean + (high - clean) * left / whole, mu)


def sgm_uniform(path: Path, n: int, mu: float | None = None) -> Array:
    """``n`` of ``n + 1`` equally spaced times, the last left out: ``t_i = t_max + (t_min - t_max) i/n`` (ComfyUI, after
    Stability's generative models).

    Args:
        path: the forward process.
        n: evaluations.
        mu: dynamic shift of flow models.

    Returns:
        (n,) float64, times.
    """
    high, low, _ = path.grid_range
    return path.grid_times(np.linspace(high, low, n + 1)[:-1], mu)


def beta_timesteps(path: Path, n: int, mu: float | None = None, a: float = 0.6, b: float = 0.6) -> Array:
    """Quantiles ``1 - i/n`` of Beta(a, b) in training time (Lee et al. 2024, arXiv:2407.12173; ComfyUI and A1111, which
    round them to integers); :func:`beta` is diffusers' form, in noise levels.

    Args:
        path: the forward process.
        n: evaluations.
        mu: dynamic shift of flow models.
        a, b: of the Beta law.

    Returns:
        (n,) float64, times.
    """
    high, low, _ = path.grid_range
    return path.grid_times(low + (high - low) * betaincinv(a, b, 1 - np.arange(n) / n), mu)


def beta57(path: Path, n: int, mu: float | None = None) -> Array:
    """:func:`beta_timesteps` of Beta(0.5, 0.7) (RES4LYF).

    Args:
        path: the forward process.
        n: evaluations.
        mu: dynamic shift of flow models.

    Returns:
        (n,) float64, times.
    """
    return beta_timesteps(path, n, mu, 0.5, 0.7)


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
