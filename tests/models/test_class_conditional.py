"""The class-conditional pipeline: what it draws, by which names it is asked, and how diffusers loads it."""

import json

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline, UNet2DModel
from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders
from pipeline_parts import tiny_unet

from diffusers_sde import ClassConditionalPipeline, FlowMapScheduler, FlowMapUNet2DModel, ReverseSDEScheduler

NULL = 3
NAMES = ["shoe", "bag", "coat"]
VP = {"clip_sample": False, "prediction_type": "epsilon"}
SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler(**VP),
    "ancestral": diffusers.DDPMScheduler(**VP),
    "euler": diffusers.EulerDiscreteScheduler(),  # starts at sigma_max and scales what the network sees
    "edm": diffusers.EDMEulerScheduler(),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(),
    "heun": diffusers.HeunDiscreteScheduler(),  # evaluates more often than it has steps
    "ours": ReverseSDEScheduler(),
}


def named_unet():
    unet = tiny_unet(classes=NULL + 1)
    unet.register_to_config(_class_names=NAMES)
    return unet


def pipeline(unet=None, scheduler=SCHEDULERS["ddim"]):
    pipe = ClassConditionalPipeline(unet or named_unet(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def states(pipe, *labels, seed=0, **options):
    """The last states of a call of two steps."""
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(seed), **options}
    return pipe(*labels, output_type="latent", **options).images


# -- what it draws --


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_call_is_the_loop_of_guided_predictions_with_any_scheduler(name, scale):
    """``m_null + w (m_label - m_null)``, written out with diffusers' own loop; noise of start and steps from one
    generator."""
    unet, scheduler = named_unet().double(), SCHEDULERS[name]
    got = states(pipeline(unet, scheduler), [2, 0], guidance_scale=scale)
    generator = torch.Generator().manual_seed(0)
    if name == "flow":
        scheduler.set_timesteps(sigmas=[1.0, 0.5])
    else:
        scheduler.set_timesteps(2)
    x = torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64) * getattr(scheduler, "init_noise_sigma", 1.0)
    extra = {"generator": generator} if name in ("ancestral", "ours") else {}
    with torch.no_grad():
        for t in scheduler.timesteps:
            seen = x if name == "flow" else scheduler.scale_model_input(x, t)
            none, some = (unet(seen, t, torch.tensor(labels)).sample for labels in ([NULL, NULL], [2, 0]))
            x = scheduler.step(none + scale * (some - none), t, x, **extra).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)


def test_without_a_guidance_scale_labels_are_guided_by_two_and_no_label_is_not_guided():
    pipe = pipeline()
    assert torch.equal(states(pipe, 1), states(pipe, 1, guidance_scale=2.0))
    assert torch.equal(states(pipe, num_images=2), states(pipe, [NULL, NULL], guidance_scale=1.0))


@pytest.mark.parametrize("scheduler", [diffusers.DDPMScheduler(variance_type="learned_range"), SCHEDULERS["ddim"]])
def test_a_learned_variance_is_that_of_the_label_and_goes_only_to_schedulers_that_sample_with_it(scheduler):
    """Guidance moves the mean alone (Nichol & Dhariwal's networks have both); DDIM would fail on twice the channels."""
    unet = UNet2DModel.from_config({**named_unet().config, "out_channels": 2})
    seen, step = [], scheduler.step
    scheduler.step = lambda output, *args, **kwargs: seen.append(output) or step(output, *args, **kwargs)
    noise = torch.randn(1, 1, 8, 8)
    assert states(pipeline(unet, scheduler), 2, latents=noise, guidance_scale=3.0).shape == noise.shape
    with torch.no_grad():
        none, some = (unet(noise, scheduler.timesteps[0], torch.tensor([label])).sample for label in (NULL, 2))
    expected = torch.cat([none[:, :1] + 3 * (some - none)[:, :1], some[:, 1:]], dim=1)
    torch.testing.assert_close(seen[0], expected[:, : seen[0].shape[1]], rtol=1e-4, atol=1e-6)
    assert seen[0].shape[1] == (1 if scheduler is SCHEDULERS["ddim"] else 2)


def test_a_flow_map_is_called_with_its_target_and_without_guidance():
    """MeanFlow's network gets the next time; its jumps written out."""
    unet = FlowMapUNet2DModel.from_unet(named_unet())
    torch.nn.init.normal_(unet.class_embedding.target.linear_2.weight)  # else it ignores the target
    scheduler = FlowMapScheduler(flow_map="mean_flow", gamma=0.0)
    noise = torch.randn(2, 1, 8, 8)
    got = states(pipeline(unet, scheduler), ["bag", "coat"], latents=noise)
    scheduler.set_timesteps(2)
    x = noise
    with torch.no_grad():
        for t in scheduler.timesteps:
            said = unet(x, t, torch.tensor([1, 2]), target_timestep=scheduler.target_timestep(t)).sample
            x = scheduler.step(said, t, x).prev_sample
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="built in"):
        states(pipeline(unet, scheduler), 1, guidance_scale=2.0)


