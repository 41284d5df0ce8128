"""Every named grid is its published formula, written out here, or what diffusers' own class lays out.

Expected values know each path by its published constants only (betas, ranges, T = 1000).
"""

import diffusers
import numpy as np
import pytest
from helpers import LINEAR, PATHS, SD, nodes_of
from scipy.special import betaincinv

from diffusers_sde import ProbabilityFlowScheduler
from diffusers_sde.named_grids import GRIDS, distilled, make_grid
from diffusers_sde.paths import FlowMatching, VarianceExploding
from diffusers_sde.tables import build_multistep

counts = pytest.mark.parametrize("n", [2, 7, 10, 33])


def grid(path, name, n, **options):
    return make_grid(PATHS[path], name, n, **options)


def vp_levels(config):
    """Half log-SNR at the integers of a stock process, in float64."""
    power = 0.5 if config["beta_schedule"] == "scaled_linear" else 1.0
    betas = np.linspace(config["beta_start"] ** power, config["beta_end"] ** power, 1000) ** (1 / power)
    abar = np.cumprod(1 - betas)
    return 0.5 * np.log(abar / (1 - abar))


# -- in time --


@counts
def test_trailing(n):
    """``T (n-i)/n - 1`` (Lin et al. 2023, arXiv:2305.08891, table 2); flow matching: unshifted sigma ``(n-i)/n``."""
    left = np.arange(n, 0, -1) / n
    np.testing.assert_allclose(grid("vp_linear", "trailing", n), 1000 * left - 1, atol=1e-9)
    np.testing.assert_allclose(grid("flow", "trailing", n), 1000 * left, rtol=1e-12)
    np.testing.assert_allclose(grid("flow_shift", "trailing", n), 1000 * 3 * left / (1 + 2 * left), rtol=1e-12)


@counts
def test_linspace(n):
    """``n`` equal steps of time from T - 1 to 0 (diffusers' linspace; sigma from 1 to 1/T for flow matching), of
    ``log(sigma)/4`` for EDM."""
    np.testing.assert_allclose(grid("vp_linear", "linspace", n), np.linspace(999, 0, n), atol=1e-9)
    np.testing.assert_allclose(grid("flow", "linspace", n), np.linspace(1000, 1, n), rtol=1e-12)
    edm = np.linspace(np.log(80) / 4, np.log(0.002) / 4, n)
    np.testing.assert_allclose(grid("edm", "linspace", n), edm, rtol=1e-9, atol=1e-12)


