r"""Picture to noise and back, for editing and interpolation, along the probability-flow ODE of any model.

``method="exact"`` is the time-symmetric leapfrog of :mod:`diffusers_sde.methods.inversion` in the normalised state
``z = x / sqrt(c^2 alpha^2 + sigma^2)`` and the angle ``theta = atan(sigma / (c alpha))``,

    z_{i+1} = z_{i-1} + (theta_{i+1} - theta_{i-1}) V(z_i, theta_i),    V = cos(theta) eps - sin(theta) D/c,

which retraces its own states: the picture comes back up to rounding with any number of steps, with and without
guidance.  What makes it exact is the pair of its last two states, ``latents`` and ``companion``.
``method="ode"`` is the high-order table of ``ProbabilityFlowScheduler`` run backwards: one noise, and a round trip
as accurate as the ODE solver.

Usage, in a clone of the repository:

```python
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from diffusers_sde import ProbabilityFlowScheduler
from diffusers_sde.assets import FASHION_MODEL
from diffusers_sde.methods.pipeline_io import pictures
from diffusers_sde.sampling import network_denoiser, sample

pipe = DiffusionPipeline.from_pretrained(
    FASHION_MODEL, custom_pipeline="pipelines/inversion.py", trust_remote_code=True
)

# four pictures to edit: here the model's own
labels = torch.tensor([0, 3, 7, 2])
scheduler = ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
scheduler.set_timesteps(15)
noise = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
originals = pictures(sample(network_denoiser(pipe.unet, labels, 2.0), scheduler, noise), "pil")

steps = {"num_inference_steps": 24}
same = pipe(originals, labels, **steps).images
edited = pipe(originals, labels, target_labels=[3, 2, 9, 4], target_guidance_scale=2.0, strength=0.8, **steps).images
between = pipe.interpolate(originals[0], originals[2], class_labels=[0, 7], num_images=4, **steps).images

# rows: pictures, round trip, edited; from the first picture to the third
image = make_image_grid([tile.resize((64, 64)) for tile in originals + same + edited + between], rows=4, cols=4)
```
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.utils import BaseOutput

from diffusers_sde.configs import path_from_config
from diffusers_sde.errors import check_finite, check_whole
from diffusers_sde.methods.fields import Field, network_field, wide_dtype
from diffusers_sde.methods.images import from_state, to_state
from diffusers_sde.methods.inversion import Trajectory, inversion_points, multistep, reversible, slerp
from diffusers_sde.methods.pipeline_io import check_output_type, label_tensor
from diffusers_sde.stock_configs import canonical_config
from diffusers_sde.weights import Point


@dataclass
class InversionOutput(BaseOutput):
    """Pictures, and the noise they came from.

    Args:
        images: of the requested type.
        latents: the noise found (N, C, H, W), float64 (where the device has it).
        companion: for the exact method the state one step before the noise, of the same shape; else None.
    """

    images: Any
    latents: torch.Tensor
    companion: torch.Tensor | None


class InversionPipeline(DiffusionPipeline):
    """Invert, edit and interpolate.

    Args:
        unet: a ``UNet2DModel``-like network or a mixture.
        scheduler: any of diffusers or of this package; only its forward process is used.
        vae: the autoencoder whose latents the network knows; None: pixels.
    """

    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(self, unet: Any, scheduler: Any, vae: AutoencoderKL | None = None):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        image: Any,
        class_labels: Any = None,
        target_labels: Any = None,
        guidance_scale: float = 1.0,
        target_guidance_scale: float | None = None,
        num_inference_steps: int = 50,
        strength: float = 1.0,
        method: str = "exact",
        data_std: float = 0.5,
        mu: float | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> InversionOutput | tuple[Any, torch.Tensor, torch.Tensor | None]:
        """Invert ``image`` and generate from what was found.

        Args:
            image: PIL images, an array (N, H, W, C) in 0..1, or a tensor (N, C, H, W) in the model's units.
            class_labels: the classes of the images (labels or names), one or one for each; None: no class.
            target_labels: the classes to generate; None: as in the inversion, which gives the image back.
            guidance_scale: classifier-free guidance of the inversion; 1 (none) suits editing.
            target_guidance_scale: that of the generation; None: as in the inversion.
            num_inference_steps: steps each way; a step is one evaluation (two with guidance).
            strength: how far towards noise to go, in (0, 1]; less than 1 keeps more of the image.
            method: exact (reversible, second order) or ode (multistep table with corrector).
            data_std: data scale c of the exact method.
            mu: shift of a flow model with dynamic shifting.
            output_type: pil, np, pt (in 0..1) or latent (the state, in the model's units).
            return_dict: False returns a tuple.

        Returns:
            :class:`InversionOutput` or its tuple.

        Raises:
            ValueError: for wrong inputs, before any evaluation.
        """
        check_output_type(output_type)
        if target_guidance_scale is not None:
            check_finite("target_guidance_scale", target_guidance_scale)
        state = self._state(image)
        points = self._points(num_inference_steps, strength, method, mu)
        source = self._field(class_labels, len(state), guidance_scale)
        labels = class_labels if target_labels is None else target_labels
        scale = guidance_scale if target_guidance_scale is None else target_guidance_scale
        target = self._field(labels, len(state), scale)
        noise = self._run(source, self._at(state, points[0]), points, method, data_std)
        result = self._run(target, noise, points[::-1], method, data_std)
        images = from_state(result.state / points[0].alpha, self.vae, output_type)
        out = InversionOutput(images=images, latents=noise.state, companion=noise.companion)
        return out if return_dict else out.to_tuple()

    @torch.no_grad()
    def interpolate(
        self,
        first: Any,
        last: Any,
        class_labels: Any = None,
        num_images: int = 8,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 50,
        method: str = "exact",
        data_std: float = 0.5,
        mu: float | None = None,
        output_type: str = "pil",
    ) -> InversionOutput:
        """Pictures between two: slerp between their noises, both ends included; with ``method="exact"`` the ends are
        the two pictures.

        Args:
            first: one image, as in :meth:`__call__`.
            last: another one.
            class_labels: one label or one for each end (each picture then has that of the nearer end); None: no class.
            num_images: 2 or more.
            guidance_scale: classifier-free guidance, both ways.
            num_inference_steps: steps each way.
            method: exact or ode.
            data_std: data scale c of the exact method.
            mu: shift of a flow model with dynamic shifting.
            output_type: pil, np, pt (in 0..1) or latent (the state, in the model's units).

        Returns:
            :class:`InversionOutput` with num_images pictures and the noises between.

        Raises:
            ValueError: for wrong inputs, before any evaluation.
        """
        check_output_type(output_type)
        check_whole("num_images", num_images, 2)  # both ends
        state = torch.cat([self._state(first), self._state(last)])
        if len(state) != 2:
            raise ValueError(f"Interpolation takes one image at each end, not {len(state)} in all.")
        points = self._points(num_inference_steps, 1.0, method, mu)
        labels = label_tensor(self.unet, class_labels, 2)
        weights = torch.linspace(0, 1, num_images).tolist()
        nearer = None if labels is None else labels[[int(w > 0.5) for w in weights]]
        source = self._field(labels, 2, guidance_scale)
        target = self._field(nearer, num_images, guidance_scale)
        noise = self._run(source, self._at(state, points[0]), points, method, data_std)
        companion = None if noise.companion is None else _between(noise.companion, weights)
        between = Trajectory(_between(noise.state, weights), companion, noise.points)
        result = self._run(target, between, points[::-1], method, data_std)
        images = from_state(result.state / points[0].alpha, self.vae, output_type)
        return InversionOutput(images=images, latents=between.state, companion=between.companion)

    def _state(self, image: Any) -> torch.Tensor:
        return to_state(image, self.unet, self.vae, wide_dtype(self.unet.device))

    def _at(self, state: torch.Tensor, point: Point) -> Trajectory:
        """A picture taken for the state at the smallest training noise (it has next to none)."""
        return Trajectory(state * point.alpha, None, (point,))

    def _field(self, labels: Any, count: int, guidance_scale: float) -> Field:
        labels = label_tensor(self.unet, labels, count)
        return network_field(self.unet, self.scheduler.config, labels, guidance_scale)

    def _points(self, steps: int, strength: float, method: str, mu: float | None) -> tuple[Point, ...]:
        if method not in ("exact", "ode"):
            raise ValueError(f"method must be 'exact' or 'ode', not {method!r}.")
        return inversion_points(path_from_config(canonical_config(self.scheduler.config)), steps, strength, mu)

    def _run(
        self, field: Field, start: Trajectory, points: Sequence[Point], method: str, data_std: float
    ) -> Trajectory:
        beyond_one_a_step = 0 if method == "ode" else 1 if start.companion is None else -1
        with self.progress_bar(total=len(points) - 1 + beyond_one_a_step) as bar:
            if method == "exact":
                return reversible(field, start, points, data_std=data_std, callback=bar.update)
            return multistep(field, start, points, callback=bar.update)


def _between(pair: torch.Tensor, weights: Sequence[float]) -> torch.Tensor:
    return torch.cat([slerp(pair[:1], pair[1:], w) for w in weights])
