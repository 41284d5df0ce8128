"""Flow maps: the jump, the identities of the exact map, re-noising by gamma, scheduler, networks, pipeline."""

import itertools
import math

import diffusers
import numpy as np
import pytest
import torch
from contract_helpers import by_process, randn, relative, seeded
from diffusers import DDIMScheduler, DDPMPipeline, LCMScheduler
from helpers import LINEAR, PATHS, SD, deviation, mixture, probe_ours, probe_stock
from hypothesis import given
from hypothesis import strategies as st
from pipeline_parts import tiny_unet
from snippets import load, run
from stated import stated

from diffusers_sde import FlowMapScheduler, FlowMapUNet2DModel, GaussianMixtureModel, ProbabilityFlowScheduler
from diffusers_sde.flow_maps import (
    average_prediction,
    exact_flow_map,
    gamma_targets,
    jump,
    jump_coefficients,
)
from diffusers_sde.grids import nodes_from_times, nodes_from_user
from diffusers_sde.prediction import PREDICTION_TYPES, model_coefficients

KINDS = [kind for kind in PREDICTION_TYPES if kind != "score"]
MAPS = {"vp": "vp_linear", "flow": "flow", "edm": "edm"}  # families on which the oracle's map is integrated
by_path = pytest.mark.parametrize("name", MAPS.values(), ids=MAPS)
fractions = st.floats(0.0, 1.0)


def time_at(path, u):
    """A time of the path, u = 0 its cleanest, u = 1 (nearly) its noisiest."""
    return path.cleanest + 0.999 * u * (path.noisiest - path.cleanest)


# -- the jump --


@pytest.mark.parametrize("kind", KINDS)
@given(name=st.sampled_from(sorted(PATHS)), u=fractions, v=fractions, x0=st.floats(-2, 2), eps=st.floats(-3, 3))
def test_jump_keeps_data_and_noise(kind, name, u, v, x0, eps):
    """X(alpha_t x0 + sigma_t eps, t, s) = alpha_s x0 + sigma_s eps if m = A x0 + B eps, on every path, either way."""
    path = PATHS[name]
    t, s = time_at(path, u), time_at(path, v)
    (alpha, sigma), (alpha_s, sigma_s) = (map(float, path.alpha_sigma(r)) for r in (t, s))
    a, b = model_coefficients(path, kind, alpha, sigma)
    if alpha < 1e-3 or sigma < 1e-6:
        return  # epsilon or sample prediction says (nearly) nothing there
    k_x, k_m = jump_coefficients(path, kind, t, s)
    found, scale = k_x * (alpha * x0 + sigma * eps) + k_m * (a * x0 + b * eps), 1 + abs(float(k_x)) + abs(float(k_m))
    assert found == pytest.approx(alpha_s * x0 + sigma_s * eps, abs=1e-10 * scale * (1 + sigma + sigma_s))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(PATHS))
def test_consistency_function_is_the_identity_at_the_boundary(kind, name):
    """f(x, t_min) = x exactly, whatever the network says (Song et al. 2023, arXiv:2303.01469, eq. 5)."""
    path = PATHS[name]
    k_x, k_m = jump_coefficients(path, kind, [path.cleanest, time_at(path, 0.5)], path.cleanest)
    assert (k_x[0], k_m[0]) == (1.0, 0.0)
    assert k_m[1] != 0


def test_flow_jump_is_mean_flow():
    """Flow matching: x_s = x_t + (sigma_s - sigma_t) u (Geng et al. 2025, arXiv:2505.13447, section 3)."""
    k_x, k_m = jump_coefficients(PATHS["flow"], "flow_prediction", [900.0, 1000.0, 10.0], [100.0, 0.0, 700.0])
    np.testing.assert_allclose(k_x, 1, atol=1e-12)
    np.testing.assert_allclose(k_m, [-0.8, -1.0, 0.69], atol=1e-12)


def test_variance_preserving_jump_is_a_rotation():
    """v prediction: x_s = cos(d) x - sin(d) v, d the angle between t and s (Lu & Song 2024, arXiv:2410.11081)."""
    path, t, s = PATHS["vp_zero_snr"], np.array([999.0, 600.5, 20.0]), np.array([0.0, 100.25, 300.0])
    angles = [np.arctan2(*path.alpha_sigma(r)[::-1]) for r in (t, s)]
    k_x, k_m = jump_coefficients(path, "v_prediction", t, s)
    np.testing.assert_allclose(k_x, np.cos(angles[0] - angles[1]), atol=1e-12)
    np.testing.assert_allclose(k_m, -np.sin(angles[0] - angles[1]), atol=1e-12)


