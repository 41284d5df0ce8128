"""``diffusers-sde bench --sections parallel``: what sampling in parallel in time costs and saves.

Knows the mixture oracle and the embedded text-to-image model; asserts nothing.  Rounds are calls of the network one
after the other, evaluations the states of a sample in all of them; a sequential run of n steps has n of both.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from diffusers_sde.assets import load_default_model
from diffusers_sde.benchmarks.common import PROCESSES, mean_error, oracle, print_table
from diffusers_sde.class_conditional import ClassConditionalPipeline
from diffusers_sde.generation import sample_parallel
from diffusers_sde.schedulers import ProbabilityFlowScheduler, ReverseSDEScheduler

STEPS, TOLERANCES = (20, 50, 100), (1e-1, 1e-2, 1e-3)
VARIANTS: dict[str, dict[str, Any]] = {
    "Picard": {"acceleration": 0},
    "Anderson": {"acceleration": 1},
    "window of 10": {"window": 10},
    "coarse solve of 5": {"predictor_steps": 5},
}
TIMED: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 3.0, "tolerance": 3e-2, "output_type": "latent"}
PROMPT = "red apple"


def measure(seed: int = 0) -> None:
    """The three tables of the section."""
    _rounds(seed)
    _wall_time(seed)


def _rounds(seed: int) -> None:
    """Rounds and evaluations against the tolerance, on the oracle, ODE and SDE."""
    pipe = ClassConditionalPipeline(oracle(seed=seed, process=PROCESSES["linear"]), ProbabilityFlowScheduler())
    pipe.set_progress_bar_config(disable=True)
    for cls in (ProbabilityFlowScheduler, ReverseSDEScheduler):
        pipe.scheduler = cls.from_config(PROCESSES["linear"])
        rows = []
        for n in tqdm(STEPS, desc=cls.__name__, leave=False):
            fixed = {"num_images": 2, "num_inference_steps": n, "output_type": "latent"}
            one_by_one = pipe(**fixed, generator=torch.Generator().manual_seed(seed), guidance_scale=1.0).images
            for name, options in VARIANTS.items():
                cells = []
                for tolerance in TOLERANCES:
                    generator = torch.Generator().manual_seed(seed)
                    made = sample_parallel(pipe, **fixed, tolerance=tolerance, generator=generator, **options)
                    error = mean_error(made.images, one_by_one)
                    cells.append(f"{made.rounds} / {max(made.evaluations)} ({error:.0e})")
                rows.append([f"{n} steps, {name}", *cells])
        title = f"{cls.__name__} in parallel: rounds / evaluations (distance to the sequential result), by tolerance"
        print_table(title, ["", *(f"{tolerance:g}" for tolerance in TOLERANCES)], rows)


def _wall_time(seed: int) -> None:
    """Seconds of a picture of the embedded model, step by step and in parallel, on one process and on two."""
    one, rounds, evaluations, sequential = _timed(seed)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", __name__]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    said = subprocess.run([*command, str(seed)], env=environment, capture_output=True, text=True, check=True).stdout
    two = json.loads(said.splitlines()[-1])[0]
    steps = TIMED["num_inference_steps"]
    rows = [
        ["step by step, one process", f"{steps}", f"{steps}", f"{sequential:.1f}"],
        ["in parallel, one process", f"{rounds}", f"{evaluations}", f"{one:.1f}"],
        ["in parallel, two processes", f"{rounds}", f"{evaluations}", f"{two:.1f}"],
    ]
    title = f"A picture of the embedded text-to-image model, tolerance {TIMED['tolerance']:g}, on the CPU"
    print_table(title, ["", "rounds", "evaluations", "seconds"], rows)


def _timed(seed: int) -> tuple[float, int, int, float]:
    """``(seconds, rounds, evaluations, seconds step by step)``, the batches split over the processes there are."""
    pipe = load_default_model()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = ProbabilityFlowScheduler.from_config(pipe.scheduler.config)

    def in_parallel() -> Any:
        return sample_parallel(pipe, PROMPT, generator=torch.Generator().manual_seed(seed), split=True, **TIMED)

    def step_by_step() -> Any:
        options = {key: value for key, value in TIMED.items() if key != "tolerance"}
        return pipe(PROMPT, generator=torch.Generator().manual_seed(seed), **options)

    made, seconds = _clocked(in_parallel)
    return seconds, made.rounds, max(made.evaluations), _clocked(step_by_step)[1]


def _clocked(act: Callable[[], Any]) -> tuple[Any, float]:
    begun = time.perf_counter()
    return act(), time.perf_counter() - begun


if __name__ == "__main__":  # one of two processes
    result = _timed(int(sys.argv[1]))
    if PartialState().is_main_process:
        print(json.dumps(result), flush=True)
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
