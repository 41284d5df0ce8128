"""Forward processes and predictions: the statements of three texts, and the configs of diffusers that spell them.

Fu & Wang: arXiv:2605.22586.  Lu: arXiv:2607.01693.  Lai et al.: arXiv:2510.21890.
"""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
from helpers import (
    BETA_CONFIGS,
    LINEAR,
    PATHS,
    SD,
    SMOOTH,
    mixture,
    mixture_denoiser,
    nodes_of,
    noise_like,
    run_table,
    span,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from diffusers_sde import ProbabilityFlowScheduler, ReverseSDEScheduler
from diffusers_sde.configs import alphas_cumprod_from_config
from diffusers_sde.dynamics import drift_and_diffusion
from diffusers_sde.paths import FlowMatching, Path, VarianceExploding, VariancePreserving
from diffusers_sde.prediction import (
    PREDICTION_TYPES,
    convert,
    model_coefficients,
    prediction_coefficients,
    split_variance,
)
from diffusers_sde.sampling import sample
from diffusers_sde.tables import build_multistep
from diffusers_sde.weights import Point, linear_coefficients

every_path = pytest.mark.parametrize("name", PATHS)
unit = st.floats(0, 1)


def inner_times(path, n=23):
    """Times off the integers, where every path has derivatives."""
    start, end = span(path)
    grid = np.linspace(start, end, n)
    return np.floor(grid) + 0.37 if isinstance(path, VariancePreserving) else grid


# -- alpha, sigma and their derivatives --


@every_path
def test_f_and_g2_are_the_derivatives_of_alpha_and_sigma(name):
    """f = d log alpha/dt, g^2 = d sigma^2/dt - 2 f sigma^2, in noise order (F, setup)."""
    path = PATHS[name]
    t, h = inner_times(path), 1e-5 * abs(path.noisiest - path.cleanest)
    sign = np.sign(path.noisiest - path.cleanest)
    (a0, s0), (a1, s1) = path.alpha_sigma(t - h), path.alpha_sigma(t + h)
    f, g2 = drift_and_diffusion(path, t)
    sigma2 = path.alpha_sigma(t)[1] ** 2
    numeric_f = sign * (np.log(a1) - np.log(a0)) / (2 * h)
    numeric_ds2 = sign * (s1**2 - s0**2) / (2 * h)
    np.testing.assert_allclose(f, numeric_f, rtol=1e-6, atol=1e-6 * np.abs(g2 / sigma2).min())
    np.testing.assert_allclose(g2, numeric_ds2 - 2 * f * sigma2, rtol=1e-6)


@pytest.mark.parametrize(("name", "ends"), [("vp_zero_snr", (998, 999)), ("vp_clean_start", (0, 1))])
def test_f_and_g2_where_the_angle_is_linear(name, ends):
    """Next to alpha = 0 (zero terminal SNR) or sigma = 0: f = -angle' tan(angle) and g^2 = -2 f, from alpha =
    cos(angle) by hand and as the derivatives of alpha and sigma (Fu & Wang, setup); at the ends their limits."""
    path = {**PATHS, "vp_clean_start": VariancePreserving([1.0, 0.7, 0.2])}[name]
    angle = [float(np.arctan2(*path.alpha_sigma(end)[::-1])) for end in ends]
    rate, t, h = angle[1] - angle[0], ends[0] + np.array([0.01, 0.3, 0.7, 0.99]), 1e-6
    f, g2 = drift_and_diffusion(path, t)
    np.testing.assert_allclose(f, -rate * np.tan(angle[0] + (t - ends[0]) * rate), rtol=1e-10)
    np.testing.assert_allclose(g2, -2 * f, rtol=1e-10)
    (a0, s0), (a1, s1) = path.alpha_sigma(t - h), path.alpha_sigma(t + h)
    np.testing.assert_allclose(f, (np.log(a1) - np.log(a0)) / (2 * h), rtol=1e-6)
    np.testing.assert_allclose(g2, (s1**2 - s0**2) / (2 * h) - 2 * f * path.alpha_sigma(t)[1] ** 2, rtol=1e-6)
    np.testing.assert_allclose(path.d_log_snr(t), (path.log_snr(t + h) - path.log_snr(t - h)) / (2 * h), rtol=1e-6)
    limits = [float(v) for v in drift_and_diffusion(path, path.noisiest if name == "vp_zero_snr" else 0.0)]
    assert limits == ([-np.inf, np.inf] if name == "vp_zero_snr" else [0.0, 0.0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "noisy", "clean"), [("flow", 1000.0, 0.0), ("mochi", 0.0, 1000.0)])
def test_f_and_g2_of_flow_matching_at_its_ends(name, noisy, clean):
    """f = -1/(1 - u) and g^2 = 2 u/(1 - u) with u = t/T, per unit of t: their limits, without a warning."""
    assert [float(v) for v in drift_and_diffusion(PATHS[name], noisy)] == [-np.inf, np.inf]
    assert [float(v) for v in drift_and_diffusion(PATHS[name], clean)] == [-0.001, 0.0]


@every_path
def test_g2_is_positive(name):
    """Every path of the package is a noising process: g^2 >= 0 and the log-SNR falls with noise (F, setup)."""
    path = PATHS[name]
    assert np.all(drift_and_diffusion(path, inner_times(path))[1] > 0)


class Wavy(VarianceExploding):
    """alpha = 1, sigma = 2 + sin t: denoises half of the time."""

    def __init__(self):
        self.noisiest, self.cleanest = 6.0, 0.0

    def log_snr(self, t):
        return -np.log(2 + np.sin(t))

    def d_log_snr(self, t):
        return -np.cos(t) / (2 + np.sin(t))

    def alpha_sigma(self, t):
        return np.ones_like(np.asarray(t, float)), 2 + np.sin(t)


def test_a_path_with_negative_g2_is_refused():
    """g^2 < 0 is no diffusion (F, setup): refused where sigma falls with t, accepted where it rises."""
    assert drift_and_diffusion(Wavy(), 0.5)[1] == pytest.approx(2 * (2 + np.sin(0.5)) * np.cos(0.5), rel=1e-14)
    with pytest.raises(ValueError, match=r"g\^2 < 0"):
        drift_and_diffusion(Wavy(), 2.0)


@pytest.mark.parametrize(("name", "law"), [("vp_linear", 0), ("vp_laplace", 0), ("edm", 1), ("flow", 2), ("mochi", 2)])
def test_alpha_and_sigma_obey_their_family(name, law):
    """alpha^2 + sigma^2 = 1 (VP), alpha = 1 (VE), alpha + sigma = 1 (flow matching) (Lai et al., chapters 4 and 5)."""
    path = PATHS[name]
    t = np.linspace(path.noisiest, path.cleanest, 200)[1:]
    alpha, sigma = path.alpha_sigma(t)
    np.testing.assert_allclose([alpha**2 + sigma**2, alpha, alpha + sigma][law], 1, rtol=1e-14)
    np.testing.assert_allclose(np.log(alpha) - np.log(sigma), path.log_snr(t), rtol=1e-9, atol=1e-9)


# -- time and log-SNR --


@every_path
@given(u=unit)
def test_log_snr_is_inverted_exactly_by_time(name, u):
    """time(log_snr(t)) = t on the whole training range, fractional times included (Kingma et al. 2021)."""
    path = PATHS[name]
    t = path.noisiest + u * (path.cleanest - path.noisiest)
    scale = max(abs(path.noisiest), abs(path.cleanest))
    assert path.time(path.log_snr(t)) == pytest.approx(t, abs=1e-9 * scale)


@every_path
@given(u=unit)
def test_time_is_inverted_exactly_by_log_snr(name, u):
    """log_snr(time(lambda)) = lambda at every noise level of the training range (Kingma et al. 2021)."""
    path = PATHS[name]
    low, high = (max(float(path.log_snr(t)), -9.0) for t in (path.noisiest, path.cleanest))
    lam = low + u * (high - low)
    assert path.log_snr(path.time(lam)) == pytest.approx(lam, abs=1e-8)


@every_path
@given(u=unit, v=unit)
def test_log_snr_decreases_with_noise(name, u, v):
    """A later time in noise order has a smaller log-SNR: g^2 > 0 integrated (F, setup)."""
    assume(abs(u - v) > 1e-6)
    path = PATHS[name]
    noisier, cleaner = sorted((u, v))
    width = path.cleanest - path.noisiest
    assert path.log_snr(path.noisiest + noisier * width) < path.log_snr(path.noisiest + cleaner * width)


@pytest.mark.parametrize("name", BETA_CONFIGS)
def test_vp_log_snr_is_linear_between_training_times(name):
    """Between integers the log-SNR is interpolated linearly, in the angle next to an infinite end."""
    path = PATHS[f"vp_{name}"]
    k = np.arange(int(path.noisiest))
    left, middle, right = (path.log_snr(k + u) for u in (0.0, 0.5, 1.0))
    finite = np.isfinite(right)
    np.testing.assert_allclose(middle[finite], 0.5 * (left + right)[finite], rtol=1e-12, atol=1e-12)
    assert finite[:-1].all()
    if not finite[-1]:
        angle = np.arctan(np.exp(-middle[-1]))
        assert angle == pytest.approx(0.5 * (np.arctan(np.exp(-left[-1])) + np.pi / 2), abs=1e-14)


def test_limits_are_exact():
    """alpha = 0 and sigma = 0 are reached exactly, with infinite log-SNR (zero terminal SNR, flow matching)."""
    for path in (PATHS["vp_zero_snr"], PATHS["flow"], PATHS["mochi"]):
        assert path.log_snr(path.noisiest) == -np.inf
        assert [float(v) for v in path.alpha_sigma(path.noisiest)] == [0.0, 1.0]
        assert [float(v) for v in path.alpha_sigma_of(np.inf)] == [1.0, 0.0]


# -- the configs of diffusers --

STOCK_BETAS = {
    "linear": (diffusers.DDPMScheduler, LINEAR),
    "scaled_linear": (diffusers.DDPMScheduler, SD),
    "squaredcos_cap_v2": (diffusers.DDPMScheduler, BETA_CONFIGS["squaredcos_cap_v2"]),
    "sigmoid": (diffusers.DDPMScheduler, BETA_CONFIGS["sigmoid"]),
    "laplace": (diffusers.DDPMScheduler, BETA_CONFIGS["laplace"]),
    "trained_betas": (diffusers.DDPMScheduler, BETA_CONFIGS["trained_betas"]),
    "zero_snr": (diffusers.DDIMScheduler, BETA_CONFIGS["zero_snr"]),
    "snr_shift": (diffusers.CogVideoXDDIMScheduler, BETA_CONFIGS["snr_shift"]),
    "snr_shift_zero_snr": (diffusers.CogVideoXDDIMScheduler, BETA_CONFIGS["snr_shift_zero_snr"]),
}


def assert_product_of(alphas_cumprod, betas):
    """Equal to prod(1 - beta) up to the float32 rounding of each beta."""
    betas = betas.double().numpy()
    relative = np.abs(alphas_cumprod / np.cumprod(1 - betas) - 1)
    assert np.all(relative <= 2**-22 * np.cumsum(betas / (1 - betas)) + 1e-12)


@pytest.mark.parametrize("name", STOCK_BETAS)
def test_betas_are_those_of_diffusers(name):
    """alphas_cumprod of every beta schedule equals that of diffusers' own class up to its float32 arithmetic."""
    cls, config = STOCK_BETAS[name]
    stock = cls(**config)
    ours = alphas_cumprod_from_config(config)
    np.testing.assert_allclose(ours, stock.alphas_cumprod.double().numpy(), rtol=3e-5, atol=1e-9)
    if "shift" not in name and "zero" not in name:  # without float32's cumulative product, only its betas
        assert_product_of(ours, stock.betas)


def test_exp_betas_are_those_of_diffusers():
    """The ``exp`` schedule exists in diffusers as an alpha_bar transform only: equal to it."""
    betas = betas_for_alpha_bar(1000, alpha_transform_type="exp")
    assert_product_of(alphas_cumprod_from_config(BETA_CONFIGS["exp"]), betas)


FLOW_CONFIGS = [
    ({"shift": 1.0}, None),
    ({"shift": 3.0}, None),
    ({"shift": 0.4}, None),
    ({"shift": 3.0, "shift_terminal": 0.1}, None),
    ({"use_dynamic_shifting": True}, 1.15),
    ({"use_dynamic_shifting": True, "shift": 3.0}, 0.5),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 1.7),
    ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 0.9),
]


