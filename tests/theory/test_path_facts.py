"""A path owns the facts of its family: what diffusers' own classes do for it, and a fourth family in one class."""

import math

import diffusers
import numpy as np
import pytest
import torch
from helpers import PATHS

from diffusers_sde.defaults import measured_defaults
from diffusers_sde.grids import nodes_from_times
from diffusers_sde.named_grids import GRIDS, make_grid
from diffusers_sde.paths import FlowMatching, Path, VarianceExploding, VariancePreserving
from diffusers_sde.prediction import model_coefficients, prediction_coefficients
from diffusers_sde.tables import build_multistep

EDM = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)


@pytest.mark.parametrize("name", PATHS)
def test_levels_on_a_device_are_those_of_the_host(name):
    """At integers and between them, both ends included: the same rule, in float32."""
    path = PATHS[name]
    times = np.concatenate([np.linspace(path.cleanest, path.noisiest, 401), [path.noisiest, path.cleanest]])
    times = np.float32(times).astype(np.float64)
    for device, host in zip(path.alpha_sigma_on_device(torch.from_numpy(times)), path.alpha_sigma(times), strict=True):
        np.testing.assert_allclose(device.double().numpy(), host, rtol=4e-5, atol=1e-7)


def test_input_and_start_are_scaled_as_diffusers_does():
    """EDM: x / sqrt(sigma^2 + sigma_data^2) into the network, and a start that is noised data; else 1."""
    path = PATHS["edm"]
    assert path.start_scale == pytest.approx(math.hypot(80, 0.5), rel=1e-12)
    expected = float(EDM.precondition_inputs(torch.ones(1, dtype=torch.float64), torch.tensor([3.0]).double()))
    assert path.input_scale(3.0) == pytest.approx(expected, rel=1e-12)
    assert float(path.input_scale(torch.tensor([3.0]).double())) == pytest.approx(expected, rel=1e-12)
    assert PATHS["flow"].input_scale(0.3) == PATHS["vp_linear"].start_scale == 1


def test_edm_output_is_preconditioned_as_diffusers_does():
    """D = c_skip x + c_out F of Karras et al. 2022, table 1, at the state of a known x_0 and noise."""
    x0, noise, sigma = 0.7, -1.3, 2.5
    a, b = model_coefficients(PATHS["edm"], "epsilon", 1.0, sigma)
    x, output = torch.tensor([x0 + sigma * noise]), torch.tensor([a * x0 + b * noise])
    denoised = EDM.precondition_outputs(x, output, torch.tensor([sigma]))
    assert float(denoised) == pytest.approx(x0, rel=1e-5)


@pytest.mark.parametrize("conditioning", ["log", "atan"])
def test_the_training_range_of_edm_is_from_sigma_min_to_sigma_max(conditioning):
    path = VarianceExploding(0.01, 50.0, 0.5, conditioning)
    levels = path.alpha_sigma(np.array([path.cleanest, path.noisiest]))[1]
    np.testing.assert_allclose(levels, [0.01, 50.0], rtol=1e-12)
    assert path.grid_range == (path.noisiest, path.cleanest, path.cleanest)


def test_mochi_says_the_velocity_towards_data():
    """x_0 - eps, minus what other flow models say; its other predictions are everybody's."""
    assert model_coefficients(PATHS["mochi"], "flow_prediction", 0.3, 0.7) == (1.0, -1.0)
    assert model_coefficients(PATHS["flow"], "flow_prediction", 0.3, 0.7) == (-1.0, 1.0)
    assert model_coefficients(PATHS["mochi"], "v_prediction", 0.3, 0.7) == (-0.7, 0.3)


