r"""Exact log-likelihood by the probability-flow ODE and the instantaneous change of variables.

In the normalised state ``z = x/rho``, ``rho^2 = c^2 alpha^2 + sigma^2``, the angle ``theta = atan(sigma/(c alpha))``
and the clock ``u = log tan(theta/2)``,

    dz/du = sin(theta) (cos(theta) E[eps|x] - sin(theta) E[x_0|x]/c) = cos(theta) z - E[x_0|x]/c =: G,
    log p(x_0) = log p(z_T) + Int_{u_0}^{u_T} div G du - d log(rho_0/alpha_0)

(Chen et al. 2018, arXiv:1806.07366, theorem 1; Song et al. 2021, arXiv:2011.13456, eq. 39; Lai et al.,
arXiv:2510.21890, chapter 4).  G is bounded at both ends; u is the log-SNR near the data and the angle near the noise,
where it ends at 0 even for alpha = 0 (on the embedded network its error was a third of the angle's at 120 evaluations).
G is affine in the network's output m: the divergence of its linear part is exact and only ``tr dm/dx`` is estimated
(Hutchinson 1990).  What is computed is the density of the data at the smallest noise level of the run, ``x_0 + s eps``;
images have no density without it.

The integrator is scipy's RK45 with its error measured for each sample and for the log-density by itself.
Knows fields; knows nothing of pictures or pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.integrate import RK45

from diffusers_sde.errors import check_whole, is_real
from diffusers_sde.methods.fields import Field
from diffusers_sde.weights import Point

DISTRIBUTIONS = ("rademacher", "gaussian")
PRIORS = ("matched", "standard")


@dataclass(frozen=True)
class LogLikelihood:
    """``log_density`` (N,) in nats, float64, and what its error is made of.

    ``solver_error`` (N,): the sum over steps of ``|e_l + score . e_z|``, RK45's local errors of the integral and of the
    state as they reach the result.  ``trace_error`` (N,): its standard error over the probes (0 for the exact trace,
    nan for a single probe).  ``prior_error`` (N,): ``|z_T . (score(z_T) - grad log prior(z_T))|``, the next order of
    the prior by the network's own score (0 where the noise is pure).  ``noise`` (N, ...): the state at the noisy end.
    ``evaluations``: of the network, each for all probes.
    """

    log_density: torch.Tensor
    solver_error: torch.Tensor
    trace_error: torch.Tensor
    prior_error: torch.Tensor
    noise: torch.Tensor
    evaluations: int

    @property
    def error(self) -> torch.Tensor:
        """The three together, with one standard error of the trace; nan, unknown, where that is: it is the largest."""
        return self.solver_error + self.trace_error + self.prior_error


def log_likelihood(
    field: Field,
    x: torch.Tensor,
    *,
    divergence: str = "hutchinson",
    num_probes: int = 1,
    distribution: str = "rademacher",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    noise_std: float | None = None,
    data_std: float = 1.0,
    prior: str = "matched",
    probe_batch: int = 16,
    generator: torch.Generator | None = None,
    progress: Callable[[float], None] = lambda fraction: None,
) -> LogLikelihood:
    """The log-density of data at a small noise level, by the formula of the module docstring.

    Args:
        field: the network.
        x: the data (N, ...), in its own units.
        divergence: exact (as many backward passes as dimensions) or hutchinson.
        num_probes: of Hutchinson's estimate.
        distribution: of the probes, rademacher or gaussian.
        rtol: relative tolerance of RK45, for the state and for the log-density of each sample.
        atol: absolute tolerance, likewise.
        noise_std: the noise level ``s = sigma/alpha`` at which the data is looked at; None: the smallest trained one.
        data_std: data scale c of the coordinate.
        prior: at the noisy end ``N(alpha_T m, sigma_T^2 + c^2 alpha_T^2)``, matched: with m the network's
            ``E[x_0|x_T=0]``, standard: with m = 0 (one evaluation less).  Its error is part of the result.
        probe_batch: how many probes share one evaluation.
        generator: draws the probes, on the CPU.
        progress: called with the fraction of the way done.

    Returns:
        :class:`LogLikelihood`.

    Raises:
        ValueError: for options that do not exist or do not fit.
        ArithmeticError: where RK45 finds no step that meets the tolerances.
    """
    _check(divergence, num_probes, distribution, prior, rtol, atol, data_std)
    start, end = _ends(field, noise_std)
    clock = [math.log(math.tan(math.atan2(p.sigma, data_std * p.alpha) / 2)) for p in (start, end)]
    count, size = len(x), x[0].numel()
    shape, device = x.shape, x.device
    if divergence == "hutchinson":
        probes = _draw(distribution, (num_probes, *shape), generator).to(device)
        columns = num_probes
    else:
        probes, columns = None, 1
    evaluations = 0

    def slope(u: float, y: np.ndarray) -> np.ndarray:
        nonlocal evaluations
        evaluations += 1
        point = end if u >= clock[1] else _point(field, u, data_std)  # the end exactly: its log-SNR may be infinite
        rho, sin, cos = math.hypot(data_std * point.alpha, point.sigma), 1 / math.cosh(u), -math.tanh(u)
        k_x, k_m = field.coefficients(point, (-(sin**2) / data_std, sin * cos))
        z = torch.from_numpy(y.reshape(count, size + columns)[:, :size]).to(device, x.dtype)
        state = (z * rho).reshape(shape)
        m, traces = output_and_traces(lambda v: field.output(v, point), state, probes, probe_batch)
        g = k_x * rho * z + k_m * m.reshape(count, size)
        out = torch.cat([g, rho * (k_x * size + k_m * traces)], dim=1)
        return out.double().cpu().numpy().ravel()

    rho_0 = math.hypot(data_std * start.alpha, start.sigma)
    first = torch.cat([(x * (start.alpha / rho_0)).reshape(count, size), x.new_zeros(count, columns)], dim=1)
    solver = _PerSample(slope, clock[0], first.double().cpu().numpy().ravel(), clock[1], rtol, atol, count, size)
    error = np.zeros(count)
    while solver.status == "running":
        message = solver.step()
        if solver.status == "failed":
            raise ArithmeticError(f"RK45 gave up at u = {solver.t:.3g} ({message}): use a larger rtol.")
        error += solver.density_error()
        progress((solver.t - clock[0]) / (clock[1] - clock[0]))

    y = torch.from_numpy(solver.y).reshape(count, size + columns)
    z, log_dets = y[:, :size], y[:, size:]
    centre, prior_error, evaluations = _prior(field, z, end, data_std, prior, x, evaluations)
    log_prior = -0.5 * (z - centre).square().sum(1) - 0.5 * size * math.log(2 * math.pi)
    log_density = log_prior + log_dets.mean(1) - size * math.log(rho_0 / start.alpha)
    spread = torch.zeros(count, dtype=torch.float64)
    if divergence == "hutchinson":  # of one probe the spread is not known: nan
        spread = log_dets.std(1) / math.sqrt(columns) if columns > 1 else spread.fill_(math.nan)
    noise = (z * math.hypot(data_std * end.alpha, end.sigma)).reshape(shape).to(device, x.dtype)
    return LogLikelihood(log_density, torch.from_numpy(error), spread, prior_error, noise, evaluations)


def output_and_traces(
    function: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    probes: torch.Tensor | None,
    probe_batch: int = 16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A function's value m and ``tr dm/dx`` by reverse mode: estimates ``e' (dm/dx) e`` (Hutchinson 1990), or exactly.

    Args:
        function: (M, ...) to (M, ...), of copies of the batch; sample n of its value may depend on sample n of its
            argument only.
        x: (N, ...).
        probes: e (P, N, ...); None: the exact trace, with one backward pass for each dimension.
        probe_batch: copies of the batch in one evaluation.

    Returns:
        m (N, ...), and the estimates (N, P), or the trace (N, 1).
    """
    m, traces = None, []
    with torch.enable_grad():
        for batch in _batches(x, probes, probe_batch):
            copies = x.detach().repeat(len(batch), *[1] * (x.ndim - 1)).requires_grad_()
            out = function(copies)
            (pulled,) = torch.autograd.grad(out, copies, batch.reshape(out.shape))
            traces.append((pulled.reshape(batch.shape) * batch).flatten(2).sum(2))
            m = out[: len(x)].detach() if m is None else m
    assert m is not None
    estimates = torch.cat(traces).T
    return m, estimates.sum(1, keepdim=True) if probes is None else estimates


