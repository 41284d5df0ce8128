"""The table for each number of steps: candidate grids, fit, refinement, and the test on held-out noise.

Knows what competes with what, and that only a winner on held-out noise is kept.  Knows nothing of pipelines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from diffusers_sde.calibration.dynamic_program import best_grids, step_costs
from diffusers_sde.calibration.fit import error_of_ends, fit_tables, subgrid, table_error
from diffusers_sde.calibration.job import POWERS, Job
from diffusers_sde.calibration.refine import refine
from diffusers_sde.calibration.stock import best_stock
from diffusers_sde.defaults import standard_table
from diffusers_sde.grids import Nodes
from diffusers_sde.named_grids import make_grid
from diffusers_sde.schedulers.calibration_format import written_entry
from diffusers_sde.tables import Table


def deterministic_entries(job: Job) -> dict[int, dict[str, Any]]:
    """For each number of steps the config entry of its table; see the page of theory in the package.

    Raises:
        ValueError: for a model that draws noise of its own.
    """
    refuse_random(job)
    job.teacher.run(job.training.firsts, job.held_out.firsts)
    dynamic = best_grids(*step_costs(job.teacher.gram(job.training.firsts)), job.counts)
    entries = {}
    for n in job.counts:
        name = job.note_name(n, f"refined-{job.refined_grids[n]}-steps")
        entry = job.store.note(name)
        if entry is None:
            entry = _entry(job, dynamic[n], n)
            job.store.put_note(name, entry)
        entries[n] = entry
    return entries


def refuse_random(job: Job) -> None:
    """Raise ``ValueError`` for a model whose answers to one question differ: it has no trajectory to learn from."""
    path = job.evaluator.path
    time = torch.tensor(0.5 * (path.noisiest + path.cleanest), dtype=torch.float32)
    if job.evaluator.integer_times:
        time = time.round().long()
    with job.source.open(0) as batch:
        one, two = (batch.evaluate(batch.noise, time).double() for _ in range(2))
    if float((one - two).norm()) > 1e-2 * float(one.norm()):
        raise ValueError(
            "This model draws noise of its own (two evaluations of one state differ): put it into eval mode; a model "
            "that stays random has no deterministic table."
        )


def candidate_grids(job: Job, dynamic: list[int], n: int) -> list[list[int]]:
    """Grids to try, as indices of teacher nodes: the dynamic program's, power grids, the exact solver's own."""
    grids, path, teacher_times = [dynamic], job.evaluator.path, job.teacher.nodes.time[:-1]
    power = [make_grid(path, "power", n, rho=rho, mu=job.source.mu) for rho in POWERS]
    for times in [*power, job.default_nodes(n).time[:-1]]:
        nearest = sorted({int(np.argmin(np.abs(teacher_times - t))) for t in times})
        if len(nearest) == n and nearest[0] == 0 and nearest not in grids:
            grids.append(nearest)
    return grids


def _entry(job: Job, dynamic: list[int], n: int) -> dict[str, Any]:
    """Fit on every candidate grid, refine the best, keep what is best on held-out noise."""
    job.show(n, "fit")
    grids = candidate_grids(job, dynamic, n)
    fitted = sorted(zip(fit_tables(job.training, grids), grids, strict=True), key=lambda found: found[0][1])
    found = fitted[:1]
    for (table, _), grid in fitted[: job.refined_grids[n]]:
        found.append((refine(job.training, job.store, table, lambda e: job.show(n, f"training error {e:.4f}")), grid))
    job.show(n, "held out")
    exact = job.default_nodes(n)
    errors: dict[str, Any] = {"exact": table_error(job.held_out, standard_table(job.evaluator.path, exact))}
    if job.stock:
        errors |= best_stock(job.stock, job.config, n, job.held_out, lambda ends: error_of_ends(job.held_out, ends))
    held_out = [table_error(job.held_out, table) for (table, _), _ in found]
    best = int(np.argmin(held_out))
    (table, training), grid = found[best]
    errors |= {"training": training, "held_out": held_out[best]}
    if held_out[best] < errors["exact"]:
        return written_entry(_with_times(subgrid(job.teacher.nodes, grid), table), table, None, errors)
    errors |= {"lost": errors["held_out"], "held_out": errors["exact"]}
    return written_entry(exact, None, None, errors)


def _with_times(nodes: Nodes, table: Table) -> Nodes:
    """The levels of a grid with the times at which the table evaluates."""
    times = [row.time for row in table.rows]
    return Nodes(np.append(times, nodes.time[-1]), nodes.alpha, nodes.sigma)


def format_errors(errors: dict[int, dict[str, Any]]) -> str:
    """A table for the terminal: training and held-out error, the exact solver, and the best stock sampler where these
    were compared."""
    stock = any("stock" in e for e in errors.values())
    lines = ["steps  training  held-out     exact" + ("     stock  (best of diffusers)   " if stock else "")]
    lines[0] += "  ratio to exact" + (", stock" if stock else "")
    for n, e in errors.items():
        compared = ("exact", "stock") if stock else ("exact",)
        cells = ["-".rjust(9) if e[k] is None else f"{e[k]:9.5f}" for k in ("training", "held_out", *compared)]
        name = f"  {e['stock_name'] or '-':<22}" if stock else ""
        ratios = ", ".join(f"{e['held_out'] / e[k]:.2f}" if e[k] else "-" for k in compared)
        kept = f"   (the calibrated {e['lost']:.5f} lost: the exact solver stays)" if "lost" in e else ""
        lines.append(f"{n:5d} {' '.join(cells)}{name}  {ratios}{kept}")
    return "\n".join(lines)
