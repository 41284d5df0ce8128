"""Forward processes ``x_t = alpha(t) x_0 + sigma(t) eps``: variance preserving, variance exploding, flow matching.

Knows ``alpha``, ``sigma`` and the half log-SNR ``log_snr = log(alpha / sigma)`` as functions of the time ``t`` that
the network sees, their derivatives, and everything else that is a fact of a family of processes: its network's input
scale and parameterisation, its start, its range of noise, the clock its grids take equal steps of, what its pipelines
call sigma.  A new family is one subclass of :class:`Path`.  Everything is float64 on the host but
:meth:`Path.alpha_sigma_on_device`.  Knows nothing of configs, solvers or networks.

Sources: Kingma et al. 2021 (arXiv:2107.00630) for the log-SNR; Fu & Wang (arXiv:2605.22586), setup; Lipman et al. 2022
(arXiv:2210.02747) for flow matching; Karras et al. 2022 (arXiv:2206.00364) for variance exploding / EDM.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Array = np.ndarray


class Path:
    """One Gaussian forward process, and the facts of its family.

    A subclass must say what :meth:`log_snr`, its inverse :meth:`time`, :meth:`alpha_sigma_of` and the two derivatives
    are, and the attributes without a default; the other facts have one.  ``t`` is always the number that the network
    is handed.

    Attributes:
        family: the name of the kind of process: ``variance preserving``, ``flow matching`` or ``EDM``.
        noisiest, cleanest: the times that bound the training range.
        num_train_timesteps: T, where times are counted in T equal steps; None where they are not.
        alphas_cumprod: ``alpha^2`` at the integer times 0 .. T-1 (T,), where networks are trained at these; else None.
        time_is_noise: whether equal steps of the grid clock are steps of noise that need no balancing with log-SNR.
        default_clock: the clock of multistep tables that is finite on the whole range, see
            :mod:`diffusers_sde.weights`.
        data_scale: the standard deviation of the data that networks of this family are made for.
        grid_range: ``(high, low, clean)``, the values of the grid clock at the noisiest and the cleanest training time
            and at clean data, see :meth:`grid_times`; ``clean = low`` where the range ends at its cleanest time.
    """

    family: str
    noisiest: float
    cleanest: float
    num_train_timesteps: int | None = None
    alphas_cumprod: Array | None = None
    time_is_noise = False
    default_clock = "log_snr"
    data_scale = 1.0
    grid_range: tuple[float, float, float]

    # -- the process --

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

    def alpha_sigma_on_device(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`alpha_sigma` for times that live on an accelerator, without bringing them to the host.

        Args:
            t: times of any shape, on any device.

        Returns:
            ``(alpha, sigma)``, float32 tensors of t's shape on t's device, equal to the host's up to rounding.
        """
        raise NotImplementedError

    def d_log_snr(self, t: Any) -> Array:
        """``d log_snr / dt``."""
        raise NotImplementedError

    def d_log_alpha(self, t: Any) -> Array:
        """``d log alpha / dt``, the drift coefficient f of the forward SDE."""
        raise NotImplementedError

    # -- what diffusers calls "sigma" for this family, and back --

    def sigma_label(self, alpha: Any, sigma: Any) -> Array:
        """What ``scheduler.sigmas`` shows: ``sigma/alpha`` (VP, VE), ``sigma`` (flow matching)."""
        with np.errstate(divide="ignore"):
            return np.divide(np.asarray(sigma, float), np.asarray(alpha, float))

    def log_snr_of_label(self, label: Any) -> Array:
        """The half log-SNR of a value of ``scheduler.sigmas``; nan where no noise level has this label."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return -np.log(np.asarray(label, float))

    def times_of_sigmas(self, sigmas: Array, mu: float | None = None) -> Array:
        """The times that pipelines mean by ``set_timesteps(sigmas=...)``: labels, for flow matching before the shift.

        Args:
            sigmas: (n,), from high to low noise.
            mu: the dynamic shift of flow models.

        Returns:
            (n,) float64; nan where no noise level has this label.
        """
        return self.time(self.log_snr_of_label(sigmas))

    def is_sigma_ramp(self, sigmas: Array) -> bool:
        """Whether ``sigmas`` are a ramp from 0 to 1 along the range of noise and not labels (EDM pipelines)."""
        return False

    def habitual_sigmas(self, n: int) -> Array | None:
        """The (n,) sigmas that pipelines pass whatever the user wants; None where they pass none."""
        return None

    # -- the network --

    def input_scale(self, sigma: Any) -> Any:
        """What the state is multiplied by before the network sees it: 1, EDM ``1/sqrt(sigma^2 + sigma_data^2)``;
        sigma a float, an array or a tensor."""
        return 1.0

    @property
    def start_scale(self) -> float:
        """Standard deviation of the state of pure noise (``init_noise_sigma``): 1, or EDM's at ``sigma_max``."""
        return 1.0

    def own_prediction(self, prediction_type: str, sigma: float) -> tuple[float, float] | None:
        """``(A, B)`` of the output ``A x_0 + B eps`` of this family's networks where ``prediction_type`` means
        something of its own there; None where it means what it says, see :mod:`diffusers_sde.prediction`."""
        return None

    # -- grids --

    def grid_times(self, clock: Array, mu: float | None = None) -> Array:
        """The times at values of the grid clock, in which named grids take equal steps.

        Args:
            clock: (n,), from ``grid_range[0]`` (pure noise) down: the time itself; flow models' unshifted sigma.
            mu: the dynamic shift of flow models.

        Returns:
            (n,) float64.

        Raises:
            ValueError: where the model needs ``mu`` and it is None.
        """
        return np.asarray(clock, np.float64)

    def noise_range(self) -> tuple[float, float]:
        """Smallest and largest finite noise level of the training range, in the meaning of :meth:`times_of_noise`."""
        low, high = np.exp(-self.log_snr(np.array([self.cleanest, self.noisiest])))
        return float(low), float(high)

    def times_of_noise(self, levels: Array) -> Array:
        """The times at noise levels: ``sigma/alpha`` (VP, VE), ``sigma`` (flow matching), unshifted."""
        return self.time(-np.log(levels))

    # -- training --

    def training_times(self, fractions: Array) -> tuple[Array, float | Array]:
        """Times at which to train, and the density of fractions in time.

        Args:
            fractions: (N,) in (0, 1), from the cleanest to the noisiest time.

        Returns:
            ``(t, |d fraction / dt|)``, each (N,) or a number.
        """
        span = self.noisiest - self.cleanest
        return self.cleanest + span * fractions, 1 / abs(span)


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
        low, _ = self._cell(np.floor(np.asarray(t, np.float64)).astype(int))
        return self._log_snr[low + 1] - self._log_snr[low]

    def d_log_alpha(self, t: Any) -> Array:
        # alpha^2 = sigmoid(2 lambda), so d log alpha = sigma^2 d lambda
        return self.alpha_sigma(t)[1] ** 2 * self.d_log_snr(t)

    def noise_range(self) -> tuple[float, float]:
        ends = self._log_snr[[0, -1 if np.isfinite(self._log_snr[-1]) else -2]]  # the last is zero terminal SNR
        low, high = np.exp(-ends)
        return float(low), float(high)

    def training_times(self, fractions: Array) -> tuple[Array, float | Array]:
        """Integers, every one as often as the others."""
        t = np.floor(fractions * (self.noisiest + 1))
        return np.minimum(t, self.noisiest), 1 / self.noisiest


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

    def training_times(self, fractions: Array) -> tuple[Array, float | Array]:
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
