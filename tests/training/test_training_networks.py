"""What can be trained: default networks, any pipeline conditioned by its own call, LoRA."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_pipelines
import torch
from accelerate import Accelerator
from PIL import Image
from tiny_pipelines import PIPELINES
from training_helpers import common, losses, make_images, train_here
from training_tasks import settings, text_pipeline, text_task

from diffusers_sde.training.framing import Framing
from diffusers_sde.training.losses import times_of
from diffusers_sde.training.networks import default_network, pipeline_task, process_scheduler
from diffusers_sde.training.validation import sample_sheet


@pytest.fixture(scope="module")
def captioned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_images(tmp_path_factory.mktemp("captioned"), 8, 16, classes=0, channels=3)
    lines = [json.dumps({"file_name": f"{i:03d}.png", "text": ["a cat", "a mat"][i % 2]}) for i in range(8)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("labelled"), 8, 16, channels=3)


def saved(name: str, folder: Path) -> Path:
    pipe, _, _ = PIPELINES[name]()
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("resolution", [16, 24, 32, 64, 128, 256])
def test_the_default_network_fits_the_resolution(resolution: int) -> None:
    network = default_network(resolution, 3, 4)
    count = sum(p.numel() for p in network.parameters())
    assert network.config.num_class_embeds == 5 and count < 8e6
    if resolution <= 32:
        x = torch.zeros(1, 3, resolution, resolution)
        assert network(x, 0, torch.tensor([0])).sample.shape == x.shape


def test_a_resolution_that_does_not_halve_is_refused_with_the_divisor() -> None:
    with pytest.raises(ValueError, match="multiple of 4"):
        default_network(30, 3, 0)


def test_the_default_network_at_32_is_of_the_size_of_the_embedded_models() -> None:
    assert 2e6 < sum(p.numel() for p in default_network(32, 3, 8).parameters()) < 4e6


@pytest.mark.parametrize("path", ["vp", "cosine", "flow", "edm"])
def test_processes_that_diffusers_knows_are_saved_as_its_own(path: str) -> None:
    kind = {"flow": "flow_prediction", "edm": "epsilon"}.get(path, "v_prediction")
    assert type(process_scheduler(path, kind)).__module__.startswith("diffusers.")


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart_alpha"])
def test_the_condition_of_a_caption_is_what_the_pipeline_gives_its_network(name: str) -> None:
    """The captured arguments make the network say what it says inside the pipeline's own call."""
    pipe, call, _ = PIPELINES[name]()
    task = pipeline_task(pipe, 0, captions=True)
    seen: list = []
    forward = task.network.forward

    def watch(*args, **kwargs):
        out = forward(*args, **kwargs)
        seen.append((args, kwargs, out[0]))
        return out

    task.network.forward = watch
    taken = {k: v for k, v in call.items() if k in ("height", "width", "use_resolution_binning")}
    generator = torch.Generator().manual_seed(0)
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent", "generator": generator}
    pipe(prompt=["a cat"], **options, **taken)
    task.network.forward = forward
    args, kwargs, said = seen[0]
    x = args[0] if args else kwargs["hidden_states" if name in ("sd3", "pixart_alpha") else "sample"]
    time = kwargs["timestep"] if "timestep" in kwargs else args[1]
    condition = task.condition(None, ["a cat"])
    with torch.no_grad():
        mine = task.network(x, timestep=time, **condition, return_dict=False)[0]
    torch.testing.assert_close(mine, said)


def test_a_dropped_caption_is_what_the_pipeline_samples_with_beside_the_prompt() -> None:
    """SDXL's: zeros, not the embedding of an empty prompt; its pipeline calls the network once, for both."""
    pipe = PIPELINES["sdxl"]()[0]
    assert pipe.config.force_zeros_for_empty_prompt
    seen: list = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pipe("a cat", num_inference_steps=1, guidance_scale=5.0, output_type="latent")
    hook.remove()
    expected, added = seen[0]["encoder_hidden_states"], seen[0]["added_cond_kwargs"]
    task = pipeline_task(pipe, 0, captions=True)
    found = task.condition(None, [None, "a cat"])
    torch.testing.assert_close(found["encoder_hidden_states"], expected)
    torch.testing.assert_close(found["added_cond_kwargs"]["text_embeds"], added["text_embeds"])
    empty = task.condition(None, [""])
    assert empty["encoder_hidden_states"].abs().max() > 0  # a caption that is empty was not dropped


