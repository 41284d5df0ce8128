"""Plots of the 2-D playground.  Knows plotly and what :mod:`space.playground` returns."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import plotly.graph_objects as go

from diffusers_sde import GaussianMixtureModel
from space.playground import EXTENT, WIDE, Flow, Guided, axis, density, score_field
from space.style import ACCENT, MUTED, OURS, framed

FRAMES, PATHS, ARROW_LENGTH = 20, 60, 0.18
SHADES = [[0.0, "rgba(47,127,134,0)"], [0.15, "rgba(47,127,134,.16)"], [1.0, "rgba(47,127,134,.72)"]]


def _square(
    figure: go.Figure, height: int, box: tuple[float, float, float] = (0.0, 0.0, EXTENT), **layout: Any
) -> go.Figure:
    """The square of half-width ``box[2]`` around a point, without axes."""
    x, y, half = box
    framed(figure, height, **{"margin": {"l": 8, "r": 8, "t": 34, "b": 8}, **layout})
    side = {"showticklabels": False, "showgrid": False, "ticks": "", "constrain": "domain"}
    figure.update_xaxes(range=[x - half, x + half], **side)
    figure.update_yaxes(range=[y - half, y + half], scaleanchor="x", **side)
    return figure


def _heat(values: np.ndarray, name: str, half: float = EXTENT) -> go.Heatmap:
    # the root shows the tails
    z = (255 * np.sqrt(values / max(values.max(), 1e-12))).astype(np.uint8)
    u = axis(len(values), half).astype(np.float32)
    return go.Heatmap(
        x=u, y=u, z=z, zmin=0, zmax=255, colorscale=SHADES, showscale=False, zsmooth="best", hoverinfo="skip",
        name=name, showlegend=True,
    )  # fmt: skip


def _points(xy: np.ndarray, name: str, colour: str = OURS, size: float = 4.5) -> go.Scatter:
    x, y = xy.astype(np.float32).T
    marker = {"size": size, "color": colour, "opacity": 0.72, "line": {"width": 0}}
    return go.Scatter(x=x, y=y, mode="markers", marker=marker, hoverinfo="skip", name=name)


def _broken_lines(starts_to_ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Polylines (M, K, 2) as one line with gaps."""
    gaps = np.full((len(starts_to_ends), 1, 2), np.nan)
    flat = np.concatenate([starts_to_ends, gaps], 1).reshape(-1, 2).astype(np.float32)
    return flat[:, 0], flat[:, 1]


def _arrows(model: GaussianMixtureModel, alpha: float, sigma: float) -> go.Scatter:
    """The score as strokes with a head: long where it is strong, up to a limit."""
    points, field = score_field(model, alpha, sigma)
    length = np.linalg.norm(field, axis=1, keepdims=True).clip(1e-9)
    step = field / length * ARROW_LENGTH * np.tanh(length)
    tip, side = points + step, np.stack([-step[:, 1], step[:, 0]], 1)
    x, y = _broken_lines(
        np.stack([points, tip, tip - 0.35 * step + 0.22 * side, tip, tip - 0.35 * step - 0.22 * side], 1)
    )
    return go.Scatter(
        x=x, y=y, mode="lines", line={"color": "rgba(113,123,138,.75)", "width": 1}, hoverinfo="skip", name="score"
    )