@pytest.mark.parametrize("name", sorted(PATHS))
def test_velocity_jump_is_mean_flow_in_straight_coordinates(name):
    """flow_prediction on any path: y = x/(alpha + sigma), r = sigma/(alpha + sigma), y_s = y_t + (r_s - r_t) u (affine
    flows are equivalent up to time and scale: Lai et al., arXiv:2510.21890, chapter 6)."""
    path = PATHS[name]
    t, s = time_at(path, 0.8), time_at(path, 0.3)
    (alpha, sigma), (alpha_s, sigma_s) = path.alpha_sigma(t), path.alpha_sigma(s)
    k_x, k_m = jump_coefficients(path, "flow_prediction", t, s)
    sign = -1 if getattr(path, "inverted", False) else 1
    assert k_x == pytest.approx((alpha_s + sigma_s) / (alpha + sigma), rel=1e-12)
    assert sign * k_m == pytest.approx((alpha_s + sigma_s) * (sigma_s / (alpha_s + sigma_s) - sigma / (alpha + sigma)))


def test_average_prediction_inverts_the_jump():
    """average_prediction gives back the m that a jump used, for one time each sample, and refuses an empty jump."""
    path, x, m = PATHS["vp_linear"], randn(3, 1, 2, 2, dtype=torch.float64), randn(3, 1, 2, 2, seed=1).double()
    t, s = torch.tensor([900.0, 500.0, 30.0]), torch.tensor([0.0, 499.0, 800.0])
    x_s = jump(path, "v_prediction", x, m, t, s)
    torch.testing.assert_close(average_prediction(path, "v_prediction", x, x_s, t, s), m)
    torch.testing.assert_close(x_s[1:2], jump(path, "v_prediction", x[1:2], m[1:2], 500.0, 499.0))
    with pytest.raises(ValueError, match="different from t"):
        average_prediction(path, "v_prediction", x, x, t, t)


def test_coefficients_of_a_jump_live_where_the_state_does():
    x = torch.zeros(2, 1, 2, 2, dtype=torch.float16, device="meta")
    moved = jump(PATHS["flow"], "flow_prediction", x, x, np.array([900.0, 500.0]), 100.0)
    assert (moved.device.type, moved.dtype, moved.shape) == ("meta", torch.float16, x.shape)


# -- the exact map --


def gaussian_map(path, std, mean, x, t, s):
    """The flow of N(mean, std^2) data: x_s = alpha_s mean + rho_s/rho_t (x_t - alpha_t mean)."""
    (alpha, sigma), (alpha_s, sigma_s) = (map(float, path.alpha_sigma(r)) for r in (t, s))
    return alpha_s * mean + math.hypot(alpha_s * std, sigma_s) / math.hypot(alpha * std, sigma) * (x - alpha * mean)


@by_path
def test_exact_map_of_a_gaussian_is_its_closed_form(name):
    """x_s - alpha_s m = (rho_s/rho_t) (x_t - alpha_t m), rho^2 = alpha^2 std^2 + sigma^2, in both directions."""
    path, x = PATHS[name], randn(4, 1, 1, 2, dtype=torch.float64)
    model = GaussianMixtureModel([1.0], [[0.7, 0.7]], [0.3**2])
    for u, v in ((1.0, 0.0), (0.2, 0.9)):
        t, s = time_at(path, u), time_at(path, v)
        x_t = x * sum(path.alpha_sigma(t))
        torch.testing.assert_close(
            exact_flow_map(path, model.posterior_mean, x_t, t, s),
            gaussian_map(path, 0.3, 0.7, x_t, t, s),
            rtol=1e-6,
            atol=1e-7,
        )


