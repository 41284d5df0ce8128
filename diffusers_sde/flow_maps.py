r"""Flow maps: one network evaluation that jumps along the probability-flow ODE from time t to time s.

Knows the jump as coefficients, the levels a gamma sampler jumps to, its table, the exact map of an exact denoiser, and
how straight trajectories are.
Knows no network architecture, no training loop and no scheduler.

A network output m of some ``prediction_type`` and the state ``x_t`` determine a data prediction D and a noise
prediction eps; the jump keeps both,

    X(x_t, t, s) = alpha_s D + sigma_s eps = k_x(t, s) x_t + k_m(t, s) m,      k_x(t, t) = 1,  k_m(t, t) = 0,

so it is the identity at s = t whatever m is, and exact where m is constant along the straight path from t to s.  A flow
map network says the m that makes it exact everywhere.  On flow matching paths with ``flow_prediction`` this is
``x_s = x_t + (sigma_s - sigma_t) u`` with the *average velocity* u of MeanFlow; on variance preserving paths with
``v_prediction`` the rotation ``x_s = cos(d) x_t - sin(d) v``, d the angle between t and s (TrigFlow, sCM).  On any
path ``flow_prediction`` is MeanFlow in the coordinates ``y = x/(alpha + sigma)``, ``r = sigma/(alpha + sigma)``:
``y_s = y_t + (r_s - r_t) u``.

* A *consistency* network (Song et al. 2023, arXiv:2303.01469) knows one target, s = the cleanest training time:
  ``f(x_t, t) = X(x_t, t, t_min)``, with ``f(x, t_min) = x`` exactly.  LCM (arXiv:2310.04378), TCD (arXiv:2402.19159).
* A *mean flow* network m(x_t, t, s) knows every target (Geng et al. 2025, arXiv:2505.13447; CTM, Kim et al. 2023,
  arXiv:2310.02279).  Along a trajectory the map obeys (Lai et al., arXiv:2510.21890, chapter 11)

      semigroup    X(X(x, t, u), u, s) = X(x, t, s)
      Eulerian     d/dt X(x_t, t, s) = 0;     flow matching: u = v - (t - s) du/dt, the MeanFlow identity (eq. 6)
      Lagrangian   d/ds X(x_t, t, s) = velocity(X(x_t, t, s), s)

A sampler jumps and re-noises by gamma (CTM, algorithm 3): to the level with ``(sigma/alpha)_u = sqrt(1 - gamma^2)
(sigma/alpha)_next``, then forward to the next level with noise of standard deviation ``gamma sigma_next``.  gamma = 1
is the multistep sampler of consistency models, gamma = 0 jumps deterministically.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp

from diffusers_sde.grids import Nodes
from diffusers_sde.paths import Path
from diffusers_sde.prediction import from_model
from diffusers_sde.tables import Row, Table


def jump_coefficients(path: Path, prediction_type: str, t: Any, s: Any) -> tuple[np.ndarray, np.ndarray]:
    """The jump in terms of the model output m: with ``m = A x_0 + B eps`` at t, ``det = alpha_t B - sigma_t A``,
    ``k_x = (alpha_s B - sigma_s A)/det``, ``k_m = (sigma_s alpha_t - alpha_s sigma_t)/det``.

    Args:
        path: the forward process.
        prediction_type: what m is.
        t, s: times to jump from and to, numbers or arrays that broadcast.

    Returns:
        ``(k_x, k_m)`` with ``x_s = k_x x_t + k_m m``, float64, of the broadcast shape.

    Raises:
        ValueError: for epsilon prediction at alpha = 0.
    """

    def one(alpha: float, sigma: float, alpha_s: float, sigma_s: float) -> tuple[float, float]:
        # a state at s that keeps x_0 and eps is one more prediction, with (A, B) = (alpha_s, sigma_s)
        if (alpha, sigma) == (alpha_s, sigma_s):
            return 1.0, 0.0
        return from_model(path, prediction_type, alpha, sigma, (alpha_s, sigma_s))

    return np.vectorize(one, otypes=[float, float])(*path.alpha_sigma(t), *path.alpha_sigma(s))


def jump(path: Path, prediction_type: str, x: torch.Tensor, m: torch.Tensor, t: Any, s: Any) -> torch.Tensor:
    """The jump of states, ``x_s = k_x x + k_m m``.

    Args:
        path, prediction_type: as in :func:`jump_coefficients`.
        x: the states (N, ...) at t.
        m: the model output (N, ...).
        t, s: times, numbers or one a sample (arrays or CPU tensors).

    Returns:
        The states (N, ...) at s.

    Raises:
        ValueError: as :func:`jump_coefficients`.
    """
    k_x, k_m = (_like(k, x) for k in jump_coefficients(path, prediction_type, _floats(t), _floats(s)))
    return k_x * x + k_m * m


def average_prediction(
    path: Path, prediction_type: str, x: torch.Tensor, x_s: torch.Tensor, t: Any, s: Any
) -> torch.Tensor:
    """The model output m whose :func:`jump` takes ``x`` at t to ``x_s`` at s: ``m = (x_s - k_x x)/k_m``.

    It is what a flow map network is trained on: with ``x_s = X(x_u, u, s)`` and x_u one small step further along the
    trajectory; u = s gives the ordinary target.

    Args:
        path, prediction_type, t, s: as in :func:`jump`.
        x, x_s: the states (N, ...) at t and at s.

    Returns:
        m (N, ...).

    Raises:
        ValueError: where t = s: nothing can be inferred there.
    """
    k_x, k_m = jump_coefficients(path, prediction_type, _floats(t), _floats(s))
    if np.any(k_m == 0):
        raise ValueError("A jump of length zero says nothing about the model output: choose s different from t.")
    return (x_s - _like(k_x, x) * x) / _like(k_m, x)


def gamma_targets(path: Path, nodes: Nodes, gamma: float) -> Nodes:
    """Where each step of ``nodes`` jumps to, n levels: ``(sigma/alpha)_u = sqrt(1 - gamma^2) (sigma/alpha)_next``;
    below the cleanest training level the terminal node.

    Args:
        path: the forward process.
        nodes: of the grid, n evaluations and the terminal node.
        gamma: 0 (deterministic jumps) to 1 (jumps to clean data).

    Returns:
        n nodes.

    Raises:
        ValueError: for another gamma.
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must lie between 0 (deterministic jumps) and 1 (jumps to clean data), not {gamma}.")
    time, alpha, sigma = nodes.time[1:].copy(), nodes.alpha[1:].copy(), nodes.sigma[1:].copy()
    if gamma > 0:
        kept = 0.5 * math.log1p(-(gamma**2)) if gamma < 1 else -math.inf
        log_snr = nodes.log_snr[1:] - kept
        inner = log_snr < float(path.log_snr(path.cleanest))
        time[inner] = path.time(log_snr[inner])
        alpha[inner], sigma[inner] = path.alpha_sigma_of(log_snr[inner])
        time[~inner], alpha[~inner], sigma[~inner] = nodes.time[-1], nodes.alpha[-1], nodes.sigma[-1]
    return Nodes(time, alpha, sigma)


