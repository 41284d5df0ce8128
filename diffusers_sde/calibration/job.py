"""One calibration as a job: whose samples, what is to be done with them, and what that costs.

Knows how evaluations are counted and shown.  Knows nothing of how tables are chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm.auto import tqdm

from diffusers_sde.calibration.arguments import MOST_STEPS
from diffusers_sde.calibration.fit import TaughtSamples
from diffusers_sde.calibration.refine import refinement_cost, refinement_memory
from diffusers_sde.calibration.rollout import Evaluator
from diffusers_sde.calibration.sources import HELD_OUT, Source
from diffusers_sde.calibration.store import Store
from diffusers_sde.calibration.teacher import Teacher
from diffusers_sde.calibration.workers import is_main, share
from diffusers_sde.configs import path_from_config
from diffusers_sde.defaults import measured_defaults
from diffusers_sde.grids import Nodes, nodes_from_times

NODES = 2 * MOST_STEPS  # of the teacher
POWERS = (1.25, 1.5, 2.0)  # exponents of the power grids that compete with the dynamic program's
MOST_REFINED = 2  # grids refined for one number of steps
FEW = 6  # up to this number of steps a second grid is worth its cost: the default budget pays for it


def refined_grids(costs: Mapping[int, int], budget: int) -> dict[int, int]:
    """How many grids are refined for each number of steps: one for each, then a second one, while ``budget`` lasts.

    Args:
        costs: of one refinement at each number of steps, in evaluations a sample.
        budget: in evaluations a sample.
    """
    found = dict.fromkeys(costs, 0)
    for _ in range(MOST_REFINED):
        for n, cost in sorted(costs.items()):
            if cost <= budget:
                found[n] += 1
                budget -= cost
    return found


@dataclass(frozen=True)
class Batches:
    """Whole batches by the index of their first sample: this worker's share of the training and of the held-out ones
    in ``training`` and ``held_out``, and how many samples they have over all workers."""

    size: int
    training: Sequence[int]
    held_out: Sequence[int]
    num_samples: int
    num_held_out: int


def shared_batches(size: int, num_samples: int, num_held_out: int) -> Batches:
    """This worker's batches of ``size`` samples for at least so many training and held-out samples.

    Raises:
        ValueError: where a worker would have none.
    """
    training, held_out = range(0, num_samples, size), range(HELD_OUT, HELD_OUT + num_held_out, size)
    mine = Batches(size, share(training), share(held_out), len(training) * size, len(held_out) * size)
    if not mine.training or not mine.held_out:
        raise ValueError("There are fewer batches than workers: pass a smaller batch_size or more samples.")
    return mine


class Job:
    """What :func:`diffusers_sde.calibrate` was asked for, made definite.

    Args:
        config: of a scheduler of this package.
        source: the samples' noise and the network.
        store: where the teacher's states and finished tables are kept.
        counts: the numbers of evaluations to calibrate.
        batches: this worker's samples.
        refine, budget: whether grids are refined, and for how many evaluations a training sample, all in all.
        stock: names of the stock samplers to compare with.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        source: Source,
        store: Store,
        counts: Sequence[int],
        batches: Batches,
        *,
        refine: bool,
        budget: int | None,
        stock: Sequence[str],
    ):
        self.config, self.source, self.store, self.counts = config, source, store, counts
        self.batches, self.stock = batches, stock
        path = path_from_config(config)
        integer = bool(config.get("round_timesteps"))
        self.evaluator = Evaluator(path, config["prediction_type"], path.data_scale, integer, self._count_batch)
        self.teacher = Teacher(self.evaluator, source, store, NODES)
        self.training = TaughtSamples(self.evaluator, source, batches.training, self.teacher)
        self.held_out = TaughtSamples(self.evaluator, source, batches.held_out, self.teacher)
        costs = {n: refinement_cost(n, times=not integer) for n in counts}
        standard = sum((MOST_REFINED if n <= FEW else 1) * cost for n, cost in costs.items())
        self.refined_grids = refined_grids(costs, 0 if not refine else standard if budget is None else budget)
        self.budget = sum(costs[n] * k for n, k in self.refined_grids.items())
        self.bar = tqdm(disable=True)

    def _count_batch(self) -> None:
        self.bar.update(self.batches.size)

    def show(self, n: int, what: str) -> None:
        """Write beside the bar what is being done for ``n`` steps."""
        self.bar.set_description(f"{n} steps: {what}")

    def note_name(self, n: int, kind: str) -> str:
        """The name of a finished entry in the store: different for whatever it depends on beside the run's identity."""
        stock = "-and-stock" if self.stock else ""
        return f"{kind}-{n}-of-{self.batches.num_samples}-and-{self.batches.num_held_out}{stock}"

    def default_nodes(self, n: int, stochastic: bool = False) -> Nodes:
        """The grid of the exact solver's measured defaults at ``n`` evaluations."""
        default = measured_defaults(self.evaluator.path, n, stochastic)
        times = self.evaluator.times(default.grid, n, mu=self.source.mu, **default.options)
        return nodes_from_times(self.evaluator.path, times)

    @property
    def evaluations(self) -> int:
        """At most this many evaluations of a sample, in this worker."""
        steps = sum(self.counts)
        fitting = (len(POWERS) + 3) * steps + self.budget
        testing = (2 + MOST_REFINED + len(self.stock)) * steps  # the exact, fitted and refined tables, stock samplers
        training, held_out = (self.batches.size * len(v) for v in (self.batches.training, self.batches.held_out))
        return training * (self.teacher.evaluations + fitting) + held_out * (self.teacher.evaluations + testing)

    def announce(self, progress: bool) -> Any:
        """Say what will be done and what it takes; returns the progress bar, a context manager."""
        shown = progress and is_main()
        if shown:
            with self.source.open(0) as batch:
                refined = [n for n, k in self.refined_grids.items() if k]
                memory = refinement_memory(max(refined), times=not self.evaluator.integer_times) if refined else 0
                size = 4 * batch.noise[0].numel() * self.batches.num_samples * (NODES + 1 + memory) / 2**20
            refinement = f", {self.budget:,} a training sample for refinement" if self.budget else ""
            jacobian = " and a Jacobian" if self.budget else ""
            where = "on disk, in work_dir" if self.store.folder else "in the host's memory"
            print(
                f"Calibrating {', '.join(map(str, self.counts))} steps on {self.batches.num_samples} training and "
                f"{self.batches.num_held_out} held-out samples: at most {self.evaluations:,} evaluations of a sample "
                f"in this process{refinement}; {size:,.1f} MiB of the teacher's states{jacobian} {where}, "
                f"{self.batches.size} samples at a time on the device."
            )
        self.bar = tqdm(total=self.evaluations, unit="eval", disable=not shown, desc="teacher", leave=False)
        return self.bar
