"""Every limit of ``safe_weights`` lies where its constant says: the step is widened until it is refused, and what the
limit speaks of is computed there from its definition."""

import math

import numpy as np
import pytest
from helpers import PATHS

from diffusers_sde.extrapolation import (
    MAX_AMPLIFICATION,
    MAX_CANCELLATION,
    MAX_FRESH,
    MAX_STEP_RATIO,
    MAX_STIFFNESS,
    Method,
)
from diffusers_sde.weights import Point, evaluation_coefficients, lagrange_weights

INF = math.inf
VP = PATHS["vp_linear"]


def at(log_snr):
    return Point(*(float(v) for v in VP.alpha_sigma_of(log_snr)))


def step_at_the_limit(method, ages, tau, start=0.0):
    """The longest step from ``start`` that may read the evaluations made ``ages`` of log-SNR earlier, and their
    weights there."""
    basis = [at(start - age) for age in ages]

    def weights(step):
        return method.safe_weights(basis[0], at(start + step), basis, tau, basis)

    low, high = 1e-3, 20.0
    assert weights(low) is not None
    assert weights(high) is None
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if weights(middle) is None else (middle, high)
    return low, weights(low)


def amplification(weights):
    return np.abs(weights).sum() / abs(weights.sum())


def test_a_step_is_at_most_the_ratio_times_the_one_before():
    """In the clock: log-SNR, and sigma, in which the step from s to s - 4 (s_before - s) is the last."""
    step, weights = step_at_the_limit(Method(VP, INF, "log_snr"), [0.0, 0.05], 0.0, start=-4.0)
    assert step == pytest.approx(0.05 * MAX_STEP_RATIO, rel=1e-9)
    assert amplification(weights) < MAX_AMPLIFICATION[2] - 0.02
    step, weights = step_at_the_limit(Method(VP, INF, "sigma"), [0.0, 0.05], 0.0, start=-4.0)
    assert 1 - math.exp(-step) == pytest.approx(MAX_STEP_RATIO * math.expm1(0.05), rel=1e-9)


@pytest.mark.parametrize("order", MAX_AMPLIFICATION)
def test_weights_are_amplified_by_no_more_than_their_number_allows(order):
    """Equal steps of log-SNR before the step: sum |b| / |sum b| is at the limit of this order, the ratio below its."""
    step, weights = step_at_the_limit(Method(None, 0.0, "log_snr"), 0.6 * np.arange(order), 0.0)
    assert amplification(weights) == pytest.approx(MAX_AMPLIFICATION[order], rel=1e-9)
    assert step < 0.6 * MAX_STEP_RATIO * 0.99


@pytest.mark.parametrize(
    ("data_std", "ages", "tau"), [(0.0, [0, 0.9, 1.8], 0.7), (1.0, [0, 0.3, 0.5], 1.2), (1.0, [0, 1], 0.9)]
)
def test_noise_drawn_between_evaluations_is_amplified_up_to_a_limit(data_std, ages, tau):
    """1 - exp(-2 tau^2 h), the fraction of noise that is new since the oldest evaluation, times the amplification."""
    _, weights = step_at_the_limit(Method(None, data_std, "log_snr"), ages, tau)
    fresh = 1 - math.exp(-2 * tau**2 * ages[-1])
    assert amplification(weights) * fresh == pytest.approx(MAX_FRESH[data_std > 0], rel=1e-9)
    assert amplification(weights) < MAX_AMPLIFICATION[len(ages)] * 0.99


def test_a_stochastic_noise_prediction_step_has_a_limited_stiffness():
    """Amplification times A/2 (s_s/s_t - 1); a deterministic step of that length is taken."""
    method, tau = Method(None, INF, "log_snr"), 0.3
    step, weights = step_at_the_limit(method, [0.0, 0.8], tau, start=-3.0)
    assert amplification(weights) * 0.5 * (1 + tau**2) * math.expm1(step) == pytest.approx(MAX_STIFFNESS, rel=1e-9)
    basis = [at(-3.0), at(-3.8)]
    assert method.safe_weights(basis[0], at(-3.0 + 1.1 * step), basis, 0.0, basis) is not None


def test_cancellation_of_noise_predictions_is_limited():
    """An error of x_0 is one of min(1, alpha/sigma) of the noise: their weighted sum, relative to the end's
    sqrt(alpha^2 + sigma^2), may grow to a fraction of the amplification."""
    for start, ages in ((-0.3, [0.0, 1.0]), (0.4, [0.0, 0.5])):
        step, weights = step_at_the_limit(Method(None, INF, "log_snr"), ages, 0.0, start=start)
        end = at(start + step)
        errors = sum(abs(w) * min(1.0, math.exp(start - age)) for w, age in zip(weights, ages, strict=True))
        assert errors / math.hypot(end.alpha, end.sigma) == pytest.approx(
            MAX_CANCELLATION * MAX_AMPLIFICATION[2], rel=1e-9
        )
        assert amplification(weights) < MAX_AMPLIFICATION[2] * 0.99