def build_flow_map(path: Path, nodes: Nodes, gamma: float) -> Table:
    """The table of jump and re-noise, in terms of the data prediction D at each node (``data_std = 0``):

    ``x_u = (sigma_u/sigma_t) x + (alpha_u - alpha_t sigma_u/sigma_t) D``, then
    ``x_next = (alpha_next/alpha_u) x_u + c z`` with ``c^2 = sigma_next^2 - (alpha_next sigma_u/alpha_u)^2``.

    Args:
        path, nodes, gamma: as in :func:`gamma_targets`.

    Returns:
        One row an evaluation.

    Raises:
        ValueError: as :func:`gamma_targets`.
    """
    targets = gamma_targets(path, nodes, gamma)
    rows = []
    for i in range(len(nodes) - 1):
        alpha, sigma, alpha_u, sigma_u = (
            float(v) for v in (nodes.alpha[i], nodes.sigma[i], targets.alpha[i], targets.sigma[i])
        )
        forward = float(nodes.alpha[i + 1]) / alpha_u
        c = math.sqrt(max(float(nodes.sigma[i + 1]) ** 2 - (forward * sigma_u) ** 2, 0.0)) if gamma else 0.0
        kept = sigma_u / sigma
        rows.append(Row(float(nodes.time[i]), alpha, sigma, forward * kept, (forward * (alpha_u - alpha * kept),), c))
    return Table(tuple(rows), 0.0)