@pytest.mark.parametrize(("config", "mu"), FLOW_CONFIGS)
def test_flow_shift_of_given_sigmas_is_that_of_diffusers(config, mu):
    """Static and dynamic shift, exponential and linear, the stretch to shift_terminal (arXiv:2403.03206, eq. 23)."""
    sigmas = np.linspace(1, 1 / 12, 12).tolist()
    stock = diffusers.FlowMatchEulerDiscreteScheduler(**config)
    stock.set_timesteps(sigmas=sigmas, mu=mu)
    ours = ProbabilityFlowScheduler.from_config(stock.config)
    ours.set_timesteps(sigmas=sigmas, mu=mu)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=0, atol=2e-7)
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=0, atol=2e-4)


def test_flow_shift_is_applied_once():
    """FlowMatchEuler shifts its default grid twice at the clean end (diffusers issue 13243); here it is once."""
    shift, n = 3.0, 10
    stock = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    stock.set_timesteps(n)
    ours = ProbabilityFlowScheduler.from_config(stock.config, timestep_spacing="linspace")
    ours.set_timesteps(n)

    def once(u):
        return shift * u / (1 + (shift - 1) * u)

    np.testing.assert_allclose(ours.sigmas[:-1], once(np.linspace(1, 1e-3, n)), rtol=1e-6)
    assert float(ours.sigmas[-2]) == pytest.approx(once(1e-3), rel=1e-6)
    assert float(stock.sigmas[-2]) == pytest.approx(once(once(1e-3)), rel=1e-5)


