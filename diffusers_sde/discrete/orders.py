"""Which masked positions to fill in next.

Knows the orders and how many positions a step may take together.  One position at a time is exact for every order that
looks at the laws and not at what was drawn from them, however cleverly (the chain rule holds for each order); the
popular order of confidence looks at what was drawn, prefers likely tokens, and samples another law.  Tensors (N, L);
knows no process and no network.
"""

from __future__ import annotations

import torch

from diffusers_sde.discrete.categorical import entropy

#: random: uniform, as the process itself; max_probability, margin (Kim et al. 2025, arXiv:2502.06768), entropy: the
#: surest law first; confidence: the surest draw first (LLaDA, Nie et al. 2025, arXiv:2502.09992); stride: far apart;
#: left_to_right: autoregression.
ORDERS = ("random", "max_probability", "margin", "entropy", "confidence", "stride", "left_to_right")


def priorities(
    order: str, probabilities: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator | None = None
) -> torch.Tensor:
    """How early each position is to be filled in, the largest first.

    Args:
        order: one of :data:`ORDERS`.
        probabilities: the laws of the clean tokens (N, L, S).
        tokens: draws from them (N, L).
        generator: of the random order, on its own device.

    Returns:
        (N, L), float64 where the device has it.

    Raises:
        ValueError: for an unknown order.
    """
    shape, device = tokens.shape, tokens.device
    if order == "random":
        where = device if generator is None else generator.device
        return torch.rand(shape, device=where, generator=generator).to(device)
    if order == "max_probability":
        return probabilities.amax(-1)
    if order == "margin":
        first, second = probabilities.topk(2, dim=-1).values.unbind(-1)
        return first - second
    if order == "entropy":
        return -entropy(probabilities)
    if order == "confidence":
        return probabilities.gather(-1, tokens[..., None])[..., 0]
    if order == "stride":
        return -stride_ranks(shape[1]).to(device).expand(shape).double()
    if order == "left_to_right":
        return -torch.arange(shape[1], device=device).expand(shape).double()
    raise ValueError(f"order {order!r} is unknown: use one of {', '.join(ORDERS)}.")


def stride_ranks(length: int) -> torch.Tensor:
    """When each position comes, (L,), if neighbours are kept apart: positions in the order of their bits reversed
    (van der Corput), so that every 2^k-th one comes before those between."""
    bits = max(length - 1, 1).bit_length()
    reversed_bits = torch.tensor([int(f"{i:0{bits}b}"[::-1], 2) for i in range(length)])
    return reversed_bits.argsort().argsort()


def first_of(priority: torch.Tensor, masked: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """The ``count`` (N,) masked positions of highest priority in each row, as a mask (N, L)."""
    ranks = priority.double().masked_fill(~masked, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    return masked & (ranks < count[:, None])


def unmasked_count(masked: torch.Tensor, alpha_t: float, alpha_s: float) -> torch.Tensor:
    """How many of a row's masks a step from survival alpha_t to alpha_s removes: what the process does on average, a
    share ``(alpha_s - alpha_t)/(1 - alpha_t)``, rounded; all of them at alpha_s = 1.

    Args:
        masked: (N, L).

    Returns:
        (N,), int64.
    """
    number = masked.sum(-1)
    return number - (number * ((1 - alpha_s) / (1 - alpha_t))).round().long()


def entropy_bounded(probabilities: torch.Tensor, masked: torch.Tensor, bound: float) -> torch.Tensor:
    """The surest masked positions that may be filled in together, (N, L): as many as keep the sum of their entropies
    without the largest one, which bounds what independent draws lose (their joint divergence), within ``bound`` nats;
    at least one (Ben-Hamu et al. 2025, arXiv:2505.24857, equation 8)."""
    ordered, index = entropy(probabilities).masked_fill(~masked, torch.inf).sort(-1)
    finite = torch.where(ordered.isfinite(), ordered, torch.zeros_like(ordered))
    taken = (finite.cumsum(-1) - finite <= bound) & ordered.isfinite()
    return torch.zeros_like(masked).scatter(-1, index, taken)