@by_path
def test_semigroup(name):
    """X(X(x, t, u), u, s) = X(x, t, s) on the mixture (Lai et al., arXiv:2510.21890, chapter 11)."""
    path, model = PATHS[name], mixture()
    t, u, s = (time_at(path, v) for v in (1.0, 0.5, 0.05))
    x = randn(8, 1, 1, 3, dtype=torch.float64) * float(sum(path.alpha_sigma(t)))

    def X(x, t, s):
        return exact_flow_map(path, model.posterior_mean, x, t, s)

    torch.testing.assert_close(X(X(x, t, u), u, s), X(x, t, s), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(X(X(x, t, s), s, t), x, rtol=1e-5, atol=1e-5)


def rate(path, model, x, t):
    """dx/dt of the probability-flow ODE at t."""
    alpha, sigma = (float(v) for v in path.alpha_sigma(t))
    f, d_log_snr = float(path.d_log_alpha(t)), float(path.d_log_snr(t))
    return f * x + sigma**2 * d_log_snr * model.score(x, alpha, sigma)


@pytest.mark.parametrize("name", ["flow", "edm"])  # smooth in t
def test_eulerian_and_lagrangian_identities(name):
    """d/dt X(x_t, t, s) = 0 along a trajectory, dX/dt + (grad X) velocity = 0; d/ds X(x, t, s) = velocity(X, s)."""
    path, model = PATHS[name], mixture()
    t, s = time_at(path, 0.8), time_at(path, 0.3)
    h = 1e-4 * (path.noisiest - path.cleanest)
    x = randn(6, 1, 1, 3, dtype=torch.float64) * float(sum(path.alpha_sigma(t)))

    def X(x, t, s):
        return exact_flow_map(path, model.posterior_mean, x, t, s, rtol=1e-11, atol=1e-11)

    v = rate(path, model, x, t)
    total = (X(x + h * v, t + h, s) - X(x - h * v, t - h, s)) / (2 * h)
    partial = (X(x, t + h, s) - X(x, t - h, s)) / (2 * h)
    assert total.abs().max() < 1e-5 * partial.abs().max()
    found = (X(x, t, s + h) - X(x, t, s - h)) / (2 * h)
    torch.testing.assert_close(found, rate(path, model, X(x, t, s), s), rtol=1e-5, atol=1e-6 / h)


def test_mean_flow_identity():
    """u = v - (t - s) du/dt for the average velocity u of the exact map (Geng et al. 2025, eq. 6, time sigma)."""
    path, model, t, s, h = PATHS["flow"], mixture(), 800.0, 200.0, 0.1
    x = randn(6, 1, 1, 3, dtype=torch.float64)

    def u(x, t):
        x_s = exact_flow_map(path, model.posterior_mean, x, t, s, rtol=1e-11, atol=1e-11)
        return average_prediction(path, "flow_prediction", x, x_s, t, s)

    v = 1000 * rate(path, model, x, t)
    total = (u(x + h / 1000 * v, t + h) - u(x - h / 1000 * v, t - h)) / (2 * h / 1000)
    torch.testing.assert_close(u(x, t), v - 0.6 * total, rtol=1e-5, atol=1e-5)


@by_path
def test_exact_map_is_the_fixed_point_of_the_training_target(name):
    """average_prediction(x_t, X(x_u, u, s)) along an exact trajectory is the exact map's own m, for every u."""
    path, model = PATHS[name], mixture()
    t, s = time_at(path, 0.9), time_at(path, 0.1)
    x = randn(4, 1, 1, 3, dtype=torch.float64) * float(sum(path.alpha_sigma(t)))

    def X(x, t, s):
        return exact_flow_map(path, model.posterior_mean, x, t, s)

    own = average_prediction(path, "v_prediction", x, X(x, t, s), t, s)
    for v in (0.85, 0.5):
        u = time_at(path, v)
        target = average_prediction(path, "v_prediction", x, X(X(x, t, u), u, s), t, s)
        torch.testing.assert_close(target, own, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_training_target_learns_the_map():
    """A small perceptron trained on average_prediction(x_t, X(x_u, u, s)), u a sixteenth of the time below t, without a
    teacher: in one and two steps its error to the exact ODE solution is below 0.6 of that of exact DDIM steps, which is
    what the best instantaneous network could do."""
    torch.manual_seed(0)
    model, kind = GaussianMixtureModel([0.5, 0.5], [[1.0, 0.5], [-1.0, -0.2]], [0.05, 0.1]), "v_prediction"
    scheduler = FlowMapScheduler(prediction_type=kind, flow_map="mean_flow", final_sigmas_type="sigma_min")
    path, generator, rng = scheduler.path, seeded(), np.random.default_rng(0)
    sizes, layers = [10, 64, 64, 64, 2], []
    for before, after in itertools.pairwise(sizes):
        layers += [torch.nn.Linear(before, after), torch.nn.SiLU()]
    network = torch.nn.Sequential(*layers[:-1])

    def features(t):
        alpha, sigma = path.alpha_sigma(np.broadcast_to(t, 128))
        angle = torch.as_tensor(np.arctan2(sigma, alpha)).float()[:, None]
        return torch.cat([torch.sin(angle), torch.cos(angle), torch.sin(3 * angle), torch.cos(3 * angle)], 1)

    def ask(x, t, s):
        return network(torch.cat([x, features(t), features(s)], 1))

    steps, optimizer = 1200, torch.optim.Adam(network.parameters(), 2e-3)
    for k in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 + math.cos(math.pi * k / steps))
        x0, eps = model.sample(128, generator).flatten(1).float(), torch.randn(128, 2, generator=generator)
        place = 1 / 16 + 15 / 16 * rng.random(128)
        below = place - 1 / 16
        to = np.where(rng.random(128) < 0.5, below, below * rng.random(128) * (rng.random(128) < 0.7))
        t, u, s = (999 * w for w in (place, below, to))
        x, x_u = (
            sum(torch.as_tensor(c).float()[:, None] * v for c, v in zip(path.alpha_sigma(r), (x0, eps), strict=True))
            for r in (t, u)
        )
        with torch.no_grad():
            target = average_prediction(path, kind, x, jump(path, kind, x_u, ask(x_u, u, s), u, s), t, s)
        loss = (ask(x, t, s) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    x = torch.randn(128, 2, generator=generator)
    exact = exact_flow_map(path, model.posterior_mean, x, 999.0, 0.0, rtol=1e-6, atol=1e-6)
    for count in (1, 2):
        scheduler.set_timesteps(count)
        learned, first_order = x, x.double()
        for t in scheduler.timesteps:
            s = float(scheduler.target_timestep(t))
            with torch.no_grad():
                learned = scheduler.step(ask(learned, float(t), s), t, learned).prev_sample
            alpha, sigma = (float(v) for v in path.alpha_sigma(float(t)))
            clean = model.posterior_mean(first_order, alpha, sigma)
            v = (alpha * first_order - clean) / sigma
            first_order = jump(path, kind, first_order, v, float(t), s)
        errors = [float((y - exact).square().mean().sqrt()) for y in (learned, first_order)]
        assert errors[0] < 0.6 * errors[1], (count, errors)


def test_exact_map_refuses_clean_data():
    with pytest.raises(ValueError, match="cleanest training time"):
        exact_flow_map(PATHS["flow"], mixture().posterior_mean, randn(1, 3), 1000.0, 0.0)


# -- re-noising --


@given(gamma=st.floats(0.0, 1.0), name=st.sampled_from(["vp_linear", "flow", "edm"]))
def test_gamma_splits_the_noise(gamma, name):
    """The jump goes to (sigma/alpha)_u = sqrt(1 - gamma^2) (sigma/alpha)_next and the noise has standard deviation
    gamma sigma_next (CTM, arXiv:2310.02279, algorithm 3)."""
    path = PATHS[name]
    nodes = nodes_from_times(path, [time_at(path, u) for u in (1.0, 0.6, 0.3)])
    targets = gamma_targets(path, nodes, gamma)
    scheduler = FlowMapScheduler(**process_of(name), gamma=gamma)
    scheduler.set_timesteps(timesteps=nodes.time[:-1].tolist())
    for i, t in enumerate(scheduler.timesteps[:-1]):
        out = scheduler.step(torch.zeros(1, 1, 1, 1), t, torch.zeros(1, 1, 1, 1))
        inner = targets.sigma[i] > 0
        level = targets.sigma[i] / targets.alpha[i] / (nodes.sigma[i + 1] / nodes.alpha[i + 1])
        assert level == pytest.approx(math.sqrt(1 - gamma**2) if inner else 0, abs=1e-9)
        expected = gamma * nodes.sigma[i + 1] if inner else nodes.sigma[i + 1]
        assert out.noise_std == pytest.approx(expected, rel=1e-6, abs=3e-8)  # rounding under a root


@pytest.mark.parametrize("gamma", [-0.1, 1.01, 1.5, math.nan])
def test_a_gamma_outside_zero_to_one_is_refused(gamma):
    nodes = nodes_from_times(PATHS["flow"], np.array([900.0, 500.0]))
    with pytest.raises(ValueError, match="gamma must lie between 0"):
        gamma_targets(PATHS["flow"], nodes, gamma)


def test_gamma_zero_jumps_to_the_next_node_itself():
    """To its time too, which a user's list may set apart from its level (timesteps and sigmas together)."""
    nodes = nodes_from_user(PATHS["vp_linear"], [950.0, 600.0, 90.0], [6.0, 1.0, 0.3])
    targets = gamma_targets(PATHS["vp_linear"], nodes, 0.0)
    np.testing.assert_array_equal(targets.time, nodes.time[1:])
    np.testing.assert_array_equal(targets.alpha, nodes.alpha[1:])
    np.testing.assert_array_equal(targets.sigma, nodes.sigma[1:])


def process_of(name):
    return {"vp_linear": {}, "flow": {"use_flow_sigmas": True}, "edm": {"sigma_data": 0.5}}[name] | {
        "prediction_type": "flow_prediction" if name == "flow" else "v_prediction"
    }


@by_path
@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_every_gamma_has_the_right_law(name, steps, gamma):
    """With the exact map of N(0, 0.3^2) data every gamma and number of steps ends with the variance of p_{t_min}: the
    mean of each step is linear in the state, so the variance is computed, not sampled."""
    scheduler = FlowMapScheduler(**process_of(name), flow_map="mean_flow", gamma=gamma, final_sigmas_type="sigma_min")
    path, kind, std = scheduler.path, scheduler.config.prediction_type, 0.3
    scheduler.set_timesteps(steps)
    alpha, sigma = (float(v) for v in path.alpha_sigma(float(scheduler.timesteps[0])))
    variance, one = (alpha * std) ** 2 + sigma**2, torch.ones(1, 1, 1, 1, dtype=torch.float64)
    for t in scheduler.timesteps:
        t, s = float(t), float(scheduler.target_timestep(t))
        m = average_prediction(path, kind, one, gaussian_map(path, std, 0.0, one, t, s), t, s)
        out = scheduler.step(m, t, one)
        variance = float(out.prev_sample_mean) ** 2 * variance + out.noise_std**2
    alpha, sigma = (float(v) for v in path.alpha_sigma(path.cleanest))
    assert math.sqrt(variance) == pytest.approx(math.hypot(alpha * std, sigma), rel=1e-5)  # timesteps are float32


def test_gamma_one_is_lcm():
    """Coefficients of diffusers' LCMScheduler, whose boundary scalings deviate from (0, 1) by 1e-5 on these times."""
    theirs = LCMScheduler(**SD)
    theirs.set_timesteps(4)
    ours = FlowMapScheduler.from_config(theirs.config)
    ours.set_timesteps(timesteps=theirs.timesteps.tolist())
    assert ours.gamma == 1.0
    found, stds = probe_ours(ours)
    stock = probe_stock(theirs)
    # LCM's last step ends at its clean data prediction, as ours
    assert deviation(found, stock) < 1e-4
    assert stds[-1] == 0 and stds[0] > 0


def test_gamma_zero_with_one_target_is_ddim():
    """Jumping with an instantaneous network is DDIM, the first-order method (a flow map network is what removes its
    error)."""
    ours, first = (
        FlowMapScheduler(**LINEAR, gamma=0.0),
        ProbabilityFlowScheduler(**LINEAR, solver_order=1, grid="trailing"),
    )
    for scheduler in (ours, first):
        scheduler.set_timesteps(4)
    np.testing.assert_allclose(probe_ours(ours)[0], probe_ours(first)[0], atol=1e-12)


# -- the scheduler --


class ExactFlowMapNetwork:
    """What a perfectly trained mean flow network says on the mixture."""

    def __init__(self, scheduler, model):
        self.path, self.kind, self.model = scheduler.path, scheduler.config.prediction_type, model

    def __call__(self, x, t, s):
        t, s = float(t), float(s)
        x_s = exact_flow_map(self.path, self.model.posterior_mean, x, t, s)
        return average_prediction(self.path, self.kind, x.double(), x_s, t, s)


@by_path
def test_exact_network_in_one_two_and_four_steps(name):
    """gamma = 0 with the exact map arrives at the ODE's solution whatever the number of steps (semigroup); EDM's last
    grid interval included."""
    model, results = mixture(), []
    for steps in (1, 2, 4):
        scheduler = FlowMapScheduler(**process_of(name), flow_map="mean_flow", final_sigmas_type="sigma_min")
        network = ExactFlowMapNetwork(scheduler, model)
        scheduler.set_timesteps(steps)
        assert len(scheduler.timesteps) == steps
        x = randn(6, 1, 1, 3, dtype=torch.float64) * scheduler.init_noise_sigma
        start, first = x, float(scheduler.timesteps[0])
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t, scheduler.target_timestep(t)), t, x).prev_sample
        results.append(x)
        exact = exact_flow_map(scheduler.path, model.posterior_mean, start, first, scheduler.path.cleanest)
        torch.testing.assert_close(x, exact, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)
    stated("with the exact flow map 1, 2 and 4 steps agree with the ODE to 1e-4")


