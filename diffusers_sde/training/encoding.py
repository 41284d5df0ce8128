"""What an autoencoder of diffusers makes of pictures and of latents, in the units of the network that is trained on it.

Knows the encoders with a distribution and without, those of videos, whose latents have an axis of frames, and the
conventions of shift and scale.  Knows nothing of files, data sets or losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


@torch.no_grad()
def encoder_output(vae: Any, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the encoder says of pictures (N, C, H, W): ``parameters`` (mean and log-variance, (N, 2 c, h, w)) or, of
    deterministic ones, ``latents`` (N, c, h, w); on the CPU."""
    pixels, frames = pixels.to(vae.device, vae.dtype), has_frames(vae)
    out = vae.encode(pixels.unsqueeze(2) if frames else pixels)
    if hasattr(out, "latent_dist"):
        name, value = "parameters", out.latent_dist.parameters
    else:
        name, value = "latents", out.latent if hasattr(out, "latent") else out.latents
    return {name: (value.squeeze(2) if frames else value).cpu()}


def has_frames(vae: Any) -> bool:
    """Whether an autoencoder is one of videos: pictures are videos of one frame."""
    return any(isinstance(part, torch.nn.Conv3d) for part in vae.modules())


def drawn(output: dict[str, torch.Tensor], generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Latents (N, c, h, w), float32, drawn from what :func:`encoder_output` says, each with its own generator;
    deterministic encoders draw nothing."""
    if "latents" in output:
        return output["latents"].float()
    posterior = DiagonalGaussianDistribution(output["parameters"].float())
    noise = torch.stack([torch.randn(posterior.mean.shape[1:], generator=g) for g in generators])
    return posterior.mean + posterior.std * noise


@dataclass(frozen=True)
class Units:
    """``(z - shift) scale`` of latents (N, c, h, w), a number each or one for every channel."""

    shift: tuple[float, ...]
    scale: tuple[float, ...]

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        shift, scale = (torch.tensor(v).view(-1, 1, 1).to(latents) for v in (self.shift, self.scale))
        return (latents - shift) * scale

    def inverse(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents as the autoencoder has them."""
        shift, scale = (torch.tensor(v).view(-1, 1, 1).to(latents) for v in (self.shift, self.scale))
        return latents / scale + shift


def units_of(vae: Any) -> Units:
    """The units of the network of an autoencoder, from its config: ``(z - shift_factor) scaling_factor`` or, with
    statistics of every channel, ``(z - latents_mean) scaling_factor / latents_std``; what is not there is 0 or 1."""
    scale = vae.config.get("scaling_factor") or 1.0
    if vae.config.get("latents_mean") is None or vae.config.get("latents_std") is None:
        return Units((vae.config.get("shift_factor") or 0.0,), (scale,))
    mean, std = vae.config["latents_mean"], vae.config["latents_std"]
    return Units(tuple(map(float, mean)), tuple(scale / float(s) for s in std))


def decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pictures (N, C, H, W) of latents (N, c, h, w) in the units of the network, float32, differentiable."""
    z, frames = units_of(vae).inverse(latents).to(vae.dtype), has_frames(vae)
    pictures = vae.decode(z.unsqueeze(2) if frames else z).sample
    return (pictures.squeeze(2) if frames else pictures).float()
