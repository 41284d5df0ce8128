r"""The probability-flow ODE with steps chosen by their error: exponential Adams methods of variable step and order.

A step from s to t of order p predicts the state with the weights of p evaluations, evaluates the network there, and
redoes the step with that evaluation as one node more (:mod:`diffusers_sde.weights`: the linear part exactly, the rest
by interpolation).  The two results are an embedded pair of orders p and p + 1 on the same evaluations, one of them new;
their difference

    e_p = data_std / sqrt(data_std^2 alpha_t^2 + sigma_t^2)  rms(corrected - predicted),

in units of the data at the end of the run (the flow of ``N(0, data_std^2 I)`` data keeps that quantity), is held below
a bound, and the better of the two is gone on from (local extrapolation).  Then the error at the end is in
proportion to the tolerance (Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, section II.4).  The
next step is ``h (aim/e)^(0.7/k) (e_before/aim)^(0.4/k)``, k = p + 1, with an aim somewhat below the bound (the PI
controller of Gustafsson 1991, ACM Trans. Math. Softw. 17, 533), in the coordinate ``log(1 + data_std alpha/sigma)``,
which is finite at alpha = 0.  The order is that of which the longest step is expected: the differences e_1, e_2, ... of
all orders come from the same evaluations.

Knows the field of a network at points of a path; knows no grid, scheduler or pipeline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffusers_sde.errors import check_whole, is_real
from diffusers_sde.extrapolation import Method
from diffusers_sde.methods.images import at_least_float32
from diffusers_sde.paths import Path
from diffusers_sde.prediction import from_model
from diffusers_sde.weights import Point, evaluation_coefficients, linear_coefficients

# states (P, ...), where each of them is and the sample of each -> the network's output there (P, ...)
EvaluatePoints = Callable[[torch.Tensor, Sequence[Point], Sequence[int]], torch.Tensor]

MAX_ORDER = 4  # of the predictor
LOCAL = 8.0  # tolerances that a step's estimate may have: measured, for an error of about one at the end
SAFETY = 0.75  # of the step that is expected to just pass: a rejected one costs an evaluation
SHRINK, GROW = 0.2, 4.0  # of a step to the one before
FIRST = 0.02  # the first step, of the whole way
RESERVE = 0.25  # of the evaluations, with which the rest of the way is gone in equal steps
CLEAN = Point(1.0, 0.0)


@dataclass(frozen=True)
class Report:
    """What the run of a sample did.

    Args:
        evaluations: of the network, those of rejected steps included.
        accepted, rejected: steps.
        met: whether every step kept the tolerance; False where ``max_evaluations`` forced longer ones.
        log_snr: half log-SNRs of the nodes, from noise to data.
    """

    evaluations: int
    accepted: int
    rejected: int
    met: bool
    log_snr: tuple[float, ...]


def check_adaptive(tolerance: float, max_evaluations: int) -> None:
    """Raise ``ValueError`` for arguments of :func:`sample_with_error_control` that no run could use."""
    if not (is_real(tolerance) and 0 < tolerance < math.inf):
        raise ValueError(f"tolerance must be positive, in units of the data, not {tolerance!r}.")
    check_whole("max_evaluations", max_evaluations, 2)


@torch.no_grad()
def sample_with_error_control(
    evaluate: EvaluatePoints,
    path: Path,
    prediction_type: str,
    x: torch.Tensor,
    *,
    tolerance: float,
    max_evaluations: int = 1000,
    callback: Callable[[float], Any] = lambda progress: None,
) -> tuple[torch.Tensor, list[Report]]:
    """Solve the probability-flow ODE to a tolerance, each sample with steps of its own, all samples in one batch.

    Args:
        evaluate: the network at any points of the path, without learned variances.
        path: the forward process.
        prediction_type: what the network says.
        x: the states to start from (N, ...), at the noisiest training time.
        tolerance: the error that the result may have, root mean square over a sample, in units of the data.
        max_evaluations: of each sample, at least 2; where they would not suffice, the rest of the way is gone in equal
            steps, whatever their error.
        callback: called after each evaluation of the batch with the part of the way gone, of the slowest sample.

    Returns:
        The states at sigma = 0 (N, ...), in x's dtype, and a report of each sample.

    Raises:
        ValueError: for arguments that no run could use.
    """
    check_adaptive(tolerance, max_evaluations)
    way = _Way(path, prediction_type)
    runs = [_Run(way, state, LOCAL * tolerance, max_evaluations) for state in at_least_float32(x)]
    while active := [k for k, run in enumerate(runs) if not run.arrived]:
        states = torch.stack([runs[k].proposed for k in active]).to(x.dtype)
        outputs = evaluate(states, [runs[k].end for k in active], active)
        for k, state, output in zip(active, at_least_float32(states), at_least_float32(outputs), strict=True):
            runs[k].judge(state, output)
        callback(min(run.place for run in runs) / way.length)
    return torch.stack([run.clean() for run in runs]).to(x.dtype), [run.report() for run in runs]


class _Way:
    """The way from the noisiest to the cleanest training time, in the coordinate that steps are chosen in."""

    def __init__(self, path: Path, prediction_type: str):
        self.path, self.prediction_type, self.data_std = path, prediction_type, path.data_scale
        first, self._last = (float(path.log_snr(t)) for t in (path.noisiest, path.cleanest))
        # no other clock than the angle has a place for alpha = 0
        self.method = Method(path, self.data_std, path.default_clock if math.isfinite(first) else "angle")
        self._from = math.log1p(self.data_std * math.exp(first))
        self.length = math.log1p(self.data_std * math.exp(self._last)) - self._from

    def point(self, place: float) -> Point:
        """The point at ``place``, 0 at the noisiest time and ``length`` at the cleanest."""
        at = math.expm1(self._from + place) / self.data_std
        log_snr = self._last if place >= self.length else math.log(at) if at else -math.inf
        return Point(*map(float, self.path.alpha_sigma_of(log_snr)))

    def nonlinear(self, x: torch.Tensor, point: Point, output: torch.Tensor) -> torch.Tensor:
        """F of :mod:`diffusers_sde.weights`, from the network's output at x."""
        target = evaluation_coefficients(self.data_std, point.alpha, point.sigma)
        k_x, k_m = from_model(self.path, self.prediction_type, point.alpha, point.sigma, target)
        return torch.mul(output, k_m).add_(x, alpha=k_x)