def test_ending_at_zero_removes_the_last_noise():
    """final_sigmas_type zero goes along the last jump to clean data: within sigma_min |eps| of the state at t_min."""
    model, ends = mixture(), {}
    for final in ("zero", "sigma_min"):
        scheduler = FlowMapScheduler(**process_of("vp_linear"), flow_map="mean_flow", final_sigmas_type=final)
        network = ExactFlowMapNetwork(scheduler, model)
        scheduler.set_timesteps(1)
        x, t = randn(6, 1, 1, 3, dtype=torch.float64), scheduler.timesteps[0]
        ends[final] = scheduler.step(network(x, t, scheduler.target_timestep(t)), t, x).prev_sample
    assert 0 < (ends["zero"] - ends["sigma_min"]).abs().max() < 0.01 * 4


@by_process
def test_target_timestep(process):
    """The target is the next timestep at gamma 0, the cleanest training time at gamma 1, both in between."""
    for gamma in (0.0, 0.5, 1.0):
        scheduler = FlowMapScheduler(**process, flow_map="mean_flow", gamma=gamma)
        scheduler.set_timesteps(3)
        cleanest, times = scheduler.path.cleanest, [*scheduler.timesteps.tolist()[1:], scheduler.path.cleanest]
        for t, following in zip(scheduler.timesteps, times, strict=True):
            target = scheduler.target_timestep(t)
            assert target.dtype == torch.float32 and target.shape == ()
            expected = {0.0: following, 1.0: cleanest}.get(gamma)
            if expected is not None:
                assert float(target) == pytest.approx(expected, rel=1e-6, abs=1e-6)
            else:
                assert cleanest - 1e-6 <= float(target) <= following + 1e-6
            scheduler.step(torch.zeros(1, 1, 2, 2), t, torch.zeros(1, 1, 2, 2))


