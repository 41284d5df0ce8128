"""Published samplers written out from their papers, in k-diffusion's coordinates: ``D(x, s)``, levels s that fall to 0,
and ``z``, the standard normals of each step in turn.  k-diffusion's own functions where it is installed."""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from scipy.integrate import quad


def k_diffusion_sampling():
    """The module ``k_diffusion.sampling`` of PyPI's k-diffusion, without its package and what that needs for training
    (wandb, kornia, torchvision, ...): it is installed with ``pip install --no-deps k-diffusion``."""
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        pytest.skip("k-diffusion is not installed: pip install --no-deps -c constraints.txt k-diffusion")
    package, utils = types.ModuleType("k_diffusion"), types.ModuleType("k_diffusion.utils")
    package.__path__ = list(spec.submodule_search_locations)
    package.utils, utils.append_dims = utils, lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)]
    absent = {name: mock.MagicMock() for name in ("torchdiffeq", "torchsde") if name not in sys.modules}
    with mock.patch.dict(sys.modules, {"k_diffusion": package, "k_diffusion.utils": utils, **absent}):
        at = importlib.util.spec_from_file_location("k_diffusion.sampling", Path(package.__path__[0]) / "sampling.py")
        module = importlib.util.module_from_spec(at)
        at.loader.exec_module(module)
    return module


def phi_1(h):
    return -math.expm1(-h) / h


def phi_2(h):
    return (1 - phi_1(h)) / h


# -- single step --


def exponential_step(D, x, s, t, c, a, b):
    """``x_t = e^-h x + h sum b_i D_i`` with stages ``e^(-c_i h) x + h sum a_ij D_j`` (Hochbruck & Ostermann 2005)."""
    h = math.log(s / t)
    stages = []
    for c_i, row in zip(c, a(h), strict=True):
        y = math.exp(-c_i * h) * x + h * sum(w * v for w, v in zip(row, stages, strict=True))
        stages.append(D(y, s * math.exp(-c_i * h)))
    return math.exp(-h) * x + h * sum(w * v for w, v in zip(b(h), stages, strict=True))


def two_stages(c):
    """Their eq. 5.3: order 2."""
    return (0, c), lambda h: [[], [c * phi_1(c * h)]], lambda h: [phi_1(h) - phi_2(h) / c, phi_2(h) / c]


def three_stages(c2, c3):
    """Their eq. 5.9: order 3, ``gamma`` from ``2 (gamma c2 + c3) = 3 (gamma c2^2 + c3^2)``."""
    gamma = (3 * c3**2 - 2 * c3) / (c2 * (2 - 3 * c2))

    def a(h):
        a32 = gamma * c2 * phi_2(c2 * h) + c3**2 / c2 * phi_2(c3 * h)
        return [[], [c2 * phi_1(c2 * h)], [c3 * phi_1(c3 * h) - a32, a32]]

    def b(h):
        b3 = phi_2(h) / (gamma * c2 + c3)
        return [phi_1(h) - (1 + gamma) * b3, gamma * b3, b3]

    return (0, c2, c3), a, b


def single_step(step):
    """A run of single steps, the last one returning D."""

    def run(D, x, levels, z):
        for s, t in itertools.pairwise(levels[:-1]):
            x = step(D, x, s, t)
        return D(x, levels[-2])

    return run


def exponential(tableau):
    return single_step(lambda D, x, s, t: exponential_step(D, x, s, t, *tableau))


def runge_kutta(c, a, b):
    """Butcher's scheme on ``dx/ds = (x - D)/s``."""

    def step(D, x, s, t):
        slopes = []
        for c_i, row in zip(c, a, strict=True):
            y, at = x + (t - s) * sum(w * d for w, d in zip(row, slopes, strict=True)), s + c_i * (t - s)
            slopes.append((y - D(y, at)) / at)
        return x + (t - s) * sum(w * d for w, d in zip(b, slopes, strict=True))

    return single_step(step)


def data_solver_2s(D, x, s, t):
    """DPM-Solver++(2S) (Lu et al. 2022, algorithm 1; r = 1/2), alpha = 1."""
    middle = math.sqrt(s * t)
    u = middle / s * x + (1 - middle / s) * D(x, s)
    return t / s * x + (1 - t / s) * D(u, middle)


def noise_solver_3(D, x, s, t):
    """DPM-Solver-3 (Lu et al. 2022, algorithm 2; r1 = 1/3, r2 = 2/3), alpha = 1."""
    h = math.log(s / t)
    at = [s * math.exp(-h / 3), s * math.exp(-2 * h / 3)]

    def eps(y, level):
        return (y - D(y, level)) / level

    e0 = eps(x, s)
    u1 = x - at[0] * math.expm1(h / 3) * e0
    d1 = eps(u1, at[0]) - e0
    u2 = x - at[1] * math.expm1(2 * h / 3) * e0 - 2 * at[1] * (math.expm1(2 * h / 3) / (2 * h / 3) - 1) * d1
    d2 = eps(u2, at[1]) - e0
    return x - t * math.expm1(h) * e0 - 1.5 * t * (math.expm1(h) / h - 1) * d2


