"""Small parts that several tabs share: the choice of a model, friendly errors, picture strips.

Knows gradio; knows nothing of what is computed.
"""

from __future__ import annotations

import functools
import html
import inspect
from collections.abc import Callable
from typing import Any

import gradio as gr
import torch

from diffusers_sde.errors import UsageError
from space import models
from space.pictures import data_uri, picture


def friendly(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with every :class:`UsageError` shown as a message, without a trace."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def stream(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from function(*args, **kwargs)
            except UsageError as error:
                raise gr.Error(str(error), print_exception=False) from error

        return stream

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except UsageError as error:
            raise gr.Error(str(error), print_exception=False) from error

    return call


def model_choices(embedded_only: bool = False) -> list[tuple[str, str]]:
    """(title, key) of the models that can be used here."""
    usable = (m for m in models.MODELS.values() if models.unavailable(m) is None)
    return [(m.title, m.key) for m in usable if m.embedded or not embedded_only]


def greyed_models() -> str:
    """The other models and why they cannot be used here."""
    missing = [(m.title, models.unavailable(m)) for m in models.MODELS.values()]
    chips = "".join(f"<span>{html.escape(t)} · {html.escape(r)}</span>" for t, r in missing if r)
    return f'<div class="grey" aria-label="models not available here">{chips}</div>' if chips else ""


def image_tag(images: torch.Tensor, alt: str, columns: int | None = None, extra: str = 'class="pic"') -> str:
    """Images (N, C, H, W) as one ``<img>``."""
    return f'<img {extra} alt="{html.escape(alt)}" src="{data_uri(picture(images, columns))}">'


def progress_bar(done: int, total: int) -> str:
    """A thin bar, gone when all is done."""
    if done >= total:
        return '<div class="bar" style="visibility:hidden"></div>'
    return (
        f'<div class="bar" role="progressbar" aria-valuenow="{done}" aria-valuemax="{total}">'
        f'<i style="width:{100 * done / total:.0f}%"></i></div>'
    )
