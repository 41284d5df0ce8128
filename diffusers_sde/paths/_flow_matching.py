"""Flow matching on straight lines, and the shifts of its time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from diffusers_sde.paths._path import Array, Path


class FlowMatching(Path):
    """``alpha = 1 - sigma``, ``t = T sigma``; with ``inverted`` the network sees ``T (1 - sigma)`` and returns
    ``x_0 - eps`` (Mochi).

    Args:
        num_train_timesteps: T.
        shift: the static shift of :meth:`shift`.
        use_dynamic_shifting: shift by the ``mu`` of a run instead.
        time_shift_type: how mu shifts, ``exponential`` or ``linear``.
        shift_terminal: where shifted grids end.
        inverted: time and labels run against the noise.
        sigma_range: smallest and largest sigma of the training range; None: 1/T to 1.  No grid goes beyond the largest.
        ramps_in_ratio: whether ramps of noise (karras, exponential, beta) are ramps of ``sigma/alpha``, as for EDM, and
            not of sigma.

    Raises:
        ValueError: for a ``shift``, ``time_shift_type`` or ``sigma_range`` that does not exist.
    """

    family = "flow matching"
    time_is_noise = True
    default_clock = "angle"

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        inverted: bool = False,
        sigma_range: tuple[float, float] | None = None,
        ramps_in_ratio: bool = False,
    ):
        if time_shift_type not in ("exponential", "linear"):
            raise ValueError(f"time_shift_type must be 'exponential' or 'linear', not {time_shift_type!r}.")
        if not shift > 0:
            raise ValueError(f"shift must be positive, not {shift}.")
        self.num_train_timesteps, self.scale = int(num_train_timesteps), float(num_train_timesteps)
        self.static_shift, self.inverted = float(shift), inverted
        self.use_dynamic_shifting, self.time_shift_type = use_dynamic_shifting, time_shift_type
        self.shift_terminal = shift_terminal
        self.sigma_range = (1 / self.scale, 1.0) if sigma_range is None else sigma_range
        if not 0 < self.sigma_range[0] < self.sigma_range[1] <= 1:
            raise ValueError(f"A flow matching path has sigmas between 0 and 1, not {sigma_range}.")
        self.ramps_in_ratio = ramps_in_ratio
        self.cleanest, self.noisiest = (float(self._times_of_sigma(s)) for s in self.sigma_range)
        self.grid_range = (1.0, 1 / self.scale, 0.0)

    def _times_of_sigma(self, sigma: Any) -> Array:
        return self.scale * (1 - sigma if self.inverted else sigma)

    def _sigma(self, t: Any) -> Array:
        u = np.asarray(t, np.float64) / self.scale
        return 1 - u if self.inverted else u

    def log_snr(self, t: Any) -> Array:
        sigma = self._sigma(t)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.log1p(-sigma) - np.log(sigma)

    def time(self, log_snr: Any) -> Array:
        return self._times_of_sigma(self.alpha_sigma_of(log_snr)[1])

    def alpha_sigma_of(self, log_snr: Any) -> tuple[Array, Array]:
        lam = np.asarray(log_snr, np.float64)
        return np.exp(-np.logaddexp(0, -lam)), np.exp(-np.logaddexp(0, lam))

    def alpha_sigma_on_device(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sigma = t.float() / self.scale
        return (sigma, 1 - sigma) if self.inverted else (1 - sigma, sigma)

    def d_log_snr(self, t: Any) -> Array:
        sigma = self._sigma(t)
        with np.errstate(divide="ignore"):
            return (1 if self.inverted else -1) / (sigma * (1 - sigma)) / self.scale

    def d_log_alpha(self, t: Any) -> Array:
        with np.errstate(divide="ignore"):
            return (1 if self.inverted else -1) / (1 - self._sigma(t)) / self.scale

    def sigma_label(self, alpha: Any, sigma: Any) -> Array:
        return np.asarray(alpha if self.inverted else sigma, np.float64)

    def log_snr_of_label(self, label: Any) -> Array:
        return self.log_snr(np.asarray(label, np.float64) * self.scale)

    def times_of_sigmas(self, sigmas: Array, mu: float | None = None) -> Array:
        if np.allclose(sigmas, self.habitual_sigmas(len(sigmas)), atol=1e-6):  # nobody asked for its first value
            return self.grid_times(sigmas, mu)
        return self._times_of_sigma(self.shift(sigmas, mu))

    def habitual_sigmas(self, n: int) -> Array:
        return np.linspace(1, 1 / max(n, 1), n)

    def own_prediction(self, prediction_type: str, sigma: float) -> tuple[float, float] | None:
        return (1.0, -1.0) if self.inverted and prediction_type == "flow_prediction" else None

    def grid_times(self, clock: Array, mu: float | None = None) -> Array:
        return self._times_of_sigma(np.minimum(self.shift(clock, mu), self.sigma_range[1]))

    def noise_range(self) -> tuple[float, float]:
        low, high = self.sigma_range
        return (low / (1 - low), high / (1 - high)) if self.ramps_in_ratio else (low, high)

    def times_of_noise(self, levels: Any) -> Array:
        return self._times_of_sigma(levels / (1 + levels) if self.ramps_in_ratio else levels)

    def training_times(self, fractions: Array) -> tuple[Array, Array]:
        """Through the static shift, as in Esser et al. 2024; a dynamic one is a fact of a run, not of the training."""
        if self.use_dynamic_shifting:
            return super().training_times(fractions)
        s = self.static_shift
        times, density = super().training_times(s * fractions / (1 + (s - 1) * fractions))
        return times, density * (1 + (s - 1) * fractions) ** 2 / s

    def shift(self, u: Any, mu: float | None = None) -> Array:
        """The time warp that diffusers applies to a grid before sampling: static ``s u / (1 + (s-1) u)`` or dynamic
        ``e^mu / (e^mu + (1/u - 1))`` (Esser et al. 2024, arXiv:2403.03206, eq. 23), then stretched to end at
        ``shift_terminal``.

        Args:
            u: (n,), unshifted sigmas in [0, 1].
            mu: used, and required, with dynamic shifting only.

        Returns:
            (n,) float64, sigmas.

        Raises:
            ValueError: where ``mu`` is missing.
        """
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