def test_dynamic_shift_needs_mu():
    """Dynamic shifting without mu is refused in one sentence that names the remedy."""
    scheduler = ProbabilityFlowScheduler(use_flow_sigmas=True, use_dynamic_shifting=True)
    with pytest.raises(ValueError, match="pass `mu` to set_timesteps"):
        scheduler.set_timesteps(4)


def test_invert_sigmas_labels_are_those_of_mochi():
    """Mochi's inverted flow: labels 1 - sigma ending at 1, times 1000 (1 - sigma), the same process underneath."""
    sigmas = np.linspace(1, 0.1, 10).tolist()
    stock = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    stock.set_timesteps(sigmas=sigmas)
    ours = ProbabilityFlowScheduler.from_config(stock.config)
    ours.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(ours.sigmas, stock.sigmas, rtol=0, atol=2e-7)
    torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=0, atol=2e-4)
    times = np.array([0.0, 250.0, 900.0])
    np.testing.assert_allclose(PATHS["mochi"].log_snr(times), PATHS["flow"].log_snr(1000 - times), rtol=1e-12)


# -- predictions --

level = st.floats(0.02, 50.0)
kinds = st.sampled_from(PREDICTION_TYPES)


@given(alpha=level, sigma=level, source=kinds, target=kinds, x0=st.floats(-3, 3), eps=st.floats(-3, 3))
def test_every_prediction_converts_to_every_other(alpha, sigma, source, target, x0, eps):
    """eps, x0, v, flow velocity and score are A x0 + B eps; one 2x2 inverse converts them (Lai et al., chapter 6)."""
    x = alpha * x0 + sigma * eps
    own, other = (prediction_coefficients(kind, alpha, sigma) for kind in (source, target))
    k_x, k_m = convert(own, other, alpha, sigma)
    said, wanted = (a * x0 + b * eps for a, b in (own, other))
    # an error in the last digit of the input, amplified by the conversion, is all that may be left
    slack = abs(k_x * alpha * x0) + abs(k_x * sigma * eps) + abs(k_m * own[0] * x0) + abs(k_m * own[1] * eps)
    assert k_x * x + k_m * said == pytest.approx(wanted, abs=1e-13 * slack + 1e-300)


