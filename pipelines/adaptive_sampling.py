r"""Text or classes to pictures with as many steps as their error needs: the user says a tolerance, no number of steps.

Each step of the probability-flow ODE is taken with exponential Adams methods of orders p and p + 1 on the same
evaluations, whose difference says the error; steps and orders are chosen by it
(:mod:`diffusers_sde.methods.adaptive` has the formulas).  The tolerance is in the model's units: pixels in -1..1, or
latents.  Each picture has steps of its own; ``reports`` says how many were accepted and rejected, and where.

```python
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

from diffusers_sde.assets import FASHION_MODEL

pipe = DiffusionPipeline.from_pretrained(
    FASHION_MODEL, custom_pipeline="pipelines/adaptive_sampling.py", trust_remote_code=True
)
rows, evaluations = [], []
for tolerance in (0.3, 0.03):
    made = pipe(class_labels=[0, 7, 8], tolerance=tolerance, generator=torch.Generator().manual_seed(0))
    rows += made.images
    evaluations.append([report.evaluations for report in made.reports])
image = make_image_grid(rows, 2, 3).resize((288, 192))
```
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from diffusers_sde.generation import AdaptiveOutput, known_pipeline, sample_adaptive


class AdaptiveSamplingPipeline(DiffusionPipeline):
    """Sample to a tolerance.

    Args:
        unet: of Stable Diffusion, or without the other parts a ``UNet2DModel``-like network or a mixture.
        scheduler: any of diffusers or of this package that does not fix its steps in advance; only its forward process
            is used.
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
        tolerance: float = 1e-2,
        num_images: int | None = None,
        guidance_scale: float | None = None,
        max_evaluations: int = 1000,
        generator: Any = None,
        latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> AdaptiveOutput | tuple[Any, list[Any]]:
        """Generate pictures.

        Args:
            prompt, class_labels, tolerance, num_images, guidance_scale, max_evaluations, generator, latents, height,
                width, output_type: as :func:`diffusers_sde.generation.sample_adaptive` takes them.
            return_dict: False returns a tuple.

        Returns:
            :class:`diffusers_sde.generation.AdaptiveOutput` or its tuple.

        Raises:
            ValueError: for wrong inputs and for a scheduler that fixes its steps, before any evaluation.
        """
        out = sample_adaptive(
            known_pipeline(self),
            prompt,
            tolerance=tolerance,
            class_labels=class_labels,
            num_images=num_images,
            guidance_scale=guidance_scale,
            max_evaluations=max_evaluations,
            generator=generator,
            latents=latents,
            height=height,
            width=width,
            output_type=output_type,
        )
        return out if return_dict else out.to_tuple()
