"""Tab 1, shown: controls, the sheet of cells, a slider between two of them, the program of one.

Knows gradio; :mod:`space.compare` computes.
"""

from __future__ import annotations

import functools
import html
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from diffusers_sde.comparison.engine import Comparison
from diffusers_sde.errors import UsageError
from diffusers_sde.sampler_names import SAMPLERS
from space import compare, inputs, models
from space.pictures import data_uri, picture
from space.turns import SHARED, in_turn
from space.visitors import waits
from space.widgets import download, friendly, greyed_models, image_tag, model_choices, progress_bar, prompt_box

EMPTY = '<div class="empty">Choose samplers and press <b>Compare</b>: the first pictures take a moment.</div>'
# a click, or Enter on a focused cell, chooses it
CHOOSE = """
element.addEventListener('click', (event) => {
  const cell = event.target.closest('[data-cell]');
  if (cell) trigger('select', {cell: cell.dataset.cell});
});
"""
# two pictures, one over the other up to the place of the slider
DRAG = """
element.addEventListener('input', (event) => {
  event.target.closest('.over').style.setProperty('--at', event.target.value + '%');
});
"""
REFERENCE = "reference"


def cell_name(sampler: str, budget: int) -> str:
    return f"{sampler} · {budget}"


def parse_cell(name: str) -> tuple[str, int]:
    sampler, budget = name.split(" · ")
    return sampler, int(budget)


