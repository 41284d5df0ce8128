"""Small parts that several tabs share: the choice of a model, friendly errors, picture strips.

Knows gradio; knows nothing of what is computed.
"""

from __future__ import annotations

import base64
import functools
import html
import inspect
from collections.abc import Callable
from typing import Any

import gradio as gr
import torch

from diffusers_sde.assets import EXAMPLE_PROMPTS
from diffusers_sde.errors import UsageError
from space import inputs, models
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
    reasons: dict[str, list[str]] = {}
    for model in models.MODELS.values():
        if reason := models.unavailable(model):
            reasons.setdefault(reason, []).append(model.title)
    lines = "".join(
        f"<span>{html.escape(why)}: {html.escape(', '.join(which))}</span>" for why, which in reasons.items()
    )
    return f'<div class="grey" aria-label="models not available here">{lines}</div>' if lines else ""


_CHOOSE_PROMPT = """
element.addEventListener('click', (event) => {
  const example = event.target.closest('[data-prompt]');
  if (example) trigger('select', {prompt: example.dataset.prompt});
});
"""


def prompt_box(model: models.Model, placeholder: str) -> tuple[gr.Column, gr.Textbox]:
    """A box for a prompt with examples to click on, in a column that is there for models that take one."""
    examples = "".join(
        f'<button type="button" data-prompt="{html.escape(p)}">{html.escape(p)}</button>' for p in EXAMPLE_PROMPTS
    )
    with gr.Column(visible=model.prompted, min_width=0, elem_classes="prompt") as column:
        box = gr.Textbox(label="Prompt", placeholder=placeholder, max_length=inputs.MAX_PROMPT, lines=1, max_lines=3)
        chips = gr.HTML(f'<div class="examples">{examples}</div>', js_on_load=_CHOOSE_PROMPT)
    chips.select(_chosen_prompt, None, box, show_progress="hidden", api_visibility="private", concurrency_limit=8)
    return column, box


def _chosen_prompt(event: gr.EventData) -> str:
    return event.prompt


def download(identity: str, title: str, name: str, kind: str, data: bytes) -> str:
    """A link whose file is in the page, so that the server keeps none."""
    address = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return f'<a class="download" id="{identity}" download="{name}" href="{address}">{title}</a>'


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
