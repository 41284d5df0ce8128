"""The transition of a scheduler's step as a public function, for trainers that re-score what a sampler has drawn.

Knows the row of a run and that only first-order rows are Markov.  Changes no run: steps may be scored in any order.
"""

from __future__ import annotations

from typing import Any

import torch

from diffusers_sde.schedulers.base import TableScheduler, _unchanged
from diffusers_sde.schedulers.compiled import Compiled
from diffusers_sde.schedulers.execution import evaluate_row, for_arithmetic, next_mean
from diffusers_sde.tables import points_of
from diffusers_sde.transitions import GaussianTransition


def transition(
    scheduler: TableScheduler, model_output: torch.Tensor, timestep: Any, sample: torch.Tensor
) -> GaussianTransition:
    """The exact transition ``x' ~ N(mean, std^2 I)`` of a step, as :meth:`TableScheduler.step` takes it to the last
    bit, differentiable in ``model_output`` and ``sample``; without synchronisation, and without a step being taken.

    ``ReverseSDEScheduler(solver_order=1, data_std=c, tau=1.0)`` is a chain of such steps that is exact in law for
    N(0, c^2) data; a list for tau switches the noise on in a window of steps.  ``scheduler.levels`` are the exact
    levels of a run, ``scheduler.set_timesteps(levels=...)`` replays them: re-scored with an unchanged network, a
    rollout has the ratio 1.

        policy = transition(scheduler, network(x, t), t, x)
        x_next = policy.draw(torch.randn_like(x))
        ratio = (transition(scheduler, new_network(x, t), t, x).log_prob(x_next) - policy.log_prob(x_next)).exp()

    Args:
        scheduler: of this package, laid out, of first order.
        model_output: what the network says (N, ...), see :meth:`TableScheduler.step`.
        timestep: an element of ``scheduler.timesteps``.
        sample: the state (N, ...); arithmetic is float32 for half precision.

    Returns:
        :class:`diffusers_sde.transitions.GaussianTransition`.

    Raises:
        ValueError: for a scheduler whose steps read earlier evaluations or are no table's, and for shapes that do not
            fit.
    """
    if not isinstance(scheduler, TableScheduler):
        raise ValueError(
            f"{type(scheduler).__name__} does not say its transition: use "
            "ReverseSDEScheduler.from_config(scheduler.config, solver_order=1)."
        )
    run, i = scheduler._located(timestep, sample)
    compiled = run.compiled
    if compiled is None or i < compiled.begin or not _unchanged(compiled.settings, scheduler._internal_dict):
        compiled = scheduler._compile(run.layout, run.begin if run.begin is not None and run.begin <= i else 0)
    _check_markov(compiled)
    row = compiled.rows[i - compiled.begin]
    model_output, sample = for_arithmetic(model_output, sample, scheduler.config.variance_type)
    evaluation, _ = evaluate_row(row, model_output, sample, scheduler.config if compiled.limits else None)
    mean = next_mean(row, sample, evaluation, ())
    start, end = points_of(scheduler._nodes(run.layout)[i : i + 2])
    return GaussianTransition(mean, row.c if row.noise else 0.0, row.weights[0], start, end)


def _check_markov(compiled: Compiled) -> None:
    """Raise ``ValueError`` for a table with a row that reads earlier evaluations."""
    if any(row.keep for row in compiled.rows):
        raise ValueError(
            "The steps of this scheduler read earlier evaluations, so that a state alone does not say the law of the "
            "next one: use solver_order=1 and corrector=False."
        )
