"""One row of a table on tensors: its evaluation and the mean of the next state, for all that execute rows.

Knows what a row says, which x_0 it may follow and how far a run's own errors let it be followed.  Knows no run and no
noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_sde.extrapolation import trust
from diffusers_sde.prediction import split_variance
from diffusers_sde.schedulers.compiled import CompiledRow
from diffusers_sde.schedulers.data_prediction import limited

HALF = (torch.float16, torch.bfloat16)


def for_arithmetic(model_output: Tensor, sample: Tensor, variance_type: str) -> tuple[Tensor, Tensor]:
    """Model output and state as rows take them: a learned variance is split off, half precision is float32, and the
    output has the state's dtype."""
    if model_output.shape != sample.shape:
        model_output = split_variance(model_output, sample, variance_type)
    if sample.dtype in HALF:
        sample = sample.float()
    if model_output.dtype != sample.dtype:
        model_output = model_output.to(sample.dtype)
    return model_output, sample


def evaluate_row(
    row: CompiledRow, model_output: Tensor, sample: Tensor, limits: Any = None, x0: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """``E = m + kappa x``, the row's evaluation up to a factor that the weights carry.

    Args:
        row: compiled.
        model_output, sample: m and x (N, ...), see :func:`for_arithmetic`.
        limits: the config by which x_0 is clipped or thresholded; None: it is not.
        x0: the x_0 to follow; None: what the network says.  A limited or given one takes the place of that, so that the
            whole step follows it.

    Returns:
        E, and the limited or given x_0, None where there is none.
    """
    if x0 is None and limits is not None:
        x0 = limited(torch.mul(model_output, row.d_m).add_(sample, alpha=row.d_x), limits)
    if x0 is not None:  # the model output that says this x_0
        x0 = x0.to(sample.dtype)
        model_output = torch.sub(x0, sample, alpha=row.d_x).div_(row.d_m)
    return torch.add(model_output, sample, alpha=row.kappa), x0


def data_prediction(row: CompiledRow, sample: Tensor, evaluation: Tensor) -> Tensor:
    """``E[x_0|x]`` that an evaluation says at its state, (N, ...) each."""
    x0 = torch.mul(evaluation, row.d_m)
    return x0.add_(sample, alpha=row.d_rest) if row.d_rest else x0


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