def test_evaluations_must_be_apart_and_finite_in_the_clock():
    """Two at one place, or one at alpha = 0 in log-SNR, span no polynomial; in the angle alpha = 0 is a place."""
    start, end, noise = at(-1.0), at(-0.5), Point(0.0, 1.0)
    assert Method(None, 0.0, "log_snr").safe_weights(start, end, [start, start], 0.0, [start, start]) is None
    assert Method(None, 0.0, "log_snr").safe_weights(start, end, [start, noise], 0.0, [start, noise]) is None
    weights = Method(None, 0.0, "angle").safe_weights(start, end, [start, noise], 0.0, [start, noise])
    exact = lagrange_weights(None, start, end, [start, noise], data_std=0.0, clock="angle", tau=0.0)
    np.testing.assert_allclose(weights, exact, rtol=1e-12)


def test_a_step_to_clean_data_has_no_ratio_in_log_snr_and_is_weighed_in_the_angle():
    """sigma = 0 has no finite log-SNR: there the weights are those of the angle, whatever the step before."""
    start, old, clean = at(1.0), at(0.9), Point(1.0, 0.0)
    weights = Method(None, 1.0, "log_snr").weights(start, clean, [start, old], 0.0)
    exact = lagrange_weights(None, start, clean, [start, old], data_std=1.0, clock="angle", tau=0.0)
    np.testing.assert_allclose(weights, exact, rtol=1e-12)
    far = [start, at(-1.0)]
    assert Method(None, 1.0, "log_snr").safe_weights(start, clean, far, 0.0, far) is not None


def test_a_step_of_no_length_has_no_weights():
    start = at(0.3)
    np.testing.assert_array_equal(Method(None, 1.0, "angle").weights(start, start, [start, at(0.0)], 1.0), [0, 0])


def test_the_midpoint_rule_is_for_two_finite_places():
    """``total (1 - slope, slope)``, slope = h/2 over the step before; from alpha = 0, to sigma = 0 and with other
    numbers of evaluations the exact weights."""
    rule = Method(None, 0.0, "angle", "midpoint")
    start, old, end = at(0.0), at(-0.4), at(0.6)
    total = end.alpha * (1 - math.exp(-0.6))
    slope = -0.5 * 0.6 / 0.4
    np.testing.assert_allclose(
        rule.weights(start, end, [start, old], 0.0), [total * (1 - slope), total * slope], rtol=1e-12
    )
    noise, clean = Point(0.0, 1.0), Point(1.0, 0.0)
    exact = Method(None, 1.0, "angle")
    rule = Method(None, 1.0, "angle", "midpoint")
    for case in (
        (noise, end, [noise, end]),
        (start, clean, [start, old]),
        (start, end, [start]),
        (start, end, [start, old, at(-1.0)]),
    ):
        np.testing.assert_array_equal(rule.weights(*case, 0.0), exact.weights(*case, 0.0))


@pytest.mark.parametrize("tau", [0.0, 2.0])
def test_stiffness_is_the_gain_of_the_noise_prediction(tau):
    """``A/2 (s_s/s_t - 1)`` between sigma/alpha = 3 and 0.5, infinite at sigma = 0, none for bounded evaluations."""
    start, end = Point(0.25, 0.75), Point(0.8, 0.4)
    assert Method(None, INF, "log_snr").stiffness(start, end, tau) == pytest.approx((1 + tau**2) / 2 * 5, rel=1e-12)
    assert Method(None, INF, "log_snr").stiffness(start, Point(1.0, 0.0), tau) == INF
    assert Method(None, 3.0, "log_snr").stiffness(start, end, tau) == 0


@pytest.mark.parametrize("end", [Point(0.6, 0.8), Point(1.0, 1.0)])
def test_feedback_is_the_weight_times_the_slope_of_the_evaluation(end):
    """With D fixed, F = A D + B (x - alpha D)/sigma has the slope B/sigma in x; none for D itself and where the noise
    is gone."""
    for data_std in (0.5, 2.0):
        slope = evaluation_coefficients(data_std, end.alpha, end.sigma)[1] / end.sigma
        exact = data_std**2 * end.alpha / (math.hypot(data_std * end.alpha, end.sigma) * end.sigma)
        assert Method(None, data_std, "angle").feedback(-0.7, end) == pytest.approx(0.7 * exact, rel=1e-12)
        assert -slope == pytest.approx(exact, rel=1e-12)
        assert Method(None, data_std, "angle").feedback(-0.7, Point(1.0, 0.0)) == 0
    for data_std in (0.0, INF):
        assert Method(None, data_std, "angle").feedback(-0.7, end) == 0


@pytest.mark.parametrize("newest", [0, 1])
def test_evaluations_at_infinity_of_the_clock_are_not_interpolated_over(newest):
    """Refused before anything is computed with them: no warning comes of it."""
    ends = [at(INF), at(1.0)]
    basis = [ends[newest], ends[1 - newest]]
    with np.errstate(all="raise"):
        assert Method(VP, 1.0, "log_snr").safe_weights(basis[0], at(2.0), basis, 0.0, basis) is None