@by_process
def test_contract(process):
    """Two-tuple, dtype of the sample, generator and hash seeds, image-to-image at any index, save and load."""
    scheduler = FlowMapScheduler(**process)
    assert scheduler.order == 1
    scheduler.set_timesteps(4)
    x, m = randn(2, 1, 4, 4), randn(2, 1, 4, 4, seed=1)
    t = scheduler.timesteps[0]
    prev, x0 = scheduler.step(m, t, x, generator=seeded(1), return_dict=False)
    assert prev.shape == x0.shape == x.shape
    for seed, same in ((1, True), (2, False)):
        scheduler.set_timesteps(4)
        again = scheduler.step(m, t, x, generator=seeded(seed)).prev_sample
        assert torch.equal(again, prev) is same
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(2)
    started = scheduler.add_noise(x, m, scheduler.timesteps[2:3])
    half = scheduler.step(m.half(), scheduler.timesteps[2], started.half())
    assert half.prev_sample.dtype == torch.float16 and scheduler.step_index == 3


def test_from_config_of_anything(tmp_path):
    """From a stock config, through a folder, and back; gamma's default follows the kind of map."""
    stock = DDIMScheduler(**SD, prediction_type="v_prediction")
    scheduler = FlowMapScheduler.from_config(stock.config, flow_map="mean_flow")
    scheduler.save_pretrained(tmp_path)
    loaded = FlowMapScheduler.from_pretrained(tmp_path)
    assert (
        loaded.config.flow_map == "mean_flow" and loaded.gamma == 0.0 and loaded.config.beta_start == SD["beta_start"]
    )
    assert FlowMapScheduler.from_config(stock.config).gamma == 1.0
    assert DDIMScheduler.from_config(loaded.config).config.prediction_type == "v_prediction"
    ours = ProbabilityFlowScheduler.from_config(loaded.config)
    assert ours.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    "wrong, words", [({"flow_map": "shortcut"}, "consistency or mean_flow"), ({"gamma": 1.5}, "gamma")]
)
def test_wrong_settings(wrong, words):
    with pytest.raises(ValueError, match=words):
        FlowMapScheduler(**wrong)


