"""``diffusers-sde bench --sections defaults``: what the defaults are worth on guided problems, and the search for them.

Knows the candidates that the laws of :mod:`diffusers_sde.defaults` were chosen from, on the development half of the
suite, and how the choice is judged: on the held-out half, against the best of all stock settings chosen anew at each
number of evaluations of each problem.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_sde.benchmarks.common import mean_error, print_table, reference_solution
from diffusers_sde.benchmarks.competition import best_of, laid_out_odes
from diffusers_sde.benchmarks.suite import GUIDANCE, PROCESSES, Problem, problems
from diffusers_sde.configs import path_from_config
from diffusers_sde.named_grids import make_grid
from diffusers_sde.sampling import sample
from diffusers_sde.schedulers import ProbabilityFlowScheduler
from diffusers_sde.stock_configs import canonical_config

STEPS = (4, 5, 6, 8, 10, 15, 20)
REFERENCE_STEPS = 400
CAP = 50.0  # a ratio counts as this much at most, so that one explosion does not hide all else

Grid = Callable[[int], tuple[str, dict[str, float]]]


def _balanced(slope: float, rho: float) -> Grid:
    return lambda n: ("balanced", {"rho": rho, "share": min(0.45 + slope / n, 1.0)})


def _fixed(grid: str, **options: float) -> Grid:
    return lambda n: (grid, options)


# family -> candidate -> its grid for n evaluations
CANDIDATES: dict[str, dict[str, Grid]] = {
    "variance preserving": {
        **{f"balanced {r:g}, share .45 + {k:g}/n": _balanced(k, r) for k in (0.5, 1.7, 3.0) for r in (1.0, 1.1, 1.25)},
        **{f"power {rho:g}": _fixed("power", rho=rho) for rho in (1.0, 1.25, 1.5)},
        **{f"noise_fraction {rho:g}": _fixed("noise_fraction", rho=rho) for rho in (1.0, 1.5)},
        "karras": _fixed("karras"),
        "log_snr": _fixed("log_snr"),
    },
    "flow matching": {
        "power 1.3 - 1/n": lambda n: ("power", {"rho": 1.3 - 1 / n}),
        **{f"power {rho:g}": _fixed("power", rho=rho) for rho in (1.0, 1.15, 1.25, 1.5)},
    },
    "EDM": {
        **{f"noise_fraction {rho:g}": _fixed("noise_fraction", rho=rho) for rho in (1.0, 1.25, 1.5, 2.0)},
        "noise_fraction 2 - 2.5/n": lambda n: ("noise_fraction", {"rho": max(2 - 2.5 / n, 1.0)}),
        "balanced": _fixed("balanced"),
        "karras": _fixed("karras"),
    },
}


def measure(processes: Sequence[str] | None = None, candidates: bool = False) -> None:
    """Print the ratios of the defaults on the held-out half; with ``candidates`` the search on the development half."""
    if candidates:
        return search(processes)
    tables: dict[str, Any] = {title: defaultdict(lambda: defaultdict(list)) for title in ("process", "guidance")}
    for problem, n, best, found in _results("held-out", processes, lambda family: {"default": None}):
        process = problem.name.split(", ", 1)[1].rsplit(",", 1)[0]
        for title, group in (("process", process), ("process", "all"), ("guidance", f"{problem.guidance:g}")):
            tables[title][group][n].append(found["default"] / best)
    for title, groups in tables.items():
        rows = [[name, *(_cell(by_n[n]) for n in STEPS), _cell(_joined(by_n))] for name, by_n in groups.items()]
        header = [title, *(f"{n} NFE" for n in STEPS), "all"]
        print_table(
            "Error over that of the best stock setting, geometric mean (worst), held-out problems", header, rows
        )


def search(processes: Sequence[str] | None = None) -> None:
    """Print each candidate's objective: half the log of the mean square of its ratios, capped."""
    found: dict[str, dict[str, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for problem, n, best, errors in _results("development", processes, CANDIDATES.__getitem__):
        for name, error in errors.items():
            found[problem.family][name][n].append(min(error / best, CAP))
    for family, by_name in found.items():
        rows = [
            [name, *(f"{_objective(by_n[n]):.2f}" for n in STEPS), f"{_objective(_joined(by_n)):.2f}"]
            for name, by_n in by_name.items()
        ]
        rows.sort(key=lambda row: float(row[-1]))
        print_table(f"{family}, development problems: log of the mean ratio", ["", *map(str, STEPS), "all"], rows)


def _results(
    half: str, processes: Sequence[str] | None, candidates: Callable[[str], Mapping[str, Grid | None]]
) -> Iterable[tuple[Problem, int, float, dict[str, float]]]:
    """Of each problem at each number of evaluations the best stock error, and those of the candidates."""
    stock: dict[tuple[str, int], dict[str, Any]] = {}
    count = 3 * len(processes or PROCESSES) * len(GUIDANCE)
    for problem in tqdm(problems(half, processes), total=count, desc=f"{half} problems", leave=False):
        reference = reference_solution(problem.denoiser, problem.noise, problem.config, REFERENCE_STEPS)
        for n in STEPS:
            key = str(problem.config), n
            if key not in stock:  # once for all problems of a process
                stock[key], _ = laid_out_odes(problem.config, n)
            best, _, _ = best_of(stock[key], problem.denoiser, problem.noise, reference)
            if math.isfinite(best):
                grids = candidates(problem.family).items()
                yield problem, n, best, {name: _error(problem, reference, _ours(problem, n, g)) for name, g in grids}


def _ours(problem: Problem, n: int, grid: Grid | None) -> ProbabilityFlowScheduler:
    """Our scheduler with its defaults, on a candidate grid; laid out for ``n`` evaluations."""
    scheduler = ProbabilityFlowScheduler.from_config(problem.config, clip_sample=False)
    if grid is None:
        scheduler.set_timesteps(n)
        return scheduler
    name, options = grid(n)
    times = make_grid(path_from_config(canonical_config(problem.config)), name, n, **options)
    scheduler.set_timesteps(timesteps=times.tolist())
    return scheduler


def _error(problem: Problem, reference: torch.Tensor, scheduler: Any) -> float:
    return mean_error(sample(problem.denoiser, scheduler, problem.noise), reference)


def _joined(by_n: Mapping[int, list[float]]) -> list[float]:
    return list(itertools.chain.from_iterable(by_n.values()))


def _objective(ratios: Sequence[float]) -> float:
    """nan where no stock setting could be run."""
    if not ratios:
        return math.nan
    return 0.5 * math.log(statistics.fmean(ratio**2 for ratio in ratios))


def _cell(ratios: Sequence[float]) -> str:
    """Nothing where no stock setting could be run."""
    if not ratios:
        return "-"
    return f"{statistics.geometric_mean(ratios):.2f} ({max(ratios):.1f})"
