"""``diffusers-sde bench --sections speed memory``: what a step costs without its network.

Knows the shapes, our schedulers and the stock ones that are timed; all are interleaved in one run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from diffusers_sde.benchmarks.common import PROCESSES, print_table
from diffusers_sde.schedulers import DPMSolverScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler

SHAPES = ((1, 4, 64, 64), (8, 16, 128, 128))


def step_schedulers() -> dict[str, Any]:
    config = PROCESSES["linear"]
    return {
        "ProbabilityFlow, order 2": ProbabilityFlowScheduler.from_config(config, solver_order=2),
        "ProbabilityFlow, no corrector": ProbabilityFlowScheduler.from_config(config, solver_order=2, corrector=False),
        "ReverseSDE, order 2": ReverseSDEScheduler.from_config(config),
        "DPMSolver 2M": DPMSolverScheduler.from_config(config),
        "diffusers DDIM": diffusers.DDIMScheduler.from_config(config, clip_sample=False),
        "diffusers DPM++2M": diffusers.DPMSolverMultistepScheduler.from_config(config),
        "diffusers UniPC": diffusers.UniPCMultistepScheduler.from_config(config),
        "diffusers SASolver": diffusers.SASolverScheduler.from_config(config),
    }


def step_times(repeats: int = 9, steps: int = 20) -> None:
    """Median time of a step over full runs, interleaved, against the two operations no step can do without.

    A run is set_timesteps and ``steps`` steps, as a pipeline makes it; ours keep the table of the last grid, so the
    one-time cost of building it is printed apart.
    """
    rows = []
    for shape in SHAPES:
        jobs = {"floor: mul, add": floor_job(shape, steps)}
        jobs |= {name: run_job(scheduler, shape, steps) for name, scheduler in step_schedulers().items()}
        times: dict[str, list[float]] = {name: [] for name in jobs}
        for _ in range(repeats):
            for name, job in jobs.items():
                start = time.perf_counter()
                job()
                times[name].append((time.perf_counter() - start) / steps)
        medians = {name: statistics.median(values[1:]) for name, values in times.items()}
        floor, two_m = medians["floor: mul, add"], medians["diffusers DPM++2M"]
        for name, value in medians.items():
            first = f"{(times[name][0] - value) * steps * 1e3:.1f}" if "floor" not in name else ""
            cells = [f"{value * 1e6:.0f}", f"{value / floor:.1f}", f"{value / two_m:.2f}", first]
            rows.append(["x".join(map(str, shape)), name, *cells])
    header = ["shape", "scheduler", "us", "x floor", "x DPM++2M", "first run +ms"]
    print_table(f"Time of a step ({torch.get_num_threads()} threads)", header, rows)


def floor_job(shape: tuple[int, ...], steps: int) -> Callable[[], None]:
    x, m, out = torch.randn(shape), torch.randn(shape), torch.empty(shape)

    def job() -> None:
        for _ in range(steps):
            torch.mul(x, 0.9, out=out).add_(m, alpha=0.1)

    return job


def run_job(scheduler: Any, shape: tuple[int, ...], steps: int) -> Callable[[], None]:
    x, m = torch.randn(shape), torch.randn(shape)

    def job() -> None:
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            scheduler.step(m, t, x, return_dict=False)

    return job


def step_memory(n: int = 10) -> None:
    """Largest number of sample-sized tensors a scheduler holds between steps."""
    rows = []
    for name, scheduler in step_schedulers().items():
        scheduler.set_timesteps(n)
        x, most = torch.randn(1, 4, 64, 64), 0
        for t in scheduler.timesteps:
            x = scheduler.step(torch.randn_like(x), t, x, return_dict=False)[0]
            most = max(most, held_tensors(scheduler, x))
        rows.append([name, str(most)])
    print_table("Tensors held between steps, in samples", ["scheduler", "tensors"], rows)


def held_tensors(scheduler: Any, like: torch.Tensor) -> int:
    """Distinct storages of the sample's size that the scheduler's attributes reach, ``like`` itself not counted."""
    found: set[int] = set()

    def walk(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.numel() == like.numel() and value.data_ptr() != like.data_ptr():
                found.add(value.data_ptr())
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)

    state = scheduler._run.history if hasattr(scheduler, "_run") else list(vars(scheduler).values())
    walk(state)
    return len(found)
