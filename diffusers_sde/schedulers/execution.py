"""One row of a table on tensors: the mean of the next state, for schedulers and calibration alike.

Knows what a row says and how far a run's own errors let it be followed.  Knows no run, no noise and no config.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusers_sde.extrapolation import trust
from diffusers_sde.schedulers.compiled import CompiledRow


def next_mean(row: CompiledRow, sample: Tensor, evaluation: Tensor, history: Sequence[Tensor]) -> Tensor:
    """:func:`followed` for a row in terms of this model's output.

    Args:
        row: compiled.
        sample: x (N, ...).
        evaluation: E_i (N, ...).
        history: E_{i-1}, E_{i-2}, ... as far as the row reads, (N, ...) each.

    Returns:
        (N, ...), new.
    """
    weights = row.a, row.weights, row.slope, row.gap, row.correction
    return followed(*weights, sample, evaluation, history)


def followed(
    a: float,
    weights: Sequence[float],
    slope: Sequence[float],
    gap: Sequence[float],
    correction: float,
    sample: Tensor,
    evaluation: Tensor,
    history: Sequence[Tensor],
) -> Tensor:
    """``a x + sum_j weights[j] E_{i-j}``, or, for a row with a gap,

        a x + first E_i + trust_slope sum_j slope[j] E_{i-j} + trust_correction correction sum_j gap[j] E_{i-j}

    with the trust of each sample by its own gap (:func:`diffusers_sde.extrapolation.trust`); on the device, without
    synchronisation.

    Args:
        a, weights, slope, gap, correction: of :class:`diffusers_sde.tables.Row`.
        sample, evaluation, history: see :func:`next_mean`; a sample without dimensions beside the first is one.

    Returns:
        (N, ...), new.
    """
    mean = torch.mul(sample, a)
    if not gap:
        return _plus(mean, weights, (evaluation, *history))
    surprise = _plus(torch.add(evaluation, history[0], alpha=gap[1]), gap[2:], history[1:])
    extrapolated = _plus(torch.mul(evaluation, slope[0]), slope[1:], history)
    own = tuple(range(1, sample.ndim)) or 0
    size = torch.linalg.vector_norm(evaluation, dim=own, keepdim=True).add_(torch.finfo(sample.dtype).tiny)
    relative = torch.linalg.vector_norm(surprise, dim=own, keepdim=True).div_(size)
    correcting, extrapolating = trust(relative)
    mean.add_(evaluation, alpha=weights[0] - slope[0] - correction)
    return mean.addcmul_(extrapolated, extrapolating).addcmul_(surprise, correcting, value=correction)


def _plus(total: Tensor, weights: Sequence[float], evaluations: Sequence[Tensor]) -> Tensor:
    """``total``, to which the weighted evaluations have been added; there may be more of them than weights."""
    for weight, evaluation in zip(weights, evaluations, strict=False):
        total.add_(evaluation, alpha=weight)
    return total