@counts
@pytest.mark.parametrize("offset", [0, 1])
def test_leading(n, offset):
    """``(n-1-i) floor(T/n) + steps_offset`` (Lin et al. 2023, table 2; diffusers' DDIM)."""
    expected = np.arange(n - 1, -1, -1) * (1000 // n) + offset
    np.testing.assert_allclose(grid("vp_linear", "leading", n, steps_offset=offset), expected, atol=1e-9)
    ddim = diffusers.DDIMScheduler(**LINEAR, steps_offset=offset)
    ddim.set_timesteps(n)
    np.testing.assert_allclose(grid("vp_linear", "leading", n, steps_offset=offset), ddim.timesteps, atol=1e-9)


@counts
@pytest.mark.parametrize("rho", [1.25, 3.0])
def test_power(n, rho):
    """``T ((n-i)/n)^rho - 1``, or ``(T-1) ((n-1-i)/(n-1))^rho`` where that would pass t = 0 (the docstring); flow
    matching ``((n-i)/n)^rho`` as long as that is at least 1/T; EDM ``((n-1-i)/(n-1))^rho`` of the range of time."""
    to_clean, to_end = (np.arange(n, 0, -1) / n) ** rho, (np.arange(n - 1, -1, -1) / (n - 1)) ** rho
    vp = 1000 * to_clean - 1
    np.testing.assert_allclose(
        grid("vp_linear", "power", n, rho=rho), vp if vp[-1] >= 0 else 999 * to_end, rtol=1e-12, atol=1e-9
    )
    flow = 1000 * to_clean
    np.testing.assert_allclose(
        grid("flow", "power", n, rho=rho), flow if flow[-1] >= 1 else 1 + 999 * to_end, rtol=1e-12
    )
    high, low = np.log([80.0, 0.002]) / 4
    np.testing.assert_allclose(grid("edm", "power", n, rho=rho), low + (high - low) * to_end, rtol=1e-9, atol=1e-12)


def test_power_covers_both_forms():
    """The exponents above end at clean data at 7 steps and, at 33 steps of rho 3, at the last training time."""
    assert grid("vp_linear", "power", 7, rho=1.25)[-1] == pytest.approx(1000 / 7**1.25 - 1)
    assert grid("vp_linear", "power", 33, rho=3.0)[-1] == 0


# -- in noise --


@counts
@pytest.mark.parametrize("rho", [1.0, 1.5])
def test_balanced(n, rho):
    """``1/2 (t/(T-1)) + 1/2 (lambda_0 - lambda_t)/(lambda_0 - lambda_T) = ((n-i)/n)^rho`` (the docstring)."""
    lam = vp_levels(LINEAR)
    t = grid("vp_linear", "balanced", n, rho=rho)
    at = np.interp(t, np.arange(1000), lam)
    mean = 0.5 * t / 999 + 0.5 * (lam[0] - at) / (lam[0] - lam[-1])
    np.testing.assert_allclose(mean, (np.arange(n, 0, -1) / n) ** rho, atol=1e-9)
    # time is log sigma for EDM: both halves are the same; for flow matching time is noise
    high, low = np.log([80.0, 0.002]) / 4
    edm = low + (high - low) * (np.arange(n, 0, -1) / n) ** rho
    np.testing.assert_allclose(grid("edm", "balanced", n, rho=rho), edm, atol=1e-9)
    np.testing.assert_allclose(grid("flow", "balanced", n, rho=rho), 1000 * (np.arange(n, 0, -1) / n) ** rho)


@counts
def test_balanced_weighs_time_by_its_share(n):
    """``share`` of equal steps of time, the rest of log-SNR; all of it is ``power``."""
    lam, t = vp_levels(LINEAR), grid("vp_linear", "balanced", n, rho=1.1, share=0.8)
    at = np.interp(t, np.arange(1000), lam)
    mean = 0.8 * t / 999 + 0.2 * (lam[0] - at) / (lam[0] - lam[-1])
    np.testing.assert_allclose(mean, (np.arange(n, 0, -1) / n) ** 1.1, atol=1e-6)
    whole = grid("vp_linear", "balanced", n, rho=1.1, share=1.0)
    np.testing.assert_allclose(whole, 999 * (np.arange(n, 0, -1) / n) ** 1.1, atol=1e-9)


@counts
@pytest.mark.parametrize("name", ["edm", "vp_linear", "flow"])
def test_noise_fraction_is_a_power_of_equal_steps_of_the_fraction(name, n):
    """``u = s/(s + 4 data_scale)`` with s = sigma/alpha: from the first level's on, trailing."""
    path = PATHS[name]
    t = grid(name, "noise_fraction", n, rho=1.5)
    alpha, sigma = path.alpha_sigma(t)
    u = sigma / (sigma + 4 * {"edm": 0.5, "vp_linear": 1.0, "flow": 1.0}[name] * alpha)
    assert t[0] == path.noisiest
    np.testing.assert_allclose(u / u[0], (np.arange(n, 0, -1) / n) ** 1.5, rtol=1e-3)


def ramps(low, high, n):
    """Noise levels of each grid between the smallest and the largest."""
    u = np.linspace(0, 1, n)
    return {
        # Karras et al. 2022, arXiv:2206.00364, eq. 5, rho = 7
        "karras": (high ** (1 / 7) + u * (low ** (1 / 7) - high ** (1 / 7))) ** 7,
        # Lu et al. 2022, arXiv:2206.00927, section 3.4: equal steps of log-SNR
        "log_snr": high * (low / high) ** u,
        "exponential": high * (low / high) ** u,
        # Lee et al. 2024, arXiv:2407.12173: quantiles of Beta(0.6, 0.6)
        "beta": low + (high - low) * betaincinv(0.6, 0.6, 1 - u),
    }


@counts
def test_grids_of_noise_levels(n):
    """``sigma/alpha`` of DDPM's betas and of EDM, sigma of flow matching, ``sigma/alpha`` of it where asked for."""
    lam = vp_levels(LINEAR)
    for name, expected in ramps(*np.exp(-lam[[0, -1]]), n).items():
        times = np.interp(np.log(expected), -lam, np.arange(1000))
        np.testing.assert_allclose(grid("vp_linear", name, n), times, atol=1e-6)
    for name, expected in ramps(0.002, 80.0, n).items():
        np.testing.assert_allclose(grid("edm", name, n), np.log(expected) / 4, atol=1e-9)
    for name, expected in ramps(0.001, 1.0, n).items():
        np.testing.assert_allclose(grid("flow", name, n), 1000 * expected, rtol=1e-9)
    in_ratio = FlowMatching(sigma_range=(0.01, 0.99), ramps_in_ratio=True)
    for name, expected in ramps(0.01 / 0.99, 99.0, n).items():
        np.testing.assert_allclose(make_grid(in_ratio, name, n), 1000 * expected / (1 + expected), rtol=1e-9)


@pytest.mark.parametrize("flag", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_grids_of_noise_levels_are_those_of_diffusers(flag):
    """The sigmas of EulerDiscreteScheduler and of FlowMatchEulerDiscreteScheduler, up to their float32."""
    for stock in (
        diffusers.EulerDiscreteScheduler(**SD, **{flag: True}),
        diffusers.FlowMatchEulerDiscreteScheduler(**{flag: True}),
    ):
        stock.set_timesteps(9)
        ours = ProbabilityFlowScheduler.from_config(stock.config)
        ours.set_timesteps(9)
        np.testing.assert_allclose(ours.sigmas, stock.sigmas, rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("n", [5, 10, 20])
def test_align_your_steps(n):
    """Sabour et al. 2024, arXiv:2404.14507: the noise levels published for Stable Diffusion 1.5 in 10 steps, log-linear
    between them for other numbers of steps, their ends (14.615 and 0.029) those of the path; the published timesteps
    within 2."""
    published = np.log([14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029])
    for config, path in ((SD, "vp_scaled_linear"), (LINEAR, "vp_linear")):
        lam = vp_levels(config)
        levels = np.interp(10 / n * np.arange(n), np.arange(11), published)
        levels = np.interp(levels, published[[-1, 0]], -lam[[0, -1]])
        np.testing.assert_allclose(grid(path, "ays", n), np.interp(levels, -lam, np.arange(1000)), atol=1e-6)
    timesteps = grid("vp_scaled_linear", "ays", n)[:: max(n // 10, 1)]
    listed = [999, 850, 736, 645, 545, 455, 343, 233, 124, 24][:: max(10 // n, 1)]
    assert np.abs(timesteps - listed).max() <= 2


def test_align_your_steps_of_other_models():
    """The 10 steps published for SDXL, and for Stable Video Diffusion on its own process."""
    sdxl = [14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113]
    found = PATHS["vp_scaled_linear"].log_snr(grid("vp_scaled_linear", "ays_sdxl", 10))
    np.testing.assert_allclose(np.exp(-found), sdxl, rtol=0.01)  # up to the range: 14.615 is 14.61, 0.029 is 0.0292
    svd = [700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034]
    path = VarianceExploding(0.002, 700.0, 1.0)
    np.testing.assert_allclose(np.exp(-path.log_snr(make_grid(path, "ays_svd", 10))), svd, rtol=1e-9)


# -- of the user interfaces, as their sources lay them out: sigmas of T training times, in ascending order --


def tabulated(path):
    """The model's 1000 training sigmas (of a flow model with its shift) as ComfyUI tabulates them."""
    if path.startswith("vp"):
        return np.exp(-vp_levels(SD if "scaled" in path else LINEAR))
    if path == "edm":
        return np.exp(np.linspace(np.log(0.002), np.log(80), 1000))
    u = np.arange(1, 1001) / 1000
    return 3 * u / (1 + 2 * u) if path == "flow_shift" else u


tables_of_sigmas = pytest.mark.parametrize("path", ["vp_linear", "vp_scaled_linear", "edm", "flow", "flow_shift"])


def levels(path, name, n):
    """The sigmas of a named grid."""
    return PATHS[path].sigma_label(*PATHS[path].alpha_sigma(grid(path, name, n)))


@counts
@tables_of_sigmas
def test_simple(path, n):
    """Every (T/n)th training sigma from the highest on, the index rounded down."""
    expected = [tabulated(path)[-(1 + int(i * 1000 / n))] for i in range(n)]
    np.testing.assert_allclose(levels(path, "simple", n), expected, rtol=1e-9)


@counts
@tables_of_sigmas
def test_sgm_uniform(path, n):
    """n + 1 equally spaced training times from the last to the first, without the last of them."""
    at = np.linspace(999, 0, n + 1)[:-1]
    table = np.log(tabulated(path)) if path != "flow" else tabulated(path)
    expected = np.interp(at, np.arange(1000), table)
    expected = expected if path == "flow" else np.exp(expected)
    np.testing.assert_allclose(levels(path, "sgm_uniform", n), expected, rtol=1e-6 if path != "flow_shift" else 1e-3)


@counts
@tables_of_sigmas
@pytest.mark.parametrize(("name", "law"), [("beta_timesteps", (0.6, 0.6)), ("beta57", (0.5, 0.7))])
def test_beta_of_training_times(path, n, name, law):
    """The training sigmas at the quantiles of Beta(0.6, 0.6), of RES4LYF Beta(0.5, 0.7), rounded to whole times."""
    at = betaincinv(*law, 1 - np.arange(n) / n) * 999
    table = np.arange(1000), np.log(tabulated(path))
    np.testing.assert_allclose(np.interp(np.log(levels(path, name, n)), *table[::-1]), at, atol=0.3)


@counts
@tables_of_sigmas
def test_kl_optimal(path, n):
    """``tan(i/(n-1) atan(sigma_min) + (1 - i/(n-1)) atan(sigma_max))`` (Sabour et al. 2024)."""
    u = np.arange(n) / (n - 1)
    sigmas = tabulated(path.replace("flow_shift", "flow"))
    expected = np.tan(u * np.arctan(sigmas[0]) + (1 - u) * np.arctan(sigmas[-1]))
    np.testing.assert_allclose(levels(path, "kl_optimal", n), expected, rtol=1e-9)


@pytest.mark.parametrize("n", [2, 7, 10, 20])
def test_linear_quadratic(n):
    """Mochi's: linear in the first half up to 2.5 % of the noise; ``a i^2 + b i + c`` of its published coefficients."""
    linear, threshold = n // 2, 0.025
    difference, rest = linear - threshold * n, n - linear
    a = difference / (linear * rest**2)
    b, c = threshold / linear - 2 * difference / rest**2, a * linear**2
    y = [i * threshold / linear for i in range(linear)] + [a * i**2 + b * i + c for i in range(linear, n)]
    np.testing.assert_allclose(levels("flow", "linear_quadratic", n), 1 - np.array(y), rtol=1e-9)
    highest = np.exp(-vp_levels(SD)[-1])
    np.testing.assert_allclose(
        levels("vp_scaled_linear", "linear_quadratic", n), highest * (1 - np.array(y)), rtol=1e-9
    )


@pytest.mark.parametrize("n", [2, 7, 10, 20])
def test_bong_tangent(n):
    """Two arctangents of slope 0.2 (at 40 places) about the place int(0.6 (n + 2)), from 1 to 0.5 and on to 0."""
    places, slope = n + 2, 0.2 * 40 / (n + 2)
    pivot = int(0.6 * places)

    def arc(count, pivot, start, end):
        y = [(2 / np.pi * np.arctan(-slope * (x - pivot)) + 1) / 2 for x in range(count)]
        return [(v - y[-1]) / (y[0] - y[-1]) * (start - end) + end for v in y]

    expected = np.array(arc(pivot, pivot, 1.0, 0.5)[:-1] + arc(places - pivot, 0, 0.5, 0.0)[:-1])
    np.testing.assert_allclose(levels("flow", "bong_tangent", n), expected, rtol=1e-9)
    highest = np.exp(-vp_levels(SD)[-1])
    np.testing.assert_allclose(levels("vp_scaled_linear", "bong_tangent", n), highest * expected, rtol=1e-9)


# -- of distilled networks --


@pytest.mark.parametrize("n", [1, 3, 4, 7])
def test_the_grid_of_latent_consistency_is_the_one_of_fifty_distilled_steps(n):
    np.testing.assert_allclose(grid("vp_scaled_linear", "lcm", n), distilled(PATHS["vp_scaled_linear"], n, 50))
    np.testing.assert_allclose(grid("flow", "lcm", n), 1000 * (50 - np.floor(50 * np.arange(n) / n)) / 50)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("n", "original"), [(1, 50), (3, 50), (4, 50), (7, 50), (6, 40), (20, 50)])
def test_distilled_is_the_grid_of_lcm(n, original, strength):
    """Equally spaced of the steps ``k T/original - 1`` that the network was trained on (Luo et al. 2023,
    arXiv:2310.04378, section 4.3), as diffusers' LCMScheduler lays them out."""
    stock = diffusers.LCMScheduler(**SD)
    stock.set_timesteps(n, original_inference_steps=original, strength=strength)
    found = distilled(PATHS["vp_scaled_linear"], n, original, strength)
    np.testing.assert_array_equal(found, stock.timesteps)


def test_no_named_grid_is_left_out():
    """Each has its formula above."""
    in_time = {"trailing", "linspace", "leading", "power", "simple", "sgm_uniform", "beta_timesteps", "beta57", "lcm"}
    in_noise = {"balanced", "noise_fraction", "kl_optimal", "linear_quadratic", "bong_tangent", *ramps(0.1, 1.0, 2)}
    assert set(GRIDS) == in_time | in_noise | {"ays", "ays_sdxl", "ays_svd"}


# -- a noise level of its own for each step --


def combined(rows, evaluations):
    """States of a table, from 1, whose evaluation at row i is ``evaluations[i]``."""
    x, states = 1.0, []
    for i, row in enumerate(rows):
        x = row.a * x + sum(b * evaluations[i - j] for j, b in enumerate(row.b))
        states.append(x)
    return np.array(states)


@pytest.mark.parametrize("data_std", [0.0, 0.7])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_corrected_step_keeps_its_own_tau(order, data_std):
    """Each step of a table with one tau a step is that of its tau: with a constant evaluation, which every rule
    integrates exactly, the corrected table is the table of single steps, state by state."""
    path, nodes = PATHS["vp_linear"], np.linspace(-2, 2, 7)
    taus = [0.0, 1.4, 0.3, 1.0, 0.0, 0.8]
    corrected = build_multistep(path, nodes_of(path, nodes), order=order, corrector=True, tau=taus, data_std=data_std)
    single = []
    for i, tau in enumerate(taus):
        single += build_multistep(path, nodes_of(path, nodes[i : i + 2]), order=1, tau=tau, data_std=data_std).rows
    assert any(len(row.b) == order + 1 for row in corrected.rows)
    expected = combined(single, np.full(6, 0.9))
    np.testing.assert_allclose(combined(corrected.rows, np.full(6, 0.9)), expected, rtol=1e-11)
    np.testing.assert_allclose([row.c for row in corrected.rows], [row.c for row in single], rtol=1e-12)
