"""A model as a problem to solve: everything fixed but the sampler.

Knows how to call a bare network with this package's loop or any other pipeline through its own call, always from the
same noise.  Knows no sampler, no error and no picture.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from diffusers_sde.assets import EXAMPLE_PROMPTS
from diffusers_sde.class_conditional import GUIDANCE
from diffusers_sde.errors import UsageError
from diffusers_sde.named_samplers import CALIBRATED, process_family
from diffusers_sde.sampling import lay_out, network_denoiser, sample, spread_labels

Tick = Callable[[], None]


@dataclass(frozen=True)
class Problem:
    """A model with everything but the sampler fixed.

    Attributes:
        config: the scheduler config of the model, see :func:`model_config`.
        solve: ``solve(scheduler, steps, tick)`` returns images (N, C, H, W) with values around [-1, 1] on the CPU, from
            the same noise each time, and calls ``tick`` after each evaluation.
        own_loop: whether this package's loop calls the network, and not a pipeline.
    """

    config: Mapping[str, Any]
    solve: Callable[[Any, int, Tick], torch.Tensor]
    own_loop: bool


def make_problem(
    pipe: diffusers.DiffusionPipeline,
    *,
    num_images: int,
    seed: int,
    guidance_scale: float | None = None,
    prompt: str | Sequence[str] | None = None,
    class_labels: Sequence[int] | None = None,
) -> Problem:
    """A pipeline as a problem: a bare network in this package's loop, any other pipeline through its call.

    Args:
        pipe: the pipeline; one that is called gets its scheduler replaced.
        num_images: N.
        seed: of the noise.
        guidance_scale: None: 2 for a class-conditional bare network, a pipeline's own default.
        prompt: of a pipeline that makes pictures from text, see :func:`prompts_for`.
        class_labels: (N,) of a class-conditional bare network; None spreads the images over its classes.

    Raises:
        UsageError: for what the model does not take (guidance, prompt), and for a scheduler that
            describes no known process.
    """
    try:
        process_family(pipe.scheduler.config)
    except (AttributeError, ValueError) as error:
        raise UsageError(f"This model has no scheduler with a known diffusion process: {error}") from error
    if set(pipe.components) == {"unet", "scheduler"}:
        if prompt is not None:
            raise UsageError("This model takes no prompt: leave out --prompt.")
        return _network_problem(pipe, num_images, seed, guidance_scale, class_labels)
    return _pipeline_problem(pipe, num_images, seed, guidance_scale, prompt)


def prompts_for(num_images: int, prompt: str | Sequence[str] | None = None) -> list[str]:
    """A prompt for each image: one or several, dealt out; None: :data:`diffusers_sde.assets.EXAMPLE_PROMPTS`."""
    prompts = EXAMPLE_PROMPTS if prompt is None else [prompt] if isinstance(prompt, str) else prompt
    return [prompts[i % len(prompts)] for i in range(num_images)]


def model_config(pipe: Any) -> Mapping[str, Any]:
    """A pipeline's scheduler config and, where a calibrated scheduler lies beside its weights, that folder under
    :data:`~diffusers_sde.named_samplers.CALIBRATED`."""
    folder = Path(str(pipe.name_or_path)) / CALIBRATED
    config = pipe.scheduler.config
    return {**config, CALIBRATED: str(folder)} if (folder / "scheduler_config.json").is_file() else config


def _network_problem(
    pipe: Any, num_images: int, seed: int, guidance_scale: float | None, class_labels: Sequence[int] | None
) -> Problem:
    network, device = pipe.unet, pipe.device
    classes = getattr(network.config, "num_class_embeds", None)
    if not classes and guidance_scale not in (None, 1.0):
        raise UsageError(
            "Guidance needs a class-conditional model, this one has no classes: leave out --guidance_scale."
        )
    scale = (GUIDANCE if classes else 1.0) if guidance_scale is None else guidance_scale
    chosen = spread_labels(num_images, classes - 1) if classes and class_labels is None else class_labels
    labels = torch.tensor(chosen, device=device) if classes else None
    denoiser, size = network_denoiser(network, labels, scale), network.config.sample_size
    channels = network.config.in_channels
    shape = (num_images, channels, *((size, size) if isinstance(size, int) else size))

    def mean(x: torch.Tensor, t: Any) -> torch.Tensor:
        return denoiser(x, t)[:, :channels]  # without a learned variance, which some of the samplers cannot take

    def solve(scheduler: Any, steps: int, tick: Tick) -> torch.Tensor:
        # the noise of a stochastic sampler goes on where that of the start ended, as in a pipeline
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(shape, generator=generator).to(device)
        lay_out(scheduler, steps)
        return sample(mean, scheduler, start, generator=generator, callback=tick).float().cpu()

    return Problem(model_config(pipe), solve, own_loop=True)


def _pipeline_problem(
    pipe: Any, num_images: int, seed: int, guidance_scale: float | None, prompt: str | Sequence[str] | None
) -> Problem:
    known, name = inspect.signature(pipe.__call__).parameters, type(pipe).__name__
    inputs: dict[str, Any] = {"output_type": "np"}
    if "generator" not in known:
        raise UsageError(f"{name} takes no generator, so its noise cannot be fixed: pass another --model.")
    if guidance_scale is not None:
        if "guidance_scale" not in known:
            raise UsageError(f"{name} takes no guidance: leave out --guidance_scale.")
        inputs["guidance_scale"] = guidance_scale
    if prompt is not None and "prompt" not in known:
        raise UsageError(f"{name} takes no prompt: leave out --prompt.")
    if "class_labels" in known:
        inputs["class_labels"] = spread_labels(num_images, pipe.transformer.config.num_embeds_ada_norm)
    elif "prompt" in known:
        inputs["prompt"] = prompts_for(num_images, prompt)
    elif "batch_size" in known:
        inputs["batch_size"] = num_images
    else:
        raise UsageError(f"{name} takes neither a prompt nor class labels nor a batch size: pass a model that does.")
    pipe.set_progress_bar_config(disable=True)

    def solve(scheduler: Any, steps: int, tick: Tick) -> torch.Tensor:
        # pipelines draw their latents before all else: a seed per image is the same noise for every sampler
        generators = [torch.Generator().manual_seed(seed + i) for i in range(num_images)]
        pipe.scheduler = ticking(scheduler, tick)
        try:
            images = pipe(**inputs, num_inference_steps=steps, generator=generators).images
        except Exception as error:  # a pipeline may refuse a scheduler in any way
            reason = f"{name} failed with {type(scheduler).__name__}: {error}"
            raise UsageError(f"{reason}; leave that out of --samplers or pass another --model.") from error
        return torch.from_numpy(np.asarray(images)).movedim(-1, 1).float() * 2 - 1

    return Problem(model_config(pipe), solve, own_loop=False)


def ticking(scheduler: Any, tick: Tick) -> Any:
    """``scheduler`` with a step that calls ``tick`` and keeps its signature, which pipelines inspect."""
    step = scheduler.step

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        tick()
        return step(*args, **kwargs)

    scheduler.step = counted
    return scheduler
