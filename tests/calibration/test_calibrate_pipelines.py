"""Calibration through a pipeline's own call, and the command."""

import numpy as np
import pytest
import torch
from calibration_helpers import VP
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from helpers import mixture
from tiny_pipelines import PIPELINES

import diffusers_sde
from diffusers_sde import CalibratedScheduler, ProbabilityFlowScheduler, calibrate
from diffusers_sde.calibration.sources import class_conditional_source
from diffusers_sde.cli import main


def test_command_writes_a_scheduler(tmp_path, capsys):
    pipe = DDPMPipeline(mixture(**VP), DDPMScheduler(**VP, clip_sample=False))
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--num_samples", "8", "--steps", "4", "--budget", "0", "--output_dir", str(out)]
    assert main(["calibrate", "--model", str(tmp_path / "model"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "8 training and 8 held-out samples" in printed and "MiB of the teacher" in printed
    assert "training  held-out     exact  ratio to exact\n" in printed and "diffusers)" not in printed
    assert set(CalibratedScheduler.from_pretrained(out).errors) == {4}
    assert main(["calibrate", "--model", str(tmp_path / "model"), *arguments, "--compare_with_stock"]) == 0
    printed = capsys.readouterr().out
    assert "stock  (best of diffusers)     ratio to exact, stock\n" in printed
    best = CalibratedScheduler.from_pretrained(out).errors[4]
    assert f"{best['stock']:.5f}  {best['stock_name']}" in printed
    assert main(["calibrate", "--model", str(tmp_path / "none"), *arguments]) == 2
    assert main(["calibrate", "--model", str(tmp_path / "model"), *arguments, "--prompt", "a cat"]) == 2
    assert "prompt" in capsys.readouterr().err


def test_class_conditional_network_through_its_bare_pipeline():
    """Every class at every guidance scale is in each batch; classes may be named where the network has names."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=3,
    ).eval()
    seen = []
    unet.register_forward_hook(lambda m, args, out: seen.append(args[2].tolist()))
    pipe = DDPMPipeline(unet, DDPMScheduler(clip_sample=False))
    options = {"num_inference_steps": 3, "num_samples": 4, "batch_size": 4, "budget": 0, "progress": False}
    scheduler = calibrate(pipe, guidance_scale=[1.0, 3.0], **options)
    assert isinstance(scheduler, diffusers_sde.CalibratedScheduler)
    assert {tuple(v) for v in seen} == {(0, 0, 1, 1), (2, 2, 2, 2)}
    seen.clear()
    unet.register_to_config(_class_names=["shoe", "bag"])
    with class_conditional_source(pipe, {"class_labels": "bag"}, batch_size=2, seed=0).open(0) as batch:
        batch.evaluate(batch.noise, torch.tensor(500))
    assert seen == [[2, 2, 1, 1]]  # guided, as the pipeline's own call
    with pytest.raises(ValueError, match="no prompt"):
        calibrate(pipe, prompt="a cat", **options)


def tiny(name):
    pipe, call, _ = PIPELINES[name]()
    ours = ("generator", "num_inference_steps", "output_type", "return_dict", "latents")
    return pipe, {k: v for k, v in call.items() if k not in ours}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "flux", "dit"])
def test_pipelines_are_calibrated_through_their_own_call(name):
    """Guided text-to-image, flow matching with a dynamic shift, class labels with every sample held twice: the pipeline
    keeps its scheduler, and the calibrated one takes it nearer to its own converged latents than the exact one."""
    pipe, call = tiny(name)
    own = pipe.scheduler
    options = {"num_samples": 2, "batch_size": 2, "budget": 0, "progress": False}
    scheduler = calibrate(pipe, num_inference_steps=3, **options, **call)
    assert pipe.scheduler is own
    e = scheduler.errors[3]
    assert e["held_out"] < e["exact"]

    def latents(s, n):
        pipe.scheduler = s
        kind = {} if name == "dit" else {"output_type": "latent"}
        return torch.as_tensor(
            np.asarray(pipe(**call, num_inference_steps=n, generator=torch.Generator().manual_seed(5), **kind)[0])
        ).float()

    if name != "dit":  # it returns pictures only
        exact = ProbabilityFlowScheduler.from_config(own.config)
        converged = latents(exact, 60)
        learned, plain = ((latents(s, 3) - converged).norm() for s in (scheduler, exact))
        assert learned < plain


def test_pipelines_that_start_from_an_image_are_refused():
    pipe, call = tiny("sd_img2img")
    with pytest.raises(ValueError, match="pure noise"):
        calibrate(pipe, num_inference_steps=3, num_samples=2, batch_size=1, progress=False, **call)
    pipe, call = tiny("sd")
    with pytest.raises(ValueError, match="latents"):
        calibrate(pipe, latents=torch.zeros(1), progress=False, **call)
    with pytest.raises(ValueError, match="takes no colour"):
        calibrate(pipe, colour="red", progress=False, **call)
