"""Every known sampler is a setting of one table, and where diffusers' arithmetic differs from it, who is right.

Samplers are compared by all their coefficients (see `helpers.probe_stock`): each state as a combination of the first
state, the network's outputs and the noises.  Fu & Wang: arXiv:2605.22586.  Lai et al.: arXiv:2510.21890.
"""

import math
from dataclasses import replace

import diffusers
import numpy as np
import pytest
import torch
from helpers import (
    COSINE,
    LINEAR,
    PATHS,
    SD,
    deviation,
    gaussian_denoiser,
    gaussian_flow,
    gaussian_law,
    mixture,
    mixture_denoiser,
    nodes_of,
    noise_like,
    order_of,
    probe_ours,
    probe_stock,
    probe_table,
    reference_weights,
    run_table,
    stock_nodes,
    stock_row,
)
from scipy.integrate import solve_ivp

from diffusers_sde import DPMSolverScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.configs import alphas_cumprod_from_config
from diffusers_sde.grids import Nodes
from diffusers_sde.tables import Table, build_multistep, build_singlestep, tau_from_eta
from diffusers_sde.weights import Point, lagrange_weights

# diffusers warns that its noise prediction will go; what it does is compared as long as it is there
pytestmark = pytest.mark.filterwarnings("ignore:.*algorithm_type:FutureWarning")

INF = math.inf
FLOAT32 = 3e-6  # stock schedulers keep their noise levels in float32
BODY = slice(0, -1)  # all rows but the last


def stock(name, n=10, **config):
    scheduler = getattr(diffusers, name)(**{**LINEAR, **config})
    scheduler.set_timesteps(n)
    return scheduler


def assert_is(scheduler, table, kind, rows=slice(None), tolerance=FLOAT32, **step):
    """The stock scheduler's coefficients are the table's."""
    assert deviation(probe_table(table, kind)[rows], probe_stock(scheduler, **step)[rows]) < tolerance


# -- DDPM and DDIM --


@pytest.mark.parametrize("data_std", [0.0, INF])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_ddim_is_the_ode_of_order_one(data_std, kind):
    """DDIM = probability flow of order 1, data or noise prediction (Fu & Wang, section 7; Lai et al., chapter 9:
    exponential Euler on x0 or on eps)."""
    ddim = stock("DDIMScheduler", clip_sample=False, prediction_type=kind)
    ours = ProbabilityFlowScheduler.from_config(ddim.config, solver_order=1, corrector=False, data_std=data_std)
    ours.set_timesteps(timesteps=ddim.timesteps)
    states, stds = probe_ours(ours)
    assert deviation(states, probe_stock(ddim, eta=0.0)) < 1e-5
    assert not stds.any()


@pytest.mark.parametrize("data_std", [0.5, 1.0])
def test_order_one_with_a_finite_data_std_is_not_ddim(data_std):
    """F constant with 0 < c < inf is another first-order method: it differs from DDIM and is exact for N(0, c^2)."""
    nodes = nodes_of(PATHS["vp_linear"], np.linspace(-4, 4, 8))
    table, ddim = (build_multistep(None, nodes, order=1, data_std=c) for c in (data_std, 0.0))
    assert deviation(probe_table(table, "sample"), probe_table(ddim, "sample")) > 0.05
    first, last = (nodes.alpha[i] ** 2 * data_std**2 + nodes.sigma[i] ** 2 for i in (0, -1))
    assert gaussian_law(table, data_std, first) == pytest.approx(last, rel=1e-12)
    assert abs(gaussian_law(ddim, data_std, first) / last - 1) > 0.05


def test_euler_on_v_in_the_angle_is_the_finite_one():
    """VP with c = 1: F = -v and the order-1 row is x cos(d) - v sin(d) over the angle d (Lai et al., chapter 9: Euler
    on v)."""
    nodes = nodes_of(PATHS["vp_linear"], np.linspace(-3, 3, 6))
    angles = np.arctan2(nodes.sigma, nodes.alpha)
    rows = build_multistep(None, nodes, order=1, data_std=1.0).rows
    for row, turn in zip(rows, angles[:-1] - angles[1:], strict=True):
        assert row.a == pytest.approx(1.0, rel=1e-13)
        assert row.b[0] == pytest.approx(turn, rel=1e-12)  # Euler in the angle: a rotation to first order


