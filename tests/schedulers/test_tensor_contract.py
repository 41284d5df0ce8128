"""The tensors that go in and out: sliced timesteps, changing batches, any shape, one time a sample, training."""

import diffusers
import numpy as np
import pytest
import torch
from contract_helpers import (
    EDM,
    FLOW,
    VP,
    by_class,
    by_every,
    by_process,
    gaussian,
    laid_out,
    loop,
    point,
    randn,
    relative,
)

from diffusers_sde import DPMSolverScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler

SHAPE = (2, 4, 8, 8)


# -- assigning timesteps --


@by_class
@by_process
@pytest.mark.parametrize("kind", ["view", "clone", "double"])
def test_assigned_rest_of_the_timesteps(process, cls, kind):
    """``scheduler.timesteps = scheduler.timesteps[k:]`` runs those rows: a network that knows the data finds it from a
    state at their first level."""
    scheduler = laid_out(cls, 8, **process, **({} if cls is DPMSolverScheduler else {"final": "denoise"}))
    rest = scheduler.timesteps[3:]
    scheduler.timesteps = {"view": rest, "clone": rest.clone(), "double": rest.double()}[kind]
    assert scheduler.num_inference_steps == 5 and len(scheduler.sigmas) == 6
    x0, eps = randn(*SHAPE, seed=1), randn(*SHAPE)
    level = scheduler.levels
    x = float(level.alpha[0]) * x0 + float(level.sigma[0]) * eps
    torch.testing.assert_close(loop(scheduler, x, point(scheduler, x0)), x0, atol=5e-4, rtol=1e-4)


def test_assigned_first_timesteps_end_at_the_next_level():
    """The first k of them go to the level of the one that follows, as the first half of a base-plus-refiner run."""
    scheduler = laid_out(ProbabilityFlowScheduler, 8, **VP, data_std=0.0)
    level = scheduler.levels
    scheduler.timesteps = scheduler.timesteps[:5]
    x0, eps = randn(*SHAPE, seed=1), randn(*SHAPE)
    start, end = (float(level.alpha[i]) * x0 + float(level.sigma[i]) * eps for i in (0, 5))
    torch.testing.assert_close(loop(scheduler, start, point(scheduler, x0)), end, atol=1e-4, rtol=1e-4)


def test_timesteps_that_were_left_out_are_refused():
    """An element of the old timesteps that is not among the assigned ones is no row of the run."""
    scheduler, x = laid_out(ProbabilityFlowScheduler, 8, **VP), randn(*SHAPE)
    before = scheduler.timesteps
    scheduler.timesteps = before[3:]
    with pytest.raises(ValueError, match="left out"):
        scheduler.step(x, before[2], x)
    assert scheduler.step(x, before[3], x).prev_sample.isfinite().all()
    scheduler.timesteps = before  # all of them again: a grid of these numbers
    assert len(scheduler.sigmas) == 9 and loop(scheduler, x).isfinite().all()


@by_every
def test_assigned_numbers_are_a_grid(cls):
    """Other numbers are the caller's own grid, as if passed to ``set_timesteps``."""
    times = torch.tensor([990.0, 612.0, 333.0, 40.0])
    scheduler, expected = cls(**VP), cls(**VP)
    scheduler.set_timesteps(4)
    scheduler.timesteps = times
    expected.set_timesteps(timesteps=times)
    assert torch.equal(scheduler.sigmas, expected.sigmas) and torch.equal(scheduler.timesteps, times)
    assert torch.equal(loop(scheduler, randn(*SHAPE)), loop(expected, randn(*SHAPE)))


# -- batches and shapes --


@by_every
@by_process
@pytest.mark.parametrize("shape", [(5,), (3, 2), (1, 16, 6), (2, 3, 2, 4, 4)], ids=str)
def test_samples_of_any_shape(process, cls, shape):
    """Numbers, sequences, video: Gaussian data of std 0.5 keeps the relation to its noise that pictures have."""
    scheduler = laid_out(cls, **process)
    x = randn(*shape) * scheduler.init_noise_sigma
    found = loop(scheduler, x)
    assert found.shape == shape and found.isfinite().all()
    if not scheduler.stochastic:
        other = laid_out(cls, **process)
        flat = loop(other, x.reshape(1, 1, 1, -1)).reshape(shape)
        torch.testing.assert_close(found, flat, atol=1e-6, rtol=1e-5)


KEEPING = [ProbabilityFlowScheduler, ReverseSDEScheduler, DPMSolverScheduler]


