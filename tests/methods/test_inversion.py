"""pipelines/inversion.py and methods/inversion.py: the way to noise, and the way back."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from pipeline_parts import PROCESSES, bars_of, ddpm, oracle, save_oracle, tiny_unet, tiny_vae
from snippets import load, run
from stated import stated

from diffusers_sde.assets import FASHION_MODEL, load_fashion_model
from diffusers_sde.configs import path_from_config
from diffusers_sde.methods.fields import network_field
from diffusers_sde.methods.inversion import Trajectory, inversion_points, multistep, reversible, slerp
from diffusers_sde.named_grids import make_grid
from diffusers_sde.weights import Point


def relative(a, b):
    return float((a - b).double().norm() / b.double().norm())


def field_of(process, labels=None):
    """An oracle's field; an EDM network is shown the scaled state, the oracle wants the state."""
    model, scheduler = oracle(process)
    field = network_field(model, scheduler.config, labels)
    if process == "edm":
        shown = field.denoiser
        scale = lambda t: math.hypot(field.path.alpha_sigma(t)[1], field.path.sigma_data)  # noqa: E731
        field = replace(field, denoiser=lambda x, t: shown(x * scale(t), t))
    return model, field


def start_at(field, x, steps, dtype=torch.float64):
    points = inversion_points(field.path, steps)
    return Trajectory((points[0].alpha * x).to(dtype), None, (points[0],)), points


def test_a_network_is_given_the_exact_time():
    """Between the integers too: UNet2DModel takes 123.75 in a tensor for what it is, and in a Python float for 123."""
    network, x = tiny_unet(), torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    field = network_field(network, ddpm().config)
    point = Point(*(float(v) for v in field.path.alpha_sigma(123.75)))
    with torch.no_grad():
        found, exact, cut = field.output(x, point), network(x, torch.tensor(123.75)).sample, network(x, 123.75).sample
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)
    assert (exact - cut).abs().max() > 1e-4


@pytest.mark.parametrize("steps", [3, 20, 50])
@pytest.mark.parametrize("process", PROCESSES)
def test_the_leapfrog_retraces_itself_in_float32(process, steps):
    """Round trip <= 1e-5 with state and network in float32, at any number of steps (1e-13 with a float64 state)."""
    model, field = field_of(process)
    x = model.sample(64, torch.Generator().manual_seed(0))
    for dtype, bound in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        start, points = start_at(field, x, steps, dtype)
        there = reversible(field, start, points)
        back = reversible(field, there, points[::-1])
        assert back.state.dtype == dtype
        assert relative(back.state, start.state) <= bound


def test_ddim_inversion_does_not():
    """The same toy, 50 steps: DDIMInverseScheduler and DDIM lose 7 %, the leapfrog with as many evaluations nothing."""
    model, field = field_of("vp")
    x = model.sample(64, torch.Generator().manual_seed(0)).float()
    inverse, forward = DDIMInverseScheduler(clip_sample=False), DDIMScheduler(clip_sample=False)
    state = x
    for scheduler in (inverse, forward):
        scheduler.set_timesteps(50)
        for t in scheduler.timesteps:
            state = scheduler.step(model(state, t, return_dict=False)[0], t, state, return_dict=False)[0]
    start, points = start_at(field, x, 50, torch.float32)
    back = reversible(field, reversible(field, start, points), points[::-1])
    assert relative(state, x) == pytest.approx(0.071, abs=5e-4)
    assert relative(back.state, start.state) < 1e-7
    stated("round trip below 1e-7 in float32, DDIM inversion .071 on the same mixture")


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_it_is_exact_on_the_embedded_network_with_and_without_guidance(scale):
    """Float32 network, pair kept in float64: <= 1e-5 (rounding of the network is the same on the way back)."""
    pipe = load_fashion_model()
    labels = torch.tensor([1, 9])
    field = network_field(pipe.unet, pipe.scheduler.config, labels, scale)
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        start, points = start_at(field, x, 6)
        back = reversible(field, reversible(field, start, points), points[::-1])
    assert relative(back.state, start.state) <= 1e-5


