"""The models that the demo offers, in one table, and why one cannot be offered here.

Knows where models lie, how to load each once, and how to make a pipeline of a request's own from shared components.
Knows no sampler and no interface.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from diffusers_sde.assets import ASSETS
from diffusers_sde.comparison.problems import Problem, make_problem, prompts_for
from diffusers_sde.conditioning import network_name
from diffusers_sde.errors import UsageError
from diffusers_sde.loading import load_pipeline
from diffusers_sde.methods.images import from_latents
from diffusers_sde.methods.pipeline_io import sample_shape
from diffusers_sde.sampling import Denoiser, network_denoiser, prompt_denoiser


@dataclass(frozen=True)
class Model:
    """One row of the table.  ``source``: the name of an embedded model or a Hub id; ``loader``: what loads the embedded
    one, of :mod:`diffusers_sde.assets`; ``classes``: the names of its labels, empty for none; ``prompted``: it makes
    pictures from text; ``guidance``: the scale to start with, None where there is no guidance; ``gpu``: too slow
    without one."""

    key: str
    title: str
    source: str
    loader: str = ""
    classes: tuple[str, ...] = ()
    prompted: bool = False
    guidance: float | None = None
    gpu: bool = False

    @property
    def embedded(self) -> bool:
        """Whether the package ships it."""
        return bool(self.loader)


_CLOTHES = "t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot"

MODELS: dict[str, Model] = {
    model.key: model
    for model in (
        Model("emoji", "Emoji from text", "emoji", "load_default_model", prompted=True, guidance=7.5),
        Model("emoji_flow", "Emoji, flow matching", "emoji_flow", "load_flow_model", prompted=True, guidance=7.5),
        Model(
            "fashion",
            "Fashion-MNIST",
            "fashion_mnist",
            "load_fashion_model",
            classes=tuple(_CLOTHES.split(", ")),
            guidance=2.0,
        ),
        Model("cat", "Cats 256 (DDPM)", "google/ddpm-cat-256", gpu=True),
        Model(
            "sd15",
            "Stable Diffusion 1.5",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            prompted=True,
            guidance=7.5,
            gpu=True,
        ),
        Model(
            "sdxl",
            "Stable Diffusion XL",
            "stabilityai/stable-diffusion-xl-base-1.0",
            prompted=True,
            guidance=5.0,
            gpu=True,
        ),
        Model(
            "sana",
            "Sana 0.6B (flow matching)",
            "Efficient-Large-Model/Sana_600M_512px_diffusers",
            prompted=True,
            guidance=4.5,
            gpu=True,
        ),
    )
}
DEFAULT = "emoji"

_loaded: dict[str, Any] = {}
_failed: dict[str, str] = {}
_lock = threading.Lock()


def has_gpu() -> bool:
    """Whether this machine can run the large models."""
    return torch.cuda.is_available()


def unavailable(model: Model) -> str | None:
    """Why this model cannot be used here, in a few words; None if nothing speaks against it."""
    if model.key in _failed:
        return _failed[model.key]
    if model.embedded and not (ASSETS / model.source / "model_index.json").is_file():
        return "not part of this installation"
    return "needs a GPU" if model.gpu and not has_gpu() else None


def find(key: str) -> Model:
    """The model of this key; raises :class:`UsageError` where there is none or it cannot be used here."""
    if key not in MODELS:
        raise UsageError(f"There is no model {key!r}: choose one of {', '.join(MODELS)}.")
    model, reason = MODELS[key], unavailable(MODELS[key])
    if reason:
        raise UsageError(f"{model.title} cannot be used here ({reason}): choose another model.")
    return model


def shared_pipeline(model: Model) -> Any:
    """The pipeline of a model, loaded once and shared by all requests: never change it, see :func:`own_pipeline`.

    Raises :class:`UsageError` where it cannot be loaded, and from then on says so in the table.
    """
    with _lock:
        if model.key not in _loaded:
            options = {} if model.embedded else {"dtype": torch.float16}
            try:
                pipe = load_pipeline(model.source, **options)
                if model.classes and pipe.unet.config.num_class_embeds != len(model.classes) + 1:
                    raise UsageError(f"{model.title} does not have the {len(model.classes)} classes of the table.")
                _loaded[model.key] = pipe.to("cuda" if model.gpu else "cpu")
            except (UsageError, RuntimeError) as error:
                _failed[model.key] = "could not be loaded"
                raise UsageError(f"{model.title} could not be loaded: {error}") from error
        return _loaded[model.key]


def own_pipeline(pipe: Any) -> diffusers.DiffusionPipeline:
    """A new pipeline on the same weights, whose scheduler and network may be replaced, set and intercepted without
    touching ``pipe``."""
    known = inspect.signature(type(pipe).__init__).parameters
    options = {k: v for k, v in pipe.config.items() if k in known and k not in pipe.components}
    name = network_name(pipe)
    parts = {**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler), name: copy.copy(getattr(pipe, name))}
    own = type(pipe)(**parts, **options)
    own.register_to_config(_name_or_path=pipe.name_or_path)  # where a calibrated scheduler may lie
    return own


def labels_of(model: Model, choice: str | None, count: int) -> list[int] | None:
    """The labels of ``count`` images of the class named ``choice``, None for a mix; raises :class:`UsageError`."""
    if not choice or choice == "mix" or not model.classes:
        return None
    if choice not in model.classes:
        raise UsageError(f"{model.title} has no class {choice!r}: choose mix or one of {', '.join(model.classes)}.")
    return [model.classes.index(choice)] * count


def prompts_of(prompt: str, count: int) -> list[str]:
    """What ``count`` images show: the prompt, or, where it is empty, an example each."""
    return prompts_for(count, prompt.strip() or None)


def problem(
    key: str,
    *,
    choice: str | None = None,
    prompt: str = "",
    seed: int = 0,
    guidance: float | None = None,
    images: int = 4,
) -> Problem:
    """Everything but the sampler, on a pipeline of this request's own.  Raises :class:`UsageError`."""
    model = find(key)
    return make_problem(
        own_pipeline(shared_pipeline(model)),
        num_images=images,
        seed=seed,
        guidance_scale=guidance if model.guidance is not None else None,
        prompt=prompts_of(prompt, images) if model.prompted else None,
        class_labels=labels_of(model, choice, images),
    )


@dataclass(frozen=True)
class OnePicture:
    """A model as a function of one state: its network guided, the shape (C, H, W) of a state, the config of its
    scheduler, and what makes pictures (N, 3 or 1, H, W) with values around [-1, 1] of states."""

    denoiser: Denoiser
    shape: tuple[int, ...]
    config: Any
    pictures: Callable[[torch.Tensor], torch.Tensor]


def one_picture(key: str, choice: str, prompt: str, guidance: float) -> OnePicture:
    """An embedded model asked for one picture: of a class, or of a prompt.  Raises :class:`UsageError`."""
    model = find(key)
    pipe: Any = own_pipeline(shared_pipeline(model))
    network, config = getattr(pipe, network_name(pipe) or ""), pipe.scheduler.config
    if not model.prompted:
        labels = torch.tensor(labels_of(model, choice, 1) or [0])
        return OnePicture(
            network_denoiser(network, labels, guidance), sample_shape(network), config, lambda states: states
        )
    denoiser = prompt_denoiser(pipe, prompts_of(prompt, 1), guidance)

    @torch.no_grad()
    def pictures(states: torch.Tensor) -> torch.Tensor:
        return torch.cat([from_latents(pipe.vae, part) for part in states.split(8)]).float()

    return OnePicture(denoiser, sample_shape(network), config, pictures)
