r"""Guidance: how predictions are combined to sample a sharper or a conditional law.

Knows formulas on predictions, in any linear parameterisation unless it says data prediction ``D = E[x_0 | x_t]``, and
their strengths as functions of the noise level.  Knows no network call, scheduler or pipeline.

A score of the form ``grad log p_t(x) + grad log h_t(x)`` moves the data prediction by ``sigma^2/alpha grad log h_t``.
With ``h_t = p_t(y | x)`` the result is the conditional law exactly (Fu & Wang, arXiv:2605.22586, section 6).  With
``h_t = p_t(y | x)^w``, as classifier-free guidance has it, it is *not* the tilted law ``p(x) p(y | x)^w`` unless w = 1:
``p_t(y | x)^w`` is not what the noising process makes of ``p(y | x_0)^w`` (Lu, arXiv:2607.01693, section 8).
:mod:`diffusers_sde.methods.control` samples that one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

Classifier = Callable[[torch.Tensor, Any], torch.Tensor]


def classifier_free(null: torch.Tensor, conditional: torch.Tensor, scale: float) -> torch.Tensor:
    """``null + scale (conditional - null)`` (Ho & Salimans 2022, arXiv:2207.12598): 0 unconditional, 1 conditional, as
    diffusers counts.  With a weaker model's prediction for ``null`` it is autoguidance (Karras et al. 2024,
    arXiv:2406.02507)."""
    return torch.lerp(null, conditional, scale)


def cfg_plus_plus_scale(strength: float, log_snr: float, next_log_snr: float) -> float:
    """The scale of :func:`classifier_free` with which a step is CFG++ of ``strength`` in [0, 1]:
    ``strength / (1 - exp(-h))``, h the step of half log-SNR.

    CFG++ (Chung et al. 2024, arXiv:2406.08070, algorithm 2) goes to the guided data prediction but re-noises with the
    unconditional noise: ``alpha' D_guided + sigma' eps_null``.  A DDIM step with scale w moves by ``w (D_y - D_null)``
    times ``alpha' - alpha sigma'/sigma = alpha' (1 - exp(-h))``, CFG++ by strength times alpha'.
    """
    return strength / -math.expm1(log_snr - next_log_snr)


def interval_scale(scale: float, noise_level: float, interval: tuple[float, float] | None) -> float:
    """``scale`` where the noise level ``sigma/alpha`` lies in the interval, 1 (conditional, no guidance) elsewhere
    (Kynkaanniemi et al. 2024, arXiv:2404.07724, eq. 5)."""
    return scale if interval is None or interval[0] < noise_level <= interval[1] else 1.0


def rescaled(guided: torch.Tensor, conditional: torch.Tensor, amount: float) -> torch.Tensor:
    """``guided`` with the standard deviation of ``conditional``, each sample over all its values, blended by ``amount``
    in [0, 1] (Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16)."""
    axes = tuple(range(1, guided.ndim))
    ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
    return torch.lerp(guided, guided * ratio, amount)


def adaptive_projection(
    null: torch.Tensor,
    conditional: torch.Tensor,
    scale: float,
    *,
    parallel: float = 0.0,
    norm_threshold: float = math.inf,
    momentum: float = 0.0,
    average: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adaptive projected guidance on *data predictions* (Sadat et al. 2024, arXiv:2410.02416, algorithm 1):
    ``D_y + (scale - 1) (d_orthogonal + parallel d_parallel)``, and the running average that the next step passes in.

    ``d = D_y - D_null + momentum average``, shortened to ``norm_threshold``, is split along ``D_y`` of each sample; the
    parallel part, which oversaturates, is damped.  parallel = 1 without threshold and momentum is classifier-free
    guidance.
    """
    d = conditional - null
    if average is not None and momentum:
        d = d + momentum * average
    kept = d
    flat = (len(d), *[1] * (d.ndim - 1))
    if norm_threshold < math.inf:
        norm = d.flatten(1).norm(dim=1).reshape(flat)
        d = d * (norm_threshold / norm.clamp(min=1e-12)).clamp(max=1.0)
    unit = torch.nn.functional.normalize(conditional.flatten(1), dim=1)
    along = ((d.flatten(1) * unit).sum(1, keepdim=True) * unit).reshape(d.shape)
    return conditional + (scale - 1) * (d - along + parallel * along), kept


def classifier_gradient(
    classifier: Classifier,
    scaled: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    t: Any,
    labels: torch.Tensor,
) -> torch.Tensor:
    """``grad_x log p_t(y | x)`` of ``classifier(scaled(x), t) -> logits`` (N, classes), ``scaled`` the network's input
    scaling.  Raises ``ValueError`` for logits of another shape or labels that the classifier does not have."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = classifier(scaled(x), t)
        if logits.ndim != 2 or len(logits) != len(x):
            raise ValueError(f"The classifier must return logits ({len(x)}, classes), not {tuple(logits.shape)}.")
        if int(labels.max()) >= logits.shape[1]:
            raise ValueError(f"The classifier knows labels 0 to {logits.shape[1] - 1} only: pass one of these.")
        log_prob = logits.log_softmax(1).gather(1, labels[:, None].to(logits.device)).sum()
        (gradient,) = torch.autograd.grad(log_prob, x)
    return gradient


def data_shift(gradient: torch.Tensor, alpha: float, sigma: float, scale: float = 1.0) -> torch.Tensor:
    """What ``scale grad log h_t`` adds to the data prediction: ``scale sigma^2/alpha`` times it (Dhariwal & Nichol
    2021, arXiv:2105.05233, eq. 14, in terms of D).  Raises ``ValueError`` at alpha = 0: x says nothing about x_0."""
    if alpha == 0:
        raise ValueError("Classifier guidance cannot start at zero SNR: pass timesteps that start below it.")
    return (scale * sigma**2 / alpha) * gradient
