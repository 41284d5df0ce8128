"""A pipeline by name, for the commands, the training and the demo.

Knows the three things that a name can be (an embedded model, a folder, a hub id) and what to tell who gave a wrong
one.  Knows nothing of what is done with the pipeline.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch

from diffusers_sde.assets import embedded_models, shared_parts
from diffusers_sde.errors import UsageError


def load_pipeline(model: str, **options: Any) -> diffusers.DiffusionPipeline:
    """A pipeline by name.

    Args:
        model: the name of an embedded model, a folder of ``save_pretrained`` or a hub id.
        options: of ``from_pretrained``.

    Raises:
        UsageError: where there is none, or it cannot be loaded.
    """
    folder = embedded_models().get(model, Path(model))
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise UsageError(f"{model} is no pipeline (it has no model_index.json): pass a folder of save_pretrained.")
    if not folder.exists() and (model.count("/") != 1 or model.startswith((".", "/", "~"))):
        raise UsageError(f"{model} does not exist: pass a pipeline's folder or a hub id like google/ddpm-cifar10-32.")
    try:
        options = {**shared_parts(folder), **options}
        return diffusers.DiffusionPipeline.from_pretrained(folder if folder.exists() else model, **options)
    except Exception as error:  # whatever it is: hub, cache, network, json and weights each raise their own
        where = "is a broken pipeline folder" if folder.exists() else "is no folder and could not be had from the Hub"
        reason = " ".join(str(error).split())[:200]
        raise UsageError(
            f"{model} {where} ({type(error).__name__}: {reason}): check it, or pass another --model."
        ) from error


def default_device() -> str:
    """Where a model runs if nobody says where: ``cuda`` if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"
