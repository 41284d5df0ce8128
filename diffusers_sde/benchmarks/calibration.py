"""``diffusers-sde bench --sections calibration``: learned tables against exact ones and against diffusers' schedulers.

Knows the problems (mixture oracles, a flow matching and a strongly guided one, the embedded network), what is measured
on them, and the goals.  All samplers start from the same noise, which no fit and no choice has seen.  Prints tables;
asserts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from diffusers_sde.assets import FASHION_MODEL, load_fashion_model
from diffusers_sde.benchmarks.common import (
    PROCESSES,
    mean_error,
    network_start,
    oracle,
    print_left_out,
    print_table,
    reference_solution,
    sliced_wasserstein,
)
from diffusers_sde.benchmarks.competition import best_stock_ode
from diffusers_sde.calibration.run import calibrate
from diffusers_sde.named_samplers import CALIBRATED
from diffusers_sde.sampling import Denoiser, network_denoiser, sample
from diffusers_sde.schedulers import CalibratedScheduler, ProbabilityFlowScheduler

STEPS = (4, 5, 6, 8, 10)
FLOW = {"num_train_timesteps": 1000, "use_flow_sigmas": True, "prediction_type": "flow_prediction", "shift": 3.0}
ORACLE_SAMPLES, NETWORK_SAMPLES = 64, 40
SHIPPED_GUIDANCE = 2.0  # at which the embedded model was calibrated


@dataclass(frozen=True)
class Case:
    """A problem: the network as a denoiser of ``len(noise)`` samples, fresh noise, its process, and its calibration."""

    name: str
    denoiser: Denoiser
    noise: torch.Tensor
    config: dict[str, Any]
    calibrate: Callable[[], CalibratedScheduler]


def oracles(seed: int) -> Iterator[Case]:
    """The bench's mixtures under both betas and flow matching, and one guided with weight 7.5 to its components."""
    for name, process_config, scale in (
        *((f"mixture, {name} betas", process_config, None) for name, process_config in PROCESSES.items()),
        ("mixture, flow matching", FLOW, None),
        ("mixture, guidance 7.5", PROCESSES["scaled linear"], 7.5),
    ):
        model, n = oracle(seed=seed, process=process_config), ORACLE_SAMPLES
        components = len(model.config.weights)
        model.register_to_config(num_class_embeds=components + 1)
        labels = torch.arange(n) % components
        if scale is None:  # the null class
            labels = torch.full((n,), components)
        denoiser = network_denoiser(model, labels, 1.0 if scale is None else scale)
        noise = torch.randn(n, *model.sample_shape, generator=torch.Generator().manual_seed(seed + 12345))

        def learn(denoiser: Any = denoiser, config: Any = process_config, shape: Any = model.sample_shape) -> Any:
            scheduler = ProbabilityFlowScheduler.from_config(config)
            options = {"scheduler": scheduler, "sample_shape": shape, "seed": seed, "progress": False}
            return calibrate(denoiser, STEPS, ORACLE_SAMPLES, **options)

        yield Case(name, denoiser, noise, process_config, learn)


def networks(seed: int, num_images: int, guidance_scales: list[float], shipped: bool) -> Iterator[Case]:
    """The embedded class-conditional network, every class equally often; ``shipped``: with the scheduler beside it."""
    pipe = load_fashion_model()
    noise, labels = network_start(pipe.unet, num_images, seed + 12345)
    for scale in guidance_scales:
        denoiser = network_denoiser(pipe.unet, labels, scale)

        def learn(scale: float = scale) -> CalibratedScheduler:
            if shipped:
                return CalibratedScheduler.from_pretrained(FASHION_MODEL / CALIBRATED)
            return calibrate(pipe, STEPS, NETWORK_SAMPLES, seed=seed, batch_size=20, guidance_scale=scale)

        yield Case(f"embedded network, guidance {scale:g}", denoiser, noise, dict(pipe.scheduler.config), learn)


def errors(case: Case, scheduler: CalibratedScheduler) -> None:
    """Error to the converged solution from fresh noise at each number of steps, and the ratios."""
    reference = reference_solution(case.denoiser, case.noise, case.config, 160)
    exact = ProbabilityFlowScheduler.from_config(case.config, clip_sample=False)
    table: dict[str, list[str]] = {
        k: [] for k in ("best of diffusers", "exact (default)", "calibrated", "to exact", "to diffusers", "setting")
    }
    left_out: list[str] = []
    for n in tqdm(STEPS, desc=case.name, leave=False):
        error, setting, missing = best_stock_ode(case.config, n, case.denoiser, case.noise, reference)
        left_out += missing
        found = []
        for ours in (exact, scheduler):
            ours.set_timesteps(n)
            found.append(mean_error(sample(case.denoiser, ours, case.noise), reference))
        cells = (
            *(f"{v:.4f}" for v in (error, *found)),
            *(f"{found[1] / v:.2f}" for v in (found[0], error)),
            setting,
        )
        for values, cell in zip(table.values(), cells, strict=True):
            values.append(cell)
    settings = table.pop("setting")
    title = f"Calibrated samplers, error to the exact ODE solution: {case.name}, {len(case.noise)} samples"
    print_table(title, ["", *(f"{n} NFE" for n in STEPS)], [[k, *v] for k, v in table.items()])
    print("best of diffusers was: " + "; ".join(f"{n}: {name}" for n, name in zip(STEPS, settings, strict=True)))
    print_left_out(left_out)