@given(alpha=level, sigma=level, source=kinds, target=kinds)
def test_losses_of_all_predictions_differ_by_a_weight_only(alpha, sigma, source, target):
    """|error of target| = |k_m| |error of source|, so every loss is a weighted eps loss: x0 by sigma/alpha, score by
    1/sigma, v by 1/alpha for VP (Lai et al., chapter 6)."""
    eps = (0.0, 1.0)
    k = [convert(eps, prediction_coefficients(kind, alpha, sigma), alpha, sigma)[1] for kind in (source, target)]
    known = {
        "epsilon": 1.0,
        "sample": -sigma / alpha,
        "score": -1 / sigma,
        "v_prediction": (alpha**2 + sigma**2) / alpha,
        "flow_prediction": (alpha + sigma) / alpha,
    }
    assert k[0] == pytest.approx(known[source], rel=1e-12)
    own, other = (prediction_coefficients(kind, alpha, sigma) for kind in (source, target))
    assert convert(own, other, alpha, sigma)[1] == pytest.approx(k[1] / k[0], rel=1e-9)


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "flow_prediction"])
def test_predictions_stay_finite_at_pure_noise(kind):
    """At alpha = 0 all but eps and score still determine x0 (zero terminal SNR, arXiv:2305.08891)."""
    k_x, k_m = convert(prediction_coefficients(kind, 0.0, 1.0), (1.0, 0.0), 0.0, 1.0)
    x0, eps = 0.7, -1.3
    a, b = prediction_coefficients(kind, 0.0, 1.0)
    assert k_x * eps + k_m * (a * x0 + b * eps) == pytest.approx(x0, abs=1e-15)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
