"""What any pipeline tells its network besides state and time: text embeddings, pooled ones, sizes, masks, labels.

Knows how to have a pipeline's own call say it, once for each prompt or label, by stopping the call at the network.
Knows nothing of training, samplers or pictures.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch


class _Captured(Exception):
    """Carries what a pipeline hands to its network."""


def network_name(pipe: Any) -> str | None:
    """The component of a pipeline that predicts, ``unet`` or ``transformer``; None where there is neither."""
    return next((name for name in ("unet", "transformer") if getattr(pipe, name, None) is not None), None)


def capture(pipe: Any, **inputs: Any) -> tuple[torch.Tensor, dict[str, Any], float]:
    """What a pipeline's call gives to its network at its first step, without guidance.

    Args:
        pipe: a pipeline with a ``unet`` or ``transformer``.
        inputs: of its call, a batch of one, as ``prompt=["a cat"]`` or ``class_labels=[3]``.

    Returns:
        Its latents (1, C, H, W); the network's other keyword arguments, on the CPU; and what the pipeline multiplies
        the scheduler's timesteps by.

    Raises:
        ValueError: where the latents are packed, so that they are no picture.
    """
    network = getattr(pipe, network_name(pipe) or "")
    signature, forward = inspect.signature(network.forward), network.forward

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _Captured(signature.bind(*args, **kwargs).arguments)

    options = {
        "num_inference_steps": 1,
        "guidance_scale": 1.0,
        "output_type": "latent",
        "use_resolution_binning": False,
    }
    taken = inspect.signature(pipe.__call__).parameters
    network.forward = stop
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad():
            pipe(**{key: value for key, value in options.items() if key in taken}, **inputs)
    except _Captured as captured:
        arguments = dict(captured.args[0])
    finally:
        network.forward = forward
    arguments = {**arguments, **arguments.pop("kwargs", {})}
    latents = arguments.pop(next(iter(signature.parameters)))
    if latents.ndim != 4:
        raise ValueError(f"{type(pipe).__name__} packs its latents, which is not supported: use another pipeline.")
    time, level = arguments.pop("timestep"), float(pipe.scheduler.timesteps[0])
    arguments.pop("return_dict", None)
    scale = float(torch.as_tensor(time).flatten()[0]) / level if level else 1.0
    return latents, moved(arguments, torch.device("cpu")), scale


def stack(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch of several conditions of batch 1; what has no batch dimension must be the same in all."""
    return {key: _stacked([value[key] for value in values]) for key in values[0]} if values else {}


def _stacked(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return stack(values)
    if isinstance(first, torch.Tensor) and first.ndim and first.shape[0] == 1:
        return torch.cat(list(values))
    return first


def moved(value: Any, device: torch.device) -> Any:
    """A condition on another device."""
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value.to(device) if isinstance(value, torch.Tensor) else value
