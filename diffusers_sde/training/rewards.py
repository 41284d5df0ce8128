"""Rewards: functions of pictures, prompts and labels; how they are found, weighted, called and checked.

A reward is called as ``reward(images, prompts, labels)`` with images (N, C, H, W) in [0, 1], prompts a list of N
strings and labels a list of N numbers, each None where the model is not asked for such, and returns N numbers: a
tensor, an array or a list.  For adjoint matching they are differentiable in the images.

Knows nothing of networks that sample, of steps or of processes.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusers_sde.assets import load_default_classifier, load_fashion_model
from diffusers_sde.configs import path_from_config
from diffusers_sde.errors import UsageError

Function = Callable[[torch.Tensor, Sequence[str] | None, Sequence[int] | None], Any]


class Reward(NamedTuple):
    """A function by the name that it was asked for by, and its weight."""

    name: str
    weight: float
    function: Function


class Spoiled(Exception):
    """A reward that is no number for a picture.

    Attributes:
        index: of the picture in the batch, None for the whole batch.
        what: happened, in words that go on "the reward ...".
    """

    def __init__(self, what: str, index: int | None = None) -> None:
        super().__init__(what)
        self.what, self.index = what, index


# -- built in --


def brightness(images: torch.Tensor, prompts: Any, labels: Any) -> torch.Tensor:
    """The mean value, 0 black to 1 white."""
    return images.mean((1, 2, 3))


def saturation(images: torch.Tensor, prompts: Any, labels: Any) -> torch.Tensor:
    """The mean distance of the largest and the smallest colour of a pixel, 0 grey to 1."""
    return (images.amax(1) - images.amin(1)).mean((1, 2))


def symmetry(images: torch.Tensor, prompts: Any, labels: Any) -> torch.Tensor:
    """1 minus the root mean square difference from the mirror image."""
    return 1 - ((images - images.flip(-1)).square().mean((1, 2, 3)) + 1e-8).sqrt()


def agreement(images: torch.Tensor, prompts: Any, labels: Sequence[int] | None) -> torch.Tensor:
    """``log p(label | picture)`` of the embedded Fashion-MNIST classifier."""
    classifier, time = _classifier(str(images.device))
    if labels is None or images.shape[1:] != (1, 32, 32):
        raise ValueError("agreement is for labelled grey pictures of 32x32, as of the embedded Fashion-MNIST model")
    known = torch.as_tensor(labels, device=images.device)
    return classifier(images * 2 - 1, time).log_softmax(1).gather(1, known[:, None])[:, 0]


@functools.cache
def _classifier(device: str) -> tuple[Any, float]:
    """The embedded classifier and the time of clean pictures."""
    path = path_from_config(load_fashion_model().scheduler.config)
    return load_default_classifier().requires_grad_(False).eval().to(device), float(path.cleanest)


BUILT_IN: dict[str, Function] = {
    "agreement": agreement,
    "brightness": brightness,
    "saturation": saturation,
    "symmetry": symmetry,
}


# -- found --


def find_rewards(names: Sequence[str], weights: Sequence[float] | None) -> list[Reward]:
    """The functions of these names: built in, ``module:function`` or ``file.py:function``.

    Args:
        names: at least one.
        weights: a number each; None: 1.

    Raises:
        UsageError: for one that cannot be imported or called.
    """
    return [Reward(n, w, find_reward(n)) for n, w in zip(names, weights or [1.0] * len(names), strict=True)]


def find_reward(name: str) -> Function:
    """The function of this name, see :func:`find_rewards`."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    source, colon, attribute = name.rpartition(":")
    if not colon:
        known = ", ".join(BUILT_IN)
        raise UsageError(f"There is no reward {name!r}: pass {known}, module:function or file.py:function.")
    try:
        module = _module_of_file(source) if source.endswith(".py") else importlib.import_module(source)
        function = functools.reduce(getattr, attribute.split("."), module)
    except Exception as error:  # whatever the user's module raises
        raise UsageError(
            f"The reward {name} cannot be imported ({type(error).__name__}: {error}): pass module:function of a module "
            "that Python finds from here, or file.py:function."
        ) from error
    if not callable(function):
        raise UsageError(f"The reward {name} is no function but a {type(function).__name__}.")
    return function


def _module_of_file(file: str) -> Any:
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    if spec is None or spec.loader is None or not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- called --


def total(
    rewards: Sequence[Reward],
    images: torch.Tensor,
    prompts: Sequence[str] | None,
    labels: Sequence[int] | None,
    differentiable: bool = False,
) -> torch.Tensor:
    """The weighted sum of the rewards.

    Args:
        images: (N, C, H, W) in [0, 1].
        prompts, labels: N each, or None.
        differentiable: whether it must depend on the images by autograd.

    Returns:
        (N,), float32 on the images' device.

    Raises:
        Spoiled: for what is no finite number of a picture.
    """
    value = torch.zeros(len(images), device=images.device)
    for reward in rewards:
        own = _checked(reward, _called(reward, images, prompts, labels), len(images)).to(images.device)
        if differentiable and not own.requires_grad:
            raise Spoiled(f"{reward.name} has no gradient: make it differentiable in the images, or use grpo or nft")
        value = value + reward.weight * own
    return value


def _called(reward: Reward, images: torch.Tensor, prompts: Any, labels: Any) -> Any:
    try:
        return reward.function(images, prompts, labels)
    except Exception as error:  # whatever the user's function raises
        said = f"{reward.name} raised {type(error).__name__} ({' '.join(str(error).split())[:200]})"
        for i in range(len(images) if len(images) > 1 else 0):  # which picture is it
            one = (None if v is None else v[i : i + 1] for v in (prompts, labels))
            try:
                reward.function(images[i : i + 1], *one)
            except Exception:
                raise Spoiled(said, i) from error
        raise Spoiled(said, 0 if len(images) == 1 else None) from error


def _checked(reward: Reward, value: Any, count: int) -> torch.Tensor:
    try:
        value = torch.as_tensor(value).float()
    except (TypeError, ValueError, RuntimeError) as error:
        raise Spoiled(
            f"{reward.name} returned {type(value).__name__}: it must return {count} numbers, one a picture"
        ) from error
    if value.shape != (count,):
        raise Spoiled(f"{reward.name} returned shape {tuple(value.shape)}: it must be ({count},), one number a picture")
    bad = (~value.detach().isfinite()).nonzero().flatten().tolist()
    if bad:
        raise Spoiled(f"{reward.name} returned {float(value[bad[0]])}", bad[0])
    return value
