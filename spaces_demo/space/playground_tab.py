"""Tab 3, shown: a distribution (chosen or drawn), particles that flow, guidance next to the true law.

Knows gradio; :mod:`space.playground` computes, :mod:`space.playground_plots` draws.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import gradio as gr

from diffusers_sde.weights import CLOCKS
from space import inputs, playground
from space.playground_plots import draw_flow, draw_guided
from space.widgets import friendly

CANVAS = '<canvas class="draw" width="520" height="520" role="img" aria-label="draw a distribution here"></canvas>'
# strokes become points in the coordinates of the plots; the server hears of them when the pen is lifted
DRAW = """
const canvas = element.querySelector('canvas'), pen = canvas.getContext('2d');
let points = [], down = false;
function at(event) {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}
function mark(u, v) {
  pen.fillStyle = '#d1495b';
  pen.beginPath(); pen.arc(u * canvas.width, v * canvas.height, 7, 0, 7); pen.fill();
}
function add(event) {
  const [u, v] = at(event), x = (2 * u - 1) * EXTENT, y = (1 - 2 * v) * EXTENT;
  const last = points[points.length - 1];
  if (points.length >= LIMIT || (last && Math.hypot(x - last[0], y - last[1]) < 0.05)) return;
  points.push([+x.toFixed(3), +y.toFixed(3)]);
  mark(u, v);
}
canvas.addEventListener('pointerdown', (e) => { down = true; canvas.setPointerCapture(e.pointerId); add(e); });
canvas.addEventListener('pointermove', (e) => { if (down) add(e); });
const up = () => { if (down) { down = false; trigger('input', {points: JSON.stringify(points)}); } };
canvas.addEventListener('pointerup', up);
canvas.addEventListener('pointercancel', up);
element.addEventListener('click', (e) => {
  if (!e.target.matches('.wipe')) return;
  points = []; pen.clearRect(0, 0, canvas.width, canvas.height);
});
""".replace("EXTENT", str(playground.EXTENT)).replace("LIMIT", str(playground.MAX_POINTS))
WIPE = (
    '<button type="button" class="wipe" style="font-size:.84rem;text-decoration:underline;cursor:pointer">Wipe</button>'
)
NAMES = ("distribution", "points", "tau", "order", "clock", "grid", "steps", "particles", "seed", "component", "scale")


def _request(values: tuple) -> playground.Request:
    """A request of the tab's inputs; a component that the distribution does not have becomes its last one."""
    given = dict(zip(NAMES, values, strict=True))
    known = playground.mixture(playground.checked(**{**given, "component": None})).config.weights
    return playground.checked(**{**given, "component": min(int(given["component"] or 1), len(known)) - 1})


@friendly
def run(*values: Any) -> Iterator[tuple[Any, ...]]:
    """Stream all plots and the notes on them: the flow first, then guidance."""
    request = _request(values)
    found, keep = playground.flow(request), gr.skip()
    note = (
        f'<div class="note">Sliced Wasserstein distance to the data <b>{found.distance:.3f}</b>; of as many exact '
        f"samples <b>{found.floor:.3f}</b>. Click names above the plot to show or hide layers.</div>"
    )
    yield draw_flow(playground.mixture(request), found), note, keep, keep, keep, keep
    steered = playground.guided(request)
    free, monte_carlo = steered.distances
    guided_note = (
        '<div class="note">The ground is the true law p(x) p(y | x)<sup>w</sup>. Distance to it: guidance '
        f"<b>{free:.3f}</b>, Monte Carlo <b>{monte_carlo:.3f}</b>, exact samples <b>{steered.floor:.3f}</b>. Guidance "
        "aims at that law at every noise level, and so samples another one unless w = 1.</div>"
    )
    yield keep, keep, *draw_guided(steered), guided_note


def drawn(event: gr.EventData) -> tuple[str, str]:
    """The points of the canvas, and the distribution that they are."""
    return json.dumps(json.loads(event.points)), playground.DRAWN


