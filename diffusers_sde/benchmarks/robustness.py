"""``diffusers-sde bench --sections robustness``: no selectable setting explodes, few steps and guidance 7.5 included.

Knows every setting of the solvers that a user can select, under a process of each family, and two problems with an
exact answer: a mixture for the error of ODEs and, for SDEs, a normal law, on which the final standard deviation follows
without drawing anything.  Data have standard deviation 1/2; guided, they are pushed from a wider law with weight 7.5.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tqdm.auto import tqdm

from diffusers_sde.analytic import GaussianMixture
from diffusers_sde.benchmarks.common import PROCESSES, mean_error, print_table
from diffusers_sde.named_grids import GRIDS
from diffusers_sde.prediction import to_model
from diffusers_sde.schedulers import DPMSolverScheduler, ProbabilityFlowScheduler, ReverseSDEScheduler, TableScheduler
from diffusers_sde.weights import CLOCKS

STD, NULL_STD, GUIDANCE = 0.5, 0.6, 7.5
FAMILIES: dict[str, dict[str, Any]] = {
    "variance preserving": PROCESSES["linear"],
    "flow matching": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    "EDM": {"sigma_data": STD, "prediction_type": "epsilon"},
}
LIMITS = (2.0, 1.5)  # of the error of an ODE, of the standard deviation of an SDE
DATA_STDS = (0.0, STD, math.inf)
Data = Callable[[torch.Tensor, float, float], torch.Tensor]  # E[x_0 | x] of x, alpha, sigma


def settings(stochastic: bool) -> Iterator[tuple[type[TableScheduler], dict[str, Any]]]:
    """Every solver that a config can name, on every grid."""
    for grid in GRIDS:
        for order, singlestep in itertools.product((1, 2, 3), (False, True)):
            for kind, rule in itertools.product(("dpmsolver", "dpmsolver++"), ("midpoint", "heun")):
                solver = {"algorithm_type": f"sde-{kind}" if stochastic else kind, "solver_type": rule}
                yield DPMSolverScheduler, {"grid": grid, "solver_order": order, "singlestep": singlestep, **solver}
        for order, clock, data_std, corrector in itertools.product((1, 2, 3, 4), CLOCKS, DATA_STDS, (False, True)):
            multistep = {
                "grid": grid,
                "solver_order": order,
                "clock": clock,
                "data_std": data_std,
                "corrector": corrector,
            }
            if not stochastic:
                yield ProbabilityFlowScheduler, multistep
            elif order < 4:
                yield ReverseSDEScheduler, multistep


def run(scheduler: TableScheduler, x: torch.Tensor, data: Data, basis: torch.Tensor | None = None) -> torch.Tensor:
    """The final state, with the noise of step i replaced by ``basis[i]``; for an ODE ``basis`` is None."""
    levels = scheduler.levels
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = float(levels.alpha[i]), float(levels.sigma[i])
        k_x, k_d = to_model(scheduler.path, scheduler.config.prediction_type, alpha, sigma)
        out: Any = scheduler.step(k_x * x + k_d * data(x, alpha, sigma), t, x)
        x = out.prev_sample if basis is None else out.prev_sample_mean + out.noise_std * basis[i]
    return x


def mixture_problem(seed: int) -> tuple[Data, torch.Tensor]:
    """Guided and plain data predictions side by side, (2N, 2), and the noise (N, 2) they start from."""
    g = torch.Generator().manual_seed(seed)
    angles = torch.arange(4, dtype=torch.float64) * math.pi / 2
    means = 0.6 * torch.stack([angles.cos(), angles.sin()], 1)
    mixture = GaussianMixture(torch.ones(4), means, torch.full((4,), 0.07))  # standard deviation 1/2
    noise = torch.randn(16, 2, generator=g, dtype=torch.float64)
    label, null = torch.arange(16) % 4, torch.full((16,), 4)

    def data(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        plain, guided = x.chunk(2)
        free = mixture.posterior_mean(torch.cat([plain, guided]), alpha, sigma, torch.cat([null, null]))
        conditional = mixture.posterior_mean(guided, alpha, sigma, label)
        return torch.cat([free[:16], torch.lerp(free[16:], conditional, GUIDANCE)])

    return data, noise


def normal_problem(x: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
    """Of the two laws N(0, 1/4), plain and guided away from N(0, 0.36), one column each."""
    conditional, null = (alpha * c**2 / ((alpha * c) ** 2 + sigma**2) for c in (STD, NULL_STD))
    return x * torch.tensor([conditional, null + GUIDANCE * (conditional - null)], dtype=torch.float64)


def final_std(scheduler: TableScheduler) -> torch.Tensor:
    """(2,), exact: the state is linear in the first noise and each step's, whose unit vectors are the batch."""
    n = len(scheduler.timesteps)
    unit = torch.eye(n + 1, dtype=torch.float64)[:, :, None].expand(-1, -1, 2)
    end = run(scheduler, unit[0] * scheduler.init_noise_sigma, normal_problem, unit[1:])
    return end.square().sum(0).sqrt()


