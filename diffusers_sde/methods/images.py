"""Pictures as states: what a user hands over becomes what a network moves, and back through an autoencoder.

Knows PIL images, arrays, tensors and an optional ``AutoencoderKL``.  A tensor is a state already, in the network's
units (-1..1 for pictures); everything else goes through diffusers' image processor.  Knows nothing of processes.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor

from diffusers_sde.methods.pipeline_io import pictures, sample_shape


def to_pixels(images: Any, channels: int) -> torch.Tensor:
    """One tensor (N, C, H, W) of a PIL image, an array (N, H, W, C) in 0..1 or a list of either (then ``2 u - 1``), or
    of a tensor (N, C, H, W) or (C, H, W) in the model's units."""
    if isinstance(images, torch.Tensor):
        return images[None] if images.ndim == 3 else images
    if isinstance(images, list | tuple) and images and all(isinstance(image, torch.Tensor) for image in images):
        return torch.cat([to_pixels(image, channels) for image in images])
    gray = channels == 1
    processor = VaeImageProcessor(
        do_resize=False, vae_scale_factor=1, do_convert_grayscale=gray, do_convert_rgb=not gray
    )
    return processor.preprocess(list(images) if isinstance(images, tuple) else images)


def to_state(
    images: Any, network: torch.nn.Module, vae: Any = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """``images`` as states of ``network`` on its device, encoded by ``vae`` where there is one.

    Raises ``ValueError`` where the shape is not the network's.
    """
    pixels = to_pixels(images, network.config.in_channels if vae is None else vae.config.in_channels)
    pixels = pixels.to(network.device)
    state = pixels if vae is None else encode(vae, pixels)
    wanted = sample_shape(network)
    if state.shape[1:] != wanted:
        what = "images" if vae is None else "images, encoded,"
        raise ValueError(f"The {what} have shape {tuple(state.shape[1:])}, this model works on {wanted}: resize them.")
    return state.to(dtype)


def encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Latents ``(mode - shift) * scale`` of pixels (N, C, H, W) in -1..1."""
    latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pixels (N, C, H, W) of latents, the inverse scaling first; differentiable."""
    return vae.decode((latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).to(vae.dtype)).sample


def from_state(state: torch.Tensor, vae: Any = None, output_type: str = "pil") -> Any:
    """States as :func:`diffusers_sde.methods.pipeline_io.pictures`, decoded by ``vae``
    if any; ``latent``: themselves."""
    return pictures(state if vae is None or output_type == "latent" else decode(vae, state), output_type)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating point type of a device: float64, or float32 where there is none (mps)."""
    return torch.float32 if device.type == "mps" else torch.float64
