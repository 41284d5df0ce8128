"""The competition: every scheduler of diffusers, deterministic or stochastic, with every grid that it offers, and the
published samplers that diffusers does not have.

Knows these settings, how many steps give each so many evaluations, and the best of them on a problem.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import diffusers
import torch

from diffusers_sde.benchmarks.common import mean_error
from diffusers_sde.calibration.stock import fitting_samplers
from diffusers_sde.named_samplers import make_scheduler, process_family
from diffusers_sde.names import sampler
from diffusers_sde.sampler_names import SAMPLERS
from diffusers_sde.sampling import Denoiser, lay_out, sample

SPACINGS = [{"timestep_spacing": s} for s in ("trailing", "linspace", "leading")]
SIGMAS = [{f"use_{s}_sigmas": True} for s in ("karras", "exponential", "beta")]
LU = [{"use_lu_lambdas": True}]
PUBLISHED_ODES = ("res_2m", "res_3m", "res_2s", "res_3s")
PUBLISHED_SDES = ("er_sde", "seeds_2", "seeds_3")
PUBLISHED_SCHEDULES = ("turbo", "karras", "exponential", "beta57")


_ORDERS: list[dict[str, Any]] = [{"solver_order": k} for k in (2, 3)]
# named sampler, grids, solvers: what these offer beyond their defaults
_OF_FLOW: list[tuple[str, list[dict], list[dict]]] = [
    ("euler", SIGMAS, [{}]),
    ("dpm++2m", [{}, *SIGMAS], _ORDERS),
    ("unipc", [{}, *SIGMAS], _ORDERS),
]
_OF_EDM: list[tuple[str, list[dict], list[dict]]] = [
    ("euler", [{"sigma_schedule": "exponential"}], [{}]),
    ("dpm++2m", [{"sigma_schedule": s} for s in ("karras", "exponential")], _ORDERS),
]


def stock_odes(config: dict[str, Any], n: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every deterministic scheduler of diffusers with every grid it offers.

    Args:
        config: of the process.
        n: evaluations.

    Yields:
        A setting in words, and what makes its scheduler, laid out for ``n`` evaluations; that may raise anything.
    """
    family = process_family(config)
    if family != "variance preserving":
        for name in fitting_samplers(config, stochastic=False)[0]:
            yield name, functools.partial(_named, name, config, n)
        for name, grids, solvers in _OF_FLOW if family == "flow matching" else _OF_EDM:
            for solver, grid in itertools.product(solvers, grids):
                options = {**solver, **grid}
                yield f"{name} {_words(options)}", functools.partial(_named, name, config, n, **options)
        return
    families: list[tuple[str, list[dict], list[dict]]] = [
        ("DDIMScheduler", SPACINGS, [{}]),
        ("EulerDiscreteScheduler", SPACINGS + SIGMAS, [{}]),
        ("HeunDiscreteScheduler", SPACINGS + SIGMAS, [{}]),
        ("KDPM2DiscreteScheduler", SPACINGS + SIGMAS, [{}]),
        ("PNDMScheduler", SPACINGS, [{"skip_prk_steps": True}]),
        ("LMSDiscreteScheduler", SPACINGS + SIGMAS, [{}]),
        ("DEISMultistepScheduler", SPACINGS + SIGMAS, _ORDERS),
        ("UniPCMultistepScheduler", SPACINGS + SIGMAS, _ORDERS),
        ("DPMSolverMultistepScheduler", SPACINGS + SIGMAS + LU, _ORDERS),
        ("DPMSolverSinglestepScheduler", SIGMAS, _ORDERS),
    ]
    for name, grids, solvers in families:
        for solver in solvers:
            for grid in grids:
                label = name.replace("Scheduler", "").replace("Discrete", "").replace("Multistep", "")
                order = f"-{solver['solver_order']}" if "solver_order" in solver else ""
                yield f"{label}{order} {_words(grid)}", functools.partial(_laid_out, name, config, n, **solver, **grid)


def _words(grid: dict[str, Any]) -> str:
    return "/".join(str(key if value is True else value) for key, value in grid.items())


def _named(name: str, config: dict[str, Any], n: int, **options: Any) -> Any:
    scheduler = make_scheduler(name, config)
    if options:
        scheduler = type(scheduler).from_config(scheduler.config, **options)
    lay_out(scheduler, SAMPLERS[name].steps(n))
    return scheduler


