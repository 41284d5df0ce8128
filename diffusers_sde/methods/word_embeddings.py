"""Words out of Gaussian noise on their embeddings: what a sampler is told, and what its result says.

Knows a network of embeddings (``network(sample, timestep, last)`` with ``sample``; ``embeddings``) as the denoiser of
any sampler.  Knows no scheduler and no training.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from diffusers_sde.discrete.embeddings import clamped, rounded


def embedding_denoiser(
    network: Any, *, self_conditioning: bool = True, clamping: bool = False
) -> Callable[[torch.Tensor, Any], torch.Tensor]:
    """The denoiser of one run of a sampler.

    Args:
        network: of embeddings.
        self_conditioning: tell the network its last prediction (Chen et al. 2022, arXiv:2208.04202).
        clamping: predict the nearest word's embedding itself (Li et al. 2022, arXiv:2205.14217, section 4.3).

    Returns:
        ``denoiser(sample, timestep)``, the data prediction; it remembers the last one, so make one for each run.
    """
    last: torch.Tensor | None = None

    def denoiser(sample: torch.Tensor, timestep: Any) -> torch.Tensor:
        nonlocal last
        prediction = network(sample, timestep, last).sample
        last = prediction if self_conditioning else None
        if not clamping:
            return prediction
        return clamped(prediction[:, 0], network.embeddings)[:, None].to(prediction)

    return denoiser


def words_of(sample: torch.Tensor, network: Any) -> torch.Tensor:
    """The words (N, L) of a sampler's result (N, 1, L, d)."""
    return rounded(sample[:, 0], network.embeddings)