def straightness(states: torch.Tensor, nodes: Nodes) -> torch.Tensor:
    """How far trajectories are from straight lines, ``S = Int_0^1 |dy/dr - (y_end - y_start)|^2 dr`` of each (S(Z) of
    Liu et al. 2022, arXiv:2209.03003), 0 where one Euler step is exact.

    In the coordinates ``y = x/(alpha + sigma)``, ``r = sigma/(alpha + sigma)`` of the module docstring, where every
    path is the line from x_0 to eps; the part of r that the trajectory covers counts as the whole.  A polygon through
    the given states has at most the S of the curve.

    Args:
        states: those of a run (n + 1, N, ...), the first one included.
        nodes: their levels, as ``scheduler.levels`` says them.

    Returns:
        S of each trajectory (N,), float64, in squared units of x.

    Raises:
        ValueError: unless there is a state for each node.
    """
    if len(states) != len(nodes):
        raise ValueError(f"{len(states)} states for {len(nodes)} levels: pass the first state and one after each step.")
    flat, scale = states.double().flatten(2), nodes.alpha + nodes.sigma
    parts = np.diff(nodes.sigma / scale)
    y, part = flat / _like(scale, flat), _like(parts / parts.sum(), flat)
    return (part * (y.diff(dim=0) / part - (y[-1] - y[0])).square()).sum((0, 2))


def exact_flow_map(
    path: Path,
    denoise: Callable[[torch.Tensor, float, float], torch.Tensor],
    x: torch.Tensor,
    t: float,
    s: float,
    *,
    rtol: float = 1e-9,
    atol: float = 1e-9,
) -> torch.Tensor:
    """``X(x, t, s)`` of an exact denoiser ``D = denoise(x, alpha, sigma)`` by adaptive integration (DOP853), float64.

    The ODE is ``dy/dr = eps - D`` in the coordinates of the module docstring, finite at alpha = 0.

    Args:
        path: the forward process.
        denoise: D, (N, ...) to (N, ...).
        x: the states (N, ...) at t.
        t, s: times to go from and to, in either direction.
        rtol, atol: tolerances of the integrator.

    Returns:
        The states (N, ...) at s, float64.

    Raises:
        ValueError: for an end at sigma = 0.
        RuntimeError: if the solver fails.
    """
    (alpha, sigma), (alpha_s, sigma_s) = ([float(v) for v in path.alpha_sigma(u)] for u in (t, s))
    if sigma == 0 or sigma_s == 0:
        raise ValueError("The flow map is integrated between positive noise levels: use the cleanest training time.")

    def slope(r: float, y: np.ndarray) -> np.ndarray:
        a, b = (float(v) for v in path.alpha_sigma_of(math.log1p(-r) - math.log(r) if r < 1 else -math.inf))
        state = torch.from_numpy(y).reshape(x.shape) * (a + b)
        clean = denoise(state, a, b)
        return ((state - a * clean) / b - clean).flatten().numpy()

    start, end = sigma / (alpha + sigma), sigma_s / (alpha_s + sigma_s)
    if start == end:
        return x.double()
    y = (x.double() / (alpha + sigma)).flatten().numpy()
    solution = solve_ivp(slope, (start, end), y, method="DOP853", rtol=rtol, atol=atol)
    if not solution.success:
        raise RuntimeError(f"The flow map could not be integrated from t = {t:g} to {s:g}: {solution.message}")
    return torch.from_numpy(solution.y[:, -1]).reshape(x.shape) * (alpha_s + sigma_s)


def _floats(t: Any) -> np.ndarray:
    return np.asarray(t.detach().cpu() if isinstance(t, torch.Tensor) else t, np.float64)


def _like(k: np.ndarray, x: torch.Tensor) -> torch.Tensor:
    """Coefficients as a tensor of x's dtype that broadcasts over its samples."""
    return torch.as_tensor(k, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
