"""What goes into and comes out of the pipelines in ``pipelines/``: labels, initial noise, pictures.

Knows networks like ``UNet2DModel`` and the mixture oracle, and what callers may get wrong.  Knows no sampler.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from diffusers_sde.models.gaussian_mixture import GaussianMixtureModel

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def null_label(network: Any) -> int | None:
    """The label that means "no class": the last of ``num_class_embeds``, the number of components of a mixture; None
    for an unconditional network."""
    if isinstance(network, GaussianMixtureModel):
        return len(network.config.weights)
    classes = getattr(network.config, "num_class_embeds", None)
    return classes - 1 if classes else None


def label_tensor(network: Any, class_labels: Any, batch: int | None = None) -> torch.Tensor | None:
    """Labels (N,) int64 on the network's device; for None the null label ``batch`` (default 1) times, or None if the
    network has no classes.

    class_labels: an int, a list or a tensor; one label is repeated ``batch`` times.  Raises ``ValueError`` for labels
    that the network does not have and for numbers that do not fit.
    """
    null = null_label(network)
    if class_labels is None:
        return None if null is None else torch.full((batch or 1,), null, device=network.device)
    if null is None:
        raise ValueError("This network has no classes: leave out class_labels.")
    labels = labels_of(class_labels, batch)
    if bool((labels > null).any()):
        raise ValueError(f"class_labels must be whole numbers from 0 to {null - 1}, or {null} for no class.")
    return labels.to(network.device)


def labels_of(class_labels: Any, batch: int | None = None) -> torch.Tensor:
    """``class_labels`` (an int, an iterable, a tensor) as a tensor (N,) int64 on the CPU, one label repeated ``batch``
    times; raises ``ValueError`` for what is no list of labels, or not as long as the batch."""
    several = isinstance(class_labels, Iterable) and not isinstance(class_labels, torch.Tensor)
    labels = torch.as_tensor(list(class_labels) if several else class_labels).reshape(-1).cpu()
    if labels.is_floating_point() or not len(labels) or bool((labels < 0).any()):
        raise ValueError("class_labels must be one or more whole numbers, 0 or larger.")
    if batch is not None and len(labels) not in (1, batch):
        raise ValueError(f"{len(labels)} class_labels for {batch} images: pass one, or one for each image.")
    return labels.long().expand(batch or len(labels))


def sample_shape(network: Any) -> tuple[int, ...]:
    """(C, H, W) of one sample of the network."""
    size = network.config.sample_size
    return (network.config.in_channels, *((size, size) if isinstance(size, int) else size))


def initial_noise(
    network: Any, scheduler: Any, batch: int, generator: Any = None, latents: torch.Tensor | None = None
) -> torch.Tensor:
    """The state to start from: unit normals (N, C, H, W), or the caller's ``latents``, times ``init_noise_sigma``, in
    the network's dtype (float32 for an oracle).  Raises ``ValueError`` for latents of another shape."""
    shape = (batch, *sample_shape(network))
    if latents is None:
        latents = randn_tensor(shape, generator=generator, device=network.device, dtype=network.dtype)
    elif tuple(latents.shape) != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}, this model makes {shape}.")
    return latents.to(network.device) * float(getattr(scheduler, "init_noise_sigma", 1.0))


def check_output_type(output_type: str) -> None:
    """Raise ``ValueError`` for an output_type that :func:`pictures` does not know, before any work is done."""
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type {output_type!r} is unknown: use one of {', '.join(OUTPUT_TYPES)}.")


def pictures(sample: torch.Tensor, output_type: str) -> Sequence[Any] | np.ndarray | torch.Tensor:
    """``sample`` in [-1, 1] as PIL images, as an array (N, H, W, C) or tensor (N, C, H, W) in [0, 1], or itself
    (``latent``)."""
    if output_type == "latent":
        return sample
    return VaeImageProcessor().postprocess(sample.float(), output_type=output_type)
