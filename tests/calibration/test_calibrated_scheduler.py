"""The scheduler of learned tables: which table runs, what is saved, and for what it is refused."""

import json
import warnings

import numpy as np
import pytest
import torch
from calibration_helpers import FLOW, SHAPE, VP, calibrated, denoiser_of, final
from contract_helpers import randn
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, FlowMatchEulerDiscreteScheduler
from helpers import mixture

from diffusers_sde import CalibratedScheduler, ProbabilityFlowScheduler
from diffusers_sde.assets import FASHION_MODEL
from diffusers_sde.calibration.rollout import Evaluator, roll
from diffusers_sde.calibration.sources import DenoiserBatch
from diffusers_sde.defaults import standard_table
from diffusers_sde.named_samplers import CALIBRATED
from diffusers_sde.sampling import sample
from diffusers_sde.schedulers.calibrated import process_values
from diffusers_sde.schedulers.calibration_format import FORMAT_VERSION, entry_nodes, entry_table


@pytest.fixture(scope="module")
def learned():
    return calibrated(steps=(4, 6), num_samples=64)


def test_more_steps_than_asked_for_and_grids_of_the_user_are_exact(learned):
    """An uncalibrated number of steps: the exact solver on the interpolated grid, and a warning; likewise timesteps."""
    exact = ProbabilityFlowScheduler(**VP)
    with pytest.warns(UserWarning, match="5 steps were not calibrated"):
        learned.set_timesteps(5)
    times = learned.timesteps.tolist()
    assert times[0] == 999 and times == sorted(times, reverse=True)
    noise, denoiser = randn(8, *SHAPE), denoiser_of(VP)
    mine = sample(denoiser, learned, noise)
    exact.set_timesteps(timesteps=times)
    assert torch.allclose(mine, sample(denoiser, exact, noise), atol=1e-5)
    with pytest.warns(UserWarning, match="was not calibrated"):
        learned.set_timesteps(timesteps=times)
    assert torch.allclose(mine, sample(denoiser, learned, noise), atol=1e-5)
    with pytest.warns(UserWarning):
        learned.set_timesteps(40)  # finer: converges to the same solution
    fine = sample(denoiser, learned, noise)
    assert (fine - final(exact, 100, noise, denoiser)).abs().max() < 0.02


def test_saved_scheduler_makes_equal_bits(learned, tmp_path):
    """save_pretrained, from_pretrained, from_config and deepcopy: the same samples to the last bit; a few kB."""
    learned.save_pretrained(tmp_path)
    loaded = CalibratedScheduler.from_pretrained(tmp_path)
    again = CalibratedScheduler.from_config(learned.config)
    noise, denoiser = randn(8, *SHAPE), denoiser_of(VP)
    for n in (4, 6):
        wanted = final(learned, n, noise, denoiser)
        assert torch.equal(wanted, final(loaded, n, noise, denoiser))
        assert torch.equal(wanted, final(again, n, noise, denoiser))
    assert (tmp_path / "scheduler_config.json").stat().st_size < 16_000
    assert loaded.errors == learned.errors
    json.loads((tmp_path / "scheduler_config.json").read_text(), parse_constant=pytest.fail)


def test_pipeline_saves_and_loads_it(learned, tmp_path):
    pipe = DDPMPipeline(mixture(**VP), learned)
    pipe.save_pretrained(tmp_path)
    loaded = DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is CalibratedScheduler
    images = [
        p(num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="np").images
        for p in (pipe, loaded)
    ]
    assert np.array_equal(*images)


def test_a_run_from_inside_the_grid_has_exact_rows(learned):
    """Image-to-image: no history, so the rest of the grid runs with exact rows; starting at 0 restores the table."""
    learned.set_timesteps(6)
    learned.set_begin_index(3)
    entry = learned.config.calibration["tables"]["6"]
    start, denoiser = randn(4, *SHAPE), denoiser_of(VP)
    evaluator, batch = Evaluator(learned.path, "epsilon", 1.0), DenoiserBatch(start, denoiser, "fixed_small")
    x = start
    for t in learned.timesteps[3:]:
        x = learned.step(denoiser(x, t), t, x, return_dict=False)[0]
    exact = standard_table(learned.path, entry_nodes(entry)[3:])
    assert torch.allclose(x, roll(evaluator, batch, exact, start)[0][-1], atol=1e-5)
    learned_rows = roll(evaluator, batch, entry_table(entry, 1.0), start)[0][-1]
    assert torch.allclose(final(learned, 6, start, denoiser), learned_rows, atol=1e-5)