def test_predictions_stay_finite_at_clean_data(kind):
    """At sigma = 0 all but x0 and score still determine the noise."""
    k_x, k_m = convert(prediction_coefficients(kind, 1.0, 0.0), (0.0, 1.0), 1.0, 0.0)
    a, b = prediction_coefficients(kind, 1.0, 0.0)
    assert k_x * 0.7 + k_m * (a * 0.7 + b * -1.3) == pytest.approx(-1.3, abs=1e-15)


def test_predictions_without_information_are_refused():
    """eps at alpha = 0, x0 at sigma = 0 and the score at sigma = 0 say nothing: an error that names the remedy."""
    with pytest.raises(ValueError, match="use v_prediction, flow_prediction or sample"):
        convert((0.0, 1.0), (1.0, 0.0), 0.0, 1.0)
    with pytest.raises(ValueError, match="sample prediction a positive noise level"):
        convert((1.0, 0.0), (0.0, 1.0), 1.0, 0.0)
    with pytest.raises(ValueError, match="stop at a positive noise level"):
        prediction_coefficients("score", 1.0, 0.0)
    with pytest.raises(ValueError, match="use one of epsilon, sample"):
        prediction_coefficients("velocity", 1.0, 0.5)


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_an_output_with_variances_starts_with_the_prediction(variance_type):
    """The first C of 2C channels (Nichol & Dhariwal 2021, section 3.1)."""
    output = torch.arange(2 * 6 * 4).reshape(2, 6, 2, 2)
    torch.testing.assert_close(split_variance(output, torch.zeros(2, 3, 2, 2), variance_type), output[:, :3])


@pytest.mark.parametrize("shape", [(2, 4, 2, 2), (3, 6, 2, 2), (2, 6, 2, 4), (4, 3, 2, 2), (2, 3, 2, 2)])
def test_an_output_that_does_not_fit_the_sample_is_refused(shape):
    """Only the doubled channels of the sample's own shape hold variances."""
    with pytest.raises(ValueError, match=r"must agree\.$"):
        split_variance(torch.zeros(shape), torch.zeros(2, 3, 2, 2), "learned_range")
    with pytest.raises(ValueError, match=r"must agree\.$"):
        split_variance(torch.zeros(4), torch.zeros(2), "learned_range")
    with pytest.raises(ValueError, match=r"set variance_type='learned_range'\)\.$"):
        split_variance(torch.zeros(2, 6, 2, 2), torch.zeros(2, 3, 2, 2), "fixed_small")


@given(sigma=level, x0=st.floats(-3, 3), eps=st.floats(-3, 3))
def test_edm_preconditioning(sigma, x0, eps):
    """D = c_skip x + c_out F with c_skip = sd^2/r^2, c_out = sigma sd/r (Karras et al. 2022, table 1; P D.6)."""
    path, x = PATHS["edm"], x0 + sigma * eps
    a, b = model_coefficients(path, "epsilon", 1.0, sigma)
    r2, sd = path.sigma_data**2 + sigma**2, path.sigma_data
    assert sd**2 / r2 * x + sigma * sd / r2**0.5 * (a * x0 + b * eps) == pytest.approx(x0, abs=1e-12 * (1 + abs(x)))


