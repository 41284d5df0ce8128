"""The comparison: which cells there are, in which order they are solved, the reference solution, and the errors to it.

Knows which sampler is offered at which number of evaluations, which are compared by default, and how many evaluations
the reference has.  Knows no network, no command and no interface: the command waits for the last state, the Space shows
every one.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from diffusers_sde.comparison.problems import Problem, Tick
from diffusers_sde.errors import UsageError
from diffusers_sde.named_samplers import make_scheduler, process_family, reference_scheduler
from diffusers_sde.sampler_names import DEFAULT_SAMPLERS, SAMPLERS
from diffusers_sde.sampling import lay_out, rmse, sample

REFERENCE_STEPS = 100

Cell = tuple[str, int]  # a sampler and its budget of evaluations


@dataclass(frozen=True)
class Result:
    """One solved cell.

    Attributes:
        sampler, budget: its name and how many evaluations it may make.
        nfe: how many it made.
        seconds: how long that took.
        images: (N, C, H, W), values around [-1, 1], on the CPU.
        errors: (N,), the RMSE of each image to the reference; None for a stochastic sampler and without a reference.
    """

    sampler: str
    budget: int
    nfe: int
    seconds: float
    images: torch.Tensor
    errors: np.ndarray | None = None

    @property
    def mean(self) -> float | None:
        return None if self.errors is None else float(self.errors.mean())

    @property
    def median(self) -> float | None:
        return None if self.errors is None else float(np.median(self.errors))

    def against(self, reference: torch.Tensor) -> Result:
        """With its errors to a reference (N, C, H, W)."""
        stochastic = SAMPLERS[self.sampler].stochastic
        return self if stochastic else replace(self, errors=rmse(self.images, reference).numpy())


@dataclass(frozen=True)
class Comparison:
    """What is known so far.

    Attributes:
        samplers, budgets: rows and columns of the sheet.
        jobs: its cells in the order in which they are solved; a cell that is not among them is not offered.
        reference_steps: evaluations of the reference solution.
        total: evaluations of everything.
        results: the solved cells, in the order of ``jobs``.
        reference: (N, C, H, W), None until it is solved.
        reference_error: its mean RMSE to the solution with half its evaluations, None until everything is solved.
        done: evaluations made, of ``total``.
    """

    samplers: tuple[str, ...]
    budgets: tuple[int, ...]
    jobs: tuple[Cell, ...]
    reference_steps: int
    total: int
    results: tuple[Result, ...] = ()
    reference: torch.Tensor | None = None
    reference_error: float | None = None
    done: int = 0

    @property
    def finished(self) -> bool:
        return self.reference_error is not None

    @property
    def by_sampler(self) -> list[Result]:
        """The results row by row."""
        return sorted(self.results, key=lambda r: (self.samplers.index(r.sampler), r.budget))

    def cell(self, sampler: str, budget: int) -> Result | None:
        """The result of a cell, None where it is not solved or not offered."""
        return next((r for r in self.results if (r.sampler, r.budget) == (sampler, budget)), None)

    def best(self, budget: int) -> float | None:
        """The smallest mean error at a budget."""
        return min((r.mean for r in self.results if r.budget == budget and r.mean is not None), default=None)

    def absence(self, sampler: str, budget: int) -> str | None:
        """Why a cell is not offered, None where it is."""
        return None if (sampler, budget) in self.jobs else f"not calibrated for {budget}"


def compare(
    problem: Problem,
    samplers: Sequence[str],
    budgets: Sequence[int],
    *,
    reference_steps: int | None = None,
    solve_reference: Callable[[int], torch.Tensor] | None = None,
    tick: Tick = lambda: None,
) -> Iterator[Comparison]:
    """Solve a problem with every sampler at every number of evaluations, and with the reference.

    Stop iterating to cancel: nothing is computed between two states that are asked for.

    Args:
        problem: the model and everything but the sampler.
        samplers: names of :data:`diffusers_sde.sampler_names.SAMPLERS`.
        budgets: numbers of evaluations.
        reference_steps: evaluations of the reference; None: :func:`reference_steps_for`.
        solve_reference: the reference solution with a number of evaluations, where it is known already; None: solved.
        tick: called after each evaluation.

    Yields:
        The state before anything is solved, after the first cell, after the reference, after each other cell, and, with
        the error of the reference, at last.

    Raises:
        UsageError: before any work, for a sampler that cannot run, see :func:`check_samplers`.
    """
    samplers, budgets = tuple(dict.fromkeys(samplers)), tuple(sorted(set(budgets)))
    check_samplers(samplers, budgets, problem)
    jobs = tuple((name, n) for n in budgets for name in samplers if offered(name, n, problem))
    steps = reference_steps or reference_steps_for(budgets)
    total = steps + steps // 2 + sum(SAMPLERS[name].evaluations(n) for name, n in jobs)
    state = Comparison(samplers, budgets, jobs, steps, total)
    yield state

    def solved(n: int) -> torch.Tensor:
        return problem.solve(reference_scheduler(problem.config), n, tick)

    problem.solve(reference_scheduler(problem.config), 1, lambda: None)  # a first call would make the first cell slow
    solve_reference = solve_reference or solved
    for name, n in jobs:
        result, done = solve_cell(problem, name, n, tick), state.done + SAMPLERS[name].evaluations(n)
        if state.reference is not None:
            result = result.against(state.reference)
        state = replace(state, results=(*state.results, result), done=done)
        yield state
        if state.reference is None:
            reference = solve_reference(steps)
            results = tuple(result.against(reference) for result in state.results)
            state = replace(state, reference=reference, results=results, done=done + steps)
            yield state
    assert state.reference is not None  # check_samplers left a job
    error = float(rmse(solve_reference(steps // 2), state.reference).mean())
    yield replace(state, reference_error=error, done=total)


def solve_cell(problem: Problem, name: str, budget: int, tick: Tick = lambda: None) -> Result:
    """One cell, without its errors; ``tick`` is called after each evaluation."""
    scheduler = make_scheduler(name, problem.config)
    start = time.perf_counter()
    images = problem.solve(scheduler, SAMPLERS[name].steps(budget), tick)
    return Result(name, budget, len(scheduler.timesteps), time.perf_counter() - start, images)


def reference_steps_for(budgets: Sequence[int]) -> int:
    """Evaluations of the reference solution of a comparison: at least twice those of any cell."""
    return max(REFERENCE_STEPS, 2 * max(budgets))


# -- which samplers, and where --


def available_samplers(problem: Problem) -> list[str]:
    """The names of all samplers that can be had for this model."""
    return [name for name in SAMPLERS if _fits(name, problem)]


def default_samplers(problem: Problem, budgets: Sequence[int], at_most: int | None = None) -> list[str]:
    """What is compared where nothing is asked for: the first ``at_most`` (None: all) of the default samplers of the
    model's family that can be had for it and are offered at one of the ``budgets``."""
    names = [name for name in DEFAULT_SAMPLERS[process_family(problem.config)] if _fits(name, problem)]
    return [name for name in names if any(offered(name, n, problem) for n in budgets)][:at_most]