@pytest.mark.parametrize("cls", KEEPING, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("batch", [1, 3, 4], ids=["shrinks", "grows", "doubles"])
def test_a_batch_that_changes_in_mid_run_is_refused(cls, batch):
    """Where nobody says which samples go on, the next step or the one after names ``reorder``."""
    scheduler = laid_out(cls, **VP)
    x = loop(scheduler, randn(*SHAPE), stop=3)
    x = x[[0, 1, 0, 1][:batch]]
    with pytest.raises(ValueError, match="reorder"):
        loop(scheduler, x, start=3)


@pytest.mark.parametrize("cls", KEEPING, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("index", [[1], [1, 0, 1]], ids=["shrinks", "grows"])
def test_a_reordered_batch_goes_on(cls, index):
    """After ``reorder(index)`` each sample ends where it would have ended."""
    scheduler = laid_out(cls, **VP)
    x = loop(scheduler, randn(*SHAPE), stop=3)
    scheduler.reorder(torch.tensor(index))
    found = loop(scheduler, x[index], start=3)
    torch.testing.assert_close(found, loop(laid_out(cls, **VP), randn(*SHAPE))[index])


def test_another_shape_in_mid_run_is_refused():
    scheduler = laid_out(ProbabilityFlowScheduler, **VP)
    x = loop(scheduler, randn(*SHAPE), stop=3)
    with pytest.raises(ValueError, match="model_outputs"):
        loop(scheduler, x[..., :4], start=3)


def test_trimmed_evaluations_go_on():
    """ChronoEdit trims the frames of its latents and, through ``model_outputs``, of what the scheduler has stored."""
    scheduler = laid_out(ProbabilityFlowScheduler, **VP)
    x = loop(scheduler, randn(*SHAPE), stop=3)
    assert scheduler.last_sample is None and len(scheduler.model_outputs) == 2
    for j in range(len(scheduler.model_outputs)):
        scheduler.model_outputs[j] = scheduler.model_outputs[j][..., :4]
    found = loop(scheduler, x[..., :4], start=3)
    torch.testing.assert_close(found, loop(laid_out(ProbabilityFlowScheduler, **VP), randn(*SHAPE))[..., :4])


# -- one timestep a sample --


@by_every
@by_process
@pytest.mark.parametrize(
    "make", [lambda t: t.expand(2), lambda t: t.repeat(2), lambda t: t[None]], ids=["expand", "repeat", "one"]
)
def test_one_timestep_repeated_for_each_sample(process, cls, make):
    """Many pipelines hand the step what they handed the network: the same time for each sample."""
    scheduler, model, x = laid_out(cls, **process), None, randn(*SHAPE)
    x, model = x * scheduler.init_noise_sigma, gaussian(scheduler)
    expected = loop(laid_out(cls, **process), x)
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, make(t))
        torch.testing.assert_close(scaled, scheduler.scale_model_input(x, t))
        x = scheduler.step(model(x, t), make(t), x, return_dict=False)[0]
    assert torch.equal(x, expected)


@by_every
def test_different_timesteps_in_one_step_are_refused(cls):
    """A step has one row."""
    scheduler, x = laid_out(cls, **VP), randn(*SHAPE)
    for times in (scheduler.timesteps[:2], torch.tensor([900.0, 100.0])):
        with pytest.raises(ValueError, match="one timestep for the whole batch"):
            scheduler.step(x, times, x)


def test_input_scale_of_each_sample():
    """EDM networks in training: each sample is scaled for its own time."""
    scheduler = ProbabilityFlowScheduler(**EDM)
    times, x = torch.tensor([0.8, -0.4]), randn(*SHAPE)
    sigma = torch.exp(4 * times)[:, None, None, None]
    torch.testing.assert_close(scheduler.scale_model_input(x, times), x / torch.sqrt(sigma**2 + 0.25))


# -- levels in training and in a run --


def ddpm_noised(x0, eps, t):
    return diffusers.DDPMScheduler(**VP).add_noise(x0, eps, t)


@by_every
@pytest.mark.parametrize("when", ["laid out", "begin index", "in mid-run", "finished"])
def test_training_during_and_after_runs_uses_its_own_timesteps(cls, when):
    """``add_noise``, ``scale_noise`` and ``get_velocity`` at times that training draws are DDPM's, whatever runs."""
    scheduler = cls(**VP)
    scheduler.set_timesteps(6)
    if when != "laid out":
        scheduler.set_begin_index(2)
    if when in ("in mid-run", "finished"):
        loop(scheduler, randn(*SHAPE), start=2, stop=4 if when == "in mid-run" else None)
    x0, eps, t = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([999, 871])
    torch.testing.assert_close(scheduler.add_noise(x0, eps, t), ddpm_noised(x0, eps, t))
    torch.testing.assert_close(scheduler.scale_noise(x0, t, eps), ddpm_noised(x0, eps, t))
    expected = diffusers.DDPMScheduler(**VP).get_velocity(x0, eps, t)
    torch.testing.assert_close(scheduler.get_velocity(x0, eps, t), expected)


@by_every
def test_a_copy_of_the_runs_timestep_means_the_run(cls):
    """``timesteps[:1].repeat(batch)``, which image-to-image pipelines pass, is the run's level: sigmas may be given."""
    scheduler = cls(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(timesteps=[900.0, 400.0], sigmas=[0.8, 0.5])
    x0, eps = randn(*SHAPE), randn(*SHAPE, seed=1)
    found = scheduler.scale_noise(x0, scheduler.timesteps[1:].repeat(2), eps)
    torch.testing.assert_close(found, 0.5 * x0 + 0.5 * eps)


@by_process
@pytest.mark.parametrize("when", ["laid out", "begin index", "laid anew", "in mid-run"])
def test_levels_found_on_a_device_are_those_of_the_host(process, when):
    """An accelerator's times are compared with the run's where they are, the levels are those that the host finds, for
    times of the run, copies of them from before a grid was laid out anew, and others."""
    scheduler = laid_out(ProbabilityFlowScheduler, 8, **process)
    before, x = scheduler.timesteps.clone(), randn(*SHAPE)
    if when != "laid out":
        scheduler.set_begin_index(3)
    if when == "laid anew":
        scheduler.add_noise(x, x, scheduler.timesteps[3:4])
        assert process is EDM or scheduler.timesteps[3] != before[3]  # its default grid takes equal steps of time
    if when == "in mid-run":
        loop(scheduler, x, start=3, stop=5)
    others = torch.tensor([0.5, -0.2]) if process is EDM else torch.tensor([700.5, 12.25])
    for times in (scheduler.timesteps[3:4].clone(), scheduler.timesteps[2:4].clone(), before[3:4].repeat(2), others):
        found = scheduler._levels_on_device(scheduler._run, times)
        expected = scheduler._alpha_sigma(times, x)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a.expand(len(times)), b.flatten().expand(len(times)), atol=2e-6, rtol=1e-5)


@by_every
def test_rounded_timesteps_of_given_sigmas(cls):
    """With ``round_timesteps`` the level moves together with its label: the state is where the network is told."""
    scheduler = cls(**VP, round_timesteps=True)
    scheduler.set_timesteps(sigmas=[14.0, 6.475, 1.886, 0.4])
    assert scheduler.timesteps.dtype == torch.int64
    abar = diffusers.DDIMScheduler(**VP).alphas_cumprod.double()[scheduler.timesteps]
    torch.testing.assert_close(scheduler.sigmas[:-1].double(), ((1 - abar) / abar).sqrt(), rtol=1e-5, atol=0)


def test_alphas_cumprod_between_integers():
    """Some pipelines index it with the timestep, which need not be an integer here: alpha^2 of the path; integers and
    arithmetic are those of a tensor."""
    scheduler, theirs = ProbabilityFlowScheduler(**VP), diffusers.DDIMScheduler(**VP).alphas_cumprod
    table = scheduler.alphas_cumprod
    torch.testing.assert_close(table[torch.tensor([3, 871])], theirs[[3, 871]])
    torch.testing.assert_close(table[-1], theirs[-1])
    torch.testing.assert_close(1 - table, 1 - theirs)
    expected = torch.tensor(float(scheduler.path.alpha_sigma(499.5)[0] ** 2))
    for index in (499.5, torch.tensor(499.5)):
        torch.testing.assert_close(table[index], expected)
    assert theirs[500] < float(table[torch.tensor([499.5])]) < theirs[499]


# -- original_inference_steps --


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_original_inference_steps_are_those_of_latent_consistency(n, strength):
    """A latent consistency model is asked at times that it was trained at: LCMScheduler's, for any number of steps."""
    theirs = diffusers.LCMScheduler(original_inference_steps=50)
    theirs.set_timesteps(n, original_inference_steps=50, strength=strength)
    for cls in (ProbabilityFlowScheduler, ReverseSDEScheduler):
        ours = cls.from_config(diffusers.DDIMScheduler(**VP).config)
        ours.set_timesteps(n, original_inference_steps=50, strength=strength)
        np.testing.assert_array_equal(ours.timesteps.numpy(), theirs.timesteps.numpy())


def test_original_inference_steps_below_the_number_of_steps():
    with pytest.raises(ValueError, match="original_inference_steps"):
        ProbabilityFlowScheduler(**VP).set_timesteps(8, original_inference_steps=4)


# -- taking a step twice --


@pytest.mark.parametrize("cls", KEEPING, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("copies", [1, 2])
def test_a_step_taken_twice_is_the_step(cls, copies):
    """Cosmos looks at ``step(...)[1]`` of a doubled batch, puts the index back and steps: the run is the plain one,
    with the same noise."""
    plain = loop(laid_out(cls, 12, **FLOW), randn(*SHAPE))
    scheduler, x = laid_out(cls, 12, **FLOW), randn(*SHAPE)
    model = gaussian(scheduler)
    for t in scheduler.timesteps:
        twice = torch.cat([x] * copies)
        scheduler.step(model(twice, t), t, twice)
        scheduler._step_index -= 1
        x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
    assert relative(x, plain) < 1e-6