def test_a_network_without_classes_draws_as_many_as_are_asked_for():
    """Equal to ``DDPMPipeline``'s own call, which is for such networks."""
    unet, scheduler = tiny_unet(), SCHEDULERS["ancestral"]
    stock = DDPMPipeline(unet, scheduler)
    stock.set_progress_bar_config(disable=True)
    expected = stock(3, torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np").images
    options = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    np.testing.assert_allclose(pipeline(unet, scheduler)(num_images=3, **options).images, expected, atol=1e-6)


# -- how it is asked --


def test_names_numbers_and_tensors_are_the_same_labels():
    pipe = pipeline()
    expected = states(pipe, [1, 2, 1])
    for labels in (["bag", "coat", "bag"], ("bag", 2, np.int64(1)), torch.tensor([1, 2, 1]), np.array([1, 2, 1])):
        assert torch.equal(states(pipe, labels), expected)
    assert pipe.class_names == NAMES
    assert torch.equal(states(pipe, "bag"), states(pipe, class_labels=1))


def test_numbers_of_images_repeat_labels_one_after_the_other():
    pipe = pipeline()
    assert torch.equal(states(pipe, ["bag", 0], num_images_per_label=2), states(pipe, [1, 1, 0, 0]))
    assert torch.equal(states(pipe, "bag", num_images=3), states(pipe, [1, 1, 1]))


@pytest.mark.parametrize("name", ["ancestral", "ours"])
def test_with_a_generator_each_an_image_does_not_depend_on_the_others(name):
    pipe = pipeline(scheduler=SCHEDULERS[name])
    both = states(pipe, [0, 1], generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)])
    torch.testing.assert_close(both[1:], states(pipe, 1, seed=6), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="2 generators for 3 images"):
        states(pipe, [0, 1, 2], generator=[torch.Generator(), torch.Generator()])


def test_pictures_come_as_asked_for():
    """Zero is mid-grey: 0.5."""
    unet = named_unet()
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    options = {"latents": torch.zeros(1, 1, 8, 8), "num_inference_steps": 2}
    pipe = pipeline(unet)
    array, tensor = (pipe("bag", output_type=kind, **options).images for kind in ("np", "pt"))
    np.testing.assert_array_equal(array, np.full((1, 8, 8, 1), 0.5))
    assert torch.equal(tensor, torch.full((1, 1, 8, 8), 0.5))
    (image,) = pipe("bag", return_dict=False, **options)[0]
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("L", (8, 8), 128)


def test_callbacks_see_each_step_and_may_replace_the_state():
    pipe, seen = pipeline(), []

    def watch(pipeline, step, timestep, values):
        seen.append((pipeline is pipe, step, int(timestep), list(values)))
        return {"latents": torch.zeros_like(values["latents"])} if step == 2 else None

    last = states(pipe, 1, num_inference_steps=3, callback_on_step_end=watch)
    assert seen == [(True, i, t, ["latents"]) for i, t in enumerate(pipe.scheduler.timesteps.tolist())]
    assert not last.any()
    states(pipe, 1, callback_on_step_end=lambda *given: seen.append(given[3]), callback_on_step_end_tensor_inputs=[])
    assert seen[-1] == {}


def test_a_network_in_half_precision_takes_latents_of_any():
    pipe = pipeline(named_unet().bfloat16())
    noise = torch.randn(1, 1, 8, 8)
    half = states(pipe, "bag", latents=noise)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), states(pipeline(), "bag", latents=noise), rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"class_labels": "sho"}, "There is no class 'sho', the nearest is 'shoe'"),
        ({"class_labels": [0, 4]}, "whole numbers from 0 to 2, or 3 for no class"),
        ({"class_labels": -1}, "0 or larger"),
        ({"class_labels": 1.5}, "one or more whole numbers"),
        ({"class_labels": [True]}, "one or more whole numbers"),
        ({"class_labels": [None]}, "one or more whole numbers"),
        ({"class_labels": []}, "one or more"),
        ({"class_labels": [0, 1], "num_images": 3}, "2 class_labels for 3 images"),
        ({"num_images": 0}, "num_images must be a whole number of at least 1, not 0"),
        ({"class_labels": 0, "num_images_per_label": 1.5}, "num_images_per_label must be"),
        ({"class_labels": 0, "latents": torch.zeros(1, 1, 4, 4)}, r"this model makes \(1, 1, 8, 8\)"),
        ({"class_labels": 0, "output_type": "jpeg"}, "use one of pil"),
        ({"class_labels": 0, "callback_on_step_end_tensor_inputs": ["noise"]}, r"may have \['latents'\], not"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_remedy_before_the_first_step(options, sentence):
    pipe = pipeline()
    pipe.unet.forward = None
    with pytest.raises(ValueError, match=sentence):
        pipe(**options)


def test_labels_of_a_network_without_classes_are_refused():
    with pytest.raises(ValueError, match="no classes: leave out class_labels"):
        pipeline(tiny_unet())("bag")


# -- how it is saved --


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    pipeline().save_pretrained(path)
    return path


def test_a_saved_pipeline_is_loaded_by_diffusers_own_class(folder):
    """As itself with its names; as a ``DDPMPipeline`` if that is what is asked for."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is ClassConditionalPipeline and pipe.class_names == NAMES
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(states(pipe, "coat"), states(pipeline(), 2))
    assert type(DDPMPipeline.from_pretrained(folder)) is DDPMPipeline


def test_the_folder_of_a_ddpm_pipeline_is_loaded_too(tmp_path):
    DDPMPipeline(named_unet(), SCHEDULERS["ddim"]).save_pretrained(tmp_path)
    pipe = ClassConditionalPipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(states(pipe, "coat"), states(pipeline(), 2))


def test_the_index_names_nothing_that_a_download_from_the_hub_would_take_for_a_component(folder):
    """diffusers takes every list in ``model_index.json`` for a component with its library: names lie elsewhere."""
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "ClassConditionalPipeline"
    files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    assert _get_custom_components_and_folders("someone/model", index, files) == ({}, ["scheduler", "unet"])