def seeds(stages):
    """SEEDS-2 and -3 with data prediction (Gonzalez et al. 2023), tau = 1: the deterministic part is that of a step
    ``2 h`` of the decay ``e^-2h``; the noise of a stage is kept in the stages after it."""

    def run(D, x, levels, z):
        for s, t in itertools.pairwise(levels[:-1]):
            h, places = math.log(s / t), [i / stages for i in range(1, stages + 1)]
            values, noise, before = [D(x, s)], 0.0, s
            for i, r in enumerate(places):
                at, g = s * math.exp(-r * h), 2 * r * h
                first = -math.expm1(-g)
                mean = math.exp(-g) * x + first * values[0]
                if stages == 2 and i == 1:
                    mean = math.exp(-g) * x + first * values[1]
                if stages == 3 and i:
                    slope = g * phi_2(g) * r / places[i - 1]
                    mean = mean + slope * (values[-1] - values[0])
                decay = at / before
                noise = decay**2 * noise + at * math.sqrt(1 - decay**2) * next(z)
                x_at, before = mean + noise, at
                if i < stages - 1:
                    values.append(D(x_at, at))
            x = x_at
        return D(x, levels[-2])

    return run


# -- multistep --


def slope_run(combine):
    """``x += combine(levels, i, slopes)`` on ``d = (x - D)/s``, newest first; the last step returns D."""

    def run(D, x, levels, z):
        slopes = []
        for i, s in enumerate(levels[:-2]):
            slopes.insert(0, (x - D(x, s)) / s)
            x = x + combine(levels, i, slopes)
        return D(x, levels[-2])

    return run


def fixed(*rows):
    def combine(levels, i, slopes):
        row = rows[min(i, len(rows) - 1)]
        return (levels[i + 1] - levels[i]) * sum(w * d for w, d in zip(row, slopes, strict=False))

    return slope_run(combine)


def lagrange_integral(kernel, at, low, high):
    """``Int kernel(u) L_j(u) du`` for each node."""

    def basis(u, j):
        return math.prod((u - at[k]) / (at[j] - at[k]) for k in range(len(at)) if k != j)

    return [
        quad(lambda u, j=j: kernel(u) * basis(u, j), low, high, epsabs=1e-13, epsrel=1e-12)[0] for j in range(len(at))
    ]


def interpolated(order, of=lambda s: s, rate=lambda s: 1.0):
    """Adams-Bashforth in the coordinate ``of(s)`` with ``du = rate(s) ds``."""

    def combine(levels, i, slopes):
        at = [of(levels[i - j]) for j in range(min(order, i + 1))]
        low, high = of(levels[i]), of(levels[i + 1])
        return sum(w * d for w, d in zip(lagrange_integral(rate, at, low, high), slopes, strict=False))

    return slope_run(combine)


def exponential_weights(s, t, nodes, tau=0.0):
    """``A Int e^(-A (lambda_t - u)) L_j(u) du`` on log-SNR, ``A = 1 + tau^2``."""
    A, top = 1 + tau**2, -math.log(t)
    return lagrange_integral(lambda u: A * math.exp(-A * (top - u)), [-math.log(n) for n in nodes], -math.log(s), top)


def data_multistep(order, tau=0.0):
    """Exponential Adams-Bashforth on D."""

    def run(D, x, levels, z):
        values = []
        for i, s in enumerate(levels[:-2]):
            t = levels[i + 1]
            values.insert(0, D(x, s))
            weights = exponential_weights(s, t, levels[max(i - order + 1, 0) : i + 1][::-1], tau)
            x = (t / s) ** (1 + tau**2) * x + sum(w * v for w, v in zip(weights, values, strict=False))
            if tau:
                x = x + t * math.sqrt(1 - (t / s) ** (2 * tau**2)) * next(z)
        return D(x, levels[-2])

    return run


