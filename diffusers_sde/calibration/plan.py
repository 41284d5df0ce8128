"""The plan of one calibration: its samples, what is to be done with them, and what that costs.

Knows how evaluations are counted and shown.  Knows nothing of how tables are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from diffusers_sde.calibration.fit import Samples
from diffusers_sde.calibration.processes import is_main, share
from diffusers_sde.calibration.refine import memory, refinement_cost
from diffusers_sde.calibration.rollout import Process
from diffusers_sde.calibration.sources import HELD_OUT, Source
from diffusers_sde.calibration.teacher import Store, Teacher
from diffusers_sde.configs import path_from_config
from diffusers_sde.named_samplers import SAMPLERS
from diffusers_sde.schedulers.calibrated import data_scale

NODES = 48
POWERS = (1.25, 1.5, 2.0)
STARTS = 2  # grids refined for one number of steps, at most
FEW = 6  # up to this number of steps a second grid is worth its cost: the default budget pays for it
STOCK = tuple(name for name, s in SAMPLERS.items() if not s.ours and not s.stochastic)


def starts(costs: Mapping[int, int], budget: int) -> dict[int, int]:
    """How many grids are refined for each number of steps: one for each, then a second one, while ``budget`` lasts."""
    found = dict.fromkeys(costs, 0)
    for _ in range(STARTS):
        for n, cost in sorted(costs.items()):
            if cost <= budget:
                found[n] += 1
                budget -= cost
    return found


class Plan:
    """What :func:`diffusers_sde.calibrate` was asked for, made definite: whole batches, shared among processes."""

    def __init__(
        self,
        config: Mapping[str, Any],
        source: Source,
        store: Store,
        counts: Sequence[int],
        *,
        refine: bool,
        budget: int | None,
        num_samples: int,
        num_held_out: int,
    ):
        self.config, self.source, self.store, self.counts = config, source, store, counts
        size = source.batch_size
        firsts = range(0, num_samples, size)
        held_out = range(HELD_OUT, HELD_OUT + max(num_held_out, 1), size)
        self.held_out_origin = HELD_OUT
        self.num_samples, self.num_held_out = len(firsts) * size, len(held_out) * size
        path = path_from_config(config)
        integer = bool(config.get("round_timesteps"))
        self.process = Process(path, config["prediction_type"], data_scale(path), integer, tick=self.tick)
        self.teacher = Teacher(self.process, source, store, NODES)
        self.training = Samples(self.process, source, share(firsts), self.teacher)
        self.held_out = Samples(self.process, source, share(held_out), self.teacher)
        if not self.training.firsts or not self.held_out.firsts:
            raise ValueError("There are fewer batches than processes: pass a smaller batch_size or more samples.")
        costs = {n: refinement_cost(n, times=not integer) for n in counts}
        wanted = sum((STARTS if n <= FEW else 1) * cost for n, cost in costs.items())
        self.starts = starts(costs, 0 if not refine else wanted if budget is None else budget)
        self.budget = sum(costs[n] * k for n, k in self.starts.items())
        self.bar = tqdm(disable=True)

    def tick(self) -> None:
        self.bar.update(self.source.batch_size)

    def say(self, n: int, what: str) -> None:
        self.bar.set_description(f"{n} steps: {what}")

    @property
    def evaluations(self) -> int:
        """At most this many evaluations of a sample, in this process."""
        size, steps = self.source.batch_size, sum(self.counts)
        fitting = (len(POWERS) + 3) * steps + self.budget
        testing = (2 + STARTS + len(STOCK)) * steps  # the exact, the fitted and the refined tables, the stock samplers
        training, held_out = len(self.training.firsts) * size, len(self.held_out.firsts) * size
        return training * (self.teacher.evaluations + fitting) + held_out * (self.teacher.evaluations + testing)

    def announce(self, progress: bool) -> Any:
        """Say what will be done and what it takes; returns the progress bar, a context manager."""
        shown = progress and is_main()
        if shown:
            with self.source.open(0) as batch:
                refined = [n for n, k in self.starts.items() if k]
                kept = NODES + 1 + (memory(max(refined)) if refined else 0)
                size = 4 * batch.noise[0].numel() * self.num_samples * kept / 2**20
            refinement = f", {self.budget:,} a training sample for refinement" if self.budget else ""
            jacobian = " and a Jacobian" if self.budget else ""
            where = "on disk, in work_dir" if self.store.folder else "in the host's memory"
            print(
                f"Calibrating {', '.join(map(str, self.counts))} steps on {self.num_samples} training and "
                f"{self.num_held_out} held-out samples: at most {self.evaluations:,} evaluations of a sample in this "
                f"process{refinement}; {size:,.1f} MiB of the teacher's states{jacobian} {where}, "
                f"{self.source.batch_size} samples at a time on the device."
            )
        self.bar = tqdm(total=self.evaluations, unit="eval", disable=not shown, desc="teacher", leave=False)
        return self.bar