class _Run:
    """One sample on its way: the state at ``place``, the evaluations behind it, and the step that is being tried."""

    def __init__(self, way: _Way, x: torch.Tensor, bound: float, max_evaluations: int):
        self._way, self._bound, self._left = way, bound, max_evaluations
        self._reserve = math.ceil(RESERVE * max_evaluations)
        self._x, self.place, self.arrived = x, 0.0, False
        self._points: list[Point] = []  # where the network was evaluated, latest first, and what F was
        self._history: list[torch.Tensor] = []
        self._step, self._order = FIRST * way.length, 1
        self._before: dict[int, float] = {}  # the errors of the step before, by order
        self._accepted = self._rejected = self._evaluations = 0
        self._met, self._log_snr = True, [way.point(0.0).log_snr]
        self.proposed, self.end = x, way.point(0.0)  # the first evaluation is where the run stands

    def _try(self) -> None:
        """Propose a step: long enough to arrive with the evaluations that are left, and no shorter rest behind it."""
        rest = self._way.length - self.place
        least = rest / self._left if self._left <= self._reserve else 0.0
        self._forced = self._step <= least
        self._step = max(self._step, least)
        if self._step > 0.99 * rest:
            self._step = rest
        elif self._step > 0.5 * rest:
            self._step = 0.5 * rest
        self.end = self._way.point(self.place + self._step)
        start, method = self._points[0], self._way.method
        self._factor, _ = linear_coefficients(start, self.end, method.data_std, 0.0)
        while (weights := self._predictor(self._order)) is None:
            self._order -= 1
        self.proposed = self._combined(weights, self._history)

    def _predictor(self, order: int) -> np.ndarray | None:
        """Weights of the latest ``order`` evaluations, where they may be extrapolated."""
        start, basis, method = self._points[0], self._points[:order], self._way.method
        if order == 1:
            return method.weights(start, self.end, basis, 0.0)
        return method.safe_weights(start, self.end, basis, 0.0, basis) if len(basis) == order else None

    def _corrector(self, order: int) -> np.ndarray | None:
        """Weights of the new evaluation and the latest ``order`` before it."""
        start, nodes, method = self._points[0], [self.end, *self._points[:order]], self._way.method
        return method.safe_weights(start, self.end, nodes, 0.0, nodes) if len(nodes) == order + 1 else None

    def _combined(self, weights: np.ndarray, evaluations: Sequence[torch.Tensor]) -> torch.Tensor:
        state = torch.mul(self._x, self._factor)
        for weight, evaluation in zip(weights.tolist(), evaluations, strict=False):
            state.add_(evaluation, alpha=weight)
        return state

    def judge(self, x: torch.Tensor, output: torch.Tensor) -> None:
        """Take the step that was tried, or not, now that the network said ``output`` at the state x there."""
        new = self._way.nonlinear(x, self.end, output)
        self._evaluations, self._left = self._evaluations + 1, self._left - 1
        if not self._history:
            self._points, self._history = [self.end], [new]
        else:
            errors = self._errors(new)
            order = max((p for p in errors if p <= self._order), default=0)
            passed = errors[order] <= self._bound if order else False
            if passed or self._forced:
                self._accept(order, new, errors, passed)
            else:
                self._rejected += 1
                steps = {p: self._expected(p, error) for p, error in errors.items() if p <= self._order}
                self._order = max(steps, key=lambda p: steps[p], default=1)
                self._step = min(steps.get(self._order, 0.0), 0.9 * self._step) or 0.5 * self._step
        if not self.arrived:
            self._try()

    def _errors(self, new: torch.Tensor) -> dict[int, float]:
        """``e_p`` of every order for which both results exist."""
        scale = self._way.data_std / math.hypot(self._way.data_std * self.end.alpha, self.end.sigma)
        errors = {}
        for order in range(1, min(len(self._history), MAX_ORDER) + 1):
            predictor, corrector = self._predictor(order), self._corrector(order)
            if predictor is None or corrector is None:
                break
            difference = torch.zeros_like(new)
            weights = (corrector - np.append(0.0, predictor)).tolist()
            for weight, evaluation in zip(weights, [new, *self._history], strict=False):
                difference.add_(evaluation, alpha=weight)
            error = scale * float(difference.square().mean().sqrt())
            errors[order] = error if math.isfinite(error) else math.inf
        return errors

    def _expected(self, order: int, error: float, before: float | None = None) -> float:
        """The step after one with this error, by the PI controller where the error ``before`` it is known."""
        k = order + 1
        aim, floor = self._bound * SAFETY**k, 1e-12 * self._bound
        factor = (aim / max(error, floor)) ** ((1.0 if before is None else 0.7) / k)
        if before is not None:
            factor *= (min(max(before, floor), self._bound) / aim) ** (0.4 / k)
        return self._step * min(max(factor, SHRINK), GROW)

    def _accept(self, order: int, new: torch.Tensor, errors: dict[int, float], passed: bool) -> None:
        corrector = self._corrector(order) if order else None
        self._x = self.proposed if corrector is None else self._combined(corrector, [new, *self._history])
        self._points, self._history = [self.end, *self._points[:MAX_ORDER]], [new, *self._history[:MAX_ORDER]]
        self.place, self._accepted, self._met = self.place + self._step, self._accepted + 1, self._met and passed
        self._log_snr.append(self.end.log_snr)
        self.arrived = self.place >= self._way.length * (1 - 1e-12)
        before, self._before = self._before, errors
        steps = {p: self._expected(p, error, before.get(p)) for p, error in errors.items() if p <= order + 1}
        if steps:
            self._order = max(steps, key=lambda p: steps[p])
            self._step = steps[self._order]

    def clean(self) -> torch.Tensor:
        """The state at sigma = 0: the rest of the way, with the latest evaluation and the next one behind it that is
        far enough for a line."""
        start, method = self._points[0], self._way.method
        self._factor, _ = linear_coefficients(start, CLEAN, method.data_std, 0.0)
        for older, evaluation in zip(self._points[1:], self._history[1:], strict=True):
            weights = method.safe_weights(start, CLEAN, [start, older], 0.0, [start, older])
            if weights is not None:
                return self._combined(weights, [self._history[0], evaluation])
        return self._combined(method.weights(start, CLEAN, [start], 0.0), self._history)

    def report(self) -> Report:
        return Report(self._evaluations, self._accepted, self._rejected, self._met, tuple(self._log_snr))
