"""Brownian noise that does not depend on the number of steps, the batch size or the device.

Knows a Brownian path on the log-SNR axis, drawn by dyadic bisection (Levy's construction), and a counter-based normal
generator.  The increment of each step is a linear combination of standard normals attached to tree nodes; its
coefficients are host floats known before sampling, so a path has no state: refining the grid refines the same path,
any step can be started from, and nothing is stored between steps.  Knows nothing of networks or schedulers.

The noise of a step of constant tau from s to t is ``r_t^(1+tau^2) (W(C_t) - W(C_s))`` with ``C = r^(-2 tau^2)``,
``r^2 = data_std^2 + (sigma/alpha)^2``: a Brownian motion in the clock C.  Where tau changes from step to step the
clocks are joined with continuous slope.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

# The tree spans this interval of half log-SNR; beyond it exp(-2 * 16) is below float32 rounding.
LOG_SNR_SPAN = 16.0
_EXTRA_LEVELS = 2  # bisections below the first interval that holds a single grid node
_MAX_LEVEL = 40


def brownian_weights(
    log_snr: Sequence[float] | np.ndarray, *, tau: float | Sequence[float] = 1.0, data_std: float = 0.0
) -> list[tuple[tuple[int, float], ...]]:
    """For each step of the grid, ``((node, weight), ...)`` with ``z = sum weight xi_node`` its unit-variance noise.

    ``log_snr``: the n + 1 half log-SNRs of a grid, non-decreasing; infinite ends allowed.  ``xi_node`` are independent
    standard normals, node 1 the root, node k split into 2k and 2k + 1.  Squared weights of a step sum to 1 and those
    of different steps are orthogonal: exactly a Brownian motion at the grid nodes.
    """
    lam = np.clip(np.asarray(log_snr, np.float64), -LOG_SNR_SPAN, LOG_SNR_SPAN)
    steps = len(lam) - 1
    taus = np.full(steps, float(tau)) if np.ndim(tau) == 0 else np.asarray(tau, np.float64)[:steps]
    clock = _joined_clock(lam, taus, data_std)
    values = _bisect(lam, clock)
    out = []
    for i in range(steps):
        weights = {k: values[i + 1].get(k, 0.0) - values[i].get(k, 0.0) for k in {**values[i], **values[i + 1]}}
        norm = math.sqrt(sum(w * w for w in weights.values()))
        out.append(tuple((k, w / norm) for k, w in sorted(weights.items()) if w) if norm > 0 else ())
    return out


def _joined_clock(lam: np.ndarray, taus: np.ndarray, data_std: float):
    """``K(lambda)``: on each step an affine image of ``C = r^(-2 tau^2)``, continuous with continuous slope."""

    def log_r(x: np.ndarray) -> np.ndarray:
        return 0.5 * np.logaddexp(2 * math.log(data_std), -2 * x) if 0 < data_std < math.inf else -x

    def local(x: np.ndarray, tau: float) -> tuple[np.ndarray, np.ndarray]:
        """C and dC/dlambda up to a factor; tau = 0 draws no noise and gets the plain clock lambda."""
        if math.isinf(data_std):  # variance tau^2 (s_s^2 - s_t^2): the clock is -s^2
            return -np.exp(-2 * x), 2 * np.exp(-2 * x)
        if tau == 0:
            return x, np.ones_like(x)
        c = np.exp(-2 * tau**2 * log_r(x))
        return c, 2 * tau**2 * c * np.exp(-2 * x - 2 * log_r(x))

    pieces = []  # (slope factor, offset) of each step's clock
    factor, offset = 1.0, 0.0
    for i, tau in enumerate(taus):
        if i and tau != taus[i - 1]:
            c_old, d_old = (float(v) for v in local(lam[i], taus[i - 1]))
            c_new, d_new = (float(v) for v in local(lam[i], tau))
            value = factor * c_old + offset
            factor = factor * d_old / d_new if d_new > 0 else factor
            offset = value - factor * c_new
        pieces.append((factor, offset))

    def clock(x: np.ndarray) -> np.ndarray:
        step = np.clip(np.searchsorted(lam, x, side="right") - 1, 0, len(taus) - 1)
        out = np.empty_like(x)
        for i in np.unique(step):
            chosen = step == i
            out[chosen] = pieces[i][0] * local(x[chosen], taus[i])[0] + pieces[i][1]
        return out

    return clock


def _bisect(lam: np.ndarray, clock) -> list[dict[int, float]]:
    """The Brownian value at each grid node as ``{tree node: coefficient}``."""
    out: list[dict[int, float]] = [{} for _ in lam]

    def bridge(k: int, at: float, left, right) -> dict[int, float]:
        (_, c_l, v_l), (_, c_r, v_r), c = left, right, float(clock(np.array([at]))[0])
        u = (c - c_l) / (c_r - c_l) if c_r > c_l else 0.5
        value = {n: (1 - u) * v_l.get(n, 0.0) + u * v_r.get(n, 0.0) for n in {**v_l, **v_r}}
        value[k] = math.sqrt(max((c - c_l) * (1 - u), 0.0))
        return value

    def visit(k: int, level: int, left, right, inside: list[int], spare: int) -> None:
        """Split (left, right), whose interior holds the grid nodes ``inside`` in increasing order."""
        if not inside:
            return
        distinct = len({lam[i] for i in inside})
        if level >= _MAX_LEVEL or (distinct == 1 and spare == 0):
            value = bridge(k, lam[inside[0]], left, right)
            for i in inside:
                out[i] = value
            return
        middle = 0.5 * (left[0] + right[0])
        here = (middle, float(clock(np.array([middle]))[0]), bridge(k, middle, left, right))
        spare = spare - (distinct == 1)
        visit(2 * k, level + 1, left, here, [i for i in inside if left[0] < lam[i] < middle], spare)
        visit(2 * k + 1, level + 1, here, right, [i for i in inside if middle < lam[i] < right[0]], spare)
        for i in inside:
            if lam[i] == middle:
                out[i] = here[2]

    ends = np.array([-LOG_SNR_SPAN, LOG_SNR_SPAN])
    low, high = (float(c) for c in clock(ends))
    left, right = (ends[0], low, {}), (ends[1], high, {1: math.sqrt(max(high - low, 0.0))})
    for i, x in enumerate(lam):
        if x >= ends[1]:
            out[i] = right[2]
    visit(2, 1, left, right, [i for i, x in enumerate(lam) if ends[0] < x < ends[1]], _EXTRA_LEVELS)
    return out


# -- counter-based normals --------------------------------------------------------------------------------------------


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Bijective avalanche of int64 (the finaliser of splitmix64, Steele et al. 2014, with arithmetic shifts masked)."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x ^ ((x >> 31) & ((1 << 33) - 1))


_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as int64


def _wrap(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63


def seeds_from_latents(sample: torch.Tensor) -> torch.Tensor:
    """One int64 seed per sample, a hash of its values (batch,): same latents, same seed; no synchronisation."""
    bits = sample.detach().float().contiguous().view(torch.int32).flatten(1).long()
    place = torch.arange(bits.shape[1], device=bits.device)
    return _mix(_mix(bits + place * _GOLDEN).sum(1))


def seeds_from_generator(generator, batch: int, device: torch.device) -> torch.Tensor:
    """One int64 seed per sample from a ``torch.Generator`` or a list with one generator per sample."""
    generators = generator if isinstance(generator, list | tuple) else [generator]
    if len(generators) not in (1, batch):
        raise ValueError(f"{len(generators)} generators for a batch of {batch}: pass one, or one for each sample.")
    each = batch if len(generators) == 1 else 1
    seeds = [torch.randint(-(2**62), 2**62, (each,), generator=g, device=g.device) for g in generators]
    return _mix(torch.cat([s.to(device) for s in seeds]))


def seeds_from_int(seed: int, batch: int, device: torch.device) -> torch.Tensor:
    """Seeds ``hash(seed, k)`` for the samples ``k`` of a batch."""
    return _mix(_mix(torch.full((batch,), seed, dtype=torch.int64, device=device)) + torch.arange(batch, device=device))


def normals(seeds: torch.Tensor, node: int, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """Standard normals (float32) of ``shape``: element e of sample k is a function of ``(seeds[k], node, e)`` only.

    splitmix64 counters through Box-Muller; two values per 64-bit word, uniforms of 24 bits (|z| < 5.9).
    """
    count = math.prod(shape[1:])
    half = (count + 1) // 2
    counter = torch.arange(half, device=seeds.device) * _GOLDEN
    key = _mix(seeds + _wrap(node * _GOLDEN))
    word = _mix(key[:, None] + counter)
    u = ((word >> 40) & 0xFFFFFF).float().add_(0.5).mul_(2.0**-24)
    v = ((word >> 8) & 0xFFFFFF).float().mul_(2.0**-24 * 2 * math.pi)
    radius = u.log_().mul_(-2).sqrt_()
    pair = torch.cat([radius * v.cos(), radius * v.sin()], 1)
    return pair[:, :count].reshape(shape)


def combine(weights: Sequence[tuple[int, float]], seeds: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """``z = sum weight xi_node``: the unit-variance noise of one step, float32."""
    out = torch.zeros(shape, dtype=torch.float32, device=seeds.device)
    for node, weight in weights:
        out.add_(normals(seeds, node, shape), alpha=weight)
    return out
