"""The variance exploding process of EDM, and its network's preconditioning."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from diffusers_sde.paths._path import Array, Path


class VarianceExploding(Path):
    """``alpha = 1``; the network sees ``c_noise``: ``log(sigma)/4`` (EDM) or ``2 atan(sigma)/pi`` (cosine).

    Networks are preconditioned as in EDM (Karras et al. 2022, eq. 7 and table 1): they see ``x / r``,
    ``r = sqrt(sigma_data^2 + sigma^2)``, and return F with ``D = c_skip x + c_out F``, which diffusers calls
    ``epsilon``; its ``v_prediction`` is -F.

    Args:
        sigma_min, sigma_max: the training range.
        sigma_data: the data scale of the preconditioning.
        noise_conditioning: ``log`` or ``atan``.
        preconditioned: False for networks that a pipeline preconditions itself (Cosmos 2): they see x and say the
            velocity dx/dsigma.

    Raises:
        ValueError: for a range or a conditioning that does not exist.
    """

    family = "EDM"

    def __init__(
        self,
        sigma_min: float,
        sigma_max: float,
        sigma_data: float,
        noise_conditioning: str = "log",
        preconditioned: bool = True,
    ):
        if not 0 < sigma_min < sigma_max:
            raise ValueError("A variance exploding path needs 0 < sigma_min < sigma_max.")
        if noise_conditioning not in ("log", "atan"):
            raise ValueError(f"noise_conditioning must be 'log' or 'atan', not {noise_conditioning!r}.")
        self.sigma_data, self.noise_conditioning = float(sigma_data), noise_conditioning
        self.data_scale, self.preconditioned = self.sigma_data, preconditioned
        self.noisiest, self.cleanest = (float(self.time(-math.log(s))) for s in (sigma_max, sigma_min))
        self.grid_range = (self.noisiest, self.cleanest, self.cleanest)

    def log_snr(self, t: Any) -> Array:
        t = np.asarray(t, np.float64)
        if self.noise_conditioning == "log":
            return -4 * t
        with np.errstate(divide="ignore", invalid="ignore"):
            return -np.log(np.tan(t * np.pi / 2))

    def time(self, log_snr: Any) -> Array:
        lam = np.asarray(log_snr, np.float64)
        return -lam / 4 if self.noise_conditioning == "log" else np.arctan(np.exp(-lam)) * 2 / np.pi

    def alpha_sigma_of(self, log_snr: Any) -> tuple[Array, Array]:
        sigma = np.exp(-np.asarray(log_snr, np.float64))
        return np.ones_like(sigma), sigma

    def alpha_sigma_on_device(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = t.float()
        sigma = torch.exp(4 * t) if self.noise_conditioning == "log" else torch.tan(t * (math.pi / 2))
        return torch.ones_like(sigma), sigma

    def d_log_snr(self, t: Any) -> Array:
        t = np.asarray(t, np.float64)
        return np.full_like(t, -4.0) if self.noise_conditioning == "log" else -np.pi / np.sin(np.pi * t)

    def d_log_alpha(self, t: Any) -> Array:
        return np.zeros_like(np.asarray(t, np.float64))

    def is_sigma_ramp(self, sigmas: Array) -> bool:
        return bool(sigmas[0] == 0 and sigmas.max() <= 1)

    def habitual_sigmas(self, n: int) -> Array | None:
        return np.linspace(0, 1, n)

    def input_scale(self, sigma: Any) -> Any:
        return 1 / (sigma**2 + self.sigma_data**2) ** 0.5 if self.preconditioned else 1.0

    @property
    def start_scale(self) -> float:
        return math.hypot(float(self.alpha_sigma(self.noisiest)[1]), self.sigma_data)

    def own_prediction(self, prediction_type: str, sigma: float) -> tuple[float, float] | None:
        """``(sigma / (sigma_data r), -sigma_data / r)`` for F, which diffusers calls ``epsilon``; without
        preconditioning ``(0, 1)`` for the velocity dx/dsigma, which it calls ``flow_prediction``."""
        if not self.preconditioned:
            return (0.0, 1.0) if prediction_type == "flow_prediction" else None
        if prediction_type not in ("epsilon", "v_prediction"):
            return None
        r, sign = math.hypot(self.sigma_data, sigma), 1.0 if prediction_type == "epsilon" else -1.0
        return sign * sigma / (self.sigma_data * r), -sign * self.sigma_data / r