def _batches(x: torch.Tensor, probes: torch.Tensor | None, size: int) -> Iterator[torch.Tensor]:
    if probes is not None:
        yield from probes.to(x.dtype).split(size)
        return
    dimension = x[0].numel()
    for low in range(0, dimension, size):
        rows = torch.arange(low, min(low + size, dimension), device=x.device)
        basis = torch.nn.functional.one_hot(rows, dimension).to(x.dtype)
        yield basis[:, None].expand(-1, len(x), -1).reshape(len(rows), *x.shape)


def bits_per_dimension(log_density: torch.Tensor, dimension: int, bin_width: float = 1.0) -> torch.Tensor:
    """``-(log p + d log bin_width)/(d log 2)``: with ``x + bin_width (u - 1/2)``, u uniform, in place of quantised x,
    an upper bound in expectation on the bits of x (Theis et al. 2016, arXiv:1511.01844, section 3.1).

    Args:
        log_density: log p (N,), nats.
        dimension: d.
        bin_width: of the quantised values, in units of x.

    Returns:
        Bits per dimension (N,).
    """
    return -log_density / (dimension * math.log(2)) - math.log2(bin_width)


def dequantized(x: torch.Tensor, bin_width: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """``x + bin_width (u - 1/2)``, u uniform in [0, 1) (Theis et al. 2016, arXiv:1511.01844, section 3.1).

    Args:
        x: quantised values (N, ...).
        bin_width: their distance, in units of x.
        generator: of u, on the CPU.

    Returns:
        Values (N, ...) in the bins of x.
    """
    u = torch.rand(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype)
    return x + bin_width * (u - 0.5)


class _PerSample(RK45):
    """scipy's RK45 whose error norm is that of the worst sample: the root mean square over its state, or its
    log-density (mean over probes), whichever is larger.  One norm over a batch would hide a hard sample among easy
    ones, and the log-density among the pixels."""

    _error: np.ndarray
    _slope: np.ndarray

    def __init__(
        self, fun: Any, t0: float, y0: np.ndarray, t_bound: float, rtol: float, atol: float, count: int, size: int
    ):
        self._count, self._size = count, size
        super().__init__(fun, t0, y0, t_bound, rtol=rtol, atol=atol)

    def density_error(self) -> np.ndarray:
        """(N,): how far the last step's local errors move the result, ``|e_l + score . e_z|`` with the score of z,
        ``-z - G cos(theta)/sin(theta)^2``."""
        z = self.y.reshape(self._count, -1)[:, : self._size]
        score = -z + self._slope * (math.sinh(self.t) * math.cosh(self.t))
        return np.abs(self._error[:, self._size :].mean(axis=1) + (score * self._error[:, : self._size]).sum(axis=1))

    def _estimate_error_norm(self, K: np.ndarray, h: float, scale: np.ndarray) -> float:
        error, scale = (v.reshape(self._count, -1) for v in (self._estimate_error(K, h), scale))
        state = np.sqrt(np.mean((error / scale)[:, : self._size] ** 2, axis=1))
        log_density = np.abs(error[:, self._size :].mean(axis=1))
        self._error, self._slope = error, K[-1].reshape(error.shape)[:, : self._size]  # of the step about to be taken
        return float(np.max(np.maximum(state, log_density / scale[:, self._size :].mean(axis=1))))


def _prior(
    field: Field, z: torch.Tensor, end: Point, data_std: float, prior: str, like: torch.Tensor, evaluations: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """``(centre of the prior of z (N, d), its error (N,), evaluations so far)``; both are 0 in pure noise."""
    if end.alpha == 0:
        return torch.zeros_like(z), torch.zeros(len(z), dtype=z.dtype), evaluations
    rho = math.hypot(data_std * end.alpha, end.sigma)

    def shrunk(state: torch.Tensor) -> torch.Tensor:  # cos(theta) E[x_0|x]/c
        with torch.no_grad():
            mean = field(state.reshape(like.shape).to(like), end)
        return mean.double().cpu().reshape(z.shape) * (end.alpha / rho)

    score = (shrunk(z * rho) - z) * (rho / end.sigma) ** 2
    centre = shrunk(torch.zeros_like(z)) if prior == "matched" else torch.zeros_like(z)
    error = ((score + z - centre) * z).sum(1).abs()
    return centre, error, evaluations + (2 if prior == "matched" else 1)


def _point(field: Field, u: float, data_std: float) -> Point:
    """Where ``tan(theta) = -1/sinh(u)``."""
    alpha, sigma = field.path.alpha_sigma_of(math.log(-math.sinh(u)) - math.log(data_std))
    return Point(float(alpha), float(sigma))


def _ends(field: Field, noise_std: float | None) -> tuple[Point, Point]:
    path = field.path
    noisy = Point(*(float(v) for v in path.alpha_sigma(path.noisiest)))
    clean = float(path.log_snr(path.cleanest))
    if noise_std is not None:
        if not (is_real(noise_std) and 0 < noise_std < math.exp(-noisy.log_snr)):
            raise ValueError(f"noise_std must be a positive noise level below the largest one, not {noise_std!r}.")
        clean = -math.log(noise_std)
    return Point(*(float(v) for v in path.alpha_sigma_of(clean))), noisy


def _draw(distribution: str, shape: tuple[int, ...], generator: torch.Generator | None) -> torch.Tensor:
    if distribution == "gaussian":
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    return torch.randint(0, 2, shape, generator=generator).double().mul_(2).sub_(1)


def _check(
    divergence: str, num_probes: int, distribution: str, prior: str, rtol: float, atol: float, data_std: float
) -> None:
    if divergence not in ("exact", "hutchinson"):
        raise ValueError(f"divergence must be 'exact' or 'hutchinson', not {divergence!r}.")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be 'rademacher' or 'gaussian', not {distribution!r}.")
    if prior not in PRIORS:
        raise ValueError(f"prior must be 'matched' or 'standard', not {prior!r}.")
    check_whole("num_probes", num_probes)
    if not all(is_real(tolerance) and tolerance > 0 for tolerance in (rtol, atol)):
        raise ValueError(f"rtol and atol must be positive, not {rtol!r} and {atol!r}.")
    if not (is_real(data_std) and 0 < data_std < math.inf):
        raise ValueError(f"data_std must be positive and finite, not {data_std!r}.")
