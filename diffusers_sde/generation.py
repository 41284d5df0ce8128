"""Pictures from a pipeline's parts by loops that no pipeline has: many steps at once, and steps chosen by their error.

``sample_parallel`` makes the pictures of the pipeline's own call in fewer calls of the network, one after the other:
all steps of a run are guessed, evaluated in one batch and corrected until they agree
(:mod:`diffusers_sde.methods.parallel`).  It pays with many steps and a device, or several, that evaluates a batch in
about the time of one state; the number of evaluations is two to five times that of the run step by step.

``sample_adaptive`` solves the probability-flow ODE of the model to a tolerance
(:mod:`diffusers_sde.methods.adaptive`), in pixel units: 0.01 of a picture in -1..1 is a grey level and a quarter of
8 bits.  For latents the unit is that of the latents.

Both work on any pipeline whose network :mod:`diffusers_sde.conditioning` can call: Stable Diffusion and the like,
pipelines of transformers on packed latents, class-conditional and unconditional networks.

Knows pipelines, noise and pictures; knows no method.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils import BaseOutput

from diffusers_sde.class_conditional import GUIDANCE, ClassConditionalPipeline
from diffusers_sde.conditioning import calling, capture, network_name, takes_prompts
from diffusers_sde.configs import path_from_config
from diffusers_sde.errors import check_finite, check_whole
from diffusers_sde.methods.adaptive import Report, check_adaptive, sample_with_error_control
from diffusers_sde.methods.images import from_state
from diffusers_sde.methods.parallel import check_parallel, sample_rows
from diffusers_sde.methods.pipeline_io import check_output_type, label_tensor, lay_out_grid, sample_shape, unit_noise
from diffusers_sde.methods.splitting import of_main_process, split_over_processes
from diffusers_sde.sampling import Evaluator, label_evaluator, prompt_evaluator
from diffusers_sde.schedulers import CalibratedScheduler, FlowMapScheduler, ProbabilityFlowScheduler, TableScheduler
from diffusers_sde.stock_configs import FLOW_MAP_CLASSES, canonical_config, class_name
from diffusers_sde.weights import Point

# The schedulers of diffusers whose networks are distilled to jump.
JUMPING = {"LCMScheduler", "TCDScheduler", "CMStochasticIterativeScheduler", *FLOW_MAP_CLASSES}


@dataclass
class ParallelOutput(BaseOutput):
    """Pictures, and what they cost.

    Args:
        images: of the requested type.
        rounds: calls of the network, one after the other.
        evaluations: states of each sample that it was evaluated at, a list of N (twice as many with guidance).
    """

    images: Any
    rounds: int
    evaluations: list[int]


@dataclass
class AdaptiveOutput(BaseOutput):
    """Pictures, and how they were reached.

    Args:
        images: of the requested type.
        reports: of each sample: its evaluations, accepted and rejected steps, its nodes, and whether it kept the
            tolerance (:class:`diffusers_sde.methods.adaptive.Report`).
    """

    images: Any
    reports: list[Report]


def sample_parallel(
    pipe: Any,
    prompt: str | Sequence[str] | None = None,
    *,
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
) -> ParallelOutput:
    """The pictures of the pipeline's scheduler, with many of its steps at once.

    Args:
        pipe: a pipeline; its scheduler is used as it is if it is one of this package, ODE or SDE, else its process is
            sampled by :class:`ProbabilityFlowScheduler`.
        prompt: one or several, for pipelines that take them; guidance is against the empty prompt.
        class_labels: labels or names, for networks with classes.
        num_images: pictures of one prompt or label or of none; None: one for each.
        num_inference_steps: of the scheduler's grid.
        guidance_scale: of classifier-free guidance, 1: none; None: the default of the pipeline's call, else 1.
        window: steps of each picture in a call of the network; None: all.  A smaller one needs less memory, and fewer
            evaluations in more rounds.
        tolerance: how near a state must be to the one that an evaluation was made at, in units of the data, one or one
            for each picture; 0: the result of the steps one after the other, in as many rounds at most.
        acceleration: sweeps that Anderson acceleration mixes; 0: none.
        predictor_steps: evaluations of the coarse solve that guesses the states.
        split: each process of an ``accelerate launch`` evaluates its part of every batch; all get all pictures.
        generator: of the noise; one, or one for each picture.
        latents: the noise to start from, unit normals (N, C, H, W).
        height, width: of the pictures in pixels, for pipelines with prompts; None: the pipeline's own.
        output_type: pil, np, pt (in 0..1) or latent (the state, in the model's units).

    Returns:
        :class:`ParallelOutput`.

    Raises:
        ValueError: for wrong inputs and for a pipeline whose network cannot be called, before any evaluation.
    """
    check_parallel(window, tolerance, acceleration, predictor_steps)
    scheduler = pipe.scheduler
    if _is_flow_map(scheduler):
        raise ValueError(
            f"{type(scheduler).__name__} makes few jumps, each of which needs the one before: call the pipeline itself."
        )
    if not isinstance(scheduler, TableScheduler):
        scheduler = ProbabilityFlowScheduler.from_config(scheduler.config)
    model = _opened(pipe, prompt, class_labels, num_images, guidance_scale, height, width, output_type)
    noise = model.noise(generator, latents)
    state = (of_main_process(noise) if split else noise) * float(scheduler.init_noise_sigma)
    lay_out_grid(scheduler, num_inference_steps, state.device, mu=model.mu)
    transitions = scheduler.transitions(state, generator)
    if split and transitions.seeds is not None:
        transitions = replace(transitions, seeds=of_main_process(transitions.seeds))
    path, sigmas = scheduler.path, transitions.nodes.sigma

    def evaluate(x: torch.Tensor, rows: Sequence[int], samples: Sequence[int]) -> torch.Tensor:
        return model.evaluate(x, path.input_scale(sigmas[list(rows)]), transitions.times[list(rows)], samples)

    with pipe.progress_bar(total=num_inference_steps * len(state)) as bar:
        state, cost = sample_rows(
            split_over_processes(evaluate) if split else evaluate,
            transitions,
            state,
            window=window,
            tolerance=tolerance,
            acceleration=acceleration,
            predictor_steps=predictor_steps,
            data_std=path.data_scale,
            callback=bar.update,
        )
    return ParallelOutput(model.pictures(state), cost.rounds, list(cost.evaluations))


def sample_adaptive(
    pipe: Any,
    prompt: str | Sequence[str] | None = None,
    *,
    tolerance: float = 1e-2,
    class_labels: Any = None,
    num_images: int | None = None,
    guidance_scale: float | None = None,
    max_evaluations: int = 1000,
    generator: Any = None,
    latents: torch.Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
    output_type: str = "pil",
) -> AdaptiveOutput:
    """Pictures of the probability-flow ODE, with as many steps as their error needs.

    Args:
        pipe: a pipeline; of its scheduler only the forward process is used.
        prompt: one or several, for pipelines that take them; guidance is against the empty prompt.
        tolerance: root mean square error of a picture to the exact solution, in the model's units (pixels in -1..1, or
            latents); it was met within a factor of 3 on every problem with a known solution.
        class_labels: labels or names, for networks with classes.
        num_images: pictures of one prompt or label or of none; None: one for each.
        guidance_scale: of classifier-free guidance, 1: none; None: the default of the pipeline's call, else 1.
        max_evaluations: of each picture, at least 2; beyond three quarters of them the rest is gone in equal steps.
        generator: of the noise; one, or one for each picture.
        latents: the noise to start from, unit normals (N, C, H, W).
        height, width: of the pictures in pixels, for pipelines with prompts; None: the pipeline's own.
        output_type: pil, np, pt (in 0..1) or latent (the state, in the model's units).

    Returns:
        :class:`AdaptiveOutput`.  Each picture has steps of its own, whatever the others of its batch are.

    Raises:
        ValueError: for wrong inputs, for a pipeline that fixes its steps in advance (a distilled model's, or one with a
            calibrated scheduler), and for one whose network cannot be called, before any evaluation.
    """
    check_adaptive(tolerance, max_evaluations)
    scheduler = pipe.scheduler
    if _is_flow_map(scheduler) or isinstance(scheduler, CalibratedScheduler):
        what = "was calibrated for" if isinstance(scheduler, CalibratedScheduler) else "belongs to a network that makes"
        raise ValueError(
            f"{type(scheduler).__name__} {what} steps that are fixed in advance: use a model that was not distilled "
            "with pipe.scheduler = ProbabilityFlowScheduler.from_config(pipe.scheduler.config)."
        )
    config = canonical_config(scheduler.config)
    path = path_from_config(config)
    model = _opened(pipe, prompt, class_labels, num_images, guidance_scale, height, width, output_type)
    start = model.noise(generator, latents) * path.start_scale

    def evaluate(x: torch.Tensor, points: Sequence[Point], samples: Sequence[int]) -> torch.Tensor:
        times = torch.tensor([float(path.time(point.log_snr)) for point in points], dtype=torch.float32)
        sigmas = np.array([point.sigma for point in points])
        return model.evaluate(x, path.input_scale(sigmas), times.to(x.device), samples)

    with pipe.progress_bar(total=100) as bar:
        state, reports = sample_with_error_control(
            evaluate,
            path,
            config.get("prediction_type") or "epsilon",
            start,
            tolerance=tolerance,
            max_evaluations=max_evaluations,
            callback=lambda progress: bar.update(round(100 * progress) - bar.n),
        )
    return AdaptiveOutput(model.pictures(state), reports)


def known_pipeline(parts: Any) -> Any:
    """The pipeline whose call says what the network is told, made of the parts of another one.

    Args:
        parts: a pipeline with ``unet`` and ``scheduler``, and those of Stable Diffusion or none of them.

    Returns:
        A ``StableDiffusionPipeline`` or a :class:`ClassConditionalPipeline`, with the same progress bar.
    """
    components = {name: part for name, part in parts.components.items() if part is not None}
    if "text_encoder" in components:
        absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = diffusers.StableDiffusionPipeline(**components, **absent)
    else:
        pipe = ClassConditionalPipeline(**components)
    pipe.set_progress_bar_config(**getattr(parts, "_progress_bar_config", {}))
    return pipe


@dataclass(frozen=True)
class _Model:
    """A pipeline taken apart: the network for N pictures, the ``shape`` of a state, the dynamic shift ``mu`` of that
    size, and how states become pictures."""

    network: Any
    evaluator: Evaluator
    count: int
    shape: tuple[int, ...]
    mu: float | None
    pictures: Callable[[torch.Tensor], Any]

    def noise(self, generator: Any, latents: torch.Tensor | None) -> torch.Tensor:
        """Unit normals (N, ...) as the pipeline draws them."""
        return unit_noise(self.network, self.count, generator, latents, shape=self.shape)

    @torch.no_grad()
    def evaluate(self, x: torch.Tensor, scale: Any, times: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        """The network at states x (P, ...), each multiplied by its ``scale`` (1.0 or an array)."""
        if not isinstance(scale, float):
            x = x * torch.as_tensor(scale, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        return self.evaluator(x.to(self.network.dtype), times, samples)


def _opened(
    pipe: Any,
    prompt: str | Sequence[str] | None,
    class_labels: Any,
    num_images: int | None,
    guidance_scale: float | None,
    height: int | None,
    width: int | None,
    output_type: str,
) -> _Model:
    """The parts of a pipeline for some pictures; raises ``ValueError`` for inputs that it does not take."""
    check_output_type(output_type)
    if guidance_scale is not None:
        check_finite("guidance_scale", guidance_scale)
    if num_images is not None:
        check_whole("num_images", num_images)
    size = {name: value for name, value in (("height", height), ("width", width)) if value is not None}
    kind, vae = type(pipe).__name__, getattr(pipe, "vae", None)
    if vae is not None and output_type != "latent" and not hasattr(vae.config, "scaling_factor"):
        raise ValueError(f"The autoencoder of {kind} has no single scale: pass output_type='latent'.")
    needed = [p.name for p in inspect.signature(pipe.__call__).parameters.values() if p.default is p.empty]
    if set(needed) - {"prompt", "class_labels", "args", "kwargs"}:
        raise ValueError(f"{kind} needs {' and '.join(needed)}: use a pipeline that makes pictures from noise.")
    network: Any = getattr(pipe, network_name(pipe) or "", None)
    if takes_prompts(pipe) and network is not None:
        if prompt is None or class_labels is not None:
            raise ValueError(f"{kind} makes pictures of prompts: pass a prompt and no class_labels.")
        prompts = _prompts(prompt, num_images)
        scale = _usual_guidance(pipe, network) if guidance_scale is None else guidance_scale
        given = capture(pipe, prompt=[""], **size)
        evaluator, count = prompt_evaluator(pipe, prompts, scale, **size), len(prompts)
        shape, mu = _latent_shape(pipe, given.latents, size), given.mu
    elif network is not None and network is getattr(pipe, "unet", None):
        if prompt is not None or size:
            raise ValueError(f"{kind} takes no prompt, height or width: leave them out.")
        labels = label_tensor(network, class_labels, num_images)
        usual = 1.0 if class_labels is None else GUIDANCE
        evaluator = label_evaluator(network, labels, usual if guidance_scale is None else guidance_scale)
        count = (num_images or 1) if labels is None else len(labels)
        shape, mu = sample_shape(network), None
    else:
        raise ValueError(f"How the network of {kind} is called is not known: use a text-to-image pipeline, or a unet.")

    @torch.no_grad()
    def pictures(state: torch.Tensor) -> Any:
        images = from_state(state.to(network.dtype), vae, output_type)
        pipe.maybe_free_model_hooks()
        return images

    return _Model(network, evaluator, count, shape, mu, pictures)


def _prompts(prompt: str | Sequence[str], num_images: int | None) -> list[str]:
    """One prompt for each picture."""
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or not all(isinstance(text, str) for text in prompts):
        raise ValueError("prompt must be a text, or a list with at least one.")
    if len(prompts) == 1:
        return prompts * (num_images or 1)
    if num_images not in (None, len(prompts)):
        raise ValueError(f"{len(prompts)} prompts for {num_images} images: pass one, or one for each image.")
    return prompts


def _usual_guidance(pipe: Any, network: Any) -> float:
    """The default guidance of a pipeline's call, where it is classifier-free guidance as diffusers counts it."""
    usual = inspect.signature(pipe.__call__).parameters.get("guidance_scale")
    embedded = getattr(network.config, "guidance_embeds", False) or calling(network).unguided != 1.0
    return 1.0 if usual is None or usual.default in (None, usual.empty) or embedded else float(usual.default)


def _latent_shape(pipe: Any, latents: Any, size: Mapping[str, int]) -> tuple[int, ...]:
    """The shape (C, H, W) of a state, whatever the network makes of it."""
    if isinstance(latents, torch.Tensor) and latents.ndim == 4:
        return tuple(latents.shape[1:])
    factor = pipe.vae_scale_factor
    height, width = (size.get(side, pipe.default_sample_size * factor) // factor for side in ("height", "width"))
    return (pipe.vae.config.latent_channels, height, width)


def _is_flow_map(scheduler: Any) -> bool:
    """Whether a scheduler, of this package or of diffusers, is one of networks that jump."""
    names = {type(scheduler).__name__, class_name(scheduler.config)}  # one that was constructed names no class
    return isinstance(scheduler, FlowMapScheduler) or not names.isdisjoint(JUMPING)
