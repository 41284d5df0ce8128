"""Every state of one sampling run.  Knows schedulers' steps and levels; knows no model, no picture and no interface."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from diffusers_sde import TableScheduler
from diffusers_sde.comparison.problems import Tick
from diffusers_sde.grids import Nodes
from diffusers_sde.sampling import Denoiser


@dataclass(frozen=True)
class Recording:
    """States (n + 1, N, ...) at n + 1 levels, and the data predictions (n, N, ...) made at the first n."""

    levels: Nodes
    states: torch.Tensor
    clean: torch.Tensor


@torch.no_grad()
def record(denoiser: Denoiser, scheduler: TableScheduler, noise: torch.Tensor, tick: Tick = lambda: None) -> Recording:
    """Run a scheduler of this package, whose timesteps are set, from unit ``noise`` and keep everything; ``tick`` is
    called after each evaluation."""
    levels = scheduler.levels
    x = noise * scheduler.init_noise_sigma
    states, clean = [x], []
    for t in scheduler.timesteps:
        out = scheduler.step(denoiser(scheduler.scale_model_input(x, t), t), t, x)
        x = out.prev_sample
        states.append(x)
        clean.append(out.pred_original_sample)
        tick()
    return Recording(levels, torch.stack(states), torch.stack(clean))
