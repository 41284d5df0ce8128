"""What an autoencoder is trained on and measured by: reconstruction, sharpness, the prior of its latents, PSNR.

Knows images (N, C, H, W) in [-1, 1] and the moments of Gaussian posteriors as tensors.  Knows nothing of networks,
data sets or optimizers, and needs no weights of another network.
"""

from __future__ import annotations

import torch

from diffusers_sde.training.objectives import regression_loss

PYRAMID_LEVELS = 3


def laplacian_pyramid(images: torch.Tensor, levels: int = PYRAMID_LEVELS) -> list[torch.Tensor]:
    """The bands ``L_k = I_k - up(down(I_k))``, ``I_{k+1} = down(I_k)``, finest first, without the last low-pass image
    (Burt & Adelson 1983): ``down`` is the mean of 2x2 pixels, ``up`` bilinear.

    Ends earlier where a side is odd or below 2.
    """
    bands = []
    for _ in range(levels):
        if min(images.shape[-2:]) < 2 or any(side % 2 for side in images.shape[-2:]):
            break
        lower = torch.nn.functional.avg_pool2d(images, 2)
        raised = torch.nn.functional.interpolate(lower, scale_factor=2, mode="bilinear", align_corners=False)
        bands.append(images - raised)
        images = lower
    return bands


def reconstruction_loss(
    reconstruction: torch.Tensor, images: torch.Tensor, *, loss: str, huber_c: float, sharpness_weight: float
) -> torch.Tensor:
    """Per-sample error (N,): that of the pixels plus ``sharpness_weight`` times the mean of that of the bands of
    :func:`laplacian_pyramid`, each measured by :func:`.objectives.regression_loss` (mean over pixels).

    The bands count what blurring loses, edges and fine lines, more than the pixels' error does.
    """
    error = reconstruction.float() - images.float()
    one, zero = error.new_ones(len(error)), torch.zeros_like
    pixels = regression_loss(error, zero(error), one, loss, huber_c)
    bands = [regression_loss(band, zero(band), one, loss, huber_c) for band in laplacian_pyramid(error)]
    return pixels + sharpness_weight * torch.stack(bands).mean(0) if bands else pixels


def kl_divergence(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """``KL(N(mean, exp(log_variance)) || N(0, I))`` per latent number, in nats, its mean over each sample (N,)."""
    mean, log_variance = mean.float(), log_variance.float()
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).mean(1)


def psnr(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio (N,) in dB, ``10 log10(2^2 / MSE)``, of images clamped to [-1, 1]."""
    error = reconstruction.float().clamp(-1, 1) - images.float().clamp(-1, 1)
    return 10 * torch.log10(4 / error.square().flatten(1).mean(1))