# -- the network --


@pytest.mark.parametrize("classes", [None, 4])
def test_network_starts_as_its_teacher_and_learns_the_target(classes, tmp_path):
    """from_unet says what the UNet says for every target; with trained weights the target matters; saves and loads."""
    unet, x, t = tiny_unet(classes=classes), randn(3, 1, 8, 8), torch.tensor([900.0, 500.0, 20.0])
    labels = () if classes is None else (torch.tensor([0, 3, 1]),)
    model = FlowMapUNet2DModel.from_unet(unet).eval()
    with torch.no_grad():
        assert torch.equal(model(x, t, *labels, target_timestep=3.0).sample, unet(x, t, *labels).sample)
        torch.nn.init.normal_(model.class_embedding.target.linear_2.weight)
        now, one = model(x, t, *labels, target_timestep=3.0).sample, model(x, t, *labels).sample
        assert relative(now, one) > 1e-3
        model.save_pretrained(tmp_path)
        loaded = FlowMapUNet2DModel.from_pretrained(tmp_path)
        assert torch.equal(loaded(x, t, *labels, target_timestep=3.0).sample, now)
        each = torch.cat(
            [
                model(x[i : i + 1], t[i], *(v[i : i + 1] for v in labels), target_timestep=torch.tensor([3.0])).sample
                for i in range(3)
            ]
        )
        torch.testing.assert_close(each, now, rtol=1e-4, atol=1e-5)
    if classes:
        with pytest.raises(ValueError, match="class_labels"):
            model(x, t)


