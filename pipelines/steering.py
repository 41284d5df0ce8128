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
from diffusers_sde.assets import DEFAULT_MODEL

pipe = DiffusionPipeline.from_pretrained(
    DEFAULT_MODEL, custom_pipeline="pipelines/steering.py", trust_remote_code=True
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

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

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
from diffusers_sde.schedulers import TableScheduler


@dataclass
class SteeringOutput(BaseOutput):
    """images: one of each population, drawn by weight (the best for best_of_n); rewards (P,): theirs.

    mean_reward, mean_reward_error: the estimate of ``E[r]`` under the tilted law and its standard error (NaN for one
    population; with several labels, of the law that draws the label too); log_normalizer, log_normalizer_error: of
    ``log E[exp(beta r)]``; particles: everything (:class:`diffusers_sde.methods.control.Particles`), in the latents'
    range.
    """

    images: Any
    rewards: torch.Tensor
    mean_reward: float
    mean_reward_error: float
    log_normalizer: float
    log_normalizer_error: float
    particles: Particles


class SteeringPipeline(DiffusionPipeline):
    """Twisted sequential Monte Carlo with ``unet`` and a stochastic scheduler of diffusers_sde."""

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
        """Generate one picture per label, each from its own population of ``num_particles``.

        Args: ``reward(images)`` from (M, C, H, W) in [-1, 1] to (M,), also of blurred predictions; ``beta`` strength of
        the tilt; ``method`` smc or best_of_n (plain samples, the best kept); ``use_gradient`` for differentiable
        rewards; ``schedule`` beta_k/beta of each step (0: no twist yet); ``resample_threshold`` fraction of
        num_particles; ``guidance_scale`` classifier-free guidance of the sampler that is tilted; ``max_batch_size`` of
        one network call; ``latents`` unit noise (num_images, num_particles, C, H, W).
        Raises ``ValueError`` for a scheduler without a Gaussian transition, and for wrong rewards and inputs.
        """
        self._check(method, num_particles, beta, output_type, generator)
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
        own = None if labels is None else labels.repeat_interleave(num_particles)
        self.scheduler.set_timesteps(num_inference_steps, device=x.device)
        with self.progress_bar(total=num_inference_steps) as bar:
            particles = twisted_smc(
                scheduler_kernel(self._denoiser(own, guidance_scale, max_batch_size), self.scheduler),
                reward,
                x,
                steps=num_inference_steps,
                beta=beta if method == "smc" else 0.0,
                gradient=use_gradient,
                schedule=schedule,
                threshold=resample_threshold,
                generator=generator,
                reorder=self.scheduler.reorder,
                tick=bar.update,
            )
        chosen = draw(particles, generator) if method == "smc" else best_of(particles)
        every = torch.arange(populations, device=chosen.device)
        images = pictures(particles.samples[every, chosen], output_type)
        rewards = particles.rewards[every, chosen]
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
        if num_particles < 1:
            raise ValueError(f"num_particles must be at least 1, not {num_particles}.")
        if not abs(beta) < float("inf"):
            raise ValueError(f"beta must be a finite number, not {beta}.")
        if isinstance(generator, list | tuple):
            raise ValueError("Particles share their noise source: pass one generator, not a list.")
        check_output_type(output_type)

    def _denoiser(
        self, labels: torch.Tensor | None, guidance_scale: float, max_batch_size: int
    ) -> Callable[[torch.Tensor, Any], torch.Tensor]:
        """The network on at most ``max_batch_size`` particles at a time."""
        pieces = [None] if labels is None else labels.split(max_batch_size)
        calls = [network_denoiser(self.unet, piece, guidance_scale) for piece in pieces]

        def denoise(x: torch.Tensor, t: Any) -> torch.Tensor:
            parts = x.split(max_batch_size)
            return torch.cat([calls[i % len(calls)](part, t) for i, part in enumerate(parts)])

        return denoise