def render(sheet: compare.Sheet, chosen: str | None = None) -> str:
    """The sheet as a table of buttons, one a cell, of use when all are there; holes where nothing is computed yet."""
    state = sheet.comparison
    head = "".join(f"<th scope='col'>{n} evaluations</th>" for n in state.budgets)
    body = []
    for name in state.samplers:
        cells = "".join(f"<td>{_cell(state, name, n, chosen)}</td>" for n in state.budgets)
        body.append(f"<tr><th scope='row'><b>{html.escape(name)}</b>{SAMPLERS[name].label}</th>{cells}</tr>")
    if state.reference is not None:
        own_error = "" if state.reference_error is None else f" · its own error {state.reference_error:.4f}"
        picture_of = image_tag(state.reference, "reference solution", extra="")
        body.insert(
            0,
            f"<tr><th scope='row'><b>{REFERENCE}</b>exact solution</th><td colspan='{len(state.budgets)}'>"
            f"<div class='cell' style='cursor:default'>{picture_of}"
            f"<small>{state.reference_steps} evaluations{own_error}</small></div></td></tr>",
        )
    return (
        f"{progress_bar(state.done, state.total)}<div class='scroll'>"
        f"<table class='sheet' style='--cell: {min(660 // len(state.budgets), 262)}px'>"
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(state: Comparison, name: str, budget: int, chosen: str | None) -> str:
    result = state.cell(name, budget)
    if result is None:
        absence = state.absence(name, budget) or "&nbsp;<br>&nbsp;"
        return f"<div class='cell' style='cursor:default'><div class='hole'></div><small>{absence}</small></div>"
    if result.mean is None:
        distance = "no distance: it draws noise" if SAMPLERS[name].stochastic else "distance follows"
    else:
        distance = f"distance <b{' class=best' if result.mean == state.best(budget) else ''}>{result.mean:.4f}</b>"
    key = cell_name(name, budget)
    waiting = "" if state.finished else " disabled"
    return (
        f"<button type='button' class='cell{' chosen' if key == chosen else ''}' data-cell='{key}'{waiting} "
        f"aria-label='{key} evaluations: choose'>{image_tag(result.images, key, extra='')}"
        f"<small>{distance}<br>{result.nfe} evaluations · {1000 * result.seconds:.0f} ms</small></button>"
    )


# -- handlers --


@friendly
def run(
    model: str, choice: str, prompt: str, seed: Any, budgets: str, samplers: list[str], guidance: Any
) -> Iterator[tuple]:
    """Stream the sheet: (html, request, left, right, code, slider, files, the part below the sheet)."""
    request = compare.checked(
        model=model, choice=choice, prompt=prompt, seed=seed, budgets=budgets, samplers=samplers, guidance=guidance
    )
    sheet = None
    for sheet in in_turn(functools.partial(compare.sheets, request), waits()):
        # what belongs to the last sheet goes until this one is finished
        yield render(sheet), None, *[gr.skip()] * 4, "", gr.update(visible=False)
    assert sheet is not None
    names = [cell_name(name, budget) for name, budget in sheet.comparison.jobs]
    first = names[0]
    yield (
        render(sheet, first),
        request,
        gr.update(choices=names, value=first),
        gr.update(choices=[REFERENCE, *names], value=REFERENCE),
        compare.program(request, *parse_cell(first)),
        slider(sheet, first, REFERENCE),
        files(sheet),
        gr.update(visible=True),
    )


def files(sheet: compare.Sheet) -> str:
    """Links to the sheet and its table."""
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        picture_file, table = (file.read_bytes() for file in compare.write_files(sheet, Path(folder)))
    return (
        download("compare-png", "Sheet (PNG)", "compare.png", "image/png", picture_file)
        + download("compare-csv", "Table (CSV)", "compare.csv", "text/csv", table)
    )  # fmt: skip


def slider(sheet: compare.Sheet, left: str, right: str) -> str:
    """Two cells as pictures with sharp pixels, the left one over the right one."""
    over, under = (_slider_picture(sheet, name) for name in (left, right))
    return (
        f'<div class="over"><img alt="{html.escape(right)}" src="{under}"><img alt="{html.escape(left)}" '
        f'src="{over}"><i></i><input type="range" min="0" max="100" step="0.5" value="50" '
        'aria-label="how much of the left picture is shown"></div>'
    )


def _slider_picture(sheet: compare.Sheet, name: str) -> str:
    state = sheet.comparison
    cell = None if name == REFERENCE else state.cell(*parse_cell(name))
    images = state.reference if cell is None else cell.images
    assert images is not None  # a finished sheet has them all
    return data_uri(picture(images, columns=2 if len(images) > 1 else 1))


@friendly
def choose(request: compare.Request | None, left: str | None, right: str | None) -> tuple:
    """The sheet with the chosen cell marked, that cell's program, and the slider: (html, code, slider)."""
    if request is None or not left or not right:
        return gr.skip(), gr.skip(), gr.skip()
    sheet = compare.finished(request)
    if sheet is None:
        raise UsageError("This sheet is no longer kept: press Compare again.")
    return render(sheet, left), compare.program(request, *parse_cell(left)), slider(sheet, left, right)


def clicked(event: gr.EventData) -> str:
    return event.cell


def for_model(key: str) -> tuple[Any, Any, Any, Any]:
    """Class, prompt, guidance and samplers as they fit a model."""
    model = models.MODELS[key]
    fitting, preselected = compare.choices(key)
    return (
        gr.update(choices=["mix", *model.classes], value="mix", visible=bool(model.classes)),
        gr.update(visible=model.prompted),
        gr.update(value=model.guidance or 1.0, visible=model.guidance is not None),
        gr.update(choices=fitting, value=preselected),
    )


def build(_tab: gr.Tab) -> None:
    """The tab's components and what connects them."""
    fitting, preselected = compare.choices(models.DEFAULT)
    model, default = models.MODELS[models.DEFAULT], compare.Request()
    gr.Markdown(
        "The same noise, several samplers, few network evaluations. The distance is the RMSE to the exact solution of "
        "the probability flow ODE from that noise.",
        elem_classes="lead",
    )
    with gr.Row():
        with gr.Column(scale=3, min_width=270):
            key = gr.Dropdown(model_choices(), value=model.key, label="Model", elem_id="compare-model")
            gr.HTML(greyed_models())
            choice = gr.Dropdown(["mix", *model.classes], value="mix", label="Class", visible=bool(model.classes))
            asking, prompt = prompt_box(model, "empty: the examples, one each")
            samplers = gr.CheckboxGroup(fitting, value=preselected, label="Samplers", elem_id="compare-samplers")
            budgets = gr.Textbox(
                ", ".join(map(str, default.budgets)),
                label="Evaluations",
                info=f"up to {inputs.MAX_BUDGETS} numbers to {inputs.MAX_NFE}",
            )
            with gr.Row():
                guidance = gr.Number(model.guidance, label="Guidance", minimum=0, maximum=20, step=0.5, min_width=90)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=inputs.MAX_SEED, min_width=90)
            with gr.Row():
                start = gr.Button("Compare", variant="primary", elem_id="compare-run", min_width=120)
                stop = gr.Button("Cancel", elem_id="compare-cancel", min_width=90)
        with gr.Column(scale=7, min_width=320):
            sheet_html = gr.HTML(EMPTY, js_on_load=CHOOSE, elem_id="compare-sheet")
            state = gr.State(None)
            links = gr.HTML()
            with gr.Column(visible=False) as details:  # from the first sheet on
                gr.HTML('<h4 class="part">Two cells, one over the other</h4>')
                with gr.Row():
                    left = gr.Dropdown([], label="Left: the chosen cell", min_width=140, elem_id="compare-left")
                    right = gr.Dropdown([], label="Right", min_width=140)
                pictures = gr.HTML(js_on_load=DRAG, elem_id="compare-slider")
                code = gr.Code(language="python", label="The chosen cell as a program", interactive=False, lines=6)

    outputs = [sheet_html, state, left, right, code, pictures, links, details]
    options: dict[str, Any] = {"api_visibility": "private"}
    running = gr.on(
        [start.click, prompt.submit, budgets.submit],
        run,
        [key, choice, prompt, seed, budgets, samplers, guidance],
        outputs,
        **SHARED,
        show_progress="hidden",
        **options,
    )
    stop.click(None, cancels=[running], **options)
    key.change(for_model, key, [choice, asking, guidance, samplers], show_progress="hidden", **options)
    quick: dict[str, Any] = {
        "show_progress": "hidden",
        "concurrency_limit": 8,
        "trigger_mode": "always_last",
        **options,
    }
    chosen = [choose, [state, left, right], [sheet_html, code, pictures]]
    sheet_html.select(clicked, None, left, **quick).then(*chosen, **quick)
    left.input(*chosen, **quick)  # input, not change: what run fills in is already shown
    right.input(*chosen, **quick)


