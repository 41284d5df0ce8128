"""``--objective autoencoder``: its loss from closed forms and stock diffusers, what is held out, measured and saved."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from training_helpers import TINY_VAE, common, config_file, losses, make_images, train_here

from diffusers_sde.assets import ASSETS
from diffusers_sde.training import autoencoders
from diffusers_sde.training.arguments import read_settings
from diffusers_sde.training.data import DataError, load_images
from diffusers_sde.training.reconstruction import kl_divergence, laplacian_pyramid, psnr, reconstruction_loss
from diffusers_sde.training.samples import hold_out

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("data"), 24, channels=3)


def arguments(data: Path, output: Path, steps: int = 6, **options: object) -> list[str]:
    config = config_file(output.parent, TINY_VAE)
    return common(data, output, config, steps, objective="autoencoder", num_held_out_images=4, use_ema=True, **options)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "out"
    assert train_here(arguments(data, output, num_validation_images=4)) == 0
    return output


# -- formulas --


def checkerboard(amplitude: float) -> torch.Tensor:
    signs = (-1.0) ** (torch.arange(16)[:, None] + torch.arange(16))
    return amplitude * signs.expand(1, 3, 16, 16)


def test_the_bands_of_the_pyramid_and_the_last_low_pass_image_make_the_image() -> None:
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    low = torch.nn.functional.avg_pool2d(image, 8)
    for band in reversed(laplacian_pyramid(image, levels=3)):
        raised = torch.nn.functional.interpolate(low, scale_factor=2, mode="bilinear", align_corners=False)
        low = raised + band
    torch.testing.assert_close(low, image)


def test_sharpness_counts_the_error_of_edges_and_not_that_of_a_shade() -> None:
    """A checkerboard is in the finest of three bands alone, a shade in none."""
    nothing, weights = torch.zeros(1, 3, 16, 16), {"loss": "l2", "huber_c": 0.1, "sharpness_weight": 6.0}
    edges = reconstruction_loss(checkerboard(0.5), nothing, **weights)
    shade = reconstruction_loss(nothing + 0.5, nothing, **weights)
    torch.testing.assert_close(edges, torch.tensor([0.25 * (1 + 6 / 3)]))
    torch.testing.assert_close(shade, torch.tensor([0.25]))


def test_the_divergence_is_that_of_diffusers_per_latent_number() -> None:
    vae = AutoencoderKL.from_config(TINY_VAE)
    posterior = vae.encode(torch.randn(3, 3, 16, 16)).latent_dist
    expected = posterior.kl() / posterior.mean[0].numel()
    torch.testing.assert_close(kl_divergence(posterior.mean, posterior.logvar), expected)


def test_an_error_of_a_hundredth_of_the_range_has_40_decibels_and_values_are_clamped() -> None:
    images = torch.full((1, 3, 8, 8), 0.5)
    torch.testing.assert_close(psnr(images + 0.02, images), torch.tensor([40.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(psnr(images + 9, images), psnr(images + 0.5, images))


def test_the_loss_of_a_batch_is_that_of_the_decoded_mean_plus_noise(data: Path, tmp_path: Path) -> None:
    """With a posterior of (almost) no variance the decoded mean has the loss; the prior's weight counts once."""
    settings = read_settings([*arguments(data, tmp_path / "out"), "--kl_weight", "0.5"])
    vae = AutoencoderKL.from_config(TINY_VAE)
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -30.0  # of the log-variance
    task = autoencoders.autoencoder_task(vae)
    images = load_images(data, resolution=16, channels=3)
    batch = {"pixel_values": autoencoders.pixels_of(images, 4), "positions": torch.arange(4)}
    with torch.no_grad():
        mean = vae.encode(batch["pixel_values"]).latent_dist.mean
        error = vae.decode(mean).sample - batch["pixel_values"]
        bands = [band.square().mean() for band in laplacian_pyramid(error)]
        divergence = 0.5 * (mean.square().mean() + np.exp(-30) - 1 + 30)
        expected = error.square().mean() + sum(bands) / len(bands) + 0.5 * divergence
        loss = autoencoders.loss_of_batch(settings, task, task.trained, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)


# -- held-out images --


def test_held_out_images_are_spread_evenly_and_never_trained_on(data: Path) -> None:
    images = load_images(data, resolution=16, channels=3)
    rest, held = hold_out(images, 4)
    assert held.numbers.tolist() == [3, 9, 15, 21]
    assert sorted([*rest.numbers, *held.numbers]) == list(range(24)) and len(rest) == 20
    seen = {item["pixel_values"].numpy().tobytes() for item in rest.items(range(60), seed=0)}
    assert not seen & {held.item(i, 0)["pixel_values"].numpy().tobytes() for i in range(4)}


