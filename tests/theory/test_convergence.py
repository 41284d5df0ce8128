"""Order of convergence on a mixture oracle, and weak order of the SDE tables."""

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import PATHS, mixture_denoiser, nodes_of, run_table
from scipy.integrate import solve_ivp

from diffusers_sde import GaussianMixtureModel
from diffusers_sde.noise import brownian_weights, combine, seeds_from_int
from diffusers_sde.prediction import convert
from diffusers_sde.tables import build_multistep, build_singlestep
from diffusers_sde.weights import evaluation_coefficients

LOW, HIGH = -1.5, 1.0  # half log-SNRs between which the oracle is smooth and far from linear
MIXTURE = ([0.5, 0.5], [[1.0, -0.5], [-1.0, 0.5]], [0.3, 0.5])
FINEST = 160
NAMES = ("vp_linear", "edm", "flow")


@functools.lru_cache
def exact(name: str) -> np.ndarray:
    """States on the finest grid, (FINEST + 1, 8, 2): ``d(x/alpha)/d lambda = D - x/alpha`` by DOP853 to 1e-12."""
    path, denoise = PATHS[name], mixture_denoiser(GaussianMixtureModel(*MIXTURE))
    lam = np.linspace(LOW, HIGH, FINEST + 1)

    def right(at, flat):
        scaled = torch.from_numpy(flat.reshape(8, 2))
        return (denoise(scaled, _At(1.0, math.exp(-at))) - scaled).numpy().ravel()

    start = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * math.exp(-LOW)
    solution = solve_ivp(right, (LOW, HIGH), start.numpy().ravel(), "DOP853", lam, rtol=1e-12, atol=1e-13)
    return solution.y.T.reshape(-1, 8, 2) * path.alpha_sigma_of(lam)[0][:, None, None]


class _At:
    def __init__(self, alpha, sigma):
        self.alpha, self.sigma = alpha, sigma


