r"""Inference-time control: pictures from the tilted law ``p(x) exp(beta r(x)) / Z`` for any reward r.

Twisted sequential Monte Carlo (Feynman-Kac steering; Wu et al. 2023, arXiv:2306.17775; Singhal et al. 2025,
arXiv:2501.06848): particles follow the scheduler's exact Gaussian transition ``x' ~ N(mean, std^2)``, weighted by

    psi_{k+1}(x') / psi_k(x) * N(x'; mean, std^2) / q(x'),        psi_k(x) = exp(beta r(D(x, t_k))),

q the proposal: the transition itself for a black-box reward, shifted by ``std^2 grad log psi_k`` for a differentiable
one.  They are resampled where their effective sample size falls.  Unlike guidance alone this is consistent: with more
particles it converges to the tilted law.  Several populations run independently, so that error bars are known.

```python
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

from diffusers_sde import ReverseSDEScheduler
from diffusers_sde.assets import FASHION_MODEL

pipe = DiffusionPipeline.from_pretrained(
    FASHION_MODEL, custom_pipeline="pipelines/steering.py", trust_remote_code=True
)
pipe.scheduler = ReverseSDEScheduler.from_config(pipe.scheduler.config)


def brightness(images):
    return images.mean((1, 2, 3))


rows = []
for beta in (-60, 0, 60):
    out = pipe(
        brightness,
        class_labels=[2] * 4,  # pullovers, four populations of particles
        beta=beta,
        num_particles=6,
        num_inference_steps=10,
        generator=torch.Generator().manual_seed(0),
    )
    print(f"beta {beta}: E r = {out.mean_reward:.3f} +- {out.mean_reward_error:.3f}")
    rows += out.images
image = make_image_grid(rows, 3, 4).resize((512, 384))
```
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from diffusers_sde import TableScheduler
from diffusers_sde.errors import check_finite, check_whole, is_real
from diffusers_sde.methods.control import (
    Particles,
    best_of,
    draw,
    estimate,
    log_normalizer,
    scheduler_kernel,
    twisted_smc,
)
from diffusers_sde.methods.pipeline_io import check_output_type, initial_noise, label_tensor, pictures
from diffusers_sde.sampling import network_denoiser


@dataclass
class SteeringOutput(BaseOutput):
    """What P populations found.

    Args:
        images: one of each population, drawn by weight (the best for best_of_n).
        rewards: theirs (P,).
        mean_reward: the estimate of ``E[r]`` under the tilted law (with several labels, of the law that draws the label
            too).
        mean_reward_error: its standard error, NaN for one population.
        log_normalizer: the estimate of ``log E[exp(beta r)]``.
        log_normalizer_error: its standard error, NaN for one population.
        particles: everything (:class:`diffusers_sde.methods.control.Particles`), in the latents' range.
    """

    images: Any
    rewards: torch.Tensor
    mean_reward: float
    mean_reward_error: float
    log_normalizer: float
    log_normalizer_error: float
    particles: Particles


class SteeringPipeline(DiffusionPipeline):
    """Twisted sequential Monte Carlo.

    Args:
        unet: a ``UNet2DModel``-like network or a mixture.
        scheduler: a stochastic one of diffusers_sde.
    """

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    def __call__(
        self,
        reward: Callable[[torch.Tensor], torch.Tensor],
        class_labels: Any = None,
        num_images: int | None = None,
        num_particles: int = 16,
        beta: float = 1.0,
        method: str = "smc",
        use_gradient: bool = False,
        schedule: Sequence[float] | None = None,
        resample_threshold: float = 0.5,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.0,
        max_batch_size: int = 64,
        generator: torch.Generator | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> SteeringOutput | tuple[Any, torch.Tensor]:
        """Generate one picture per label, each from its own population of particles.

        Args:
            reward: ``reward(images)`` from (M, C, H, W) in -1..1 to (M,), also of blurred predictions.
            class_labels: a label or its name, several, or None for no class.
            num_images: number of pictures; None: as many as there are labels.
            num_particles: of each population.
            beta: strength of the tilt; finite.
            method: smc, or best_of_n (plain samples, the best kept).
            use_gradient: propose along the gradient of the reward, which must be differentiable.
            schedule: beta_k/beta of each step; 0: no twist yet.  None: 1.
            resample_threshold: fraction of num_particles below which an effective sample size leads to resampling.
            num_inference_steps: network evaluations of each particle.
            guidance_scale: classifier-free guidance of the sampler that is tilted.
            max_batch_size: of one network call.
            generator: of all noise and resampling.
            latents: unit noise (num_images, num_particles, C, H, W).
            output_type: pil, np, pt (in 0..1) or latent (the state, in the model's units).
            return_dict: False returns a tuple.

        Returns:
            :class:`SteeringOutput`, or ``(images, rewards)``.

        Raises:
            ValueError: for a scheduler without a Gaussian transition, and for wrong rewards and inputs.
        """
        self._check(method, num_particles, beta, output_type, generator)
        for name, number in (("num_images", num_images), ("max_batch_size", max_batch_size)):
            if number is not None:
                check_whole(name, number)
        check_finite("resample_threshold", resample_threshold)
        if schedule is not None and not (isinstance(schedule, Iterable) and all(map(is_real, schedule))):
            raise ValueError(f"schedule must hold numbers, one a step, not {schedule!r}.")
        labels = label_tensor(self.unet, class_labels, num_images)
        populations = (num_images or 1) if labels is None else len(labels)
        total = populations * num_particles
        if latents is not None and tuple(latents.shape[:2]) != (populations, num_particles):
            raise ValueError(
                f"latents begin with {tuple(latents.shape[:2])}, expected ({populations}, {num_particles}): "
                "(images, particles, C, H, W)."
            )
        flat = None if latents is None else latents.flatten(0, 1)
        x = initial_noise(self.unet, self.scheduler, total, generator, flat).unflatten(0, (populations, num_particles))
        of_particles = None if labels is None else labels.repeat_interleave(num_particles)
        self.scheduler.set_timesteps(num_inference_steps, device=x.device)
        with self.progress_bar(total=num_inference_steps) as bar:
            particles = twisted_smc(
                scheduler_kernel(self._denoiser(of_particles, guidance_scale, max_batch_size), self.scheduler),
                reward,
                x,
                steps=num_inference_steps,
                beta=beta if method == "smc" else 0.0,
                gradient=use_gradient,
                schedule=schedule,
                threshold=resample_threshold,
                generator=generator,
                reorder=self.scheduler.reorder,
                callback=bar.update,
            )
        chosen = draw(particles, generator) if method == "smc" else best_of(particles)
        population = torch.arange(populations, device=chosen.device)
        images = pictures(particles.samples[population, chosen], output_type)
        rewards = particles.rewards[population, chosen]
        if not return_dict:
            return images, rewards
        values = particles.rewards if method == "smc" else rewards[:, None].expand_as(particles.rewards)
        mean, error = estimate(values, particles)
        return SteeringOutput(
            images, rewards, float(mean), float(error), *log_normalizer(particles), particles=particles
        )

    def _check(self, method: str, num_particles: int, beta: float, output_type: str, generator: Any) -> None:
        if not isinstance(self.scheduler, TableScheduler) or not self.scheduler.stochastic:
            raise ValueError(
                f"{type(self.scheduler).__name__} has no noise with a known law to steer by: use pipe.scheduler = "
                "ReverseSDEScheduler.from_config(pipe.scheduler.config)."
            )
        if method not in ("smc", "best_of_n"):
            raise ValueError(f"method {method!r} is unknown: use smc or best_of_n.")
        check_whole("num_particles", num_particles)
        check_finite("beta", beta)
        if isinstance(generator, list | tuple):
            raise ValueError("Particles share their noise source: pass one generator, not a list.")
        check_output_type(output_type)

    def _denoiser(
        self, labels: torch.Tensor | None, guidance_scale: float, max_batch_size: int
    ) -> Callable[[torch.Tensor, Any], torch.Tensor]:
        """The network on at most ``max_batch_size`` particles at a time."""
        pieces = [None] if labels is None else labels.split(max_batch_size)
        denoisers = [network_denoiser(self.unet, piece, guidance_scale) for piece in pieces]

        def denoise(x: torch.Tensor, t: Any) -> torch.Tensor:
            batches = x.split(max_batch_size)
            return torch.cat([denoisers[i % len(denoisers)](batch, t) for i, batch in enumerate(batches)])

        return denoise