def test_networks_that_know_of_sizes_are_told_those_of_each_picture() -> None:
    """SDXL: original height and width, top and left of the crop, height and width of the training images."""
    task = pipeline_task(PIPELINES["sdxl"]()[0], 0, captions=True, resolution=24)
    frames = torch.tensor([[100, 50, 0, 3], [30, 60, 2, 0]])
    found = task.given(None, ["a cat", None], frames)["added_cond_kwargs"]["time_ids"]
    assert found.tolist() == [[100, 50, 0, 3, 24, 24], [30, 60, 2, 0, 24, 24]]
    assert task.given(None, ["a cat"])["added_cond_kwargs"]["time_ids"].tolist() == [[24, 24, 0, 0, 24, 24]]


@pytest.mark.parametrize("flip", [False, True])
def test_the_frame_of_an_item_says_where_in_its_picture_it_lies(flip: bool) -> None:
    """A picture of 40x20 at resolution 10 is scaled to 20x10, and its crop begins at a column that is its shade."""
    ramp = torch.arange(40, dtype=torch.uint8).repeat(20, 1).numpy() * 6
    framing = Framing(10, 1, center_crop=False, random_flip=flip)
    pixels = torch.from_numpy(framing.pixels(Image.fromarray(ramp)))
    seen = set()
    for seed in range(20):
        height, width, top, left = framing.frame((40, 20), seed)
        row = (framing.tensor(pixels, seed)[0, 0] + 1) * 127.5
        flipped = bool(row[0] > row[-1])
        whole = (pixels.flip(-1) if flipped else pixels)[0, 0].float()
        torch.testing.assert_close(row, whole[left : left + 10])
        assert (height, width, top) == (20, 40, 0)
        seen.add(flipped)
    assert seen == ({False, True} if flip else {False})


def test_a_centre_crop_begins_where_its_margin_ends() -> None:
    assert Framing(10, 1).frame((80, 20), 0) == (20, 80, 0, 15)


@pytest.mark.parametrize("name", ["flux", "qwen_image"])
def test_training_times_are_shifted_as_the_pipeline_shifts_at_this_resolution(name: str) -> None:
    """``mu`` grows with the number of tokens, 16 here (Flux: 0.5 at 256, 1.15 at 4096)."""
    task = text_task(name)
    config = task.scheduler.config
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    assert task.mu == pytest.approx(config.base_shift + slope * (16 - config.base_image_seq_len))
    u = np.array([0.2, 0.7])
    plain = (1 + 999 * (np.exp(task.mu) * u / (1 + (np.exp(task.mu) - 1) * u))) / 1000
    times, _ = times_of(settings(), task, u)
    np.testing.assert_allclose(times / 1000, plain, rtol=1e-12)


def test_sheets_are_made_at_the_resolution_of_the_training_a_few_at_a_time() -> None:
    """Five pictures of 24x24, at most two at once; the same whatever the batch."""
    task = text_task("sd")
    options = {"num_validation_images": 5, "validation_inference_steps": 1, "resolution": 24}
    counts = []
    decode = task.vae.decode

    def counted(z, *args, **kwargs):
        counts.append(len(z))
        return decode(z, *args, **kwargs)

    task.pipe.vae.decode = counted
    two, five = (
        sample_sheet(settings(train_batch_size=size, **options), task, 0, Accelerator(cpu=True), None)
        for size in (2, 5)
    )
    assert counts == [2, 2, 1, 5] and two.size == (5 * 2 * 24 + 12, 2 * 24 + 4)
    assert np.abs(np.asarray(two, int) - np.asarray(five, int)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "pixart_alpha"])
