"""``diffusers-sde bench --sections labels``: how often the shipped classifier agrees with the label of a sample.

Knows the embedded model and its classifier, which was trained on real images only.  Prints a table; asserts nothing.
"""

from __future__ import annotations

import torch
from tqdm.auto import tqdm

from diffusers_sde.assets import load_default_classifier, load_fashion_model
from diffusers_sde.benchmarks.common import network_start, print_table
from diffusers_sde.sampling import network_denoiser, sample
from diffusers_sde.schedulers import ProbabilityFlowScheduler

SCALES, COUNT, BATCH, STEPS = (1.0, 2.0, 3.0), 200, 50, 12


@torch.no_grad()
def measure(seed: int = 0) -> None:
    """Agreement in percent, over all and the worst class, for ``COUNT`` samples at each guidance scale."""
    pipe, classifier = load_fashion_model(), load_default_classifier().eval()
    scheduler = ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
    noise, labels = network_start(pipe.unet, COUNT, seed)
    rows = []
    for scale in SCALES:
        right = []
        for part in tqdm(torch.arange(COUNT).split(BATCH), desc=f"labels, guidance {scale:g}", leave=False):
            scheduler.set_timesteps(STEPS)
            images = sample(network_denoiser(pipe.unet, labels[part], scale), scheduler, noise[part]).clamp(-1, 1)
            right.append(classifier(images, 0.0).argmax(1) == labels[part])
        agreed = torch.cat(right).double()
        worst = min(agreed[labels == k].mean().item() for k in labels.unique())
        rows.append([f"{scale:g}", f"{100 * agreed.mean().item():.1f} %", f"{100 * worst:.0f} %"])
    title = f"The classifier agrees with the label: {COUNT} samples of {STEPS} evaluations"
    print_table(title, ["guidance", "all classes", "worst class"], rows)