# -- quality of the samples --


def read_images(folder: str | Path, count: int, channels: int, size: int) -> torch.Tensor:
    """``count`` images spread over a folder (and its sub-folders), (N, C, H, W) in [-1, 1].

    Raises ``ValueError`` for a folder without enough images.
    """
    files = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if len(files) < count:
        raise ValueError(f"{folder} has {len(files)} images, {count} are needed: make it with diffusers-sde prepare.")
    chosen = [files[i * len(files) // count] for i in range(count)]
    images = []
    for file in chosen:
        image = Image.open(file).convert("L" if channels == 1 else "RGB").resize((size, size))
        images.append(torch.from_numpy(np.asarray(image, np.float32).reshape(size, size, channels)).movedim(-1, 0))
    return torch.stack(images) / 127.5 - 1


@torch.no_grad()
def features(pipe: Any, images: torch.Tensor) -> torch.Tensor:
    """The network's own middle features of slightly noisy images, averaged over places, (N, features)."""
    seen: list[torch.Tensor] = []
    hook = pipe.unet.mid_block.register_forward_hook(lambda _, __, out: seen.append(out.mean((2, 3))))
    null = pipe.unet.config.num_class_embeds - 1
    try:
        for part in images.split(50):
            labels = torch.full((len(part),), null)
            noise = torch.randn(part.shape, generator=torch.Generator().manual_seed(0))
            noisy = ProbabilityFlowScheduler.from_config(pipe.scheduler.config).add_noise(part, noise, 100)
            pipe.unet(noisy, 100, labels)
    finally:
        hook.remove()
    return torch.cat(seen)


def frechet(x: torch.Tensor, y: torch.Tensor) -> float:
    """Frechet distance of two sets of features as Gaussians (Heusel et al. 2017, eq. 6)."""
    x, y = x.double(), y.double()
    a, b = torch.cov(x.T), torch.cov(y.T)
    values = torch.linalg.eigvals(a @ b).real.clamp(min=0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + a.trace() + b.trace() - 2 * values)


def quality(scheduler: CalibratedScheduler, scale: float, folder: str, count: int, seed: int) -> None:
    """Distances of calibrated samples and of the teacher's to training images, from the same noise."""
    pipe = load_fashion_model()
    config = pipe.unet.config
    real = read_images(folder, count, config.in_channels, config.sample_size)
    noise, labels = network_start(pipe.unet, count, seed + 54321)
    real_features, rows = features(pipe, real), []
    exact = ProbabilityFlowScheduler.from_config(pipe.scheduler.config)
    for name, ours, n in (("teacher", exact, 80), *(("calibrated", scheduler, n) for n in STEPS)):
        made = []
        for first in tqdm(range(0, count, 50), desc=f"quality, {name} {n}", leave=False):
            part = slice(first, first + 50)
            ours.set_timesteps(n)
            made.append(sample(network_denoiser(pipe.unet, labels[part], scale), ours, noise[part]))
        images = torch.cat(made)
        distances = (sliced_wasserstein(images, real), frechet(features(pipe, images), real_features))
        rows.append([f"{name}, {n} NFE", *(f"{v:.4f}" for v in distances)])
    title = f"Distance of {count} samples to training images: embedded network, guidance {scale:g}"
    print_table(title, ["", "sliced Wasserstein", "Frechet, own features"], rows)


def measure(
    seed: int = 0,
    num_images: int = 20,
    guidance_scales: list[float] | None = None,
    training_images: str | None = None,
    quality_images: int = 300,
    shipped: bool = False,
) -> None:
    """The section: every oracle, then the embedded network at each guidance scale, its sample quality where a folder of
    training images is given.  ``shipped``: nothing is learned, the scheduler that ships with the network is measured at
    its guidance."""
    for case in () if shipped else oracles(seed):
        errors(case, case.calibrate())
    scales = [SHIPPED_GUIDANCE] if shipped else [1.0, 3.0] if guidance_scales is None else guidance_scales
    for scale, case in zip(scales, networks(seed, num_images, scales, shipped), strict=True):
        start = time.perf_counter()
        scheduler = case.calibrate()
        minutes = (time.perf_counter() - start) / 60
        if not shipped:
            print(f"\n{case.name}: calibrated for {len(STEPS)} numbers of steps in {minutes:.1f} minutes")
        errors(case, scheduler)
        if training_images:
            quality(scheduler, scale, training_images, quality_images, seed)
