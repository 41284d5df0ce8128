"""The competition: every scheduler of diffusers, deterministic or stochastic, with every grid that it offers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import diffusers

SPACINGS = [{"timestep_spacing": s} for s in ("trailing", "linspace", "leading")]
SIGMAS = [{f"use_{s}_sigmas": True} for s in ("karras", "exponential", "beta")]
LU = [{"use_lu_lambdas": True}]


def stock_odes(config: dict[str, Any], n: int) -> Iterator[tuple[str, Any]]:
    """Every deterministic scheduler of diffusers with every grid it offers, laid out for ``n`` evaluations."""
    families: list[tuple[str, list[dict], list[dict]]] = [
        ("DDIMScheduler", SPACINGS, [{}]),
        ("EulerDiscreteScheduler", SPACINGS + SIGMAS, [{}]),
        ("HeunDiscreteScheduler", SPACINGS + SIGMAS, [{}]),
        ("KDPM2DiscreteScheduler", SPACINGS + SIGMAS, [{}]),
        ("PNDMScheduler", SPACINGS, [{"skip_prk_steps": True}]),
        ("LMSDiscreteScheduler", SPACINGS + SIGMAS, [{}]),
        ("DEISMultistepScheduler", SPACINGS + SIGMAS, [{"solver_order": k} for k in (2, 3)]),
        ("UniPCMultistepScheduler", SPACINGS + SIGMAS, [{"solver_order": k} for k in (2, 3)]),
        ("DPMSolverMultistepScheduler", SPACINGS + SIGMAS + LU, [{"solver_order": k} for k in (2, 3)]),
        ("DPMSolverSinglestepScheduler", SIGMAS, [{"solver_order": k} for k in (2, 3)]),
    ]
    for name, grids, solvers in families:
        cls = getattr(diffusers, name)
        for solver in solvers:
            for grid in grids:
                scheduler = cls.from_config({**config, "_class_name": name}, clip_sample=False, **solver, **grid)
                evaluations = (
                    (n + 1) // 2 if name.startswith(("Heun", "KDPM2")) else n - 1 if name.startswith("PNDM") else n
                )
                try:
                    scheduler.set_timesteps(evaluations)
                except Exception:  # a setting that this n does not allow is no competition
                    continue
                if len(scheduler.timesteps) <= n:
                    label = name.replace("Scheduler", "").replace("Discrete", "").replace("Multistep", "")
                    order = f"-{solver['solver_order']}" if "solver_order" in solver else ""
                    yield f"{label}{order} {'/'.join(str(k if v is True else v) for k, v in grid.items())}", scheduler


def stock_sdes(config: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    families: list[tuple[str, list[dict], dict[str, Any]]] = [
        ("EulerAncestralDiscreteScheduler", SPACINGS, {}),
        ("DDPMScheduler", SPACINGS, {}),
        ("DPMSolverMultistepScheduler", SPACINGS + SIGMAS, {"algorithm_type": "sde-dpmsolver++"}),
        ("SASolverScheduler", SPACINGS + SIGMAS, {}),
        ("DPMSolverSDEScheduler", SPACINGS + SIGMAS, {}),
    ]
    for name, grids, options in families:
        for grid in grids:
            label = f"{name.replace('Scheduler', '')} {'/'.join(str(k if v is True else v) for k, v in grid.items())}"
            arguments = {"clip_sample": False, **options, **grid}
            yield (
                label,
                functools.partial(getattr(diffusers, name).from_config, {**config, "_class_name": name}, **arguments),
            )
