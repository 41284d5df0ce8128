"""The table for each number of steps: candidate grids, fit, refinement, and the test on held-out noise.

Knows what competes with what, and that only a winner on held-out noise is kept.  Knows nothing of pipelines.
"""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from diffusers_sde.calibration.dynamic_program import best_grids, step_costs
from diffusers_sde.calibration.fit import fit_tables, mean_error, sample_errors, subgrid
from diffusers_sde.calibration.plan import POWERS, STOCK, Plan
from diffusers_sde.calibration.processes import total
from diffusers_sde.calibration.refine import refine
from diffusers_sde.comparison.problems import lay_out
from diffusers_sde.defaults import measured_defaults
from diffusers_sde.grids import Nodes, make_grid, nodes_from_times
from diffusers_sde.named_samplers import SAMPLERS, make_scheduler
from diffusers_sde.sampling import sample
from diffusers_sde.schedulers.calibrated import standard_table, table_entry
from diffusers_sde.tables import Table


def deterministic_entries(plan: Plan) -> dict[int, dict[str, Any]]:
    """For each number of steps the config entry of its table; see the page of theory in the package."""
    refuse_random(plan)
    plan.teacher.run(plan.training.firsts, plan.held_out.firsts)
    nodes = plan.teacher.nodes
    assert nodes is not None
    dynamic = best_grids(*step_costs(plan.teacher.gram(plan.training.firsts)), plan.counts)
    entries = {}
    for n in plan.counts:
        name = f"steps-{n}-of-{plan.num_samples}-and-{plan.num_held_out}-refined-{plan.starts[n]}"
        entry = plan.store.note(name)
        if entry is None:
            entry = _entry(plan, nodes, dynamic[n], n)
            plan.store.put_note(name, entry)
        entries[n] = entry
    return entries


def refuse_random(plan: Plan) -> None:
    """Raise ``ValueError`` for a model whose answers to one question differ: it has no trajectory to learn from."""
    path = plan.process.path
    time = torch.tensor(0.5 * (path.noisiest + path.cleanest), dtype=torch.float32)
    if plan.process.integer_times:
        time = time.round().long()
    with plan.source.open(0) as batch:
        one, two = (batch.evaluate(batch.noise, time).double() for _ in range(2))
    if float((one - two).norm()) > 1e-2 * float(one.norm()):
        raise ValueError(
            "This model draws noise of its own (two evaluations of one state differ): put it into eval mode; a model "
            "that stays random has no deterministic table."
        )


def default_nodes(plan: Plan, n: int) -> Nodes:
    """The grid of the exact solver's measured defaults."""
    path, mu = plan.process.path, plan.source.mu
    default = measured_defaults(path, n)
    times = make_grid(path, default.grid, n, rho=default.rho, mu=mu)
    return nodes_from_times(path, np.round(times) if plan.process.integer_times else times)


def candidate_grids(plan: Plan, nodes: Nodes, dynamic: list[int], n: int) -> list[list[int]]:
    """Grids to try, as indices of teacher nodes: the dynamic program's, power grids, the exact solver's own."""
    grids, path = [dynamic], plan.process.path
    wanted = [make_grid(path, "power", n, rho=rho, mu=plan.source.mu) for rho in POWERS]
    for times in [*wanted, default_nodes(plan, n).time[:-1]]:
        nearest = sorted({int(np.argmin(np.abs(nodes.time[:-1] - t))) for t in times})
        if len(nearest) == n and nearest[0] == 0 and nearest not in grids:
            grids.append(nearest)
    return grids


def _entry(plan: Plan, nodes: Nodes, dynamic: list[int], n: int) -> dict[str, Any]:
    """Fit on every candidate grid, refine the best, keep what is best on held-out noise."""
    plan.say(n, "fit")
    grids = candidate_grids(plan, nodes, dynamic, n)
    fitted = sorted(zip(fit_tables(plan.training, grids), grids, strict=True), key=lambda found: found[0][1])
    found = fitted[:1]
    for (table, _), grid in fitted[: plan.starts[n]]:
        found.append((refine(plan.training, plan.store, table, lambda e: plan.say(n, f"training error {e:.4f}")), grid))
    plan.say(n, "held out")
    exact = default_nodes(plan, n)
    errors: dict[str, Any] = {"exact": mean_error(plan.held_out, standard_table(plan.process.path, exact))}
    errors |= best_stock(plan, n)
    held_out = [mean_error(plan.held_out, table) for (table, _), _ in found]
    best = int(np.argmin(held_out))
    (table, training), grid = found[best]
    errors |= {"training": training, "held_out": held_out[best]}
    if held_out[best] < errors["exact"]:
        return table_entry(_with_times(subgrid(nodes, grid), table), table, None, errors)
    errors |= {"lost": errors["held_out"], "held_out": errors["exact"]}
    return table_entry(exact, None, None, errors)


def _with_times(nodes: Nodes, table: Table) -> Nodes:
    """The levels of a grid with the times at which the table evaluates."""
    times = [row.time for row in table.rows]
    return Nodes(np.append(times, nodes.time[-1]), nodes.alpha, nodes.sigma)


def best_stock(plan: Plan, n: int) -> dict[str, Any]:
    """``stock`` and ``stock_name``: the smallest held-out error of the named samplers of diffusers that fit."""
    given = {k: v for k, v in plan.config.items() if v is not None}  # stock classes have other words for "default"
    best: dict[str, Any] = {"stock": None, "stock_name": None}
    for name in STOCK:
        sums = np.array([0.0, 0.0])
        with contextlib.suppress(Exception):  # one that cannot run here is no competition
            for first in plan.held_out.firsts:
                scheduler = make_scheduler(name, given)
                lay_out(scheduler, SAMPLERS[name].steps(n))
                with plan.source.open(first) as batch:
                    x = sample(batch.evaluate, scheduler, batch.noise, callback=plan.tick)
                sums += sample_errors(x, plan.teacher.solution(first)).sum(), len(x)
        sums = total(sums)
        if sums[1] == plan.num_held_out and np.isfinite(sums[0]):
            error = float(sums[0] / sums[1])
            if best["stock"] is None or error < best["stock"]:
                best = {"stock": error, "stock_name": name}
    return best


def format_errors(errors: dict[int, dict[str, Any]]) -> str:
    """A table for the terminal: training and held-out error, the exact solver and the best stock sampler there."""
    lines = ["steps  training  held-out     exact     stock  (best of diffusers)    ratio to exact, stock"]
    for n, e in errors.items():
        values = (e["training"], e["held_out"], e["exact"], e["stock"])
        cells = ("-".rjust(9) if v is None else f"{v:9.5f}" for v in values)
        ratios = ", ".join(f"{e['held_out'] / e[k]:.2f}" if e[k] else "-" for k in ("exact", "stock"))
        kept = f"   (the calibrated {e['lost']:.5f} lost: the exact solver stays)" if "lost" in e else ""
        lines.append(f"{n:5d} {' '.join(cells)}  {e['stock_name'] or '-':<22}  {ratios}{kept}")
    return "\n".join(lines)
