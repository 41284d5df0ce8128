r"""Text or classes to pictures with many steps at once, the pictures of the steps one after the other.

A run ``x_{i+1} = step_i(x_i; E_i, E_{i-1}, ...)`` is the fixed point of the map that evaluates the network at guesses
of all its states in one batch and takes the steps again on these evaluations (Picard iterations; ParaDiGMS, Shih et
al. 2023, arXiv:2305.16317), accelerated by Anderson's method (ParaTAA, Tang et al. 2024, arXiv:2402.09970) and begun,
if wanted, with a coarse solve (SRDS, Selvam et al. 2024, arXiv:2412.08292); :mod:`diffusers_sde.methods.parallel` has
the map.  It holds for every scheduler of this package; for a ``ReverseSDEScheduler`` too, whose Brownian path is fixed
before the run.  n steps take n rounds at most.

It makes a run shorter on devices that evaluate a batch about as fast as one state, and over several of them
(``split=True`` under ``accelerate launch``).  It makes it longer where a batch costs in proportion to its size, as on a
CPU, and with few steps: below 20 there is little to win.

```python
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

from diffusers_sde.assets import DEFAULT_MODEL

pipe = DiffusionPipeline.from_pretrained(
    DEFAULT_MODEL, custom_pipeline="pipelines/parallel_sampling.py", trust_remote_code=True
)
made = []
for tolerance in (0.2, 0.0):  # the second one is what ten steps one after the other make
    generator = torch.Generator().manual_seed(0)
    made.append(pipe("red apple", num_inference_steps=10, guidance_scale=3.0, generator=generator, tolerance=tolerance))
image = make_image_grid([out.images[0] for out in made], 1, 2)
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from diffusers_sde.generation import ParallelOutput, known_pipeline, sample_parallel


class ParallelSamplingPipeline(DiffusionPipeline):
    """Sample in parallel in time.

    Args:
        unet: of Stable Diffusion, or without the other parts a ``UNet2DModel``-like network or a mixture.
        scheduler: one of this package is used as it is; the process of any other one is sampled by
            ``ProbabilityFlowScheduler``.
        vae, text_encoder, tokenizer: of Stable Diffusion.
    """

    _optional_components = ["vae", "text_encoder", "tokenizer"]  # noqa: RUF012

    def __init__(
        self,
        unet: Any,
        scheduler: Any,
        vae: AutoencoderKL | None = None,
        text_encoder: Any = None,
        tokenizer: Any = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        class_labels: Any = None,
        num_images: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        window: int | None = None,
        tolerance: float | Sequence[float] = 1e-2,
        acceleration: int = 1,
        predictor_steps: int = 1,
        split: bool = False,
        generator: Any = None,
        latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ParallelOutput | tuple[Any, int, list[int]]:
        """Generate pictures.

        Args:
            prompt, class_labels, num_images, num_inference_steps, guidance_scale, window, tolerance, acceleration,
                predictor_steps, split, generator, latents, height, width, output_type: as
                :func:`diffusers_sde.generation.sample_parallel` takes them.
            return_dict: False returns a tuple.

        Returns:
            :class:`diffusers_sde.generation.ParallelOutput` or its tuple.

        Raises:
            ValueError: for wrong inputs, before any evaluation.
        """
        out = sample_parallel(
            known_pipeline(self),
            prompt,
            class_labels=class_labels,
            num_images=num_images,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            window=window,
            tolerance=tolerance,
            acceleration=acceleration,
            predictor_steps=predictor_steps,
            split=split,
            generator=generator,
            latents=latents,
            height=height,
            width=width,
            output_type=output_type,
        )
        return out if return_dict else out.to_tuple()