def drawn_by(scheduler, process, kind, noise):
    """Samples of the mixture seen as a network of this prediction type."""
    network = mixture(**process, prediction_type=kind)
    return sample(lambda x, t: network(x, t).sample, scheduler, noise)


@pytest.mark.parametrize("process", [LINEAR, {"use_flow_sigmas": True}], ids=["vp", "flow"])
def test_prediction_types_are_interchangeable(process):
    """One denoiser said as eps, x0, v, flow velocity or score gives the same samples (Lai et al., chapter 6)."""
    noise, results = noise_like(16)[:, None, None], {}
    for kind in PREDICTION_TYPES:
        if process.get("use_flow_sigmas") and kind in ("epsilon", "score"):
            continue  # without information at sigma = 1, where this run starts
        scheduler = ProbabilityFlowScheduler(**process, prediction_type=kind, grid="trailing")
        scheduler.set_timesteps(8)  # its times are exact in float32
        results[kind] = drawn_by(scheduler, process, kind, noise)
    assert len(results) >= 3
    for left, right in itertools.combinations(results.values(), 2):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-9)
    assert float(left.std()) > 0.5


def test_prediction_types_are_interchangeable_below_pure_noise():
    """The same for eps and score on a flow path that starts just below sigma = 1 (Lai et al., chapter 6)."""
    process, noise, results = {"use_flow_sigmas": True}, noise_like(16)[:, None, None], []
    for kind in PREDICTION_TYPES:
        scheduler = ProbabilityFlowScheduler(**process, prediction_type=kind)
        scheduler.set_timesteps(timesteps=[875.0, 750.0, 500.0, 250.0, 125.0])
        results.append(drawn_by(scheduler, process, kind, noise))
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=0, atol=1e-9)


# -- discrete kernels --


@st.composite
def level_pairs(draw):
    """Two points of one path, noisier first."""
    path = PATHS[draw(st.sampled_from(list(SMOOTH)))]
    low, high = (max(float(path.log_snr(t)), -5.0) for t in (path.noisiest, path.cleanest))
    start, step = draw(st.floats(low, high - 0.02)), draw(st.floats(0.01, 1.0))
    return path, start, min(start + step, high)


def chain(path: Path, start: float, end: float):
    """a_{k+1}, sigma_{k+1}, a_k, sigma_k, alpha_k, eta_k of Lu, chapter 5."""
    (a1, s1), (a0, s0) = (tuple(float(v) for v in path.alpha_sigma_of(lam)) for lam in (start, end))
    return a1, s1, a0, s0, a1 / a0, s1**2 / (a1 / a0) ** 2 - s0**2


@given(pair=level_pairs())
def test_exact_bayes_kernel_is_the_order_one_row(pair):
    """p(x_k | x_{k+1}, x_0) is the row of order 1, data_std 0, tau 1 with D = x_0 (Lu, chapter 5; Ho et al.
    2020, eq. 6-7)."""
    path, start, end = pair
    a1, s1, a0, s0, alpha_k, _ = chain(path, start, end)
    # Given x_0, (x_k, x_{k+1}) is Gaussian with covariance alpha_k s0^2: condition the one on the other.
    gain = alpha_k * s0**2 / s1**2
    variance = s0**2 * (s1**2 - alpha_k**2 * s0**2) / s1**2
    row = build_multistep(path, nodes_of(path, [start, end]), order=1, tau=1.0).rows[0]
    assert row.a == pytest.approx(gain, rel=1e-9)
    assert row.b[0] == pytest.approx(a0 - gain * a1, rel=1e-9, abs=1e-12)
    assert row.c == pytest.approx(variance**0.5, rel=1e-7, abs=1e-12)


@given(pair=level_pairs(), x=st.floats(-3, 3), score=st.floats(-3, 3))
def test_gaussian_update_has_the_mean_of_the_bayes_kernel(pair, x, score):
    """N(x'/alpha_k + alpha_k eta_k s, eta_k): its mean is the order-1 row with D from Tweedie's formula
    (Lu, chapter 5)."""
    path, start, end = pair
    a1, s1, _, _, alpha_k, eta_k = chain(path, start, end)
    row = build_multistep(path, nodes_of(path, [start, end]), order=1, tau=1.0).rows[0]
    denoised = (x + s1**2 * score) / a1
    expected = x / alpha_k + alpha_k * eta_k * score
    assert row.a * x + row.b[0] * denoised == pytest.approx(expected, rel=1e-8, abs=1e-9 * (1 + abs(denoised)))