def test_text_to_image_pipelines_are_fine_tuned(name: str, captioned: Path, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "model")
    arguments = common(captioned, tmp_path / "out", None, 2, pretrained_model_name_or_path=model, resolution=16)
    assert train_here([*arguments, "--cache_latents", "--center_crop"]) == 0
    assert (
        type(diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out")).__name__
        == type(PIPELINES[name]()[0]).__name__
    )
    assert all(v < 20 for v in losses(tmp_path / "out").values())


def test_a_class_conditional_transformer_is_fine_tuned(labelled: Path, tmp_path: Path) -> None:
    model = saved("dit", tmp_path / "model")
    arguments = common(labelled, tmp_path / "out", None, 2, pretrained_model_name_or_path=model, resolution=16)
    assert train_here([*arguments, "--center_crop"]) == 0
    assert (tmp_path / "out/transformer").is_dir()


def test_lora_of_stable_diffusion_loads_into_the_pipeline(captioned: Path, tmp_path: Path) -> None:
    """The saved weights are the trained ones: they change the picture, and only the adapters were trained."""
    model = saved("sd", tmp_path / "model")
    arguments = common(captioned, tmp_path / "out", None, 3, pretrained_model_name_or_path=model, resolution=16)
    options = [
        "--rank",
        "2",
        "--learning_rate",
        "0.05",
        "--num_validation_images",
        "1",
        "--validation_prompts",
        "a cat",
    ]
    assert train_here([*arguments, *options, "--validation_inference_steps", "2"]) == 0
    assert (tmp_path / "out/pytorch_lora_weights.safetensors").is_file() and not (tmp_path / "out/unet").exists()
    pipe, call, _ = PIPELINES["sd"]()

    def picture():
        return pipe(**{**call, "generator": torch.Generator().manual_seed(0), "output_type": "np"})[0]

    before = picture()
    pipe.load_lora_weights(tmp_path / "out")
    try:
        assert abs(picture() - before).max() > 1e-4
    finally:
        pipe.unload_lora_weights()
    assert "load_lora_weights" in (tmp_path / "out/README.md").read_text()


def test_lora_of_a_packed_flow_transformer_is_trained_by_the_script(captioned: Path, tmp_path: Path) -> None:
    """Flux: cached latents, a sheet, a card, and weights that its pipeline loads."""
    model = saved("flux", tmp_path / "model")
    arguments = common(captioned, tmp_path / "out", None, 2, pretrained_model_name_or_path=model, resolution=16)
    shown = ["--num_validation_images", "1", "--validation_prompts", "a cat", "--validation_inference_steps", "2"]
    assert train_here([*arguments, "--rank", "2", "--cache_latents", "--center_crop", *shown]) == 0
    PIPELINES["flux"]()[0].lora_state_dict(tmp_path / "out")
    assert (tmp_path / "out/samples.png").is_file() and (tmp_path / "out/README.md").is_file()


@pytest.mark.parametrize(
    ("name", "options", "remedy"),
    [
        ("sd", {}, "metadata.jsonl"),
        ("dit", {"classes": 0}, "class folders"),
    ],
)
def test_data_and_pipelines_that_do_not_fit_are_refused_with_the_remedy(name: str, options: dict, remedy: str) -> None:
    pipe, _, _ = PIPELINES[name]()
    with pytest.raises(ValueError, match=remedy):
        pipeline_task(pipe, options.get("classes", 2 if name == "dit" else 0), captions=options.get("captions", False))


@pytest.mark.parametrize("name", ["flux", "qwen_image", "z_image"])
def test_a_resolution_that_does_not_fall_into_patches_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"multiple of {2 * text_pipeline(name).vae_scale_factor}"):
        pipeline_task(text_pipeline(name), 0, captions=True, resolution=18)


def test_a_model_without_adapters_refuses_lora(labelled: Path, tmp_path: Path, capsys) -> None:
    network = tiny_pipelines.ddpm_unet()
    diffusers.DDPMPipeline(network, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "model")
    arguments = common(labelled, tmp_path / "out", None, 2, pretrained_model_name_or_path=tmp_path / "model", rank=2)
    assert train_here(arguments) == 2
    assert "leave out --rank" in capsys.readouterr().err and not (tmp_path / "out").exists()
