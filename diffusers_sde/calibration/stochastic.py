"""Calibration of the reverse SDE: a grid and a noise level for each step, by the distance between distributions.

A stochastic sampler has no error of a sample; what can be compared is its samples with the teacher's, in energy
distance

    2 E|X - Y| - E|X - X'| - E|Y - Y'|  >= 0, and 0 for equal laws only (Szekely & Rizzo 2013),

with |.| the root mean square over elements.  The search is over few numbers (grid exponent and tau, then tau step by
step) with the same noise each time; the rows stay exact.  Knows nothing of deterministic rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffusers_sde.calibration.choose import refuse_random
from diffusers_sde.calibration.fit import TaughtSamples
from diffusers_sde.calibration.job import Job
from diffusers_sde.calibration.sources import HELD_OUT
from diffusers_sde.calibration.stock import best_stock
from diffusers_sde.calibration.workers import sum_over_workers
from diffusers_sde.defaults import falling_noise_levels
from diffusers_sde.grids import Nodes, nodes_from_times
from diffusers_sde.sampling import sample
from diffusers_sde.schedulers import ReverseSDEScheduler
from diffusers_sde.schedulers.calibration_format import written_entry

EXPONENTS = (1.0, 1.25, 1.5, 2.0, 2.5)
LEVELS = (0.25, 0.5, 0.75, 1.0, 1.25)
FACTORS = (0.5, 0.8, 1.25, 2.0)
MAX_LEVEL = 2.0


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Energy distance of two sample sets, unbiased, with root mean square distances, in units of a sample.

    Args:
        x, y: (N, ...) and (M, ...).  Samples k of both sets may share their initial noise: for equal sizes the pair
            (k, k) is left out everywhere.

    Raises:
        ValueError: for fewer than two samples.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError("The energy distance needs at least two samples of each kind.")
    x, y = (v.double().flatten(1) / v[0].numel() ** 0.5 for v in (x, y))

    def mean(a: torch.Tensor, b: torch.Tensor, paired: bool) -> torch.Tensor:
        d = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return (d.sum() - d.diagonal().sum()) / (d.numel() - len(d)) if paired else d.mean()

    return float(2 * mean(x, y, len(x) == len(y)) - mean(x, x, True) - mean(y, y, True))


def stochastic_entries(job: Job) -> dict[int, dict[str, Any]]:
    """For each number of steps the config entry with the best nodes and tau, or the default ones where these win on
    held-out samples.

    Raises:
        ValueError: for a model that draws noise of its own.
    """
    refuse_random(job)
    job.teacher.run(job.training.firsts, job.held_out.firsts)
    entries = {}
    for n in job.counts:
        name = job.note_name(n, "sde")
        entry = job.store.note(name)
        if entry is None:
            entry = _entry(job, n)
            job.store.put_note(name, entry)
        entries[n] = entry
    return entries


def _entry(job: Job, n: int) -> dict[str, Any]:
    path, mu = job.evaluator.path, job.source.mu
    grids = {rho: nodes_from_times(path, job.evaluator.times("power", n, rho=rho, mu=mu)) for rho in EXPONENTS}
    tried: dict[tuple[float, tuple[float, ...]], float] = {}

    def distance(rho: float, tau: tuple[float, ...]) -> float:
        if (rho, tau) not in tried:
            job.show(n, f"energy distance {min(tried.values(), default=np.inf):.4f}")
            tried[rho, tau] = _distance(job, job.training, grids[rho], tau)
        return tried[rho, tau]

    constant = ((rho, (tau,) * n) for rho, tau in itertools.product(EXPONENTS, LEVELS))
    falling = ((rho, tuple(falling_noise_levels(path, grids[rho]))) for rho in EXPONENTS)
    best = min(itertools.chain(constant, falling), key=lambda v: distance(*v))
    for i in range(n - 1):  # the last step draws no noise
        rho, tau = best
        moved = [(*tau[:i], min(tau[i] * f, MAX_LEVEL), *tau[i + 1 :]) for f in FACTORS]
        best = min([best, *((rho, t) for t in moved)], key=lambda v: distance(*v))
    standard = job.default_nodes(n, stochastic=True)
    levels = [1.0] * n
    nodes, tau = grids[best[0]], best[1]
    errors: dict[str, Any] = {
        "training": tried[best],
        "held_out": _distance(job, job.held_out, nodes, tau),
        "exact": _distance(job, job.held_out, standard, levels),
    }
    if job.stock:
        errors |= best_stock(job.stock, job.config, n, job.held_out, lambda ends: _distance_of(job, job.held_out, ends))
    if not errors["held_out"] < errors["exact"]:
        errors |= {"lost": errors["held_out"], "held_out": errors["exact"]}
        nodes, tau = standard, tuple(levels)
    return written_entry(nodes, None, list(tau), errors)


def _distance(job: Job, samples: TaughtSamples, nodes: Nodes, tau: Sequence[float]) -> float:
    """:func:`_distance_of` the reverse SDE on these nodes with these noise levels, always with the same noise."""
    ends = {}
    for first in samples.firsts:
        scheduler = ReverseSDEScheduler.from_config(job.config, tau=list(tau))
        scheduler.set_timesteps(timesteps=nodes.time[:-1])
        generator, tick = torch.Generator().manual_seed(first), job.evaluator.tick
        with samples.source.open(first) as batch:
            x = sample(batch.evaluate, scheduler, batch.noise, generator=generator, callback=tick)
        ends[first] = x.cpu()
    return _distance_of(job, samples, ends)


def _distance_of(job: Job, samples: TaughtSamples, ends: Mapping[int, torch.Tensor]) -> float:
    """Energy distance of last states, by batch, to the teacher's solutions, over the samples of all workers; inf where
    one is not finite."""
    training = samples is job.training
    origin, count = (0, job.batches.num_samples) if training else (HELD_OUT, job.batches.num_held_out)
    solutions = {first: samples.teacher.solution(first) for first in samples.firsts}
    pairs = np.zeros((2, count, solutions[samples.firsts[0]][0].numel()))
    for first, solution in solutions.items():
        pair = torch.stack([ends[first].double(), solution.double()]).flatten(2)
        pairs[:, first - origin : first - origin + len(solution)] = pair.numpy()
    x, y = torch.from_numpy(sum_over_workers(pairs))
    return energy_distance(x, y) if bool(x.isfinite().all()) else float("inf")