def test_pipelines_that_pass_their_habitual_sigmas_get_the_learned_grid():
    scheduler = calibrated(FLOW, steps=4, num_samples=16, budget=0)
    learned = entry_nodes(scheduler.config.calibration["tables"]["4"]).time[:-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))
    assert np.allclose(scheduler.timesteps, learned)
    with pytest.warns(UserWarning, match="not calibrated"):
        scheduler.set_timesteps(sigmas=[1.0, 0.7, 0.3, 0.2])


# -- the format --


def test_a_calibration_in_another_format_is_refused(learned, tmp_path):
    """Whatever else a newer file holds: what to do is said in one sentence, by every way of loading it."""
    for version in (FORMAT_VERSION + 1, 0):
        other = {"format_version": version, "grids": [[1.0, 0.5]]}
        words = f"format {version} .* reads format 1: update diffusers_sde, or make the calibration again"
        with pytest.raises(ValueError, match=words):
            CalibratedScheduler(**VP, calibration=other)
        learned.save_pretrained(tmp_path)
        file = tmp_path / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"calibration": other}))
        with pytest.raises(ValueError, match=words):
            CalibratedScheduler.from_pretrained(tmp_path)


def test_a_calibration_without_a_version_is_of_the_first_format(learned):
    first = {k: v for k, v in learned.config.calibration.items() if k != "format_version"}
    noise, denoiser = randn(2, *SHAPE), denoiser_of(VP)
    without = final(CalibratedScheduler(**VP, calibration=first), 6, noise, denoiser)
    assert torch.equal(without, final(learned, 6, noise, denoiser))


def test_the_shipped_calibration_is_in_the_present_format():
    shipped = CalibratedScheduler.from_pretrained(FASHION_MODEL / CALIBRATED)
    assert shipped.config.calibration["format_version"] == FORMAT_VERSION
    assert sorted(shipped.errors) == [4, 5, 6, 8, 10]


# -- what is refused --


def test_another_process_is_refused(learned):
    for change in ({"beta_end": 0.03}, {"prediction_type": "v_prediction"}, {"beta_schedule": "scaled_linear"}):
        with pytest.raises(ValueError, match="another process"):
            CalibratedScheduler.from_config({**learned.config, **change})
        with pytest.raises(ValueError, match=next(iter(change))):
            learned.check_process(DDIMScheduler(**{**VP, **change}).config)
    learned.check_process(DDPMScheduler(**VP).config)
    flow = calibrated(FLOW, steps=4, num_samples=16, budget=0)
    flow.check_process(FlowMatchEulerDiscreteScheduler(shift=3.0).config)
    with pytest.raises(ValueError, match=r"shift is 1\.0, was 3\.0"):
        flow.check_process(FlowMatchEulerDiscreteScheduler(shift=1.0).config)


def test_a_changed_config_is_refused_before_the_run(learned):
    mine = CalibratedScheduler.from_config(learned.config)
    mine.register_to_config(beta_end=0.03)
    with pytest.raises(ValueError, match="another process"):
        mine.set_timesteps(4)


def test_a_table_that_lost_cannot_be_made_or_saved(learned):
    """Held-out error above the exact solver's: no scheduler can hold such a table."""
    bad = json.loads(json.dumps(learned.config.calibration))
    bad["tables"]["4"]["errors"]["held_out"] = 2 * bad["tables"]["4"]["errors"]["exact"]
    with pytest.raises(ValueError, match="worse than the exact solver"):
        CalibratedScheduler(**VP, calibration=bad)
    with pytest.raises(ValueError, match="needs a calibration"):
        CalibratedScheduler(**VP)


def test_process_of_names_what_must_agree():
    assert process_values(DDIMScheduler(**VP).config) == process_values(ProbabilityFlowScheduler(**VP).config)
    assert process_values(DDIMScheduler(trained_betas=[0.1, 0.2]).config)["trained_betas"] == [0.1, 0.2]
    assert "beta_end" not in process_values(FlowMatchEulerDiscreteScheduler().config)
