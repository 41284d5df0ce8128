r"""Few-step generation with consistency, CTM and MeanFlow models.

One network evaluation jumps along the probability-flow ODE from time t to time s,

    X(x_t, t, s) = alpha_s D + sigma_s eps,        D, eps from the network's output m(x_t, t[, s]),

and between jumps the sample is re-noised by ``gamma`` (CTM, Kim et al. 2023, arXiv:2310.02279, algorithm 3): jump to
``(sigma/alpha)_u = sqrt(1 - gamma^2) (sigma/alpha)_next``, then add noise of standard deviation ``gamma sigma_next``.
gamma = 1 is the multistep sampler of consistency models (Song et al. 2023, arXiv:2303.01469, algorithm 1), gamma = 0
deterministic jumps, for networks that know their target (MeanFlow, Geng et al. 2025, arXiv:2505.13447).

Usage, with the embedded flow map or another model of ``diffusers_sde.train --objective mean_flow`` or ``consistency``:

```python
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

from diffusers_sde.assets import FLOW_MAP_MODEL

pipe = DiffusionPipeline.from_pretrained(
    FLOW_MAP_MODEL, custom_pipeline="pipelines/flow_map.py", trust_remote_code=True
)
rows = []
for steps in (1, 2, 4):
    generator = torch.Generator().manual_seed(0)
    rows += pipe(class_labels=range(0, 10, 2), num_inference_steps=steps, generator=generator).images
image = make_image_grid(rows, 3, 5).resize((480, 288))
```
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from diffusers_sde import FlowMapScheduler
from diffusers_sde.errors import check_whole
from diffusers_sde.methods.pipeline_io import check_output_type, initial_noise, label_tensor, lay_out_grid, pictures
from diffusers_sde.sampling import flow_map_denoiser


class FlowMapPipeline(DiffusionPipeline):
    """Jump and re-noise.

    Args:
        unet: a ``UNet2DModel``, or a ``FlowMapUNet2DModel`` that is also given the target time.
        scheduler: a :class:`diffusers_sde.FlowMapScheduler`.
    """

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any = None,
        num_inference_steps: int = 2,
        batch_size: int | None = None,
        timesteps: Any = None,
        generator: Any = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one picture per label; gamma and the kind of map are the scheduler's.

        Args:
            class_labels: a label or its name, several, or None for no class.
            num_inference_steps: network evaluations.
            batch_size: number of pictures; None: as many as there are labels.
            timesteps: what to evaluate the network at, from noise to data, instead of a number of steps.
            generator: of the first noise and of the re-noising; one, or one for each picture.
            latents: unit noise (N, C, H, W).
            output_type: pil, np, pt (in 0..1) or latent (the state, in the model's units).
            return_dict: False returns a tuple.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or ``(images,)``.

        Raises:
            ValueError: for a scheduler of another kind and for wrong inputs, before any evaluation.
        """
        if not isinstance(self.scheduler, FlowMapScheduler):
            raise ValueError(
                f"{type(self.scheduler).__name__} cannot jump: use pipe.scheduler = FlowMapScheduler.from_config("
                "pipe.scheduler.config, flow_map='consistency') or flow_map='mean_flow', as the model was trained."
            )
        check_output_type(output_type)
        if batch_size is not None:
            check_whole("batch_size", batch_size)
        labels = label_tensor(self.unet, class_labels, batch_size)
        batch = (batch_size or 1) if labels is None else len(labels)
        scheduler = self.scheduler
        x = initial_noise(self.unet, scheduler, batch, generator, latents)
        lay_out_grid(scheduler, num_inference_steps, x.device, timesteps)
        denoiser = flow_map_denoiser(self.unet, scheduler, labels)
        for t in self.progress_bar(scheduler.timesteps):
            m = denoiser(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(m, t, x, generator=generator, return_dict=False)[0]
        images = pictures(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