def ode_errors(scheduler: TableScheduler, data: Data, noise: torch.Tensor, reference: torch.Tensor) -> list[float]:
    """The plain and the guided error, each over the root mean square of the right samples (guided: 1.0)."""
    start = torch.cat([noise, noise]) * scheduler.init_noise_sigma
    pairs = zip(run(scheduler, start, data).chunk(2), reference.chunk(2), strict=True)
    return [mean_error(mine, right) / float(right.square().mean().sqrt()) for mine, right in pairs]


def measure(seed: int, steps: tuple[int, ...] = (5, 10)) -> None:
    """The worst cell of each family of processes, ODE and SDE, plain and guided."""
    data, noise = mixture_problem(seed)
    rows, refused = [], 0
    for (family, process_config), stochastic in itertools.product(FAMILIES.items(), (False, True)):
        fine: TableScheduler
        if stochastic:
            fine = ReverseSDEScheduler(**process_config, solver_order=1, corrector=False, grid="balanced", rho=1.5)
            fine.set_timesteps(400)
            scale = final_std(fine).clamp(min=STD)
            judge: Callable[[TableScheduler], list[float]] = lambda s, scale=scale: (final_std(s) / scale).tolist()  # type: ignore[misc]  # noqa: E731
        else:
            fine = ProbabilityFlowScheduler(**process_config, grid="balanced", rho=1.25, data_std=STD)
            fine.set_timesteps(240)
            reference = run(fine, torch.cat([noise, noise]) * fine.init_noise_sigma, data)
            judge = functools.partial(ode_errors, data=data, noise=noise, reference=reference)
        found: list[tuple[list[float], str]] = []
        for n, (cls, options) in tqdm(
            list(itertools.product(steps, settings(stochastic))), desc=f"robustness, {family}", leave=False
        ):
            scheduler = cls(**process_config, **options)
            scheduler.set_timesteps(n)
            try:
                found.append((judge(scheduler), f"{cls.__name__} {n} NFE, {' '.join(map(str, options.values()))}"))
            except ValueError:  # noise prediction from zero SNR
                refused += 1
        for i, problem in enumerate(("plain", f"guidance {GUIDANCE:g}")):
            cells = [(values[i] if math.isfinite(values[i]) else math.inf, name) for values, name in found]
            (worst, setting), limit = max(cells), LIMITS[stochastic]
            above = sum(value > limit for value, _ in cells)
            kind = "SDE, std" if stochastic else "ODE, error"
            row = [f"{family}, {problem}", kind, str(len(found)), f"{above} > {limit:g}", f"{worst:.2f}", setting]
            rows.append(row)
    title = f"Worst of every selectable setting, over the size of the right samples ({refused} runs refused)"
    print_table(title, ["process", "measure", "runs", "above", "worst", "setting"], rows)
