"""What any pipeline tells its network besides state and time (text embeddings, pooled ones, sizes, masks, labels), and
how networks of each class take states and times.

Knows how to have a pipeline's own call say it, once for each prompt or label, by stopping the call at the network.
Knows nothing of training, samplers or pictures.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Calling:
    """How networks of a class are called.

    Args:
        enter: latents (N, C, H, W) as the network takes them.
        leave: the network's output for ``N x C x H x W`` latents as the prediction of the scheduler's type, of the
            latents' shape.
        time: name of the argument that is the time.
        time_offset: the time that the network is told for the scheduler's time 0.
        unguided: the pipeline's ``guidance_scale`` that means no guidance.
        text: names of the text embeddings (N, length, width) and of their mask (N, length), None where all prompts
            have the same length or no mask is known.
    """

    enter: Callable[[torch.Tensor], Any] = lambda latents: latents
    leave: Callable[[Any, torch.Size], torch.Tensor] = lambda out, shape: out[:, : shape[1]]  # without variances
    time: str = "timestep"
    time_offset: float = 0.0
    unguided: float = 1.0
    text: tuple[str, str] | None = None


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, H, W) as tokens (N, H/2 W/2, 4 C), one for each 2x2 patch, the channels slowest."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).mT


def unpack(tokens: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Tokens of :func:`pack` as latents of ``shape`` again."""
    patches = tokens.mT.unflatten(2, (shape[2] // 2, shape[3] // 2))
    return torch.nn.functional.pixel_shuffle(patches, 2)


PLAIN = Calling()
CALLINGS = {
    "FluxTransformer2DModel": Calling(pack, unpack),
    "QwenImageTransformer2DModel": Calling(pack, unpack, text=("encoder_hidden_states", "encoder_hidden_states_mask")),
    # takes a list of (C, 1, H, W), counts time from noise to data, and predicts x_0 - eps
    "ZImageTransformer2DModel": Calling(
        lambda latents: list(latents.unsqueeze(2).unbind()),
        lambda out, shape: -torch.stack(list(out)).squeeze(2),
        time="t",
        time_offset=1.0,
        unguided=0.0,
    ),
}


def calling(network: Any) -> Calling:
    """How a network is called, by its class."""
    return next((CALLINGS[c.__name__] for c in type(network).__mro__ if c.__name__ in CALLINGS), PLAIN)


def call(
    how: Calling,
    network: Callable[..., Any],
    x: torch.Tensor,
    times: torch.Tensor,
    time_scale: float,
    condition: Mapping[str, Any],
) -> torch.Tensor:
    """What a network says of latents x (N, C, H, W) at the scheduler's times (N,), of the shape of x.

    Args:
        how: of the network's class.
        network: itself, or a module that is called like it.
        time_scale: what times are multiplied by for the network.
        condition: its other arguments.
    """
    told = times if (time_scale, how.time_offset) == (1.0, 0.0) else how.time_offset + times * time_scale
    return how.leave(network(how.enter(x), **{how.time: told}, **condition, return_dict=False)[0], x.shape)


class _Captured(Exception):
    """Carries what a pipeline hands to its network."""


class Given(NamedTuple):
    """What a pipeline's call gives to its network at its first step: latents as the network takes them, its other
    keyword arguments, on the CPU, what the scheduler's times are multiplied by, and the scheduler's dynamic shift."""

    latents: Any
    condition: dict[str, Any]
    time_scale: float
    mu: float | None


def network_name(pipe: Any) -> str | None:
    """The component of a pipeline that predicts, ``unet`` or ``transformer``; None where there is neither."""
    return next((name for name in ("unet", "transformer") if getattr(pipe, name, None) is not None), None)


def takes_prompts(pipe: Any) -> bool:
    """Whether a pipeline is called with prompts."""
    return callable(pipe) and "prompt" in inspect.signature(pipe.__call__).parameters


def capture(pipe: Any, **inputs: Any) -> Given:
    """What a pipeline's call gives to its network at its first step, without guidance (networks with an embedding of
    the guidance are told the pipeline's usual one).

    Args:
        pipe: a pipeline with a ``unet`` or ``transformer``.
        inputs: of its call, as ``prompt=["a cat"]`` or ``class_labels=[3]``; those that it does not take are left out.

    Raises:
        ValueError: where the latents are packed in a way that is not known.
    """
    network = getattr(pipe, network_name(pipe) or "")
    how = calling(network)
    signature, forward = inspect.signature(network.forward), network.forward
    set_timesteps, told = pipe.scheduler.set_timesteps, dict[str, Any]()

    def stop(*args: Any, **kwargs: Any) -> None:
        raise _Captured(signature.bind(*args, **kwargs).arguments)

    @functools.wraps(set_timesteps)
    def listen(*args: Any, **kwargs: Any) -> Any:
        told.update(kwargs)
        return set_timesteps(*args, **kwargs)

    taken = inspect.signature(pipe.__call__).parameters
    options: dict[str, Any] = {
        "num_inference_steps": 2,  # a grid that is stretched to a terminal shift needs two
        "true_cfg_scale": 1.0,
        "generator": torch.Generator(),  # the global one is somebody else's
        "output_type": "latent",
        "use_resolution_binning": False,
    }
    usual = taken["guidance_scale"].default if "guidance_scale" in taken else None
    if usual is not None and not getattr(network.config, "guidance_embeds", False):
        options["guidance_scale"] = how.unguided
    network.forward, pipe.scheduler.set_timesteps = stop, listen
    pipe.set_progress_bar_config(disable=True)
    try:
        with torch.no_grad():
            pipe(**{key: value for key, value in {**options, **inputs}.items() if key in taken})
    except _Captured as captured:
        arguments = dict(captured.args[0])
    finally:
        network.forward = forward
        del pipe.scheduler.set_timesteps
    arguments = {**arguments, **arguments.pop("kwargs", {})}
    latents = arguments.pop(next(iter(signature.parameters)))
    if how is PLAIN and latents.ndim != 4:
        raise ValueError(f"{type(pipe).__name__} packs its latents, which is not supported: use another pipeline.")
    time, level = arguments.pop(how.time), float(pipe.scheduler.timesteps[0])
    arguments.pop("return_dict", None)
    scale = (float(torch.as_tensor(time).flatten()[0]) - how.time_offset) / level if level else 1.0
    return Given(latents, moved(arguments, torch.device("cpu")), scale, told.get("mu"))


def batched(how: Calling, values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch of several conditions of batch 1 (:func:`stack`), shorter prompts filled up behind their end and masked
    where the network takes a mask."""
    if how.text is None or len({value[how.text[0]].shape[1] for value in values}) < 2:
        return stack(values)
    text, mask = how.text
    longest = max(value[text].shape[1] for value in values)

    def filled(value: Mapping[str, Any]) -> dict[str, Any]:
        embeddings, known = value[text], value.get(mask)
        known = torch.ones(embeddings.shape[:2], dtype=torch.bool) if known is None else known.bool()
        missing = longest - embeddings.shape[1]
        pad = torch.nn.functional.pad
        return {**value, text: pad(embeddings, (0, 0, 0, missing)), mask: pad(known, (0, missing))}

    return stack([filled(value) for value in values])


def ragged(how: Calling, values: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the texts of conditions differ in length in a network that takes no mask for them."""
    texts = [value.get("encoder_hidden_states") for value in values]
    return how.text is None and len({text.shape for text in texts if isinstance(text, torch.Tensor)}) > 1


def stack(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch of several conditions of batch 1; lists are joined, what has no batch dimension must be the same in
    all.

    Raises:
        ValueError: for texts of different lengths.
    """
    return {key: _stacked(key, [value[key] for value in values]) for key in values[0]} if values else {}


def _stacked(key: str, values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return stack(values)
    if isinstance(first, list):
        return [item for value in values for item in value]
    if isinstance(first, torch.Tensor) and first.ndim and first.shape[0] == 1:
        if len({value.shape for value in values}) > 1:
            raise ValueError(
                f"The network's {key} differ in length between these prompts and it takes no mask for them: use "
                "captions of about the same length, or a batch size of 1."
            )
        return torch.cat(list(values))
    return first


def moved(value: Any, device: torch.device) -> Any:
    """A condition on another device."""
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


def bytes_of(value: Any) -> int:
    """Memory that the tensors of a condition take."""
    if isinstance(value, dict | list):
        return sum(map(bytes_of, value.values() if isinstance(value, dict) else value))
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0


def remembered(make: Callable[[Any], dict[str, Any]], most: int) -> Callable[[Hashable], dict[str, Any]]:
    """``make`` with its results kept, those used last as long as they take at most ``most`` bytes together."""
    kept: OrderedDict[Hashable, dict[str, Any]] = OrderedDict()
    size = 0

    def given(key: Hashable) -> dict[str, Any]:
        nonlocal size
        if key not in kept:
            kept[key] = make(key)
            size += bytes_of(kept[key])
            while size > most and len(kept) > 1:
                size -= bytes_of(kept.popitem(last=False)[1])
        kept.move_to_end(key)
        return kept[key]

    return given
