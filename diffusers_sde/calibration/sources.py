"""Where evaluations come from: a bare denoiser or a class-conditional network.

Knows how to draw the same noise again and to ask a network for one prediction at any state and time.  Knows nothing of
tables or fits, and of no pipeline's call (:mod:`diffusers_sde.calibration.pipeline_source` does).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from diffusers_sde.calibration.arguments import check_names
from diffusers_sde.class_conditional import GUIDANCE
from diffusers_sde.methods.pipeline_io import labels_of
from diffusers_sde.noise import seeds_from_int
from diffusers_sde.prediction import split_variance
from diffusers_sde.sampling import Denoiser, class_names, network_denoiser

HELD_OUT = 1 << 20  # held-out samples are numbered from here: never a training sample's noise


class Batch(Protocol):
    """Some samples: their unit noise, and the network at any of their states."""

    @property
    def noise(self) -> torch.Tensor:
        """(B, ...), standard normal, float32 or more."""
        ...

    def evaluate(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """The network's prediction for its input ``sample`` (scaled, for EDM) at one ``timestep``, float32 or more."""
        ...


class Source(Protocol):
    """Batches by the index of their first sample; ``mu`` is the shift that a flow pipeline asked for, known once a
    batch has been opened."""

    @property
    def batch_size(self) -> int: ...

    @property
    def mu(self) -> float | None: ...

    def open(self, first: int) -> contextlib.AbstractContextManager[Batch]:
        """The samples ``first .. first + batch_size - 1``; the same noise each time."""
        ...


@dataclass(frozen=True)
class DenoiserBatch:
    """A :class:`Batch` of ``denoiser(sample, timestep)``, whose learned variance is split off."""

    noise: torch.Tensor
    denoiser: Denoiser
    variance_type: str

    def evaluate(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        prediction = self.denoiser(sample, timestep.to(sample.device))
        if not isinstance(prediction, torch.Tensor):
            raise ValueError(
                f"The denoiser returns a {type(prediction).__name__}: it must return the prediction as a tensor."
            )
        return (
            prediction if prediction.shape == sample.shape else split_variance(prediction, sample, self.variance_type)
        )


@dataclass(frozen=True)
class DenoiserSource:
    """The source of a callable ``denoiser(sample, timestep)``.

    Args:
        denoiser: always called with ``batch_size`` samples.
        sample_shape: (C, H, W) of a sample.
        batch_size: samples of one evaluation.
        seed: of the noise.
        device: where the samples live.
        variance_type: what a prediction with 2 C channels holds.
    """

    denoiser: Denoiser
    sample_shape: tuple[int, ...]
    batch_size: int
    seed: int
    device: Any = "cpu"
    variance_type: str = "fixed_small"
    mu: float | None = None

    @contextlib.contextmanager
    def open(self, first: int) -> Iterator[Batch]:
        generators = sample_generators(self.seed, first, self.batch_size)
        noise = torch.stack([torch.randn(self.sample_shape, generator=g) for g in generators]).to(self.device)
        with torch.no_grad():
            yield DenoiserBatch(noise, self.denoiser, self.variance_type)


def sample_generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """One generator per sample: sample k does not depend on the batch it is in."""
    seeds = seeds_from_int(seed, first + count, torch.device("cpu"))[first:].tolist()
    return [torch.Generator().manual_seed(s % 2**63) for s in seeds]


def is_class_conditional(pipe: Any) -> bool:
    """Whether a pipeline is a bare class-conditional network, which is evaluated here without the pipeline's call."""
    return set(pipe.components) == {"unet", "scheduler"} and bool(pipe.unet.config.get("num_class_embeds"))


def class_conditional_source(pipe: Any, inputs: Mapping[str, Any], batch_size: int, seed: int) -> DenoiserSource:
    """The source of a bare class-conditional network: each batch has every label at every guidance scale (1: no
    guidance), as often as fits into ``batch_size``, at least once.

    Args:
        pipe: a pipeline of which :func:`is_class_conditional` holds.
        inputs: ``class_labels`` (default: all but the last class, which is null) and ``guidance_scale`` (default 2),
            numbers, class names that the network has, or lists.
        batch_size: at most so many samples in one evaluation, unless there are more labels.
        seed: of the noise.

    Raises:
        ValueError: for other inputs, for labels that the network does not have, and for empty lists.
    """
    check_names("A class-conditional network", inputs, ["class_labels", "guidance_scale"])
    network, config = pipe.unet, pipe.unet.config
    class_labels = inputs.get("class_labels", range(config.num_class_embeds - 1))
    labels = labels_of(class_labels, names=class_names(network)).tolist()
    scale = inputs.get("guidance_scale", GUIDANCE)
    scales = [scale] if isinstance(scale, int | float) else list(scale)
    if not scales or not labels or not all(0 <= k < config.num_class_embeds for k in labels):
        raise ValueError(
            f"Pass one or more class_labels in 0..{config.num_class_embeds - 1} and guidance scales, not {labels} and "
            f"{scales}."
        )
    times = max(batch_size // (len(labels) * len(scales)), 1)
    each = torch.tensor([k for k in labels for _ in scales] * times, device=pipe.device)
    if len(scales) == 1:
        denoiser = network_denoiser(network, each, float(scales[0]))
    else:
        conditional = network_denoiser(network, each)
        null = network_denoiser(network, torch.full_like(each, config.num_class_embeds - 1))
        weights = torch.tensor(scales * (len(labels) * times), device=pipe.device)[:, None, None, None]

        def denoiser(sample: torch.Tensor, t: Any) -> torch.Tensor:
            return torch.lerp(null(sample, t), conditional(sample, t), weights)

    size = config.sample_size
    shape = (config.in_channels, *((size, size) if isinstance(size, int) else size))
    kind = pipe.scheduler.config.get("variance_type", "fixed_small")
    return DenoiserSource(denoiser, shape, len(each), seed, pipe.device, kind)
