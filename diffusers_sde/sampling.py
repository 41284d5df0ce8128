"""The sampling loop, for networks that have no pipeline of their own call: compare, bench and tests use it.

Knows how to call an unconditional or class-conditional network with classifier-free guidance or as a flow map, and how
to drive any scheduler, ours or diffusers', from given noise.  Knows no particular model or scheduler.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch

Denoiser = Callable[[torch.Tensor, Any], torch.Tensor]


def network_denoiser(
    network: torch.nn.Module, class_labels: torch.Tensor | None = None, guidance_scale: float = 1.0
) -> Denoiser:
    """``denoiser(sample, timestep)`` of a ``UNet2DModel``-like network.

    With labels (N,) and ``guidance_scale`` w: ``m_null + w (m_label - m_null)`` in one batch of 2N (Ho & Salimans 2022,
    arXiv:2207.12598, eq. 6 in diffusers' scale: 1 is conditional, no guidance).  The null label is the network's last
    class.  Raises ``ValueError`` for guidance without labels or without a class-conditional network.
    """
    classes = getattr(network.config, "num_class_embeds", None)
    if class_labels is None:
        if guidance_scale != 1.0:
            raise ValueError("Guidance needs class labels: this model is sampled without any, use guidance_scale 1.")
        if classes:
            raise ValueError(f"This network is class-conditional: pass class labels in 0..{classes - 1}.")
        return lambda sample, t: network(sample, t, return_dict=False)[0]
    if guidance_scale == 1.0:
        return lambda sample, t: network(sample, t, class_labels, return_dict=False)[0]
    if not classes:
        raise ValueError("Guidance needs a network with a null class: this one has no num_class_embeds.")
    labels = torch.cat([torch.full_like(class_labels, classes - 1), class_labels])

    def guided(sample: torch.Tensor, t: Any) -> torch.Tensor:
        null, conditional = network(torch.cat([sample, sample]), t, labels, return_dict=False)[0].chunk(2)
        return torch.lerp(null, conditional, guidance_scale)

    return guided


def flow_map_denoiser(network: torch.nn.Module, scheduler: Any, class_labels: torch.Tensor | None = None) -> Denoiser:
    """``denoiser(sample, timestep)`` of a flow map network, told where the step jumps to if it was trained so
    (``scheduler.config.flow_map == "mean_flow"``); its guidance is built in."""
    told = {} if class_labels is None else {"class_labels": class_labels}

    def denoiser(sample: torch.Tensor, t: Any) -> torch.Tensor:
        target = {"target_timestep": scheduler.target_timestep(t)} if scheduler.config.flow_map == "mean_flow" else {}
        return network(sample, t, return_dict=False, **told, **target)[0]

    return denoiser


def lay_out(scheduler: Any, num_inference_steps: int) -> None:
    """``set_timesteps``, trailing for flow matching Euler too, which has no option for it."""
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist())
    else:
        scheduler.set_timesteps(num_inference_steps)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    scheduler: Any,
    noise: torch.Tensor,
    *,
    generator: Any = None,
    callback: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Run ``scheduler``, whose timesteps are set, from unit ``noise``; ``callback`` is called after each evaluation."""
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for t in scheduler.timesteps:
        # flow matching schedulers have no scale_model_input
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(denoiser(scaled, t), t, x, return_dict=False, **extra)[0]
        if callback is not None:
            callback()
    return x


def rmse(samples: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of each sample: (N, ...) and (N, ...) to (N,) float64."""
    return (samples - reference).double().flatten(1).square().mean(1).sqrt()
