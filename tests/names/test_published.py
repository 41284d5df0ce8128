"""Every sampler that can be had by name is its published formula: k-diffusion's own function where it has the method,
the paper's formula written out where not, on the mixture oracle to 1e-6; where they disagree, which side is exact."""

import dataclasses
import functools
import math

import diffusers
import numpy as np
import published_formulas as papers
import pytest
import torch
from helpers import PATHS, SD, gaussian_law, mixture, nodes_of, order_of, run_table
from scipy.integrate import solve_ivp

import diffusers_sde
from diffusers_sde.grids import nodes_from_times
from diffusers_sde.named_grids import make_grid
from diffusers_sde.published import RECIPES, build_published, noise_levels, with_stages

CONFIGS = {
    "vp": diffusers.EulerDiscreteScheduler(**SD).config,
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config,
    "edm": diffusers.EDMEulerScheduler().config,
}
STEPS = 7
by_process = pytest.mark.parametrize("process", CONFIGS)
MODEL = mixture()


def runs(name, process, schedule="karras", **options):
    """One run of a sampler on the mixture: ``(x_0, first state, levels of the steps, z of every row that draws, D)`` in
    the coordinates of k-diffusion, where a flow model's level is its sigma and any other's sigma/alpha."""
    scheduler = diffusers_sde.sampler(name, CONFIGS[process], schedule=schedule, **options)
    recipe, flow = RECIPES[name], process == "flow"
    steps = diffusers_sde.sampler("euler", CONFIGS[process], schedule=schedule)
    steps.set_timesteps(STEPS)
    scheduler.set_timesteps(recipe.evaluations * (STEPS - 1) + 1)
    at = scheduler.levels
    x = first = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * at.sigma[0]
    drawn = []
    for alpha, sigma, t in zip(at.alpha, at.sigma, scheduler.timesteps, strict=False):
        x0 = MODEL.posterior_mean(x, float(alpha), float(sigma))
        out = scheduler.step(torch.zeros_like(x), t, x, pred_original_sample=x0)
        if out.noise_std:
            drawn.append((out.prev_sample - out.prev_sample_mean) / out.noise_std)
        x = out.prev_sample
    scale = 1.0 if flow else float(at.alpha[0])
    levels = steps.levels.sigma if flow else steps.levels.sigma / steps.levels.alpha

    def denoise(y, s, **_):
        s = float(s.flatten()[0]) if isinstance(s, torch.Tensor) else float(s)
        return MODEL.posterior_mean(y, 1 - s, s) if flow else MODEL.posterior_mean(y, 1.0, s)

    return x, first / scale, levels, drawn, denoise


# -- k-diffusion --

DETERMINISTIC = ("euler", "heun", "dpm_2", "lms", "dpmpp_2m")
STOCHASTIC = {
    "euler_ancestral": ("euler_ancestral", {}),
    "dpm_2_ancestral": ("dpm_2_ancestral", {}),
    "dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", {}),
    "dpmpp_2m_sde": ("dpmpp_2m_sde", {"solver_type": "midpoint"}),
    "dpmpp_2m_sde_heun": ("dpmpp_2m_sde", {"solver_type": "heun"}),
}


def k_diffusion(function, denoise, x, levels, **options):
    return getattr(papers.k_diffusion_sampling(), f"sample_{function}")(
        denoise, x, torch.from_numpy(np.asarray(levels)), disable=True, **options
    )


@by_process
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_an_ode_method_is_k_diffusion_s(name, process):
    """On flow matching the same function of sigma and x, as ComfyUI calls it."""
    found, x, levels, _, denoise = runs(name, process)
    torch.testing.assert_close(found, k_diffusion(name, denoise, x, levels), rtol=0, atol=1e-6)


