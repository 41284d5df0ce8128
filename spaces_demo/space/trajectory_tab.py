"""Tab 2, shown: a player along log-SNR, a filmstrip, and the pictures that stay.

Knows gradio; :mod:`space.trajectory` computes.
"""

from __future__ import annotations

import functools
import html
import json
from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr
import numpy as np

from diffusers_sde.assets import EXAMPLE_PROMPTS
from space import inputs, models, trajectory
from space.pictures import data_uri, picture
from space.turns import SHARED, in_turn
from space.visitors import waits
from space.widgets import friendly, image_tag, model_choices, progress_bar, prompt_box

EMPTY = '<div class="empty">Press <b>Run</b> and watch a picture leave the noise.</div>'
FRAMES_SHOWN = 9
# the frames travel with the page: moving the slider asks the server for nothing
PLAYER = """
let timer = null;
const frames = () => JSON.parse(element.querySelector('.player').dataset.frames);
function show(index) {
  const frame = frames()[index];
  element.querySelector('.noisy').src = frame.x;
  element.querySelector('.clean').src = frame.d;
  element.querySelector('output').textContent = 'log-SNR ' + frame.l;
  element.querySelector('input').value = index;
}
function stop() {
  clearInterval(timer); timer = null;
  const button = element.querySelector('.play');
  if (button) button.textContent = 'Play';
}
element.addEventListener('input', (event) => {
  if (event.target.matches('.player input')) { stop(); show(+event.target.value); }
});
element.addEventListener('click', (event) => {
  if (!event.target.matches('.play')) return;
  if (timer) { stop(); return; }
  event.target.textContent = 'Pause';
  const last = frames().length - 1;
  let index = +element.querySelector('input').value;
  if (index >= last) index = -1;
  timer = setInterval(() => {
    if (!element.querySelector('.player')) { stop(); return; }
    show(++index);
    if (index >= last) stop();
  }, 140);
});
"""


def level(log_snr: float) -> str:
    """A log-SNR in words short enough for a caption."""
    return "∞ (clean)" if np.isposinf(log_snr) else f"{log_snr:+.2f}"


def tiles(frames: Sequence[trajectory.Frame]) -> list[dict[str, str]]:
    """Each frame's state, predicted picture and log-SNR as the page shows them."""
    return [
        {
            "x": data_uri(picture(frame.state / frame.state.abs().max().clamp(min=1.0) * 1.4)),
            "d": data_uri(picture(frame.clean)),
            "l": level(frame.log_snr),
        }
        for frame in frames
    ]


def player(shown: list[dict[str, str]]) -> str:
    """Two pictures, a slider over log-SNR and a button that plays the way."""
    at = len(shown) // 2
    data = html.escape(json.dumps(shown), quote=True)
    return (
        f'<div class="player" data-frames="{data}">'
        f'<figure><figcaption>state x<sub>t</sub></figcaption><img class="pic noisy" '
        f'alt="state" src="{shown[at]["x"]}">'
        "</figure><figure><figcaption>predicted x<sub>0</sub></figcaption>"
        f'<img class="pic clean" alt="predicted picture" src="{shown[at]["d"]}"></figure>'
        '<div class="controls"><button type="button" class="play">Play</button>'
        f'<input type="range" min="0" max="{len(shown) - 1}" value="{at}" aria-label="place on the log-SNR axis">'
        f"<output>log-SNR {shown[at]['l']}</output></div></div>"
    )


def filmstrip(shown: list[dict[str, str]]) -> str:
    """A few moments: x_t above, the predicted x_0 below."""
    chosen = np.unique(np.linspace(0, len(shown) - 1, min(FRAMES_SHOWN, len(shown))).round().astype(int))
    columns = "".join(
        f'<div class="tile"><img class="pic" alt="state {i}" src="{shown[i]["x"]}">'
        f'<img class="pic" alt="prediction {i}" src="{shown[i]["d"]}"><small>{shown[i]["l"]}</small></div>'
        for i in chosen
    )
    return (
        '<h4 class="part">The way</h4><div class="note">above the state, below the predicted picture; numbers are '
        f'log-SNRs</div><div class="strip">{columns}</div>'
    )


def staying(state: trajectory.Journey) -> str:
    """Final pictures at 10, 20, 40 steps for each kind of sampler, with their likeness to the one at most steps."""
    if not state.staying:
        return ""
    rows = []
    for kind in dict.fromkeys(kind for kind, _ in state.staying):
        last = state.staying.get((kind, trajectory.STEP_COUNTS[-1]))
        cells = ""
        for n in trajectory.STEP_COUNTS:
            image = state.staying.get((kind, n))
            if image is None:
                continue
            known = last is not None and image is not last
            alike = f" · alike <b>{trajectory.likeness(image, last):.2f}</b>" if known else ""
            tag = image_tag(image, f"{kind}, {n} steps")
            cells += f'<td><div class="tile wide">{tag}<small>{n}{alike}</small></div></td>'
        whose = (
            "diffusers" if kind == "Euler ancestral" else f"tau = {state.request.tau or 1:g}" if kind == "SDE" else ""
        )
        rows.append(f"<tr><th scope='row'><b>{kind}</b>{whose}</th>{cells}</tr>")
    return (
        '<h4 class="part">One seed at 10, 20 and 40 steps</h4><div class="note">“alike” is the correlation with the '
        "picture at 40 steps: our SDE follows one Brownian path, so that its picture stays</div>"
        f"<div class='scroll'><table class='sheet'><tbody>{''.join(rows)}</tbody></table></div>"
    )


