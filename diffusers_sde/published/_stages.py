"""Where the evaluations of a recipe lie: its coordinates, its lower levels, and stages between the nodes of a grid."""

from __future__ import annotations

import itertools
import math

import numpy as np

from diffusers_sde.grids import Nodes
from diffusers_sde.paths import FlowMatching, Path
from diffusers_sde.published._recipes import Recipe
from diffusers_sde.tables import points_of
from diffusers_sde.weights import Point

_SAME = 1e-9  # in log-SNR: levels nearer than this are one


def in_sigma(path: Path, recipe: Recipe) -> bool:
    """Whether the recipe's formula is one in sigma and x themselves: that of an ODE on flow matching, where
    ``(x - D)/sigma`` is the velocity, and everything stays finite at sigma = 1."""
    return path.family == FlowMatching.family and recipe.noise in ("none", "ancestral")


def levels(path: Path, nodes: Nodes, recipe: Recipe) -> tuple[Point, ...]:
    """The nodes in the recipe's coordinates: a flow model's sigma counts as that of a process with alpha = 1."""
    points = points_of(nodes)
    return tuple(Point(1.0, p.sigma) for p in points) if in_sigma(path, recipe) else points


def lower_level(start: Point, end: Point, recipe: Recipe, eta: float) -> Point:
    """Where the deterministic part of an ancestral step ends, at alpha of its end: ``s_d^2 = s_t^2 - s_u^2``,
    ``s_u = min(s_t, eta s_t sqrt(1 - s_t^2/s^2))``; of any other step its end."""
    if recipe.noise != "ancestral" or end.sigma == 0:
        return end
    ratio = end.sigma * start.alpha / (end.alpha * start.sigma)
    up = min(1.0, eta * math.sqrt(max(1 - ratio**2, 0.0)))
    return Point(end.alpha, end.sigma * math.sqrt(max(1 - up**2, 0.0)))


def _has_stages(start: Point, end: Point) -> bool:
    return math.isfinite(start.log_snr) and math.isfinite(end.log_snr)


def _stage_levels(start: Point, end: Point, recipe: Recipe, eta: float) -> list[float]:
    """The half log-SNR, in the recipe's coordinates, of each stage inside a step; that of the end where it is there."""
    low, top = start.log_snr, lower_level(start, end, recipe, eta).log_snr
    out = []
    for stage in recipe.stages[:-1]:
        at = stage.at
        place = (1 - at) * low + at * top
        if recipe.clock == "sigma":
            place = -math.log((1 - at) * math.exp(-low) + at * math.exp(-top))
        out.append(end.log_snr if abs(place - end.log_snr) < _SAME else place)
    return out


def with_stages(path: Path, nodes: Nodes, recipe: Recipe, eta: float = 1.0) -> Nodes:
    """The evaluations of a single-step recipe on a grid: its nodes, and the stages of every step between noise levels
    that are neither clean data nor pure noise without a finite level.

    Args:
        path: the forward process.
        nodes: of the grid: the ends of the steps.
        recipe: what is run.
        eta: of an ancestral method, on which the lower level depends.

    Returns:
        All nodes, of non-increasing noise; the grid's own for a multistep recipe.
    """
    if not recipe.stages:
        return nodes
    points = levels(path, nodes, recipe)
    out = []
    for i, (start, end) in enumerate(itertools.pairwise(points)):
        out.append((nodes.time[i], nodes.alpha[i], nodes.sigma[i]))
        for place in _stage_levels(start, end, recipe, eta) if _has_stages(start, end) else ():
            if place == end.log_snr:
                out.append((nodes.time[i + 1], nodes.alpha[i + 1], nodes.sigma[i + 1]))
            else:
                lam = path.log_snr_of_label(_label(path, place)) if in_sigma(path, recipe) else place
                alpha, sigma = path.alpha_sigma_of(lam)
                out.append((float(path.time(lam)), float(alpha), float(sigma)))
    out.append((nodes.time[-1], nodes.alpha[-1], nodes.sigma[-1]))
    return Nodes(*(np.array(column, np.float64) for column in zip(*out, strict=True)))


def _label(path: Path, place: float) -> float:
    """The label of a flow model's sigma ``e^-place``."""
    sigma = math.exp(-place)
    return float(path.sigma_label(1 - sigma, sigma))


def step_groups(path: Path, nodes: Nodes, recipe: Recipe, eta: float = 1.0) -> list[tuple[int, int]]:
    """``(first, size)`` of each step's evaluations: full steps where the stages lie as the recipe has them, steps of
    one evaluation elsewhere, as to clean data, from inside a step and on a grid of a user's own.

    Args:
        path: the forward process.
        nodes: of the run, n + 1.
        recipe, eta: as in :func:`with_stages`.

    Returns:
        Pairs that cover the n evaluations.
    """
    points = levels(path, nodes, recipe)
    out, i, n, size = [], 0, len(points) - 1, recipe.evaluations
    while i < n:
        full = size > 1 and i + size <= n and _has_stages(points[i], points[i + size])
        if full:
            expected = _stage_levels(points[i], points[i + size], recipe, eta)
            found = [p.log_snr for p in points[i + 1 : i + size]]
            full = max(abs(e - f) for e, f in zip(expected, found, strict=True)) < 1e3 * _SAME
        out.append((i, size if full else 1))
        i += out[-1][1]
    return out
