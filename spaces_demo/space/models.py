"""The models that the demo offers, in one table, and why one cannot be offered here.

Knows where models lie, how to load each once, and how to make a pipeline of a request's own from shared components.
Knows no sampler and no interface.
"""

from __future__ import annotations

import inspect
import threading
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

from diffusers_sde.assets import FASHION_MODEL
from diffusers_sde.comparison.problems import Problem, make_problem
from diffusers_sde.errors import UsageError
from diffusers_sde.loading import load_pipeline

ASSETS = FASHION_MODEL.parent


@dataclass(frozen=True)
class Model:
    """One row of the table.  ``source``: a folder of ``diffusers_sde/assets`` or a Hub id; ``classes``: the names of
    its labels, empty for none; ``prompted``: it makes pictures from text; ``guidance``: the scale to start with, None
    where there is no guidance; ``gpu``: too slow without one."""

    key: str
    title: str
    source: str
    classes: tuple[str, ...] = ()
    prompted: bool = False
    guidance: float | None = None
    gpu: bool = False

    @property
    def embedded(self) -> bool:
        """Whether the package ships it."""
        return "/" not in self.source


_CLOTHES = "t-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot"
_EMOJI = "smileys, people, animals & nature, food & drink, travel & places, activities, objects, symbols"

MODELS: dict[str, Model] = {
    model.key: model
    for model in (
        Model("fashion", "Fashion-MNIST", "fashion_mnist", tuple(_CLOTHES.split(", ")), guidance=2.0),
        Model("emoji", "Emoji", "noto_emoji", tuple(_EMOJI.split(", ")), guidance=2.0),
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
DEFAULT = "fashion"

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
                pipe = load_pipeline(str(ASSETS / model.source) if model.embedded else model.source, **options)
                if model.classes and pipe.unet.config.num_class_embeds != len(model.classes) + 1:
                    raise UsageError(f"{model.title} does not have the {len(model.classes)} classes of the table.")
                _loaded[model.key] = pipe.to("cuda" if model.gpu else "cpu")
            except (UsageError, RuntimeError) as error:
                _failed[model.key] = "could not be loaded"
                raise UsageError(f"{model.title} could not be loaded: {error}") from error
        return _loaded[model.key]


def own_pipeline(pipe: Any) -> diffusers.DiffusionPipeline:
    """A new pipeline on the same components, whose scheduler may be replaced without touching ``pipe``."""
    known = inspect.signature(type(pipe).__init__).parameters
    options = {k: v for k, v in pipe.config.items() if k in known and k not in pipe.components}
    own = type(pipe)(**pipe.components, **options)
    own.register_to_config(_name_or_path=pipe.name_or_path)  # where a calibrated scheduler may lie
    return own


def labels_of(model: Model, choice: str | None, count: int) -> list[int] | None:
    """The labels of ``count`` images of the class named ``choice``, None for a mix; raises :class:`UsageError`."""
    if not choice or choice == "mix" or not model.classes:
        return None
    if choice not in model.classes:
        raise UsageError(f"{model.title} has no class {choice!r}: choose mix or one of {', '.join(model.classes)}.")
    return [model.classes.index(choice)] * count


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
    labels = labels_of(model, choice, images)
    if model.prompted and not prompt.strip():
        raise UsageError(f"{model.title} makes pictures from text: write a prompt.")
    return make_problem(
        own_pipeline(shared_pipeline(model)),
        num_images=images,
        seed=seed,
        guidance_scale=guidance if model.guidance is not None else None,
        prompt=prompt.strip() if model.prompted else None,
        class_labels=labels,
    )
