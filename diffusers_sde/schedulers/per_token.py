"""Flow matching where every token has a noise level of its own (LTX conditioning).  Tensors in, tensors out."""

from __future__ import annotations

import torch

from diffusers_sde.paths import FlowMatching, Path


def per_token_step(
    path: Path, grid: torch.Tensor, sigma: torch.Tensor, sample: torch.Tensor, model_output: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(prev_sample, x_0)``: an Euler step of each token from its level ``sigma`` (N, tokens) to the next level of
    ``grid`` below it; the sign convention of the output is FlowMatchEuler's.

    Raises ``ValueError`` for a process that is not flow matching.
    """
    if not isinstance(path, FlowMatching):
        raise ValueError("per_token_timesteps needs a flow matching scheduler.")
    levels = grid.to(sample.device, sample.dtype)[:, None, None]
    below = ((levels < sigma - 1e-6) * levels).amax(0)
    x, m = sample.float(), model_output.float()
    prev = x + (sigma - below)[..., None].float() * m
    return prev.to(sample.dtype), (x + sigma[..., None].float() * m).to(sample.dtype)
