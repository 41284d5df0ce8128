"""Invariants of grids and tables: what must hold for every path, every grid and every number of steps; the formula of
each grid stands in test_named_grids.py."""

import functools
import itertools
import math
import re
import warnings

import mpmath
import numpy as np
import pytest
from diffusers import LCMScheduler
from helpers import (
    LINEAR,
    PATHS,
    gaussian_denoiser,
    gaussian_law,
    mixture_denoiser,
    nodes_of,
    noise_like,
    order_of,
    probe_table,
    reference_weights,
    run_table,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from diffusers_sde import DPMSolverScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.extrapolation import MAX_STEP_RATIO
from diffusers_sde.grids import distinct_integers, nodes_from_times, nodes_from_user
from diffusers_sde.named_grids import GRIDS, distilled, make_grid
from diffusers_sde.paths import FlowMatching, VarianceExploding
from diffusers_sde.tables import SINGLESTEP_METHODS, build_multistep, build_singlestep, tau_from_eta
from diffusers_sde.weights import (
    CLOCKS,
    Point,
    evaluation_coefficients,
    lagrange_weights,
    linear_coefficients,
    quadrature,
)

INF = math.inf
LONG = [name for name in PATHS if name != "vp_trained_betas"]  # paths with more training times than steps
every_long_path = pytest.mark.parametrize("name", LONG)
every_grid = pytest.mark.parametrize("grid", GRIDS)


# -- grids --


@functools.cache
def all_times(name, grid):
    """The grid at 1 to 60 steps, for every exponent a user is likely to set."""
    exponents = (None, 1.25, 1.5, 2.0, 3.0) if grid == "power" else (None,)
    return [make_grid(PATHS[name], grid, n, rho=rho) for rho in exponents for n in range(1, 61)]


@every_grid
@every_long_path
def test_grid_has_n_times_of_decreasing_noise(name, grid):
    """n finite, distinct times whose noise strictly decreases, for n from 1 to 60."""
    for i, times in enumerate(all_times(name, grid)):
        assert times.shape == (i % 60 + 1,)
        assert np.all(np.isfinite(times))
        assert np.all(np.diff(PATHS[name].log_snr(times)) > 0)


@every_grid
@every_long_path
def test_grid_stays_in_the_training_range(name, grid):
    """No time lies outside what the network was trained on."""
    low, high = sorted((PATHS[name].cleanest, PATHS[name].noisiest))
    for times in all_times(name, grid):
        assert low - 1e-9 * abs(high) <= times.min()
        assert times.max() <= high


@every_grid
@every_long_path
def test_grid_starts_at_the_highest_noise(name, grid):
    """The first time is exactly the noisiest one; leading alone may miss it (arXiv:2305.08891)."""
    first = [float(times[0]) for times in all_times(name, grid)]
    if grid == "leading":
        assert first[0] == PATHS[name].noisiest
        assert isinstance(PATHS[name], VarianceExploding) or len(set(first)) > 1
    else:
        assert set(first) == {PATHS[name].noisiest}


@every_long_path
@given(n=st.integers(1, 30))
def test_nodes_end_at_clean_data(name, n):
    """final zero ends at alpha = 1, sigma = 0 exactly; sigma_min at the cleanest training time."""
    path = PATHS[name]
    times = make_grid(path, "power", n)
    nodes = nodes_from_times(path, times)
    assert (nodes.alpha[-1], nodes.sigma[-1], len(nodes)) == (1.0, 0.0, n + 1)
    last = nodes_from_times(path, times, "sigma_min")
    assert last.log_snr[-1] == pytest.approx(path.log_snr(path.cleanest), rel=1e-12)
    np.testing.assert_array_equal(last.alpha[:-1], nodes.alpha[:-1])


@pytest.mark.parametrize("grid", ["balanced", "power", "trailing", "linspace", "leading"])
def test_grids_of_time_go_through_the_dynamic_shift(grid):
    """mu of a flow model moves every unshifted sigma u to e^mu / (e^mu + 1/u - 1) (Esser et al. 2024, eq. 23)."""
    plain = make_grid(FlowMatching(), grid, 5) / 1000
    shifted = make_grid(FlowMatching(use_dynamic_shifting=True), grid, 5, mu=0.8)
    np.testing.assert_allclose(shifted, 1000 * math.exp(0.8) / (math.exp(0.8) + 1 / plain - 1), rtol=1e-12)


@pytest.mark.parametrize(("n", "original", "strength"), [(4, 50, 1.0), (3, 50, 0.5), (50, 50, 1.0), (7, 1000, 1.0)])
def test_distilled_times_are_those_of_lcm(n, original, strength):
    """The noisiest of the equal steps of the training, as LCMScheduler chooses them (Luo et al. 2023, section 4.3)."""
    stock = LCMScheduler(**LINEAR)
    stock.set_timesteps(n, original_inference_steps=original, strength=strength)
    np.testing.assert_array_equal(distilled(PATHS["vp_linear"], n, original, strength), stock.timesteps.numpy())


@pytest.mark.parametrize(
    ("name", "n", "original", "strength"),
    [("vp_linear", 26, 50, 0.5), ("vp_linear", 4, 1001, 1.0), ("edm", 4, 50, 1.0)],
)
def test_more_steps_than_were_distilled_are_refused(name, n, original, strength):
    with pytest.raises(ValueError, match="ask for fewer steps"):
        distilled(PATHS[name], n, original, strength)


def test_distinct_integers_are_the_nearest_that_are_left():
    """Rounded; a repetition takes the next integer below, or those above where there is no room below."""
    for times, expected in (
        ([900.4, 500.6, 3.2], [900, 501, 3]),
        ([10.4, 10.3, 9.8, 2.0], [10, 9, 8, 2]),
        ([2.2, 0.3, 0.1], [2, 1, 0]),
        ([5.0, 0.4, 0.2, 0.1], [5, 2, 1, 0]),
    ):
        np.testing.assert_array_equal(distinct_integers(np.array(times)), expected)
    with pytest.raises(ValueError, match="too few distinct timesteps"):
        distinct_integers(np.array([1.2, 0.3, 0.1]))


# -- what users pass --


class OnAccelerator:
    """A list that numpy cannot read before ``cpu()`` has brought it."""

    def __init__(self, values):
        self.values = values

    def cpu(self):
        return np.array(self.values)

    def __array__(self, *_, **__):
        raise TypeError("can't convert a device tensor to numpy")


def test_lists_may_live_on_an_accelerator_and_in_any_precision():
    """A ramp in float32 means the levels of its float64 values, not levels computed in float32."""
    nodes = nodes_from_user(PATHS["vp_linear"], OnAccelerator([900, 500]), None)
    np.testing.assert_array_equal(nodes.time[:-1], [900, 500])
    ramp = np.array([0, 0.25, 0.5, 1])
    exact = nodes_from_user(PATHS["edm"], None, ramp)
    np.testing.assert_array_equal(nodes_from_user(PATHS["edm"], None, ramp.astype(np.float32)).sigma, exact.sigma)


def test_user_timesteps_are_taken_as_they_are():
    """timesteps are what the network sees, fractional or not; the state follows the path."""
    path = PATHS["vp_linear"]
    nodes = nodes_from_user(path, [900, 500.5, 3], None)
    np.testing.assert_array_equal(nodes.time[:-1], [900, 500.5, 3])
    np.testing.assert_allclose(nodes.log_snr[:-1], path.log_snr(np.array([900, 500.5, 3])), rtol=1e-12)


@given(n=st.integers(1, 40))
def test_sigmas_of_a_path_are_sigma_over_alpha(n):
    """sigmas of VP and EDM are sigma/alpha; with or without the terminal 0 they mean the same run."""
    for name in ("vp_linear", "edm"):
        path = PATHS[name]
        levels = np.geomspace(10, 0.1, n)
        nodes = nodes_from_user(path, None, levels)
        np.testing.assert_allclose(nodes.sigma[:-1] / nodes.alpha[:-1], levels, rtol=1e-9)
        closed = nodes_from_user(path, None, np.append(levels, 0.0))
        for a, b in zip((nodes.time, nodes.sigma), (closed.time, closed.sigma), strict=True):
            np.testing.assert_array_equal(a, b)


def test_edm_takes_a_ramp():
    """EDM pipelines pass a ramp from 0 to 1: Karras levels with rho 7, as EDMEuler makes of it."""
    path = PATHS["edm"]
    ramp = np.linspace(0, 1, 10)
    np.testing.assert_allclose(nodes_from_user(path, None, ramp).time[:-1], make_grid(path, "karras", 10), rtol=1e-12)


def test_timesteps_and_sigmas_together():
    """With both, the network sees the timesteps and the state has the sigmas."""
    nodes = nodes_from_user(PATHS["flow_shift"], [990.0, 400.0], [0.9, 0.5])
    np.testing.assert_array_equal(nodes.time[:-1], [990.0, 400.0])
    np.testing.assert_allclose(nodes.sigma, [0.9 * 3 / 2.8, 0.75, 0.0])


ONE_SENTENCE = re.compile(r"^[^\n]+\.$")
BAD_LISTS = {
    "empty": ("vp_linear", {"timesteps": []}),
    "not_a_list": ("vp_linear", {"timesteps": 500}),
    "nested": ("vp_linear", {"timesteps": [[900, 100]]}),
    "nan": ("vp_linear", {"timesteps": [900, float("nan")]}),
    "infinite": ("vp_linear", {"sigmas": [float("inf"), 1.0]}),
    "rising": ("vp_linear", {"timesteps": [100, 900]}),
    "rising_sigmas": ("flow", {"sigmas": [0.2, 0.8]}),
    "unequal": ("vp_linear", {"timesteps": [900, 100], "sigmas": [5.0, 1.0, 0.2]}),
    "negative_sigma": ("vp_linear", {"sigmas": [5.0, -1.0]}),
    "flow_above_one": ("flow", {"sigmas": [1.5, 0.5]}),
    "flow_negative": ("flow", {"sigmas": [0.5, -0.5]}),
    "flow_time_above_range": ("flow", {"timesteps": [1500.0, 500.0]}),
    "zero_before_the_end": ("vp_linear", {"sigmas": [5.0, 0.0, 1.0]}),
    "only_zero": ("vp_linear", {"sigmas": [0.0]}),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", BAD_LISTS)
def test_bad_lists_are_refused(case):
    """Every list that is not a run of decreasing noise is a ValueError of one clear sentence, never NaN."""
    name, lists = BAD_LISTS[case]
    with pytest.raises(ValueError) as error:
        nodes_from_user(PATHS[name], lists.get("timesteps"), lists.get("sigmas"))
    assert ONE_SENTENCE.match(str(error.value))


BAD_CALLS = {
    "nothing": {},
    "too_many": {"num_inference_steps": 5, "timesteps": [900, 100]},
    "no_steps": {"num_inference_steps": 0},
    "negative_steps": {"num_inference_steps": -3},
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_are_refused(case):
    """set_timesteps without or with contradictory arguments is a ValueError of one clear sentence."""
    with pytest.raises(ValueError) as error:
        ProbabilityFlowScheduler().set_timesteps(**BAD_CALLS[case])
    assert ONE_SENTENCE.match(str(error.value))


BAD_CONFIGS = {
    "grid": (ProbabilityFlowScheduler, {"grid": "uniform"}),
    "final_sigmas_type": (ProbabilityFlowScheduler, {"final_sigmas_type": "none"}),
    "prediction_type": (ProbabilityFlowScheduler, {"prediction_type": "noise"}),
    "beta_schedule": (ProbabilityFlowScheduler, {"beta_schedule": "quadratic"}),
    "order": (DPMSolverScheduler, {"solver_order": 4}),
    "algorithm_type": (DPMSolverScheduler, {"algorithm_type": "ddim"}),
    "solver_type": (DPMSolverScheduler, {"solver_type": "bh2"}),
    "sde_order": (ReverseSDEScheduler, {"solver_order": 4}),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_refused(case):
    """An option that does not exist is a ValueError of one clear sentence, at the latest by set_timesteps."""
    cls, config = BAD_CONFIGS[case]
    with pytest.raises(ValueError) as error:
        cls(**config).set_timesteps(4)
    assert ONE_SENTENCE.match(str(error.value))


BAD_TABLES = {
    "order": {"order": 5},
    "clock": {"clock": "theta"},
    "rule": {"rule": "simpson"},
    "final": {"final": "euler"},
    "data_std": {"data_std": -1.0},
    "data_std_nan": {"data_std": math.nan},
    "tau": {"tau": -0.5},
    "tau_too_large": {"tau": 1e6},
    "too_few_taus": {"tau": [1.0, 1.0]},
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_bad_table_options_are_refused(case):
    """The builder names what it does not know."""
    nodes = nodes_of(PATHS["vp_linear"], np.linspace(-3, 3, 6))
    with pytest.raises(ValueError) as error:
        build_multistep(PATHS["vp_linear"], nodes, **BAD_TABLES[case])
    assert ONE_SENTENCE.match(str(error.value))


def test_noise_prediction_at_zero_snr_is_refused():
    """data_std = inf cannot start where alpha = 0: one sentence that names the remedy."""
    nodes = nodes_from_times(PATHS["flow"], make_grid(PATHS["flow"], "power", 5))
    with pytest.raises(ValueError, match="use a finite data_std or a smaller first t") as error:
        build_multistep(PATHS["flow"], nodes, data_std=INF)
    assert ONE_SENTENCE.match(str(error.value))


# -- weights --


def points_at(*log_snr):
    path = PATHS["vp_linear"]
    return [Point(*(float(v) for v in path.alpha_sigma_of(lam))) for lam in log_snr]


lams = st.floats(-6, 6)
gaps = st.floats(0.01, 3.0)


@given(start=lams, h=gaps, tau=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_weights_are_phi_functions(start, h, tau):
    """Data prediction: sum_j b_j (lambda_j - lambda_s)^k = alpha_t times the phi function of A h, k = 0, 1, 2."""
    before, begin, end = points_at(start - 0.7 * h, start, start + h)
    middle = points_at(start + 0.4 * h)[0]
    basis, at = [begin, before, middle], np.array([0.0, -0.7, 0.4]) * h
    w = lagrange_weights(None, begin, end, basis, data_std=0.0, clock="log_snr", tau=tau) / end.alpha
    rate = 1 + tau**2
    z = rate * h
    one = -math.expm1(-z)
    exact = [one, (z - one) / rate, (z**2 - 2 * (z - one)) / rate**2]
    scale = np.abs(w).sum()
    for k, value in enumerate(exact):
        assert w @ at**k == pytest.approx(value, abs=1e-12 * scale * h**k + 1e-12 * h**k)


@given(start=lams, h=gaps, tau=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_noise_prediction_weights_are_phi_functions(start, h, tau):
    """Noise prediction: constants and slopes of -eps integrate to A alpha_t Int e^-lambda (lambda - lambda_s)^k."""
    begin, end, before = points_at(start, start + h, start - 0.7 * h)
    w = lagrange_weights(None, begin, end, [begin, before], data_std=INF, clock="log_snr", tau=tau)
    scale = (1 + tau**2) * end.alpha * math.exp(-start)
    one = -math.expm1(-h)
    assert w.sum() == pytest.approx(scale * one, rel=1e-12)
    assert w[1] * -0.7 * h == pytest.approx(scale * (one - h * math.exp(-h)), rel=1e-10, abs=1e-14 * scale)


@given(start=lams, h=gaps, order=st.integers(1, 4), tau=st.sampled_from([0.0, 1.0]))
def test_weights_agree_with_thirty_digits(start, h, order, tau):
    """Gauss-Legendre from the start of the step loses nothing: 1e-12 against arbitrary precision, at every order."""
    assume(h > 0.05)
    lam = start - 0.8 * h * np.arange(order)
    points, end = points_at(*lam), points_at(start + h)[0]
    w = lagrange_weights(None, points[0], end, points, data_std=0.0, clock="log_snr", tau=tau) / end.alpha
    lam = np.array([p.log_snr for p in points])
    exact = reference_weights(points[0].log_snr, end.log_snr, lam, tau)
    np.testing.assert_allclose(w, exact, atol=1e-12 * np.abs(exact).max())


STEPS = {
    "long": (-5.0, 4.0),
    "short and clean": (6.0, 6.01),
    "from zero SNR": (-INF, -2.0),
    "from zero SNR, far": (-INF, 1.5),
    "to clean data": (0.5, INF),
    "the whole way": (-INF, INF),
    "towards noise": (4.0, -8.0),
    "towards noise, to zero SNR": (3.0, -INF),
}


@pytest.mark.parametrize("data_std", [0.25, 1.0, 50.0, 1000.0])
@pytest.mark.parametrize(
    ("step", "tau"), [(s, tau) for s in STEPS for tau in (0.0, 0.3, 1.0) if tau == 0 or "towards" not in s]
)
def test_the_rule_of_a_step_agrees_with_twenty_digits(step, data_std, tau):
    """Int A (r_t/r_u)^A (s_u/r_u) p(u) d lambda = Int A/c (cos/cos_t)^(tau^2) p d theta with tan theta = s/c, for p =
    1 + theta, to 1e-12: at any data scale, from and to infinite log-SNR and, for the ODE, towards noise."""
    alpha, sigma = PATHS["vp_linear"].alpha_sigma_of(np.array(STEPS[step]))
    start, end = (Point(float(a), float(s)) for a, s in zip(alpha, sigma, strict=True))
    lam, w = quadrature(start, end, data_std, tau)
    with mpmath.workdps(20):
        first, last = (mpmath.atan2(mpmath.mpf(p.sigma), data_std * mpmath.mpf(p.alpha)) for p in (start, end))

        def integrand(x):
            return (mpmath.cos(x) / mpmath.cos(last) if tau else 1) ** mpmath.mpf(tau**2) * (1 + x)

        exact = (1 + tau**2) * mpmath.quad(integrand, mpmath.linspace(last, first, 3))
    rho_t = math.hypot(data_std * end.alpha, end.sigma)
    assert w @ (1 + np.arctan2(np.exp(-lam), data_std)) == pytest.approx(float(exact) * rho_t / data_std, rel=1e-12)


@pytest.mark.parametrize("data_std", [0.0, 0.5, 50.0, 1000.0])
@pytest.mark.parametrize("h", [1e-6, 1e-3, 1.0])
def test_the_noise_of_a_short_step_agrees_with_thirty_digits(h, data_std):
    """c = rho_t sqrt(1 - (r_t/r_s)^(2 tau^2)), without the cancellation of its terms."""
    for lam, tau in itertools.product((-3.0, 2.0), (0.5, 1.0)):
        start, end = points_at(lam, lam + h)
        with mpmath.workdps(30):
            c2, (s, t) = (
                mpmath.mpf(data_std) ** 2,
                ((mpmath.mpf(p.sigma) / mpmath.mpf(p.alpha)) ** 2 for p in (start, end)),
            )
            exact = end.alpha * mpmath.sqrt((c2 + t) * (1 - ((c2 + t) / (c2 + s)) ** (mpmath.mpf(tau) ** 2)))
        found = linear_coefficients(start, end, data_std, tau)[1]
        assert found == pytest.approx(float(exact), rel=1e-12 + 4e-16 / h)  # log-SNR itself is rounded


@given(shift=st.floats(-4, 4), tau=st.sampled_from([0.0, 0.7, 1.0]), order=st.integers(1, 4))
def test_data_prediction_weights_do_not_depend_on_where_the_step_is(shift, tau, order):
    """c = 0: the weights over alpha_t depend on the steps of log-SNR only."""
    lam = np.array([-1.0, -0.6, -0.1, 0.5, 0.9])
    rows = []
    for offset in (0.0, shift):
        nodes = nodes_of(PATHS["edm"], lam + offset)
        rows.append(build_multistep(None, nodes, order=order, tau=tau).rows[-1])
    np.testing.assert_allclose(rows[0].b, rows[1].b, rtol=1e-11, atol=1e-13)
    assert len(rows[0].b) == order


@given(
    data_std=st.sampled_from([0.0, 0.3, 1.0, 5.0, INF]),
    clock=st.sampled_from(CLOCKS),
    order=st.integers(1, 4),
    corrector=st.booleans(),
    tau=st.sampled_from([0.0, 0.6, 1.0]),
    n=st.integers(1, 12),
)
def test_rows_integrate_a_constant_evaluation_exactly(data_std, clock, order, corrector, tau, n):
    """Whatever the order and the clock, if every F is the same the table lands where one order-1 step from the first
    node would: Lagrange weights sum to the whole."""
    # noise prediction integrates D instead where a stochastic step would be unstable
    assume(not (math.isinf(data_std) and 0.5 * (1 + tau**2) * math.expm1(7 / n) > 1))
    path = PATHS["vp_linear"]
    nodes = nodes_of(path, np.linspace(-4, 3, n + 1))
    table = build_multistep(path, nodes, order=order, corrector=corrector, data_std=data_std, clock=clock, tau=tau)
    whole = nodes_of(path, [-4.0, 3.0])
    single = build_multistep(path, whole, order=1, data_std=data_std, tau=tau).rows[0]
    x, carried, constant = 1.7, [], 0.9
    for row in table.rows:
        carried.insert(0, constant)
        x = row.a * x + sum(b * f for b, f in zip(row.b, carried, strict=False))
    assert x == pytest.approx(single.a * 1.7 + single.b[0] * constant, rel=1e-9)


@given(
    name=st.sampled_from(LONG),
    clock=st.sampled_from(CLOCKS),
    order=st.integers(1, 4),
    corrector=st.booleans(),
    n=st.integers(1, 15),
    constant=st.floats(-3, 3),
)
def test_constant_data_is_reached_exactly(name, clock, order, corrector, n, constant):
    """If D is one point, the c = 0 table keeps x = alpha D + sigma eps on its path and lands on the point."""
    path = PATHS[name]
    nodes = nodes_from_times(path, make_grid(path, "power", n))
    table = build_multistep(path, nodes, order=order, corrector=corrector, clock=clock)
    x = nodes.alpha[0] * constant + nodes.sigma[0] * 0.8
    states = run_table(table, lambda *_: constant, x, states=True)
    expected = nodes.alpha[1:] * constant + nodes.sigma[1:] * 0.8
    np.testing.assert_allclose(states, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["vp_linear", "vp_zero_snr", "edm", "flow"])
@pytest.mark.parametrize("final", ["exact", "second_order"])
@given(
    std=st.floats(0.1, 3.0),
    tau=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    n=st.integers(1, 12),
    order=st.integers(1, 3),
    corrector=st.booleans(),
)
def test_gaussian_data_is_exact_at_any_number_of_steps(name, final, std, tau, n, order, corrector):
    """x_0 ~ N(0, c^2) with data_std = c: exact variance at sigma = 0 for every tau, order and number of steps."""
    path = PATHS[name]
    nodes = nodes_from_times(path, make_grid(path, "power", n))
    table = build_multistep(path, nodes, order=order, corrector=corrector, data_std=std, tau=tau, final=final)
    first = nodes.alpha[0] ** 2 * std**2 + nodes.sigma[0] ** 2
    assert gaussian_law(table, std, first) == pytest.approx(std**2, rel=1e-10)


def error_of_the_mean(n, data_std, tau, order=2, mean=1.4, std=0.6):
    """Error of the mean of N(mean, std^2) data after n steps (the mean of an affine recursion runs alone)."""
    nodes = nodes_of(PATHS["vp_linear"], np.linspace(-4, 3, n + 1))
    table = build_multistep(None, nodes, order=order, data_std=data_std, tau=tau)
    x = run_table(
        table,
        lambda x, row: mean + gaussian_denoiser(std)(x - row.alpha * mean, row),
        nodes.alpha[0] * mean,
    )
    return abs(x / nodes.alpha[-1] - mean)


@given(
    n=st.integers(1, 12),
    order=st.integers(1, 4),
    data_std=st.sampled_from([0.0, INF]),
    tau=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
)
def test_mean_of_gaussian_data_is_exact_for_data_and_noise_prediction(n, order, data_std, tau):
    """At the mean of N(m, c^2) the denoiser says m at every noise level: c 0 and inf carry it exactly, in any number of
    steps."""
    assert error_of_the_mean(n, data_std, tau, order) < 1e-9


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("order", [1, 2])
def test_mean_of_shifted_gaussian_data_converges(order, tau):
    """With a finite data_std the evaluation at m is m s/r, no constant: exact for m = 0, else of the method's order."""
    errors = [error_of_the_mean(n, 0.6, tau, order) for n in (50, 100, 200)]
    assert order_of(errors)[-1] > order - 0.25
    assert errors[-1] < 0.03
    assert error_of_the_mean(5, 0.6, tau, order, mean=0.0) == 0


@given(start=lams, h=gaps, data_std=st.sampled_from([0.0, 0.3, 1.0, INF]), tau=st.sampled_from([0.0, 0.5, 1.0, 2.0]))
def test_linear_parts_compose(start, h, data_std, tau):
    """Two steps are one step: factors multiply, noise variances add (the linear SDE is solved exactly)."""
    p, q, r = points_at(start, start + 0.4 * h, start + h)
    (a1, c1), (a2, c2), (a, c) = (linear_coefficients(*pair, data_std, tau) for pair in ((p, q), (q, r), (p, r)))
    assert a1 * a2 == pytest.approx(a, rel=1e-9)
    assert (a2 * c1) ** 2 + c2**2 == pytest.approx(c**2, rel=1e-8, abs=1e-14)


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("data_std", [0.0, 0.5, INF])
def test_a_step_of_no_length_keeps_the_state(data_std, tau):
    """Factor 1 and no noise, at clean data too, where s_t/s_s is no number."""
    for point in (*points_at(0.3), Point(1.0, 0.0)):
        assert linear_coefficients(point, point, data_std, tau) == (1.0, 0.0)


@given(lam=lams, data_std=st.sampled_from([0.0, 0.4, 1.0, 3.0]))
def test_evaluation_of_gaussian_data_vanishes(lam, data_std):
    """F is the part of D that N(0, c^2) data does not explain, so it is 0 for them; at c = 1 under VP it is -v."""
    alpha, sigma = (float(v) for v in PATHS["vp_linear"].alpha_sigma_of(lam))
    a, b = evaluation_coefficients(data_std, alpha, sigma)
    row = Point(alpha, sigma)
    denoised = gaussian_denoiser(data_std)(1.0, row)
    noise = (1.0 - alpha * denoised) / sigma
    assert a * denoised + b * noise == pytest.approx(0, abs=1e-11)
    if data_std == 1:
        assert (a, b) == pytest.approx((sigma, -alpha), rel=1e-12)


# -- structure --


@given(
    name=st.sampled_from(LONG),
    grid=st.sampled_from(list(GRIDS)),
    order=st.integers(1, 4),
    corrector=st.booleans(),
    n=st.integers(1, 20),
)
def test_history_is_at_most_the_order(name, grid, order, corrector, n):
    """No more than ``order`` evaluations are kept (order - 1 without corrector), and none after the last row."""
    path = PATHS[name]
    table = build_multistep(path, nodes_from_times(path, make_grid(path, grid, n)), order=order, corrector=corrector)
    kept = [table.history(i) for i in range(n)]
    assert max(kept) <= (order if corrector else order - 1)
    assert kept[-1] == 0
    for i, row in enumerate(table.rows):
        assert len(row.b) <= 1 + (kept[i - 1] if i else 0)


@pytest.mark.parametrize("method", SINGLESTEP_METHODS)
@given(n=st.integers(1, 12), tau=st.sampled_from([0.0, 1.0]))
def test_singlestep_tables_restart_at_their_anchor(method, n, tau):
    """A single-step table forgets the step before: what came earlier enters the state after a step through the state
    before it only, with one common factor."""
    nodes = nodes_of(PATHS["vp_linear"], np.linspace(-3, 3, n + 1))
    table = build_singlestep(PATHS["vp_linear"], nodes, method=method, tau=tau)
    size = SINGLESTEP_METHODS[method][0]
    assert max(table.history(i) for i in range(len(table.rows))) <= size - 1
    states = probe_table(table, "sample")[:, : 1 + len(table.rows)]
    ends = range(size - 1, len(table.rows), size)
    for a, b in itertools.pairwise(ends):
        np.testing.assert_allclose(states[b, : a + 2] * states[a, 0], states[a, : a + 2] * states[b, 0], atol=1e-9)


def test_stages_are_rows_of_their_own():
    """Methods with stages between grid nodes list every evaluation: as many rows as network calls."""
    nodes = nodes_of(PATHS["vp_linear"], np.linspace(-3, 3, 5), clean=True)
    for method, calls in (("heun", 9), ("2s", 9), ("3s", 13), ("grid2", 5), ("grid3", 5)):
        table = build_singlestep(PATHS["vp_linear"], nodes, method=method)
        assert len(table.rows) == calls
        np.testing.assert_allclose(
            [row.time for row in table.rows],
            PATHS["vp_linear"].time([math.log(row.alpha / row.sigma) for row in table.rows]),
            rtol=1e-9,
        )


@given(n=st.integers(2, 30), eta=st.floats(0, 1))
def test_eta_gives_a_tau_for_every_step(n, eta):
    """tau_from_eta has one entry per step, within [0, 1], increasing with eta and finite at sigma = 0."""
    nodes = nodes_from_times(PATHS["vp_linear"], make_grid(PATHS["vp_linear"], "power", n))
    taus = tau_from_eta(eta, nodes)
    assert len(taus) == n
    assert all(0 <= tau <= 1 for tau in taus)
    assert all(low <= high + 1e-12 for low, high in zip(tau_from_eta(eta / 2, nodes), taus, strict=True))


@pytest.mark.parametrize(("step", "terms"), [(0.8, 2), (2.4, 1)])
def test_a_correction_with_one_node_is_left_out_where_it_would_feed_back(step, terms):
    """A step redone with the new evaluation alone (corrector = 1) weighs it by all of its weight w; where ``|w| c^2
    alpha/(rho sigma)``, the slope of F, makes that more than 1.1 times an error, the state stays."""
    std = 2.0
    nodes = nodes_of(PATHS["vp_linear"], [0.0, step, step + 0.5])
    start, end = (Point(*pair) for pair in zip(nodes.alpha[:2], nodes.sigma[:2], strict=True))
    weight = lagrange_weights(None, start, end, [end], data_std=std, clock="log_snr", tau=0.0)[0]
    slope = std**2 * end.alpha / (math.hypot(std * end.alpha, end.sigma) * end.sigma)
    assert (weight * slope > 1.1) == (terms == 1)
    assert len(build_multistep(None, nodes, order=1, corrector=1, data_std=std).rows[1].b) == terms


def test_rows_do_not_extrapolate_over_large_ratios():
    """A step more than MAX_STEP_RATIO times the one before is taken with one evaluation; just below it, with two."""
    for ratio, count in ((MAX_STEP_RATIO * 1.01, 1), (MAX_STEP_RATIO * 0.99, 2)):
        nodes = nodes_of(PATHS["vp_linear"], [-2.002, -2.0, -2.0 + 0.002 * ratio])
        assert len(build_multistep(None, nodes, order=2).rows[1].b) == count


# -- no combination explodes --

ROBUST_PATHS = ("vp_linear", "vp_zero_snr", "flow", "edm")
ROBUST_GRIDS = (("power", 1.0), ("power", 3.0), ("leading", None), ("karras", None), ("log_snr", None), ("beta", None))


def amplification(name, options, stds=(0.1, 1.0, 3.0)):
    """Largest standard deviation of what the tables return for N(0, std^2) data, relative to the larger of std and a
    finite data_std, over grids and numbers of steps."""
    path, worst = PATHS[name], 0.0
    for (grid, rho), n in itertools.product(ROBUST_GRIDS, (5, 12)):
        nodes = nodes_from_times(path, make_grid(path, grid, n, rho=rho))
        if nodes.alpha[0] == 0 and math.isinf(options["data_std"]):
            continue
        table = build_multistep(path, nodes, **options)
        for std in stds:
            law = gaussian_law(table, std, nodes.alpha[0] ** 2 * std**2 + nodes.sigma[0] ** 2)
            scale = max(std, options["data_std"] if math.isfinite(options["data_std"]) else 0.0)
            worst = max(worst, math.sqrt(law) / scale)
    return worst


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("data_std", [0.0, 1.0])
@pytest.mark.parametrize(("tau", "orders"), [(0.0, (2, 3, 4)), (1.0, (2, 3))])
def test_no_table_explodes_on_gaussian_data(clock, data_std, tau, orders):
    """Every grid, clock, order and corrector that a scheduler offers returns a bounded result, at 5 and at 12 steps,
    for data ten times smaller to three times larger than unit scale."""
    for name, order, corrector in itertools.product(ROBUST_PATHS, orders, (False, True)):
        options = {"order": order, "corrector": corrector, "data_std": data_std, "clock": clock, "tau": tau}
        assert amplification(name, {**options, "final": "corrected"}) < 6, options  # the schedulers' last step


@pytest.mark.parametrize("tau", [0.0, 1.0])
@pytest.mark.parametrize("corrector", [False, True])
def test_no_noise_prediction_table_explodes(tau, corrector):
    """The same for data_std = inf, which the schedulers offer too (DPM-Solver, DEIS, sde-dpmsolver)."""
    for name, order in itertools.product(ROBUST_PATHS, (1, 2, 3)):
        options = {"order": order, "corrector": corrector, "data_std": INF, "clock": "log_snr", "tau": tau}
        assert amplification(name, options) < 6, (name, options)


@pytest.mark.parametrize("clock", CLOCKS)
@pytest.mark.parametrize("data_std", [0.0, 1.0])
@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_no_table_explodes_on_the_mixture(clock, data_std, tau):
    """The same on mixture data, where F is not linear: every coordinate stays within the data's range."""
    start = noise_like(32, seed=5)
    noise = noise_like(12 * 32, seed=6).reshape(12, 32, 3)
    for name, (grid, rho), corrector in itertools.product(("vp_linear", "flow"), ROBUST_GRIDS, (False, True)):
        nodes = nodes_from_times(PATHS[name], make_grid(PATHS[name], grid, 8, rho=rho))
        options = {"order": 3, "corrector": corrector, "data_std": data_std, "clock": clock, "tau": tau}
        table = build_multistep(PATHS[name], nodes, **options)
        x = run_table(table, mixture_denoiser(), start, lambda i: noise[i])
        assert float(x.abs().max()) < 8, (name, grid, options)


@pytest.mark.parametrize("name", ["vp_linear", "vp_zero_snr", "edm", "flow"])
@pytest.mark.parametrize("clock", CLOCKS)
def test_tables_are_built_without_warnings(name, clock):
    """Infinite log-SNR at either end is planned for: building a default table warns of nothing."""
    path = PATHS[name]
    nodes = nodes_from_times(path, make_grid(path, "power", 6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_multistep(path, nodes, order=2, corrector=True, clock=clock)


def test_default_scheduler_is_the_default_table():
    """ProbabilityFlowScheduler's rows are those of build_multistep with the options in its config."""
    scheduler = ProbabilityFlowScheduler(**LINEAR)
    scheduler.set_timesteps(7)
    nodes = nodes_from_times(PATHS["vp_linear"], scheduler._run.nodes.time[:-1])
    np.testing.assert_array_equal(nodes.alpha, scheduler._run.nodes.alpha)
    np.testing.assert_allclose(scheduler.timesteps, nodes.time[:-1].astype(np.float32), rtol=0)


# -- grids that begin at a fraction of equal steps of time (image to image) --


@pytest.mark.parametrize("grid", ["power", "balanced"])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_a_started_grid_begins_where_equal_steps_of_time_would(grid, n):
    """start = 0.4: time 399 (diffusers' trailing), unshifted sigma 0.4 of flow matching, 40 % of EDM's range of time;
    then strictly down, within the training range."""
    edm = PATHS["edm"]
    span = edm.noisiest - edm.cleanest
    first = {"vp_linear": 399.0, "flow": 400.0, "flow_shift": 1000 * 1.2 / 1.8, "mochi": 600.0}
    first["edm"] = edm.cleanest + 0.4 * span
    for name, expected in first.items():
        path = PATHS[name]
        times = make_grid(path, grid, n, rho=1.25, start=0.4)
        assert len(times) == n
        assert times[0] == pytest.approx(expected, rel=1e-12)
        assert np.all(np.diff(path.log_snr(times)) > 0)
        assert min(path.noisiest, path.cleanest) <= times.min() and times.max() <= max(path.noisiest, path.cleanest)


@pytest.mark.parametrize("name", ["vp_linear", "flow_shift", "edm"])
@pytest.mark.parametrize("grid", ["power", "balanced"])
def test_a_started_grid_is_the_rest_of_the_full_one(grid, name):
    """The same law on what is left: started at its own k-th time, a grid goes on as the full one does; started at 1 it
    is the full one to the last bit."""
    path, n, k, rho = PATHS[name], 12, 5, 1.25
    full = make_grid(path, grid, n, rho=rho)
    high, _, clean = path.grid_range
    clock = full if name != "flow_shift" else ((np.arange(n, 0, -1) / n) ** rho)
    rest = make_grid(path, grid, n - k, rho=rho, start=(clock[k] - clean) / (high - clean))
    np.testing.assert_allclose(rest, full[k:], rtol=1e-9, atol=1e-9)
    np.testing.assert_array_equal(make_grid(path, grid, n, rho=rho, start=1.0), full)


def test_a_stretched_shift_keeps_the_start_of_one_step():
    """shift_terminal stretches a grid to its end, not the level that a single step starts from."""
    path = PATHS["flow_terminal"]
    one, many = (make_grid(path, "power", n, start=0.5)[0] for n in (1, 100))
    assert one == pytest.approx(many, rel=0.03)


@pytest.mark.parametrize("start", [0, -0.2, 1.5, float("nan")])
def test_a_start_outside_the_range_is_refused(start):
    with pytest.raises(ValueError, match="start must lie in"):
        make_grid(PATHS["vp_linear"], "power", 5, start=start)


# -- single steps: one tau a step, and a split where a stage would amplify --


@pytest.mark.parametrize("method", SINGLESTEP_METHODS)
def test_singlestep_takes_one_tau_a_step(method):
    """Each step, with the stages inside it, is that of a run with its tau alone.  Steps whose stages are grid nodes
    have as many taus as nodes, here equal within a step."""
    size, fractions = SINGLESTEP_METHODS[method]
    each = 1 if fractions else size
    levels = [0.0, 1.0, 0.3, 0.5]
    taus = [tau for tau in levels for _ in range(each)]
    nodes = nodes_of(PATHS["vp_linear"], np.linspace(-2, 2, len(taus) + 1))
    table = build_singlestep(PATHS["vp_linear"], nodes, method=method, tau=taus)
    for i, tau in enumerate(levels):
        alone = build_singlestep(PATHS["vp_linear"], nodes, method=method, tau=tau)
        assert table.rows[i * size : (i + 1) * size] == alone.rows[i * size : (i + 1) * size]
    with pytest.raises(ValueError, match="one for each"):
        build_singlestep(PATHS["vp_linear"], nodes, method=method, tau=taus[:-1])


def test_a_single_step_is_split_where_its_stage_would_amplify():
    """Three stages whose last leaps 5.8 of log-SNR after steps of 1: that step starts at its stage."""
    lam = [-1.1, 0.0, 1.1, 6.9]
    rows = build_singlestep(PATHS["flow"], nodes_of(PATHS["flow"], lam), method="grid3").rows
    assert [len(row.b) for row in rows] == [1, 2, 1]
    even = build_singlestep(PATHS["flow"], nodes_of(PATHS["flow"], [-1.1, 0.0, 1.1, 2.2]), method="grid3").rows
    assert [len(row.b) for row in even] == [1, 2, 3]
