"""One row of a table on tensors: the mean of the next state.

Knows what a row says and how far a run's own errors let it be followed.  Knows no run, no noise and no config.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusers_sde.extrapolation import trust
from diffusers_sde.schedulers.compiled import CompiledRow


def next_mean(row: CompiledRow, sample: Tensor, evaluation: Tensor, history: Sequence[Tensor]) -> Tensor:
    """``a x + sum_j weights[j] E_{i-j}``, or, where the row has a gap,

        a x + first E_i + trust_slope sum_j slope[j] E_{i-j} + trust_correction correction sum_j gap[j] E_{i-j}

    with the trust of each sample by its own gap (:func:`diffusers_sde.extrapolation.trust`); on the device, without
    synchronisation.

    Args:
        row: with weights for this model's output.
        sample: x (N, ...).
        evaluation: E_i (N, ...).
        history: E_{i-1}, E_{i-2}, ... as far as the row reads, (N, ...) each.

    Returns:
        (N, ...), new.
    """
    mean = torch.mul(sample, row.a)
    if not row.gap:
        mean.add_(evaluation, alpha=row.weights[0])
        for weight, old in zip(row.weights[1:], history, strict=False):
            mean.add_(old, alpha=weight)
        return mean
    gap = torch.add(evaluation, history[0], alpha=row.gap[1])
    for weight, old in zip(row.gap[2:], history[1:], strict=False):
        gap.add_(old, alpha=weight)
    slope = torch.mul(evaluation, row.slope[0])
    for weight, old in zip(row.slope[1:], history, strict=False):
        slope.add_(old, alpha=weight)
    relative = _norm(gap) / _norm(evaluation).clamp_(min=torch.finfo(gap.dtype).tiny)
    correcting, extrapolating = (factor.reshape(-1, *[1] * (sample.ndim - 1)) for factor in trust(relative))
    mean.add_(evaluation, alpha=row.weights[0] - row.slope[0] - row.correction)
    return mean.addcmul_(slope, extrapolating).addcmul_(gap, correcting, value=row.correction)


def _norm(x: Tensor) -> Tensor:
    """Of each sample: (N, ...) to (N,)."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)