# -- the API --


@friendly
def api(
    model: str = models.DEFAULT,
    choice: str = "mix",
    prompt: str = "",
    seed: float = 0,
    budgets: list[int] = [5, 10],  # noqa: B006  (gradio shows it; never changed)
    samplers: list[str] | None = None,
    guidance: float | None = None,
    images: float = 4,
) -> dict[str, Any]:
    """Compare samplers (by default the first of the model's) on one model from the same noise: for each cell true
    evaluations, milliseconds, the distance to the reference (null where noise is drawn) and the picture.  An
    empty prompt: the examples, one each; no guidance: the model's own.  A calibrated sampler has no cell at a number of
    evaluations that it was not calibrated for."""
    request = compare.checked(
        model=model,
        choice=choice,
        prompt=prompt,
        seed=seed,
        budgets=budgets,
        samplers=samplers,
        guidance=guidance,
        images=images,
    )
    *_, sheet = in_turn(functools.partial(compare.sheets, request), waits())
    cells = [
        {
            "sampler": r.sampler,
            "budget": r.budget,
            "evaluations": r.nfe,
            "milliseconds": round(1000 * r.seconds, 1),
            "distance": r.mean,
            "picture": data_uri(picture(r.images)),
        }
        for r in sheet.comparison.results
    ]
    return {"seed": request.seed, "cells": cells, "reference_error": sheet.comparison.reference_error}
