"""When a step may extrapolate from earlier evaluations: weights that are safe, or none.

Knows how a solver weighs evaluations (:class:`Method`), the limits beyond which that amplifies errors more than another
order gains, and how much a run's own errors leave of it (:func:`trust`).  Knows one step, no grid and no table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffusers_sde.paths import Path
from diffusers_sde.weights import Point, clock_values, lagrange_weights, midpoint_weights

# What a row may do before it reads fewer evaluations, found by a scan over every selectable setting (the robustness
# section of the bench), where looser limits let few steps end far outside the data.
MAX_STEP_RATIO = 4.0  # a step to the one before it
MAX_AMPLIFICATION = {2: 5.0, 3: 8.0, 4: 14.0, 5: 14.0}  # sum |b| / |sum b|, by the number of evaluations
MAX_STIFFNESS = 2.0  # of a stochastic step, see Method.stiffness
MAX_FRESH = (6.2, 1.5)  # amplification times fresh noise, for data prediction and for an F that contains the noise
MAX_FEEDBACK = 1.1  # of a correction, see Method.feedback
DOUBT = 1.0, 0.25  # of a correction and of an extrapolation, see trust
MAX_CANCELLATION = 0.3  # of MAX_AMPLIFICATION: what errors of x_0 may grow to when noise predictions are subtracted


@dataclass(frozen=True)
class Method:
    """How to weigh evaluations: everything about a solver but the grid and the order.

    data_std, clock, tau: see :mod:`diffusers_sde.weights`; ``rule`` is ``exact`` or ``midpoint`` (two-node rules only).
    """

    path: Path | None
    data_std: float
    clock: str
    rule: str = "exact"

    def weights(self, start: Point, end: Point, basis: Sequence[Point], tau: float) -> np.ndarray:
        """Weights of the evaluations at ``basis``, in their order, in the step from ``start`` to ``end`` at noise level
        ``tau``; 0 for a step of no length."""
        if start.log_snr == end.log_snr:
            return np.zeros(len(basis))
        if self.rule == "midpoint" and len(basis) == 2 and end.sigma > 0 and start.alpha > 0:
            return midpoint_weights(self.path, start, end, basis, data_std=self.data_std, tau=tau)
        clock = self.clock
        if end.sigma == 0 and clock == "log_snr":  # log-SNR has no finite coordinate there
            clock = "angle"
        return lagrange_weights(self.path, start, end, basis, data_std=self.data_std, clock=clock, tau=tau)

    def stiffness(self, start: Point, end: Point, tau: float) -> float:
        """Gain of a feedback through the noise prediction, whose slope at the end is 1/s_t: ``A/2 (s_s/s_t - 1)``;
        0 for a finite data_std, where evaluations are bounded."""
        if not math.isinf(self.data_std):
            return 0.0
        return 0.5 * (1 + tau**2) * math.expm1(end.log_snr - start.log_snr)

    def feedback(self, weight: float, end: Point) -> float:
        """What a correction with this weight on the new evaluation makes of an error of the predicted state where the
        data prediction does not follow the state (data with no spread): ``|w| data_std^2 alpha/(rho sigma)``, the
        slope of F there; above 1 the error grows."""
        if not 0 < self.data_std < math.inf or end.sigma == 0:
            return 0.0
        rho = math.hypot(self.data_std * end.alpha, end.sigma)
        return abs(weight) * self.data_std**2 * end.alpha / (rho * end.sigma)

    def safe_weights(
        self, start: Point, end: Point, basis: Sequence[Point], tau: float, newest_first: Sequence[Point]
    ) -> np.ndarray | None:
        """:meth:`weights`, or None where interpolating over these nodes is impossible or would amplify errors: nodes
        that coincide or are infinite in the clock, too large a step ratio, too large a sum of |weights|, too much fresh
        noise or cancellation between them.

        Args:
            start, end: of the step.
            basis: the evaluations, in the order of the weights.
            tau: the noise level of the step.
            newest_first: the same evaluations by age.
        """
        order = len(basis)
        at = clock_values(self.path, self.clock, np.array([p.log_snr for p in (end, *newest_first)]), self.data_std)
        if not np.all(np.isfinite(at[1:])) or len(set(at[1:])) < order:
            return None
        if math.isfinite(at[0]) and abs(at[0] - at[1]) > MAX_STEP_RATIO * abs(at[1] - at[2]):
            return None
        weights = self.weights(start, end, basis, tau)
        amplification = np.abs(weights).sum() / max(abs(weights.sum()), 1e-300)
        # extrapolation lives on evaluations that resemble each other: noise drawn between them enters amplified
        fresh = -math.expm1(-2 * tau**2 * (newest_first[0].log_snr - newest_first[-1].log_snr)) if tau else 0.0
        safe = amplification <= MAX_AMPLIFICATION[order]
        safe &= amplification * fresh <= MAX_FRESH[self.data_std != 0]
        if math.isinf(self.data_std):
            safe &= tau == 0 or amplification * self.stiffness(start, end, tau) <= MAX_STIFFNESS
            # an error d of x_0 is one of min(1, d/s) of the noise, which weights of size s turn into the end's state
            errors = np.abs(weights) @ [min(1.0, p.alpha / p.sigma) for p in basis]
            safe &= errors <= MAX_CANCELLATION * MAX_AMPLIFICATION[order] * math.hypot(end.alpha, end.sigma)
        return weights if safe else None


def trust(gap: Any) -> tuple[Any, Any]:
    """How far a row may follow its earlier evaluations, by what they had expected of the newest one.

    With ``gap = |F_i - P_i| / |F_i|``, P_i the value that the last extrapolation implied for F_i:

        correction by ``1/(1 + gap^2)``, extrapolation by ``1/(1 + gap/4)``.

    A network under strong guidance answers a change of the state with a change of F several times as large: corrected
    and extrapolated states then overshoot, each step further, and the gap says so one step ahead.  It shrinks with the
    square of the step for order 2, so that trust becomes full and the order stays.  The two numbers were chosen with
    the grids (:mod:`diffusers_sde.defaults`).

    Args:
        gap: the relative gap, a number, an array or a tensor (N,), 0 or more.

    Returns:
        The factors of the correction and of the slope (:class:`diffusers_sde.tables.Row`), in (0, 1].
    """
    correction, slope = DOUBT
    return 1 / (1 + correction * gap**2), 1 / (1 + slope * gap)
