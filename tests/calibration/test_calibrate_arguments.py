"""What ``calibrate`` refuses, in one sentence each, before the network is evaluated."""

import pytest
import torch
from calibration_helpers import QUIET, SHAPE, VP, denoiser_of, scheduler_of
from diffusers import DDPMPipeline, DDPMScheduler
from helpers import mixture

from diffusers_sde import ProbabilityFlowScheduler, calibrate


def names(value):
    return value if isinstance(value, str) else ",".join(value)


def assert_refused(words, *arguments, calls, **options):
    """One sentence that contains ``words``, and no evaluation."""
    with pytest.raises(ValueError) as refusal:
        calibrate(*arguments, **options)
    message = str(refusal.value)
    assert words in message and message.endswith(".") and "\n" not in message and ". " not in message
    assert not calls


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"num_inference_steps": 4.0}, "whole numbers from 1 to 24, at least one, not 4.0"),
        ({"num_inference_steps": [4, 5.5]}, "not [4, 5.5]"),
        ({"num_inference_steps": -4}, "not -4"),
        ({"num_inference_steps": [0]}, "not [0]"),
        ({"num_inference_steps": []}, "not []"),
        ({"num_inference_steps": "4"}, "not '4'"),
        ({"num_inference_steps": True}, "not True"),
        ({"num_inference_steps": [4, 25]}, "not [4, 25]"),
        ({"num_samples": 64.0}, "num_samples must be a whole number of at least 1, not 64.0"),
        ({"num_samples": 0}, "num_samples must be a whole number of at least 1, not 0"),
        ({"num_held_out": 0}, "num_held_out must be a whole number of at least 1, not 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, not 0"),
        ({"budget": -1}, "budget must be a whole number of at least 0, not -1"),
        ({"seed": 0.5}, "seed must be a whole number of at least 0, not 0.5"),
        ({"scheduler": scheduler_of(VP).config}, "scheduler must be a scheduler, not a FrozenDict: pass for example"),
        ({"scheduler": ProbabilityFlowScheduler}, "scheduler must be a scheduler, not a type: pass for example"),
        ({"scheduler": None}, "scheduler= and sample_shape=(C, H, W)"),
        ({"scheduler": ProbabilityFlowScheduler(**VP, thresholding=True)}, "thresholding=False"),
        ({"sample_shape": None}, "scheduler= and sample_shape=(C, H, W)"),
        ({"sample_shape": 32}, "(C, H, W), not 32"),
        ({"sample_shape": (1, 8.0, 8)}, "(C, H, W), not (1, 8.0, 8)"),
        ({"prompt": "a cat"}, "takes no prompt: bind it to the denoiser"),
        ({"stochastic": True, "num_samples": 1}, "at least 2 num_samples and 2 num_held_out"),
        ({"scheduler": ProbabilityFlowScheduler(trained_betas=[0.1] * 5, round_timesteps=True)}, "5 whole timesteps"),
    ],
    ids=names,
)
def test_wrong_arguments_are_refused_before_the_first_evaluation(wrong, words):
    calls = []
    right = {"scheduler": scheduler_of(VP), "num_inference_steps": [8], **QUIET}
    assert_refused(words, lambda x, t: calls.append(x), calls=calls, **right | wrong)


def test_a_work_dir_that_is_a_file_is_refused_and_nothing_is_made(tmp_path):
    file, calls = tmp_path / "file", []
    file.write_text("mine")
    for wrong in (file, str(file), file / "below"):
        options = {"scheduler": scheduler_of(VP), "work_dir": wrong, **QUIET}
        assert_refused("is a file, pass a folder", lambda x, t: calls.append(x), calls=calls, **options)
    options = {"scheduler": scheduler_of(VP), "work_dir": tmp_path / "new", "batch_size": 0, **QUIET}
    assert_refused("batch_size", lambda x, t: calls.append(x), calls=calls, **options)
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and file.read_text() == "mine"


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"colour": "red"}, "DDPMPipeline takes no colour: leave it out"),
        ({"return_dct": False}, "DDPMPipeline takes no return_dct: did you mean return_dict"),
        ({"output_type": "np"}, "Calibration chooses output_type itself: leave it out"),
        ({"scheduler": scheduler_of(VP)}, "leave out scheduler, sample_shape and device"),
        ({"device": "cpu"}, "leave out scheduler, sample_shape and device"),
    ],
    ids=names,
)
def test_wrong_inputs_of_a_pipeline_are_refused_before_the_first_evaluation(wrong, words):
    pipe, calls = DDPMPipeline(mixture(**VP), DDPMScheduler(**VP, clip_sample=False)), []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    assert_refused(words, pipe, 4, progress=False, calls=calls, **wrong)


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"class_labels": [0, 4]}, "one or more class_labels in 0..3 and guidance scales, not [0, 4] and [2.0]"),
        ({"class_labels": []}, "one or more whole numbers"),
        ({"class_labels": "bag"}, "have no names: class_labels must be whole numbers, not 'bag'"),
        ({"guidance_scale": []}, "one or more class_labels in 0..3 and guidance scales"),
        ({"guidance_scal": 2.0}, "takes no guidance_scal: did you mean guidance_scale"),
    ],
    ids=names,
)
def test_wrong_inputs_of_a_class_conditional_network_are_refused_before_the_first_evaluation(wrong, words):
    network, calls = mixture(**VP), []
    network.register_to_config(num_class_embeds=4)
    network.register_forward_hook(lambda *_: calls.append(1))
    pipe = DDPMPipeline(network, DDPMScheduler(**VP, clip_sample=False))
    assert_refused(words, pipe, 4, progress=False, calls=calls, **wrong)


def test_what_only_an_evaluation_shows_is_refused_after_two_of_them():
    """A model that draws noise of its own, and one that returns no tensor."""
    process, denoiser, calls = scheduler_of(VP), denoiser_of(VP), []

    def random(x, t):
        calls.append(1)
        return denoiser(x, t) + 0.1 * torch.randn_like(x)

    with pytest.raises(ValueError, match="noise of its own"):
        calibrate(random, scheduler=process, **QUIET)
    assert len(calls) == 2
    with pytest.raises(ValueError, match="must return the prediction as a tensor"):
        calibrate(mixture(**VP), scheduler=process, **QUIET)


def test_clipping_is_switched_off_with_a_warning():
    with pytest.warns(UserWarning, match="clip_sample is switched off"):
        scheduler = calibrate(denoiser_of(VP), 4, 8, scheduler=DDPMScheduler(**VP), budget=0, **QUIET)
    assert scheduler.config.clip_sample is False


def test_numpy_integers_and_repetitions_are_numbers_of_steps():
    counts = torch.tensor([4, 5, 4]).numpy()
    scheduler = calibrate(
        denoiser_of(VP), counts, 8, scheduler=scheduler_of(VP), sample_shape=list(SHAPE), budget=0, progress=False
    )
    assert sorted(scheduler.errors) == [4, 5]
