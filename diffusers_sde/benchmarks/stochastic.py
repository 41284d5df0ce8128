"""``diffusers-sde bench --sections sde``: distance of stochastic samplers to the true distribution of a mixture."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_sde.benchmarks.common import PROCESSES, oracle, print_table, sliced_wasserstein
from diffusers_sde.benchmarks.competition import PUBLISHED_SDES, published, stock_sdes
from diffusers_sde.sampling import network_denoiser, sample
from diffusers_sde.schedulers import ReverseSDEScheduler

SDE_STEPS = (6, 10, 20, 50)


def sde_quality(seed: int, count: int = 3000, repeats: int = 3) -> None:
    """Sliced Wasserstein distance to the true distribution, ours against each stock family and published sampler with
    its best grid: means over independent sets of samples."""
    process_config = PROCESSES["linear"]
    model = oracle(seed=seed, process=process_config)
    denoiser, generator = network_denoiser(model), torch.Generator().manual_seed(seed + 1)
    truth = model.sample(count, generator)
    floor = statistics.mean(sliced_wasserstein(model.sample(count, generator), truth) for _ in range(repeats))
    noises = [torch.randn(count, *model.sample_shape, generator=generator) for _ in range(repeats)]

    ours = functools.partial(ReverseSDEScheduler.from_config, process_config)
    others = [*stock_sdes(process_config), *published(PUBLISHED_SDES, process_config)]
    table: dict[str, list[float]] = {}
    skipped: dict[str, str] = {}
    for n in tqdm(SDE_STEPS, desc="SDE quality", leave=False):
        best: dict[str, float] = {}
        samplers: list[tuple[str, Callable[[], Any]]] = [("ReverseSDE (default)", ours), *others]
        for label, make in samplers:
            family = label if label.endswith("(default)") else label.split()[0]
            try:
                values = []
                for x in noises:
                    scheduler = make()
                    scheduler.set_timesteps((n + 1) // 2 if family == "DPMSolverSDE" else n)
                    values.append(sliced_wasserstein(sample(denoiser, scheduler, x, generator=generator), truth))
            except Exception as error:
                skipped[family] = str(error).strip().splitlines()[0][:80]
                continue
            best[family] = min(best.get(family, float("inf")), statistics.mean(values))
        for family, value in best.items():
            table.setdefault(family, []).append(value)
    rows = [[name, *(f"{v:.4f}" for v in values)] for name, values in table.items()]
    title = f"Sliced Wasserstein to the true distribution, {repeats} x {count} samples (sampling floor {floor:.4f})"
    print_table(title, ["best grid of each", *(f"{n} NFE" for n in SDE_STEPS)], rows)
    for family, reason in skipped.items():
        print(f"skipped {family}: {reason}")
