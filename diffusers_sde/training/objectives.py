"""Denoising as one regression: where in time to train, on what, with which weight.

Knows that every training objective of a diffusion or flow model is ``E_t w(t) E |m_theta(x_t, t) - (A x_0 + B eps)|^2``
with ``x_t = alpha x_0 + sigma eps``: the prediction type chooses (A, B), the time sampling the distribution of t, the
weighting w; none of them changes the minimiser at any t, which is the conditional expectation and hence one and the
same score (Lai et al., arXiv:2510.21890, chapter 6; Fu & Wang, arXiv:2605.22586, section 4).  Arrays of floats on the
host and, in :func:`regression_loss`, tensors; knows nothing of networks, data sets or devices.
"""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import torch
from scipy.special import expit, ndtr, ndtri

from diffusers_sde.paths import Path
from diffusers_sde.prediction import DATA, convert, model_coefficients
from diffusers_sde.training.settings import ErrorMeasure, LossWeighting, TimeSampling

Array = np.ndarray
TIME_SAMPLINGS: tuple[str, ...] = get_args(TimeSampling)
LOSS_WEIGHTINGS: tuple[str, ...] = get_args(LossWeighting)
LOSSES: tuple[str, ...] = get_args(ErrorMeasure)


def check_objective(path: Path, prediction_type: str, loss_weighting: str, loss: str) -> None:
    """Raise ``ValueError``, naming the remedy, for axes that cannot go together.

    Noise (and score) prediction says nothing about x_0 at alpha = 0, where flow matching and zero terminal SNR start;
    a likelihood bound is a quadratic loss over a process whose log-SNR is finite.
    """
    # a flow matching path for noise prediction is cut just below its start, but data are still noised from there
    starts_at_zero_snr = path.family == "flow matching" or float(path.alpha_sigma(path.noisiest)[0]) == 0
    if starts_at_zero_snr and prediction_type in ("epsilon", "score"):
        raise ValueError(
            f"{prediction_type} prediction cannot be sampled from alpha = 0, where this path starts: use "
            "--prediction_type v_prediction, flow_prediction or sample."
        )
    if loss_weighting == "likelihood" and loss != "l2":
        raise ValueError("Likelihood weighting bounds the likelihood for the squared error only: use --loss l2.")
    if loss_weighting == "likelihood" and starts_at_zero_snr and path.alphas_cumprod is not None:
        raise ValueError(
            "Likelihood weighting is infinite at zero terminal SNR: use another --loss_weighting, or betas that are "
            "not rescaled."
        )


def draw_times(
    path: Path, sampling: str, u: Array, *, mean: float = 0.0, std: float = 1.0, mode_scale: float = 1.29
) -> tuple[Array, Array]:
    """Training times and the density of their half log-SNR, from uniform numbers ``u`` in (0, 1), (N,), float64.

    ``uniform`` and ``stratified`` (the caller's u are then stratified): uniform in the path's time, which is the
    integer timesteps of a variance preserving process; ``logit_normal``: ``logit w ~ N(mean, std^2)`` on the unit
    interval of times (Esser et al. 2024, arXiv:2403.03206, eq. 19), ``mode``: ``w = 1 - u - s (cos^2(pi u/2) - 1 + u)``
    (eq. 20); ``lognormal``: ``log(sigma/alpha) ~ N(mean, std^2)`` given that it lies in the training range (Karras et
    al. 2022, arXiv:2206.00364, table 1).  Flow matching times pass through the model's static shift.

    Returns ``(t, p)``: the mean of ``g(log_snr(t))/p`` is the integral of g over the training range, by the trapezoidal
    rule on the integer timesteps of a variance preserving process.

    Raises ``ValueError`` for a ``mean`` and ``std`` of lognormal times that leave nothing in the training range.
    """
    if sampling == "lognormal":
        least, most = (float(path.log_snr(end)) for end in (path.noisiest, path.cleanest))
        z, mass = _truncated_normal(u, (-most - mean) / std, (-least - mean) / std)
        if mass == 0:
            raise ValueError(f"No noise level of this path is near exp({mean:g}): use another --time_mean.")
        t = path.time(np.clip(-(mean + std * z), least, most))
        p = np.exp(-0.5 * z**2) / (mass * std * math.sqrt(2 * math.pi))
        return (t if path.alphas_cumprod is None else np.round(t)), p
    if sampling in ("uniform", "stratified"):
        w, density = u, np.ones_like(u)
    elif sampling == "logit_normal":
        z = ndtri(u)
        w = expit(mean + std * z)
        density = np.exp(-0.5 * z**2) / (std * math.sqrt(2 * math.pi) * w * (1 - w))
    elif sampling == "mode":
        w = 1 - u - mode_scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u)
        density = 1 / np.abs(1 + mode_scale * (1 - np.pi / 2 * np.sin(np.pi * u)))
    else:
        raise ValueError(f"time_sampling {sampling!r} is unknown: use one of {', '.join(TIME_SAMPLINGS)}.")
    t, per_log_snr = path.training_times(w)
    return t, density * per_log_snr