def dial(state: trajectory.Journey) -> str:
    """Final pictures from the ODE to the SDE."""
    pictures = "".join(
        f'<div class="tile wide">{image_tag(image, f"tau {tau:g}")}<small>tau = <b>{tau:g}</b>'
        f"{' (ODE)' if tau == 0 else ''}</small></div>"
        for tau, image in state.dial.items()
    )
    return f'<h4 class="part">From the ODE to the SDE</h4><div class="strip">{pictures}</div>' if pictures else ""


@friendly
def run(
    model: str, choice: str, prompt: str, seed: Any, steps: Any, tau: Any, guidance: Any
) -> Iterator[tuple[Any, str]]:
    """Stream (player, everything below it)."""
    request = trajectory.checked(
        model=model, choice=choice, prompt=prompt, seed=seed, steps=steps, tau=tau, guidance=guidance
    )
    way = ""
    for state in in_turn(functools.partial(trajectory.journey, request), waits()):
        shown, first = tiles(state.frames) if not way else [], not way
        way = way or filmstrip(shown)
        below = progress_bar(state.done, state.total) + way + staying(state) + dial(state)
        yield player(shown) if first else gr.skip(), below


def for_model(key: str) -> tuple[Any, Any, Any]:
    """Class, prompt and guidance as they fit a model."""
    model = models.MODELS[key]
    classes = list(model.classes)
    return (
        gr.update(choices=classes, value=classes[-1] if classes else None, visible=bool(classes)),
        gr.update(visible=model.prompted),
        gr.update(value=model.guidance),
    )


def build(_tab: gr.Tab) -> None:
    """The tab's components and what connects them."""
    model, default = models.MODELS[models.DEFAULT], trajectory.Request()
    gr.Markdown(
        "One picture on its way from noise: the state and what the network believes the picture to be. "
        "tau = 0 is the ODE, tau = 1 the reverse SDE; all have the same marginals.",
        elem_classes="lead",
    )
    with gr.Row():
        with gr.Column(scale=3, min_width=270):
            key = gr.Dropdown(model_choices(embedded_only=True), value=model.key, label="Model")
            choice = gr.Dropdown(list(model.classes), label="Class", visible=bool(model.classes))
            asking, prompt = prompt_box(model, f"empty: {EXAMPLE_PROMPTS[0]}")
            tau = gr.Slider(0, 2, default.tau, step=0.1, label="tau (0 ODE, 1 SDE)", elem_id="trajectory-tau")
            steps = gr.Slider(5, 60, default.steps, step=1, label="Steps")
            with gr.Row():
                guidance = gr.Number(model.guidance, label="Guidance", minimum=0, maximum=20, step=0.5, min_width=90)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=inputs.MAX_SEED, min_width=90)
            with gr.Row():
                start = gr.Button("Run", variant="primary", elem_id="trajectory-run", min_width=120)
                stop = gr.Button("Cancel", min_width=90)
        with gr.Column(scale=7, min_width=320):
            film = gr.HTML(EMPTY, js_on_load=PLAYER, elem_id="trajectory-player")
            below = gr.HTML("", elem_id="trajectory-below")
    options: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    running = gr.on(
        [start.click, prompt.submit],
        run,
        [key, choice, prompt, seed, steps, tau, guidance],
        [film, below],
        **SHARED,
        **options,
    )
    stop.click(None, cancels=[running], **options)
    key.change(for_model, key, [choice, asking, guidance], **options)


@friendly
def api(
    model: str = models.DEFAULT,
    choice: str = "",
    prompt: str = "",
    seed: float = 0,
    steps: float = 20,
    tau: float = 1.0,
    guidance: float | None = None,
) -> dict[str, Any]:
    """One sampling path: log-SNRs, the states and predicted pictures, at most 21, and the final picture at 10, 20 and
    40 steps with its correlation to the last.  An empty prompt: the first example; no guidance: the model's own."""
    request = trajectory.checked(
        model=model, choice=choice, prompt=prompt, seed=seed, steps=steps, tau=tau, guidance=guidance
    )
    *_, state = in_turn(functools.partial(trajectory.journey, request), waits())
    last = trajectory.STEP_COUNTS[-1]
    return {
        "seed": request.seed,
        "log_snr": [frame.log_snr if np.isfinite(frame.log_snr) else None for frame in state.frames],
        "frames": [{"state": tile["x"], "clean": tile["d"]} for tile in tiles(state.frames)],
        "alike": {
            f"{kind}, {n}": trajectory.likeness(image, state.staying[kind, last])
            for (kind, n), image in state.staying.items()
        },
    }
