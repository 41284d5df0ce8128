"""The embedded class-conditional model and its flow map: small, called by names, and trained."""

import torch
from diffusers import DDPMPipeline, DiffusionPipeline

from diffusers_sde import ClassConditionalPipeline, ProbabilityFlowScheduler
from diffusers_sde.assets import (
    FASHION_MODEL,
    FLOW_MAP_MODEL,
    load_default_classifier,
    load_default_flow_map,
    load_fashion_model,
)
from diffusers_sde.sampling import network_denoiser, sample

TROUSER, BOOT = 1, 9
NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def test_they_are_small_and_load_with_their_names():
    """2 to 4 million parameters, at most 8 MB in all, with a model card; ``DDPMPipeline`` takes them too."""
    for folder in (FASHION_MODEL, FLOW_MAP_MODEL):
        pipe = DiffusionPipeline.from_pretrained(folder)
        assert type(pipe) is ClassConditionalPipeline
        assert pipe.class_names == list(NAMES) and pipe.class_names[BOOT] == "ankle boot"
        assert 2e6 < sum(p.numel() for p in pipe.unet.parameters()) < 4e6
        assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 8e6
        assert (folder / "README.md").is_file()
        assert type(DDPMPipeline.from_pretrained(folder)) is DDPMPipeline


def test_it_draws_its_classes():
    """Guided samples look like their label: trousers are lighter in the upper half, boots in the lower one."""
    pipe = load_fashion_model()
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
    pipe.set_progress_bar_config(disable=True)
    for steps in (2, 4):
        generator = torch.Generator().manual_seed(0)
        images = pipe([*NAMES] * 3, num_inference_steps=steps, generator=generator, output_type="latent").images
        with torch.no_grad():
            right = classifier(images.clamp(-1, 1), 0.0).argmax(1) == torch.arange(30) % 10
        assert right.float().mean() > 0.8