# -- the pipeline --


@pytest.fixture
def few_step_model(tmp_path):
    """A folder as the training script leaves it."""
    scheduler = FlowMapScheduler(prediction_type="v_prediction", flow_map="mean_flow")
    pipe = DDPMPipeline(unet=FlowMapUNet2DModel.from_unet(tiny_unet(classes=11)), scheduler=scheduler)
    pipe.save_pretrained(tmp_path / "few_step_model")
    return tmp_path / "few_step_model"


def test_snippet():
    """The usage in the pipeline's docstring runs as it stands."""
    found = run("flow_map")
    assert len(found["rows"]) == 15 and found["image"].size == (480, 288)


def test_pipeline_is_the_loop(few_step_model):
    """The pipeline gives what jumping by hand gives, from latents and labels, also from given timesteps."""
    pipe = load("flow_map", few_step_model)
    pipe.set_progress_bar_config(disable=True)
    latents, labels = randn(2, 1, 8, 8), torch.tensor([3, 10])
    torch.nn.init.normal_(pipe.unet.class_embedding.target.linear_2.weight)
    found = pipe(class_labels=[3, 10], timesteps=[999, 400], latents=latents, output_type="latent").images
    x, path = latents, pipe.scheduler.path
    with torch.no_grad():
        for t, s in ((999.0, 400.0), (400.0, 0.0)):
            m = pipe.unet(x, t, labels, target_timestep=s).sample
            end = jump(path, "v_prediction", x, m, t, s)
            x = end if s else jump_to_zero(path, x, m, t)
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def jump_to_zero(path, x, m, t):
    alpha, sigma = (float(v) for v in path.alpha_sigma(t))
    return alpha * x - sigma * m  # the data prediction of v


def test_pipeline_refuses(few_step_model):
    """One sentence that says what to do."""
    pipe = load("flow_map", few_step_model)
    for wrong, words in (
        ({"class_labels": [11]}, "from 0 to 9"),
        ({"class_labels": [0.5]}, "whole numbers"),
        ({"class_labels": [1, 2], "batch_size": 3}, "one for each"),
        ({"latents": randn(1, 3, 8, 8)}, "latents"),
        ({"output_type": "jpeg"}, "output_type"),
    ):
        with pytest.raises(ValueError, match=words):
            pipe(**wrong)
    pipe.scheduler = diffusers.DDPMScheduler()
    with pytest.raises(ValueError, match=r"FlowMapScheduler\.from_config"):
        pipe()
