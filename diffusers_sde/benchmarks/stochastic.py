"""``diffusers-sde bench --sections sde stochastic``: how far what stochastic samplers make is from the truth, that of a
mixture (``sde``) and the training images of the embedded network (``stochastic``).

Knows the problems and the distances; the stock families and their grids are those of the competition.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_sde.assets import load_default_classifier, load_fashion_model
from diffusers_sde.benchmarks.calibration import frechet, read_images
from diffusers_sde.benchmarks.common import PROCESSES, network_start, oracle, print_table, sliced_wasserstein
from diffusers_sde.benchmarks.competition import PUBLISHED_SDES, published, stock_sdes
from diffusers_sde.sampling import network_denoiser, sample
from diffusers_sde.schedulers import ReverseSDEScheduler

SDE_STEPS = (6, 10, 20, 50)
OURS = "ReverseSDE (default)"


def best_of_each(
    config: Any, n: int, measure: Callable[[Callable[[], Any]], tuple[float, ...]], skipped: dict[str, str]
) -> dict[str, tuple[float, ...]]:
    """The measures of ours and of each stock family at ``n`` evaluations, with the grid whose first one is smallest.

    Args:
        config: of the process.
        n: evaluations.
        measure: of what makes a scheduler that is laid out.
        skipped: gets the families that failed, with the reason.
    """
    best: dict[str, tuple[float, ...]] = {}
    ours = functools.partial(ReverseSDEScheduler.from_config, config)
    samplers: list[tuple[str, Callable[[], Any]]] = [
        (OURS, ours),
        *stock_sdes(config),
        *published(PUBLISHED_SDES, config),
    ]
    for label, make in samplers:
        family = label if label == OURS else label.split()[0]
        try:
            values = measure(functools.partial(_laid_out, make, (n + 1) // 2 if family == "DPMSolverSDE" else n))
        except Exception as error:  # a stock scheduler may fail on its own grid in any way
            skipped[family] = str(error).strip().splitlines()[0][:80]
            continue
        best[family] = min(best.get(family, (math.inf,)), values)
    return best


def _laid_out(make: Callable[[], Any], steps: int) -> Any:
    scheduler = make()
    scheduler.set_timesteps(steps)
    return scheduler


def sde_quality(seed: int, count: int = 3000, repeats: int = 3) -> None:
    """Sliced Wasserstein distance to the true distribution, ours against each stock family and published sampler with
    its best grid: means over independent sets of samples."""
    process_config = PROCESSES["linear"]
    model = oracle(seed=seed, process=process_config)
    denoiser, generator = network_denoiser(model), torch.Generator().manual_seed(seed + 1)
    truth = model.sample(count, generator)
    floor = statistics.mean(sliced_wasserstein(model.sample(count, generator), truth) for _ in range(repeats))
    noises = [torch.randn(count, *model.sample_shape, generator=generator) for _ in range(repeats)]

    def distance(make: Callable[[], Any]) -> tuple[float, ...]:
        made = (sample(denoiser, make(), x, generator=generator) for x in noises)
        return (statistics.mean(sliced_wasserstein(x, truth) for x in made),)

    table: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    for n in tqdm(SDE_STEPS, desc="SDE quality", leave=False):
        for family, (value,) in best_of_each(process_config, n, distance, skipped).items():
            table.setdefault(family, []).append(f"{value:.4f}")
    title = f"Sliced Wasserstein to the true distribution, {repeats} x {count} samples (sampling floor {floor:.4f})"
    _print(title, table, skipped)


def network_quality(
    seed: int,
    folder: str | None,
    count: int = 300,
    repeats: int = 3,
    scales: tuple[float, ...] = (1.0, 5.0),
    steps: tuple[int, ...] = SDE_STEPS,
) -> None:
    """The embedded Fashion-MNIST network, ours against each stock family with its best grid: Frechet distance in the
    features of the embedded classifier, with the standard error over ``repeats`` sets of ``count`` images, and sliced
    Wasserstein, to the training images of ``folder``."""
    if folder is None:
        print("stochastic: left out without --training_images (diffusers-sde prepare fashion-mnist)")
        return
    pipe = load_fashion_model()
    config, network = pipe.scheduler.config, pipe.unet
    real = read_images(folder, 10 * count, network.config.in_channels, network.config.sample_size)
    real_features = classifier_features(real)
    for scale in scales:
        table: dict[str, list[str]] = {}
        skipped: dict[str, str] = {}

        def distances(make: Callable[[], Any], scale: float = scale) -> tuple[float, ...]:
            found = []
            for k in range(repeats):
                noise, labels = network_start(network, count, seed + k)
                generator = torch.Generator().manual_seed(seed + k)
                images = sample(network_denoiser(network, labels, scale), make(), noise, generator=generator)
                away = frechet(classifier_features(images), real_features)
                found.append((away, sliced_wasserstein(images, real[::10])))
            frechets, slices = zip(*found, strict=True)
            error = statistics.stdev(frechets) / math.sqrt(repeats) if repeats > 1 else math.nan
            return statistics.mean(frechets), error, statistics.mean(slices)

        for n in tqdm(steps, desc=f"stochastic, guidance {scale:g}", leave=False):
            for family, (away, error, sliced) in best_of_each(config, n, distances, skipped).items():
                table.setdefault(family, []).append(f"{away:.3f} +- {error:.3f}, {sliced:.3f}")
        title = (
            f"Frechet distance (classifier's features) and sliced Wasserstein to training images, guidance {scale:g}"
        )
        _print(title, table, skipped, steps)


@torch.no_grad()
def classifier_features(images: torch.Tensor) -> torch.Tensor:
    """What the embedded classifier decides by, (N, features), of clean images (N, C, H, W)."""
    classifier = load_default_classifier()
    seen: list[torch.Tensor] = []
    classifier.classify.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for part in images.split(50):
        classifier(part, 0)
    return torch.cat(seen)


def _print(
    title: str, table: dict[str, list[str]], skipped: dict[str, str], steps: tuple[int, ...] = SDE_STEPS
) -> None:
    print_table(title, ["best grid of each", *(f"{n} NFE" for n in steps)], [[k, *v] for k, v in table.items()])
    for family, reason in skipped.items():
        print(f"skipped {family}: {reason}")