def uniform_points(path, steps):
    """Nodes at equal steps of ``log tan(theta/2)``, ``theta = atan2(sigma, alpha)``: a grid that can be refined."""
    ends = [math.log(math.tan(math.atan2(s, a) / 2)) for a, s in map(path.alpha_sigma, (path.cleanest, path.noisiest))]
    angles = 2 * np.arctan(np.exp(np.linspace(*ends, steps + 1)))
    with np.errstate(divide="ignore"):
        log_snr = np.log(np.cos(angles).round(15)) - np.log(np.sin(angles))
    return [Point(float(a), float(s)) for a, s in zip(*path.alpha_sigma_of(log_snr), strict=True)]


def component(process):
    """``(field, at)`` of one Gaussian component, ``at(point)`` a trajectory of its ODE: ``(x_t - alpha m) / std_t``
    is constant."""
    model, field = field_of(process, torch.zeros(16, dtype=torch.long))
    mean, variance = model.mixture.means[0], model.covariances[0].diagonal()
    w = torch.randn(16, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def at(point):
        spread = (point.alpha**2 * variance + point.sigma**2).sqrt()
        return (point.alpha * mean + w * spread).reshape(16, 1, 1, 4)

    return replace(field, dtype=torch.float64), at


@pytest.mark.parametrize("process", PROCESSES)
def test_both_methods_converge_to_the_exact_ode(process):
    """On one Gaussian component errors fall with order 2 or more."""
    field, at = component(process)
    for method in (reversible, multistep):
        errors = []
        for steps in (50, 100, 200):
            points = uniform_points(field.path, steps)
            end = method(field, Trajectory(at(points[0]), None, (points[0],)), points)
            errors.append(relative(end.state, at(points[-1])))
        assert errors[-1] < 5e-3
        assert math.log2(errors[0] / errors[2]) > 2 * 1.7


def test_editing_swaps_the_component(tmp_path):
    """Inverted as component 0, generated as component 1: the optimal map between the two Gaussians,
    ``m_1 + C_1^(1/2) C_0^(-1/2) (x - m_0)`` for commuting covariances."""
    model = save_oracle(tmp_path)
    pipe = load("inversion", tmp_path)
    w = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    source, target = (
        (model.mixture.means[k] + w * model.covariances[k].diagonal().sqrt()).reshape(8, 1, 1, 4) for k in (0, 1)
    )
    for method in ("exact", "ode"):
        out = pipe(source, 0, target_labels=1, num_inference_steps=200, method=method, output_type="latent")
        assert relative(out.images, target) < 1e-2
    assert out.companion is None and relative(out.latents.flatten(1), w) < 1e-2


@given(st.integers(0, 100), st.floats(0, 1))
def test_slerp_keeps_norms_between_the_ends(seed, weight):
    """Norms are interpolated, ends are ends, and equal samples stay."""
    g = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, 3, 2, 5, dtype=torch.float64, generator=g)
    middle = slerp(a, b, weight)
    norms = [v.flatten(1).norm(dim=1) for v in (a, b, middle)]
    torch.testing.assert_close(norms[2], (1 - weight) * norms[0] + weight * norms[1])
    torch.testing.assert_close(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    torch.testing.assert_close(slerp(a, a, weight), a)


@pytest.mark.parametrize("method", ["exact", "ode"])
def test_the_progress_bars_count_the_evaluations(method, tmp_path):
    """Of both ways: the exact method's first step takes two of them, its way back one less than it has steps."""
    model = save_oracle(tmp_path)
    pipe = load("inversion", tmp_path)
    bars = bars_of(pipe)
    pipe(model.sample(1), num_inference_steps=6, method=method, output_type="latent")
    assert [bar.n for bar in bars] == [bar.total for bar in bars] == ([7, 5] if method == "exact" else [6, 6])


def test_interpolation_ends_at_the_two_pictures(tmp_path):
    """The first and last of the pictures are the given ones."""
    model = save_oracle(tmp_path, "flow")
    pipe = load("inversion", tmp_path)
    first, last = model.sample(2, torch.Generator().manual_seed(3)).split(1)
    out = pipe.interpolate(first, last, num_images=5, num_inference_steps=10, output_type="latent")
    assert out.images.shape == (5, 1, 1, 4)
    assert relative(out.images[[0, -1]], torch.cat([first, last])) < 1e-12


def test_foreign_schedulers_latents_and_half_precision():
    """A stock scheduler's process is enough; with an autoencoder the state is its latent; a bfloat16 network is undone
    exactly too."""
    pipe_class = type(load("inversion", FASHION_MODEL))
    pipe = pipe_class(unet=tiny_unet(channels=4).bfloat16(), scheduler=ddpm(), vae=tiny_vae())
    pipe.set_progress_bar_config(disable=True)
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    out = pipe(x, num_inference_steps=5, output_type="latent")
    assert out.images.shape == (2, 4, 8, 8)
    assert relative(out.images, pipe(x, num_inference_steps=2, output_type="latent").images) < 1e-5
    images = pipe(x, num_inference_steps=5, output_type="pil").images
    assert images[0].size == (16, 16)
    assert pipe(images, num_inference_steps=3, output_type="latent").latents.shape == (2, 4, 8, 8)


def test_a_row_may_read_fewer_evaluations_than_are_kept():
    """A step far longer than the one before it reads one, the next ones again as many as they have."""
    field, at = component("flow")
    levels = field.path.alpha_sigma_of(np.array([-2, -1.999, -1.7, -1.68, -1.66, -1.6]))
    points = [Point(float(a), float(s)) for a, s in zip(*levels, strict=True)]
    end = multistep(field, Trajectory(at(points[0]), None, (points[0],)), points, order=4)
    assert relative(end.state, at(points[-1])) < 0.02


def test_inversion_runs_along_the_balanced_grid_the_other_way():
    """At rho = 1.1, from the smallest noise of the training."""
    path = path_from_config(ddpm().config)
    times = [*make_grid(path, "balanced", 12, rho=1.1), path.cleanest]
    found = [point.log_snr for point in inversion_points(path, 12)]
    np.testing.assert_allclose(found, sorted(path.log_snr(np.array(times)), reverse=True), rtol=1e-9)


def test_strength_stops_early():
    """``strength`` runs the first part of the grid only."""
    path = path_from_config(ddpm().config)
    whole, half = inversion_points(path, 20), inversion_points(path, 20, 0.5)
    assert half == whole[:11] and whole[0].alpha > 0.99 and whole[-1].sigma > 0.99


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "ddim"}, "method must be 'exact' or 'ode'"),
        ({"num_inference_steps": 1}, "at least 2"),
        ({"strength": 0.0}, r"strength must lie in \(0, 1\]"),
        ({"data_std": 0.0}, "data_std must be positive"),
        ({"output_type": "jpg"}, "output_type 'jpg' is unknown"),
        ({"class_labels": 7}, "class_labels must be"),
        ({"class_labels": [0, 1, 2]}, "3 class_labels for 2 images"),
        ({"image": torch.zeros(2, 1, 1, 5)}, "this model works on"),
    ],
)
def test_wrong_inputs_get_a_sentence(tmp_path, arguments, message):
    save_oracle(tmp_path)
    with pytest.raises(ValueError, match=message):
        load("inversion", tmp_path)(**{"image": torch.zeros(2, 1, 1, 4), **arguments})


@pytest.mark.slow
def test_the_docstring_snippet_runs():
    """Verbatim: round trip within rounding of the pictures, an edit that changes them."""
    variables = run("inversion")
    assert variables["image"].size == (256, 256)
    pixels = [
        [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).int() for i in variables[k]]
        for k in ("originals", "same", "edited")
    ]
    for original, same, edited in zip(*pixels, strict=True):
        assert int((original - same).abs().max()) <= 1
        assert float((original - edited).abs().float().mean()) > 1
