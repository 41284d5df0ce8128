"""A text-to-image model from captions alone: tokenizer, text encoder in training, the stock pipeline that is saved."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from tiny_pipelines import PIPELINES
from training_helpers import (
    CAPTIONS,
    TINY,
    TINY_TEXT_TRANSFORMER,
    TINY_TEXT_UNET,
    TINY_VAE,
    common,
    config_file,
    losses,
    make_captioned,
    train_here,
)
from transformers import CLIPTokenizer

import diffusers_sde
from diffusers_sde.training import text, text_pipelines
from diffusers_sde.training.arguments import read_settings
from diffusers_sde.training.data import load_images
from diffusers_sde.training.networks import pipeline_task, process_scheduler
from diffusers_sde.training.parts import part_states

UNET, ENCODER = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
SENTENCES = ["grinning face with smiling eyes", "red apple", "1st place medal, award", "upside-down face"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_captioned(tmp_path_factory.mktemp("captioned"))


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    vae = diffusers.AutoencoderKL.from_config({**TINY_VAE, "scaling_factor": 0.7})
    with torch.no_grad():  # latents without noise
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -30
    vae.save_pretrained(folder)
    return folder


def arguments(data: Path, vae: Path, output: Path, steps: int = 6, **options: object) -> list[str]:
    config = config_file(output.parent, TINY_TEXT_UNET)
    new = {"vae_model_name_or_path": vae, "train_text_encoder": True, "cache_latents": True, "use_ema": True}
    return common(data, output, config, steps, **{**new, **options})


@pytest.fixture(scope="module")
def trained(data: Path, vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "out"
    shown = {"num_validation_images": 2, "validation_inference_steps": 2}
    assert train_here(arguments(data, vae, output, label_dropout=0.5, **shown)) == 0
    return output


def fresh_network(flow: bool) -> torch.nn.Module:
    if flow:
        return diffusers.CogView4Transformer2DModel.from_config(TINY_TEXT_TRANSFORMER)
    return diffusers.UNet2DConditionModel.from_config(TINY_TEXT_UNET)


def fresh_pipeline(flow: bool = False) -> diffusers.DiffusionPipeline:
    torch.manual_seed(0)
    scheduler = process_scheduler(*(("flow", "flow_prediction") if flow else ("scaled_linear", "v_prediction")))
    vae = diffusers.AutoencoderKL.from_config(TINY_VAE)
    return text_pipelines.new_pipeline(vae, fresh_network(flow), scheduler, SENTENCES, 8)


# -- tokenizer --


def test_every_word_of_the_captions_is_one_piece_between_start_and_end() -> None:
    tokenizer = text.make_tokenizer(SENTENCES)
    words = ["red", "apple", "with", "smiling", "eyes"]
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("Red  apple with smiling eyes").input_ids)
    assert pieces == [
        "<|startoftext|>",
        *(f"{word}</w>" for word in words),
        "<|endoftext|>",
    ]


@pytest.mark.parametrize("words", ["red apple", "grinning eyes with apple", "purple zebra", "ünï 🍎", "x"])
def test_known_and_unknown_words_come_back_from_their_numbers(words: str) -> None:
    """Unknown words fall apart into pieces, in the end into bytes; none becomes the token of the unknown."""
    tokenizer = text.make_tokenizer(SENTENCES)
    numbers = tokenizer(words).input_ids
    assert tokenizer.decode(numbers, skip_special_tokens=True) == words
    assert tokenizer.unk_token_id not in numbers[1:-1]


def test_the_most_frequent_pair_is_merged_first_and_the_first_in_the_alphabet_among_equals() -> None:
    """aab, aab, ab: (a, b) occurs three times, (a, a) twice; after its merge (a, ab) is left.  Then cd before ce."""
    merges = [("a", "b</w>"), ("a", "ab</w>"), ("c", "d</w>"), ("c", "e</w>")]
    assert text.learn_merges({"ce": 1, "ab": 1, "cd": 1, "aab": 2}) == merges
    assert text.merged(["a", "a", "a", "b"], ("a", "a")) == ["aa", "a", "b"]


def test_the_numbers_of_words_are_the_same_in_every_process() -> None:
    """A resumed training builds its tokenizer anew; hashes of strings differ from process to process."""
    program = f"from diffusers_sde.training import text; print(text.make_tokenizer({SENTENCES}).get_vocab())"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert ast.literal_eval(done.stdout) == text.make_tokenizer(SENTENCES).get_vocab()


def test_the_tokenizer_survives_saving(tmp_path: Path) -> None:
    tokenizer = text.make_tokenizer(SENTENCES)
    tokenizer.save_pretrained(tmp_path)
    other = CLIPTokenizer.from_pretrained(tmp_path)
    assert other.get_vocab() == tokenizer.get_vocab() and other.model_max_length == 16
    assert [other(s).input_ids for s in SENTENCES] == [tokenizer(s).input_ids for s in SENTENCES]


def test_prompts_may_be_as_long_as_the_longest_caption() -> None:
    assert text.make_tokenizer(["one two " * 10]).model_max_length == 24


# -- the new pipeline --


def test_the_process_of_a_new_text_model_is_that_of_stable_diffusion() -> None:
    scheduler = process_scheduler("scaled_linear", "v_prediction")
    stock = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    torch.testing.assert_close(scheduler.alphas_cumprod, stock.alphas_cumprod, rtol=0, atol=0)
    assert float(scheduler.alphas_cumprod[-1]) == pytest.approx(0.00466, abs=1e-5)
    assert type(scheduler) is diffusers.DDIMScheduler and scheduler.config.prediction_type == "v_prediction"


def test_the_default_network_is_small_and_fits_the_latents() -> None:
    network = text_pipelines.default_text_network(16, 4, flow=False)
    assert 3e6 < sum(p.numel() for p in network.parameters()) < 8e6
    with torch.no_grad():
        assert network(torch.zeros(1, 4, 16, 16), 5, torch.zeros(1, 16, 128)).sample.shape == (1, 4, 16, 16)
    with pytest.raises(ValueError, match="a multiple of 4"):
        text_pipelines.default_text_network(10, 4, flow=False)


def test_the_default_flow_network_is_small_and_fits_the_latents() -> None:
    network = text_pipelines.default_text_network(16, 4, flow=True)
    assert 3e6 < sum(p.numel() for p in network.parameters()) < 6e6
    sizes = {name: torch.full((1, 2), 64.0) for name in ("original_size", "target_size", "crop_coords")}
    with torch.no_grad():
        made = network(torch.zeros(1, 4, 16, 16), torch.zeros(1, 16, 128), torch.tensor([5.0]), **sizes)
    assert made.sample.shape == (1, 4, 16, 16)
    with pytest.raises(ValueError, match="a multiple of 2"):
        text_pipelines.default_text_network(9, 4, flow=True)


def test_a_prompt_means_the_same_alone_and_beside_a_longer_one() -> None:
    """CogView4Pipeline pads a batch to its longest prompt, then on the left; so does the tokenizer made for it."""
    pipe = fresh_pipeline(flow=True)
    with torch.no_grad():
        alone, _ = pipe.encode_prompt("red apple", do_classifier_free_guidance=False)
        beside, _ = pipe.encode_prompt(SENTENCES[:2], do_classifier_free_guidance=False)
    torch.testing.assert_close(alone[0], beside[1])


def test_prompts_longer_than_any_caption_are_not_an_error() -> None:
    image = fresh_pipeline(flow=True)("red apple " * 20, num_inference_steps=1, output_type="latent").images
    assert image.shape == (1, 4, 8, 8)


def test_captions_of_very_different_lengths_are_filled_up_as_the_pipeline_does() -> None:
    """Its network takes no mask."""
    pipe = fresh_pipeline(flow=True)
    captions = ["red apple", "red apple " * 20]
    found = pipeline_task(pipe, 0, True).condition(None, captions)["encoder_hidden_states"]
    with torch.no_grad():
        expected, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("flow", [True, False])
def test_a_network_of_another_process_is_refused(flow: bool) -> None:
    """The stock scheduler of one process cannot be called by the stock pipeline of the other."""
    network = fresh_network(flow=not flow)
    scheduler = process_scheduler(*(("flow", "flow_prediction") if flow else ("scaled_linear", "v_prediction")))
    with pytest.raises(ValueError, match="does not go with this --path"):
        text_pipelines.new_pipeline(diffusers.AutoencoderKL.from_config(TINY_VAE), network, scheduler, SENTENCES, 8)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"in_channels": 5}, "takes 5 channels, the latents have 4"),
        ({"sample_size": 16}, "makes latents of side 16, those of the training images have 8"),
        (None, "needs a UNet2DConditionModel or a CogView4Transformer2DModel, not a UNet2DModel: correct"),
    ],
)
def test_a_network_that_does_not_fit_is_refused(changes: dict[str, object] | None, remedy: str) -> None:
    if changes is None:
        network = diffusers.UNet2DModel.from_config(TINY)
    else:
        network = diffusers.UNet2DConditionModel.from_config({**TINY_TEXT_UNET, **changes})
    with pytest.raises(ValueError, match=remedy):
        scheduler = process_scheduler("scaled_linear", "v_prediction")
        text_pipelines.new_pipeline(diffusers.AutoencoderKL.from_config(TINY_VAE), network, scheduler, SENTENCES, 8)


# -- the text encoder in training --


@pytest.mark.parametrize("flow", [False, True])
def test_the_joint_module_predicts_what_the_pipeline_would_feed_its_network(flow: bool) -> None:
    pipe = fresh_pipeline(flow)
    frozen = pipeline_task(pipe, 0, True)
    prompts = ["red apple", None, "grinning face with smiling eyes"]
    given = frozen.condition(None, prompts)
    joint = text.with_text_encoder(frozen)
    x, t = torch.randn(3, 4, 8, 8), torch.tensor([10.0, 500.0, 900.0])
    with torch.no_grad():
        expected = frozen.network(x, timestep=t, **given, return_dict=False)[0]
        actual = joint.trained(x, timestep=t, **joint.condition(None, prompts), return_dict=False)[0]
    torch.testing.assert_close(actual, expected)


def test_gradients_reach_every_weight_of_the_encoder_and_none_of_the_autoencoder() -> None:
    joint = text.with_text_encoder(pipeline_task(fresh_pipeline(), 0, True))
    condition = joint.condition(None, SENTENCES)
    joint.trained(
        torch.randn(4, 4, 8, 8), timestep=torch.full((4,), 500.0), **condition
    ).sample.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in joint.pipe.text_encoder.parameters())
    assert not any(p.requires_grad for p in joint.pipe.vae.parameters())


def test_layers_behind_the_one_attended_to_are_not_trained() -> None:
    """Processes that wait for gradients of theirs would wait for ever."""
    joint = text.with_text_encoder(pipeline_task(fresh_pipeline(flow=True), 0, True))
    idle = {name for name, p in joint.pipe.text_encoder.named_parameters() if not p.requires_grad}
    assert idle and all("layers.1." in name or "final_layer_norm" in name for name in idle)


def test_the_weights_of_the_parts_are_found_in_those_of_the_joint_module() -> None:
    joint = text.with_text_encoder(pipeline_task(fresh_pipeline(), 0, True))
    states = part_states(joint, joint.trained.state_dict())
    for name in ("unet", "text_encoder"):
        own = getattr(joint.pipe, name).state_dict()
        assert states[name].keys() == own.keys() and all(torch.equal(states[name][k], own[k]) for k in own)


@pytest.mark.parametrize("name", ["sdxl", "pixart_alpha", "dit"])
def test_pipelines_with_other_conditions_are_refused(name: str) -> None:
    task = pipeline_task(PIPELINES[name]()[0], 2, True)
    with pytest.raises(ValueError, match="leave out --train_text_encoder"):
        text.with_text_encoder(task)


# -- training --


def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(data: Path, vae: Path, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert train_here(arguments(data, vae, output, stop_after_steps=3, label_dropout=0.5)) == 0
    assert train_here(arguments(data, vae, output, resume_from_checkpoint="latest", label_dropout=0.5)) == 0
    for file in (UNET, ENCODER):
        first, second = load_file(trained / file), load_file(output / file)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert losses(trained) == losses(output)


def test_the_result_is_called_by_stock_diffusers_in_a_new_process(data: Path, vae: Path, tmp_path: Path) -> None:
    """Stored in half precision, loaded in float32."""
    trained = tmp_path / "out"
    assert train_here([*arguments(data, vae, trained, 2), "--save_precision", "fp16"]) == 0
    assert all(load_file(trained / file).popitem()[1].dtype == torch.float16 for file in (UNET, ENCODER))
    program = f"""
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({str(trained)!r})
image = pipe("a red bar", num_inference_steps=2, guidance_scale=5.0, output_type="pt").images
print(type(pipe).__name__, type(pipe.scheduler).__name__, tuple(image.shape), bool(image.isfinite().all()))
print(pipe.vae.config.scaling_factor, pipe.safety_checker, pipe.text_encoder.dtype, "diffusers_sde" in sys.modules)"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == [
        "StableDiffusionPipeline DDIMScheduler (1, 3, 16, 16) True",
        "0.7 None torch.float32 False",
    ]


