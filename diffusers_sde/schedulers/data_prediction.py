"""Limits on the data prediction ``E[x_0|x_t]`` and learned-variance outputs.  Tensors in, tensors out."""

from __future__ import annotations

from typing import Any

import torch


def limited(x0: torch.Tensor, config: Any) -> torch.Tensor:
    """Clip to ``+-clip_sample_range``, or dynamic thresholding: divide by ``s = quantile(|x0|,
    dynamic_thresholding_ratio)``, at least 1 and at most ``sample_max_value``, after clipping to it (Saharia et al.
    2022, arXiv:2205.11487, section 2.3)."""
    if config.thresholding:
        flat = x0.flatten(1).abs().float()
        s = torch.quantile(flat, config.dynamic_thresholding_ratio, dim=1)
        s = s.clamp(1.0, max(config.sample_max_value, 1.0)).to(x0.dtype).reshape(-1, *[1] * (x0.ndim - 1))
        return x0.clamp(-s, s) / s
    return x0.clamp(-config.clip_sample_range, config.clip_sample_range)


def split_variance(model_output: torch.Tensor, sample: torch.Tensor, variance_type: str) -> torch.Tensor:
    """The mean half of an output with twice the sample's channels (learned variance); raises ``ValueError`` for
    outputs of any other shape."""
    doubled = model_output.ndim == sample.ndim and model_output.shape[1] == 2 * sample.shape[1]
    if doubled and variance_type in ("learned", "learned_range"):
        return model_output.chunk(2, dim=1)[0]
    raise ValueError(
        f"The model output has shape {tuple(model_output.shape)}, the sample {tuple(sample.shape)}: they must agree"
        + (" (for learned variances set variance_type='learned_range')." if doubled else ".")
    )
