r"""Data to noise and back along the probability-flow ODE: a high-order table run backwards, and an exactly reversible
two-step method.

Both move the normalised state ``z = x/rho``, ``rho^2 = c^2 alpha^2 + sigma^2``, in the angle
``theta = atan(sigma/(c alpha))`` with data scale c (``data_std``), where the ODE is

    dz/dtheta = V(z, theta) = cos(theta) E[eps|x] - sin(theta) E[x_0|x]/c,

bounded at sigma = 0 and at alpha = 0.  The reversible method is the leapfrog

    z_{i+1} = z_{i-1} + (theta_{i+1} - theta_{i-1}) V(z_i, theta_i):

swapping the two ends is the same formula, so the run backwards retraces its states, for any network, with any number
of steps.  It is second order at one evaluation a step.  O-BELM (Wang et al. 2024, arXiv:2410.07273) is the
leapfrog in sigma/alpha; its parasitic mode is multiplied by the squared ratio of consecutive steps, the one here by -1.

Knows fields and nodes; knows nothing of pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffusers_sde.defaults import measured_defaults
from diffusers_sde.errors import check_finite, check_whole, is_real
from diffusers_sde.grids import Nodes, nodes_from_times
from diffusers_sde.methods.fields import Field
from diffusers_sde.named_grids import make_grid
from diffusers_sde.paths import Path
from diffusers_sde.tables import build_multistep, points_of
from diffusers_sde.weights import Point, evaluation_coefficients

Callback = Callable[[], Any]


@dataclass(frozen=True)
class Trajectory:
    """Where a run stands.

    Args:
        state: x at the last of the points (N, C, H, W).
        companion: for the reversible method x at the point before it, of the same shape; else None.
        points: the nodes run so far, in order.
    """

    state: torch.Tensor
    companion: torch.Tensor | None
    points: tuple[Point, ...]


def inversion_points(path: Path, steps: int, strength: float = 1.0, mu: float | None = None) -> tuple[Point, ...]:
    """The nodes of a run from the smallest training noise up to the largest (grid ``balanced``, rho 1.1), or of the
    first part of it.

    Args:
        path: the forward process.
        steps: of the whole run, 2 or more.
        strength: fraction of the steps, in (0, 1].
        mu: shift of a flow model with dynamic shifting.

    Returns:
        ``strength steps + 1`` points (at least 3), cleanest first.

    Raises:
        ValueError: for fewer than 2 steps or a strength outside (0, 1].
    """
    check_whole("num_inference_steps", steps, 2)
    if mu is not None:
        check_finite("mu", mu)
    if not (is_real(strength) and 0 < strength <= 1):
        raise ValueError(f"strength must lie in (0, 1], not {strength!r}: 1 goes all the way to noise.")
    nodes = nodes_from_times(path, make_grid(path, "balanced", steps, rho=1.1, mu=mu), final="sigma_min")
    points = sorted(points_of(nodes), key=lambda point: point.log_snr, reverse=True)
    return tuple(points[: max(math.ceil(strength * steps - 1e-9), 2) + 1])


def reversible(
    field: Field,
    start: Trajectory,
    points: Sequence[Point],
    *,
    data_std: float = 0.5,
    callback: Callback = lambda: None,
) -> Trajectory:
    """The leapfrog of the module docstring, second order at one evaluation a step.  To go back, hand the result and the
    reversed points over: the states of the way there are retraced up to rounding.

    Args:
        field: the network.
        start: where the run begins; without a companion it starts itself with one Heun step (2 evaluations).
        points: the nodes of the run, the first one where ``start`` stands.
        data_std: data scale c, positive.
        callback: called after each evaluation.

    Returns:
        The state at the last point, and its companion.

    Raises:
        ValueError: for ``data_std <= 0`` and for points that do not begin where the run stands.
    """
    if not (is_real(data_std) and data_std > 0):
        raise ValueError(f"data_std must be positive for the reversible method, not {data_std!r}.")
    if start.points[-1] != points[0]:
        raise ValueError("The points must start where the trajectory stands.")
    angles = [math.atan2(p.sigma, data_std * p.alpha) for p in points]
    scales = [math.hypot(data_std * p.alpha, p.sigma) for p in points]

    def velocity(z: torch.Tensor, i: int) -> torch.Tensor:
        v = field(z * scales[i], points[i], (-math.sin(angles[i]) / data_std, math.cos(angles[i])))
        callback()
        return v

    older = start.state / scales[0]
    if start.companion is None:
        h, slope = angles[1] - angles[0], velocity(older, 0)
        newer = older + 0.5 * h * (slope + velocity(older + h * slope, 1))
    else:  # the companion stands one node further on in the new direction: it was passed on the way here
        newer = start.companion / scales[1]
    for i in range(1, len(points) - 1):
        older, newer = newer, older + (angles[i + 1] - angles[i - 1]) * velocity(newer, i)
    return Trajectory(newer * scales[-1], older * scales[-2], tuple(points))


def multistep(
    field: Field,
    start: Trajectory,
    points: Sequence[Point],
    *,
    order: int = 2,
    callback: Callback = lambda: None,
) -> Trajectory:
    """The probability-flow table (:func:`diffusers_sde.tables.build_multistep`, with corrector) towards noise or data
    alike, at one evaluation a step.  Data scale and clock are the measured defaults of the path.

    Args:
        field: the network.
        start: where the run begins.
        points: the nodes of the run, the first one where ``start`` stands.
        order: of the table, 1 to 4.
        callback: called after each evaluation.

    Returns:
        The state at the last point, without a companion.
    """
    default = measured_defaults(field.path, len(points) - 1)
    data_std = default.data_std
    columns = zip(*((float(field.path.time(p.log_snr)), p.alpha, p.sigma) for p in points), strict=True)
    nodes = Nodes(*map(np.array, columns))
    table = build_multistep(
        field.path,
        nodes,
        order=order,
        corrector=order > 1,
        data_std=data_std,
        clock=default.clock,
        final="exact",
    )
    x = start.state
    history: list[torch.Tensor] = []
    for i, row in enumerate(table.rows):
        history.insert(0, field(x, points[i], evaluation_coefficients(data_std, row.alpha, row.sigma)))
        callback()
        x = row.a * x + sum(b * f for b, f in zip(row.b, history, strict=False))
        del history[table.history(i) :]
    return Trajectory(x, None, tuple(points))


def slerp(a: torch.Tensor, b: torch.Tensor, weight: float) -> torch.Tensor:
    """Interpolation of each sample on the great circle through two, ``(sin((1-w) phi) u + sin(w phi) v) / sin phi`` of
    their directions at angle phi (Shoemake 1985), with norms interpolated linearly: noise between two noises has their
    norm.  Nearly parallel samples are interpolated linearly.

    Args:
        a: (N, ...), at weight 0.
        b: (N, ...), at weight 1.
        weight: w.

    Returns:
        (N, ...).
    """
    left, right = a.flatten(1), b.flatten(1)
    norms = left.norm(dim=1, keepdim=True), right.norm(dim=1, keepdim=True)
    u, v = left / norms[0].clamp(min=1e-30), right / norms[1].clamp(min=1e-30)
    angle = (u * v).sum(1, keepdim=True).clamp(-1, 1).arccos()
    curved = (torch.sin((1 - weight) * angle) * u + torch.sin(weight * angle) * v) / angle.sin().clamp(min=1e-30)
    unit = torch.where(angle.sin().abs() < 1e-6, (1 - weight) * u + weight * v, curved)
    return (unit * ((1 - weight) * norms[0] + weight * norms[1])).reshape(a.shape)
