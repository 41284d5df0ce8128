"""The scheduler of published samplers inside diffusers' contract: what num_inference_steps counts, stages, noise."""

import copy

import diffusers
import numpy as np
import pytest
import torch
from helpers import SD

import diffusers_sde
from diffusers_sde import NamedScheduler
from diffusers_sde.assets import load_default_model
from diffusers_sde.published import RECIPES

VP = diffusers.EulerDiscreteScheduler(**SD).config
FLOW = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config


def laid_out(name, n, config=VP, **options):
    scheduler = diffusers_sde.sampler(name, config, **options)
    scheduler.set_timesteps(n)
    return scheduler


@pytest.mark.parametrize("n", [1, 2, 7, 20])
@pytest.mark.parametrize("name", ["euler", "heun", "res_3s", "rk4_4s"])
def test_num_inference_steps_counts_evaluations(name, n):
    """k evaluations a step and one in the last: at most n of them, and no further step would fit."""
    k, made = RECIPES[name].evaluations, len(laid_out(name, n).timesteps)
    assert made <= n < made + k and (made - 1) % k == 0


def test_n_steps_of_two_stages_are_the_timesteps_of_stock_heun():
    """``2 N - 1`` evaluations are N steps: diffusers' HeunDiscreteScheduler on the same grid."""
    stock = diffusers.HeunDiscreteScheduler(**SD, timestep_spacing="trailing")
    stock.set_timesteps(5)
    np.testing.assert_allclose(laid_out("heun", 9).timesteps, stock.timesteps, atol=1e-3)


def test_a_stage_lies_at_the_geometric_mean():
    at = laid_out("dpm_2 karras", 9).levels
    s = at.sigma / at.alpha
    np.testing.assert_allclose(s[1:-1:2], np.sqrt(s[:-2:2] * s[2:-1:2]), rtol=1e-9)


def test_a_list_names_the_steps_and_stages_come_on_top():
    scheduler = diffusers_sde.sampler("res_2s", VP)
    scheduler.set_timesteps(timesteps=[900.0, 500.0, 100.0])
    np.testing.assert_allclose(scheduler.timesteps[::2], [900.0, 500.0, 100.0])
    assert len(scheduler.timesteps) == 5


def test_the_sigmas_that_pipelines_pass_by_habit_count_evaluations():
    """Flow matching pipelines pass ``linspace(1, 1/n, n)`` whatever the user wants."""
    scheduler = diffusers_sde.sampler("heun beta57", FLOW)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 9, 9))
    asked = laid_out("heun beta57", 9, FLOW)
    assert torch.equal(scheduler.timesteps, asked.timesteps)


def test_stages_of_a_network_of_integer_times_are_labelled_with_integers():
    scheduler = laid_out("res_2s", 9, round_timesteps=True)
    exact = laid_out("res_2s", 9)
    assert scheduler.timesteps.dtype == torch.int64
    np.testing.assert_allclose(scheduler.levels.log_snr[1::2], exact.levels.log_snr[1::2], atol=0.02)


def clean(scheduler, x, begin=0):
    """A run from a row on, on data that is one point: D = 1 whatever the state."""
    for t in scheduler.timesteps[begin:]:
        x = scheduler.step(torch.zeros_like(x), t, x, pred_original_sample=torch.ones_like(x)).prev_sample
    return x