def build(tab: gr.Tab) -> None:
    """The tab's components and what connects them; every change is shown at once."""
    default = playground.Request()
    gr.Markdown(
        "An exact score instead of a network: particles flow from noise to a mixture of Gaussians.", elem_classes="lead"
    )
    points = gr.State(None)
    with gr.Row():
        with gr.Column(scale=3, min_width=270):
            names = [*playground.DISTRIBUTIONS, playground.DRAWN]
            distribution = gr.Radio(names, value=default.distribution, label="Distribution", elem_id="playground-shape")
            tau = gr.Slider(0, 2, default.tau, step=0.1, label="tau (0 ODE, 1 SDE)")
            steps = gr.Slider(2, 60, default.steps, step=1, label="Steps", elem_id="playground-steps")
            order = gr.Radio([1, 2, 3], value=default.order, label="Order")
            with gr.Row():
                clock = gr.Dropdown(["default", *CLOCKS], value="default", label="Clock", min_width=110)
                grid = gr.Dropdown(list(playground.GRID_CHOICES), value="default", label="Grid", min_width=110)
            with gr.Row():
                particles = gr.Number(
                    default.particles, label="Particles", precision=0, minimum=10, maximum=1000, min_width=90
                )
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=inputs.MAX_SEED, min_width=90)
            with gr.Accordion("Draw a distribution", open=False):
                canvas = gr.HTML(CANVAS + WIPE, js_on_load=DRAW, elem_id="playground-canvas")
        with gr.Column(scale=7, min_width=320):
            plot = gr.Plot(show_label=False, elem_id="playground-plot")
            note = gr.HTML()
    gr.HTML('<h4 class="part">Guidance towards one component, two ways</h4>')
    with gr.Row():
        component = gr.Slider(1, 8, 2, step=1, label="Component", min_width=160)
        scale = gr.Slider(0, 8, default.scale, step=0.5, label="Guidance w", min_width=160)
    with gr.Row():
        free = gr.Plot(show_label=False, min_width=280)
        monte_carlo = gr.Plot(show_label=False, min_width=280)
    guided_note = gr.HTML()
    effective = gr.Plot(show_label=False)

    controls = [distribution, points, tau, order, clock, grid, steps, particles, seed, component, scale]
    outputs = [plot, note, free, monte_carlo, effective, guided_note]
    options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    changes = [c.change for c in controls if c is not distribution]
    gr.on(
        [*changes, distribution.input],
        run,
        controls,
        outputs,
        trigger_mode="always_last",
        concurrency_limit=4,
        concurrency_id="playground",
        **options,
    )
    canvas.input(drawn, None, [points, distribution], trigger_mode="always_last", **options)
    tab.select(run, controls, outputs, **options)


@friendly
def api(
    distribution: str = "moons",
    points: list[list[float]] | None = None,
    tau: float = 0.0,
    order: float = 2,
    clock: str = "default",
    grid: str = "default",
    steps: float = 20,
    particles: float = 300,
    seed: float = 0,
    component: float | None = None,
    scale: float = 3.0,
) -> dict[str, Any]:
    """Particles of a two-dimensional mixture: their last positions and the distance to the data; with a ``component``
    (from 0) also guidance towards it, two ways."""
    values = (distribution, points, tau, order, clock, grid, steps, particles, seed, component, scale)
    request = playground.checked(**dict(zip(NAMES, values, strict=True)))
    found = playground.flow(request)
    answer: dict[str, Any] = {
        "seed": request.seed,
        "particles": found.particles[-1].tolist(),
        "distance": found.distance,
        "floor": found.floor,
    }
    if request.component is not None:
        steered = playground.guided(request)
        answer["guided"] = {
            "distances": {"guidance": steered.distances[0], "monte_carlo": steered.distances[1]},
            "floor": steered.floor,
            "effective_sample_size": steered.effective.tolist(),
        }
    return answer