@given(pair=level_pairs())
def test_gaussian_update_has_the_upper_variance(pair):
    """eta_k is the variance under a flat prior: it is the noise of the noise-prediction SDE (data_std = inf), above the
    posterior variance of x_k, which it bounds for every data distribution (Lu, chapter 5)."""
    path, start, end = pair
    _, _, _, _, _, eta_k = chain(path, start, end)
    points = [Point(*(float(v) for v in path.alpha_sigma_of(lam))) for lam in (start, end)]
    upper = linear_coefficients(*points, float("inf"), 1.0)[1] ** 2
    lower = linear_coefficients(*points, 0.0, 1.0)[1] ** 2
    assert upper == pytest.approx(eta_k, rel=1e-8, abs=1e-13)
    for std in (0.1, 1.0, 10.0):  # Var(x_k | x_{k+1}) for N(0, std^2) data lies between, and grows with std
        joint = linear_coefficients(*points, std, 1.0)[1] ** 2
        assert lower <= joint * (1 + 1e-9)
        assert joint <= upper * (1 + 1e-9)
        lower = joint


def test_fixed_large_variance_is_that_of_ddpm():
    """variance_type fixed_large is beta_t = alpha_k^2 eta_k, the exact variance for unit Gaussian data under VP
    (Ho et al. 2020, section 3.2), and that of diffusers' class."""
    stock = diffusers.DDPMScheduler(**LINEAR, variance_type="fixed_large", clip_sample=False)
    stock.set_timesteps(20)
    ours = ReverseSDEScheduler.from_config(stock.config, solver_order=1, corrector=False)
    ours.set_timesteps(timesteps=stock.timesteps)
    nodes = nodes_of(PATHS["vp_linear"], PATHS["vp_linear"].log_snr(stock.timesteps.numpy()), clean=True)
    x = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    stds = [ours.step(x, t, x).noise_std for t in ours.timesteps]
    expected = [float(stock._get_variance(int(t))) ** 0.5 for t in stock.timesteps[:-1]]
    np.testing.assert_allclose(stds[:-1], expected, rtol=1e-4)  # 1 - a ratio of float32 numbers
    assert stds[-1] == 0
    points = [Point(float(a), float(s)) for a, s in zip(nodes.alpha, nodes.sigma, strict=True)]
    exact = [linear_coefficients(p, q, 1.0, 1.0)[1] for p, q in itertools.pairwise(points)]
    np.testing.assert_allclose(stds[:-1], exact[:-1], rtol=1e-7)


# -- affine equivalence --


@pytest.mark.parametrize("clock", ["log_snr", "sigma", "angle"])
@pytest.mark.parametrize("tau", [0.0, 0.8])
@pytest.mark.parametrize("data_std", [0.0, 0.7, float("inf")])
def test_affine_flows_are_equivalent(clock, tau, data_std):
    """VP, VE and flow matching samplers of one denoiser agree on corresponding nodes, up to the scale alpha (Lai
    et al., chapter 6)."""
    log_snr = np.linspace(-3, 3, 9)
    noise, start = noise_like(9, seed=1, dim=24).reshape(9, 8, 3), noise_like(8)
    results = []
    for name in ("vp_linear", "edm", "flow"):
        nodes = nodes_of(PATHS[name], log_snr, clean=True)
        table = build_multistep(
            PATHS[name], nodes, order=3, corrector=True, data_std=data_std, clock=clock, tau=tau, final="denoise"
        )
        x = run_table(table, mixture_denoiser(), start * nodes.alpha[0] * np.exp(3), lambda i: noise[i], states=True)
        results.append([v / a for v, a in zip(x, nodes.alpha[1:], strict=True)])
    for other in results[1:]:
        for left, right in zip(results[0], other, strict=True):
            torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_flow_matching_rejects_impossible_options():
    """A shift that is not positive or a shift type that does not exist is refused."""
    with pytest.raises(ValueError, match="shift must be positive"):
        FlowMatching(shift=0.0)
    with pytest.raises(ValueError, match="'exponential' or 'linear'"):
        FlowMatching(time_shift_type="cubic")