def _truncated_normal(u: Array, low: float, high: float) -> tuple[Array, float]:
    """Quantiles u of a standard normal given that it lies in (low, high), and the probability of that."""
    if low + high > 0:  # probabilities are precise in the lower tail only
        z, mass = _truncated_normal(1 - u, -high, -low)
        return -z, mass
    below, mass = ndtr(low), float(ndtr(high) - ndtr(low))
    return ndtri(below + mass * u), mass


def prediction_targets(path: Path, prediction_type: str, alpha: Array, sigma: Array) -> tuple[Array, Array]:
    """``(A, B)``, each (N,), of the regression target ``A x_0 + B eps`` of this path's network."""
    pairs = [model_coefficients(path, prediction_type, float(a), float(s)) for a, s in zip(alpha, sigma, strict=True)]
    return np.array([a for a, _ in pairs]), np.array([b for _, b in pairs])


def loss_weights(
    weighting: str,
    path: Path,
    prediction_type: str,
    alpha: Array,
    sigma: Array,
    *,
    snr_gamma: float = 5.0,
    log_snr_density: Array | None = None,
) -> Array:
    """Weights (N,) of the squared error of the *prediction*, each from its published weight of the error of x_0.

    An error e of the prediction is an error ``k e`` of x_0, with k from :func:`diffusers_sde.prediction.convert`.  With
    ``SNR = (alpha/sigma)^2`` and the noise level of the equivalent flow ``q = sigma/(alpha + sigma)``, on x_0:

        none          1/k^2, that is 1 on the prediction itself
        min_snr       min(SNR, gamma)               Hang et al. 2023, arXiv:2303.09556; on v min(SNR, gamma)/(SNR + 1)
        soft_min_snr  SNR gamma/(SNR + gamma)       Crowson et al. 2024, arXiv:2401.11605
        edm           SNR + 1/data_scale^2          Karras et al. 2022, arXiv:2206.00364, table 1, with the path's data
                      scale for sigma_data: 1 on the output of an EDM network and on v under variance preserving
        sigma_sqrt    q^-4, that is q^-2 on the flow velocity               Esser et al. 2024, arXiv:2403.03206
        cosmap        2/(pi (1 - 2q + 2q^2)) on the flow velocity           the same, eq. 21
        likelihood    SNR/p(log_snr): the evidence bound whatever the time sampling (Kingma et al. 2021,
                      arXiv:2107.00630, eq. 18), needs ``log_snr_density`` of :func:`draw_times`

    All of them are finite at zero SNR.  Raises ``ValueError`` for an unknown name.
    """
    if weighting == "none":
        return np.ones_like(alpha)
    q = sigma / (alpha + sigma)
    snr = (alpha / sigma) ** 2
    if weighting == "min_snr":
        on_x0 = np.minimum(snr, snr_gamma)
    elif weighting == "soft_min_snr":
        on_x0 = snr * snr_gamma / (snr + snr_gamma)
    elif weighting == "edm":
        on_x0 = snr + path.data_scale**-2.0
    elif weighting == "sigma_sqrt":
        on_x0 = q**-4.0
    elif weighting == "cosmap":
        on_x0 = 2 / (np.pi * (1 - 2 * q + 2 * q**2)) / q**2
    elif weighting == "likelihood":
        if log_snr_density is None:
            raise ValueError("Likelihood weighting needs the density of the drawn log-SNR.")
        on_x0 = snr / log_snr_density
    else:
        raise ValueError(f"loss_weighting {weighting!r} is unknown: use one of {', '.join(LOSS_WEIGHTINGS)}.")
    targets = zip(*prediction_targets(path, prediction_type, alpha, sigma), strict=True)
    k = [convert(pair, DATA, float(a), float(s))[1] for pair, a, s in zip(targets, alpha, sigma, strict=True)]
    return on_x0 * np.square(k)


def regression_loss(
    prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor, loss: str = "l2", huber_c: float = 0.1
) -> torch.Tensor:
    """Per-sample weighted loss (N,), float32: the mean square, or pseudo-Huber ``2 c (sqrt(e^2 + c^2) - c)``, which is
    ``e^2`` for small errors (Song & Dhariwal 2023, arXiv:2310.14189, section 3.3, scaled as in diffusers' examples).

    Huber's minimiser is the conditional mean for symmetric errors only.
    """
    error = prediction.float() - target.float()
    if loss == "l2":
        each = error.square()
    elif loss == "huber":
        each = 2 * huber_c * ((error.square() + huber_c**2).sqrt() - huber_c)
    else:
        raise ValueError(f"loss {loss!r} is unknown: use one of {', '.join(LOSSES)}.")
    return weights * each.flatten(1).mean(1)
