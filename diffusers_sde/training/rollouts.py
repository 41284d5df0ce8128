"""Rollouts: what this package's samplers draw from a network, step by step, with the law of each step.

Knows the scheduler of a process, a network as a function of state and time, and counter-based noise: a picture depends
on its own seed only.  Knows no rewards and no objectives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffusers_sde import noise
from diffusers_sde.schedulers import ProbabilityFlowScheduler, ReverseSDEScheduler, transition
from diffusers_sde.transitions import GaussianTransition

Predict = Callable[[torch.Tensor, Any], torch.Tensor]  # of states (N, ...) and their time, a float or (N,) floats
_OWN = {"clip_sample": False, "thresholding": False, "use_dynamic_shifting": False}


@dataclass(frozen=True)
class Chain:
    """The Markov chain of a first-order sampler that is laid out.

    Args:
        scheduler: :func:`diffusers_sde.transition` is its law.
    """

    scheduler: ReverseSDEScheduler

    def __len__(self) -> int:
        return len(self.scheduler.timesteps)

    def step(self, predict: Predict, k: int, x: torch.Tensor) -> GaussianTransition:
        """The transition of step k from the states x (N, ...)."""
        time = float(self.scheduler.levels.time[k])
        return transition(self.scheduler, predict(x, time), self.scheduler.timesteps[k], x)


def make_chain(
    config: Mapping[str, Any],
    steps: int,
    *,
    tau: float | Sequence[float] = 1.0,
    data_std: float = 0.0,
    device: Any = None,
) -> Chain:
    """A chain from noise to data.

    Args:
        config: of the process.
        steps: evaluations of the network.
        tau: the noise level, or one for each step; at 1 the chain forgets its first state.
        data_std: of data for which it is exact in law at any number of steps; 0: data prediction (DDPM's steps), whose
            last step returns x_0 without noise.
        device: of the timesteps.
    """
    options: dict[str, Any] = {"solver_order": 1, "corrector": False, "eta": None, **_OWN}
    final = "exact" if data_std else "denoise"
    taus = tau if isinstance(tau, float | int) else [float(t) for t in tau]
    scheduler = ReverseSDEScheduler.from_config(config, tau=taus, data_std=data_std, final=final, **options)
    scheduler.set_timesteps(steps, device=device)
    return Chain(scheduler)


@dataclass(frozen=True)
class Trajectory:
    """What a chain has drawn.

    Args:
        states: T + 1 of (N, ...), from noise to data.
        steps: the T transitions between them.
    """

    states: list[torch.Tensor]
    steps: list[GaussianTransition]

    @property
    def noisy(self) -> list[int]:
        """The steps that drew noise."""
        return [k for k, step in enumerate(self.steps) if step.std > 0]


@torch.no_grad()
def roll_out(chain: Chain, predict: Predict, seeds: torch.Tensor, shape: Sequence[int]) -> Trajectory:
    """A trajectory of the chain.

    Args:
        predict: the network.
        seeds: one for each sample (N,), int64, on the device.
        shape: of a sample.
    """
    size = (len(seeds), *shape)
    states, steps = [first_state(chain.scheduler, seeds, shape)], []
    for k in range(len(chain)):
        step = chain.step(predict, k, states[-1])
        steps.append(step)
        states.append(step.draw(noise.normals(seeds, k + 1, size)) if step.std else step.mean)
    return Trajectory(states, steps)


def first_state(scheduler: Any, seeds: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The noise that a sampler starts from (N, ...), one seed (N,) a sample."""
    return noise.normals(seeds, 0, (len(seeds), *shape)) * scheduler.init_noise_sigma


@torch.no_grad()
def draw_samples(
    config: Mapping[str, Any], steps: int, tau: float, predict: Predict, seeds: torch.Tensor, shape: Sequence[int]
) -> torch.Tensor:
    """Samples (N, ...) of the best sampler for so few steps: of the ODE at tau = 0, else of the reverse SDE."""
    own: dict[str, Any] = {} if tau == 0 else {"tau": tau}
    cls = ProbabilityFlowScheduler if tau == 0 else ReverseSDEScheduler
    scheduler = cls.from_config(config, **own, **_OWN)
    scheduler.set_timesteps(steps, device=seeds.device)
    x = first_state(scheduler, seeds, shape)
    for time, t in zip(scheduler.levels.time.tolist(), scheduler.timesteps, strict=False):
        x = scheduler.step(predict(x, time), t, x, return_dict=False)[0]
    return x
