"""Forward processes ``x_t = alpha(t) x_0 + sigma(t) eps``: variance preserving, variance exploding, flow matching.

Knows ``alpha``, ``sigma`` and the half log-SNR ``log_snr = log(alpha / sigma)`` as functions of the time ``t`` that
the network sees, and their derivatives.  Everything is float64 on the host.  Knows nothing of configs, grids, solvers,
tensors or networks.

Sources: Kingma et al. 2021 (arXiv:2107.00630) for the log-SNR; Fu & Wang (arXiv:2605.22586), setup; Lipman et al. 2022
(arXiv:2210.02747) for flow matching; Karras et al. 2022 (arXiv:2206.00364) for variance exploding / EDM.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = np.ndarray


class Path:
    """One Gaussian forward process.

    A subclass says what ``log_snr(t)``, its inverse ``time(log_snr)`` and ``alpha_sigma(log_snr)`` are; ``t`` is the
    number handed to the network.  ``noisiest`` and ``cleanest`` are the times that bound its training range.
    """

    noisiest: float
    cleanest: float

    def log_snr(self, t: Any) -> Array:
        """Half log-SNR ``log(alpha/sigma)`` at times ``t`` (float64; -inf at alpha = 0, +inf at sigma = 0)."""
        raise NotImplementedError

    def time(self, log_snr: Any) -> Array:
        """The time with this half log-SNR: the exact inverse of :meth:`log_snr`."""
        raise NotImplementedError

    def alpha_sigma_of(self, log_snr: Any) -> tuple[Array, Array]:
        """``(alpha, sigma)`` at half log-SNR ``log_snr``; exact limits at plus and minus infinity."""
        raise NotImplementedError

    def alpha_sigma(self, t: Any) -> tuple[Array, Array]:
        """``(alpha, sigma)`` at times ``t``."""
        return self.alpha_sigma_of(self.log_snr(t))

    def d_log_snr(self, t: Any) -> Array:
        """``d log_snr / dt``."""
        raise NotImplementedError

    def d_log_alpha(self, t: Any) -> Array:
        """``d log alpha / dt``, the drift coefficient f of the forward SDE."""
        raise NotImplementedError

    # The number that diffusers calls "sigma" for this family, and back.
    def sigma_label(self, alpha: Any, sigma: Any) -> Array:
        """What ``scheduler.sigmas`` shows: ``sigma/alpha`` (VP, VE), ``sigma`` (flow matching)."""
        with np.errstate(divide="ignore"):
            return np.divide(np.asarray(sigma, float), np.asarray(alpha, float))

    def log_snr_of_label(self, label: Any) -> Array:
        """The half log-SNR of a value of ``scheduler.sigmas``."""
        with np.errstate(divide="ignore"):
            return -np.log(np.asarray(label, float))


class VariancePreserving(Path):
    """``alpha^2 + sigma^2 = 1`` from ``alphas_cumprod = alpha^2`` at integer times ``0 .. T-1``.

    Between integers ``log_snr`` is linear in t (linear in the angle ``atan2(sigma, alpha)`` on an interval with an
    infinite end, as after ``rescale_betas_zero_snr``), so that time and log-SNR are exact inverses of each other.

    Raises ``ValueError`` unless ``alphas_cumprod`` strictly decreases within [0, 1].
    """

    def __init__(self, alphas_cumprod: Any):
        abar = np.asarray(alphas_cumprod, np.float64)
        if abar.ndim != 1 or len(abar) < 2 or not np.all(np.diff(abar) < 0) or abar[0] > 1 or abar[-1] < 0:
            raise ValueError("alphas_cumprod must decrease strictly within [0, 1]: use betas in (0, 1).")
        self.alphas_cumprod = abar
        self.noisiest, self.cleanest = float(len(abar) - 1), 0.0
        with np.errstate(divide="ignore"):
            self._log_snr = 0.5 * (np.log(abar) - np.log1p(-abar))
        self._angle = np.arctan2(np.sqrt(1 - abar), np.sqrt(abar))
        self._finite = bool(np.all(np.isfinite(self._log_snr)))

    def _cell(self, index: Array) -> tuple[Array, Array]:
        low = np.clip(index, 0, len(self.alphas_cumprod) - 2)
        return low, np.isfinite(self._log_snr[low]) & np.isfinite(self._log_snr[low + 1])

    def log_snr(self, t: Any) -> Array:
        t = np.asarray(t, np.float64)
        low, finite = self._cell(np.floor(t).astype(int))
        u = t - low
        if self._finite:
            return self._log_snr[low] * (1 - u) + self._log_snr[low + 1] * u
        angle = self._angle[low] * (1 - u) + self._angle[low + 1] * u
        with np.errstate(invalid="ignore", divide="ignore"):
            linear = self._log_snr[low] + u * (self._log_snr[low + 1] - self._log_snr[low])
            # cos(pi/2) is 6e-17 in floating point; at zero SNR the exact limit is wanted
            curved = np.where(angle >= np.pi / 2, -np.inf, -np.log(np.tan(np.clip(angle, 0, np.pi / 2))))
        return np.where(finite, linear, curved)

    def time(self, log_snr: Any) -> Array:
        lam = np.asarray(log_snr, np.float64)
        low, finite = self._cell(len(self._log_snr) - 1 - np.searchsorted(self._log_snr[::-1], lam, side="left"))
        with np.errstate(invalid="ignore", over="ignore"):
            linear = (lam - self._log_snr[low]) / (self._log_snr[low + 1] - self._log_snr[low])
            curved = (np.arctan(np.exp(-lam)) - self._angle[low]) / (self._angle[low + 1] - self._angle[low])
        return low + np.where(finite, linear, curved)

    def alpha_sigma_of(self, log_snr: Any) -> tuple[Array, Array]:
        lam = np.asarray(log_snr, np.float64)
        return np.exp(-0.5 * np.logaddexp(0, -2 * lam)), np.exp(-0.5 * np.logaddexp(0, 2 * lam))

    def d_log_snr(self, t: Any) -> Array:
        low, _ = self._cell(np.floor(np.asarray(t, np.float64)).astype(int))
        return self._log_snr[low + 1] - self._log_snr[low]

    def d_log_alpha(self, t: Any) -> Array:
        # alpha^2 = sigmoid(2 lambda), so d log alpha = sigma^2 d lambda
        return self.alpha_sigma(t)[1] ** 2 * self.d_log_snr(t)


class VarianceExploding(Path):
    """``alpha = 1``; the network sees ``c_noise``: ``log(sigma)/4`` (EDM) or ``2 atan(sigma)/pi`` (cosine).

    ``sigma_data`` is the data scale of EDM's preconditioning, ``(sigma_min, sigma_max)`` the training range.
    """

    def __init__(self, sigma_min: float, sigma_max: float, sigma_data: float, noise_conditioning: str = "log"):
        if not 0 < sigma_min < sigma_max:
            raise ValueError("A variance exploding path needs 0 < sigma_min < sigma_max.")
        if noise_conditioning not in ("log", "atan"):
            raise ValueError(f"noise_conditioning must be 'log' or 'atan', not {noise_conditioning!r}.")
        self.sigma_data, self.noise_conditioning = float(sigma_data), noise_conditioning
        self.noisiest, self.cleanest = (float(self.time(-math.log(s))) for s in (sigma_max, sigma_min))

    def log_snr(self, t: Any) -> Array:
        t = np.asarray(t, np.float64)
        if self.noise_conditioning == "log":
            return -4 * t
        with np.errstate(divide="ignore"):
            return -np.log(np.tan(t * np.pi / 2))

    def time(self, log_snr: Any) -> Array:
        lam = np.asarray(log_snr, np.float64)
        return -lam / 4 if self.noise_conditioning == "log" else np.arctan(np.exp(-lam)) * 2 / np.pi

    def alpha_sigma_of(self, log_snr: Any) -> tuple[Array, Array]:
        sigma = np.exp(-np.asarray(log_snr, np.float64))
        return np.ones_like(sigma), sigma

    def d_log_snr(self, t: Any) -> Array:
        t = np.asarray(t, np.float64)
        return np.full_like(t, -4.0) if self.noise_conditioning == "log" else -np.pi / np.sin(np.pi * t)

    def d_log_alpha(self, t: Any) -> Array:
        return np.zeros_like(np.asarray(t, np.float64))


class FlowMatching(Path):
    """``alpha = 1 - sigma``, ``t = T sigma``; with ``inverted`` the network sees ``T (1 - sigma)`` (Mochi).

    :meth:`shift` is the time warp of a grid in [0, 1] that diffusers applies before sampling: static
    ``s u / (1 + (s-1) u)`` or dynamic ``e^mu / (e^mu + (1/u - 1))`` (Esser et al. 2024, arXiv:2403.03206, eq. 23),
    then stretched to end at ``shift_terminal``.
    """

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        inverted: bool = False,
    ):
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type must be 'exponential' or 'linear', not {time_shift_type!r}.")
        if not shift > 0:
            raise ValueError(f"shift must be positive, not {shift}.")
        self.scale, self.static_shift, self.inverted = float(num_train_timesteps), float(shift), inverted
        self.use_dynamic_shifting, self.time_shift_type = use_dynamic_shifting, time_shift_type
        self.shift_terminal = shift_terminal
        self.noisiest, self.cleanest = (float(self._time_of_sigma(s)) for s in (1.0, 1 / num_train_timesteps))

    def _time_of_sigma(self, sigma: Any) -> Array:
        return self.scale * (1 - sigma if self.inverted else sigma)

    def _sigma(self, t: Any) -> Array:
        u = np.asarray(t, np.float64) / self.scale
        return 1 - u if self.inverted else u

    def log_snr(self, t: Any) -> Array:
        sigma = self._sigma(t)
        with np.errstate(divide="ignore"):
            return np.log1p(-sigma) - np.log(sigma)

    def time(self, log_snr: Any) -> Array:
        return self._time_of_sigma(self.alpha_sigma_of(log_snr)[1])

    def alpha_sigma_of(self, log_snr: Any) -> tuple[Array, Array]:
        lam = np.asarray(log_snr, np.float64)
        return np.exp(-np.logaddexp(0, -lam)), np.exp(-np.logaddexp(0, lam))

    def d_log_snr(self, t: Any) -> Array:
        sigma = self._sigma(t)
        return (1 if self.inverted else -1) / (sigma * (1 - sigma)) / self.scale

    def d_log_alpha(self, t: Any) -> Array:
        return (1 if self.inverted else -1) / (1 - self._sigma(t)) / self.scale

    def sigma_label(self, alpha: Any, sigma: Any) -> Array:
        return np.asarray(alpha if self.inverted else sigma, np.float64)

    def log_snr_of_label(self, label: Any) -> Array:
        return self.log_snr(np.asarray(label, np.float64) * self.scale)

    def shift(self, u: Any, mu: float | None = None) -> Array:
        """Warp grid values ``u`` in [0, 1] to sigmas; ``mu`` is used, and required, with dynamic shifting only."""
        u = np.asarray(u, np.float64)
        if self.use_dynamic_shifting:
            if mu is None:
                raise ValueError("This model shifts its timesteps by resolution: pass `mu` to set_timesteps.")
            factor = math.exp(mu) if self.time_shift_type == "exponential" else mu
        else:
            factor = self.static_shift
        sigma = factor * u / (1 + (factor - 1) * u)
        if self.shift_terminal and len(sigma) and sigma[-1] < 1:
            sigma = 1 - (1 - sigma) * (1 - self.shift_terminal) / (1 - sigma[-1])
        return sigma
