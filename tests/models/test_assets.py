"""The embedded model: a stock pipeline, small, and trained."""

import torch
from diffusers import DDPMPipeline

from diffusers_sde import ProbabilityFlowScheduler
from diffusers_sde.assets import (
    DEFAULT_MODEL,
    embedded_models,
    load_default_classifier,
    load_default_flow_map,
    load_default_model,
)
from diffusers_sde.sampling import flow_map_denoiser, network_denoiser, sample

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


def test_the_flow_map_draws_its_classes_in_two_and_four_steps():
    """The classifier, which never saw a sample, agrees with most labels; guidance is built in."""
    pipe, classifier = load_default_flow_map(), load_default_classifier().eval()
    labels, scheduler = torch.arange(30) % 10, pipe.scheduler
    for steps in (2, 4):
        scheduler.set_timesteps(steps)
        noise = torch.randn(30, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        images = sample(flow_map_denoiser(pipe.unet, scheduler, labels), scheduler, noise)
        with torch.no_grad():
            right = classifier(images.clamp(-1, 1), 0.0).argmax(1) == labels
        assert right.float().mean() > 0.8


def test_every_embedded_model_is_class_conditional_and_small():
    models = embedded_models()
    assert list(models) == ["fashion_mnist", "noto_emoji"]
    for folder in models.values():
        unet = DDPMPipeline.from_pretrained(folder).unet
        assert unet.config.num_class_embeds and 2e6 < sum(p.numel() for p in unet.parameters()) < 4e6
        assert (folder / "README.md").is_file() and (folder / "samples.png").is_file()
        assert (folder / "unet/diffusion_pytorch_model.safetensors").stat().st_size < 8e6
