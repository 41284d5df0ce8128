"""A pipeline for class-conditional networks, which diffusers has only with a transformer and an autoencoder.

Knows diffusers' conventions for a pipeline's call, and which scheduler is told a learned variance.  Knows no loop, no
guidance and no scheduler of its own: those are :mod:`diffusers_sde.sampling`'s and the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, DiffusionPipeline, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from diffusers_sde.errors import is_whole
from diffusers_sde.methods.pipeline_io import check_output_type, label_tensor, pictures, unit_noise
from diffusers_sde.sampling import Denoiser, class_names, flow_map_denoiser, lay_out, network_denoiser, sample
from diffusers_sde.schedulers import FlowMapScheduler

GUIDANCE = 2.0  # of labels, if the caller names none


class ClassConditionalPipeline(DiffusionPipeline):
    """Pictures of classes, by their names or numbers: ``pipe("sneaker").images[0]``.

    Args:
        unet: a ``UNet2DModel`` whose last class of ``num_class_embeds`` means none, with the names of the others in its
            config (:func:`diffusers_sde.sampling.class_names`); a network without classes; a
            :class:`FlowMapUNet2DModel`; or a mixture.
        scheduler: any, of this package or of diffusers.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def class_names(self) -> list[str] | None:
        """The names that labels may have, in the order of their numbers; None: they have none."""
        return class_names(self.unet)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any = None,
        num_images: int | None = None,
        num_images_per_label: int = 1,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate pictures.

        Args:
            class_labels: a name or number, several, or a tensor of numbers; None: no class.
            num_images: pictures of one label or of none; None: one for each label.
            num_images_per_label: times each of these, one after the other.
            num_inference_steps: of the scheduler's grid.
            guidance_scale: of classifier-free guidance, 1: none.  None: 2 for labels, where the network has a class
                that means none and no guidance built in.
            generator: of all noise; one, or one for each picture.
            latents: the noise to start from, unit normals (N, C, H, W).
            output_type: pil, np, pt (in 0..1) or latent (the last state, in the model's units).
            return_dict: False returns a tuple.
            callback_on_step_end: ``callback(pipe, step, timestep, {"latents": state})`` after each step; ``latents``
                in what it returns are gone on from.
            callback_on_step_end_tensor_inputs: what it is given, ``["latents"]`` or nothing.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or ``(images,)``.

        Raises:
            ValueError: for labels that the network does not have, guidance that it cannot give and wrong inputs.
        """
        check_output_type(output_type)
        counts = {"num_images": num_images, "num_images_per_label": num_images_per_label}
        for name, number in counts.items():
            if number is not None and not (is_whole(number) and number > 0):
                raise ValueError(f"{name} must be a whole number of at least 1, not {number!r}.")
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if not set(callback_on_step_end_tensor_inputs) <= set(self._callback_tensor_inputs):
            known, asked = self._callback_tensor_inputs, list(callback_on_step_end_tensor_inputs)
            raise ValueError(f"callback_on_step_end_tensor_inputs may have {known}, not {asked}.")
        labels = label_tensor(self.unet, class_labels, num_images)
        if labels is not None:
            labels = labels.repeat_interleave(num_images_per_label).to(self._execution_device)
        denoiser = self._denoiser(labels, guidance_scale, default=1.0 if class_labels is None else GUIDANCE)
        count = (num_images or 1) * num_images_per_label if labels is None else len(labels)
        scheduler, device = self.scheduler, self._execution_device
        noise = unit_noise(self.unet, count, generator, latents, device).to(self.unet.dtype)
        lay_out(scheduler, num_inference_steps, device)

        def on_step_end(step: int, timestep: Any, state: torch.Tensor) -> torch.Tensor:
            if callback_on_step_end is None:
                return state
            values = {name: state for name in callback_on_step_end_tensor_inputs}
            return (callback_on_step_end(self, step, timestep, values) or {}).get("latents", state)

        with self.progress_bar(total=len(scheduler.timesteps)) as bar:
            state = sample(
                denoiser, scheduler, noise, generator=generator, callback=bar.update, on_step_end=on_step_end
            )
        images = pictures(state, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _denoiser(self, labels: torch.Tensor | None, guidance_scale: float | None, default: float) -> Denoiser:
        """The guided network, whose learned variance goes to those schedulers only that sample with it."""
        scheduler, channels = self.scheduler, self.unet.config.in_channels
        if isinstance(scheduler, FlowMapScheduler):
            if guidance_scale not in (None, 1.0):
                raise ValueError("The guidance of a flow map is built in: leave out guidance_scale.")
            return flow_map_denoiser(self.unet, scheduler, labels)
        denoiser = network_denoiser(self.unet, labels, default if guidance_scale is None else guidance_scale)
        ancestral = isinstance(scheduler, DDPMScheduler | DDPMParallelScheduler)
        if ancestral and scheduler.config.variance_type in ("learned", "learned_range"):
            return denoiser
        return lambda x, t: denoiser(x, t)[:, :channels]
