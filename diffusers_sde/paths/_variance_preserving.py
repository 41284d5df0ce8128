"""The variance preserving process of DDPM, from its betas."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from diffusers_sde.paths._path import Array, Path


class VariancePreserving(Path):
    """``alpha^2 + sigma^2 = 1`` from ``alphas_cumprod = alpha^2`` at integer times ``0 .. T-1``.

    Between integers ``log_snr`` is linear in t (linear in the angle ``atan2(sigma, alpha)`` on an interval with an
    infinite end, as after ``rescale_betas_zero_snr``), so that time and log-SNR are exact inverses of each other.

    Args:
        alphas_cumprod: (T,).

    Raises:
        ValueError: unless ``alphas_cumprod`` strictly decreases within [0, 1].
    """

    family = "variance preserving"
    alphas_cumprod: Array

    def __init__(self, alphas_cumprod: Any):
        abar = np.asarray(alphas_cumprod, np.float64)
        if abar.ndim != 1 or len(abar) < 2 or not np.all(np.diff(abar) < 0) or abar[0] > 1 or abar[-1] < 0:
            raise ValueError("alphas_cumprod must decrease strictly within [0, 1]: use betas in (0, 1).")
        self.alphas_cumprod, self.num_train_timesteps = abar, len(abar)
        self.noisiest, self.cleanest = float(len(abar) - 1), 0.0
        self.grid_range = (self.noisiest, 0.0, -1.0)
        with np.errstate(divide="ignore"):
            self._log_snr = 0.5 * (np.log(abar) - np.log1p(-abar))
        self._angle = np.arctan2(np.sqrt(1 - abar), np.sqrt(abar))
        self._finite = bool(np.all(np.isfinite(self._log_snr)))

    def _cell(self, index: Array) -> tuple[Array, Array]:
        low = np.clip(index, 0, len(self.alphas_cumprod) - 2)
        return low, np.isfinite(self._log_snr[low]) & np.isfinite(self._log_snr[low + 1])

    def _sine_and_cosine(self, t: Array, low: Array) -> tuple[Array, Array]:
        """Of the angle where it is linear in t; the cosine as a sine, which is exactly 0 at alpha = 0."""
        u = t - low
        angle = np.clip(self._angle[low] * (1 - u) + self._angle[low + 1] * u, 0, np.pi / 2)
        return np.sin(angle), np.sin(np.pi / 2 - angle)

    def log_snr(self, t: Any) -> Array:
        t = np.asarray(t, np.float64)
        low, finite = self._cell(np.floor(t).astype(int))
        u = t - low
        if self._finite:
            return self._log_snr[low] * (1 - u) + self._log_snr[low + 1] * u
        sine, cosine = self._sine_and_cosine(t, low)
        with np.errstate(invalid="ignore", divide="ignore"):
            linear = self._log_snr[low] + u * (self._log_snr[low + 1] - self._log_snr[low])
            return np.where(finite, linear, np.log(cosine) - np.log(sine))

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

    def alpha_sigma_on_device(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = t.float()
        low = t.floor().clamp(0, len(self.alphas_cumprod) - 2).long()

        def between(table: Array) -> torch.Tensor:
            values = torch.from_numpy(table).float().to(t.device, non_blocking=True)
            return torch.lerp(values[low], values[low + 1], t - low)

        log_snr = between(self._log_snr)
        alpha, sigma = (-0.5 * F.softplus(-2 * log_snr)).exp(), (-0.5 * F.softplus(2 * log_snr)).exp()
        if self._finite:
            return alpha, sigma
        finite, angle = log_snr.isfinite(), between(self._angle)
        return torch.where(finite, alpha, angle.cos()), torch.where(finite, sigma, angle.sin())

    def d_log_snr(self, t: Any) -> Array:
        t = np.asarray(t, np.float64)
        low, finite = self._cell(np.floor(t).astype(int))
        sine, cosine = self._sine_and_cosine(t, low)
        with np.errstate(invalid="ignore", divide="ignore"):
            linear = self._log_snr[low + 1] - self._log_snr[low]
            return np.where(finite, linear, (self._angle[low] - self._angle[low + 1]) / (sine * cosine))

    def d_log_alpha(self, t: Any) -> Array:
        t = np.asarray(t, np.float64)
        low, finite = self._cell(np.floor(t).astype(int))
        sine, cosine = self._sine_and_cosine(t, low)
        with np.errstate(invalid="ignore", divide="ignore"):
            # alpha^2 = sigmoid(2 lambda), so d log alpha = sigma^2 d lambda
            linear = self.alpha_sigma(t)[1] ** 2 * (self._log_snr[low + 1] - self._log_snr[low])
            return np.where(finite, linear, (self._angle[low] - self._angle[low + 1]) * sine / cosine)

    def noise_range(self) -> tuple[float, float]:
        ends = self._log_snr[[0, -1 if np.isfinite(self._log_snr[-1]) else -2]]  # the last is zero terminal SNR
        low, high = np.exp(-ends)
        return float(low), float(high)

    def training_times(self, fractions: Array) -> tuple[Array, Array]:
        """Integers, every one as often as the others, each for the log-SNRs of the times that are rounded to it."""
        steps = len(self.alphas_cumprod)
        t = np.minimum(np.floor(fractions * steps), self.noisiest)
        low, high = (self.log_snr(np.clip(t + half, 0, self.noisiest)) for half in (0.5, -0.5))
        return t, 1 / (steps * (high - low))
