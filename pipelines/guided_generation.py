r"""Class-conditional generation with every kind of guidance, in ODE and SDE form.

With predictions ``m_y`` (label y) and ``m_0`` (no label), the guided one is

    m = m_0 + w (m_y - m_0)                                  classifier-free guidance (arXiv:2207.12598), scale w
    w -> w / (1 - exp(-h)), 0 < w <= 1                       CFG++ (arXiv:2406.08070), h the step of log(alpha/sigma)
    w -> 1 outside (sigma/alpha) in [low, high]              guidance interval (arXiv:2404.07724)
    m -> blend of m and m std(m_y)/std(m)                    rescale (arXiv:2305.08891)
    D = D_y + (w - 1) (D_y - D_0 orthogonal to D_y)          APG (arXiv:2410.02416), on data predictions
    m_0 -> the prediction of a weaker model                  autoguidance (arXiv:2406.02507)
    D -> D + s sigma^2/alpha grad log p_t(y | x_t)           classifier guidance (arXiv:2105.05233), scale s

Langevin corrector steps (predictor-corrector sampling, arXiv:2011.13456) and Restart (arXiv:2306.14878) spend further
evaluations on removing errors; correctors without a solver are annealed Langevin dynamics (NCSN, arXiv:1907.05600;
:mod:`diffusers_sde.methods.langevin`).

Scale 1 of classifier-free guidance is conditional sampling; scale 0 with a classifier at scale 1 samples the same law.
Larger scales do not sample ``p(x) p(y | x)^w``; ``pipelines/steering.py`` with the reward ``log p(y | x)`` does.

```python
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid

from diffusers_sde import ProbabilityFlowScheduler
from diffusers_sde.assets import FASHION_MODEL, load_default_classifier

pipe = DiffusionPipeline.from_pretrained(
    FASHION_MODEL, custom_pipeline="pipelines/guided_generation.py", trust_remote_code=True
)
pipe.scheduler = ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
rows = []
for options in (
    {"guidance_scale": 1},
    {"guidance_scale": 0, "classifier": load_default_classifier()},
    {"guidance_scale": 5},
    {"guidance_scale": 5, "guidance_interval": (0.3, 5.0)},
    {"guidance_scale": 5, "apg_parallel": 0.0, "apg_norm_threshold": 3.0},
):
    generator = torch.Generator().manual_seed(0)
    rows += pipe(class_labels=range(0, 10, 2), num_inference_steps=10, generator=generator, **options).images
image = make_image_grid(rows, 5, 5).resize((480, 480))
```
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

from diffusers_sde import TableScheduler
from diffusers_sde.errors import check_finite, check_whole, is_real
from diffusers_sde.methods.guidance import (
    Classifier,
    adaptive_projection,
    cfg_plus_plus_scale,
    classifier_free,
    classifier_gradient,
    data_shift,
    interval_scale,
    rescaled,
)
from diffusers_sde.methods.images import at_least_float32
from diffusers_sde.methods.langevin import annealed_langevin, planned_visits, sample_with_correctors
from diffusers_sde.methods.pipeline_io import (
    check_output_type,
    initial_noise,
    label_tensor,
    labels_of,
    lay_out_grid,
    pictures,
)
from diffusers_sde.prediction import from_model
from diffusers_sde.sampling import class_names, null_label
from diffusers_sde.tables import points_of


class GuidedGenerationPipeline(DiffusionPipeline):
    """Guided sampling.

    Args:
        unet: a ``UNet2DModel``-like network or a mixture; class-conditional, or guided by a classifier only.
        scheduler: any of diffusers_sde.
    """

    def __init__(self, unet: Any, scheduler: Any):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Any = None,
        num_images: int | None = None,
        num_inference_steps: int = 20,
        timesteps: Any = None,
        sigmas: Any = None,
        guidance_scale: float = 3.0,
        cfg_plus_plus: bool = False,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float = 0.0,
        apg_parallel: float | None = None,
        apg_norm_threshold: float = float("inf"),
        apg_momentum: float = 0.0,
        weak_unet: Any = None,
        classifier: Classifier | None = None,
        classifier_scale: float = 1.0,
        corrector_steps: int = 0,
        corrector_snr: float = 0.1,
        annealed: bool = False,
        restart: tuple[float, float, int] | None = None,
        generator: Any = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Generate one picture per label.

        Args:
            class_labels: a label or its name, several, or None for no class.
            num_images: number of pictures; None: as many as there are labels.
            num_inference_steps: network evaluations (twice as many where guidance needs two predictions).
            timesteps: what the network is given, from noise to data, instead of a number of steps.
            sigmas: noise levels of the states, likewise; with ``timesteps`` too, as many of one as of the other.
            guidance_scale: 0 unconditional, 1 conditional, larger guided.
            cfg_plus_plus: guide by CFG++, with guidance_scale in (0, 1].
            guidance_interval: (low, high) noise levels sigma/alpha to guide in; None: all.
            guidance_rescale: in [0, 1].
            apg_parallel: what APG keeps of the parallel part; None: no APG.
            apg_norm_threshold: largest norm of APG's difference of data predictions.
            apg_momentum: weight of its running average.
            weak_unet: a weaker network, for autoguidance.
            classifier: ``classifier(x, t)``, logits (N, classes) of noisy pictures; its labels are the network's.
            classifier_scale: of the classifier's guidance.
            corrector_steps: Langevin steps after each step.
            corrector_snr: their size, ``2 (corrector_snr sigma)^2``.
            annealed: no solver, corrector_steps at each level only: annealed Langevin dynamics, which needs many levels
                or many steps at each.
            restart: (low, high, repeats), an interval of noise levels sigma/alpha to go through again.
            generator: of all noise; one, or one for each picture.
            latents: unit noise (N, C, H, W).
            output_type: pil, np, pt (in 0..1) or latent (the state, in the model's units).
            return_dict: False returns a tuple.

        Returns:
            ``ImagePipelineOutput`` with ``images``, or ``(images,)``.

        Raises:
            ValueError: for guidance that the network cannot give, a scheduler of another kind and wrong inputs.
        """
        check_output_type(output_type)
        check_finite("guidance_scale", guidance_scale)
        check_finite("classifier_scale", classifier_scale)
        check_finite("apg_momentum", apg_momentum)
        if apg_parallel is not None:
            check_finite("apg_parallel", apg_parallel)
        if not (is_real(apg_norm_threshold) and apg_norm_threshold > 0):
            raise ValueError(f"apg_norm_threshold must be positive, not {apg_norm_threshold!r}.")
        if num_images is not None:
            check_whole("num_images", num_images)
        self._check(class_labels, guidance_scale, cfg_plus_plus, guidance_interval, guidance_rescale, weak_unet)
        if classifier is not None and class_labels is None:
            raise ValueError("Classifier guidance needs class_labels: pass the classes that the pictures should have.")
        if annealed and restart is not None:
            raise ValueError("Annealed Langevin has no steps to restart: leave out restart, or annealed.")
        has_classes, scheduler = null_label(self.unet) is not None, self.scheduler
        labels = label_tensor(self.unet, class_labels if has_classes else None, num_images)
        names = class_names(self.unet)
        classes = None if class_labels is None else labels_of(class_labels, num_images, names).to(self.unet.device)
        batch = (num_images or 1) if classes is None else len(classes)
        x = initial_noise(self.unet, scheduler, batch, generator, latents)
        lay_out_grid(scheduler, num_inference_steps, x.device, timesteps, sigmas)
        path, kind, points = scheduler.path, scheduler.config.prediction_type, points_of(scheduler.levels)
        average = None

        def predict(x: torch.Tensor, row: int) -> torch.Tensor:
            """The guided model output."""
            nonlocal average
            t, point = scheduler.timesteps[row], points[row]
            alpha, sigma = point.alpha, point.sigma
            k_x, k_m = from_model(path, kind, alpha, sigma)  # D = k_x x + k_m m
            level = sigma / alpha if alpha else float("inf")
            scale = 1.0 if labels is None else interval_scale(guidance_scale, level, guidance_interval)
            if cfg_plus_plus:
                scale = cfg_plus_plus_scale(guidance_scale, point.log_snr, points[row + 1].log_snr)
            null, m = self._predict(scheduler.scale_model_input(x, t), t, labels, scale, weak_unet)
            x, m = at_least_float32(x), at_least_float32(m)
            null = None if null is None else at_least_float32(null)
            if null is not None and apg_parallel is not None:
                guided, average = adaptive_projection(
                    k_x * x + k_m * null,
                    k_x * x + k_m * m,
                    scale,
                    parallel=apg_parallel,
                    norm_threshold=apg_norm_threshold,
                    momentum=apg_momentum,
                    average=average,
                )
                m = (guided - k_x * x) / k_m
            elif null is not None:
                guided = classifier_free(null, m, scale)
                m = rescaled(guided, m, guidance_rescale) if guidance_rescale else guided
            if classifier is not None:
                dtype = getattr(classifier, "dtype", x.dtype)
                gradient = classifier_gradient(
                    classifier, lambda y: scheduler.scale_model_input(y, t).to(dtype), x, t, classes
                )
                m = m + data_shift(gradient, alpha, sigma, classifier_scale) / k_m
            return m

        with self.progress_bar(total=len(planned_visits(scheduler, restart))) as bar:
            shared = {"generator": generator, "callback": bar.update}
            if annealed:
                x = annealed_langevin(
                    predict, scheduler, x, steps_per_level=corrector_steps, snr=corrector_snr, **shared
                )
            else:
                x = sample_with_correctors(
                    predict,
                    scheduler,
                    x,
                    corrector_steps=corrector_steps,
                    corrector_snr=corrector_snr,
                    restart=restart,
                    **shared,
                )
        images = pictures(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _predict(
        self, scaled: torch.Tensor, t: Any, labels: torch.Tensor | None, scale: float, weak_unet: Any
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The prediction to move away from (None where there is no guidance) and the one to move to."""
        if labels is None:
            return None, self.unet(scaled, t, return_dict=False)[0]
        none = torch.full_like(labels, null_label(self.unet))
        if scale in (0.0, 1.0):
            return None, self.unet(scaled, t, labels if scale else none, return_dict=False)[0]
        if weak_unet is not None:
            return tuple(net(scaled, t, labels, return_dict=False)[0] for net in (weak_unet, self.unet))
        both = self.unet(torch.cat([scaled, scaled]), t, torch.cat([none, labels]), return_dict=False)[0]
        return both.chunk(2)

    def _check(
        self,
        class_labels: Any,
        scale: float,
        plus_plus: bool,
        interval: tuple[float, float] | None,
        rescale: float,
        weak_unet: Any,
    ) -> None:
        if not isinstance(self.scheduler, TableScheduler):
            raise ValueError(
                f"{type(self.scheduler).__name__} does not say its noise levels: use pipe.scheduler = "
                "ProbabilityFlowScheduler.from_config(pipe.scheduler.config), or ReverseSDEScheduler."
            )
        if scale != 1.0 and class_labels is None and scale != 0.0:
            raise ValueError("Guidance needs class_labels: pass some, or guidance_scale=1.")
        if null_label(self.unet) is None and scale not in (0.0, 1.0):
            raise ValueError("Classifier-free guidance needs a network with a class for 'none': use guidance_scale=1.")
        if weak_unet is not None and null_label(weak_unet) != null_label(self.unet):
            raise ValueError("weak_unet must have the classes of the pipeline's network.")
        if plus_plus and not 0 < scale <= 1:
            raise ValueError(f"The guidance_scale of CFG++ lies in (0, 1], not {scale}: 0.6 is a usual one.")
        if plus_plus and interval is not None:
            raise ValueError("CFG++ chooses its scale at every level: leave out guidance_interval.")
        if interval is not None and not (
            isinstance(interval, list | tuple)
            and len(interval) == 2
            and all(map(is_real, interval))
            and 0 <= interval[0] < interval[1]
        ):
            raise ValueError(f"guidance_interval must be (low, high) noise levels sigma/alpha, not {interval!r}.")
        if not (is_real(rescale) and 0 <= rescale <= 1):
            raise ValueError(f"guidance_rescale must lie in [0, 1], not {rescale!r}.")
