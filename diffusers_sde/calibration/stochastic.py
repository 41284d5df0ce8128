"""Calibration of the reverse SDE: a grid and a noise level for each step, by the distance between distributions.

A stochastic sampler has no error of a sample; what can be compared is its samples with the teacher's, in energy
distance

    2 E|X - Y| - E|X - X'| - E|Y - Y'|  >= 0, and 0 for equal laws only (Szekely & Rizzo 2013),

with |.| the root mean square over elements.  The search is over few numbers (grid exponent and tau, then tau step by
step) with the same noise each time; the rows stay exact.  Knows nothing of deterministic rows.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from diffusers_sde.calibration.choose import refuse_random
from diffusers_sde.calibration.fit import Samples
from diffusers_sde.calibration.plan import Plan
from diffusers_sde.calibration.processes import total
from diffusers_sde.comparison.problems import lay_out
from diffusers_sde.defaults import measured_defaults
from diffusers_sde.grids import make_grid, nodes_from_times
from diffusers_sde.named_samplers import SAMPLERS, make_scheduler
from diffusers_sde.sampling import sample
from diffusers_sde.schedulers import ReverseSDEScheduler
from diffusers_sde.schedulers.calibrated import table_entry

EXPONENTS = (1.0, 1.25, 1.5, 2.0, 2.5)
LEVELS = (0.25, 0.5, 0.75, 1.0, 1.25)
FACTORS = (0.5, 0.8, 1.25, 2.0)
MAX_LEVEL = 2.0


def energy_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Energy distance of two sample sets (N, ...) and (M, ...), unbiased, with root mean square distances.

    Samples k of both sets may share their initial noise: for equal sizes the pair (k, k) is left out everywhere.
    Raises ``ValueError`` for fewer than two samples.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError("The energy distance needs at least two samples of each kind.")
    x, y = (v.double().flatten(1) / v[0].numel() ** 0.5 for v in (x, y))

    def mean(a: torch.Tensor, b: torch.Tensor, paired: bool) -> torch.Tensor:
        d = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        return (d.sum() - d.diagonal().sum()) / (d.numel() - len(d)) if paired else d.mean()

    return float(2 * mean(x, y, len(x) == len(y)) - mean(x, x, True) - mean(y, y, True))


def stochastic_entries(plan: Plan) -> dict[int, dict[str, Any]]:
    """For each number of steps the config entry with the best nodes and tau, or the default ones where these win on
    held-out samples."""
    refuse_random(plan)
    plan.teacher.run(plan.training.firsts, plan.held_out.firsts)
    entries = {}
    for n in plan.counts:
        name = f"sde-{n}-of-{plan.num_samples}-and-{plan.num_held_out}"
        entry = plan.store.note(name)
        if entry is None:
            entry = _entry(plan, n)
            plan.store.put_note(name, entry)
        entries[n] = entry
    return entries


def _entry(plan: Plan, n: int) -> dict[str, Any]:
    grids = {rho: _times(plan, rho, n) for rho in EXPONENTS}
    tried: dict[tuple[float, tuple[float, ...]], float] = {}

    def distance(rho: float, tau: tuple[float, ...]) -> float:
        if (rho, tau) not in tried:
            plan.say(n, f"energy distance {min(tried.values(), default=np.inf):.4f}")
            tried[rho, tau] = _distance(plan, plan.training, _reverse_sde(plan, grids[rho], tau))
        return tried[rho, tau]

    best = min(((rho, (tau,) * n) for rho, tau in itertools.product(EXPONENTS, LEVELS)), key=lambda v: distance(*v))
    for i in range(n - 1):  # the last step draws no noise
        rho, tau = best
        moved = [(*tau[:i], min(tau[i] * f, MAX_LEVEL), *tau[i + 1 :]) for f in FACTORS]
        best = min([best, *((rho, t) for t in moved)], key=lambda v: distance(*v))
    default = measured_defaults(plan.process.path, n, stochastic=True)
    standard = make_grid(plan.process.path, default.grid, n, rho=default.rho, mu=plan.source.mu)
    if plan.process.integer_times:
        standard = np.round(standard)
    errors: dict[str, Any] = {
        "training": tried[best],
        "held_out": _distance(plan, plan.held_out, _reverse_sde(plan, grids[best[0]], best[1])),
        "exact": _distance(plan, plan.held_out, _reverse_sde(plan, standard, (1.0,) * n)),
        **_best_stock(plan, n),
    }
    times, tau = grids[best[0]], best[1]
    if not errors["held_out"] < errors["exact"]:
        errors |= {"lost": errors["held_out"], "held_out": errors["exact"]}
        times, tau = standard, (1.0,) * n
    return table_entry(nodes_from_times(plan.process.path, times), None, list(tau), errors)


def _times(plan: Plan, rho: float, n: int) -> np.ndarray:
    times = make_grid(plan.process.path, "power", n, rho=rho, mu=plan.source.mu)
    return np.round(times) if plan.process.integer_times else times


def _reverse_sde(plan: Plan, times: np.ndarray, tau: Sequence[float]) -> Any:
    def build(first: int) -> Any:
        scheduler = ReverseSDEScheduler.from_config(plan.config, tau=list(tau), noise_seed=first)
        scheduler.set_timesteps(timesteps=times)
        return scheduler

    return build


def _distance(plan: Plan, samples: Samples, build: Any) -> float:
    """Energy distance of a sampler's results to the teacher's over the samples of all processes; inf where one is not
    finite."""
    size = samples.source.batch_size
    count = plan.num_samples if samples is plan.training else plan.num_held_out
    origin = 0 if samples is plan.training else plan.held_out_origin
    made = None
    for first in samples.firsts:
        scheduler = build(first)
        generator = torch.Generator().manual_seed(first)
        with samples.source.open(first) as batch:
            x = sample(batch.evaluate, scheduler, batch.noise, generator=generator, callback=plan.tick).cpu().double()
        solution = samples.teacher.solution(first).double()
        if made is None:
            made = np.zeros((2, count, solution[0].numel()))
        made[:, first - origin : first - origin + size] = torch.stack([x, solution]).flatten(2).numpy()
    assert made is not None
    x, y = torch.from_numpy(total(made))
    return energy_distance(x, y) if bool(x.isfinite().all()) else float("inf")


def _best_stock(plan: Plan, n: int) -> Mapping[str, Any]:
    """``stock`` and ``stock_name``: the smallest distance of diffusers' stochastic samplers that fit."""
    given = {k: v for k, v in plan.config.items() if v is not None}
    best: dict[str, Any] = {"stock": None, "stock_name": None}
    for name in (k for k, s in SAMPLERS.items() if s.stochastic and not s.ours):

        def build(first: int, name: str = name) -> Any:
            scheduler = make_scheduler(name, given)
            lay_out(scheduler, n)
            return scheduler

        with contextlib.suppress(Exception):  # one that cannot run here is no competition
            distance = _distance(plan, plan.held_out, build)
            if np.isfinite(distance) and (best["stock"] is None or distance < best["stock"]):
                best = {"stock": distance, "stock_name": name}
    return best
