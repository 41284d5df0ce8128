"""Exact laws of samplers of tokens on small state spaces: every state is evaluated, nothing is drawn."""

from __future__ import annotations

import torch

from diffusers_sde.discrete.oracles import MarkovChain
from diffusers_sde.discrete.processes import DiscreteProcess, absorbing, uniform
from diffusers_sde.schedulers.discrete import Row

INITIAL = [0.5, 0.3, 0.2]
TRANSITION = [[0.8, 0.1, 0.1], [0.1, 0.2, 0.7], [0.3, 0.6, 0.1]]
MILD = [[0.4, 0.35, 0.25], [0.3, 0.3, 0.4], [0.35, 0.4, 0.25]]  # a chain whose tokens say little of each other
MASK = 3


def chain(length: int, transition=TRANSITION) -> MarkovChain:
    return MarkovChain(INITIAL, transition, length)


def process_of(noise: str) -> DiscreteProcess:
    return absorbing(4, MASK) if noise == "masked" else uniform(3)


def all_states(process: DiscreteProcess, length: int) -> torch.Tensor:
    """(S^L, L), in the order of a flat table."""
    return torch.cartesian_prod(*[torch.arange(process.states)] * length).reshape(-1, length)


def clean_laws(oracle, process: DiscreteProcess, x: torch.Tensor, alpha: float) -> torch.Tensor:
    """``p(x_0^l | x_t)`` (N, L, S), exact; 0 for the mask."""
    tokens = oracle.vocabulary
    if process.states > tokens:  # of masked tokens at any time the same, also where there can be none
        alpha = 0.5
    law = oracle.posterior(process.likelihood(x, alpha)[..., :tokens])
    return torch.nn.functional.pad(law, (0, process.states - tokens))


def joint(laws: torch.Tensor) -> torch.Tensor:
    """(N, S^L): the law of a state from independent laws of its positions (N, L, S)."""
    out = laws[:, 0]
    for position in range(1, laws.shape[1]):
        out = (out[:, :, None] * laws[:, position, None]).flatten(1)
    return out


def noisy_law(oracle, process: DiscreteProcess, alpha: float) -> torch.Tensor:
    """``p_t`` (S^L,)."""
    kernel = process.marginal(torch.eye(process.states, dtype=torch.float64)[: oracle.vocabulary], alpha)
    return oracle.table().noised(kernel).probabilities.flatten()


def law_of_sampler(scheduler, oracle, process: DiscreteProcess, steps: int | list[Row]) -> torch.Tensor:
    """The law (S^L,) that a scheduler's transitions lead to, from the true law where they begin: those of so many
    calls, or the rows themselves."""
    if isinstance(steps, int):
        scheduler.set_timesteps(steps)
        steps = scheduler._rows
    states, law = all_states(process, oracle.length), noisy_law(oracle, process, steps[0].start)
    count, first, held = len(states), None, torch.empty(0)
    for row in steps:
        alpha = row.start if row.stage != "second" else float(scheduler._schedule.alpha(row.time))
        clean = clean_laws(oracle, process, states, alpha)
        if row.stage == "second":  # pairs of a step's first state and its intermediate one
            index, star = torch.arange(count).repeat_interleave(count), torch.arange(count).repeat(count)
            scheduler._first = held[index]
            second = joint(scheduler.transition(process, row, states[star], clean[star])).reshape(count, count, count)
            law = torch.einsum("x,xs,xsy->y", law, first, second)
        else:
            step = joint(scheduler.transition(process, row, states, clean))
            held = scheduler._first
            first, law = (step, law) if row.stage == "first" else (None, law @ step)
    return law


def true_law(oracle, process: DiscreteProcess) -> torch.Tensor:
    return noisy_law(oracle, process, 1.0)


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    return float((p - q).abs().sum() / 2)


def frequencies(x: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The share of each sequence in samples (N, L), in the order of the flat table."""
    powers = vocabulary ** torch.arange(x.shape[1] - 1, -1, -1)
    return torch.bincount((x * powers).sum(-1), minlength=vocabulary ** x.shape[1]).double() / len(x)


def entropy_of(law: torch.Tensor) -> float:
    return float(torch.special.entr(law).sum())
