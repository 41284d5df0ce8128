"""Limits on the data prediction ``E[x_0|x_t]``.  Tensors in, tensors out."""

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
