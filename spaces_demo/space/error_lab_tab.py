"""Tab 4, shown: error curves with their slopes, the stacked budget under its dials, a table to take away.

Knows gradio and plotly; :mod:`space.error_lab` computes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import gradio as gr
import plotly.graph_objects as go

from diffusers_sde.comparison.report import COLOURS
from diffusers_sde.sampler_names import SAMPLERS
from space import error_lab, inputs
from space.style import MUTED, framed
from space.turns import SHARED, in_turn
from space.visitors import waits
from space.widgets import download, friendly

SOURCE_COLOURS = {"initialisation": "#8f9bb3", "discretisation": "#2f7f86", "score": "#d9a441"}


def draw_curves(found: error_lab.Curves) -> go.Figure:
    """Error against evaluations, both logarithmic, the slope in the name."""
    figure = go.Figure()
    for name, points in found.points.items():
        slope = found.slope(name)
        label = name if slope is None else f"{name}  ~ n<sup>-{slope:.1f}</sup>"
        line = {"color": COLOURS.get(name, MUTED), "width": 2.6 if SAMPLERS[name].ours else 1.8}
        line["dash"] = "solid" if SAMPLERS[name].ours else "dot"
        x, y = zip(*points, strict=True)
        figure.add_scatter(
            x=x, y=y, mode="lines+markers", line=line, marker={"size": 6}, name=label,
            hovertemplate="%{x} evaluations<br>error %{y:.2e}<extra>" + name + "</extra>",
        )  # fmt: skip
    framed(
        figure,
        430,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        margin={"l": 62, "r": 14, "t": 30, "b": 58},
    )
    nfes = error_lab.NFES[found.problem]
    figure.update_xaxes(type="log", tickvals=nfes, ticktext=[str(n) for n in nfes], title="network evaluations n")
    figure.update_yaxes(type="log", exponentformat="power", dtick=1, title="RMSE to the exact solution")
    return figure


def draw_budget(found: error_lab.Budget) -> go.Figure:
    """The three sources stacked, and the whole error as a mark: never above the stack."""
    steps = [str(n) for n in found.steps]
    figure = go.Figure()
    for source in error_lab.SOURCES:
        figure.add_bar(
            x=steps, y=[p[source] for p in found.parts], name=source,
            marker={"color": SOURCE_COLOURS[source], "line": {"width": 0}},
            hovertemplate=source + " %{y:.3f}<extra></extra>",
        )  # fmt: skip
    figure.add_scatter(
        x=steps, y=[p["together"] for p in found.parts], mode="markers", name="whole error",
        marker={"symbol": "line-ew", "size": 34, "line": {"width": 3, "color": "#c23b4f"}},
        hovertemplate="whole error %{y:.3f}<extra></extra>",
    )  # fmt: skip
    framed(
        figure,
        360,
        barmode="stack",
        bargap=0.45,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
    )
    figure.update_xaxes(title="network evaluations", type="category")
    figure.update_yaxes(title="root mean square", rangemode="tozero")
    return figure


@friendly
def run(problem: str, samplers: list[str], seed: Any) -> Iterator[tuple[Any, error_lab.Curves, str]]:
    """Stream (plot, state, note)."""
    for found in in_turn(functools.partial(error_lab.curves, problem, samplers, seed), waits()):
        steps, own_error = found.comparison.reference_steps, found.comparison.reference_error
        quality = "" if own_error is None else f", its own error {own_error:.1e}"
        text = f"Reference: {steps} evaluations{quality}. Slopes are fitted to the last four points."
        yield draw_curves(found), found, f'<div class="note">{text}</div>'


@friendly
def weigh(noise: Any, score: Any, order: Any, seed: Any) -> tuple[Any, error_lab.Budget]:
    """The stacked budget under its dials."""
    found = error_lab.budget(error_lab.checked_dials(noise, score, order), inputs.seed(seed))
    return draw_budget(found), found


def first_curves(known: error_lab.Curves | None, *values: Any) -> Iterator[tuple]:
    """:func:`run` unless there is a result."""
    if known is None:
        yield from run(*values)
    else:
        yield gr.skip(), known, gr.skip()


def first_budget(known: error_lab.Budget | None, *values: Any) -> tuple:
    """:func:`weigh` unless there is a result."""
    return weigh(*values) if known is None else (gr.skip(), known)


def table(curves: error_lab.Curves | None, budget: error_lab.Budget | None) -> Any:
    """The link to the table, once both parts are there."""
    if curves is None or budget is None:
        return gr.skip()
    return download("errors-csv", "Table (CSV)", "errors.csv", "text/csv", error_lab.as_csv(curves, budget).encode())


def build(tab: gr.Tab) -> None:
    """The tab's components and what connects them."""
    dials = error_lab.Dials()
    gr.Markdown("How fast errors fall with the number of evaluations, and what they are made of.", elem_classes="lead")
    curves, budget = gr.State(None), gr.State(None)
    with gr.Row():
        with gr.Column(scale=3, min_width=270):
            problems = [(title, key) for key, title in error_lab.PROBLEMS.items()]
            problem = gr.Radio(problems, value="mixture", label="Problem")
            names = list(error_lab.DETERMINISTIC)
            samplers = gr.CheckboxGroup(names, value=list(error_lab.PRESELECTED), label="Samplers")
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=inputs.MAX_SEED)
            start = gr.Button("Measure", variant="primary", elem_id="errors-run")
            csv_link = gr.HTML()
        with gr.Column(scale=7, min_width=320):
            plot = gr.Plot(show_label=False, elem_id="errors-plot")
            note = gr.HTML()
    gr.HTML(
        '<h4 class="part">The budget</h4>'
        '<div class="note">Three sources of error on a mixture in four dimensions, '
        "each measured alone on coupled samples: a start from pure noise, finite steps, a network that is slightly "
        "wrong. The whole error is at most their sum.</div>"
    )
    with gr.Row():
        with gr.Column(scale=3, min_width=270):
            noise = gr.Slider(
                2, 40, dials.noise, step=1, label="Largest noise level sigma/alpha", elem_id="errors-noise"
            )
            score = gr.Slider(0, 0.3, dials.score, step=0.01, label="Score error of the network")
            order = gr.Radio([1, 2, 3], value=dials.order, label="Order of the solver")
        with gr.Column(scale=7, min_width=320):
            bars = gr.Plot(show_label=False, elem_id="errors-budget")
    options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    solve: dict[str, Any] = {**SHARED, **options}
    measured = start.click(run, [problem, samplers, seed], [plot, curves, note], **solve)
    measured.then(table, [curves, budget], csv_link, **options)
    weighed = gr.on(
        [noise.change, score.change, order.change, seed.change],
        weigh,
        [noise, score, order, seed],
        [bars, budget],
        trigger_mode="always_last",
        concurrency_limit=4,
        **options,
    )
    weighed.then(table, [curves, budget], csv_link, **options)
    # the first visit measures at once
    tab.select(first_budget, [budget, noise, score, order, seed], [bars, budget], **options)
    tab.select(first_curves, [curves, problem, samplers, seed], [plot, curves, note], **solve).then(
        table, [curves, budget], csv_link, **options
    )


@friendly
def api(
    problem: str = "mixture",
    samplers: list[str] = list(error_lab.PRESELECTED),  # noqa: B006  (gradio shows it; never changed)
    seed: float = 0,
    noise: float = 8.0,
    score: float = 0.05,
    order: float = 2,
) -> dict[str, Any]:
    """Errors with fitted slopes, the budget of their sources under its dials, and both as CSV."""
    dials = error_lab.checked_dials(noise, score, order)
    *_, found = in_turn(functools.partial(error_lab.curves, problem, samplers, inputs.seed(seed)), waits())
    made_of = error_lab.budget(dials, inputs.seed(seed))
    return {
        "seed": inputs.seed(seed),
        "errors": found.points,
        "slopes": {name: found.slope(name) for name in found.points},
        "budget": dict(zip(map(str, made_of.steps), made_of.parts, strict=True)),
        "csv": error_lab.as_csv(found, made_of),
    }