def error(name: str, build, n: int, given: int) -> float:
    """RMS error of a table on ``n`` equal steps of log-SNR whose first ``given`` states are replaced by exact ones:
    the start that the theory of multistep methods assumes (Hairer, Norsett & Wanner, section III.4)."""
    path, denoise = PATHS[name], mixture_denoiser(GaussianMixtureModel(*MIXTURE))
    states = torch.from_numpy(exact(name)[:: FINEST // n])
    table = build(path, nodes_of(path, np.linspace(LOW, HIGH, n + 1)))
    x, history = states[0], []
    for i, row in enumerate(table.rows):
        own = evaluation_coefficients(table.data_std, row.alpha, row.sigma)
        k_x, k_d = convert((1.0, 0.0), own, row.alpha, row.sigma)
        history.insert(0, k_x * x + k_d * denoise(x, row))
        x = row.a * x + sum(b * f for b, f in zip(row.b, history, strict=False))
        if i + 1 < given:
            x = states[i + 1]
    return float((x - states[-1]).square().mean().sqrt())


def slope(name: str, build, given: int, steps=(40, 80)) -> float:
    coarse, fine = (error(name, build, n, given) for n in steps)
    return math.log2(coarse / fine)


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("data_std", [0.0, 0.5, math.inf])
@pytest.mark.parametrize("clock", ["log_snr", "angle", "sigma"])
@pytest.mark.parametrize("name", NAMES)
def test_multistep_has_its_order(name, clock, data_std, order, corrector):
    """An order-p table converges with order p, with the corrector p + 1 (Zhao et al. 2023, theorem 3.1)."""

    def build(path, nodes):
        return build_multistep(path, nodes, order=order, corrector=corrector, data_std=data_std, clock=clock)

    steps = (80, 160) if order == 4 and corrector else (40, 80)  # the fifth order is reached later
    assert abs(slope(name, build, order + 1, steps) - order - corrector) < 0.25


@pytest.mark.parametrize("order", [1, 2, 3])
def test_multistep_has_its_order_in_time(order):
    """The same in the clock t, where it is smooth: flow matching."""

    def build(path, nodes):
        return build_multistep(path, nodes, order=order, data_std=1.0, clock="time")

    assert abs(slope("flow", build, given=order + 1) - order) < 0.25


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("data_std", [0.0, 0.5, math.inf])
def test_singlestep_has_its_order(data_std, order):
    """Stages on the grid: order k per step of k evaluations (Lu et al. 2022, theorem 3.2), no history to start."""

    def build(path, nodes):
        return build_singlestep(path, nodes, method=f"grid{order}", data_std=data_std)

    steps = (40, 80) if order == 2 else (30, 60)
    path, denoise = PATHS["vp_linear"], mixture_denoiser(GaussianMixtureModel(*MIXTURE))
    states = exact("vp_linear")
    errors = []
    for n in steps:
        table = build(path, nodes_of(path, np.linspace(LOW, HIGH, n + 1)))
        end = run_table(table, denoise, torch.from_numpy(states[0]))
        errors.append(float((end - torch.from_numpy(states[-1])).square().mean().sqrt()))
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.25


def test_heun_has_order_two():
    """Predictor and trapezoid, two evaluations a step (Karras et al. 2022, algorithm 1)."""

    def build(path, nodes):
        return build_singlestep(path, nodes, method="heun", data_std=math.inf, clock="sigma")

    path, denoise, states = PATHS["edm"], mixture_denoiser(GaussianMixtureModel(*MIXTURE)), exact("edm")
    ends = [
        run_table(build(path, nodes_of(path, np.linspace(LOW, HIGH, n + 1))), denoise, torch.from_numpy(states[0]))
        for n in (20, 40)
    ]
    errors = [float((x - torch.from_numpy(states[-1])).square().mean().sqrt()) for x in ends]
    assert abs(math.log2(errors[0] / errors[1]) - 2) < 0.25


def test_published_third_order_weight_is_half_the_right_one():
    """DPM-Solver++ 3M as published halves the weight of the second difference: order 2, exact weights: order 3."""

    def published(path, nodes):
        """F_0 + u (d + dd/2) + u^2 dd/2 interpolates at u = 0, -1, -2 with differences d, dd; the u^2 term, whose exact
        weight is w, enters with w/2."""
        table = build_multistep(path, nodes, order=3)
        h = (HIGH - LOW) / (len(nodes) - 1)
        rows = list(table.rows)
        for i in range(2, len(rows)):
            w = float(nodes.alpha[i + 1]) * (0.5 - 1 / h + (1 - math.exp(-h)) / h**2)
            b = np.array(rows[i].b) - 0.5 * w * np.array([1.0, -2.0, 1.0])
            rows[i] = replace(rows[i], b=tuple(b))
        return replace(table, rows=tuple(rows))

    assert abs(slope("vp_linear", published, given=4) - 2) < 0.25
    assert abs(slope("vp_linear", lambda p, n: build_multistep(p, n, order=3), given=4) - 3) < 0.25


# -- weak order: laws, not samples --

LINE = GaussianMixtureModel([0.3, 0.7], [[-1.0], [1.5]], [0.09, 0.64])  # data on a line, far from Gaussian


def law(table, nodes, size) -> tuple[np.ndarray, np.ndarray]:
    """A grid of the line, and how much more probable than p_t a table of tau > 0 makes each point of it at the end,
    started from p_t: Chapman-Kolmogorov on the grid, spectrally accurate.  Rows may read two evaluations: the joint law
    of the last two states is carried."""
    grid, dx = np.linspace(-7, 7, size, retstep=True)
    points = torch.from_numpy(grid)[:, None]

    def marginal(i):
        return np.exp(LINE.log_density(points, float(nodes.alpha[i]), float(nodes.sigma[i])).numpy())

    joint, older = marginal(0)[:, None] * dx, np.zeros(1)  # (states, states before); evaluations of these
    for row in table.rows:
        own = evaluation_coefficients(table.data_std, row.alpha, row.sigma)
        k_x, k_d = convert((1.0, 0.0), own, row.alpha, row.sigma)
        newest = k_x * grid + k_d * LINE.posterior_mean(points, row.alpha, row.sigma).numpy()[:, 0]
        weights = [*row.b, 0.0][:2]
        mean = row.a * grid[:, None] + weights[0] * newest[:, None] + weights[1] * older
        kernel = np.exp(-0.5 * ((grid[:, None, None] - mean) / row.c) ** 2) / (row.c * math.sqrt(2 * math.pi)) * dx
        joint, older = (kernel * joint).sum(2), newest
        if len(table.rows[-1].b) == 1:  # nothing older is read
            joint, older = joint.sum(1)[:, None], np.zeros(1)
    return grid, joint.sum(1) - marginal(-1) * dx


def weak_errors(order, data_std, tau, steps, size):
    """Errors of the mean of 1, x^2 and cos(2x) over the law at the end, (len(steps), 3)."""
    errors = []
    for n in steps:
        nodes = nodes_of(PATHS["vp_linear"], np.linspace(LOW, HIGH, n + 1))
        grid, excess = law(build_multistep(None, nodes, order=order, data_std=data_std, tau=tau), nodes, size)
        errors.append([np.sum(f * excess) for f in (1.0, grid**2, np.cos(2 * grid))])
    return np.abs(errors)


@pytest.mark.parametrize("tau", [0.7, 1.0, 1.5])
@pytest.mark.parametrize("data_std", [0.0, 0.7, math.inf])
def test_sde_tables_of_order_one_have_weak_order_one(data_std, tau):
    """Means over the law of the table converge to those over p_t with order 1 for every tau and data_std (Kloeden &
    Platen, chapter 14), on a mixture."""
    errors = weak_errors(1, data_std, tau, (32, 64), 320)
    assert errors[:, 0].max() < 1e-7
    np.testing.assert_allclose(np.log2(errors[0] / errors[1])[1:], 1, atol=0.1)


def test_sde_tables_of_order_two_do_better():
    """A second evaluation: weak order above 1, and less than a third of the error of one, at 8 and 16 steps."""
    one, two = (weak_errors(order, 0.0, 1.0, (8, 16), size) for order, size in ((1, 300), (2, 120)))
    assert two[:, 0].max() < 1e-7
    assert np.all(np.log2(two[0] / two[1])[1:] > 1.3)
    assert np.all(two[:, 1:] < one[:, 1:] / 3)


def test_corrected_sde_tables_converge_weakly():
    """E|x|^2 of the reverse SDE of order 2 with corrector converges at least with weak order 1.  The fine solution on
    the same Brownian path is the control variate, which leaves a standard error far below the differences."""
    path, denoise = PATHS["vp_linear"], mixture_denoiser(GaussianMixtureModel(*MIXTURE))
    count = 3000
    start = torch.from_numpy(exact("vp_linear")[0][:1]).expand(count, 2)
    seeds = seeds_from_int(0, count, start.device)

    def second_moment(n):
        lam = np.linspace(LOW, HIGH, n + 1)
        table = build_multistep(path, nodes_of(path, lam), order=2, corrector=True, tau=1.0)
        weights = brownian_weights(lam, tau=1.0)
        end = run_table(table, denoise, start, lambda i: combine(weights[i], seeds, start.shape).double())
        return end.square().sum(1)

    fine = second_moment(96)
    gaps = [second_moment(n) - fine for n in (4, 8)]
    errors, noise = np.array([[abs(float(g.mean())), float(g.std()) / math.sqrt(count)] for g in gaps]).T
    assert np.all(errors > 6 * noise)
    assert math.log2(errors[0] / errors[1]) > 1