def unipc(order, variant):
    """UniPC with data prediction (Zhao et al. 2023, algorithms 5 to 8), alpha = 1: the coefficients solve
    ``R a = b``, of one unknown they are 1/2; the order falls towards the end."""

    def update(x, lam, values, i, p, new):
        h = lam[i + 1] - lam[i]
        B = -h if variant == "bh1" else math.expm1(-h)
        r = [(lam[i - k] - lam[i]) / h for k in range(1, p)] + ([1.0] if new is not None else [])
        D1 = [(v - values[0]) / q for v, q in zip([*values[1:p], *([] if new is None else [new])], r, strict=True)]
        result = math.exp(-h) * x - math.expm1(-h) * values[0]
        if not r:
            return result
        phi, factorial, b = math.expm1(-h) / -h - 1, 1, []
        for k in range(1, len(r) + 1):
            factorial *= k
            b.append(phi * factorial / B)
            phi = phi / -h - 1 / math.factorial(k + 1)
        a = np.linalg.solve(np.vander(r, increasing=True).T, b) if len(r) > 1 else [0.5]
        return result - B * sum(w * d for w, d in zip(a, D1, strict=True))

    def run(D, x, levels, z):
        lam, values, n = -np.log(levels[:-1]), [], len(levels) - 1
        before, p = None, 0
        for i, s in enumerate(levels[:-1]):
            new = D(x, s)
            if i == n - 1:
                return new
            if before is not None:
                x = update(before, lam, values, i - 1, p, new)
            values.insert(0, new)
            before, p = x, min(order, i + 1, n - i)
            x = update(before, lam, values, i, p, None)
        return None

    return run


def sa_solver(taus):
    """SA-Solver (Xue et al. 2023, algorithm 1): predictor on 3, corrector on 4 nodes, fewer at both ends."""

    def run(D, x, levels, z):
        values, n, before, drawn = [], len(levels) - 1, None, 0.0
        for i, s in enumerate(levels[:-1]):
            values.insert(0, D(x, s))
            if i == n - 1:
                return values[0]
            if i:
                x = (
                    adams(before, levels, i - 1, levels[i - min(4, i + 1, n - i) + 1 : i + 1][::-1], values, taus)
                    + drawn
                )
            before, order = x, min(3, i + 1, n - 1 - i)
            x = adams(x, levels, i, levels[i - order + 1 : i + 1][::-1], values, taus)
            drawn = 0.0
            if taus[i]:
                drawn = levels[i + 1] * math.sqrt(1 - (levels[i + 1] / s) ** (2 * taus[i] ** 2)) * next(z)
            x = x + drawn
        return None

    def adams(x, levels, i, nodes, values, taus):
        weights = exponential_weights(levels[i], levels[i + 1], nodes, taus[i])
        decay = (levels[i + 1] / levels[i]) ** (1 + taus[i] ** 2)
        return decay * x + sum(w * v for w, v in zip(weights, values, strict=False))

    return run


def ancestral_line(D, x, levels, z):
    """RES multistep to ``s_d = s_t^2/s`` on the line through the last two evaluations, then noise up to s_t."""
    values = []
    for i, s in enumerate(levels[:-2]):
        t = levels[i + 1]
        values.insert(0, D(x, s))
        weights = exponential_weights(s, t**2 / s, levels[max(i - 1, 0) : i + 1][::-1])
        x = (t / s) ** 2 * x + sum(w * v for w, v in zip(weights, values, strict=False))
        x = x + t * math.sqrt(1 - (t / s) ** 2) * next(z)
    return D(x, levels[-2])


# -- ER-SDE --


def er_phi(s):
    """The noise law ER-SDE 5 of Cui et al. 2023."""
    return s * (math.exp(s**0.3) + 10)


def er_sde(D, x, levels, z):
    """ER-SDE-Solver-2 (Cui et al. 2023, eq. 19): D to first order about s, its slope a backward difference."""
    values = []
    for i, s in enumerate(levels[:-2]):
        t = levels[i + 1]
        values.insert(0, D(x, s))
        ratio = er_phi(t) / er_phi(s)
        x = ratio * x + (1 - ratio) * values[0]
        if i:
            integral = quad(lambda u: 1 / er_phi(u), t, s, epsabs=1e-14, epsrel=1e-12)[0]
            slope = (values[0] - values[1]) / (s - levels[i - 1])
            x = x + (t - s + integral * er_phi(t)) * slope
        x = x + math.sqrt(t**2 - (ratio * s) ** 2) * next(z)
    return D(x, levels[-2])


def er_third_weight(s, t, before, two_before, value):
    """The third term of ER-SDE-Solver-3 as published, for evaluations ``value(s)``: first and second difference about s
    as if the first were exact there."""
    first, second = (
        (value(s) - value(before)) / (s - before),
        (value(before) - value(two_before)) / (before - two_before),
    )
    curvature = (first - second) / ((s - two_before) / 2)
    integral = quad(lambda u: 1 / er_phi(u), t, s)[0], quad(lambda u: (u - s) / er_phi(u), t, s)[0]
    return (
        (1 - er_phi(t) / er_phi(s)) * value(s)
        + (t - s + integral[0] * er_phi(t)) * first
        + ((t - s) ** 2 / 2 + integral[1] * er_phi(t)) * curvature
    )
