"""Tiny models for the tests of the pipelines: an autoencoder, random networks, and oracles saved as pipelines."""

from __future__ import annotations

import io

import torch
from diffusers import AutoencoderKL, DDPMPipeline, DDPMScheduler, UNet2DModel

from diffusers_sde import GaussianMixtureModel, ProbabilityFlowScheduler

PROCESSES = {
    "vp": {"prediction_type": "epsilon"},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "edm": {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0},
}
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def oracle(process: str = "vp", dim: int = 4, seed: int = 0) -> tuple[GaussianMixtureModel, ProbabilityFlowScheduler]:
    """Three Gaussians on (1, 1, dim) with standard deviations from 0.1 to 0.6, and a scheduler of their process."""
    g = torch.Generator().manual_seed(seed)
    means = 0.7 * torch.randn(3, dim, generator=g, dtype=torch.float64)
    stds = 0.1 + 0.5 * torch.rand(3, dim, generator=g, dtype=torch.float64)
    model = GaussianMixtureModel([0.5, 0.3, 0.2], means.tolist(), (stds**2).tolist(), process=PROCESSES[process])
    return model, ProbabilityFlowScheduler(**PROCESSES[process])


class RelabelledModel(GaussianMixtureModel):
    """A mixture whose network counts time from 200 later: given t it assumes the noise level of t + 200.  It is right
    on grids that say so, ``timesteps=[t - 200, ...]`` with ``sigmas=[sigma/alpha at t, ...]``, and on no other."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return super().forward(sample, timestep + 200, class_labels, return_dict)


def relabelled_grid(path, times) -> dict[str, list[float]]:
    """The grid on which :class:`RelabelledModel` is the mixture evaluated at ``times``."""
    alpha, sigma = path.alpha_sigma(times)
    return {"timesteps": [t - 200 for t in times], "sigmas": (sigma / alpha).tolist()}


def save_oracle(folder, process: str = "vp", **options):
    """An oracle saved as a ``DDPMPipeline``; returns it."""
    model, scheduler = oracle(process, **options)
    DDPMPipeline(unet=model, scheduler=scheduler).save_pretrained(folder)
    return model


def tiny_unet(channels: int = 1, size: int = 8, classes: int | None = None) -> UNet2DModel:
    """A random network of some ten thousand parameters."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        num_class_embeds=classes,
    )


def tiny_vae() -> AutoencoderKL:
    """A random autoencoder from 3x16x16 to 4x8x8."""
    torch.manual_seed(0)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )


def ddpm() -> DDPMScheduler:
    """A scheduler that is not ours."""
    return DDPMScheduler()


def bars_of(pipe) -> list:
    """The progress bars that the pipeline will have opened, as they stand in the end; nothing is printed."""
    bars, opened = [], pipe.progress_bar

    def progress_bar(*arguments, **options):
        bars.append(opened(*arguments, **options))
        return bars[-1]

    pipe.progress_bar = progress_bar
    pipe.set_progress_bar_config(disable=False, file=io.StringIO())
    return bars
