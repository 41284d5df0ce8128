"""The teacher: a converged solution of each sample, its states at the nodes, and the Gram matrix of what it saw.

Knows how fine the teacher is, what is kept of it (states, the Gram matrix in float64; the evaluations are not needed
again) and where: in memory or in a folder, one file per batch, never on the device.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path as Folder
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_sde.calibration.processes import total
from diffusers_sde.calibration.rollout import Process, roll
from diffusers_sde.calibration.sources import Source
from diffusers_sde.grids import Nodes, make_grid, nodes_from_times
from diffusers_sde.paths import VarianceExploding
from diffusers_sde.schedulers.calibrated import standard_table

SUBSTEPS = 2


def teacher_nodes(process: Process, count: int, mu: float | None) -> Nodes:
    """``count`` nodes between which students may step: the trailing power grid of exponent 1.25 (EDM: balanced), at
    integers for a network that only knows these, and clean data."""
    grid = ("balanced", 1.0) if isinstance(process.path, VarianceExploding) else ("power", 1.25)
    times = make_grid(process.path, grid[0], count, rho=grid[1], mu=mu)
    if process.integer_times:
        times = np.unique(np.round(times))[::-1]
    return nodes_from_times(process.path, times)


def fine_nodes(process: Process, nodes: Nodes, substeps: int) -> Nodes:
    """``substeps`` equal steps of time for each step between nodes, the last one down to the cleanest time."""
    ends = np.append(nodes.time[:-1], process.path.cleanest)
    index = np.arange(substeps * (len(ends) - 1) + 1) / substeps
    times = np.interp(index, np.arange(len(ends)), ends)
    if times[-1] == times[-2]:  # the last node is the cleanest time
        times = times[:-substeps]
    return nodes_from_times(process.path, times)


class Store:
    """Tensors by name, in memory or, with a folder, one safetensors file a name, written whole or not at all."""

    def __init__(self, folder: Folder | None = None):
        self.folder, self._memory = folder, dict[str, dict[str, torch.Tensor]]()

    def __contains__(self, name: str) -> bool:
        return name in self._memory if self.folder is None else (self.folder / f"{name}.safetensors").is_file()

    def put(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
        if self.folder is None:
            self._memory[name] = tensors
            return
        path = self.folder / f"{name}.safetensors"
        temporary = path.with_suffix(f".{os.getpid()}.part")
        save_file(tensors, temporary)
        os.replace(temporary, path)

    def get(self, name: str, key: str, index: int | None = None) -> torch.Tensor:
        """One tensor, or one entry of its first axis (only that is read)."""
        if self.folder is None:
            tensor = self._memory[name][key]
            return tensor if index is None else tensor[index]
        with safe_open(self.folder / f"{name}.safetensors", "pt") as file:
            return file.get_tensor(key) if index is None else file.get_slice(key)[index : index + 1][0]

    def drop(self, name: str) -> None:
        if self.folder is None:
            self._memory.pop(name, None)
        else:
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)

    def note(self, name: str) -> Any:
        """What :meth:`put_note` wrote, None if it did not."""
        path = None if self.folder is None else self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path is not None and path.is_file() else None

    def put_note(self, name: str, value: Any) -> None:
        """Keep a small JSON value in the folder; without one there is nothing to resume."""
        if self.folder is not None:
            temporary = self.folder / f"{name}.{os.getpid()}.part"
            temporary.write_text(json.dumps(value))
            os.replace(temporary, self.folder / f"{name}.json")


class Teacher:
    """Targets of a calibration: ``state(first, i)`` of node i for the batch that starts at sample ``first``."""

    def __init__(self, process: Process, source: Source, store: Store, count: int, substeps: int = SUBSTEPS):
        self._process, self._source, self._store = process, source, store
        self._count, self._substeps = count, substeps
        self.nodes: Nodes | None = None

    @property
    def evaluations(self) -> int:
        """At most this many a sample."""
        return self._substeps * self._count + 1

    def run(self, firsts: Sequence[int], held_out: Sequence[int]) -> None:
        """Solve every batch that is not in the store yet; of held-out ones only the solution is kept."""
        for first in [*firsts, *held_out]:
            name, all_states = f"teacher-{first}", first in set(firsts)
            if name in self._store:
                for _ in range(self.evaluations):
                    self._process.tick()
            with self._source.open(first) as batch:
                nodes = self.nodes = teacher_nodes(self._process, self._count, self._source.mu)
                fine = fine_nodes(self._process, nodes, self._substeps)
                table = standard_table(self._process.path, fine)
                if name in self._store:
                    self._same_network(name, batch, table)
                    continue
                x = self._process.start(batch)
                states, evaluations = roll(self._process, batch, table, x)
                at = [self._substeps * i for i in range(len(nodes) - 1)]
                kept = {"solution": states[-1], "first": evaluations[0][:1]}
                if all_states:
                    kept["states"] = torch.stack([([x, *states][i]).cpu() for i in at] + [states[-1].cpu()])
                    kept["gram"] = self._gram(kept["states"], [evaluations[i] for i in at], nodes)
                self._store.put(name, kept)

    def _same_network(self, name: str, batch, table) -> None:
        now = self._process.evaluate(batch, table.rows[0], self._process.start(batch))[:1].cpu()
        if not torch.allclose(now, self._store.get(name, "first"), rtol=1e-2, atol=1e-2):
            raise ValueError("work_dir holds the teacher of another network or other inputs: pass another work_dir.")

    def _gram(self, states: torch.Tensor, evaluations: list[torch.Tensor], nodes: Nodes) -> torch.Tensor:
        """Inner products, summed over samples and averaged over their elements, float64: normalised states, then F."""
        rho = [self._process.normaliser(a, s) for a, s in zip(nodes.alpha, nodes.sigma, strict=True)]
        vectors = [x.double().flatten() / r for x, r in zip(states, rho, strict=True)]
        vectors += [f.double().cpu().flatten() for f in evaluations]
        stacked = torch.stack(vectors)
        return stacked @ stacked.mT / math.prod(states.shape[2:])

    def state(self, first: int, index: int) -> torch.Tensor:
        return self._store.get(f"teacher-{first}", "states", index)

    def solution(self, first: int) -> torch.Tensor:
        return self._store.get(f"teacher-{first}", "solution")

    def gram(self, firsts: Sequence[int]) -> np.ndarray:
        """The Gram matrix of the samples of all processes, averaged over samples and elements."""
        assert self.nodes is not None
        size, count = 2 * len(self.nodes) - 1, 0
        out = np.zeros((size, size))
        for first in firsts:
            out += self._store.get(f"teacher-{first}", "gram").numpy()
            count += self._source.batch_size
        return total(out) / total(np.array(float(count)))
