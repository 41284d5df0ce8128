"""The embedded model: a stock pipeline, small, and trained."""

import torch
from diffusers import DDPMPipeline

from diffusers_sde import ProbabilityFlowScheduler
from diffusers_sde.assets import DEFAULT_MODEL, load_default_model
from diffusers_sde.sampling import network_denoiser, sample

TROUSER, BOOT = 1, 9


def test_it_is_a_small_stock_pipeline():
    """``DDPMPipeline``, 2 to 4 million parameters, at most 8 MB in all, with a model card."""
    pipe = load_default_model()
    assert type(pipe) is DDPMPipeline
    assert 2e6 < sum(p.numel() for p in pipe.unet.parameters()) < 4e6
    assert sum(f.stat().st_size for f in DEFAULT_MODEL.rglob("*") if f.is_file()) < 8e6
    assert (DEFAULT_MODEL / "README.md").is_file()


def test_it_draws_its_classes():
    """Guided samples look like their label: trousers are lighter in the upper half, boots in the lower one."""
    pipe = load_default_model()
    scheduler = ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(8)
    labels = torch.tensor([TROUSER] * 3 + [BOOT] * 3)
    noise = torch.randn(6, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    light = (sample(network_denoiser(pipe.unet, labels, 2.0), scheduler, noise).clamp(-1, 1) + 1) / 2
    upper, lower = light[:, 0, :15].mean((1, 2)), light[:, 0, 15:].mean((1, 2))
    assert ((upper / lower)[:3] > 1.1).all() and ((upper / lower)[3:] < 0.9).all()
    assert (light.mean((1, 2, 3)) > 0.05).all() and light.amax() > 0.6