def test_habits_of_pipelines():
    """What pipelines pass as sigmas whatever the user wants: the ramps of flow and EDM pipelines."""
    np.testing.assert_allclose(PATHS["flow"].habitual_sigmas(4), [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(PATHS["edm"].habitual_sigmas(3), [0, 0.5, 1])
    assert PATHS["vp_linear"].habitual_sigmas(4) is None
    assert PATHS["edm"].is_sigma_ramp(np.array([0, 0.5, 1])) and not PATHS["flow"].is_sigma_ramp(np.array([0, 1]))


@pytest.mark.parametrize("name", PATHS)
def test_a_label_is_read_back(name):
    """What ``scheduler.sigmas`` shows for a level names that level: sigma/alpha, sigma, and Mochi's 1 - sigma."""
    path = PATHS[name]
    log_snr = np.array([-2.0, 0.3, 3.0])
    alpha, sigma = path.alpha_sigma_of(log_snr)
    flow = {"mochi": alpha}.get(name, sigma)
    np.testing.assert_allclose(path.sigma_label(alpha, sigma), flow if path.time_is_noise else sigma / alpha)
    np.testing.assert_allclose(path.log_snr_of_label(path.sigma_label(alpha, sigma)), log_snr, rtol=1e-9)


def test_ramps_of_noise_run_in_sigma_or_in_its_ratio_to_alpha():
    """Flow matching: sigma, or sigma / (1 - sigma) as for EDM, over the training range of sigma."""
    ratio = FlowMatching(sigma_range=(0.02, 0.9), ramps_in_ratio=True)
    assert ratio.noise_range() == pytest.approx((1 / 49, 9), rel=1e-12)
    np.testing.assert_allclose(ratio.times_of_noise(np.array([9, 1, 0.25])), [900, 500, 200], rtol=1e-12)
    plain = FlowMatching(sigma_range=(0.02, 0.9))
    assert plain.noise_range() == (0.02, 0.9)
    np.testing.assert_allclose(plain.times_of_noise(np.array([0.9, 0.02])), [900, 20], rtol=1e-12)


@pytest.mark.parametrize("name", ["edm", "ve_atan", "flow", "flow_shift", "mochi"])
def test_training_times_have_the_density_they_name(name):
    """From the cleanest to the noisiest time, with |d fraction / d log_snr| the inverse of the derivative."""
    path, u, h = PATHS[name], np.linspace(0.05, 0.95, 7), 1e-6
    density = path.training_times(u)[1]
    cleaner, noisier = (path.log_snr(path.training_times(v)[0]) for v in (u - h, u + h))
    np.testing.assert_allclose(density * (cleaner - noisier) / (2 * h), 1, rtol=1e-6)
    np.testing.assert_allclose(path.training_times(np.array([0.0, 1.0]))[0], [path.cleanest, path.noisiest], rtol=1e-9)


def test_flow_training_goes_through_the_shift():
    """sigma = s u / (1 + (s - 1) u) at s = 3 (Esser et al. 2024, eq. 23), here of the range 1/1000 to 1; a dynamic
    shift, where it is known, is the static one of e^mu, or of mu if it is linear."""
    u = np.array([0.25, 0.5])
    shifted = 1 + 999 * np.array([0.75 / 1.5, 1.5 / 2])
    np.testing.assert_allclose(PATHS["flow_shift"].training_times(u)[0], shifted, rtol=1e-12)
    for kind, mu in (("exponential", np.log(3.0)), ("linear", 3.0)):
        dynamic = FlowMatching(shift=5.0, use_dynamic_shifting=True, time_shift_type=kind)
        np.testing.assert_allclose(dynamic.training_times(u)[0], 1 + 999 * u, rtol=1e-12)
        for found, expected in zip(dynamic.training_times(u, mu), PATHS["flow_shift"].training_times(u), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-12)


class Trigonometric(Path):
    """``alpha = cos t``, ``sigma = sin t`` (TrigFlow): a fourth family is one class."""

    family = "trigonometric"
    noisiest, cleanest = math.pi / 2 - 0.01, 0.002
    grid_range = (noisiest, cleanest, 0.0)

    def log_snr(self, t):
        return -np.log(np.tan(np.asarray(t, float)))

    def time(self, log_snr):
        return np.arctan(np.exp(-np.asarray(log_snr, float)))

    def alpha_sigma_of(self, log_snr):
        return np.cos(self.time(log_snr)), np.sin(self.time(log_snr))

    def d_log_snr(self, t):
        return -2 / np.sin(2 * np.asarray(t, float))

    def d_log_alpha(self, t):
        return -np.tan(np.asarray(t, float))


@pytest.mark.parametrize("grid", GRIDS)
def test_a_fourth_family_has_every_grid(grid):
    """From its noisiest time down, strictly, without a line anywhere else."""
    path = Trigonometric()
    times = make_grid(path, grid, 7)
    assert times[0] == path.noisiest and np.all(np.diff(times) < 0) and times[-1] >= path.cleanest
    alpha, sigma = path.alpha_sigma(times)
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-12)


def test_a_fourth_family_is_sampled_by_the_measured_defaults():
    """Data N(0, 1): x_0 = x_T cos-sin exactly, and the defaults' table reproduces it (data_std = 1 is exact there)."""
    path = Trigonometric()
    default = measured_defaults(path, 6)
    nodes = nodes_from_times(path, make_grid(path, default.grid, 6, rho=default.rho))
    table = build_multistep(path, nodes, data_std=default.data_std, clock=default.clock, final="exact")
    assert model_coefficients(path, "v_prediction", 0.6, 0.8) == prediction_coefficients("v_prediction", 0.6, 0.8)
    state = 1.0
    for row in table.rows:  # F of N(0, 1) data is 0
        state *= row.a
    assert state == pytest.approx(1.0, rel=1e-12)


def test_a_flow_has_no_shift_unless_asked_for() -> None:
    assert FlowMatching().alpha_sigma(500.0) == (0.5, 0.5)


def test_a_table_that_ends_below_zero_is_refused() -> None:
    """The last entry alone: alpha_bar is a square."""
    with pytest.raises(ValueError, match="alphas_cumprod"):
        VariancePreserving(np.array([0.9, 0.5, 0.1, -0.1]))


def test_the_slope_of_the_log_snr_is_float64_whatever_the_times_are() -> None:
    path = VariancePreserving(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    times = np.array([3, 250, 700])
    exact = path.d_log_snr(times.astype(np.float64))
    for kind in (np.int64, np.float32):
        found = path.d_log_snr(times.astype(kind))
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found, exact)