@pytest.mark.parametrize("eta", [1.0, 0.6])
@pytest.mark.parametrize("process", ["vp", "edm"])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_stochastic_method_is_k_diffusion_s(name, process, eta):
    """With the same normals, at any eta."""
    function, options = STOCHASTIC[name]
    found, x, levels, drawn, denoise = runs(name, process, eta=eta)
    assert len(drawn) == STEPS - 1
    drawn = iter(drawn)
    expected = k_diffusion(function, denoise, x, levels, eta=eta, noise_sampler=lambda *_: next(drawn), **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_dpmpp_sde_is_k_diffusion_s_with_the_noise_of_one_path():
    """The noise of a whole step is that of its stage, decayed by ``(s_t/s_m)^2``, plus what came after."""
    found, x, levels, drawn, denoise = runs("dpmpp_sde", "vp")
    drawn, held = iter(drawn), []

    def noise(s, t):
        if not held:
            held.append((s, t, next(drawn)))
            return held[0][2]
        s, middle, first = held.pop()
        own, kept = t * (1 - (t / middle) ** 2) ** 0.5, (t / middle) ** 2 * middle * (1 - (middle / s) ** 2) ** 0.5
        return (kept * first + own * next(drawn)) / (t * (1 - (t / s) ** 2) ** 0.5)

    expected = k_diffusion("dpmpp_sde", denoise, x, levels, noise_sampler=noise)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def exact_third_order(eta):
    """A step of three evaluations of ``D = lambda^2``, which no rule of third order errs on: what k-diffusion and what
    we make of it, and the integral."""
    levels, tau = np.array([4.0, 2.5, 1.4, 0.8]), math.sqrt(eta)
    A, lam = 1 + eta, -np.log(levels)

    def denoise(x, s, **_):
        return torch.log(s.flatten()[0]).square() * torch.ones_like(x)

    def zero(*_):
        return torch.zeros(1, 1, dtype=torch.float64)

    start = torch.zeros(1, 1, dtype=torch.float64)
    theirs = [
        k_diffusion("dpmpp_3m_sde", denoise, start, levels[:k], eta=eta, noise_sampler=zero).item() for k in (3, 4)
    ]
    grid = np.linspace(lam[2], lam[3], 20001)
    expected = np.trapezoid(A * np.exp(-A * (lam[3] - grid)) * grid**2, grid)
    table = build_published(PATHS["edm"], nodes_of(PATHS["edm"], lam), RECIPES["dpmpp_3m_sde"], taus=[tau] * 3)
    return theirs[1] - theirs[0] * (levels[3] / levels[2]) ** A, np.dot(table.rows[2].b, lam[2::-1] ** 2), expected


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_third_order_weights_are_exact_here_and_not_in_k_diffusion(eta):
    """A step from three evaluations of a parabola in log-SNR ends where the integral does; k-diffusion's is 2 % off."""
    theirs, ours, exact = exact_third_order(eta)
    assert ours == pytest.approx(exact, rel=1e-7)
    assert abs(theirs - exact) > 0.02 * abs(exact)


# -- papers --

EXPONENTIAL_THIRDS = papers.three_stages(1 / 3, 2 / 3)
KUTTA = ([0, 1 / 2, 1], [[], [1 / 2], [-1, 2]], [1 / 6, 4 / 6, 1 / 6])
RK4 = ([0, 1 / 2, 1 / 2, 1], [[], [1 / 2], [0, 1 / 2], [0, 0, 1]], [1 / 6, 1 / 3, 1 / 3, 1 / 6])
ADAMS = ([1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24])
FORMULAS = {
    "dpm_solver_3": papers.single_step(papers.noise_solver_3),
    "ipndm": papers.fixed(*ADAMS),
    "ipndm_v": papers.interpolated(4),
    "deis_2m": papers.interpolated(2),
    "deis": papers.interpolated(3),
    "deis_4m": papers.interpolated(4),
    "deis_log_rho": papers.interpolated(2, math.log, math.exp),
    "gradient_estimation": papers.fixed([1], [2, -1]),
    "dpmpp_3m": papers.data_multistep(3),
    "dpmpp_2s": papers.single_step(papers.data_solver_2s),
    "dpmpp_3s": papers.exponential(EXPONENTIAL_THIRDS),
    "unipc": papers.unipc(3, "bh1"),
    "unipc_bh2": papers.unipc(3, "bh2"),
    "unipc_2": papers.unipc(2, "bh2"),
    "res_2m": papers.data_multistep(2),
    "res_3m": papers.data_multistep(3),
    "res_2s": papers.exponential(papers.two_stages(0.5)),
    "res_3s": papers.exponential(papers.three_stages(0.5, 1.0)),
    "exp_heun_2_x0": papers.exponential(papers.two_stages(1.0)),
    "midpoint_2s": papers.runge_kutta([0, 1 / 2], [[], [1 / 2]], [0, 1]),
    "ralston_2s": papers.runge_kutta([0, 2 / 3], [[], [2 / 3]], [1 / 4, 3 / 4]),
    "kutta_3s": papers.runge_kutta(*KUTTA),
    "rk4_4s": papers.runge_kutta(*RK4),
}
NOISY_FORMULAS = {
    "dpmpp_3m_sde": papers.data_multistep(3, tau=1.0),
    "res_multistep_ancestral": papers.ancestral_line,
    "seeds_2": papers.seeds(2),
    "seeds_3": papers.seeds(3),
}


@pytest.mark.parametrize("process", ["vp", "flow"])
@pytest.mark.parametrize("name", FORMULAS)
def test_an_ode_method_is_its_paper_s(name, process):
    found, x, levels, _, denoise = runs(name, process)
    torch.testing.assert_close(found, FORMULAS[name](denoise, x, levels, None), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NOISY_FORMULAS)
def test_a_stochastic_method_is_its_paper_s(name):
    found, x, levels, drawn, denoise = runs(name, "vp")
    expected = NOISY_FORMULAS[name](denoise, x, levels, iter(drawn))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_sa_solver_is_its_paper_s():
    """tau = 1 on the steps that end between 0.2 and 0.8 of the training times, 0 outside."""
    found, x, levels, drawn, denoise = runs("sa_solver", "vp", schedule="normal")
    ends = np.append(np.linspace(999, 0, STEPS)[1:], 0) / 999
    taus = [float(0.2 <= u <= 0.8) for u in ends]
    assert 0 < sum(taus) == len(drawn) < STEPS
    torch.testing.assert_close(found, papers.sa_solver(taus)(denoise, x, levels, iter(drawn)), rtol=0, atol=1e-6)


def test_exponential_heun_with_noise_is_the_two_stage_formula_of_twice_the_decay():
    """Hochbruck & Ostermann's weights at 2 h, the second stage at the end with the step's noise."""
    found, x, levels, drawn, denoise = runs("exp_heun_2_x0_sde", "vp")
    for s, t, z in zip(levels[:-2], levels[1:-1], drawn, strict=True):
        g, noise = 2 * math.log(s / t), t * math.sqrt(1 - (t / s) ** 2) * z
        first = denoise(x, s)
        decayed, slope = math.exp(-g) * x + noise, g * papers.phi_2(g)
        second = denoise(decayed - math.expm1(-g) * first, t)
        x = decayed - math.expm1(-g) * first + slope * (second - first)
    torch.testing.assert_close(found, denoise(x, levels[-2]), rtol=0, atol=1e-6)


# -- ER-SDE --


def test_er_sde_of_two_evaluations_is_its_paper_s(monkeypatch):
    monkeypatch.setitem(RECIPES, "er_sde", dataclasses.replace(RECIPES["er_sde"], history=2))
    found, x, levels, drawn, denoise = runs("er_sde", "vp")
    torch.testing.assert_close(found, papers.er_sde(denoise, x, levels, iter(drawn)), rtol=0, atol=1e-6)


def test_third_order_weights_of_er_sde_are_exact_here_and_not_in_its_paper():
    """Three evaluations of a parabola in s: the exact step is ``Int phi_t phi'/phi^2 s^2 ds``, and the published third
    term, which takes the backward difference for the slope at s, is 2 % off."""
    levels = np.array([6.0, 3.5, 2.0, 1.0])
    rows = build_published(
        PATHS["edm"], nodes_of(PATHS["edm"], -np.log(levels)), RECIPES["er_sde"], taus=[1.0] * 3
    ).rows
    u = np.linspace(1.0, 2.0, 40001)
    inverse = 1 / np.array([papers.er_phi(v) for v in u])
    exact = papers.er_phi(1.0) * (np.trapezoid(inverse * 2 * u, u) + inverse[0] * 1.0 - inverse[-1] * 4.0)
    assert np.dot(rows[2].b, levels[2::-1] ** 2) == pytest.approx(exact, rel=1e-7)
    published = papers.er_third_weight(2.0, 1.0, 3.5, 6.0, np.square)
    assert abs(published - exact) > 0.02 * exact


# -- all --


def test_every_recipe_has_its_formula():
    here = {"dpmpp_sde", "sa_solver", "exp_heun_2_x0_sde", "er_sde"}
    assert set(RECIPES) == {*DETERMINISTIC, *STOCHASTIC, *FORMULAS, *NOISY_FORMULAS} | here


def two_points(x, row):
    """``E[x_0|x]`` of data at -1 and 1."""
    return math.tanh(x * row.alpha / row.sigma**2)


@functools.cache
def solution(x, start, end):
    """The end of the ODE ``dx/ds = (x - D)/s`` between two levels with alpha = 1."""
    found = solve_ivp(lambda s, y: (y - math.tanh(y[0] / s**2)) / s, (start, end), [x], rtol=1e-12, atol=1e-13)
    return found.y[0, -1]


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.noise in ("none", "extended")])
def test_the_stated_order_is_the_measured_one(name):
    """Of the deterministic methods: errors fall with the steps as fast as stated, at least.  Multistep methods start
    with lower orders, which cost them no more than the second order of the whole."""
    recipe = dataclasses.replace(RECIPES[name], noise="none", ending=None)
    path, errors = PATHS["edm"], []
    for steps in (32, 64):
        nodes = with_stages(path, nodes_of(path, np.linspace(-1.0, 1.0, steps + 1)), recipe)
        table = build_published(path, nodes, recipe, taus=noise_levels(path, nodes, recipe))
        errors.append(abs(run_table(table, two_points, 1.3) - solution(1.3, math.e, 1 / math.e)))
    started = min(recipe.order, 2) if recipe.history > 1 else recipe.order
    assert order_of(errors)[-1] > started - 0.35


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.stochastic])
def test_a_stochastic_method_has_the_law_of_its_data_on_flow_matching(name):
    """Gaussian data of standard deviation 1/2 from pure noise, where sigma = 1: the bias falls with the steps, so that
    the amount of noise is right in each (on other processes the formulas above hold)."""
    path, recipe, bias = PATHS["flow_shift"], RECIPES[name], []
    for steps in (60, 120):
        nodes = with_stages(path, nodes_from_times(path, make_grid(path, "simple", steps)), recipe)
        table = build_published(path, nodes, recipe, taus=noise_levels(path, nodes, recipe))
        bias.append(abs(math.sqrt(gaussian_law(table, 0.5, 1.0)) - 0.5))
    assert bias[1] < max(0.65 * bias[0], 0.005)
