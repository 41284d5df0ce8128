"""Replacing the scheduler of a stock pipeline: it runs, costs the same, means the same process, and can be undone."""

import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from tiny_pipelines import PIPELINES, generator, stock

from diffusers_sde import DPMSolverScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler

CLASSES = [ProbabilityFlowScheduler, ReverseSDEScheduler, DPMSolverScheduler]
# Pipelines with a deterministic stock solver to compare with (None: the one they have).
ODE_OF_STOCK = {
    **dict.fromkeys(["sd", "sd_img2img", "sdxl", "playground", "playground_euler", "sd3", "flux", "flux_img2img"]),
    **dict.fromkeys(["pixart_alpha", "dit", "ddim", "sana", "wan", "ltx", "cogvideox", "mochi", "svd"]),
    "deepfloyd_if": diffusers.DPMSolverMultistepScheduler,
}


by_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def denoiser(pipe):
    return next(pipe.components[name] for name in ("unet", "transformer", "prior") if name in pipe.components)


def run(pipe, kwargs):
    """Call the pipeline; return its output, the number of network calls, and the first and last sample of the loop."""
    steps, calls = [], []
    original = pipe.scheduler.step

    @functools.wraps(original)  # pipelines look at the signature
    def step(*args, **kw):
        sample = inspect.signature(original).bind(*args, **kw).arguments["sample"].clone()
        result = original(*args, **kw)
        steps.append((sample, result[0]))
        return result

    hook = denoiser(pipe).register_forward_hook(lambda *_: calls.append(1))
    pipe.scheduler.step = step
    try:
        output = torch.as_tensor(pipe(**kwargs)[0])
    finally:
        hook.remove()
        del pipe.scheduler.step
    return SimpleNamespace(output=output, calls=len(calls), first=steps[0][0], last=steps[-1][1])


def swapped(name, cls, **changes):
    pipe, kwargs, shape = PIPELINES[name]()
    pipe.scheduler = cls.from_config(pipe.scheduler.config, **changes)
    return pipe, kwargs, shape


def directly(scheduler):
    """The same scheduler from its constructor: the config has no `_class_name` and no record of what was a default."""
    cls = type(scheduler)
    names = set(inspect.signature(cls.__init__).parameters) & set(scheduler.config)
    return cls(**{name: scheduler.config[name] for name in names})


@by_class
@pytest.mark.parametrize("name", PIPELINES)
def test_runs(name, cls):
    """The pipeline runs after the swap: finite, of the right shape, and the loop has moved the sample."""
    pipe, kwargs, shape = swapped(name, cls)
    result = run(pipe, kwargs)
    assert isinstance(pipe.scheduler, cls)
    assert tuple(result.output.shape) == shape
    assert result.output.isfinite().all()
    assert result.last.isfinite().all()
    assert (result.last - result.first).norm() > 0.01 * result.first.norm()


@by_class
@pytest.mark.parametrize("name", PIPELINES)
def test_runs_from_direct_config(name, cls):
    """The same for a scheduler that was never loaded from a checkpoint, so that its config does not name its class."""
    pipe, kwargs, shape = PIPELINES[name]()
    pipe.scheduler = cls.from_config(directly(pipe.scheduler).config)
    output = torch.as_tensor(pipe(**kwargs)[0])
    assert tuple(output.shape) == shape
    assert output.isfinite().all()


@pytest.mark.parametrize("name", PIPELINES)
def test_costs_what_stock_costs(name):
    """The ODE at its default settings calls the network exactly as often as the stock scheduler, for the same call."""
    pipe, kwargs, _ = PIPELINES[name]()
    expected = run(pipe, kwargs).calls
    if isinstance(pipe.scheduler, diffusers.PNDMScheduler):
        expected -= 1  # PLMS evaluates its second timestep twice
    assert run(*swapped(name, ProbabilityFlowScheduler)[:2]).calls == expected


@pytest.mark.parametrize("name", ODE_OF_STOCK)
def test_has_the_limit_of_stock(name):
    """With many steps the swapped ODE arrives where a stock solver does: betas, sigmas, shifts and prediction type were
    all read from the config as the stock class reads them."""
    outputs = []
    for cls in (ODE_OF_STOCK[name], ProbabilityFlowScheduler):
        pipe, kwargs, _ = PIPELINES[name]()
        same_start = {"timestep_spacing": "trailing"} if "timestep_spacing" in pipe.scheduler.config else {}
        pipe.scheduler = (cls or type(pipe.scheduler)).from_config(pipe.scheduler.config, **same_start)
        steps = 400 if name == "svd" else 100  # stock is first order there; PNDM wants a divisor of 1000
        outputs.append(torch.as_tensor(pipe(**kwargs | {"num_inference_steps": steps})[0]))
    expected, output = outputs
    assert (output - expected).norm() < 0.05 * expected.norm()


