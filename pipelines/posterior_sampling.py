r"""Linear inverse problems: pictures that explain an observation ``y = A x_0 + noise_std n``.

Any diffusion or flow model is a prior; ``E[x_0 | x_t]`` is replaced by

    E[x_0 | x_t, y] = D + (sigma^2/alpha) (dD/dx)' A' (A C A' + noise_std^2 I)^-1 (y - A D)

in every step of any scheduler, with the covariance C of ``x_0`` given ``x_t`` from the network's Jacobian
(``method="mmps"``, exact for Gaussian data), isotropic (``"pigdm"``), or without one (``"dps"``).  ``"projection"``
replaces what the operator sees by the noised observation instead (Score-SDE's imputation, ILVR): no backward pass, and
the least faithful.  :mod:`diffusers_sde.methods.posterior` has sources and operators (inpainting, super_resolution,
gaussian_blur, linear_map); any linear torch function is an operator.  All of them are approximations: the weights of
well separated explanations are not exact (twisted sequential Monte Carlo, ``pipelines/steering.py``, converges to
them).

Usage, in a clone of the repository:

```python
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from diffusers_sde import ProbabilityFlowScheduler
from diffusers_sde.assets import FASHION_MODEL
from diffusers_sde.methods.pipeline_io import pictures
from diffusers_sde.methods.posterior import adjoint, gaussian_blur, inpainting, linear_map, super_resolution
from diffusers_sde.sampling import network_denoiser, sample

pipe = DiffusionPipeline.from_pretrained(
    FASHION_MODEL, custom_pipeline="pipelines/posterior_sampling.py", trust_remote_code=True
)

# four pictures to lose and find again: here the model's own
labels = torch.tensor([3, 7, 9, 0])
scheduler = ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
scheduler.set_timesteps(15)
noise = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(2))
truth = sample(network_denoiser(pipe.unet, labels, 2.0), scheduler, noise).clamp(-1, 1)

mask = torch.ones(32, 32, dtype=torch.bool)
mask[8:24, 8:24] = False
random = torch.randn(256, 1024, generator=torch.Generator().manual_seed(3)) / 32
operators = [inpainting(mask), super_resolution(4), gaussian_blur(2.0), linear_map(random)]

backprojected, restored = [], []
for k, operator in enumerate(operators):
    generator = torch.Generator().manual_seed(k)
    y = operator(truth[k : k + 1])
    y = y + 0.05 * torch.randn(y.shape, generator=generator)
    back = adjoint(operator, y, truth[:1])
    backprojected.append(back / back.abs().max())
    options = {"noise_std": 0.05, "class_labels": int(labels[k]), "generator": generator, "output_type": "latent"}
    restored.append(pipe(y, operator, num_inference_steps=30, **options).images)
psnr = 10 * torch.log10(4 / (torch.cat(restored) - truth).square().mean((1, 2, 3)))

# rows: truth, A' y, restored
tiles = pictures(torch.cat([truth, *backprojected, *restored]), "pil")
image = make_image_grid([tile.resize((64, 64)) for tile in tiles], rows=3, cols=4)
```
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

from diffusers_sde import FlowMapScheduler, ReverseSDEScheduler, TableScheduler
from diffusers_sde.errors import check_whole
from diffusers_sde.methods.fields import network_field
from diffusers_sde.methods.images import from_latents, from_state
from diffusers_sde.methods.pipeline_io import check_output_type, initial_noise, label_tensor, lay_out_grid, sample_shape
from diffusers_sde.methods.posterior import Measurement, check_method, check_observation, conditional_mean, project
from diffusers_sde.prediction import to_model
from diffusers_sde.tables import points_of


class PosteriorSamplingPipeline(DiffusionPipeline):
    """Sample ``x_0`` given ``y = operator(x_0) + noise``.

    Args:
        unet: the prior, a ``UNet2DModel``-like network or a mixture.
        scheduler: one of this package is used as it is, at its own noise levels; the forward process of any other one
            is sampled by ``ReverseSDEScheduler``.
        vae: the autoencoder whose latents the network knows; the operator then acts on decoded pixels, linearised at
            each step.  None: pixels.
    """

    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(self, unet: Any, scheduler: Any, vae: AutoencoderKL | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    def __call__(
        self,
        observation: torch.Tensor,
        operator: Callable[[torch.Tensor], torch.Tensor],
        noise_std: float,
        class_labels: Any = None,
        method: str = "mmps",
        num_inference_steps: int = 50,
        timesteps: Any = None,
        sigmas: Any = None,
        num_images: int = 1,
        solver_iterations: int = 5,
        data_std: float = 1.0,
        max_noise: float = 5.0,
        dps_scale: float = 1.0,
        guidance_scale: float = 1.0,
        mu: float | None = None,
        generator: Any = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Samples of the posterior of each observation, those of one observation in a row.

        Args:
            observation: y, (N, ...), in the units of the model's pixels (-1..1).
            operator: linear function from pixels (N, C, H, W) to y's shape, in torch.
            noise_std: standard deviation of the noise in y; positive.
            class_labels: what the pictures show (labels or names), one or one for each observation; None: no class.
            method: mmps, pigdm, dps or projection (of pixels only; it takes the observation to be exact).
            num_inference_steps: network evaluations; each needs 1 (pigdm, dps), up to solver_iterations + 1 (mmps) or
                no (projection) backward passes.
            timesteps: what the network is given, from noise to data, instead of a number of steps.
            sigmas: noise levels of the states, likewise; with ``timesteps`` too, as many of one as of the other.
            num_images: samples of each observation.
            solver_iterations: steps of conjugate gradients.
            data_std: scale of the data, in pigdm's covariance and above max_noise.
            max_noise: noise level sigma/alpha above which the covariance is isotropic instead of the network's; inf
                for an exact oracle.
            dps_scale: step of dps, published for 1000 steps; more for fewer.
            guidance_scale: classifier-free guidance of the prior.
            mu: shift of a flow model with dynamic shifting.
            generator: of all noise; one, or one for each sample.
            latents: the noise to start from, (N num_images, C, H, W).
            output_type: pil, np, pt (in 0..1) or latent (the state, in the model's units).
            return_dict: False returns a tuple.

        Returns:
            ``ImagePipelineOutput`` with ``images``, N num_images of them, or ``(images,)``.

        Raises:
            ValueError: for wrong inputs, before any evaluation.
        """
        check_output_type(output_type)
        check_method(method, data_std, solver_iterations, max_noise, dps_scale)
        check_whole("num_images", num_images)
        if method == "projection" and self.vae is not None:
            raise ValueError("Projection replaces pixels, not latents: use method='mmps', 'pigdm' or 'dps'.")
        device, count = self.unet.device, len(observation)
        y = observation.to(device, torch.float32)
        check_observation(operator, y, noise_std, torch.zeros(1, *self._pixel_shape(), device=device))
        labels = label_tensor(self.unet, class_labels, count)
        labels = None if labels is None else labels.repeat_interleave(num_images)
        field = network_field(self.unet, self.scheduler.config, labels, guidance_scale)
        scheduler = self.scheduler
        if not isinstance(scheduler, TableScheduler) or isinstance(scheduler, FlowMapScheduler):  # a jump is no solver
            scheduler = ReverseSDEScheduler.from_config(scheduler.config)
        lay_out_grid(scheduler, num_inference_steps, device, timesteps, sigmas, mu)
        to_pixels = None if self.vae is None else lambda z: from_latents(self.vae, z)
        measurement = Measurement(operator, y.repeat_interleave(num_images, dim=0), noise_std, to_pixels)
        x = initial_noise(self.unet, scheduler, count * num_images, generator, latents).float()
        times, points = scheduler.levels.time.tolist(), points_of(scheduler.levels)
        for row, t in enumerate(self.progress_bar(scheduler.timesteps)):
            point = points[row]
            mean, gradient = conditional_mean(
                field,
                x,
                point,
                measurement,
                method=method,
                data_std=data_std,
                iterations=solver_iterations,
                max_noise=max_noise,
                time=times[row],
            )
            k_x, k_d = to_model(field.path, field.prediction_type, point.alpha, point.sigma)
            x = scheduler.step(k_x * x + k_d * mean, t, x, generator=generator, return_dict=False)[0]
            if method == "dps":
                x = x - dps_scale * gradient
            if method == "projection":
                z = randn_tensor(x.shape, generator=generator, device=device, dtype=x.dtype)
                x = project(x, points[row + 1], measurement, z, solver_iterations)
        with torch.no_grad():
            images = from_state(x, self.vae, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _pixel_shape(self) -> tuple[int, ...]:
        shape = sample_shape(self.unet)
        if self.vae is None:
            return shape
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return (self.vae.config.out_channels, shape[1] * scale, shape[2] * scale)