def draw_flow(model: GaussianMixtureModel, found: Flow) -> go.Figure:
    """Particles on the density of their noise level, with the score, moved by a slider or played."""
    steps = len(found.particles) - 1
    chosen = np.unique(np.linspace(0, steps, min(FRAMES, steps + 1)).round().astype(int))

    def layers(i: int) -> list[Any]:
        alpha, sigma = found.levels[i]
        return [
            _heat(density(model, alpha, sigma), "density"),
            _arrows(model, *(found.levels[i] if sigma else found.levels[i - 1])),
            _points(found.particles[i], "particles"),
        ]

    x, y = _broken_lines(np.swapaxes(found.particles[:, :PATHS], 0, 1))
    paths = go.Scatter(
        x=x, y=y, mode="lines", line={"color": "rgba(113,123,138,.38)", "width": 1}, hoverinfo="skip", name="paths",
        visible="legendonly",
    )  # fmt: skip
    names = [str(i) for i in chosen]
    labels = ["∞" if np.isposinf(found.log_snr[i]) else f"{found.log_snr[i]:.1f}" for i in chosen]
    frames = [go.Frame(name=name, data=layers(i), traces=[0, 1, 2]) for name, i in zip(names, chosen, strict=True)]
    figure = go.Figure([*layers(steps), paths], frames=frames)
    still = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    moving = {"fromcurrent": False, "frame": {"duration": 110, "redraw": True}, "transition": {"duration": 0}}
    _square(
        figure,
        560,
        margin={"l": 8, "r": 8, "t": 34, "b": 74},
        legend={"orientation": "h", "x": 0, "y": 1.01, "yanchor": "bottom", "font": {"size": 12}},
        updatemenus=[
            {
                "type": "buttons", "showactive": False, "x": 0, "y": -0.03, "xanchor": "left", "yanchor": "top",
                "pad": {"t": 8}, "bgcolor": "rgba(0,0,0,0)", "borderwidth": 1,
                "buttons": [{"label": "Play", "method": "animate", "args": [None, moving]}],
            }
        ],
        sliders=[
            {
                "active": len(names) - 1, "x": 0.16, "y": -0.03, "len": 0.84, "yanchor": "top", "pad": {"t": 6, "b": 0},
                "currentvalue": {"prefix": "log-SNR ", "xanchor": "left", "font": {"size": 12}},
                "ticklen": 0, "minorticklen": 0, "font": {"size": 1, "color": "rgba(0,0,0,0)"},
                "steps": [
                    {"label": label, "method": "animate", "args": [[name], still]}
                    for name, label in zip(names, labels, strict=True)
                ],
            }
        ],
    )  # fmt: skip
    figure.layout.sliders[0].currentvalue.font.color = MUTED
    return figure


def draw_guided(found: Guided) -> tuple[go.Figure, go.Figure, go.Figure]:
    """Guidance, Monte Carlo, and the effective sample size of the latter."""
    pair, box = [], _around(found)
    for particles, title in ((found.free, "classifier-free guidance"), (found.monte_carlo, "sequential Monte Carlo")):
        figure = go.Figure([_heat(found.law, "true law", WIDE), _points(particles, "particles", size=4)])
        title_of = {"text": title, "x": 0.02, "y": 0.965, "yanchor": "top", "font": {"size": 13}}
        pair.append(_square(figure, 360, box, showlegend=False, title=title_of))
    curve = go.Scatter(y=found.effective, mode="lines", line={"color": ACCENT, "width": 2}, hoverinfo="y")
    sizes = go.Figure([curve])
    title_of = {"text": "effective sample size", "x": 0.02, "y": 0.94, "yanchor": "top", "font": {"size": 13}}
    framed(sizes, 200, showlegend=False, title=title_of, margin={"l": 46, "r": 14, "t": 36, "b": 40})
    sizes.update_yaxes(range=[0, 1.04], tickformat=".0%", nticks=3)
    sizes.update_xaxes(title={"text": "step", "standoff": 4})
    return pair[0], pair[1], sizes


def _around(found: Guided) -> tuple[float, float, float]:
    """A square that holds the law and nearly all particles."""
    u = axis(len(found.law), WIDE)
    mass = found.law / found.law.sum()
    x, y = float(mass.sum(0) @ u), float(mass.sum(1) @ u)
    everything = np.concatenate([found.free, found.monte_carlo])
    far = np.quantile(np.abs(everything - [x, y]).max(1), 0.99)
    spread = 3 * math.sqrt(float(mass.sum(0) @ (u - x) ** 2 + mass.sum(1) @ (u - y) ** 2))
    return x, y, float(np.clip(1.15 * max(far, spread), 0.5, EXTENT))