def test_holding_out_everything_is_refused(data: Path) -> None:
    with pytest.raises(DataError, match="pass fewer"):
        hold_out(load_images(data, resolution=16, channels=3), 24)


# -- training --


def test_stopped_and_resumed_is_uninterrupted_bit_for_bit(data: Path, trained: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert train_here(arguments(data, output, stop_after_steps=3)) == 0
    assert train_here(arguments(data, output, resume_from_checkpoint="latest")) == 0
    first, second = load_file(trained / WEIGHTS), load_file(output / WEIGHTS)
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert losses(trained) == losses(output)


def test_training_sharpens_the_reconstruction(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = {"train_batch_size": 16, "checkpointing_steps": 60, "learning_rate": 5e-3}
    assert train_here(arguments(data, output, 60, **options)) == 0
    curve = list(losses(output).values())
    assert sum(curve[-10:]) < 0.3 * sum(curve[:10])


def test_the_result_is_a_stock_autoencoder_with_its_scaling_factor_quality_and_sheet(data: Path, trained: Path) -> None:
    vae = AutoencoderKL.from_pretrained(trained)
    held = hold_out(load_images(data, resolution=16, channels=3), 4)[1]
    images = torch.stack([held.item(i, 0)["pixel_values"] for i in range(4)])
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        decibels = psnr(vae.decode(latents).sample, images).mean()
    assert (latents * vae.config.scaling_factor).std() == pytest.approx(1, abs=1e-5)
    card = (trained / "README.md").read_text()
    assert f"PSNR {decibels:.2f} dB on 4 held-out images" in card and (trained / "samples.png").stat().st_size
    snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1].replace('"out"', f'"{trained}"')
    namespace: dict = {"images": images}
    exec(snippet, namespace)
    assert namespace["images"].shape == (4, 3, 16, 16)


def test_the_default_autoencoder_has_a_quarter_of_the_side_and_four_channels() -> None:
    vae = autoencoders.default_autoencoder(64, 3)
    assert sum(p.numel() for p in vae.parameters()) < 2e6
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean
        assert latents.shape == (1, 4, 16, 16) and vae.decode(latents).sample.shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="multiple of 4"):
        autoencoders.default_autoencoder(30, 3)


def test_the_embedded_autoencoder_reconstructs_held_out_emoji() -> None:
    """The sheet of its card has 40 of them, enlarged twice with a gap of 2, each above what the autoencoder makes."""
    folder = ASSETS / "emoji/vae"
    pixels = np.asarray(Image.open(folder / "samples.png").convert("RGB"))[2:, 2:]
    tiles = torch.from_numpy(pixels[: 8 * 130, : 10 * 130].reshape(8, 130, 10, 130, 3)[:, :128:2, :, :128:2].copy())
    images, shown = (tiles[k::2].permute(0, 2, 4, 1, 3).reshape(40, 3, 64, 64) / 127.5 - 1 for k in (0, 1))
    vae = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        made = vae.decode(latents).sample
    assert psnr(made, images).mean() > 31 and psnr(made, shown).min() > 40
    assert (latents * vae.config.scaling_factor).std() == pytest.approx(1, abs=0.05)
    assert (folder / WEIGHTS).stat().st_size < 3e6


# -- refusals --


@pytest.mark.parametrize(
    "words",
    [
        "--path flow",
        "--prediction_type epsilon",
        "--loss_weighting edm",
        "--time_sampling lognormal",
        "--pretrained_model_name_or_path m",
        "--vae_model_name_or_path v --train_text_encoder",
        "--cache_latents",
        "--kl_weight -1",
    ],
)
def test_what_an_autoencoder_has_not_is_refused_in_one_sentence(words: str, tmp_path: Path, capsys) -> None:
    least = ["--train_data_dir", "d", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    with pytest.raises(SystemExit):
        read_settings([*least, "--objective", "autoencoder", *words.split()])
    problem = capsys.readouterr().err
    assert words.split()[0] in problem and problem.count("\n") == 1


def test_held_out_images_of_another_objective_are_refused(tmp_path: Path, capsys) -> None:
    least = ["--train_data_dir", "d", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    with pytest.raises(SystemExit):
        read_settings([*least, "--num_held_out_images", "4"])
    assert "--num_held_out_images is for --objective autoencoder" in capsys.readouterr().err


def test_a_config_of_another_network_is_refused(data: Path, tmp_path: Path, capsys) -> None:
    config = config_file(tmp_path, {"_class_name": "UNet2DModel"})
    assert train_here(common(data, tmp_path / "out", config, 2, objective="autoencoder")) == 2
    assert "trains an AutoencoderKL, not a UNet2DModel" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
