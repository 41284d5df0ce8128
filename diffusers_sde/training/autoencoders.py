"""The training of an autoencoder: a new ``AutoencoderKL``, how its training calls it, what is measured at the end.

Knows diffusers' autoencoders and images; :mod:`.reconstruction` has the formulas.  Knows nothing of diffusion
processes, optimizers or checkpoints.
"""

from __future__ import annotations

import math
import types
from typing import Any

import diffusers
import torch

from diffusers_sde.training.networks import Task
from diffusers_sde.training.randomness import generator_of
from diffusers_sde.training.reconstruction import kl_divergence, psnr, reconstruction_loss
from diffusers_sde.training.samples import SAMPLE_STREAM, Selection, TrainingData
from diffusers_sde.training.settings import Settings

NAME = "autoencoder"  # of the task
MEASURED = 1000  # images that quality and scaling factor are measured on, if there are so many


def default_autoencoder(resolution: int, channels: int) -> diffusers.AutoencoderKL:
    """A convolutional ``AutoencoderKL`` to 4 channels at a quarter of the resolution: widths 24, 48, 96, one layer a
    block, 1.4 M parameters.

    Raises:
        ValueError: for a resolution that is no multiple of 4.
    """
    if resolution % 4:
        raise ValueError(f"--resolution {resolution} must be a multiple of 4 for the default autoencoder.")
    return diffusers.AutoencoderKL(
        sample_size=resolution,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(24, 48, 96),
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        mid_block_add_attention=False,
    )


class Reconstruction(torch.nn.Module):
    """An autoencoder as its training calls it, in one call that every wrapper of Accelerate sees."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(reconstruction, mean, log_variance)``: the decoded ``mean + std noise`` of images (N, C, H, W) and the
        moments of their latents (N, c, h, w), the shape of ``noise``."""
        posterior = self.network.encode(images).latent_dist
        latents = posterior.mean + posterior.std * noise
        return self.network.decode(latents).sample, posterior.mean, posterior.logvar


def autoencoder_task(network: Any) -> Task:
    """An autoencoder without a pipeline.  Raises ``ValueError`` for a network that is no ``AutoencoderKL``."""
    if not isinstance(network, diffusers.AutoencoderKL):
        raise ValueError(f"--objective autoencoder trains an AutoencoderKL, not a {type(network).__name__}.")
    nothing = types.SimpleNamespace(scheduler=None, components={})
    return Task(nothing, NAME, network, lambda labels, captions: {}, trained=Reconstruction(network))


def loss_of_batch(settings: Settings, task: Task, network: Any, batch: dict[str, Any]) -> torch.Tensor:
    """The mean over a batch of reconstruction, sharpness and ``kl_weight`` times the divergence of the latents from
    N(0, I) (Kingma & Welling 2013, arXiv:1312.6114); the noise of each sample is that of its position."""
    images = batch["pixel_values"].to(task.network.device)
    factor = 2 ** (len(task.network.config.block_out_channels) - 1)
    shape = (task.network.config.latent_channels, *(side // factor for side in images.shape[2:]))
    generators = [generator_of(settings.seed, int(p), SAMPLE_STREAM) for p in batch["positions"]]
    noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(images)
    made, mean, log_variance = network(images, noise)
    error = reconstruction_loss(
        made, images, loss=settings.loss, huber_c=settings.huber_c, sharpness_weight=settings.sharpness_weight
    )
    return (error + settings.kl_weight * kl_divergence(mean, log_variance)).mean()


@torch.no_grad()
def reconstructed(task: Task, images: torch.Tensor, batch_size: int = 16) -> torch.Tensor:
    """Images (N, C, H, W) through the mean of their latents and back."""
    vae = task.network
    parts = images.to(vae.device).split(batch_size)
    return torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample.float().cpu() for part in parts])


def pixels_of(data: TrainingData, count: int) -> torch.Tensor:
    """``count`` images of ``data`` spread evenly over it (all of them if it has fewer), (N, C, H, W) in [-1, 1]."""
    count = min(count, len(data))
    return torch.stack([data.item(i * len(data) // count, 0)["pixel_values"] for i in range(count)])


@torch.no_grad()
def measure(task: Task, data: TrainingData) -> dict[str, str]:
    """The facts of a trained autoencoder, for its card; writes the scaling factor, one over the standard deviation of
    all numbers of the latents of ``data``, which diffusion models multiply them by, into its config.

    Raises:
        ValueError: for latents that are all the same.
    """
    images = pixels_of(data, MEASURED)
    decibels = psnr(reconstructed(task, images), images)
    vae = task.network
    means = torch.cat([vae.encode(part.to(vae.device)).latent_dist.mean.float() for part in images.split(16)])
    factor = 1 / float(means.std())
    if not math.isfinite(factor):
        raise ValueError("The latents of this autoencoder have no spread: train longer, or with a smaller --kl_weight.")
    # what this list of diffusers names is left out when a model is made from the config
    defaults = [key for key in vae.config.get("_use_default_values", ()) if key != "scaling_factor"]
    vae.register_to_config(scaling_factor=factor, _use_default_values=defaults)
    kind = "held-out images" if isinstance(data, Selection) else "images"
    return {
        "Quality": f"PSNR {decibels.mean():.2f} dB on {len(images)} {kind}, median {decibels.median():.2f}, "
        f"worst {decibels.min():.2f}",
        "Latents": f"{'x'.join(map(str, means.shape[1:]))}, scaling factor {factor:.4f}",
    }


@torch.no_grad()
def before_and_after(task: Task, data: TrainingData, count: int, columns: int = 10) -> torch.Tensor:
    """Rows of ``columns`` images, each followed by the row of their reconstructions: (2 N, C, H, W)."""
    images = pixels_of(data, count)
    pairs = zip(images.split(columns), reconstructed(task, images).split(columns), strict=True)
    return torch.cat([torch.cat(pair) for pair in pairs])
