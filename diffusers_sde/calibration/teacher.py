"""The teacher: a converged solution of each sample, its states at the nodes, and the Gram matrix of what it saw.

Knows how fine the teacher is and what is kept of it: states, and the Gram matrix in float64; the evaluations are not
needed again.  Nothing stays on the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from diffusers_sde.calibration.rollout import Evaluator, roll
from diffusers_sde.calibration.sources import Batch, Source
from diffusers_sde.calibration.store import Store
from diffusers_sde.calibration.workers import sum_over_workers
from diffusers_sde.defaults import standard_table
from diffusers_sde.grids import Nodes, nodes_from_times
from diffusers_sde.named_grids import make_grid
from diffusers_sde.tables import Table

SUBSTEPS = 2  # of the teacher between two nodes


def teacher_nodes(evaluator: Evaluator, count: int, mu: float | None) -> Nodes:
    """``count`` nodes between which students may step: the trailing power grid of exponent 1.25 where times count equal
    steps (EDM: balanced), at integers for a network that only knows these (fewer where these coincide), and clean
    data."""
    grid, rho = ("balanced", 1.0) if evaluator.path.num_train_timesteps is None else ("power", 1.25)
    times = make_grid(evaluator.path, grid, count, rho=rho, mu=mu)
    if evaluator.integer_times:
        times = np.unique(np.round(times))[::-1]
    return nodes_from_times(evaluator.path, times)


def fine_nodes(evaluator: Evaluator, nodes: Nodes) -> Nodes:
    """The teacher's own nodes: equal steps of time for each step between ``nodes``, the last one down to the cleanest
    time."""
    ends = np.append(nodes.time[:-1], evaluator.path.cleanest)
    index = np.arange(SUBSTEPS * (len(ends) - 1) + 1) / SUBSTEPS
    times = np.interp(index, np.arange(len(ends)), ends)
    if times[-1] == times[-2]:  # the last node is the cleanest time
        times = times[:-SUBSTEPS]
    return nodes_from_times(evaluator.path, times)


class Teacher:
    """Targets of a calibration: :meth:`run` makes them, :meth:`state`, :meth:`solution` and :meth:`gram` hand them out.

    Args:
        evaluator, source: whose samples.
        store: where they are kept.
        count: nodes between which students may step.
    """

    def __init__(self, evaluator: Evaluator, source: Source, store: Store, count: int):
        self._evaluator, self._source, self._store, self._count = evaluator, source, store, count
        self._nodes: Nodes | None = None

    @property
    def nodes(self) -> Nodes:
        """The nodes, known once :meth:`run` has opened a batch: a flow pipeline's shift is known then."""
        assert self._nodes is not None
        return self._nodes

    @property
    def evaluations(self) -> int:
        """At most this many a sample."""
        return SUBSTEPS * self._count + 1

    def run(self, firsts: Sequence[int], held_out: Sequence[int]) -> None:
        """Solve every batch that is not in the store yet; of held-out ones only the solution is kept.

        Raises:
            ValueError: for a store that holds the teacher of another network or of other inputs.
        """
        for first in [*firsts, *held_out]:
            name, all_states = f"teacher-{first}", first in set(firsts)
            if name in self._store:
                for _ in range(self.evaluations):
                    self._evaluator.tick()
            with self._source.open(first) as batch:
                nodes = self._nodes = teacher_nodes(self._evaluator, self._count, self._source.mu)
                table = standard_table(self._evaluator.path, fine_nodes(self._evaluator, nodes))
                if name in self._store:
                    self._check_network(name, batch, table)
                    continue
                x = self._evaluator.start(batch)
                states, evaluations = roll(self._evaluator, batch, table, x)
                at = [SUBSTEPS * i for i in range(len(nodes) - 1)]
                kept = {"solution": states[-1], "first": evaluations[0][:1]}
                if all_states:
                    kept["states"] = torch.stack([([x, *states][i]).cpu() for i in at] + [states[-1].cpu()])
                    kept["gram"] = self._gram(kept["states"], [evaluations[i] for i in at], nodes)
                self._store.put(name, kept)

    def _check_network(self, name: str, batch: Batch, table: Table) -> None:
        now = self._evaluator.evaluate(batch, table.rows[0], self._evaluator.start(batch))[:1].cpu()
        if not torch.allclose(now, self._store.get(name, "first"), rtol=1e-2, atol=1e-2):
            raise ValueError("work_dir holds the teacher of another network or other inputs: pass another work_dir.")

    def _gram(self, states: torch.Tensor, evaluations: list[torch.Tensor], nodes: Nodes) -> torch.Tensor:
        """Inner products, summed over samples and averaged over their elements, float64: normalised states, then F."""
        rho = [self._evaluator.normaliser(a, s) for a, s in zip(nodes.alpha, nodes.sigma, strict=True)]
        vectors = [x.double().flatten() / r for x, r in zip(states, rho, strict=True)]
        vectors += [f.double().cpu().flatten() for f in evaluations]
        stacked = torch.stack(vectors)
        return stacked @ stacked.mT / math.prod(states.shape[2:])

    def state(self, first: int, index: int) -> torch.Tensor:
        """The state at node ``index`` of the batch that starts at sample ``first``, (B, ...), on the host."""
        return self._store.get(f"teacher-{first}", "states", index)

    def solution(self, first: int) -> torch.Tensor:
        """The converged solution of a batch, (B, ...), on the host."""
        return self._store.get(f"teacher-{first}", "solution")

    def gram(self, firsts: Sequence[int]) -> np.ndarray:
        """The Gram matrix of the samples of all workers, averaged over samples and elements, float64 (2M + 1, 2M + 1):
        the normalised states at the M nodes and the solution, then the evaluations at the nodes."""
        size, count = 2 * len(self.nodes) - 1, 0
        out = np.zeros((size, size))
        for first in firsts:
            out += self._store.get(f"teacher-{first}", "gram").numpy()
            count += self._source.batch_size
        return sum_over_workers(out) / sum_over_workers(np.array(float(count)))