@pytest.mark.parametrize("config", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("name", ["heun", "dpm_2_ancestral", "res_3s", "rk4_4s", "unipc", "er_sde", "seeds_3", "lms"])
def test_a_run_may_begin_inside_a_step(name, config):
    """Image-to-image begins at any evaluation: from the forward process there, data of one point are met exactly, and
    the state is that of the forward process at every row but inside an ancestral step."""
    scheduler = laid_out(name, 13, config)
    for begin in (4, 5, 6):
        scheduler.set_begin_index(begin)
        at = scheduler.levels
        x = torch.full((1, 2), float(at.alpha[begin]), dtype=torch.float64)
        torch.testing.assert_close(clean(scheduler, x, begin), torch.ones(1, 2, dtype=torch.float64), atol=1e-9, rtol=0)


def test_an_ancestral_step_with_stages_draws_the_noise_of_the_whole_step():
    """One seed draws the same Brownian increments at every eta: at 1, where the stage is the step's end, those of the
    single-stage method on the same steps."""
    x = torch.zeros(1, 64, dtype=torch.float64)
    drawn = {}
    for name, n in (("euler_ancestral", 6), ("dpm_2_ancestral", 11), ("dpmpp_2s_ancestral", 11)):
        scheduler = laid_out(name, n, schedule="karras", noise_seed=3)
        drawn[name] = []
        for t in scheduler.timesteps:
            out = scheduler.step(x, t, x, pred_original_sample=x)
            if out.noise_std:
                drawn[name].append((out.prev_sample - out.prev_sample_mean) / out.noise_std)
    assert len(drawn["euler_ancestral"]) == 5
    for name in ("dpm_2_ancestral", "dpmpp_2s_ancestral"):
        torch.testing.assert_close(torch.cat(drawn[name]), torch.cat(drawn["euler_ancestral"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.4])
@pytest.mark.parametrize("name", ["dpm_2_ancestral", "dpmpp_sde"])
def test_noise_of_any_eta_is_of_unit_variance(name, eta):
    scheduler = laid_out(name, 9, eta=eta, noise_seed=0)
    assert scheduler.stochastic == (eta > 0)
    x = torch.zeros(1, 4000, dtype=torch.float64)
    for t in scheduler.timesteps:
        out = scheduler.step(x, t, x, pred_original_sample=x)
        z = (out.prev_sample - out.prev_sample_mean) / (out.noise_std or 1.0)
        assert z.std() == pytest.approx(1.0 if out.noise_std else 0.0, abs=0.05)


@pytest.mark.parametrize("name", ["res_2s", "dpmpp_2s_ancestral", "er_sde"])
def test_saved_copied_and_converted_it_is_the_same(tmp_path, name):
    scheduler = diffusers_sde.sampler(name, VP, schedule="kl_optimal", noise_seed=5)
    scheduler.save_pretrained(tmp_path)
    again = NamedScheduler.from_pretrained(tmp_path)
    back = NamedScheduler.from_config(diffusers.DDIMScheduler.from_config(scheduler.config).config)
    x = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    results = []
    for each in (scheduler, again, back, copy.deepcopy(scheduler)):
        assert (each.config.sampler, each.config.grid) == (name, "kl_optimal")
        each.set_timesteps(7)
        state = x
        for t in each.timesteps:
            state = each.step(torch.sin(state), t, state).prev_sample
        results.append(state)
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_wrong_settings_are_refused_with_the_remedy():
    for settings, words in (
        ({"sampler": "dpmpp_2n"}, "nearest are dpmpp_2"),
        ({"sampler": "heun", "eta": 0.5}, "heun has no eta"),
        ({"sampler": "er_sde", "eta": 0.5}, "er_sde has no eta"),
        ({"sampler": "euler_ancestral", "eta": 1.5}, "between 0"),
        ({"sampler": "dpmpp_2m_sde", "eta": -1.0}, "tau must be"),
    ):
        with pytest.raises(ValueError, match=words):
            NamedScheduler.from_config(VP, **settings)


def test_noise_prediction_from_zero_terminal_snr_is_refused():
    config = {**VP, "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler = laid_out("lms", 5, config)
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        scheduler.step(x, scheduler.timesteps[0], x)
    scheduler = laid_out("res_2s", 5, config)
    assert scheduler.step(x, scheduler.timesteps[0], x).prev_sample.isfinite().all()


def test_a_pipeline_makes_at_most_the_evaluations_it_was_asked_for():
    """Three steps of two stages and the last one: ``num_inference_steps=6`` is five calls of the network, twice the
    batch for guidance."""
    pipe = load_default_model()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers_sde.sampler("DPM++ 2S a Karras", pipe.scheduler.config)
    calls = []
    pipe.unet.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    images = pipe(
        "red apple", num_inference_steps=6, output_type="np", generator=torch.Generator().manual_seed(0)
    ).images
    assert calls == [2] * 5 and np.isfinite(images).all()
