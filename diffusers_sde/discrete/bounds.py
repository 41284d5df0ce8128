r"""The training bound of a discrete diffusion: score entropy in general, weighted cross entropy under masking.

Knows the rate at which the bound on ``-log p(x_0)`` grows in time (Lou et al. 2023, arXiv:2310.16834, theorem 3.6; Lu,
arXiv:2607.01693, chapter 7), that under masking it is a cross entropy whose weight ``-alpha'/(1 - alpha)`` makes it
independent of the schedule (Shi et al. 2024, arXiv:2406.04329; Sahoo et al. 2024, arXiv:2406.07524), and that it then
is the mean over all orders of autoregression (Ou et al. 2024, arXiv:2406.03736).  Tensors; knows no network.
"""

from __future__ import annotations

from typing import Any

import torch

from diffusers_sde.discrete.processes import DiscreteProcess
from diffusers_sde.discrete.schedules import NoiseSchedule


def bound_density(
    process: DiscreteProcess, x: torch.Tensor, x0: torch.Tensor, clean: torch.Tensor, alpha: float, rate: float
) -> torch.Tensor:
    r"""What time t adds to the bound: ``-log p(x_0) <= \int_0^1 E[density] dt + divergence at t = 1``.

    ``sum_l sum_{y != x^l} beta pi(x^l) (s_y - r_y + r_y log(r_y/s_y))`` with the concrete scores s of the model and
    ``r_y = q(y|x_0^l)/q(x^l|x_0^l)`` of the data.

    Args:
        process: the noise.
        x: states (N, L) at survival ``alpha``.
        x0: the data (N, L).
        clean: the model's ``p(x_0^l | x)`` (N, L, S).
        alpha, rate: survival and forward rate beta at that time.

    Returns:
        (N,), in nats per unit of the time that ``rate`` is measured in.
    """
    truth = torch.nn.functional.one_hot(x0, process.states).double()
    model, data = (process.reverse_rates(x, p, alpha, rate) for p in (clean, truth))
    log_ratio = data.clamp(min=1e-300).log() - model.clamp(min=1e-300).log()
    return (model - data + data * torch.where(data > 0, log_ratio, torch.zeros_like(data))).sum((-1, -2))


def masked_weight(schedule: NoiseSchedule, t: Any) -> Any:
    """``-alpha'/(1 - alpha)``, the weight of the cross entropy summed over the masked positions at time t, with which
    the mean over t in (0, 1) bounds ``-log p(x_0)``."""
    return -schedule.slope(t) / (1 - schedule.alpha(t))


def any_order_loss(logits: torch.Tensor, x0: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """The bound in nats per token, with the number of masks uniform in 1 .. L: the mean cross entropy over them.

    The integral over time in alpha gives every number of masks the same weight, so that ``-log p(x_0) <= L E[mean
    cross entropy]`` with a number n uniform in 1 .. L and the n positions uniform: no weight, and no schedule left (Ou
    et al. 2024, arXiv:2406.03736, theorem 2).

    Args:
        logits: of the clean tokens, (N, L, S).
        x0: the data (N, L).
        masked: which positions were masked (N, L), at least one in each row.

    Returns:
        (N,), float32.
    """
    each = torch.nn.functional.cross_entropy(logits.float().mT, x0, reduction="none")
    return (each * masked).sum(-1) / masked.sum(-1)


def terminal_divergence(process: DiscreteProcess, x0: torch.Tensor, alpha: float) -> torch.Tensor:
    """``KL(q(x_1|x_0) || pi)`` summed over positions, (N,): the part of the bound that a schedule leaves which does not
    end at alpha = 0.  Infinite under masking."""
    law = process.marginal(torch.nn.functional.one_hot(x0, process.states).double(), alpha)
    return (torch.special.xlogy(law, law) - torch.special.xlogy(law, process.stationary.to(law.device))).sum((-1, -2))