def test_ddpm_is_the_reverse_sde_of_order_one():
    """DDPM = order 1, tau = 1, c = 0: mean and posterior variance of every step (Fu & Wang, section 7; Ho et al.
    2020, eq. 6-7)."""
    ddpm = stock("DDPMScheduler", clip_sample=False)
    ours = ReverseSDEScheduler.from_config(ddpm.config, solver_order=1, corrector=False)
    ours.set_timesteps(timesteps=ddpm.timesteps)
    states, stds = probe_ours(ours)
    assert deviation(states, probe_stock(ddpm)) < 1e-5
    abar = np.append(alphas_cumprod_from_config(LINEAR)[ddpm.timesteps.numpy()], 1.0)
    beta = 1 - abar[:-1] / abar[1:]
    np.testing.assert_allclose(stds**2, (1 - abar[1:]) / (1 - abar[:-1]) * beta, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(stds**2, [float(ddpm._get_variance(int(t))) for t in ddpm.timesteps], atol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_with_eta_is_a_tau_per_step(eta):
    """DDIM's eta is exp(-2 tau^2 h) = 1 - eta^2 (1 - exp(-2h)): mean and noise (Song et al. 2021, eq. 16)."""
    ddim = stock("DDIMScheduler", clip_sample=False)
    ours = ReverseSDEScheduler.from_config(ddim.config, eta=eta, solver_order=1, corrector=False)
    ours.set_timesteps(timesteps=ddim.timesteps)
    states, stds = probe_ours(ours)
    reference = probe_stock(ddim, eta=eta)
    assert deviation(states, reference) < 1e-5
    n = len(stds)
    np.testing.assert_allclose(stds, [abs(reference[i, n + 1 + i]) for i in range(n)], atol=2e-6)
    assert (stds[:-1] > 0).all() == (eta > 0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.9])  # at 1 DDIM takes the root of a rounding error below 0
def test_ddim_with_eta_from_zero_terminal_snr(eta):
    """The first step, from alpha = 0, keeps sqrt(1 - eta^2) of the state and draws eta of noise, half a standard
    deviation at eta = .5: every coefficient of DDIM (Song et al. 2021, eq. 16), and its fixed_large variance."""
    zero = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    ddim = stock("DDIMScheduler", clip_sample=False, **zero)
    ours = ReverseSDEScheduler.from_config(ddim.config, eta=eta, solver_order=1, corrector=False)
    ours.set_timesteps(10)
    assert list(ours.timesteps) == list(ddim.timesteps) and float(ours.levels.alpha[0]) == 0
    states, stds = probe_ours(ours)
    reference = probe_stock(ddim, eta=eta)
    assert deviation(states, reference) < 1e-5
    np.testing.assert_allclose(stds, [abs(reference[i, 11 + i]) for i in range(10)], atol=2e-6)
    assert stds[0] == pytest.approx(eta, rel=1e-3)
    large = ReverseSDEScheduler.from_config(ours.config, variance_type="fixed_large")
    large.set_timesteps(10)
    assert probe_ours(large)[1][0] == pytest.approx(eta, abs=1e-12)


@pytest.mark.parametrize("process", [{"use_flow_sigmas": True}, {"rescale_betas_zero_snr": True}], ids=["flow", "vp"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("order", [1, 2])
def test_eta_from_zero_snr_keeps_the_law(process, eta, order):
    """N(0, c^2) data with data_std = c have their variance exactly, at any eta, order and number of steps, also where
    the run starts at alpha = 0 or takes a single step."""
    for n in (1, 2, 5):
        scheduler = ReverseSDEScheduler(
            **process, prediction_type="v_prediction", eta=eta, data_std=0.5, solver_order=order, final="exact"
        )
        scheduler.set_timesteps(n)
        nodes = scheduler.levels
        assert nodes.alpha[0] == 0
        table = scheduler._table(scheduler.path, nodes, scheduler._taus(nodes))
        assert gaussian_law(table, 0.5, 1.0) == pytest.approx(0.25, rel=1e-10)


def test_tau_of_eta_one_is_one():
    """eta = 1 is tau = 1 whatever the step, eta = 0 is the ODE, and between them tau depends on the step."""
    nodes = nodes_of(PATHS["vp_linear"], [-3.0, -2.0, 1.0])
    assert tau_from_eta(1.0, nodes) == [1.0, 1.0]
    assert tau_from_eta(0.0, nodes) == [0.0, 0.0]
    near, far = tau_from_eta(0.5, nodes)
    for tau, h in ((near, 1.0), (far, 3.0)):
        assert math.exp(-2 * tau**2 * h) == pytest.approx(1 - 0.25 * (1 - math.exp(-2 * h)), rel=1e-12)
    assert near != pytest.approx(far, rel=0.1)


def test_zero_terminal_snr_with_epsilon_is_refused():
    """eps prediction at zero SNR: NaN in DDIM (diffusers issue 3851), here an error that names the remedy."""
    config = {**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
    ddim, x = stock("DDIMScheduler", **config), torch.ones(1, 1, 1, 1)
    ours = ProbabilityFlowScheduler.from_config(ddim.config)
    ours.set_timesteps(10)
    assert not ddim.step(x, ddim.timesteps[0], x).prev_sample.isfinite().all()
    with pytest.raises(ValueError, match="v_prediction"):
        ours.step(x, ours.timesteps[0], x)


# -- Euler, LMS, Heun --


@pytest.mark.parametrize("data_std", [0.0, INF])
def test_euler_is_order_one_in_ve_coordinates(data_std):
    """k-diffusion's Euler is DDIM on x/alpha (Lai et al., chapter 9; Karras et al. 2022)."""
    euler = stock("EulerDiscreteScheduler")
    assert_is(euler, build_multistep(None, stock_nodes(euler, "ve"), order=1, data_std=data_std), "epsilon")


def test_euler_ancestral_is_the_sde_of_order_one():
    """Euler ancestral = tau 1, c = 0 in VE coordinates: sigma_down and sigma_up of every step."""
    euler = stock("EulerAncestralDiscreteScheduler")
    assert_is(euler, build_multistep(None, stock_nodes(euler, "ve"), order=1, tau=1.0), "epsilon")


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_is_noise_prediction_in_the_sigma_clock(order):
    """k-diffusion's LMS = c inf, clock sigma (the last step, where it still extrapolates, returns D here)."""
    lms = stock("LMSDiscreteScheduler")
    table = build_multistep(None, stock_nodes(lms, "ve"), order=order, data_std=INF, clock="sigma")
    assert_is(lms, table, "epsilon", BODY, order=order)
    assert len(table.rows[-2].b) == order  # no row was guarded away
    assert len(table.rows[-1].b) == 1


def test_heun_is_a_singlestep_table():
    """Heun (Karras et al. 2022, algorithm 1) = single-step heun, c inf, clock sigma."""
    heun = stock("HeunDiscreteScheduler")
    keep = np.append(True, np.diff(heun.sigmas.numpy()) != 0)  # the stock list holds every inner level twice
    double = stock_nodes(heun, "ve")
    nodes = Nodes(double.time[keep], double.alpha[keep], double.sigma[keep])
    table = build_singlestep(None, nodes, method="heun", data_std=INF, clock="sigma")
    assert_is(heun, table, "epsilon")


@pytest.mark.parametrize("inverted", [False, True])
def test_flow_match_euler_is_order_one(inverted):
    """FlowMatchEuler = order 1 on the flow path; with invert_sigmas (Mochi) the network says x0 - eps
    (Fu & Wang, section 8; Lai et al., chapter 5)."""
    euler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=inverted)
    euler.set_timesteps(sigmas=np.linspace(1, 0.1, 10).tolist())
    ours = ProbabilityFlowScheduler.from_config(euler.config, solver_order=1, corrector=False)
    ours.set_timesteps(sigmas=np.linspace(1, 0.1, 10).tolist())
    assert deviation(probe_ours(ours)[0], probe_stock(euler)) < FLOAT32


def test_edm_euler_is_order_one():
    """EDMEuler = order 1 on the EDM path, preconditioning included (Karras et al. 2022, eq. 5 and 7)."""
    euler = diffusers.EDMEulerScheduler()
    euler.set_timesteps(10)
    ours = ProbabilityFlowScheduler.from_config(euler.config, solver_order=1, corrector=False)
    ours.set_timesteps(10)
    assert deviation(probe_ours(ours)[0], probe_stock(euler)) < FLOAT32


# -- DPM-Solver, DEIS, UniPC --

ALGORITHMS = {
    "dpmsolver": (INF, 0.0),
    "dpmsolver++": (0.0, 0.0),
    "sde-dpmsolver": (INF, 1.0),
    "sde-dpmsolver++": (0.0, 1.0),
}
RULES = {"midpoint": "midpoint", "heun": "exact"}


def dpm(name, algorithm, **config):
    """A stock DPM-Solver that says what it integrates; noise prediction cannot end at sigma = 0 there."""
    data = algorithm.endswith("++")
    if algorithm == "sde-dpmsolver":  # unstable in larger steps, where this package integrates D instead
        config = {"n": 60, **config}
    end = "zero" if data else "sigma_min"
    kind = "sample" if data else "epsilon"
    return stock(name, algorithm_type=algorithm, final_sigmas_type=end, prediction_type=kind, **config), kind


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("solver_type", RULES)
@pytest.mark.parametrize("order", [1, 2])
def test_dpm_solver_is_a_table(algorithm, solver_type, order):
    """DPM-Solver(++) 1 and 2M, ODE and SDE: c 0 or inf, tau 0 or 1; midpoint has the flat-kernel rule, heun the exact
    weights (Lu et al. 2022; Lai et al., chapter 9).  Noise prediction is compared up to the last row: its step to
    sigma_min is more than four times the one before, over which this package does not extrapolate."""
    scheduler, kind = dpm(
        "DPMSolverMultistepScheduler", algorithm, solver_order=order, solver_type=solver_type, lower_order_final=False
    )
    data_std, tau = ALGORITHMS[algorithm]
    nodes = stock_nodes(scheduler)
    table = build_multistep(None, nodes, order=order, data_std=data_std, tau=tau, rule=RULES[solver_type])
    assert_is(scheduler, table, kind, slice(None) if kind == "sample" else BODY)
    assert len(table.rows[-2].b) == order


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_dpm_solver_scheduler_builds_these_tables(algorithm):
    """DPMSolverScheduler takes algorithm_type and solver_type of a stock config and does the same steps."""
    scheduler, kind = dpm("DPMSolverMultistepScheduler", algorithm, lower_order_final=False)
    ours = DPMSolverScheduler.from_config(scheduler.config)
    ours.set_timesteps(timesteps=scheduler.timesteps)
    assert (ours.config.algorithm_type, ours.config.solver_type) == (algorithm, "midpoint")
    states, stds = probe_ours(ours)
    assert deviation(states[BODY], probe_stock(scheduler)[BODY]) < 1e-5
    assert (stds[:-1] > 0).all() == algorithm.startswith("sde")
    assert kind == ours.config.prediction_type


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize(("order", "solver_type"), [(2, "midpoint"), (2, "heun"), (3, "heun")])
@pytest.mark.parametrize("n", [9, 10, 11])
def test_singlestep_dpm_solver_is_a_table(algorithm, order, solver_type, n):
    """Single-step DPM-Solver(++) 2 and 3 = grid2 and grid3: consecutive nodes are the stages of one step."""
    scheduler, kind = dpm("DPMSolverSinglestepScheduler", algorithm, n=n, solver_order=order, solver_type=solver_type)
    nodes, rule = stock_nodes(scheduler), RULES[solver_type]
    table = build_singlestep(None, nodes, method=f"grid{order}", data_std=ALGORITHMS[algorithm][0], rule=rule)
    # with sigma_min at the end the stock list of orders puts a first-order step there, this package goes on
    assert_is(scheduler, table, kind, slice(None) if kind == "sample" else BODY)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_is_noise_prediction_in_log_snr(order):
    """DEIS (diffusers: log-rho) = c inf, clock log_snr, the same as DPM-Solver with exact weights (Lai
    et al., chapter 9: DDIM = DPM-Solver-1 = DEIS-1)."""
    deis = stock("DEISMultistepScheduler", solver_order=order, lower_order_final=False)
    table = build_multistep(None, stock_nodes(deis), order=order, data_std=INF)
    assert_is(deis, table, "epsilon", BODY)
    assert len(table.rows[-2].b) == order


@pytest.mark.parametrize(("kind", "data_std"), [("sample", 0.0), ("epsilon", INF)])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_unipc_is_predictor_and_corrector(order, kind, data_std):
    """UniPC-p bh2 = predictor of order p (midpoint at order 2) with the step redone when the next evaluation arrives;
    for three nodes and more B(h) cancels (Zhao et al. 2023)."""
    unipc = stock(
        "UniPCMultistepScheduler",
        solver_order=order,
        lower_order_final=False,
        final_sigmas_type="sigma_min",
        prediction_type=kind,
        predict_x0=kind == "sample",
    )
    nodes = stock_nodes(unipc)
    table = build_multistep(None, nodes, order=order, data_std=data_std, rule="midpoint", corrector=True)
    assert_is(unipc, table, kind, BODY)
    assert len(table.rows[-2].b) == order + 1


def test_bh1_and_bh2_are_the_exact_weights_from_three_nodes_on():
    """B(h) cancels once the weights solve the full system: UniC-3 is exact with either (Zhao et al. 2023)."""
    rows = {}
    for solver_type in ("bh1", "bh2"):
        unipc = stock("UniPCMultistepScheduler", solver_order=3, solver_type=solver_type, prediction_type="sample")
        unipc.this_order, unipc._step_index = 3, 6
        basis = torch.eye(5, dtype=torch.float64)[:, :, None]
        unipc.model_outputs = [basis[2][None], basis[1][None], basis[0][None]]
        update = unipc.multistep_uni_c_bh_update(
            this_model_output=basis[3][None], last_sample=basis[4][None], this_sample=basis[4][None], order=3
        )
        rows[solver_type] = update.flatten().numpy()
    lam = stock_nodes(unipc).log_snr
    exact = reference_weights(lam[5], lam[6], lam[[5, 4, 3, 6]]) * stock_nodes(unipc).alpha[6]
    for row in rows.values():
        np.testing.assert_allclose(row[:4], exact, atol=1e-4 * np.abs(exact).max())


# -- SA-Solver --


def few_step_term(table: Table, nodes: Nodes, tau: float, predictor: int, corrector: int) -> Table:
    """Add to a table the O(h^3) terms that diffusers' SASolver puts on its two-node weights."""
    lam, rate = nodes.log_snr, 1 + tau**2
    rows, before = list(table.rows), 0.0
    for i, row in enumerate(rows):
        b = np.append(row.b, np.zeros(3))
        if (i and corrector == 2) or (i == 1 and corrector > 2):  # the corrected step i-1 -> i has two nodes
            h = lam[i] - lam[i - 1]
            exact = (h * rate + math.expm1(-rate * h)) / rate**2
            b[:2] += row.a * rate * nodes.alpha[i] * (h**2 / 2 - exact) / h * np.array([1, -1])
        b[1:3] -= row.a * before * np.array([1, -1])  # the redone step replaces the predicted one
        before = 0.0
        if (i and predictor == 2) or (i == 1 and predictor > 2):  # and so has the predicted step i -> i+1
            h = lam[i + 1] - lam[i]
            exact = (h * rate + math.expm1(-rate * h)) / rate**2
            before = rate * nodes.alpha[i + 1] * (h**2 / 2 - exact) / (lam[i] - lam[i - 1])
            b[:2] += before * np.array([1, -1])
        rows[i] = replace(row, b=tuple(b))
    return Table(tuple(rows), table.data_std)


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("predictor", "corrector"), [(1, 1), (1, 2), (1, 3), (2, 2), (2, 3), (3, 3), (3, 4)])
def test_sa_solver_is_the_table_plus_its_few_step_term(predictor, corrector, tau):
    """SA-Solver = c 0, any tau, predictor and corrector orders (Xue et al. 2023), up to the O(h^3) term that its code
    adds to two-node weights "for few steps sampling"."""
    sa = stock(
        "SASolverScheduler",
        predictor_order=predictor,
        corrector_order=corrector,
        tau_func=lambda t: tau,
        prediction_type="sample",
        lower_order_final=False,
    )
    nodes = stock_nodes(sa)
    table = build_multistep(None, nodes, order=predictor, corrector=corrector, tau=tau)
    assert_is(sa, few_step_term(table, nodes, tau, predictor, corrector), "sample", BODY, tolerance=1e-4)


# -- where the arithmetic differs: who is right --


def moments(weights, basis, start, count=3):
    """sum_j w_j (lambda_j - lambda_start)^k: what a row integrates the monomials to."""
    return np.array([weights @ (np.asarray(basis) - start) ** k for k in range(count)])


@pytest.mark.parametrize(("algorithm", "tau"), [("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)])
def test_dpm_solver_3m_has_wrong_curvature(algorithm, tau):
    """DPM-Solver++ 3M integrates constants and slopes exactly, curvature not: half of it in the ODE, the wrong sign in
    the SDE (-0.5 should be +0.5).  The table here has all three (reference to 30 digits)."""
    scheduler, _ = dpm("DPMSolverMultistepScheduler", algorithm, n=20, solver_order=3, lower_order_final=False)
    nodes, i = stock_nodes(scheduler), 9
    lam, alpha = nodes.log_snr, nodes.alpha[i + 1]
    basis = lam[[i, i - 1, i - 2]]
    exact = moments(reference_weights(lam[i], lam[i + 1], basis, tau), basis, lam[i]) * alpha
    ours = np.array(build_multistep(None, nodes, order=3, tau=tau).rows[i].b)
    np.testing.assert_allclose(moments(ours, basis, lam[i]), exact, rtol=1e-11, atol=1e-15)
    theirs = stock_row(scheduler, "multistep_dpm_solver_third_order_update", i, 3)
    their = moments(theirs[:3], basis, lam[i])
    np.testing.assert_allclose(their[:2], exact[:2], rtol=1e-4)
    if tau == 0:
        assert their[2] == pytest.approx(exact[2] / 2, rel=1e-3)
    else:  # 1/2 exact - alpha h^2
        assert their[2] == pytest.approx(exact[2] / 2 - alpha * (lam[i + 1] - lam[i]) ** 2, rel=1e-3)
        assert their[2] < 0 < exact[2]


def test_singlestep_sde_dpm_solver_3_has_the_wrong_sign():
    """The same sign error in the single-step SDE update of order 3; its ODE update is exact."""
    for algorithm, tau in (("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)):
        scheduler, _ = dpm("DPMSolverSinglestepScheduler", algorithm, n=20, solver_order=3, solver_type="heun")
        nodes, i = stock_nodes(scheduler), 8  # stages 6, 7, 8
        lam, alpha = nodes.log_snr, nodes.alpha[i + 1]
        basis = lam[[i, i - 1, i - 2]]
        exact = moments(reference_weights(lam[i - 2], lam[i + 1], basis, tau), basis, lam[i - 2]) * alpha
        points = [Point(float(a), float(s)) for a, s in zip(nodes.alpha, nodes.sigma, strict=True)]
        stages = [points[j] for j in (i, i - 1, i - 2)]
        ours = lagrange_weights(None, points[i - 2], points[i + 1], stages, data_std=0.0, clock="log_snr", tau=tau)
        np.testing.assert_allclose(moments(ours, basis, lam[i - 2]), exact, rtol=1e-11)
        theirs = stock_row(scheduler, "singlestep_dpm_solver_third_order_update", i, 3)
        their = moments(theirs[:3], basis, lam[i - 2])
        np.testing.assert_allclose(their[:2], exact[:2], rtol=1e-4)
        off = 2 * alpha * (lam[i + 1] - lam[i - 2]) ** 2 if tau else 0.0
        assert their[2] == pytest.approx(exact[2] - off, rel=1e-3)


def test_unipc_loses_its_weights_to_float32():
    """UniPC solves for its weights in float32: at h = 0.03 the highest moment of UniC-3 is off by per cents, here it is
    exact."""
    config = {"prediction_type": "sample", "use_exponential_sigmas": True}
    unipc = stock("UniPCMultistepScheduler", n=300, solver_order=3, **config)
    nodes = stock_nodes(unipc)
    lam, points = nodes.log_snr, [Point(float(a), float(s)) for a, s in zip(nodes.alpha, nodes.sigma, strict=True)]
    assert lam[101] - lam[100] == pytest.approx(0.0323, abs=1e-4)
    basis, worst = torch.eye(5, dtype=torch.float64)[:, None, :], []
    unipc.model_outputs = [*basis[:3].flip(0)]
    for i in range(20, 280, 10):
        unipc._step_index, where = i + 1, [i, i - 1, i - 2, i + 1]
        theirs = unipc.multistep_uni_c_bh_update(basis[3], last_sample=basis[4], this_sample=basis[4], order=3)
        ours = lagrange_weights(
            None, points[i], points[i + 1], [points[j] for j in where], data_std=0.0, clock="log_snr", tau=0.0
        )
        exact = reference_weights(lam[i], lam[i + 1], lam[where]) * nodes.alpha[i + 1]
        cubic = (lam[where] - lam[i]) ** 3
        worst.append([abs(w @ cubic / (exact @ cubic) - 1) for w in (theirs.flatten().numpy()[:4], ours)])
    theirs, ours = np.max(worst, 0)
    assert theirs > 0.03
    assert ours < 1e-8


def test_sa_solver_loses_its_weights_to_float32():
    """SASolver expands Lagrange polynomials into monomials of the absolute log-SNR in float32; here they stay exact."""
    sa = stock("SASolverScheduler", n=100, prediction_type="sample", use_exponential_sigmas=True)
    nodes = stock_nodes(sa)
    lam, worst = nodes.log_snr, []
    table = build_multistep(None, nodes, order=4)
    lam32 = torch.from_numpy(lam).float()
    for i in range(10, 95, 3):
        basis = [i, i - 1, i - 2, i - 3]
        theirs = sa.get_coefficients_fn(4, lam32[i], lam32[i + 1], [lam32[j] for j in basis], torch.tensor(0.0))
        theirs = np.array([float(c) for c in theirs]) * math.exp(-lam[i + 1])
        exact = reference_weights(lam[i], lam[i + 1], lam[basis])
        ours = np.array(table.rows[i].b) / nodes.alpha[i + 1]
        worst.append([np.abs(w - exact).max() / np.abs(exact).max() for w in (theirs, ours)])
    theirs, ours = np.max(worst, 0)
    assert theirs > 0.03
    assert ours < 1e-11


def test_flow_timesteps_are_not_truncated():
    """UniPC truncates 1000 sigma to integers on flow models: the network is asked about another noise level."""
    unipc = stock("UniPCMultistepScheduler", use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    ours = ProbabilityFlowScheduler.from_config(unipc.config)
    ours.set_timesteps(sigmas=np.linspace(1, 0.1, 10))
    assert (unipc.timesteps - 1000 * unipc.sigmas[:-1]).abs().max() > 0.3
    torch.testing.assert_close(ours.timesteps, 1000 * ours.sigmas[:-1], rtol=1e-6, atol=0)


def test_cosine_betas_with_karras_sigmas_have_distinct_timesteps():
    """Rounded Karras timesteps repeat on cosine betas (diffusers issue 12771); unrounded ones do not."""
    config = {**COSINE, "use_karras_sigmas": True}
    rounded = stock("DPMSolverMultistepScheduler", n=20, **config)
    ours = ProbabilityFlowScheduler.from_config(rounded.config, use_karras_sigmas=True)
    ours.set_timesteps(20)
    assert len(rounded.timesteps.unique()) < 20
    assert len(ours.timesteps.unique()) == 20


# -- order of convergence --


def local_errors(weights_of, step, std=0.7, at=1.0):
    """Error of one step from exact evaluations, for Gaussian data, at halved steps; ``weights_of(lambdas)`` gives the
    factor on x/alpha and the weights on D at the basis that it returns."""
    errors = []
    for h in step / 2.0 ** np.arange(4):
        factor, weights, basis = weights_of(at, h)
        x, _ = gaussian_flow([at, at + h], std)
        errors.append(abs(factor * x[0] + weights @ gaussian_flow(basis, std)[1] - x[1]))
    return np.array(errors)


def data_prediction_step(order, corrector):
    def weights_of(at, h):
        basis = at + h * np.arange(corrector, corrector - order - corrector, -1.0)
        points = {lam: Point(math.sqrt(0.5), math.sqrt(0.5) * math.exp(-lam)) for lam in (*basis, at, at + h)}
        w = lagrange_weights(
            None, points[at], points[at + h], [points[b] for b in basis], data_std=0.0, clock="log_snr", tau=0.0
        )
        return math.exp(-h), w / math.sqrt(0.5), basis

    return weights_of


@pytest.mark.parametrize("corrector", [0, 1])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_local_order_of_the_exact_weights(order, corrector):
    """One step of order p errs by h^(p+1); redone with the evaluation at its end by h^(p+2) (Zhao et al. 2023)."""
    errors = local_errors(data_prediction_step(order, corrector), 0.1)
    assert order_of(errors)[-1] == pytest.approx(order + corrector + 1, abs=0.1)


def test_local_order_of_3m_is_that_of_2m():
    """The published weights of DPM-Solver++ 3M have local order 3, not 4: half of the curvature is missing."""

    def published(at, h):
        _, weights, basis = data_prediction_step(3, 0)(at, h)
        curvature = weights @ (basis - at) ** 2 / 2  # take half of the second moment away again, by divided differences
        return math.exp(-h), weights - curvature * np.array([0.5, -1.0, 0.5]) / h**2, basis

    assert order_of(local_errors(published, 0.1))[-1] == pytest.approx(3, abs=0.15)
    assert order_of(local_errors(data_prediction_step(3, 0), 0.1))[-1] == pytest.approx(4, abs=0.15)


FROM, TO = -4.0, 1.0


@pytest.fixture(scope="module")
def exact_flow():
    """States x/alpha of 6 samples at FROM and, by a high-order integrator, at TO."""
    model, start = mixture(), noise_like(6, seed=3) * math.sqrt(1 + math.exp(-2 * FROM))

    def rate(lam, y):
        x = torch.from_numpy(y.reshape(start.shape))
        return (model.posterior_mean(x, 1.0, math.exp(-lam)) - x).numpy().ravel()

    end = solve_ivp(rate, (FROM, TO), start.numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    return start, torch.from_numpy(end.reshape(start.shape))


def global_order(exact_flow, build):
    start, end = exact_flow
    errors = []
    for n in (48, 96, 192):
        nodes = nodes_of(PATHS["vp_linear"], np.linspace(FROM, TO, n + 1))
        x = run_table(build(nodes), mixture_denoiser(), start * nodes.alpha[0]) / nodes.alpha[-1]
        errors.append(float((x - end).square().mean().sqrt()))
    assert errors[-1] < 0.01
    return order_of(errors).mean()


@pytest.mark.parametrize("data_std", [0.0, 1.0, INF])
@pytest.mark.parametrize("clock", ["log_snr", "angle", "time"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_convergence_on_the_mixture(exact_flow, order, clock, data_std):
    """The multistep table of order p converges with order p to the probability-flow ODE, in every clock and for every
    data_std (Fu & Wang, section 5; Lai et al., chapter 9)."""

    def build(nodes):
        return build_multistep(PATHS["vp_linear"], nodes, order=order, data_std=data_std, clock=clock)

    assert global_order(exact_flow, build) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_corrector_adds_an_order(exact_flow, order):
    """Predictor of order p with corrector converges with order p + 1 at no further evaluation (Zhao et al. 2023)."""

    def build(nodes):
        return build_multistep(None, nodes, order=order, corrector=True)

    assert global_order(exact_flow, build) > order + 0.9


@pytest.mark.parametrize(("method", "order"), [("heun", 2), ("2s", 2), ("3s", 3), ("grid2", 2), ("grid3", 3)])
def test_order_of_single_step_methods(exact_flow, method, order):
    """Heun and 2S converge with order 2, 3S with order 3, per step (Lu et al. 2022; Karras et al. 2022)."""

    def build(nodes):
        return build_singlestep(PATHS["vp_linear"], nodes, method=method)

    assert global_order(exact_flow, build) == pytest.approx(order, abs=0.2)


# -- the reverse family --


@pytest.mark.parametrize("n", [2, 5, 12])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("std", [0.1, 1.0, 3.0])
def test_noise_does_not_need_many_steps_where_the_data_scale_is_known(std, tau, n):
    """With data_std = c every tau reproduces N(0, c^2) at any number of steps; with c = 0 it needs many."""
    nodes = nodes_of(PATHS["vp_linear"], np.linspace(-4, 4, n + 1))
    first, last = (nodes.alpha[i] ** 2 * std**2 + nodes.sigma[i] ** 2 for i in (0, -1))
    for order, corrector in ((1, False), (2, False), (2, True), (3, True)):
        table = build_multistep(None, nodes, order=order, corrector=corrector, data_std=std, tau=tau)
        assert gaussian_law(table, std, first) == pytest.approx(last, rel=1e-11)
    if n == 2:
        assert abs(gaussian_law(build_multistep(None, nodes, order=1, tau=tau), std, first) / last - 1) > 1e-3


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("data_std", [0.0, 0.5, INF])
def test_every_tau_converges_to_the_marginal(tau, data_std):
    """The variance of the discretised SDE converges to that of p_t for every tau and data_std (Fu & Wang, section 3),
    with order 1."""
    std, errors = 0.8, []
    for n in (200, 400):
        nodes = nodes_of(PATHS["vp_linear"], np.linspace(-3, 2, n + 1))
        first, last = (nodes.alpha[i] ** 2 * std**2 + nodes.sigma[i] ** 2 for i in (0, -1))
        table = build_multistep(None, nodes, order=1, data_std=data_std, tau=tau)
        errors.append(abs(gaussian_law(table, std, first) / last - 1))
    assert order_of(errors)[0] == pytest.approx(1, abs=0.15)
    assert errors[-1] < 0.05


def test_runner_agrees_with_the_scheduler():
    """The test-side runner of tables and the package's step do the same arithmetic, on the mixture."""
    scheduler = ProbabilityFlowScheduler(**LINEAR, prediction_type="sample", data_std=0.5, solver_order=3, trust=False)
    scheduler.set_timesteps(10)
    x = noise_like(4)
    nodes = scheduler._run.nodes
    table = build_multistep(scheduler.path, nodes, order=3, corrector=True, data_std=0.5, final="corrected")
    expected = run_table(table, gaussian_denoiser(1.3), x)
    for t, alpha, sigma in zip(scheduler.timesteps, nodes.alpha, nodes.sigma, strict=False):
        x = scheduler.step(gaussian_denoiser(1.3)(x, Point(float(alpha), float(sigma))), t, x).prev_sample
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)
