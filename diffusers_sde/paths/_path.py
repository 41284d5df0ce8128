"""What every forward process says of itself: the contract of a path, and the facts most families share."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

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
        """``d log_snr / dt``: from above where t is a kink, infinite where ``log_snr`` is."""
        raise NotImplementedError

    def d_log_alpha(self, t: Any) -> Array:
        """``d log alpha / dt``, the drift coefficient f of the forward SDE; infinite at alpha = 0."""
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

    def training_times(self, fractions: Array) -> tuple[Array, Array]:
        """Times at which to train, and the density of fractions in half log-SNR.

        Args:
            fractions: (N,) in (0, 1), from the cleanest to the noisiest time.

        Returns:
            ``(t, |d fraction / d log_snr|)``, each (N,).
        """
        span = self.noisiest - self.cleanest
        t = self.cleanest + span * fractions
        return t, 1 / np.abs(span * self.d_log_snr(t))
