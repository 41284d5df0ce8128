"""Pictures as states: what a user hands over becomes what a network moves, and back through an autoencoder.

Knows PIL images, arrays, tensors and an optional ``AutoencoderKL``.  A tensor is a state already, in the network's
units (-1..1 for pictures); everything else goes through diffusers' image processor.  Knows nothing of noise.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor

from diffusers_sde.methods.pipeline_io import pictures, sample_shape


def to_pixels(images: Any, channels: int) -> torch.Tensor:
    """Pictures as one tensor: ``2 u - 1`` of values u in 0..1; a tensor is taken as it is.

    Args:
        images: a PIL image, an array (N, H, W, C) in 0..1 or a list of either, or a tensor (N, C, H, W) or (C, H, W) in
            the model's units.
        channels: C of the model; 1 makes PIL images gray.

    Returns:
        (N, C, H, W).
    """
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
    """Pictures as states of a network.

    Args:
        images: as :func:`to_pixels` takes them.
        network: whose shape and device they get.
        vae: an ``AutoencoderKL`` that encodes them; None: the state is the picture.
        dtype: of the result.

    Returns:
        (N, C, H, W) on the network's device.

    Raises:
        ValueError: where the shape is not the network's, and for images that are not finite.
    """
    pixels = to_pixels(images, network.config.in_channels if vae is None else vae.config.in_channels)
    pixels = pixels.to(network.device)
    state = pixels if vae is None else to_latents(vae, pixels)
    expected = sample_shape(network)
    if state.shape[1:] != expected:
        what = "images" if vae is None else "images, encoded,"
        raise ValueError(
            f"The {what} have shape {tuple(state.shape[1:])}, this model works on {expected}: resize them."
        )
    if not bool(state.isfinite().all()):
        raise ValueError("The images are not finite: replace their NaN and infinite values.")
    return state.to(dtype)


def to_latents(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The mode of the autoencoder's posterior, in the network's units: ``(mode - shift) * scale``.

    Args:
        vae: an ``AutoencoderKL``.
        pixels: (N, C, H, W) in -1..1.

    Returns:
        Latents (N, c, h, w) in the vae's dtype.
    """
    latents = vae.encode(pixels.to(vae.dtype)).latent_dist.mode()
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


def from_latents(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """The pixels of latents: ``latents / scale + shift`` decoded; differentiable.

    Args:
        vae: an ``AutoencoderKL``.
        latents: (N, c, h, w).

    Returns:
        Pixels (N, C, H, W) in -1..1, in the vae's dtype.
    """
    return vae.decode((latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)).to(vae.dtype)).sample


def from_state(state: torch.Tensor, vae: Any = None, output_type: str = "pil") -> Any:
    """States as pictures.

    Args:
        state: (N, C, H, W), in the model's units.
        vae: the ``AutoencoderKL`` that decodes them; None: the state is the picture.
        output_type: pil, np, pt as in :func:`diffusers_sde.methods.pipeline_io.pictures`, or latent, the state itself.

    Returns:
        N pictures.
    """
    return pictures(state if vae is None or output_type == "latent" else from_latents(vae, state), output_type)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision is for networks: everything else is computed in float32.

    Args:
        x: of any floating point dtype.

    Returns:
        x, in float32 where it was float16 or bfloat16.
    """
    return x.float() if x.dtype.itemsize < 4 else x
