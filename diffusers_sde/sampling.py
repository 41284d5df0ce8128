"""The sampling loop, for networks that have no pipeline of their own call: compare, bench and tests use it.

Knows how to call an unconditional, class- or text-conditional network with classifier-free guidance or as a flow map,
and how to drive any scheduler, ours or diffusers', from given noise.  Knows no scheduler in particular.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import numpy as np
import torch

from diffusers_sde.conditioning import batched, call, calling, capture, moved, network_name
from diffusers_sde.errors import check_finite
from diffusers_sde.models.gaussian_mixture import GaussianMixtureModel

Denoiser = Callable[[torch.Tensor, Any], torch.Tensor]
# states (P, ...), their times (P,) and the number of the sample that each is a state of, to predictions (P, ...)
Evaluator = Callable[[torch.Tensor, torch.Tensor, Sequence[int]], torch.Tensor]
CLASS_NAMES = "_class_names"  # key of a network's config; diffusers keeps private keys without a word


def null_label(network: Any) -> int | None:
    """The label that means "no class".

    Args:
        network: a ``UNet2DModel``-like network or a mixture.

    Returns:
        The last of ``num_class_embeds``, the number of components of a mixture, or None for a network without classes.
    """
    if isinstance(network, GaussianMixtureModel):
        return len(network.config.weights)
    classes = getattr(network.config, "num_class_embeds", None)
    return classes - 1 if classes else None


def class_names(network: Any) -> list[str] | None:
    """The names of a network's classes, in the order of their labels.

    Args:
        network: with a config, where trained networks have them as :data:`CLASS_NAMES` and others as ``id2label``
            (transformers' convention).

    Returns:
        One for each class that has a name, or None.
    """
    if names := getattr(network.config, CLASS_NAMES, None):
        return list(names)
    numbered = {int(label): str(name) for label, name in (getattr(network.config, "id2label", None) or {}).items()}
    known = numbered and numbered.keys() == set(range(len(numbered)))
    return [numbered[label] for label in range(len(numbered))] if known else None


def spread_labels(n: int, classes: int) -> list[int]:
    """``n`` labels in 0..classes - 1: evenly spread where n is smaller, else cycling."""
    if n >= classes:
        return [i % classes for i in range(n)]
    return [round(i * (classes - 1) / max(n - 1, 1)) for i in range(n)]


def network_denoiser(
    network: torch.nn.Module, class_labels: torch.Tensor | None = None, guidance_scale: float = 1.0
) -> Denoiser:
    """A network as a function of state and time, guided if wanted: ``m_null + w (m_label - m_null)`` in one batch of 2N
    (Ho & Salimans 2022, arXiv:2207.12598, eq. 6 in diffusers' scale: 1 is conditional, no guidance).

    Args:
        network: a ``UNet2DModel``-like network or a mixture.
        class_labels: (N,) int64, on the network's device; None: no class.
        guidance_scale: w.

    Returns:
        ``denoiser(sample, timestep)``, (N, C, H, W) to (N, C, H, W): what the network's prediction type says.  The
        timestep is one, or one for each sample.

    Raises:
        ValueError: for guidance without labels or without a null class, and for a class-conditional network without
            labels.
    """
    check_finite("guidance_scale", guidance_scale)
    if class_labels is None:
        if guidance_scale != 1.0:
            raise ValueError("Guidance needs class labels: this model is sampled without any, use guidance_scale 1.")
        classes = getattr(network.config, "num_class_embeds", None)
        if classes:
            raise ValueError(f"This network is class-conditional: pass class labels in 0..{classes - 1}.")
        return lambda sample, t: network(sample, t, return_dict=False)[0]
    if guidance_scale == 1.0:
        return lambda sample, t: network(sample, t, class_labels, return_dict=False)[0]
    null = null_label(network)
    if null is None:
        raise ValueError("Guidance needs a network with a null class: this one has no num_class_embeds.")
    labels = torch.cat([torch.full_like(class_labels, null), class_labels])

    def guided(sample: torch.Tensor, t: Any) -> torch.Tensor:
        times = t.repeat(2) if isinstance(t, torch.Tensor) and t.numel() > 1 else t
        out = network(torch.cat([sample, sample]), times, labels, return_dict=False)[0]
        unconditional, conditional = out.chunk(2)
        mean = torch.lerp(unconditional, conditional, guidance_scale)
        channels = sample.shape[1]  # beyond them lies a learned variance, that of the label: no direction to follow
        return mean if mean.shape[1] == channels else torch.cat([mean[:, :channels], conditional[:, channels:]], dim=1)

    return guided


def label_evaluator(
    network: torch.nn.Module, class_labels: torch.Tensor | None = None, guidance_scale: float = 1.0
) -> Evaluator:
    """:func:`network_denoiser` for states of any of the N samples at times of their own.

    Args:
        network, class_labels, guidance_scale: as there.

    Returns:
        ``evaluate(states, times, samples)``, without learned variances.

    Raises:
        ValueError: as there.
    """
    network_denoiser(network, class_labels, guidance_scale)  # refuses what does not fit
    channels = network.config.in_channels

    def evaluate(x: torch.Tensor, times: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        labels = None if class_labels is None else class_labels[list(samples)]
        return network_denoiser(network, labels, guidance_scale)(x, times)[:, :channels]

    return evaluate


def prompt_evaluator(pipe: Any, prompts: Sequence[str], guidance_scale: float = 1.0, **size: int) -> Evaluator:
    """The network of a text-to-image pipeline as a function of latents and times, guided as the pipeline guides:
    ``m_empty + w (m_prompt - m_empty)`` in one batch of 2P, against the empty prompt.

    Args:
        pipe: a pipeline whose latents are pictures, whatever its network makes of them (:mod:`.conditioning`).
        prompts: N of them.
        guidance_scale: w; 1: no guidance.
        size: ``height`` and ``width`` of the pictures in pixels; none: the pipeline's own.

    Returns:
        ``evaluate(latents, times, samples)``.

    Raises:
        ValueError: where the pipeline packs its latents in a way that is not known.
    """
    network = getattr(pipe, network_name(pipe) or "")
    how = calling(network)
    known = {prompt: capture(pipe, prompt=[prompt], **size) for prompt in dict.fromkeys([*prompts, ""])}
    scale = known[""].time_scale

    @functools.lru_cache(maxsize=2)  # a batch keeps its samples from call to call
    def conditions(samples: tuple[int, ...]) -> dict[str, Any]:
        words = [prompts[k] for k in samples]
        words = words if guidance_scale == 1.0 else ["" for _ in words] + words
        return moved(batched(how, [known[prompt].condition for prompt in words]), network.device)

    def evaluate(x: torch.Tensor, times: torch.Tensor, samples: Sequence[int]) -> torch.Tensor:
        condition = conditions(tuple(samples))
        if guidance_scale == 1.0:
            return call(how, network, x, times, scale, condition)
        out = call(how, network, torch.cat([x, x]), times.repeat(2), scale, condition)
        return torch.lerp(*out.chunk(2), guidance_scale)

    return evaluate


def prompt_denoiser(pipe: Any, prompts: Sequence[str], guidance_scale: float = 1.0, **size: int) -> Denoiser:
    """:func:`prompt_evaluator` of all N prompts at one time: ``denoiser(latents, timestep)``, (N, C, H, W) to
    (N, C, H, W)."""
    evaluate = prompt_evaluator(pipe, prompts, guidance_scale, **size)
    return lambda x, t: evaluate(x, torch.as_tensor(t, device=x.device).expand(len(x)), range(len(x)))


def flow_map_denoiser(network: torch.nn.Module, scheduler: Any, class_labels: torch.Tensor | None = None) -> Denoiser:
    """A flow map network as a function of state and time; its guidance is built in.

    Args:
        network: ``network(sample, timestep)``, also given ``target_timestep`` if it was trained so
            (``scheduler.config.flow_map == "mean_flow"``).
        scheduler: the :class:`diffusers_sde.FlowMapScheduler` whose timesteps are set when the network is called.
        class_labels: (N,) int64, on the network's device; None: no class.

    Returns:
        ``denoiser(sample, timestep)``, (N, C, H, W) to (N, C, H, W).
    """
    labels = {} if class_labels is None else {"class_labels": class_labels}

    def denoiser(sample: torch.Tensor, t: Any) -> torch.Tensor:
        target = {"target_timestep": scheduler.target_timestep(t)} if scheduler.config.flow_map == "mean_flow" else {}
        return network(sample, t, return_dict=False, **labels, **target)[0]

    return denoiser


def lay_out(scheduler: Any, num_inference_steps: int, device: Any = None) -> None:
    """``set_timesteps``, trailing for flow matching Euler too, which has no option for it."""
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        sigmas = np.linspace(1, 1 / num_inference_steps, num_inference_steps).tolist()
        scheduler.set_timesteps(sigmas=sigmas, device=device)
    else:
        scheduler.set_timesteps(num_inference_steps, device=device)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    scheduler: Any,
    noise: torch.Tensor,
    *,
    generator: Any = None,
    callback: Callable[[], Any] | None = None,
    on_step_end: Callable[[int, Any, torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Run a scheduler from noise to data.

    Args:
        denoiser: ``denoiser(scaled sample, timestep)``, without gradients.
        scheduler: any scheduler, ours or diffusers', whose timesteps are set.
        noise: unit normals (N, ...); multiplied by ``init_noise_sigma``.
        generator: of the steps' noise, for schedulers that take one.
        callback: called after each evaluation.
        on_step_end: ``on_step_end(number, timestep, state)`` after each step, the state to go on from.

    Returns:
        The state after the last step, of the noise's shape and dtype.
    """
    extra = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))
    for i, t in enumerate(scheduler.timesteps):
        # flow matching schedulers have no scale_model_input
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(denoiser(scaled, t), t, x, return_dict=False, **extra)[0]
        if on_step_end is not None:
            x = on_step_end(i, t, x)
        if callback is not None:
            callback()
    return x


def rmse(samples: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of each sample: (N, ...) and (N, ...) to (N,) float64."""
    return (samples - reference).double().flatten(1).square().mean(1).sqrt()
