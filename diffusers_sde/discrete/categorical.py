"""Draws of tokens, and the shaping of their laws by temperature, nucleus and rank.

Knows how to draw from a law over a large vocabulary without lowering its temperature: with Gumbel noise in float32 (and
by any sum in float32) rare tokens never win, since the noise is bounded by 16.6, so that samples are less diverse than
the model (Zheng et al. 2024, arXiv:2409.02908, section 4).  Here one float64 number a position is looked up in the
float64 distribution function.  Knows no process and no order.
"""

from __future__ import annotations

import math

import torch


def sample_categorical(probabilities: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """A draw from each law.

    Args:
        probabilities: (..., S), non-negative, of any sums above 0.
        generator: of one number a draw, on its own device.

    Returns:
        States (...), int64.
    """
    shape = probabilities.shape[:-1]
    device = probabilities.device if generator is None else generator.device
    u = torch.rand(shape, dtype=torch.float64, device=_with_float64(device), generator=generator)
    return quantile(probabilities, u.to(_with_float64(probabilities.device))).to(probabilities.device)


def quantile(probabilities: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The state at which the distribution function passes u.

    Args:
        probabilities: (..., S), of any sums above 0.
        u: (...) in [0, 1), float64.

    Returns:
        States (...), int64, of positive probability.
    """
    cumulative = probabilities.to(u.device).double().cumsum(-1)
    total = cumulative[..., -1:]
    found = torch.searchsorted(cumulative, u[..., None] * total, right=True)
    last = (cumulative < total).sum(-1, keepdim=True)  # where rounding would go past the last possible state
    return torch.minimum(found, last)[..., 0]


def _with_float64(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "mps" else device


def shape_logits(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """The law that tokens are drawn from.

    Args:
        logits: (..., S).
        temperature: of the softmax; 0: the likeliest token.
        top_k: keep so many of the likeliest tokens; None: all.
        top_p: keep the likeliest tokens until they have this probability together (nucleus); None: all.

    Returns:
        Probabilities (..., S), float64 where the device has it.

    Raises:
        ValueError: for values out of range.
    """
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature must be a number of at least 0, not {temperature!r}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], not {top_p!r}: None keeps every token.")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k must be positive, not {top_k!r}: None keeps every token.")
    logits = logits.float() if logits.device.type == "mps" else logits.double()
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).to(logits.dtype)
    probabilities = (logits / temperature).softmax(-1)
    if top_k and top_k < logits.shape[-1]:
        least = probabilities.topk(top_k, dim=-1).values[..., -1:]
        probabilities = probabilities * (probabilities >= least)
    if top_p is not None and top_p < 1:
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        ordered, index = probabilities.sort(dim=-1, descending=True)
        kept = ordered.cumsum(-1) - ordered < top_p
        probabilities = probabilities * torch.zeros_like(kept).scatter(-1, index, kept)
    return probabilities / probabilities.sum(-1, keepdim=True)


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """``-sum p log p`` in nats, (...), of laws (..., S)."""
    return torch.special.entr(probabilities).sum(-1)