def offered(name: str, n: int, problem: Problem) -> bool:
    """Whether a sampler is itself at ``n`` evaluations: a calibrated one is, where its learned table is the best known;
    elsewhere it runs the exact solver, which has a name of its own."""
    return not SAMPLERS[name].learned or n in _learned_steps(name, problem)


def check_samplers(names: Sequence[str], budgets: Sequence[int], problem: Problem) -> None:
    """Refuse samplers that cannot run on this model's process or with these numbers of evaluations: each makes a dry
    run without the network (a pipeline lays out its steps itself and cannot).

    Raises:
        UsageError: names the first of them and the remedy.
    """
    for name in names:
        scheduler, numbers = make_scheduler(name, problem.config), [n for n in budgets if offered(name, n, problem)]
        if not numbers:
            known = ", ".join(map(str, _learned_steps(name, problem)))
            raise UsageError(f"Sampler {name} was learned for {known} evaluations: choose one of these numbers.")
        n = numbers[0]
        try:
            for n in numbers if problem.own_loop else ():
                lay_out(scheduler, SAMPLERS[name].steps(n))
                if not sample(lambda x, t: torch.zeros_like(x), scheduler, torch.ones(1, 1, 1, 1)).isfinite().all():
                    raise ValueError("its coefficients are not finite")
        except (ValueError, IndexError, ArithmeticError) as error:
            reason = f"Sampler {name} cannot run with {n} evaluations on this model's process: {error}"
            raise UsageError(f"{reason}; leave it out or choose another number.") from error


def _fits(name: str, problem: Problem) -> bool:
    with contextlib.suppress(UsageError):
        make_scheduler(name, problem.config)
        return True
    return False


def _learned_steps(name: str, problem: Problem) -> list[int]:
    """The numbers of evaluations at which a calibrated scheduler has a table that beat the exact solver."""
    errors = make_scheduler(name, problem.config).errors
    return sorted(n for n, measured in errors.items() if "lost" not in measured)