def _laid_out(name: str, config: dict[str, Any], n: int, **options: Any) -> Any:
    scheduler = getattr(diffusers, name).from_config({**config, "_class_name": name}, clip_sample=False, **options)
    two_stage, one_more = name.startswith(("Heun", "KDPM2")), name.startswith("PNDM")
    scheduler.set_timesteps((n + 1) // 2 if two_stage else n - 1 if one_more else n)
    if len(scheduler.timesteps) > n:
        raise ValueError(f"It makes {len(scheduler.timesteps)} evaluations instead of {n}.")
    return scheduler


def best_stock_ode(
    config: dict[str, Any], n: int, denoiser: Denoiser, noise: torch.Tensor, reference: torch.Tensor
) -> tuple[float, str, list[str]]:
    """The best of :func:`stock_odes` on a problem.

    Args:
        config, n: see :func:`stock_odes`.
        denoiser, noise, reference: see :func:`best_of`.

    Returns:
        Its error, its name, and which settings were left out, since they refuse this number of evaluations or crash.
    """
    schedulers, refused = laid_out_odes(config, n)
    error, name, crashed = best_of(schedulers, denoiser, noise, reference)
    return error, name, [f"{setting} at {n} ({reason})" for setting, reason in {**refused, **crashed}.items()]


def laid_out_odes(config: dict[str, Any], n: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Those of :func:`stock_odes` that can be laid out, which takes longer than to run them on a mixture.

    Args:
        config, n: see :func:`stock_odes`.

    Returns:
        The schedulers by name, and by name the exceptions of those that refuse this number of evaluations or crash.
    """
    schedulers, refused = {}, {}
    for name, make in stock_odes(config, n):
        try:
            schedulers[name] = make()
        except Exception as error:  # a stock scheduler may fail on its own grid in any way
            refused[name] = type(error).__name__
    return schedulers, refused


def best_of(
    schedulers: Mapping[str, Any], denoiser: Denoiser, noise: torch.Tensor, reference: torch.Tensor
) -> tuple[float, str, dict[str, str]]:
    """The best scheduler on a problem.

    Args:
        schedulers: laid out, by name; copies of them run.
        denoiser: the network.
        noise: (N, ...), to start from.
        reference: (N, ...), the solution.

    Returns:
        Its error (inf where all of them crashed), its name, and by name the exceptions of those that crashed.
    """
    best, crashed = (float("inf"), ""), {}
    for name, scheduler in schedulers.items():
        try:
            best = min(best, (mean_error(sample(denoiser, copy.deepcopy(scheduler), noise), reference), name))
        except Exception as error:  # in any way
            crashed[name] = type(error).__name__
    return *best, crashed


def published(names: Sequence[str], config: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Published samplers that diffusers does not have, on the grids that people run them on.

    Args:
        names: of :data:`diffusers_sde.published.RECIPES`.
        config: of the process.

    Yields:
        A setting in words, the name first, and what makes its scheduler.
    """
    for name in names:
        for schedule in PUBLISHED_SCHEDULES:
            yield f"{name} {schedule}", functools.partial(sampler, name, config, schedule=schedule)


def stock_sdes(config: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every stochastic scheduler of diffusers with every grid it offers.

    Args:
        config: of the process, variance preserving.

    Yields:
        A setting in words, and what makes its scheduler.
    """
    families: list[tuple[str, list[dict], dict[str, Any]]] = [
        ("EulerAncestralDiscreteScheduler", SPACINGS, {}),
        ("DDPMScheduler", SPACINGS, {}),
        ("DPMSolverMultistepScheduler", SPACINGS + SIGMAS, {"algorithm_type": "sde-dpmsolver++"}),
        ("SASolverScheduler", SPACINGS + SIGMAS, {}),
        ("DPMSolverSDEScheduler", SPACINGS + SIGMAS, {}),
    ]
    for name, grids, options in families:
        for grid in grids:
            label = f"{name.replace('Scheduler', '')} {_words(grid)}"
            arguments = {"clip_sample": False, **options, **grid}
            yield (
                label,
                functools.partial(getattr(diffusers, name).from_config, {**config, "_class_name": name}, **arguments),
            )
