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
    """Classifier-free guidance, ``null + scale (conditional - null)`` (Ho & Salimans 2022, arXiv:2207.12598).

    Args:
        null: the prediction without a label (N, ...), or a weaker model's, which makes it autoguidance (Karras et al.
            2024, arXiv:2406.02507).
        conditional: the prediction with the label, of the same parameterisation and shape.
        scale: 0 unconditional, 1 conditional, as diffusers counts.

    Returns:
        The guided prediction (N, ...).
    """
    return torch.lerp(null, conditional, scale)


def cfg_plus_plus_scale(strength: float, log_snr: float, next_log_snr: float) -> float:
    """The scale of :func:`classifier_free` with which a step is one of CFG++: ``strength / (1 - exp(-h))``.

    CFG++ (Chung et al. 2024, arXiv:2406.08070, algorithm 2) goes to the guided data prediction but re-noises with the
    unconditional noise: ``alpha' D_guided + sigma' eps_null``.  A DDIM step with scale w moves by ``w (D_y - D_null)``
    times ``alpha' - alpha sigma'/sigma = alpha' (1 - exp(-h))``, CFG++ by strength times alpha'.

    Args:
        strength: of CFG++, in [0, 1].
        log_snr: half log-SNR at the evaluation; may be -inf.
        next_log_snr: after the step, larger by h; may be +inf.

    Returns:
        The scale.
    """
    return strength / -math.expm1(log_snr - next_log_snr)


def interval_scale(scale: float, noise_level: float, interval: tuple[float, float] | None) -> float:
    """Guidance in an interval of noise levels only (Kynkaanniemi et al. 2024, arXiv:2404.07724, eq. 5).

    Args:
        scale: of the guidance.
        noise_level: ``sigma/alpha`` at the evaluation; may be inf.
        interval: (low, high) noise levels; None: everywhere.

    Returns:
        ``scale`` for ``low < noise_level <= high``, 1 (conditional, no guidance) elsewhere.
    """
    return scale if interval is None or interval[0] < noise_level <= interval[1] else 1.0


def rescaled(guided: torch.Tensor, conditional: torch.Tensor, amount: float) -> torch.Tensor:
    """A guided prediction with the standard deviation of the conditional one, ``m -> (1 - amount) m + amount m
    std(m_y)/std(m)`` (Lin et al. 2023, arXiv:2305.08891, eq. 15 and 16).

    Args:
        guided: m (N, ...).
        conditional: m_y, of the same parameterisation and shape.
        amount: in [0, 1].

    Returns:
        The rescaled prediction (N, ...); the standard deviation is that of all values of a sample.
    """
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
    """Adaptive projected guidance, ``D_y + (scale - 1) (d_orthogonal + parallel d_parallel)`` (Sadat et al. 2024,
    arXiv:2410.02416, algorithm 1).

    ``d = D_y - D_null + momentum average``, shortened to ``norm_threshold``, is split along ``D_y`` of each sample; the
    parallel part, which oversaturates, is damped.  parallel = 1 without threshold and momentum is classifier-free
    guidance.

    Args:
        null: the *data prediction* D_null (N, ...).
        conditional: D_y, of the same shape.
        scale: of the guidance; 1 is conditional.
        parallel: what is kept of the parallel part.
        norm_threshold: largest norm of d over all values of a sample.
        momentum: weight of the running average, usually negative.
        average: what the step before returned; None at the first step.

    Returns:
        The guided data prediction (N, ...), and the running average (N, ...) for the next step.
    """
    difference = conditional - null
    if average is not None and momentum:
        difference = difference + momentum * average
    average = difference
    if norm_threshold < math.inf:
        norm = difference.flatten(1).norm(dim=1).reshape(-1, *[1] * (difference.ndim - 1))
        difference = difference * (norm_threshold / norm.clamp(min=1e-12)).clamp(max=1.0)
    unit = torch.nn.functional.normalize(conditional.flatten(1), dim=1)
    along = ((difference.flatten(1) * unit).sum(1, keepdim=True) * unit).reshape(difference.shape)
    return conditional + (scale - 1) * (difference - along + parallel * along), average


def classifier_gradient(
    classifier: Classifier,
    scale_input: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    t: Any,
    labels: torch.Tensor,
) -> torch.Tensor:
    """``grad_x log p_t(y | x)`` of a classifier of noisy samples.

    Args:
        classifier: ``classifier(scale_input(x), t)``, logits (N, classes).
        scale_input: from states to what networks see, differentiable.
        x: the states (N, ...).
        t: the timestep.
        labels: y (N,) int64.

    Returns:
        The gradient (N, ...).

    Raises:
        ValueError: for logits of another shape or labels that the classifier does not have.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = classifier(scale_input(x), t)
        if logits.ndim != 2 or len(logits) != len(x):
            raise ValueError(f"The classifier must return logits ({len(x)}, classes), not {tuple(logits.shape)}.")
        if int(labels.max()) >= logits.shape[1]:
            raise ValueError(f"The classifier knows labels 0 to {logits.shape[1] - 1} only: pass one of these.")
        log_prob = logits.log_softmax(1).gather(1, labels[:, None].to(logits.device)).sum()
        (gradient,) = torch.autograd.grad(log_prob, x)
    return gradient


def data_shift(gradient: torch.Tensor, alpha: float, sigma: float, scale: float = 1.0) -> torch.Tensor:
    """What a guiding gradient adds to the data prediction, ``scale sigma^2/alpha grad log h_t`` (Dhariwal & Nichol
    2021, arXiv:2105.05233, eq. 14, in terms of D).

    Args:
        gradient: ``grad log h_t`` (N, ...).
        alpha: signal level, positive.
        sigma: noise level.
        scale: strength of the guidance.

    Returns:
        The shift of D (N, ...).

    Raises:
        ValueError: at alpha = 0, where x says nothing about x_0.
    """
    if alpha == 0:
        raise ValueError("Classifier guidance cannot start at zero SNR: pass timesteps that start below it.")
    return (scale * sigma**2 / alpha) * gradient