def test_a_new_flow_model_is_trained_and_called_by_stock_diffusers(data: Path, vae: Path, tmp_path: Path) -> None:
    """Network and text encoder have moved, and the loaded pipeline makes another picture of another prompt."""
    config = config_file(tmp_path, TINY_TEXT_TRANSFORMER)
    new = {"vae_model_name_or_path": vae, "train_text_encoder": True, "cache_latents": True, "path": "flow"}
    for name, rate in (("still", 1e-30), ("moved", 1e-2)):
        words = common(data, tmp_path / name, config, 3, **new)
        assert train_here([*words, "--learning_rate", str(rate)]) == 0
    still, moved = (diffusers.DiffusionPipeline.from_pretrained(tmp_path / name) for name in ("still", "moved"))
    assert type(moved) is diffusers.CogView4Pipeline
    assert type(moved.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    for part in ("transformer", "text_encoder"):
        before, after = (getattr(pipe, part).state_dict() for pipe in (still, moved))
        changed = {key for key in before if not torch.equal(before[key], after[key])}
        unused = {key for key in before if "layers.1." in key or "final_layer_norm" in key}  # of the text encoder
        assert changed == before.keys() - unused if part == "text_encoder" else len(changed) > 0.9 * len(before)
    options = {"num_inference_steps": 2, "output_type": "latent"}
    first, second = (
        moved(prompt, **options, generator=torch.Generator().manual_seed(0)).images for prompt in ("a red bar", "bar")
    )
    assert first.shape == (1, 4, 8, 8) and not torch.allclose(first, second)


@pytest.mark.parametrize("name", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"])
def test_the_result_also_changes_pictures_with_the_schedulers_of_this_package(trained: Path, name: str) -> None:
    """Little strength, little change of the picture's latents, even by a network that has hardly learned."""
    pipe = getattr(diffusers, name).from_pretrained(trained)
    pipe.scheduler = diffusers_sde.ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    masked = {"mask_image": torch.ones(1, 1, 16, 16), "height": 16, "width": 16} if "Inpaint" in name else {}
    with torch.no_grad():
        kept = pipe.vae.encode(2 * image - 1).latent_dist.mean * pipe.vae.config.scaling_factor

    def changed(strength: float) -> float:
        inputs = {"image": image, "strength": strength, "num_inference_steps": 20, "output_type": "latent", **masked}
        made = pipe("a red bar", **inputs, generator=torch.Generator().manual_seed(1)).images
        return float((made - kept).square().mean().sqrt())

    assert changed(0.1) < 0.5 * changed(1.0)


def test_network_and_text_encoder_are_trained_and_the_autoencoder_is_not(
    data: Path, vae: Path, trained: Path, tmp_path: Path
) -> None:
    """Against the same seed at a learning rate that changes nothing."""
    still = tmp_path / "out"
    assert train_here([*arguments(data, vae, still, 1, use_ema=False), "--learning_rate", "1e-30"]) == 0
    for file in (UNET, ENCODER):
        before, after = load_file(still / file), load_file(trained / file)
        moved = [key for key in before if not torch.equal(before[key], after[key])]
        assert len(moved) > 0.9 * len(before)
    given = load_file(vae / "diffusion_pytorch_model.safetensors")
    kept = load_file(trained / "vae/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(given[key], kept[key]) for key in given)


def test_lora_on_network_and_text_encoder_changes_the_picture_of_the_loaded_pipeline(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    options = {"pretrained_model_name_or_path": trained, "rank": 2, "train_text_encoder": True, "learning_rate": 1e-2}
    assert train_here(common(data, output, None, 4, **options)) == 0
    saved = load_file(output / "pytorch_lora_weights.safetensors")
    assert {key.split(".")[0] for key in saved} == {"unet", "text_encoder"}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(trained)

    def embeddings() -> torch.Tensor:
        with torch.no_grad():
            return pipe.encode_prompt("a red bar", "cpu", 1, False)[0]

    before = embeddings()
    pipe.load_lora_weights(output)
    assert not torch.allclose(before, embeddings(), atol=1e-4)
    pipe.unload_lora_weights()
    torch.testing.assert_close(before, embeddings())


def test_of_several_captions_each_is_drawn_and_its_image_keeps_its_own(data: Path) -> None:
    images = load_images(data, resolution=16, channels=3)
    labels = [images.item(i, 0)["class_labels"] for i in range(len(images))]
    for label, expected in enumerate((set(CAPTIONS[0]), {CAPTIONS[1]})):
        drawn = {images.item(i, seed)["caption"] for i, k in enumerate(labels) if k == label for seed in range(20)}
        assert drawn == expected
    assert set(images.all_captions()) == {*CAPTIONS[0], CAPTIONS[1]}


# -- refusals --


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("--train_text_encoder", "pass --pretrained_model_name_or_path"),
        ("--vae_model_name_or_path v", "pass --train_text_encoder too"),
        ("--vae_model_name_or_path v --pretrained_model_name_or_path m", "leave out --vae_model_name_or_path"),
        ("--pretrained_model_name_or_path m --train_text_encoder --objective consistency", "leave it out"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_sentence(words: str, remedy: str, tmp_path: Path, capsys) -> None:
    least = ["--train_data_dir", "d", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    with pytest.raises(SystemExit):
        read_settings([*least, *words.split()])
    problem = capsys.readouterr().err
    assert remedy in problem and problem.count("\n") == 1


def test_missing_captions_and_autoencoders_are_refused_before_anything_is_written(
    data: Path, vae: Path, tmp_path: Path, capsys
) -> None:
    bare = tmp_path / "bare"
    for file in data.rglob("*.png"):
        target = bare / file.relative_to(data)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    output = tmp_path / "out"
    assert train_here(arguments(bare, vae, output)) == 2
    assert "needs captions" in capsys.readouterr().err
    assert train_here(arguments(data, vae, output, caption_column="keywords")) == 2
    assert "none named 'keywords'" in capsys.readouterr().err
    assert train_here(arguments(data, tmp_path / "missing", output)) == 2
    assert "holds no AutoencoderKL" in capsys.readouterr().err
    assert not output.exists()
