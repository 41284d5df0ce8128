"""What goes into and comes out of the pipelines in ``pipelines/``: labels, initial noise, pictures.

Knows networks like ``UNet2DModel`` and the mixture oracle, and what callers may get wrong.  Knows no sampler.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor

from diffusers_sde.errors import check_finite, is_whole
from diffusers_sde.sampling import class_names, null_label

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def label_tensor(network: Any, class_labels: Any, batch: int | None = None) -> torch.Tensor | None:
    """Labels as a network takes them.

    Args:
        network: a ``UNet2DModel``-like network or a mixture.
        class_labels: an int or a name, a list of them or a tensor; None: no class.
        batch: number of samples; None: as many as there are labels.  One label is repeated for all of them.

    Returns:
        (N,) int64 on the network's device; for None the null label, or None if the network has no classes.

    Raises:
        ValueError: for labels that the network does not have and for numbers that do not fit.
    """
    null = null_label(network)
    if class_labels is None:
        return None if null is None else torch.full((batch or 1,), null, device=network.device)
    if null is None:
        raise ValueError("This network has no classes: leave out class_labels.")
    labels = labels_of(class_labels, batch, class_names(network))
    if bool((labels > null).any()):
        raise ValueError(f"class_labels must be whole numbers from 0 to {null - 1}, or {null} for no class.")
    return labels.to(network.device)


def labels_of(class_labels: Any, batch: int | None = None, names: Sequence[str] | None = None) -> torch.Tensor:
    """Labels as a tensor.

    Args:
        class_labels: an int or a name, an iterable of them or a tensor.
        batch: number of samples; None: as many as there are labels.  One label is repeated for all of them.
        names: of the classes, if they have some; their case does not matter.

    Returns:
        (N,) int64 on the CPU.

    Raises:
        ValueError: for what is no list of labels, a name that no class has, or not as long as the batch.
    """
    if isinstance(class_labels, torch.Tensor | np.ndarray):
        class_labels = class_labels.reshape(-1).tolist()
    several = isinstance(class_labels, Iterable) and not isinstance(class_labels, str)
    numbers = [_label(label, names) for label in (class_labels if several else [class_labels])]
    if not numbers or not all(is_whole(number) and 0 <= number < 2**63 for number in numbers):
        raise ValueError("class_labels must be one or more whole numbers, 0 or larger.")
    labels = torch.tensor([int(number) for number in numbers])
    if batch is not None and len(labels) not in (1, batch):
        raise ValueError(f"{len(labels)} class_labels for {batch} images: pass one, or one for each image.")
    return labels.expand(batch or len(labels))


def _label(label: Any, names: Sequence[str] | None) -> Any:
    """The number of a class that is named; whatever else as it is."""
    if not isinstance(label, str):
        return label
    if names is None:
        raise ValueError(f"The classes of this model have no names: class_labels must be whole numbers, not {label!r}.")
    alike = [i for i, name in enumerate(names) if name.casefold() == label.casefold()]
    if not alike:
        (near,) = difflib.get_close_matches(label, names, 1, cutoff=0.0)
        raise ValueError(
            f"There is no class {label!r}, the nearest is {near!r}: class_labels are numbers, or names among "
            f"{', '.join(names)}."
        )
    return next((i for i in alike if names[i] == label), alike[0])


def sample_shape(network: Any) -> tuple[int, ...]:
    """The shape of one sample.

    Args:
        network: with ``in_channels`` and ``sample_size`` in its config.

    Returns:
        (C, H, W).
    """
    size = network.config.sample_size
    return (network.config.in_channels, *((size, size) if isinstance(size, int) else size))


def initial_noise(
    network: Any, scheduler: Any, batch: int, generator: Any = None, latents: torch.Tensor | None = None
) -> torch.Tensor:
    """The state to start from: unit normals times ``init_noise_sigma``.

    Args:
        network: whose shape, device and dtype (float32 for an oracle) it gets.
        scheduler: any; one without ``init_noise_sigma`` starts at 1.
        batch: N.
        generator: one, or one for each sample.
        latents: the caller's normals (N, C, H, W), in the dtype that the state shall have; None: they are drawn.

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: as :func:`unit_noise`.
    """
    noise = unit_noise(network, batch, generator, latents)
    return noise * float(getattr(scheduler, "init_noise_sigma", 1.0))


def unit_noise(
    network: Any,
    batch: int,
    generator: Any = None,
    latents: torch.Tensor | None = None,
    device: torch.device | None = None,
    shape: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """Unit normals.

    Args:
        network: whose shape and dtype (float32 for an oracle) they get.
        batch: N.
        generator: one, or one for each sample.
        latents: the caller's, (N, C, H, W), in the dtype that the state shall have; None: they are drawn.
        device: where they are to be; None: where the network is.
        shape: (C, H, W) of a sample; None: the network's own.

    Returns:
        (N, C, H, W).

    Raises:
        ValueError: for latents of another shape, for some that are not finite, and for another number of generators.
    """
    shape, device = (batch, *(shape or sample_shape(network))), device or network.device
    if isinstance(generator, list) and len(generator) not in (1, batch):
        raise ValueError(f"{len(generator)} generators for {batch} images: pass one, or one for each image.")
    if latents is None:
        return randn_tensor(shape, generator=generator, device=device, dtype=network.dtype)
    if tuple(latents.shape) != shape:
        raise ValueError(f"latents have shape {tuple(latents.shape)}, this model makes {shape}.")
    if not bool(latents.isfinite().all()):
        raise ValueError("latents are not finite: pass unit normals.")
    return latents.to(device)


def lay_out_grid(
    scheduler: Any,
    num_inference_steps: int,
    device: torch.device,
    timesteps: Any = None,
    sigmas: Any = None,
    mu: float | None = None,
) -> None:
    """Set a scheduler's timesteps: the caller's own grid if there is one, else a number of steps.

    Args:
        scheduler: one of this package.
        num_inference_steps: of the scheduler's own grid.
        device: of the timesteps.
        timesteps: what the network is given, from noise to data.
        sigmas: the noise levels of the states; with ``timesteps`` too, these say what the network is given.
        mu: shift of a flow model with dynamic shifting.

    Raises:
        ValueError: as the scheduler's ``set_timesteps``.
    """
    if mu is not None:
        check_finite("mu", mu)
    number = num_inference_steps if timesteps is None and sigmas is None else None
    scheduler.set_timesteps(number, device=device, timesteps=timesteps, sigmas=sigmas, mu=mu)


def check_output_type(output_type: str) -> None:
    """Refuse an output type that :func:`pictures` does not know, before any work is done.

    Args:
        output_type: pil, np, pt or latent.

    Raises:
        ValueError: for any other.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type {output_type!r} is unknown: use one of {', '.join(OUTPUT_TYPES)}.")


def pictures(sample: torch.Tensor, output_type: str) -> Sequence[Any] | np.ndarray | torch.Tensor:
    """Pixels in the form that a caller wants.

    Args:
        sample: (N, C, H, W), -1..1.
        output_type: pil, np, pt or latent.

    Returns:
        N PIL images; an array (N, H, W, C) or a tensor (N, C, H, W) in 0..1; or, for latent, ``sample`` itself.
    """
    if output_type == "latent":
        return sample
    return VaeImageProcessor().postprocess(sample.float(), output_type=output_type)