@pytest.mark.xfail(reason="the pipeline preconditions in VE coordinates, which the config does not say")
def test_latent_upscaler_has_the_limit_of_stock():
    """The same for a pipeline that does a part of the scheduler's work by itself."""
    outputs = []
    for cls in (diffusers.EulerDiscreteScheduler, ProbabilityFlowScheduler):
        pipe, kwargs, _ = swapped("sd_latent_upscale", cls)
        outputs.append(pipe(**kwargs | {"num_inference_steps": 100})[0])
    expected, output = outputs
    assert (output - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("name", PIPELINES)
def test_network_sees_the_times_of_stock(name):
    """Index, c_noise or 1000 sigma: what the network is conditioned on spans the range it has under the stock class."""
    ranges = []
    for scheduler in (lambda config: None, ProbabilityFlowScheduler.from_config):
        pipe, kwargs, _ = PIPELINES[name]()
        pipe.scheduler = scheduler(pipe.scheduler.config) or pipe.scheduler
        pipe(**kwargs | {"num_inference_steps": 20})
        times = pipe.scheduler.timesteps.double()
        ranges.append((times[0].item(), times[-1].item()))
    (start, end), found = ranges
    # Loose, because spacings differ, and FlowMatchEuler shifts its last sigma twice.
    np.testing.assert_allclose(found, (start, end), atol=0.15 * abs(start - end))


@pytest.mark.parametrize("name", PIPELINES)
def test_betas_are_those_of_stock(name):
    """Defaults that the config leaves out are those of the class that it came from."""
    scheduler = PIPELINES[name]()[0].scheduler
    if not hasattr(scheduler, "betas") or scheduler.config.get("use_flow_sigmas"):
        pytest.skip("not a process with betas")
    if scheduler.config.get("timestep_type") == "continuous":
        pytest.skip("variance exploding: its betas are not used")
    if scheduler.config.get("rescale_betas_zero_snr"):
        pytest.skip("stock classes differ in whether `betas` are those before or after rescaling")
    ours = ProbabilityFlowScheduler.from_config(scheduler.config)
    torch.testing.assert_close(ours.betas.float(), scheduler.betas.float(), atol=1e-6, rtol=1e-4)


@by_class
def test_base_and_refiner_share_one_schedule(cls):
    """SDXL base until 0.6 and refiner from 0.6: together as many steps as asked for, each timestep once."""
    base, kwargs, shape = swapped("sdxl", cls)
    kwargs["num_inference_steps"] = 5
    first = run(base, kwargs | {"denoising_end": 0.6})
    refiner, kwargs, _ = swapped("sdxl_refiner", cls)
    second = run(refiner, kwargs | {"image": first.output, "denoising_start": 0.6})
    assert first.calls > 0 and second.calls > 0
    assert first.calls + second.calls == 5
    assert torch.equal(first.output, second.first)
    assert tuple(second.output.shape) == shape
    assert second.output.isfinite().all()


@by_class
def test_step_taken_twice(cls):
    """Cosmos asks `step` for the denoised sample, puts the step index back, and steps again with the guided one."""
    config = stock("EDMEulerScheduler", sigma_min=0.002, sigma_max=80.0, sigma_data=0.5).config
    scheduler = cls.from_config(config)
    scheduler.set_timesteps(6)
    target = torch.randn(1, 4, 8, 8, generator=generator(1))
    sample = torch.randn(1, 4, 8, 8, generator=generator()) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        output = torch.zeros(2, 4, 8, 8)
        denoised = scheduler.step(output, t, torch.cat([sample, sample]), return_dict=False)[1]
        assert denoised.shape == output.shape
        scheduler._step_index -= 1
        sample = scheduler.step(target, t, sample, return_dict=False, pred_original_sample=target)[0]
    torch.testing.assert_close(sample, target, atol=1e-3, rtol=1e-3)


@by_class
@pytest.mark.parametrize("make", [lambda s: s, directly], ids=["loaded", "direct"])
@pytest.mark.parametrize("name", PIPELINES)
def test_swap_back(name, make, cls):
    """Stock -> ours -> stock describes the process, and makes the grid, that it began with."""
    before = make(PIPELINES[name]()[0].scheduler)
    after = type(before).from_config(cls.from_config(before.config).config)
    for scheduler in (before, after):
        if hasattr(before, "alphas_cumprod"):
            torch.testing.assert_close(after.alphas_cumprod, before.alphas_cumprod, atol=0, rtol=0)
        scheduler.set_timesteps(6, **({"mu": 0.7} if before.config.get("use_dynamic_shifting") else {}))
    for attribute in ("timesteps", "sigmas"):
        if hasattr(before, attribute):
            torch.testing.assert_close(getattr(after, attribute), getattr(before, attribute), atol=0, rtol=0)
    for key in {"prediction_type", "variance_type"} & set(before.config):
        assert after.config[key] == before.config[key]


def test_saved_pipeline_loads_in_a_fresh_process(tmp_path):
    """`save_pretrained`, then `DiffusionPipeline.from_pretrained` in a new process that has only imported the package:
    our class, its config, and the same picture."""
    expected = {}
    for cls in CLASSES:
        pipe, kwargs, _ = swapped("ddpm", cls)
        pipe.save_pretrained(tmp_path / cls.__name__)
        config = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
        expected[cls.__name__] = {"config": config, "mean": float(pipe(**kwargs)[0].mean())}
    script = """if True:
        import json, sys, torch
        import diffusers_sde
        from diffusers import DiffusionPipeline
        found = {}
        for name in sys.argv[2:]:
            pipe = DiffusionPipeline.from_pretrained(f"{sys.argv[1]}/{name}")
            assert type(pipe.scheduler) is getattr(diffusers_sde, name), type(pipe.scheduler)
            config = {k: v for k, v in pipe.scheduler.config.items() if not k.startswith("_")}
            generator = torch.Generator().manual_seed(0)
            image = pipe(generator=generator, num_inference_steps=5, output_type="np")[0]
            found[name] = {"config": config, "mean": float(image.mean())}
        print(json.dumps(found))
    """
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), *expected],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    found = json.loads(process.stdout.splitlines()[-1])
    for name, want in expected.items():
        assert found[name]["config"] == json.loads(json.dumps(want["config"]))
        assert np.isclose(found[name]["mean"], want["mean"], atol=1e-5)
